"""Downstream transfer attack: what a pretrained encoder hands on to the models made from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from headstart.core.ascent import Ball, Goal, ascend, check_inputs, goal_gradient
from headstart.core.modes import evaluating
from headstart.core.paper import Paper
from headstart.core.taps import blocks_of, features_at, layer_of, token_similarity, tokens_of
from headstart.core.validate import one_of, require

from .draws import generators, noise
from .settings import check

PAPER = Paper(
    title="Downstream Transfer Attack: Adversarial Attacks on Downstream Models with Pre-trained Vision Transformers",
    authors="Weijie Zheng and Xingjun Ma and Hanxun Huang and Zuxuan Wu and Yu-Gang Jiang",
    year=2024,
    arxiv="2408.01705",
    departs="Each example chooses its own layers, from short probes judged at the last layer; radius, steps and this "
    "search are this library's, as the abstract does not tell them.",
)


@dataclass(frozen=True, kw_only=True)
class DTA:
    """Inputs changed by at most `radius` so that models fine-tuned from an encoder err; needs no labels, no victim.

    The tokens of a layer are turned away from those of the clean input, by descent on their mean cosine (ATCS). Which
    layer is found by short probes: each candidate layer is judged by the ATCS that its probe causes at the last one.

    Args:
        encoder: the pretrained model, inputs in [0, 1] -> anything; run in eval mode. A classifier will do.
        layers: names of the candidates, shallow to deep; None takes `blocks_of(encoder)`. One layer needs no probe.
        final: layer that probes are judged at; None takes the last of `layers`.
        radius: of the ball, in units of x in [0, 1]; at most 1 in linf (not in the abstract; 10 / 255 is usual).
        steps: >= 0; 0 returns the random start. A probe makes a fifth of them, rounded up.
        step_size: in (0, 1]; by default radius / 5.
        norm: "linf" (paper) or "l2".
        choose: a layer for "each" example, one for the whole "batch" by the mean of its scores, or "all" layers, whose
            mean ATCS is lowered without probes. With "batch", examples depend on each other.
        select: the layer of the "lowest" score, or the "shallowest_within" `within` of it. The last layer wins nearly
            always by score, yet shallower ones often carry over better to models that were fine-tuned far.
        within: >= 0, in ATCS; for "shallowest_within" only.
        patience: >= 1; the probes stop when the score has become worse that many times in a row; None tries all.
        tokens: "all", "cls" (the first) or "patch" (the others).
        seed: of the random start, a function of it and the example's number alone.
        first: number of x's first example in its data set, >= 0, so that splitting it into batches changes nothing.

    Shape: x (n, ...) in [0, 1] -> the same shape and dtype. A layer says (n, p, d), (n, d), or (n, d, h, w), where
    places are tokens. Put normalisation and resizing inside the encoder.

    Use it when: asking what a fine-tuned model inherits from its public base, or training against that.
    Not when: the victim's own gradient may be used: `PGD` on it finds far worse points.

    Cost: 1 + layers / 5 times `steps` forward and backward passes, each up to the deepest layer it needs.

    Notes: the goals are not used, so that several goals or none give the same. At x itself the slope is exactly zero,
    so the start is always random. Unrelated to the "Direction Tuning Attack" of the same name.

    Raises:
        Refused: an argument out of range, a layer that does not exist or is not called; x empty, not finite or outside
            [0, 1]; a gradient with NaN.

    Reference: Zheng et al. 2024, abstract.

    >>> encoder = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh())
    >>> x = torch.full((3, 2), 0.5)
    >>> float((DTA(encoder=encoder, layers=("0", "1"), radius=0.1).perturb(x) - x).abs().max()) <= 0.1 + 1e-7
    True
    """

    encoder: nn.Module = field(repr=False)
    layers: tuple[str, ...] | None = None
    final: str | None = None
    radius: float = 10 / 255
    steps: int = 20
    step_size: float | None = None
    norm: Literal["linf", "l2"] = "linf"
    choose: Literal["each", "batch", "all"] = "each"
    select: Literal["lowest", "shallowest_within"] = "lowest"
    within: float = 0.15
    patience: int | None = 2
    tokens: Literal["all", "cls", "patch"] = "all"
    seed: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        check(self)
        one_of("choose", self.choose, ["each", "batch", "all"])
        one_of("select", self.select, ["lowest", "shallowest_within"])
        one_of("tokens", self.tokens, ["all", "cls", "patch"])
        require(0 <= self.within < math.inf, "DTA needs a finite within >= 0", self.within, "The default is 0.15.")
        require(self.patience is None or self.patience >= 1, "DTA needs patience >= 1", self.patience, "2 is usual.")
        names = self.candidates
        require(0 < len(names) == len(set(names)), "DTA needs different layers", names, "Name each one once.")
        for name in (*names, self.judge):
            layer_of(self.encoder, name)

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names of the layers to choose from."""
        return blocks_of(self.encoder) if self.layers is None else self.layers

    @property
    def judge(self) -> str:
        """Name of the layer that probes are judged at."""
        return self.candidates[-1] if self.final is None else self.final

    def perturb(self, x: Tensor, goals: Sequence[Goal] = ()) -> Tensor:
        """The inputs moved so that the encoder's tokens turn away; `goals` is there for the protocol's sake."""
        clean, start = self._begun(x)
        k, names = len(x), self.candidates
        if self.choose == "all":
            share = x.new_full((k, len(names)), 1 / len(names))
        else:
            scores = x.new_zeros(k, 1) if len(names) == 1 else self._scores(x, clean, start)
            share = torch.eye(len(names), dtype=x.dtype, device=x.device)[self.chosen(scores)]
        return self._descended(x, clean, start, share, self.steps)

    def probe(self, x: Tensor) -> Tensor:
        """ATCS at the final layer after a probe of each candidate (n, layers); infinite where the probes had stopped.

        With choose="batch" all examples have the mean score.
        """
        return self._scores(x, *self._begun(x))

    def chosen(self, scores: Tensor) -> Tensor:
        """The number of the chosen layer (n,), by the scores of `probe`."""
        reach = scores.amin(1, keepdim=True) + (self.within if self.select == "shallowest_within" else 0)
        return (scores <= reach).int().argmax(1)  # the first that is near enough

    def similarity(self, a: Tensor, x: Tensor) -> Tensor:
        """ATCS of a with x at each candidate layer (n, layers), 1 where nothing has turned."""
        with torch.no_grad():
            return self._similarity(a, self._tokens(x, self.candidates))

    def _begun(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The clean tokens of all layers, and the random start."""
        check_inputs(x)
        names = tuple(dict.fromkeys((*self.candidates, self.judge)))
        with torch.enable_grad():  # as in each step: without a graph, torch's fused attention rounds in another way
            clean = {name: found.detach() for name, found in self._tokens(x.detach().requires_grad_(), names).items()}
        ball, draws = Ball(self.radius, self.norm), generators(self.seed, self.first, len(x))
        return clean, x + noise(x, ball, draws, copies=1)[0]

    def _tokens(self, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        with evaluating(self.encoder):
            found = features_at(self.encoder, names, x)
        return {name: tokens_of(value, self.tokens) for name, value in found.items()}

    def _similarity(self, a: Tensor, clean: dict[str, Tensor]) -> Tensor:
        found = self._tokens(a, list(clean))
        return torch.stack([token_similarity(found[name], clean[name]) for name in clean], 1)

    def _descended(self, x: Tensor, clean: dict[str, Tensor], start: Tensor, share: Tensor, steps: int) -> Tensor:
        """Steps down the ATCS of the layers, weighted by `share` (n, layers)."""
        used = [k for k in range(share.shape[1]) if bool(share[:, k].any())]
        wanted = {self.candidates[k]: clean[self.candidates[k]] for k in used}

        def away(a: Tensor) -> Tensor:
            return -(self._similarity(a, wanted) * share[:, used]).sum(1)

        return ascend(x, lambda a: goal_gradient([away], a), ball=Ball(self.radius, self.norm), steps=steps,
                      step_size=self.step_size or self.radius / 5, start=start)  # fmt: skip

    def _scores(self, x: Tensor, clean: dict[str, Tensor], start: Tensor) -> Tensor:
        final, steps, patience = {self.judge: clean[self.judge]}, -(-self.steps // 5), self.patience or math.inf
        last, rises = x.new_full((len(x),), torch.inf), torch.zeros(len(x), device=x.device)
        columns = []
        for share in torch.eye(len(self.candidates), dtype=x.dtype, device=x.device):
            if bool((rises >= patience).all()):
                columns.append(torch.full_like(last, torch.inf))
                continue
            moved = self._descended(x, clean, start, share.expand(len(x), -1), steps)
            with torch.no_grad():
                score = self._similarity(moved, final)[:, 0]
            score = score.mean().expand(len(x)) if self.choose == "batch" else score
            columns.append(torch.where(rises < patience, score, torch.inf))
            rises = torch.where((score > last) | (rises >= patience), rises + 1, 0)
            last = score
        return torch.stack(columns, 1)
