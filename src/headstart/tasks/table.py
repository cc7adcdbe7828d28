"""Tables: CSV, TSV, JSON lines, Parquet and DataFrames with a label column beside pictures, texts or numbers."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headstart.core.validate import Refused, require

from .arrays import rows
from .columns import fill, known_column, labels_from, missing, numbers_from
from .examples import Inputs, Texts, content_hash
from .folder import PARTS
from .found import Found, Modality, encoded, few, refuse_unreadable, skip_notes
from .read import Reading

# not "None", which pandas would add: a class may be called that
MISSING = ["", "NA", "N/A", "<NA>", "NaN", "nan", "null", "NULL"]


def read_table(path: Path, reading: Reading) -> Found:
    """A .csv, .tsv, .jsonl or .parquet file; picture files are relative to its folder."""
    pandas = tool("pandas")
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            tool("pyarrow")
            frame = pandas.read_parquet(path)
        elif suffix in (".jsonl", ".ndjson"):
            frame = pandas.DataFrame.from_records(_records(path))
        else:  # as text, so that the label "01" stays what it is
            frame = pandas.read_csv(path, sep="\t" if suffix == ".tsv" else ",", dtype=str, encoding="utf-8-sig",
                                    keep_default_na=False, na_values=MISSING)  # fmt: skip
    except (ValueError, OSError) as error:  # pandas' and pyarrow's own errors are ValueErrors
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Refused(
            f"{path} must be a readable {suffix} table; got {first}. Look at that place in the file."
        ) from error
    return read_frame(frame, reading, where=str(path), root=path.parent)


def _records(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; blank lines are passed over."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            require(
                isinstance(record, dict), f"each line of {path} must be a JSON object", f"line {number}", "Repair it."
            )
            records.append(record)
    return records


def read_frame(
    frame: Any,
    reading: Reading,
    *,
    where: str,
    root: Path = Path("."),
    order: Mapping[str, Sequence[str]] | None = None,
) -> Found:
    """A pandas DataFrame as examples.

    Args:
        frame: one row an example.
        reading: the column flags.
        where: its name in messages.
        root: the folder that picture files are relative to.
        order: declared class names of a column.
    """
    columns = [str(column) for column in frame.columns]
    require(
        len(columns) == len(set(columns)), f"{where} must have columns of different names", few(columns, 8), "Rename."
    )
    require(len(frame) > 0, f"{where} must have rows", "none", "Pass a table with examples.")
    cells = {name: frame.iloc[:, i].astype(object).tolist() for i, name in enumerate(columns)}
    reading = fill(reading, cells, where)
    for flag in ("image_column", "text_column", "label_column", "split_column"):
        if getattr(reading, flag) is not None:
            known_column(flag, getattr(reading, flag), columns)
    label = reading.label_column
    assert label is not None
    series = frame.iloc[:, columns.index(label)]
    declared = (order or {}).get(label)
    if declared is None and str(series.dtype) == "category":
        declared = [str(word) for word in series.cat.categories]
    parts = _parts(cells[reading.split_column], reading.split_column) if reading.split_column else ()
    labels, classes, notes = labels_from(
        cells[label],
        label,
        label_type=reading.label_type,
        missing_labels=reading.missing_labels,
        order=declared,
        hidden={i for i, part in enumerate(parts) if part == "unlabelled"},
    )
    if reading.image_column:
        items, names = _files(cells[reading.image_column], root)
        return encoded(items, names, labels=labels, classes=classes, parts=parts, notes=notes,
                       max_unreadable=reading.max_unreadable)  # fmt: skip
    modality, inputs, kept, skipped, more = _texts(cells, reading) if reading.text_column else _numbers(cells, reading)
    return Found(
        modality=modality,
        inputs=inputs,
        names=tuple(f"row {i}" for i in kept),
        labels=labels[kept],
        classes=classes,
        hashes=tuple(content_hash(inputs[i]) for i in range(len(inputs))),
        parts=tuple(parts[i] for i in kept) if parts else (),
        skipped=skipped,
        notes=(*notes, *more),
    )


def _parts(cells: Sequence[Any], column: str) -> list[str]:
    strange = [i for i, cell in enumerate(cells) if str(cell).strip().lower() not in PARTS]
    require(
        not strange,
        f"split_column {column!r} must say train, validation, test or unlabelled",
        f"{cells[strange[0]] if strange else ''!r} (row {strange[0] if strange else 0})",
        "Rename the parts.",
    )
    return [PARTS[str(cell).strip().lower()] for cell in cells]


def _files(cells: Sequence[Any], root: Path) -> tuple[list[Path | bytes], list[str]]:
    """Where the pictures of a column are (files, or bytes as Hugging Face stores them), and their names."""
    items: list[Path | bytes] = []
    names = []
    for i, cell in enumerate(cells):
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        path = cell.get("path") if isinstance(cell, dict) else cell
        items.append(content if isinstance(content, bytes) else b"" if missing(path) else root / str(path))
        names.append(path if isinstance(path, str) and path.strip() else f"row {i}")
    return items, names if len(set(names)) == len(names) else [f"row {i}" for i in range(len(cells))]


Read = tuple[Modality, Inputs, list[int], tuple[tuple[str, str], ...], list[str]]


def _texts(cells: Mapping[str, list[Any]], reading: Reading) -> Read:
    column = reading.text_column
    assert column is not None
    values = cells[column]
    strange = [i for i, value in enumerate(values) if not missing(value) and not isinstance(value, str)]
    require(
        not strange,
        f"text_column {column!r} must hold texts",
        f"mixed types: {len(strange)} cells are not text (row {few(map(str, strange))})",
        "Repair them, or name numeric columns with feature_columns=.",
    )
    skipped = tuple((f"row {i}", "no text") for i, value in enumerate(values) if missing(value))
    refuse_unreadable(skipped, len(values), reading.max_unreadable)
    kept = [i for i, value in enumerate(values) if not missing(value)]
    return "text", Texts(values[i] for i in kept), kept, skipped, skip_notes(skipped)


def _numbers(cells: Mapping[str, list[Any]], reading: Reading) -> Read:
    asked = reading.feature_columns is not None
    chosen = reading.feature_columns or [
        name for name in cells if name not in (reading.label_column, reading.split_column)
    ]
    for name in chosen:
        known_column("feature_columns", name, list(cells))
        require(name != reading.label_column, "features must not hold the label", repr(name), "Leave it out.")
    read = {name: numbers_from(cells[name], name, asked=asked) for name in chosen}
    used = {name: values for name, values in read.items() if values is not None}
    require(
        bool(used),
        "a task needs inputs",
        f"no numeric column beside the label among {few(map(repr, cells), 12)}",
        "Name image_column=, text_column= or feature_columns=.",
    )
    ignored = [name for name in chosen if name not in used]
    notes = [f"columns that hold no numbers were ignored: {', '.join(ignored)}"] if ignored else []
    values = np.stack(list(used.values()), axis=1)
    return "numeric", rows(values, list(used)), list(range(len(values))), (), notes


def tool(name: str) -> Any:
    """An optional package, or a refusal that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refused(f"this file needs {name}; got no such package. Run: pip install {name}") from error
