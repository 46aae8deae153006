"""The `fastllm` command: serve, chat, generate, run-batch, export, quantize, key."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastllm.engine_args import EngineArgs
    from fastllm.sampling import SamplingParams

_EXAMPLES = """examples:
  fastllm serve Qwen/Qwen2.5-0.5B-Instruct --port 8000
  fastllm chat ./my-model
  fastllm chat --url http://127.0.0.1:8000
  fastllm generate ./my-model --prompt "Once upon a time" --max-tokens 64
  echo "Why is the sky blue?" | fastllm chat ./my-model
  fastllm run-batch ./my-model -i requests.jsonl -o answers.jsonl
  fastllm export ./my-model ./bundle --dtype bfloat16
  fastllm quantize ./my-model ./my-model-gptq --method gptq --bits 4
"""

# Sampling flags of chat and generate: name, type, metavar, help.
_SAMPLING_FLAGS: tuple[tuple[str, Callable[[str], Any], str, str], ...] = (
    ("max-tokens", int, "N", "most tokens to generate"),
    ("min-tokens", int, "N", "fewest tokens before it may stop"),
    ("temperature", float, "T", "0 is greedy"),
    ("top-p", float, "P", "keep the likeliest tokens up to this probability"),
    ("top-k", int, "K", "keep the K likeliest tokens; 0: off"),
    ("min-p", float, "P", "drop tokens below P times the likeliest one's probability"),
    ("repetition-penalty", float, "R", "above 1 discourages what already occurred"),
    ("presence-penalty", float, "X", "-2 to 2"),
    ("frequency-penalty", float, "X", "-2 to 2"),
)


class UserError(Exception):
    """Something the user can put right; shown as one sentence."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand. Returns 0, 1 after a failure, 2 for a wrong command line, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["serve"]:  # its flags are the server's, with the server's help
        from fastllm.server.run import main as serve

        return serve(given[1:], prog="fastllm serve", positional_model=True)
    if given[:1] == ["run-batch"]:
        from fastllm.server.batch import main as run_batch

        return run_batch(given[1:])
    parser = _make_parser()
    args = parser.parse_args(given)
    if args.command is None:
        parser.print_help()
        return 2
    return _guarded(args, parser)


