"""Task arithmetic: limits, negation, and the sum it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headstart.core.validate import Refused
from headstart.merge import Average, TaskArithmetic
from headstart.testing import contract

test_contract = contract(
    TaskArithmetic(scale=1.0),
    known_failures={"copies_give_it_back": "three copies add their change three times"},
    refuses=[lambda: TaskArithmetic(scale=float("inf")), lambda: TaskArithmetic(weights=(0.0, 0.0))],
)
test_normalised = contract(TaskArithmetic(scale=1.0, normalise=True))

BASE = {"w": torch.tensor([1.0, 2.0, 3.0])}
MODELS = [{"w": torch.tensor([2.0, 2.0, 1.0])}, {"w": torch.tensor([1.0, 5.0, 1.0])}]


@given(scale=st.floats(-3, 3, width=32), weights=st.tuples(st.floats(-2, 2, width=32), st.floats(0.5, 2, width=32)))
def test_is_the_weighted_sum_of_the_changes(scale, weights):
    expected = BASE["w"] + scale * sum(w * (m["w"] - BASE["w"]) for w, m in zip(weights, MODELS, strict=True))
    merged = TaskArithmetic(scale=scale, weights=weights).merge(MODELS, base=BASE)["w"]
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)


def test_limits():
    one = TaskArithmetic(scale=1.0).merge(MODELS[:1], base=BASE)
    assert torch.equal(one["w"], MODELS[0]["w"])
    forgotten = TaskArithmetic(scale=1.0, weights=(-1.0,)).merge(MODELS[:1], base=BASE)
    assert forgotten["w"].tolist() == [0, 2, 5]
    mean = TaskArithmetic(scale=1.0, normalise=True).merge(MODELS, base=BASE)
    assert torch.equal(mean["w"], Average().merge(MODELS)["w"])


def test_refusals():
    with pytest.raises(Refused, match=r"TaskArithmetic needs base=.*got None"):
        TaskArithmetic().merge(MODELS)
    with pytest.raises(Refused, match="one weight for each of 2 models; got 3"):
        TaskArithmetic(weights=(1.0, 1.0, 1.0)).merge(MODELS, base=BASE)
    with pytest.raises(Refused, match="sum is not 0"):
        TaskArithmetic(weights=(1.0, -1.0), normalise=True).merge(MODELS, base=BASE)
