"""Does merging cost what reading and writing cost? Ratios in one run; memory beside time.

    python benchmarks/merging.py

The threshold of a global trim: 20 million changes, 20 % kept, against sorting them all (mergekit's form), `topk` (peft's) and
`kthvalue` (the official one), one thread, the same entries kept. Then TIES of 8 models of 64 million weights each, from disk to
disk, against reading those bytes and writing the result, with the files in the page cache and not. Peak memory is that of a
process of its own. Writes benchmarks/results/merging.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import torch
from torch import Tensor

from headstart.core.shards import LazyWeights, spans
from headstart.core.weights import merged_parts, save_weights
from headstart.core.write import write_parts
from headstart.merge import Average, Ties
from headstart.merge.edges import edges

OUT = Path(__file__).parent / "results" / "merging.json"
ENTRIES, DENSITY, MODELS = 20_000_000, 0.2, 8
SHAPES = {
    f"layers.{k}.{name}": shape
    for k in range(12)
    for name, shape in (*((f"{n}_proj", (1024, 1024)) for n in "qkvo"), ("up", (512, 1024)), ("down", (1024, 512)))
}
SHAPES["embed"] = (1100, 1024)  # fmt: skip


def threshold() -> list[dict[str, object]]:
    x = torch.randn(ENTRIES, generator=torch.Generator().manual_seed(0))
    base, kept = {"x": torch.zeros(ENTRIES)}, int(DENSITY * ENTRIES)

    def ours() -> Tensor:
        return edges(["x"], [{"x": x}], base, [kept])["x"][0](x, 0) != 0

    def argsort() -> Tensor:
        return torch.zeros(ENTRIES, dtype=torch.bool).scatter_(0, x.abs().argsort(descending=True)[:kept], True)

    def topk() -> Tensor:
        return torch.zeros(ENTRIES, dtype=torch.bool).scatter_(0, x.abs().topk(kept).indices, True)

    def kthvalue() -> Tensor:
        return x.abs() >= x.abs().kthvalue(ENTRIES - kept + 1).values

    mask, own = timed(ours, 3)
    rows = []
    for name, form in (("argsort", argsort), ("topk", topk), ("kthvalue", kthvalue)):
        other, seconds = timed(form, 1)
        rows.append({"against": name, "ours_s": own, "theirs_s": seconds, "ratio": seconds / own,
                     "entries_that_differ": int((mask != other).sum())})  # fmt: skip
    return rows


def timed(call: Callable[[], Tensor], times: int) -> tuple[Tensor, float]:
    best = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - began)
    return result, best


def make(folder: Path) -> None:
    g = torch.Generator().manual_seed(0)
    base = {name: 0.05 * torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    save_weights(base, folder / "base")
    for k in range(MODELS):
        save_weights({n: w + 0.01 * torch.randn(w.shape, generator=g) for n, w in base.items()}, folder / str(k))


def forget(folder: Path) -> None:
    """Take the files out of the page cache."""
    for file in folder.rglob("*.safetensors"):
        number = os.open(file, os.O_RDONLY)
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


def read_and_write(models: list[LazyWeights], base: LazyWeights) -> Iterator[tuple[str, int, Tensor]]:
    for name in base:
        for start, stop in spans(base.spec(name).entries):
            for model in models:
                model.part(name, start, stop)
            yield name, start, base.part(name, start, stop)


def peak_mb() -> float:
    """Of this process alone; getrusage would count what its parent held."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def part(what: str, folder: Path) -> None:
    """One way in a process of its own; prints seconds and peak bytes above the start."""
    torch.set_num_threads(1)
    models, base = [LazyWeights(folder / str(k)) for k in range(MODELS)], LazyWeights(folder / "base")
    specs = {name: base.spec(name) for name in base}
    before = peak_mb()
    began = time.perf_counter()
    if what == "bytes":
        parts = read_and_write(models, base)
    else:
        rule = Ties(density=DENSITY) if what == "ties" else Average()
        parts = merged_parts(rule, models, base=base)
    write_parts(parts, specs, folder / "out")
    sys.stdout.write(json.dumps({"seconds": time.perf_counter() - began, "cpu": os.times()[:2], "peak_mb": peak_mb(),
                                 "above_start_mb": peak_mb() - before}))  # fmt: skip


def checkpoints() -> dict[str, object]:
    found: dict[str, object] = {"models": MODELS, "weights": MODELS * sum(a * b for a, b in SHAPES.values())}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(folder)
        for where in ("from disk", "from the page cache"):
            rows = {}
            for what in ("bytes", "average", "ties"):
                runs = []
                for _ in range(3):
                    if where == "from disk":
                        forget(folder)
                    said = subprocess.run([sys.executable, __file__, what, place], capture_output=True, check=True)
                    runs.append(json.loads(said.stdout))
                rows[what] = min(runs, key=lambda run: run["seconds"])
            rows["ties over bytes"] = rows["ties"]["seconds"] / rows["bytes"]["seconds"]
            rows["average over bytes"] = rows["average"]["seconds"] / rows["bytes"]["seconds"]
            found[where] = rows
    return found


def main() -> None:
    torch.set_num_threads(1)
    record = {"torch": torch.__version__, "threshold": threshold(), "checkpoints": checkpoints()}
    OUT.write_text(json.dumps(record, indent=1) + "\n")
    sys.stdout.write(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        part(sys.argv[1], Path(sys.argv[2]))
    else:
        main()
