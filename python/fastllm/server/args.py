"""The command line of the server: EngineArgs' flags and the server's own."""

from __future__ import annotations

import argparse

from fastllm.arg_parser import Version, parse_count, parse_seconds
from fastllm.environment import defaults_from_environment
from fastllm.server.answer_flags import add_answer_flags
from fastllm.server.dialect import add_dialect_flags
from fastllm.server.limits import Limits, flag_name, flags
from fastllm.server.log_flags import add_log_flags
from fastllm.server.network_flags import add_network_flags
from fastllm.server.responses_store import RESPONSES_KEPT


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the examples as written and shows defaults that mean something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, "", argparse.SUPPRESS) or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-v", "--version", action=Version, help="print the version and exit")
    parser.add_argument("--config", metavar="FILE", help="YAML file of flags; what is on the command line wins")
    network = parser.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for every interface")
    network.add_argument("--port", type=_port, default=8000, help="port to listen on; 0 picks a free one")
    network.add_argument("--root-path", default="", metavar="PATH", help="prefix a proxy puts before every path")
    api = parser.add_argument_group("API")
    api.add_argument(
        "--api-key",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY",
        help="key that requests must carry; repeatable; FASTLLM_API_KEY adds one without showing it in `ps`",
    )
    api.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="JSON file of hashed keys with tiers, rates, models, expiry (see `fastllm key`); SIGHUP reads it again",
    )
    api.add_argument(
        "--allow-unauthenticated",
        action="store_true",
        help="do not warn when every machine that reaches the address may use the model",
    )
    api.add_argument(
        "--share-prefix-cache",
        action="store_true",
        help="let requests of different keys reuse each other's cached prompts, which timing then shows to others",
    )
    api.add_argument("--disable-console", dest="console", action="store_false", help="no page for browsers at /")
    api.add_argument("--response-role", default="assistant", metavar="ROLE", help="role of chat answers")
    add_dialect_flags(api)
    api.add_argument(
        "--responses-store",
        type=parse_count,
        default=RESPONSES_KEPT,
        metavar="N",
        help="responses of /v1/responses kept in memory for previous_response_id; 0 keeps none",
    )
    limits = parser.add_argument_group("limits", "What one request, or all of them together, may ask for.")
    for limit in flags():
        kind = parse_seconds if limit.name.endswith("_s") else parse_count
        settings = {"metavar": limit.metadata["metavar"], "help": limit.metadata["help"]}
        limits.add_argument(f"--{flag_name(limit)}", dest=limit.name, type=kind, default=limit.default, **settings)
    life = parser.add_argument_group("life")
    life.add_argument(
        "--shutdown-timeout",
        type=parse_seconds,
        default=30.0,
        metavar="SECONDS",
        help="time for accepted requests to finish after SIGTERM or Ctrl-C",
    )


def make_parser(prog: str, *, positional_model: bool) -> argparse.ArgumentParser:
    from fastllm.arg_parser import FlexibleArgumentParser
    from fastllm.engine_args import EngineArgs

    model = "Qwen/Qwen2.5-0.5B-Instruct"
    example = f"{prog} {model}" if positional_model else f"{prog} --model {model}"
    parser = FlexibleArgumentParser(
        prog=prog,
        formatter_class=_Formatter,
        description="Serves a model over the OpenAI API.",
        epilog=f"examples:\n  {example}\n  {example} --port 8080 --max-model-len 4k\n"
        f"  {prog} {'null' if positional_model else '--model null'}    (no weights: for clients and load tests)",
    )
    if positional_model:
        parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="the same as --model")
    add_server_flags(parser)
    add_network_flags(parser)
    add_answer_flags(parser)
    add_log_flags(parser)
    EngineArgs.add_cli_args(parser)
    try:
        parser.set_defaults(**defaults_from_environment())
    except ValueError as error:
        parser.error(str(error))
    return parser


def limits_from(args: argparse.Namespace) -> Limits:
    return Limits(**{limit.name: getattr(args, limit.name) for limit in flags()})


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a port from 0 to 65535, got {text!r}")
    return int(text)
