"""`headstart predict`: the class of new inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from headstart.core.validate import Refused, require

from .shell import Shell, table

SAYS = """The class and probability of each input by a finished run. Inputs are pictures or folders of them, tables
(.csv .tsv .jsonl .parquet with the columns of the training table), .npz files, or for a text model the texts
themselves; - reads texts or file names from stdin, one a line."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """The directory of a finished run, or a model directory."""
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")]
    """What to predict."""
    out: Path | None = None
    """Write a .csv or .jsonl with every probability, instead of printing a table."""
    column: str | None = None
    """Column of a table with the pictures or texts; by default that of the training table or the only fitting one."""
    quiet: bool = False
    """No progress."""


def run(arguments: list[str], shell: Shell) -> int:
    """Predict and print, or write."""
    flags = shell.parse(Flags, "predict", arguments, SAYS)
    kind = "" if flags.out is None else flags.out.suffix.lstrip(".")
    require(kind in ("", "csv", "jsonl"), "--out must end in .csv or .jsonl", flags.out, "Rename it.")
    if flags.out is not None:
        require(not flags.out.exists(), "--out must be a new file", flags.out, "Name another; none is overwritten.")
    require(bool(flags.inputs), "predict needs inputs", "none", "Name files, folders, texts or -.")
    from headstart.core.checkpoint import write_atomically
    from headstart.run.inputs import read_inputs
    from headstart.run.predict import described, lines, load

    predictor = load(flags.run)
    names, inputs = read_inputs(_lines(flags.inputs), predictor.modality, flags.column, flags.run)
    records = list(described(predictor, names, inputs))
    if flags.out is None:
        rows = [(one["input"], one["class"], f"{one['probability']:.3f}") for one in records]
        shell.say(table(rows, ("input", "class", "probability")))
        return 0
    text = lines(records, kind)
    try:
        write_atomically(flags.out, lambda file: file.write(text.encode()))
    except OSError as problem:
        raise Refused(f"--out must be writable; got {problem.strerror}: {flags.out}. Name another place.") from problem
    shell.tell(f"{len(records)} predictions in {flags.out}")
    return 0


def _lines(inputs: Sequence[str]) -> list[str]:
    import sys

    given: list[Any] = []
    for one in inputs:
        given += [line.rstrip("\n") for line in sys.stdin if line.strip()] if one == "-" else [one]
    return given
