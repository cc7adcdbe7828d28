"""Move a large model as far as fine-tuning moved a small one, token by token, in logits alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headstart.core.paper import Paper
from headstart.core.plan import Teacher
from headstart.core.validate import one_of, require

from .tilt import FLAT, Path, Search

PAPER = Paper(
    title="On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion",
    authors="Fan et al.",
    year=2024,
    arxiv="2406.15480",
    departs="Solves for alpha instead of trying 21 values, as `grid=` does. Of several experts, each searched on its "
    "own axis, the one with the smallest joint objective is used; that objective alone does not tell them apart.",
)
Direction = Literal["forward", "reverse", "symmetric"]
Mode = Literal["axis", "uniform"]


@torch.no_grad()
def fuse_logits(
    large: Tensor, small: Tensor, experts: Sequence[Tensor], *, direction: Direction = "symmetric", mode: Mode = "axis",
    most: float = 2.0, grid: Sequence[float] | None = None, vocabulary: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Logits of a large model with what small experts learnt, and how much of each expert is in them.

    The change of an expert from its small base is added to the large model, alpha times: for each row the alpha at
    which the large model is moved as far from itself, in KL, as the small one was. No weights, no training.

    Args:
        large: logits of the large model, next tokens or classes.
        small: logits of the small model that the experts were fine-tuned from, same context and vocabulary.
        experts: logits of each expert.
        direction: which divergence from the base is matched: "forward" KL(base || moved), "reverse" KL(moved || base),
            or "symmetric", the sum of both squared differences.
        mode: of several experts, "axis" uses one a row, which matches all experts' divergences best when alone;
            "uniform" adds all of them with one alpha.
        most: the largest alpha (a_max), > 0; the paper's search ends at 2.
        grid: values >= 0 to choose alpha from; None solves for it. The paper's are 0, 0.1, ..., 2.
        vocabulary: cut all logits to this many first entries, which must mean the same token (`common_vocabulary`);
            None refuses differing sizes.

    Shape: (..., c) each -> (..., c) and alpha (..., experts), in `large`'s dtype; float32 for half precision.

    Use it when: fine-tuning the large model is out of reach, and a small one of the same vocabulary was fine-tuned.
    Not when: the expert is worse than its base (its change is added all the same), or tokenizers differ.

    Cost: about 8 passes over the logits of an expert for one direction, 25 for both; 21 for the paper's grid.

    Notes: apply temperature, top-p and penalties to what comes out. Rows do not depend on one another. A token with
    -inf, or the least number of the dtype, in any model is excluded: -inf in the result, left out of the divergences.
    An expert equal to its base gets alpha 0; a divergence out of reach gets `most`. With alpha 1 this is proxy-tuning.
    Works in float64. Where the models are all but certain, the symmetric objective can have two minima, and rarely the
    worse one is found.

    Raises:
        Refused: no expert, differing shapes or devices, NaN, a row of -inf, most <= 0, a bad grid.

    Reference: Fan et al. 2024, section 3 (their objective; the root is exact here).

    >>> base, expert = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    >>> fuse_logits(base, base, [expert])
    (tensor([[1., 0.]]), tensor([[1.]]))
    """
    check_options(direction, mode, most, grid)
    given = _checked(large, small, experts, vocabulary)
    wide = [logits.double() for logits in given]
    alive = torch.stack([logits > torch.finfo(logits.dtype).min for logits in given]).all(0)
    require(bool(alive.any(-1).all()), "Each row must keep a token that no model excludes", "none in some row",
            "Check which tokens are masked with -inf.")  # fmt: skip
    log_p, log_q = (logits.masked_fill(~alive, -torch.inf).log_softmax(-1) for logits in wide[:2])
    deltas = [(expert - wide[1]).masked_fill(~alive, 0) for expert in wide[2:]]
    one = log_p.new_ones(log_p.shape[:-1])
    targets = torch.stack([Path.along(log_q, delta).at(one)[0] for delta in deltas], -2)  # (..., experts, 2)
    search = Search(forward=direction != "reverse", reverse=direction != "forward", most=most, grid=grid)
    if mode == "uniform":  # the sum over experts differs from their mean target's by a constant
        total = torch.stack(deltas).sum(0)
        weights = search.alpha(Path.along(log_p, total), targets.mean(-2))[..., None].expand(*one.shape, len(deltas))
    else:
        weights = _on_axes(search, [Path.along(log_p, delta) for delta in deltas], targets)
    moved = sum((weights[..., t, None] * delta for t, delta in enumerate(deltas)), wide[0])
    dtype = torch.promote_types(large.dtype, torch.float32)
    return moved.masked_fill(~alive, -torch.inf).to(dtype), weights.to(dtype)


