"""One self-contained HTML file that answers first: what to start from, how good it is, and how that is known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.core.checkpoint import write_atomically
from headstart.core.validate import require

from . import figures

if TYPE_CHECKING:
    from jinja2 import Environment


def write_report(directory: Path) -> Path:
    """Turn a run directory's records into `directory`/report.html.

    Args:
        directory: has results.json and run.json; evidence/mistakes.npz and evidence/texts.json are used if there.

    Returns:
        the path of the report: no scripts, no network, readable on a phone and in print.

    Raises:
        Refused: the directory holds no finished run.

    Cost: about a second, most of it drawing.
    """
    directory = Path(directory)
    records = directory / "results.json"
    require(records.exists(), "A report needs a finished run", f"{directory} without results.json",
            f"Run: headstart fit TARGET --out {directory}")  # fmt: skip
    results = json.loads(records.read_text(encoding="utf-8"))
    run_file = directory / "run.json"
    run = json.loads(run_file.read_text(encoding="utf-8")) if run_file.exists() else {}
    html = render(results, run, _mistakes(directory, results))
    path = directory / "report.html"
    write_atomically(path, lambda file: file.write(html.encode()))
    return path


def render(results: Mapping[str, Any], run: Mapping[str, Any], mistakes: list[dict[str, Any]]) -> str:
    """The page as text; sections whose records are missing are left out."""
    from markupsafe import Markup

    names = ("ranking", "candidates", "test", "robustness", "audit", "cost", "reproduce", "model", "methods")
    sections = {name: results.get(name) for name in names}
    agreement = (sections["ranking"] or {}).get("agreement")
    return pages().get_template("report.html.jinja").render(
        task=results["task"], answer=results["answer"], mistakes=mistakes, versions=run.get("versions", {}),
        finished=str(run.get("finished", "")).replace("T", " ")[:16], agreement=_agreement(agreement),
        figures={name: Markup(svg) for name, svg in _draw(results).items()},  # noqa: S704  matplotlib escapes its text
        **sections,
    )  # fmt: skip


def pages() -> Environment:
    """Templates and their filters; what comes from the data is escaped."""
    from jinja2 import Environment, PackageLoader

    made = Environment(loader=PackageLoader("headstart.run", "."), autoescape=True, trim_blocks=True)
    made.filters.update(percent=percent, points=points, span=span, figure=figure, count=count, size=size)
    return made


def _draw(results: Mapping[str, Any]) -> dict[str, str]:
    answer, test = results["answer"], results.get("test") or {}
    named = {"from scratch": answer.get("scratch"), "random features": answer.get("random_features"),
             "from scratch, with patience": answer.get("patient_scratch")}  # fmt: skip
    known = {name: value for name, value in named.items() if value}
    rows = [("this model", answer["accuracy"], answer["interval"])] if answer.get("accuracy") is not None else []
    rows += [(name, value["accuracy"], value.get("interval")) for name, value in known.items()]
    ranking = (results.get("ranking") or {}).get("rows") or []
    drawn = {
        "answer": figures.bars(rows, "test accuracy"),
        "ranking": figures.ranking(ranking, {name: value["accuracy"] for name, value in known.items()}),
        "cost": figures.cost(results.get("candidates") or []),
    }
    if test.get("confusion"):
        drawn["confusion"] = figures.confusion(test["confusion"], results["task"]["classes"])
    if (test.get("calibration") or {}).get("bins"):
        drawn["calibration"] = figures.calibration(test["calibration"]["bins"])
    if results.get("robustness"):
        drawn |= _robustness(results["robustness"])
    return drawn


def _robustness(found: Mapping[str, Any]) -> dict[str, str]:
    corruptions, rows = found["corruptions"], found["perturbations"]["rows"]
    names = [name.replace("_", " ") for name in corruptions["accuracy"]]
    bars = [(row["name"], row["accuracy"], row["interval"]) for row in rows]
    severities = [f"severity {k}" if k == 1 else str(k) for k in corruptions["severities"]]
    return {
        "corruptions": figures.heat([*corruptions["accuracy"].values()], names, severities, good=True),
        "perturbations": figures.bars([("unchanged", found["clean"], None), *bars], "accuracy") if rows else "",
    }


def _mistakes(directory: Path, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    import numpy as np

    listed = [dict(m) for m in (results.get("test") or {}).get("mistakes") or []]
    pictures, texts = directory / "evidence/mistakes.npz", directory / "evidence/texts.json"
    if pictures.exists():
        with np.load(pictures, allow_pickle=False) as stored:
            shown = [m for m in listed if f"pixels_{m['row']}" in stored]
            return [{**m, "picture": figures.png(stored[f"pixels_{m['row']}"])} for m in shown[:48]]
    words = json.loads(texts.read_text(encoding="utf-8")) if texts.exists() else {}
    return [{**m, "text": words.get(str(m["row"]), "")[:400]} for m in listed[:24]]


def _agreement(agreement: Any) -> str:
    value = agreement.get("mean") if isinstance(agreement, Mapping) else agreement
    return f"{value:.2f} (rank correlation)" if isinstance(value, int | float) else ""


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage.

    >>> percent(0.9512), percent(None)
    ('95.1 %', '')
    """
    return "" if value is None else f"{100 * value:.{digits}f} %"


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * value:+.1f}"


def span(interval: tuple[float, float]) -> str:
    """An interval of shares.

    >>> span((0.9, 0.95))
    '90.0 to 95.0 %'
    """
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def figure(value: float | None) -> str:
    """A number with three significant digits, plainly.

    >>> figure(12.345), figure(0.00012), figure(1234.5)
    ('12.3', '0.00012', '1,234')
    """
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def count(value: int | None) -> str:
    """A count with separators."""
    return "" if value is None else f"{value:,}"


def size(value: float) -> str:
    """Bytes in a unit a person reads.

    >>> size(4_300_000)
    '4.3 MB'
    """
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
