"""Feature optimal alignment attack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from headstart.core.ascent import Ball, Goal, ascend, check_inputs
from headstart.core.paper import Paper
from headstart.core.validate import one_of, require

from .alignment import Normalise, Seen, foa_loss, see
from .crops import boxes, cropped
from .draws import generators
from .settings import check

PAPER = Paper(
    title="Adversarial Attacks against Closed-Source MLLMs via Feature Optimal Alignment",
    authors="Jia et al.",
    year=2025,
    arxiv="2505.21494",
    code="https://github.com/jiaxiaojunQAQ/FOA-Attack",
    departs="Between the user's own modules only; tokens are normalised over features, weights follow one objective "
    "from step to step and begin anew with each picture, every step stays in [0, 1], crops are not rounded to pixels.",
)
LARGEST_GROWTH = 5.0  # of a similarity, which may pass through zero


def member_weights(now: Tensor, before: Tensor | None, temperature: float = 1.0) -> Tensor:
    """How much each of K members counts, (K, n): more for those that grew, K in all for each picture.

    K · softmax(ρ / temperature) with ρ = now / (before + 1e-8), kept within [0, 5]; 1 for all at the first step.

    >>> member_weights(torch.tensor([[0.2], [0.1]]), torch.tensor([[0.1], [0.1]])).flatten()
    tensor([1.4621, 0.5379])
    """
    if before is None:
        return torch.ones_like(now)
    growth = torch.nan_to_num(now / (before + 1e-8), nan=1.0).clamp(0, LARGEST_GROWTH)
    return len(now) * (growth / temperature).softmax(0)


@dataclass(frozen=True, kw_only=True)
class FOA:
    """Inputs changed by at most `radius` so that encoders take them for other pictures, in the whole and in the parts.

    Args:
        encoders: the user's own modules, x -> (features (n, d), tokens (n, p, d)), differentiable.
        reference: (n, ...) in [0, 1], the pictures whose features are approached; (1, ...) is the same one for all.
        radius: of the ball, in units of x in [0, 1] (paper: 16 / 255).
        steps: >= 0 (paper: 300); 0 returns x.
        step_size: in (0, 1]; by default radius / 16 (paper: 1 / 255).
        norm: "linf" (paper) or "l2".
        clusters: of a picture's tokens, >= 1 (paper's code: 10).
        local: weight of the clusters beside the features, >= 0 (paper's code: 0.2); 0 aligns features only.
        temperature: of the weights of encoders, > 0 (paper: 1); infinity weighs all alike.
        regularisation: of the transport, > 0 (paper's code: 0.1).
        crop: smallest and largest share of the area that is looked at in each step, drawn for x and the reference
            (paper: (0.5, 0.9)); None looks at whole pictures.
        normalise: see `see`.
        seed: of crops and starts of k-means, functions of it, the step and the picture's number alone.
        first: number of x's first picture in its data set, >= 0, so that splitting it into batches changes nothing.

    Shape: x (n, ...) in [0, 1], with crops (n, c, h, w) -> the same shape and dtype.

    Use it when: asking how far features of one's encoders can be led astray together; see `held_out` for others.
    Not when: pictures have few pixels: without crops more carries over there.

    Cost: a step is a forward and backward pass of every encoder, with crops another forward pass, and k-means.

    Notes: `goals` of `perturb`, such as `misclassify(model, y)`, join the encoders as members of their own.

    Raises:
        Refused: an argument out of range; encoders that are no modules; x empty, not finite or outside [0, 1]; a
            reference that does not fit; neither encoders nor goals; features or a gradient with NaN.

    Reference: Jia et al. 2025, and the paper's code.

    >>> class Pixels(nn.Module):
    ...     def forward(self, x): return x.flatten(1), x.flatten(1)[..., None]
    >>> attack = FOA(encoders=(Pixels(),), reference=torch.tensor([[0.0, 1.0]]), radius=0.1, crop=None, clusters=1)
    >>> attack.perturb(torch.tensor([[0.5, 0.5]]))
    tensor([[0.4000, 0.6000]])
    """

    encoders: tuple[nn.Module, ...] = ()
    reference: Tensor | None = None
    radius: float = 16 / 255
    steps: int = 300
    step_size: float | None = None
    norm: Literal["linf", "l2"] = "linf"
    clusters: int = 10
    local: float = 0.2
    temperature: float = 1.0
    regularisation: float = 0.1
    crop: tuple[float, float] | None = (0.5, 0.9)
    normalise: Normalise = "features"
    seed: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        check(self)
        one_of("normalise", self.normalise, ["features", "columns"])
        modules = all(isinstance(encoder, nn.Module) for encoder in self.encoders)
        require(modules, "FOA needs encoders that are modules in this process",
                [type(encoder).__name__ for encoder in self.encoders], "Wrap your own models.")  # fmt: skip
        require(bool(self.encoders) == (self.reference is not None), "FOA needs encoders and a reference, or neither",
                (len(self.encoders), self.reference is not None), "Pass both.")  # fmt: skip
        require(self.clusters >= 1, "FOA needs clusters >= 1", self.clusters, "The paper's code uses 10.")
        require(0 <= self.local < math.inf, "FOA needs a finite local >= 0", self.local, "The paper's code uses 0.2.")
        require(self.temperature > 0 and self.regularisation > 0, "FOA needs temperature > 0 and regularisation > 0",
                (self.temperature, self.regularisation), "The paper uses 1 and 0.1.")  # fmt: skip
        good = self.crop is None or 0 < self.crop[0] <= self.crop[1] <= 1
        require(good, "FOA needs shares 0 < smallest <= largest <= 1 in crop", self.crop, "The paper uses (0.5, 0.9).")

    def perturb(self, x: Tensor, goals: Sequence[Goal] = ()) -> Tensor:
        check_inputs(x)
        require(bool(self.encoders) or bool(goals), "FOA needs encoders or goals", "neither", "Pass encoders.")
        require(self.crop is None or x.ndim == 4, "Crops need pictures (n, c, h, w)", tuple(x.shape), "Pass crop=None.")
        draws, before = generators(self.seed, self.first, len(x)), None
        look = partial(see, clusters=self.clusters if self.local else 0, draws=draws, normalise=self.normalise)
        near = partial(foa_loss, local=self.local, regularisation=self.regularisation)
        reference = self._reference(x)

        @torch.no_grad()
        def aims() -> list[Seen]:
            view = cropped(reference, boxes(draws, self.crop)) if self.crop and self.encoders else reference
            return [look(encoder, view) for encoder in self.encoders]

        fixed = None if self.crop else aims()

        def gradient(a: Tensor) -> Tensor:
            nonlocal before
            towards = fixed or aims()
            with torch.enable_grad():
                point = a.detach().requires_grad_()
                view = cropped(point, boxes(draws, self.crop)) if self.crop else point
                own = [-near(look(e, view), aim) for e, aim in zip(self.encoders, towards, strict=True)]
                now = torch.stack([*own, *(goal(view) for goal in goals)])
                weights = member_weights(now.detach(), before, self.temperature)
                before = now.detach()
                return torch.autograd.grad((weights * now).sum(), point)[0]

        return ascend(x, gradient, ball=Ball(self.radius, self.norm), steps=self.steps,
                      step_size=self.step_size or self.radius / 16)  # fmt: skip

    def _reference(self, x: Tensor) -> Tensor:
        """One picture for each of x."""
        if self.reference is None:
            return x
        check_inputs(self.reference)
        fits = self.reference.shape[1:] == x.shape[1:] and len(self.reference) in (1, len(x))
        require(fits, f"FOA needs a reference of shape {tuple(x.shape)}, or one for all", tuple(self.reference.shape),
                "Resize it, or pass as many as x.")  # fmt: skip
        return self.reference.to(x).expand(x.shape)
