"""GGUF files (versions 2 and 3, little-endian), mapped and checked.

Layout: magic, version, counts, key/value pairs, tensor descriptions, padding, tensor data. Dimensions are stored
fastest first and reversed here. Block formats keep their rows as they are; the core decodes them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastllm.errors import LoadError
from fastllm.loader.files import map_file
from fastllm.loader.tensors import FileTensor

# ggml's number of a tensor type -> our name, elements per block, bytes per block
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


@dataclass(frozen=True)
class GgufFile:
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, FileTensor]


class _Cursor:
    """Reads forward through the file; every read is checked against its end."""

    def __init__(self, path: Path, view: memoryview) -> None:
        self.path = path
        self.view = view
        self.at = 0

    def take(self, count: int) -> memoryview:
        if count > len(self.view) - self.at:
            raise LoadError(f"{self.path} ends at byte {len(self.view)}, in the middle of its header.")
        self.at += count
        return self.view[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        return bytes(self.take(self.number("<Q"))).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise LoadError(f"{self.path} has a metadata value of the unknown type {kind}.")
        return self.number(_SCALARS[kind])

    def array(self) -> list[Any]:
        kind, count = self.number("<I"), self.number("<Q")
        if count > len(self.view) - self.at:
            raise LoadError(f"{self.path} has a metadata array of {count} entries, more than the file has bytes.")
        if kind in _SCALARS:
            code = _SCALARS[kind][1]
            return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(code))))
        if kind != _STRING:
            raise LoadError(f"{self.path} has a metadata array of the unsupported type {kind}.")
        return [self.string() for _ in range(count)]


def read_gguf(path: Path) -> GgufFile:
    """Metadata and tensors of one file. Raises LoadError for anything that is not a well-formed GGUF file."""
    view = map_file(path)
    cursor = _Cursor(path, view)
    if len(view) < 24 or bytes(cursor.take(4)) != b"GGUF":
        raise LoadError(f"{path} is not a GGUF file: it does not start with 'GGUF'.")
    version = cursor.number("<I")
    if version not in (2, 3):
        raise LoadError(f"{path} has GGUF version {version}; supported are 2 and 3 (little-endian).")
    num_tensors, num_values = cursor.number("<Q"), cursor.number("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.string()
        if key in metadata:
            raise LoadError(f"{path} has the metadata key {key!r} twice.")
        metadata[key] = cursor.value(cursor.number("<I"))
    if metadata.get("split.count", 1) not in (0, 1):
        raise LoadError(f"{path} is one part of a split GGUF model; merge the parts into one file first.")
    infos = [_tensor_info(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20:
        raise LoadError(f"{path} has the alignment {alignment!r}; it must be between 1 and 1048576.")
    data = view[min(len(view), -(-cursor.at // alignment) * alignment) :]
    tensors: dict[str, FileTensor] = {}
    at = 0  # where the next tensor begins
    for name, shape, kind, offset in infos:
        if name in tensors:
            raise LoadError(f"{path} has the tensor {name!r} twice.")
        if offset != at:
            raise LoadError(f"{path}: tensor {name!r} begins at byte {offset} of the data instead of {at}.")
        tensors[name] = tensor = _tensor(path, name, shape, kind, offset, data)
        at = -(-(offset + len(tensor.data)) // alignment) * alignment
    return GgufFile(path, metadata, tensors)


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, num_dims = cursor.string(), cursor.number("<I")
    if not 1 <= num_dims <= _MAX_DIMS:
        raise LoadError(f"{cursor.path}: tensor {name!r} has {num_dims} dimensions; 1 to {_MAX_DIMS} are allowed.")
    dims = [cursor.number("<Q") for _ in range(num_dims)]
    return name, tuple(reversed(dims)), cursor.number("<I"), cursor.number("<Q")


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, data: memoryview) -> FileTensor:
    if kind not in _TYPES:
        supported = ", ".join(t[0] for t in _TYPES.values())
        raise LoadError(
            f"{path}: tensor {name!r} has ggml type {kind}, which is not supported; supported: {supported}."
        )
    type_name, block, block_bytes = _TYPES[kind]
    if shape[-1] % block:
        raise LoadError(f"{path}: rows of {name!r} have {shape[-1]} elements, not a multiple of {block} ({type_name}).")
    size = block_bytes
    for extent in (*shape[:-1], shape[-1] // block):
        size *= extent
    if offset > len(data) or size > len(data) - offset:
        raise LoadError(
            f"{path}: tensor {name!r} spans bytes {offset} to {offset + size} of the data, but the file has "
            f"{len(data)}; is it truncated?"
        )
    return FileTensor(name, type_name, shape, data[offset : offset + size])
