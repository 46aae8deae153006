"""Finds calls in the text of a model while it comes. Pure: text in, events out, in whatever pieces the text is cut.

One parser reads one sample: feed() every piece, then finish(). What could still turn out to be a marker is held back.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection

from fastllm.server.tools.call_object import CallObject
from fastllm.server.tools.events import CallArguments, CallStart, Event, Text

_SPACE = " \t\r\n"


def held_back(text: str, markers: Collection[str]) -> int:
    """Length of the longest end of `text` that begins one of the markers.

    >>> held_back("so <tool", ["<tool_call>"])
    5
    """
    longest = max(map(len, markers)) - 1
    for length in range(min(longest, len(text)), 0, -1):
        tail = text[-length:]
        if any(marker.startswith(tail) for marker in markers):
            return length
    return 0


class ToolParser(ABC):
    """Owned by one sample. num_calls: calls found so far."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._pending = ""  # text that no event speaks of yet
        self._call: CallObject | None = None
        self._announced = False

    def feed(self, text: str) -> list[Event]:
        self._pending += text
        return self._run(last=False)

    def finish(self) -> list[Event]:
        """The text has ended; what was held back is decided."""
        return self._run(last=True)

    @abstractmethod
    def _run(self, last: bool) -> list[Event]: ...

    def _content(self, text: str) -> list[Event]:
        return [Text(text)] if text else []

    def _start_call(self) -> None:
        self._call, self._announced = CallObject(), False

    def _read_call(self, call: CallObject, last: bool, names: Collection[str] | None) -> tuple[list[Event], str | None]:
        """Events of the call from the pending text, and its raw text once it turned out to be none.

        names: the only ones that make it a call; None: any.
        """
        taken = call.feed(self._pending)
        self._pending = self._pending[taken:]
        events: list[Event] = []
        is_call = bool(call.name) and (names is None or call.name in names)
        if not self._announced:
            # Without a mark a name is not enough.
            if is_call and (names is None or call.arguments_begun or call.done):
                self._announced = True
                events.append(CallStart(self.num_calls, call.name or ""))
                self.num_calls += 1
            elif last or call.failed or call.done or (call.name is not None and not is_call):
                self._call = None
                return events, call.raw
        if self._announced:
            arguments = call.take()
            if arguments:
                events.append(CallArguments(self.num_calls - 1, arguments))
            if call.done or call.failed or last:
                self._call = None
        return events, None


class TaggedParser(ToolParser):
    """Hermes, Qwen 2.5 and 3: text, and calls between tags; anything that is no call inside tags is text again.

    Each call: <tool_call>{"name": ..., "arguments": {...}}</tool_call>
    """

    def __init__(self, open_tag: str = "<tool_call>", close_tag: str = "</tool_call>") -> None:
        super().__init__()
        self._open, self._close = open_tag, close_tag
        self._after_call = False  # only whitespace since a call, which is not content
        self._expects_close = False

    def _run(self, last: bool) -> list[Event]:
        events: list[Event] = []
        while True:
            if self._call is not None:
                found, raw = self._read_call(self._call, last, None)
                events += found
                if raw is not None:
                    events += self._content(self._open + raw)
                elif self._call is None:
                    self._after_call = self._expects_close = True
                if self._call is not None:
                    return events
                continue
            if self._after_call:
                self._pending = self._pending.lstrip(_SPACE)
                if self._expects_close:
                    if self._pending.startswith(self._close):
                        self._pending, self._expects_close = self._pending[len(self._close) :], False
                        continue
                    if not last and self._close.startswith(self._pending):
                        return events
                    self._expects_close = False
                    continue
            at = self._pending.find(self._open)
            if at >= 0:
                events += self._content(self._pending[:at])
                self._pending = self._pending[at + len(self._open) :]
                self._after_call = False
                self._start_call()
                continue
            keep = 0 if last else held_back(self._pending, [self._open])
            shown = self._pending[: len(self._pending) - keep]
            if shown:
                self._after_call = False
            events += self._content(shown)
            self._pending = self._pending[len(self._pending) - keep :]
            return events


