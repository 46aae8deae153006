"""Model files that are damaged or made to do harm: each is refused in one sentence, in time, without memory to match.

A folder of a tiny model is changed in one place at a time; the loader must name what is wrong. Where a change is
harmless the model must load.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_files import load, refusal

from fastllm import LLM
from fastllm.errors import FastllmError
from tiny_models import ENGINE

Edit = Callable[[Path], None]
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


# ---- safetensors


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def content(value: bytes) -> Edit:
    return lambda folder: (folder / WEIGHTS).write_bytes(value) and None


def header(change: Callable[[dict[str, Any]], object], tail: bytes = b"") -> Edit:
    """Changes the parsed header; tail: bytes after the data."""

    def edit(folder: Path) -> None:
        parsed, data = header_of((folder / WEIGHTS).read_bytes())
        change(parsed)
        (folder / WEIGHTS).write_bytes(with_header(json.dumps(parsed).encode(), data + tail))

    return edit


Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"


def moved(begin: int, end: int) -> Edit:
    def change(parsed: dict[str, Any]) -> None:
        offsets = parsed[Q]["data_offsets"]
        parsed[Q]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]

    return header(change)


def doubled(folder: Path) -> None:
    parsed, data = header_of((folder / WEIGHTS).read_bytes())
    text = json.dumps(parsed)
    text = text[:-1] + f', "{Q}": {json.dumps(parsed[Q])}}}'
    (folder / WEIGHTS).write_bytes(with_header(text.encode(), data))


def pickled(folder: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return os.mkdir, (str(folder / "executed"),)

    (folder / WEIGHTS).write_bytes(pickle.dumps(Harm()))


def pipe(name: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return edit


def directory(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def link(name: str, target: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return edit


MANY = b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(100_001)) + b"}"
SAFETENSORS: dict[str, tuple[Edit, str]] = {
    "empty": (content(b""), "is empty"),
    "seven bytes": (content(bytes(7)), "too few"),
    "header of nothing": (content(bytes(8)), "header of 0 bytes"),
    "header of one byte": (content(struct.pack("<Q", 1) + b"{"), "header of 1 bytes"),
    "header over the limit": (content(struct.pack("<Q", 100_000_001) + b"{}"), "header of 100000001 bytes"),
    "header of 2^63": (content(struct.pack("<Q", 2**63) + b"{}"), "header of 9223372036854775808"),
    "header of 2^64 - 1": (content(struct.pack("<Q", 2**64 - 1) + b"{}"), "header of 18446744073709551615"),
    "not UTF-8": (content(with_header(b'{"\xff\xfe":1}')), "not valid JSON"),
    "not JSON": (content(with_header(b"{nope}")), "not valid JSON"),
    "an array": (content(with_header(b"[1,2]")), "does not start with"),
    "a leading space": (content(with_header(b" {}")), "does not start with"),
    "padded with NUL": (content(with_header(b"{}\0\0")), "not valid JSON"),
    "nested deeply": (content(with_header(b'{"a":' + b"[" * 200_000)), "not valid JSON"),
    "too many tensors": (content(with_header(MANY)), "more than 100000 tensors"),
    "a name twice": (doubled, "same key twice"),
    "begin after end": (header(lambda h: h[Q].update(data_offsets=[64, 0])), "spans bytes 64 to 0"),
    "past the end": (moved(0, 1 << 40), "is it truncated"),
    "negative offset": (header(lambda h: h[Q].update(data_offsets=[-8, 8])), "malformed data_offsets"),
    "huge offset": (header(lambda h: h[Q].update(data_offsets=[0, 2**64])), "malformed data_offsets"),
    "offsets missing": (header(lambda h: h[Q].pop("data_offsets")), "malformed data_offsets"),
    "description missing": (header(lambda h: h.update({Q: None})), "has no description"),
    "two tensors share bytes": (moved(-64, -64), "overlaps another"),
    "bytes after the last": (header(lambda h: None, bytes(12)), "last 12 bytes belong to no tensor"),
    "a hole": (header(lambda h: h.pop(Q)), "belong to no tensor"),
    "size mismatch": (header(lambda h: h[Q].update(shape=[64, 63])), "takes 16128 bytes, but 16384"),
    "shape overflows": (header(lambda h: h[Q].update(shape=[2, 2**64 - 2])), "malformed shape"),
    "shape wraps to its size": (
        header(lambda h: h[Q].update(shape=[2**62 + 64, 64])),
        "takes 1180591620717411319808 bytes",
    ),
    "shape of a bool": (header(lambda h: h[Q].update(shape=[True, 4096])), "malformed shape"),
    "shape transposed": (
        header(lambda h: h[K].update(shape=[64, 32])),
        r"its shape is \[64, 32\], the model needs \[32, 64\]",
    ),
    "no elements": (header(lambda h: h[Q].update(shape=[0, 64], data_offsets=[0, 0])), "belong to no tensor"),
    "unknown type": (header(lambda h: h[Q].update(dtype="F7")), "has the type F7"),
    "lower case type": (header(lambda h: h[Q].update(dtype="f32")), "has the type f32"),
    "type null": (header(lambda h: h[Q].update(dtype=None)), "has the type None"),
    "booleans": (header(lambda h: h[Q].update(dtype="BOOL")), "has the type BOOL"),
    "a tensor of another model": (header(lambda h: h.update({"extra": h.pop(Q)})), "lacks 1 of the tensors"),
    "a pickle": (pickled, "announces a header"),
    "a pipe": (pipe(WEIGHTS), "not a regular file"),
    "a device": (link(WEIGHTS, "/dev/zero"), "not a regular file"),
    "a directory": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()) and None,
        "not a regular file|no .*safet",
    ),
    "a dangling link": (link(WEIGHTS, "nowhere"), "cannot be read"),
    "a loop of links": (link(WEIGHTS, WEIGHTS), "cannot be read"),
    "a link to another file": (link(WEIGHTS, "/etc/passwd"), "not a safetensors file"),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_bad_safetensors_is_refused_by_name(folder: Path, name: str) -> None:
    edit, said = SAFETENSORS[name]
    edit(folder)
    message = refusal(folder)
    assert WEIGHTS in message or str(folder) in message
    assert re.search(said, message), message
    assert not (folder / "executed").exists() and "root:" not in message


def test_data_that_starts_anywhere_loads(folder: Path) -> None:
    """The header's length decides where data start; alignment is a habit of writers, not a promise of files."""
    parsed, data = header_of((folder / WEIGHTS).read_bytes())
    for pad in range(1, 8):
        text = json.dumps(parsed).encode() + b" " * pad
        (folder / WEIGHTS).write_bytes(with_header(text, data))
        load(folder)


