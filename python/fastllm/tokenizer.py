"""Text to tokens and back, over the `tokenizers` library; `transformers` only where nothing else can read a model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from fastllm.errors import LoadError
from fastllm.loader.files import check_file, read_json
from fastllm.template_renderer import TemplateRenderer

_LONG_TEXT = 2000  # characters or tokens; from here on other threads run meanwhile: only batches give up the GIL


class TooManyTokens(ValueError):
    """A text has `count` tokens, more than the caller takes."""

    def __init__(self, count: int) -> None:
        super().__init__(f"The text has {count} tokens.")
        self.count = count


class Tokenizer:
    """A model's tokenizer with its special tokens and chat template. Immutable once loaded; safe to share by threads.

    special_tokens: names such as "bos_token" to their text. chat_template: Jinja, or named templates.
    """

    def __init__(
        self,
        backend: FastTokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | dict[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        backend.no_padding()
        backend.no_truncation()
        self._added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self.templates = TemplateRenderer()
        self.byte_level = _decoder_type(backend) == "ByteLevel"
        self._stream_bytes: dict[int, bytes] = {}  # of the tokens seen so far

    @property
    def vocab_size(self) -> int:
        """Entries, added tokens included; the model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id_of("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id_of("pad_token")

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True, most: int | None = None) -> list[int]:
        """Raises TooManyTokens, before it makes a list of them, for a text of more than `most` tokens."""
        if len(text) < _LONG_TEXT:
            encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        else:
            encoding = self.backend.encode_batch([text], add_special_tokens=add_special_tokens)[0]
        count = len(encoding)
        if most is not None and count > most:
            del encoding  # here: the traceback would keep it for whichever thread collects next, for 0.2 s
            raise TooManyTokens(count)
        return encoding.ids

    def decode(self, ids: int | Sequence[int], skip_special_tokens: bool = True) -> str:
        chosen = [ids] if isinstance(ids, int) else ids if isinstance(ids, list) else list(ids)
        if len(chosen) < _LONG_TEXT:
            return self.backend.decode(chosen, skip_special_tokens=skip_special_tokens)
        return self.backend.decode_batch([chosen], skip_special_tokens=skip_special_tokens)[0]

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def token_str(self, token_id: int) -> str:
        """The text of one token alone; bytes that are no character become U+FFFD. Special tokens are spelled out."""
        return self.backend.decode([token_id], skip_special_tokens=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The tokens as the vocabulary spells them; "" for ids it does not have."""
        return [self.backend.id_to_token(token_id) or "" for token_id in ids]

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes one token stands for; empty for ids outside the vocabulary."""
        if token_id in self._added:
            return self._added[token_id].content.encode()
        piece = self.backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self.byte_level:
            return _bytes_of(piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    def stream_bytes(self, token_id: int) -> bytes:
        """What a byte-level decoder appends for this token; unlike token_bytes, added tokens are decoded too."""
        known = self._stream_bytes.get(token_id)
        if known is None:
            piece = self.backend.id_to_token(token_id)
            known = self._stream_bytes[token_id] = b"" if piece is None else _bytes_of(piece)
        return known

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt text of a conversation. Raises ValueError saying what the template or the messages lack."""
        return self.templates.render(
            chat_template or self.template_for(tools),
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            continue_final_message=continue_final_message,
            **{**self.special_tokens, **kwargs},
        )

    def template_for(self, tools: Sequence[Mapping[str, Any]] | None) -> str | None:
        if isinstance(self.chat_template, dict):
            named = self.chat_template
            return (named.get("tool_use") if tools else None) or named.get("default")
        return self.chat_template


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder. Raises LoadError if there is none."""
    config = _read_json(folder / "tokenizer_config.json")
    file = folder / "tokenizer.json"
    backend = _parse(file) if file.is_file() else _convert_with_transformers(folder)
    special = {**_special_tokens(_read_json(folder / "special_tokens_map.json")), **_special_tokens(config)}
    return Tokenizer(backend, special, _chat_template(folder, config))


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are bytes, then a few special tokens and a plain chat template; for models without files."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers

    vocab = {piece: byte for byte, piece in _byte_pieces().items()}
    backend = FastTokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return Tokenizer(backend, special, template)


def _byte_pieces() -> dict[int, str]:
    """GPT-2's printable character for every byte: itself where printable, else 256 and up in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


_BYTE_OF_CHAR = {char: byte for byte, char in _byte_pieces().items()}


def _bytes_of(piece: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in piece])
    except KeyError:
        return piece.encode()


def _decoder_type(backend: FastTokenizer) -> str | None:
    return None if backend.decoder is None else type(backend.decoder).__name__


def _parse(file: Path) -> FastTokenizer:
    check_file(file)
    try:
        return FastTokenizer.from_file(str(file))
    except BaseException as error:  # the tokenizers library raises bare Exceptions, and panics beyond them
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise LoadError(f"{file} cannot be read: {error}.") from error


def _convert_with_transformers(folder: Path) -> FastTokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise LoadError(
            f"{folder} has no tokenizer.json, and converting another format needs `pip install transformers`."
        ) from error
    try:
        backend = AutoTokenizer.from_pretrained(str(folder), use_fast=True).backend_tokenizer
    except Exception as error:  # transformers raises many kinds here
        raise LoadError(f"{folder} has no tokenizer.json and no other tokenizer that can be read: {error}") from error
    if not isinstance(backend, FastTokenizer):
        raise LoadError(f"The tokenizer in {folder} has no fast version.")
    return backend


def _read_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        check_file(file)
        try:
            return file.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise LoadError(f"{file} is not UTF-8: {error}.") from error
    given = _read_json(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(given, list):
        pairs = [(t.get("name"), t.get("template")) for t in given if isinstance(t, dict)]
        return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
    return given if isinstance(given, str) else None
