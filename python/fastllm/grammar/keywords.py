"""JSON schemas in keywords that a grammar can enforce while text is written: what may not be, or what depends on
something else, becomes a choice of what may be.

  not S                     anyOf: for each keyword of S what does not satisfy it
  if S then T else E        anyOf: S and T | not S and E
  dependentRequired {a: b}  anyOf: no a | a and b
  uniqueItems               anyOf: the arrangements of a few listed values

Pure functions. What has no such form is an error that names it: a schema that was given must hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import permutations
from math import perm
from typing import Any

from fastllm.grammar.limits import GrammarError, too_complex

Schema = dict[str, Any]

_TYPES = ("string", "number", "boolean", "null", "object", "array")
# What says nothing about a value, or nothing that is checked.
_ANNOTATIONS = frozenset(
    "title description default examples deprecated readOnly writeOnly format contentEncoding contentMediaType "
    "contentSchema $comment $schema $id $anchor $defs definitions discriminator nullable then else".split()
)
FORMATS = frozenset("date-time date time duration email hostname ipv4 ipv6 uuid uri".split())
_MAX_NODES = 20_000  # of what is made, which repeats parts of what was given
_MAX_ARRANGED = 110  # arrays without repetition: four values of any number, or ten of which two are taken
_MAX_OTHER_TEXT = 2000  # characters of all strings that a string may not be
_ANY_TEXT = "(.|\\n)*"
_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions")
_OF_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_OF_ONE = ("items", "additionalProperties", "additionalItems")
# keyword -> type of what it speaks of, the keyword that says the opposite, what is added to its number there
_OPPOSITES = {
    "minimum": ("number", "exclusiveMaximum", 0),
    "maximum": ("number", "exclusiveMinimum", 0),
    "exclusiveMinimum": ("number", "maximum", 0),
    "exclusiveMaximum": ("number", "minimum", 0),
    "minLength": ("string", "maxLength", -1),
    "maxLength": ("string", "minLength", 1),
    "minItems": ("array", "maxItems", -1),
    "maxItems": ("array", "minItems", 1),
    "minProperties": ("object", "maxProperties", -1),
    "maxProperties": ("object", "minProperties", 1),
}


def enforceable(schema: Schema | bool) -> Any:
    """The same schema without keywords that a grammar does not know. Raises GrammarError naming what has no such form.

    >>> enforceable({"type": "boolean", "not": {"const": True}})
    {'type': 'boolean', 'allOf': [{'anyOf': [{'type': 'boolean', 'enum': [False]}]}]}
    """
    try:
        made = _Rewriter().rewrite(schema)
    except GrammarError:
        raise
    except (TypeError, AttributeError, ValueError):
        raise GrammarError(
            "The JSON schema has a keyword whose value is of the wrong type.", "invalid_schema"
        ) from None
    if made is False:
        raise GrammarError("The JSON schema cannot be satisfied: it excludes every value.", "invalid_schema")
    return made


def _unsupported(what: str) -> GrammarError:
    return GrammarError(f"The JSON schema uses what is not supported: {what}.", "unsupported_schema")


def _types_of(schema: Any) -> list[str]:
    """Types that a value may have, as far as `type` tells."""
    given = schema.get("type") if isinstance(schema, Mapping) else None
    types = [given] if isinstance(given, str) else given
    return [t for t in types if isinstance(t, str)] if isinstance(types, list) and types else list(_TYPES)


def _any_of(schemas: Sequence[Any]) -> Any:
    """One of them; False if there is none."""
    if any(schema is True or schema == {} for schema in schemas):
        return True
    possible = [schema for schema in schemas if schema is not False]
    return {"anyOf": possible} if possible else False


def _all_of(*schemas: Any) -> Any:
    if any(schema is False for schema in schemas):
        return False
    some = [schema for schema in schemas if schema is not True and schema != {}]
    return some[0] if len(some) == 1 else {"allOf": some} if some else True


def _without(name: str) -> Schema:
    return {"properties": {name: False}}


class _Rewriter:
    """Made for one schema."""

    def __init__(self) -> None:
        self._left = _MAX_NODES

    def rewrite(self, schema: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise too_complex("The JSON schema is too complex: its conditions multiply.")
        if not isinstance(schema, dict):
            return schema
        made: Schema = {}
        also: list[Any] = []
        for name, value in schema.items():
            if name in _OF_NAMES and isinstance(value, dict):
                made[name] = {key: self.rewrite(one) for key, one in value.items()}
            elif (name in _OF_LISTS or name == "items") and isinstance(value, list):
                made[name] = [self.rewrite(one) for one in value]
            elif name in _OF_ONE:
                made[name] = self.rewrite(value)
            elif (rule := _RULES.get(name)) is not None:
                also += rule(self, value, schema)
            elif name == "format" and isinstance(value, str) and value not in FORMATS:
                continue  # says what the text means
            else:
                made[name] = value
        if any(one is False for one in also):
            return False
        also = [one for one in also if one is not True]
        if also:
            made["allOf"] = [*made.get("allOf", []), *also]
        return made

    # ---- keywords: what must hold beside the rest of the schema

    def _not(self, value: Any, schema: Schema) -> list[Any]:
        return [self.negate(value, schema)]

    def _if(self, value: Any, schema: Schema) -> list[Any]:
        if "then" not in schema and "else" not in schema:
            return []
        then, otherwise = (self.rewrite(schema.get(name, True)) for name in ("then", "else"))
        met = _all_of(self.rewrite(value), then)
        return [_any_of([met, _all_of(self.negate(value, schema), otherwise)])]

    def _part_of_if(self, value: Any, schema: Schema) -> list[Any]:
        return []

    def _unique_items(self, value: Any, schema: Schema) -> list[Any]:
        most = schema.get("maxItems")
        if value is not True or (isinstance(most, int) and most <= 1):
            return []
        values = _listed(schema.get("items"))
        least = schema.get("minItems", 0)
        lengths = range(least, min(len(values or ()), len(values or ()) if most is None else most) + 1)
        if values is None or "prefixItems" in schema or sum(perm(len(values), k) for k in lengths) > _MAX_ARRANGED:
            raise _unsupported("uniqueItems, but of a few items that an enum lists")
        arrays = [
            {"type": "array", "prefixItems": [{"const": one} for one in row], "items": False, "minItems": length}
            for length in lengths
            for row in permutations(values, length)
        ]
        self._left -= 4 * len(arrays)
        return [_any_of([*arrays, *_other_types("array", schema)])]

    def _contains(self, value: Any, schema: Schema) -> list[Any]:
        if schema.get("minContains") == 0 and "maxContains" not in schema:
            return []
        raise _unsupported("contains")

    def _part_of_contains(self, value: Any, schema: Schema) -> list[Any]:
        return []

    def _property_names(self, value: Any, schema: Schema) -> list[Any]:
        if value is True or value == {} or value == {"type": "string"}:
            return []
        rest = {key: one for key, one in value.items() if key != "type"} if isinstance(value, dict) else {}
        known = schema.get("properties", {})
        if "patternProperties" in schema or not isinstance(known, dict):
            raise _unsupported("propertyNames beside patternProperties")
        values = _listed(rest)
        if values is not None and len(rest) == 1:
            names = [one for one in values if isinstance(one, str)]
            others = {name: False for name in known if name not in names}
            return [{"properties": {**dict.fromkeys(names, True), **others}, "additionalProperties": False}]
        pattern = _pattern_of_names(rest)
        if pattern is None or known:
            raise _unsupported("propertyNames of other forms than an enum, or a pattern or lengths without properties")
        return [{"patternProperties": {pattern: True}, "additionalProperties": False}]

    def _dependent(self, value: Any, schema: Schema) -> list[Any]:
        """dependentRequired, dependentSchemas, and both in the older dependencies."""
        if not isinstance(value, dict):
            raise _unsupported("dependencies that are not an object")
        also = []
        for name, needed in value.items():
            needs = {"required": needed} if isinstance(needed, list) else self.rewrite(needed)
            has = _all_of({"required": [name]}, needs)
            also.append(_any_of([_without(name), has, *_other_types("object", schema)]))
        return also

    def _unevaluated(self, value: Any, schema: Schema, name: str, same: Iterable[str]) -> list[Any]:
        if value is True or value == {}:
            return []
        if any(key in schema for key in ("allOf", "anyOf", "oneOf", "if", "not", "$ref", "dependentSchemas")):
            raise _unsupported(f"unevaluated{name.capitalize()} beside schemas that apply to the same value")
        keyword = next(iter(same))
        return [] if any(key in schema for key in same) else [{keyword: self.rewrite(value)}]

    def _unevaluated_properties(self, value: Any, schema: Schema) -> list[Any]:
        if "additionalProperties" in schema:
            return []
        named = {
            key: {one: True for one in schema[key]} for key in ("properties", "patternProperties") if key in schema
        }
        return [{**named, **one} for one in self._unevaluated(value, schema, "properties", ("additionalProperties",))]

    def _unevaluated_items(self, value: Any, schema: Schema) -> list[Any]:
        first = {"prefixItems": [True] * len(schema["prefixItems"])} if "prefixItems" in schema else {}
        return [{**first, **one} for one in self._unevaluated(value, schema, "items", ("items",))]

    # ---- negation

    def negate(self, schema: Any, base: Any) -> Any:
        """What does not satisfy `schema`, of values that satisfy `base`; False if there is nothing."""
        self._left -= 1
        if self._left < 0:
            raise too_complex("The JSON schema is too complex: its conditions multiply.")
        if isinstance(schema, bool):
            return not schema
        if not isinstance(schema, dict):
            raise _unsupported("not of what is no schema")
        ways: list[Any] = []
        for name, value in schema.items():
            if name == "if":
                fails, misses = (self.negate(schema.get(key, True), base) for key in ("then", "else"))
                ways += [_all_of(self.rewrite(value), fails), _all_of(self.negate(value, base), misses)]
            elif name not in _ANNOTATIONS:
                ways += self._ways_to_fail(name, value, base)
        return _any_of(ways)

    def _ways_to_fail(self, name: str, value: Any, base: Any) -> list[Any]:
        types = _types_of(base)
        if name == "not":
            return [self.rewrite(value)]
        if name == "type":
            return _of_other_types([value] if isinstance(value, str) else value, types)
        if name in ("const", "enum"):
            return _other_values([value] if name == "const" else value, types)
        if name == "anyOf":
            return [_all_of(*(self.negate(one, base) for one in value))]
        if name == "allOf":
            return [self.negate(one, base) for one in value]
        if name == "required":
            return [{"type": "object", **_without(key)} for key in value] if "object" in types else []
        if name == "properties":
            known = base.get("properties", {}) if isinstance(base, dict) else {}
            return [
                {"type": "object", "properties": {key: other}, "required": [key]}
                for key, one in value.items()
                if "object" in types and (other := self.negate(one, known.get(key))) is not False
            ]
        if name in _OPPOSITES and isinstance(value, int | float):
            kind, opposite, more = _OPPOSITES[name]
            has = kind in types or (kind == "number" and "integer" in types)
            return [{"type": kind, opposite: value + more}] if has and (more >= 0 or value + more >= 0) else []
        raise _unsupported(f"not, or if, of {name}")


_RULES: dict[str, Callable[[_Rewriter, Any, Schema], list[Any]]] = {
    "not": _Rewriter._not,
    "if": _Rewriter._if,
    "then": _Rewriter._part_of_if,
    "else": _Rewriter._part_of_if,
    "uniqueItems": _Rewriter._unique_items,
    "contains": _Rewriter._contains,
    "minContains": _Rewriter._part_of_contains,
    "maxContains": _Rewriter._part_of_contains,
    "propertyNames": _Rewriter._property_names,
    "dependentRequired": _Rewriter._dependent,
    "dependentSchemas": _Rewriter._dependent,
    "dependencies": _Rewriter._dependent,
    "unevaluatedProperties": _Rewriter._unevaluated_properties,
    "unevaluatedItems": _Rewriter._unevaluated_items,
}


def _other_types(kind: str, schema: Schema) -> list[Any]:
    """A choice for values that a keyword of one type says nothing about."""
    others = [one for one in _types_of(schema) if one != kind]
    return [{"type": others}] if others else []


def _listed(schema: Any) -> list[Any] | None:
    """The values of a schema that lists them, once each."""
    if not isinstance(schema, dict):
        return None
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values is None:
        values = {"boolean": [False, True], "null": [None]}.get(str(schema.get("type")))
    if not isinstance(values, list):
        return None
    return list({json.dumps(value, sort_keys=True): value for value in values}.values())


def _pattern_of_names(schema: Schema) -> str | None:
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    if set(schema) == {"pattern"}:
        return str(schema["pattern"])
    return f"^(.|\\n){{{least},{most}}}$" if schema and set(schema) <= {"minLength", "maxLength"} else None


def _of_other_types(excluded: Sequence[str], types: Sequence[str]) -> list[Any]:
    if "integer" in excluded and "number" not in excluded and "number" in types:
        raise _unsupported("not of type integer, where numbers are allowed")
    gone = {*excluded, "integer"} if "number" in excluded else {*excluded}
    left = [one for one in types if one not in gone]
    return [{"type": left}] if left else []


def _other_values(values: Sequence[Any], types: Sequence[str]) -> list[Any]:
    if any(isinstance(value, dict | list) for value in values):
        raise _unsupported("not, or if, of a listed object or array")
    texts = [value for value in values if isinstance(value, str)]
    numbers = sorted({value for value in values if isinstance(value, int | float) and not isinstance(value, bool)})
    truths = [value for value in (False, True) if not any(value is one for one in values)]
    ways: list[Any] = []
    untouched: list[str] = []
    for kind in types:
        if kind == "string" and texts:
            ways.append({"type": "string", "pattern": _other_text(texts)})
        elif kind in ("number", "integer") and numbers:
            ends = [None, *numbers, None]
            for low, high in zip(ends, ends[1:], strict=False):
                way = {"type": kind, "exclusiveMinimum": low, "exclusiveMaximum": high}
                empty = kind == "integer" and low is not None and high is not None and int(high) - int(low) < 2
                if not empty:
                    ways.append({key: value for key, value in way.items() if value is not None})
        elif kind == "boolean" and len(truths) < 2:
            if truths:
                ways.append({"type": "boolean", "enum": truths})
        elif kind != "null" or None not in values:
            untouched.append(kind)
    return [*ways, {"type": untouched}] if untouched else ways


def _other_text(texts: Sequence[str]) -> str:
    """A regex of every text but these: a beginning of one of them, and then none or another character."""
    if sum(map(len, texts)) > _MAX_OTHER_TEXT:
        raise too_complex(f"The JSON schema excludes strings of more than {_MAX_OTHER_TEXT} characters together.")
    following: dict[str, set[str]] = {}
    for text in texts:
        for at in range(len(text) + 1):
            following.setdefault(text[:at], set()).update(text[at : at + 1])
    ways = []
    for start, nexts in sorted(following.items()):
        other = f"[^{''.join(map(_escaped, sorted(nexts)))}]{_ANY_TEXT}" if nexts else "(.|\\n)" + _ANY_TEXT
        ways.append(f"{_escaped(start)}{other}" if start in texts else f"{_escaped(start)}({other})?")
    return f"^({'|'.join(ways)})$"


def _escaped(text: str) -> str:
    return re.sub(r"[^\w\s<>]", r"\\\g<0>", text)
