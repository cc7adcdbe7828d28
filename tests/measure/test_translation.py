"""Translation: simulated score fields against the formulae, a slow restatement, and what must hold between figures."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.core.validate import Refused
from headstart.measure.translation import (
    cosine_above,
    positions_needed,
    same_crop_everywhere_probability,
    same_crop_probability,
    same_neighbour,
    translation_report,
)


def scenes(n: int = 40, side: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(seed))


def linear(size: int = 10, seed: int = 1) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(size * size, 4), nn.Dropout(0.5))
    model[1].weight.data.copy_(torch.randn(4, size * size, generator=torch.Generator().manual_seed(seed)))
    return model


def brightest(views: Tensor) -> tuple[Tensor, Tensor]:
    """A crop of 6x6 with the brightest top left pixel."""
    rows = views[:, 0, : views.shape[2] - 5, : views.shape[3] - 5]
    first = rows.flatten(1).argmax(1)
    at = torch.stack([first // rows.shape[2], first % rows.shape[2]], 1)
    return torch.stack([v[:, r : r + 6, c : c + 6] for v, (r, c) in zip(views, at.tolist(), strict=True)]), at


@pytest.mark.parametrize(("n", "axis", "diagonal", "everywhere"),
                         [(9, 0.80, 0.653, 0.405), (33, 0.941, 0.887, 0.785), (97, 0.980, 0.960, 0.920)])  # fmt: skip
def test_independent_scores_follow_the_formulae(n, axis, diagonal, everywhere):
    """The card's figures (rounded there), and fields of uniform scores whose best place is looked up."""
    found = (
        same_crop_probability(n, (0, 1)),
        same_crop_probability(n, (-1, 1)),
        same_crop_everywhere_probability(n, 1),
    )
    assert found == pytest.approx((axis, diagonal, everywhere), abs=1e-3)
    if n > 40:
        return
    draws, generator = 4000, torch.Generator().manual_seed(0)
    best = torch.empty(draws, 9, dtype=torch.int64)  # the place in the scene that each of nine views finds
    field = torch.rand(draws, n + 2, n + 2, generator=generator)
    every = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    for k, (a, b) in enumerate(every):
        at = field[:, 1 + a : 1 + a + n, 1 + b : 1 + b + n].flatten(1).argmax(1)
        best[:, k] = (at // n + a) * 1000 + at % n + b
    alike = best == best[:, every.index((0, 0))][:, None]
    simulated = [alike[:, every.index(shift)].double().mean().item() for shift in ((0, 1), (1, 1))]
    simulated.append(alike.all(1).double().mean().item())
    assert simulated == pytest.approx(found, abs=4 * 0.5 / draws**0.5)


@given(st.integers(1, 200), st.integers(0, 8), st.integers(0, 8))
def test_probabilities_are_ordered(n, a, b):
    one, more = same_crop_probability(n, (a, b)), same_crop_probability(n, (a + 1, b))
    assert 0 <= more <= one <= 1
    assert same_crop_probability(n + 1, (a, b)) >= one
    assert same_crop_everywhere_probability(n, max(a, b)) <= one + 1e-12
    assert same_crop_probability(n, (0, 0)) == 1


@given(st.floats(0.001, 0.999), st.integers(1, 5))
def test_the_positions_needed_are_the_fewest(probability, k):
    n = positions_needed(probability, k)
    assert same_crop_everywhere_probability(n, k) >= probability
    assert n == 1 or same_crop_everywhere_probability(n - 1, k) < probability


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("batch_size", [7, 100])
def test_it_is_the_loop_over_shifts(k, batch_size):
    pictures, model = scenes(), linear().train()
    labels = torch.arange(40) % 4
    report = translation_report(model, pictures, labels, view=10, max_shift=k, select=brightest, batch_size=batch_size)
    assert all(module.training for module in model.modules())
    model.eval()
    kept, same = [], []
    base = pictures[:, :, 3:13, 3:13]
    for a, b in report.shifts:
        view = pictures[:, :, 3 + a : 13 + a, 3 + b : 13 + b]
        kept.append(model(view).argmax(1) == model(base).argmax(1))
        same.append((brightest(view)[0] == brightest(base)[0]).flatten(1).all(1))
    assert len(report.shifts) == (2 * k + 1) ** 2 - 1
    assert torch.equal(report.kept, torch.stack(kept))
    assert torch.equal(report.same, torch.stack(same))
    assert torch.equal(report.right, model(base).argmax(1) == labels)
    assert torch.equal(report.places, brightest(base)[1])
    assert report.robustness == torch.stack(kept).all(0).double().mean().item()
    assert report.predicted_everywhere == same_crop_everywhere_probability(5, k)


def test_a_model_of_the_crop_alone_is_at_least_as_consistent_as_its_crop():
    pictures, model = scenes(200), linear(6)
    report = translation_report(lambda v: model.eval()(brightest(v)[0]), pictures, view=10, select=brightest)
    assert bool((report.kept | ~report.same).all())
    assert report.consistency >= report.same_crop > report.same_crop_everywhere > 0
    assert report.consistency >= report.robustness >= report.same_crop_everywhere
    # scores of single pixels are independent and of one law: four standard errors of 200 pictures
    assert report.same_crop == pytest.approx(report.predicted, abs=4 * 0.5 / 200**0.5)
    assert report.same_crop_everywhere == pytest.approx(report.predicted_everywhere, abs=4 * 0.5 / 200**0.5)


def test_rolling_the_scenes_moves_them_in_a_circle():
    pictures, seen = scenes(3, 6), []

    def model(views: Tensor) -> Tensor:
        seen.append(views.clone())
        return views.mean((2, 3)).repeat(1, 2)

    report = translation_report(model, pictures, view=6, max_shift=3, circular=True, select=lambda v: (v, v[:, 0, 0]))
    assert report.predicted is None
    assert report.predicted_everywhere is None
    assert report.robustness == 1
    rolled = {tuple(view[0].flatten().tolist()) for view in seen}
    assert rolled == {tuple(pictures[0].roll((a, b), (1, 2)).flatten().tolist()) for a in range(6) for b in range(6)}


def test_features_are_compared_by_cosine_or_neighbour():
    gallery = torch.eye(3)
    a, b = torch.tensor([[1.0, 0, 0], [1, 0.9, 0]]), torch.tensor([[2.0, 0.1, 0], [0.9, 1, 0]])
    assert same_neighbour(5 * gallery)(a, b).tolist() == [True, False]
    exact = F.cosine_similarity(a, b)
    assert cosine_above(0.995)(a, b).tolist() == (exact > 0.995).tolist() == [True, False]
    loose = translation_report(lambda v: v.flatten(1), scenes(), view=10, same=cosine_above(0.5))
    strict = translation_report(lambda v: v.flatten(1), scenes(), view=10, same=cosine_above(0.9))
    assert loose.consistency > 0.99 > 0.01 > strict.consistency


def test_without_labels_or_selection_nothing_is_said_of_them():
    report = translation_report(linear(), scenes(), view=10)
    nothing = (report.accuracy, report.same_crop, report.same_crop_everywhere, report.places, report.predicted)
    assert nothing == (None,) * 5


@pytest.mark.parametrize("refused", [
    lambda: translation_report(linear(), scenes(), view=15), lambda: translation_report(linear(), scenes()[0], view=9),
    lambda: translation_report(linear(), scenes(), view=10, max_shift=4),
    lambda: translation_report(linear(), scenes(), torch.zeros(3), view=10),
    lambda: translation_report(linear(), scenes(), view=10, circular=True),
    lambda: translation_report(linear(), scenes() * torch.nan, view=10),
    lambda: translation_report(lambda v: v.flatten(1) / 0 * 0, scenes(), view=10),
    lambda: translation_report(linear(), scenes(), view=10, max_shift=0), lambda: positions_needed(1.0),
    lambda: positions_needed(0.0),
    lambda: same_crop_probability(0, (1, 1)), lambda: same_crop_everywhere_probability(3, -1),
])  # fmt: skip
def test_bad_input_is_refused(refused):
    with pytest.raises(Refused, match=r"; got .*\. "):
        refused()
