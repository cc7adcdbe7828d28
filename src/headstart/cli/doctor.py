"""`headstart doctor`: what a target holds, what is wrong with it, and what to run next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from .shell import Shell, table

SAYS = """Look at a target before spending time on it: counts, balance, unreadable files, duplicates, suspicious labels.
Exit codes: 0 usable, 1 it needs repair first, 2 wrong use."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """As for fit."""
    image_column: str | None = None
    """Column with picture files, relative to the table."""
    text_column: str | None = None
    """Column with texts."""
    feature_columns: tuple[str, ...] = ()
    """Numeric columns; by default all of them but the label."""
    label_column: str | None = None
    """Column with the class."""
    split_column: str | None = None
    """Column that says train, validation or test."""
    max_unreadable: float = 0.1
    """Skip unreadable pictures (each is named) up to this share."""
    quiet: bool = False
    """No progress."""


def run(arguments: list[str], shell: Shell) -> int:
    """Diagnose and print."""
    flags = shell.parse(Flags, "doctor", arguments, SAYS)
    from headstart.tasks import doctor

    found = doctor(
        flags.target, image_column=flags.image_column, text_column=flags.text_column,
        feature_columns=flags.feature_columns or None, label_column=flags.label_column,
        split_column=flags.split_column, max_unreadable=flags.max_unreadable,
    )  # fmt: skip
    shell.say(diagnosed(found))
    return 1 if any(problem.severity == "error" for problem in found.problems) else 0


def diagnosed(found: Any) -> str:
    """The diagnosis for a person, worst problems first."""
    lines = [f"{found.target}: {found.modality or 'cannot be read'}"]
    if found.counts:
        lines += ["", table([(name, str(n)) for name, n in found.counts.items()], ("class", "examples"))]
        parts = ", ".join(f"{n} {part}" for part, n in found.parts.items() if n)
        lines += ["", f"parts      {parts}"]
    lines += ["", *(f"{problem.severity:<9}  {problem.says}" for problem in found.problems)]
    if not found.problems:
        lines.append("no problem found")
    return "\n".join([*lines, "", f"next       {found.command}"])
