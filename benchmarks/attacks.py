"""Attacks on one thread beside torchattacks, at equal results.

    python benchmarks/attacks.py

Ten steps of radius 8 / 255 on random labels: PGD from x itself, MI-FGSM, and VMI-FGSM with 5 and 20 neighbours, on a
convolutional model of the embedded zoo (32 x 32 pixels) and on a small one for 8 x 8 pixels. Processor seconds,
interleaved, the median over repetitions and of the ratios within a repetition; peak memory in a process of its own.
`largest_difference` is that of the results, for VMI-FGSM at one example and with the draws of torchattacks. Then a
gradient of several surrogates' averaged logits, stacked and one after another. Writes benchmarks/results/attacks.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torchattacks
from torch import Tensor, nn

from headstart.attack import MIFGSM, PGD, VMIFGSM, fused
from headstart.attack.draws import generators
from headstart.core.ascent import Attack, goal_gradient, misclassify
from headstart.core.rng import seeded
from headstart.zoo.mini import mini_sources

RADIUS, ALPHA = 8 / 255, 2 / 255


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 10),
    ).eval()  # fmt: skip


MODELS = ("small convolutional", "mini:cnn-letters")


def made(label: str) -> tuple[nn.Module, tuple[int, ...]]:
    return (embedded(label), (3, 32, 32)) if label.startswith("mini") else (small(), (1, 8, 8))


def embedded(name: str) -> nn.Module:
    (source,) = [source for source in mini_sources() if source.name == name]
    model: nn.Module = source.load()
    return model.eval()


def methods(model: nn.Module) -> dict[str, tuple[Attack, Callable[[Tensor, Tensor], Tensor]]]:
    given: dict[str, Any] = {"radius": RADIUS, "step_size": ALPHA}
    theirs: dict[str, Any] = {"eps": RADIUS, "alpha": ALPHA, "steps": 10}
    return {
        "PGD": (PGD(random_start=False, **given), torchattacks.PGD(model, random_start=False, **theirs)),
        "MI-FGSM": (MIFGSM(**given), torchattacks.MIFGSM(model, **theirs)),
    } | {
        f"VMI-FGSM, {n} neighbours": (VMIFGSM(neighbours=n, **given), torchattacks.VMIFGSM(model, N=n, **theirs))
        for n in (5, 20)
    }


def timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


def compare(model: nn.Module, shape: tuple[int, ...], name: str, repetitions: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator)
    y = torch.randint(model(x).shape[1], (shape[0],), generator=generator)
    attack, theirs = methods(model)[name]
    goals = [misclassify(model, y)]
    works: dict[str, Callable[[], Tensor]] = {
        "headstart": partial(attack.perturb, x, goals),
        "torchattacks": partial(theirs, x, y),
    }
    seconds: dict[str, list[float]] = {arm: [] for arm in works}
    found: dict[str, Tensor] = {}
    for _ in range(repetitions + 1):
        for arm, work in works.items():
            if arm == "torchattacks" and name.startswith("VMI"):  # its normal numbers are drawn and overwritten
                with seeded(generators(0, 0, 1)[0].initial_seed()), patch("torch.randn_like", torch.empty_like):
                    took, found[arm] = timed(work)
            else:
                took, found[arm] = timed(work)
            seconds[arm].append(took)
    row: dict[str, object] = {"method": name, "n": shape[0], "pixels": shape[-1]}
    for arm, each in seconds.items():  # the first round warms up
        row[f"{arm}_ms"] = round(1e3 * statistics.median(each[1:]), 2)
    pairs = zip(seconds["torchattacks"][1:], seconds["headstart"][1:], strict=True)
    row["times_faster"] = round(statistics.median(a / b for a, b in pairs), 2)
    if shape[0] == 1 or not name.startswith("VMI"):
        far = (found["headstart"] - found["torchattacks"]).abs().max()
        row["largest_difference"] = float(f"{float(far):.2g}")
    return row


def resident_mb() -> float:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def once(label: str, name: str, arm: str, n: int) -> None:
    """Print the peak memory of one attack above that before it."""
    torch.set_num_threads(1)
    model, picture = made(label)
    x, y = torch.rand(n, *picture), torch.arange(n) % 10
    mine, theirs = methods(model)[name]
    before = resident_mb()
    if arm == "headstart":
        mine.perturb(x, [misclassify(model, y)])
    else:
        theirs(x, y)
    print(resident_mb() - before)


def peak(label: str, name: str, arm: str, n: int) -> float:
    """Peak memory in MB of one attack in a process of its own, above what models and examples take."""
    said = subprocess.run(
        [sys.executable, __file__, "--once", label, name, arm, str(n)], capture_output=True, check=True
    )
    return round(float(said.stdout), 1)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
                         nn.Linear(128, 10)).eval()  # fmt: skip


def stacking(make: Callable[[], nn.Module], count: int, n: int, repetitions: int, device: str) -> dict[str, object]:
    """One gradient of `count` models' averaged logits at n examples, stacked and one after another."""
    models = []
    for k in range(count):
        with seeded(k):
            models.append(make().to(device))
    x, y = torch.rand(n, 1, 8, 8, device=device), torch.arange(n, device=device) % 10
    goals = {stack: fused(models, y, stack=stack) for stack in (True, False)}
    seconds: dict[bool, list[float]] = {stack: [] for stack in goals}
    found = {}
    clock = time.process_time if device == "cpu" else time.perf_counter
    for _ in range(3 * repetitions + 1):
        for stack, goal in goals.items():
            began = clock()
            found[stack] = goal_gradient([goal], x).cpu()
            seconds[stack].append(clock() - began)
    pairs = zip(seconds[False][1:], seconds[True][1:], strict=True)
    return {
        "members": count, "n": n, "device": device,
        "stacked_ms": round(1e3 * statistics.median(seconds[True][1:]), 2),
        "times_faster": round(statistics.median(a / b for a, b in pairs), 2),
        "largest_difference": float(f"{float((found[True] - found[False]).abs().max()):.2g}"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "attacks.json")
    parser.add_argument("--once", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        label, name, arm, n = options.once
        once(label, name, arm, int(n))
        return
    torch.set_num_threads(1)
    rows = []
    for label in MODELS:
        model, picture = made(label)
        for n in (1, 8, 64, 1024):
            for name in methods(model):
                slow = label.startswith("mini") and (name.startswith("VMI") or n == 1024)
                if n < 1024 or not name.startswith("VMI"):
                    row = compare(model, (n, *picture), name, 3 if slow else options.repetitions)
                    peaks = {arm: peak(label, name, arm, n) for arm in ("headstart", "torchattacks")} if n > 8 else {}
                    rows.append({"model": label, **row, **{f"{arm}_peak_mb": mb for arm, mb in peaks.items()}})
                    print(rows[-1], flush=True)
    stacks: list[dict[str, object]] = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for label, make in (("small convolutional", small), ("perceptron", perceptron)):
            for count in (3, 8, 16, 50):
                for n in (1, 8, 64):
                    stacks.append({"model": label, **stacking(make, count, n, options.repetitions, device)})
                    print(stacks[-1], flush=True)
    record = {"rows": rows, "stacked": stacks, "torch": torch.__version__, "torchattacks": version("torchattacks"),
              "python": platform.python_version(), "threads": 1}  # fmt: skip
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
