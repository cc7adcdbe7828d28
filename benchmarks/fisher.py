"""What the closed forms of the Fisher diagonal save over one gradient for each example and class, and whether they agree.

    python benchmarks/fisher.py

512 examples (128 of the larger pictures and texts), 10 classes, float32, one thread, processor seconds; the least
of three runs of ours, one run of the loop. The loop makes one forward pass an example and one `autograd.grad` of all weights a
class, as the first published implementation does. Memory is the peak above the start of a fresh process (Linux). The largest
difference is relative to each tensor's largest entry. Writes benchmarks/results/fisher.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import torch
from torch import Tensor, nn

from headstart.core.fisher import diagonal_fisher

OUT = Path(__file__).parent / "results" / "fisher.json"
CLASSES = 10


class Encoder(nn.Module):
    """Two pre-norm blocks of Linear layers, as most libraries write a transformer; tokens -> classes."""

    def __init__(self, d: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(1000, d), nn.Embedding(64, d)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "first": nn.LayerNorm(d), "second": nn.LayerNorm(d), "up": nn.Linear(d, 4 * d), "down": nn.Linear(4 * d, d),
                "key": nn.Linear(d, d, bias=False),  # a bias of keys changes nothing: its Fisher is rounding alone
                **{name: nn.Linear(d, d) for name in ("query", "value", "out")},
            }) for _ in range(blocks)
        )  # fmt: skip
        self.head = nn.Linear(d, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.word(ids) + self.place(torch.arange(ids.shape[1], device=ids.device)[None])
        for block in self.blocks:
            x = block["first"](h)
            q, k, v = (block[name](x).unflatten(-1, (4, -1)).transpose(1, 2) for name in ("query", "key", "value"))
            h = h + block["out"](nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            h = h + block["down"](nn.functional.gelu(block["up"](block["second"](h))))
        return self.head(h.mean(1))


def perceptron() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(
        nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, CLASSES)
    ), torch.randn(512, 256)


def convolutions(n: int, side: int, width: int) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(8 * width, CLASSES),
    ), torch.randn(n, 1, side, side)  # fmt: skip


def encoder(n: int, tokens: int, d: int) -> tuple[nn.Module, Tensor]:
    return Encoder(d), torch.randint(1000, (n, tokens))


def torch_encoder(n: int, tokens: int, d: int) -> tuple[nn.Module, Tensor]:
    layers = [nn.TransformerEncoderLayer(d, 4, 4 * d, batch_first=True) for _ in range(2)]
    head = nn.Sequential(nn.Flatten(), nn.Linear(d * tokens, CLASSES))
    return nn.Sequential(nn.Embedding(1000, d), *layers, head), torch.randint(1000, (n, tokens))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "perceptron, 256-512-512-10": perceptron,
    "convolutional, 8 x 8 pixels, 8 and 16 channels": partial(convolutions, 512, 8, 8),
    "convolutional, 28 x 28 pixels, 16 and 32 channels": partial(convolutions, 128, 28, 16),
    "transformer, 16 tokens of width 32": partial(encoder, 512, 16, 32),
    "transformer, 32 tokens of width 64": partial(encoder, 128, 32, 64),
    "nn.TransformerEncoderLayer, 16 tokens of width 32": partial(torch_encoder, 512, 16, 32),
}


def made(what: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = MODELS[what]()
    return model.eval(), x


def loop(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """One gradient for each example and class."""
    named = dict(model.named_parameters())
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in named.items()}
    for one in x:
        logs = model(one[None])[0].log_softmax(0)
        for c in range(CLASSES):
            gradients = torch.autograd.grad(logs[c], list(named.values()), retain_graph=c + 1 < CLASSES)
            p = float(logs[c].detach().exp())
            for value, g in zip(total.values(), gradients, strict=True):
                value.add_(g.square(), alpha=p / len(x))
    return total


def fast(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return diagonal_fisher(model, [x])


def seconds(call: Callable[[], object], times: int) -> float:
    taken = []
    for _ in range(times):
        began = time.process_time()
        call()
        taken.append(time.process_time() - began)
    return min(taken)


def part(what: str, how: str) -> None:
    """Seconds and peak memory of one way, in a process of its own."""
    torch.set_num_threads(1)
    model, x = made(what)
    call = fast if how == "fast" else loop
    call(model, x[:2])  # loads what is loaded at first use
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    taken = seconds(lambda: call(model, x), 3 if how == "fast" else 1)
    sys.stdout.write(json.dumps({"seconds": taken, "peak_mb": (memory("VmHWM") - before) / 1024}))


def memory(what: str) -> float:
    """A figure of /proc/self/status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(what)).split()[1])


def row(what: str) -> dict[str, object]:
    measured = {}
    for how in ("fast", "loop"):
        command = [sys.executable, __file__, what, how]
        measured[how] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    model, x = made(what)
    ours, theirs = fast(model, x), loop(model, x)
    error = max(float((ours[name] - value).abs().max() / value.max()) for name, value in theirs.items())
    return {"what": what, "examples": len(x), "weights": sum(p.numel() for p in model.parameters()),
            "ours_s": measured["fast"]["seconds"], "loop_s": measured["loop"]["seconds"],
            "ratio": measured["loop"]["seconds"] / measured["fast"]["seconds"], "ours_peak_mb": measured["fast"]["peak_mb"],
            "loop_peak_mb": measured["loop"]["peak_mb"], "difference": error}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for what in MODELS:
        rows.append(row(what))
        print(rows[-1], flush=True)
    OUT.write_text(json.dumps({"torch": torch.__version__, "classes": CLASSES, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    part(*sys.argv[1:]) if len(sys.argv) > 1 else main()
