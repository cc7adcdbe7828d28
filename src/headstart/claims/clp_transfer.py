"""A small helper's geometry places the rows of a new vocabulary so well that little training is left to do."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from headstart.core.claim import Claim
from headstart.core.loop import fit
from headstart.core.plan import Plan, Step
from headstart.core.stream import Batches
from headstart.core.validate import Refused
from headstart.language import NextToken, windows
from headstart.language.bits import nats
from headstart.merge.clp_transfer import PAPER as PAPER
from headstart.merge.clp_transfer import clp_transfer

from .feed_forward import fresh

_holds = partial(Claim, than="nothing", by=0.99, seeds=3)
CLAIMS = (
    _holds(
        says="After 0, 25 and 100 steps each way of weighting has a lower held-out loss than copying the overlap only, "
        "than training from scratch and than the helper's rows dealt out wrongly, in every seed.",
        metric="ahead throughout",
        better="CLP",
    ),
    _holds(
        says="topk and softmax after 25 steps are ahead of training from scratch after 300, in every seed.",
        metric="25 steps beat 300",
        better="CLP",
    ),
    _holds(
        says="The paper's weights on this helper, whose rows are centred, are refused and not exploded, in every seed.",
        metric="guarded",
        better="paper",
    ),
)
TOKENS, CLASSES, STEPS = 300, 15, (0, 25, 100, 300)


def language(n: int, generator: torch.Generator, process: tuple[Tensor, Tensor]) -> Tensor:
    """n tokens: classes follow a chain, each class says tokens of its own."""
    chain, words = (p.cumsum(-1)[:, :-1].tolist() for p in process)  # the last edge is 1
    said, now = [], 0
    for a, b in torch.rand(n, 2, generator=generator).tolist():
        now = bisect(chain[now], a)
        said.append(now * (TOKENS // CLASSES) + bisect(words[now], b))
    return torch.tensor(said)


def dirichlet(rows: int, width: int, alpha: float, seed: int) -> Tensor:
    """Rows of probabilities."""
    import numpy as np

    return torch.tensor(np.random.default_rng(seed).dirichlet([alpha] * width, rows), dtype=torch.float32)


def trained(
    model: nn.Module, text: Tensor, steps: int, rate: float, seed: int, look: Callable[[nn.Module], float]
) -> tuple[nn.Module, list[float]]:
    """Adam at a constant rate, and what `look` saw after STEPS."""
    x, y = windows(text.tolist(), start=0, length=1, overlap=2)
    seen = [look(model)]

    def watch(step: Step) -> None:
        if round(step.progress * steps) + 1 in STEPS:
            seen.append(look(step.model))

    plan = Plan(model=model, stream=Batches(x=x, y=y, batch_size=128, seed=seed), terms={"text": NextToken()},
                steps=steps, optimizer=lambda params: torch.optim.Adam(params, rate), after_step=(watch,))  # fmt: skip
    return fit(plan, device="cpu", seed=seed).model, seen


def run(seed: int) -> dict[str, dict[str, float]]:
    """The target is the source language with every token renamed; half of the names are the source's."""
    process = dirichlet(CLASSES, CLASSES, 0.15, seed), dirichlet(CLASSES, TOKENS // CLASSES, 0.7, 1000 + seed)
    generator = torch.Generator().manual_seed(seed)
    source, target, held = (language(n, generator, process) for n in (60_000, 25_000, 10_000))
    order = torch.randperm(TOKENS, generator=generator)  # the target's row of each token
    names = [f"both {k}" if k % 2 else f"source {k}" for k in range(TOKENS)]
    theirs = {name: k for k, name in enumerate(names)}
    ours = {name.replace("source", "target"): int(order[k]) for k, name in enumerate(names)}
    target, held = order[target], order[held]
    x, y = windows(held.tolist(), start=0, length=10_000, overlap=2)

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        total, count = nats(model(x), y)
        return float(total / count)

    large, _ = trained(fresh(TOKENS, 2, 64, 256, seed, tied=True), source, 1500, 3e-3, seed, lambda _: 0.0)
    helper, _ = trained(fresh(TOKENS, 2, 24, 48, seed, tied=True), target, 1000, 3e-3, seed, loss)
    rows = helper.get_parameter("embed.weight").detach()
    missing = torch.tensor([row for name, row in ours.items() if name not in theirs])
    shuffled, blank = rows.clone(), rows.clone()
    shuffled[missing] = rows[missing[torch.randperm(len(missing), generator=generator)]]
    blank[missing] = 0  # resembles nothing, so it stays random

    place = partial(clp_transfer, large, theirs, helper_vocabulary=ours, seed=seed)
    starts = {arm: place(helper=rows, weighting=arm)[0] for arm in ("topk", "relu", "softmax")}
    starts |= {"shuffled": place(helper=shuffled)[0], "overlap only": place(helper=blank)[0]}
    starts["scratch"] = fresh(TOKENS, 2, 64, 256, 100 + seed, tied=True)
    seen = {arm: trained(start, target, 300, 1e-3, seed, loss)[1] for arm, start in starts.items()}
    arms = {
        arm: {f"minus loss at {at}": -v for at, v in zip(STEPS, losses, strict=True)} for arm, losses in seen.items()
    }
    leads = [min(seen[c][k] for c in ("shuffled", "overlap only", "scratch")) - max(seen[w][k] for w in
             ("topk", "relu", "softmax")) for k in range(3)]  # fmt: skip
    early = max(seen["topk"][1], seen["softmax"][1])
    arms["CLP"] = {"least lead": min(leads), "ahead throughout": float(min(leads) > 0),
                   "25 steps beat 300": float(early < seen["scratch"][3])}  # fmt: skip
    arms["helper"] = {"minus loss alone": -loss(helper)}
    try:
        place(helper=rows, weighting="paper")
        guarded = 0.0
    except Refused:
        guarded = 1.0
    arms["paper"] = {"guarded": guarded}
    arms["nothing"] = {"ahead throughout": 0.0, "25 steps beat 300": 0.0, "guarded": 0.0}
    return arms
