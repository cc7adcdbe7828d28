"""Perturbations from vision transformers and their augmented copies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from headstart.core.ascent import Ball, Goal, LabelGoal, ascend, check_inputs, goal_gradient, own
from headstart.core.paper import Paper
from headstart.core.validate import require

from .vit_copies import Copy, augmented, blocks_of

PAPER = Paper(
    title="ViT-EnsembleAttack: Augmenting Ensemble Models for Stronger Adversarial Transferability in Vision "
    "Transformers",
    authors="Cao and Lu and Wang and He",
    year=2025,
    arxiv="2508.12384",
    departs="Written from the abstract: ranges, the direction of the weights, kappa and the search are definitions of "
    "this library. Weights are each example's own.",
)
COPIES = (Copy(by="heads", value=0.25), Copy(by="scores", value=0.75), Copy(by="features", value=0.75))


@dataclass(frozen=True, kw_only=True)
class ViTEnsemble:
    """Inputs changed by at most `radius` so that other models err, from vision transformers and copies of them.

    The copies are the surrogates with heads dropped, attention scores scaled or features mixed. At each step a member
    that is not yet fooled weighs more, w = softmax(-goal / temperature) for each example, and steps are kappa times
    longer than those of `MIFGSM`.

    Args:
        radius: of the ball, in units of x in [0, 1]; at most 1 in linf (paper: 16 / 255).
        steps: >= 0 (paper: 10); 0 returns x.
        kappa: length of a step in units of radius / steps, > 0; 1 is that of `MIFGSM`.
        decay: μ >= 0 (paper: 1).
        norm: "linf" or "l2".
        temperature: not 0; infinity gives all members equal weights, and below 0 those that are fooled weigh more,
            which is there to see that it is worse.
        copies: those of all surrogates, ((...),), or of each, in the order of the goals; see `find_copies`. `((),)` is
            the surrogates alone.
        seed: of the masks and shuffles.

    Shape: x (n, ...) in [0, 1] -> the same shape and dtype; goals are those of `misclassify` or `reach`.

    Use it when: surrogates are vision transformers, and the time for four passes in place of one is there.
    Not when: surrogates have no attention, or there are many of them already.

    Cost: `steps` forward and backward passes of every surrogate and every copy, one at a time; copies share weights.

    Notes: masks and shuffles are the same for all examples and new at each step, so that an example does not depend on
    its batch, unless a copy has mix="batch". Compare with `MIFGSM(step_size=kappa * radius / steps)`: longer steps by
    themselves are half of the gain, and with them `fused` logits of the originals alone do about as well (the claim).

    Raises:
        Refused: an argument out of range; x empty, not finite or outside [0, 1]; no goals, or plain functions; copies
            of a model without attention; a gradient with NaN.

    Reference: Cao et al. 2025, as far as its abstract says.

    >>> from headstart.core.ascent import misclassify
    >>> model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(32, 3))
    >>> x, y = torch.full((2, 4, 8), 0.5), torch.tensor([0, 1])
    >>> float((ViTEnsemble(radius=0.1).perturb(x, [misclassify(model, y)]) - x).abs().max())
    0.1000...
    """

    radius: float = 16 / 255
    steps: int = 10
    kappa: float = 2.0
    decay: float = 1.0
    norm: Literal["linf", "l2"] = "linf"
    temperature: float = 1.0
    copies: tuple[tuple[Copy, ...], ...] = (COPIES,)
    seed: int = 0

    def __post_init__(self) -> None:
        Ball(self.radius, self.norm)
        require(self.steps >= 0, "ViTEnsemble needs steps >= 0", self.steps, "The paper uses 10.")
        require(0 < self.kappa < math.inf, "ViTEnsemble needs a finite kappa > 0", self.kappa, "The default is 2.")
        require(0 <= self.decay < math.inf, "ViTEnsemble needs a finite decay >= 0", self.decay, "The paper uses 1.")
        require(self.temperature != 0 and not math.isnan(self.temperature), "ViTEnsemble needs a temperature that is "
                "not 0", self.temperature, "The default is 1; math.inf gives equal weights.")  # fmt: skip

    def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
        check_inputs(x)
        members = self.members(own(goals, "ViTEnsemble"))
        draws = Generator().manual_seed(self.seed)

        def gradient(a: Tensor) -> Tensor:
            values: list[Tensor] = []
            slopes = [goal_gradient([_noted(goal, copy, draws, values)], a) for goal, copy in members]
            weights = shares(torch.stack(values), self.temperature).to(a.dtype)
            return torch.einsum("mn,mn...->n...", weights, torch.stack(slopes))

        return ascend(
            x,
            gradient,
            ball=Ball(self.radius, self.norm),
            steps=self.steps,
            step_size=self.kappa * self.radius / max(self.steps, 1),
            decay=self.decay,
        )

    def members(self, goals: Sequence[LabelGoal]) -> list[tuple[LabelGoal, Copy | None]]:
        """The surrogates, then the copies of each."""
        fits = len(self.copies) in (1, len(goals))
        require(fits, f"ViTEnsemble needs the copies of all surrogates or of each of {len(goals)}", len(self.copies),
                "Pass copies=(find_copies(...), ...), one for each goal.")  # fmt: skip
        each = self.copies * len(goals) if len(self.copies) == 1 else self.copies
        for goal, copies in zip(goals, each, strict=True):
            if copies and goal.model is not None:
                blocks_of(goal.model)  # refuses a model without attention
        found = [(goal, copy) for goal, copies in zip(goals, each, strict=True) for copy in copies]
        return [*((goal, None) for goal in goals), *found]


def _noted(goal: LabelGoal, copy: Copy | None, draws: Generator, values: list[Tensor]) -> Goal:
    """The goal of a copy; its values are appended to `values`."""

    def noted(x: Tensor) -> Tensor:
        assert isinstance(goal.model, nn.Module)
        if copy is None:
            found = goal(x)
        else:
            with augmented(goal.model, copy, draws):
                found = goal(x)
        values.append(found.detach())
        return found

    return noted


def shares(values: Tensor, temperature: float) -> Tensor:
    """Weights of members (m, n) in float64, of each example adding up to one: the lower its goal, the more it weighs.

    >>> shares(torch.tensor([[0.0], [1.0]]), temperature=math.inf)
    tensor([[0.5000],
            [0.5000]], dtype=torch.float64)
    """
    values = values.double()
    most = values.amin(0) if temperature > 0 else values.amax(0)
    return ((most - values) / temperature).softmax(0)
