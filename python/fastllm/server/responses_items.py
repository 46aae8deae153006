"""The items of a response while they are written: each opens, grows and closes, and tells so as events."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from functools import cached_property

from fastllm.server.long_answer import FEW_ITEMS, raw_array
from fastllm.server.protocol import TokenLogprob
from fastllm.server.responses_protocol import (
    CallDeltaEvent,
    CallDoneEvent,
    ItemEvent,
    NumberedEvent,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    PartEvent,
    ReasoningDeltaEvent,
    ReasoningDoneEvent,
    ReasoningText,
    TextDeltaEvent,
    TextDoneEvent,
)


class Item(ABC):
    """Owned by the builder. `index` is its place in the output; a status is in_progress, completed or incomplete."""

    prefix: str  # of its id

    def __init__(self, index: int) -> None:
        self.id = f"{self.prefix}_{uuid.uuid4().hex}"
        self.index = index
        self._pieces: list[str] = []

    @property
    def written(self) -> str:
        return "".join(self._pieces)

    @abstractmethod
    def output(self, status: str) -> OutputItem:
        """The whole item, with nothing in it yet while it is in progress."""

    def opening(self) -> list[NumberedEvent]:
        item = self.output("in_progress")
        return [ItemEvent(type="response.output_item.added", output_index=self.index, item=item)]

    def closing(self, status: str) -> list[NumberedEvent]:
        item = self.output(status)
        return [ItemEvent(type="response.output_item.done", output_index=self.index, item=item)]

    def _part(self, change: str, part: OutputText | ReasoningText) -> PartEvent:
        return PartEvent(type=f"response.content_part.{change}", item_id=self.id, output_index=self.index, part=part)


class MessageItem(Item):
    prefix = "msg"

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._logprobs: list[TokenLogprob] = []

    def output(self, status: str) -> OutputMessage:
        return OutputMessage(self.id, status, [] if status == "in_progress" else [self._whole])

    @cached_property
    def _whole(self) -> OutputText:
        """Once nothing is added any more. Three events and the response hold it, so what is long is encoded here."""
        logprobs = self._logprobs
        return OutputText(self.written, logprobs if len(logprobs) <= FEW_ITEMS else raw_array(logprobs))

    def opening(self) -> list[NumberedEvent]:
        return [*super().opening(), self._part("added", OutputText(""))]

    def add(self, text: str, logprobs: list[TokenLogprob]) -> list[NumberedEvent]:
        self._pieces.append(text)
        self._logprobs += logprobs
        event = TextDeltaEvent(
            type="response.output_text.delta",
            item_id=self.id,
            output_index=self.index,
            delta=text,
            logprobs=logprobs,
        )
        return [event]

    def closing(self, status: str) -> list[NumberedEvent]:
        done = TextDoneEvent(
            type="response.output_text.done",
            item_id=self.id,
            output_index=self.index,
            text=self._whole.text,
            logprobs=self._whole.logprobs,
        )
        return [done, self._part("done", self._whole), *super().closing(status)]


class ReasoningItem(Item):
    prefix = "rs"

    def output(self, status: str) -> OutputReasoning:
        return OutputReasoning(self.id, status, [] if status == "in_progress" else [ReasoningText(self.written)])

    def opening(self) -> list[NumberedEvent]:
        return [*super().opening(), self._part("added", ReasoningText(""))]

    def add(self, text: str) -> list[NumberedEvent]:
        self._pieces.append(text)
        event = ReasoningDeltaEvent(
            type="response.reasoning_text.delta", item_id=self.id, output_index=self.index, delta=text
        )
        return [event]

    def closing(self, status: str) -> list[NumberedEvent]:
        done = ReasoningDoneEvent(
            type="response.reasoning_text.done", item_id=self.id, output_index=self.index, text=self.written
        )
        return [done, self._part("done", ReasoningText(self.written)), *super().closing(status)]


class CallItem(Item):
    prefix = "fc"

    def __init__(self, index: int, call_id: str, name: str) -> None:
        super().__init__(index)
        self.call_id = call_id
        self.name = name

    def output(self, status: str) -> OutputCall:
        return OutputCall(self.id, status, self.call_id, self.name, self.written)

    def add(self, arguments: str) -> list[NumberedEvent]:
        self._pieces.append(arguments)
        event = CallDeltaEvent(
            type="response.function_call_arguments.delta", item_id=self.id, output_index=self.index, delta=arguments
        )
        return [event]

    def closing(self, status: str) -> list[NumberedEvent]:
        done = CallDoneEvent(
            type="response.function_call_arguments.done",
            item_id=self.id,
            output_index=self.index,
            name=self.name,
            arguments=self.written,
        )
        return [done, *super().closing(status)]
