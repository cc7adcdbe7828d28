"""RegMean: known answers, least squares of all data together, a slow restatement, Gram matrices of real layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.core.rng import random_state, seeded
from headstart.core.stream import Batches
from headstart.core.validate import Refused
from headstart.core.weights import LazyWeights, merge_streaming, save_weights
from headstart.merge import Average, RegMean, gram_matrices
from headstart.testing import contract
from headstart.testing.subject import difference, snapshot

test_contract = contract(RegMean(), needs=("grams",), refuses=[lambda: RegMean(alpha=1.1), lambda: RegMean(alpha=-0.1)])
test_least_squares = contract(RegMean(alpha=1.0), needs=("base", "grams"))
test_diagonal = contract(RegMean(alpha=0.0), needs=("grams",))


def problem(seed: int, k: int = 3, d: int = 4, out: int = 2) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    inputs = [
        torch.randn(9 + 4 * j, d, generator=g).double() @ torch.randn(d, d, generator=g).double() for j in range(k)
    ]
    models = [
        {"w": torch.randn(out, d, generator=g).double(), "b": torch.randn(out, generator=g).double()} for _ in range(k)
    ]
    return models, inputs


def grams(inputs: list[Tensor]) -> list[dict[str, Tensor]]:
    return [{"w": x.T @ x} for x in inputs]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), k=st.integers(1, 4), alpha=st.sampled_from([0.0, 0.1, 0.9, 1.0]))
def test_equals_the_normal_equations_with_an_inverse(seed: int, k: int, alpha: float) -> None:
    models, inputs = problem(seed, k)
    scaled = [alpha * x.T @ x + (1 - alpha) * torch.diag((x.T @ x).diagonal()) for x in inputs]
    slow = torch.linalg.inv(sum(scaled)) @ sum(g @ m["w"].T for g, m in zip(scaled, models, strict=True))
    merged = RegMean(alpha=alpha).merge(models, importance=grams(inputs))
    torch.testing.assert_close(merged["w"], slow.T, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(merged["b"], sum(m["b"] for m in models) / k, rtol=1e-12, atol=0)


def test_full_matrices_are_least_squares_of_all_data_together() -> None:
    _, inputs = problem(0)
    g = torch.Generator().manual_seed(1)
    answers = [torch.randn(len(x), 2, generator=g).double() for x in inputs]
    alone = [{"w": torch.linalg.lstsq(x, y).solution.T} for x, y in zip(inputs, answers, strict=True)]
    pooled = torch.linalg.lstsq(torch.cat(inputs), torch.cat(answers)).solution.T
    torch.testing.assert_close(
        RegMean(alpha=1).merge(alone, importance=grams(inputs))["w"], pooled, rtol=1e-9, atol=1e-10
    )
    assert not torch.allclose(RegMean().merge(alone, importance=grams(inputs))["w"], pooled, rtol=1e-3)
    assert not torch.allclose(Average().merge(alone)["w"], pooled, rtol=1e-3)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_one_model_and_copies_give_it_back_and_equal_matrices_the_average(alpha: float) -> None:
    models, inputs = problem(2)
    rule = RegMean(alpha=alpha)
    torch.testing.assert_close(rule.merge(models[:1], importance=grams(inputs[:1])), models[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(rule.merge([models[1]] * 3, importance=grams(inputs)), models[1], rtol=1e-14, atol=0)
    alike = rule.merge(models, importance=grams([inputs[0]] * 3))
    torch.testing.assert_close(alike, Average().merge(models), rtol=1e-9, atol=1e-12)


def test_the_scale_of_all_matrices_does_not_matter_and_a_larger_one_pulls() -> None:
    models, inputs = problem(3, 2)
    merged = RegMean().merge(models, importance=grams(inputs))["w"]
    torch.testing.assert_close(RegMean().merge(models, importance=grams([1e-9 * x for x in inputs]))["w"], merged)
    pulled = RegMean().merge(models, importance=grams([1e4 * inputs[0], inputs[1]]))["w"]
    torch.testing.assert_close(pulled, models[0]["w"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_inputs_that_no_model_has_seen_keep_the_average(alpha: float) -> None:
    models, inputs = problem(4)
    for x in inputs:
        x[:, 2] = 0  # as the corners of pictures
    merged = RegMean(alpha=alpha).merge(models, importance=grams(inputs))["w"]
    torch.testing.assert_close(merged[:, 2], Average().merge(models)["w"][:, 2], rtol=1e-14, atol=0)
    rest = [{"w": m["w"][:, [0, 1, 3]]} for m in models]
    alone = RegMean(alpha=alpha).merge(rest, importance=grams([x[:, [0, 1, 3]] for x in inputs]))["w"]
    torch.testing.assert_close(merged[:, [0, 1, 3]], alone, rtol=1e-9, atol=1e-12)


def test_fewer_examples_than_inputs_is_solved_next_to_the_average_and_said() -> None:
    models, inputs = problem(5, 2)
    few = [x[:1] for x in inputs]
    with pytest.warns(UserWarning, match="the inputs of 'w' span 2 of 4 directions"):
        merged = RegMean(alpha=1).merge(models, importance=grams(few))["w"]
    for x, model in zip(few, models, strict=True):  # two rows, two models: both are answered exactly
        torch.testing.assert_close(x @ merged.T, x @ model["w"].T, rtol=1e-8, atol=1e-9)
    change = merged - Average().merge(models)["w"]
    unseen = torch.linalg.svd(torch.cat(few)).Vh[2:]
    assert float((change @ unseen.T).abs().max()) < 1e-9
    regular = RegMean().merge(models, importance=grams(few))["w"]  # without a warning, which would be an error
    assert bool(regular.isfinite().all())


def network() -> nn.Module:
    with seeded(0):
        return nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 1, groups=1), nn.Dropout(),
                             nn.Flatten(2), nn.Linear(6, 5), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3))  # fmt: skip


def test_gram_matrices_are_those_of_what_each_layer_is_given() -> None:
    model, x = network().train(), torch.randn(7, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    before, state = snapshot(model), random_state()
    found = gram_matrices(model, [(x[:3], torch.zeros(3)), x[3:]])
    assert not difference(before, snapshot(model))
    assert not difference(state, random_state())
    model.eval()
    patches = F.unfold(x, 3, padding=1, stride=2).mT.reshape(-1, 18).double()
    torch.testing.assert_close(found["0.weight"], patches.T @ patches)
    h = model[:2](x)
    pixels = h.detach().flatten(2).mT.reshape(-1, 3).double()
    torch.testing.assert_close(found["2.weight"], pixels.T @ pixels)
    rows = model[:5](x).detach().reshape(-1, 6).double()
    torch.testing.assert_close(found["5.weight"], rows.T @ rows)
    assert found.keys() == {"0.weight", "2.weight", "5.weight", "8.weight"}
    assert {g.dtype for g in found.values()} == {torch.float64}


def test_matrices_add_over_layers_that_are_called_twice_and_inputs_by_name() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.unused = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.layer(left) + self.layer(right)

    x = torch.randn(4, 3)
    found = gram_matrices(Twice(), [{"left": x, "right": 2 * x}])
    assert list(found) == ["layer.weight"]
    torch.testing.assert_close(found["layer.weight"], 5 * (x.T @ x).double(), rtol=1e-6, atol=1e-6)


def test_a_merged_network_answers_both_tasks_better_than_the_average() -> None:
    """Two linear maps whose inputs live in subspaces that overlap little: one map that is right on both exists."""
    g = torch.Generator().manual_seed(0)
    models = [nn.Sequential(nn.Linear(8, 4, bias=False)) for _ in range(2)]
    inputs = [torch.randn(50, 4, generator=g) @ torch.randn(4, 8, generator=g) for _ in range(2)]
    weights = [dict(model.state_dict()) for model in models]
    merged = RegMean(alpha=1).merge(
        weights, importance=[gram_matrices(m, [x]) for m, x in zip(models, inputs, strict=True)]
    )
    for x, own in zip(inputs, weights, strict=True):
        error, averaged = (
            float((x @ (w["0.weight"] - own["0.weight"]).T).abs().max()) for w in (merged, Average().merge(weights))
        )
        assert error < 1e-3 < averaged


def test_convolutions_are_linear_layers_on_patches() -> None:
    g = torch.Generator().manual_seed(0)
    models = [nn.Conv2d(2, 3, 3) for _ in range(2)]
    x = [torch.randn(6, 2, 5, 5, generator=g) for _ in range(2)]
    found = [gram_matrices(m, [own]) for m, own in zip(models, x, strict=True)]
    merged = RegMean().merge([dict(m.state_dict()) for m in models], importance=found)["weight"]
    flat = [{"w": m.weight.detach().flatten(1)} for m in models]
    expected = RegMean().merge(flat, importance=[{"w": one["weight"]} for one in found])["w"]
    torch.testing.assert_close(merged.flatten(1), expected)


def test_a_tied_weight_follows_and_streams_from_disk(tmp_path) -> None:
    models, inputs = problem(6)
    for model in models:
        model["tied"] = model["w"]
    merged = RegMean().merge(models, importance=grams(inputs))
    assert torch.equal(merged["tied"], merged["w"])
    assert not torch.allclose(merged["w"], Average().merge(models)["w"], rtol=1e-3)
    for k, model in enumerate(models):
        save_weights({name: w.clone() for name, w in model.items()}, tmp_path / str(k))
        save_weights(grams(inputs)[k], tmp_path / f"grams{k}")
    lazy, own = ([LazyWeights(tmp_path / f"{what}{k}") for k in range(3)] for what in ("", "grams"))
    assert not difference(dict(merge_streaming(RegMean(), lazy, importance=own)), {n: merged[n] for n in lazy[0]})


def test_refuses() -> None:
    models, inputs = problem(7, 2)
    good = grams(inputs)
    with pytest.raises(Refused, match="needs importance="):
        RegMean().merge(models)
    with pytest.raises(Refused, match="each of 2 models; got 1"):
        RegMean().merge(models, importance=good[:1])
    with pytest.raises(Refused, match=r"none of \['w'\]"):
        RegMean().merge(models, importance=[good[0], {}])
    bad = {"shape": torch.eye(3), "symmetric": good[0]["w"] + torch.ones(4, 4).triu(1) * 9, "negative": -good[0]["w"]}
    for value in bad.values():
        with pytest.raises(Refused, match="of 'w' must be symmetric"):
            RegMean().merge(models, importance=[good[0], {"w": value}])
    with pytest.raises(Refused, match="must be finite"):
        RegMean().merge(models, importance=[good[0], {"w": torch.full((4, 4), torch.nan)}])
    x = torch.randn(4, 2)
    with pytest.raises(Refused, match="finite pass"):
        gram_matrices(nn.Linear(2, 2), Batches(x=x))
    with pytest.raises(Refused, match="need examples"):
        gram_matrices(nn.Linear(2, 2), [])
    with pytest.raises(Refused, match="need examples"):
        gram_matrices(nn.Tanh(), [x])
    with pytest.raises(Refused, match="inputs of 'weight' must be finite"):
        gram_matrices(nn.Linear(2, 2), [x * torch.nan])
