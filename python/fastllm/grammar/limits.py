"""What a schema, a regex or a grammar may cost. Pure functions over what the user sent; nothing is compiled here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


class GrammarError(ValueError):
    """A constraint that cannot be used. code: what kind of reason, for programs."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class GrammarLimits:
    max_schema_bytes: int = 64 << 10  # bytes of a schema, a regex, a grammar or all choices
    max_schema_nodes: int = 5000  # values in a schema, nested ones included
    max_schema_depth: int = 64  # levels of nesting of the JSON text of a schema
    max_regex_size: int = 20_000  # characters that one match of a regex can be forced to have
    max_compile_time_s: float = 1.0


def too_complex(what: str) -> GrammarError:
    return GrammarError(what, "schema_too_complex")


def check_bytes(text: str, limits: GrammarLimits, what: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise GrammarError(f"{what} contains characters that are no valid Unicode.", "invalid_unicode") from None
    if size > limits.max_schema_bytes:
        raise too_complex(f"{what} has {size} bytes; at most {limits.max_schema_bytes} are allowed.")


def read_schema(given: Any, limits: GrammarLimits) -> dict[str, Any] | bool:
    """The schema as a value, within the limits and without references that leave it. Raises GrammarError."""
    if isinstance(given, str):
        check_bytes(given, limits, "The JSON schema")
        try:
            given = json.loads(given)
        except RecursionError:
            raise too_complex(_depth_text(limits)) from None
        except ValueError as error:
            raise GrammarError(f"The JSON schema is not valid JSON: {error}.", "invalid_schema") from None
    if given is True:
        return True
    if not isinstance(given, dict):
        raise GrammarError("The JSON schema must be an object, or true for any JSON.", "invalid_schema")
    check_value(given, limits)
    try:
        check_bytes(json.dumps(given, ensure_ascii=False), limits, "The JSON schema")
    except (TypeError, ValueError) as error:
        if isinstance(error, GrammarError):
            raise
        raise GrammarError(f"The JSON schema is not plain JSON: {error}.", "invalid_schema") from None
    return given


def check_value(schema: Any, limits: GrammarLimits) -> None:
    """Counts the values of a schema level by level, so that its depth is never the depth of our stack."""
    level, depth, nodes = [schema], 0, 1
    while level:
        if depth > limits.max_schema_depth:
            raise too_complex(_depth_text(limits))
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                _check_object(value, limits)
                below.extend(value.values())
            elif isinstance(value, list):
                below.extend(value)
        nodes += len(below)
        if nodes > limits.max_schema_nodes:
            raise too_complex(f"The JSON schema has more than {limits.max_schema_nodes} values.")
        level = [value for value in below if isinstance(value, dict | list)]
        depth += 1


def _depth_text(limits: GrammarLimits) -> str:
    return f"The JSON schema is nested more than {limits.max_schema_depth} levels deep."


def _check_object(schema: dict[str, Any], limits: GrammarLimits) -> None:
    for name in ("$ref", "$dynamicRef"):
        target = schema.get(name)
        if isinstance(target, str) and not target.startswith("#"):
            raise GrammarError(
                f"The JSON schema refers to {target[:80]!r}; references can only point into the schema itself (#/...).",
                "unsupported_ref",
            )
    if isinstance(schema.get("pattern"), str):
        check_regex(schema["pattern"], limits)
    patterns = schema.get("patternProperties")
    for pattern in patterns if isinstance(patterns, dict) else ():
        check_regex(str(pattern), limits)
    for name in ("minItems", "minLength", "minProperties"):
        least = schema.get(name)
        if isinstance(least, int | float) and least > limits.max_regex_size:
            raise too_complex(f"The JSON schema asks for {name} {least:g}; at most {limits.max_regex_size} is allowed.")


def check_regex(pattern: str, limits: GrammarLimits) -> None:
    check_bytes(pattern, limits, "The regex")
    if regex_size(pattern) > limits.max_regex_size:
        raise too_complex(
            f"The repetitions of the regex multiply to more than {limits.max_regex_size} characters; make its counts "
            "smaller."
        )


def regex_size(pattern: str) -> int:
    """Characters of the pattern with every counted repetition written out; syntax errors are left to the compiler.

    >>> regex_size("a{3}"), regex_size("(ab{2}){10,}"), regex_size("[^]x]{4}[{9}]")
    (3, 30, 5)
    """
    sums, last, at = [0], 0, 0
    while at < len(pattern):
        char = pattern[at]
        if char == "(":
            sums.append(0)
            last = 0
        elif char == ")" and len(sums) > 1:
            last = sums.pop()
            sums[-1] += last
        elif char == "{":
            end = pattern.find("}", at, at + 32)
            counts = pattern[at + 1 : end].split(",") if end > 0 else []
            if counts and counts[0].strip().isdecimal() and len(counts) <= 2:
                numbers = [int(c) for c in counts if c.strip().isdecimal()]
                more = (max(numbers) - 1) * last
                sums[-1] += more
                last += more
                at = end
        elif char not in "*+?|^$":
            last = 1
            sums[-1] += 1
            if char == "\\":
                at += 1
            elif char == "[":
                at = _class_end(pattern, at)
        at += 1
    return sum(sums)


def _class_end(pattern: str, start: int) -> int:
    """The index of the bracket that closes the character class which opens at `start`."""
    at = start + 1
    at += pattern[at : at + 1] == "^"
    at += pattern[at : at + 1] == "]"
    while at < len(pattern) and pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return at
