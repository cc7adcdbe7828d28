"""Sample models from the posterior with noise at a constant rate."""

from __future__ import annotations

from dataclasses import dataclass, field

from headstart.core.paper import Paper
from headstart.core.plan import Plan
from headstart.core.rates import constant
from headstart.core.validate import require

from .langevin import Chain
from .samples import Samples

PAPER = Paper(
    title="Bayesian Learning via Stochastic Gradient Langevin Dynamics",
    authors="Max Welling and Yee Whye Teh",
    year=2011,
    departs="The rate stays constant, so the stationary law is the posterior up to O(rate).",
)


@dataclass(frozen=True, kw_only=True)
class SGLD:
    """Models drawn from the posterior of the weights by one training run with noise at a constant rate.

    θ ← θ - lr · ∇(loss + weight_decay / 2 · |θ|²) + √(2 · lr · temperature / examples) · N(0, 1).

    Args:
        examples: n >= 1, how many training examples the loss is a mean over; it turns the loss into a posterior.
        every: >= 1, steps between two kept models.
        burn_in: >= 0, steps before the first may be kept.
        lr: > 0; takes the place of the plan's optimizer and schedule.
        temperature: >= 0; 1 is the posterior, 0 plain gradient descent without a draw.
        weight_decay: >= 0, the Gaussian prior's 1 / (n · variance). Give it nowhere else.
        seed: of the noise, which is a function of it and the step alone.
        samples: where the models are kept.

    Use it when: asking how sure a model is, or for surrogates that differ, and one long run is affordable.
    Not when: the run is too short to move from one mode to another: see `CSGLD`.

    Cost: one normal number for each trained weight a step, and one copy of them for each model kept.

    Notes: the loss must be a mean over examples. Noise goes to all trained weights of the model, not of terms.
    The rate does not fall, so the stationary law is that of the posterior up to O(lr). Settle the plan's steps and
    surgeries first.

    Raises:
        Refused: a number out of range, or a run too short to keep one model.

    Reference: Welling and Teh 2011, equation 4.

    >>> import torch
    >>> from headstart.core.loop import fit
    >>> from headstart.core.stream import Batches
    >>> x = torch.tensor([[-1.0], [1.0]]).repeat(16, 1)
    >>> plan = Plan(model=torch.nn.Linear(1, 2), stream=Batches(x=x, y=(x[:, 0] > 0).long()), steps=20)
    >>> posterior = SGLD(examples=32, every=5, burn_in=10)
    >>> model = fit(posterior(plan)).model
    >>> posterior.samples.steps
    [15, 20]
    """

    examples: int
    every: int
    burn_in: int = 0
    lr: float = 0.01
    temperature: float = 1.0
    weight_decay: float = 3e-4
    seed: int = 0
    samples: Samples = field(default_factory=Samples, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._chain()
        require(self.every >= 1, "SGLD needs every >= 1", self.every, "Pass the number of batches of an epoch.")
        require(self.burn_in >= 0, "SGLD needs burn_in >= 0", self.burn_in, "Pass a number of steps.")

    def __call__(self, plan: Plan) -> Plan:
        """The same plan with noise, at a constant rate."""
        least = self.burn_in + self.every
        require(plan.steps >= least, "SGLD needs steps >= burn_in + every", f"{plan.steps} of {least}", "Train longer.")
        return self._chain().within(
            plan,
            schedule=constant,
            noisy=lambda _index: True,
            kept=lambda index: index >= self.burn_in and (index - self.burn_in + 1) % self.every == 0,
        )

    def _chain(self) -> Chain:
        return Chain(examples=self.examples, lr=self.lr, temperature=self.temperature, weight_decay=self.weight_decay,
                     seed=self.seed, samples=self.samples)  # fmt: skip
