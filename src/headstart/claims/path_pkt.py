"""Survival models of related diseases: which transfer as they are, and whether a router over them beats one's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headstart.choose.path_pkt import PAPER as PAPER
from headstart.choose.path_pkt import MoEPKT, Routing, SurvivalNLL
from headstart.choose.survival import binned, concordance, risk
from headstart.core.claim import Claim
from headstart.core.loop import fit
from headstart.core.plan import Plan, Term, adamw
from headstart.core.rng import seeded
from headstart.core.stream import Batch
from headstart.nets.bags import ABMIL, vectors_of

CLAIMS = (
    Claim(
        says="A router over the target's own and six related models orders patients better than the own model alone.",
        metric="concordance",
        better="MoE-PKT",
        than="own model",
        seeds=4,
    ),
    Claim(
        says="It does so on three seeds of four.",
        metric="ahead of the own model",
        better="MoE-PKT",
        than="never",
        by=0.74,
        seeds=4,
    ),
    Claim(
        says="The opposite task's model has C below 0.4 as it is, and the nearest one's above 0.6, on every seed.",
        metric="signs as the tasks say",
        better="zero transfer",
        than="never",
        by=0.99,
        seeds=4,
    ),
    Claim(
        says="Routing beats plain averaging of what the six models see.",
        metric="concordance",
        better="MoE-PKT",
        than="mean of the sources",
        seeds=4,
    ),
)
COSINES = (0.9, 0.8, 0.7, 0.7, 0.0, -0.8)
DIMENSIONS, INSTANCES, BINS, WIDTH, EPOCHS, GROUP = 16, 20, 8, 32, 40, 16
YEAR = 0.35  # width of a bin; the median time is near 0.7


class Cohort:
    """Patients as bags of 20 instances, of which 40 % are tumour: noise, the patient's vector s and a marker 2 u."""

    def __init__(self, direction: Tensor, marker: Tensor, patients: int, generator: torch.Generator) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        own = normal(patients, DIMENSIONS)
        tumour = torch.arange(INSTANCES) < int(0.4 * INSTANCES)
        self.bags = normal(patients, INSTANCES, DIMENSIONS) + tumour[:, None] * (own + 2 * marker)[:, None]
        rate = torch.exp(1.5 * own @ direction)
        dies, leaves = (-torch.rand(patients, generator=generator).log() for _ in range(2))
        dies = dies / rate
        self.times, self.events = torch.minimum(dies, leaves), dies <= leaves

    def stream(self, seed: int, **more: Tensor) -> list[Batch]:
        """Forty epochs in groups of sixteen patients; an incomplete group is left out."""
        generator, batches = torch.Generator().manual_seed(seed), []
        y, event, x = binned(self.times, BINS, YEAR), self.events.float(), {"instances": self.bags, **more}
        for _ in range(EPOCHS):
            order = torch.randperm(len(y), generator=generator)
            for rows in torch.split(order[: len(y) // GROUP * GROUP], GROUP):
                batches.append(Batch({k: v[rows] for k, v in x.items()}, y[rows], {"event": event[rows]}))
        return batches

    def concordance(self, model: nn.Module, **more: Tensor) -> float:
        """How well the model's risks order these patients."""
        with torch.no_grad():
            logits = model.eval()({"instances": self.bags, **more})
        return concordance(risk(logits), self.times, self.events)


class Mean(nn.Module):
    """A linear layer on the mean of what the experts see."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, BINS)

    def forward(self, x: Any) -> Tensor:
        logits: Tensor = self.head(x["experts"].mean(1))
        return logits


def run(seed: int) -> dict[str, dict[str, float]]:
    """Six sources of 300 patients, a target of 60 and 300 more to test on; AdamW at 1e-3 for 40 epochs each."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(DIMENSIONS, DIMENSIONS, generator=generator)).Q
    target, marker, *others = axes.T
    directions = [c * target + (1 - c * c) ** 0.5 * others[k] for k, c in enumerate(COSINES)]
    sources = [
        trained(small(k + 100 * seed), Cohort(w, marker, 300, generator), seed) for k, w in enumerate(directions)
    ]
    train, test = Cohort(target, marker, 60, generator), Cohort(target, marker, 300, generator)
    own = trained(small(99 + 100 * seed), train, seed)
    zero = {f"source of cosine {c:+.1f}, {k}": {"concordance": test.concordance(source)}
            for k, (c, source) in enumerate(zip(COSINES, sources, strict=True))}  # fmt: skip
    nearest, *_, opposite = (arm["concordance"] for arm in zero.values())
    with_self, without = ([vectors_of(models, {"instances": part.bags}) for part in (train, test)]
                          for models in ([own, *sources], sources))  # fmt: skip

    def routed(seen: list[Tensor]) -> float:
        with seeded(seed):
            model = MoEPKT(DIMENSIONS, seen[0].shape[1], BINS, width=WIDTH, top=3, attention=24)
        tuned = trained(model, train, seed, {"routing": Routing()}, experts=seen[0])
        return test.concordance(tuned, experts=seen[1])

    with seeded(seed):
        plain = Mean()
    found = {
        "MoE-PKT": routed(with_self),
        "MoE-PKT without the own model": routed(without),
        "own model": test.concordance(own),
        "mean of the sources": test.concordance(trained(plain, train, seed, experts=without[0]), experts=without[1]),
    }
    arms = {name: {"concordance": value} for name, value in found.items()}
    arms["MoE-PKT"]["ahead of the own model"] = float(found["MoE-PKT"] > found["own model"])
    arms["zero transfer"] = {"signs as the tasks say": float(opposite < 0.4 and nearest > 0.6)}
    arms["never"] = {"ahead of the own model": 0.0, "signs as the tasks say": 0.0}
    return arms | zero


def small(seed: int) -> ABMIL:
    """An attention network of width 32."""
    with seeded(seed):
        return ABMIL(DIMENSIONS, BINS, width=WIDTH, attention=24)


def trained(model: nn.Module, cohort: Cohort, seed: int, more: dict[str, Term] | None = None, **x: Tensor) -> Any:
    """The model, of its own kind, after forty epochs of the survival loss."""
    stream = cohort.stream(seed, **x)
    plan = Plan(model=model, stream=stream, steps=len(stream), terms={"task": SurvivalNLL(), **(more or {})},
                optimizer=adamw(1e-3, weight_decay=1e-5))  # fmt: skip
    return fit(plan, device="cpu", seed=seed).model.eval()
