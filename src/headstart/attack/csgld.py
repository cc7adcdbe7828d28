"""Sample models from the posterior in cycles of one training run."""

from __future__ import annotations

from dataclasses import dataclass, field

from headstart.core.paper import Paper
from headstart.core.plan import Plan
from headstart.core.rates import cosine
from headstart.core.validate import require

from .langevin import Chain
from .samples import Samples

PAPER = Paper(
    title="Cyclical Stochastic Gradient MCMC for Bayesian Deep Learning",
    authors="Ruqi Zhang and Chunyuan Li and Jianyi Zhang and Changyou Chen and Andrew Gordon Wilson",
    year=2020,
    arxiv="1902.03932",
    code="https://github.com/ruqizhang/csgmcmc",
    departs="No momentum and no cold restarts; steps are counted, not epochs.",
)


@dataclass(frozen=True, kw_only=True)
class CSGLD:
    """Models from several modes of the posterior, by one run whose rate starts high again in every cycle.

    Step k of a cycle of P has the rate lr / 2 · (cos(π k / P) + 1). A cycle begins with plain descent, which moves to
    another mode, and ends with noise of standard deviation √(2 · rate · temperature / examples), in which models are
    kept. Weights carry over from cycle to cycle.

    Args:
        examples: n >= 1, how many training examples the loss is a mean over.
        every: >= 1, steps between two kept models of a cycle (paper: an epoch).
        cycles: >= 1 (paper: 5 of 50 epochs); transfer gains little from more than 5.
        samples_per_cycle: >= 1 (paper: 3); the last `every · samples_per_cycle` steps of a cycle have noise.
        lr: > 0, at the start of a cycle (paper: 0.5 on CIFAR-10, 0.1 on ImageNet); models without batch normalisation
            need less. Takes the place of the plan's optimizer and schedule.
        temperature: >= 0; 1 is the posterior, about 0.08 what the published code has on CIFAR-10, 0 descent without a
            draw: snapshot ensembles.
        weight_decay: >= 0, the Gaussian prior (paper: 3e-4 to 5e-4 on CIFAR-10). Give it nowhere else.
        burn_in_cycles: >= 0 and < cycles; the first cycles from which nothing is kept.
        seed: of the noise, which is a function of it and the step alone.
        samples: where the models are kept.

    Use it when: surrogates for transferred perturbations are needed and several independent trainings are too dear.
    Not when: many weights are trained together and each copy is dear: see `SWAG`, which keeps a few columns.

    Cost: one normal number for each trained weight in the noisy steps, one copy of them for each model kept.

    Notes: the published noise, standard deviation √(2 · rate · (1 - momentum)) / batches, is ours at temperature =
    (1 - momentum) · n / batches². On small data that is too much: 3.3 for 1,200 examples in 19 batches. No momentum,
    with which the noise would have to enter the velocity. A rate that is too high spoils models of later cycles without
    an error: see `sound`. Settle the plan's steps and surgeries first.

    Raises:
        Refused: a number out of range, steps that do not divide by cycles, or cycles too short for their models.

    Reference: Zhang et al. 2020, equation 1 and algorithm 1; as surrogates: Gubri et al. 2022 (arXiv 2011.05074).

    >>> import torch
    >>> from headstart.core.loop import fit
    >>> plan = Plan(model=torch.nn.Linear(1, 2), stream=[(torch.ones(4, 1), torch.zeros(4).long())], steps=20)
    >>> posterior = CSGLD(examples=4, every=2, cycles=2, samples_per_cycle=2)
    >>> model = fit(posterior(plan)).model
    >>> posterior.samples.steps
    [8, 10, 18, 20]
    """

    examples: int
    every: int
    cycles: int = 5
    samples_per_cycle: int = 3
    lr: float = 0.5
    temperature: float = 0.08
    weight_decay: float = 3e-4
    burn_in_cycles: int = 0
    seed: int = 0
    samples: Samples = field(default_factory=Samples, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._chain()
        require(self.every >= 1, "CSGLD needs every >= 1", self.every, "Pass the number of batches of an epoch.")
        require(self.cycles >= 1 and self.samples_per_cycle >= 1, "CSGLD needs cycles >= 1 and samples_per_cycle >= 1",
                (self.cycles, self.samples_per_cycle), "The paper uses 5 and 3.")  # fmt: skip
        require(0 <= self.burn_in_cycles < self.cycles, "CSGLD needs 0 <= burn_in_cycles < cycles", self.burn_in_cycles,
                "Keep something from the last cycle.")  # fmt: skip

    def __call__(self, plan: Plan) -> Plan:
        """The same plan in cycles."""
        period, rest = divmod(plan.steps, self.cycles)
        quiet = period - self.every * self.samples_per_cycle
        require(rest == 0, f"CSGLD needs steps that divide by {self.cycles} cycles", plan.steps, "Round the steps.")
        require(quiet >= 0, "A cycle must hold its models: steps / cycles >= every · samples_per_cycle",
                f"{period} of {self.every * self.samples_per_cycle}", "Train longer.")  # fmt: skip
        return self._chain().within(
            plan,
            schedule=lambda progress: cosine(round(progress * plan.steps) % period / period),
            noisy=lambda index: index % period >= quiet,
            kept=lambda index: (
                index // period >= self.burn_in_cycles
                and index % period >= quiet
                and (index % period - quiet + 1) % self.every == 0
            ),
        )

    def _chain(self) -> Chain:
        return Chain(examples=self.examples, lr=self.lr, temperature=self.temperature, weight_decay=self.weight_decay,
                     seed=self.seed, samples=self.samples)  # fmt: skip
