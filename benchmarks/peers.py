"""Is ours exact and cheaper than what a user would pick? Ratios in one run, one thread, memory beside time.

    OMP_NUM_THREADS=1 python benchmarks/peers.py

LogME against the published per-class iteration (restated from the paper's released algorithm: SVD of F'F, then products with
F in every iteration of every class). TIES against peft's `ties` (trims each tensor by itself) and against the published form
(stack the whole models, sort). Writes benchmarks/results/peers.json.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

OUT = Path(__file__).parent / "results" / "peers.json"


def published_logme(features: np.ndarray, labels: np.ndarray) -> float:
    """One class after another, every iteration with products of size n x d; no epsilon, at most 11 iterations."""
    n, d = features.shape
    _, values, right = np.linalg.svd(features.T @ features, full_matrices=True)
    evidence = []
    for c in range(labels.max() + 1):
        t = (labels == c).astype(np.float64)
        alpha, beta = 1.0, 1.0
        for _ in range(11):
            gamma = (beta * values / (alpha + beta * values)).sum()
            m = beta * (right.T @ ((right @ (features.T @ t)) / (alpha + beta * values)))
            new_alpha, residual = gamma / (m @ m), ((t - features @ m) ** 2).sum()
            new_beta = (n - gamma) / residual
            done = abs(new_alpha / new_beta - alpha / beta) / (alpha / beta) <= 1e-3
            alpha, beta = new_alpha, new_beta
            if done:
                break
        m = beta * (right.T @ ((right @ (features.T @ t)) / (alpha + beta * values)))
        residual = ((t - features @ m) ** 2).sum()
        evidence.append(
            d / 2 * np.log(alpha) + n / 2 * np.log(beta) - np.log(alpha + beta * values).sum() / 2
            - beta / 2 * residual - alpha / 2 * (m @ m) - n / 2 * np.log(2 * np.pi)
        )  # fmt: skip
    return float(np.mean(evidence) / n)


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


def seconds(call: Callable[[], object], repeats: int = 3) -> float:
    """The median of a few runs."""
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def logme_row() -> dict[str, object]:
    from headstart.choose import LogME
    from headstart.core.evidence import Evidence

    generator = np.random.default_rng(0)
    labels = np.arange(8000) % 100
    features = generator.normal(size=(100, 768))[labels] * 0.3 + generator.normal(size=(8000, 768))
    evidence = Evidence(features=torch.from_numpy(features), labels=torch.from_numpy(labels))
    ours, theirs = LogME().score(evidence), published_logme(features, labels)
    a, b = seconds(lambda: LogME().score(evidence)), seconds(lambda: published_logme(features, labels))
    return {"what": "LogME, n=8,000 d=768 c=100", "against": "published per-class iteration", "ours_s": a, "theirs_s": b,
            "ratio": b / a, "difference": abs(ours - theirs)}  # fmt: skip


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
    rows = [logme_row(), *ties_rows()]
    for row in rows:
        print({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    ties_part(sys.argv[1]) if len(sys.argv) > 1 else main()
