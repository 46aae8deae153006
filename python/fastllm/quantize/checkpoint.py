"""The folder that is written: it appears under its name only when it is whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastllm.errors import InvalidArgument, LoadError
from fastllm.loader.tensors import FileTensor

if TYPE_CHECKING:
    import torch

MAX_SHARD = 5 * 10**9  # bytes
_COPIED = (
    *("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "generation_config.json", "LICENSE*"),
)


@contextmanager
def new_folder(out: Path, overwrite: bool, source: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name at the end, or goes if something fails.

    Raises InvalidArgument if `out` is not free: overwrite replaces a model's folder, but nothing else, and never the
    one that is read.
    """
    out = out.expanduser().absolute()
    _check_free(out, overwrite, source.resolve())
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        yield temporary
        _check_free(out, overwrite, source.resolve())
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_checkpoint(
    folder: Path,
    source: Path,
    tensors: Mapping[str, FileTensor],
    packed: Mapping[str, dict[str, torch.Tensor]],
    changed: Mapping[str, torch.Tensor],
    quantization: dict[str, Any],
    max_shard: int = MAX_SHARD,
) -> int:
    """Writes weights, config.json and copies of the small files; returns the bytes of all tensors.

    tensors: the source's, all of which are written again but for the weights of `packed` layers.
    """
    shards = _shards(tensors, packed, max_shard)
    total = 0
    weight_map = {}
    for number, names in enumerate(shards, 1):
        one = len(shards) == 1
        file = "model.safetensors" if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        content: dict[str, torch.Tensor] = {}
        for name in names:
            content.update(_written(name, tensors[name], packed, changed))
        _save(content, folder / file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in content.values())
        weight_map.update(dict.fromkeys(content, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    _write_config(folder, source, quantization, narrowed=any(t.type == "F32" for t in tensors.values()))
    for pattern in _COPIED:
        for file_path in source.glob(pattern):
            if file_path.is_file():
                shutil.copyfile(file_path, folder / file_path.name)
    return total


def check_disk(folder: Path, needed: int) -> None:
    """Raises OSError if the disk of `folder` has less than `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"The checkpoint takes {needed / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB",
            str(folder),
        )


def _check_free(out: Path, overwrite: bool, source: Path) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise InvalidArgument(f"{out} exists and is not an empty folder; --overwrite replaces a model's folder.")
    if not (out / "config.json").is_file():
        raise InvalidArgument(f"{out} is not a model's folder (it has no config.json), so it is not overwritten.")
    if out.resolve() == source or out.resolve() in source.parents:
        raise InvalidArgument(f"{out} holds the model that is read, so it is not overwritten.")


def _shards(
    tensors: Mapping[str, FileTensor], packed: Mapping[str, dict[str, torch.Tensor]], max_shard: int
) -> list[list[str]]:
    """Names of the source's tensors, file by file; a larger tensor has a file to itself."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        parts = packed.get(name.removesuffix(".weight"))
        size = sum(t.numel() * t.element_size() for t in parts.values()) if parts else len(tensor.data)
        if shards[-1] and filled + size > max_shard:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _written(
    name: str,
    tensor: FileTensor,
    packed: Mapping[str, dict[str, torch.Tensor]],
    changed: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    import torch

    layer, _, kind = name.rpartition(".")
    if kind == "weight" and layer in packed:
        return {f"{layer}.{part}": value.contiguous() for part, value in packed[layer].items()}
    if name in changed:
        return {name: changed[name].contiguous()}
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    value = torch.frombuffer(bytearray(tensor.data), dtype=dtypes[tensor.type]).reshape(tensor.shape)
    if tensor.type == "F32" and value.dim() > 1:  # embeddings and heads are kept in 16 bits
        if float(value.abs().max()) > torch.finfo(torch.float16).max:
            raise LoadError(f"{name} holds numbers that 16 bits cannot: convert the model to bfloat16 first.")
        value = value.half()
    return {name: value}


def _save(content: dict[str, torch.Tensor], file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(content, file, metadata={"format": "pt"})
    except SafetensorError as error:  # the library's name for a full disk, among others
        raise OSError(errno.EIO, f"writing failed: {error}", str(file)) from error


def _write_config(folder: Path, source: Path, quantization: dict[str, Any], narrowed: bool) -> None:
    config: dict[str, Any] = json.loads((source / "config.json").read_text("utf-8"))
    if narrowed:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = "float16"
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
