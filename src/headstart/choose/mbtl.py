"""Choose which contexts to train on so that the policies transfer to all of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from headstart.core.paper import Paper
from headstart.core.validate import one_of, require

from .transfer_matrix import Forecast, expected_gain, first_largest, scaled, slopes_of

PAPER = Paper(
    title="Model-Based Transfer Learning for Contextual Reinforcement Learning",
    authors="Jung-Hoon Cho and Vindula Jayawardana and Sirui Li and Cathy Wu",
    year=2024,
    arxiv="2408.04498",
    code="https://github.com/jhoon-cho/MBTL",
    departs="By default contexts are scaled to [0, 1], the Gaussian process is centred and its length bounded, and the "
    "slope is estimated from all rows; mode='paper' has the release's settings. Where no gain is expected anywhere it "
    "explores instead of repeating a source.",
)
EXPLORATION: dict[str, Callable[[int], float]] = {
    "log": lambda k: math.sqrt(math.log(k + 1)), "inverse": lambda k: 1 / (k + 1), "one": lambda k: 1,
    "none": lambda k: 0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MBTL:
    """The next context to train on, so that few trainings serve a whole range of contexts by transfer.

    A Gaussian process forecasts what training on each context reaches there; transfer to another context is taken to
    fall linearly with the distance. Proposed is the context whose policy would raise the best known performance most.

    Args:
        slope: of the fall, per unit of contexts scaled to [0, 1], >= 0: one number, one for each dimension (weighted l1
            distance), or None to estimate it from what was observed. The paper's control tasks have 0.5.
        noise: standard deviation of one evaluation, > 0; None is 0.03, or 0.1 in mode="paper".
        mode: "robust" (contexts in [0, 1], prior mean that of the observed, length in [0.05, 0.5]) or "paper" (grid
            units, zero prior mean, length in [0.01, 100]; it goes back to zero two or three contexts away).
        exploration: how many deviations a forecast is optimistic by at pick k = 1, 2, ...: "log" is √log(k + 1) as
            in the paper, "inverse" 1 / (k + 1), "one" 1, "none" 0.
        low, high: bounds of performance, low < high; costs are negated first.
        restarts: random starts, >= 0, of the fit of the Gaussian process beside the first (paper: 9).
        seed: of these starts.

    Shape: contexts (n,) or (n, q) of numbers -> one index (1,); observed are rows (b, n), each policy on all contexts.

    Use it when: training is dear, evaluation cheap, and performance falls about linearly with the distance of contexts.
    Check that first, on the rows of a few sources, with `transfer_matrix.gap_linearity`.
    Not when: policies transfer everywhere, or to one side only: random or evenly spaced sources do as well there.

    Cost: O(k³ + n k) a fit of the Gaussian process, `restarts` + 1 fits a pick, and O(n²) for the gains.

    Notes: observed is the largest of noisy evaluations; average ten episodes or more. NaN (a training that crashed)
    counts as `low`. In mode="paper" a slope that is estimated is that of the nearest source's own line, as released.

    Raises:
        Refused: contexts that are not numbers or all trained, rows of another length or outside the bounds.

    Reference: Cho et al. 2024, section 4 and algorithm 1.

    >>> x = torch.linspace(0, 1, 5)
    >>> sampler = MBTL(slope=0.5)
    >>> chosen = sampler.propose(x)
    >>> sampler.observe(x[chosen], 0.9 - 0.5 * (x[chosen][:, None] - x).abs())
    >>> chosen.tolist(), sampler.propose(x).tolist()
    ([2], [0])
    """

    slope: float | tuple[float, ...] | None = None
    noise: float | None = None
    mode: Literal["robust", "paper"] = "robust"
    exploration: Literal["log", "inverse", "one", "none"] = "log"
    low: float = 0.0
    high: float = 1.0
    restarts: int = 9
    seed: int = 0
    seen: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        slopes = self.slope if isinstance(self.slope, tuple) else (1.0 if self.slope is None else self.slope,)
        require(bool(slopes) and all(0 <= s < math.inf for s in slopes), "MBTL needs a finite slope >= 0", self.slope,
                "Pass the fall per unit of [0, 1], or None to estimate it.")  # fmt: skip
        noise = 1.0 if self.noise is None else self.noise
        require(0 < noise < math.inf, "MBTL needs a finite noise > 0", noise, "Pass the deviation of an evaluation.")
        one_of("mode", self.mode, ["robust", "paper"])
        one_of("exploration", self.exploration, EXPLORATION)
        require(self.restarts >= 0, "MBTL needs restarts >= 0", self.restarts, "The paper has 9.")
        require(-math.inf < self.low < self.high < math.inf, "MBTL needs finite bounds low < high",
                (self.low, self.high), "Pass the worst and the best performance there can be.")  # fmt: skip

    def propose(self, tasks: Tensor) -> Tensor:
        """The index (1,) of the context to train on next."""
        x, sources = scaled(tasks), self._sources(tasks)
        free = torch.tensor([i not in set(sources) for i in range(len(x))])
        require(bool(free.any()), "MBTL needs a context that is not trained yet", f"{len(x)} of {len(x)} trained",
                "Stop here, or add contexts.")  # fmt: skip
        if not sources:
            return torch.tensor([first_largest(-(x - 0.5).abs().sum(1).round(decimals=9))])  # the middle of the range
        forecast = self.forecast(tasks)
        rank = forecast.gain
        if not bool(forecast.gain[free].max() > 0):  # nothing to gain: go where least is known, then farthest
            spread = forecast.deviation[free]
            even = spread.max() - spread.min() < 1e-9
            rank = (x[:, None] - x[sources]).abs().sum(2).amin(1) if even else forecast.deviation
        return torch.tensor([first_largest(torch.where(free, rank, -math.inf))])

    def observe(self, tasks: Tensor, results: Tensor) -> None:
        """Remember what policies trained on `tasks` (b,) or (b, q) reach on all contexts, `results` (b, n)."""
        require(results.ndim == 2 and len(results) == len(tasks), f"MBTL needs {len(tasks)} rows, one for each source",
                tuple(results.shape), "Evaluate each policy on every context.")  # fmt: skip
        rows = (results.detach().cpu().double() - self.low) / (self.high - self.low)
        outside = (rows < -1e-9) | (rows > 1 + 1e-9)
        require(not bool(outside.any()), f"Performance must lie in {self.low}..{self.high}",
                (results.min().item(), results.max().item()), "Pass low= and high=; negate costs.")  # fmt: skip
        known = self.seen.get("results", rows[:0])
        require(known.shape[1] == rows.shape[1], f"Each row must have {known.shape[1]} contexts", rows.shape[1],
                "Keep the contexts that you began with.")  # fmt: skip
        self.seen["tasks"] = torch.cat([self.seen.get("tasks", tasks[:0].cpu()), tasks.cpu()])
        self.seen["results"] = torch.cat([known, rows.clamp(0, 1)])  # a clamp keeps NaN

    def forecast(self, tasks: Tensor) -> Forecast:
        """What the next training is expected to bring, once something was observed."""
        x, sources = scaled(tasks), self._sources(tasks)
        require(bool(sources), "A forecast needs observed rows", "none", "Train the first proposal.")
        rows = self.seen["results"]
        require(rows.shape[1] == len(x), f"Rows have {rows.shape[1]} contexts", len(x), "Keep the contexts.")
        slopes = slopes_of(self.slope, x, sources, rows, of_nearest=self.mode == "paper")
        falls = torch.einsum("ijd,id->ij", (x[:, None] - x).abs(), slopes)  # weighted l1
        rows = rows.nan_to_num(nan=0.0)
        reached = rows.cummax(0).values[torch.arange(len(rows)), sources]  # on its own context when it was trained
        mean, deviation = self._posterior(x, sources, reached)
        optimistic = mean + EXPLORATION[self.exploration](len(sources)) * deviation
        return Forecast(mean=mean, deviation=deviation, gain=expected_gain(optimistic, falls, rows.amax(0)))

    def select(self, matrix: Tensor, budget: int, contexts: Tensor | None = None) -> tuple[list[int], Tensor]:
        """Benchmark on a known transfer matrix (n, n): the sources in order and their learning curve in [0, 1]."""
        x = torch.arange(len(matrix)) if contexts is None else contexts
        require(1 <= budget <= len(x) == len(matrix), f"The budget must be 1..{len(x)}, one context a row",
                (budget, len(matrix)), "Train fewer sources, and pass one context for each row.")  # fmt: skip
        sampler = replace(self)
        chosen: list[int] = []
        while len(chosen) < budget:
            pick = sampler.propose(x)
            sampler.observe(x[pick], matrix[pick])
            chosen += pick.tolist()
        return chosen, sampler.seen["results"].nan_to_num(nan=0.0).cummax(0).values.mean(1)

    def assignment(self) -> Tensor:
        """For each context (n,) which of the trained sources, in the order observed, does best there."""
        require(bool(self.seen), "An assignment needs observed rows", "none", "Train the first proposal.")
        return self.seen["results"].nan_to_num(nan=0.0).argmax(0)

    def state_dict(self) -> dict[str, Tensor]:
        """What was observed; `load_state_dict` continues with the same proposals."""
        return {name: value.clone() for name, value in self.seen.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state_dict`."""
        self.seen.clear()
        self.seen.update({name: value.clone() for name, value in state.items()})

    def _sources(self, tasks: Tensor) -> list[int]:
        found: list[int] = []
        x = tasks.cpu().reshape(len(tasks), -1)
        for row in (
            (self.seen.get("tasks", x[:0]).reshape(-1, 1, x.shape[1]) == x).all(2).tolist()
        ):  # twins of a context are trained one after the other
            same = [i for i, is_it in enumerate(row) if is_it and i not in found]
            require(bool(same), "Every trained source must be among the contexts", "another", "Keep the contexts.")
            found.append(same[0])
        return found

    def _posterior(self, x: Tensor, sources: Sequence[int], reached: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation (n,) of a Gaussian process through the performance reached at the sources."""
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel

        paper = self.mode == "paper"
        grid = torch.tensor([len(column.unique()) - 1 for column in x.T]) if paper else torch.ones(x.shape[1])
        length = RBF(1.0, (1e-2, 1e2)) if paper else RBF(0.2, (0.05, 0.5))
        noise = (0.1 if paper else 0.03) if self.noise is None else self.noise
        process = GaussianProcessRegressor(ConstantKernel(1.0, (1e-3, 1e3)) * length, alpha=noise**2,
                                           n_restarts_optimizer=self.restarts, random_state=self.seed)  # fmt: skip
        points, centre = (x * grid).numpy(), 0.0 if paper else float(reached.mean())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # two or three points often put a length at its bound
            process.fit(points[list(sources)], (reached - centre).numpy())
            mean, deviation = process.predict(points, return_std=True)
        return torch.from_numpy(mean) + centre, torch.from_numpy(deviation)
