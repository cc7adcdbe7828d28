"""Arrays in memory or in an .npz file: pictures, numbers or texts beside their labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.core.validate import Refused, require

from .columns import labels_from, unpack
from .examples import Images, Inputs, Rows, Texts, content_hash
from .found import Found, Modality, few

PAIRS = {  # part: names of inputs and labels
    "": (("x", "y"), ("X", "y")),
    "train": (("x_train", "y_train"), ("X_train", "y_train")),
    "validation": (("x_val", "y_val"), ("X_val", "y_val"), ("x_validation", "y_validation")),
    "test": (("x_test", "y_test"), ("X_test", "y_test")),
}
UNLABELLED = ("x_unlabelled", "x_unlabeled")


def read_npz(path: Path) -> Found:
    """Arrays from an .npz file with keys x and y, or x_train, y_train, x_test, y_test ...; pickled ones are refused."""
    import zipfile

    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        why = "pickled objects" if "pickle" in str(error).lower() else f"{type(error).__name__}: {error}"
        raise Refused(
            f"{path} must be an .npz of plain arrays; got {why}. Save numbers or fixed-width texts with numpy.savez."
        ) from error
    return read_arrays(arrays)


def read_arrays(target: Any) -> Found:
    """A tuple (x, y), or a mapping with the keys of `PAIRS` and "x_unlabelled".

    Args:
        target: x is pictures (uint8, or floats in [0, 1], NHWC, NCHW or NHW; or a list of (H, W, 3) arrays), numbers
            (n, d) or texts; y is one class a row, as numbers or words.

    Raises:
        Refused: for anything else, NaN, infinity, or lengths that differ.
    """
    if isinstance(target, tuple) and len(target) == 2:
        target = {"x": target[0], "y": target[1]}
    require(
        isinstance(target, Mapping),
        "a target must be a path, an embedded name, a DataFrame, (x, y), or a mapping of arrays",
        type(target).__name__,
        "See load_task for what can be read.",
    )
    blocks: list[tuple[str, Any, Any]] = []
    for part, pairs in PAIRS.items():
        blocks += [(part, target[x], target[y]) for x, y in pairs if x in target and y in target]
    blocks += [("unlabelled", target[name], None) for name in UNLABELLED if name in target]
    parts = [part for part, _, _ in blocks]
    require(
        "" in parts or "train" in parts,
        "the arrays must be called x and y, or x_train and y_train",
        few(map(str, target), 8) or "none",
        "Rename them.",
    )
    return _found(blocks)


def _found(blocks: Sequence[tuple[str, Any, Any]]) -> Found:
    notes: list[str] = []
    kinds, inputs, labels, parts = [], [], [], []
    for part, x, y in blocks:
        kind, read = _inputs(x, notes)
        words: Sequence[Any] = [None] * len(read) if y is None else unpack(y)
        require(len(words) == len(read), "x and y must have one row an example", f"{len(read)} and {len(words)}",
                "Pass the labels of exactly these examples.")  # fmt: skip
        kinds.append(kind)
        inputs.append(read)
        labels += list(words)
        parts += [part] * len(read)
    require(len(set(kinds)) == 1, "all parts must be of one kind", few(kinds, 5), "Pass one kind of input.")
    joined = inputs[0] if len(inputs) == 1 else _join(inputs)
    hidden = {i for i, part in enumerate(parts) if part == "unlabelled"}
    indices, classes, more = labels_from(labels, "y", hidden=hidden)
    if isinstance(joined, Images):
        sizes = tuple((joined[i].shape[1], joined[i].shape[0]) for i in range(len(joined)))
    return Found(
        modality=kinds[0],
        inputs=joined,
        names=tuple(f"row {i}" for i in range(len(parts))),
        labels=indices,
        classes=classes,
        hashes=tuple(content_hash(joined[i]) for i in range(len(joined))),
        parts=tuple(parts),
        notes=(*dict.fromkeys(notes), *more),
        sizes=sizes if isinstance(joined, Images) else (),
    )


def _join(blocks: Sequence[Inputs]) -> Inputs:
    if isinstance(blocks[0], Rows):
        widths = {block.values.shape[1] for block in blocks if isinstance(block, Rows)}
        require(len(widths) == 1, "all parts must have the same columns", sorted(widths), "Pass equal widths.")
        return Rows(np.concatenate([block.values for block in blocks if isinstance(block, Rows)]))
    items = [block[i] for block in blocks for i in range(len(block))]
    return Texts(items) if isinstance(blocks[0], Texts) else Images(items)


def _inputs(x: Any, notes: list[str]) -> tuple[Modality, Inputs]:
    if isinstance(x, Sequence) and not isinstance(x, str) and len(x):
        if all(isinstance(item, str) for item in x):
            return "text", Texts(x)
        if all(isinstance(item, np.ndarray) and item.ndim == 3 for item in x):
            return "image", Images([_pixels(np.asarray(item)[None], notes)[0] for item in x])
    try:
        values = np.asarray(x)
    except ValueError as error:
        raise Refused(
            f"x must be one array; got rows of different length ({error}). Pad or align them first."
        ) from None
    if values.dtype.kind in "UT" or (values.dtype == object and all(isinstance(item, str) for item in values.flat)):
        require(values.ndim == 1, "texts must come one an example", f"shape {values.shape}", "Pass a flat list.")
        return "text", Texts(str(item) for item in values)
    require(
        values.dtype.kind in "biuf" and values.ndim in (2, 3, 4) and len(values) > 0,
        "x must be pictures (n, H, W[, C]), numbers (n, d), or texts",
        f"shape {values.shape}, {values.dtype}",
        "Pass plain numbers of one type: mixed types and objects are not read.",
    )
    return ("numeric", rows(values, ())) if values.ndim == 2 else ("image", Images(_pixels(values, notes)))


def rows(values: NDArray[Any], columns: Sequence[str]) -> Rows:
    """Numbers (n, d) as float32 rows; NaN and infinity, also after the cast, are refused by row and column."""
    with np.errstate(over="ignore"):
        cast = np.asarray(values, dtype=np.float32)
    at, column = np.nonzero(~np.isfinite(cast))
    where = f"{columns[column[0]]!r}" if len(at) and columns else f"column {column[0] if len(at) else 0}"
    require(
        not len(at),
        "numeric inputs must be finite",
        f"{len(at)} missing, NaN or infinite values, the first in {where}, row {at[0] if len(at) else 0}",
        "Fill or drop them first.",
    )
    return Rows(cast, columns)


def _pixels(values: NDArray[Any], notes: list[str]) -> NDArray[np.uint8]:
    """(n, H, W), (n, H, W, C) or (n, C, H, W) to uint8 (n, H, W, 3)."""
    if values.ndim == 3:
        values = values[..., None]
    if values.shape[-1] not in (1, 3, 4) and values.shape[1] in (1, 3):
        values = np.moveaxis(values, 1, -1)
        notes.append("pictures came channels first and were turned to (n, H, W, C)")
    require(values.shape[-1] in (1, 3, 4) and min(values.shape) > 0, "pictures must have 1, 3 or 4 channels",
            f"shape {values.shape}", "Pass (n, H, W), (n, H, W, 3) or (n, 3, H, W).")  # fmt: skip
    low, high = float(np.min(values)), float(np.max(values))
    real = values.dtype.kind == "f"
    top = 1 if real or values.dtype.kind == "b" else 255
    require(
        low >= 0 and high <= top,
        f"{'float' if real else 'integer'} pictures must lie in [0, {top}]",
        f"[{low:g}, {high:g}]",
        "Undo the normalisation, or pass uint8.",
    )
    if top == 1:
        notes.append("pictures came as numbers in [0, 1] and were scaled to 0..255")
    pixels = np.rint(values * 255.0).astype(np.uint8) if top == 1 else values.astype(np.uint8)
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels[..., :3]
