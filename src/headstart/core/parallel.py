"""Work that several threads share, with the results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")
SMALL = 1 << 20  # numbers below which a second thread costs more than it saves


def workers(numbers: int) -> int:
    """How many threads share work on so many numbers: as many as torch uses (OMP_NUM_THREADS), or one if they are few.

    >>> workers(1000)
    1
    """
    return torch.get_num_threads() if numbers > SMALL else 1


def in_order(calls: Iterable[Callable[[], Result]], workers: int) -> Iterator[Result]:
    """The results of the calls in their order, some of them made ahead of time by other threads.

    Args:
        calls: made as they are needed; at most twice as many as workers are under way.
        workers: threads; 1 calls here, one after the other.

    >>> list(in_order((lambda k=k: k * k for k in range(4)), workers=2))
    [0, 1, 4, 9]
    """
    if workers <= 1:
        yield from (call() for call in calls)
        return
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for call in calls:
                waiting.append(pool.submit(call))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # after an error nobody wants the rest
            for future in waiting:
                future.cancel()