def _guarded(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from fastllm.errors import BAD_MODEL, FastllmError, LoadError, RequestError

    try:
        run: Callable[[argparse.Namespace], int] = args.run
        return run(args)
    except UserError as exc:
        print(f"fastllm {args.command}: {exc}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1
    except LoadError as exc:
        print(f"fastllm {args.command}: model error: {exc}", file=sys.stderr)
        return BAD_MODEL
    except (FastllmError, RequestError, ValueError, OSError) as exc:
        print(f"fastllm {args.command}: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _make_parser() -> argparse.ArgumentParser:
    from fastllm.arg_parser import FlexibleArgumentParser, Version
    from fastllm.quantize.command import add_flags as add_quantize_flags
    from fastllm.quantize.command import run as quantize_command
    from fastllm.server.key_command import add_flags as add_key_flags
    from fastllm.server.key_command import run as key_command

    parser = FlexibleArgumentParser(
        prog="fastllm",
        description="Runs large language models: as a server, in a terminal, from a script.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=Version, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    commands.add_parser("serve", help="serve a model over the OpenAI API", add_help=False)
    commands.add_parser("run-batch", help="answer a file of requests", add_help=False)

    chat = commands.add_parser("chat", help="talk to a model in the terminal", epilog=_EXAMPLES, **_format())
    chat.add_argument("--url", help="talk to a running server instead of loading a model")
    chat.add_argument("--api-key", metavar="KEY", help="key of that server (or FASTLLM_API_KEY)")
    chat.add_argument("--system", metavar="TEXT", help="system message")
    _add_model_flags(chat, optional=True)
    chat.set_defaults(run=_chat)

    generate = commands.add_parser("generate", help="complete a prompt", epilog=_EXAMPLES, **_format())
    generate.add_argument("--prompt", metavar="TEXT", help="text to continue; without it, standard input")
    _add_model_flags(generate, optional=False)
    generate.set_defaults(run=_generate)

    export = commands.add_parser("export", help="write a bundle that C++ programs open", epilog=_EXAMPLES, **_format())
    export.add_argument("model", metavar="MODEL", help="folder, GGUF file or hub id")
    export.add_argument("folder", metavar="DIR", help="where to write the bundle")
    export.add_argument(
        "--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="of the weights"
    )
    export.set_defaults(run=_export)

    quantize = commands.add_parser(
        "quantize", help="write a GPTQ or AWQ checkpoint of a 16-bit one", epilog=_EXAMPLES, **_format()
    )
    add_quantize_flags(quantize)
    quantize.set_defaults(run=quantize_command)

    key = commands.add_parser("key", help="make an API key for `serve --api-key-file`", epilog=_EXAMPLES, **_format())
    add_key_flags(key)
    key.set_defaults(run=key_command)
    return parser


def _format() -> dict[str, Any]:
    return {"formatter_class": argparse.RawDescriptionHelpFormatter}


def _add_model_flags(parser: argparse.ArgumentParser, *, optional: bool) -> None:
    from fastllm.engine_args import EngineArgs

    parser.add_argument(
        "model_tag", metavar="MODEL", nargs="?" if optional else None, help="folder, GGUF file, hub id or null"
    )
    sampling = parser.add_argument_group("sampling", "Defaults are the model's own.")
    for name, kind, metavar, text in _SAMPLING_FLAGS:
        sampling.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="end at this text; repeatable")
    sampling.add_argument("--ignore-eos", action="store_true", default=None, help="go on to the token limit")
    sampling.add_argument("--sampling-seed", type=int, metavar="N", help="makes the answer repeatable")
    EngineArgs.add_cli_args(parser)


def _engine_args(args: argparse.Namespace) -> EngineArgs:
    from fastllm.engine_args import EngineArgs

    if args.model_tag:
        args.model = args.model_tag
    try:
        return EngineArgs.from_cli_args(args)
    except ValueError as exc:
        raise UserError(str(exc)) from None


def sampling_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling flags that were given, by the API's names."""
    names = [name.replace("-", "_") for name, *_ in _SAMPLING_FLAGS] + ["stop", "ignore_eos"]
    fields = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.sampling_seed is not None:
        fields["seed"] = args.sampling_seed
    return fields


def sampling_params(args: argparse.Namespace, defaults: dict[str, Any]) -> SamplingParams:
    """Streaming parameters from the flags, over the model's defaults; no --max-tokens means the rest of the context."""
    from fastllm.sampling import RequestOutputKind, SamplingParams

    fields = {"max_tokens": None, **defaults, **sampling_fields(args)}
    try:
        return SamplingParams(**fields, output_kind=RequestOutputKind.DELTA)
    except ValueError as exc:
        raise UserError(str(exc)) from None


def _chat(args: argparse.Namespace) -> int:
    from fastllm.terminal import LocalChat, RemoteChat, converse

    if bool(args.url) == bool(args.model_tag):
        raise UserError("name a MODEL to load, or give the --url of a server.")
    talker = RemoteChat(args.url, args.api_key, sampling_fields(args)) if args.url else None
    if talker is None:
        return converse(lambda: LocalChat(_engine_args(args), lambda d: sampling_params(args, d)), args.system)
    return converse(lambda: talker, args.system)


def _generate(args: argparse.Namespace) -> int:
    from fastllm.terminal import complete

    prompt = args.prompt
    if prompt is None:
        if sys.stdin.isatty():
            raise UserError("give a --prompt, or pipe text into it.")
        prompt = sys.stdin.read()
    if not prompt:
        raise UserError("the prompt is empty.")
    return complete(_engine_args(args), prompt, lambda defaults: sampling_params(args, defaults))


def _export(args: argparse.Namespace) -> int:
    from fastllm.export import export

    export(args.model, args.folder, dtype=args.dtype)
    print(f"wrote {args.folder}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
