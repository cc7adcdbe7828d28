"""What `doctor` says about a target, as data and as lines of text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "hint"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong. An "error" stops `headstart fit`; a "warning" does not; a "hint" may be nothing."""

    severity: Severity
    says: str


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """An example whose nearest neighbours all have another label."""

    name: str
    label: str
    neighbours: str


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What `doctor` found.

    Args:
        target: what was looked at.
        modality: "image", "text" or "numeric"; None when it could not be read.
        counts: examples of each class.
        parts: examples of each part that the target brings, or that seed 0 would make.
        unlabelled: number of examples without label.
        imbalance: largest class over smallest.
        unreadable: (name, reason).
        duplicates: groups of names with identical content.
        across: the groups of those that the target itself puts into more than one part.
        conflicts: the groups of those whose labels differ.
        suspects: labels to look at again, from a cheap comparison of thumbnails or numbers: a hint, often wrong.
        sizes: (width, height) of the smallest, median and largest picture by area; () for other kinds.
        problems: everything above that needs a word, worst first.
        command: what to run next.
    """

    target: str
    modality: str | None
    counts: dict[str, int]
    parts: dict[str, int]
    unlabelled: int
    imbalance: float
    unreadable: tuple[tuple[str, str], ...]
    duplicates: tuple[tuple[str, ...], ...]
    across: tuple[tuple[str, ...], ...]
    conflicts: tuple[tuple[str, ...], ...]
    suspects: tuple[Suspect, ...]
    sizes: tuple[tuple[int, int], ...]
    problems: tuple[Problem, ...]
    command: str

    @property
    def healthy(self) -> bool:
        """Whether `headstart fit` will take this target."""
        return not any(problem.severity == "error" for problem in self.problems)

    def lines(self) -> list[str]:
        """The diagnosis as lines of text, the answer first."""
        if self.modality is None:
            return [f"{self.target} cannot be used", *(f"  {p.severity}: {p.says}" for p in self.problems)]
        total = sum(self.counts.values())
        classes = ", ".join(f"{word} {count}" for word, count in self.counts.items())
        lines = [
            f"{self.target}: {total} {self.modality} examples in {len(self.counts)} classes"
            + (f", {self.unlabelled} without label" if self.unlabelled else ""),
            f"  classes: {classes}",
            f"  parts:   {', '.join(f'{part} {count}' for part, count in self.parts.items() if count) or 'none'}",
        ]
        if self.sizes:
            lines.append("  sizes:   " + ", ".join(f"{width}x{height}" for width, height in self.sizes))
        lines += [f"  {problem.severity}: {problem.says}" for problem in self.problems] or ["  no problem found"]
        return [*lines, f"Next: {self.command}"]
