"""Choose an ensemble: models near the target's domain and task that also say the same of its examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.core.evidence import Evidence, classes_of
from headstart.core.paper import Paper
from headstart.core.validate import one_of, require

from .ensemble_leep import same_examples
from .parc import balanced
from .pool import Pool, joint_entropies, predictions
from .transport import squared_distances, transport

PAPER = Paper(
    title="Building a Winning Team: Selecting Source Model Ensembles using a Submodular Transferability Estimation "
    "Approach",
    authors="Vimal K B, Bachu et al.",
    year=2023,
    arxiv="2309.02429",
    departs="Claims no approximation guarantee: the negated sum falls with every model added, and standardised it is "
    "not monotone either. Transport is exact up to 2,000 examples.",
)


@dataclass(frozen=True, kw_only=True)
class Osborn:
    """Which models to average for a target: near it in domain and task, and of one mind about it; higher is better.

    The score of a set is minus the sum of its models' domain differences (optimal transport of their own examples'
    features to the target's), task differences (entropy of own classes given target classes under that transport) and
    of the conditional entropies between the predictions of each two.

    Args:
        weights: of domain, task and cohesion, >= 0; the paper's are 1, and it reports gains from tuning them.
        direction: "source given target" conditions the label entropy as the paper does; it grows with the number of a
            model's own classes. "target given source", as in the released code of OTCE, which the paper follows, does
            not: take it where models differ in that (0.55 against 0.24 correlation in the claim).
        unit: divides features by the root mean squared norm of the model's own; otherwise models of wide or large
            features look far from everything. The paper has none of this.
        examples: at most this many rows of each data set, >= 2, classes as equal as can be; the paper has 5,000.
        exact: transport is exact up to this many rows and entropic (Sinkhorn) above, >= 0.
        regularisation: of Sinkhorn, as a share of the median cost, > 0; not given in the paper.
        seed: of the draw of rows.

    Shape: each model's evidence has features (n, d), logits (n, c) and labels (n,) of the same target examples in the
        same order, and `source` with features and labels of its own data; d and c may differ.

    Use it when: examples of what each model was trained on are at hand, and the models' outputs will be averaged.
    Not when: there is no source data (`ELEEP` and `MSLEEP` need none), or the pool holds untrained or collapsed models,
        which win: their features, and so all distances, are tiny. Leave those out by LEEP or LogME first.

    Cost: O(n³) a model exactly (1 to 5 s for 2,000 rows), memory 4 n² float64; O(M² n log n) for all pairs of M models.

    Notes: `select` standardises each term and is a greedy heuristic, without a guarantee. `score_set` cannot: a set
    alone has nothing to be compared with; compare many with `pool(...).scores(subsets, standardise=True)`. Copies of
    one model add no cohesion cost, so they are rewarded: pass the pool through `distinct` first. Predictions are the
    classes of highest logit; renaming them changes nothing.

    Raises:
        Refused: no model, no source, no logits or labels, one class, labels that differ between models, `ot` missing.

    Reference: Vimal K B et al. 2023, section 4; standardising and k = 3 from its implementation details.

    >>> labels, x = torch.tensor([0, 0, 1, 1]), torch.tensor([[0.0], [1.0], [5.0], [6.0]])
    >>> def model(shift): return Evidence(features=x + shift, logits=torch.eye(2)[labels], labels=labels,
    ...                                   source=Evidence(features=x, labels=labels))
    >>> Osborn().score_set([model(0.0), model(2.0)]), Osborn().select([model(3.0), model(0.0), model(1.0)], k=2)
    (-4.0, (1, 2))
    """

    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    direction: Literal["source given target", "target given source"] = "source given target"
    unit: bool = False
    examples: int = 5000
    exact: int = 2000
    regularisation: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        good = len(self.weights) == 3 and all(math.isfinite(w) and w >= 0 for w in self.weights)
        require(good, "Osborn needs three finite weights >= 0", self.weights, "Pass (domain, task, cohesion).")
        one_of("direction", self.direction, ["source given target", "target given source"])
        require(self.examples >= 2, "Osborn needs examples >= 2", self.examples, "Pass a number such as 5000.")
        require(self.exact >= 0, "Osborn needs exact >= 0", self.exact, "Pass a number such as 2000.")
        require(0 < self.regularisation < math.inf, "Osborn needs regularisation > 0", self.regularisation,
                "Pass a share such as 0.02.")  # fmt: skip

    def score_set(self, evidence: Sequence[Evidence]) -> float:
        """Minus the weighted sum of the three terms of these models, not standardised."""
        return self.pool(evidence).score(range(len(evidence)))

    def select(self, evidence: Sequence[Evidence], k: int = 3) -> tuple[int, ...]:
        """The indices of k models for one ensemble, in the order chosen, each term standardised over the pool."""
        return self.pool(evidence).standardised().select(k)

    def pool(self, evidence: Sequence[Evidence]) -> Pool:
        """The terms of every model and pair, for all subsets."""
        labels, _ = classes_of(same_examples(evidence).cpu())
        for m, e in enumerate(evidence):
            require(e.source is not None, "Osborn needs each model's evidence with source=", f"none in model {m}",
                    "Extract it from the model's own data, or use ELEEP or MSLEEP, which need none.")  # fmt: skip
        said = predictions(evidence)
        rows = balanced(labels, self.examples, self.seed)
        found = torch.tensor([self._differences(e, labels, rows) for e in evidence], dtype=torch.float64)
        joint = joint_entropies(said[:, rows])
        own = joint.diag()
        cohesion = (2 * joint - (own[:, None] + own)).clamp(min=0)  # below 0 is rounding
        return Pool(domain=found[:, 0], task=found[:, 1], cohesion=cohesion, weights=self.weights)

    def _differences(self, evidence: Evidence, labels: Tensor, rows: Tensor) -> tuple[float, float]:
        """W_D and W_T of one model."""
        assert evidence.source is not None
        features, own = (t.cpu() for t in evidence.source.need("features", "labels"))
        own, _ = classes_of(own)
        drawn = balanced(own, self.examples, self.seed)
        x, y = features[drawn].double(), evidence.features.cpu()[rows].double()
        if self.unit and bool(x.any()):
            size = x.square().sum(1).mean().sqrt()
            x, y = x / size, y / size
        cost = squared_distances(x, y)
        coupling = transport(cost, exact=self.exact, regularisation=self.regularisation)
        joint = F.one_hot(own[drawn]).double().T @ coupling @ F.one_hot(labels[rows]).double()  # (own, target classes)
        given = joint.sum(0 if self.direction == "source given target" else 1)
        entropy = torch.special.entr(joint).sum() - torch.special.entr(given).sum()
        return float((coupling * cost).sum()), max(float(entropy), 0.0)  # below 0 is rounding
