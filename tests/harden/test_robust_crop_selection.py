"""Crop selection: the card's known answers, locality of the scores, ties, the cyclic mode, batch against loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.core.validate import Refused
from headstart.harden import RICS, select_crop
from headstart.harden.crop_scores import score_map

NAMES = ("edges", "random", "small")


def pictures(n: int = 4, side: int = 32, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


def linear(size: int, channels: int = 3) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 5))
    weight = model[1].weight.data
    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.mark.parametrize("size", [8, 20])  # both ways to correlate
@pytest.mark.parametrize("score", NAMES)
def test_a_score_is_that_of_its_crop_alone(score, size):
    views = pictures(2, 24)
    scores = score_map(views, size, score, seed=3)
    assert scores.shape == (2, 25 - size, 25 - size)
    for r in range(25 - size):
        for c in range(25 - size):
            alone = score_map(views[:, :, r : r + size, c : c + size], size, score, seed=3)[:, 0, 0]
            torch.testing.assert_close(alone, scores[:, r, c], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [6, 13])
def test_the_random_score_is_an_inner_product_with_a_zero_mean_filter(size):
    views = pictures(1, 20)
    kernel = torch.randn(size, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    kernel = (kernel - kernel.mean()) / (kernel - kernel.mean()).norm()
    expected = F.conv2d(views.double().mean(1, keepdim=True), kernel[None, None])[:, 0]
    torch.testing.assert_close(score_map(views, size, "random", seed=5), expected, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(NAMES), st.integers(5, 14), st.integers(0, 6), st.integers(0, 6), st.integers(0, 2**16))
def test_it_is_the_loop_over_all_crops(score, size, more, wider, seed):
    views = torch.rand(2, 2, size + more, size + wider, generator=torch.Generator().manual_seed(seed))
    crops, at = select_crop(views, size, score, seed=seed)
    for k, view in enumerate(views):
        found = {
            (r, c): float(score_map(view[None, :, r : r + size, c : c + size], size, score, seed=seed))
            for r in range(more + 1)
            for c in range(wider + 1)
        }
        r, c = max(found, key=lambda place: found[place])
        assert at[k].tolist() == [r, c]
        assert torch.equal(crops[k], view[:, r : r + size, c : c + size])
        alone = select_crop(view[None], size, score, seed=seed)
        assert torch.equal(alone[0][0], crops[k])


@pytest.mark.parametrize("score", NAMES)
def test_brightness_and_contrast_do_not_move_the_crop(score):
    views = pictures(16)
    at = select_crop(views, 20, score)[1]
    assert len({tuple(place) for place in at.tolist()}) > 4
    assert torch.equal(at, select_crop(0.25 * views, 20, score)[1])
    assert torch.equal(at, select_crop(views + 3, 20, score)[1])


@pytest.mark.parametrize("score", NAMES)
def test_no_larger_than_the_crop_is_the_plain_model(score):
    views, model = pictures(3, 16), linear(16)
    assert torch.equal(RICS(model, 16, score)(views), model(views))


@pytest.mark.parametrize("score", NAMES)
@pytest.mark.parametrize("size", [8, 20])
def test_a_flat_picture_is_cropped_at_its_first_corner(score, size):
    for grey in (0.0, 0.1, 1 / 3):
        crops, at = select_crop(torch.full((2, 3, 30, 30), grey), size, score)
        assert at.tolist() == [[0, 0], [0, 0]]
        assert torch.equal(crops, torch.full((2, 3, size, size), grey))


def answered(score: str, size: int, seed: int = 0) -> Tensor:
    """A crop (m, m) around grey 0.5 with the highest score for its contrast: the filter itself, up to its sign."""
    points = torch.eye(size * size, dtype=torch.float64).view(-1, 1, size, size)
    middle = size * size // 2
    kernel = score_map(points + 1e3 * points[middle], size, score, seed=seed)[:, 0, 0]
    kernel = (kernel - 1e3 * score_map(points[middle, None], size, score, seed=seed)[0, 0, 0]).view(size, size)
    return (0.5 + 0.5 * kernel / kernel.abs().max()).float()


@pytest.mark.parametrize("score", NAMES)
def test_a_patch_in_the_middle_is_the_same_crop_under_all_small_shifts(score):
    scene = torch.full((1, 1, 40, 40), 0.5)
    scene[0, 0, 14:25, 14:25] = answered(score, 11)
    for a in range(-4, 5):
        for b in range(-4, 5):
            crop, at = select_crop(scene[:, :, 4 + a : 36 + a, 4 + b : 36 + b], 11, score)
            assert torch.equal(crop, scene[:, :, 14:25, 14:25])
            assert at.tolist() == [[10 - a, 10 - b]]


@pytest.mark.parametrize("score", NAMES)
def test_the_same_crop_whenever_the_best_of_both_views_lies_in_both(score):
    """And only then: the best of the union is found from scores of the whole scene."""
    scenes, size, view, together = pictures(24, 30), 14, 24, 0
    scores = score_map(scenes, size, score)
    for a, b in ((1, 0), (0, -1), (1, 1), (3, -2)):
        one, two = (select_crop(scenes[:, :, 3 + r : 3 + r + view, 3 + c : 3 + c + view], size, score)[0]
                    for r, c in ((0, 0), (a, b)))  # fmt: skip
        for k in range(len(scenes)):
            seen = [{(r, c) for r in range(3 + x, 14 + x) for c in range(3 + y, 14 + y)} for x, y in ((0, 0), (a, b))]
            best = max(seen[0] | seen[1], key=lambda place: float(scores[(k, *place)]))
            assert torch.equal(one[k], two[k]) == (best in seen[0] & seen[1])
            together += best in seen[0] & seen[1]
    assert 0 < together < 4 * 24


def test_ties_are_broken_by_content():
    """The small score sees only the middle of a crop, and two crops here share it."""
    chosen = set()
    for seed in range(12):
        scene = torch.full((1, 1, 16, 40), 0.5)
        scene[0, 0, 2:13, 3:14] = scene[0, 0, 2:13, 26:37] = answered("small", 11, seed)
        scene[0, 0, 3, 5] = scene[0, 0, 3, 35] = 0.51  # at other places of the two crops
        scores = score_map(scene, 11, "small", seed=seed)[0, 2]
        assert scores.argmax() in (3, 26)
        assert abs(scores[3] - scores[26]) < 1e-12
        crop, at = select_crop(scene, 11, "small", seed=seed)
        swapped, other = select_crop(torch.cat([scene[..., 20:], scene[..., :20]], 3), 11, "small", seed=seed)
        assert torch.equal(crop, swapped)
        assert (at[0, 1] - other[0, 1]).abs() == 20
        chosen.add(int(at[0, 1]))
    assert chosen == {3, 26}  # by place it would be 3 each time


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(NAMES), st.sampled_from([5, 13, 16]), st.integers(0, 15), st.integers(0, 15), st.integers(0, 99))
def test_cyclic_selection_follows_every_roll(score, size, a, b, seed):
    views, model = pictures(2, 16, 1, seed), linear(size, 1)
    crops, at = select_crop(views, size, score, cyclic=True)
    rolled, moved = select_crop(views.roll((a, b), (2, 3)), size, score, cyclic=True)
    assert torch.equal(moved, (at + torch.tensor([a, b])) % 16)
    assert torch.equal(crops, rolled)
    robust = RICS(model, size, score, cyclic=True)
    assert torch.equal(robust(views), robust(views.roll((a, b), (2, 3))))


def brightest(views: Tensor) -> Tensor:
    return F.avg_pool2d(views.mean(1, keepdim=True), 8, stride=1)[:, 0]


def test_a_users_score_is_followed():
    views = pictures(3, 24)
    crops, at = select_crop(views, 8, brightest)
    scores = brightest(views.double()).flatten(1)
    assert at.tolist() == [[k // 17, k % 17] for k in scores.argmax(1).tolist()]
    assert torch.equal(crops[0], views[0][:, at[0, 0] : at[0, 0] + 8, at[0, 1] : at[0, 1] + 8])


NOT_LOCAL = {
    "padded": lambda v: F.avg_pool2d(F.pad(v.mean(1, keepdim=True), (1, 1, 1, 1)), 10, 1)[:, 0],
    "normalised": lambda v: brightest((v - v.mean()) / v.std()),
    "by place": lambda v: brightest(v) + torch.arange(v.shape[3] - 7) / 1e3,
    "single precision": lambda v: brightest(v).float(),
    "another shape": lambda v: v.mean(1),
    "NaN": lambda v: brightest(v) * torch.nan,
}


@pytest.mark.parametrize("score", list(NOT_LOCAL))
def test_a_score_that_depends_on_more_than_its_crop_is_refused(score):
    with pytest.raises(Refused, match=r"crop score"):
        select_crop(pictures(2, 24), 8, NOT_LOCAL[score])


def test_gradients_pass_and_nothing_is_left_behind():
    views, model = pictures(2, 24).requires_grad_(), linear(16)
    before, state = views.detach().clone(), torch.get_rng_state()
    robust = RICS(model, 16)
    robust(views).sum().backward()
    at = robust.select(views)[1]
    expected = torch.zeros_like(before)
    for k, (r, c) in enumerate(at.tolist()):
        expected[k, :, r : r + 16, c : c + 16] = model[1].weight.sum(0).view(3, 16, 16)
    torch.testing.assert_close(views.grad, expected)
    assert torch.equal(views.detach(), before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8])
def test_the_crop_keeps_its_dtype_and_is_chosen_in_double_precision(dtype):
    views = (255 * pictures(4, 24)).floor().to(dtype)
    crops, at = select_crop(views, 16)
    assert crops.dtype == dtype
    assert torch.equal(at, select_crop(views.double(), 16)[1])


@pytest.mark.parametrize("refused", [
    lambda: select_crop(pictures(1, 16), 17), lambda: select_crop(pictures(1, 16), 4, "small"),
    lambda: select_crop(pictures(1, 16), 2), lambda: select_crop(pictures(1, 16), 8, "randon"),
    lambda: select_crop(pictures(1, 16)[0], 8), lambda: select_crop(pictures(1, 16)[:0], 8),
    lambda: select_crop(pictures(1, 16) * torch.nan, 8), lambda: RICS(nn.Identity(), 8, "randon"),
])  # fmt: skip
def test_bad_input_is_refused(refused):
    with pytest.raises(Refused, match=r"; got .*\. "):
        refused()
