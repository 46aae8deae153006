"""What the output must look like, with the names users know from vLLM."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass
class StructuredOutputsParams:
    """Exactly one constraint, and how JSON is written.

    json: a JSON schema, as a dict or as text. regex: what the whole output matches; no look-around, no
    back-references. choice: the possible outputs. grammar: Lark or GBNF. json_object: any JSON object.
    structural_tag: free text with constrained parts, see fastllm.grammar.structural_tag. disable_any_whitespace: JSON
    without whitespace outside strings. disable_additional_properties: objects have no properties but those listed.
    whitespace_pattern: regex of the whitespace between JSON tokens; by default a space, or a line break with at most 40
    characters of indentation. Raises ValueError naming the field.

    >>> StructuredOutputsParams(choice=["yes", "no"]).kind
    'choice'
    """

    json: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        if self.json_object is False:
            self.json_object = None
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            chosen = " and ".join(given) or "none"
            raise ValueError(f"structured_outputs needs exactly one of {', '.join(KINDS)}; got {chosen}.")
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"structured_outputs: {name} must be a string.")
            if value == "":
                raise ValueError(f"structured_outputs: {name} must not be empty.")
        if self.json is not None and not isinstance(self.json, str | Mapping | bool):
            raise ValueError("structured_outputs: json must be a JSON schema, which is an object or true.")
        if self.structural_tag is not None and not isinstance(self.structural_tag, str | Mapping):
            raise ValueError("structured_outputs: structural_tag must be an object or its JSON text.")
        if self.json_object is not None and self.json_object is not True:
            raise ValueError("structured_outputs: json_object must be true or false.")
        if self.choice is not None:
            if not isinstance(self.choice, list) or not self.choice or not all(isinstance(c, str) for c in self.choice):
                raise ValueError("structured_outputs: choice must be a list of at least one string.")
            if any(not c for c in self.choice):
                raise ValueError("structured_outputs: choice must not contain an empty string.")
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"structured_outputs: {name} must be true or false.")

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def key(self) -> str:
        """Equal for equal constraints."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps({name: value for name, value in values.items() if value is not None}, default=dict)

    @classmethod
    def of(cls, given: Any) -> StructuredOutputsParams:
        """From an instance, or from the dict that means the same. Raises ValueError for unknown fields."""
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise ValueError("structured_outputs must be an object such as {'json': {...}} or {'choice': [...]}.")
        known = {field.name for field in fields(cls)}
        unknown = sorted(str(name) for name in given if name not in known and not str(name).startswith("_"))
        if unknown:
            raise ValueError(
                f"structured_outputs: {unknown[0][:60]!r} is not a field of it; it takes {', '.join(sorted(known))}."
            )
        return cls(**{name: value for name, value in given.items() if name in known and value is not None})


# The name of vLLM's earlier versions.
GuidedDecodingParams = StructuredOutputsParams
