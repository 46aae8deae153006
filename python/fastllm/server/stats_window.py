"""What happened lately: rates and means of the last window, for the log and for old names of metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastllm.server.histogram import Histogram

if TYPE_CHECKING:
    from fastllm import _core


@dataclass(frozen=True)
class WindowFigures:
    seconds: float = 0.0
    prompt_tokens_s: float = 0.0  # computed, cache hits not counted
    output_tokens_s: float = 0.0
    first_token_s: float = 0.0  # mean
    inter_token_s: float = 0.0  # mean
    hit_rate: float = 0.0  # of the tokens looked up in the prefix cache


@dataclass(frozen=True)
class _Sums:
    time: float
    prompt: int
    output: int
    queries: int
    hits: int
    first: tuple[int, float]  # count, seconds
    inter: tuple[int, float]


class StatsWindow:
    """Owned by Metrics; `close` ends a window and begins the next."""

    def __init__(self, first_token: Histogram, inter_token: Histogram) -> None:
        self._first_token = first_token
        self._inter_token = inter_token
        self._start: _Sums | None = None
        self.figures = WindowFigures()

    def close(self, stats: _core.EngineStats, now: float) -> WindowFigures:
        end = _Sums(
            now,
            stats.prompt_tokens,
            stats.generated_tokens,
            stats.prefix_queries,
            stats.prefix_hits,
            (self._first_token.total, self._first_token.sum),
            (self._inter_token.total, self._inter_token.sum),
        )
        start, self._start = self._start, end
        if start is not None and end.time > start.time:
            seconds = end.time - start.time
            self.figures = WindowFigures(
                seconds,
                (end.prompt - start.prompt) / seconds,
                (end.output - start.output) / seconds,
                _mean(start.first, end.first),
                _mean(start.inter, end.inter),
                _mean((start.queries, start.hits), (end.queries, end.hits)),
            )
        return self.figures


def _mean(start: tuple[int, float], end: tuple[int, float]) -> float:
    count = end[0] - start[0]
    return (end[1] - start[1]) / count if count > 0 else 0.0
