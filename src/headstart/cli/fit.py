"""`headstart fit`: the main job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from headstart.core.validate import require
from headstart.run.settings import Reading, Tuning, command, filled, read_run

from .shell import Shell, percent, size, table

SAYS = """Choose where to start, move what that model knows to your data by the route that does best on held-out
labels, compare with the same network without its pretraining, judge once on sealed test labels, and write it all
to --out.

Stopped or killed, the same command goes on where it was. Exit codes: 0 done, 1 the run says no (not better than the
baselines, or the audit failed), 2 wrong use, 130 interrupted."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")] = ""
    """A folder of class folders, a .csv, .tsv, .jsonl, .parquet or .npz file, a save_to_disk folder, or one of
    breast-cancer, damage, digits, faces, glyphs, greek, scenes, textures, tissue, typefaces, vessels, wine."""
    out: Path | None = None
    """A new directory for the model, the report and the records."""
    reading: Reading = field(default_factory=Reading)
    tuning: Tuning = field(default_factory=Tuning)
    again: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """A run.json, or the directory of a run, to repeat; flags given beside it take precedence."""
    dry_run: bool = False
    """Say what would be done, and stop."""
    quiet: bool = False
    """No progress, only the answer."""


def run(arguments: list[str], shell: Shell) -> int:
    """Fit, summarise, and say by the exit code whether it was worth it."""
    flags = shell.parse(Flags, "fit", arguments, SAYS, default=_repeated(arguments))
    require(bool(flags.target), "fit needs a target", "none", "Name a folder, a file, or an embedded task: digits.")
    flags.tuning.checked()
    task = load(flags.target, flags.reading, flags.tuning.seed)
    if flags.tuning.robustness:
        from headstart.run.robustness import check_possible

        check_possible(task, flags.tuning)
    out = flags.out or Path("runs") / task.name
    for note in () if flags.quiet else task.notes:
        shell.tell(f"note: {note}")
    if flags.dry_run:
        shell.say(planned(task, flags, out))
        return 0
    shell.resume = f"To go on where it stopped, run: {command(flags.target, flags.reading, flags.tuning, str(out))}"
    from headstart.run.fit import run as fit

    result = fit(task, flags.tuning.zoo, flags.tuning, flags.reading, out=out, progress=shell.progress)
    shell.stop()
    shell.say(summary(result.results, out))
    return 0 if result.good else 1


def load(target: str, reading: Reading, seed: int) -> Any:
    """The task of a target read as the flags say."""
    from headstart.tasks import load_task

    return load_task(target, seed=seed, **reading.options())


def planned(task: Any, flags: Flags, out: Path) -> str:
    """What a run would do."""
    from headstart.zoo.resolve import resolve

    sources, skipped = resolve(flags.tuning.zoo)
    fitting = [one for one in sources if one.modality == task.modality]
    require(bool(fitting), f"A run needs a source for {task.modality} data", f"none in {flags.tuning.zoo}",
            "Name another --zoo.")  # fmt: skip
    parts = ", ".join(f"{len(getattr(task, part))} {part}" for part in ("train", "validation", "unlabelled", "test"))
    lines = [
        f"task       {task.name}: {task.modality}, {len(task.classes)} classes; {parts}",
        f"zoo        {len(fitting)} sources fit, {len(sources) - len(fitting) + len(skipped)} do not",
        f"routes     {' '.join(flags.tuning.routes)}, {flags.tuning.steps(len(task.train))} steps each, compared on "
        + (f"{len(task.validation)} validation examples" if len(task.validation) else f"{flags.tuning.folds} folds"),
        "baselines  the same network from scratch with as many steps and with at least 300; random features",
        *(
            [
                "robustness  15 corruptions at five severities, and changes of "
                + flags.tuning.radius
                + ", on at most 500 "
                "test pictures"
            ]
            if flags.tuning.robustness
            else []
        ),
        f"out        {out}",
        f"command    {command(flags.target, flags.reading, flags.tuning, str(out))}",
    ]
    return "\n".join([*lines, *(f"skipped    {one.name}: {one.why}" for one in skipped)])


def summary(results: Mapping[str, Any], out: Path) -> str:
    """The end of a run for a person."""
    from headstart.run.robustness import in_words

    answer, cost = results["answer"], results["cost"]
    first = results["ranking"]["rows"][0] if results["ranking"]["rows"] else None
    rows = [("", "test accuracy", "95 % interval", "steps")]
    by_name = {one["route"]: one for one in results["candidates"] if one["test"]}
    named = [("this model", by_name[answer["route"]]), ("same network from scratch", by_name["scratch"]),
             ("  with patience", by_name["patient"]),
             ("random features + probe", by_name["random"])]  # fmt: skip
    for label, one in named:
        low, high = one["test"]["interval"]
        rows.append(
            (label, percent(one["test"]["accuracy"]), f"{100 * low:.1f} to {100 * high:.1f}", str(one["steps"]))
        )
    seconds = cost["seconds"]
    told = answer["predicted"]
    lines = [
        answer["sentence"], *(f"  ! {reason}" for reason in answer["reasons"]), "",
        f"source     {answer['source']} ({_sureness(results, first)})",
        f"route      {answer['route']}" + ("" if told is None else
            f", predicted {percent(told['accuracy'])} ({100 * told['low']:.1f} to {100 * told['high']:.1f}) "
            f"by {told['how']}"),
        "", table(rows[1:], rows[0]), "",
        f"judged     {answer['n']} sealed test labels, {answer['looks']} look" + ("" if answer["looks"] == 1 else "s"),
        "audit      " + ("passed" if results["audit"]["passed"] else "FAILED"),
        *([f"robustness {in_words(results['robustness'])}"] if "robustness" in results else []),
        f"cost       {seconds['total']:.0f} s: choosing {seconds['choose']:.0f}, tuning {seconds['tune']:.0f}, "
        f"baselines {seconds['baselines']:.0f}"
        + (f", robustness {seconds['robustness']:.0f}" if "robustness" in results else "")
        + f"; {size(cost['peak_memory'] or 0)} of memory at most",
        f"report     {out / 'report.html'}",
        f"predict    {results['reproduce']['predict']}",
    ]  # fmt: skip
    return "\n".join(lines)


def _sureness(results: Mapping[str, Any], first: Mapping[str, Any] | None) -> str:
    ranking, count = results["ranking"], len(results["ranking"]["rows"])
    if count == 1:
        return "the only one that fits"
    close = ranking["close"]
    if not close:
        return f"clearly first of {count}"
    share = f" in {100 * first['sure']:.0f} % of resamples" if first and first["sure"] is not None else ""
    return f"first of {count}{share}; {len(close)} cannot be told from it: {', '.join(close[:3])}"


def _repeated(arguments: list[str]) -> Flags | None:
    """The flags of the run that --from names, as defaults for this one."""
    given = next((i for i, word in enumerate(arguments) if word == "--from" or word.startswith("--from=")), None)
    if given is None:
        return None
    _, equals, value = arguments[given].partition("=")
    path = value if equals else next(iter(arguments[given + 1 : given + 2]), "")
    require(bool(path), "--from needs the run.json of an earlier run", "nothing", "Give its path.")
    settings = read_run(Path(path))["settings"]
    reading, tuning = filled(Reading, settings["reading"]), filled(Tuning, settings["tuning"])
    return replace(Flags(), target=settings["target"], reading=reading, tuning=tuning, again=Path(path))
