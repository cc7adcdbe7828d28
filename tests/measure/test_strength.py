"""The strength of a perturbation: as strong as pays off, as long as the pictures stay alike."""

from __future__ import annotations

import pytest
import torch

from headstart.core.validate import Refused
from headstart.measure.strength import similarity, strongest
from headstart.testing.material import digits, trained


def test_similarity_falls_with_noise_and_takes_small_pictures() -> None:
    x = digits()[0][:20]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    levels = [float(similarity(x, (x + size * noise).clamp(0, 1)).mean()) for size in (0, 0.1, 0.3, 0.6)]
    assert levels[0] == 1
    assert levels == sorted(levels, reverse=True)
    assert similarity(x[:, :, :4, :3], x[:, :, :4, :3]).tolist() == [1] * 20


def test_similarity_is_the_published_formula_in_one_window() -> None:
    """A 7x7 picture is one window: means, variances and the covariance of its 49 pixels."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(1, 1, 7, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    c1, c2 = 0.01**2, 0.03**2
    covariance = ((a - a.mean()) * (b - b.mean())).sum() / 48
    wanted = (2 * a.mean() * b.mean() + c1) * (2 * covariance + c2)
    wanted /= (a.mean() ** 2 + b.mean() ** 2 + c1) * (a.var() + b.var() + c2)
    assert float(similarity(a, b)) == pytest.approx(float(wanted))


def test_the_strongest_that_is_alike_is_chosen_and_ties_go_up() -> None:
    x, y = digits()
    model = trained()
    x, y = x[1000:1060], y[1000:1060]
    slight, same, other = (x + 1e-4).clamp(0, 1), x.clone(), 1 - x
    assert strongest(model, x, y, [same, slight]) == 1  # neither fools anyone
    assert float(similarity(x, other).mean()) < 0.4
    assert strongest(model, x, y, [slight, other]) == 0  # the other pictures fool, but are not alike
    assert strongest(model, x, y, [slight, other, same], least=-1) == 1


def test_bad_input_is_refused() -> None:
    x, y = digits()
    x, y = x[:8], y[:8]
    with pytest.raises(Refused, match="candidates"):
        strongest(trained(), x, y, [])
    with pytest.raises(Refused, match="mean similarity"):
        strongest(trained(), x, y, [1 - x])
    with pytest.raises(Refused, match="right on some"):
        strongest(lambda a: torch.eye(10)[(y + 1) % 10], x, y, [x])
    with pytest.raises(Refused):
        similarity(x, x[:4])
    with pytest.raises(Refused):
        similarity(x.flatten(1), x.flatten(1))
