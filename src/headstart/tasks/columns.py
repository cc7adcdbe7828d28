"""Columns of a table: labels as class indices, numbers as floats; missing and mixed values are refused by row."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from headstart.core.validate import require, suggestion

from .folder import SUFFIXES
from .found import class_order, few
from .read import Reading

LABELS = ("label", "labels", "class", "target", "y")
IMAGES = ("image", "img", "file", "filename", "file_name", "path", "image_path")
TEXTS = ("text", "sentence")


def unpack(values: Any) -> list[Any]:
    """A list of Python values from a list, array or tensor (n,); one-hot labels are refused."""
    if not isinstance(values, list | tuple):
        values = np.asarray(values)
        require(values.ndim == 1, "labels must be one class a row", f"shape {values.shape}", "Pass indices or words.")
        values = values.tolist()
    return list(values)


def missing(value: Any) -> bool:
    """None, NaN, pandas' NA and NaT, and blank text."""
    if isinstance(value, str):
        return not value.strip()
    return (
        value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    )


def labels_from(
    values: Sequence[Any],
    column: str,
    *,
    label_type: Literal["auto", "text"] = "auto",
    missing_labels: Literal["refuse", "unlabelled"] = "refuse",
    order: Sequence[str] | None = None,
    hidden: Collection[int] = (),
) -> tuple[NDArray[np.int64], tuple[str, ...], list[str]]:
    """Class indices (-1 for missing), class names, and notes.

    Args:
        values: one Python value a row.
        column: its name, for messages.
        label_type: "text" accepts numbers beside words.
        missing_labels: what to do with rows without label.
        order: class names in an order that is declared elsewhere.
        hidden: rows that count as unlabelled whatever they say.

    Raises:
        Refused: missing or mixed values, named by row.
    """
    for name, word, choices in (
        ("label_type", label_type, ("auto", "text")),
        ("missing_labels", missing_labels, ("refuse", "unlabelled")),
    ):
        require(word in choices, f"{name} must be one of {choices}", repr(word), suggestion(str(word), choices))
    values = [None if i in hidden else value for i, value in enumerate(values)]
    empty = [i for i, value in enumerate(values) if missing(value) and i not in hidden]
    require(
        not empty or missing_labels == "unlabelled",
        f"every row needs a label in {column!r}",
        f"{len(empty)} of {len(values)} missing or NaN (row {few(map(str, empty))})",
        'Fill or drop them, or pass missing_labels="unlabelled".',
    )
    kinds = {_kind(value): i for i, value in reversed(list(enumerate(values))) if not missing(value)}
    require(
        len(kinds) <= 1 or label_type == "text",
        f"the labels in {column!r} must be of one type",
        "mixed types: " + " and ".join(f"{kind} such as {values[i]!r} (row {i})" for kind, i in sorted(kinds.items())),
        'Repair them, or pass label_type="text" if both are class names.',
    )
    words = [None if missing(value) else _word(value) for value in values]
    present = {word for word in words if word is not None}
    classes = tuple(word for word in order if word in present) if order else class_order(present)
    notes = [f"class {word!r} is declared and has no example" for word in order or () if word not in present]
    index = {word: i for i, word in enumerate(classes)}
    return np.array([-1 if word is None else index[word] for word in words], dtype=np.int64), classes, notes


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "numbers" if number(value) is not None else "words"
    return "numbers" if isinstance(value, int | float | np.number | Decimal) else f"a {type(value).__name__}"


def _word(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def number(value: Any) -> float | None:
    """The number a cell holds, NaN where it is missing, None where it holds something else."""
    if missing(value):
        return math.nan
    if isinstance(value, str | int | float | np.number | Decimal):
        try:
            return float(value)
        except ValueError:
            return None
    return None


def numbers_from(values: Sequence[Any], column: str, *, asked: bool) -> NDArray[np.float64] | None:
    """The column as float64, NaN where missing; None when it is not meant as numbers.

    Args:
        values: one Python value a row.
        column: its name, for messages.
        asked: the user named this column, so anything but a number is refused.

    Raises:
        Refused: when words stand among the numbers.
    """
    read = [number(value) for value in values]
    strange = [i for i, value in enumerate(read) if value is None]
    if not asked and (len(strange) > len(read) / 2 or all(missing(value) for value in values)):
        return None
    require(
        not strange,
        f"the column {column!r} must hold numbers only",
        f"mixed types: {len(strange)} of {len(read)} are not numbers, such as "
        f"{values[strange[0]] if strange else ''!r} (row {strange[0] if strange else 0})",
        "Repair those cells, or choose the numeric columns with feature_columns.",
    )
    return np.array(read, dtype=np.float64)


def known_column(flag: str, column: str, columns: Sequence[str]) -> None:
    """Refuse a column that is not there, with the nearest name."""
    require(column in columns, f"{flag} must be a column", repr(column), suggestion(column, columns))


def fill(reading: Reading, cells: Mapping[str, list[Any]], where: str) -> Reading:
    """The flags, filled in where none was given and a column carries a usual name."""
    columns = list(cells)
    if reading.label_column is None:
        usual = [name for name in columns if name.lower() in LABELS]
        require(
            len(usual) == 1,
            f"{where} needs a label column",
            f"columns {few(map(repr, usual or columns), 12)}",
            "Name it with label_column=.",
        )
        reading = replace(reading, label_column=usual[0])
    inputs = [reading.image_column, reading.text_column, reading.feature_columns]
    given = sum(flag is not None for flag in inputs)
    require(given <= 1, "a task has one kind of input", f"{given} of image_column, text_column, feature_columns",
            "Pass one of them.")  # fmt: skip
    if given == 0:
        free = [name for name in columns if name not in (reading.label_column, reading.split_column)]
        images = [name for name in free if name.lower() in IMAGES and _pictures(cells[name])]
        texts = [name for name in free if name.lower() in TEXTS and all(isinstance(c, str) for c in cells[name][:9])]
        if len(images) == 1:
            return replace(reading, image_column=images[0])
        if len(texts) == 1:
            return replace(reading, text_column=texts[0])
    return reading


def _pictures(cells: Sequence[Any]) -> bool:
    first = next((cell for cell in cells if not missing(cell)), None)
    return isinstance(first, bytes | dict) or (isinstance(first, str) and Path(first).suffix.lower() in SUFFIXES)
