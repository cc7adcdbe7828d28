"""Measure how much of a perturbation's transfer is owed to shared data, architecture and class balance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from headstart.core.paper import Paper
from headstart.core.validate import require

from .transfer_matrix import Perturb, perturbed, transfer_matrix

PAPER = Paper(
    title="Your Attack Is Too DUMB: Formalizing Attacker Scenarios for Adversarial Transferability",
    authors="Marco Alecci and Mauro Conti and Francesco Marchiori and Luca Martinelli and Luca Pajola",
    year=2023,
    arxiv="2306.15363",
    code="https://github.com/Mhackiori/DUMB",
    departs="Gradients are taken through each model's own preprocessing, examples stay floating-point, success counts "
    "what the victim gets right of the same examples, and a second seed is no white box.",
)
CASES = ("C1", "C1'", "C2", "C3", "C4", "C5", "C6", "C7", "C8")


@dataclass(frozen=True)
class Condition:
    """How a model was made: data source, architecture, class balance, and which of several seeds."""

    source: str
    architecture: str
    balance: str
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One surrogate, one victim, one perturbation.

    Attributes:
        counted: examples that the victim first gets right.
        clean: its accuracy on the surrogate's test examples.
        success: the share of the counted that it then gets wrong.
        by_class: class -> (success, counted), for each class.
        kept: whether enough is counted to say anything.
    """

    surrogate: Condition
    victim: Condition
    perturbation: str
    case: str
    counted: int
    clean: float
    success: float
    by_class: Mapping[int, tuple[float, int]]
    kept: bool


@dataclass(frozen=True, kw_only=True)
class CaseSummary:
    """Mean success of one perturbation in one case, its 95 % interval over models, pairs behind it and left out."""

    perturbation: str
    case: str
    success: float
    interval: tuple[float, float]
    pairs: int
    dropped: int


@dataclass(frozen=True, kw_only=True)
class DumbStudy:
    """The long table and its summary; a case without a pair that was kept has no summary."""

    pairs: tuple[Pair, ...]
    cases: tuple[CaseSummary, ...]

    def success(self, perturbation: str) -> dict[str, float]:
        """Case -> mean success of one perturbation."""
        return {row.case: row.success for row in self.cases if row.perturbation == perturbation}


def case(surrogate: Condition, victim: Condition) -> str:
    """C1 (all alike) to C8 (nothing alike): 1 + 4 [source differs] + 2 [architecture differs] + [balance differs].

    The same model is C1, the white box; another seed under the same conditions is C1'.

    >>> case(Condition("web", "vit", "50/50"), Condition("web", "cnn", "20/80"))
    'C4'
    """
    differs = (surrogate.source != victim.source, surrogate.architecture != victim.architecture,
               surrogate.balance != victim.balance)  # fmt: skip
    index = 1 + 4 * differs[0] + 2 * differs[1] + differs[2]
    return "C1'" if index == 1 and surrogate.seed != victim.seed else f"C{index}"


def unguided(change: Callable[[Tensor], Tensor]) -> Perturb:
    """A perturbation that asks no model, such as blur, noise or inversion: one set of examples for all surrogates."""
    return lambda x, _goals: change(x)


