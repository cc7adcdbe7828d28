"""What every iterative attack refuses."""

from __future__ import annotations

import math
from typing import Any

from headstart.core.ascent import Ball
from headstart.core.validate import require


def check(attack: Any, decay: float = 0.0) -> None:
    """Refuse a radius, norm, steps, step_size or decay that means nothing, with the attack's name."""
    name = type(attack).__name__
    Ball(attack.radius, attack.norm)
    require(attack.steps >= 0, f"{name} needs steps >= 0", attack.steps, "10 are usual.")
    require(attack.step_size is None or 0 < attack.step_size <= 1, f"{name} needs 0 < step_size <= 1, in units of x in "
            "[0, 1]", attack.step_size, "Leave it out, or divide by 255 if it is in grey levels.")  # fmt: skip
    require(0 <= decay < math.inf, f"{name} needs a finite decay >= 0", decay, "0 or 1 are usual.")
