"""Reuse prognosis models of other diseases: which of them carry over, and a router over what they see."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.core.paper import Paper
from headstart.core.plan import Step, Term
from headstart.core.validate import require
from headstart.nets.bags import ABMIL

PAPER = Paper(
    title="Towards Understanding and Harnessing the Transferability of Prognostic Knowledge in Computational Pathology",
    authors="Pei Liu and Luping Ji and Jiaxiang Gou and Xiangxiang Zeng",
    year=2025,
    arxiv="2508.13482",
    code="https://github.com/liupei101/Path-PKT",
    departs="Positive sources are chosen on the folds that are not tested on (`positive_sources`), where the release "
    "looks at the target's test folds; batches of padded bags take the place of single bags whose gradients are "
    "accumulated; the router's Gumbel noise, off in the release, is left out.",
)


class SurvivalNLL(Term):
    """Trains a model's outputs to be hazards of discrete survival times, censored patients included.

    An event in bin j costs -log S(j-1) - log h(j), a patient censored in bin j (1 - alpha) times -log S(j), with
    hazards h = sigmoid(logits) and S the product of 1 - h up to a bin; the mean over patients.

    Args:
        alpha: how much less censored patients weigh, in [0, 1]; the paper has 0.5.
        floor: smallest argument of a logarithm, > 0; the paper has 1e-7.

    Shape: logits (n, T); the batch's y (n,) are bins in 0..T-1 and its extra["event"] (n,) is 1 for an event.

    Use it when: times are censored, and one network serves tasks that share their bins.
    Not when: everybody was followed to the event; then any regression does.

    Cost: O(n T).

    Raises:
        Refused: a batch without bins or event flags, flags other than 0 and 1, bins outside the outputs, alpha outside
            [0, 1].

    Reference: Liu et al. 2025, as in Zadeh and Schmid 2020.

    >>> from headstart.core.stream import Batch
    >>> hazards = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    >>> batch = Batch(hazards.logit(), torch.tensor([2]), {"event": torch.ones(1)})
    >>> round(SurvivalNLL()(Step(nn.Identity(), batch)).item(), 4)
    1.5325
    """

    def __init__(self, alpha: float = 0.5, floor: float = 1e-7) -> None:
        require(0 <= alpha <= 1, "SurvivalNLL needs 0 <= alpha <= 1", alpha, "The paper has 0.5.")
        require(0 < floor < 1, "SurvivalNLL needs 0 < floor < 1", floor, "The paper has 1e-7.")
        super().__init__()
        self.alpha, self.floor = alpha, floor

    def forward(self, step: Step) -> Tensor:
        logits, bins, event = step.run(step.batch.x).output, step.batch.y, step.batch.extra.get("event")
        require(bins is not None and event is not None, 'SurvivalNLL needs bins in y and extra["event"]', None,
                'Pass Batch(x, bins, {"event": events}).')  # fmt: skip
        require(bins.shape == event.shape == logits.shape[:1] and bool(((event == 0) | (event == 1)).all()),
                "Each patient needs a bin and an event flag, 0 or 1", (tuple(bins.shape), tuple(event.shape)),
                "Flag 1 where the event was seen; a censoring flag is its opposite.")  # fmt: skip
        top = int(bins.max())
        require(int(bins.min()) >= 0 and top < logits.shape[1], f"Bins must lie in 0..{logits.shape[1] - 1}", top,
                "Use binned(times, bins=outputs of the model).")  # fmt: skip
        log_survive = F.logsigmoid(-logits).cumsum(1)  # log S(j)
        low = math.log(self.floor)
        before = F.pad(log_survive, (1, 0))[:, :-1].gather(1, bins[:, None])[:, 0].clamp(min=low)
        dies = F.logsigmoid(logits).gather(1, bins[:, None])[:, 0].clamp(min=low)
        stays = log_survive.gather(1, bins[:, None])[:, 0].clamp(min=low)
        seen = event.to(logits.dtype)
        loss: Tensor = -(seen * (before + dies) + (1 - seen) * (1 - self.alpha) * stays).mean()
        return loss


class MoEPKT(nn.Module):
    """A network for a task with few patients that takes up, bag by bag, what frozen models of other tasks see.

    A router looks at the bag and weighs the experts, of which each reads one frozen model's vector of the same bag; the
    weighted sum of the best `top` gives the logits. The weights are the softmax's own and do not add up to one.

    Args:
        inputs: width of an instance.
        experts: how many frozen vectors come with each bag.
        outputs: logits, such as bins.
        width: of those vectors.
        top: experts that speak, 1 <= top <= experts; the paper has 5.
        transform: give each expert a linear layer with ReLU of its own; False reads the vectors as they are.
        attention, dropout: of the router's `ABMIL`.

    Shape: a mapping with "instances" (n, K, inputs), maybe "mask" (n, K), and "experts" (n, experts, width)
        -> (n, outputs).

    Use it when: some fifty patients or more, and a few trained models of related tasks on the same kind of instances.
    Not when: fewer have had the event; then `pooled_risk` of the positive sources needs no training. If the target's
        own model is an expert, its vectors of patients it was trained on look better than they are, and the router
        trusts it too much: pass vectors of patients held out from it, or leave it out.

    Cost: one ABMIL and one batched product of experts; the frozen models ran once, before (`vectors_of`).

    Raises:
        Refused: top outside 1..experts, another number or width of vectors than experts.

    Reference: Liu et al. 2025, section 5.

    >>> x = {"instances": torch.ones(2, 7, 3), "experts": torch.ones(2, 4, 8)}
    >>> model = MoEPKT(3, experts=4, outputs=5, width=8, top=2)
    >>> model(x).shape, (model.weights(x) > 0).sum(1).tolist()
    (torch.Size([2, 5]), [2, 2])
    """

    def __init__(
        self, inputs: int, experts: int, outputs: int, *, width: int = 512, top: int = 5, transform: bool = True,
        attention: int = 384, dropout: float = 0.25,
    ) -> None:  # fmt: skip
        require(1 <= top <= experts, "MoEPKT needs 1 <= top <= experts", (top, experts), "Lower top, or add experts.")
        super().__init__()
        self.trunk = ABMIL(inputs, 1, width=width, attention=attention, dropout=dropout)
        self.trunk.head = nn.Identity()  # type: ignore[assignment]
        self.router = nn.Linear(width, experts, bias=False)
        bound, kept = width**-0.5, experts if transform else 0
        self.weight = nn.Parameter(torch.empty(kept, width, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(kept, width))
        self.head = nn.Linear(width, outputs)
        self.top = top

    def weights(self, x: Any) -> Tensor:
        """How much each expert says of each bag, (n, experts): the softmax where it is among the best, else 0."""
        p: Tensor = self.router(self.trunk.bag(x)).softmax(1)
        best = p.topk(self.top, 1)
        return torch.zeros_like(p).scatter(1, best.indices, best.values)

    def forward(self, x: Mapping[str, Any]) -> Tensor:
        seen: Tensor = x["experts"]
        wanted = (len(x["instances"]), self.router.out_features, self.router.in_features)
        require(seen.shape == wanted, f"MoEPKT needs one vector an expert, {wanted}", tuple(seen.shape),
                "Pass vectors_of(models, bags), the models in the order of training.")  # fmt: skip
        if len(self.weight):
            seen = (torch.einsum("ned,edf->nef", seen, self.weight) + self.bias).relu()
        logits: Tensor = self.head(torch.einsum("ne,ned->nd", self.weights(x), seen))
        return logits


class Routing(Term):
    """Keeps a router from sending everything one way and its logits small.

    Args:
        balance: weight of the balance; the paper has 0.01.
        z: weight of the squared log-sum-exp; the paper has 0.01.
        true_balance: E sum f_i P_i over the batch (how often each expert is first, times its mean weight) in place of
            the release's mean largest weight, which flattens each bag's routing instead of balancing the load.
        layer: the router, whose outputs (n, E) are read.

    Use it when: training a `MoEPKT`, or any model with a layer that gives logits over experts.

    Cost: O(n E).

    Raises:
        Refused: a weight below 0.

    Reference: Liu et al. 2025, as released; Fedus et al. 2022 for the true balance.

    >>> from headstart.core.stream import Batch
    >>> step = Step(nn.Identity(), Batch(torch.ones(3, 2)), recorded={"router": torch.zeros(3, 4)})
    >>> round(Routing()(step).item(), 4)  # 0.01 (1 / 4 + log(4)²)
    0.0217
    """

    def __init__(
        self, balance: float = 0.01, z: float = 0.01, true_balance: bool = False, layer: str = "router"
    ) -> None:
        require(balance >= 0 and z >= 0, "Routing needs weights >= 0", (balance, z), "The paper has 0.01 for both.")
        super().__init__()
        self.balance, self.z, self.true_balance, self.taps = balance, z, true_balance, (layer,)

    def forward(self, step: Step) -> Tensor:
        r = step.run(step.batch.x).taps[self.taps[0]]
        p = r.softmax(1)
        first = p.max(1).values.mean()
        if self.true_balance:
            often = F.one_hot(p.argmax(1), p.shape[1]).to(p.dtype).mean(0)
            first = p.shape[1] * (often * p.mean(0)).sum()
        loss: Tensor = self.balance * first + self.z * r.logsumexp(1).square().mean()
        return loss
