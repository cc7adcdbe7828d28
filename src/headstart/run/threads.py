"""How many threads a run may use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from headstart.zoo import Source

SMALL = 2_000_000  # parameters below which a second thread gains nothing


@contextmanager
def threads_for(sources: Sequence[Source]) -> Iterator[None]:
    """One thread while all sources are small, the caller's number again afterwards; for torch and for numpy.

    A small network gains next to nothing from a second thread, loses a factor of ten where another process is busy,
    and its numbers would depend on the number of cores.
    """
    if not all((source.facts.get("parameters") or SMALL) < SMALL for source in sources):
        yield
        return
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        torch.set_num_threads(before)
