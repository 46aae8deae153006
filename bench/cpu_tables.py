"""Tables (Markdown) of cpu_report.py: figures, and the share of the machine's ceilings that they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from cpu_roofline import Machine, Model
from tables import number, table

Results = dict[str, dict[str, Any]]  # precision -> its result, of cpu_workloads.py
Rows = list[tuple[str, dict[str, Any]]]  # column's name -> a result with the same keys

_WORKLOADS = {
    "prefill_tps": "prefill 512, tokens/s",
    "decode_tps": "one sequence, tokens/s",
    "batch_out_tps": "64 x 128/64 at 16, output tokens/s",
}
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
    peers = [(label, result) for label, result in peers if any(number(result, key) for key in _WORKLOADS)]
    columns = [*results.items(), *peers]
    rows: list[list[str]] = []
    for key, label in _WORKLOADS.items():
        values = [number(result, key) for _, result in columns]
        if not any(values):
            continue
        ours = [v for v in values[: len(results)] if v]
        theirs = [v for v in values[len(results) :] if v]
        ratio = f"{max(ours) / max(theirs):.2f}x" if ours and theirs else ""
        rows.append([label, *["" if v is None else f"{v:,.1f}" for v in values], ratio])
        percents = [percent(number(of_ceiling.get(column, {}), key)) for column in results]
        if any(percents):
            rows.append(["of the ceiling", *percents, *["" for _ in peers], ""])
    for key, label in (("load_s", "load, s"), ("peak_rss_mb", "peak RSS, MB")):
        values = [number(result, key) for _, result in columns]
        if any(values):
            rows.append([label, *["" if v is None else f"{v:,.1f}" for v in values], ""])
    if not rows:
        return ""
    return table(name, ["", *[column for column, _ in columns], "best to best peer"], rows)


def percent(share: float | None) -> str:
    return "" if share is None else f"{share * 100:.0f} %"
