"""The least time a CPU could take: bytes over read bandwidth, operations over the peak of its matrix units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# precision -> bytes of a weight where the engine does not say what it holds; groups of codes share a scale of 16 bits
_WEIGHT_BYTES = {"bf16": 2.0, "fp32": 4.0}
_KV_BYTES = {"fp32": 4}  # of a number in the cache; 2 for all other precisions


@dataclass(frozen=True)
class Model:
    """What a step of a model reads and computes."""

    linear: int  # weights of the layers' matrices
    head: int  # weights of the logits' matrix
    embedding: int  # weights of the embedding if it is not the head too, else 0
    kv: int  # numbers of one token in the cache, keys and values of all layers
    attention: int  # operations for one query token on one cached token, all layers

    @classmethod
    def of_spec(cls, spec: dict[str, Any]) -> Model:
        """spec: fastllm's model spec as JSON."""
        hidden, vocab = spec["embed"]["hidden"], spec["embed"]["vocab"]
        linear = kv = attention = 0
        for kind in spec["layer_kind"]:
            attn, ffn = spec["kinds"][kind]["attn"], spec["kinds"][kind]["ffn"]
            heads, kv_heads, size = attn["heads"], attn["kv_heads"], attn["head_dim"]
            linear += hidden * size * (2 * heads + 2 * kv_heads)
            linear += hidden * ffn["inner"] * (3 if ffn["gated"] else 2)
            kv += 2 * kv_heads * size
            attention += 4 * heads * size
        table = vocab * hidden
        return cls(linear, table, 0 if spec["head"]["tied"] else table, kv, attention)

    def bytes_per_step(self, precision: str, held: int = 0) -> float:
        """Bytes of weights that one decode step reads; held: those of all weights if the engine says, else 0."""
        embedding = self.embedding * (4 if precision == "fp32" else 2)  # never compressed, and only a row is read
        return float(held - embedding) if held else (self.linear + self.head) * _WEIGHT_BYTES.get(precision, 0)

    def prefill_operations(self, tokens: int) -> float:
        """Of one prompt, with the logits of its last token."""
        pairs = tokens * (tokens + 1) / 2
        return 2.0 * self.linear * tokens + 2.0 * self.head + self.attention * pairs

    def decode_operations(self, sequences: int, context: int) -> float:
        return sequences * (2.0 * (self.linear + self.head) + self.attention * context)


@dataclass(frozen=True)
class Machine:
    read: float  # bytes/s, all threads
    peaks: dict[str, float]  # bf16, fp32, int8: operations/s, all threads

    @classmethod
    def of_benchmark(cls, result: dict[str, Any]) -> Machine | None:
        """From the JSON of `fastllm_bench_ops --benchmark_filter=Ceilings`; None where it has no ceilings."""
        for one in result.get("benchmarks", []):
            if "read_GB/s" in one:
                fp32 = one["fp32_GFLOP/s"] * 1e9
                bf16, tiles = one["bf16_GFLOP/s"] * 1e9, one["int8_GOP/s"] * 1e9
                int8 = max(tiles, one.get("int8_vnni_GOP/s", 0.0) * 1e9)
                return cls(one["read_GB/s"] * 1e9, {"fp32": fp32, "bf16": bf16 or fp32, "int8": int8 or fp32})
        return None

    def peak(self, precision: str) -> float:
        return self.peaks[precision if precision in self.peaks else "int8"]

    def step_s(self, model: Model, precision: str, weights: float, sequences: int, context: int) -> float:
        """One token for each of `sequences` that have `context` tokens; weights: bytes."""
        kv = sequences * context * model.kv * _KV_BYTES.get(precision, 2)
        return max((weights + kv) / self.read, model.decode_operations(sequences, context) / self.peak(precision))

    def prefill_s(self, model: Model, precision: str, tokens: int) -> float:
        return model.prefill_operations(tokens) / self.peak(precision)

    def batch_s(self, model: Model, precision: str, weights: float, requests: int, at_once: int, tokens: Any) -> float:
        """tokens: (prompt, output) of each of `requests`, `at_once` of which run."""
        prompt, output = tokens
        steps = -(-requests // at_once) * output
        prefill = requests * self.prefill_s(model, precision, prompt)
        return prefill + steps * self.step_s(model, precision, weights, at_once, prompt + output // 2)
