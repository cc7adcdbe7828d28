"""A folder that Hugging Face `save_to_disk` wrote, read with pyarrow alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from headstart.core.validate import Refused, require

from .folder import PARTS
from .found import Found, few
from .read import Reading
from .table import read_frame, tool

SPLIT = "split (folder)"  # no stored column has this name


def read_saved(root: Path, reading: Reading) -> Found:
    """A saved Dataset or DatasetDict: class names in declared order, -1 as unlabelled, pictures still encoded.

    Raises:
        Refused: when files are damaged or missing, or no column fits.
    """
    pandas = tool("pandas")
    folders, notes = {"": root}, []
    if (root / "dataset_dict.json").is_file():
        names = _json(root / "dataset_dict.json").get("splits", [])
        folders = {PARTS.get(name.lower(), name): root / name for name in names}
        unknown = [part for part in folders if part not in PARTS.values() and part != "unsupervised"]
        notes = [f"split {name!r} was ignored: it is none of train, validation, test, unlabelled" for name in unknown]
        folders = {"unlabelled" if p == "unsupervised" else p: f for p, f in folders.items() if p not in unknown}
    require(bool(folders), f"{root} must hold splits", "none that is train, validation or test", "Rename the splits.")
    frames = {part: _frame(folder) for part, folder in folders.items()}
    features = _json(next(iter(folders.values())) / "dataset_info.json").get("features") or {}
    if "" not in frames:
        require(reading.split_column is None, f"{root} already has splits", "split_column", "Leave it out.")
        frames = {part: frame.assign(**{SPLIT: part}) for part, frame in frames.items()}
        reading = replace(reading, split_column=SPLIT)
    frame = pandas.concat(list(frames.values()), ignore_index=True)
    order = {}
    for column, feature in features.items():
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and column in frame:
            names = feature["names"]
            frame[column] = [_name(value, names) for value in frame[column].astype(object)]
            order[column] = names
    reading = _columns(reading, features, order)
    if reading.label_column in order:  # a ClassLabel of -1 is how such data sets say "no label"
        reading = replace(reading, missing_labels="unlabelled", label_type="text")
    found = read_frame(frame, reading, where=str(root), root=root, order=order)
    return replace(found, notes=(*notes, *found.notes))


def _columns(reading: Reading, features: dict[str, Any], labels: dict[str, list[str]]) -> Reading:
    """The flags that the declared types decide: the only ClassLabel, the only Image."""
    if reading.label_column is None and len(labels) == 1:
        reading = replace(reading, label_column=next(iter(labels)))
    images = [name for name, feature in features.items() if isinstance(feature, dict) and feature["_type"] == "Image"]
    inputs = (reading.image_column, reading.text_column, reading.feature_columns)
    if len(images) == 1 and all(flag is None for flag in inputs):
        reading = replace(reading, image_column=images[0])
    return reading


def _name(value: Any, names: list[str]) -> str | None:
    if value is None or value != value or value == -1:
        return None
    require(0 <= int(value) < len(names), "a ClassLabel must index its names", value, f"The names: {few(names, 8)}.")
    return names[int(value)]


def _frame(folder: Path) -> Any:
    pyarrow = tool("pyarrow")
    files = [folder / entry["filename"] for entry in _json(folder / "state.json").get("_data_files", [])]
    require(bool(files), f"{folder} must list data files", "none", "Save the data set again with save_to_disk.")
    try:
        tables = [pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all() for file in files]
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise Refused(f"{folder} must be a data set that save_to_disk wrote; got {error}. Save it again.") from error
    return pyarrow.concat_tables(tables).to_pandas()


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        why = "no such file" if isinstance(error, OSError) else "damaged JSON"
        raise Refused(f"a saved data set needs {path}; got {why}. Save the data set again.") from error
    require(isinstance(content, dict), f"{path} must hold a JSON object", type(content).__name__, "Save it again.")
    return dict(content)
