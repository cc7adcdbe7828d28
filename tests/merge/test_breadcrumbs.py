"""Breadcrumbs: the middle of the magnitudes, restated with a sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.core.validate import Refused
from headstart.merge import Breadcrumbs, TaskArithmetic, Ties
from headstart.testing import contract

test_contract = contract(
    Breadcrumbs(density=0.9, outliers=0.0, normalise=True, elect="total"),
    known_failures={"copies_give_it_back": "a thinned change is not the whole change"},
    refuses=[lambda: Breadcrumbs(density=0.0), lambda: Breadcrumbs(density=0.9, outliers=0.2),
             lambda: Breadcrumbs(outliers=-0.1), lambda: Breadcrumbs(trim="layer")],
)  # fmt: skip
test_summed = contract(Breadcrumbs(), known_failures={"copies_give_it_back": "a sum of copies is larger"})


def slow(change: torch.Tensor, density: float, outliers: float) -> torch.Tensor:
    order = change.abs().argsort(descending=True, stable=True)
    most = int(outliers * len(change))
    kept = order[most : most + max(1, int(density * len(change)))]
    return torch.zeros_like(change).scatter(0, kept, change[kept])


@given(seed=st.integers(0, 999), density=st.floats(0.05, 0.6), outliers=st.floats(0, 0.4), n=st.integers(1, 60),
       coarse=st.booleans())  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_equals_a_sort(seed, density, outliers, n, coarse):
    taus = torch.randn(3, n, generator=torch.Generator().manual_seed(seed))
    taus = taus.round() if coarse else taus
    rule = Breadcrumbs(density=density, outliers=outliers)
    merged = rule.merge([{"w": tau} for tau in taus], base={"w": torch.zeros(n)})["w"]
    expected = sum(slow(tau.double(), density, outliers) for tau in taus)
    torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=1e-6)


def test_small_tensors_keep_their_change_though_they_have_no_outlier():
    base, model = {"w": torch.zeros(40), "s": torch.tensor(0.0)}, {"w": torch.arange(40.0), "s": torch.tensor(3.0)}
    merged = Breadcrumbs(density=0.5, outliers=0.01).merge([model], base=base)
    assert merged["s"].item() == 3
    assert int((merged["w"] != 0).sum()) == 20
    assert merged["w"][39] == 39


def test_limits():
    g = torch.Generator().manual_seed(1)
    models, base = [{"w": torch.randn(30, generator=g)} for _ in range(3)], {"w": torch.zeros(30)}
    whole = Breadcrumbs(density=1.0, outliers=0.0).merge(models, base=base)
    assert torch.equal(whole["w"], TaskArithmetic(scale=1.0).merge(models, base=base)["w"])
    elected = Breadcrumbs(density=0.4, outliers=0.0, elect="total", normalise=True).merge(models, base=base)
    assert torch.equal(elected["w"], Ties(density=0.4, trim="tensor").merge(models, base=base)["w"])
    with pytest.raises(Refused, match="Breadcrumbs needs base="):
        Breadcrumbs().merge(models)
