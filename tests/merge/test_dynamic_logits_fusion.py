"""Dynamic logits fusion: known answers of the card, with softmaxes, autograd and grids beside it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.core.rng import random_state
from headstart.core.validate import Refused
from headstart.merge import DynamicLogitsFusion, fuse_logits
from headstart.merge.tilt import CLOSE, Path, Search, solve
from headstart.testing.subject import difference, snapshot

DIRECTIONS = ["forward", "reverse", "symmetric"]
every_direction = pytest.mark.parametrize("direction", DIRECTIONS)


def logits(seed: int, *shape: int, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def trio(n: int = 6, c: int = 30, experts: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Large, small, and experts that moved by different amounts from the small one."""
    small = logits(seed, n, c)
    moved = [small + logits(seed + 2 + t, n, c, scale=0.5 + 0.4 * t) for t in range(experts)]
    return logits(seed + 1, n, c) + 0.5 * small, small, moved


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1)


def objective(alpha: Tensor, large: Tensor, small: Tensor, expert: Tensor, direction: str) -> Tensor:
    """The card's, restated with softmaxes."""
    fused = large + alpha[:, None] * (expert - small)
    forward = (kl(large, fused) - kl(small, expert)) ** 2
    reverse = (kl(fused, large) - kl(expert, small)) ** 2
    return {"forward": forward, "reverse": reverse, "symmetric": forward + reverse}[direction]


# known answers of the card


