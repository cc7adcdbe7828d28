"""Adapt a classifier to unlabelled inputs by its own confident answers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.core.plan import Step, Term
from headstart.core.validate import finite, require


def trusted(logits: Tensor, each: int | None = None) -> Tensor:
    """Fixed labels for the inputs that a model is surest of: for every class those with its highest probability.

    Args:
        logits: (n, c), over all unlabelled inputs, before adaptation.
        each: inputs a class; by default min(n // c // 10, 100), the paper's.

    Returns:
        (n,) the label, or -1 where there is none. An input that several classes want goes to the one that it gives the
        highest probability.

    >>> trusted(torch.tensor([[4.0, 0.0], [0.0, 3.0], [1.0, 0.0]]), each=1)
    tensor([ 0,  1, -1])
    """
    require(logits.ndim == 2 and len(logits) > 0, "trusted needs logits (n, c)", tuple(logits.shape), "Pass a table.")
    finite("logits", logits)
    n, classes = logits.shape
    count = min(n // classes // 10, 100) if each is None else each
    require(0 <= count <= n, f"each must be from 0 to {n}", count, "Change it.")
    probability = logits.double().softmax(1)
    wanted = torch.full_like(probability, -1.0)
    rows = probability.topk(count, dim=0).indices
    best, label = wanted.scatter(0, rows, probability.gather(0, rows)).max(1)
    return torch.where(best >= 0, label, -1)


class Confident(Term):
    """A model that fits inputs without labels better: what it says surely of one view, it learns to say of another.

    The loss is the mean cross-entropy of the `strong` view against the answer to the `weak` one, over those examples
    whose answer is sure, and 0 where none is. Labels y >= 0 of the batch, from `trusted`, take the place of answers.

    Args:
        strong: x -> a much changed view, which is learned from; draws from torch's generator, which `fit` seeds.
        weak: x -> the view that is trusted; by default x itself.
        threshold: an example counts where the largest probability of its answer exceeds this, in [0, 1).
        temperature: > 0; below 1 answers are sharpened to p^(1 / T), before the threshold looks at them. 1 leaves them,
            as the official code does in effect; the paper speaks of 0.5.

    Shape: logits (n, c); y (n,) or None.

    Use it when: the target has no labels at all, and the model is right about a good part of it.
    Not when: the model starts near chance: it would learn its own mistakes.

    Cost: two forward passes; one where other terms look at the weak view, too.

    Notes: the paper trains coefficients with it at 1e-3, a cosine and 10 passes over the test set.

    Raises:
        Refused: a threshold outside [0, 1), temperature <= 0, a label that is no class.

    Reference: Zhang et al. 2024, test-time adaptation, after FixMatch (Sohn et al. 2020).

    >>> import torch
    >>> from headstart.core.plan import Batch
    >>> Confident(strong=lambda x: x)(Step(torch.nn.Identity(), Batch(torch.tensor([[1.0, 0.0]])))).item()
    0.0
    """

    def __init__(
        self,
        strong: Callable[[Tensor], Tensor],
        weak: Callable[[Tensor], Tensor] = lambda x: x,
        threshold: float = 0.99,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        require(0 <= threshold < 1, "Confident needs 0 <= threshold < 1", threshold, "Pass a number such as 0.99.")
        require(
            0 < temperature < float("inf"), "Confident needs a finite temperature > 0", temperature, "Pass 0.5 or 1."
        )
        self.strong, self.weak, self.threshold, self.temperature = strong, weak, threshold, temperature

    def forward(self, step: Step) -> Tensor:
        x, y = step.batch.x, step.batch.y
        answers = (step.run(self.weak(x)).output.detach() / self.temperature).softmax(1)
        logits = step.run(self.strong(x)).output
        counts = answers.amax(1) > self.threshold
        if y is not None:
            classes = logits.shape[1]
            require(bool((y < classes).all()), f"Labels must be below {classes}, the classes of the head", int(y.max()),
                    "Mark unlabelled examples with -1.")  # fmt: skip
            known = y >= 0
            answers = torch.where(known[:, None], F.one_hot(y.clamp(min=0), classes).to(answers.dtype), answers)
            counts = counts | known
        losses = F.cross_entropy(logits, answers, reduction="none")
        loss: Tensor = losses[counts].sum() / counts.sum().clamp(min=1)
        return loss

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, temperature={self.temperature}"
