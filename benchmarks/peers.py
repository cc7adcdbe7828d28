"""Is ours exact and cheaper than what a user would pick? Ratios in one run, one thread, memory beside time.

    OMP_NUM_THREADS=1 python benchmarks/peers.py

TIES against peft's `ties` (trims each tensor by itself) and against the published form
(stack the whole models, sort). Writes benchmarks/results/peers.json.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

OUT = Path(__file__).parent / "results" / "peers.json"


def published_ties(
    models: list[dict[str, torch.Tensor]], base: dict[str, torch.Tensor], density: float
) -> torch.Tensor:
    """Flatten everything, sort for the threshold, elect, average."""
    flat = torch.stack([torch.cat([(m[k] - base[k]).flatten() for k in base]) for m in models])
    keep = int(density * flat.shape[1])
    edge = flat.abs().sort(dim=1, descending=True).values[:, keep - 1 : keep]
    trimmed = flat * (flat.abs() >= edge)
    sign = trimmed.sum(0).sign()
    agreeing = trimmed * (trimmed.sign() == sign)
    return agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)


def merge_models() -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {f"layer.{k}.weight": (1024, 1024) for k in range(12)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    models = [{k: v + 0.01 * torch.randn(v.shape, generator=generator) for k, v in base.items()} for _ in range(3)]
    return models, base


def ties_part(which: str) -> None:
    """Run one form in a process of its own, so that its peak memory is its own; prints seconds and bytes."""
    models, base = merge_models()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    if which == "ours":
        from headstart.core.weights import merge_streaming
        from headstart.merge import Ties

        for _name, _tensor in merge_streaming(Ties(density=0.2), models, base=base):
            pass  # a tensor at a time, as save_weights takes them
    elif which == "peft":
        from peft.utils.merge_utils import ties

        for name in base:
            ties([m[name] - base[name] for m in models], torch.ones(3), 0.2)
    else:
        published_ties(models, base, 0.2)
    taken = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    sys.stdout.write(json.dumps({"seconds": taken, "mb": peak / 1024}))


def ties_rows() -> list[dict[str, object]]:
    figures = {}
    for which in ("ours", "published", "peft"):
        done = subprocess.run([sys.executable, __file__, which], capture_output=True, text=True, check=True)
        figures[which] = json.loads(done.stdout)
    ours = figures["ours"]
    names = {"published": "whole models stacked and sorted", "peft": "peft's ties (per tensor, not the paper's)"}
    return [
        {"what": "TIES, 3 models of 12.6 M weights", "against": name, "ours_s": ours["seconds"], "ours_mb": ours["mb"],
         "theirs_s": figures[which]["seconds"], "theirs_mb": figures[which]["mb"],
         "ratio": figures[which]["seconds"] / ours["seconds"], "memory_ratio": figures[which]["mb"] / ours["mb"]}
        for which, name in names.items()
    ]  # fmt: skip


def main() -> None:
    """Run all comparisons and keep them."""
    torch.set_num_threads(1)
    rows = ties_rows()
    for row in rows:
        print({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    ties_part(sys.argv[1]) if len(sys.argv) > 1 else main()
