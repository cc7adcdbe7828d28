"""TIES: the card's known answers, a slow restatement, peft, and properties over random models."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headstart.core.validate import Refused
from headstart.core.weights import LazyWeights, merge_streaming, save_weights
from headstart.merge import Average, Ties
from headstart.testing import contract

test_contract = contract(
    Ties(density=0.2),
    known_failures={"copies_give_it_back": "a trimmed change is not the whole change (card, answer 4)"},
    refuses=[lambda: Ties(density=0), lambda: Ties(density=1.5)],
)
test_by_tensor = contract(Ties(density=1.0, trim="tensor", combine="max"))
test_sum = contract(
    Ties(density=1.0, combine="sum"),
    known_failures={"copies_give_it_back": "a sum of copies is larger (card, answer 5)"},
)

TAU = [[5, -1, 0.1, 3, 0], [-2, -4, 0.2, 3, 0.5], [1, 6, -0.3, -1.5, -0.4]]


def merged(taus, rule, split=(5,)) -> list[float]:
    """The merged change of task vectors around a base of zeros, cut into tensors of the sizes `split`."""
    models = [dict(zip("abc", torch.tensor(tau, dtype=torch.float32).split(list(split)), strict=False)) for tau in taus]
    base = {name: torch.zeros_like(value) for name, value in models[0].items()}
    return torch.cat(list(rule.merge(models, base=base).values())).tolist()


def slow(taus: Tensor, density: float, combine: str = "mean") -> Tensor:
    """Algorithm 1 on a flat (k, d) matrix without equal magnitudes, in float64."""
    taus = taus.double()
    kept = int(density * taus.shape[1])
    edge = taus.abs().kthvalue(taus.shape[1] - kept + 1, dim=1, keepdim=True).values
    taus = torch.where(taus.abs() >= edge, taus, 0.0)
    sign = taus.sum(0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    out = torch.zeros_like(sign)
    for p in range(len(out)):
        agree = [float(tau[p]) for tau in taus if tau[p] != 0 and tau[p].sign() == sign[p]]
        if agree:
            out[p] = {"mean": sum(agree) / len(agree), "sum": sum(agree), "max": max(agree, key=abs)}[combine]
    return out


def random_models(seed: int, k: int = 3, dtype=torch.float32) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"scalar": (), "empty": (0, 3), "bias": (7,), "weight": (11, 13), "kernel": (3, 2, 2, 2)}
    base = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
    models = [
        {name: (w + 0.1 * torch.randn(w.shape, generator=g)).to(dtype) for name, w in base.items()} for _ in range(k)
    ]
    for position, weights in enumerate([base, *models]):
        weights["steps"] = torch.tensor(position)
    return models, base


def flat(weights) -> Tensor:
    return torch.cat([w.flatten() for w in weights.values() if w.is_floating_point()])


# known answers of the card, by number


@pytest.mark.parametrize("split", [(5,), (2, 3), (1, 0, 4)])
@pytest.mark.parametrize(("combine", "answer"), [("mean", [5, 6, 0, 3, 0]), ("sum", [5, 6, 0, 6, 0])])
def test_1_worked_example_however_the_model_is_cut(combine, answer, split):
    assert merged(TAU, Ties(density=0.4, combine=combine), split) == answer


@pytest.mark.parametrize(("combine", "answer"), [("mean", [3, 6, 0, 3, 0]), ("sum", [6, 6, 0, 6, 0])])
def test_2_the_official_rule_keeps_one_entry_more(combine, answer):
    # official K = 0.4 on 5 entries keeps int(5 * 0.4) + 1 = 3, which is our density 0.6
    assert merged(TAU, Ties(density=0.6, combine=combine)) == answer


def test_3_the_larger_total_wins_not_the_larger_number_of_models():
    assert merged([[1.0], [-0.3], [-0.3]], Ties(density=1), (1,)) == [1.0]


def test_3_weights_vote_before_the_election_as_in_mergekit_or_after_it_as_in_peft():
    taus, weights = [[1.0], [-0.5]], (0.2, 0.8)
    assert merged(taus, Ties(density=1, weights=weights), (1,)) == [-0.5]
    assert merged(taus, Ties(density=1, weights=weights, weigh="after"), (1,)) == [pytest.approx(0.2)]
    # a count of one against one goes to whoever won most places, here nobody
    assert merged(taus, Ties(density=1, elect="count"), (1,)) == [0]
    assert merged([[1.0, 1], [-0.5, 2]], Ties(density=1, elect="count"), (1, 1)) == [1, 1.5]


def test_4_one_model_untrimmed_is_given_back():
    models, base = random_models(0, k=1)
    torch.testing.assert_close(flat(Ties(density=1).merge(models, base=base)), flat(models[0]), rtol=0, atol=1e-7)


def test_5_copies_give_the_trimmed_change_and_its_multiple():
    assert merged([TAU[0]] * 4, Ties(density=0.4)) == [5, 0, 0, 3, 0]
    assert merged([TAU[0]] * 4, Ties(density=0.4, combine="sum")) == [20, 0, 0, 12, 0]


def test_6_without_conflict_it_is_the_average():
    models, base = random_models(1)
    models = [{name: base[name] + (w - base[name]).abs() for name, w in model.items()} for model in models]
    expected = flat(Average().merge(models, base=base))
    torch.testing.assert_close(flat(Ties(density=1).merge(models, base=base)), expected, rtol=0, atol=1e-6)


@given(seed=st.integers(0, 10_000), k=st.integers(1, 4), density=st.floats(0.05, 1), power=st.integers(-8, 8))
@settings(max_examples=40, deadline=None)
def test_7_order_scale_and_sign_and_8_bounds(seed, k, density, power):
    taus = torch.randn(k, 24, generator=torch.Generator().manual_seed(seed))
    rule = Ties(density=density)
    change = torch.tensor(merged(taus.tolist(), rule, (20, 4)))
    for order in permutations(range(k)):
        assert merged(taus[list(order)].tolist(), rule, (20, 4)) == change.tolist()
    scaled = merged((taus * 2.0**power).tolist(), rule, (20, 4))
    assert scaled == (change * 2.0**power).tolist()
    assert merged((-taus).tolist(), rule, (20, 4)) == (-change).tolist()
    agree = torch.tensor([[float(t) if t * c > 0 else 0.0 for t, c in zip(tau, change, strict=True)] for tau in taus])
    assert bool((change.abs() <= agree.abs().max(0).values).all())


# a slow restatement, and peft


@given(seed=st.integers(0, 10_000), k=st.integers(1, 4), density=st.floats(0.02, 1), split=st.integers(0, 60),
       combine=st.sampled_from(["mean", "sum", "max"]))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_equals_the_algorithm_on_the_flattened_model(seed, k, density, split, combine):
    taus = torch.randn(k, 60, generator=torch.Generator().manual_seed(seed))
    change = merged(taus.tolist(), Ties(density=density, combine=combine), (split, 60 - split))
    torch.testing.assert_close(torch.tensor(change).double(), slow(taus, density, combine), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_equals_peft_when_tensors_are_trimmed_one_by_one(density):
    peft = pytest.importorskip("peft.utils.merge_utils")
    models, base = random_models(3)
    for weights in (base, *models):
        del weights["scalar"]  # one entry at density 0.2 is refused here and dropped there
    merged_weights = Ties(density=density, trim="tensor").merge(models, base=base)
    for name in ("bias", "weight", "kernel"):
        taus = [model[name] - base[name] for model in models]
        with pytest.warns(UserWarning, match="density") if density == 1 else nullcontext():
            change = peft.ties(taus, torch.ones(len(taus)), density)
        torch.testing.assert_close(merged_weights[name], base[name] + change, rtol=1e-6, atol=1e-7)


# what the card warns of


@pytest.mark.parametrize("trim", ["model", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_streamed_from_disk_equals_whole(tmp_path, dtype, trim):
    models, base = random_models(4, dtype=dtype)
    for weights in (base, *models):
        weights["tied"] = weights["weight"]
    rule = Ties(density=1.0 if trim == "tensor" else 0.3, trim=trim)
    whole = rule.merge(models, base=base)
    for k, weights in enumerate([base, *models]):
        (tmp_path / str(k)).mkdir()
        save_weights(weights, tmp_path / str(k), shard_bytes=200)
    lazy_base, *lazy = [LazyWeights(tmp_path / str(k)) for k in range(4)]
    streamed = dict(merge_streaming(rule, lazy, base=lazy_base))
    assert set(streamed) == set(whole)
    assert all(torch.equal(streamed[name], whole[name]) and whole[name].dtype == base[name].dtype for name in whole)
    assert torch.equal(whole["tied"], whole["weight"])
    assert whole["steps"] == 0


def test_a_tied_weight_is_counted_once():
    taus = torch.randn(3, 40, generator=torch.Generator().manual_seed(5))
    models = [{"a": tau[:20], "b": tau[20:]} for tau in taus]
    base = {"a": torch.zeros(20), "b": torch.zeros(20)}
    expected = Ties(density=0.3).merge(models, base=base)
    tied = Ties(density=0.3).merge([m | {"copy": m["b"]} for m in models], base=base | {"copy": base["b"]})
    assert all(torch.equal(tied[name], expected[name]) for name in expected)
    assert torch.equal(tied["copy"], tied["b"])


def test_equal_magnitudes_are_kept_in_order_until_the_count_is_exact():
    assert merged([[1, -1, 1, 1, 1]], Ties(density=0.6), (2, 3)) == [1, -1, 1, 0, 0]
    assert merged([[1, -1, 1, 2, 1]], Ties(density=0.6, trim="model"), (1, 4)) == [1, -1, 0, 2, 0]


@given(st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]), min_size=3, max_size=40), st.floats(0.1, 1))
@settings(max_examples=60, deadline=None)
def test_the_count_is_exact_whatever_ties(tau, density):
    kept = int(density * len(tau))
    if kept == 0:
        return
    change = merged([tau], Ties(density=density), (1, len(tau) - 1))
    assert sum(c != 0 for c in change) == min(kept, sum(t != 0 for t in tau))
    dropped = [abs(t) for t, c in zip(tau, change, strict=True) if c == 0]
    assert max(dropped, default=0) <= min((abs(c) for c in change if c), default=9)


def test_exact_cancellation_takes_the_sign_that_won_elsewhere():
    assert merged([[1, -2, -3], [-1, -2, -3]], Ties(density=1), (1, 2)) == [-1, -2, -3]
    assert merged([[1, 2, 3], [-1, 2, 3]], Ties(density=1), (1, 2)) == [1, 2, 3]
    # trimmed tensor by tensor there is nobody else to ask
    assert merged([[1, -2, -3], [-1, -2, -3]], Ties(density=1, trim="tensor"), (1, 2)) == [0, -2, -3]


def test_bfloat16_is_merged_in_float32():
    base = {"w": torch.full((2,), 1.0, dtype=torch.bfloat16)}
    models = [{"w": torch.tensor(w, dtype=torch.bfloat16)} for w in ([1.0078125, 2.0], [1.015625, 3.0])]
    change = Ties(density=1).merge(models, base=base)["w"]
    assert change.tolist() == [torch.tensor(1.01171875).bfloat16().item(), 2.5]


def test_model_trimming_may_empty_a_layer_and_tensor_trimming_does_not():
    taus = [[9, 8, 7, 0.1, 0.2]]
    assert merged(taus, Ties(density=0.6), (3, 2)) == [9, 8, 7, 0, 0]
    assert merged(taus, Ties(density=0.6, trim="tensor"), (3, 2))[3:] == [0, pytest.approx(0.2)]


def test_tensors_of_one_entry_change_too_when_each_is_trimmed_by_itself():
    assert merged([[3, 1, 2], [5, 1, 2]], Ties(density=0.2, trim="tensor"), (1, 2)) == [4, 0, 2]


def test_scale_multiplies_the_change():
    assert merged(TAU, Ties(density=0.4, scale=0.5)) == [2.5, 3, 0, 1.5, 0]


# refusals


@pytest.mark.parametrize("density", [0, -0.1, 1.01, 20, float("nan")])
def test_refuses_a_density_that_is_no_share(density):
    with pytest.raises(Refused, match="0 < density <= 1"):
        Ties(density=density)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": float("inf")}, "finite scale"),
        ({"trim": "layer"}, "trim must be a known name"),
        ({"combine": "median"}, "combine must be a known name"),
    ],
)
def test_refuses_unknown_settings(change, message):
    with pytest.raises(Refused, match=message):
        Ties(**change)


def test_refuses_what_cannot_be_merged():
    models, base = random_models(6)
    with pytest.raises(Refused, match=r"Ties needs base=.*got None"):
        Ties().merge(models)
    with pytest.raises(Refused, match=r"keeps one of 175 entries"):
        Ties(density=0.005).merge(models, base=base)
    with pytest.raises(Refused, match="importance"):
        Ties().merge(models, base=base, importance=models)
    models[1]["bias"] = models[1]["bias"].clone()
    models[1]["bias"][2] = float("nan")
    with pytest.raises(Refused, match=r"'bias'.*1 NaN"):
        Ties().merge(models, base=base)
