"""Who is trained on, who is tested on: stratified, by seed, copies of one content never on both sides of the test."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.core.validate import require

from .found import few

PARTS = ("train", "validation", "test", "unlabelled")
FORMAT = "headstart-split/1"
TEST_SHARE, VALIDATION_SHARE = 0.25, 0.15  # the rest is trained on
Parts = NDArray[np.str_]


def assign(
    labels: NDArray[np.int64],
    keys: Sequence[str],
    given: Sequence[str] = (),
    *,
    labels_per_class: int | None = None,
    seed: int = 0,
    test_share: float = TEST_SHARE,
    validation_share: float = VALIDATION_SHARE,
) -> Parts:
    """The part of each example: "train", "validation", "test" or "unlabelled".

    Args:
        labels: class indices (n,), -1 for unlabelled.
        keys: examples with one key (same content, same region) stay together on one side of the test split.
        given: parts the data came with, "" where undecided; a given part is kept.
        labels_per_class: keep this many labels of each class in train; every other training example, validation
            included, becomes unlabelled. The test split does not depend on it, and a smaller number is a subset.
        seed: decides the test split and which examples keep their labels.
        test_share: share of each class that is tested on, at least one example.
        validation_share: share of each class for validation.

    Shape: labels (n,) to parts (n,).
    """
    parts = np.array([str(part) for part in given] if len(given) else [""] * len(labels), dtype="<U10")
    parts[labels < 0] = "unlabelled"
    if not (parts == "test").any():
        pool = np.flatnonzero(np.isin(parts, ["", "train"]))
        parts[_draw(pool, labels, keys, share=test_share, least=1, rng=np.random.default_rng([seed, 0]))] = "test"
        left = validation_share / (1 - test_share)
    else:
        left = validation_share
    free = np.flatnonzero(np.isin(parts, ["", "train"]))
    if labels_per_class is not None:
        pool = np.flatnonzero((parts != "test") & (labels >= 0) & (parts != "unlabelled"))
        parts[pool] = "unlabelled"
        order = np.random.default_rng([seed, 1]).permutation(pool)
        for label in np.unique(labels[pool]):
            parts[order[labels[order] == label][:labels_per_class]] = "train"
        return parts
    if not (parts == "validation").any():
        rng = np.random.default_rng([seed, 2])
        parts[_draw(free, labels, keys, share=left, least=0, rng=rng)] = "validation"
    parts[np.isin(parts, ["", "train"])] = "train"
    return parts


def _draw(
    pool: NDArray[np.int64],
    labels: NDArray[np.int64],
    keys: Sequence[str],
    *,
    share: float,
    least: int,
    rng: np.random.Generator,
) -> list[int]:
    """`share` of every class of `pool` in whole groups of one key, at least `least`, never a whole class."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i in rng.permutation(pool):
        groups[keys[i]].append(int(i))
    by_class: dict[int, list[list[int]]] = defaultdict(list)
    for members in groups.values():
        by_class[int(labels[members[0]])].append(members)
    chosen: list[int] = []
    for label in sorted(by_class):
        units = by_class[label]
        if len(units) == 1 and least:  # one content only: it has to be broken up to be tested at all
            units = [[i] for i in units[0]]
        size = sum(map(len, units))
        quota = min(max(least, round(share * size)), size - 1)
        taken: list[int] = []
        for members in units:
            if len(taken) + len(members) <= quota:
                taken += members
        if least and quota and not taken:  # every group is larger than the quota
            taken = min(units, key=len)
        chosen += taken
    return chosen


def save(
    path: Path, names: dict[str, Sequence[str]], *, target: str, seed: int, classes: Sequence[str], manifest: str
) -> None:
    """Write who is in which part as JSON; holds names and class order, no label."""
    content = {"format": FORMAT, "target": target, "seed": seed, "manifest": manifest, "classes": list(classes)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | {part: list(names[part]) for part in PARTS}, indent=1) + "\n")


def load(path: Path, names: Sequence[str], classes: Sequence[str]) -> tuple[Parts, tuple[str, ...], str]:
    """The part of each of `names` ("" for names the file does not know), class order and manifest of a saved split."""
    try:
        content: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        content = f"{type(error).__name__}"
    known = isinstance(content, dict) and content.get("format") == FORMAT
    lacks = [key for key in ("classes", "manifest", *PARTS) if key not in content] if known else []
    require(
        known and not lacks,
        f"split={path} must be a split that save_split wrote",
        content if isinstance(content, str) else f"one without {few(lacks, 5)}" if known else "another kind of JSON",
        "Pass the path given to save_split.",
    )
    require(
        sorted(content["classes"]) == sorted(classes),
        f"split={path} must have the classes of the target",
        f"{few(content['classes'], 5)} against {few(classes, 5)}",
        "Use the split of this target, or split anew.",
    )
    part_of = {name: part for part in PARTS for name in content[part]}
    missing = sorted(set(part_of) - set(names))
    require(
        not missing,
        f"every example of split={path} must still be in the target",
        f"{len(missing)} missing ({few(missing)})",
        "Restore them, or split anew.",
    )
    parts = np.array([part_of.get(name, "") for name in names], dtype="<U10")
    return parts, tuple(content["classes"]), str(content["manifest"])