def dumb_study(
    models: Mapping[Condition, nn.Module],
    tests: Mapping[str, tuple[Tensor, Tensor]],
    perturbations: Mapping[str, Perturb],
    *,
    least_accuracy: float = 0.6,
    least_counted: int = 10,
    resamples: int = 1000,
    seed: int = 0,
    batch_size: int = 256,
) -> DumbStudy:
    """How much success a perturbation loses when victim and surrogate differ in data, architecture or balance.

    Args:
        models: trained classifiers by their conditions, x in [0, 1] to logits, preprocessing inside (`Prepared`).
        tests: source -> x (n, ...) in [0, 1] and y (n,), balanced, not trained on. A surrogate's examples come from
            its own source, whatever the victim's.
        perturbations: name -> such as `PGD(radius=0.1).perturb`, all of the size that is asked about, or `unguided`.
        least_accuracy: pairs whose victim is less accurate on the surrogate's test examples are left out of the
            summary and counted there.
        least_counted: so are those whose victim is right on fewer examples.
        resamples: bootstrap draws of models, each a surrogate and a victim: pairs that share one are not independent.
        seed: of the draws.
        batch_size: examples at once.

    Use it when: a transfer rate was measured between models that have their training in common, and one asks whether
        it would hold without.
    Not when: there is one model of a kind: at least two values on one axis are needed.

    Cost: one run of each perturbation on each model; a forward pass of every model for each such set.

    Raises:
        Refused: fewer than two models, a source without test examples, nothing to measure.

    Reference: Alecci et al. 2023, section 3 (cases), section 4 (success on what the victim gets right).

    >>> models = {Condition("a", "linear", b): nn.Linear(2, 2) for b in ("50/50", "20/80")}
    >>> tests = {"a": (torch.rand(40, 2), torch.arange(40) % 2)}
    >>> study = dumb_study(models, tests, {"none": unguided(lambda x: x)}, least_accuracy=0, least_counted=0)
    >>> study.success("none")
    {'C1': 0.0, 'C2': 0.0}
    """
    require(len(models) >= 2, "dumb_study needs at least two models", len(models), "Train under another condition.")
    require(bool(perturbations), "dumb_study needs perturbations", "none", "Pass at least one.")
    lacking = sorted({c.source for c in models} - set(tests))
    require(not lacking, "dumb_study needs test examples of every source", f"none of {lacking}", "Add them to tests.")
    require(resamples >= 1, "dumb_study needs resamples >= 1", resamples, "Pass a number such as 1000.")
    conditions, victims, pairs = list(models), {str(k): model for k, model in enumerate(models.values())}, []
    for name, perturb in perturbations.items():
        for source in dict.fromkeys(c.source for c in conditions):
            x, y = tests[source]
            own = {str(k): models[c] for k, c in enumerate(conditions) if c.source == source}
            moved = perturbed(own, x, y, perturb, batch_size=batch_size)
            matrix = transfer_matrix(moved, victims, x, y, resamples=1, batch_size=batch_size)
            classes = {int(label): matrix.of_class(int(label)) for label in torch.unique(y.cpu())}
            counted, clean, success = matrix.counted.tolist(), matrix.clean.tolist(), matrix.success.tolist()
            for s, surrogate in enumerate(conditions[int(k)] for k in own):
                pairs += [
                    Pair(
                        surrogate=surrogate, victim=victim, perturbation=name, case=case(surrogate, victim),
                        counted=counted[v], clean=clean[v], success=success[s][v],
                        by_class={c: (float(rate[s, v]), int(n[v])) for c, (rate, n) in classes.items()},
                        kept=counted[v] >= max(least_counted, 0) and clean[v] >= least_accuracy,
                    )
                    for v, victim in enumerate(conditions)
                ]  # fmt: skip
    draws = torch.randint(len(models), (resamples, len(models)), generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(resamples, len(models)).scatter_add_(1, draws, torch.ones(draws.shape))
    summary = partial(_summary, pairs, {c: times[:, k] for k, c in enumerate(conditions)})
    found = [summary(name, which) for name in perturbations for which in CASES]
    return DumbStudy(pairs=tuple(pairs), cases=tuple(row for row in found if row))


def _summary(pairs: Sequence[Pair], times: Mapping[Condition, Tensor], name: str, which: str) -> CaseSummary | None:
    asked = [pair for pair in pairs if pair.perturbation == name and pair.case == which]
    kept = [pair for pair in asked if pair.kept]
    if not kept:
        return None
    rates = torch.tensor([pair.success for pair in kept])
    # a model drawn k times is in k pairs with another, and once a draw in the pair with itself
    weights = torch.stack([times[p.surrogate] * (1 if p.surrogate == p.victim else times[p.victim]) for p in kept], 1)
    total = weights.sum(1)
    means = ((weights @ rates) / total.clamp_min(1))[total > 0]  # a draw without any of these pairs says nothing
    means = means if len(means) else rates.mean()[None]
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975])).tolist()
    return CaseSummary(perturbation=name, case=which, success=float(rates.mean()), interval=(low, high),
                       pairs=len(kept), dropped=len(asked) - len(kept))  # fmt: skip
