"""Tables (Markdown) and plots of cpu_report.py: figures, and the share of the machine's ceilings that they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpu_roofline import Machine, Model
from tables import find_pyplot, number, save, table

Results = dict[str, dict[str, Any]]  # precision -> its result, of cpu_workloads.py
Rows = list[tuple[str, dict[str, Any]]]  # column's name -> a result with the same keys

_BATCH = (64, 16, (128, 64))  # requests, at once, (prompt, output)


def read_peers(text: str, name: str, belongs: Callable[[dict[str, Any]], bool]) -> Rows:
    """A peer's results that belong: one JSON object, or one a line, which then are told apart by their type."""
    try:
        found = [json.loads(text)]
    except ValueError:
        found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    found = [one for one in found if belongs(one)]
    return [(name if len(found) == 1 else f"{name} {one.get('dtype', i)}", one) for i, one in enumerate(found)]


def ceiling_table(result: dict[str, Any]) -> str:
    """What fastllm_bench_ops measured of the machine; 0 is shown as not there."""
    names = {
        "read_1t_GB/s": "memory read, one thread, GB/s",
        "read_GB/s": "memory read, all threads, GB/s",
        "fp32_GFLOP/s": "fp32 multiply-adds, GFLOP/s",
        "bf16_GFLOP/s": "bf16 tiles, GFLOP/s",
        "int8_GOP/s": "int8 tiles, GOP/s",
        "int8_vnni_GOP/s": "int8 in vector registers, GOP/s",
        "threads": "threads",
    }
    for one in result.get("benchmarks", []):
        if "read_GB/s" in one:
            shown = {key: f"{one[key]:,.1f}".removesuffix(".0") if one[key] else "-" for key in names if key in one}
            rows = [[names[key], value] for key, value in shown.items()]
            return table("ceilings", ["", ""], rows)
    return ""


def shares(result: dict[str, Any], machine: Machine) -> dict[str, Any]:
    """The floor's share of each measured time, by the keys of the figures. {} without weights of known size."""
    model, precision = Model.of_spec(result["spec"]), result["precision"]
    weights = model.bytes_per_step(precision, result.get("held_bytes", 0))
    if not weights:
        return {}
    seen: dict[str, Any] = {"weight_bytes_per_step": weights}
    if rate := number(result, "prefill_tps"):
        seen["prefill_tps"] = machine.prefill_s(model, precision, 512) / (512 / rate)
    if rate := number(result, "decode_tps"):
        seen["decode_tps"] = weights * rate / machine.read
    if rate := number(result, "batch_out_tps"):
        requests, _, (_, output) = _BATCH
        seen["batch_out_tps"] = machine.batch_s(model, precision, weights, *_BATCH) / (requests * output / rate)
    for group, counts in (("sequences", lambda n: (n, 128)), ("contexts", lambda n: (1, n))):
        seen[group] = {
            key: machine.step_s(model, precision, weights, *counts(int(key))) * rate / counts(int(key))[0]
            for key in result.get(group, {})
            if (rate := number(result, group, key, "tps"))
        }
    return seen


def workload_table(name: str, results: Results, peers: Rows, of_ceiling: Results) -> str:
    """Figures of every precision and peer; the ratio is of fastllm's best to the peers' best."""
    columns = [*results.items(), *peers]
    rows: list[list[str]] = []
    for key, label in (
        ("prefill_tps", "prefill 512, tokens/s"),
        ("decode_tps", "one sequence, tokens/s"),
        ("batch_out_tps", "64 x 128/64 at 16, output tokens/s"),
    ):
        values = [number(result, key) for _, result in columns]
        if not any(values):
            continue
        ours = [v for v in values[: len(results)] if v]
        theirs = [v for v in values[len(results) :] if v]
        ratio = f"{max(ours) / max(theirs):.2f}x" if ours and theirs else ""
        rows.append([label, *["" if v is None else f"{v:,.1f}" for v in values], ratio])
        percents = [_percent(number(of_ceiling.get(column, {}), key)) for column in results]
        if any(percents):
            rows.append(["of the ceiling", *percents, *["" for _ in peers], ""])
    for key, label in (("load_s", "load, s"), ("peak_rss_mb", "peak RSS, MB")):
        values = [number(result, key) for _, result in columns]
        if any(values):
            rows.append([label, *["" if v is None else f"{v:,.1f}" for v in values], ""])
    if not rows:
        return ""
    return table(name, ["", *[column for column, _ in columns], "best to best peer"], rows)


def growth_table(title: str, group: str, results: Results, of_ceiling: Results) -> str:
    """Tokens/s of all sequences together, with the share of the ceiling, a row per count or length."""
    keys = sorted({key for result in results.values() for key in result.get(group, {})}, key=int)
    rows = []
    for key in keys:
        row = [key]
        for precision, result in results.items():
            rate = number(result, group, key, "tps")
            share = _percent(number(of_ceiling.get(precision, {}), group, key))
            why = result.get(group, {}).get(key, {}).get("skipped", "")
            row.append(why if rate is None else f"{rate:,.1f} ({share})" if share else f"{rate:,.1f}")
        rows.append(row)
    return table(title, [group, *results], rows) if rows else ""


def plot_growth(title: str, group: str, results: Results, of_ceiling: Results, file: Path) -> None:
    """A line per precision, its ceiling dashed. Nothing without matplotlib or results."""
    lines = {precision: _points(result.get(group, {})) for precision, result in results.items()}
    lines = {precision: points for precision, points in lines.items() if points}
    pyplot = find_pyplot() if lines else None
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for precision, points in lines.items():
        xs = [x for x, _ in points]
        (line,) = axes.plot(xs, [rate for _, rate in points], marker="o", label=precision)
        known = of_ceiling.get(precision, {}).get(group, {})
        ceiling = [(x, rate / known[str(x)]) for x, rate in points if known.get(str(x))]
        if ceiling:
            axes.plot(*zip(*ceiling, strict=True), linestyle="--", color=line.get_color())
    axes.set_xscale("log", base=2)
    ticks = sorted({x for points in lines.values() for x, _ in points})
    axes.set_xticks(ticks, [str(x) for x in ticks])
    axes.set_yscale("log", base=10)
    axes.set_xlabel("sequences after 128 tokens" if group == "sequences" else "tokens of context, one sequence")
    axes.set_ylabel("tokens/s (dashed: ceiling)")
    axes.set_title(title)
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend()
    save(pyplot, figure, file)


def _points(figures: dict[str, Any]) -> list[tuple[int, float]]:
    rates = [(int(key), number(figures, key, "tps")) for key in figures]
    return sorted((n, rate) for n, rate in rates if rate is not None)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share * 100:.0f} %"