class ObjectParser(ToolParser):
    """Llama 3 and models without a form of their own: the whole output is calls, or it is text.

    {"name": ..., "parameters": {...}}; {...}     [{...}, {...}]     each also after a prefix or in a code fence
    names: of the functions on offer; other JSON is an answer.
    """

    def __init__(self, names: Collection[str], prefixes: Collection[str] = ()) -> None:
        super().__init__()
        self._names = names
        self._prefixes = [*prefixes, "```json", "```"]
        self._is_text = False
        self._lead = ""  # what came before the first object, in case it is text after all
        self._separators = ";,] \t\r\n`"

    def _run(self, last: bool) -> list[Event]:
        events: list[Event] = []
        while True:
            if self._is_text:
                events += self._content(self._pending)
                self._pending = ""
                return events
            if self._call is not None:
                found, raw = self._read_call(self._call, last, self._names)
                events += found
                if raw is not None:
                    self._is_text = True
                    events += self._content(self._lead + raw)
                elif self._call is not None:
                    return events
                continue
            if not self._step(last):
                return events

    def _step(self, last: bool) -> bool:
        """Moves to the next object; False while more text is needed."""
        text = self._pending
        if self.num_calls:
            rest = text.lstrip(self._separators)
            if rest.startswith("{"):
                self._lead, self._pending = "", rest
                self._start_call()
                return True
            self._is_text, self._pending = bool(rest), rest
            return bool(rest)
        rest = text.lstrip(_SPACE)
        if not last and any(prefix.startswith(rest) for prefix in self._prefixes):
            return False
        for prefix in self._prefixes:
            if rest.startswith(prefix):
                rest = rest[len(prefix) :].lstrip(_SPACE)
                break
        rest = rest.removeprefix("[").lstrip(_SPACE)
        if rest.startswith("{"):
            self._lead, self._pending = text[: len(text) - len(rest)], rest
            self._start_call()
            return True
        if not last and not rest:
            return False
        self._is_text = True
        return True


# name{  name[ARGS]{  name[CALL_ID]id[ARGS]{   and what may become one of them
_NAMED = re.compile(r"([a-zA-Z0-9_.:-]{1,64})(?:\[CALL_ID\]\w{0,64})?(?:\[ARGS\][ \t\r\n]*)?(?=\{)")
_MAYBE_NAMED = re.compile(r"[a-zA-Z0-9_.:-]{1,64}(\[[A-Z_]{0,7}(\]\w{0,64}[ \t\r\n]*(\[[A-Z]{0,4}(\][ \t\r\n]*)?)?)?)?")


class MistralParser(ToolParser):
    """Mistral: text, then [TOOL_CALLS] and a list of objects, or in later models name[ARGS]{...} for each call."""

    MARK = "[TOOL_CALLS]"

    def __init__(self) -> None:
        super().__init__()
        self._marked = False

    def _run(self, last: bool) -> list[Event]:
        events: list[Event] = []
        while True:
            if not self._marked:
                at = self._pending.find(self.MARK)
                if at < 0:
                    keep = 0 if last else held_back(self._pending, [self.MARK])
                    events += self._content(self._pending[: len(self._pending) - keep])
                    self._pending = self._pending[len(self._pending) - keep :]
                    return events
                events += self._content(self._pending[:at])
                self._pending, self._marked = self._pending[at + len(self.MARK) :], True
            if self._call is not None:
                found, raw = self._read_call(self._call, last, None)
                events += found
                if raw is not None:
                    self._marked = False
                    events += self._content(raw)
                elif self._call is not None:
                    return events
                continue
            if not self._step(last):
                return events

    def _step(self, last: bool) -> bool:
        """Moves to the next call behind the mark; False while more text is needed."""
        rest = self._pending
        while rest and rest[0] in " \t\r\n,[]":
            if rest.startswith(self.MARK):
                self._pending = rest[len(self.MARK) :]
                return True
            if self.MARK.startswith(rest) and not last:
                self._pending = rest
                return False
            rest = rest[1:]
        if not rest:
            self._pending = ""
            return False
        self._pending = rest
        if rest.startswith("{"):
            self._start_call()
            return True
        if named := _NAMED.match(rest):
            self._start_call()
            assert self._call is not None
            self._call.begin_named(named[1])
            self._pending = rest[named.end() :]
            return True
        if not last and _MAYBE_NAMED.fullmatch(rest):
            return False
        self._marked = False
        return True
