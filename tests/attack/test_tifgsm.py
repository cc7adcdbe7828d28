"""TI-FGSM: torchattacks' values, the kernel's known numbers, any number of channels, the mean over shifts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.attack import MIFGSM, TIFGSM
from headstart.attack.tifgsm import profile, smoothed
from headstart.core.ascent import misclassify, reach
from headstart.core.rng import seeded
from headstart.core.validate import Refused
from headstart.testing import contract

SMOOTHED = {"optimum_of_a_linear_model": "It follows the smoothed gradient, by design."}

test_contract = contract(
    TIFGSM(size=5),  # the optimum of the check's linear goal, whose weights rise evenly, is the same when smoothed
    refuses=[lambda: TIFGSM(size=4), lambda: TIFGSM(size=0), lambda: TIFGSM(kernel="box"), lambda: TIFGSM(steps=-1),
             lambda: TIFGSM(decay=-1.0), lambda: TIFGSM(step_size=0.0)],
)  # fmt: skip
test_contract_l2 = contract(TIFGSM(radius=0.5, norm="l2", size=5, kernel="linear"), known_failures=SMOOTHED)

KERNELS = ["gaussian", "linear", "uniform"]


def model_of(channels: int = 3) -> nn.Module:
    with seeded(0):
        return nn.Sequential(nn.Conv2d(channels, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(600, 10)).double().eval()


def pictures(n: int = 8, channels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, channels, 12, 12, generator=generator).double()
    return x, torch.randint(10, (n,), generator=generator)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("kernel", "size"), [("gaussian", 15), ("gaussian", 5), ("linear", 7), ("uniform", 7)])
def test_it_is_torchattacks_without_diversity(kernel, size, targeted):
    (x, y), model = pictures(), model_of()
    theirs = pytest.importorskip("torchattacks").TIFGSM(
        model, eps=8 / 255, alpha=2 / 255, decay=1.0, kernel_name=kernel, len_kernel=size, diversity_prob=0.0
    )
    exact = {"gaussian": theirs.gkern, "linear": theirs.lkern, "uniform": theirs.ukern}[kernel](size)
    theirs.stacked_kernel = torch.from_numpy(exact).expand(3, 1, size, size)  # before it was rounded to float32
    if targeted:
        theirs.set_mode_targeted_by_label(quiet=True)
    attack = TIFGSM(radius=8 / 255, step_size=2 / 255, kernel=kernel, size=size)
    with seeded(0):
        expected = theirs(x, y)
    moved = attack.perturb(x, [(reach if targeted else misclassify)(model, y)])
    assert torch.allclose(moved, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [1, 3, 15])
def test_kernels_sum_to_one_and_are_symmetric(kernel, size):
    square = torch.outer(profile(kernel, size), profile(kernel, size))
    assert square.shape == (size, size)
    assert float(square.sum()) == pytest.approx(1, abs=1e-15)
    assert torch.allclose(square, square.flip(0), rtol=1e-12)
    assert torch.equal(square, square.T)


def test_the_published_kernel_falls_by_exp_nine_to_its_corners():
    square = torch.outer(profile("gaussian", 15), profile("gaussian", 15))
    assert float(square[7, 7] / square[0, 0]) == pytest.approx(math.exp(9), rel=1e-12)


@pytest.mark.parametrize("channels", [1, 4])
def test_smoothing_is_one_convolution_a_channel_and_the_mean_over_shifts(channels):
    x = pictures(2, channels)[0]
    window = profile("gaussian", 5)
    square = torch.outer(window, window)
    found = smoothed(x, window)
    slow = F.conv2d(x, square.expand(channels, 1, 5, 5), padding="same", groups=channels)
    assert torch.allclose(found, slow, rtol=0, atol=1e-14)
    padded = F.pad(x, [2] * 4)
    shifts = sum(square[i, j] * padded[:, :, i : i + 12, j : j + 12] for i in range(5) for j in range(5))
    assert torch.allclose(found, shifts, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_of_one_pixel_is_mifgsm(kernel):
    (x, y), model = pictures(channels=1), model_of(1)
    mine = TIFGSM(kernel=kernel, size=1).perturb(x, [misclassify(model, y)])
    assert torch.equal(mine, MIFGSM().perturb(x, [misclassify(model, y)]))


def test_a_linear_goal_is_followed_along_its_smoothed_weights():
    weight = torch.randn(1, 1, 12, 12, generator=torch.Generator().manual_seed(1)).double()
    x = torch.full((2, 1, 12, 12), 0.5).double()
    soft = smoothed(weight, profile("gaussian", 5))
    goal = lambda a: (a * weight).flatten(1).sum(1)  # noqa: E731
    assert torch.allclose(TIFGSM(radius=0.1, size=5).perturb(x, [goal]), x + 0.1 * soft.sign(), rtol=0, atol=1e-9)
    moved = TIFGSM(radius=0.1, size=5, norm="l2").perturb(x, [goal])
    assert torch.allclose(moved, x + 0.1 * soft / soft.norm(), rtol=0, atol=1e-9)


def test_rows_are_refused():
    with pytest.raises(Refused, match="pictures"):
        TIFGSM().perturb(torch.full((1, 64), 0.5), [lambda a: a.sum(1)])
