"""Choose among adapted models, settings and epochs with no label of the target."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headstart.core.evidence import Evidence, extract
from headstart.core.paper import Paper
from headstart.core.stream import Resumable
from headstart.core.surgery import head_of
from headstart.core.taps import layer_of
from headstart.core.validate import finite, require

PAPER = Paper(
    title="Can We Evaluate Domain Adaptation Models Without Target-Domain Labels?",
    authors="Jianfei Yang and Hanjie Qian and Yuecong Xu and Kai Wang and Lihua Xie",
    year=2024,
    arxiv="2305.18712",
    code="https://github.com/sleepyseal/TransferScore",
    departs="Distances to the power 1 and to all features, as in the code, where the paper prints the power d and a "
    "sample; the mean of ten draws for one; mutual information of the whole set, without epsilons, for batches of 32.",
)


@dataclass(frozen=True, kw_only=True)
class TransferScored:
    """The Transfer Score of one model, hopkins + information - uniformity, and its parts; at most 2."""

    uniformity: float
    hopkins: float
    information: float

    @property
    def score(self) -> float:
        """Larger is better."""
        return self.hopkins + self.information - self.uniformity


@dataclass(frozen=True, kw_only=True)
class TransferScore:
    """How well a classifier adapted to a target without labels does there, seen from its outputs; larger is better.

    The sum of how clustered the target's features are and how much its predictions say, less how far the head's
    class weights are from spreading evenly. Compare methods, settings or epochs by it, on the same target examples.

    Args:
        draws: of the Hopkins statistic, averaged, >= 1; the paper's code has 1.
        share: of the examples probed in a draw, in (0, 1), but at least ten of them; the paper's code has 0.05.
        by_dimension: raise distances to the power d, as printed; at d >= 16 that is 0 or 1 whatever the features.
        batch: mean mutual information of consecutive batches of this size, or None for that of the whole set; the
            paper's code has 32, which is biased low unless the classes are far fewer.
        seed: of the draws.

    Shape: features (n, d), logits (n, K), head_weight (K, d), n >= 2, K >= 2; about 1.7 to 1.9 for a good model.

    Use it when: no label of the target is at hand; differences below 0.003 are noise.
    Not when: comparing a method trained on entropy, mutual information or uniformity (MCC, SHOT, information
    maximisation, or this score itself) with others, because it is inflated there; or target classes are far from
    equally frequent, because a truthful skewed prediction loses information. It is not corrected for either.

    Cost: O(draws share n² d) time, O(n d + n K + K²) memory; one forward pass more from a model.

    Notes: the Hopkins statistic compares at equal d, equal n and like scaling of features only: one Gaussian blob has
    0.78 at d = 2 and 0.61 at 256 for n = 1,000, and 0.89 and 0.64 for 4,000. Constant features are dropped first.
    Distances below 1e-8 of the range may be of another neighbour as near. Cosines are cut at -1 and 1, without a
    margin. More classes than d + 1 cannot spread as the uniformity asks; it is returned with a warning.

    Raises:
        Refused: one class, one example, no logits, probabilities for logits, a head of another shape or with zero
            rows, NaN.

    Reference: Yang et al. 2024, section 3 and appendix; the Hopkins statistic as in the code.

    >>> head = torch.eye(3) - 1 / 3  # class weights spread evenly
    >>> answers = head.repeat(20, 1)
    >>> round(TransferScore().of(Evidence(features=answers, logits=99 * answers), head).score, 6)
    2.0
    """

    draws: int = 10
    share: float = 0.05
    by_dimension: bool = False
    batch: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.draws >= 1, "TransferScore needs draws >= 1", self.draws, "Pass a number such as 10.")
        require(0 < self.share < 1, "TransferScore needs 0 < share < 1", self.share, "The paper's code has 0.05.")
        require(self.batch is None or self.batch >= 2, "TransferScore needs batch >= 2", self.batch, "Pass None.")

    def of(self, evidence: Evidence, head_weight: Tensor) -> TransferScored:
        """From features that enter the head, logits that leave it, and its weights."""
        features, logits = evidence.need("features", "logits")
        shape = (logits.shape[-1], features.shape[1])
        require(tuple(head_weight.shape) == shape, f"The head's weights must be {shape}, classes by features",
                tuple(head_weight.shape), "Extract the features that enter this head, at its input.")  # fmt: skip
        information = self.information(logits)  # first, as it refuses most
        return TransferScored(
            uniformity=uniformity(head_weight), hopkins=self.hopkins(features), information=information
        )

    def of_model(self, model: nn.Module, stream: Iterable[Any], *, head: str | None = None) -> TransferScored:
        """From one pass of a model over a finite stream of the target; labels are not looked at.

        `head` is the dotted name of its last linear layer, where that is not the head.
        """
        name = head or head_of(model)
        layer = layer_of(model, name)
        require(isinstance(layer, nn.Linear), "The head must be a linear layer", name, "Name another layer.")
        require(not isinstance(stream, Resumable), "The target must be one finite pass",
                f"{type(stream).__name__}, which never ends", "Pass a list of batches, as x.split(256).")  # fmt: skip
        assert isinstance(layer, nn.Linear)
        return self.of(extract(model, stream, head=name), layer.weight.detach())

    def hopkins(self, features: Tensor) -> float:
        """How clustered the features are: 0.5 if spread evenly over their box, towards 1 in clusters; 0.5 in one point.

        With v from random places and w from examples to the nearest (other) example, sum v / (sum v + sum w).
        """
        n = len(features)
        require(n >= 2, "The Hopkins statistic needs two examples", n, "Pass more of the target.")
        x = features.detach().double()
        low, high = x.amin(0), x.amax(0)
        finite("The range of the features", high - low)
        x, middle, span = (t[..., high > low] for t in (x, low / 2 + high / 2, high - low))
        if x.shape[1] == 0:
            warnings.warn("All features are the same point; the Hopkins statistic is taken to be 0.5.", stacklevel=2)
            return 0.5
        x, span = (x - middle) / span.max(), span / span.max()
        generator, found = torch.Generator().manual_seed(self.seed), []
        m = min(max(int(self.share * n), 10), n - 1)
        power = x.shape[1] if self.by_dimension else 1
        for _ in range(self.draws):
            rows = torch.randperm(n, generator=generator)[:m].to(x.device)
            places = torch.rand(m, x.shape[1], generator=generator, dtype=torch.float64).to(x.device) - 0.5
            v, w = _nearest(places * span, x), _nearest(x[rows], x, rows)
            found.append(torch.sigmoid((power * v.log()).logsumexp(0) - (power * w.log()).logsumexp(0)))
        return float(torch.stack(found).mean())

    def information(self, logits: Tensor) -> float:
        """Mutual information of examples and predictions as a share of ln K: 1 if sure and balanced, 0 if constant."""
        p = _checked(logits).softmax(1)
        parts = torch.split(p, self.batch or len(p))
        nats = sum(torch.special.entr(q.mean(0)).sum() * len(q) for q in parts) - torch.special.entr(p).sum()
        return max(float(nats) / len(p), 0.0) / math.log(p.shape[1])


def uniformity(head_weight: Tensor) -> float:
    """How far the angles between class weights (K, d) are from equal: mean squared radians, 0 for a simplex."""
    require(head_weight.ndim == 2 and len(head_weight) >= 2, "Uniformity needs head weights (K, d), K >= 2",
            tuple(head_weight.shape), "Score a classifier of two classes or more.")  # fmt: skip
    finite("head_weight", head_weight)
    classes, d = head_weight.shape
    w = head_weight.detach().double()
    norms = w.norm(dim=1, keepdim=True)
    require(bool((norms > 0).all()), "Each class needs weights other than zero", f"{int((norms == 0).sum())} zero rows",
            "Train the head first.")  # fmt: skip
    if classes > d + 1:
        warnings.warn(f"{classes} classes cannot spread evenly in {d} dimensions; uniformity stays > 0.", stacklevel=2)
    angles = (w / norms @ (w / norms).T).clamp(-1, 1).arccos()
    gaps = (angles - math.acos(-1 / (classes - 1))).square().fill_diagonal_(0)
    return float(gaps.sum()) / (classes * (classes - 1))


def _checked(logits: Tensor) -> Tensor:
    require(logits.ndim == 2 and len(logits) > 0 and logits.shape[1] >= 2, "Logits must be (n, K), n > 0, K >= 2",
            tuple(logits.shape), "Score a classifier of two classes or more.")  # fmt: skip
    finite("logits", logits)
    z = logits.detach().double()
    slack = 0.02 if logits.element_size() < 4 else 1e-3  # what half precision leaves of a sum of probabilities
    probabilities = bool((z >= 0).all()) and bool(((z.sum(1) - 1).abs() <= slack).all())
    require(not probabilities, "Logits come before the softmax", "rows that sum to 1",
            "Pass log-probabilities, such as p.clamp(min=1e-30).log(), if there are no logits.")  # fmt: skip
    return z


def _nearest(points: Tensor, x: Tensor, own: Tensor | None = None) -> Tensor:
    """Each point's distance to the nearest row of x (n, d), other than row `own`; 2^24 distances at once."""
    squares, rows, found = x.square().sum(1), max(2**24 // len(x), 1), []
    for first in range(0, len(points), rows):
        part = points[first : first + rows]
        gaps = torch.addmm(squares, part, x.T, alpha=-2)  # |x|² - 2 v·x; |v|² is the same for all x
        if own is not None:
            gaps.scatter_(1, own[first : first + rows, None], math.inf)
        found.append((part - x[gaps.argmin(1)]).norm(dim=1))  # anew: a difference of squares would lose digits
    return torch.cat(found)
