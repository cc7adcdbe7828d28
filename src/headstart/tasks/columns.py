"""Columns of a table: labels as class indices, numbers as floats; missing and mixed values are refused by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..core.validate import require, suggestion
from .found import class_order, few


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
) -> tuple[NDArray[np.int64], tuple[str, ...], list[str]]:
    """Class indices (-1 for missing), class names, and notes.

    Args:
        values: one Python value a row.
        column: its name, for messages.
        label_type: "text" accepts numbers beside words.
        missing_labels: what to do with rows without label.
        order: class names in an order that is declared elsewhere.

    Raises:
        Refused: missing or mixed values, named by row.
    """
    for name, word, choices in (
        ("label_type", label_type, ("auto", "text")),
        ("missing_labels", missing_labels, ("refuse", "unlabelled")),
    ):
        require(word in choices, f"{name} must be one of {choices}", repr(word), suggestion(str(word), choices))
    empty = [i for i, value in enumerate(values) if missing(value)]
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
    return "numbers" if isinstance(value, int | float | np.number) else f"a {type(value).__name__}"


def _word(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def number(value: Any) -> float | None:
    """The number a cell holds, NaN where it is missing, None where it holds something else."""
    if missing(value):
        return math.nan
    if isinstance(value, str | int | float | np.number):
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
