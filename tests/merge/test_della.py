"""DELLA: chances by rank, unbiased, and DARE where they are equal."""

from __future__ import annotations

import pytest
import torch

from headstart.core.validate import Refused
from headstart.merge import Dare, Della, Ties
from headstart.testing import contract

test_contract = contract(
    Della(),
    known_failures={"copies_give_it_back": "each copy loses other entries"},
    refuses=[lambda: Della(density=0.1), lambda: Della(density=0.9), lambda: Della(spread=-0.1)],
)


def test_chances_rise_with_the_rank_inside_each_row():
    change = torch.stack([torch.arange(1.0, 6.0), 100 * torch.arange(5.0, 0.0, -1.0)]).repeat(20_000, 1)
    kept = (Della(density=0.5, spread=0.4).thin(change, "x") != 0).float()
    expected = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    torch.testing.assert_close(kept[::2].mean(0), expected, rtol=0, atol=0.02)
    torch.testing.assert_close(kept[1::2].mean(0), expected.flip(0), rtol=0, atol=0.02)


def test_is_unbiased():
    change = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    mean = torch.stack([Della(density=0.5, spread=0.3, seed=s).thin(change, "x") for s in range(2000)]).mean(0)
    assert ((mean - change) / change).abs().max().item() < 0.25  # five standard errors where 0.2 is kept
    assert ((mean - change) / change).mean().abs().item() < 0.005


def test_without_spread_the_lot_is_dares_and_density_one_is_ties():
    g = torch.Generator().manual_seed(1)
    base = {"w": torch.randn(6, 9, generator=g)}
    models = [{"w": base["w"] + torch.randn(6, 9, generator=g)} for _ in range(3)]
    ours = Della(density=0.4, spread=0.0, seed=3).merge(models, base=base)["w"]
    dares = Dare(density=0.4, elect="total", normalise=True, seed=3).merge(models, base=base)["w"]
    torch.testing.assert_close(ours, dares)
    whole = Della(density=1.0, spread=0.0).merge(models, base=base)["w"]
    assert torch.equal(whole, Ties(density=1.0).merge(models, base=base)["w"])
    with pytest.raises(Refused, match="Della needs base="):
        Della().merge(models)
