"""`headstart claims`: what each paper says, whether it held here, and how to check it again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import tyro

from headstart.core.validate import one_of, require

from .shell import Shell, table

SAYS = """claims lists every claim with its verdict and seconds; claims check SLUG runs one again, --all every one.
Exit codes: 0 held or listed, 1 a claim that was checked failed, 2 wrong use."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    action: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="list|check")] = "list"
    """What to do."""
    slugs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SLUG")] = ()
    """Claims; all of them for list."""
    all: bool = False
    """For check: every claim."""
    data: str | None = None
    """For check, of a claim that is a recipe for your own data: a folder, for instance."""
    out: Path | None = None
    """For check: keep the records in this folder as SLUG.json."""
    quiet: bool = False
    """No progress."""


def run(arguments: list[str], shell: Shell) -> int:
    """List or check."""
    flags = shell.parse(Flags, "claims", arguments, SAYS)
    one_of("What claims does", flags.action, ["list", "check"])
    from headstart.core.catalogue import claim_modules

    known = claim_modules()
    for slug in flags.slugs:
        one_of("A claim", slug, known)
    if flags.action == "list":
        rows = [row for slug in flags.slugs or sorted(known) for row in listed(slug)]
        shell.say(table(rows, ("claim", "verdict", "difference", "seconds", "says")))
        return 0
    require(flags.all != bool(flags.slugs), "claims check needs SLUGs or --all", "neither or both", "Name one.")
    return _check(list(flags.slugs) or sorted(known), flags, shell)


def _check(slugs: list[str], flags: Flags, shell: Shell) -> int:
    from headstart.core.catalogue import load_claim
    from headstart.core.claim import check, write_record

    failed = 0
    for slug in slugs:
        record = check(load_claim(slug), partial(shell.progress, slug), data=flags.data)
        shell.stop()
        rows = rows_of(slug, record)
        if flags.data is not None:
            shell.say(measured(record) + "\n")
        failed += sum(row[1].startswith("failed") for row in rows)
        shell.say("\n".join(f"{slug}: {row[1]}, {row[2]}, {row[3]} s: {row[4]}" for row in rows))
        if flags.out is not None:
            write_record(record, flags.out)
    return 1 if failed else 0


def listed(slug: str) -> list[tuple[str, str, str, str, str]]:
    """One row for each claim of a module, from its stored verdicts; "not run" without any."""
    from headstart.core.catalogue import load_claim
    from headstart.run.verdicts import verdict_of

    record = verdict_of(slug)
    if record is None:
        return [(slug, "not run", "", "", claim.says) for claim in load_claim(slug).CLAIMS]
    return rows_of(slug, record)


def measured(record: dict[str, Any]) -> str:
    """What every arm reached, as means over the runs.

    >>> print(measured({"runs": [{"a": {"x": 1.0}}, {"a": {"x": 2.0}, "b": {"y": 3.0}}]}))
       x    y
    a  1.5
    b       3
    """
    found: dict[str, dict[str, list[float]]] = {}
    for run in record["runs"]:
        for arm, metrics in run.items():
            for metric, value in metrics.items():
                found.setdefault(arm, {}).setdefault(metric, []).append(value)
    metrics = list({metric: None for arm in found.values() for metric in arm})
    rows = [(arm, *(f"{fmean(of[m]):.4g}" if m in of else "" for m in metrics)) for arm, of in found.items()]
    return table(rows, ("", *metrics))


def rows_of(slug: str, record: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """One row for each verdict of a record."""
    rows = []
    for verdict in record["verdicts"]:
        word = ("held" if verdict["held"] else "failed") + ("" if verdict["certain"] else ", uncertain")
        low, high = verdict["interval"]
        difference = f"{verdict['difference']:+.3g} ({low:+.3g} to {high:+.3g})"
        rows.append((slug, word, difference, f"{record['seconds']:.0f}", verdict["claim"]["says"]))
    return rows
