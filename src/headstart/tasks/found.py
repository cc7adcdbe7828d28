"""What a reader found at a target before any split, and the one pass over files that checks, hashes and sketches."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from headstart.core.validate import require

from .examples import Images, Inputs, Picture, content_hash, open_picture

Modality = Literal["image", "text", "numeric"]
SKETCH = 16  # side of the thumbnail that `doctor` compares


@dataclass(frozen=True, kw_only=True)
class Found:
    """Every readable example of a target; axis 0 is the example.

    Args:
        inputs: the raw inputs.
        names: unique names.
        labels: class indices, -1 where there is no label.
        classes: the name of each class.
        hashes: sha256 of each example's content.
        parts: the part each example was found in: "train", "validation", "test", "unlabelled", or "" for undecided.
        groups: examples that must stay on one side of a split, such as patches of one region; () for none.
        skipped: (name, reason) of what could not be read.
        sizes: (width, height) of each picture; () for other kinds.
        sketches: pictures as (n, 16, 16, 3) thumbnails where the reader has already decoded them.
    """

    modality: Modality
    inputs: Inputs
    names: tuple[str, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    hashes: tuple[str, ...]
    parts: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    sketches: NDArray[np.uint8] | None = None


@dataclass(frozen=True, kw_only=True)
class Glance:
    """One encoded picture, looked at once: its hash, size and thumbnail, or the reason why it cannot be read."""

    hash: str = ""
    size: tuple[int, int] = (0, 0)
    sketch: Picture | None = None
    problem: str = ""


def glance(item: Path | bytes) -> Glance:
    """Read and decode one picture; a failure becomes `problem`. Cost: one read and one (reduced) decoding."""
    from PIL import Image

    try:
        content = item.read_bytes() if isinstance(item, Path) else item
        if not content:
            return Glance(problem="empty (0 bytes)")
        image = open_picture(content, at_least=4 * SKETCH)
        with Image.open(io.BytesIO(content)) as header:
            size = (header.width, header.height)
        thumbnail = image.resize((SKETCH, SKETCH), Image.Resampling.BOX, reducing_gap=2.0)
        return Glance(hash=content_hash(content), size=size, sketch=np.array(thumbnail, dtype=np.uint8))
    except FileNotFoundError:
        return Glance(problem="missing")
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError) as error:
        return Glance(problem=f"unreadable ({type(error).__name__})")


def glances(items: Sequence[Path | bytes]) -> list[Glance]:
    """Look at every picture once, a few at a time (decoding releases the interpreter lock)."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(glance, items))


def refuse_unreadable(skipped: Sequence[tuple[str, str]], total: int, max_unreadable: float) -> None:
    """Refuse a target whose share of unreadable examples is above `max_unreadable`; names the first three."""
    require(
        len(skipped) <= max_unreadable * total,
        f"at most {max_unreadable:.0%} of the examples may be unreadable",
        f"{len(skipped)} of {total} ({few(f'{name}: {why}' for name, why in skipped)})",
        "Repair or delete them, or raise max_unreadable.",
    )


def encoded(
    items: Sequence[Path | bytes],
    names: Sequence[str],
    *,
    labels: NDArray[np.int64],
    classes: tuple[str, ...],
    parts: Sequence[str],
    notes: Sequence[str],
    max_unreadable: float,
) -> Found:
    """`Found` from picture files or their bytes, each looked at once; the unreadable ones are skipped by name."""
    seen = glances(items)
    skipped = tuple((name, look.problem) for name, look in zip(names, seen, strict=True) if look.problem)
    refuse_unreadable(skipped, len(items), max_unreadable)
    kept = [i for i, look in enumerate(seen) if not look.problem]
    sketches = [look.sketch for look in seen if look.sketch is not None]
    return Found(
        modality="image",
        inputs=Images([items[i] for i in kept]),
        names=tuple(names[i] for i in kept),
        labels=labels[kept],
        classes=classes,
        hashes=tuple(seen[i].hash for i in kept),
        parts=tuple(parts[i] for i in kept) if parts else (),
        skipped=skipped,
        notes=(*notes, *skip_notes(skipped)),
        sizes=tuple(seen[i].size for i in kept),
        sketches=np.stack(sketches) if sketches else None,
    )


def skip_notes(skipped: Sequence[tuple[str, str]]) -> list[str]:
    """One note for each example left out."""
    return [f"skipped {name}: {why}" for name, why in skipped]


def few(words: Iterable[str], most: int = 3) -> str:
    """The first few words, and how many more there are.

    >>> few(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    known = list(words)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(known[:most]) + more


def class_order(words: Iterable[str]) -> tuple[str, ...]:
    """Class names in a fixed order: by value when all are whole numbers, else alphabetical.

    >>> class_order(["10", "9"]), class_order(["cat", "9"])
    (('9', '10'), ('9', 'cat'))
    """
    known = set(words)
    if all(word.lstrip("-").isdecimal() for word in known):
        return tuple(sorted(known, key=lambda word: (int(word), word)))
    return tuple(sorted(known))
