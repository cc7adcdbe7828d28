"""Two trained blocks start transformers of any depth better than random blocks do."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from headstart.core.claim import Claim
from headstart.core.loop import fit
from headstart.core.plan import CrossEntropy, Plan, adamw, cosine
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.distill.soft_targets import SoftTargets
from headstart.merge.keep_best import clipped
from headstart.merge.learngene import Learngene
from headstart.merge.tleg import PAPER as PAPER
from headstart.merge.tleg import TLEG
from headstart.testing.material import digits

DEPTHS = (2, 3, 6)
CLAIMS = (
    *(
        Claim(
            says=f"After 60 steps a model of depth {depth} expanded from two blocks is 10 points above {what}.",
            metric=f"accuracy at depth {depth}",
            better="expanded",
            than=than,
            by=0.1,
            seeds=3,
        )
        for depth in DEPTHS
        for than, what in (
            ("random", "the same model from a random start"),
            ("random blocks", "one that has all of the trained model but its blocks"),
        )
    ),
    *(
        Claim(
            says=f"Without any fine-tuning the model of depth {depth} is above 85 %.",
            metric=f"accuracy at depth {depth}, untuned",
            better="expanded",
            than="nothing",
            by=0.85,
            seeds=3,
        )
        for depth in (3, 6)
    ),
    Claim(
        says="All eight statements hold on every seed.",
        metric="all hold",
        better="this seed",
        than="nothing",
        by=0.999,
        seeds=3,
    ),
)


NOTE = (
    "The card leaves the schedule of the 60 steps open; with stage 1's cosine the random starts come out as in its "
    "pilot. At a constant rate they learn faster: the lead over a random start is 11 to 28 points, that over random "
    "blocks 5 to 12; at depth 6 it is 7 on average, and that statement and the one on every seed would fail. Reported, "
    "not claimed: without a slope, one block shared, models are as good: what gains here is trained blocks, not the "
    "line. Depth 6 trained freely is no nearer to a line than independent blocks (0.20 explained, 0.20 by chance)."
)


class Patches(nn.Module):
    """Pre-norm blocks over the sixteen 2x2 patches of a digit, norm, mean: (n, 1, 8, 8) -> (n, 10)."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.enter, self.place = nn.Conv2d(1, 32, 2, 2), nn.Parameter(0.3 * torch.randn(16, 32))
        self.blocks = nn.Sequential(*[_block() for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)
        with torch.no_grad():
            self.enter.weight.normal_(std=0.3)
            for name, p in self.named_parameters():
                if name.endswith("bias"):
                    p.zero_()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.enter(x).flatten(2).transpose(1, 2) + self.place  # (n, 16, 32)
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


def _block() -> nn.Module:
    block = nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)
    with torch.no_grad():
        for p in block.parameters():
            if p.dim() > 1:
                p.normal_(std=0.15)
    return block


def run(seed: int) -> dict[str, dict[str, float]]:
    """Digits: 1,200 to train on. Stage 1: depth 4, 500 steps, a perceptron's soft targets; then 60 steps a depth."""
    x, y = digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1200], order[1200:]
    stream = Batches(x=x[train], y=y[train], batch_size=64, seed=seed)
    with seeded(seed):
        perceptron = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
        )
        start, fresh = Patches(4), {depth: Patches(depth) for depth in DEPTHS}

    def trained(model: nn.Module, steps: int, rate: float, teacher: nn.Module | None = None) -> nn.Module:
        terms = {"task": CrossEntropy()} if teacher is None else {"kd": SoftTargets(teacher, temperature=1.0)}
        optimizer = clipped(adamw(rate, weight_decay=0.05))
        plan = Plan(model=model.train(), stream=stream, terms=terms, steps=steps, optimizer=optimizer, schedule=cosine)
        return fit(plan, device="cpu", seed=seed).model

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model.eval()(x[test]).argmax(1) == y[test]).float().mean())

    teacher = trained(perceptron, 500, 1e-3)
    found: dict[str, dict[str, float]] = {"teacher": {"accuracy": accuracy(teacher)}}

    def tuned(arm: str, models: Mapping[int, nn.Module]) -> None:
        for depth, model in models.items():
            found.setdefault(arm, {})[f"accuracy at depth {depth}, untuned"] = accuracy(model)
            found[arm][f"accuracy at depth {depth}"] = accuracy(trained(model, 60, 1e-3))

    def auxiliary(arm: str, slope: float) -> Learngene:
        untrained = TLEG(slope=slope, seed=seed).apply(start)
        untrained.slope.requires_grad_(slope > 0)
        two = trained(untrained, 500, 3e-3, teacher)
        assert isinstance(two, Learngene)
        found[arm] = {"accuracy at depth 4, the auxiliary model's": accuracy(two)}
        tuned(arm, {depth: two.expand(depth) for depth in DEPTHS})
        return two

    auxiliary("no slope", 0.0)
    two = auxiliary("expanded", 0.02)
    tuned("random", fresh)
    kept = {depth: two.expand(depth) for depth in DEPTHS}
    for depth in DEPTHS:
        kept[depth].get_submodule("blocks").load_state_dict(fresh[depth].get_submodule("blocks").state_dict())
    tuned("random blocks", kept)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (two, *fresh.values())]
    found["numbers stored"] = {"two blocks": float(sizes[0]), "a model for each depth": float(sum(sizes[1:]))}
    found["nothing"] = {"all hold": 0.0} | {f"accuracy at depth {d}, untuned": 0.0 for d in DEPTHS}
    hold = [found[c.better][c.metric] - found[c.than][c.metric] > c.by for c in CLAIMS[:-1]]
    return found | {"this seed": {"all hold": float(all(hold))}}
