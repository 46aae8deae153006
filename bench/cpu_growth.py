"""Decoding over numbers of sequences and lengths of contexts: tables (Markdown) and plots of cpu_report.py.

Figures are tokens/s of all sequences together. Beside each stands what the roofline allows at most: the step's bytes
over the read bandwidth or its operations over the peak, whichever takes longer, both ceilings of the same machine.
A peer's result has the same form: {"model": NAME, "sequences": {"1": {"tps": 80.0}, ...}, "contexts": {...}}.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpu_tables import Results, Rows, percent
from tables import find_pyplot, number, save, table

# key of a result -> (title, axis of the plot)
GROUPS = {
    "sequences": ("sequences after 128 tokens", "sequences after 128 tokens"),
    "contexts": ("one sequence after a context", "tokens of context, one sequence"),
}


def growth_table(title: str, group: str, results: Results, peers: Rows, of_ceiling: Results) -> str:
    """A row per count or length; the ratio is of fastllm's best to the peers' best."""
    columns = [*results.items(), *peers]
    keys = sorted({key for _, result in columns for key in result.get(group, {})}, key=int)
    shown_peers = [(name, result) for name, result in peers if result.get(group)]
    rows = []
    for key in keys:
        row = [key]
        for precision, result in results.items():
            rate = number(result, group, key, "tps")
            share = percent(number(of_ceiling.get(precision, {}), group, key))
            why = result.get(group, {}).get(key, {}).get("skipped", "")
            row.append(why if rate is None else f"{rate:,.1f} ({share})" if share else f"{rate:,.1f}")
        theirs = [number(result, group, key, "tps") for _, result in shown_peers]
        row += ["" if rate is None else f"{rate:,.1f}" for rate in theirs]
        if shown_peers:
            row.append(_ratio([number(result, group, key, "tps") for result in results.values()], theirs))
        rows.append(row)
    head = [group, *results, *[name for name, _ in shown_peers], *(["best to best peer"] if shown_peers else [])]
    return table(title, head, rows) if rows else ""


def plot_growth(title: str, group: str, results: Results, peers: Rows, of_ceiling: Results, file: Path) -> None:
    """A line per precision with its ceiling dashed, a dotted one per peer. Nothing without matplotlib or results."""
    ours = _lines([*results.items()], group)
    theirs = _lines(peers, group)
    pyplot = find_pyplot() if ours or theirs else None
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for precision, points in ours.items():
        (line,) = axes.plot(*zip(*points, strict=True), marker="o", label=precision)
        known = of_ceiling.get(precision, {}).get(group, {})
        ceiling = [(x, rate / known[str(x)]) for x, rate in points if known.get(str(x))]
        if ceiling:
            axes.plot(*zip(*ceiling, strict=True), linestyle="--", color=line.get_color())
    for name, points in theirs.items():
        axes.plot(*zip(*points, strict=True), marker="s", linestyle=":", label=name)
    axes.set_xscale("log", base=2)
    ticks = sorted({x for points in [*ours.values(), *theirs.values()] for x, _ in points})
    axes.set_xticks(ticks, [str(x) for x in ticks])
    axes.set_yscale("log", base=10)
    axes.set_xlabel(GROUPS[group][1])
    axes.set_ylabel("tokens/s (dashed: ceiling, dotted: peers)" if theirs else "tokens/s (dashed: ceiling)")
    axes.set_title(title)
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend()
    save(pyplot, figure, file)


def _lines(columns: Rows, group: str) -> dict[str, list[tuple[int, float]]]:
    lines = {name: _points(result.get(group, {})) for name, result in columns}
    return {name: points for name, points in lines.items() if points}


def _points(figures: dict[str, Any]) -> list[tuple[int, float]]:
    rates = [(int(key), number(figures, key, "tps")) for key in figures]
    return sorted((n, rate) for n, rate in rates if rate is not None)


def _ratio(ours: list[float | None], theirs: list[float | None]) -> str:
    best = [max((rate for rate in rates if rate), default=None) for rates in (ours, theirs)]
    return f"{best[0] / best[1]:.2f}x" if best[0] and best[1] else ""
