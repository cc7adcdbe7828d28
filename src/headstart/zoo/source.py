"""What the zoo hands out: one pretrained model, how to feed it, and where its features are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

Modality = Literal["image", "text", "numeric"]
Kind = Literal["mini", "timm", "hf", "dir"]


class Preprocess(Protocol):
    """Raw examples to one batch that the source's model takes as its only argument.

    A raw example is a uint8 array (H, W, 3) for images, a str for text, a float32 row (d,) for numeric data.
    The result for one example does not depend on the other examples of the batch.
    """

    def __call__(self, raw: Sequence[Any], /) -> Tensor | dict[str, Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """One pretrained model that a task may start from; nothing is loaded until `load()` is called.

    Args:
        name: what the user types, "mini:cnn-letters", "timm:resnet18", "hf:org/name" or "dir:PATH".
        modality: the kind of raw example it reads.
        load: gives a fresh module with the pretrained weights, in eval mode, whose forward returns logits (n, c);
            raises `Refused` when it cannot.
        preprocess: raw examples to the batch for `model(batch)`.
        head: dotted name of the final `nn.Linear`; the features of a source are the input of that layer.
        classes: what the source's own outputs mean, in order; empty when unknown or self-supervised.
        licence: SPDX identifier, or "unknown".
        fingerprint: sha256 that changes whenever the weights do; part of the key of the evidence cache.
        kind: which part of the zoo it comes from.
        facts: what the card says (parameters, family, data, objective, input size, bytes, ...).
    """

    name: str
    modality: Modality
    load: Callable[[], nn.Module]
    preprocess: Preprocess
    head: str
    classes: tuple[str, ...]
    licence: str
    fingerprint: str
    kind: Kind
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A source that cannot be used here, and the reason; reported to the user, never fatal to a ranking."""

    name: str
    why: str
