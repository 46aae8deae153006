"""Flags of how requests are started and answered."""

from __future__ import annotations

import argparse

from fastllm.arg_parser import OnOff, parse_count, parse_seconds


def add_answer_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answers")
    group.add_argument(
        "--enable-force-include-usage", action=OnOff, default=False, help="streams end with usage without being asked"
    )
    group.add_argument(
        "--sse-keep-alive-interval",
        type=parse_seconds,
        default=0.0,
        metavar="SECONDS",
        help="a comment line whenever a stream was silent for so long; 0: none",
    )
    group.add_argument(
        "--scheduler-delay",
        type=parse_seconds,
        default=0.0,
        metavar="SECONDS",
        help="while requests run, new ones are gathered for so long and start together",
    )
    group.add_argument(
        "--strict-params",
        action=OnOff,
        default=False,
        help="refuse requests with a top-level field that this server does not know; else it is ignored and logged",
    )
    group.add_argument(
        "--tokenizer-pool-size",
        "--renderer-num-workers",
        type=parse_count,
        default=0,
        metavar="N",
        help="threads for templates and long prompts; 0: two",
    )
