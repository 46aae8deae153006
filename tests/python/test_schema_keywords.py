"""Keywords of JSON schemas that become choices: what the grammar lets a model write is what the schema allows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastllm.grammar.compiler import GrammarCompiler
from fastllm.grammar.keywords import enforceable
from fastllm.grammar.limits import GrammarError
from fastllm.grammar.params import StructuredOutputsParams
from grammar_fixtures import accepts

_SCALARS: list[Any] = ["", "a", "ab", "b", "abc", 0, 1, 2, 5, 7, -3, 1.5, True, False, None]
_VALUES: list[Any] = [*_SCALARS, [], ["a"], ["a", "b"], ["a", "a"], ["b", "a", "c"]]
_VALUES += [{}, {"a": 1}, {"b": 1}, {"a": 1, "b": 2}, {"x1": 1}, {"abc": 1}]
_SHAPES = [
    {name: value for name, value in (("kind", kind), ("n", n), ("m", m)) if value is not None}
    for kind in (None, "a", "b", "c")
    for n in (None, 1, 2)
    for m in (None, 1, 5)
]
_LETTERS = {"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True}
_OBJECT: dict[str, Any] = {"type": "object"}
_KIND: dict[str, Any] = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b", "c"]}, "n": {"type": "integer"}, "m": {"type": "integer"}},
    "required": ["kind"],
    "additionalProperties": False,
}
_IS_A = {"properties": {"kind": {"const": "a"}}}
_IS_B = {"properties": {"kind": {"const": "b"}}}
_NEEDS_N, _NEEDS_M = {"required": ["n"]}, {"required": ["m"]}

ENFORCED: list[dict[str, Any]] = [
    {"not": {"type": "string"}},
    {"not": {"type": ["string", "number"]}},
    {"type": ["string", "null"], "not": {"type": "null"}},
    {"type": "string", "not": {"const": "a"}},
    {"type": "string", "not": {"enum": ["a", "abc", ""]}},
    {"not": {"enum": [1, 5, "a", None, True]}},
    {"type": "integer", "not": {"enum": [1, 2, 5]}},
    {"type": "number", "not": {"const": 1}},
    {"type": "boolean", "not": {"const": True}},
    {"enum": ["a", "b", 1], "not": {"const": "a"}},
    {"not": {"not": {"type": "string"}}},
    {"not": {"required": ["a"]}},
    {**_OBJECT, "not": {"required": ["a", "b"]}},
    {**_OBJECT, "not": {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}},
    {**_OBJECT, "not": {"allOf": [{"required": ["a"]}, {"required": ["b"]}]}},
    {**_OBJECT, "not": {"properties": {"a": {"const": 1}}, "required": ["a"]}},
    {**_OBJECT, "properties": {"a": {"not": {}}}},
    {"type": "integer", "not": {"minimum": 2}},
    {"type": "string", "not": {"minLength": 2}},
    {"type": "array", "not": {"maxItems": 1}},
    {**_OBJECT, "not": {"minProperties": 1}},
    _LETTERS,
    {**_LETTERS, "minItems": 2},
    {"items": {"enum": ["a", "b"]}, "uniqueItems": True},
    {"type": "array", "uniqueItems": True, "maxItems": 1},
    {"type": "array", "uniqueItems": False},
    {"type": "array", "contains": {"const": "a"}, "minContains": 0},
    {**_OBJECT, "dependentRequired": {"a": ["b"]}},
    {"dependentRequired": {"a": ["b"]}},
    {**_OBJECT, "dependentSchemas": {"a": {"required": ["b"]}}},
    {**_OBJECT, "propertyNames": {"pattern": "^x"}},
    {**_OBJECT, "propertyNames": {"enum": ["a", "b"]}},
    {**_OBJECT, "propertyNames": {"maxLength": 2}},
    {**_OBJECT, "properties": {"a": {}}, "propertyNames": {"enum": ["b"]}},
    {**_OBJECT, "properties": {"a": {"type": "integer"}}, "unevaluatedProperties": False},
    {"type": "array", "prefixItems": [{"const": "a"}], "unevaluatedItems": False},
    {"if": {"type": "string"}, "then": {"minLength": 2}, "else": {"type": "integer"}},
    {"type": ["integer", "string"], "if": {"minimum": 3}, "then": {"maximum": 5}},
    {"then": {"type": "string"}},
    {"if": True, "then": {"type": "string"}},
    {"type": "string", "format": "password"},
    {**_KIND, "if": _IS_A, "then": _NEEDS_N, "else": _NEEDS_M},
    {**_KIND, "if": {**_IS_A, "required": ["kind"]}, "then": _NEEDS_N},
    {**_KIND, "allOf": [{"if": _IS_A, "then": _NEEDS_N}, {"if": _IS_B, "then": {**_NEEDS_M, "not": _NEEDS_N}}]},
    {**_KIND, "if": {"properties": {"kind": {"enum": ["a", "b"]}}}, "else": {"not": _NEEDS_N}},
    {**_KIND, "not": {"properties": {"kind": {"const": "a"}, "n": {"const": 1}}, "required": ["kind", "n"]}},
    {**_KIND, "if": _NEEDS_N, "then": _NEEDS_M, "else": {"properties": {"m": False}}},
    {**_KIND, "dependentRequired": {"n": ["m"]}},
    {**_KIND, "not": {"if": _IS_A, "then": _NEEDS_N, "else": _NEEDS_M}},
    {**_KIND, "if": _IS_A, "then": {"if": _NEEDS_N, "then": _NEEDS_M}},
]

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "array", "items": {"enum": [1, 2, 3, 4, 5]}, "uniqueItems": True}, "uniqueItems"),
    ({"type": "array", "contains": {"const": 1}}, "contains"),
    ({"type": "string", "not": {"pattern": "a"}}, "not, or if, of pattern"),
    ({"not": {"$ref": "#/$defs/a"}, "$defs": {"a": {}}}, r"not, or if, of \$ref"),
    ({"not": {"const": {"a": 1}}}, "object or array"),
    ({"type": "number", "not": {"type": "integer"}}, "integer"),
    ({"not": {}}, "excludes every value"),
    ({"type": "string", "not": {"type": "string"}}, "excludes every value"),
    ({"type": "string", "not": {"enum": ["x" * 3000]}}, "3000|2000"),
    ({"type": "integer", "not": {"required": 5}}, "wrong type|cannot be|excludes"),
]


@pytest.mark.parametrize("schema", ENFORCED, ids=json.dumps)
def test_grammar_accepts_what_the_schema_does(compiler: GrammarCompiler, schema: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema as the reference")
    reference = jsonschema.Draft202012Validator(schema)
    grammar = compiler.compile(StructuredOutputsParams(json=schema))
    for value in _SHAPES if "kind" in schema.get("properties", ()) else _VALUES:
        assert accepts(grammar, json.dumps(value).encode()) == reference.is_valid(value), value


@pytest.mark.parametrize(("schema", "named"), REFUSED, ids=lambda one: json.dumps(one)[:60])
def test_what_cannot_be_enforced_is_named(compiler: GrammarCompiler, schema: dict[str, Any], named: str) -> None:
    with pytest.raises(GrammarError, match=named):
        compiler.compile(StructuredOutputsParams(json=schema))


def test_conditions_that_multiply_are_too_complex() -> None:
    nested: dict[str, Any] = {"type": "object", "required": ["a"]}
    for _ in range(40):
        nested = {"properties": {"a": {"if": nested, "then": nested}}}
    with pytest.raises(GrammarError) as caught:
        enforceable(nested)
    assert caught.value.code == "schema_too_complex"


def test_a_schema_without_such_keywords_stays_as_it_is() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"anyOf": [{"const": 1}, {"$ref": "#/$defs/b"}]}},
        "$defs": {"b": {}},
    }
    assert enforceable(schema) == schema and enforceable(True) is True
