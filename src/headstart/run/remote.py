"""Where the jobs of a ranking run: in this process, or on a Ray cluster."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeVar

from headstart.core.validate import one_of, require

Workers = Literal["here", "ray"]
Job = TypeVar("Job")
Result = TypeVar("Result")
RETRIES = 3


def crew(workers: Workers) -> Callable[[Callable[[Job], Result], Iterable[Job]], Iterator[Result]]:
    """A `map` that yields results in the order of the jobs.

    Args:
        workers: "here", one after another; "ray", one remote task a job on the cluster that Ray is connected to (or
            RAY_ADDRESS names), else on a local one with as many workers as processors. A job whose worker dies is run
            again, up to three times; what it had put into a cache on storage shared by the workers is not done twice.

    Raises:
        Refused: Ray is not installed.

    >>> list(crew("here")(abs, [-1, 2]))
    [1, 2]
    """
    one_of("workers", workers, ["here", "ray"])
    if workers == "here":
        return map
    missing = importlib.util.find_spec("ray") is None
    require(not missing, "workers='ray' needs the package ray", "none", "Run `pip install 'headstart[scale]'`.")
    return on_ray


def on_ray(function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
    """Run every job as a Ray task with one processor, and the threads this process uses so that digits agree."""
    import ray
    import torch

    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    threads = torch.get_num_threads()

    def run(shared: Callable[[Job], Result], job: Job) -> Result:
        torch.set_num_threads(threads)
        return shared(job)

    remote, shared = ray.remote(num_cpus=1, max_retries=RETRIES)(run), ray.put(function)
    running = [remote.remote(shared, job) for job in jobs]
    for reference in running:
        yield ray.get(reference)
