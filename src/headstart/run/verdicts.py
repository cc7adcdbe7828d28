"""Where the records of checked claims are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "claims" / "verdicts"


def verdict_of(slug: str) -> dict[str, Any] | None:
    """The stored record of a claim, or None when it was never run.

    >>> verdict_of("no-such-claim") is None
    True
    """
    path = FOLDER / f"{slug}.json"
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record
