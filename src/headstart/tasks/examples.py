"""Examples: inputs beside their names and, where they may be seen, their labels. Pictures are decoded on access."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Picture = NDArray[np.uint8]


def open_picture(source: Path | bytes, *, at_least: int | None = None) -> Any:
    """A decoded PIL image in mode RGB, upright, transparency laid over white.

    Args:
        source: a file or its bytes.
        at_least: when given, a JPEG may be decoded at a smaller scale, no side below this; only for sketches.

    Raises:
        OSError: (or another of Pillow's errors) when the bytes are no readable picture.
    """
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
        if at_least is not None:
            opened.draft("RGB", (at_least, at_least))
        opened.load()
        image: Any = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits and wider: convert("RGB") would clip, not scale
        values = np.asarray(image, dtype=np.float64)
        highest = values.max(initial=0)  # "I" and "F" do not say what white is
        top = 65535.0 if image.mode.startswith("I;16") or highest > 255 else 1.0 if highest <= 1 else 255.0
        image = Image.fromarray((np.clip(values / top, 0, 1) * 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class Images(Sequence[Picture]):
    """Pictures as uint8 arrays (H, W, 3), decoded on access; sizes may differ.

    Args:
        items: files, encoded bytes or uint8 arrays (H, W, 3); an array (n, H, W, 3) is kept as one block.

    >>> Images(np.zeros((2, 8, 8, 3), np.uint8))[0].shape
    (8, 8, 3)
    """

    def __init__(self, items: Sequence[Path | bytes | Picture] | Picture) -> None:
        self.items = items if isinstance(items, np.ndarray) else tuple(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        item = self.items[int(index)]
        return item if isinstance(item, np.ndarray) else np.array(open_picture(item), dtype=np.uint8)

    def __repr__(self) -> str:
        return f"Images({len(self)})"

    def take(self, indices: Iterable[int]) -> Images:
        """The pictures at `indices`, in that order, still undecoded."""
        chosen = [int(i) for i in indices]
        if isinstance(self.items, np.ndarray):
            return Images(self.items[chosen])
        return Images([self.items[i] for i in chosen])


class Texts(Sequence[str]):
    """Texts, one str an example."""

    def __init__(self, items: Iterable[str]) -> None:
        self.items = tuple(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return Texts(self.items[index]) if isinstance(index, slice) else self.items[int(index)]

    def __repr__(self) -> str:
        return f"Texts({len(self)})"

    def take(self, indices: Iterable[int]) -> Texts:
        """The texts at `indices`, in that order."""
        return Texts(self.items[int(i)] for i in indices)


class Rows(Sequence[NDArray[np.float32]]):
    """Numbers, one float32 row (d,) an example.

    Args:
        values: array (n, d).
        columns: the name of each column, () when they have none.
    """

    def __init__(self, values: NDArray[Any], columns: Sequence[str] = ()) -> None:
        self.values = np.asarray(values, dtype=np.float32)
        self.columns = tuple(columns)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Any:
        return Rows(self.values[index], self.columns) if isinstance(index, slice) else self.values[int(index)]

    def __repr__(self) -> str:
        return f"Rows{self.values.shape}"

    def take(self, indices: Iterable[int]) -> Rows:
        """The rows at `indices`, in that order."""
        return Rows(self.values[[int(i) for i in indices]], self.columns)


Inputs = Images | Texts | Rows


def content_hash(item: Path | bytes | str | NDArray[Any]) -> str:
    """The sha256 of one example's content: file bytes, text, or shape, type and values of an array."""
    if isinstance(item, Path):
        item = item.read_bytes()
    if isinstance(item, str):
        item = item.encode()
    if isinstance(item, np.ndarray):
        item = f"{item.shape}{item.dtype}".encode() + np.ascontiguousarray(item).tobytes()
    return hashlib.sha256(item).hexdigest()


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Examples:
    """Some examples of a task; axis 0 is the example in every field.

    Args:
        inputs: images (uint8 (H, W, 3)), texts (str) or numeric rows (float32 (d,)).
        names: the file name or row of each example.
        labels: class indices int64 (n,); None where sealed or unknown.
        hashes: the sha256 of each example's content.
    """

    inputs: Inputs
    names: tuple[str, ...]
    labels: Tensor | None = None
    hashes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"Examples({self.inputs!r}, {'without' if self.labels is None else 'with'} labels)"

    def take(self, indices: Iterable[int] | Tensor) -> Examples:
        """The examples at `indices`, in that order.

        >>> some = Examples(inputs=Texts(["a", "b"]), names=("0", "1"), labels=torch.tensor([0, 1]))
        >>> some.take([1]).inputs[0], some.take([1]).labels.tolist()
        ('b', [1])
        """
        chosen = [int(i) for i in indices]
        return Examples(
            inputs=self.inputs.take(chosen),
            names=tuple(self.names[i] for i in chosen),
            labels=None if self.labels is None else self.labels[torch.tensor(chosen, dtype=torch.long)],
            hashes=tuple(self.hashes[i] for i in chosen) if self.hashes else (),
        )
