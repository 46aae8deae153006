"""What a parser finds in the text of a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Text:
    """Content for the reader."""

    text: str


@dataclass
class CallStart:
    """A call begins; its name is complete."""

    index: int
    name: str


@dataclass
class CallArguments:
    """The next part of the arguments of a call, as the model wrote them."""

    index: int
    text: str


Event = Text | CallStart | CallArguments
