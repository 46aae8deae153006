"""The one place where a request that ends in an error is counted and gets its line in the log."""

from __future__ import annotations

import logging
from typing import Any

from fastllm.server.errors import ApiError
from fastllm.server.http_metrics import HttpMetrics
from fastllm.server.json_log import escape

refusal_log = logging.getLogger("fastllm.refused")


def line_fields(remote: str | None, method: str, path: str, status: int, seconds: float) -> dict[str, Any]:
    """What the line of a request says, refused or not."""
    return {
        "remote": remote or "unix",
        "method": method[:16],
        "path": escape(path[:200]),
        "status": status,
        "ms": round(seconds * 1e3, 1),
    }


def note_refusal(metrics: HttpMetrics, error: ApiError, request_id: str, fields: dict[str, Any]) -> None:
    """fields: from line_fields; the status is 200 where the answer had begun."""
    metrics.refused(error.body.code or error.body.type)
    fields = {**fields, "reason": error.reason, "request_id": request_id}
    refusal_log.log(
        logging.WARNING if error.status >= 500 else logging.INFO,
        "%s %s %s %d %.0f ms id=%s refused: %s",
        *(fields["remote"], fields["method"], fields["path"], fields["status"], fields["ms"]),
        *(request_id, error.reason),
        extra={"fields": fields},
    )
