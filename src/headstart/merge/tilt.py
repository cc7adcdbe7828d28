"""How far along a change of logits a distribution has moved, and where it has moved so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLAT = 1e-12
"""A divergence this small is rounding: the expert is its base."""
CLOSE = 1e-9
"""alpha is found to this."""
CELLS = 8
"""Steps in which the symmetric objective is looked over first: where few tokens are likely it may have two minima."""


@dataclass(frozen=True)
class Path:
    """The distributions P_alpha = softmax(log_p + alpha delta), one path a row.

    Attributes:
        log_p: log-probabilities (..., c); -inf where a token is excluded, and delta 0 there.
        delta: what alpha multiplies (..., c), with mean 0 under P.
        powers: delta to the power of 0 to 3 (..., c, 4).
    """

    log_p: Tensor
    delta: Tensor
    powers: Tensor

    @classmethod
    def along(cls, log_p: Tensor, delta: Tensor) -> Path:
        """The path of a change of logits; a constant in it changes nothing."""
        delta = delta - (log_p.exp() * delta).sum(-1, keepdim=True)
        return cls(log_p, delta, torch.stack([delta**k for k in range(4)], -1))

    def at(self, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """KL(P || P_alpha) and KL(P_alpha || P), their slopes in alpha and their second derivatives: (..., 2) each.

        With mean 0 under P they are log Z and alpha E_alpha[delta] - log Z, with slopes E_alpha[delta] and
        alpha Var_alpha[delta]; both grow with alpha.
        """
        tilted = torch.addcmul(self.log_p, alpha[..., None], self.delta)
        shift = tilted.amax(-1, keepdim=True)  # or exp overflows
        sums = ((tilted - shift).exp_().unsqueeze(-2) @ self.powers).squeeze(-2)  # (..., 4)
        log_z = sums[..., 0].log() + shift[..., 0]
        mean, square, cube = (sums[..., 1:] / sums[..., :1]).unbind(-1)
        variance = (square - mean.square()).clamp(min=0)
        third = cube - 3 * mean * square + 2 * mean**3
        values = torch.stack([log_z, alpha * mean - log_z], -1).clamp(min=0)
        slopes = torch.stack([mean.clamp(min=0), alpha * variance], -1)
        return values, slopes, torch.stack([variance, variance + alpha * third], -1)


@dataclass(frozen=True, kw_only=True)
class Search:
    """Finds the alpha in [0, most] at which the divergences of a path come nearest to given ones, each row by itself.

    Attributes:
        forward, reverse: which divergences count.
        most: the largest alpha.
        grid: values to choose from instead; the first of equals is taken.
    """

    forward: bool
    reverse: bool
    most: float
    grid: Sequence[float] | None = None

    def alpha(self, path: Path, targets: Tensor) -> Tensor:
        """Targets (..., 2) in the order of `Path.at` -> alpha (...); 0 where the targets are."""
        if self.grid is not None:
            values = torch.tensor(sorted(self.grid), dtype=targets.dtype, device=targets.device)
            tried = [self.objective(path.at(value.expand(targets.shape[:-1]))[0], targets) for value in values]
            return values[torch.stack(tried).argmin(0)]
        if self.forward and self.reverse:
            roots = [_root(path, targets, which, self.most) for which in (0, 1)]
            return self._between(path, targets, torch.minimum(*roots), torch.maximum(*roots))
        return _root(path, targets, int(self.reverse), self.most)

    def objective(self, reached: Tensor, targets: Tensor) -> Tensor:
        """The squared differences that count, summed: (..., 2) each -> (...)."""
        squares = (reached - targets).square()
        return self.forward * squares[..., 0] + self.reverse * squares[..., 1]

    def _between(self, path: Path, targets: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The minimum of both squares, which lies between the two roots: outside, both get worse."""
        width = high - low
        tried = torch.stack([low + width * k / CELLS for k in range(1, CELLS + 1)])
        values = torch.stack([self.objective(path.at(alpha)[0], targets) for alpha in tried])
        start = tried.gather(0, values.argmin(0, keepdim=True))[0]

        def move(alpha: Tensor) -> Tensor:
            reached, slopes, bends = path.at(alpha)
            slope = ((reached - targets) * slopes).sum(-1)
            bend = (slopes.square() + (reached - targets) * bends).sum(-1)
            return slope / bend.abs()  # where it bends down, the bracket stops the step

        return solve(move, start, start - width / CELLS, torch.minimum(start + width / CELLS, high))


def _root(path: Path, targets: Tensor, which: int, most: float) -> Tensor:
    """The alpha at which one divergence is its target; `most` if it stays below."""
    target = targets[..., which]
    top = path.at(torch.full_like(target, most))[0][..., which]

    def move(alpha: Tensor) -> Tensor:  # Newton on the square roots: a divergence grows about as alpha squared
        reached, slopes, _ = (both[..., which] for both in path.at(alpha))
        step = 2 * (reached - (reached * target).sqrt()) / slopes
        return step.where(reached > 0, -torch.inf)  # too far left to see a slope

    still, high = target <= FLAT, torch.full_like(target, most)
    settled = still | (top <= target)
    start = high.where(settled, most * (target / top).sqrt())
    return solve(move, start, high.where(settled, 0.0), high).masked_fill(still, 0.0)


def solve(move: Callable[[Tensor], Tensor], alpha: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Newton's steps inside a bracket that shrinks, from `alpha`; rows stop one by one, so none sees the others.

    Args:
        move: alpha -> how much Newton subtracts from it: above 0 right of the root.
        alpha: where to start.
        low, high: the bracket; a row whose bracket is closed stays where it is.
    """
    done = high - low <= CLOSE
    for k in range(100):
        if bool(done.all()):
            break
        step = move(alpha)
        right = step > 0
        low, high = torch.where(right, low, alpha), torch.where(right, alpha, high)
        new, middle = alpha - step, (low + high) / 2
        inside = (new >= low) & (new <= high)  # False for NaN, where the slope is 0
        new = torch.where(inside & (k < 8 or k % 2 == 0), new, middle)  # halving at times, it ends
        new = torch.where(done, alpha, new)
        done |= (new - alpha).abs() <= CLOSE
        alpha = new
    return alpha
