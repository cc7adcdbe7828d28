"""A signature of robustness extracted from three models makes a fourth one robust that had no part in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from headstart.core.claim import Claim
from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw, sgd
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.core.weights import Weights
from headstart.merge.robust_weight_signatures import PAPER as PAPER
from headstart.merge.robust_weight_signatures import Signature, extract_signature, patch
from headstart.merge.signature_profile import first_layers
from headstart.testing.material import digits

Rate = Callable[[list[nn.Parameter]], Optimizer]
CORRUPTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "contrast": lambda x: 0.5 + 0.25 * (x - 0.5),
    "blur": lambda x: F.avg_pool2d(x, 3, 1, 1),
}
ORDER = "Under {}, accuracy rises from none to three to four layers on at least 4 of 5 seeds, for model "
SAYS = {
    "three layers": ("Patching three convolutions raises accuracy under {} for model A and for B, which had no part in "
                     "the signature (the smaller gain).", "signature", "nothing", 0.0),
    "the fourth": ("Under {}, patching the fourth as well raises it further for both.", "signature", "nothing", 0.0),
    "in order, A": (ORDER + "A.", "signature", "nothing", 0.79),
    "in order, B": (ORDER + "B.", "signature", "nothing", 0.79),
    "half": ("Half of the three-layer patch for {} lies between none and all of it, in clean and corrupted accuracy, "
             "for both (the smallest distance to an end).", "signature", "nothing", 0.0),
    "moved": ("A random vector of the four-layer signature's norms moves accuracy under {} by less than 2 points, for "
              "both (the larger move).", "2 points", "random vector", 0.0),
}  # fmt: skip
CLAIMS = (
    *(
        Claim(says=says.format(corruption), metric=f"{corruption}: {what}", better=better, than=than, by=by)
        for corruption in CORRUPTIONS for what, (says, better, than, by) in SAYS.items()
    ),
    Claim(
        says="Where fine-tuning moved far (SGD at 0.03 from a poor start), a four-layer patch for contrast costs model "
        "A more of its clean accuracy than where it moved little.",
        metric="clean accuracy kept",
        better="small steps",
        than="large steps",
    ),
)  # fmt: skip
TEST = slice(1078, None)


def run(seed: int) -> dict[str, dict[str, float]]:
    """Digits, a CNN of four convolutions: a common start, two clean models, and for each corruption A's sister."""
    x, y = digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]

    def trained(start: nn.Module, inputs: Tensor, rows: slice, steps: int, rate: Rate) -> nn.Module:
        stream = Batches(x=inputs[rows], y=y[rows], batch_size=64, seed=seed)
        return fit(Plan(model=start, stream=stream, steps=steps, optimizer=rate), device="cpu", seed=seed).model

    def accuracy(weights: Weights, inputs: Tensor) -> float:
        model = _fresh(seed)
        model.load_state_dict(dict(weights))
        with torch.no_grad():
            return float((model(inputs[TEST]).argmax(1) == y[TEST]).float().mean())

    start, small = trained(_fresh(seed), x, slice(0, 300), 400, adamw(2e-3)), adamw(3e-4)
    models = {"A": trained(start, x, slice(300, 700), 200, small), "B": trained(start, x, slice(700, 1078), 200, small)}
    found: dict[str, dict[str, float]] = {"nothing": {f"{c}: {what}": 0.0 for c in CORRUPTIONS for what in SAYS}}
    found |= {arm: {} for arm in ("signature", "random vector", "clean", "robust model")}
    found["2 points"] = {f"{corruption}: moved": 0.02 for corruption in CORRUPTIONS}
    for corruption, corrupt in CORRUPTIONS.items():
        robust = trained(start, corrupt(x), slice(300, 700), 200, small)
        found["robust model"][f"{corruption}: corrupted"] = accuracy(robust.state_dict(), corrupt(x))
        own = {k: _signature(start, models["A"], robust, k) for k in (3, 4)}
        margins: dict[str, list[float]] = {what: [] for what in SAYS}
        for name, model in models.items():
            base = model.state_dict()
            arms = {
                "clean": base,
                "half": patch(base, {corruption: own[3]}, 0.5).weights,
                "three": patch(base, {corruption: own[3]}).weights,
                "four": patch(base, {corruption: own[4]}).weights,
                "random vector": patch(base, {corruption: _random(own[4], seed)}).weights,
            }
            hard = {arm: accuracy(weights, corrupt(x)) for arm, weights in arms.items()}
            easy = {arm: accuracy(weights, x) for arm, weights in arms.items()}
            for arm in arms:
                found.setdefault(arm, {}).update(
                    {f"{corruption}, {name}: corrupted": hard[arm], f"{corruption}, {name}: clean": easy[arm]}
                )
            margins["three layers"].append(hard["three"] - hard["clean"])
            margins["the fourth"].append(hard["four"] - hard["three"])
            margins[f"in order, {name}"].append(float(hard["clean"] < hard["three"] < hard["four"]))
            margins["half"].append(min(hard["half"] - hard["clean"], hard["three"] - hard["half"],
                                       easy["clean"] - easy["half"], easy["half"] - easy["three"]))  # fmt: skip
            margins["moved"].append(-abs(hard["random vector"] - hard["clean"]))
        found["signature"] |= {f"{corruption}: {what}": min(values) for what, values in margins.items()}
        found["random vector"][f"{corruption}: moved"] = -min(margins["moved"])

    four = found["four"]["contrast, A: clean"] - found["clean"]["contrast, A: clean"]
    poor = trained(_fresh(seed), x, slice(0, 300), 100, sgd(0.03))
    clean = trained(poor, x, slice(300, 700), 200, sgd(0.03))
    robust = trained(poor, CORRUPTIONS["contrast"](x), slice(300, 700), 200, sgd(0.03))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of exactly this
        far = patch(clean.state_dict(), {"contrast": _signature(poor, clean, robust, 4)}).weights
    kept = accuracy(far, x) - accuracy(clean.state_dict(), x)
    return found | {"small steps": {"clean accuracy kept": four}, "large steps": {"clean accuracy kept": kept}}


def _signature(start: nn.Module, clean: nn.Module, robust: nn.Module, count: int) -> Signature:
    layers = first_layers(start, torch.zeros(1, 1, 8, 8), count)
    return extract_signature(start.state_dict(), clean.state_dict(), robust.state_dict(), layers)


def _random(signature: Signature, seed: int) -> dict[str, Tensor]:
    """Gaussian tensors of the same norms."""
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in signature.items()}
    return {name: noise[name] / noise[name].norm() * tensor.norm() for name, tensor in signature.items()}


def _fresh(seed: int) -> nn.Module:
    with seeded(seed):
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip
