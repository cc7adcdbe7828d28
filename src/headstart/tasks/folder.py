"""Class folders of pictures, with or without train, validation, test and unlabelled folders above them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from headstart.core.validate import require

from .found import Found, class_order, encoded, few

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("unlabelled", "unlabeled"), "unlabelled"),
}


def read_folder(root: Path, *, max_unreadable: float = 0.1) -> Found:
    """Every picture under `root`, its class from the folder it lies in.

    Args:
        root: holds one folder a class, or `train/` (and `val/`, `test/`) that do. Pictures under `unlabelled/` or
            `unlabeled/`, and those of a part that has no class folders, come without label.
        max_unreadable: the share of unreadable pictures above which the folder is refused.

    Raises:
        Refused: when there is no picture, no class folder, or too much is unreadable.
    """
    entries: list[tuple[Path, str, str | None]] = []  # file, part, class
    notes: list[str] = []
    folders = _folders(root)
    split = any(PARTS.get(folder.name.lower()) == "train" for folder in folders)
    for folder in folders:
        part = PARTS.get(folder.name.lower(), "")
        if part == "unlabelled":
            entries += [(file, part, None) for file in _pictures(folder)]
        elif split and part:
            entries += _part(folder, part, notes)
        elif split:
            notes.append(f"{folder.name}/ was ignored: it lies beside train/")
        else:
            entries += _class(folder, "", notes)
    loose = [file for file in root.iterdir() if _is_picture(file)]
    require(
        bool(entries or loose),
        f"{root} must hold pictures in one folder a class",
        f"a folder without pictures ({few(sorted(SUFFIXES), 20)})",
        "Put each picture under a folder named after its class.",
    )
    classes = class_order(word for _, _, word in entries if word is not None)
    require(
        bool(classes),
        f"{root} must hold one folder a class",
        f"{len(loose) or len(entries)} pictures and no class folder",
        "Move each picture into a folder named after its class, or pass a table with image_column=.",
    )
    if loose:
        notes.append(f"{len(loose)} pictures beside the class folders were ignored")
    index = {word: i for i, word in enumerate(classes)}
    return encoded(
        [file for file, _, _ in entries],
        [file.relative_to(root).as_posix() for file, _, _ in entries],
        labels=np.array([-1 if word is None else index[word] for _, _, word in entries], dtype=np.int64),
        classes=classes,
        parts=[part for _, part, _ in entries],
        notes=notes,
        max_unreadable=max_unreadable,
    )


def _part(folder: Path, part: str, notes: list[str]) -> list[tuple[Path, str, str | None]]:
    """The pictures of one of train, validation, test: labelled by class folder, else unlabelled."""
    entries = [entry for inner in _folders(folder) for entry in _class(inner, part, notes)]
    loose = [file for file in folder.iterdir() if _is_picture(file)]
    if loose:
        notes.append(f"{len(loose)} pictures of {folder.name}/ lie in no class folder: taken as unlabelled")
    return entries + [(file, "unlabelled", None) for file in sorted(loose)]


def _class(folder: Path, part: str, notes: list[str]) -> list[tuple[Path, str, str | None]]:
    files = _pictures(folder)
    if not files:
        notes.append(f"{folder.name}/ holds no picture and is no class")
    return [(file, part, folder.name) for file in files]


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if _is_picture(path))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
