"""From checkpoint names to canonical weights, strictly: missing and unexpected tensors are errors that name them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fastllm.errors import LoadError
from fastllm.families import Family
from fastllm.loader.tensors import FileTensor
from fastllm.spec import ModelSpec

SOURCE_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@dataclass(frozen=True)
class Binding:
    """One canonical weight and the tensors it is made of; becomes a _core.WeightBinding."""

    canonical: str
    sources: tuple[FileTensor, ...]
    transform: str = "copy"
    add_one: bool = False


def bind_weights(family: Family, spec: ModelSpec, tensors: Mapping[str, FileTensor], where: str) -> list[Binding]:
    """A binding for every weight the spec has. Raises LoadError naming what is missing, unexpected or unreadable."""
    tensors = _with_prefix(family, tensors)
    bindings: list[Binding] = []
    used: set[str] = set()
    missing: list[str] = []
    for canonical, _ in spec.weight_shapes():
        module, suffix = canonical.rsplit(".", 1)
        layer = re.match(r"layers\.(\d+)\.", module)
        index = layer.group(1) if layer else ""
        rule = family.weights.get(module.replace(f"layers.{index}.", "layers.{i}.", 1) if layer else module)
        if rule is None:
            raise LoadError(f"The family {family.name} has no rule for the weight {canonical}.")
        names = [f"{name.replace('{i}', index)}.{suffix}" for name in rule.sources]
        absent = [name for name in names if name not in tensors]
        missing += absent
        if not absent:
            used.update(names)
            sources = tuple(tensors[n] for n in names)
            # GPTQ's codes of a layer that stores [in, out] are those of any other layer.
            is_gptq = all(t.packing and t.packing.layout == "gptq" for t in sources)
            as_it_is = rule.transform == "transpose" and (suffix == "bias" or is_gptq)
            bindings.append(Binding(canonical, sources, "copy" if as_it_is else rule.transform, rule.add_one))
    if missing:
        raise LoadError(f"{where} lacks {len(missing)} of the tensors that the model needs: {_some(missing)}.")
    unexpected = [name for name in tensors if name not in used and not _ignorable(family, spec, tensors[name], name)]
    if unexpected:
        raise LoadError(
            f"{where} has {len(unexpected)} tensors that a {family.name} model with this config does not use: "
            f"{_some(unexpected)}."
        )
    for binding in bindings:
        for tensor in binding.sources:
            if tensor.packing is None and tensor.type not in SOURCE_TYPES:
                raise LoadError(
                    f"{where}: {tensor.name} has the type {tensor.type}; supported are {', '.join(SOURCE_TYPES)}."
                )
    return bindings


def _with_prefix(family: Family, tensors: Mapping[str, FileTensor]) -> Mapping[str, FileTensor]:
    """Some checkpoints hold the bare decoder: every name lacks the family's prefix."""
    if not tensors or any(name.startswith(family.prefix) for name in tensors):
        return tensors
    return {name if name.startswith("lm_head.") else family.prefix + name: t for name, t in tensors.items()}


def _ignorable(family: Family, spec: ModelSpec, tensor: FileTensor, name: str) -> bool:
    head = family.weights["head"].sources[0]
    if name.endswith(".bias") and not any(tensor.data):
        return True  # quantised layers are often saved with biases that the model never had
    if spec.head.tied and name == f"{head}.weight":
        return True  # a tied head saved all the same
    return any(re.fullmatch(pattern, name) for pattern in family.ignored)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
