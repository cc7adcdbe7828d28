"""`headstart choose`: which source to start from, and how sure that is."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from headstart.core.validate import require
from headstart.run.results import mean_agreement
from headstart.run.scores import DEFAULT, scores_named
from headstart.run.settings import Reading

from .fit import load
from .shell import Shell, table

if TYPE_CHECKING:
    from headstart.run.choice import Choice, Estimate

SAYS = """Rank the sources of a zoo for your data: scores with intervals first, then probes, then short fine-tunes of
the best few, within a budget. Looks at training labels only. Exit codes: 0 done, 1 no source fits, 2 wrong use."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """What to learn; as for fit."""
    reading: Reading = field(default_factory=Reading)
    zoo: str = "mini"
    """Where to start from: mini, mini:NAME, timm:NAME, hf:ORG/NAME, dir:PATH; commas join."""
    scores: str = ",".join(DEFAULT)
    """Transferability scores to show: commas join names, all shows every one. They do not change the order."""
    budget: float = 0.1
    """What choosing may cost, as a share of fine-tuning every source."""
    seed: int = 0
    """Of the split and of everything random."""
    workers: Literal["here", "ray"] = "here"
    """Where sources are ranked: here, or ray (a Ray cluster)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    json: bool = False
    """Print everything that was found as JSON."""
    quiet: bool = False
    """No progress, only the answer."""


def run(arguments: list[str], shell: Shell) -> int:
    """Rank and print."""
    flags = shell.parse(Flags, "choose", arguments, SAYS)
    from headstart.run.cache import Cache
    from headstart.run.rank import choose
    from headstart.zoo.resolve import resolve

    require(0 < flags.budget <= 1, "choose needs 0 < budget <= 1", flags.budget, "Pass a share such as 0.1.")
    scores = scores_named(flags.scores)
    task = load(flags.target, flags.reading, flags.seed)
    sources, skipped = resolve(flags.zoo)
    shell.resume = "What is finished is in the cache; run the same command again to go on."
    choice = choose(task, sources, cache=Cache(device=flags.device), budget=flags.budget, seed=flags.seed,
                    workers=flags.workers, scores=scores, skipped=skipped, progress=shell.progress)  # fmt: skip
    shell.stop()
    shell.say(json.dumps(choice.to_json(), indent=1) if flags.json else ranked(choice))
    return 0 if choice.best is not None else 1


def ranked(choice: Choice) -> str:
    """The ranking for a person: the answer, the table, what is left open."""
    names = list({name: None for one in choice.ranking for name in one.scores})
    rows = [
        (str(one.place), one.name, _estimate(one.predicted), one.basis, "close" if one.close else "",
         *(f"{one.scores[name].value:.3g}" if name in one.scores else "" for name in names))
        for one in choice.ranking
    ]  # fmt: skip
    lines = [choice.reason, ""]
    if rows:
        lines += [table(rows, ("", "source", "predicted accuracy", "from", "", *names)), ""]
    agreed = mean_agreement(choice.agreement)
    if agreed is not None:
        lines.append(f"scores   agree with each other to {agreed:.2f} (Kendall's tau, weighted towards the top)")
    lines += [f"skipped  {one.name}: {one.why}" for one in choice.skipped]
    lines.append(
        f"cost     {choice.cost:.1%} of fine-tuning every source (budget {choice.budget:.0%}), {choice.seconds:.1f} s"
    )
    return "\n".join([*lines, choice.decide] if choice.decide else lines)


def _estimate(value: Estimate) -> str:
    return f"{100 * value.value:.1f} % ({100 * value.low:.1f} to {100 * value.high:.1f})"
