"""Reasoning and answer are told apart however the text is cut into pieces."""

from __future__ import annotations

import random

import pytest

from fastllm.server.reasoning import BRACKETS, THINK, ReasoningParser, ReasoningTags, choose_tags, is_opened

# tags, opened by the prompt, text of the model, reasoning, answer
TABLE: list[tuple[ReasoningTags, bool, str, str, str]] = [
    (THINK, False, "<think>\nHm, 1 < 2.\n</think>\n\nTwo.", "Hm, 1 < 2.", "Two."),
    (THINK, False, "\n<think>a</think>b </think> c", "a", "b </think> c"),
    (THINK, False, "<think></think>x", "", "x"),
    (THINK, False, "<think>never ends </thi", "never ends </thi", ""),
    (THINK, False, "No thought <think>.", "", "No thought <think>."),
    (THINK, False, " <thin ice", "", " <thin ice"),
    (THINK, False, "", "", ""),
    (THINK, True, "\n so  it is \n\n</think>\n\n Yes.\n", "so  it is", "Yes.\n"),
    (THINK, True, "cut", "cut", ""),
    (BRACKETS, False, "[THINK]plan[/THINK]Do [THINK]", "plan", "Do [THINK]"),
]


@pytest.mark.parametrize(("tags", "opened", "text", "reasoning", "answer"), TABLE)
def test_reasoning_is_split_in_every_chunking(
    tags: ReasoningTags, opened: bool, text: str, reasoning: str, answer: str, seed: int
) -> None:
    rng = random.Random(seed)
    cuts = [[text], list(text)]
    for _ in range(20):
        at = sorted(rng.sample(range(len(text) + 1), min(len(text), 4)))
        cuts.append([text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)])
    for pieces in cuts:
        parser = ReasoningParser(tags, opened)
        found = [piece for part in pieces for piece in parser.feed(part)] + parser.finish()
        assert all(piece.text for piece in found)
        assert "".join(p.text for p in found if p.is_reasoning) == reasoning
        assert "".join(p.text for p in found if not p.is_reasoning) == answer


def test_template_and_prompt_tell_the_tags() -> None:
    assert choose_tags("{{ '<think>\\n' }}") is THINK and choose_tags("[THINK]") is BRACKETS
    assert choose_tags("{{ messages }}") is None and choose_tags(None) is None
    assert is_opened("user: hi\nassistant: <think>\n", THINK) and not is_opened("<think></think>", THINK)
