"""Grammars of answers that call functions: that must, or that may and then write the arguments as the schema says.

may_call, where calls follow a mark:     text | text mark call ...
may_call, where an answer is all calls:  text that does not look like a call | call ...
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastllm.grammar.keywords import enforceable
from fastllm.grammar.limits import GrammarError
from fastllm.grammar.source import ANY_TEXT, json_schema, literal, up_to

if TYPE_CHECKING:
    from fastllm.server.tools.formats import ToolFormat

# More calls than this in one answer are a model that repeats itself.
_MAX_PARALLEL = 16
_BLANK = r" \t\r\n"
_SPACE = rf"[{_BLANK}]"
_ANY = r"(.|\n)*"
_OBJECT = {"type": "object"}

Functions = Sequence[Mapping[str, Any]]


class CallGrammar:
    """Made for one request. preambles: what answers may begin with before what this grammar says, reasoning."""

    def __init__(
        self, form: ToolFormat, functions: Functions, specials: Mapping[str, int], preambles: Sequence[str] = ()
    ) -> None:
        self._form = form
        self._names = [json.dumps(function["name"])[1:-1] for function in functions]
        self._functions = functions
        self._specials = specials
        self._preambles = preambles

    def must_call(self, parallel: bool, *, loosely: bool = False) -> str:
        """Lark for at least one call. loosely: arguments of functions that are not strict may be any object.

        Raises GrammarError for a strict schema that cannot be enforced.
        """
        before, start, _, _, after = self._form.written
        return (
            f"start: {self._literal(before)} call{self._more(parallel)} {self._literal(after)}\n"
            f"{self._calls('call', start)}{self._arguments(loosely)}"
        )

    def may_call(self, parallel: bool) -> str:
        """Lark for text without calls, or calls of which those of strict functions have arguments that fit.

        Raises GrammarError for a strict schema that cannot be enforced.
        """
        before, start, _, _, after = self._form.written
        then = f"{self._more(parallel)} {self._literal(after)}\n{self._calls('call', start)}"
        then += self._arguments(loosely=True)
        mark = self._form.mark
        if not mark:
            return f"start: FREE | first{then}{self._first_of_all()}{self._free()}"
        opening = f"{up_to('opening', mark, {})}{ANY_TEXT}"
        if mark in self._specials:  # it can be written as text, too
            opening = f"opening: marked | text_until\n{up_to('text_until', mark, {})}"
            opening += f"{up_to('marked', mark, self._specials)}{ANY_TEXT}"
        if before:
            return f"start: ANY_TEXT | opening {self._literal(before.removeprefix(mark))} call{then}{opening}"
        return f"start: ANY_TEXT | opening first{then}{self._calls('first', start.removeprefix(mark))}{opening}"

    def _schema(self, function: Mapping[str, Any], loosely: bool) -> dict[str, Any]:
        parameters = function.get("parameters") or _OBJECT
        if not function.get("strict"):
            return json_schema(_OBJECT if loosely else parameters, lenient=True)
        try:
            return json_schema(enforceable(parameters))
        except GrammarError as error:
            raise GrammarError(
                f"the parameters of {function['name']!r}, which is strict: {error}", error.code
            ) from None

    def _literal(self, text: str) -> str:
        return literal(text, self._specials)

    def _more(self, parallel: bool) -> str:
        between = self._form.written[3]
        several = parallel and self._form.parallel
        return f" ({self._literal(between)} call){{0,{_MAX_PARALLEL - 1}}}" if several else ""

    def _arguments(self, loosely: bool) -> str:
        schemas = [json.dumps(self._schema(function, loosely)) for function in self._functions]
        return "".join(f"arguments_{number}: %json {schema}\n" for number, schema in enumerate(schemas))

    def _calls(self, rule: str, start: str) -> str:
        return self._rule(rule, [self._literal(start.replace("{name}", name)) for name in self._names])

    def _rule(self, rule: str, starts: Sequence[str]) -> str:
        end = self._literal(self._form.written[2])
        return f"{rule}: {' | '.join(f'{start} arguments_{n} {end}' for n, start in enumerate(starts))}\n"

    def _first_of_all(self) -> str:
        """The first call with what the parser skips before it: one lexeme, as text that is no call begins alike."""
        prefixes = self._form.prefixes
        lead = "".join(f"({_escaped(prefix)})?" for prefix in prefixes if prefix not in self._specials)
        lead = rf"{_SPACE}{{0,8}}{lead}(```(json)?)?{_SPACE}{{0,8}}\[?{_SPACE}{{0,8}}"
        marks = "".join(f"(<[{self._specials[prefix]}]>)? " for prefix in prefixes if prefix in self._specials)
        starts = [self._form.written[1].replace("{name}", name) for name in self._names]
        lines = [f"FIRST_{number}: /{lead}{_escaped(start)}/\n" for number, start in enumerate(starts)]
        return "".join(lines) + self._rule("first", [f"{marks}FIRST_{number}" for number in range(len(starts))])

    def _free(self) -> str:
        """What the parser is certain to take for text: it begins unlike calls, or nothing in it is called "name"."""
        begins = r"{\[`" + "".join(_escaped(prefix[0]) for prefix in self._form.prefixes)
        kinds = [rf"/{_SPACE}*([^{_BLANK}{begins}]{_ANY})?/", rf"/{_SPACE}*`{{1,2}}([^`]{_ANY})?/"]
        kinds.append(rf"/{_SPACE}*```([^j{_BLANK}{{\[]{_ANY})?/")
        for prefix in self._form.prefixes:
            kinds.append(rf"/{_SPACE}*{_escaped(prefix[0])}([^{_escaped(prefix[1])}]{_ANY})?/")
        kinds.append(rf"(/{without(chr(34) + 'name' + chr(34))}/ & /{without(chr(92) + 'u006')}/)")
        others = "".join(f" & /{_SPACE}*({not_beginning(text)})/" for text in self._preambles)
        return f"FREE: ({' | '.join(kinds)}){others}\n"


def _escaped(text: str) -> str:
    """For a regex between the slashes of Lark, where an escaped < or > would be the edge of a word."""
    return re.sub(r"[^\w\s<>]", r"\\\g<0>", text).replace("\n", "\\n")


def not_beginning(text: str) -> str:
    """A regex of all texts, without whitespace at their start, that do not begin with this one.

    >>> [bool(re.fullmatch(not_beginning("ab"), text)) for text in ("", "a", "ac", "b", "ab", "abc", " ab")]
    [True, True, True, True, False, False, False]
    """
    ways = [rf"[^{_BLANK}{_escaped(text[0])}]{_ANY}"]
    for length in range(1, len(text)):
        ways.append(f"{_escaped(text[:length])}([^{_escaped(text[length])}]{_ANY})?")
    return f"({'|'.join(ways)})?"


def without(text: str) -> str:
    r"""A regex of all texts that do not contain this one, whose first character occurs in it again at most at its end.

    >>> [bool(re.fullmatch(without("abca"), text)) for text in ("", "abcabc", "ababc", "abcba", "xabcax")]
    [True, False, True, True, False]
    """
    first, rest = text[0], text[1:]
    assert first not in rest[:-1]

    def some(of: Iterable[str]) -> str:
        return "[^" + "".join(map(_escaped, sorted(of))) + "]"

    last = len(rest) - 1
    # After `first`: parts of the rest, each up to a `first` that begins anew.
    anew = [rest[:length] for length in range(last + (rest[-1] != first))]
    loop = f"{_escaped(first)}(({'|'.join(map(_escaped, anew))}){_escaped(first)})*"
    leaves = [_escaped(rest[:length]) + some({first, rest[length]}) for length in range(len(rest))]
    parts = "|".join(_escaped(rest[:length]) for length in range(len(rest)))
    return f"({some(first)}|{loop}({'|'.join(leaves)}))*({loop}({parts}))?"
