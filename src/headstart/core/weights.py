"""Several models' weights into one: what a rule is, and the frames that feed it tensor by tensor or part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from .shards import LazyWeights as LazyWeights
from .shards import Spec as Spec
from .shards import Weights as Weights
from .shards import borrowed
from .shards import fingerprint as fingerprint
from .shards import reader as reader
from .shards import spans as spans
from .shards import spec_of as spec_of
from .validate import finite, require
from .write import save_weights as save_weights


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
    """A "model" rule: `survey` reads the models and returns a rule of scope "tensor"."""

    def survey(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> MergeRule | Entrywise: ...


@runtime_checkable
class Entrywise(Protocol):
    """A rule in which each entry depends on the same entry of the models alone, so that tensors come in parts."""

    def combine_part(
        self,
        name: str,
        rows: Iterable[Tensor],
        base: Tensor | None,
        importance: Iterable[Tensor] | None,
        start: int,
    ) -> Tensor | None:
        """Entries `start` and on of one tensor.

        Args:
            name: of the tensor.
            rows: of each model in turn the entries (n,), float32 or wider; read when asked for, once.
            base: the same entries of the base, or None.
            importance: the same entries of each model's importance, or None.
            start: place of the first entry in the flattened tensor.

        Returns:
            (n,), float32 or wider; or None when all other parts must be seen first, and it is asked again.
        """
        ...


def aligned(models: Sequence[Weights], base: Weights | None = None) -> list[str]:
    """The names all models share, in the first one's order; a missing or misshapen tensor is refused by name."""
    require(len(models) >= 1, "A merge needs at least one model", len(models), "Pass state dicts.")
    names = list(models[0])
    for k, other in enumerate([*models[1:], *([base] if base is not None else [])], 1):
        who = f"model {k}" if k < len(models) else "base"
        odd = sorted(set(names) ^ set(other))
        require(not odd, "All models must have the same tensors", f"{odd[:3]} in only one of model 0 and {who}",
                "Drop those names, or merge models of one architecture.")  # fmt: skip
        for name in names:
            shapes = spec_of(models[0], name).shape, spec_of(other, name).shape
            require(shapes[0] == shapes[1], f"Tensor {name!r} must have one shape", f"{shapes[0]} and {shapes[1]}",
                    "Align vocabularies or heads first.")  # fmt: skip
    return names


def by_tensor(
    combine: Callable[[str, Tensor, Tensor | None, Tensor | None], Tensor],
    models: Sequence[Weights],
    base: Weights | None = None,
    importance: Sequence[Weights] | None = None,
) -> dict[str, Tensor]:
    """Combine aligned models name by name: the frame of rules that need a whole tensor at once.

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
        wide = wider(first.dtype)
        stacked = torch.stack([model[name].to(first.device, wide) for model in models])
        finite(f"tensor {name!r}", stacked, "Do not merge a diverged model.")
        origin = None if base is None else base[name].to(first.device, wide)
        weight = None if importance is None else torch.stack([w[name].to(first.device, wide) for w in importance])
        merged[name] = combine(name, stacked, origin, weight).to(first.dtype)
    return merged


def by_entry(
    rule: MergeRule | Entrywise,
    models: Sequence[Weights],
    base: Weights | None = None,
    importance: Sequence[Weights] | None = None,
) -> dict[str, Tensor]:
    """What `merge` of an `Entrywise` rule returns: the parts put together."""
    merged = dict(merge_streaming(rule, models, base=base, importance=importance))
    return {name: merged[name] for name in models[0]}


def wider(dtype: torch.dtype) -> torch.dtype:
    """What weights of this dtype are combined in: float64 stays, the rest is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merged_parts(
    rule: MergeRule | Entrywise,
    models: Sequence[Weights],
    *,
    base: Weights | None = None,
    importance: Sequence[Weights] | None = None,
) -> Iterator[tuple[str, int, Tensor]]:
    """(name, first entry, merged entries) in the dtype of the first model, for `write_parts`.

    Memory: parts of one model, the base and the result at a time, whatever the number and size of the models; a rule
    that is not `Entrywise` holds one tensor of each.
    """
    names = aligned(models, base)
    if isinstance(rule, Surveyed):
        rule = rule.survey(models, base=base, importance=importance)
    later = []
    for name in names:
        spec = spec_of(models[0], name)
        copied = reader(models[0] if base is None else base, name)
        if not spec.dtype.is_floating_point:
            yield from ((name, start, copied(start, stop).clone()) for start, stop in spans(spec.entries))
        elif isinstance(rule, Entrywise):
            merge = _merger(rule, name, models, base, importance)
            for start, stop in spans(spec.entries):
                if (part := merge(start, stop)) is None:
                    later.append((name, start, partial(merge, start, stop)))
                else:
                    yield name, start, part
        else:
            only = [{name: model[name]} for model in models]
            own = None if importance is None else [{name: one[name]} if name in one else {} for one in importance]
            merged = rule.merge(only, base=None if base is None else {name: base[name]}, importance=own)
            yield name, 0, merged[name].reshape(-1)
    for name, start, again in later:
        part = again()
        assert part is not None, "asked again, a rule must answer"
        yield name, start, part


def _merger(
    rule: Entrywise,
    name: str,
    models: Sequence[Weights],
    base: Weights | None,
    importance: Sequence[Weights] | None,
) -> Callable[[int, int], Tensor | None]:
    """(start, stop) -> those entries of one tensor, merged."""
    dtype = spec_of(models[0], name).dtype
    wide, device = wider(dtype), reader(models[0], name)(0, 0).device

    def rows(sources: Sequence[Weights]) -> Callable[[int, int], Iterator[Tensor]]:
        readers = [borrowed(one, name) for one in sources]
        return lambda start, stop: (_part(name, read(start, stop).to(device, wide)) for read in readers)

    of_models, of_base, of_importance = rows(models), rows([] if base is None else [base]), rows(importance or [])

    def merge(start: int, stop: int) -> Tensor | None:
        counts = None if importance is None else of_importance(start, stop)
        merged = rule.combine_part(name, of_models(start, stop), next(of_base(start, stop), None), counts, start)
        return None if merged is None else merged.to(dtype)

    return merge


def _part(name: str, part: Tensor) -> Tensor:
    finite(f"tensor {name!r}", part, "Do not merge a diverged model.")
    return part


def merge_streaming(
    rule: MergeRule | Entrywise,
    models: Sequence[Weights],
    *,
    base: Weights | None = None,
    importance: Sequence[Weights] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The merged tensors one at a time; the same numbers as `rule.merge`. Memory: one tensor beside `merged_parts`."""
    made: dict[str, dict[int, Tensor]] = {}
    for name, start, part in merged_parts(rule, models, base=base, importance=importance):
        parts, spec = made.setdefault(name, {}), spec_of(models[0], name)
        parts[start] = part
        if sum(map(len, parts.values())) == spec.entries:
            ordered = [own for _, own in sorted(made.pop(name).items())]
            yield name, (ordered[0] if len(ordered) == 1 else torch.cat(ordered)).view(spec.shape)
