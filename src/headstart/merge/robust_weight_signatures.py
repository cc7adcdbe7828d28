"""Patch a clean model with the weights' signature of robustness to a corruption, and take the patch off again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from headstart.core.paper import Paper
from headstart.core.validate import finite, one_of, require, suggestion
from headstart.core.weights import Weights

PAPER = Paper(
    title="Robust Weight Signatures: Gaining Robustness as Easy as Patching Weights?",
    authors="Ruisi Cai and Zhenyu Zhang and Zhangyang Wang",
    year=2023,
    arxiv="2302.12480",
    code="https://github.com/VITA-Group/Robust_Weight_Signatures",
    departs="A signature counts once by its scale, where the official code for several corruptions multiplies by it "
    "twice: its alpha for n of them is our scale (alpha / n)².",
)

Signature: TypeAlias = Mapping[str, Tensor]
"""What robustness to one corruption adds to each tensor of the patched layers."""
FAR = 0.5


def extract_signature(
    pretrained: Weights, clean: Weights, robust: Weights, layers: Iterable[str], *, project: bool = True
) -> dict[str, Tensor]:
    """What training on a corruption changed that training on clean data did not, to add to any clean sister model.

    With d the change of the clean and r that of the robust model from their common start, each tensor on its own:
    V = r - d (d . r) / (d . d).

    Args:
        pretrained: the start of both models.
        clean: fine-tuned on clean data.
        robust: fine-tuned by the same recipe with every input corrupted.
        layers: dotted names of layers or blocks; the shallow ones, from `first_layers`. Never the head.
        project: False leaves out the projection; V is then robust - clean.

    Shape: every floating tensor of a layer and of what lies inside it, in float32 or wider; integers are left out.

    Use it when: a deployed model must withstand a known corruption, and only sister models can be trained for it.
    Not when: the corruption is unknown, or the models moved far from their start: adding then destroys (a warning
        says so when a matrix moved by more than half of its norm).

    Cost: one pass over the tensors of these layers in three models.

    Notes: where d is 0, V = r. A layer with BatchNorm needs `restored_batchnorm` after patching.

    Raises:
        Refused: an unknown layer, a missing or misshapen tensor, NaN.

    Reference: Cai et al. 2023, section 3.

    >>> start, clean, robust = ({"c.weight": torch.tensor(w)} for w in ([0.0, 0.0], [1.0, 1.0], [2.0, 0.0]))
    >>> extract_signature(start, clean, robust, ["c"])
    {'c.weight': tensor([ 1., -1.])}
    """
    signature, far = {}, {}
    for name in _inside(layers, robust):
        alike(name, robust[name], {"pretrained": pretrained, "clean": clean})
        start = pretrained[name].double()
        d, r = (weights[name].to(start.device).double() - start for weights in (clean, robust))
        finite(f"tensor {name!r}", torch.stack([d, r]), "Do not take a signature from a diverged model.")
        length = (d * d).sum()
        if not project:
            r = r - d
        elif length > 0:
            r = r - d * ((d * r).sum() / length)
        signature[name] = r.to(torch.promote_types(robust[name].dtype, torch.float32))
        moved = max(float((weights[name].to(start.device).double() - start).norm()) for weights in (clean, robust))
        if start.ndim >= 2 and moved > FAR * float(start.norm()):
            far[name] = round(moved / float(start.norm().clamp(min=1e-30)), 2)
    if far:
        warnings.warn(f"Tensors moved far from the start, relative to their norm: {far}. Patching may destroy a model; "
                      "fine-tune at a lower rate.", stacklevel=2)  # fmt: skip
    return signature


@dataclass(frozen=True)
class Patched:
    """A patched model and what its patched tensors were before.

    Attributes:
        weights: of the patched model; tensors that no signature touches are the given model's own, not copies.
        originals: the given model's tensors in the patched places.
    """

    weights: dict[str, Tensor]
    originals: dict[str, Tensor]

    def unpatch(self) -> dict[str, Tensor]:
        """The model as it was, bit for bit: nothing is subtracted."""
        return self.weights | self.originals


def patch(model: Weights, signatures: Mapping[str, Signature], scale: float | Mapping[str, float] = 1.0) -> Patched:
    """A clean model made robust: its weights plus the scaled signatures, summed in float64 and rounded once.

    Args:
        model: the clean model, or another one of its architecture from the same start; its number of classes is free.
        signatures: corruption -> what `extract_signature` gave.
        scale: how strong; a number is divided evenly among the signatures (the paper's alpha, 1), a mapping gives each
            named one its own, and leaves out the others. Less trades robustness for clean accuracy.

    Cost: one addition to the patched layers.

    Raises:
        Refused: no signature, a corruption without signature, a scale that is not finite, a tensor that does not fit.

    Reference: Cai et al. 2023, section 3.

    >>> patched = patch({"c.weight": torch.tensor([1.0])}, {"fog": {"c.weight": torch.tensor([0.5])}}, scale=0.5)
    >>> patched.weights, patched.unpatch()
    ({'c.weight': tensor([1.2500])}, {'c.weight': tensor([1.])})
    """
    require(bool(signatures), "patch needs a signature", "none", "Pass {corruption: signature}.")
    scales = scale if isinstance(scale, Mapping) else dict.fromkeys(signatures, scale / len(signatures))
    sums: dict[str, Tensor] = {}
    for corruption, share in scales.items():
        one_of("A corruption to patch for", corruption, signatures)
        require(math.isfinite(share), "patch needs finite scales", {corruption: share}, "Pass a number such as 1.0.")
        for name, change in signatures[corruption].items():
            alike(name, change, {"the model": model})
            finite(f"The signature of {corruption!r} at {name!r}", change, "Extract it anew.")
            old = model[name]
            sums[name] = sums.get(name, old.double()) + share * change.to(old.device).double()
    originals = {name: model[name] for name in sums}
    for name, total in sums.items():
        finite(f"tensor {name!r}", total, "Do not patch a diverged model.")
    return Patched(
        {name: sums[name].to(model[name].dtype) if name in sums else model[name] for name in model}, originals
    )


def _inside(layers: Iterable[str], weights: Weights) -> list[str]:
    """Floating tensors of the named layers and what is inside them, each once."""
    found: dict[str, None] = {}
    for layer in layers:
        names = [name for name in weights if name == layer or name.startswith(f"{layer}.")]
        known = {name.rpartition(".")[0] for name in weights}
        require(bool(names), "A layer must have tensors in the model", repr(layer), suggestion(layer, known))
        found |= dict.fromkeys(name for name in names if weights[name].is_floating_point())
    require(bool(found), "A signature needs a layer with weights", "none", "Name layers, as first_layers does.")
    return list(found)


def alike(name: str, tensor: Tensor, others: Mapping[str, Weights]) -> None:
    """Refuse weights (named in the message) that lack a tensor or have another shape of it."""
    for who, weights in others.items():
        shape = tuple(weights[name].shape) if name in weights else "no such tensor"
        require(shape == tuple(tensor.shape), f"Tensor {name!r} must be {tuple(tensor.shape)} in {who}", shape,
                "Use models of one architecture, and leave out the head.")  # fmt: skip
