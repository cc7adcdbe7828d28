"""How alike encoders find two pictures: in the whole, and in the clusters of their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from headstart.core.ascent import check_inputs, logits
from headstart.core.validate import finite, require

from .clusters import cluster_means, ot_similarity
from .draws import generators

Normalise: TypeAlias = Literal["features", "columns"]


@dataclass(frozen=True)
class Seen:
    """What an encoder says of n pictures: `whole` (n, d), and `parts` (n, k, d), the means of clusters of tokens."""

    whole: Tensor
    parts: Tensor | None = None


def see(
    encoder: nn.Module, x: Tensor, clusters: int, draws: Sequence[Generator], normalise: Normalise = "features"
) -> Seen:
    """The features of pictures, and their tokens in clusters; with gradients.

    Args:
        encoder: x -> (features (n, d), tokens (n, p, d)); run in eval mode, modes given back.
        x: (n, ...).
        clusters: 1 to p; 0 leaves the tokens out.
        draws: of the starts of k-means, one for each picture.
        normalise: what is scaled to length 1 before: each token's "features", or each feature over a picture's tokens
            ("columns", as in the paper's code).
    """
    require(isinstance(encoder, nn.Module), "An encoder must be a module in this process", type(encoder).__name__,
            "Wrap your own model in torch.nn.Module.")  # fmt: skip
    found: Any = logits(encoder, x)
    good = isinstance(found, tuple) and len(found) == 2 and all(
        isinstance(f, Tensor) and f.is_floating_point() and f.ndim == k and len(f) == len(x)
        for k, f in enumerate(found, 2)
    )  # fmt: skip
    require(good, f"An encoder must give features ({len(x)}, d) and tokens ({len(x)}, p, d)",
            [tuple(f.shape) for f in found if isinstance(f, Tensor)] if isinstance(found, tuple) else type(found),
            "Wrap it.")  # fmt: skip
    whole, tokens = found
    finite("features", whole, "Check the encoder for NaN.")
    if clusters == 0:
        return Seen(whole)
    tokens = F.normalize(tokens, dim=2 if normalise == "features" else 1)
    return Seen(whole, cluster_means(tokens, clusters, draws))


def similar(a: Seen, b: Seen, *, regularisation: float = 0.1) -> Tensor:
    """`ot_similarity` of the parts, (n,); 0 where there are none."""
    if a.parts is None or b.parts is None:
        return torch.zeros_like(a.whole[:, 0])
    return ot_similarity(a.parts, b.parts, regularisation=regularisation)


def foa_loss(a: Seen, b: Seen, *, local: float = 0.2, regularisation: float = 0.1) -> Tensor:
    """How far features and clusters of tokens are from those of other pictures: minus a similarity, (n,); minimise it.

    - cosine of `whole` - local · `ot_similarity` of `parts`, which pictures without parts leave out.

    >>> same = Seen(torch.ones(1, 3), torch.eye(3)[None])
    >>> foa_loss(same, same)
    tensor([-1.2000])
    """
    return -F.cosine_similarity(a.whole, b.whole) - local * similar(a, b, regularisation=regularisation)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What an encoder that was not attacked finds: similarity to the reference before, after, and with noise instead.

    Attributes:
        whole: "before", "after", "noise" -> (n,) cosines of the features.
        parts: the same -> (n,) `ot_similarity` of the clusters.
    """

    whole: Mapping[str, Tensor]
    parts: Mapping[str, Tensor]


@torch.no_grad()
def held_out(
    encoders: Mapping[str, nn.Module], reference: Tensor, x: Tensor, moved: Tensor, *, clusters: int = 10, seed: int = 0
) -> dict[str, HeldOut]:
    """How much nearer to the reference moved pictures are for other encoders, beside random signs of the same size.

    Args:
        encoders: name -> one's own module, x -> (features (n, d), tokens (n, p, d)).
        reference: (n, ...) in [0, 1].
        x: (n, ...) the pictures before.
        moved: (n, ...) the pictures after.
        clusters: of a picture's tokens, >= 1.
        seed: of the noise and the starts of k-means.

    Raises:
        Refused: shapes that do not fit, encoders that are no modules or give something else.
    """
    for pictures in (x, moved, reference):
        check_inputs(pictures)
        require(pictures.shape == x.shape, f"Pictures before, after and in reference must be {tuple(x.shape)}",
                tuple(pictures.shape), "Repeat a reference that serves all.")  # fmt: skip
    signs = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(seed)).to(x) * 2 - 1
    size = (moved - x).abs().flatten(1).amax(1).view(-1, *[1] * (x.ndim - 1))
    views = {"before": x, "after": moved, "noise": (x + size * signs).clamp(0, 1)}
    found = {}
    for name, encoder in encoders.items():
        draws = generators(seed, 0, len(x))
        aim = see(encoder, reference, clusters, draws)
        seen = {view: see(encoder, pictures, clusters, draws) for view, pictures in views.items()}
        found[name] = HeldOut(
            whole={view: F.cosine_similarity(s.whole, aim.whole) for view, s in seen.items()},
            parts={view: similar(s, aim) for view, s in seen.items()},
        )
    return found
