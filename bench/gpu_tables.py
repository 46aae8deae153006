"""Tables (Markdown) and plots of gpu_report.py. Plots need matplotlib and are left out without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tables import find_pyplot, leaves, number, save, table

Columns = list[tuple[str, dict[str, Any]]]  # engine -> its result, with the keys of gpu_workloads.py

# key -> (what is shown, unit)
_THROUGHPUT = [
    *[(f"static_b{n}_128_128", f"{n} x 128/128") for n in (8, 32, 64, 128, 256)],
    *[(f"tp_{n}x128_256", f"{n} x 128/256") for n in (100, 256, 1000)],
    ("mixed_512_in32-1024_out32-512", "mixed 512"),
]
_PEER_SHAPES = {"llama3-8b": "l8b", "llama3.2-1b": "l1b", "smollm2-135m": "smol135"}


def belongs(result: dict[str, Any], shape: str) -> bool:
    """Whether a peer's result, which names its model's folder, is of this shape."""
    folder = Path(str(result.get("model", ""))).name
    return folder == shape or folder.startswith(_PEER_SHAPES.get(shape, shape))


def workload_table(shape: str, columns: Columns) -> str:
    """One row per workload; the ratio is the first column's to the best of the peers'."""
    if not columns:
        return ""
    rows: list[list[str]] = []

    def add(label: str, values: list[float | None], lower_is_better: bool = False) -> None:
        if not any(v is not None for v in values):
            return
        theirs = [v for (name, _), v in zip(columns, values, strict=True) if v and name not in ("fastllm", "native")]
        ratio = ""
        if theirs and values[0]:
            ratio = f"{min(theirs) / values[0] if lower_is_better else values[0] / max(theirs):.2f}x"
        rows.append([label, *["" if v is None else f"{v:,.2f}" if v < 100 else f"{v:,.0f}" for v in values], ratio])

    for key, label in _THROUGHPUT:
        add(f"{label}, output tokens/s", [number(r, key, "out_tok_s") for _, r in columns])
    add("prefill 64 x 2048, all tokens/s", [number(r, "prefill_64x2048", "total_tok_s") for _, r in columns])
    add("one sequence, ms a token", [number(r, "bs1_128_128", "tpot_ms") for _, r in columns], True)
    add("first token of 128, ms", [number(r, "bs1_128_128", "ttft_ms") for _, r in columns], True)
    for length in (512, 2048, 4000):
        add(f"first token of {length}, ms", [number(r, f"ttft_{length}") for _, r in columns], True)
    add("load, s", [number(r, "load_s") for _, r in columns], True)
    return table(shape, ["", *[name for name, _ in columns], "to best peer"], rows)


def step_table(shape: str, columns: Columns) -> str:
    """How long fastllm's steps took, and how much of that its host worked; one row per workload and column."""
    rows: list[list[str]] = []
    for key, label in [*_THROUGHPUT, ("prefill_64x2048", "prefill 64 x 2048")]:
        for name, result in columns:
            host = number(result, key, "host_us_per_step")
            seconds, steps = number(result, key, "s"), number(result, key, "steps")
            if host is not None and seconds and steps:
                step = seconds / steps * 1e6
                rows.append([label, name, f"{step:,.0f}", f"{host:,.1f}", f"{host / step * 100:.1f} %"])
    return table(f"{shape}: steps", ["", "", "us a step", "us of host", "host"], rows) if rows else ""


