"""Checkpoint tensors as the loaders hand them on: a name, a format, a shape and mapped memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class FileTensor:
    name: str  # as in the checkpoint
    type: str  # a SourceType: "F32", "F16", "BF16", "Q4_0", ...
    shape: tuple[int, ...]  # row-major
    data: memoryview  # into the mapped file
    interleaved_head_dim: int = 0  # > 0: rows of each head are stored as rotary pairs
    packing: Packing | None = None  # given: the data are codes

    def parts(self) -> Iterator[FileTensor]:
        """This tensor and those that belong to its codes."""
        yield self
        if self.packing:
            yield from (t for t in (self.packing.scales, self.packing.zeros, self.packing.group_of) if t)


@dataclass(frozen=True)
class Packing:
    """What makes numbers of codes; see fastllm::Packing."""

    layout: str  # "gptq", "awq", "rows"
    bits: int  # 4 or 8
    group: int  # columns that share a scale; 0: all
    scales: FileTensor
    zeros: FileTensor | None = None
    group_of: FileTensor | None = None  # of each column
    zeros_less_one: bool = False


class PageRelease:
    """Lets go of the physical pages of mapped tensors every so many bytes, so that loading does not keep the checkpoint
    in memory beside the packed weights. Pages that are needed again come back from the file."""

    _EVERY = 8 << 20  # bytes

    def __init__(self, tensors: Iterable[FileTensor]) -> None:
        views = [part.data.obj for t in tensors for part in t.parts()]
        maps = {id(view): view for view in views if isinstance(view, mmap.mmap)}
        self._maps = list(maps.values()) if hasattr(mmap, "MADV_DONTNEED") else []
        self._next = self._EVERY

    def update(self, done: int, total: int) -> None:
        """`done` of `total` bytes were read."""
        if done < self._next and done < total:
            return
        self._next = done + self._EVERY
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)
