"""Where the records of checked claims are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PACKAGED = Path(__file__).parents[1] / "claims" / "verdicts"
IN_DOCS = Path(__file__).parents[3] / "docs" / "verdicts"


def verdict_of(slug: str) -> dict[str, Any] | None:
    """The stored record of a claim: the one in the package, else one in a source tree's docs; None when never run.

    >>> verdict_of("no-such-claim") is None
    True
    """
    for folder in (PACKAGED, IN_DOCS):
        path = folder / f"{slug}.json"
        if path.is_file():
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return record
    return None