@every_direction
@pytest.mark.parametrize("mode", ["axis", "uniform"])
def test_1_a_large_model_that_is_the_small_one_becomes_the_expert(direction, mode):
    _, small, (expert,) = trio()
    large = small + torch.arange(6.0, dtype=torch.float64)[:, None]  # the same up to a constant a row
    fused, alpha = fuse_logits(large, small, [expert], direction=direction, mode=mode)
    torch.testing.assert_close(alpha, torch.ones(6, 1, dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(fused.softmax(-1), expert.softmax(-1), atol=1e-8, rtol=0)


@every_direction
def test_2_an_expert_that_is_its_base_changes_nothing(direction):
    large, small, _ = trio()
    for expert in (small, small + 3.0):  # a constant is no change
        fused, alpha = fuse_logits(large, small, [expert], direction=direction)
        assert torch.equal(alpha, torch.zeros(6, 1, dtype=torch.float64))
        assert torch.equal(fused, large)


@every_direction
def test_3_out_of_reach_is_the_largest_alpha_and_at_1_proxy_tuning(direction):
    large, small, (expert,) = trio()
    large = 20 * large  # so sure that the change hardly moves it
    fused, alpha = fuse_logits(large, small, [expert], direction=direction, most=1.0)
    assert torch.equal(alpha, torch.ones(6, 1, dtype=torch.float64))
    torch.testing.assert_close(fused, large + expert - small)


@every_direction
def test_4_a_constant_on_any_row_changes_nothing(direction):
    large, small, (expert,) = trio()
    fused, alpha = fuse_logits(large, small, [expert], direction=direction)
    shifts = logits(9, 3, 6, 1, scale=30)
    again, same = fuse_logits(large + shifts[0], small + shifts[1], [expert + shifts[2]], direction=direction)
    torch.testing.assert_close(same, alpha, atol=1e-8, rtol=0)
    torch.testing.assert_close(again.softmax(-1), fused.softmax(-1), atol=1e-8, rtol=0)


def test_5_two_tokens():
    base, delta = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    values, _, _ = Path.along(base.log_softmax(-1), delta).at(torch.ones(1, dtype=torch.float64))
    assert values[0].tolist() == pytest.approx([0.120115, 0.110944], abs=5e-7)


@given(st.integers(0, 10_000), st.integers(2, 40), st.floats(0.1, 8))
@settings(deadline=None, max_examples=30)
def test_6_both_divergences_grow_from_0_and_match_softmax(seed, c, scale):
    large, delta = logits(seed, 4, c, scale=scale), logits(seed + 1, 4, c, scale=scale)
    path = Path.along(large.log_softmax(-1), delta)
    grid = torch.linspace(0, 3, 31, dtype=torch.float64)
    values = torch.stack([path.at(alpha.expand(4))[0] for alpha in grid])  # (31, 4, 2)
    assert bool((values.diff(dim=0) >= -1e-10).all())
    torch.testing.assert_close(values[0], torch.zeros(4, 2, dtype=torch.float64), atol=1e-12, rtol=0)
    fused = large + grid[20] * delta
    torch.testing.assert_close(values[20], torch.stack([kl(large, fused), kl(fused, large)], -1), atol=1e-9, rtol=1e-9)


def test_6_a_flat_large_model_has_the_root_of_its_limit():
    _, small, (expert,) = trio()
    large = torch.zeros_like(small)
    alpha = fuse_logits(large, small, [expert], direction="forward", most=50.0)[1][:, 0]
    delta = expert - small
    moved = (alpha[:, None] * delta).exp().mean(-1).log() - alpha * delta.mean(-1)
    torch.testing.assert_close(moved, kl(small, expert), atol=1e-8, rtol=0)


@every_direction
def test_7_the_root_is_that_of_a_fine_grid_and_no_value_nearby_is_better(direction):
    large, small, (expert,) = trio(n=200)
    alpha = fuse_logits(large, small, [expert], direction=direction)[1]
    nearest = fuse_logits(large, small, [expert], direction=direction, grid=[k / 1000 for k in range(2001)])[1]
    assert (alpha - nearest).abs().max() <= 1e-3
    best = objective(alpha[:, 0], large, small, expert, direction)
    for step in (-1e-4, 1e-4):
        beside = (alpha[:, 0] + step).clamp(0, 2)
        assert bool((objective(beside, large, small, expert, direction) >= best - 1e-15).all())


def test_7_single_directions_reach_their_target_to_nine_digits():
    large, small, (expert,) = trio(n=200)
    for direction, wanted in (("forward", kl(small, expert)), ("reverse", kl(expert, small))):
        alpha = fuse_logits(large, small, [expert], direction=direction, most=20.0)[1]
        fused = large + alpha * (expert - small)
        reached = kl(large, fused) if direction == "forward" else kl(fused, large)
        assert bool((alpha < 20).all())
        torch.testing.assert_close(reached, wanted, atol=1e-9, rtol=1e-9)


def test_7_derivatives_are_those_of_autograd():
    large, small, (expert,) = trio()
    path = Path.along(large.log_softmax(-1), expert - small)
    alpha = torch.full((6,), 0.7, dtype=torch.float64, requires_grad=True)
    fused = large + alpha[:, None] * (expert - small)
    _, slopes, bends = path.at(alpha.detach())
    for k, value in enumerate((kl(large, fused), kl(fused, large))):
        (slope,) = torch.autograd.grad(value.sum(), alpha, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), alpha, retain_graph=True)
        torch.testing.assert_close(slopes[:, k], slope.detach(), atol=1e-9, rtol=1e-7)
        torch.testing.assert_close(bends[:, k], bend, atol=1e-9, rtol=1e-7)


@every_direction
def test_8_copies_of_an_expert_count_once_and_permuted_experts_permute_alpha(direction):
    large, small, experts = trio(experts=3, n=50)
    fused, alpha = fuse_logits(large, small, experts[:1], direction=direction)
    again, copies = fuse_logits(large, small, experts[:1] * 3, direction=direction)
    torch.testing.assert_close(again, fused)
    torch.testing.assert_close(copies.sum(-1), alpha[:, 0])
    assert bool(((copies > 0).sum(-1) <= 1).all())
    _, weights = fuse_logits(large, small, experts, direction=direction)
    _, permuted = fuse_logits(large, small, [experts[t] for t in (2, 0, 1)], direction=direction)
    torch.testing.assert_close(permuted, weights[:, [2, 0, 1]])
    assert len(weights.nonzero()[:, 1].unique()) > 1  # not always the same one


@every_direction
@pytest.mark.parametrize("mode", ["axis", "uniform"])
def test_9_rows_are_fused_as_if_alone(direction, mode):
    large, small, experts = trio(experts=2, n=20)
    large[:10] *= 8  # some rows take many more steps than others
    together = fuse_logits(large, small, experts, direction=direction, mode=mode)
    alone = [fuse_logits(large[k : k + 1], small[k : k + 1], [e[k : k + 1] for e in experts],
                         direction=direction, mode=mode) for k in range(20)]  # fmt: skip
    for k in range(2):
        torch.testing.assert_close(together[k], torch.cat([one[k] for one in alone]), atol=1e-13, rtol=1e-13)


# several experts


@every_direction
def test_on_axes_the_joint_objective_is_the_least_of_a_search_along_all_axes(direction):
    large, small, experts = trio(experts=3, n=40)
    _, weights = fuse_logits(large, small, experts, direction=direction)
    singles = [fuse_logits(large, small, [e], direction=direction)[1][:, 0] for e in experts]

    def joint(t: int) -> Tensor:
        fused = large + singles[t][:, None] * (experts[t] - small)
        forward = sum((kl(large, fused) - kl(small, e)) ** 2 for e in experts)
        reverse = sum((kl(fused, large) - kl(e, small)) ** 2 for e in experts)
        return (direction != "reverse") * forward + (direction != "forward") * reverse

    expected = torch.stack([joint(t) for t in range(3)], -1)
    chosen = weights.argmax(-1)
    torch.testing.assert_close(expected.gather(-1, chosen[:, None])[:, 0], expected.amin(-1))
    torch.testing.assert_close(weights.sum(-1), torch.stack(singles, -1).gather(-1, chosen[:, None])[:, 0])


def test_of_two_experts_in_reach_the_one_that_moved_further_wins():
    small = logits(0, 30, 20)
    near, far = small + logits(2, 30, 20, scale=0.2), small + logits(3, 30, 20, scale=0.6)
    for at, order in ((1, [near, far]), (0, [far, near])):
        _, weights = fuse_logits(small, small, order, direction="forward")
        assert weights.argmax(-1).tolist() == [at] * 30


@every_direction
def test_uniform_is_the_best_common_alpha(direction):
    large, small, experts = trio(experts=3, n=20)
    _, weights = fuse_logits(large, small, experts, mode="uniform", direction=direction)
    assert torch.equal(weights, weights[:, :1].expand(-1, 3))

    def joint(alpha: Tensor) -> Tensor:
        fused = large + alpha[:, None] * sum(e - small for e in experts)
        forward = sum((kl(large, fused) - kl(small, e)) ** 2 for e in experts)
        reverse = sum((kl(fused, large) - kl(e, small)) ** 2 for e in experts)
        return (direction != "reverse") * forward + (direction != "forward") * reverse

    tried = torch.stack([joint(torch.full((20,), k / 200, dtype=torch.float64)) for k in range(401)])
    assert bool((joint(weights[:, 0]) <= tried.amin(0) + 1e-12).all())


# the numbers


def test_a_token_that_any_model_excludes_is_left_out_of_everything():
    large, small, experts = trio(experts=2, c=12)
    kept = [0, 1, 3, 4, 6, 7, 8, 9, 10]
    large[:, 2], small[:, 5], experts[1][:, 11] = -torch.inf, -torch.inf, -torch.inf
    fused, weights = fuse_logits(large, small, experts)
    assert bool((fused[:, [2, 5, 11]] == -torch.inf).all())
    left, same = fuse_logits(large[:, kept], small[:, kept], [e[:, kept] for e in experts])
    torch.testing.assert_close(weights, same)
    torch.testing.assert_close(fused[:, kept], left)


def test_a_mask_of_the_least_number_excludes_as_minus_infinity_does():
    for where in range(3):
        given = [t if isinstance(t, Tensor) else t[0] for t in trio(c=12)]
        results = []
        for mask in (-torch.inf, torch.finfo(torch.float64).min):
            given[where][:, 4] = mask
            results.append(fuse_logits(given[0], given[1], given[2:]))
        assert not difference(*results)


def test_one_token_left_is_certain():
    large = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    fused, alpha = fuse_logits(large, logits(0, 1, 3).float(), [logits(1, 1, 3).float()])
    assert (fused.softmax(-1).tolist(), alpha.item()) == ([[1, 0, 0]], 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_first(dtype):
    large, small, (expert,) = trio(c=500)
    expert = small + 0.05 * (expert - small)  # divergences of about 1e-3
    halves = [t.to(dtype) for t in (large, small, expert)]
    fused, alpha = fuse_logits(halves[0], halves[1], halves[2:])
    wide, exact = fuse_logits(halves[0].double(), halves[1].double(), [halves[2].double()])
    assert (fused.dtype, alpha.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(alpha, exact.float())
    torch.testing.assert_close(fused, wide.float())


def test_huge_changes_stay_finite():
    large, small, (expert,) = trio()
    for factor in (1e3, 1e6, 1e30):
        for direction in DIRECTIONS:
            fused, alpha = fuse_logits(large, small, [small + factor * (expert - small)], direction=direction)
            assert bool(fused.isfinite().all())
            assert bool(((alpha >= 0) & (alpha <= 2)).all())


@given(st.integers(0, 10_000), st.integers(2, 30), st.floats(0.1, 6), st.sampled_from(DIRECTIONS))
@settings(deadline=None, max_examples=60)
def test_any_logits_get_an_alpha_as_good_as_the_best_of_a_grid(seed, c, scale, direction):
    large, small = logits(seed, 5, c, scale=scale), logits(seed + 1, 5, c, scale=scale)
    expert = small + logits(seed + 2, 5, c, scale=1.0)
    _, alpha = fuse_logits(large, small, [expert], direction=direction)
    _, coarse = fuse_logits(large, small, [expert], direction=direction, grid=[k / 10 for k in range(21)])
    assert bool(((alpha >= 0) & (alpha <= 2)).all())
    best, tried = (objective(a[:, 0], large, small, expert, direction) for a in (alpha, coarse))
    moved = coarse[:, 0] > 0  # where rounding alone moves, alpha is 0 by rule
    assert bool((best <= tried + 1e-9)[moved].all())


def test_the_search_ends_where_a_divergence_jumps():
    log_p = torch.tensor([[0.0, -40, -90]], dtype=torch.float64).log_softmax(-1)
    path = Path.along(log_p, torch.tensor([[0.0, 60, 100]], dtype=torch.float64))
    for goal in (1e-9, 1e-3, 1.0, 20.0, 39.0):
        for which, search in enumerate((Search(forward=True, reverse=False, most=2.0),
                                        Search(forward=False, reverse=True, most=2.0))):  # fmt: skip
            alpha = search.alpha(path, torch.full((1, 2), goal, dtype=torch.float64))
            low, high = (path.at((alpha + step).clamp(0, 2))[0][0, which] for step in (-3 * CLOSE, 3 * CLOSE))
            assert low <= goal <= high


def test_steps_that_only_creep_are_halved_into_the_root():
    start, low, high = (torch.full((1,), value, dtype=torch.float64) for value in (2.0, 0.0, 2.0))
    found = solve(lambda alpha: 1e-4 * (alpha - 0.3).sign(), start, low, high)
    assert found.item() == pytest.approx(0.3, abs=1e-8)


def test_a_grid_takes_the_nearest_of_its_values_in_any_order():
    large, small, (expert,) = trio(n=100)
    exact = fuse_logits(large, small, [expert], direction="forward")[1]
    fused, alpha = fuse_logits(large, small, [expert], direction="forward", grid=[1.5, 0.0, 0.5, 1.0, 2.0])
    assert set(alpha.flatten().tolist()) <= {0, 0.5, 1, 1.5, 2}
    assert (alpha - exact).abs().max() < 0.5
    torch.testing.assert_close(fused, large + alpha * (expert - small))


def test_leading_dimensions_are_kept():
    large, small, (expert,) = trio(n=6)
    fused, alpha = fuse_logits(large, small, [expert])
    deep = [t.reshape(2, 3, 30) for t in (large, small, expert)]
    again, same = fuse_logits(deep[0], deep[1], deep[2:])
    assert (again.shape, same.shape) == ((2, 3, 30), (2, 3, 1))
    torch.testing.assert_close(again.flatten(0, 1), fused)
    torch.testing.assert_close(same.flatten(0, 1), alpha)


def test_inputs_and_random_state_stay_and_dtype_follows():
    for dtype in (torch.float32, torch.float64):
        large, small, expert = (t.to(dtype) for t in (*trio()[:2], trio()[2][0]))
        before, state = snapshot([large, small, expert]), random_state()
        fused, alpha = fuse_logits(large, small, [expert])
        assert not difference(before, snapshot([large, small, expert]))
        assert not difference(state, random_state())
        assert fused.dtype == alpha.dtype == dtype


# refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": "both"}, "direction must be a known name"),
        ({"mode": "all"}, "mode must be a known name"),
        ({"most": 0.0}, "finite most > 0"),
        ({"most": math.nan}, "finite most > 0"),
        ({"most": math.inf}, "finite most > 0"),
        ({"grid": []}, "finite values >= 0"),
        ({"grid": [-0.1, 1.0]}, "finite values >= 0"),
        ({"grid": [math.nan]}, "finite values >= 0"),
        ({"experts": []}, "needs an expert"),
        ({"small": logits(0, 6, 29)}, "one shape.*vocabulary="),
        ({"small": logits(0, 5, 30)}, "one shape"),
        ({"experts": logits(0, 6, 30)}, "floating"),  # a tensor in place of a list: its rows are no logits
        ({"large": torch.ones(6, 30, dtype=torch.long)}, "floating"),
        ({"vocabulary": 31}, "vocabulary must be 1 to 30"),
        ({"vocabulary": 0}, "vocabulary must be 1 to 30"),
    ],
)
def test_refuses_what_cannot_be_fused(change, message):
    large, small, experts = trio()
    given = {"large": large, "small": small, "experts": experts} | change
    with pytest.raises(Refused, match=message):
        fuse_logits(given.pop("large"), given.pop("small"), given.pop("experts"), **given)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_refuses_nan_infinity_and_rows_without_a_token(bad, where):
    spoiled = [t if isinstance(t, Tensor) else t[0] for t in trio()]
    spoiled[where][3, 4] = bad
    with pytest.raises(Refused, match="1 rows with NaN, inf or only -inf"):
        fuse_logits(spoiled[0], spoiled[1], spoiled[2:])
    spoiled[where][3] = -torch.inf
    with pytest.raises(Refused, match="1 rows"):
        fuse_logits(spoiled[0], spoiled[1], spoiled[2:])


def test_refuses_a_row_that_the_models_together_exclude():
    large, small, (expert,) = trio(c=4)
    large[0, :2], expert[0, 2:] = -torch.inf, -torch.inf
    with pytest.raises(Refused, match="no model excludes"):
        fuse_logits(large, small, [expert])


def test_the_vocabulary_is_cut_when_asked():
    large, small, (expert,) = trio()
    fused, alpha = fuse_logits(torch.cat([large, logits(5, 6, 3)], -1), small, [expert], vocabulary=30)
    assert torch.equal(fused, fuse_logits(large, small, [expert])[0])
    assert torch.equal(alpha, fuse_logits(large, small, [expert])[1])


# classifiers


def test_the_module_fuses_classifiers_and_leaves_them_alone():
    large, small, *experts = (nn.Sequential(nn.Linear(4, 3), nn.Dropout()) for _ in range(4))
    before = snapshot([large, small, *experts])
    model = DynamicLogitsFusion(large, small, experts, mode="uniform")
    x = logits(0, 8, 4, dtype=torch.float32)
    out, alpha = model.train().fused(x)  # frozen models stay in eval mode
    expected = fuse_logits(large[0](x), small[0](x), [e[0](x) for e in experts], mode="uniform")
    assert not difference((out, alpha), expected)
    assert torch.equal(model(x), out)
    assert not [p for p in model.parameters() if p.requires_grad]
    assert not difference(before, snapshot([large, small, *experts]))
    with pytest.raises(Refused, match="needs an expert"):
        DynamicLogitsFusion(large, small, [])
    with pytest.raises(Refused, match="direction"):
        DynamicLogitsFusion(large, small, experts, direction="sideways")
