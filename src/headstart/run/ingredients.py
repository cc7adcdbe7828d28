"""What goes into a merge: model folders, weight files, runs, adapters on their base; and which of their tensors fit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from headstart.core.shards import Spec, Weights, borrowed, reader, spec_of
from headstart.core.validate import require
from headstart.core.weights import LazyWeights
from headstart.merge.adapters import CONFIG, read_adapter
from headstart.merge.fold_adapter import fold_adapter

OnMismatch = Literal["error", "skip", "intersect"]


@dataclass(frozen=True, kw_only=True)
class Ingredient:
    """One model of a merge.

    Args:
        name: as it was given.
        folder: where its configuration is; of an adapter, its base's.
        weights: read when asked for.
        files: the weight files, whose bytes identify it.
        whole: whether `folder` holds exactly these weights; an adapter's holds its base's.
    """

    name: str
    folder: Path
    weights: Weights = field(repr=False)
    files: tuple[Path, ...]
    whole: bool = True

    def digest(self) -> str:
        """sha256 of its weight files, in the order of their names."""
        digest = hashlib.sha256()
        for file in sorted(self.files):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def is_adapter(where: str) -> bool:
    """Whether a folder holds an adapter instead of a model."""
    return (Path(where).expanduser() / CONFIG).is_file()


def open_ingredient(where: str, base: Ingredient | None = None) -> Ingredient:
    """A model by what the user typed; nothing but headers is read.

    Args:
        where: a model folder (of transformers, timm or headstart), a .safetensors file, the directory of a finished
            run, "hf:ORG/NAME", an adapter folder, or "MODEL+ADAPTER".
        base: what an adapter folder without a model before it is put on.

    Raises:
        Refused: nothing there, pickled weights, a damaged file, an adapter without a base or that does not fit it.
    """
    before, plus, adapter = where.rpartition("+")
    if plus and not Path(where).expanduser().exists():
        return _folded(where, Path(adapter).expanduser(), open_ingredient(before))
    if where.startswith("hf:"):
        from headstart.zoo.folder import snapshot

        return _opened(where, snapshot(where.removeprefix("hf:"), weights=True))
    path = Path(where).expanduser()
    if is_adapter(where):
        require(base is not None, "An adapter is merged on its base", where, "Pass --base, or write MODEL+ADAPTER.")
        assert base is not None
        return _folded(where, path, base)
    inner = path / "model"
    return _opened(where, inner if inner.is_dir() and not any(path.glob("*.safetensors*")) else path)


def _opened(name: str, path: Path) -> Ingredient:
    weights = LazyWeights(path)
    return Ingredient(name=name, folder=path.parent if path.is_file() else path, weights=weights, files=weights.files)


def _folded(name: str, adapter: Path, base: Ingredient) -> Ingredient:
    # in the base's half precision a small change would be rounded away before it is compared with the others
    weights = fold_adapter(base.weights, read_adapter(adapter), dtype=torch.float32)
    files = (*base.files, *sorted(adapter.glob("*.safetensors")))
    return Ingredient(name=name, folder=base.folder, weights=weights, files=files, whole=False)


class Selected(Mapping[str, Tensor]):
    """Some tensors of a model."""

    def __init__(self, weights: Weights, names: Collection[str]) -> None:
        self.weights, self.names = weights, list(names)
        self._known = set(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            raise KeyError(name)
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def spec(self, name: str) -> Spec:
        """Dtype and shape, without reading the tensor."""
        return spec_of(self.weights, name)

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Entries start..stop-1 of the flattened tensor."""
        return reader(self.weights, name)(start, stop)

    def lend(self, name: str) -> Callable[[int, int], Tensor]:
        """As `LazyWeights.lend`."""
        return borrowed(self.weights, name)


@dataclass(frozen=True, kw_only=True)
class Common:
    """Which tensors are merged, and what becomes of the others.

    Args:
        merged: names that every model has in one shape.
        copied: names that are taken from the base, or the first model, as they are.
        left: names of any model that the result does not have, or has from one model alone.
    """

    merged: tuple[str, ...]
    copied: tuple[str, ...]
    left: tuple[str, ...]


def common_tensors(names: Sequence[str], models: Sequence[Weights], policy: OnMismatch) -> Common:
    """Compare names and shapes; the first model is the one whose other tensors are kept.

    Args:
        names: what to call the models.
        models: the base, if there is one, before the others.
        policy: "error" refuses any difference, "skip" leaves what does not fit as the first model has it, "intersect"
            leaves it out.

    Raises:
        Refused: a difference under "error" (named, with the choices), or nothing in common.
    """
    first = models[0]
    odd: dict[str, str] = {}
    for name, model in zip(names[1:], models[1:], strict=True):
        for tensor in first:
            if tensor not in model:
                odd.setdefault(tensor, f"{tensor!r} not in {name}")
            elif (own := spec_of(model, tensor).shape) != (shape := spec_of(first, tensor).shape):
                odd.setdefault(tensor, f"{tensor!r} {list(shape)} in {names[0]}, {list(own)} in {name}")
        for tensor in model:
            if tensor not in first:
                odd.setdefault(tensor, f"{tensor!r} not in {names[0]}")
    more = f" and {len(odd) - 4} more" if len(odd) > 4 else ""
    require(not odd or policy != "error", "Models to merge must have the same tensors",
            "; ".join(list(odd.values())[:4]) + more, "Choose --on-mismatch skip (keep such tensors as the base, "
            "or the first model, has them) or intersect (leave them out); or --align for vocabularies.")  # fmt: skip
    merged = tuple(tensor for tensor in first if tensor not in odd)
    require(
        bool(merged), "Models to merge must have a tensor in common", "none", "They are of different architectures."
    )
    copied = tuple(tensor for tensor in first if tensor in odd) if policy == "skip" else ()
    return Common(merged=merged, copied=copied, left=tuple(sorted(odd)))
