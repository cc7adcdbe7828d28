"""Small targets that the tests write to disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture(seed: int, height: int = 12, width: int = 10) -> np.ndarray:
    """A random picture, different for each seed."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes `counts[class]` different .png pictures under `root/under/class/` and returns root."""

    def make(counts: dict[str, int], under: str = "", suffix: str = ".png") -> Path:
        root = tmp_path / "pictures"
        for word, count in counts.items():
            place = root / under / word
            place.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                seed = sum(map(ord, under + word)) * 1000 + i
                Image.fromarray(picture(seed)).save(place / f"{i:03d}{suffix}")
        return root

    return make
