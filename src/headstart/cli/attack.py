"""`headstart attack`: how far your own models err together under small changes to their pictures."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from headstart.core.validate import Refused, require
from headstart.run.settings import Reading

from .fit import load
from .shell import Shell, table

if TYPE_CHECKING:
    from headstart.run.predict import Predictor

SAYS = """Perturb test pictures so that your surrogates err, and count how often your victims err with them: the
transfer matrix, counted on what each victim first gets right. Models are finished runs or model folders on this
machine; each sees the pictures through its own preprocessing. Exit codes: 0 done, 1 no victim is right on anything,
2 wrong use."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """Pictures to perturb; as for fit, of which the test part is taken."""
    surrogates: str
    """Models that perturbations are made on: directories of finished runs, or model directories; commas join."""
    victims: str = ""
    """Models that are shown them; by default the surrogates."""
    attacks: str = "pgd,mifgsm"
    """Names from headstart.attack; commas join. Random signs of the same size are always shown beside them."""
    radius: str = "8/255"
    """How far a pixel (l2: a picture) may move, with pixels in 0..1."""
    norm: Literal["linf", "l2"] = "linf"
    """What the radius bounds: the largest change of a value, or the length of all changes together."""
    ensemble: bool = False
    """Also make perturbations on all surrogates together."""
    examples: int | None = None
    """Test pictures to draw; by default 500, of pictures above 64x64 fewer, down to 100."""
    out: Path | None = None
    """A new folder for attack.json, the perturbed pictures bit for bit, and report.html."""
    reading: Reading = field(default_factory=Reading)
    seed: int = 0
    """Of the split, the lot and everything random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    json: bool = False
    """Print everything that was found as JSON."""
    quiet: bool = False
    """No progress, only the answer."""


def run(arguments: list[str], shell: Shell) -> int:
    """Perturb, count and print."""
    flags = shell.parse(Flags, "attack", arguments, SAYS)
    from headstart.run.attack_records import HEADER, check_new, lines, records, stamped, write
    from headstart.run.attacking import attack_task, trained_on
    from headstart.run.attacks import RandomSigns, attacks_named, radius_of

    began, radius = time.perf_counter(), radius_of(flags.radius, flags.norm)
    attacks = attacks_named(flags.attacks, radius=radius, norm=flags.norm, seed=flags.seed)
    surrogates = _several("--surrogates", flags.surrogates)
    victims = _several("--victims", flags.victims) if flags.victims else surrogates
    if flags.out is not None:
        check_new(flags.out)
    folders = named([*surrogates, *victims])
    task = load(flags.target, flags.reading, flags.seed)
    models = {name: _loaded(folder) for folder, name in folders.items()}
    for folder, name in folders.items():
        count = trained_on(Path(folder), task)
        if count and not flags.quiet:
            shell.tell(f"note: {name} was fitted on {count} of the test pictures, which flatters it; "
                       f"--split {Path(folder) / 'split.json'} takes its own test part")  # fmt: skip
    control = RandomSigns(radius=radius, norm=flags.norm, seed=flags.seed)
    found = attack_task(
        task, {folders[one]: models[folders[one]] for one in surrogates},
        {folders[one]: models[folders[one]] for one in victims}, attacks, control,
        ensemble=flags.ensemble, examples=flags.examples, device=flags.device, progress=shell.progress,
    )  # fmt: skip
    shell.stop()
    result = stamped(records(task, found, attacks, control), shlex.join(["headstart", "attack", *arguments]),
                     {name: folder for folder, name in folders.items()}, time.perf_counter() - began)  # fmt: skip
    if flags.out is not None:
        write(flags.out, result, found)
    shell.say(json.dumps(result, indent=1) if flags.json else told(result, table(lines(result), HEADER), flags.out))
    return 0 if any(one["counted"] for one in result["victims"]) else 1


def told(result: dict[str, Any], rows: str, out: Path | None) -> str:
    """What was found, for a person."""
    star = any(cell["white_box"] for row in result["rows"] for cell in row["cells"])
    return "\n".join([
        result["answer"], "", rows, "",
        "fooled     share of the counted pictures, which the victim gets right before, that it then gets wrong",
        *(["*          the victim is one of the models that the perturbation was made on"] if star else []),
        f"judged     {result['examples']} test pictures of {result['of']}",
        *(f"note       {note}" for note in result["notes"]),
        *([f"report     {out / 'report.html'}"] if out else []),
    ])  # fmt: skip


def named(folders: Sequence[str]) -> dict[str, str]:
    """Folder -> its name: the last part of the path where that tells them apart, else the path.

    >>> named(["runs/a", "runs/b"]), named(["x/run", "y/run"])
    ({'runs/a': 'a', 'runs/b': 'b'}, {'x/run': 'x/run', 'y/run': 'y/run'})
    """
    short = {one: Path(one).name for one in dict.fromkeys(folders)}
    return {one: name if list(short.values()).count(name) == 1 and name else one for one, name in short.items()}


def _several(flag: str, text: str) -> list[str]:
    found = list(dict.fromkeys(part.strip().rstrip("/") or "/" for part in text.split(",") if part.strip()))
    require(bool(found), f"{flag} needs models", repr(text), "Name directories of finished runs; commas join.")
    return found


def _loaded(folder: str) -> Predictor:
    from headstart.run.predict import load as load_model

    try:
        return load_model(folder)
    except Refused as problem:
        raise Refused(f"attack needs models that can be loaded; got {folder}: {problem}") from problem
