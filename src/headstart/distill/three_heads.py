"""One classifier with three heads on a shared trunk, which answers with the head that is surest of an input."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.core.surgery import freeze, head_of, matching, replace_layers
from headstart.core.taps import layer_of, tapped
from headstart.core.validate import finite, one_of, require

HEADS = ("clean", "unclean", "combined")
RULES = ("entropy", "kl")
Rule = Literal["entropy", "kl"]


def choose_head(logits: Tensor, rule: Rule = "entropy") -> Tensor:
    """Which of three heads to believe for each example: (3, n, ..., c) -> indices (n, ...) into `HEADS`.

    Args:
        logits: of the clean, the unclean and the combined head.
        rule: "entropy" takes the head whose probabilities have the least entropy. "kl" first asks whether the combined
            head is nearer to the clean one, KL(combined ‖ clean) < KL(combined ‖ unclean), and then takes the surer of
            the combined and that one. Of heads that are equally sure the first counts.

    >>> sure, flat = torch.tensor([[9.0, 0.0]]), torch.zeros(1, 2)
    >>> choose_head(torch.stack([flat, sure, flat])), choose_head(torch.stack([flat, flat, flat]))
    (tensor([1]), tensor([0]))
    """
    one_of("rule", rule, RULES)
    logs = F.log_softmax(logits, -1)
    unsure = -_products(logs, logs).sum(-1)
    if rule == "kl":
        to_clean, to_unclean = (_products(logs[2], logs[2] - logs[k]).sum(-1) for k in (0, 1))
        far = torch.where(to_clean < to_unclean, 1, 0)  # the head that is no candidate
        unsure = unsure.scatter(0, far[None], torch.inf)
    return unsure.argmin(0)


def _products(logs: Tensor, of: Tensor) -> Tensor:
    return torch.where(logs == -torch.inf, 0, logs.exp() * of)  # 0 · log 0 is 0


class Heads(nn.Module):
    """Three copies of a head in its place; the output is that of the chosen one. All of them begin as the head."""

    temperatures: Tensor

    def __init__(self, head: nn.Module, rule: Rule) -> None:
        super().__init__()
        self.clean, self.unclean, self.combined = (copy.deepcopy(head).requires_grad_() for _ in HEADS)
        self.register_buffer("temperatures", torch.ones(3).to(next(self.parameters())))
        self.rule = rule

    def forward(self, features: Tensor) -> Tensor:
        logits = torch.stack([self.clean(features), self.unclean(features), self.combined(features)])
        scaled = logits.detach() / self.temperatures.view(-1, *[1] * (logits.ndim - 1))
        index = choose_head(scaled, self.rule)[None, ..., None].expand_as(logits[:1])
        return logits.gather(0, index)[0]


class ThreeHeads(nn.Module):
    """A frozen model with some layers to tune and three heads: inputs -> logits of the chosen head.

    What is frozen stays in eval mode, dropout and batch statistics included. It starts as the model, bit for bit.

    Args:
        model: a classifier; copied, frozen weights are shared.
        layers: shell pattern over dotted names of the layers to tune.
        head: dotted name of the head, by default the last linear layer.
        rule: see `choose_head`.
    """

    def __init__(self, model: nn.Module, layers: str, head: str | None = None, rule: Rule = "entropy") -> None:
        super().__init__()
        one_of("rule", rule, RULES)
        head = head or head_of(model)
        inside = [name for name in matching(model, layers, nn.Module) if name and f"{name}.".find(f"{head}.") != 0]
        whole = [name for name in inside if not any(name.startswith(f"{other}.") for other in inside)]
        tuned = sum(p.numel() for name in whole for p in layer_of(model, name).parameters())
        require(tuned > 0, "Robustify needs layers with weights beside the head", f"layers={layers!r}, head {head!r}",
                "Match the last block, or name another head.")  # fmt: skip
        for name, p in model.named_parameters():
            finite(f"weight {name!r}", p, "Load a model that has not diverged.")
        operated = replace_layers(freeze(model), whole, lambda layer: copy.deepcopy(layer).requires_grad_())
        self.model = replace_layers(operated, [head], lambda layer: Heads(layer, rule))
        self.head, self.layers = head, tuple(whole)
        self.train(model.training)

    @property
    def three(self) -> Heads:
        """The heads."""
        return cast(Heads, self.model.get_submodule(self.head))

    @property
    def taps(self) -> tuple[str, ...]:
        """The layers that say the three heads' logits, in the order of `HEADS`."""
        return tuple(f"model.{self.head}.{name}" for name in HEADS)

    def train(self, mode: bool = True) -> ThreeHeads:
        """Training mode reaches the tuned layers and the heads."""
        super().train(False)
        self.training = mode
        for name in (*self.layers, self.head):
            self.model.get_submodule(name).train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)  # type: ignore[no-any-return]

    def each(self, x: Tensor) -> Tensor:
        """The logits of all heads, (3, n, ..., c)."""
        with tapped(self, self.taps) as seen:
            self(x)
        return torch.stack([seen[tap] for tap in self.taps])


@dataclass(frozen=True, kw_only=True)
class HeadReport:
    """Accuracy of each head and of the chosen one, and the share of examples that each was chosen for."""

    clean: float
    unclean: float
    combined: float
    chosen: float
    shares: tuple[float, float, float]


@torch.no_grad()
def head_report(model: ThreeHeads, x: Tensor, y: Tensor, *, batch_size: int = 256) -> HeadReport:
    """What each head knows, to see whether three are better than one; the model's mode comes back.

    Args:
        model: made by `Robustify`.
        x: (n, ...) inputs.
        y: (n,) labels.
        batch_size: inputs at once.
    """
    logits = _said(model, x, y, batch_size)
    index = choose_head(logits / model.three.temperatures[:, None, None], model.three.rule)
    right = (logits.argmax(2) == y).double()
    one, two, three = right.mean(1).tolist()
    a, b, c = torch.bincount(index, minlength=3).double().div(len(y)).tolist()
    chosen = right.gather(0, index[None]).mean().item()
    return HeadReport(clean=one, unclean=two, combined=three, chosen=chosen, shares=(a, b, c))


@torch.no_grad()
def calibrate(model: ThreeHeads, x: Tensor, y: Tensor, *, batch_size: int = 256) -> ThreeHeads:
    """A copy whose heads are compared at temperatures that make each likeliest on held-out examples.

    Args:
        model: made by `Robustify`.
        x: (n, ...) held-out inputs, clean and unclean ones.
        y: (n,) labels.
        batch_size: inputs at once.

    Cost: one pass, and a search along one number for each head.
    """
    from scipy.optimize import minimize_scalar

    logits = _said(model, x, y, batch_size).double()

    def fitted(head: Tensor) -> float:
        loss = lambda log: F.cross_entropy(head / math.exp(log), y).item()  # noqa: E731
        return math.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-6}).x)

    new = copy.deepcopy(model)
    new.three.temperatures.copy_(torch.tensor([fitted(head) for head in logits]))
    return new


def _said(model: ThreeHeads, x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    require(len(x) == len(y) > 0, "One label for each of one or more inputs is needed", (len(x), len(y)), "Align them.")
    training = model.training
    try:
        logits = torch.cat([model.eval().each(some) for some in torch.split(x, batch_size)], 1)
    finally:
        model.train(training)
    finite("logits", logits, "Check the model.")
    return logits
