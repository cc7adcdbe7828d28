"""Score a model by how well clusters of its features predict the target's classes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.core.evidence import Evidence, classes_of
from headstart.core.paper import Paper
from headstart.core.statistics import gram
from headstart.core.validate import require

from .leep import expected_prediction

PAPER = Paper(
    title="Ranking Neural Checkpoints",
    authors="Li et al.",
    year=2021,
    arxiv="2011.11200",
    departs="Takes fewer components where there are fewer than ten examples for each, and brings what is kept of the "
    "features to mean variance 1, so that the smallest variance means the same for every model.",
)


@dataclass(frozen=True, kw_only=True)
class NLEEP:
    """LEEP for models without a classifier: clusters of the features take the place of source classes; 0 is the best.

    Features are reduced to the principal components that hold most of their variance, a mixture of Gaussians is fitted
    to them without labels, and its responsibilities are what LEEP reads.

    Args:
        components: Gaussians for each target class, >= 1; the paper has 5. Where that leaves fewer than ten examples
            for each Gaussian there are fewer, but one a class at least.
        variance: share of the variance that is kept, in (0, 1]; the paper has 0.8.
        floor: added to variances, > 0, as a share of the mean variance kept; scikit-learn's 1e-6, in units of the
            features, lets Gaussians collapse on a few examples.
        seed: of the start of the mixture.

    Shape: features (n, d), labels (n,); at most 0, and -entropy(labels) for features that say nothing.

    Use it when: models are self-supervised, or have source classes in numbers that LEEP cannot compare.
    Not when: examples are few: each Gaussian has d (d + 3) / 2 numbers to learn in d kept components.

    Cost: O(n d min(n, d)), then some tens of rounds of O(k n d'²) for k Gaussians in d' components: by far the slowest.

    Notes: shifting, turning and scaling the features changes nothing but rounding. Examples are put in order along the
    first component before the mixture starts, so that their own order changes nothing either.

    Raises:
        Refused: fewer than two classes, no labels, NaN, components < 1, variance outside (0, 1], floor <= 0.

    Reference: Li et al. 2021, section 3.3.

    >>> features = torch.tensor([[0.0], [0.1], [0.2], [9.0], [9.1], [9.2]])
    >>> abs(NLEEP().score(Evidence(features=features, labels=torch.tensor([0, 0, 0, 1, 1, 1])))) < 1e-6
    True
    """

    components: int = 5
    variance: float = 0.8
    floor: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.components >= 1, "NLEEP needs components >= 1", self.components, "The paper has 5.")
        require(0 < self.variance <= 1, "NLEEP needs 0 < variance <= 1", self.variance, "The paper has 0.8.")
        require(0 < self.floor < float("inf"), "NLEEP needs floor > 0", self.floor, "Pass a share such as 1e-4.")

    def score(self, evidence: Evidence) -> float:
        """The mean log expected prediction of the labels from the clusters."""
        features, labels = evidence.need("features", "labels")
        labels, classes = classes_of(labels)
        x = self.reduced(features.double())
        order = x[:, 0].argsort(stable=True)
        count = classes * max(1, min(self.components, len(x) // (10 * classes)))
        clusters = self.responsibilities(x[order].cpu(), count)
        return float(expected_prediction(clusters, labels[order].cpu()).log().mean())

    def reduced(self, x: Tensor) -> Tensor:
        """Principal components (n, d') of x (n, d), as few as hold the share of variance, of mean variance 1."""
        n, d = x.shape
        spread = x - x[0]  # constant columns become exactly 0
        spread = spread - spread.mean(0)
        variances, axes = torch.linalg.eigh(gram(spread if d <= n else spread.T))
        variances, axes = variances.clamp(min=0).flip(0), axes.flip(1)
        held = variances.cumsum(0)
        if not float(held[-1]) > 1e-24 * float(x.square().sum()):  # constant features
            return torch.zeros_like(x[:, :1])
        kept = int((held < self.variance * held[-1] * (1 - 1e-12)).sum()) + 1
        z = spread @ axes[:, :kept] if d <= n else axes[:, :kept] * variances[:kept].sqrt()
        peak = z.gather(0, z.abs().argmax(0, keepdim=True))  # a component has no sign of its own
        scaled: Tensor = z * peak.sign() / (held[kept - 1] / (n * kept)).sqrt()
        return scaled

    def responsibilities(self, x: Tensor, count: int) -> Tensor:
        """Of `count` Gaussians with full covariance for each row, (n, count)."""
        from sklearn.mixture import GaussianMixture

        if not bool(x.any()):
            return x.new_ones(len(x), 1)
        mixture = GaussianMixture(count, reg_covar=self.floor, random_state=self.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # duplicates leave clusters empty, and some mixtures need more rounds
            return torch.from_numpy(mixture.fit(x.numpy()).predict_proba(x.numpy()))
