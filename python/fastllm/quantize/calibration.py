"""Calibration text, cut into windows of token ids."""

from __future__ import annotations

import logging
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from fastllm.errors import InvalidArgument
from fastllm.quantize.config import QuantizeConfig
from fastllm.tokenizer import Tokenizer

log = logging.getLogger("fastllm")

# Prose and code in English that every Python has. For other languages and styles a user's own text serves better.
_MODULES = ("argparse.py", "difflib.py", "pathlib.py", "statistics.py", "subprocess.py", "typing.py")
_HELD_OUT_SHARE = 16  # one window in so many measures and is not calibrated with


@dataclass(frozen=True)
class Calibration:
    """Windows of equal length. held_out ones measure the perplexity; the weights never see them."""

    windows: list[list[int]]
    held_out: list[list[int]]
    source: str  # in words


def calibration(config: QuantizeConfig, tokenizer: Tokenizer, longest: int) -> Calibration:
    """The windows that `config` asks for, fewer with a warning where the text has no more.

    longest: the model's context, tokens. Raises InvalidArgument if the text fills less than two windows.
    """
    length = config.sample_length
    if length > longest:
        raise InvalidArgument(f"a calibration length of {length} tokens exceeds the model's context of {longest}.")
    text, source = _default_text() if config.calibration is None else _given_text(config.calibration)
    ids = tokenizer.encode(text, add_special_tokens=False)
    windows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    if len(windows) < 2:
        raise InvalidArgument(
            f"the calibration text is too short: {len(ids)} tokens do not fill 2 windows of {length}. "
            "Give more text, or a smaller --calibration-length."
        )
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer.encode("a")[:1] == [bos]:
        for window in windows:
            window[0] = bos
    random.Random(config.seed).shuffle(windows)
    held_out = min(max(1, config.num_samples // _HELD_OUT_SHARE), max(1, len(windows) // _HELD_OUT_SHARE))
    chosen = windows[held_out : held_out + config.num_samples]
    if len(chosen) < config.num_samples:
        log.warning("The calibration text fills %d windows, not the %d asked for.", len(chosen), config.num_samples)
    return Calibration(chosen, windows[:held_out], source)


def _default_text() -> tuple[str, str]:
    from pydoc_data.topics import topics

    folder = Path(sysconfig.get_path("stdlib"))
    files = [folder / name for name in _MODULES if (folder / name).is_file()]
    parts = [*topics.values(), *(file.read_text("utf-8") for file in files)]
    return "\n".join(parts), f"Python's own help texts and {len(files)} modules of its library"


def _given_text(given: str) -> tuple[str, str]:
    """A text cannot be mistaken for a file: one that names no file and has no white space is an error."""
    try:
        is_file = Path(given).is_file()
    except (OSError, ValueError):  # too long or unfit for a name
        is_file = False
    if is_file:
        return Path(given).read_text("utf-8", errors="replace"), given
    if not any(char.isspace() for char in given.strip()):
        raise InvalidArgument(f"there is no calibration file {given!r}.")
    return given, "the text given"
