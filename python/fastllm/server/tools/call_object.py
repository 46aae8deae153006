"""Reads one call written as a JSON object, character by character: {"name": "f", "arguments": {...}}."""

from __future__ import annotations

import json

_ARGUMENTS = ("arguments", "parameters")
_SPACE = " \t\r\n"


class CallObject:
    """Feed it text that begins with "{". Until the name is known nothing is certain: `raw` is what to fall back to.

    name: once it is complete. take() hands out arguments as they come. done: the object is closed. failed: this is no
    call, or no JSON.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.done = False
        self.failed = False
        self.arguments_begun = False
        self._has_arguments = False
        self._raw: list[str] = []
        self._arguments: list[str] = []  # characters not yet taken
        self._state = self._open
        self._key = ""
        self._string: list[str] = []  # characters of a string that is being read, quotes included
        self._escaped = False
        self._quoted = False  # inside a string of a nested value
        self._depth = 0  # of a nested value
        self._bare = False  # the object is the arguments themselves
        self._is_null = False  # arguments that may turn out to be null, which stands for none

    def feed(self, text: str) -> int:
        """Takes characters until the object is closed or fails; returns how many it took."""
        for at, char in enumerate(text):
            if self.done or self.failed:
                return at
            self._raw.append(char)
            self._state(char)
        return len(text)

    def begin_named(self, name: str) -> None:
        """The name is known; the object to come is the arguments alone."""
        self.name, self._key, self._bare, self._state = name, _ARGUMENTS[0], True, self._before_value

    @property
    def raw(self) -> str:
        """All that was taken."""
        return "".join(self._raw)

    def take(self) -> str:
        """The arguments that have come since the last call; nothing before the name."""
        if self.name is None or self._is_null:
            return ""
        taken = "".join(self._arguments)
        self._arguments.clear()
        return taken

    def _open(self, char: str) -> None:
        if char == "{":
            self._state = self._before_key
        elif char not in _SPACE:
            self.failed = True

    def _before_key(self, char: str) -> None:
        if char == '"':
            self._string, self._state = [char], self._in_key
        elif char == "}":
            self._close()
        elif char not in _SPACE and char != ",":
            self.failed = True

    def _string_ends(self, char: str) -> bool:
        self._string.append(char)
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        else:
            return char == '"'
        return False

    def _decoded(self) -> str:
        try:
            value = json.loads("".join(self._string), strict=False)
        except ValueError:
            self.failed = True
            return ""
        return str(value).encode(errors="replace").decode()  # half of a surrogate pair cannot be sent

    def _in_key(self, char: str) -> None:
        if self._string_ends(char):
            self._key, self._state = self._decoded(), self._before_colon

    def _before_colon(self, char: str) -> None:
        if char == ":":
            self._state = self._before_value
        elif char not in _SPACE:
            self.failed = True

    def _before_value(self, char: str) -> None:
        if char in _SPACE:
            return
        self.arguments_begun |= self._key in _ARGUMENTS
        if char == '"':
            self._string, self._state = [char], self._in_string
        elif self._key == "name":
            self.failed = True
        else:
            self._quoted, self._depth, self._state = False, 0, self._in_value
            self._is_null = char == "n" and self._key in _ARGUMENTS
            self._in_value(char)

    def _in_string(self, char: str) -> None:
        if not self._string_ends(char):
            return
        value = self._decoded()
        if self._key == "name":
            self.name = value
            self.failed = self.failed or not value
        elif self._key in _ARGUMENTS:  # some models write the arguments as a string with JSON in it
            self._arguments, self._has_arguments = [value], True
        self._state = self._after_value

    def _in_value(self, char: str) -> None:
        if self._quoted:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._quoted = False
        elif char == '"':
            self._quoted = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            if self._depth == 0:
                self._end_value()
                self._after_value(char)
                return
            self._depth -= 1
        elif self._depth == 0 and (char == "," or char in _SPACE):
            self._end_value()
            self._after_value(char)
            return
        if self._key in _ARGUMENTS:
            self._arguments.append(char)
        if self._depth == 0 and char in "}]" and not self._quoted:
            self._end_value()

    def _end_value(self) -> None:
        if self._key in _ARGUMENTS:
            self._has_arguments = True
            if self._is_null:
                self._arguments, self._is_null = ["{}"], False
        self.done, self._state = self._bare, self._after_value

    def _after_value(self, char: str) -> None:
        if char == ",":
            self._state = self._before_key
        elif char == "}":
            self._close()
        elif char not in _SPACE:
            self.failed = True

    def _close(self) -> None:
        self.done = True
        if self.name is None:
            self.failed = True
        elif not self._has_arguments:
            self._arguments = ["{}"]
