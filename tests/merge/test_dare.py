"""DARE: unbiased, the same in any parts, and peft's with the same lot."""

from __future__ import annotations

import pytest
import torch

from headstart.core import shards
from headstart.core.validate import Refused
from headstart.merge import Dare, TaskArithmetic, Ties
from headstart.merge.sparsify import uniform
from headstart.testing import contract

test_contract = contract(
    Dare(density=0.5, elect="total", normalise=True),
    known_failures={"copies_give_it_back": "each copy loses other entries"},
    refuses=[lambda: Dare(density=0.0), lambda: Dare(density=1.5)],
)
test_summed = contract(Dare(), known_failures={"copies_give_it_back": "a sum of copies is larger"})


def random_models(k: int = 3, n: int = 4000) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    base = {"a": torch.randn(n, generator=g), "b": torch.randn(7, 5, generator=g)}
    return [{name: w + torch.randn(w.shape, generator=g) for name, w in base.items()} for _ in range(k)], base


def test_density_one_is_task_arithmetic_or_ties():
    models, base = random_models()
    for ours, other in ((Dare(density=1.0), TaskArithmetic(scale=1.0)),
                        (Dare(density=1.0, elect="total", normalise=True), Ties(density=1.0))):  # fmt: skip
        expected = other.merge(models, base=base)
        assert all(torch.equal(value, expected[name]) for name, value in ours.merge(models, base=base).items())


def test_keeps_the_share_asked_and_the_change_on_average():
    models, base = random_models(1, 200_000)
    change = models[0]["a"] - base["a"]
    kept = Dare(density=0.1).merge(models, base=base)["a"] - base["a"]
    nonzero = kept != 0
    assert nonzero.float().mean().item() == pytest.approx(0.1, abs=0.003)  # 4.5 standard errors
    torch.testing.assert_close(kept[nonzero], change[nonzero] * 10, rtol=1e-3, atol=1e-5)
    seeds = [Dare(density=0.1, seed=s).merge(models, base=base)["a"] - base["a"] for s in range(40)]
    error = (torch.stack(seeds).mean(0) - change).square().mean() / change.square().mean()
    assert error.item() == pytest.approx(9 / 40, rel=0.05)  # variance (1 - p) / p a seed: unbiased


def test_models_and_tensors_have_lots_of_their_own_and_copies_share_theirs(monkeypatch):
    models = [{name: torch.ones(2000) * (k + 1) for name in "ab"} | {"t": 2 * torch.ones(2000)} for k in range(2)]
    base = {name: torch.zeros(2000) for name in "abt"}
    alone = [Dare(density=0.5).merge([model], base=base) for model in models]
    assert torch.equal(alone[0]["a"], alone[0]["b"])  # equal in every model: copies
    assert not torch.equal(alone[0]["a"] != 0, alone[0]["t"] != 0)
    both = Dare(density=0.5).merge(models, base=base)["a"]
    assert set(both.tolist()) == {0, 2, 4, 6}  # all four cases: the lots are independent
    monkeypatch.setattr(shards, "PART", 7)
    assert torch.equal(Dare(density=0.5).merge(models, base=base)["a"], both)


@pytest.mark.parametrize("elect", [None, "total"])
def test_equals_peft_with_the_same_lot(monkeypatch, elect):
    peft = pytest.importorskip("peft.utils.merge_utils")
    models, base = random_models()
    merged = Dare(density=0.3, elect=elect, normalise=elect is not None, seed=4).merge(models, base=base)
    theirs = peft.dare_ties if elect else peft.dare_linear
    for name in base:
        lots = iter([uniform(f"4 {k} {name}", 0, base[name].numel()).view_as(base[name]) < 0.3 for k in range(3)])
        monkeypatch.setattr(torch, "bernoulli", lambda _, lots=lots: next(lots).float())
        change = theirs([m[name] - base[name] for m in models], torch.ones(3), 0.3)
        torch.testing.assert_close(merged[name], base[name] + change, rtol=1e-5, atol=1e-5)


def test_refusals():
    with pytest.raises(Refused, match=r"Dare needs base="):
        Dare().merge(random_models()[0])
    with pytest.raises(Refused, match="must be finite"):
        Dare(density=0.01).merge([{"w": torch.full((50,), torch.nan)}], base={"w": torch.zeros(50)})
