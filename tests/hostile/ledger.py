"""Every refusal that a client saw has its line in the log, and the log and the metrics count the same refusals."""

from __future__ import annotations

import re
from collections import Counter

_LINE = re.compile(r" (?P<status>\d{3}) \d+ ms id=(?P<id>\S+) refused: (?P<code>\w+)")
_COUNTER = re.compile(r'^fastllm:requests_refused_total\{code="(\w+)"\} (\d+)', re.MULTILINE)


class Ledger:
    """Answers on the one side, the lines of a log that leaves none out on the other."""

    def __init__(self, lines: list[str]) -> None:
        """lines: grows while the server runs."""
        self._lines = lines
        self._read = 0  # of the lines
        self._logged: Counter[str] = Counter()  # refusals by code, since the start
        self._seen: Counter[tuple[str, int, str]] = Counter()  # (id, status, code), not yet found in the log

    def saw(self, request_id: str, status: int, code: str) -> None:
        self._seen[request_id, status, code] += 1

    def missing(self, metrics: str) -> str:
        """What is still to come; "" if all is told. Raises where a refusal has two lines."""
        while self._read < len(self._lines):
            match = _LINE.search(self._lines[self._read])
            self._read += 1
            if match:
                self._logged[match["code"]] += 1
                self._seen[match["id"], int(match["status"]), match["code"]] -= 1
        untold = [key for key, count in self._seen.items() if count > 0]
        if untold:
            return f"no line for {untold[:3]}"
        counted = Counter({code: int(number) for code, number in _COUNTER.findall(metrics) if number != "0"})
        if counted != self._logged:
            return f"counted {counted - self._logged} more, logged {self._logged - counted} more"
        self._seen.clear()
        return ""
