"""What fine-tuning changed in one version of a model serves the next version of the same run, and no other model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.core.claim import Claim
from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.core.weights import Weights
from headstart.merge.barrier import connectivity
from headstart.merge.finetuning_transfer import PAPER as PAPER
from headstart.merge.finetuning_transfer import DiffTransfer
from headstart.testing.material import digits

CLAIMS = (
    Claim(
        says="Version 2 continues version 1's training: with the change that fine-tuning made in version 1 it does the "
        "new task 50 points better than without.",
        metric="accuracy",
        better="version 2 + change",
        than="version 2",
        by=0.5,
    ),
    Claim(
        says="That is within 15 points of fine-tuning version 2 itself.",
        metric="accuracy",
        better="version 2 + change",
        than="version 2, fine-tuned",
        by=-0.15,
    ),
    Claim(
        says="A model of the same size trained from another start gains less than 10 points from the same change.",
        metric="accuracy",
        better="other start",
        than="other start + change",
        by=-0.1,
    ),
    Claim(
        says="Halfway to the model of the other start, accuracy on what both know falls by more than 5 points.",
        metric="accuracy lost halfway",
        better="version 1 to other start",
        than="nothing",
        by=0.05,
    ),
    Claim(
        says="Between the two versions there is no barrier: the loss rises by less than 0.01 above the straight line.",
        metric="- barrier",
        better="version 1 to version 2",
        than="nothing",
        by=-0.01,
    ),
    Claim(
        says="All five statements hold on every seed.",
        metric="all hold",
        better="this seed",
        than="nothing",
        by=0.999,
    ),
    Claim(
        says="After 30 steps on 50 examples, version 2 is 20 points better when it starts with the change.",
        metric="accuracy after 30 steps",
        better="version 2 + change",
        than="version 2",
        by=0.2,
    ),
)
NOTE = (
    "On seed 2 the model halfway to the other start loses 3.3 points of accuracy and not 5, so one statement of five "
    "fails there; its loss rises by 0.58 above the line, as on the other seeds (0.56 to 0.93), and nothing "
    "transfers to it. The other four hold on every seed."
)


def run(seed: int) -> dict[str, dict[str, float]]:
    """The card's setting: digits as pretraining, digits moved by one pixel each way as the new task."""
    x, y = digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    x, y, cut = x[order], y[order], int(0.6 * len(y))
    moved = x.roll((1, 1), (2, 3))
    half, train, test = slice(0, cut // 2), slice(0, cut), slice(cut, None)

    def trained(start: nn.Module, inputs: Tensor, rows: slice, steps: int = 300) -> nn.Module:
        stream = Batches(x=inputs[rows], y=y[rows], batch_size=64, seed=seed)
        return fit(Plan(model=start, stream=stream, steps=steps, optimizer=adamw(1e-3)), device="cpu", seed=seed).model

    first = trained(_fresh(seed), x, half)
    second = trained(first, x, slice(cut // 2, cut))
    other = trained(_fresh(1000 + seed), x, train, 600)
    tuned = {"version 1": trained(first, moved, train), "version 2": trained(second, moved, train)}

    def carried(model: nn.Module) -> nn.Module:
        return _with(DiffTransfer().merge([tuned["version 1"].state_dict(), first.state_dict()],
                                          base=model.state_dict()))  # fmt: skip

    def on(model: nn.Module, inputs: Tensor = moved) -> float:
        return _accuracy(model(inputs[test]), y[test])

    def line(model: nn.Module) -> dict[str, float]:
        ends = first.state_dict(), model.state_dict()
        loss = connectivity(*ends, lambda w: F.cross_entropy(_with(w)(x[test]), y[test]).item())
        lost = connectivity(*ends, lambda w: -_accuracy(_with(w)(x[test]), y[test]), points=3)
        return {"- barrier": -loss.barrier, "accuracy lost halfway": lost.excess[1]}

    few = slice(0, 50)
    found = {
        "version 2": {
            "accuracy": on(second), "accuracy after 30 steps": on(trained(second, moved, few, 30))
        },
        "version 2 + change": {
            "accuracy": on(carried(second)), "accuracy after 30 steps": on(trained(carried(second), moved, few, 30))
        },
        "version 2, fine-tuned": {"accuracy": on(tuned["version 2"])},
        "version 1, fine-tuned": {"accuracy": on(tuned["version 1"])},
        "other start": {"accuracy": on(other)},
        "other start + change": {"accuracy": on(carried(other))},
        "version 1 to version 2": line(second),
        "version 1 to other start": line(other),
        "nothing": {"accuracy lost halfway": 0.0, "- barrier": 0.0, "all hold": 0.0},
    }  # fmt: skip
    each = [found[c.better][c.metric] - found[c.than][c.metric] > c.by for c in CLAIMS[:5]]
    return found | {"this seed": {"all hold": float(all(each))}}


def _fresh(seed: int) -> nn.Module:
    with seeded(seed):
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )


def _with(weights: Weights) -> nn.Module:
    model = _fresh(0)
    model.load_state_dict(dict(weights))
    return model.eval().requires_grad_()


def _accuracy(logits: Tensor, y: Tensor) -> float:
    return (logits.argmax(1) == y).float().mean().item()
