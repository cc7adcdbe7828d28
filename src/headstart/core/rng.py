"""Random state that is borrowed and given back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def _gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def random_state() -> dict[str, Any]:
    """The state of torch's (CPU and GPU), numpy's and Python's generators, in types that `torch.save` keeps safe."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, inner, cached = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if _gpu() else [],
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "python": (version, inner, cached),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` returned."""
    name, keys, position, has_gauss, gauss = state["numpy"]
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, inner, cached = state["python"]
    random.setstate((version, tuple(inner), cached))


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed every generator inside the block and give the caller's state back after it (None leaves the seed alone).

    >>> before = torch.get_rng_state()
    >>> with seeded(0):
    ...     _ = torch.rand(3)
    >>> bool((before == torch.get_rng_state()).all())
    True
    """
    state = random_state()
    try:
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            if _gpu():
                torch.cuda.manual_seed_all(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
        yield
    finally:
        restore_random_state(state)
