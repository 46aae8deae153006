"""Flags of logs and metrics."""

from __future__ import annotations

import argparse

from fastllm.arg_parser import OnOff, parse_count, parse_seconds

_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


def add_log_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("logs")
    group.add_argument(
        "--log-level",
        type=str.lower,
        choices=_LOG_LEVELS,
        default="info",
        help="least important messages to show (or FASTLLM_LOGGING_LEVEL)",
    )
    group.add_argument("--log-format", choices=("text", "json"), default="text", help="json: one object a line")
    group.add_argument(
        "--log-lines-per-second",
        type=parse_count,
        default=20,
        metavar="N",
        help="lines of one kind, such as refusals, that are written each second; the rest is counted; 0: no limit",
    )
    group.add_argument(
        "--uvicorn-log-level",
        type=str.lower,
        choices=(*_LOG_LEVELS, "trace"),
        default="info",
        help="the same for the lines of answered requests; those of refused ones stay",
    )
    group.add_argument("--disable-uvicorn-access-log", action=OnOff, default=False, help="no line per answered request")
    group.add_argument(
        "--disable-access-log-for-endpoints",
        default="/live,/health,/ready,/ping,/metrics,/load,/stats",
        metavar="PATHS",
        help="no such line for these paths, separated by commas",
    )
    group.add_argument(
        "--enable-log-requests",
        action=OnOff,
        default=False,
        help="each request's sampling parameters; with --log-level debug its prompt, too",
    )
    group.add_argument(
        "--max-log-len", type=parse_count, metavar="N", help="most characters and token ids of a logged prompt"
    )
    group.add_argument(
        "--log-stats-interval", type=parse_seconds, default=10.0, metavar="SECONDS", help="between lines of statistics"
    )
    group.add_argument(
        "--metric-aliases", action=OnOff, default=False, help="/metrics with the names of older guides and dashboards"
    )
