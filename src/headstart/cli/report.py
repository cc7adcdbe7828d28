"""`headstart report`: write the report of a finished run again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .shell import Shell

SAYS = """Write DIR/report.html again from the records in DIR, for instance after an update of headstart."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """The directory of a finished run."""
    quiet: bool = False
    """No progress."""


def run(arguments: list[str], shell: Shell) -> int:
    """Draw and say where."""
    flags = shell.parse(Flags, "report", arguments, SAYS)
    from headstart.run.directory import disk
    from headstart.run.report import write_report

    with disk(flags.run):
        shell.say(str(write_report(flags.run)))
    return 0
