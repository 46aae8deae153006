"""Command-line parsing that accepts what vLLM users type: underscores in flags, --no-x, sizes such as 4k and 4K, parts
of JSON values (--x.key value), and flags from a YAML file (--config).
"""

from __future__ import annotations

import argparse
import copy
import difflib
import json
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str) -> int:
    """A whole number with an optional unit: 4k is 4000, 4K is 4096, 1.5k is 1500.

    >>> parse_size("4k"), parse_size("4K"), parse_size("25.6k")
    (4000, 4096, 25600)
    """
    match = re.fullmatch(r"(-?\d+)|(\d+(?:\.\d+)?)([kmgtKMGT])", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 4096, 4k (4000) or 4K (4096)")
    if match.group(1):
        return int(match.group(1))
    value = float(match.group(2)) * _UNITS[match.group(3)]
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


def parse_length(text: str) -> int | None:
    """A size, or "auto" or -1 for what the model allows."""
    return None if text.strip() in ("auto", "-1") else parse_size(text)


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def parse_strings(text: str) -> list[str]:
    """A JSON list of strings, or one string as it is.

    >>> parse_strings('["a", "b"]'), parse_strings("*")
    (['a', 'b'], ['*'])
    """
    if not text.startswith("["):
        return [text]
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON: {error}") from error
    if not all(isinstance(item, str) for item in value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON list of strings")
    return list(value)


def parse_count(text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, got {text!r}")
    return int(text)


def parse_seconds(text: str) -> float:
    """Seconds, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"must be seconds, 0 or more, got {text!r}")
    return value


class OnOff(argparse.Action):
    """A flag with its negation: --x and --no-x; --enable-x also has --disable-x, and --disable-x has --enable-x."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        options = list(option_strings)
        for option in option_strings:
            if option.startswith("--"):
                options.append("--no-" + option[2:])
            for prefix, opposite in (("--enable-", "--disable-"), ("--disable-", "--enable-")):
                if option.startswith(prefix):
                    options.append(opposite + option[len(prefix) :])
        settings.pop("type", None)
        super().__init__(options, dest, nargs=0, **settings)
        self._positive = frozenset(option_strings)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, option_string in self._positive)


class JsonObject(argparse.Action):
    """A JSON object that grows with every use, so that --x.key value adds to --x '{...}'."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        merged = copy.deepcopy(getattr(namespace, self.dest, None) or {})
        _merge(merged, values)
        setattr(namespace, self.dest, merged)


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


class Version(argparse.Action):
    """Prints the version only when asked, so that no other command pays for finding it."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from fastllm import __version__

        print(f"fastllm {__version__}")
        parser.exit()


class FlexibleArgumentParser(argparse.ArgumentParser):
    """Treats --max_model_len as --max-model-len; values stay as they are."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        given = [_dashed(a) for a in (sys.argv[1:] if args is None else args)]
        if "--config" in self._option_string_actions:
            namespace = self._with_config(given, namespace)
        return super().parse_known_args(self._joined(given), namespace)

    def _with_config(self, given: list[str], namespace: Any) -> Any:
        """Fills the namespace from the file of --config; what is on the command line is parsed over it."""
        from fastllm.config_file import as_arguments

        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config")
        path = finder.parse_known_args(given)[0].config
        if path is None:
            return namespace
        try:
            arguments = as_arguments(path, self._option_string_actions)
        except ValueError as error:
            self.error(str(error))
        namespace, unknown = super().parse_known_args(self._joined(arguments), namespace)
        if unknown:
            self.error(f"{path}: unrecognized arguments: {' '.join(unknown)}")
        return namespace

    def _joined(self, given: list[str]) -> list[str]:
        """`--x.key value` and `--x.key=value` of JSON flags as `--x={"key": value}`."""
        result: list[str] = []
        rest = iter(given)
        for argument in rest:
            match = re.fullmatch(r"(--?[A-Za-z][\w-]*)\.([\w.-]+)(?:=(.*))?", argument, re.DOTALL)
            if not match or not isinstance(self._option_string_actions.get(match[1]), JsonObject):
                result.append(argument)
                continue
            text = match[3] if match[3] is not None else next(rest, None)
            if text is None:
                self.error(f"argument {argument}: expected one argument")
            try:
                value: Any = json.loads(text)
            except ValueError:
                value = text
            for key in reversed(match[2].split(".")):
                value = {key: value}
            result += [match[1], json.dumps(value)]
        return result

    def error(self, message: str) -> NoReturn:
        """One sentence: the reason for a flag of vLLM's that is refused, or the flag that was probably meant."""
        from fastllm.refused_flags import reason_for

        hint = ""
        for flag in re.findall(r"(?<!\S)--?[A-Za-z][\w.-]*", message.partition("unrecognized arguments: ")[2]):
            reason = reason_for(flag)
            if reason:
                self.exit(2, f"{self.prog}: error: {flag}: {reason}.\n")
            meant = difflib.get_close_matches(flag, self._option_string_actions, 1)
            hint = hint or (f" (did you mean {meant[0]}?)" if meant else "")
        self.exit(2, f"{self.prog}: error: {message}{hint}\n{self.prog} --help lists everything.\n")


def _dashed(argument: str) -> str:
    """The flag with dashes for underscores; the keys of --x.some_key and values keep theirs."""
    if not argument.startswith("--"):
        return argument
    name = re.split(r"[.=]", argument, maxsplit=1)[0]
    return name.replace("_", "-") + argument[len(name) :]
