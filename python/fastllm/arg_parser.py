"""Command-line parsing that accepts what vLLM users type: underscores in flags, --no-x, sizes such as 4k and 4K."""

from __future__ import annotations

import argparse
import difflib
import re
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


class OnOff(argparse.Action):
    """A flag with its negation: --x and --no-x; --enable-x also has --disable-x."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        options = list(option_strings)
        for option in option_strings:
            if option.startswith("--"):
                options.append("--no-" + option[2:])
            if option.startswith("--enable-"):
                options.append("--disable-" + option[len("--enable-") :])
        settings.pop("type", None)
        super().__init__(options, dest, nargs=0, **settings)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        given = option_string or ""
        positive = self.option_strings[0]
        negated = given.startswith("--no-") or (given.startswith("--disable-") and positive.startswith("--enable-"))
        setattr(namespace, self.dest, not negated)


class FlexibleArgumentParser(argparse.ArgumentParser):
    """Treats --max_model_len as --max-model-len; values stay as they are."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        import sys

        given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([_dashed(a) for a in given], namespace)

    def error(self, message: str) -> NoReturn:
        """One sentence and the flag that was probably meant, instead of the names of all flags."""
        unknown = re.findall(r"--[\w-]+", message.partition("unrecognized arguments: ")[2])
        meant = [m for flag in unknown for m in difflib.get_close_matches(flag, self._option_string_actions, 1)]
        hint = f" (did you mean {', '.join(meant)}?)" if meant else ""
        self.exit(2, f"{self.prog}: error: {message}{hint}\n{self.prog} --help lists everything.\n")


def _dashed(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value
