"""Are our scores exact and cheaper than the forms their authors published? Ratios in one run, one thread.

    python benchmarks/scores.py

Each published form is restated here from its description: same value, other cost. n=8,000 examples, d=1,024 features, c=100
classes, 1,000 source classes; LogME at d=768 as well. Then the streaming pass: its peak memory for 10^5 and 10^6 examples read
from a memory map. Writes benchmarks/results/scores.json.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import numpy as np
import torch
from scipy.spatial import cKDTree
from scipy.special import digamma

from headstart.choose import PED, TMI, HScore, LogME, TransRate
from headstart.choose.leep import expected_prediction
from headstart.choose.nce import conditional_entropy
from headstart.core.evidence import Evidence
from headstart.core.statistics import ClassStatistics

OUT = Path(__file__).parent / "results" / "scores.json"
N, D, C, S = 8_000, 1_024, 100, 1_000
Array = np.ndarray


def logme(f: Array, y: Array) -> float:
    """One class after another, every iteration with products of size n x d; no epsilon, at most 11 iterations."""
    n, d = f.shape
    _, values, right = np.linalg.svd(f.T @ f, full_matrices=True)
    evidence = []
    for c in range(y.max() + 1):
        t = (y == c).astype(np.float64)
        alpha, beta = 1.0, 1.0
        for _ in range(11):
            gamma = (beta * values / (alpha + beta * values)).sum()
            m = beta * (right.T @ ((right @ (f.T @ t)) / (alpha + beta * values)))
            new_alpha, residual = gamma / (m @ m), ((t - f @ m) ** 2).sum()
            new_beta = (n - gamma) / residual
            done = abs(new_alpha / new_beta - alpha / beta) / (alpha / beta) <= 1e-3
            alpha, beta = new_alpha, new_beta
            if done:
                break
        m = beta * (right.T @ ((right @ (f.T @ t)) / (alpha + beta * values)))
        residual = ((t - f @ m) ** 2).sum()
        evidence.append(
            d / 2 * np.log(alpha) + n / 2 * np.log(beta) - np.log(alpha + beta * values).sum() / 2
            - beta / 2 * residual - alpha / 2 * (m @ m) - n / 2 * np.log(2 * np.pi)
        )  # fmt: skip
    return float(np.mean(evidence) / n)


def class_means(f: Array, y: Array) -> Array:
    """Every row replaced by its class mean, class by class."""
    g = np.zeros_like(f)
    for c in range(y.max() + 1):
        g[y == c] = f[y == c].mean(0)
    return g


def hscore(f: Array, y: Array) -> float:
    """Two covariances over all rows and a pseudo-inverse."""

    def covariance(x: Array) -> Array:
        centred = x - x.mean(0, keepdims=True)
        return centred.T @ centred / len(x)

    return float(np.trace(np.linalg.pinv(covariance(f), rcond=1e-15) @ covariance(class_means(f, y))))


def shrunk_hscore(f: Array, y: Array) -> float:
    """scikit-learn's Ledoit-Wolf, its precision matrix, and the covariance of the replaced rows."""
    from sklearn.covariance import LedoitWolf

    f = f - f.mean(0, keepdims=True)
    model = LedoitWolf(store_precision=True, assume_centered=True).fit(f)
    g = class_means(f, y)
    return float((1 - model.shrinkage_) * np.trace(model.precision_ @ (g.T @ g / len(g))))


def leep(p: Array, y: Array) -> float:
    """The n x c matrix of expected predictions, then a Python loop over the examples."""
    share = p / len(y)
    joint = np.zeros((y.max() + 1, p.shape[1]))
    for c in range(y.max() + 1):
        joint[c] = share[y == c].sum(0)
    expected = p @ (joint / joint.sum(0, keepdims=True)).T
    return float(np.mean(np.log([row[label] for row, label in zip(expected, y, strict=True)])))


def nce(z: Array, y: Array) -> float:
    """A Python loop over the examples fills the table."""
    joint = np.zeros((y.max() + 1, z.max() + 1))
    for a, b in zip(y, z, strict=True):
        joint[a, b] += 1 / len(y)
    marginal = joint.sum(0, keepdims=True).repeat(len(joint), 0)
    there = joint > 0
    return float((joint[there] * np.log(joint[there] / marginal[there])).sum())


def transrate(f: Array, y: Array, epsilon: float) -> float:
    """A dense d x d determinant for every class."""

    def rate(x: Array) -> float:
        return 0.5 * float(np.linalg.slogdet(np.eye(x.shape[1]) + 1 / (len(x) * epsilon) * x.T @ x)[1])

    f = f - f.mean(0, keepdims=True)
    return rate(f) - sum((y == c).mean() * rate(f[y == c]) for c in range(y.max() + 1))


def tmi(f: Array, y: Array) -> float:
    """A k-d tree for every class."""
    total = []
    for c in range(y.max() + 1):
        x = f[y == c]
        distance = cKDTree(x).query(x, k=4, p=np.inf)[0][:, 3]
        entropy = digamma(len(x)) - digamma(3) + x.shape[1] / len(x) * np.log(2 * np.maximum(distance, 1.0)).sum()
        total.append(len(x) / len(f) * entropy)
    return float(np.mean(total))


