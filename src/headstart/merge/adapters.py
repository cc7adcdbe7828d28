"""LoRA adapter folders: read, summed, written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.core.checkpoint import write_atomically
from headstart.core.validate import finite, require
from headstart.core.weights import LazyWeights

from .file_values import json_object
from .low_rank import Factors, Layout, LowRankSum, low_rank_sum

Adapter: TypeAlias = Mapping[str, Factors]
"""Dotted name of a layer -> the change of its weight."""

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FOLD = "Fold it with peft (merge_and_unload) and merge the whole model."
_SILENT = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip
"""Settings that are read here, or say nothing about what the stored factors compute."""


def read_adapter(folder: Path | str) -> dict[str, Factors]:
    """The low-rank changes of a PEFT adapter folder, layer by layer.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors, as `save_pretrained` of peft writes it.

    Returns:
        layer -> factors of its stored weight, with scale alpha / r, or alpha / √r (rsLoRA), by layer where patterns say
        so. Factors of transposed layers (GPT-2) and of embeddings are turned to the weight's own orientation.

    Notes: fan_in_fan_out is one setting for all layers; an adapter on both kinds of layer is not told apart where the
    weight is square.

    Raises:
        Refused: a pickled or missing file, anything but plain LoRA of linear layers and embeddings (by the setting's or
            tensor's name), ranks that differ from the configuration, NaN.
    """
    folder = Path(folder)
    there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
    do = "Save it with peft's save_pretrained; a pickled .bin is never loaded."
    for file in (CONFIG, TENSORS):
        require((folder / file).is_file(), f"An adapter folder needs {file}", there, do)
    config = json_object(folder / CONFIG, do)
    _plain(config)
    halves: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for name, tensor in LazyWeights(folder / TENSORS).items():
        found = re.fullmatch(r"(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))", name.removeprefix(_PREFIX))
        require(found is not None, "An adapter must hold low-rank factors only", repr(name),
                f"Save it again with save_embedding_layers=False if the vocabulary is unchanged. {_FOLD}")  # fmt: skip
        assert found is not None
        require(tensor.ndim == 2, "Adapters must be of linear layers and embeddings", f"{name!r} of a convolution, "
                f"{tuple(tensor.shape)}", _FOLD)  # fmt: skip
        finite(f"tensor {name!r}", tensor, "Do not merge a diverged adapter.")
        layer, linear, table = found.groups()
        halves.setdefault(layer, {})[linear or table] = ("embedding" if table else "linear"), tensor
    require(bool(halves), "An adapter must hold low-rank factors", "none", do)
    return {layer: _factors(layer, pair, config) for layer, pair in halves.items()}


def _plain(config: Mapping[str, Any]) -> None:
    """Refuse settings under which the weight is not W + scale B A of the base as it is."""
    kind = config.get("peft_type")
    require(kind == "LORA", "Only LoRA adapters are read", f"peft_type={kind!r}", _FOLD)
    numbers = {name: config.get(name) for name in ("r", "lora_alpha")}
    require(all(isinstance(value, int | float) for value in numbers.values()), f"{CONFIG} must have r and lora_alpha",
            numbers, "Save it again.")  # fmt: skip
    start = config.get("init_lora_weights", True)
    require(start in (True, False, None, "gaussian", "eva", "orthogonal"), "The adapter must leave its base as it is",
            f"init_lora_weights={start!r}, which changes the base", f"Convert it with peft's "
            f"save_pretrained(..., path_initial_model_for_weight_conversion=...). {_FOLD}")  # fmt: skip
    for name, value in sorted(config.items()):
        unset = not value or (name == "bias" and value == "none")
        require(name in _SILENT or unset, "Only plain LoRA is read", f"{name}={value!r}", _FOLD)


def _factors(layer: str, pair: Mapping[str, tuple[str, Tensor]], config: Mapping[str, Any]) -> Factors:
    require(set(pair) == {"A", "B"}, f"Layer {layer!r} must have lora_A and lora_B", sorted(pair), "Save it again.")
    (kind, down), (_, up) = pair["A"], pair["B"]
    rank, alpha = (
        next(
            (v for key, v in (config.get(pattern) or {}).items() if re.match(rf"(.*\.)?({key})$", layer)), config[name]
        )
        for pattern, name in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    require(len(down) == up.shape[1] == rank >= 1, f"The factors of {layer!r} must have the rank of {CONFIG}, {rank}",
            f"{tuple(up.shape)} and {tuple(down.shape)}", "Load the two files of one save.")  # fmt: skip
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    if kind == "embedding" or config.get("fan_in_fan_out"):
        layout: Layout = "embedding" if kind == "embedding" else "transposed"
        return Factors(down.T, up.T, scale, layout)  # (B A)ᵀ = Aᵀ Bᵀ
    return Factors(up, down, scale)


def sum_adapters(
    adapters: Sequence[Adapter], weights: Sequence[float] | None = None, *, rank: int | None = None
) -> dict[str, LowRankSum]:
    """One adapter that does what the weighted sum of several does; layer by layer `low_rank_sum`.

    Args:
        adapters: of one base; a layer that one lacks, it leaves as it is.
        weights: one number each, 1 by default.
        rank: of every layer, or None for the exact sum.

    Notes: of the forms of peft's add_weighted_adapter, "cat" is the exact sum, with its factors side by side; "svd" is
    the sum cut to `svd_rank` (by default the largest rank), decomposed dense; "linear" is not the sum: with s the
    scales it is (Σ √(w s) B) (Σ √(w s) A), in which every B meets every A.

    Raises:
        Refused: weights too many or too few, layers of unlike shape, and what `low_rank_sum` refuses.
    """
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    require(len(weights) == len(adapters) >= 1, "Each adapter needs one weight", f"{len(weights)} for {len(adapters)}",
            "Pass as many weights as adapters.")  # fmt: skip
    layers = dict.fromkeys(layer for adapter in adapters for layer in adapter)
    merged = {}
    for layer in layers:
        own = [(one[layer], weight) for one, weight in zip(adapters, weights, strict=True) if layer in one]
        require(len({(f.layout, f.shape) for f, _ in own}) == 1, f"Adapters must agree on layer {layer!r}",
                [(f.layout, f.shape) for f, _ in own], "Sum adapters of one base.")  # fmt: skip
        total = low_rank_sum([(f.up, f.down, f.scale * weight) for f, weight in own], rank=rank)
        merged[layer] = replace(total, factors=replace(total.factors, layout=own[0][0].layout))
    return merged


def write_adapter(adapter: Adapter, folder: Path | str, *, base: str | None = None, task: str | None = None) -> None:
    """Write an adapter folder that peft loads.

    Args:
        adapter: layer -> factors. All are written with the largest rank, the smaller filled up with zeros, and scales
            that differ go into B: no pattern by layer is needed, which not every reader follows.
        folder: made if need be; the two files are replaced.
        base: name or path of the base model, for the configuration.
        task: peft's task_type, such as "CAUSAL_LM".
    """
    from safetensors.torch import save

    require(bool(adapter), "An adapter needs layers", "none", "Merge at least one layer.")
    layouts = {factors.layout for factors in adapter.values()} - {"embedding"}
    require(len(layouts) <= 1, "Linear layers of an adapter must be stored alike", sorted(layouts),
            "Write them as two adapters, or fold them.")  # fmt: skip
    rank = max(factors.rank for factors in adapter.values())
    scales = {factors.scale for factors in adapter.values()}
    common = scales.pop() if len(scales) == 1 else 1.0
    tensors: dict[str, Tensor] = {}
    for layer, factors in adapter.items():
        more = rank - factors.rank
        up, down = F.pad(factors.up, (0, more)), F.pad(factors.down, (0, 0, 0, more))
        if factors.scale != common:
            up = (up.to(torch.promote_types(up.dtype, torch.float32)) * (factors.scale / common)).to(up.dtype)
        b, a = (up, down) if factors.layout == "linear" else (down.T, up.T)
        stem, end = (f"{_PREFIX}{layer}.lora_", ".weight")
        stem, end = (f"{stem}embedding_", "") if factors.layout == "embedding" else (stem, end)
        tensors |= {f"{stem}{half}{end}": t.detach().cpu().contiguous().clone() for half, t in (("A", a), ("B", b))}
    config = {
        "peft_type": "LORA", "task_type": task, "base_model_name_or_path": base, "r": rank,
        "lora_alpha": common * rank, "target_modules": list(adapter), "fan_in_fan_out": layouts == {"transposed"},
        "bias": "none", "lora_dropout": 0.0, "inference_mode": True,
    }  # fmt: skip
    write_atomically(Path(folder) / TENSORS, lambda file: file.write(save(tensors, metadata={"format": "pt"})))
    write_atomically(Path(folder) / CONFIG, lambda file: file.write(json.dumps(config, indent=1).encode()))
