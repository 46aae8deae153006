"""Requests as HTTP sees them, under the names that dashboards of FastAPI servers use, and the reasons of refusals.

Labels are routes, known methods and our own error codes: never what a client wrote. Event loop only.
"""

from __future__ import annotations

from fastllm.server.exposition import Page
from fastllm.server.histogram import LAG, Histogram

_FINE = (*(0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5), *(3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60))
_COARSE = (0.1, 0.5, 1)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
# What probes and scrapers ask for.
_UNCOUNTED = frozenset({"/metrics", "/health", "/live", "/ready", "/load", "/ping", "/version"})
_MAX_CODES = 64  # far more than there are


class _Size:
    __slots__ = ("bytes", "count")

    def __init__(self) -> None:
        self.count = 0
        self.bytes = 0


class HttpMetrics:
    def __init__(self) -> None:
        self._requests: dict[tuple[str, str, str], int] = {}  # (handler, method, status class) -> requests
        self._request_sizes: dict[str, _Size] = {}  # by handler
        self._response_sizes: dict[str, _Size] = {}
        self._durations: dict[tuple[str, str], Histogram] = {}  # by handler, method
        self._all_durations = Histogram(_FINE)
        self._refused: dict[str, int] = {"queue_full": 0, "draining": 0}  # by error code
        self.unknown_fields = 0  # that bodies had and nobody reads
        self.event_loop_lag = Histogram(LAG)

    def answered(
        self, handler: str, method: str, status: int, seconds: float, request_bytes: int, response_bytes: int
    ) -> None:
        """handler: the route's path, or "none"."""
        if handler in _UNCOUNTED:
            return
        method = method if method in _METHODS else "OTHER"
        key = (handler, method, f"{status // 100}xx")
        self._requests[key] = self._requests.get(key, 0) + 1
        for sizes, size in ((self._request_sizes, request_bytes), (self._response_sizes, response_bytes)):
            known = sizes.setdefault(handler, _Size())
            known.count += 1
            known.bytes += size
        if (handler, method) not in self._durations:
            self._durations[handler, method] = Histogram(_COARSE)
        self._durations[handler, method].observe(seconds)
        self._all_durations.observe(seconds)

    def refused(self, code: str) -> None:
        if code not in self._refused and len(self._refused) >= _MAX_CODES:
            code = "other"
        self._refused[code] = self._refused.get(code, 0) + 1

    def write(self, page: Page) -> None:
        page.counters(
            "http_requests",
            "Requests by route, method and class of status.",
            (
                ((("handler", handler), ("method", method), ("status", status)), count)
                for (handler, method, status), count in self._requests.items()
            ),
        )
        for name, sizes in (("request", self._request_sizes), ("response", self._response_sizes)):
            series = (((("handler", handler),), size.count, size.bytes) for handler, size in sizes.items())
            page.summaries(f"http_{name}_size_bytes", f"Bytes of the bodies of {name}s.", series)
        page.histogram("http_request_duration_highr_seconds", "Seconds to answer a request.", self._all_durations)
        page.histograms(
            "http_request_duration_seconds",
            "Seconds to answer a request, by route and method.",
            (((("handler", h), ("method", m)), histogram) for (h, m), histogram in self._durations.items()),
        )
        page.counters(
            "fastllm:requests_refused",
            "Requests answered with an error, by its code.",
            (((("code", code),), count) for code, count in self._refused.items()),
        )
        page.counters(
            "fastllm:unknown_request_fields",
            "Fields of request bodies that were ignored because this server does not know them.",
            [((), self.unknown_fields)],
        )
        page.histogram(
            "fastllm:event_loop_lag_seconds",
            "How late the event loop ran a timer, ten times a second.",
            self.event_loop_lag,
        )
