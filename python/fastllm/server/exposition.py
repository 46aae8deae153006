"""Prometheus's text format, written straight from numbers: a scrape of a thousand lines takes well under a millisecond
of the event loop.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import lru_cache

from fastllm.server.histogram import Histogram

CONTENT_TYPE = "text/plain; version=1.0.0; charset=utf-8"
Labels = tuple[tuple[str, str], ...]  # (name, value)


class Page:
    """One answer of /metrics. Every family is added once, whole; `common` labels go to all of its series."""

    def __init__(self, common: Labels = (), created: float | None = None) -> None:
        """created: when counting began, in seconds of the epoch."""
        self._common = common
        self._created = time.time() if created is None else created
        self._parts: list[str] = []

    def gauge(self, name: str, help: str, value: float) -> None:
        self.gauges(name, help, [((), value)])

    def gauges(self, name: str, help: str, series: Iterable[tuple[Labels, float]]) -> None:
        self._add(name, "gauge", help, name, series)

    def counter(self, name: str, help: str, value: float) -> None:
        self.counters(name, help, [((), value)])

    def counters(self, name: str, help: str, series: Iterable[tuple[Labels, float]]) -> None:
        """`name` without _total; a counter also tells when it began."""
        series = list(series)
        self._add(name + "_total", "counter", help, name + "_total", series)
        self._begun(name, help, [labels for labels, _ in series])

    def summaries(self, name: str, help: str, series: Iterable[tuple[Labels, int, float]]) -> None:
        """(labels, count, sum) of each series."""
        self._parts.append(_head(name, "summary", help))
        labels = []
        for own, count, total in series:
            text = _label_text(self._common + own)
            self._parts.append(f"{name}_count{text} {float(count)!r}\n{name}_sum{text} {float(total)!r}\n")
            labels.append(own)
        self._begun(name, help, labels)

    def histogram(self, name: str, help: str, histogram: Histogram) -> None:
        self.histograms(name, help, [((), histogram)])

    def histograms(self, name: str, help: str, series: Iterable[tuple[Labels, Histogram]]) -> None:
        self._parts.append(_head(name, "histogram", help))
        labels = []
        for own, histogram in series:
            prefixes = _bucket_prefixes(name, self._common + own, histogram.bounds)
            total = 0
            for prefix, count in zip(prefixes, histogram.counts, strict=True):
                total += count
                self._parts.append(f"{prefix}{total}.0\n")
            text = _label_text(self._common + own)
            self._parts.append(f"{name}_count{text} {total}.0\n{name}_sum{text} {histogram.sum!r}\n")
            labels.append(own)
        self._begun(name, help, labels)

    def _add(self, family: str, kind: str, help: str, name: str, series: Iterable[tuple[Labels, float]]) -> None:
        self._parts.append(_head(family, kind, help))
        for labels, value in series:
            self._parts.append(f"{name}{_label_text(self._common + labels)} {float(value)!r}\n")

    def _begun(self, name: str, help: str, series: list[Labels]) -> None:
        self._add(f"{name}_created", "gauge", help, f"{name}_created", ((labels, self._created) for labels in series))

    def encode(self) -> bytes:
        return "".join(self._parts).encode()


@lru_cache(maxsize=1024)
def _head(name: str, kind: str, help: str) -> str:
    escaped = help.replace("\\", "\\\\").replace("\n", "\\n")
    return f"# HELP {name} {escaped}\n# TYPE {name} {kind}\n"


@lru_cache(maxsize=4096)
def _label_text(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in sorted(labels)) + "}"


@lru_cache(maxsize=1024)
def _bucket_prefixes(name: str, labels: Labels, bounds: tuple[float, ...]) -> list[str]:
    limits = [*(repr(float(bound)) for bound in bounds), "+Inf"]
    return [f"{name}_bucket{_label_text((*labels, ('le', limit)))} " for limit in limits]


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