def transformers_table(shape: str, ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Output tokens/s of Transformers beside fastllm's for as many requests of the same lengths."""
    output = theirs.get("output_tokens", 64)
    ways = [("one at a time", 1, number(theirs, "one_at_a_time", "out_tok_s"))]
    for size, one in theirs.get("static", {}).items():
        best = " (best)" if str(number(theirs, "best_static", "batch")) == f"{size}.0" else ""
        ways.append((f"static batch of {size}{best}", int(size), number(one, "out_tok_s")))
    count = int(number(theirs, "continuous", "requests") or 0)
    ways.append((f"continuous batching of {count}", count, number(theirs, "continuous", "out_tok_s")))
    rows: list[list[str]] = []
    for label, requests, rate in ways:
        if rate is None:
            continue
        mine = number(ours, f"static_b{requests}_128_{output}", "out_tok_s")
        ratio = "" if mine is None else f"{mine / rate:,.1f}x"
        rows.append([label, f"{rate:,.1f}", "" if mine is None else f"{mine:,.1f}", ratio])
    if not rows:
        return ""
    name = f"Transformers {theirs.get('transformers', '')}".strip()
    title = f"{shape}: beside {name}, prompts of 128 and {output} output tokens, output tokens/s"
    return table(title, ["", name, "fastllm", "ratio"], rows)


def kernel_table(kernels: dict[str, Any]) -> str:
    """Every microbenchmark with its rates and the share of the time that the hardware's floor is."""
    rows = [
        [name, *[f"{one[key]:,.2f}" if key in one else "" for key in ("us", "GB/s", "TFLOP/s")], _percent(one)]
        for name, one in _benchmarks(kernels)
    ]
    return table("kernels", ["", "us", "GB/s", "TFLOP/s", "of floor"], rows) if rows else ""


def plain_table(title: str, result: dict[str, Any]) -> str:
    """Every figure of a nested result, one a row."""
    rows = [[name, f"{value:,.3f}" if isinstance(value, float) else str(value)] for name, value in leaves(result)]
    return table(title, ["", ""], rows) if rows else ""


def failure_table(title: str, result: dict[str, Any]) -> str:
    """What failed or was skipped, and why."""
    rows = [[path, str(value)] for path, value in leaves(result) if {"failed", "skipped"} & {*path.split(", ")}]
    return table(title, ["", ""], rows) if rows else ""


def has_matplotlib() -> bool:
    return find_pyplot() is not None


def plot_kernels(kernels: dict[str, Any], file: Path) -> None:
    """Share of the roofline that every kernel reaches. Nothing without matplotlib or results."""
    shown = [(name, one["floor"]) for name, one in _benchmarks(kernels) if "floor" in one]
    pyplot = find_pyplot() if shown else None
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.22 * len(shown)))
    axes.barh([name for name, _ in shown], [share for _, share in shown])
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("share of the roofline")
    save(pyplot, figure, file)


def concurrency(result: dict[str, Any]) -> list[tuple[int, float]]:
    """Requests of 128/128 tokens at once, and the output tokens/s of all together."""
    single = number(result, "bs1_128_128", "e2e_ms")
    rates = [(1, None if single is None else 128e3 / single)]
    rates += [(n, number(result, f"static_b{n}_128_128", "out_tok_s")) for n in (8, 32, 64, 128, 256)]
    return [(n, rate) for n, rate in rates if rate is not None]


def plot_concurrency(shape: str, columns: Columns, file: Path) -> None:
    """Throughput against concurrency, a line per engine. Nothing without matplotlib or results."""
    lines = [(name, points) for name, result in columns if (points := concurrency(result))]
    pyplot = find_pyplot() if lines else None
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, points in lines:
        axes.plot([n for n, _ in points], [rate for _, rate in points], marker="o", label=name)
    axes.set_xscale("log", base=2)
    counts = sorted({n for _, points in lines for n, _ in points})
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.set_yscale("log", base=10)
    axes.set_xlabel("concurrent requests of 128/128 tokens")
    axes.set_ylabel("output tokens/s")
    axes.set_title(shape)
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend()
    save(pyplot, figure, file)


def _benchmarks(kernels: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    runs = [one for one in kernels.get("benchmarks", []) if one.get("run_type", "iteration") == "iteration"]
    return [
        (str(one["name"]).removesuffix("/manual_time").removesuffix("/iterations:1"), one)
        for one in runs
        if not one.get("error_occurred")
    ]


def _percent(one: dict[str, Any]) -> str:
    return f"{one['floor'] * 100:.0f} %" if "floor" in one else ""
