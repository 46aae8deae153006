"""Markdown tables and plots, for the reports. Plots need matplotlib and are left out without it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def table(title: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [f"## {title}", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *["| " + " | ".join(row) + " |" for row in rows]]) + "\n\n"


def number(result: dict[str, Any], *keys: str) -> float | None:
    """The number at a path of keys, or None."""
    value: Any = result
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return float(value) if isinstance(value, int | float) else None


def leaves(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """Every value of a nested result that is no dictionary, with the path of its keys."""
    if not isinstance(value, dict):
        yield path, value
        return
    for key, inner in value.items():
        yield from leaves(inner, f"{path}, {key}" if path else str(key))


def find_pyplot() -> Any:
    """matplotlib's pyplot, drawing into files; None without it."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(pyplot: Any, figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
