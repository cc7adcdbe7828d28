"""Robust weight signatures: the card's known answers, slow restatements, torch's own statistics, storage, refusals."""

from __future__ import annotations

import copy
import inspect
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.core.rng import random_state, seeded
from headstart.core.validate import Refused
from headstart.core.weights import LazyWeights, save_weights
from headstart.merge import (
    choose_alpha,
    extract_signature,
    first_layers,
    layer_profile,
    patch,
    quantise,
    restored_batchnorm,
    robust_weight_signatures,
    signature_cosine,
)
from headstart.testing.subject import difference, snapshot

SHAPES = {"one.weight": (4, 1, 3, 3), "one.bias": (4,), "two.weight": (6, 4), "two.bias": (6,), "head.weight": (3, 6)}
LAYERS = ["one", "two"]


def model(seed: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    state = {name: (spread * torch.randn(shape, generator=g)).to(dtype) for name, shape in SHAPES.items()}
    return state | {"one.count": torch.tensor(seed)}


def sisters(seed: int, dtype: torch.dtype = torch.float32, k: int = 2) -> list[dict[str, Tensor]]:
    """A start and k models near it."""
    start = model(seed, dtype)
    found = [start]
    for j in range(k):
        change = model(1000 * (j + 1) + seed, spread=0.05)
        found.append({n: (t + change[n]).to(dtype) if t.is_floating_point() else t for n, t in start.items()})
    return found


def flat(state) -> Tensor:
    return torch.cat([t.flatten().double() for t in state.values() if t.is_floating_point()])


def vector(d: list[float], r: list[float], **settings) -> list[float]:
    start = {"layer.weight": torch.zeros(len(d), dtype=torch.float64)}
    clean, robust = ({"layer.weight": torch.tensor(w, dtype=torch.float64)} for w in (d, r))
    return extract_signature(start, clean, robust, ["layer"], **settings)["layer.weight"].tolist()


# known answers of the card, by number


@given(st.integers(0, 10_000), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_1_orthogonal_to_the_clean_change_tensor_by_tensor(seed, dtype):
    start, clean, robust = sisters(seed, dtype)
    for name, own in extract_signature(start, clean, robust, LAYERS).items():
        d = (clean[name].double() - start[name].double()).flatten()
        assert abs(float(own.double().flatten() @ d)) <= 1e-6 * float(own.double().norm() * d.norm())


@pytest.mark.parametrize("times", [-2.0, 0.0, 1.0, 3.7])
def test_1_nothing_is_left_of_a_change_along_the_clean_one(times):
    d = [0.3, -1.2, 0.5]
    assert vector(d, [times * x for x in d]) == pytest.approx([0, 0, 0], abs=1e-15)


def test_2_an_orthogonal_change_is_the_signature():
    assert vector([1.0, 0.0, 2.0], [0.0, 5.0, 0.0]) == [0, 5, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_3_without_projection_on_all_tensors_the_robust_model_comes_back(dtype):
    start, clean, robust = sisters(1, dtype)
    own = extract_signature(start, clean, robust, [*LAYERS, "head"], project=False)
    result = patch(clean, {"fog": own}).weights
    for name, expected in robust.items():
        if dtype == torch.float32:  # the signature itself is rounded to float32
            torch.testing.assert_close(result[name], expected, rtol=2**-23, atol=0)
        else:
            assert torch.equal(result[name], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4_no_strength_is_no_change_and_a_patch_comes_off_bit_for_bit(dtype):
    start, clean, robust = sisters(2, dtype)
    own = extract_signature(start, clean, robust, LAYERS)
    assert not difference(clean, patch(clean, {"fog": own}, 0.0).weights)
    patched = patch(clean, {"fog": own}, 1.3)
    assert all(not torch.equal(patched.weights[name], clean[name]) for name in own)
    assert not difference(clean, patched.unpatch())
    assert list(patched.weights) == list(clean)
    assert set(patched.originals) == set(own) == {"one.weight", "one.bias", "two.weight", "two.bias"}


@given(st.integers(0, 10_000), st.floats(-2, 2), st.floats(-2, 2))
@settings(max_examples=30, deadline=None)
def test_5_patches_add_up(seed, a, b):
    start, clean, fog, blur = sisters(seed, k=3)
    own = {"fog": extract_signature(start, clean, fog, LAYERS), "blur": extract_signature(start, clean, blur, ["two"])}
    both = patch(clean, own, {"fog": a, "blur": b}).weights
    one_by_one = patch(patch(clean, own, {"fog": a}).weights, own, {"blur": b}).weights
    torch.testing.assert_close(flat(both), flat(one_by_one), rtol=0, atol=1e-6)


def test_5_a_number_is_shared_among_the_signatures():
    start, clean, fog, blur = sisters(3, k=3)
    own = {"fog": extract_signature(start, clean, fog, LAYERS), "blur": extract_signature(start, clean, blur, LAYERS)}
    assert not difference(patch(clean, own, 0.8).weights, patch(clean, own, {"fog": 0.4, "blur": 0.4}).weights)
    # the official code multiplies before the projection and again in the sum: (alpha / n)²
    official = {n: clean[n].double() for n in own["fog"]}
    for robust in (fog, blur):
        for n in official:
            d, r = clean[n].double() - start[n].double(), 0.4 * (robust[n].double() - start[n].double())
            official[n] = official[n] + 0.4 * (r - d * (d * r).sum() / (d * d).sum())
    found = patch(clean, own, {"fog": 0.16, "blur": 0.16}).weights
    torch.testing.assert_close(flat({n: found[n] for n in official}), flat(official), rtol=0, atol=1e-6)


def test_6_without_a_clean_change_nothing_is_removed():
    assert vector([0.0, 0.0], [3.0, 4.0]) == [3, 4]


@given(st.integers(0, 10_000), st.integers(2, 300), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_7_linear_levels_are_half_a_step_off_at_most_and_equal_the_formula(seed, levels, n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    stored = quantise({"w": x}, levels)
    back = stored.restore()["w"]
    assert back.dtype == x.dtype
    if n:
        low, high = x.double().aminmax()
        assert bool(((back - x).double().abs() <= (high - low) / (2 * (levels - 1)) + 1e-6).all())
        scaled = ((x.double() - low) / (high - low) if high > low else x.double() * 0) * (levels - 1)
        off = (back.double() - (low + (high - low) * scaled.round() / (levels - 1))).abs()
        assert bool(((off <= 1e-6) | ((scaled % 1 - 0.5).abs() < 1e-4)).all())
        assert int(stored.tensors["w"].codes.max()) < levels
        assert not difference(back, quantise({"w": back}, levels).restore()["w"])


@pytest.mark.parametrize("mode", ["linear", "log", "tanh"])
def test_7_two_levels_are_the_ends_and_a_constant_stays(mode):
    for constant in (0.3, -0.7, 0.0):
        same = torch.full((3, 2), constant)
        assert torch.equal(quantise({"w": same}, 4, mode).restore()["w"], same)
    if mode != "log":
        two = quantise({"w": torch.tensor([-1.0, -0.9, 0.4, 0.5])}, 2, mode).restore()["w"]
        assert two.tolist() == pytest.approx([-1, -1, 0.5, 0.5])
    assert quantise({"w": torch.zeros(0, 3)}, 16, mode).restore()["w"].shape == (0, 3)


def test_8_worked_examples():
    assert vector([1.0, 0.0], [3.0, 4.0]) == [0, 4]
    assert vector([1.0, 1.0], [2.0, 0.0]) == [1, -1]


# a slow restatement, and what else a patch is


def test_equals_the_projection_matrix_of_the_official_code():
    start, clean, robust = sisters(4, torch.float64)
    own = extract_signature(start, clean, robust, LAYERS)
    for name, value in own.items():
        d, r = ((w[name] - start[name]).flatten() for w in (clean, robust))
        matrix = d[:, None] @ d[None] / (d @ d)
        torch.testing.assert_close(value.flatten(), r - matrix @ r)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_keeps_dtypes_devices_and_what_it_was_given(dtype):
    start, clean, robust = sisters(5, dtype)
    before, state = snapshot([start, clean, robust]), random_state()
    own = extract_signature(start, clean, robust, LAYERS)
    assert {t.dtype for t in own.values()} == {torch.float64 if dtype == torch.float64 else torch.float32}
    result = patch(clean, {"fog": own}).weights
    assert all(result[name].dtype == t.dtype and result[name].device == t.device for name, t in clean.items())
    quantise(own, 16, "log").restore()
    signature_cosine([own, own])
    layer_profile(clean, robust)
    assert not difference(before, snapshot([start, clean, robust]))
    assert not difference(state, random_state())


def test_half_precision_is_rounded_once():
    clean = {"c.weight": torch.tensor([1.0], dtype=torch.bfloat16)}
    step = {"c.weight": torch.tensor([0.003])}  # half of an ulp is 0.0039
    assert patch(clean, {"a": step, "b": step}, {"a": 1.0, "b": 1.0}).weights["c.weight"].item() == 1.0078125


def test_another_model_with_another_head_is_patched_from_disk(tmp_path):
    start, clean, robust = sisters(6)
    for name, state in (("start", start), ("clean", clean), ("robust", robust)):
        (tmp_path / name).mkdir()
        save_weights(state, tmp_path / name)
    lazy = [LazyWeights(tmp_path / name) for name in ("start", "clean", "robust")]
    own = extract_signature(*lazy, LAYERS)
    assert not difference(own, extract_signature(start, clean, robust, LAYERS))
    other = model(7) | {"head.weight": torch.ones(9, 6)}
    result = patch(other, {"fog": own}, 0.5).weights
    torch.testing.assert_close(result["one.bias"], other["one.bias"] + 0.5 * own["one.bias"])
    assert result["head.weight"] is other["head.weight"]
    assert result["one.count"] is other["one.count"]


def test_far_moves_are_warned_of_and_near_ones_are_not():
    start, clean, robust = sisters(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract_signature(start, clean, robust, LAYERS)
        far = {**robust, "two.bias": robust["two.bias"] + 99}  # vectors may: they often start at 0
        extract_signature(start, clean, far, LAYERS)
    with pytest.warns(UserWarning, match=r"two\.weight.*may destroy"):
        extract_signature(start, clean, {**robust, "two.weight": 2 * robust["two.weight"]}, LAYERS)
    with pytest.warns(UserWarning, match="two.weight"):
        extract_signature({**start, "two.weight": torch.zeros(6, 4)}, clean, robust, LAYERS)


def test_layers_are_whole_names_and_blocks():
    start, clean, robust = sisters(9)
    nested = [{f"block.{n}": t for n, t in s.items()} | {"blocks.w": torch.ones(2)} for s in (start, clean, robust)]
    assert set(extract_signature(*nested, ["block.one", "block"])) == {f"block.{n}" for n in SHAPES}
    assert set(extract_signature(*nested, ["block.two.bias"])) == {"block.two.bias"}


# what to patch, how strongly


class Backwards(nn.Module):
    """Layers that run in another order than they were made, one of them twice and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.third, self.unused = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second, self.first = nn.Conv1d(3, 1, 1), nn.Conv1d(1, 3, 1)
        self.drop, self.norm = nn.Dropout(), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.norm(self.first(x[:, None])))[:, 0]
        out: Tensor = self.head(self.third(self.drop(self.third(x))))
        return out


def test_layers_come_in_the_order_they_run():
    with seeded(0):
        module = Backwards().train()
    before, state = snapshot(module), random_state()
    assert first_layers(module, torch.ones(2, 4), 3) == ["first", "second", "third"]
    assert first_layers(module, torch.ones(2, 4), 1) == ["first"]
    assert not difference(before, snapshot(module))
    assert not difference(state, random_state())


def test_the_profile_joins_weight_and_bias():
    clean = {
        "a.weight": torch.tensor([3.0]),
        "a.bias": torch.tensor([4.0]),
        "b.w": torch.zeros(1),
        "c.w": torch.zeros(1),
    }
    robust = {
        "a.weight": torch.tensor([3.0]),
        "a.bias": torch.tensor([5.0]),
        "b.w": torch.ones(1),
        "c.w": torch.zeros(1),
    }
    counted = [{**state, "a.count": torch.tensor(k)} for k, state in enumerate((clean, robust))]
    assert layer_profile(*counted) == {"a": pytest.approx(0.2), "b": math.inf, "c": 0.0}


def test_cosines_are_of_the_whole_signature():
    a, b = ({"x": torch.tensor(x), "y": torch.tensor(y)} for x, y in (([1.0, 0.0], [0.0]), ([3.0, 0.0], [4.0])))
    none = {"x": torch.zeros(2), "y": torch.zeros(1)}
    minus = {name: -2 * t for name, t in a.items()}
    expected = torch.tensor([[1, 0.6, -1, 0], [0.6, 1, -0.6, 0], [-1, -0.6, 1, 0], [0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(signature_cosine([a, b, minus, none]), expected)


def test_the_strength_keeps_the_clean_accuracy():
    clean, own = {"c.weight": torch.tensor([1.0])}, {"fog": {"c.weight": torch.tensor([1.0])}}

    def kept(weights) -> float:
        return 1.0 - 0.1 * (float(weights["c.weight"]) - 1)

    def gained(weights) -> float:
        return min(float(weights["c.weight"]), 2.2)

    assert choose_alpha(clean, own, kept, gained, floor=0.925).alpha == 0.7
    free = choose_alpha(clean, own, kept, gained, floor=0.0)
    assert (free.alpha, free.clean, free.corrupted) == (1.2, pytest.approx(0.88), pytest.approx(2.2))  # the first best
    assert choose_alpha(clean, own, kept, gained, floor=1.0).alpha == 0
    with pytest.raises(Refused, match=r"accuracy of 1\.01; got 1\.0"):
        choose_alpha(clean, own, kept, gained, floor=1.01)
    with pytest.raises(Refused, match="empty grid"):
        choose_alpha(clean, own, kept, gained, floor=0.5, grid=())


# storage


def test_bytes_of_packed_levels():
    own = {"w": torch.randn(10, 10, generator=torch.Generator().manual_seed(0)), "b": torch.arange(10.0)}
    assert quantise(own, 16).bytes == 110 * 4 / 8 + 16
    assert quantise(own, 17).bytes == 110 * 5 / 8 + 16
    assert quantise(own, 2).bytes == 110 / 8 + 16
    assert quantise(own, 16).full_bytes == 440
    assert quantise(own, 256).tensors["w"].codes.dtype == torch.uint8


@given(st.integers(0, 10_000), st.sampled_from([4, 5, 8, 16, 255, 256, 1000]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_log_levels_keep_signs_zeros_and_proportions(seed, levels, zeros):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(30, generator=g) * torch.logspace(-6, 0, 30)
    if zeros:
        x[::5] = 0
    stored = quantise({"w": x}, levels, "log")
    back = stored.restore()["w"]
    assert torch.equal(back.sign(), x.sign())
    assert 0 <= int(stored.tensors["w"].codes.min()) <= int(stored.tensors["w"].codes.max()) < levels
    size = x[x != 0].abs().log2()
    steps = (levels - zeros) // 2 - 1
    allowed = float(size.max() - size.min()) / (2 * max(steps, 1))
    assert bool(((back[x != 0].abs().log2() - size).abs() <= allowed + 1e-4).all())


def test_tanh_levels_are_fine_near_zero():
    x = torch.linspace(-3, 3, 101)
    error = {mode: (quantise({"w": x}, 64, mode).restore()["w"] - x).abs() for mode in ("linear", "tanh")}
    near = x.abs() < 0.5
    assert float(error["tanh"][near].max()) < 0.5 * float(error["linear"][near].max())
    spread = math.tanh(3) / 63  # half a step of tanh
    assert float((quantise({"w": x}, 64, "tanh").restore()["w"].tanh() - x.tanh()).abs().max()) <= spread + 1e-6


# BatchNorm


def normed() -> nn.Module:
    with seeded(3):
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 3, 3),
                             nn.BatchNorm2d(3, momentum=0.3))  # fmt: skip


def pictures(*sizes: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(4)
    return [torch.randn(n, 1, 8, 8, generator=g) + k for k, n in enumerate(sizes)]


def test_statistics_are_those_torch_estimates():
    theirs = copy.deepcopy(normed()).eval()
    for module in theirs.modules():
        module.train(isinstance(module, nn.BatchNorm2d))
    theirs[3] = nn.Identity()  # update_bn turns dropout on
    torch.optim.swa_utils.update_bn(pictures(8, 8, 8), theirs)
    ours = restored_batchnorm(normed(), pictures(8, 8, 8))
    for k in (1, 5):
        for part in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(ours[k], part), getattr(theirs[k], part))


def test_statistics_count_every_example_alike():
    ours = restored_batchnorm(normed(), pictures(2, 11, 5))
    with torch.no_grad():
        mean = normed()[0](torch.cat(pictures(2, 11, 5))).mean((0, 2, 3))
    torch.testing.assert_close(ours[1].running_mean, mean)


def test_batchnorm_takes_over_robust_affine_parameters_in_part():
    model, batches = normed(), pictures(6, 6)
    robust = [copy.deepcopy(model.state_dict()) for _ in range(2)]
    robust[0]["1.weight"] += 1.0
    robust[1]["5.bias"] -= 3.0
    before, state = snapshot(model), random_state()
    whole = restored_batchnorm(model, batches, robust=robust)
    torch.testing.assert_close(whole[1].weight, torch.full((4,), 1.5))
    torch.testing.assert_close(whole[5].bias, torch.full((3,), -1.5))
    half = restored_batchnorm(model, batches, robust=robust, scale=0.5)
    for part in ("weight", "bias", "running_mean", "running_var"):
        expected = (getattr(model[1], part) + getattr(whole[1], part)) / 2
        torch.testing.assert_close(getattr(half[1], part), expected)
    none = restored_batchnorm(model, batches, robust=robust, scale=0.0).state_dict()
    assert not difference({n: t for n, t in model.state_dict().items() if t.is_floating_point()},
                          {n: t for n, t in none.items() if t.is_floating_point()})  # fmt: skip
    assert whole.training
    assert (whole[1].momentum, whole[5].momentum) == (0.1, 0.3)
    assert not difference(before, snapshot(model))
    assert not difference(state, random_state())


# refusals


def refuse(match: str, call) -> None:
    with pytest.raises(Refused, match=match):
        call()


def test_refuses_models_that_do_not_fit():
    start, clean, robust = sisters(10)
    without = {name: t for name, t in clean.items() if name != "two.bias"}
    refuse("'two.bias'.*clean; got no such tensor", lambda: extract_signature(start, without, robust, LAYERS))
    wide = {**start, "two.bias": torch.zeros(7)}
    refuse(
        r"'two.bias' must be \(6,\) in pretrained; got \(7,\)", lambda: extract_signature(wide, clean, robust, LAYERS)
    )
    refuse("layer must have tensors.*'tow'.*'two'", lambda: extract_signature(start, clean, robust, ["one", "tow"]))
    refuse("a layer with weights", lambda: extract_signature(start, clean, robust, []))
    for k in range(3):
        spoiled = [dict(state) for state in (start, clean, robust)]
        spoiled[k]["one.bias"] = torch.full((4,), math.nan)
        refuse("'one.bias'.*NaN", lambda spoiled=spoiled: extract_signature(*spoiled, LAYERS))


def test_refuses_patches_that_do_not_fit():
    start, clean, robust = sisters(11)
    own = {"fog": extract_signature(start, clean, robust, LAYERS)}
    refuse("Did you mean 'fog'", lambda: patch(clean, own, {"frog": 1.0}))
    refuse("Choose from: fog", lambda: patch(clean, own, {"jpeg": 1.0}))
    refuse("needs a signature", lambda: patch(clean, {}))
    refuse("finite scales", lambda: patch(clean, own, math.nan))
    refuse("'two.bias'.*the model", lambda: patch({**clean, "two.bias": torch.zeros(5)}, own))
    refuse("'one.bias'.*NaN", lambda: patch({**clean, "one.bias": torch.full((4,), math.nan)}, own))
    refuse("'fog' at 'one.bias'", lambda: patch(clean, {"fog": {"one.bias": torch.full((4,), math.inf)}}))


def test_refuses_counts_levels_and_statistics_out_of_range():
    module = Backwards()
    refuse("from 1 to 3.*got 4.*first", lambda: first_layers(module, torch.ones(2, 4), 4))
    refuse("from 1 to 3", lambda: first_layers(module, torch.ones(2, 4), 0))
    own = {"w": torch.randn(4, generator=torch.Generator().manual_seed(0))}
    refuse("2 to 65536 levels", lambda: quantise(own, 1))
    refuse("4 to 65536 levels", lambda: quantise(own, 3, "log"))
    refuse("mode must be a known name", lambda: quantise(own, 16, "sqrt"))
    refuse("'w'.*NaN", lambda: quantise({"w": torch.tensor([math.nan])}, 16))
    refuse(r"within \+-8 in 'w'", lambda: quantise({"w": torch.tensor([9.0])}, 16, "tanh"))
    refuse("same layers", lambda: signature_cosine([own, {"v": own["w"]}]))
    refuse("NaN", lambda: signature_cosine([{"w": torch.tensor([math.nan])}]))
    refuse("scale from 0 to 1", lambda: restored_batchnorm(normed(), pictures(2), scale=1.5))
    refuse("needs a batch", lambda: restored_batchnorm(normed(), []))
    refuse("BatchNorm layers", lambda: restored_batchnorm(nn.Linear(2, 2), pictures(2)))
    refuse("needs signatures", lambda: signature_cosine([]))
    refuse(r"'w' must be \(2,\) in another", lambda: signature_cosine([own, {"w": torch.ones(2)}]))
    refuse("clean; got no such", lambda: layer_profile({}, {"a.w": torch.ones(1)}))
    refuse("'a.w'.*NaN", lambda: layer_profile({"a.w": torch.ones(1)}, {"a.w": torch.tensor([math.nan])}))


def test_the_paper_and_the_documentation_are_there():
    paper = robust_weight_signatures.PAPER
    assert (paper.year, paper.arxiv) == (2023, "2302.12480")
    for function in (extract_signature, patch, choose_alpha, quantise, first_layers, restored_batchnorm):
        text = inspect.getdoc(function) or ""
        assert all(name in text for name in inspect.signature(function).parameters)
        assert "Args:" in text