def test_randomly_damaged_safetensors_never_crash(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    original = (folder / WEIGHTS).read_bytes()
    length = 8 + int.from_bytes(original[:8], "little")
    loaded = 0
    for _ in range(60):
        damaged = bytearray(original if rng.random() < 0.7 else original[: rng.randrange(len(original))])
        for _ in range(rng.randrange(1, 4)):
            if damaged:
                damaged[rng.randrange(min(length, len(damaged)))] = rng.randrange(256)
        (folder / WEIGHTS).write_bytes(damaged)
        try:
            load(folder)
            loaded += 1
        except (FastllmError, ValueError) as error:
            assert "\n" not in str(error)
    assert loaded < 60


# ---- config, index, tokenizer, other files


def config(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        values.update(changes)
        (folder / "config.json").write_text(json.dumps(values))

    return edit


def text(name: str, value: str | bytes) -> Edit:
    data = value.encode() if isinstance(value, str) else value
    return lambda folder: (folder / name).write_bytes(data) and None


def shards(name: str) -> Edit:
    def edit(folder: Path) -> None:
        names = list(header_of((folder / WEIGHTS).read_bytes())[0])
        weight_map = {tensor: name for tensor in names if tensor != "__metadata__"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return edit


def sparse(name: str, size: int) -> Edit:
    def edit(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.truncate(size)

    return edit


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Edit:
    def edit(folder: Path) -> None:
        values = json.loads((folder / "tokenizer.json").read_text())
        change(values)
        (folder / "tokenizer.json").write_text(json.dumps(values))

    return edit


FILES: dict[str, tuple[Edit, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "empty config": (text("config.json", ""), "config.json is empty"),
    "truncated config": (text("config.json", '{"architectures": ["Llama'), "not valid JSON"),
    "config of a gigabyte": (sparse("config.json", 1 << 30), "at most .* are read"),
    "deep config": (text("config.json", '{"a":' * 100_000), "not valid JSON"),
    "config as a pipe": (pipe("config.json"), "no config.json"),
    "layers 0": (config(num_hidden_layers=0), "num_hidden_layers must be a whole number"),
    "layers -1": (config(num_hidden_layers=-1), "num_hidden_layers"),
    "layers 10^9": (config(num_hidden_layers=10**9), "num_hidden_layers must be .* to 4096"),
    "layers 1.5": (config(num_hidden_layers=1.5), "num_hidden_layers"),
    "layers as text": (config(num_hidden_layers="32"), "num_hidden_layers"),
    "layers null": (config(num_hidden_layers=None), "num_hidden_layers"),
    "more layers than the file": (config(num_hidden_layers=1000), "lacks .* of the tensors"),
    "hidden 0": (config(hidden_size=0), "hidden_size"),
    "hidden 7": (config(hidden_size=7, head_dim=None), "is 1; it must be even"),
    "hidden 2^31": (config(hidden_size=2**31), "hidden_size"),
    "head_dim 0": (config(head_dim=0), "head_dim"),
    "head_dim odd": (config(head_dim=15), "is 15; it must be even"),
    "head_dim 10^6": (config(head_dim=10**6), "head_dim"),
    "kv heads that do not divide": (config(num_key_value_heads=3), "not a multiple of kv_heads 3"),
    "vocab 0": (config(vocab_size=0), "vocab_size"),
    "vocab -1": (config(vocab_size=-1), "vocab_size"),
    "vocab 2^31": (config(vocab_size=2**31), "vocab_size"),
    "vocab unlike the weights": (config(vocab_size=400), r"the model needs \[400, 64\]"),
    "context 0": (config(max_position_embeddings=0), "max_position_embeddings"),
    "eps as text": (config(rms_norm_eps="small"), "rms_norm_eps"),
    "rope theta NaN": (config(rope_parameters={"rope_type": "default", "rope_theta": float("nan")}), "rope_theta"),
    "rope of an unknown kind": (config(rope_parameters={"rope_type": "spiral"}), "spiral"),
    "unknown architecture": (config(architectures=["EvilForCausalLM"], auto_map={"x": "evil.X"}), "EvilForCausalLM"),
    "architectures as text": (config(architectures="LlamaForCausalLM"), "architectures"),
    "quantisation in 3.5 bits": (
        config(quantization_config={"quant_method": "gptq", "bits": 3.5, "group_size": 128}),
        "bits must be a whole number .* got 3.5",
    ),
    "quantisation groups of 0": (
        config(quantization_config={"quant_method": "awq", "bits": 4, "group_size": 0, "version": "gemm"}),
        "group_size must be",
    ),
    "quantisation unknown": (config(quantization_config={"quant_method": "magic"}), "magic"),
    "shard outside": (shards("../../etc/passwd"), "not a plain file name"),
    "shard absolute": (shards("/etc/passwd"), "not a plain file name"),
    "shard with backslashes": (shards("..\\x.safetensors"), "lacks the shard"),
    "shard with NUL": (shards("a\0b.safetensors"), "lacks the shard"),
    "shard with a long name": (shards("a" * 4096), "not a plain file name"),
    "shard without a name": (shards(""), "not a plain file name"),
    "shard as an address": (shards("http://127.0.0.1/x.safetensors"), "not a plain file name"),
    "index of numbers": (text("model.safetensors.index.json", '{"weight_map": {"a": 5}}'), "no weight_map"),
    "only a pickle": (
        lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin") and None,
        "convert it to safetensors first",
    ),
    "tokenizer truncated": (text("tokenizer.json", '{"version": "1.0", "model"'), "tokenizer.json cannot be read"),
    "tokenizer empty": (text("tokenizer.json", ""), "tokenizer.json is empty"),
    "tokenizer of a gigabyte": (sparse("tokenizer.json", 1 << 30), "at most .* are read"),
    "tokenizer of an unknown model": (tokenizer(lambda t: t["model"].update(type="Magic")), "cannot be read"),
    "tokenizer of an unknown kind": (tokenizer(lambda t: t.update(pre_tokenizer={"type": "Magic"})), "cannot be read"),
    "merges of unknown pieces": (tokenizer(lambda t: t["model"].update(merges=["zz yy"])), "cannot be read"),
    "a tokenizer too large for the model": (
        tokenizer(lambda t: t["model"]["vocab"].update({f"tok{i}": 300 + i for i in range(400)})),
        "do not belong together",
    ),
    "tokenizer config as a list": (text("tokenizer_config.json", "[]"), "not a JSON object"),
    "template not UTF-8": (text("chat_template.jinja", b"\xff\xfe\xfa"), "not UTF-8"),
    "no right to read": (lambda f: (f / WEIGHTS).chmod(0), "cannot be read"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_file_is_refused_by_name(folder: Path, name: str) -> None:
    if name == "no right to read" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    edit, said = FILES[name]
    (folder / "evil.py").write_text("import pathlib; pathlib.Path(__file__).with_name('executed').mkdir()")
    edit(folder)
    message = refusal(folder)
    assert re.search(said, message) and str(folder) in message, message
    assert not (folder / "executed").exists() and "root:" not in message


def test_defaults_no_request_could_ask_for_are_ignored(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = '{"temperature": NaN, "top_p": 7, "top_k": "x", "repetition_penalty": 1.5, "max_length": 1000000000000}'
    (folder / "generation_config.json").write_text(values)
    llm = LLM(str(folder), **ENGINE)
    try:
        assert llm.get_default_sampling_params().repetition_penalty == 1.5
        assert llm.get_default_sampling_params().top_p == 1.0
    finally:
        llm.shutdown()
    for name in ("temperature", "top_p", "top_k"):
        assert f"Ignored {name}=" in caplog.text


def test_code_beside_a_model_is_never_imported(folder: Path) -> None:
    (folder / "modeling_evil.py").write_text("import pathlib; pathlib.Path(__file__).with_name('executed').mkdir()")
    config(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"})(folder)
    load(folder)
    assert not (folder / "executed").exists()


def test_server_says_one_line_and_never_gets_ready(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"garbage, all of it")
    command = [sys.executable, "-m", "fastllm.server", "--model", str(folder), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "ready after" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("model error: ")] != []
