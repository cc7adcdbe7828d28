"""Features that still vary inside the target's classes carry further, among models of one architecture."""

from __future__ import annotations

import torch
from scipy.stats import kendalltau
from torch import Tensor, nn

from headstart.choose.hscore import HScore
from headstart.choose.logme import LogME
from headstart.choose.tmi import PAPER as PAPER
from headstart.choose.tmi import TMI, icv
from headstart.core.claim import Claim
from headstart.core.evidence import Evidence, extract
from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.testing.material import digits
from headstart.worlds import glyphs

from .transferability_baselines import fine_tuned, probe

SETTING = "eight small networks pretrained on coarser and finer labels, by what a probe on 50 labels reaches"
CLAIMS = (
    Claim(
        says=f"TMI orders {SETTING}: Kendall's tau above 0.4 on average.",
        metric="tau with probes",
        better="TMI",
        than="any order",
        by=0.4,
        seeds=3,
    ),
    Claim(
        says="That tau is above 0 on each of three seeds.",
        metric="tau with probes above 0",
        better="TMI",
        than="any order",
        by=0.99,
        seeds=3,
    ),
    Claim(
        says="It is above the regularised H-score's on average.",
        metric="tau with probes",
        better="TMI",
        than="HScore",
        seeds=3,
    ),
)
NOTE = (
    "The plain variance inside the classes (ICV) orders the models as TMI does, to within one swapped pair a seed: "
    "here the estimator of entropy adds nothing. One distance in three lies under TMI's floor. At unit spread its "
    "tau is 0.14 lower on average. The tau with 50-label fine-tuning is shown, not claimed: with one split a model "
    "it is mostly noise. The tau of any order is 0, a random one's mean."
)
MERGED = {"digits": (2, 3, 5, 10), "upper": (2, 5, 13, 26)}  # source -> into how many classes its own are merged


def run(seed: int) -> dict[str, dict[str, float]]:
    """Digits and letters from fonts, merged at random into fewer classes; 300 rows of UCI digits are scored."""
    x, y = digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    scored, rest = order[:300], order[300:]
    splits = [rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(k))] for k in range(3)]
    scores = {"TMI": TMI().score, "ICV": icv, "HScore": HScore().score, "LogME": LogME().score,
              "TMI at unit spread": TMI(unit_spread=True, relative=True, min_dist=0.1).score}  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in scores}
    floored, probes, tuned = [], [], []
    for kind, sizes in MERGED.items():
        pictures, labels = glyphs.boxed(2000, seed, classes=kind)
        for classes in sizes:
            model = source(pictures, merged(labels, classes, seed), classes, seed)
            seen = extract(model, [x], head="head").features
            evidence = Evidence(features=seen[scored], labels=y[scored])
            for name, score in scores.items():
                found[name].append(score(evidence))
            floored.append(TMI().report(evidence).floored)
            probes.append(sum(probe(seen, y, rows[:50], rows[50:]) for rows in splits) / 3)
            tuned.append(fine_tuned(model, x, y, splits[0][:50], splits[0][50:]))
    found["the probe itself"] = probes
    arms = {name: against(values, probes, tuned) for name, values in found.items()}
    names = [f"{kind}, {classes} classes" for kind, sizes in MERGED.items() for classes in sizes]
    zoo = {f"probe, {name}": value for name, value in zip(names, probes, strict=True)}
    rest_of_it = {"share of distances under the floor": sum(floored) / len(floored)}
    none = {"tau with probes": 0.0, "tau with fine-tuning": 0.0, "tau with probes above 0": 0.0}
    return arms | {"any order": none, "zoo": zoo | rest_of_it}


def merged(labels: Tensor, classes: int, seed: int) -> Tensor:
    """The labels with their classes merged at random into `classes` of sizes as equal as can be."""
    own = int(labels.max()) + 1
    return (torch.randperm(own, generator=torch.Generator().manual_seed(seed)) % classes)[labels]


def source(x: Tensor, y: Tensor, classes: int, seed: int, steps: int = 350) -> nn.Module:
    """A small convolutional network for pictures of 8x8 with 64 features after a ReLU, trained for some steps."""
    with seeded(seed):
        model = nn.Sequential()
        model.add_module("conv0", nn.Conv2d(1, 16, 3, padding=1))
        model.add_module("relu0", nn.ReLU())
        model.add_module("conv1", nn.Conv2d(16, 32, 3, padding=1))
        model.add_module("relu1", nn.ReLU())
        model.add_module("pool", nn.MaxPool2d(2))
        model.add_module("flat", nn.Flatten())
        model.add_module("wide", nn.Linear(512, 64))
        model.add_module("relu2", nn.ReLU())
        model.add_module("head", nn.Linear(64, classes))
    if not steps:
        return model.eval()
    plan = Plan(model=model, stream=Batches(x=x, y=y, batch_size=64, seed=seed), steps=steps, optimizer=adamw(1e-3))
    return fit(plan, device="cpu", seed=seed).model.eval()


def against(values: list[float], probes: list[float], tuned: list[float]) -> dict[str, float]:
    """Kendall's tau of scores with what probes and fine-tuning reach."""
    tau = float(kendalltau(values, probes).statistic)
    return {
        "tau with probes": tau,
        "tau with probes above 0": float(tau > 0),
        "tau with fine-tuning": float(kendalltau(values, tuned).statistic),
    }
