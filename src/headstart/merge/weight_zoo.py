"""Weights of one layout with the data each was trained for, as vectors and sets of examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headstart.core.evidence import Evidence
from headstart.core.validate import finite, require
from headstart.core.weights import Weights, wider


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which tensors a vector of weights consists of, in order; there and back changes no bit.

    Args:
        shapes: of the floating tensors, by name, in order.
        dtypes: of the same.
        kept: integer tensors, which are not part of the vector and are given back as they are.
        chunk: the vector is cut into pieces of this length, the last one padded with zeros; None is one piece.

    >>> weights = {"w": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3.0])}
    >>> layout = Layout.of(weights, chunk=2)
    >>> layout.flatten(weights)
    tensor([[1., 2.],
            [3., 0.]])
    >>> layout.unflatten(layout.flatten(weights))
    {'w': tensor([[1., 2.]]), 'b': tensor([3.])}
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    kept: Mapping[str, Tensor] = field(repr=False)
    chunk: int | None = None

    @classmethod
    def of(cls, weights: Weights, chunk: int | None = None) -> Layout:
        """The layout of these weights."""
        floating = {name: weights[name] for name in weights if weights[name].is_floating_point()}
        require(sum(t.numel() for t in floating.values()) > 0, "A layout needs a floating tensor with entries",
                list(weights)[:3], "Pass a state dict.")  # fmt: skip
        require(chunk is None or chunk >= 1, "A layout needs chunk >= 1", chunk, "Leave it out for one piece.")
        return cls(
            shapes={name: tuple(t.shape) for name, t in floating.items()},
            dtypes={name: t.dtype for name, t in floating.items()},
            kept={name: weights[name].clone() for name in weights if name not in floating},
            chunk=chunk,
        )

    @property
    def entries(self) -> int:
        """Numbers in all floating tensors together."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def flatten(self, weights: Weights) -> Tensor:
        """(pieces, length) in float32, or float64 if any tensor is.

        Raises:
            Refused: other names, shapes or dtypes than the layout's, NaN or infinity.
        """
        odd = sorted(set(weights) ^ {*self.shapes, *self.kept})
        require(not odd, "Weights must have the layout's tensors", f"{odd[:3]} in only one", "Use one architecture.")
        for name, shape in self.shapes.items():
            found = tuple(weights[name].shape), weights[name].dtype
            require(found == (shape, self.dtypes[name]), f"Tensor {name!r} must be {shape} {self.dtypes[name]}",
                    found, "Use weights of one architecture and dtype.")  # fmt: skip
            finite(f"tensor {name!r}", weights[name], "Leave diverged models out.")
        wide = torch.float64 if torch.float64 in map(wider, self.dtypes.values()) else torch.float32
        vector = torch.cat([weights[name].detach().reshape(-1).cpu().to(wide) for name in self.shapes])
        length = self.chunk or len(vector)
        return torch.nn.functional.pad(vector, (0, -len(vector) % length)).view(-1, length)

    def unflatten(self, pieces: Tensor) -> dict[str, Tensor]:
        """The state dict of (pieces, length); padding is cut off."""
        length = self.chunk or self.entries
        wanted = -(-self.entries // length), length
        require(tuple(pieces.shape) == wanted, f"A vector of this layout is {wanted}", tuple(pieces.shape),
                "Use the layout it was flattened with.")  # fmt: skip
        flat = pieces.reshape(-1)[: self.entries]
        parts = torch.split(flat, [torch.Size(shape).numel() for shape in self.shapes.values()])
        made = {name: part.view(shape).to(self.dtypes[name], copy=True)
                for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}  # fmt: skip
        return made | {name: tensor.clone() for name, tensor in self.kept.items()}


class WeightZoo:
    """Trained weights of one layout, each with examples of what it was trained for.

    Args:
        extractor: name of the model that made the features; whoever generates must name the same.
        keep: examples of each class that are kept, at random, to draw conditions from; the paper has 20.
        chunk: see `Layout`.
        head: a tensor whose first axis is the classes, checked against the labels; None checks nothing.

    Raises:
        Refused: another layout, number of classes or width of features than the first entry's, a class without
            examples, NaN.

    >>> zoo = WeightZoo()
    >>> zoo.add({"w": torch.ones(2, 3)}, features=torch.eye(4), labels=torch.tensor([0, 1, 0, 1]))
    >>> zoo.vectors().shape, zoo.entries[0].shape
    (torch.Size([1, 1, 6]), torch.Size([2, 2, 4]))
    """

    def __init__(
        self, *, extractor: str = "", keep: int = 20, chunk: int | None = None, head: str | None = None
    ) -> None:
        require(keep >= 1, "WeightZoo needs keep >= 1", keep, "The paper keeps 20.")
        self.extractor, self.keep, self.chunk, self.head = extractor, keep, chunk, head
        self.layout: Layout | None = None
        self.entries: list[Tensor] = []  # (classes, kept, d) each
        self.weights: list[Tensor] = []  # (pieces, length) each

    def add(self, weights: Weights, features: Tensor, labels: Tensor) -> None:
        """One model, with features (n, d) and labels (n,) 0..c-1 of examples it was trained for."""
        examples = by_class(features, labels, keep=self.keep, seed=len(self.entries))
        if self.entries:
            like = self.entries[0].shape
            require(examples.shape[::2] == like[::2], f"Every entry needs {like[0]} classes and {like[2]} features",
                    tuple(examples.shape[::2]), "Make one zoo for each kind.")  # fmt: skip
        if self.head is not None:
            rows = weights[self.head].shape[0]
            require(rows == len(examples), f"{self.head!r} needs a row for each of {len(examples)} classes", rows,
                    "Pass the data of this head.")  # fmt: skip
        layout = self.layout or Layout.of(weights, self.chunk)
        self.weights.append(layout.flatten(weights))
        self.layout = layout
        self.entries.append(examples)

    def vectors(self) -> Tensor:
        """(entries, pieces, length)."""
        return torch.stack(self.weights)

    def sets(self, least: int) -> Tensor:
        """Examples (entries, classes, most, d), NaN where a class has fewer than the largest has, but >= `least`."""
        most = max(entry.shape[1] for entry in self.entries)
        padded = [torch.nn.functional.pad(e, (0, 0, 0, most - e.shape[1]), value=torch.nan) for e in self.entries]
        sets = torch.stack(padded)
        fewest = int(sets[..., 0].isfinite().sum(2).min())
        require(fewest >= least, f"Every class needs {least} examples", fewest, "Lower shots, or add examples.")
        return sets


def by_class(features: Tensor, labels: Tensor, *, keep: int | None = None, seed: int = 0) -> Tensor:
    """Examples class by class (classes, most, d) in float32, NaN where a class has fewer; at most `keep`, at random."""
    features, (labels,) = features.detach().cpu().float(), Evidence(features=features, labels=labels).need("labels")
    labels = labels.cpu()
    counts = torch.bincount(labels.clamp(0, len(labels)))
    classes = len(counts)
    require(0 <= int(labels.min()) <= int(labels.max()) < len(labels) and int(counts.min()) > 0,
            "Labels must be 0..c-1, each class with an example", sorted(set(labels.tolist()))[:5],
            "Renumber the classes.")  # fmt: skip
    most = int(counts.max()) if keep is None else min(keep, int(counts.max()))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    sets = features.new_full((classes, most, features.shape[1]), torch.nan)
    for k in range(classes):
        rows = order[labels[order] == k][:most]
        sets[k, : len(rows)] = features[rows]
    return sets


def guarded(std: Tensor) -> Tensor:
    """A spread to divide by: 1 where there is none."""
    return torch.where(std > 1e-12, std, 1.0)
