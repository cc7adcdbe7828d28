"""Weights as mappings: in memory or lazily on disk, checked, combined tensor by tensor, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from .checkpoint import write_atomically
from .validate import finite, require

Weights: TypeAlias = Mapping[str, Tensor]
"""A plain state dict, or a lazy one over safetensors shards."""


class MergeRule(Protocol):
    """Several models' weights -> one model's.

    Attributes:
        scope: "tensor" rules look at one name at a time and stream as they are; a "model" rule first needs one pass
            over everything, which `Surveyed.survey` makes.
        symmetric: whether the order of the models does not matter.
    """

    scope: ClassVar[Literal["tensor", "model"]]

    @property
    def symmetric(self) -> bool: ...

    def merge(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> dict[str, Tensor]: ...


@runtime_checkable
class Surveyed(Protocol):
    """A "model" rule: `survey` reads the models once and returns a rule of scope "tensor"."""

    def survey(self, models: Sequence[Weights], *, base: Weights | None = None) -> MergeRule: ...


class LazyWeights(Mapping[str, Tensor]):
    """The tensors of a safetensors file or sharded folder, read from disk one at a time when asked for.

    Args:
        path: a .safetensors file, or a folder with model.safetensors or model.safetensors.index.json.

    Raises:
        Refused: nothing there, a pickled checkpoint, or an index that names a file outside the folder.
    """

    def __init__(self, path: Path | str) -> None:
        from safetensors import safe_open

        path = Path(path)
        self._files: dict[str, Path] = {}
        for file in _shards(path):
            with safe_open(file, framework="pt") as handle:
                self._files.update(dict.fromkeys(handle.keys(), file))

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._files[name], framework="pt") as handle:
            return handle.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _shards(path: Path) -> list[Path]:
    require(path.exists(), "Weights need a file or folder that exists", path, "Check the path.")
    if path.is_file():
        require(path.suffix == ".safetensors", "Weights are read from safetensors only, since a pickle can run code",
                path.name, "Convert it where you trust it: safetensors.torch.save_file(state_dict, PATH).")  # fmt: skip
        return [path]
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
        require(not outside, "A weight index must name files of its own folder", outside, "Do not load this folder.")
        return [path / name for name in names]
    single = path / "model.safetensors"
    pickles = sorted(p.name for p in (*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")))
    require(single.exists(), "A model folder needs model.safetensors", f"{pickles} (pickled; not loaded)" if pickles
            else "no weights", "Save it with save_pretrained(..., safe_serialization=True).")  # fmt: skip
    return [single]


def save_weights(weights: Weights | Iterable[tuple[str, Tensor]], folder: Path, *, shard_bytes: int = 2**30) -> None:
    """Write model.safetensors into `folder`, or numbered shards with an index once they pass `shard_bytes`.

    Takes pairs as they come, so memory is one shard; each file is written beside its place and renamed.
    """
    from safetensors.torch import save

    shard: dict[str, Tensor] = {}
    files: list[list[str]] = []
    total = held = 0

    def flush() -> None:
        nonlocal held
        data = save(shard, metadata={"format": "pt"})
        write_atomically(folder / f"model-{len(files) + 1:05d}.safetensors", lambda file: file.write(data))
        files.append(list(shard))
        shard.clear()
        held = 0

    for name, tensor in weights.items() if isinstance(weights, Mapping) else weights:
        size = tensor.numel() * tensor.element_size()
        if shard and held + size > shard_bytes:
            flush()
        shard[name] = tensor.detach().cpu().contiguous().clone()  # clone: tied tensors may not share memory on disk
        held += size
        total += size
    flush()
    if len(files) == 1:
        (folder / "model-00001.safetensors").replace(folder / "model.safetensors")
        return
    where = {}
    for k, names in enumerate(files, 1):
        final = f"model-{k:05d}-of-{len(files):05d}.safetensors"
        (folder / f"model-{k:05d}.safetensors").replace(folder / final)
        where.update(dict.fromkeys(names, final))
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1).encode()
    write_atomically(folder / "model.safetensors.index.json", lambda file: file.write(index))


def aligned(models: Sequence[Weights], base: Weights | None = None) -> list[str]:
    """The names all models share, in the first one's order; a missing or misshapen tensor is refused by name.

    Cost: reads every tensor once where a model is lazy.
    """
    require(len(models) >= 1, "A merge needs at least one model", len(models), "Pass state dicts.")
    names = list(models[0])
    for k, other in enumerate([*models[1:], *([base] if base is not None else [])], 1):
        who = f"model {k}" if k < len(models) else "base"
        odd = sorted(set(names) ^ set(other))
        require(not odd, "All models must have the same tensors", f"{odd[:3]} in only one of model 0 and {who}",
                "Drop those names, or merge models of one architecture.")  # fmt: skip
        for name in names:
            shapes = tuple(models[0][name].shape), tuple(other[name].shape)
            require(shapes[0] == shapes[1], f"Tensor {name!r} must have one shape", f"{shapes[0]} and {shapes[1]}",
                    "Align vocabularies or heads first.")  # fmt: skip
    return names


def by_tensor(
    combine: Callable[[str, Tensor, Tensor | None, Tensor | None], Tensor],
    models: Sequence[Weights],
    base: Weights | None = None,
    importance: Sequence[Weights] | None = None,
) -> dict[str, Tensor]:
    """Combine aligned models name by name: the frame of every rule of scope "tensor".

    Args:
        combine: (name, stacked (k, ...), base (...) or None, importance (k, ...) or None) -> (...); float32 or wider.
        models: k state dicts. Integer and boolean tensors are copied from `base`, else from the first model.

    Returns:
        name -> tensor of the first model's dtype and device.

    Raises:
        Refused: names or shapes that differ, NaN or infinity (with the tensor's name).
    """
    merged = {}
    for name in aligned(models, base):
        first = models[0][name]
        if not first.is_floating_point():
            merged[name] = (first if base is None else base[name]).clone()
            continue
        wide = torch.promote_types(first.dtype, torch.float32)
        stacked = torch.stack([model[name].to(first.device, wide) for model in models])
        finite(f"tensor {name!r}", stacked, "Do not merge a diverged model.")
        origin = None if base is None else base[name].to(first.device, wide)
        weight = None if importance is None else torch.stack([w[name].to(first.device, wide) for w in importance])
        merged[name] = combine(name, stacked, origin, weight).to(first.dtype)
    return merged


def merge_streaming(
    rule: MergeRule,
    models: Sequence[Weights],
    *,
    base: Weights | None = None,
    importance: Sequence[Weights] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The merged tensors one at a time, for models larger than memory; the same numbers as `rule.merge`.

    Memory: one tensor of each model. Feed the pairs to `save_weights`.
    """
    names = aligned(models, base)
    if isinstance(rule, Surveyed):
        rule = rule.survey(models, base=base)
    for name in names:
        only = [{name: model[name]} for model in models]
        origin = None if base is None else {name: base[name]}
        weight = None if importance is None else [{name: w[name]} for w in importance]
        yield name, rule.merge(only, base=origin, importance=weight)[name]


def fingerprint(weights: Weights) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of names; the same for lazy and loaded weights."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