def ped_features(f: Array, y: Array) -> Array:
    """c x c x d arrays of pairwise differences and forces, and a pass over all rows in every step."""
    mean, scale = f.mean(0), np.maximum(f.std(0), 1e-3)
    z = (f - mean) / scale
    first = None
    for _ in range(6):
        centres = np.stack([z[y == c].mean(0) for c in range(y.max() + 1)])
        radius = np.sqrt(np.stack([z[y == c].var(0) for c in range(y.max() + 1)]).sum(1))
        apart = centres[:, None] - centres[None]
        distance = np.sqrt((apart**2).sum(-1))
        overlap = np.maximum(0.6 * (radius[:, None] + radius) - distance, 0)
        np.fill_diagonal(overlap, 0)
        np.fill_diagonal(distance, 1)
        move = (apart / distance[..., None] * np.minimum(0.5 * 0.1**2 * overlap, overlap)[..., None]).sum(1)
        change = np.abs(move).sum()
        first = change if first is None else first
        if not first or change / first <= 0.5:
            break
        z = z + move[y]
    return z * scale + mean


def seconds(call: Callable[[], object]) -> float:
    """The least of three runs, in processor seconds."""
    taken = []
    for _ in range(3):
        began = time.process_time()
        call()
        taken.append(time.process_time() - began)
    return min(taken)


def rows() -> list[dict[str, object]]:
    """Every score against its published form."""
    generator = np.random.default_rng(0)
    y = generator.permutation(np.arange(N) % C)
    f = generator.normal(size=(C, D))[y] * 0.3 + generator.normal(size=(N, D))
    logits = generator.normal(size=(N, S)) + 3 * np.eye(S)[y]
    labels, features = torch.from_numpy(y), torch.from_numpy(f)
    evidence = Evidence(features=features, labels=labels)
    narrow = Evidence(features=features[:, :768].contiguous(), labels=labels)
    probabilities = torch.from_numpy(logits).softmax(1)
    p = probabilities.numpy()
    many = generator.integers(0, C, 200_000), generator.integers(0, S, 200_000)
    y400 = generator.permutation(np.arange(N) % 400)
    fine = Evidence(features=features, labels=torch.from_numpy(y400))
    f768 = np.ascontiguousarray(f[:, :768])
    scale = math.sqrt(np.square(f - f.mean(0)).sum(1).mean())
    cases: list[tuple[str, Callable[[], float], Callable[[], float]]] = [
        ("LogME, d=768", lambda: LogME().score(narrow), lambda: logme(f768, y)),
        ("LogME", lambda: LogME().score(evidence), lambda: logme(f, y)),
        ("H-score", lambda: HScore(shrink=False).score(evidence), lambda: hscore(f, y)),
        ("H-score, shrunk", lambda: HScore().score(evidence), lambda: shrunk_hscore(f, y)),
        ("H-score, d=768", lambda: HScore(shrink=False).score(narrow), lambda: hscore(f768, y)),
        ("H-score, shrunk, d=768", lambda: HScore().score(narrow), lambda: shrunk_hscore(f768, y)),
        ("LEEP, from probabilities", lambda: float(expected_prediction(probabilities, labels).log().mean()),
         lambda: leep(p, y)),
        ("NCE, of 200,000 labels", lambda: -conditional_entropy(*map(torch.from_numpy, many)), lambda: nce(many[1], many[0])),
        ("TransRate", lambda: TransRate().score(evidence), lambda: transrate(f / scale, y, 1e-4)),
        ("TMI", lambda: TMI().score(evidence), lambda: tmi(f, y)),
        ("PED's move, c=100", lambda: float(PED().move(evidence).features.sum()), lambda: float(ped_features(f, y).sum())),
        ("PED's move, c=400", lambda: float(PED().move(fine).features.sum()), lambda: float(ped_features(f, y400).sum())),
    ]  # fmt: skip
    found = []
    for name, ours, theirs in cases:
        a, b = ours(), theirs()
        mine, published = seconds(ours), seconds(theirs)
        row = {
            "what": name,
            "ours_s": mine,
            "published_s": published,
            "ratio": published / mine,
            "difference": abs(a - b) / max(1e-300, abs(b)),
        }
        print({k: round(v, 12) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        found.append(row)
    return found


def memory(what: str) -> float:
    """A figure of /proc/self/status, in kB."""
    return float(
        next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)).split()[1]
    )


def stream_part(path: str, n: int, d: int) -> None:
    """The statistics of n rows of a file, read 4,096 at a time; prints seconds and the growth of the peak in MB."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here (Linux)
    before = memory("VmRSS")

    def batches():  # type: ignore[no-untyped-def]
        for first in range(0, n, 4_096):
            rows = np.memmap(path, np.float32, "r", offset=first * d * 4, shape=(min(4_096, n - first), d))
            yield torch.from_numpy(np.array(rows)), torch.arange(first, first + len(rows)) % C

    began = time.process_time()
    found = ClassStatistics.stream(batches(), C)
    score = LogME().score_from(found)
    taken = time.process_time() - began
    peak = memory("VmHWM") - before
    sys.stdout.write(json.dumps({"n": n, "d": d, "seconds": taken, "peak_mb": peak / 1024, "logme": score}))


def streams() -> list[dict[str, object]]:
    """The pass over files of growing length, each in a process of its own."""
    found = []
    d = 256
    with tempfile.TemporaryDirectory() as folder:
        for n in (100_000, 1_000_000):
            path, generator = f"{folder}/{n}", np.random.default_rng(0)
            with open(path, "wb") as file:
                for _ in range(0, n, 10_000):
                    file.write(generator.normal(size=(10_000, d)).astype(np.float32).tobytes())
            done = subprocess.run(
                [sys.executable, __file__, path, str(n), str(d)], capture_output=True, text=True, check=True
            )
            found.append({**json.loads(done.stdout), "file_mb": os.path.getsize(path) / 2**20})
            print(found[-1], flush=True)
    return found


def main() -> None:
    torch.set_num_threads(1)
    record = {
        "torch": torch.__version__,
        "n": N,
        "d": D,
        "classes": C,
        "source_classes": S,
        "rows": rows(),
        "stream": streams(),
    }
    OUT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    stream_part(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])) if len(sys.argv) > 1 else main()
