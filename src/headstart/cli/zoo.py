"""`headstart zoo`: what there is to start from, and how the embedded models are made."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from headstart.core.validate import one_of, require

from .shell import Shell, size, table

SAYS = """zoo list [ZOO] shows the sources of a zoo (mini, timm:NAME, hf:ORG/NAME, dir:PATH); zoo build --out DIR trains
the embedded models again from pictures made by code."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    action: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="list|build")] = "list"
    """What to do."""
    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = ()
    """For list: a zoo. For build: the models to make; all by default."""
    out: Path | None = None
    """For build: the folder to write to."""
    seed: int = 0
    """For build: of pictures, first weights and batches."""
    quiet: bool = False
    """No progress."""


def run(arguments: list[str], shell: Shell) -> int:
    """List or build."""
    flags = shell.parse(Flags, "zoo", arguments, SAYS)
    one_of("What zoo does", flags.action, ["list", "build"])
    return _list(flags, shell) if flags.action == "list" else _build(flags, shell)


def _list(flags: Flags, shell: Shell) -> int:
    from headstart.zoo.resolve import resolve

    sources, skipped = resolve(",".join(flags.names) or "mini")
    rows = []
    for one in sources:
        facts = one.facts
        data = str(facts.get("world", facts.get("data", "")))
        rows.append((one.name, one.modality, str(facts.get("family", "")), data,
                     str(facts.get("objective", "")), f"{facts.get('parameters') or 0:,}",
                     size(facts["bytes"]) if "bytes" in facts else "", one.licence))  # fmt: skip
    if rows:
        shell.say(table(rows, ("source", "reads", "family", "pretrained on", "by", "weights", "size", "licence")))
    for left in skipped:
        shell.tell(f"skipped {left.name}: {left.why}")
    return 0 if rows else 1


def _build(flags: Flags, shell: Shell) -> int:
    require(flags.out is not None, "zoo build needs --out", "none", "Name a folder to write the models to.")
    assert flags.out is not None
    from headstart.zoo.build import build_zoo

    began = time.perf_counter()
    names = [name.removeprefix("mini:") for name in flags.names]
    cards = build_zoo(flags.out, names or None, seed=flags.seed, progress=shell.progress)
    shell.stop()
    shell.say(f"{len(cards)} models in {flags.out}, {time.perf_counter() - began:.0f} s")
    return 0
