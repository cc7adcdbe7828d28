"""`headstart cite`: BibTeX of methods."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from headstart.core.validate import Refused, one_of, require

from .shell import Shell

SAYS = """BibTeX of the methods a run used (give its directory), or of methods by slug."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    what: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR|SLUG")]
    """Directories of finished runs, or slugs such as lora."""
    quiet: bool = False
    """No progress."""


def run(arguments: list[str], shell: Shell) -> int:
    """Print the entries."""
    flags = shell.parse(Flags, "cite", arguments, SAYS)
    require(bool(flags.what), "cite needs a run or a slug", "none", "Name one: headstart cite lora.")
    from headstart.core.catalogue import catalogue

    papers = {entry.slug: entry.paper for entry in catalogue() if entry.room != "claims"}
    wanted: list[str] = []
    for one in flags.what:
        wanted += _of_run(Path(one)) if Path(one).is_dir() else [one]
    for slug in dict.fromkeys(wanted):
        one_of("A method", slug, papers)
    shell.say("\n\n".join(papers[slug].bibtex(slug) for slug in dict.fromkeys(wanted)))
    return 0


def _of_run(path: Path) -> list[str]:
    try:
        methods: list[str] = json.loads((path / "results.json").read_text(encoding="utf-8"))["methods"]
    except (OSError, ValueError, KeyError):
        raise Refused(f"cite needs a finished run; got {path}. Check the path.") from None
    return methods
