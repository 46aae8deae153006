"""Safetensors files, mapped and checked. Format: u64 length of the header, JSON header, tensor data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastllm.errors import LoadError
from fastllm.loader.files import json_object, map_file, read_json
from fastllm.loader.tensors import FileTensor

_ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "I32": 4, "I64": 8}
_MAX_HEADER = 100 << 20  # bytes, the limit of the reference implementation
_MAX_TENSORS = 100_000
_MAX_FILE_NAME = 255
_INDEX = "model.safetensors.index.json"


def read_safetensors(path: Path) -> dict[str, FileTensor]:
    """All tensors of one file by name. Raises LoadError for anything that is not a well-formed file."""
    view = map_file(path)
    if len(view) < 8:
        raise LoadError(f"{path} is not a safetensors file: {len(view)} bytes are too few for a header.")
    header_len = int.from_bytes(view[:8], "little")
    if not 2 <= header_len <= min(_MAX_HEADER, len(view) - 8):
        raise LoadError(
            f"{path} is not a safetensors file or is truncated: it announces a header of {header_len} bytes "
            f"and has {len(view)}."
        )
    text = bytes(view[8 : 8 + header_len])
    if text[:1] != b"{":
        raise LoadError(f"{path} is not a safetensors file: its header does not start with '{{'.")
    if text.count(b'"data_offsets"') > _MAX_TENSORS:  # before they take their place in memory
        raise LoadError(f"{path} names more than {_MAX_TENSORS} tensors.")
    header = json_object(text, f"the header of {path}", unique_keys=True)
    data = view[8 + header_len :]
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, FileTensor] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = _span(path, name, entry, len(data))
            tensors[name] = _tensor(path, name, entry, data[begin:end])
            spans.append((begin, end, name))
    _check_cover(path, sorted(spans), len(data))
    return tensors


def _check_cover(path: Path, spans: list[tuple[int, int, str]], size: int) -> None:
    """Every byte of the data belongs to one tensor; anything else was not written by a tool that knows the format."""
    at = 0
    for begin, end, name in spans:
        if begin < at:
            raise LoadError(f"{path}: tensor {name!r} overlaps another: it begins at byte {begin}, before {at}.")
        if begin > at:
            raise LoadError(f"{path}: bytes {at} to {begin} before tensor {name!r} belong to no tensor.")
        at = end
    if at != size:
        raise LoadError(f"{path}: the last {size - at} bytes belong to no tensor.")


def read_folder(folder: Path) -> dict[str, FileTensor]:
    """All tensors of a checkpoint folder: its index and shards, else its only safetensors file."""
    if (folder / _INDEX).is_file():
        return _read_shards(folder)
    if (folder / "model.safetensors").is_file():
        return read_safetensors(folder / "model.safetensors")
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return read_safetensors(files[0])
    if files:
        raise LoadError(f"{folder} has {len(files)} safetensors files but no {_INDEX} that says how they fit together.")
    others = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
    hint = f" It has {others[0]}: convert it to safetensors first." if others else ""
    raise LoadError(f"{folder} has no *.safetensors files.{hint}")


def _read_shards(folder: Path) -> dict[str, FileTensor]:
    index = read_json(folder / _INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise LoadError(f"{folder / _INDEX} has no weight_map from tensor names to file names.")
    tensors: dict[str, FileTensor] = {}
    for file in sorted(set(weight_map.values())):
        if not file or Path(file).name != file or len(file) > _MAX_FILE_NAME:
            raise LoadError(f"{folder / _INDEX} names the shard {file[:80]!r}, which is not a plain file name.")
        if not (folder / file).is_file():
            raise LoadError(f"{folder} lacks the shard {file} that its index names; is the download complete?")
        for name, tensor in read_safetensors(folder / file).items():
            if weight_map.get(name) != file:
                raise LoadError(f"{folder / file} holds {name!r}, which the index does not place there.")
            tensors[name] = tensor
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise LoadError(f"{folder}: the index names {missing[0]!r}, which {weight_map[missing[0]]} does not hold.")
    return tensors


def _span(path: Path, name: str, entry: Any, size: int) -> tuple[int, int]:
    """Where a tensor's bytes begin and end in the data."""
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict):
        raise LoadError(f"{where} has no description.")
    offsets = _sizes(entry.get("data_offsets"))
    if offsets is None or len(offsets) != 2:
        raise LoadError(f"{where} has malformed data_offsets.")
    begin, end = offsets
    if not begin <= end <= size:
        raise LoadError(f"{where} spans bytes {begin} to {end}, but the file has {size}; is it truncated?")
    return begin, end


def _tensor(path: Path, name: str, entry: dict[str, Any], data: memoryview) -> FileTensor:
    where = f"{path}: tensor {name!r}"
    dtype, shape = entry.get("dtype"), _sizes(entry.get("shape"))
    if shape is None or len(shape) > 8:
        raise LoadError(f"{where} has a malformed shape.")
    size = _ELEMENT_BYTES.get(dtype) if isinstance(dtype, str) else None
    if size is None:
        # Reported only if a weight needs it: buffers such as masks are often stored in other types.
        return FileTensor(name, str(dtype), tuple(shape), data)
    for extent in shape:
        size *= extent
    if size != len(data):
        raise LoadError(f"{where} of type {dtype} and shape {shape} takes {size} bytes, but {len(data)} are given.")
    return FileTensor(name, str(dtype), tuple(shape), data)


def _sizes(value: Any) -> list[int] | None:
    return value if isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value) else None
