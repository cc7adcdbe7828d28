"""Which transferability scores there are, by name, and which of them are shown without asking."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from headstart.core.validate import one_of, require

if TYPE_CHECKING:
    from headstart.core.evidence import Score

DEFAULT = ("KNN", "LogME", "PARC", "LEEP", "HScore")  # by benchmarks/choose.py, best first
DECIDING = ("KNN", "LogME")  # the two that settle what the probes cannot tell apart


def every_score() -> dict[str, Score]:
    """Every score of one source in `headstart.choose` with its default settings, by name.

    >>> "LogME" in every_score()
    True
    """
    room = importlib.import_module("headstart.choose")  # `from headstart import choose` is the function of that name
    owners: dict[str, Any] = {name: owner for name, owner in vars(room).items() if inspect.isclass(owner)}
    return {name: owner() for name, owner in sorted(owners.items()) if callable(getattr(owner, "score", None))}


def scores_named(names: str | Sequence[str]) -> dict[str, Score]:
    """The scores of these names, in this order; commas join, "all" names every one.

    Raises:
        Refused: an unknown name, or none.

    >>> list(scores_named("LogME, KNN"))
    ['LogME', 'KNN']
    """
    words = [name.strip() for name in (names.split(",") if isinstance(names, str) else names) if name.strip()]
    require(bool(words), "At least one score must be named", "none", "Pass names such as LogME,KNN, or all.")
    known = every_score()
    if words == ["all"]:
        return known
    for name in words:
        one_of("A score", name, known)
    return {name: known[name] for name in words}
