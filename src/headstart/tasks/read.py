"""From whatever the user has to `Found`: which reader fits a target, and what may be said about its columns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from headstart.core.validate import require, suggestion

from .embedded import EMBEDDED, read_embedded
from .found import Found

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How to read a target; every field is a keyword of `load_task`, which explains them."""

    image_column: str | None = None
    text_column: str | None = None
    feature_columns: tuple[str, ...] | None = None
    label_column: str | None = None
    split_column: str | None = None
    missing_labels: Literal["refuse", "unlabelled"] = "refuse"
    label_type: Literal["auto", "text"] = "auto"
    max_unreadable: float = 0.1

    def columns(self) -> list[str]:
        """The flags that only make sense for a table and were given."""
        named = ("image_column", "text_column", "feature_columns", "label_column", "split_column")
        return [name for name in named if getattr(self, name) is not None]


def read(target: Any, reading: Reading) -> tuple[Found, str, str]:
    """What is at `target`, a short name for it, and the words that load it again.

    Args:
        target: a path, an embedded name, a DataFrame, a dict of arrays, or a tuple (x, y).
        reading: flags.

    Raises:
        Refused: when there is nothing to read, or no reader fits.
    """
    require(0 <= reading.max_unreadable <= 1, "max_unreadable must be a share", reading.max_unreadable, "Pass 0 to 1.")
    if isinstance(target, str | Path):
        return _read_path(target, reading)
    from .arrays import read_arrays

    if type(target).__module__.split(".")[0] == "pandas" and type(target).__name__ == "DataFrame":
        from .table import read_frame

        return read_frame(target, reading, where="the DataFrame"), "table", f"DataFrame {target.shape}"
    _no_columns(reading, "arrays")
    found = read_arrays(target)
    return found, "arrays", f"arrays of {len(found.names)} examples"


def _read_path(target: str | Path, reading: Reading) -> tuple[Found, str, str]:
    if isinstance(target, str) and target in EMBEDDED:
        _no_columns(reading, f"the embedded task {target!r}")
        found = read_embedded(target)
        if Path(target).exists():
            found = replace(found, notes=(f"this is the embedded task; for the local {target}, write ./{target}",))
        return found, target, target
    path = Path(target).expanduser()
    require(path.exists(), "a target must be a path that exists or an embedded task", repr(str(target)), _near(path))
    if path.is_dir():
        return _read_dir(path, reading), path.resolve().name, str(path)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        from .arrays import read_npz

        _no_columns(reading, ".npz files")
        return read_npz(path), path.stem, str(path)
    require(
        suffix in TABLES,
        "a target file must be a table or .npz",
        path.name,
        f"Pass a folder of class folders, or a file ending in {', '.join((*TABLES, '.npz'))}.",
    )
    from .table import read_table

    return read_table(path, reading), path.stem, str(path)


def _read_dir(path: Path, reading: Reading) -> Found:
    if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        from .hub import read_saved

        return read_saved(path, reading)
    _no_columns(reading, "class folders")
    from .folder import read_folder

    return read_folder(path, max_unreadable=reading.max_unreadable)


def _no_columns(reading: Reading, what: str) -> None:
    given = reading.columns()
    require(not given, f"{what} have no columns", ", ".join(given), "Leave the column flags out, or pass a table.")


def _near(path: Path) -> str:
    """The sentence after a path that does not exist: a near name beside it, or the embedded tasks."""
    beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() and path.name else []
    if path.parent != Path("."):
        return (
            suggestion(path.name, beside)
            if beside
            else (
                f"{path.parent} does not exist either. A Hugging Face data set has to be saved with save_to_disk first."
            )
        )
    said = suggestion(path.name, [*EMBEDDED, *beside])
    return said if said.startswith("Did") else f"Embedded tasks: {', '.join(EMBEDDED)}."
