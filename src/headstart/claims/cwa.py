"""Going from surrogate to surrogate finds examples that fool all at once, whatever the scale of their logits."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import torch

from headstart.attack.cwa import CWA
from headstart.attack.cwa import PAPER as PAPER
from headstart.attack.ensemble import fused
from headstart.attack.mifgsm import MIFGSM
from headstart.core.ascent import misclassify
from headstart.core.claim import Claim
from headstart.measure.agreement import agreement, sharpness

from .transfer_attack_baselines import ENSEMBLES, RADIUS, fooled, sharper, trained

HELD_OUT = "held-out models fooled"
CLAIMS = (
    Claim(says="All three surrogates err on at least two points more of the examples than after MI-FGSM on averaged "
          "logits with the same steps of radius / 5: UCI digits, radius 0.15, mean of three ensembles.",
          metric="all fooled", better="CWA", than="averaged logits, radius / 5", by=0.02, seeds=3),
    Claim(says="All three surrogates err on more of the examples than after MI-FGSM on averaged logits (less refutes "
          "the mechanism).", metric="all fooled", better="CWA", than="averaged logits, radius / 5", seeds=3),
    Claim(says="Averaged logits, in steps of radius / 10, fool held-out models at least ten points less when those of "
          "the transformer are six times larger.",
          metric=HELD_OUT, better="averaged logits", than="averaged logits, one sharper", by=0.1, seeds=3),
    Claim(says="CWA fools held-out models at most three points less when the transformer's logits are six times "
          "larger.", metric=HELD_OUT, better="CWA, one sharper", than="CWA", by=-0.03, seeds=3),
)  # fmt: skip
NOTE = (
    "Neither of the two properties that the paper builds on is seen here: the members' gradients do not agree more at "
    "these examples than at those of averaged logits, the loss is not flatter, and the step back changes next to "
    "nothing (see the arms CSE alone and SAM alone). What remains is the sweep along normalised gradients, in which no "
    "member can be silenced. Seed 0: with the code's beta 0.566 all fooled and 0.505 held out, in random order 0.554 "
    "and 0.512, as written 0.570 and 0.504."
)
STEPS = CWA(radius=RADIUS, beta_rms=0.129 * RADIUS / (16 / 255))


def run(seed: int) -> dict[str, dict[str, float]]:
    """Means over three ensembles of three, each judged by its own members and by the five models outside it."""
    models, x, y = trained(seed)
    found: dict[str, dict[str, list[float]]] = {}
    for ensemble in ENSEMBLES:
        own = {name: models[name] for name in ensemble}
        victims = [model for name, model in models.items() if name not in ensemble]
        for suffix, members in (("", list(own.values())), (", one sharper", sharper(own))):
            goals, together = [misclassify(model, y) for model in members], [fused(members, y)]
            moved = {
                "CWA": STEPS.perturb(x, goals),
                "averaged logits": MIFGSM(radius=RADIUS).perturb(x, together),
            }
            if not suffix:
                steps = MIFGSM(radius=RADIUS, step_size=RADIUS / 5)
                moved["averaged logits, radius / 5"] = steps.perturb(x, together)
                moved["CSE alone"] = replace(STEPS, reverse=0.0).perturb(x, goals)
                moved["SAM alone"] = CWA(radius=RADIUS, sweep=False, reverse=RADIUS / 10).perturb(x, goals)
            for arm, inputs in moved.items():
                values = found.setdefault(arm + suffix, {})
                wrong = torch.stack([model(inputs).argmax(1) != y for model in members])
                measured = {
                    "all fooled": float(wrong.all(0).float().mean()),
                    "hardest member fooled": min(fooled(members, x, inputs, y)),
                    HELD_OUT: fmean(fooled(victims, x, inputs, y)),
                }
                if not suffix:
                    measured["mean cosine of gradients"] = agreement(goals, inputs).mean
                    measured["sharpness"] = float(sharpness(goals, inputs, radius=RADIUS / 15, steps=5).mean())
                for metric, value in measured.items():
                    values.setdefault(metric, []).append(value)
    return {arm: {m: fmean(v) for m, v in metrics.items()} for arm, metrics in found.items()}
