"""The tokenizer inside a GGUF file, rebuilt as a `tokenizers` Tokenizer.

GGUF keeps the vocabulary, the merges and the name of the pre-tokenizer, not its rules; those are listed here.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from fastllm.errors import LoadError
from fastllm.loader.gguf import GgufFile

# tokenizer.ggml.token_type
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_PATTERN = _WORDS + r"\p{N}{1,3}" + _REST
_QWEN2_PATTERN = _WORDS + r"\p{N}" + _REST
_TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT_PATTERNS = {
    "llama-bpe": _LLAMA3_PATTERN,
    "llama3": _LLAMA3_PATTERN,
    "llama-v3": _LLAMA3_PATTERN,
    "smaug-bpe": _LLAMA3_PATTERN,
    "qwen2": _QWEN2_PATTERN,
    "deepseek-r1-qwen": _QWEN2_PATTERN,
    "tekken": _TEKKEN_PATTERN,
}
_DIGITS_FIRST = ("smollm", "starcoder", "refact", "command-r")
_PLAIN_GPT2 = ("gpt-2", "gpt2", "default", "phi-2", "mpt", "olmo")


def gguf_tokenizer(file: GgufFile) -> Tokenizer:
    """Raises LoadError naming the tokenizer model or pre-tokenizer that is not supported."""
    meta = file.metadata
    tokens = meta.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise LoadError(f"{file.path} holds no tokenizer vocabulary; pass --tokenizer with a folder or a hub id.")
    kind = meta.get("tokenizer.ggml.model")
    try:
        if kind == "gpt2":
            tokenizer = _byte_level_bpe(file, tokens)
        elif kind == "llama":
            tokenizer = _sentencepiece(file, tokens)
        else:
            raise LoadError(f"{file.path}: the tokenizer {kind!r} is not supported; supported are 'gpt2' and 'llama'.")
        _add_special_tokens(tokenizer, meta, tokens)
    except LoadError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions for malformed vocabularies
        raise LoadError(f"{file.path}: the tokenizer cannot be built: {error}.") from error
    return tokenizer


def special_token(file: GgufFile, which: str) -> str | None:
    """The text of the bos, eos, padding or unknown token, if the file names one."""
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    index = file.metadata.get(f"tokenizer.ggml.{which}_token_id")
    return tokens[index] if type(index) is int and 0 <= index < len(tokens) else None


def _byte_level_bpe(file: GgufFile, tokens: list[str]) -> Tokenizer:
    meta = file.metadata
    merges = [_pair(file, merge) for merge in meta.get("tokenizer.ggml.merges", [])]
    model = models.BPE(vocab=_vocab(tokens), merges=merges, fuse_unk=False)
    tokenizer = Tokenizer(model)
    name = meta.get("tokenizer.ggml.pre", "default")
    steps: list[Any]
    if name in _SPLIT_PATTERNS:
        split = pre_tokenizers.Split(Regex(_SPLIT_PATTERNS[name]), behavior="isolated", invert=False)
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        model.ignore_merges = name not in ("qwen2", "deepseek-r1-qwen")
    elif name in _DIGITS_FIRST:
        digits = pre_tokenizers.Digits(individual_digits=True)
        steps = [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    elif name in _PLAIN_GPT2:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    else:
        known = sorted([*_SPLIT_PATTERNS, *_DIGITS_FIRST, *_PLAIN_GPT2])
        raise LoadError(
            f"{file.path}: the pre-tokenizer {name!r} is not known; known are {', '.join(known)}. "
            "Pass --tokenizer with the model's original tokenizer."
        )
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GgufFile, tokens: list[str]) -> Tokenizer:
    """SentencePiece BPE: merges follow from the scores, which rank every piece that two others make."""
    scores = file.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise LoadError(f"{file.path}: tokenizer.ggml.scores must have one entry per token.")
    vocab = _vocab(tokens)
    ranked: list[tuple[float, int, int, str, str]] = []
    for piece, index in vocab.items():
        for cut in range(1, len(piece)):
            left, right = vocab.get(piece[:cut]), vocab.get(piece[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[index], left, right, piece[:cut], piece[cut:]))
    ranked.sort()
    unknown = special_token(file, "unknown")
    merges = [(left, right) for *_, left, right in ranked]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip: list[Any] = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _vocab(tokens: list[str]) -> dict[str, int]:
    vocab: dict[str, int] = {}
    for index, token in enumerate(tokens):
        vocab.setdefault(token, index)
    return vocab


def _pair(file: GgufFile, merge: Any) -> tuple[str, str]:
    left, separator, right = merge.partition(" ") if isinstance(merge, str) else ("", "", "")
    if not separator or not left or not right:
        raise LoadError(f"{file.path}: {merge!r} is not a merge of two tokens.")
    return left, right


def _add_special_tokens(tokenizer: Tokenizer, meta: dict[str, Any], tokens: list[str]) -> None:
    types = meta.get("tokenizer.ggml.token_type", [])
    for kind, special in ((_CONTROL, True), (_UNKNOWN, True), (_USER_DEFINED, False)):
        chosen = [tokens[i] for i, t in enumerate(types[: len(tokens)]) if t == kind]
        added = [AddedToken(t, special=special, normalized=False) for t in chosen]
        if special:
            tokenizer.add_special_tokens(added)
        else:
            tokenizer.add_tokens(added)
    # Llama's files without the key mean "yes" for SentencePiece and "no" otherwise.
    wants_bos = meta.get("tokenizer.ggml.add_bos_token", meta.get("tokenizer.ggml.model") == "llama")
    template = ["$A"]
    specials: dict[str, int] = {}
    for key, wanted in (("bos", wants_bos), ("eos", meta.get("tokenizer.ggml.add_eos_token", False))):
        index = meta.get(f"tokenizer.ggml.{key}_token_id")
        if wanted and type(index) is int and 0 <= index < len(tokens):
            specials[tokens[index]] = index
            template = [tokens[index], *template] if key == "bos" else [*template, tokens[index]]
    if specials:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, pair=[*template, "$B"], special_tokens=list(specials.items())
        )
