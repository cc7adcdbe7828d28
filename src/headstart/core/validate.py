"""One template for every refusal: what must hold, what was given, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes a second to import, and reading a model card needs none of it
    from torch import Tensor


class Refused(ValueError):
    """Bad input, found before any work was done; the command line prints it and exits with 2."""


def require(condition: bool, must: str, got: object, do: str) -> None:
    """Raise `Refused` unless `condition` holds.

    Args:
        condition: what must be true.
        must: what must hold, naming the caller, such as "Ties needs 0 < density <= 1".
        got: what was given instead.
        do: what the user can do about it, a full sentence.

    >>> require(False, "Ties needs 0 < density <= 1", 2, "Pass a fraction such as 0.2.")
    Traceback (most recent call last):
    headstart.core.validate.Refused: Ties needs 0 < density <= 1; got 2. Pass a fraction such as 0.2.
    """
    if not condition:
        raise Refused(f"{must}; got {got}. {do}")


def suggestion(word: str, choices: Iterable[str]) -> str:
    """The sentence that helps after an unknown word: the nearest choice, else all of them.

    >>> suggestion("digit", ["digits", "faces"])
    "Did you mean 'digits'?"
    """
    known = sorted(choices)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else f"Choose from: {', '.join(known) or 'none'}."


def one_of(name: str, word: str, choices: Iterable[str]) -> None:
    """Refuse a word outside `choices`, with the nearest one suggested."""
    known = list(choices)
    require(word in known, f"{name} must be a known name", repr(word), suggestion(word, known))


def finite(name: str, values: Tensor, do: str = "Remove or repair those rows first.") -> None:
    """Refuse NaN and infinity in a floating tensor; says how many. Cost: one pass."""
    if values.is_floating_point() and not bool(values.sum().isfinite()):
        bad = int((~values.isfinite()).sum())
        require(bad == 0, f"{name} must be finite", f"{bad} NaN or infinite values of {values.numel()}", do)
