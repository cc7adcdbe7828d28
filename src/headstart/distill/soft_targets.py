"""Distillation of logits."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from headstart.core.paper import Paper
from headstart.core.plan import Step, Teacher, Term
from headstart.core.validate import require

PAPER = Paper(
    title="Distilling the Knowledge in a Neural Network",
    authors="Geoffrey Hinton and Oriol Vinyals and Jeff Dean",
    year=2015,
    arxiv="1503.02531",
    departs="A divergence instead of the paper's cross-entropy: the same gradients, and zero when both models agree.",
)


class SoftTargets(Term):
    """A model that answers as its teacher does, down to how it ranks the wrong classes; needs no labels.

    The loss is T² · KL(softmax(teacher / T) ‖ softmax(model / T)), the mean over examples. T² keeps the size of the
    gradient while T changes, so the weight of this term against others need not be tuned again.

    Args:
        teacher: maps the same inputs to logits of the same classes; it is frozen and stays in eval mode.
        temperature: T > 0; the higher, the more the small logits count. The paper uses 2.5 to 20, higher for students
            with more capacity; 1 compares the probabilities themselves.

    Shape: logits (n, ..., c) of model and teacher; every position counts alike.

    Use it when: labels are few and unlabelled inputs many, or the model to ship must be small.
    Not when: the teacher is worse than the labels there are, or names other classes.

    Cost: one forward pass of the teacher a step, without gradient.

    Notes: with labels, the paper gives the hard targets a considerably lower weight:
    `plan.plus(kd=Weighted(10.0, SoftTargets(teacher)))`.

    Raises:
        Refused: temperature <= 0, or teacher and model give logits of different shapes.

    Reference: Hinton et al. 2015, section 2.

    >>> import torch
    >>> from headstart.core.plan import Batch
    >>> teacher = nn.Linear(4, 3)
    >>> SoftTargets(teacher)(Step(teacher, Batch(x=torch.ones(2, 4)))).item()
    0.0
    """

    def __init__(self, teacher: nn.Module, temperature: float = 4.0) -> None:
        require(
            0 < temperature < math.inf, "SoftTargets needs a finite temperature > 0", temperature, "Pass one such as 4."
        )
        super().__init__()
        self.teacher, self.temperature = Teacher(teacher), temperature

    def forward(self, step: Step) -> Tensor:
        pair = step.run(step.batch.x).output, self.teacher(step.batch.x)
        shapes = [tuple(logits.shape) for logits in pair]
        require(
            shapes[0] == shapes[1],
            "Model and teacher must give logits of one shape",
            shapes,
            "Give both one head size.",
        )
        model, teacher = (F.log_softmax(logits.flatten(0, -2) / self.temperature, -1) for logits in pair)
        return self.temperature**2 * F.kl_div(model, teacher, log_target=True, reduction="batchmean")

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