def _on_axes(search: Search, paths: Sequence[Path], targets: Tensor) -> Tensor:
    """Each expert's alpha where it alone serves all experts' targets best, 0 elsewhere; equals go to the larger target.

    Targets (..., experts, 2) -> (..., experts).
    """
    alphas = torch.stack([search.alpha(path, targets[..., t, :]) for t, path in enumerate(paths)], -1)
    if len(paths) == 1:
        return alphas
    reached = torch.stack([path.at(alphas[..., t])[0] for t, path in enumerate(paths)], -2)
    joint = search.objective(reached[..., :, None, :], targets[..., None, :, :]).sum(-1)  # (..., experts)
    tied = joint <= joint.amin(-1, keepdim=True) * (1 + 1e-6) + FLAT**2  # two that reach both targets always tie
    first = targets[..., 0].masked_fill(~tied, -1).argmax(-1, keepdim=True)
    return torch.zeros_like(alphas).scatter(-1, first, alphas.gather(-1, first))


class DynamicLogitsFusion(nn.Module):
    """A large classifier with what small experts learnt: one module from inputs to logits, nothing trained.

    Args:
        large, small: models that map the same inputs to logits of the same classes; frozen, in eval mode.
        experts: models fine-tuned from `small`.
        direction, mode, most, grid: as for `fuse_logits`.

    Cost: one forward pass of every model.

    Reference: Fan et al. 2024.

    >>> large, small, expert = (nn.Linear(4, 3) for _ in range(3))
    >>> DynamicLogitsFusion(large, small, [expert])(torch.ones(2, 4)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self, large: nn.Module, small: nn.Module, experts: Sequence[nn.Module], *, direction: Direction = "symmetric",
        mode: Mode = "axis", most: float = 2.0, grid: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        check_options(direction, mode, most, grid)
        require(len(experts) > 0, "DynamicLogitsFusion needs an expert", "none", "Pass experts=[model, ...].")
        super().__init__()
        self.large, self.small, self.experts = Teacher(large), Teacher(small), nn.ModuleList(map(Teacher, experts))
        self.settings: dict[str, Any] = {"direction": direction, "mode": mode, "most": most, "grid": grid}

    def forward(self, x: Any) -> Tensor:
        return self.fused(x)[0]

    def fused(self, x: Any) -> tuple[Tensor, Tensor]:
        """The logits, and alpha (n, experts)."""
        return fuse_logits(self.large(x), self.small(x), [expert(x) for expert in self.experts], **self.settings)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


def check_options(direction: str, mode: str, most: float, grid: Sequence[float] | None) -> None:
    """Refuse settings that `fuse_logits` cannot work with."""
    one_of("direction", direction, ["forward", "reverse", "symmetric"])
    one_of("mode", mode, ["axis", "uniform"])
    require(0 < most < math.inf, "fuse_logits needs a finite most > 0", most, "Pass one such as 2.0.")
    good = grid is None or (len(grid) > 0 and all(0 <= value < math.inf for value in grid))
    require(good, "grid must hold finite values >= 0", grid, "Pass some such as [0.0, 0.5, 1.0], or None.")


def _checked(large: Tensor, small: Tensor, experts: Sequence[Tensor], vocabulary: int | None) -> list[Tensor]:
    """All logits, cut to one vocabulary."""
    require(len(experts) > 0, "fuse_logits needs an expert", "none", "Pass experts=[logits, ...].")
    named = {"large": large, "small": small} | {f"expert {t}": logits for t, logits in enumerate(experts)}
    for name, logits in named.items():
        require(logits.is_floating_point() and logits.ndim >= 2, f"The logits of {name} must be floating (n, c)",
                f"{logits.dtype} {tuple(logits.shape)}", "Pass a row of logits for each example.")  # fmt: skip
    if vocabulary is not None:
        fewest = min(logits.shape[-1] for logits in named.values())
        require(1 <= vocabulary <= fewest, f"vocabulary must be 1 to {fewest}, the fewest entries of a model",
                vocabulary, "Pass what common_vocabulary gives.")  # fmt: skip
        named = {name: logits[..., :vocabulary] for name, logits in named.items()}
    shapes = {name: tuple(logits.shape) for name, logits in named.items()}
    require(len(set(shapes.values())) == 1, "All models must give logits of one shape", shapes,
            "Where rows only pad the vocabulary, pass vocabulary=, the entries in common.")  # fmt: skip
    devices = {str(logits.device) for logits in named.values()}
    require(len(devices) == 1, "All logits must be on one device", sorted(devices), "Move them.")
    for name, logits in named.items():
        bad = int((~logits.amax(-1).isfinite()).sum())  # NaN, inf or a row of -inf shows in the largest
        require(bad == 0, f"The logits of {name} must be numbers or -inf", f"{bad} rows with NaN, inf or only -inf",
                "Check the model that gave them.")  # fmt: skip
    return list(named.values())
