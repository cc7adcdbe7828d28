"""Where a small trained change reads and how it is scaled decides how well it adapts a frozen transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.adapt.adapter import PAPER as PAPER
from headstart.adapt.adapter import Adapter
from headstart.adapt.lora import LoRA
from headstart.core.claim import Claim
from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.core.surgery import Surgery, freeze, with_head
from headstart.testing.material import digits

METHODS = ("adapt.adapter", "adapt.lora")
CLAIMS = (
    Claim(
        says="An adapter parallel to the feed-forward layers beats one behind them, same start and width, by 3 points.",
        metric="accuracy",
        better="parallel, feed-forward",
        than="sequential, feed-forward",
        by=0.03,
    ),
    Claim(
        says="Scaled by 4, a parallel adapter is no worse than unscaled.",
        metric="accuracy",
        better="parallel, feed-forward, scale 4",
        than="parallel, feed-forward",
        by=-1e-9,
    ),
    Claim(
        says="At the feed-forward layers a scaled parallel adapter is no worse than at attention.",
        metric="accuracy",
        better="parallel, feed-forward, scale 4",
        than="parallel, attention, scale 4",
        by=-1e-9,
    ),
)
NOTE = (
    "Parallel beats sequential at both learning rates (0.781 against 0.756; at thrice the rate 0.808 against 0.777), "
    "but by less than the card's 3 points at the first: this start already reaches 0.645 with a head alone, the card's "
    "0.469, which leaves less to adapt. Attention is the better place here, for LoRA of equal size too (0.842 against "
    "0.801); probably because turning a picture moves every patch, and attention is what relates patches. Not checked: "
    "prefix tuning and mix-and-match adapters (not in the library). The attention adapter adds behind the output "
    "projection, where the paper's code adds before it."
)


class Attend(nn.Module):
    """Self-attention of four heads: (n, t, 32) -> (n, t, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.join = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.look(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        joined: Tensor = self.join(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return joined


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attention = Attend()
        self.feed = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.feed(self.norm2(x))
        return out


class ViT(nn.Module):
    """Three blocks over the sixteen 2x2 patches of an 8x8 digit: (n, 1, 8, 8) -> (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.place = nn.Conv2d(1, 32, 2, 2), nn.Parameter(0.02 * torch.randn(16, 32))
        self.blocks, self.norm = nn.Sequential(Block(), Block(), Block()), nn.LayerNorm(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.place
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


class HeadOnly:
    """Everything frozen but the head."""

    def apply(self, model: nn.Module) -> nn.Module:
        frozen = freeze(model)
        frozen.get_submodule("head").requires_grad_()
        return frozen

    def fold(self, model: nn.Module) -> nn.Module:
        return model


FEED, ATTENTION = "blocks.?.feed", "blocks.?.attention"
ARMS: dict[str, Surgery] = {
    "head only": HeadOnly(),
    "sequential, feed-forward": Adapter(layers=FEED, scale=1.0, placement="sequential"),
    "parallel, feed-forward": Adapter(layers=FEED, scale=1.0),
    "parallel, feed-forward, scale 4": Adapter(layers=FEED, scale=4.0),
    "parallel, attention, scale 4": Adapter(layers=ATTENTION, scale=4.0),
    "LoRA, feed-forward, scale 4": LoRA(layers="blocks.?.feed.?", rank=5, scale=4.0),
    "LoRA, attention, scale 4": LoRA(layers="blocks.?.attention.*", rank=5, scale=4.0),
}


def run(seed: int) -> dict[str, dict[str, float]]:
    """Pretrained on noisy digits; then digits turned by 90 degrees and inverted, 297 labels, 250 steps of batch 32."""
    x, y = digits()
    target = 1 - x.rot90(1, (2, 3))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, test = order[:297], order[297:]
    with seeded(seed):
        rows = torch.randint(0, len(y), (3000,))
        noisy = Batches(x=(x[rows] + 0.2 * torch.randn(3000, 1, 8, 8)).clamp(0, 1), y=y[rows], batch_size=64, seed=seed)
        fresh = ViT()
    start = fit(Plan(model=fresh, stream=noisy, steps=400, optimizer=adamw(3e-3)), device="cpu", seed=seed).model
    model = with_head(start, 10, "head")
    stream = Batches(x=target[train], y=y[train], batch_size=32, seed=seed)

    def accuracy(surgery: Surgery | None, rate: float) -> float:
        plan = Plan(model=model, stream=stream, steps=250, optimizer=adamw(rate))
        tuned = fit(plan.under(surgery) if surgery else plan, device="cpu", seed=seed).model
        with torch.no_grad():
            return float((tuned(target[test]).argmax(1) == y[test]).float().mean())

    found = {arm: {"accuracy": accuracy(surgery, 3e-3)} for arm, surgery in ARMS.items()}
    for arm in ("sequential, feed-forward", "parallel, feed-forward"):
        found[arm]["accuracy at three times the rate"] = accuracy(ARMS[arm], 9e-3)
    return found | {"everything": {"accuracy": accuracy(None, 1e-3)}}
