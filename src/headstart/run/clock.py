"""Wall clock of a run, by stage."""

from __future__ import annotations

import time
from datetime import UTC, datetime


class Clock(dict[str, float]):
    """Seconds by stage; `lap` ends one."""

    def __init__(self) -> None:
        super().__init__()
        self.began = self.last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """End a stage: what passed since the last lap goes on its account."""
        at = time.perf_counter()
        self[stage] = self.get(stage, 0.0) + at - self.last
        self.last = at
        self["total"] = at - self.began


def now() -> str:
    """The time in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
