"""One pass over the target orders a zoo much as probes on its models would."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
import torch.nn.functional as F
from scipy.stats import kendalltau
from torch import Tensor, nn

from headstart.choose import GBC, KNN, LEEP, NCE, NLEEP, PARC, SFDA, HScore, LinearProbe, LogME, TransRate
from headstart.choose.logme import PAPER as PAPER
from headstart.core.claim import Claim
from headstart.core.evidence import Evidence, Score, extract
from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.core.surgery import with_head
from headstart.testing.material import digits
from headstart.worlds import glyphs, gratings

METHODS = (
    "choose.ensemble_leep", "choose.gbc", "choose.hscore", "choose.knn", "choose.leep", "choose.linear_probe",
    "choose.logme", "choose.nce", "choose.nleep", "choose.parc", "choose.sfda", "choose.transrate",
)  # fmt: skip
SCORES: dict[str, Score] = {
    "LogME": LogME(), "HScore": HScore(), "SFDA": SFDA(), "PARC": PARC(), "KNN": KNN(), "GBC": GBC(), "LEEP": LEEP(),
    "LinearProbe": LinearProbe(), "NCE": NCE(), "NLEEP": NLEEP(), "TransRate": TransRate(),
}  # fmt: skip
SCALED: dict[str, Score] = {"SFDA at unit spread": SFDA(), "GBC at unit spread": GBC()}
CLAIMS = tuple(
    Claim(
        says=f"{name} orders twelve small models by what a probe on 100 labels reaches: Kendall's tau above 0.3.",
        metric="tau with probes",
        better=name,
        than="any order",
        by=0.3,
        seeds=4,
    )
    for name in ("LogME", "HScore", "SFDA", "PARC", "KNN", "GBC")
)
NOTE = (
    "SFDA and GBC fail (SFDA below even 0.2, which counts as falsified) through the scale of the features. "
    "Untrained models have class variances near 4e-6, trained ones of 0.01 to 0.2. SFDA's shrinkage exp(-5 "
    "eigenvalue) is then 0.9995 for them, 0.01 to 0.25 for random labels and below 0.003 for the rest, and it calls"
    " the less shrunken surer; GBC's floor of 1e-4 takes untrained classes to overlap (-65; -0.3 without the "
    "floor). On features divided by their spread SFDA reaches 0.65 and GBC 0.42: arms added after the failure was "
    "seen, no claims. Sources have batch norm: without, they were at chance on their own pictures after 150 steps "
    "(digits 0.11), as most were after fine-tuning. No score is claimed against fine-tuning, which the probe itself"
    " orders backwards (-0.24) and LEEP best (0.60): what moves well need not separate well as it is. The tau of "
    "any order is 0, a random one's mean."
)
KINDS = ("digits", "letters", "punctuation", "gratings", "random labels", "untrained")


def run(seed: int) -> dict[str, dict[str, float]]:
    """Six kinds of pretraining, two models each; 300 rows of UCI digits are scored, others probed and fine-tuned on."""
    x, y = digits()
    x = F.interpolate(x, size=16, mode="bilinear")
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    scored, rest = order[:300], order[300:]
    found: dict[str, list[float]] = {name: [] for name in (*SCORES, *SCALED)}
    probes, tuned = [], []
    for kind in KINDS:
        for twin in range(2):
            model = source(kind, 2 * seed + twin)
            seen = extract(model, torch.split(x, 600), head="head").features
            evidence = Evidence(features=seen[scored], labels=y[scored], logits=model(x[scored]).detach())
            spread = seen[scored] - seen[scored].mean(0)
            unit = replace(evidence, features=spread / spread.square().sum(1).mean().sqrt())
            for name, score in SCORES.items():
                found[name].append(score.score(evidence))
            for name, score in SCALED.items():
                found[name].append(score.score(unit))
            splits = [rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(k))] for k in range(4)]
            probes.append(sum(probe(seen, y, rows[:100], rows[100:]) for rows in splits) / 4)
            tuned.append(fine_tuned(model, x, y, splits[0][:100], splits[0][100:]))
    found["the probe itself"] = probes
    arms = {
        name: {"tau with probes": _tau(values, probes), "tau with fine-tuning": _tau(values, tuned)}
        for name, values in found.items()
    }
    zoo = {
        f"{name}, {kind}": sum(values[2 * k : 2 * k + 2]) / 2
        for name, values in (("probe", probes), ("fine-tuned", tuned))
        for k, kind in enumerate(KINDS)
    }
    return arms | {"any order": {"tau with probes": 0.0, "tau with fine-tuning": 0.0}, "zoo": zoo}


def source(kind: str, seed: int) -> nn.Module:
    """A small convolutional network pretrained for 150 steps on 1,500 pictures of one kind."""
    if kind == "gratings":
        images, labels, classes = gratings.render(1500, seed, size=16)
    else:
        sets = {"digits": "digits", "punctuation": glyphs.PUNCTUATION}
        images, labels, classes = glyphs.render(1500, seed, size=16, classes=sets.get(kind, "letters"))
    x = torch.from_numpy(images).float().mean(-1)[:, None] / 255
    y = torch.from_numpy(labels)
    with seeded(seed):
        model = nn.Sequential()
        for k, (inputs, outputs) in enumerate(((1, 16), (16, 32), (32, 64))):
            model.add_module(f"conv{k}", nn.Conv2d(inputs, outputs, 3, padding=1))
            model.add_module(f"norm{k}", nn.BatchNorm2d(outputs))  # without, most sources stay at chance on their own
            model.add_module(f"relu{k}", nn.ReLU())
            model.add_module(f"pool{k}", nn.MaxPool2d(2) if k < 2 else nn.AdaptiveAvgPool2d(1))
        model.add_module("flat", nn.Flatten())
        model.add_module("head", nn.Linear(64, len(classes)))
        y = y[torch.randperm(len(y))] if kind == "random labels" else y
    if kind == "untrained":
        return model.eval()
    stream = Batches(x=x, y=y, batch_size=64, seed=seed)
    return fit(Plan(model=model, stream=stream, steps=150, optimizer=adamw(3e-3)), device="cpu", seed=seed).model.eval()


def probe(features: Tensor, labels: Tensor, train: Tensor, test: Tensor) -> float:
    """Test accuracy of a logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some sources do not converge in 500 rounds; that is their accuracy
        fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(features[train], labels[train])
    return float(fitted.score(features[test], labels[test]))


def fine_tuned(model: nn.Module, x: Tensor, y: Tensor, train: Tensor, test: Tensor) -> float:
    """Test accuracy after 100 steps on all weights from the labels of `train`."""
    plan = Plan(model=with_head(model, 10, "head"), stream=Batches(x=x[train], y=y[train]), steps=100,
                optimizer=adamw(1e-3))  # fmt: skip
    tuned = fit(plan, device="cpu").model.eval()
    with torch.no_grad():
        return float((tuned(x[test]).argmax(1) == y[test]).float().mean())


def _tau(a: list[float], b: list[float]) -> float:
    return float(kendalltau(a, b).statistic)
