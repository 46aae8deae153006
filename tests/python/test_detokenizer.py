"""Streaming text: equal to decoding at once, whole characters only, and stop strings never leak."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers

from fastllm import SamplingParams
from fastllm.detokenizer import IncrementalDetokenizer
from fastllm.tokenizer import Tokenizer, byte_tokenizer


def sentencepiece_tokenizer() -> Tokenizer:
    """The decoder of Llama 2: spaces as U+2581, unknown characters as byte tokens, the first space stripped."""
    pieces = ["<unk>", "▁", *"abcdefghij.,", *[f"<0x{b:02X}>" for b in range(256)]]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = FastTokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return Tokenizer(backend)


TOKENIZERS = {"byte_level": byte_tokenizer, "sentencepiece": sentencepiece_tokenizer}


def random_text(rng: random.Random) -> str:
    ranges = [(0x20, 0x7E), (0x61, 0x6A), (0xA0, 0x24F), (0x4E00, 0x4E80), (0x1F600, 0x1F640), (0x0900, 0x0950)]
    chosen = (rng.choice(ranges) for _ in range(rng.randrange(1, 40)))
    return "".join(chr(rng.randint(low, high)) for low, high in chosen)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_does_not_depend_on_how_many_tokens_come_at_once(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    tokenizer = TOKENIZERS[kind]()
    for _ in range(50):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 60))]
        one_by_one, in_pieces = (IncrementalDetokenizer(tokenizer, SamplingParams()) for _ in range(2))
        expected = "".join(one_by_one.add([id]) for id in ids) + one_by_one.finish()
        text, at = "", 0
        while at < len(ids):
            count = rng.randrange(1, 20)
            text += in_pieces.add(ids[at : at + count])
            at += count
        assert text + in_pieces.finish() == expected == in_pieces.text
        assert in_pieces.num_tokens == one_by_one.num_tokens == len(ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_streamed_text_equals_whole_decode(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    tokenizer = TOKENIZERS[kind]()
    for _ in range(200):
        text = random_text(rng)
        ids = tokenizer.encode(text)
        stream = IncrementalDetokenizer(tokenizer, SamplingParams())
        seen = ""
        at = 0
        while at < len(ids):
            step = rng.randrange(1, 4)
            seen += stream.add(ids[at : at + step])
            at += step
            assert text.startswith(seen), "only whole characters that belong to the text may be given out"
        seen += stream.finish()
        assert seen == stream.text == tokenizer.decode(ids) == text


def test_invalid_bytes_become_replacement_characters_as_in_whole_decode(seed: int) -> None:
    rng = random.Random(seed)
    tokenizer = byte_tokenizer()
    for _ in range(300):
        ids = [rng.randrange(256) for _ in range(rng.randrange(1, 12))]
        stream = IncrementalDetokenizer(tokenizer, SamplingParams())
        assert "".join(stream.add([i]) for i in ids) + stream.finish() == tokenizer.decode(ids), ids


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("include", [False, True])
def test_stop_string_is_found_at_every_split(kind: str, include: bool) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer.encode("abc.jjdef")
    for cut in range(len(ids) + 1):
        params = SamplingParams(stop=["jjd", "nothing"], include_stop_str_in_output=include)
        stream = IncrementalDetokenizer(tokenizer, params)
        seen = stream.add(ids[:cut]) + stream.add(ids[cut:])
        seen += stream.finish()
        assert seen == stream.text == ("abc.jjd" if include else "abc.")
        assert stream.stop_reason == "jjd"
        assert stream.num_tokens == len(ids) - 2  # those after the stop string are not taken


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    tokenizer = byte_tokenizer()
    stream = IncrementalDetokenizer(tokenizer, SamplingParams(stop=["END"]))
    given = [stream.add([i]) for i in tokenizer.encode("xENENx")]
    assert given == ["x", "", "", "EN", "", "ENx"]


def test_held_text_is_given_out_at_the_end() -> None:
    tokenizer = byte_tokenizer()
    stream = IncrementalDetokenizer(tokenizer, SamplingParams(stop=["END"]))
    assert stream.add(tokenizer.encode("xEN")) == "x"
    assert stream.finish() == "EN"


def test_stop_string_within_min_tokens_is_text() -> None:
    tokenizer = byte_tokenizer()
    stream = IncrementalDetokenizer(tokenizer, SamplingParams(stop=["a"], min_tokens=3, max_tokens=9))
    stream.add(tokenizer.encode("aaaxaz"))
    assert (stream.text, stream.stop_reason) == ("aaax", "a")


def test_special_tokens_are_hidden_unless_asked_for() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("hi<|im_end|>")
    for skip, text in ((True, "hi"), (False, "hi<|im_end|>")):
        stream = IncrementalDetokenizer(tokenizer, SamplingParams(skip_special_tokens=skip))
        assert stream.add(ids) + stream.finish() == text


def test_demo_tokenizer_streams_what_it_decodes(demo_gguf: str, seed: int) -> None:
    from fastllm.engine_args import EngineArgs
    from fastllm.loader.model import open_model

    tokenizer = open_model(EngineArgs(model=demo_gguf)).tokenizer
    rng = random.Random(seed)
    for _ in range(100):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 30))]
        stream = IncrementalDetokenizer(tokenizer, SamplingParams())
        assert "".join(stream.add([i]) for i in ids) + stream.finish() == tokenizer.decode(ids), ids


def test_window_stream_follows_a_saved_tokenizer(tmp_path: Path) -> None:
    sentencepiece_tokenizer().backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(FastTokenizer.from_file(str(tmp_path / "tokenizer.json")))
    stream = IncrementalDetokenizer(tokenizer, SamplingParams())
    assert [stream.add([i]) for i in tokenizer.encode("a 你b")] == ["", "a", " ", "", "", "你", "b"]
