"""Whoever shares one API key: what it may ask for, what it has used, and its place in the fair queue.

Event loop only. Limits are per process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastllm.server.errors import ApiError

ANONYMOUS = ""  # the name of everybody where no key is needed
_MINUTE = 60.0


@dataclass(frozen=True)
class Allowance:
    """None is no limit. The same for every key of a tier, unless a key says otherwise."""

    tier: str = ""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # prompt and output
    concurrent: int | None = None  # requests at once
    weight: float = 1.0  # share of the engine while others wait, too
    models: frozenset[str] | None = None
    expires: float | None = None  # Unix time, seconds


class Bucket:
    """A budget of at least 1 a minute that refills steadily; overdrawn, it gives nothing until it is positive."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._at = clock()

    def level(self) -> float:
        now = self._clock()
        self._level = min(float(self.limit), self._level + (now - self._at) * self.limit / _MINUTE)
        self._at = now
        return self._level

    def take(self, amount: float) -> None:
        self._level = self.level() - amount

    def seconds_until(self, amount: float) -> float:
        """Until `amount`, at most the limit, can be taken."""
        missing = min(amount, float(self.limit)) - self.level()
        return max(0.0, missing * _MINUTE / self.limit)


class Client:
    """name: in logs and as the prefix cache's salt; never the key."""

    def __init__(self, name: str, allowance: Allowance | None = None) -> None:
        self.name = name
        self.virtual_time = 0.0  # tokens per weight served so far; see gate.py
        self.active = 0  # requests
        self.set_allowance(allowance or Allowance())

    def set_allowance(self, allowance: Allowance) -> None:
        """Budgets whose limits stay the same keep their level."""
        self.allowance = allowance
        self.requests = _bucket(getattr(self, "requests", None), allowance.requests_per_minute)
        self.tokens = _bucket(getattr(self, "tokens", None), allowance.tokens_per_minute)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """One request, from its refusal or admission to its answer. Raises a 429."""
        self._check()
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    def _check(self) -> None:
        limit = self.allowance.concurrent
        if limit is not None and self.active >= limit:
            raise _limited(f"This key may have {limit} requests at once.", "concurrent_requests", 1)
        if self.tokens is not None and self.tokens.level() <= 0:
            wait = self.tokens.seconds_until(1)
            raise _limited(f"This key may use {self.tokens.limit} tokens a minute.", "tokens_per_minute", wait)
        if self.requests is not None:
            wait = self.requests.seconds_until(1)
            if wait > 0:
                raise _limited(
                    f"This key may send {self.requests.limit} requests a minute.", "requests_per_minute", wait
                )
            self.requests.take(1)

    def check_tokens(self, tokens: int) -> None:
        """Before `tokens` prompt tokens are computed. More than a minute's worth wait for a full budget."""
        if self.tokens is None:
            return
        wait = self.tokens.seconds_until(tokens)
        if wait > 0:
            raise _limited(
                f"This key may use {self.tokens.limit} tokens a minute; this request has {tokens} prompt tokens.",
                "tokens_per_minute",
                wait,
            )

    def use_tokens(self, tokens: int) -> None:
        if self.tokens is not None:
            self.tokens.take(tokens)

    def may_use(self, model: str) -> bool:
        models = self.allowance.models
        return models is None or model in models

    def headers(self) -> dict[str, str]:
        """OpenAI's x-ratelimit headers, for the budgets that this key has."""
        result: dict[str, str] = {}
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                result[f"x-ratelimit-limit-{name}"] = str(bucket.limit)
                result[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level())))
                result[f"x-ratelimit-reset-{name}"] = _duration(bucket.seconds_until(bucket.limit))
        return result


def _bucket(old: Bucket | None, limit: int | None) -> Bucket | None:
    if limit is None:
        return None
    return old if old is not None and old.limit == limit else Bucket(limit)


def _limited(sentence: str, code: str, wait: float) -> ApiError:
    seconds = max(1, math.ceil(min(wait, _MINUTE)))
    return ApiError(429, f"{sentence} Try again in {seconds} s.", code=code, retry_after=seconds)


def _duration(seconds: float) -> str:
    """As OpenAI writes it: 6m0s, 1.5s, 20ms."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1e3)}ms"
    minutes, rest = divmod(seconds, 60)
    text = f"{rest:.3f}".rstrip("0").rstrip(".")
    return f"{int(minutes)}m{text}s" if minutes else f"{text}s"
