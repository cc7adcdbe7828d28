"""Surgery works on copies that share what is frozen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headstart.core.rng import random_state
from headstart.core.surgery import clone, freeze, head_of, matching, replace_layers, with_head
from headstart.core.validate import Refused
from headstart.testing.subject import difference, snapshot


def model() -> nn.ModuleDict:
    made = nn.ModuleDict(
        {
            "embed": nn.Embedding(5, 4),
            "attention": nn.ModuleDict({"query": nn.Linear(4, 4), "value": nn.Linear(4, 4)}),
            "head": nn.Linear(4, 5),
        }
    )
    made["head"].weight = made["embed"].weight
    return made


def test_clone_copies_what_trains_and_shares_what_is_frozen() -> None:
    old = model()
    old["attention"]["query"].weight.requires_grad = False
    new = clone(old)
    assert new["attention"]["query"].weight is old["attention"]["query"].weight
    assert new["attention"]["value"].weight is not old["attention"]["value"].weight
    assert torch.equal(new["attention"]["value"].weight, old["attention"]["value"].weight)
    assert new["head"].weight is new["embed"].weight  # tied weights stay tied


def test_freeze_shares_storage_keeps_ties_and_leaves_the_original_trainable() -> None:
    old = model()
    new = freeze(old)
    assert not any(p.requires_grad for p in new.parameters())
    assert all(p.requires_grad for p in old.parameters())
    assert new["head"].weight is new["embed"].weight
    assert new["head"].weight.data_ptr() == old["head"].weight.data_ptr()


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*", ["attention.query", "attention.value", "head"]),
        ("attention.*", ["attention.query", "attention.value"]),
        ("*.query, head", ["attention.query", "head"]),
    ],
)
def test_matching_patterns(pattern: str, found: list[str]) -> None:
    assert matching(model(), pattern, nn.Linear) == found


def test_matching_refuses_and_names_what_there_is() -> None:
    with pytest.raises(Refused, match=r"class Linear; got no match. Did you mean 'attention.query'"):
        matching(model(), "attention.qeury", nn.Linear)
    with pytest.raises(Refused, match=r"Choose from: attention.query, attention.value, head"):
        matching(model(), "zzz", nn.Linear)
    with pytest.raises(Refused, match=r"Conv2d or LSTM; got no match. Choose from: none"):
        matching(model(), "*", (nn.Conv2d, nn.LSTM))


def test_replace_layers_leaves_the_original_and_reaches_nested_names() -> None:
    old = model()
    before = snapshot(old)
    new = replace_layers(old, ["attention.value", "head"], lambda layer: nn.Sequential(layer))
    assert not difference(before, snapshot(old))
    assert isinstance(new["attention"]["value"], nn.Sequential)
    assert isinstance(old["attention"]["value"], nn.Linear)
    assert new["head"][0].weight is new["embed"].weight


def test_head_of_is_the_last_linear() -> None:
    assert head_of(model()) == "head"
    with pytest.raises(Refused, match="class Linear"):
        head_of(nn.Sequential(nn.ReLU()))


def test_with_head_draws_nothing_and_scores_all_classes_alike() -> None:
    old = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    state, before = random_state(), snapshot(old)
    new = with_head(old, 7)
    assert not difference(state, random_state())
    assert not difference(before, snapshot(old))
    output = new(torch.randn(2, 4).double())
    assert output.shape == (2, 7)
    assert output.dtype == torch.float64
    assert torch.equal(output, torch.zeros_like(output))
    assert new[2].weight.requires_grad
    assert with_head(old, 2, head="0")[0].out_features == 2


def test_with_head_refuses() -> None:
    old = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    with pytest.raises(Refused, match="classes >= 1"):
        with_head(old, 0)
    with pytest.raises(Refused, match="must be a linear layer; got 1"):
        with_head(old, 2, head="1")
    with pytest.raises(Refused, match="A layer must exist"):
        with_head(old, 2, head="haed")
