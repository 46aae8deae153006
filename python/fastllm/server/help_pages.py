"""`fastllm serve --help=TOPIC`: one group of flags, the flags with a word in them, or those that are refused."""

from __future__ import annotations

import argparse
import sys

from fastllm import environment, refused_flags

_TOPICS = {"refused": refused_flags.explain, "environment": environment.explain}


def show_help(parser: argparse.ArgumentParser, topic: str) -> int:
    """Prints the page and returns the exit status: 2 if there is none."""
    page = _page(parser, topic.strip().lower())
    if page is None:
        print(
            f"{parser.prog}: no flag and no group is called {topic!r}; --help=listgroup names the groups.",
            file=sys.stderr,
        )
        return 2
    print(page)
    return 0


def _page(parser: argparse.ArgumentParser, topic: str) -> str | None:
    groups = [group for group in parser._action_groups if group.title and group._group_actions]
    if topic == "all":
        return parser.format_help()
    if topic == "listgroup":
        return "Groups of flags (--help=GROUP):\n" + "\n".join(f"  {group.title}" for group in groups)
    if topic in _TOPICS:
        return _TOPICS[topic]()
    for group in groups:
        if str(group.title).lower() == topic:
            return _section(parser, str(group.title), group.description, group._group_actions)
    word = topic.lstrip("-").replace("_", "-")
    found = [
        action
        for group in groups
        for action in group._group_actions
        if action.help != argparse.SUPPRESS and any(word in option for option in action.option_strings)
    ]
    return _section(parser, f"flags with {topic!r}", None, found) if word and found else None


def _section(
    parser: argparse.ArgumentParser, title: str, description: str | None, actions: list[argparse.Action]
) -> str:
    formatter = parser._get_formatter()
    formatter.start_section(title)
    formatter.add_text(description)
    formatter.add_arguments(actions)
    formatter.end_section()
    return formatter.format_help()
