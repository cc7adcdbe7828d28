"""The embedded zoo: small models pretrained on pictures made by code, with their cards, inside the package."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.core.validate import require

from .source import Source

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights"


def mini_sources(folder: Path = WEIGHTS) -> list[Source]:
    """Every embedded model, by name; reads the cards only.

    Args:
        folder: where cards and weights lie; `build_zoo` writes such a folder.

    Cost: a few milliseconds.

    >>> len(mini_sources()) >= 12
    True
    """
    cards = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.name != "BUILD.json"]
    return [
        Source(
            name=f"mini:{card['name']}",
            modality="image",
            load=partial(_load, folder / f"{card['name']}.safetensors", card),
            preprocess=Squared(size=card["input_size"], mean=tuple(card["mean"]), std=tuple(card["std"])),
            head="head",
            classes=tuple(card["classes"]),
            licence=card["licence"],
            fingerprint=card["sha256"],
            kind="mini",
            facts=card,
        )
        for card in cards
    ]


@dataclass(frozen=True, kw_only=True)
class Squared:
    """Pictures of any shape to one square size (antialiased bilinear, the aspect is not kept), then normalised.

    The result for one picture does not depend on the others.

    Args:
        size: side of the square.
        mean: of each channel, for values in [0, 1].
        std: of each channel.

    Shape: pictures uint8 (H, W, 3) -> float32 (n, 3, size, size).

    Raises:
        Refused: no pictures, or something that is not uint8 (H, W, 3).
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, raw: Sequence[np.ndarray], /) -> Tensor:
        import numpy as np
        import torch

        require(len(raw) > 0, "Preprocessing needs at least one picture", 0, "Pass a non-empty batch.")
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for row, picture in enumerate(raw):
            picture = np.asarray(picture)
            groups[picture.shape].append(row)
            require(
                picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and picture.size > 0,
                "A picture must be a uint8 array (H, W, 3)", f"{picture.dtype} {picture.shape} at row {row}",
                "Convert grey or transparent pictures to RGB first.",
            )  # fmt: skip
        out = torch.empty(len(raw), 3, self.size, self.size)
        for (height, width, _), rows in groups.items():
            # about 64 MB of floats at a time, however large the photographs are
            many = max(1, 2**24 // (height * width * 3))
            for first in range(0, len(rows), many):
                chosen = rows[first : first + many]
                pixels = torch.from_numpy(np.stack([np.asarray(raw[row]) for row in chosen]))
                out[chosen] = self._resized(pixels.permute(0, 3, 1, 2).float())
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (out / 255 - mean) / std

    def _resized(self, pixels: Tensor) -> Tensor:
        import torch.nn.functional as F

        if pixels.shape[2:] == (self.size, self.size):
            return pixels
        return F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)


def _load(path: Path, card: Mapping[str, Any]) -> nn.Module:
    import torch
    from safetensors.torch import load

    from headstart import nets

    repair = "Reinstall headstart, or make the weights again with `headstart zoo build`."
    require(path.is_file(), f"The weights of mini:{card['name']} must be there", f"no file {path.name}", repair)
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    require(found == card["sha256"], f"The weights of mini:{card['name']} must match its card", found, repair)
    weights = {name: t.float() if t.is_floating_point() else t for name, t in load(data).items()}
    with torch.device("meta"):  # no random numbers are drawn, and nothing is initialised only to be replaced
        model = nets.build(card["family"], card["outputs"])
    model.load_state_dict(weights, assign=True)
    return model.eval()
