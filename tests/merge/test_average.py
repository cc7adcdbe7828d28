"""Average: known answers, and the same as numpy's weighted average."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headstart.core.validate import Refused
from headstart.merge import Average, greedy_soup
from headstart.testing import contract

test_contract = contract(Average(), refuses=[lambda: Average(weights=(0.0, 0.0))])

W = [{"w": torch.randn(3, 4, generator=torch.Generator().manual_seed(k)), "n": torch.tensor(k)} for k in range(3)]


def test_equals_numpys_weighted_average():
    merged = Average(weights=(1.0, 2.0, 5.0)).merge(W)["w"]
    expected = np.average([w["w"].numpy() for w in W], axis=0, weights=[1, 2, 5])
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-6)


def test_only_the_ratio_of_the_weights_counts():
    torch.testing.assert_close(Average(weights=(1, 3)).merge(W[:2]), Average(weights=(2, 6)).merge(W[:2]))


def test_all_weight_on_one_model_gives_it_back():
    assert torch.equal(Average(weights=(0, 1, 0)).merge(W)["w"], W[1]["w"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("copies", [1, 2, 3, 7])
def test_copies_give_the_model_back(dtype, copies):
    model = {"w": W[0]["w"].to(dtype)}
    merged = Average().merge([model] * copies)["w"]
    assert merged.dtype == dtype
    torch.testing.assert_close(merged, model["w"], rtol=1e-15 if dtype == torch.float64 else 0, atol=0)


def test_half_precision_is_averaged_in_higher_precision():
    # in bfloat16 256 + 1 is 256 again, and the six ones would be lost
    models = [{"w": torch.tensor([x], dtype=torch.bfloat16)} for x in (256.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)]
    assert Average().merge(models)["w"].item() == torch.tensor(262 / 7).bfloat16().item()


def test_integers_come_from_the_base_else_the_first_model():
    assert Average().merge(W)["n"] == 0
    assert Average().merge(W[1:], base=W[2])["n"] == 2


def test_knows_when_the_order_of_models_matters():
    assert Average().symmetric
    assert Average(weights=(2, 2)).symmetric
    assert not Average(weights=(1, 2)).symmetric


@pytest.mark.parametrize("weights", [(), (0.0, 0.0), (1.0, -1.0), (float("nan"), 1.0), (float("inf"), 1.0)])
def test_refuses_weights_that_are_no_shares(weights):
    with pytest.raises(Refused, match="Average needs"):
        Average(weights=weights).merge(W[:2])


def test_refuses_a_wrong_number_of_weights_and_unused_importance():
    with pytest.raises(Refused, match="one weight for each of 3 models; got 2"):
        Average(weights=(1, 2)).merge(W)
    with pytest.raises(Refused, match="importance"):
        Average().merge(W, importance=W)


def test_greedy_soup_takes_what_helps_best_first_and_never_ends_below_the_best():
    g = torch.Generator().manual_seed(0)
    centre = torch.randn(6, generator=g)
    models = [{"w": centre + torch.randn(6, generator=g), "n": torch.tensor(k)} for k in range(7)]

    def score(weights):
        return -float((weights["w"] - centre).square().sum())

    soup, taken = greedy_soup(models, score)
    alone = [score(model) for model in models]
    assert taken[0] == alone.index(max(alone))
    assert score(soup) >= max(alone)
    torch.testing.assert_close(soup["w"], Average().merge([models[k] for k in taken])["w"])
    for k in set(range(7)) - set(taken):  # each was left out because it made the soup of its time worse
        before = [j for j in taken if alone[j] > alone[k]]
        assert score(Average().merge([models[j] for j in (*before, k)])) < score(
            Average().merge([models[j] for j in before])
        )
    with pytest.raises(Refused, match="finite scores"):
        greedy_soup(models, lambda _: float("nan"))
    with pytest.raises(Refused, match="at least one model"):
        greedy_soup([], score)
