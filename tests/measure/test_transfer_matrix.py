"""The transfer matrix: rates by hand, the same examples for both, nothing unknown pretended known."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.attack.mifgsm import MIFGSM
from headstart.core.validate import Refused
from headstart.measure.transfer_matrix import (
    Prepared,
    load_perturbed,
    perturbed,
    save_perturbed,
    transfer_matrix,
)
from headstart.testing.material import digits, trained


class Says(nn.Module):
    """Predicts the class that the first entry names (in tenths)."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot((x[:, 0] * 10).round().long(), 4).float()


def told(*classes: int) -> Tensor:
    return torch.tensor(classes)[:, None] / 10.0


Y = torch.tensor([0, 0, 0, 1, 1])
X = told(0, 0, 1, 1, 1)  # right on four of five


def test_rates_by_hand() -> None:
    moved = {"all": told(2, 2, 2, 2, 2), "one": told(0, 3, 1, 1, 1), "heals": told(0, 0, 0, 1, 1)}
    matrix = transfer_matrix(moved, {"says": Says(), "always 0": lambda x: Says()(0 * x)}, X, Y)
    assert matrix.counted.tolist() == [4, 3]
    assert matrix.clean.tolist() == pytest.approx([0.8, 0.6])
    assert matrix.success.tolist() == [[1, 0], [0.25, 0], [0, 0]]
    assert matrix.error.tolist() == [[1, 0.4], [0.4, 0.4], [0, 0.4]]
    success, counted = matrix.of_class(0)
    assert success.tolist() == [[1, 0], [0.5, 0], [0, 0]]
    assert counted.tolist() == [2, 3]
    parts = [matrix.of_class(label) for label in (0, 1)]
    assert torch.allclose(sum(rate * n for rate, n in parts) / matrix.counted, matrix.success)


def test_a_victim_right_on_nothing_is_unknown_not_nan() -> None:
    matrix = transfer_matrix({"same": X}, {"always 3": lambda x: Says()(0 * x + 0.3)}, X, Y)
    assert (matrix.counted.tolist(), matrix.success.tolist(), matrix.clean.tolist()) == ([0], [[0]], [0])
    assert (matrix.low.tolist(), matrix.high.tolist(), matrix.error.tolist()) == ([[0]], [[1]], [[1]])
    success, counted = matrix.of_class(1)
    assert (success.tolist(), counted.tolist()) == ([[0]], [0])


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 30), seed=st.integers(0, 999))
def test_intervals_hold_the_rate_and_unmoved_examples_fool_nobody(n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=generator)
    x, moved = (told(*torch.randint(4, (n,), generator=generator).tolist()) for _ in range(2))
    matrix = transfer_matrix({"moved": moved, "same": x}, {"says": Says()}, x, y, resamples=200, seed=seed)
    for name in ("success", "error", "low", "high", "clean"):
        values = getattr(matrix, name)
        assert bool(((values >= 0) & (values <= 1)).all()), name  # so not NaN either
    assert bool((matrix.low <= matrix.success).all())
    assert bool((matrix.success <= matrix.high).all())
    assert float(matrix.success[1, 0]) == 0


def test_the_interval_is_that_of_a_binomial_where_all_are_counted() -> None:
    n = 400
    y = torch.zeros(n, dtype=torch.long)
    moved = told(*([1] * 100 + [0] * 300))
    matrix = transfer_matrix({"m": moved}, {"says": Says()}, told(*[0] * n), y, resamples=4000)
    half = 1.96 * (0.25 * 0.75 / n) ** 0.5
    assert float(matrix.low) == pytest.approx(0.25 - half, abs=0.006)
    assert float(matrix.high) == pytest.approx(0.25 + half, abs=0.006)


def test_strata_keep_their_size() -> None:
    """Class 0 is always fooled, class 1 never: drawn within classes, the rate cannot vary."""
    y = torch.arange(20) % 2
    moved = torch.where(y == 0, 2, 1)[:, None] / 10
    matrix = transfer_matrix({"m": moved}, {"says": Says()}, y[:, None] / 10, y)
    assert (float(matrix.low), float(matrix.high)) == (0.5, 0.5)


