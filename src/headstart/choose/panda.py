"""What a source's soft prompt knows moves into a target's by distillation, as far as the two tasks are alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.core.loop import fit
from headstart.core.objective import Fitted
from headstart.core.paper import Paper
from headstart.core.plan import Plan, Step, Teacher, Term
from headstart.core.stream import Batch, Batches, each, size
from headstart.core.surgery import head_of
from headstart.core.validate import require

PAPER = Paper(
    title="PANDA: Prompt Transfer Meets Knowledge Distillation for Efficient Model Adaptation",
    authors="Zhong et al.",
    year=2024,
    arxiv="2208.10160",
    code="https://github.com/WHU-ZQH/PANDA",
    departs="The task embedding, which the release lacks, is the centred output on a probe set. The weight is not "
    "divided by the batch size and is clipped at zero. The teacher is in eval mode (the release leaves dropout on).",
)


class PANDA(Term):
    """A fresh prompt that learns from a source's prompt as far as the two tasks are alike; the labels do the rest.

    The loss is weight · max(similarity, 0) · mean (logits - teacher's logits)², over examples and classes.

    Args:
        teacher: the model with the source's prompt **after** tuning prompt and head on the target (see `distil_from`);
            frozen, in eval mode. None where batches carry its logits, see `answered`.
        similarity: of the two tasks, in [-1, 1], from `prompt_similarity`; below zero the term is zero.
        weight: lambda >= 0; the release has 0.1, 0.1 to 1 is sensible.
        as_released: divide by the batch size once more, as the release does. Its defaults, weight=0.1 and
            similarity=0.1 at batches of 16, come to 0.000625 and distil next to nothing.

    Shape: logits (n, c) of model and teacher.

    Use it when: a source task is related to a target with few labels, and only a prompt is trained.
    Not when: the source's prompt has not been tuned on the target; as a teacher it is worse than none.

    Cost: one forward pass of the frozen teacher a step; none with `answered`.

    Notes: late fusion of several sources is several terms, each with its similarity. Early fusion is one teacher from
    `headstart.nets.prompts.mean_prompt`. The release's schedule of the weight is unused there and left out.

    Raises:
        Refused: similarity outside [-1, 1], weight < 0, logits of other classes, neither teacher nor its logits.

    Reference: Zhong et al. 2024, section 3; weights as released.

    >>> teacher = nn.Linear(4, 3)
    >>> PANDA(teacher, similarity=0.5)(Step(teacher, Batch(x=torch.ones(2, 4)))).item()
    0.0
    """

    def __init__(
        self, teacher: nn.Module | None, similarity: float = 1.0, weight: float = 0.1, as_released: bool = False
    ) -> None:
        require(abs(similarity) <= 1 + 1e-9, "PANDA needs -1 <= similarity <= 1", similarity, "See prompt_similarity.")
        require(0 <= weight < torch.inf, "PANDA needs a finite weight >= 0", weight, "Pass a number such as 0.1.")
        super().__init__()
        self.teacher = None if teacher is None else Teacher(teacher)
        self.similarity, self.weight, self.as_released = similarity, weight, as_released

    def forward(self, step: Step) -> Tensor:
        known, logits = step.batch.extra, step.run(step.batch.x).output
        require(self.teacher is not None or "teacher" in known, "PANDA needs a teacher or its logits", "neither",
                "Pass teacher=, or a stream from answered(...).")  # fmt: skip
        teacher = known["teacher"] if self.teacher is None else self.teacher(step.batch.x)
        shapes = [tuple(logits.shape), tuple(teacher.shape)]
        require(shapes[0] == shapes[1], "Model and teacher must give logits of one shape", shapes,
                "A head of another label set cannot teach; tune the source on the target first.")  # fmt: skip
        scale = self.weight * max(self.similarity, 0.0) / (len(logits) if self.as_released else 1)
        return scale * F.mse_loss(logits, teacher)

    def extra_repr(self) -> str:
        return f"similarity={self.similarity}, weight={self.weight}, as_released={self.as_released}"


def distil_from(
    source: nn.Module, plan: Plan, *, similarity: float, weight: float = 0.1, device: str = "auto", seed: int = 0
) -> Fitted:
    """The staged recipe: tune the source's prompt on the target, then let it teach the fresh `plan.model`.

    Args:
        source: the model with the source's prompt and a head of the target's classes (`with_head` where they differ).
        plan: how a prompt is tuned on the target; the teacher is trained by it too.
        similarity, weight: as in `PANDA`.
        device, seed: as in `fit`.
    """
    heads = [len(model.get_parameter(f"{head_of(model)}.weight")) for model in (source, plan.model)]
    require(len(set(heads)) == 1, "Source and target need heads of one size", heads, "Give the source with_head(...).")
    teacher = fit(replace(plan, model=source), device=device, seed=seed).model
    return fit(plan.plus(panda=PANDA(teacher, similarity, weight)), device=device, seed=seed)


@dataclass(frozen=True)
class Answered:
    """Batches whose `extra["teacher"]` holds what a teacher says of them; made by `answered`."""

    batches: Batches

    def start(self, position: int) -> Iterator[Batch]:
        for batch in self.batches.start(position):
            yield Batch(batch.x["x"], batch.y, {"teacher": batch.x["teacher"]})

    def __iter__(self) -> Iterator[Batch]:
        return self.start(0)


def answered(stream: Batches, teacher: nn.Module) -> Answered:
    """The same batches with the teacher's logits, computed once: n c numbers in place of a forward pass a step.

    Raises:
        Refused: a stream that augments, whose inputs the teacher would have to see anew.
    """
    require(stream.augment is None, "answered needs inputs that do not change", "augment=", "Keep the teacher online.")
    device = next((p.device for p in teacher.parameters()), torch.device("cpu"))
    frozen, n, width = Teacher(teacher), size(Batch(stream.x)), stream.batch_size
    pieces = [each(lambda t, k=k: t[k : k + width].to(device), stream.x) for k in range(0, n, width)]  # type: ignore[misc]
    return Answered(replace(stream, x={"x": stream.x, "teacher": torch.cat([frozen(piece).cpu() for piece in pieces])}))
