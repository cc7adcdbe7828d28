"""Which augmented copies of a vision transformer withstand a perturbation best, and are still right."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from headstart.core.ascent import check_inputs, logits
from headstart.core.validate import one_of, require

from .vit_copies import UNCHANGED, Copy, augmented

RANGES = {"heads": (0.0, 0.5), "scores": (0.3, 2.0), "features": (0.4, 1.0)}
"""Where values are looked for."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of one copy.

    Attributes:
        copy: which one.
        relief: cross-entropy of the original less that of the copy on the perturbed inputs: high where the copy
            withstands what fools the original.
        kept: accuracy of the copy on the clean inputs as a share of the original's.
    """

    copy: Copy
    relief: float
    kept: float


def tried(model: nn.Module, copy: Copy, x: Tensor, y: Tensor, moved: Tensor, *, draws: int = 4, seed: int = 0) -> Trial:
    """How well a copy withstands the perturbed inputs, and how often it is right on the clean ones.

    Args:
        model: a vision transformer.
        copy: of it.
        x: clean inputs (n, ...) in [0, 1].
        y: their labels (n,).
        moved: the same inputs perturbed.
        draws: of masks and shuffles, >= 1, averaged.
        seed: of the draws, so that all copies see like ones.

    Cost: 2 forward passes for each draw, and 2 of the original.

    Raises:
        Refused: inputs that do not fit each other, or a model that is right on none of the clean ones.
    """
    require(draws >= 1, "tried needs draws >= 1", draws, "The default is 4.")
    check_inputs(x)
    check_inputs(moved)
    require(x.shape == moved.shape and len(x) == len(y), "A search needs inputs, their labels and the inputs perturbed",
            (tuple(x.shape), tuple(y.shape), tuple(moved.shape)), "Pass x, y and attack.perturb(x, ...).")  # fmt: skip
    generator = Generator().manual_seed(seed)

    def judged() -> tuple[float, float]:
        right = (logits(model, x).argmax(1) == y).double().mean().item()
        return F.cross_entropy(logits(model, moved).double(), y).item(), right

    with torch.no_grad():
        loss, right = judged()
        require(right > 0, "A search needs a model that is right on some of the clean inputs", "none",
                "Check the labels and the preprocessing.")  # fmt: skip
        found = []
        for _ in range(draws):
            with augmented(model, copy, generator):
                found.append(judged())
    losses, rights = zip(*found, strict=True)
    return Trial(copy=copy, relief=loss - math.fsum(losses) / draws, kept=math.fsum(rights) / draws / right)


def find_copies(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    moved: Tensor,
    *,
    by: Sequence[Literal["heads", "scores", "features"]] = ("heads", "scores", "features"),
    search: Literal["grid", "bayes"] = "grid",
    keep: float = 0.9,
    mix: Literal["token", "channel", "batch"] = "token",
    rescale: bool = False,
    points: int = 9,
    guided: int = 15,
    draws: int = 4,
    seed: int = 0,
) -> tuple[Copy, ...]:
    """The copies of a surrogate, one for each way to make them, that withstand a perturbation best and are still right.

    Args:
        model: the surrogate.
        x: calibration inputs (n, ...) in [0, 1], 64 to 256 of them.
        y: their labels (n,).
        moved: the same inputs perturbed, such as by `MIFGSM` on all surrogates.
        by: the ways.
        search: "grid" tries `points` values over the range, "bayes" 5 random ones and then `guided` ones, each where a
            Gaussian process expects the most improvement that keeps to the constraint.
        keep: share of the original's accuracy that a copy must keep, in [0, 1].
        mix: see `Copy`.
        rescale: see `Copy`.
        points: of the grid, >= 2.
        guided: trials of "bayes" after the random ones, >= 0.
        draws: of masks and shuffles for each trial, >= 1.
        seed: of the draws and of the random trials.

    Returns:
        the copies, for `ViTEnsemble(copies=(found, ...))`. Where no value keeps enough accuracy, the copy
        changes nothing.

    Cost: 2 (draws + 1) forward passes of the calibration inputs for each trial.

    Raises:
        Refused: what `tried` and `Copy` refuse, or an argument out of range.
    """
    one_of("search", search, ["grid", "bayes"])
    require(0 <= keep <= 1, "find_copies needs 0 <= keep <= 1", keep, "The default is 0.9.")
    require(points >= 2 and guided >= 0, "find_copies needs points >= 2 and guided >= 0", (points, guided), "Raise it.")
    for name in by:
        one_of("by", name, RANGES)
    found = []
    for name in by:

        def trial(value: float, name: Literal["heads", "scores", "features"] = name) -> Trial:
            copy = Copy(by=name, value=value, mix=mix, rescale=rescale)
            return tried(model, copy, x, y, moved, draws=draws, seed=seed)

        if search == "grid":
            trials = [trial(value) for value in np.linspace(*RANGES[name], points).tolist()]
        else:
            trials = _bayes(trial, RANGES[name], keep, guided, seed)
        good = [t for t in trials if t.kept >= keep]
        original = Copy(by=name, value=UNCHANGED[name], mix=mix, rescale=rescale)
        found.append(max(good, key=lambda t: t.relief).copy if good else original)
    return tuple(found)


def _bayes(
    trial: Callable[[float], Trial], ends: tuple[float, float], keep: float, guided: int, seed: int
) -> list[Trial]:
    """5 random trials, then those of the highest expected improvement times the chance of keeping enough accuracy."""
    from scipy.stats import norm

    low, high = ends
    values = np.random.default_rng(seed).uniform(low, high, 5).tolist()
    trials, grid = [trial(value) for value in values], np.linspace(low, high, 201)
    for _ in range(guided):
        good = [t.relief for t in trials if t.kept >= keep]
        mean, spread = _process(values, [t.relief for t in trials], grid, ends)
        kept, doubt = _process(values, [t.kept for t in trials], grid, ends)
        chance = norm.cdf((kept - keep) / doubt)
        z = (mean - max(good, default=-math.inf)) / spread
        gain = chance * spread * (z * norm.cdf(z) + norm.pdf(z)) if good else chance
        gain[np.isin(grid, values)] = -1  # a value gives the same each time
        values.append(float(grid[gain.argmax()]))
        trials.append(trial(values[-1]))
    return trials


def _process(
    values: list[float], heights: list[float], grid: np.ndarray, ends: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, at the points of the grid, of a Gaussian process through what was found."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern, WhiteKernel

    kernel = Matern(length_scale=0.3, length_scale_bounds=(0.05, 3.0), nu=2.5) + WhiteKernel(1e-3, (1e-6, 0.3))
    at, between = ((np.asarray(v)[:, None] - ends[0]) / (ends[1] - ends[0]) for v in (values, grid))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length at its bound is fine
        process = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0).fit(at, np.asarray(heights))
    mean, spread = process.predict(between, return_std=True)
    return mean, np.maximum(spread, 1e-9)
