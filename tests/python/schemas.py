"""Twenty JSON schemas of the kinds people use, and a check that shares no code with what it checks."""

from __future__ import annotations

import re
from typing import Any


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_WORD = {"type": "string", "pattern": "^[a-z]{1,8}$"}
_TREE = {
    "$defs": {"node": _object(value={"type": "boolean"}, next={"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]})},
    "$ref": "#/$defs/node",
}

SCHEMAS: list[dict[str, Any]] = [
    {"const": {"fixed": [1, 2, None]}},
    {"type": "boolean"},
    {"type": "null"},
    {"enum": ["red", "green", 3, None]},
    {"type": "integer", "minimum": 10, "maximum": 99},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "string", "maxLength": 10},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    {"type": "string", "format": "date"},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
    {"type": "array", "prefixItems": [{"type": "boolean"}, _WORD], "items": False, "minItems": 2},
    {"anyOf": [{"type": "boolean"}, _WORD]},
    {"oneOf": [{"const": "on"}, {"const": "off"}]},
    {"type": ["boolean", "null"]},
    _object(name=_WORD, age={"type": "integer", "minimum": 0, "maximum": 150}),
    _object(place=_object(city=_WORD, zip={"type": "string", "pattern": "^[0-9]{5}$"}), ok={"type": "boolean"}),
    _object(tags={"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}),
    _object(kind={"const": "point"}, at={"type": "array", "items": {"enum": [0, 1]}, "minItems": 2, "maxItems": 2}),
    {"type": "object", "properties": {"maybe": {"type": "boolean"}}, "additionalProperties": False},
    _TREE,
]

_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, _TYPES[name])


def fits(value: Any, schema: Any, root: Any = None) -> bool:
    """Whether a value fits one of the schemas here; keywords that they do not use are not known."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    types = schema.get("type", [])
    if types and not any(_is(value, name) for name in ([types] if isinstance(types, str) else types)):
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    for name, check in (("anyOf", any), ("oneOf", any), ("allOf", all)):
        if name in schema and not check(fits(value, one, root) for one in schema[name]):
            return False
    if isinstance(value, str):
        if "pattern" in schema and not re.search(schema["pattern"], value):
            return False
        if schema.get("format") == "date" and not re.fullmatch(r"\d{4}-\d\d-\d\d", value):
            return False
        return len(value) <= schema.get("maxLength", 1 << 30)
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        rest = schema.get("items", True)
        return schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 1 << 30) and all(
            fits(item, first[i] if i < len(first) else rest, root) for i, item in enumerate(value)
        )
    if isinstance(value, dict):
        known = schema.get("properties", {})
        other = schema.get("additionalProperties", True)
        return set(schema.get("required", ())) <= set(value) and all(
            fits(item, known.get(name, other), root) for name, item in value.items()
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    return True
