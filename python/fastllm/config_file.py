"""Flags from a YAML file: its keys are flags without the dashes, its values what would follow them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastllm.arg_parser import parse_strings

if TYPE_CHECKING:
    import argparse

_MAX_BYTES = 1 << 20


def as_arguments(path: str, known: Mapping[str, argparse.Action]) -> list[str]:
    """The command line that the file stands for, given the flags that exist. Raises ValueError with a sentence."""
    import yaml

    try:
        with Path(path).open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}.") from error
    if len(text) > _MAX_BYTES:
        raise ValueError(f"--config {path} has more than {_MAX_BYTES} bytes.")
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"--config {path} is not valid YAML: {str(error)[:200]}") from error
    if content is None:
        return []
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"--config {path} must map flags to values, such as `max-model-len: 4096`.")
    return [argument for key, value in content.items() for argument in _arguments(path, key, value, known)]


def _arguments(path: str, key: str, value: Any, known: Mapping[str, argparse.Action]) -> list[str]:
    name = key.replace("_", "-")
    flag = "--model" if name == "model-tag" else f"--{name}"
    if name == "config":
        raise ValueError(f"--config {path} cannot name another file in `config`.")
    if value is None:
        return []
    if value is True:
        return [flag]
    if value is False:
        negation = f"--no-{name}"
        return [negation] if negation in known or flag not in known else [flag, "false"]
    if isinstance(value, dict):
        return [flag, json.dumps(value)]
    if isinstance(value, list):
        if flag in known and known[flag].type is parse_strings:
            return [flag, json.dumps(value)]
        return [flag, *map(str, value)]
    return [f"{flag}={value}"]  # joined, so that a value may begin with a dash
