"""Attacks by the names of the command line, radii as people write them, and the control that every attack must beat."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from headstart.attack.draws import generators
from headstart.core.ascent import Attack, Ball, Goal
from headstart.core.validate import one_of, require

Norm = Literal["linf", "l2"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One set of perturbed examples: by which attack, made on which models; () for the control, which needs none."""

    attack: str
    made_on: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.attack} on {' + '.join(self.made_on)}" if self.made_on else self.attack


def radius_of(text: str, norm: Norm = "linf") -> float:
    """A radius as people write it, a fraction or a number.

    Raises:
        Refused: no number, negative, or in the linf norm above 1, which is a number of grey levels.

    >>> radius_of("0.5"), radius_of("51/255")
    (0.5, 0.2)
    """
    parts, value = text.split("/"), math.nan
    try:
        numbers = [float(part) for part in parts]
        value = numbers[0] if len(numbers) == 1 else numbers[0] / numbers[1] if len(numbers) == 2 else math.nan
    except (ValueError, ZeroDivisionError):
        pass
    require(math.isfinite(value), "A radius must be a number or a fraction", repr(text), "Write 8/255 or 0.03.")
    require(value >= 0, "A radius must not be negative: it is how far a pixel may move", text, "Write 8/255 or 0.03.")
    do = f"Pixels are in 0..1 here; if {text} is in grey levels, write {text}/255." if len(parts) == 1 else "Lower it."
    require(value <= 1 or norm == "l2", "A radius must be at most 1", text, do)
    return value


def known_attacks() -> dict[str, type[Any]]:
    """Attacks that need nothing but surrogates, by the names of the command line."""
    import headstart.attack

    found = {}
    for name, kind in sorted(vars(headstart.attack).items()):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and callable(getattr(kind, "perturb", None)):
            needed = [f.name for f in dataclasses.fields(kind)
                      if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]  # fmt: skip
            if "radius" in {f.name for f in dataclasses.fields(kind)} and not needed:
                found[name.lower()] = kind
    return found


def attacks_named(names: str, *, radius: float, norm: Norm, seed: int) -> dict[str, Attack]:
    """The attacks of a list that commas join, all of one radius and norm.

    Raises:
        Refused: none, an unknown name (with the nearest), or a norm that one of them does not have.
    """
    Ball(radius, norm)
    known, found = known_attacks(), dict[str, Attack]()
    for name in filter(None, (part.strip().lower() for part in names.split(","))):
        one_of("An attack", name, known)
        fields = {f.name for f in dataclasses.fields(known[name])}
        require("norm" in fields or norm == "linf", f"{name} has the norm linf only", norm, "Leave --norm out.")
        found[name] = known[name](**{k: v for k, v in (("radius", radius), ("norm", norm), ("seed", seed))
                                     if k in fields})  # fmt: skip
    require(bool(found), "--attacks needs at least one attack", repr(names), f"Choose from: {', '.join(known)}.")
    return found


@dataclass(frozen=True, kw_only=True)
class RandomSigns:
    """The control: as far as the attacks may go, in a random direction (linf: by a random sign each), blind to models.

    An attack that does no better has found nothing about the models.
    """

    radius: float
    norm: Norm = "linf"
    seed: int = 0
    first: int = 0

    def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
        """x moved by the radius; the goals are not looked at."""
        ball = Ball(self.radius, self.norm)
        draws = [torch.randn(x.shape[1:], generator=g) for g in generators(self.seed, self.first, len(x))]
        return ball.clip(x, x + self.radius * ball.step(torch.stack(draws).to(x)), (0.0, 1.0))


def control_name(control: RandomSigns) -> str:
    """What the control is called in its norm."""
    return "random signs" if control.norm == "linf" else "random directions"
