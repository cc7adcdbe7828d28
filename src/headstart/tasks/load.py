"""`load_task`: read a target, split it, seal its test labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from headstart.core.validate import require

from . import refuse
from . import split as splits
from .examples import Examples
from .found import Found
from .read import Reading, read
from .task import Seal, Task


def load_task(
    target: Any,
    *,
    labels_per_class: int | None = None,
    seed: int = 0,
    test_share: float = splits.TEST_SHARE,
    validation_share: float = splits.VALIDATION_SHARE,
    image_column: str | None = None,
    text_column: str | None = None,
    feature_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    missing_labels: Literal["refuse", "unlabelled"] = "refuse",
    label_type: Literal["auto", "text"] = "auto",
    max_unreadable: float = 0.1,
    split: str | Path | None = None,
    name: str | None = None,
) -> Task:
    """Your data as a task: training, validation, test and unlabelled examples, with the test labels sealed.

    Args:
        target: a folder with one folder of pictures a class (also under train/, val/, test/, unlabelled/); a .csv,
            .tsv, .jsonl, .parquet or .npz file; a Hugging Face `save_to_disk` folder; a DataFrame; a tuple (x, y);
            a dict of arrays; or an embedded name: breast-cancer, damage, digits, faces, glyphs, greek, scenes,
            textures, tissue, typefaces, vessels, wine.
        labels_per_class: keep this many labels of each class in `train`; `validation` is then empty and every other
            training example is `unlabelled`. None keeps all labels.
        seed: of the split and of which labels are kept.
        test_share: share of each class to test on, where the target brings no test part.
        validation_share: share of each class to validate on, where it brings no validation part.
        image_column: the column with picture files, relative to the table.
        text_column: the column with texts.
        feature_columns: the numeric columns; by default all of them but the label.
        label_column: the column with the class; by default the one called label, class, target or y.
        split_column: a column that says train, validation or test.
        missing_labels: "unlabelled" takes rows without label as unlabelled instead of refusing them.
        label_type: "text" accepts a label column that mixes numbers and words.
        max_unreadable: skip unreadable pictures (each named in `notes`) up to this share.
        split: a file written by `Task.save_split`; the shares and `labels_per_class` are then not used.
        name: the name of the task; by default from the target.

    Returns:
        A task. Examples with the same content, and patches of one region, never lie on both sides of the test.

    Cost: one read and one reduced decoding of every picture; pictures are decoded again when asked for.

    Raises:
        Refused: for every bad target, before any training.

    >>> task = load_task("wine", labels_per_class=5)
    >>> len(task.train), len(task.validation), task.test.labels is None
    (15, 0, True)
    """
    require(
        isinstance(seed, Integral) and seed >= 0, "seed must be a whole number >= 0", repr(seed), "Pass 0, 1, 2 ..."
    )
    refuse.shares(test_share, validation_share)
    reading = Reading(
        image_column=image_column,
        text_column=text_column,
        feature_columns=tuple(feature_columns) if feature_columns is not None else None,
        label_column=label_column,
        split_column=split_column,
        missing_labels=missing_labels,
        label_type=label_type,
        max_unreadable=max_unreadable,
    )
    found, short, again = read(target, reading)
    refuse.classes_of(found)
    classes, notes = found.classes, list(found.notes)
    if split is not None:
        require(labels_per_class is None, "split= already says who is labelled", f"labels_per_class={labels_per_class}",
                "Pass one of the two.")  # fmt: skip
        parts, classes, saved = splits.load(Path(split), found.names, found.classes)
        if (parts == "").any():
            notes.append(f"{int((parts == '').sum())} examples are not in the saved split and were left out")
    else:
        parts = splits.assign(
            found.labels,
            found.groups or found.hashes,
            found.parts,
            labels_per_class=refuse.whole_labels(labels_per_class),
            seed=seed,
            test_share=test_share,
            validation_share=validation_share,
        )
        refuse.parts_of(found, parts, labels_per_class)
    task = _seal(found, parts, classes, seed=int(seed), name=name or short, target=again, notes=notes)
    if split is None or task.manifest == saved:
        return task
    return replace(task, notes=(*notes, "content or labels have changed since the split was saved"))


def _seal(
    found: Found, parts: splits.Parts, classes: tuple[str, ...], *, seed: int, name: str, target: str, notes: list[str]
) -> Task:
    order = np.array([classes.index(word) for word in found.classes] + [-1])  # the last one is for "no label"
    labels = torch.from_numpy(order[found.labels])
    everything = Examples(inputs=found.inputs, names=found.names, labels=labels, hashes=found.hashes)
    chosen = {part: everything.take(np.flatnonzero(parts == part)) for part in splits.PARTS}
    bare = {
        part: Examples(inputs=chosen[part].inputs, names=chosen[part].names, hashes=chosen[part].hashes)
        for part in ("test", "unlabelled")
    }
    manifest = hashlib.sha256("\x00".join(classes).encode())
    for line in zip(found.names, found.hashes, labels.tolist(), parts.tolist(), strict=True):
        if line[-1]:
            manifest.update(repr(line).encode())
    copies = set(bare["test"].hashes) & {*chosen["train"].hashes, *chosen["validation"].hashes}
    if copies:
        notes.append(f"{len(copies)} test examples are exact copies of training or validation examples")
    return Task(
        name=name,
        modality=found.modality,
        classes=classes,
        train=chosen["train"],
        validation=chosen["validation"],
        test=bare["test"],
        unlabelled=bare["unlabelled"],
        seed=seed,
        target=target,
        manifest=manifest.hexdigest(),
        notes=tuple(notes),
        seal=Seal(chosen["test"].labels),
    )
