"""What `headstart attack` found, as plain data, as a table, and as a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.core.validate import Refused, require
from headstart.core.write import new_folder
from headstart.measure import save_perturbed
from headstart.tasks import Task

from .attacking import Attacked
from .attacks import RandomSigns
from .clock import now

PICTURES = 8


def records(task: Task, found: Attacked, attacks: Mapping[str, Any], control: RandomSigns) -> dict[str, Any]:
    """The content of attack.json; see the keys."""
    matrix = found.matrix
    success, error, low, high = (t.tolist() for t in (matrix.success, matrix.error, matrix.low, matrix.high))
    cells = [
        [{"victim": victim, "white_box": found.white_box(s, v), "success": success[s][v], "error": error[s][v],
          "interval": [low[s][v], high[s][v]]} for v, victim in enumerate(matrix.victims)]
        for s in range(len(found.rows))
    ]  # fmt: skip
    result = {
        "format": 1,
        "task": {"name": task.name, "target": task.target, "classes": list(task.classes), "seed": task.seed,
                 "manifest": task.manifest},
        "examples": len(found.x), "of": len(task.test), "size": list(found.x.shape[2:]), "looks": task.looks,
        "radius": control.radius, "norm": control.norm, "seed": control.seed,
        "attacks": {name: repr(attack) for name, attack in attacks.items()},
        "victims": [{"name": name, "accuracy": clean, "counted": counted} for name, clean, counted in
                    zip(matrix.victims, matrix.clean.tolist(), matrix.counted.tolist(), strict=True)],
        "rows": [{"attack": row.attack, "made_on": list(row.made_on), "cells": cells[s]}
                 for s, row in enumerate(found.rows)],
        "notes": list(found.notes),
        "pictures": [{"row": k, "name": task.test.names[k]} for k in found.examples],
        "labels": matrix.labels.tolist(),
    }  # fmt: skip
    return result | {"answer": answer(result)}


def answer(result: Mapping[str, Any]) -> str:
    """The worst that carried over (or, with one model, its white-box rate), beside the control."""
    known = {one["name"]: one for one in result["victims"] if one["counted"]}
    if not known:
        return "No victim is right on any of the pictures, so nothing can be said of what makes them err."
    row, cell = worst(result)
    control = next(one for one in result["rows"][0]["cells"] if one["victim"] == cell["victim"])
    low, high = cell["interval"]
    made_on, whom = " + ".join(row["made_on"]), cell["victim"]
    way = f"fool {whom}, which they are made on," if cell["white_box"] else f"carry over from {made_on} to {whom}"
    return (
        f"Changes of at most {size_of(result)} at worst {way} on {cell['success']:.1%} of the "
        f"{known[whom]['counted']} pictures it first gets right (95 % interval {low:.1%} to {high:.1%}, by "
        f"{row['attack']}); {result['rows'][0]['attack']} of that size on {control['success']:.1%}."
    )


def worst(result: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The row and cell of the highest success on a victim that is right on something; transferred ones go first."""
    counted = {one["name"] for one in result["victims"] if one["counted"]}
    pairs = [(row, cell) for row in result["rows"][1:] for cell in row["cells"] if cell["victim"] in counted]
    transferred = [pair for pair in pairs if not pair[1]["white_box"]]
    return max(transferred or pairs, key=lambda pair: pair[1]["success"])


def size_of(result: Mapping[str, Any]) -> str:
    """The radius as people say it.

    >>> size_of({"radius": 8 / 255, "norm": "linf"}), size_of({"radius": 0.5, "norm": "l2"})
    ('8/255', '0.5 (l2)')
    """
    grey = 255 * result["radius"]
    text = f"{round(grey)}/255" if abs(grey - round(grey)) < 1e-6 and 0 < grey < 255 else f"{result['radius']:g}"
    return text if result["norm"] == "linf" else f"{text} (l2)"


def check_new(out: Path) -> None:
    """Refuse a folder that holds something."""
    empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    require(empty, "--out must be a new or empty folder", out, "Name another; nothing is overwritten.")


def write(out: Path, result: Mapping[str, Any], found: Attacked) -> None:
    """attack.json, perturbed.safetensors (bit for bit) and report.html: all of them or none."""
    from .attack_page import page

    check_new(out)
    try:
        with new_folder(out) as folder:
            save_perturbed(folder / "perturbed.safetensors", found.moved, found.x, found.matrix.labels)
            (folder / "attack.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            (folder / "report.html").write_text(page(result, shown(result, found)), encoding="utf-8")
    except OSError as problem:
        told = f"Writing to {out} must succeed; got {problem.strerror or problem}. Free space there and run again."
        raise Refused(told) from problem


def shown(result: Mapping[str, Any], found: Attacked) -> list[dict[str, Any]]:
    """Some pictures of the worst row, those that fooled the victim first: clean, perturbed, difference."""
    matrix = found.matrix
    row, cell = worst(result) if bool(matrix.right.any()) else _first(result)
    s, v = result["rows"].index(row), matrix.victims.index(cell["victim"])
    fooled = matrix.right[v] & matrix.wrong[s, v]
    order = torch.argsort((~fooled).int(), stable=True)[:PICTURES].tolist()
    moved, classes = found.moved[str(found.rows[s])], result["task"]["classes"]
    reach = max(result["radius"], 1e-9) if result["norm"] == "linf" else max(float((moved - found.x).abs().max()), 1e-9)
    return [
        {"clean": _pixels(found.x[k]), "perturbed": _pixels(moved[k]),
         "difference": _pixels(0.5 + (moved[k] - found.x[k]) / (2 * reach)), "true": classes[int(matrix.labels[k])],
         "right": bool(matrix.right[v, k]), "fooled": bool(fooled[k]), "name": result["pictures"][k]["name"],
         "victim": cell["victim"], "row": str(found.rows[s])}
        for k in order
    ]  # fmt: skip


def _first(result: Mapping[str, Any]) -> tuple[Any, Any]:
    return result["rows"][1], result["rows"][1]["cells"][0]


def _pixels(x: Tensor) -> Any:
    return (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def stamped(result: Mapping[str, Any], command: str, folders: Mapping[str, str], seconds: float) -> dict[str, Any]:
    """The records with how they came about."""
    from .finish import versions

    return {**result, "command": command, "folders": dict(folders), "versions": versions(), "finished": now(),
            "seconds": round(seconds, 1)}  # fmt: skip


def lines(result: Mapping[str, Any]) -> Sequence[tuple[str, ...]]:
    """The table for a person: one line a row and victim; a star marks a victim that the row was made on."""
    facts = {one["name"]: one for one in result["victims"]}
    return [
        (row["attack"], " + ".join(row["made_on"]), cell["victim"] + (" *" if cell["white_box"] else ""),
         f"{100 * cell['success']:.1f} %" if facts[cell["victim"]]["counted"] else "unknown",
         f"{100 * cell['interval'][0]:.1f} to {100 * cell['interval'][1]:.1f}", f"{100 * cell['error']:.1f} %",
         str(facts[cell["victim"]]["counted"]), f"{100 * facts[cell['victim']]['accuracy']:.1f} %")
        for row in result["rows"] for cell in row["cells"]
    ]  # fmt: skip


HEADER = ("attack", "made on", "victim", "fooled", "95 % interval", "wrong of all", "counted", "clean accuracy")
