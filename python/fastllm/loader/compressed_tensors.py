"""The config of compressed-tensors: groups of modules, each with the scheme of its weights.

Weights are computed on as they are; activations need no scheme of theirs, since those of a CPU are quantised to 8 bits
for every token anyway, and those of a GPU stay dense, which is more than the checkpoint asks for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from fastllm.errors import LoadError
from fastllm.families import HfConfig
from fastllm.loader.scheme import Scheme, group_size

_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")


def compressed_tensors_schemes(config: HfConfig) -> Callable[[str], Scheme]:
    """Module name -> scheme. Raises LoadError for what would be computed otherwise than the checkpoint means it."""
    config.refuse("kv_cache_scheme", [], "quantised KV caches are chosen with --kv-cache-dtype")
    if config.get("transform_config"):
        raise LoadError(f"{config.where}: transform_config is not supported (rotations at run time).")
    sparsity = config.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise LoadError(f"{config.where}: sparsity_config {sparsity!r} is not supported; sparse weights are not read.")
    given = config.get("config_groups")
    if not isinstance(given, dict) or not given:
        raise LoadError(f"{config.where}: config_groups must be an object of groups, got {given!r}.")
    ignored = config.strings("ignore")
    groups: list[tuple[list[str], Scheme]] = []
    for name, values in given.items():
        group = HfConfig(values, f"{config.where}: config_groups.{name}")
        groups.append((group.strings("targets"), _scheme(group, config.get("format"))))

    def scheme_of(module: str) -> Scheme:
        if not any(_rank(target, module, config.where) for target in ignored):
            ranked = [(_rank(target, module, config.where), s) for targets, s in groups for target in targets]
            rank, scheme = max(ranked, key=lambda r: r[0], default=(0, groups[0][1]))
            if rank:
                return scheme
        raise LoadError(f"{config.where}: {module} is quantised, but no config group is for it.")

    return scheme_of


def _rank(target: str, module: str, where: str) -> int:
    """How closely a target names a module: 3 by its name, 2 by a pattern, 1 by its class, 0 not at all."""
    if target == module:
        return 3
    if target.startswith("re:"):
        try:
            return 2 if re.match(target[3:], module) else 0
        except re.error as error:
            raise LoadError(f"{where} has the malformed pattern {target!r}: {error}.") from error
    return 1 if target == "Linear" else 0


def _scheme(group: HfConfig, common_format: Any) -> Scheme:
    form = group.get("format", common_format)
    if form not in _FORMATS:
        raise LoadError(f"{group.where}: the format {form!r} is not supported; supported are {', '.join(_FORMATS)}.")
    _check_activations(group)
    weights = HfConfig(group.get("weights", {}), f"{group.where}.weights")
    if weights.get("type") != "int":
        raise LoadError(f"{weights.where}: the type {weights.get('type')!r} is not supported; it must be 'int'.")
    bits = weights.size("num_bits")
    if bits not in (4, 8):
        raise LoadError(f"{weights.where}: num_bits={bits} is not supported; it must be 4 or 8.")
    weights.refuse("dynamic", [False], "weights that are quantised at run time")
    weights.refuse("strategy", ["channel", "group"], "other shapes of scales")
    weights.refuse("actorder", ["group", "weight", "static"], "an unknown order of columns")
    by_group = weights.get("strategy") == "group"
    if by_group and weights.get("group_size") is None:
        raise LoadError(f"{weights.where}: the strategy 'group' needs a group_size.")
    return Scheme(
        "rows",
        bits,
        group_size(weights) if by_group else 0,
        has_zeros=not weights.flag("symmetric", True),
        has_order=by_group and weights.get("actorder") == "group",
    )


def _check_activations(group: HfConfig) -> None:
    group.refuse("output_activations", [], "quantised outputs")
    given = group.get("input_activations")
    if given is None:
        return
    inputs = HfConfig(given, f"{group.where}.input_activations")
    if inputs.get("type") != "int" or inputs.get("num_bits") != 8:
        raise LoadError(
            f"{inputs.where}: activations of {inputs.get('num_bits')!r} bits of type {inputs.get('type')!r} are not "
            "supported; supported are int8, or none."
        )
    if inputs.get("dynamic") is not True:
        raise LoadError(
            f"{inputs.where}: activations with scales of the checkpoint's are not supported, dynamic ones are."
        )
