"""GGUF files that are damaged or made to do harm: a file made here is changed in one place at a time."""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_files import load, refusal

from fastllm.errors import FastllmError


def g_string(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def g_key(key: str | bytes, kind: int, value: bytes) -> bytes:
    return g_string(key) + struct.pack("<I", kind) + value


def g_u32(value: int) -> bytes:
    return struct.pack("<I", value)


def g_strings(values: list[str]) -> bytes:
    return struct.pack("<IQ", 8, len(values)) + b"".join(map(g_string, values))


TOKENS = [chr(256 + i) for i in range(64)]
KEYS: dict[str, bytes] = {
    "arch": g_key("general.architecture", 8, g_string("llama")),
    "layers": g_key("llama.block_count", 4, g_u32(1)),
    "context": g_key("llama.context_length", 4, g_u32(128)),
    "hidden": g_key("llama.embedding_length", 4, g_u32(32)),
    "inner": g_key("llama.feed_forward_length", 4, g_u32(64)),
    "heads": g_key("llama.attention.head_count", 4, g_u32(2)),
    "eps": g_key("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)),
    "model": g_key("tokenizer.ggml.model", 8, g_string("gpt2")),
    "pre": g_key("tokenizer.ggml.pre", 8, g_string("gpt-2")),
    "tokens": g_key("tokenizer.ggml.tokens", 9, g_strings(TOKENS)),
    "merges": g_key("tokenizer.ggml.merges", 9, g_strings([])),
    "eos": g_key("tokenizer.ggml.eos_token_id", 4, g_u32(1)),
}
SHAPES: dict[str, list[int]] = {
    "token_embd.weight": [32, 64],
    "output_norm.weight": [32],
    **{f"blk.0.{name}.weight": [32] for name in ("attn_norm", "ffn_norm")},
    **{f"blk.0.attn_{name}.weight": [32, 32] for name in ("q", "k", "v", "output")},
    "blk.0.ffn_gate.weight": [32, 64],
    "blk.0.ffn_up.weight": [32, 64],
    "blk.0.ffn_down.weight": [64, 32],
}


class Gguf:
    """A tiny model as a GGUF file, every part of which can be replaced before it is written."""

    def __init__(self) -> None:
        self.magic, self.version = b"GGUF", g_u32(3)
        self.keys = dict(KEYS)
        self.num_keys: int | None = None
        self.num_tensors: int | None = None
        self.infos: dict[str, list[Any]] = {}  # name -> name as written, dimensions, type, offset
        at = 0
        for name, shape in SHAPES.items():
            size = 4
            for extent in shape:
                size *= extent
            self.infos[name] = [g_string(name), shape, 0, at]
            at += -(-size // 32) * 32
        rng = random.Random(1)
        self.data = b"".join(struct.pack("<f", rng.uniform(-0.1, 0.1)) for _ in range(at // 4))

    def write(self, path: Path) -> Path:
        keys, infos = b"".join(self.keys.values()), b""
        for name, shape, kind, offset in self.infos.values():
            infos += name + g_u32(len(shape)) + b"".join(struct.pack("<Q", d) for d in shape)
            infos += struct.pack("<IQ", kind, offset)
        tensors = len(self.infos) if self.num_tensors is None else self.num_tensors
        count = len(self.keys) if self.num_keys is None else self.num_keys
        head = self.magic + self.version + struct.pack("<QQ", tensors, count) + keys + infos
        path.write_bytes(head + bytes(-len(head) % 32) + self.data)
        return path


def key(name: str, value: bytes) -> Callable[[Gguf], None]:
    return lambda g: g.keys.update({name: value})


def info(field: int, value: Any, name: str = "blk.0.attn_q.weight") -> Callable[[Gguf], None]:
    return lambda g: g.infos[name].__setitem__(field, value)


def attribute(name: str, value: Any) -> Callable[[Gguf], None]:
    return lambda g: setattr(g, name, value)


ENDS = "ends at byte .* in the middle of its header"
GGUF: dict[str, tuple[Callable[[Gguf], Any], str]] = {
    "magic backwards": (attribute("magic", b"FUGG"), "does not start with 'GGUF'"),
    "version 0": (attribute("version", g_u32(0)), "version 0"),
    "version 1": (attribute("version", g_u32(1)), "version 1"),
    "version 4": (attribute("version", g_u32(4)), "version 4"),
    "version 2^32 - 1": (attribute("version", g_u32(2**32 - 1)), "version 4294967295"),
    "big-endian": (attribute("version", struct.pack(">I", 3)), "little-endian"),
    "2^64 - 1 keys": (attribute("num_keys", 2**64 - 1), ENDS),
    "10^7 keys": (attribute("num_keys", 10**7), ENDS),
    "2^64 - 1 tensors": (attribute("num_tensors", 2**64 - 1), "0 dimensions"),
    "key of 2^64 - 1 bytes": (key("x", struct.pack("<Q", 2**64 - 1) + b"x"), ENDS),
    "key of 2^32 bytes": (key("x", struct.pack("<Q", 2**32) + b"x"), ENDS),
    "a key twice": (key("x", KEYS["arch"]), "twice"),
    "unknown type of value": (key("x", g_key("x", 99, b"")), "unknown type 99"),
    "array of 2^63": (key("x", g_key("x", 9, struct.pack("<IQ", 12, 2**63))), "more than the file"),
    "array of 2^30 texts": (key("x", g_key("x", 9, struct.pack("<IQ", 8, 2**30))), "more than the file"),
    "array whose size wraps": (key("x", g_key("x", 9, struct.pack("<IQ", 12, 2**61 + 1))), "more than the file"),
    "array of arrays": (key("x", g_key("x", 9, struct.pack("<IQ", 9, 1))), "unsupported type 9"),
    "text of 2^64 - 1 bytes": (key("x", g_key("x", 8, struct.pack("<Q", 2**64 - 1))), ENDS),
    "text of 1 GiB": (key("x", g_key("x", 8, struct.pack("<Q", 1 << 30))), ENDS),
    "name of 2^63 bytes": (info(0, struct.pack("<Q", 2**63)), ENDS),
    "name empty": (info(0, g_string("")), "lacks 1 of the tensors"),
    "name of another tensor": (info(0, g_string("blk.0.attn_k.weight")), "twice"),
    "no dimensions": (info(1, []), "0 dimensions"),
    "5 dimensions": (info(1, [1] * 5), "5 dimensions"),
    "size wraps": (info(1, [32, 2**59 + 32]), "is it truncated"),
    "sizes that sum past 2^64": (info(1, [2**63 - 64]), "is it truncated"),
    "a dimension of 0": (info(1, [0, 32]), "begins at byte"),
    "unknown type of tensor": (info(2, 99), "ggml type 99"),
    "rows that are no whole blocks": (info(2, 12), "not a multiple of 256"),
    "offset unaligned": (info(3, 7), "begins at byte 7"),
    "offset of another": (info(3, 0), "begins at byte 0"),
    "offset past the end": (info(3, 1 << 40), "begins at byte"),
    "offset 2^64 - 32": (info(3, 2**64 - 32), "begins at byte"),
    "alignment 0": (key("x", g_key("general.alignment", 4, g_u32(0))), "alignment 0"),
    "alignment 2^31": (key("x", g_key("general.alignment", 4, g_u32(2**31))), "alignment"),
    "data missing": (attribute("data", b""), "is it truncated"),
    "a byte missing": (lambda g: setattr(g, "data", g.data[:-1]), "is it truncated"),
    "unknown architecture": (key("arch", g_key("general.architecture", 8, g_string("magic"))), "magic"),
    "architecture of a number": (key("arch", g_key("general.architecture", 4, g_u32(1))), "architecture 1"),
    "layers 0": (key("layers", g_key("llama.block_count", 4, g_u32(0))), "num_hidden_layers"),
    "layers 2^32 - 1": (key("layers", g_key("llama.block_count", 4, g_u32(2**32 - 1))), "num_hidden_layers"),
    "heads 0": (key("heads", g_key("llama.attention.head_count", 4, g_u32(0))), "num_attention_heads"),
    "heads of a text": (key("heads", g_key("llama.attention.head_count", 8, g_string("x"))), "num_attention_heads"),
    "eps NaN": (
        key("eps", g_key("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", float("nan")))),
        "rms_norm_eps",
    ),
    "no tokens": (lambda g: g.keys.pop("tokens"), "no tokenizer vocabulary"),
    "merges malformed": (key("merges", g_key("tokenizer.ggml.merges", 9, g_strings(["nospace"]))), "not a merge"),
    "merges of unknown pieces": (key("merges", g_key("tokenizer.ggml.merges", 9, g_strings(["zz yy"]))), "tokenizer"),
    "unknown pre-tokenizer": (key("pre", g_key("tokenizer.ggml.pre", 8, g_string("magic"))), "pre-tokenizer 'magic'"),
    "unknown tokenizer": (key("model", g_key("tokenizer.ggml.model", 8, g_string("magic"))), "'magic' is not supp"),
    "scores missing": (key("model", g_key("tokenizer.ggml.model", 8, g_string("llama"))), "scores"),
    "more tokens than rows": (
        key("tokens", g_key("tokenizer.ggml.tokens", 9, g_strings([f"t{i}" for i in range(99)]))),
        "do not belong together",
    ),
    "one part of several": (key("x", g_key("split.count", 2, struct.pack("<H", 3))), "split"),
    "eos negative": (key("eos", g_key("tokenizer.ggml.eos_token_id", 5, struct.pack("<i", -5))), "eos_token_id"),
}


def test_the_gguf_file_made_here_loads(tmp_path: Path) -> None:
    load(Gguf().write(tmp_path / "model.gguf"))


@pytest.mark.parametrize("name", GGUF)
def test_bad_gguf_is_refused_by_name(tmp_path: Path, name: str) -> None:
    change, said = GGUF[name]
    file = Gguf()
    change(file)
    message = refusal(file.write(tmp_path / "model.gguf"))
    assert "model.gguf" in message and re.search(said, message), message


def test_randomly_damaged_gguf_never_crashes(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    original = Gguf().write(tmp_path / "good.gguf").read_bytes()
    head = len(original) - len(Gguf().data)
    for _ in range(150):
        damaged = bytearray(original if rng.random() < 0.8 else original[: rng.randrange(len(original))])
        for _ in range(rng.randrange(1, 4)):
            if damaged:
                damaged[rng.randrange(min(head, len(damaged)))] = rng.randrange(256)
        (tmp_path / "model.gguf").write_bytes(damaged)
        try:
            load(tmp_path / "model.gguf")
        except (FastllmError, ValueError) as error:
            assert "\n" not in str(error)
