"""Fisher merging: the card's known answers, a restatement of another library, properties, and the search."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.core.fisher import diagonal_fisher
from headstart.core.rng import random_state, seeded
from headstart.core.validate import Refused
from headstart.core.weights import LazyWeights, merge_streaming, save_weights
from headstart.merge import Average, FisherMerging, search_weights
from headstart.testing import contract
from headstart.testing.subject import difference

# on the target alone, and high enough that a third of its entries lie below
test_contract = contract(FisherMerging(floor=0.5), needs=("importance",), refuses=[
    lambda: FisherMerging(floor=-1), lambda: FisherMerging(weights=(0.0, 0.0)), lambda: FisherMerging(floor_on="both"),
])  # fmt: skip
test_floor_on_all = contract(FisherMerging(floor=0.05, floor_on="all", relative=True), needs=("base", "importance"))
test_weighted = contract(FisherMerging(weights=(0.2, 0.8), normalize=False), needs=("importance",), models=2)


def made(seed: int, k: int = 3, dtype=torch.float32) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"weight": (3, 4), "bias": (4,), "scale": (), "empty": (0, 2)}
    models = [{n: torch.randn(s, generator=g).to(dtype) for n, s in shapes.items()} for _ in range(k)]
    fishers = [{n: torch.rand(s, generator=g) + 0.01 for n, s in shapes.items()} for _ in range(k)]
    return models, fishers


def one(*values: float) -> list[dict[str, Tensor]]:
    return [{"w": torch.tensor([float(value)])} for value in values]


def equal(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-7)


def test_1_fishers_alike_give_the_average_and_torchs_own():
    models, fishers = made(0)
    alike = [{n: torch.full_like(f, 0.3) for n, f in fisher.items()} for fisher in fishers]
    merged = FisherMerging().merge(models, importance=alike)
    equal(merged, Average().merge(models))
    averaged = torch.optim.swa_utils.AveragedModel(holding(models[0]))
    for model in models:
        averaged.update_parameters(holding(model))
    equal(merged, {n: p.detach() for n, p in averaged.module.named_parameters()})


def holding(weights: dict[str, Tensor]) -> nn.ParameterDict:
    return nn.ParameterDict({n: nn.Parameter(w.clone()) for n, w in weights.items()})


@pytest.mark.parametrize("floor_on", ["target", "all"])
def test_2_copies_give_the_model_back_whatever_the_fishers(floor_on):
    models, fishers = made(1)
    rule = FisherMerging(weights=(0.1, 2.0, 0.7), floor=0.1, floor_on=floor_on)
    equal(rule.merge([models[0]] * 3, importance=fishers), models[0])


def test_3_where_one_fisher_is_zero_the_other_decides_and_where_all_are_the_rule_says():
    models = [{"w": torch.tensor([0.0, 0.0])}, {"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([4.0, 4.0])}]
    fishers = [{"w": torch.tensor(f)} for f in ([3.0, 0.0], [0.0, 0.0], [0.0, 0.0])]
    free = {"weights": (1.0, 2.0, 1.0), "normalize": False}
    assert FisherMerging(floor=0, **free).merge(models, importance=fishers)["w"].tolist() == [0.0, 0.0]
    assert FisherMerging(floor=0, floor_on="all", **free).merge(models, importance=fishers)["w"].tolist() == [0.0, 1.5]
    with pytest.warns(UserWarning, match="100% of a model's Fisher"):
        floored = FisherMerging(floor=1e-6, floor_on="all", **free).merge(models, importance=fishers)
    assert floored["w"].tolist() == [pytest.approx(0, abs=1e-5), 1.5]
    # the target at λ = 0, an end of the search: what the others agree on, not 0 / 0
    without = FisherMerging(weights=(0, 1, 1), normalize=False).merge(models, importance=fishers)
    assert without["w"].tolist() == [2.5, 2.5]


def test_3_without_fisher_the_average_has_weights_over_norms():
    models = [{"w": torch.tensor([0.0, 0.0])}, {"w": torch.tensor([1.0, 1.0])}]
    fishers = [{"w": torch.tensor(f)} for f in ([1.0, 0.0], [3.0, 0.0])]
    merged = FisherMerging(floor=0, floor_on="all").merge(models, importance=fishers)["w"]
    assert merged.tolist() == [0.5, 0.25]  # c = 1 / 2, 1 / 6; normalised, the first entries are alike


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), which=st.integers(0, 2), power=st.floats(-12, 12), relative=st.booleans())
def test_4_the_scale_of_a_fisher_does_not_matter(seed, which, power, relative):
    models, fishers = made(seed)
    scaled = [{n: f * 10**power for n, f in x.items()} if k == which else x for k, x in enumerate(fishers)]
    rule = FisherMerging(floor=0.1 if relative else 0, floor_on="all", relative=relative)
    equal(rule.merge(models, importance=scaled), rule.merge(models, importance=fishers), 1e-5)


def linear_models(diagonal: bool) -> tuple[list[Tensor], list[Tensor], Tensor, list[int]]:
    """Least squares of three data sets, and of all of them."""
    g = torch.Generator().manual_seed(0)
    inputs, answers, alone = [], [], []
    for n in (8, 12, 20):
        x = torch.randn(n, 4, generator=g).double()
        x = torch.linalg.qr(x).Q * torch.rand(4, generator=g).add(0.5).double() if diagonal else x
        y = x @ torch.randn(4, generator=g).double() + torch.randn(n, generator=g).double()
        inputs.append(x)
        answers.append(y)
        alone.append(torch.linalg.lstsq(x, y[:, None]).solution[:, 0])
    pooled = torch.linalg.lstsq(torch.cat(inputs), torch.cat(answers)[:, None]).solution[:, 0]
    return inputs, alone, pooled, [len(x) for x in inputs]


def test_6_linear_regression_on_orthogonal_inputs_is_that_of_all_data():
    inputs, alone, pooled, sizes = linear_models(diagonal=True)
    models, fishers = [{"weight": w[None]} for w in alone], []
    for x, w in zip(inputs, alone, strict=True):
        model = nn.Linear(4, 1, bias=False).double()
        model.weight.data = w[None].clone()
        fishers.append(diagonal_fisher(model, [x]))
    merged = FisherMerging(weights=tuple(map(float, sizes)), normalize=False, floor=0).merge(models, importance=fishers)
    assert torch.allclose(merged["weight"][0], pooled, rtol=1e-6)  # Fishers are float32


def test_7_worked_example():
    for rule in (FisherMerging(normalize=False), FisherMerging(normalize=False, weights=(0.5, 0.5))):
        assert rule.merge(one(0, 1), importance=one(1, 3))["w"].tolist() == [0.75]
    assert FisherMerging().merge(one(0, 1), importance=one(1, 3))["w"].tolist() == [0.5]  # of one entry, none is left


def added_floor(models, fishers, least=1e-6) -> dict[str, Tensor]:
    """The merge as a second library has it: 1e-6 added to every Fisher and norm, weights 1 / k, in one flat vector."""
    k = len(models)
    norms = [torch.sqrt(sum((f.double() ** 2).sum() for f in fisher.values())) + least for fisher in fishers]
    shares = torch.stack([1 / norm for norm in norms]) / sum(1 / norm for norm in norms) / k
    out = {}
    for name, first in models[0].items():
        top = sum(shares[i] * (fishers[i][name].double() + least) * models[i][name].double() for i in range(k))
        bottom = sum(shares[i] * (fishers[i][name].double() + least) for i in range(k))
        out[name] = (top / bottom).to(first.dtype)
    return out


def test_8_equals_the_library_that_adds_its_floor():
    models, fishers = made(5)
    raised = [{n: f + 1e-6 for n, f in fisher.items()} for fisher in fishers]
    ours = FisherMerging(floor=0).merge(models, importance=raised)
    equal(ours, added_floor(models, fishers), 1e-5)


def test_equals_the_formula_entry_by_entry():
    models, fishers = made(7)
    weights, floor = (0.5, 0.2, 0.3), 0.2
    merged = FisherMerging(weights=weights, floor=floor).merge(models, importance=fishers)
    norms = [sum(float(v) ** 2 for f in fisher.values() for v in f.flatten()) ** 0.5 for fisher in fishers]
    for name, value in merged.items():
        for at in range(value.numel()):
            c = [
                weights[k] / norms[k] * max(float(fishers[k][name].flatten()[at]), floor if k == 0 else 0)
                for k in range(3)
            ]
            expected = sum(ck * float(m[name].flatten()[at]) for ck, m in zip(c, models, strict=True)) / sum(c)
            assert float(value.flatten()[at]) == pytest.approx(expected, rel=1e-5, abs=1e-7)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), k=st.integers(1, 4), floor=st.sampled_from([0, 1e-6, 0.3]),
       floor_on=st.sampled_from(["target", "all"]), normalize=st.booleans())  # fmt: skip
def test_each_entry_lies_between_the_models(seed, k, floor, floor_on, normalize):
    models, fishers = made(seed, k)
    for fisher in fishers:
        fisher["weight"][torch.rand(3, 4, generator=torch.Generator().manual_seed(seed)) < 0.4] = 0
    rule = FisherMerging(floor=floor, floor_on=floor_on, normalize=normalize)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a high floor
        merged = rule.merge(models, importance=fishers)
    for name, value in merged.items():
        every = torch.stack([model[name] for model in models])
        assert (
            bool(((every.amin(0) - 1e-6 <= value) & (value <= every.amax(0) + 1e-6)).all()) if value.numel() else True
        )


def test_warns_when_the_floor_hides_most_of_a_fisher():
    models, fishers = made(3)
    small = [{n: f * 1e-9 for n, f in fisher.items()} for fisher in fishers]
    with pytest.warns(UserWarning, match="below the floor of 1e-06"):
        hidden = FisherMerging(floor_on="all").merge(models, importance=small)
    norms = [sum(float(f.square().sum()) for f in fisher.values()) ** 0.5 for fisher in fishers]
    equal(hidden, Average(weights=tuple(1 / n for n in norms)).merge(models), 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        relative = FisherMerging(floor_on="all", floor=1e-3, relative=True).merge(models, importance=small)
    equal(relative, FisherMerging(floor=0).merge(models, importance=fishers), 1e-5)


def test_tensors_without_fisher_are_averaged_and_tied_ones_share_one():
    models, fishers = made(4, 2)
    for k, (model, fisher) in enumerate(zip(models, fishers, strict=True)):
        model |= {"norm.running_mean": torch.tensor([float(k)]), "count": torch.tensor(k), "tied": model["weight"]}
        del fisher["empty"]
    merged = FisherMerging(weights=(1, 3)).merge(models, importance=fishers)
    assert merged["norm.running_mean"].item() == 0.75
    assert merged["count"] == 0
    assert torch.equal(merged["tied"], merged["weight"])
    untied = [{n: w for n, w in model.items() if n != "tied"} for model in models]
    equal(FisherMerging(weights=(1, 3)).merge(untied, importance=fishers), {n: merged[n] for n in untied[0]})
    twice = [{**fisher, "tied": fisher["weight"]} for fisher in fishers]  # counted once, or the norms would change
    equal(FisherMerging(weights=(1, 3)).merge(models, importance=twice), merged)


def test_everything_from_disk_is_the_same(tmp_path):
    models, fishers = made(6)
    for k, (model, fisher) in enumerate(zip(models, fishers, strict=True)):
        save_weights(model | {"mean": torch.ones(2) * k}, tmp_path / f"model{k}")
        save_weights(fisher, tmp_path / f"fisher{k}")
    lazy, own = ([LazyWeights(tmp_path / f"{what}{k}") for k in range(3)] for what in ("model", "fisher"))
    held = [dict(one) for one in lazy]
    streamed = dict(merge_streaming(FisherMerging(), lazy, importance=own))
    assert not difference(streamed, FisherMerging().merge(held, importance=fishers))


def test_a_trained_network_keeps_what_each_model_depends_on():
    """Two linear classifiers that look at different halves of x: the merge answers both, the average is twice as unsure."""
    models, fishers = [], []
    for k in range(2):
        weights = torch.zeros(2, 4)
        weights[0, 2 * k], weights[1, 2 * k + 1] = 3.0, 3.0
        model = nn.Linear(4, 2, bias=False)
        model.weight.data = weights
        x = torch.zeros(50, 4)
        x[:, 2 * k : 2 * k + 2] = torch.randn(50, 2, generator=torch.Generator().manual_seed(k))
        models.append({"weight": weights})
        fishers.append(diagonal_fisher(model, [x]))
    merged = FisherMerging().merge(models, importance=fishers)["weight"]
    assert torch.allclose(merged, models[0]["weight"] + models[1]["weight"], atol=1e-4)


def test_search_tries_the_grid_of_two_and_draws_for_more():
    models, fishers = one(0, 1), one(1, 1)
    state = random_state()
    found = search_weights(FisherMerging(), models, fishers, lambda merged: -abs(float(merged["w"]) - 0.3))
    assert not difference(state, random_state())
    assert found.weights == pytest.approx((0.7, 0.3), abs=1e-9)
    assert found.merged["w"].item() == pytest.approx(0.3)
    assert [weights[0] for weights, _ in found.tries] == pytest.approx([1 - k / 50 for k in range(51)])
    assert max(score for _, score in found.tries) == dict(found.tries)[found.weights]
    three = search_weights(FisherMerging(), one(0, 1, 5), one(1, 1, 1), lambda merged: -float(merged["w"]), tries=400)
    drawn = torch.tensor([weights for weights, _ in three.tries])
    assert torch.allclose(drawn.sum(1), torch.ones(400), atol=1e-6)
    # the marginals of Dirichlet(1, 1, 1) have mean 1 / 3 and variance 1 / 18
    assert torch.allclose(drawn.mean(0), torch.full((3,), 1 / 3), atol=4 * (1 / 18 / 400) ** 0.5)
    assert torch.allclose(drawn.var(0), torch.full((3,), 1 / 18), rtol=0.3)
    assert three == search_weights(FisherMerging(), one(0, 1, 5), one(1, 1, 1), lambda m: -float(m["w"]), tries=400)


def test_refuses():
    models, fishers = made(0, 2)
    rule = FisherMerging()
    with pytest.raises(Refused, match="needs importance="):
        rule.merge(models)
    with pytest.raises(Refused, match="a Fisher of each of 2 models; got 1"):
        rule.merge(models, importance=fishers[:1])
    with pytest.raises(Refused, match="one weight for each of 2 models; got 3"):
        FisherMerging(weights=(1, 1, 1)).merge(models, importance=fishers)
    with pytest.raises(Refused, match=r"none of \['bias'\]"):
        rule.merge(models, importance=[fishers[0], {n: f for n, f in fishers[1].items() if n != "bias"}])
    with pytest.raises(Refused, match="must name tensors"):
        rule.merge(models, importance=[{f"module.{n}": f for n, f in one.items()} for one in fishers])
    for value, match in (
        (-1.0, "must be >= 0; that of 'bias' in model 1"),
        (torch.nan, "Fisher of 'bias' must be finite"),
    ):
        with pytest.raises(Refused, match=match):
            rule.merge(models, importance=[fishers[0], {**fishers[1], "bias": torch.full((4,), value)}])
    with pytest.raises(Refused, match="must have its shape"):
        rule.merge(models, importance=[fishers[0], {**fishers[1], "bias": torch.ones(5)}])
    with pytest.raises(Refused, match=r"not 0 everywhere; got model \[1\]"):
        rule.merge(models, importance=[fishers[0], {n: 0 * f for n, f in fishers[1].items()}])
    with pytest.raises(Refused, match="needs two models"):
        search_weights(rule, models[:1], fishers[:1], lambda merged: 0.0)
    with pytest.raises(Refused, match="finite scores"):
        search_weights(rule, models, fishers, lambda merged: float("nan"))
    with seeded(0), pytest.raises(Refused, match="finite floor"):
        FisherMerging(floor=float("inf"))
