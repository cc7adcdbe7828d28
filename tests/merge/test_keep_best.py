"""The best of what was tried comes out, the start among it; gradients are clipped after unscaling."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.core.loop import fit
from headstart.core.plan import Plan, Step, Term, sgd
from headstart.core.rng import random_state
from headstart.core.stream import Batch
from headstart.core.validate import Refused
from headstart.merge.keep_best import KeepBest, clipped
from headstart.testing import contract
from headstart.testing.material import digits
from headstart.testing.subject import difference


def right(model: nn.Module) -> float:
    """Minus the loss on some digits."""
    x, y = digits()
    return -F.cross_entropy(model(x[:64]), y[:64]).item()


test_contract = contract(
    KeepBest(score=right),
    kind="tactic",
    known_failures={"paper_complete": "a part of aTLAS, whose paper is in atlas.py"},
)


class Fall(Term):
    """Pushes the weight of a 1 x 1 layer down by the learning rate at each step."""

    def forward(self, step: Step) -> Tensor:
        return step.run(step.batch.x).output.sum()


def plan(steps: int = 8) -> Plan:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 5.0)
    return Plan(
        model=model, stream=[Batch(torch.ones(1, 1))], terms={"fall": Fall()}, steps=steps, optimizer=sgd(1.0, 0.0)
    )


def weight(model: nn.Module) -> float:
    return model.weight.item()


@pytest.mark.parametrize(("aim", "every", "found"), [(3.0, 1, 3.0), (1.5, 2, 1.0), (9.0, 1, 5.0), (-9.0, 1, -3.0)])
def test_the_best_look_wins_and_the_start_is_one(aim, every, found):
    tactic = KeepBest(score=lambda model: -abs(weight(model) - aim), every=every)
    kept = tactic(plan())
    assert weight(fit(kept, device="cpu").model) == found
    assert weight(fit(kept, device="cpu").model) == found  # a plan can be run again
    assert weight(fit(plan(), device="cpu").model) == -3.0


def test_the_start_is_kept_where_nothing_is_allowed_or_better():
    for score in (lambda _model: -math.inf, lambda _model: 0.0):
        assert weight(fit(KeepBest(score=score, every=1)(plan()), device="cpu").model) == 5.0


def test_resumed_is_unbroken(tmp_path):
    kept = KeepBest(score=lambda model: -abs(weight(model) - 4.0), every=1)

    def stop(step: int, _steps: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(kept(plan()), device="cpu", checkpoint=tmp_path / "state", every=3, progress=stop)
    assert weight(fit(kept(plan()), device="cpu", checkpoint=tmp_path / "state", resume=True).model) == 4.0


def test_looking_changes_nothing():
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 1))
    seen = []

    def score(model: nn.Module) -> float:
        assert not model.training
        seen.append(torch.rand(3))
        return model(torch.ones(2, 1)).sum().item()

    plain = replace(plan(), model=model, stream=[Batch(torch.ones(4, 1))], optimizer=sgd(0.1))
    before = random_state()
    losses = [fit(p, device="cpu").losses for p in (plain, KeepBest(score=score, every=2)(plain))]
    assert torch.equal(*losses)
    assert len(seen) == 5
    assert not difference(before, random_state())


@pytest.mark.parametrize(("norm", "length"), [(1.0, 1.0), (100.0, 50.0)])
def test_the_gradient_is_shortened_as_a_whole(norm, length):
    pair = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    pair[0].grad, pair[1].grad = torch.tensor([30.0]), torch.tensor([40.0])
    clipped(sgd(1.0), norm)(pair).step()
    torch.testing.assert_close(
        torch.cat([p.data for p in pair]), torch.tensor([-0.6, -0.8]) * length, rtol=1e-5, atol=0
    )


def test_refusals():
    with pytest.raises(Refused, match="every >= 1"):
        KeepBest(score=weight, every=0)
    with pytest.raises(Refused, match="norm > 0"):
        clipped(sgd(), 0.0)
    with pytest.raises(Refused, match="a score that is a number; got nan"):
        fit(KeepBest(score=lambda _model: math.nan)(plan()), device="cpu")
