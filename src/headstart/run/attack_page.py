"""The page of `headstart attack`: one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import figures
from .attack_records import size_of


def page(result: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]]) -> str:
    """The page as text.

    Args:
        result: the content of attack.json.
        pictures: clean, perturbed and difference as uint8 (H, W, 3), with what became of them.
    """
    from markupsafe import Markup

    from .report import pages

    drawn = [{**one, **{k: figures.png(one[k]) for k in ("clean", "perturbed", "difference")}} for one in pictures]
    return pages().get_template("attack.html.jinja").render(
        result=result, pictures=drawn, radius=size_of(result), finished=result["finished"].replace("T", " ")[:16],
        known={one["name"]: one["counted"] > 0 for one in result["victims"]},
        heat=Markup(_heat(result)),  # noqa: S704  matplotlib escapes its text
    )  # fmt: skip


def _heat(result: Mapping[str, Any]) -> str:
    columns = [f"{short(one['name'])}\n{one['accuracy']:.0%} clean" for one in result["victims"]]
    rows = [short(f"{row['attack']}\n{' + '.join(row['made_on'])}", 48) if row["made_on"] else row["attack"]
            for row in result["rows"]]  # fmt: skip
    counted = [one["counted"] > 0 for one in result["victims"]]
    values = [[cell["success"] if known else None for cell, known in zip(row["cells"], counted, strict=True)]
              for row in result["rows"]]  # fmt: skip
    below = [[f"{100 * cell['interval'][0]:.0f} to {100 * cell['interval'][1]:.0f}" for cell in row["cells"]]
             for row in result["rows"]]  # fmt: skip
    framed = [(s, v) for s, row in enumerate(result["rows"]) for v, cell in enumerate(row["cells"])
              if cell["white_box"]]  # fmt: skip
    return figures.heat(values, rows, columns, below=below, framed=framed)


def short(name: str, longest: int = 22) -> str:
    """The name, its middle left out where it is too long for a figure.

    >>> short("runs/digits-of-a-very-long-name"), short("a")
    ('runs/digit…y-long-name', 'a')
    """
    half = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[-(longest - 1 - half) :]}"
