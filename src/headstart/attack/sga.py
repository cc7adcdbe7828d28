"""Set-level guidance attack on models of pictures and captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.core.ascent import PASS, Ball, Goal, LabelGoal, ascend, check_inputs, goal_gradient
from headstart.core.encode import Encoder, check_pairs, unit, units
from headstart.core.paper import Paper
from headstart.core.validate import require

from .draws import generators, noise
from .settings import check
from .substitution import Candidates, Substituted, substitute

PAPER = Paper(
    title="Set-level Guidance Attack: Boosting Adversarial Transferability of Vision-Language Pre-training Models",
    authors="Dong Lu and Zhiqiang Wang and Teng Wang and Weili Guan and Hongchang Gao and Feng Zheng",
    year=2023,
    arxiv="2307.14061",
    code="https://github.com/Zoky-2020/SGA",
    departs="Dual encoders only; candidates for words come from a table or a function of the user's, no language model "
    "is brought along; features are always of length 1; each picture's draws follow from the seed and its number.",
)


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """What `SGA.perturb_pairs` gives.

    Attributes:
        x: (n, c, h, w) the pictures moved away from their captions.
        text: the m captions moved away from their moved pictures, and which of them could not be.
        guides: the m captions after the first stage, from which the pictures were moved away.
    """

    x: Tensor
    text: Substituted
    guides: Substituted


@dataclass(frozen=True, kw_only=True)
class SGA:
    """Pictures and captions changed a little so that models which match the two lose the match, other models too.

    Three stages on one surrogate: each caption loses `words` words to move away from its picture; each picture, seen in
    several sizes, moves away from the set of all its changed captions; each original caption moves away from its moved
    picture. `perturb_pairs` runs all three; `perturb` is the second alone, for goals of any kind.

    Args:
        encode_image: pictures (n, c, h, w) in [0, 1] -> features (n, d); resizing and normalisation belong inside. A
            module, a method of one, or a function; modules are run in eval mode, those inside a function as they are.
        encode_text: list of texts -> features (·, d); the tokenizer belongs inside.
        candidates: table word -> words, or a function (caption, number of the word) -> words; see `substitute`.
        radius: of the ball around a picture, in [0, 1] (paper: 2 / 255; 8 / 255 is common since).
        steps: >= 0 (paper: 10); 0 leaves the pictures.
        step_size: in (0, 1]; by default radius / 4 (paper).
        norm: "linf" (paper) or "l2".
        scales: sizes at which a picture is seen besides its own (paper: these); () for its own only.
        noise: standard deviation >= 0 of what is added before resizing, new at each step and size (paper: 0.05).
        words: how many words of a caption may be replaced, >= 0 (paper: 1); 0 leaves the captions.
        unknown: what stands for a hidden word; the unknown or mask token of the tokenizer.
        at_once: pictures that share a pass with all their sizes; by default as many as make 128, at least one.
        seed: of the start, uniform in the ball, and the noise: functions of it and the picture's number alone.
        first: number of x's first picture in its data set, >= 0, so that splitting it into batches changes nothing.

    Shape: x (n, c, h, w) in [0, 1] -> the same shape and dtype.

    Use it when: asking whether retrieval by one's own dual encoder errs where another one can be made to err.
    Not when: the models classify: `DIFGSM` is made for that. Captions of few words are lost by one word, whatever the
        pictures: look at the picture side alone with words=0.

    Cost: `steps` · (1 + sizes) forward and backward passes of the picture encoder; twice the passes of `substitute`.

    Notes: a word's choice is guided by one feature of the picture, as in the published code, not by all its sizes.
        Resizing is bicubic without smoothing first; what overshoots is clamped before the picture is resized back.

    Raises:
        Refused: an argument out of range, pictures too small for a scale; x empty, not finite or outside [0, 1];
            captions and pictures that do not fit; no goals; features or a gradient with NaN.

    Reference: Lu et al. 2023, section 4 and the published code.

    >>> brightness = lambda x: torch.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], 1)
    >>> words = lambda texts: torch.tensor([[float("bright" in t), float("dark" in t)] for t in texts]) + 0.01
    >>> sga = SGA(encode_image=brightness, encode_text=words, candidates={"bright": ["dark"]}, radius=0.1, noise=0.0)
    >>> found = sga.perturb_pairs(torch.full((1, 1, 4, 4), 0.8), ["a bright day"], torch.tensor([0]))
    >>> found.x.unique(), found.text.captions  # the guide was "a dark day" already, and so the picture leaves that
    (tensor([0.9000]), ('a dark day',))
    """

    encode_image: Encoder
    encode_text: Encoder
    candidates: Candidates = field(default_factory=dict)
    radius: float = 2 / 255
    steps: int = 10
    step_size: float | None = None
    norm: Literal["linf", "l2"] = "linf"
    scales: tuple[float, ...] = (0.5, 0.75, 1.25, 1.5)
    noise: float = 0.05
    words: int = 1
    unknown: str = "[UNK]"
    at_once: int | None = None
    seed: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        check(self)
        require(all(0 < s <= 8 for s in self.scales), "SGA needs 0 < scale <= 8", self.scales, "Pass such as 0.5.")
        require(0 <= self.noise < 10, "SGA needs 0 <= noise < 10, in units of x in [0, 1]", self.noise, "Pass 0.05.")
        require(self.words >= 0, "SGA needs words >= 0", self.words, "The paper replaces 1.")
        require(self.at_once is None or self.at_once >= 1, "SGA needs at_once >= 1", self.at_once, "Leave it out.")

    def perturb_pairs(self, x: Tensor, captions: Sequence[str], image_of: Tensor) -> Attacked:
        """Change pictures and all their captions, caption j being one of picture `image_of[j]` (m,)."""
        check_pairs(x, captions, image_of)
        self._check_sizes(x)
        owner = image_of.to(x.device)
        guides = self._substitute(captions, units(self.encode_image, x)[owner])
        features = units(self.encode_text, guides.captions).to(x)
        sets = features.new_zeros(len(x), features.shape[1]).index_add(0, owner, features)
        some = self.at_once or max(1, PASS // (1 + len(self.scales)))
        moved = torch.cat([
            replace(self, first=self.first + k).perturb(part, [mismatch(self.encode_image, sets[k : k + some])])
            for k, part in zip(range(0, len(x), some), torch.split(x, some), strict=True)
        ])  # fmt: skip
        text = self._substitute(captions, units(self.encode_image, moved)[owner])
        return Attacked(x=moved, text=text, guides=guides)

    def _substitute(self, captions: Sequence[str], against: Tensor) -> Substituted:
        encode, table = self.encode_text, self.candidates
        return substitute(captions, against, encode, table, words=self.words, unknown=self.unknown)

    def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
        check_inputs(x)
        self._check_sizes(x)
        ball, draws = Ball(self.radius, self.norm), generators(self.seed, self.first, len(x))
        start = (x + noise(x, ball, draws, copies=1)[0]).clamp(0, 1) if self.steps else None
        step_size = self.step_size or self.radius / 4

        def gradient(a: Tensor) -> Tensor:
            away = x.new_zeros(len(x), len(self.scales), *x.shape[1:], device="cpu")
            for row, generator in zip(away, draws, strict=True):
                row.normal_(std=self.noise, generator=generator)
            away = away.transpose(0, 1).to(x.device)
            return goal_gradient([partial(_over, goal, self.scales, away) for goal in goals], a)

        return ascend(x, gradient, ball=ball, steps=self.steps, step_size=step_size, start=start)

    def _check_sizes(self, x: Tensor) -> None:
        small = not self.scales or (x.ndim == 4 and int(min(self.scales) * min(x.shape[2:])) >= 1)
        require(small, "SGA needs pictures (n, c, h, w) that keep a pixel at each scale", (tuple(x.shape), self.scales),
                "Give each channel an axis, or pass scales=().")  # fmt: skip


def mismatch(encode_image: Encoder, sets: Tensor) -> Goal:
    """The goal of leaving captions behind: minus the inner product of a picture's feature with the sum of theirs.

    Args:
        encode_image: pictures -> features (n, d).
        sets: (n, d) for each picture the sum of its captions' unit features; only its direction counts.
    """
    return LabelGoal(lambda x, rows: -(unit(encode_image, x) * sets[rows]).sum(1), torch.arange(len(sets)))


def _over(goal: Goal, scales: tuple[float, ...], away: Tensor, a: Tensor) -> Tensor:
    """The sum of a goal over a picture and its noisy, resized views, all in one pass where the goal allows it."""
    views = [a]
    for scale, shift in zip(scales, away, strict=True):
        size = [int(scale * side) for side in a.shape[2:]]
        resized = F.interpolate(a + shift, size=size, mode="bicubic", align_corners=False).clamp(0, 1)
        views.append(F.interpolate(resized, size=a.shape[2:], mode="bicubic", align_corners=False))
    if isinstance(goal, LabelGoal):
        return goal.repeated(len(views))(torch.cat(views)).view(len(views), len(a)).sum(0)
    return torch.stack([goal(view) for view in views]).sum(0)