def test_seed_decides_the_draws_and_batches_do_not_matter() -> None:
    x, y = digits()
    x, y, model = x[1000:1090], y[1000:1090], copy.deepcopy(trained())
    moved = perturbed({"own": model}, x, y, MIFGSM(radius=0.1).perturb)
    parts = perturbed({"own": model}, x, y, MIFGSM(radius=0.1).perturb, batch_size=7)
    assert torch.allclose(moved["own"], parts["own"], atol=1e-6)
    state = torch.get_rng_state()
    one, two, other = (
        transfer_matrix(moved, {"own": model}, x, y, seed=seed, batch_size=size)
        for seed, size in ((0, 7), (0, 90), (1, 90))
    )
    assert torch.equal(state, torch.get_rng_state())
    assert (float(one.low), float(one.high)) == (float(two.low), float(two.high))
    assert (float(one.low), float(one.high)) != (float(other.low), float(other.high))
    assert float(one.success) > 0.3  # white-box


def test_radius_zero_fools_nobody_and_models_stay() -> None:
    x, y = digits()
    x, y = x[1000:1040], y[1000:1040]
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
    before = copy.deepcopy(model.state_dict())
    moved = perturbed({"own": model}, x, y, MIFGSM(radius=0.0).perturb)
    assert torch.equal(moved["own"], x)
    assert float(transfer_matrix(moved, {"own": model, "other": trained()}, x, y).success.max()) == 0
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_each_model_prepares_inputs_for_itself() -> None:
    x, y = digits()
    x, y = x[1000:1040], y[1000:1040]
    plain = copy.deepcopy(trained())
    big = nn.Sequential(nn.AvgPool2d(2), plain)  # takes 16x16 pictures in -1..1
    prepared = Prepared(nn.Sequential(big), lambda a: nn.functional.interpolate(a, scale_factor=2.0))
    moved = perturbed({"plain": plain, "big": prepared}, x, y, MIFGSM(radius=0.1).perturb)
    assert torch.allclose(moved["plain"], moved["big"], atol=1e-5)  # the same function, so the same gradients
    matrix = transfer_matrix(moved, {"plain": plain, "big": prepared}, x, y)
    assert float(matrix.success.max() - matrix.success.min()) == 0


def test_kept_examples_come_back_bit_for_bit(tmp_path: Path) -> None:
    x, y = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 0, 1])
    moved = {"z, first": x.flip(0), "a": x.half().float()}
    save_perturbed(tmp_path / "kept.safetensors", moved, x, y)
    back, same_x, same_y = load_perturbed(tmp_path / "kept.safetensors")
    assert list(back) == list(moved)
    assert all(torch.equal(back[name], moved[name]) for name in moved)
    assert torch.equal(same_x, x)
    assert torch.equal(same_y, y)


def test_bad_input_is_refused() -> None:
    never = {"never": lambda x: pytest.fail("ran before the check")}
    for moved, x, y in (
        ({}, X, Y), ({"m": X[:4]}, X, Y), ({"m": X * torch.nan}, X, Y), ({"m": X}, X, Y[:4]), ({"m": X}, X, Y.float()),
        ({"m": X}, X * 100, Y), ({"m": X[:0]}, X[:0], Y[:0]),
    ):  # fmt: skip
        with pytest.raises(Refused):
            transfer_matrix(moved, never, x, y)
    with pytest.raises(Refused):
        transfer_matrix({"m": X}, {}, X, Y)
    with pytest.raises(Refused, match="logits"):
        transfer_matrix({"m": X}, {"nan": lambda x: x * torch.nan}, X, Y)
    with pytest.raises(Refused):
        perturbed({}, X, Y, lambda x, goals: x)
    with pytest.raises(Refused, match="shape"):
        perturbed({"m": Says()}, X, Y, lambda x, goals: x[:, :0])
