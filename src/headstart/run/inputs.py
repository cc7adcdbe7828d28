"""What a person names on the command line, as raw examples: folders, picture files, tables, arrays, texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headstart.core.validate import Refused, require, suggestion

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


def read_inputs(given: Sequence[str], modality: str, column: str | None, run: Path) -> tuple[list[str], Any]:
    """Names and raw inputs of everything given.

    Args:
        given: files, folders, or texts for a text model.
        modality: what the model reads.
        column: of a table, with pictures, texts; None takes the one the run was trained on.
        run: the directory of the run, whose run.json knows the columns.

    Raises:
        Refused: something is missing, unreadable, or of another kind.
    """
    reading = _reading(run)
    names: list[str] = []
    values: list[Any] = []
    for one in given:
        path = Path(one).expanduser()
        suffix = path.suffix.lower()
        if suffix in TABLES and path.is_file():
            found = _from_table(path, modality, column, reading)
        elif suffix == ".npz" and path.is_file():
            found = _from_arrays(path, modality)
        elif modality == "text":
            found = [(one, one)]
        elif modality == "image":
            found = [(str(file), file) for file in _pictures(path)]
        else:
            raise Refused(f"This model reads rows of numbers; got {one}. Pass a {', '.join(TABLES)} or .npz file.")
        names += [name for name, _ in found]
        values += [value for _, value in found]
    require(bool(values), "predict needs at least one input", 0, "Name files, folders or texts.")
    return names, _opened(names, values) if modality == "image" else values


def _opened(names: list[str], values: list[Any]) -> list[Any]:
    """Pictures as arrays; an unreadable one is named."""
    from headstart.tasks import Images

    opened = []
    for name, value in zip(names, values, strict=True):
        try:
            opened.append(Images([value])[0])
        except (OSError, ValueError, SyntaxError) as problem:
            raise Refused(f"Every picture must be readable; got {name} ({type(problem).__name__}). "
                          "Remove it or repair it.") from problem  # fmt: skip
    return opened


def _pictures(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES)
        require(bool(files), "A folder to predict needs pictures in it", path, f"Known: {', '.join(PICTURES)}.")
        return files
    require(path.is_file(), "A picture to predict must exist", path, "Check the path.")
    return [path]


def _reading(run: Path) -> dict[str, Any]:
    file = run / "run.json"
    if not file.is_file():
        return {}
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["settings"]
    return {**settings["reading"], "columns": settings.get("columns", [])}


def _from_table(path: Path, modality: str, column: str | None, reading: dict[str, Any]) -> list[tuple[str, Any]]:
    import numpy as np
    import pandas as pd

    try:
        if path.suffix == ".parquet":
            frame = pd.read_parquet(path)
        elif path.suffix == ".jsonl":
            frame = pd.read_json(path, lines=True)
        else:
            frame = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
    except (OSError, ValueError) as problem:
        raise Refused(f"A table must be readable; got {path}: {problem}. Repair it.") from problem
    rows = [f"{path}:{i}" for i in range(len(frame))]
    if modality == "numeric":
        wanted = reading.get("columns") or reading.get("feature_columns") or list(frame.select_dtypes("number"))
        _known(wanted, frame, path)
        values = frame[list(wanted)].to_numpy(dtype=np.float32)
        return list(zip(rows, values, strict=True))
    name = column or reading.get("image_column" if modality == "image" else "text_column")
    if name is None:
        texts = [str(c) for c in frame.select_dtypes(exclude="number")]
        require(len(texts) == 1, f"{path} needs one column of {modality}s", f"{texts}", "Name it with --column.")
        name = texts[0]
    _known([name], frame, path)
    cells = [str(value) for value in frame[name]]
    if modality == "text":
        return list(zip(rows, cells, strict=True))
    return [(row, _pictures(path.parent / cell)[0]) for row, cell in zip(rows, cells, strict=True)]


def _known(wanted: Sequence[str], frame: Any, path: Path) -> None:
    for name in wanted:
        columns = [str(c) for c in frame.columns]
        require(name in columns, f"{path} needs the column {name!r}", f"{columns[:8]}", suggestion(name, columns))


def _from_arrays(path: Path, modality: str) -> list[tuple[str, Any]]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as stored:
            key = next((name for name in ("x", "inputs", "images", "features", "data") if name in stored), None)
            require(key is not None, f"{path} needs an array called x", f"{list(stored)[:8]}", "Rename it.")
            values = stored[str(key)]
    except (OSError, ValueError) as problem:
        if isinstance(problem, Refused):
            raise
        raise Refused(f"An .npz must be readable without pickle; got {path}: {problem}. Save it again.") from problem
    if modality == "image" and values.ndim == 3:
        values = np.repeat(values[..., None], 3, axis=-1)
    if modality == "image" and values.dtype != np.uint8:
        high = float(values.max(initial=0))
        require(float(values.min(initial=0)) >= 0 and high <= 255, f"Pictures in {path} must lie in 0..1 or 0..255",
                f"up to {high:g}", "Rescale them.")  # fmt: skip
        values = np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8)
    return [(f"{path}:{i}", value) for i, value in enumerate(values)]
