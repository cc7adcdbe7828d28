"""What the sum of adapters through its factors saves over decomposing the dense sum, alone and in peft's own merge.

    python benchmarks/low_rank.py

Four adapters of rank 16 of one 2,048 x 2,048 weight, in float32, one thread, processor seconds, interleaved; medians.
`dense` forms the weighted sum and decomposes it, keeping the thin factors; `peft` is the call
add_weighted_adapter(combination_type="svd") as a user makes it, on a model of one such layer. Memory is the peak of a
fresh process above its start (Linux). The target is a hundredth of `dense`. Writes benchmarks/results/low_rank.json.
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
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from headstart.merge.low_rank import low_rank_sum

WEIGHTS = (0.7, 0.5, -0.3, 0.4)


def parts_of(size: int, rank: int) -> list[tuple[Tensor, Tensor, float]]:
    """Adapters as they are after training: factors of unlike size, one direction in common."""
    g = torch.Generator().manual_seed(0)
    common = torch.randn(size, 1, generator=g)
    return [(torch.randn(size, rank, generator=g) * 0.02 + 0.02 * common, torch.randn(rank, size, generator=g) * 0.05, w)
            for w in WEIGHTS]  # fmt: skip


def dense(parts: list[tuple[Tensor, Tensor, float]], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The sum formed and decomposed: factors of the given rank, and all singular values."""
    total = parts[0][2] * (parts[0][0] @ parts[0][1])
    for up, down, weight in parts[1:]:
        total += weight * (up @ down)
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank], s


def peft_model(parts: list[tuple[Tensor, Tensor, float]], size: int) -> nn.Module:
    """A model of one layer that carries the adapters a0, a1, ..."""
    import peft

    model = nn.Sequential(nn.Linear(size, size, bias=False))
    rank = parts[0][1].shape[0]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    adapted = peft.get_peft_model(model, config, "a0")
    for k in range(1, len(parts)):
        adapted.add_adapter(f"a{k}", config)
    layer = adapted.base_model.model.get_submodule("0")
    with torch.no_grad():
        for k, (up, down, _) in enumerate(parts):
            layer.lora_A[f"a{k}"].weight.copy_(down)
            layer.lora_B[f"a{k}"].weight.copy_(up)
    return adapted


def peft_svd(model: nn.Module, name: str, rank: int) -> Tensor:
    """The layer's change after peft's merge, which keeps it under `name`."""
    names = [f"a{k}" for k in range(len(WEIGHTS))]
    model.add_weighted_adapter(names, list(WEIGHTS), name, combination_type="svd", svd_rank=rank)
    with torch.no_grad():
        return model.base_model.model.get_submodule("0").get_delta_weight(name)


def timed(call, repetitions: int) -> tuple[float, object]:
    seconds = []
    for _ in range(repetitions):
        began = time.process_time()
        result = call()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds), result


def memory(field: str) -> float:
    """Megabytes of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def peak(form: str, size: int, rank: int) -> float:
    """Megabytes that one merge takes above the factors, in a process of its own."""
    command = [sys.executable, __file__, "--size", str(size), "--rank", str(rank), "--only", form]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(out.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--only", choices=["dense", "factors"])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    parts = parts_of(chosen.size, chosen.rank)
    if chosen.only:
        small = parts_of(64, 2)
        dense(small, 2), low_rank_sum(small)  # loads what the first call loads
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = memory("VmRSS")
        dense(parts, chosen.rank) if chosen.only == "dense" else low_rank_sum(parts, rank=chosen.rank)
        print(memory("VmHWM") - before)
        return

    low_rank_sum(parts), dense(parts_of(256, 4), 4)  # warm up
    model, rounds = peft_model(parts, chosen.size), []
    for k in range(chosen.repetitions):
        slow, (up, down, values) = timed(lambda: dense(parts, chosen.rank), 1)
        fast, ours = timed(lambda: low_rank_sum(parts, rank=chosen.rank), 9)
        usual, theirs = timed(lambda k=k: peft_svd(model, f"merged{k}", chosen.rank), 1)
        rounds.append((slow, fast, usual))
    exact = torch.linalg.svdvals(sum(w * (b.double() @ a.double()) for b, a, w in parts))
    own, change = ours.singular_values, ours.factors.dense()
    slow, fast, usual = (statistics.median(column) for column in zip(*rounds, strict=True))
    largest = float(exact[0])
    record = {
        "size": chosen.size, "adapters": len(parts), "rank": chosen.rank, "repetitions": chosen.repetitions,
        "dense_seconds": round(slow, 4), "factors_seconds": round(fast, 5), "ratio": round(slow / fast, 1),
        "ratios": [round(a / b, 1) for a, b, _ in rounds],
        "peft_svd_seconds": round(usual, 4), "ratio_to_peft": round(usual / fast, 1),
        "dense_megabytes": round(peak("dense", chosen.size, chosen.rank), 1),
        "factors_megabytes": round(peak("factors", chosen.size, chosen.rank), 1),
        "singular_values_against_float64": {
            "factors": float((own - exact[: len(own)]).abs().max()) / largest,
            "dense": float((values[: len(own)].double() - exact[: len(own)]).abs().max()) / largest,
        },
        "change_against": {
            "dense": float((change - up @ down).norm() / change.norm()),
            "peft": float((change - theirs).norm() / change.norm()),
        },
        "discarded": ours.discarded, "torch": torch.__version__, "python": platform.python_version(), "threads": 1,
    }  # fmt: skip
    chosen.results.mkdir(parents=True, exist_ok=True)
    (chosen.results / "low_rank.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
