"""Average: known answers, and the same as numpy's weighted average."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headstart.core.validate import Refused
from headstart.merge import Average
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
