"""From structured output parameters to the text of a grammar in llguidance's own format."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastllm.grammar.keywords import enforceable
from fastllm.grammar.limits import GrammarError, GrammarLimits, check_bytes, check_regex, read_schema
from fastllm.grammar.params import StructuredOutputsParams

# Whitespace is bounded between any two tokens of JSON: a model that only ever writes spaces must still come to an end.
_WHITESPACE = r"[ ]?|\n[ \t]{0,40}"
_MAIN = "main"
_CONDITIONS = frozenset(("not", "if", "then", "else", "dependentSchemas", "dependencies"))
# Looking for text that must come next takes as long as that text, which may be a million characters, at every token.
_OPTIONS = '%llguidance {"no_forcing": true}\n'


@dataclass(frozen=True)
class Preamble:
    """Free text that comes before what is constrained: a model's reasoning.

    opened: its start stands in the prompt; otherwise the output may begin with `start`, or leave all of it out.
    """

    start: str
    end: str
    opened: bool


def grammar_source(
    params: StructuredOutputsParams,
    limits: GrammarLimits,
    specials: Mapping[str, int],
    preamble: Preamble | None = None,
) -> str:
    """The grammar, within the limits. specials: special tokens, which no text matches. Raises GrammarError."""
    source = _source(params, limits, specials)
    return source if preamble is None else _after(preamble, source, specials)


def _source(params: StructuredOutputsParams, limits: GrammarLimits, specials: Mapping[str, int]) -> str:
    if params.whitespace_pattern is not None:
        check_regex(params.whitespace_pattern, limits)
    if params.json is not None:
        schema = read_schema(params.json, limits)
        return _json(enforceable(strict(schema) if params.disable_additional_properties else schema), params)
    if params.json_object:
        return _json({"type": "object"}, params)
    if params.regex is not None:
        check_regex(params.regex, limits)
        return _one(f"start: /{_regex_body(params.regex)}/")
    if params.choice is not None:
        check_bytes("".join(params.choice), limits, "The list of choices")
        if len(params.choice) > limits.max_schema_nodes:
            raise GrammarError(f"choice takes at most {limits.max_schema_nodes} strings.", "schema_too_complex")
        return _one("start: " + " | ".join(json.dumps(choice) for choice in params.choice))
    if params.grammar is not None:
        check_bytes(params.grammar, limits, "The grammar")
        return _one(_lark(params.grammar))
    return _structural_tag(params, limits, specials)


def _one(lark: str) -> str:
    return json.dumps({"grammars": [{"name": _MAIN, "lark_grammar": f"{lark}\n{_OPTIONS}"}]})


def _json(schema: dict[str, Any] | bool, params: StructuredOutputsParams) -> str:
    return _one(f"start: %json {json.dumps(json_schema(schema, params))}")


def json_schema(
    schema: dict[str, Any] | bool, params: StructuredOutputsParams | None = None, *, lenient: bool = False
) -> dict[str, Any]:
    """The schema with how it is written: bounded whitespace, and oneOf taken as anyOf.

    lenient: keywords that cannot be enforced are ignored; otherwise they are errors.
    """
    options: dict[str, Any] = {"coerce_one_of": True, "lenient": lenient}
    if params is not None and params.disable_any_whitespace:
        options["whitespace_flexible"] = False
    else:
        given = None if params is None else params.whitespace_pattern
        options["whitespace_pattern"] = _WHITESPACE if given is None else given
    return {**({} if isinstance(schema, bool) else schema), "x-guidance": options}


def strict(schema: Any) -> Any:
    """A copy in which objects that list properties have no others; conditions are left as they are."""
    if isinstance(schema, list):
        return [strict(value) for value in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {name: value if name in _CONDITIONS else strict(value) for name, value in schema.items()}
    if "properties" in copy or copy.get("type") == "object":
        copy.setdefault("additionalProperties", False)
    return copy


def _regex_body(pattern: str) -> str:
    """For between the slashes of a Lark regex; a line break there must be spelled."""
    body = re.sub(r"\\(.)|/", lambda m: m.group(0) if m.group(1) is not None else r"\/", pattern, flags=re.DOTALL)
    return body.replace("\\\n", "\\n").replace("\n", "\\n")


def _lark(text: str) -> str:
    if not re.search(r"^\s*[\w-]+\s*::=", text, re.MULTILINE):
        return text
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(text)
    except Exception as error:  # a converter's errors are of many kinds
        raise GrammarError(f"The grammar is not valid GBNF: {error}", "invalid_grammar") from None


def literal(text: str, specials: Mapping[str, int]) -> str:
    """Lark for exactly this text, with its special tokens as tokens."""
    found = [token for token in specials if token and token in text]
    if not found:
        return json.dumps(text) if text else '""'
    pattern = "(" + "|".join(re.escape(token) for token in sorted(found, key=len, reverse=True)) + ")"
    pieces = [piece for piece in re.split(pattern, text) if piece]
    return " ".join(f"<[{specials[piece]}]>" if piece in specials else json.dumps(piece) for piece in pieces)


def up_to(rule: str, text: str, specials: Mapping[str, int]) -> str:
    """A Lark rule `rule` for any text until `text` comes, itself included."""
    if text in specials:
        return f"{rule}: ANY_TEXT <[{specials[text]}]>\n"
    return f"{rule}[lazy]: ANY_TEXT {json.dumps(text)}\n"


ANY_TEXT = "ANY_TEXT: /(.|\\n)*/\n"


def _after(preamble: Preamble, source: str, specials: Mapping[str, int]) -> str:
    value = json.loads(source)
    before = "reasoning GAP" if preamble.opened else f"({literal(preamble.start, specials)} reasoning GAP)?"
    outer = (
        f"{_OPTIONS}start: {before} @{_MAIN}\n{up_to('reasoning', preamble.end, specials)}GAP: /\\n{{0,2}}/\n{ANY_TEXT}"
    )
    value["grammars"].insert(0, {"name": "outer", "lark_grammar": outer})
    return json.dumps(value)


def _structural_tag(params: StructuredOutputsParams, limits: GrammarLimits, specials: Mapping[str, int]) -> str:
    """{"structures": [{"begin", "schema", "end"}], "triggers": [...]}: text, and where a trigger comes, a structure."""
    given = params.structural_tag
    if isinstance(given, str):
        check_bytes(given, limits, "The structural tag")
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"structural_tag is not valid JSON: {error}.", "invalid_schema") from None
    structures, triggers = _structures(given)
    if not structures or len(structures) > limits.max_schema_nodes:
        raise GrammarError(f"structural_tag takes 1 to {limits.max_schema_nodes} structures.", "invalid_schema")
    total = limits.max_schema_bytes
    rules: list[str] = []
    for number, (begin, schema, end) in enumerate(structures):
        trigger = next((t for t in triggers if begin.startswith(t)), None)
        if trigger is None:
            raise GrammarError(f"structural_tag: {begin[:80]!r} begins with none of the triggers.", "invalid_schema")
        checked = read_schema(schema, limits)
        checked = enforceable(strict(checked) if params.disable_additional_properties else checked)
        body = json.dumps(json_schema(checked, params))
        rest = literal(begin[len(trigger) :], specials)
        rules.append(
            f"tag_{number}: trigger_{number} {rest} %json {body} {literal(end, specials)}\n"
            + up_to(f"trigger_{number}", trigger, specials)
        )
        total -= len(body) + len(begin) + len(end)
        if total < 0:
            raise GrammarError("structural_tag: the structures are too large together.", "schema_too_complex")
    names = " | ".join(f"tag_{number}" for number in range(len(structures)))
    return _one(f"start: ({names})* ANY_TEXT\n{ANY_TEXT}{''.join(rules)}")


def _structures(given: Any) -> tuple[list[tuple[str, Any, str]], list[str]]:
    """(begin, schema, end) of every structure and the triggers, from either of the two forms of vLLM."""
    problem = "structural_tag needs 'structures' (objects with begin, schema and end) and 'triggers' (strings)"
    if isinstance(given, Mapping) and isinstance(given.get("format"), Mapping):
        form = given["format"]
        if form.get("type") != "triggered_tags" or not isinstance(form.get("tags"), Sequence):
            raise GrammarError("structural_tag: the format must be of type 'triggered_tags'.", "unsupported_schema")
        structures: Any = [_from_tag(tag) for tag in form["tags"]]
        triggers = form.get("triggers")
    elif isinstance(given, Mapping):
        structures, triggers = given.get("structures"), given.get("triggers")
    else:
        raise GrammarError(f"{problem}.", "invalid_schema")
    if not isinstance(structures, list) or not isinstance(triggers, list):
        raise GrammarError(f"{problem}.", "invalid_schema")
    if not all(isinstance(t, str) and t for t in triggers):
        raise GrammarError("structural_tag: triggers must be strings that are not empty.", "invalid_schema")
    found: list[tuple[str, Any, str]] = []
    for number, one in enumerate(structures):
        begin, end = (one.get("begin"), one.get("end", "")) if isinstance(one, Mapping) else (None, None)
        if not isinstance(begin, str) or not isinstance(end, str):
            raise GrammarError(f"structural_tag: structures[{number}] needs begin, schema and end.", "invalid_schema")
        found.append((begin, one.get("schema", True), end))
    return found, triggers


def _from_tag(tag: Any) -> Any:
    content = tag.get("content") if isinstance(tag, Mapping) else None
    if not isinstance(content, Mapping) or content.get("type") != "json_schema":
        raise GrammarError("structural_tag: the content of a tag must be of type 'json_schema'.", "unsupported_schema")
    return {"begin": tag.get("begin"), "schema": content.get("json_schema", True), "end": tag.get("end", "")}
