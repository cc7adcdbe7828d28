"""A pool of models for one target: how far each is, how much each two disagree, and which to take together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headstart.core.evidence import Evidence
from headstart.core.validate import require

from .ensemble_leep import same_examples


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """The three terms of every model and pair, found once; subsets are then scored and chosen at no cost.

    Attributes:
        domain: (M,) W_D, the cost of carrying a model's own examples to the target's.
        task: (M,) W_T, the entropy of its own classes given the target's, in nats.
        cohesion: (M, M) what two models' predictions leave unsaid of each other, H(i|j) + H(j|i); diagonal 0.
        weights: of the three terms.
    """

    domain: Tensor
    task: Tensor
    cohesion: Tensor
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def standardised(self) -> Pool:
        """Domain and task as z-scores over the models; pairs over their spread, not centred: gains must only fall."""
        pairs = torch.triu_indices(len(self.domain), len(self.domain), 1)
        values = self.cohesion[pairs[0], pairs[1]]
        spread = _spread(values) if len(values) else values.new_tensor(torch.inf)
        return replace(self, domain=_z(self.domain), task=_z(self.task), cohesion=self.cohesion / spread)

    def terms(self, subsets: Sequence[Sequence[int]]) -> Tensor:
        """(subsets, 3) the sums of domain, task and cohesion in each subset."""
        models = len(self.domain)
        member = self.domain.new_zeros(len(subsets), models)
        for row, subset in zip(member, subsets, strict=True):
            good = len(set(subset)) == len(subset) > 0 and all(0 <= m < models for m in subset)
            require(good, f"A subset needs different models of 0..{models - 1}", tuple(subset), "Name each once.")
            row[list(subset)] = 1
        within = ((member @ self.cohesion) * member).sum(1) / 2
        return torch.stack([member @ self.domain, member @ self.task, within], 1)

    def score(self, subset: Sequence[int]) -> float:
        """Minus the weighted sum of the three terms of one subset; higher is better."""
        return float(self.scores([subset])[0])

    def scores(self, subsets: Sequence[Sequence[int]], *, standardise: bool = False) -> Tensor:
        """The score of each subset (float64); standardise=True takes z-scores of each term over these subsets."""
        terms = self.terms(subsets)
        if standardise:
            sizes = {len(subset) for subset in subsets}
            require(len(sizes) == 1, "Standardised scores need subsets of one size", sorted(sizes), "Compare each size "
                    "alone.")  # fmt: skip
            terms = torch.stack([_z(term) for term in terms.T], 1)
        return -terms @ terms.new_tensor(self.weights)

    def select(self, k: int = 3) -> tuple[int, ...]:
        """k models, each the one that adds least to the sum (greedy; the first of equals), in the order chosen."""
        require(1 <= k <= len(self.domain), f"select needs 1 <= k <= {len(self.domain)} models", k, "Pass such a k.")
        near, task, cohesion = self.weights
        cost = near * self.domain + task * self.task
        chosen: list[int] = []
        for _ in range(k):
            best = int(cost.argmin())
            chosen.append(best)
            cost = cost + cohesion * self.cohesion[best]
            cost[best] = torch.inf
        return tuple(chosen)


def predictions(evidence: Sequence[Evidence]) -> Tensor:
    """(M, n) each model's predicted own class of the same target examples.

    Raises:
        Refused: no model, no logits, labels of the target that differ between models: their rows are not aligned.
    """
    same_examples(evidence)
    return torch.stack([e.need("logits")[0].argmax(1).cpu() for e in evidence])


def joint_entropies(said: Tensor) -> Tensor:
    """(M, M) entropy in nats of each two models' predictions (M, n) together; the diagonal is each one's alone.

    H(i|j) is entry (i, j) less entry (j, j).

    >>> joint_entropies(torch.tensor([[0, 0, 1, 1], [5, 5, 2, 2], [0, 1, 0, 1]])).div(0.6931471805599453)
    tensor([[1., 1., 2.],
            [1., 1., 2.],
            [2., 2., 1.]], dtype=torch.float64)
    """
    models, n = said.shape
    joint = torch.zeros(models, models, dtype=torch.float64)
    for i in range(models):
        for j in range(i, models):
            share = torch.unique(said[i] * (said[j].amax() + 1) + said[j], return_counts=True)[1].double() / n
            joint[i, j] = joint[j, i] = torch.special.entr(share.sort().values).sum()  # sorted: names change no bit
    return joint


def distinct(evidence: Sequence[Evidence], *, agreement: float = 0.95) -> tuple[int, ...]:
    """The models that are not near copies of an earlier one, in order; list those you would rather keep first.

    Args:
        evidence: of each model on the same target examples, with logits and labels.
        agreement: share of examples, in (0, 1], on which two models may not agree under the best one-to-one renaming
            of their classes.

    Cost: one linear assignment of classes for each two models.

    >>> def model(*rows): return Evidence(features=torch.zeros(4, 1), logits=torch.eye(2)[list(rows)],
    ...                                   labels=torch.tensor([0, 0, 1, 1]))
    >>> distinct([model(0, 0, 1, 1), model(1, 1, 0, 0), model(0, 1, 0, 1)])
    (0, 2)
    """
    from scipy.optimize import linear_sum_assignment

    require(0 < agreement <= 1, "distinct needs 0 < agreement <= 1", agreement, "Pass a share such as 0.95.")
    said = [torch.unique(row, return_inverse=True)[1] for row in predictions(evidence)]
    kept: list[int] = []
    for m, mine in enumerate(said):
        for other in kept:
            wide = int(mine.amax()) + 1
            both = torch.bincount(said[other] * wide + mine, minlength=(int(said[other].amax()) + 1) * wide)
            table = both.view(-1, wide).numpy()
            if table[linear_sum_assignment(table, maximize=True)].sum() >= agreement * len(mine):
                break
        else:
            kept.append(m)
    return tuple(kept)


def _z(values: Tensor) -> Tensor:
    return (values - values.mean()) / _spread(values)


def _spread(values: Tensor) -> Tensor:
    """The standard deviation; infinite where all values are the same, which then says nothing."""
    spread = values.std(correction=0)
    return torch.where(spread > 1e-12 * values.abs().amax(), spread, torch.inf)
