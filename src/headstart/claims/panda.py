"""Prompts of related tasks: similarity of outputs foretells transfer, and a teacher must know the target."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from headstart.choose.panda import PANDA, answered
from headstart.choose.panda import PAPER as PAPER
from headstart.choose.similarity import prompt_similarity
from headstart.core.claim import Claim
from headstart.core.evidence import extract
from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw, cosine
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.core.surgery import freeze


def _claim(metric: str, better: str, than: str, by: float, says: str) -> Claim:
    return Claim(says=says, metric=metric, better=better, than=than, by=by, seeds=2)


CLAIMS = (
    _claim("Spearman at least 0.6", "similarity of outputs", "one seed of two", 0.0, "On each of two seeds similarity "
           "of outputs orders seven sources as their accuracy on the target without tuning: Spearman at least 0.6."),
    _claim("accuracy", "PANDA", "prompt transfer", 0.0, "Mean accuracy over seven sources: distilling the adapted "
           "source prompt into a fresh one (w = 0.1) is above going on from the source prompt."),
    _claim("accuracy", "PANDA", "raw teacher", 0.05, "The source prompt as it is makes a teacher that is more than 5 "
           "points worse than the same prompt adapted to the target."),
)  # fmt: skip
NOTE = (
    "The second claim does not outlast its two seeds: on seeds 0 to 5 PANDA is 0.03 points below transfer (above on "
    "five, 1.8 below on one) and 0.03 above prompt tuning without any source. All four similarities order these "
    "sources, 0.89 to 1.00. Left open by the card and chosen: random first prompts, the pretrained head kept, 300 "
    "steps at 1e-2 in batches of 16 (sources: 32)."
)
COSINES = (0.95, 0.8, 0.5, 0.2, -0.2, -0.6, -0.95)
SYMBOLS, LENGTH, HIDDEN, WIDTH, HEADS, TOKENS = 24, 10, 6, 32, 4, 4


class Layer(nn.Module):
    """A pre-norm transformer layer; attention written out is a quarter faster at this size."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.look, self.join = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.think = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, WIDTH))

    def forward(self, h: Tensor, at: slice = slice(None)) -> Tensor:
        n, t, d = h.shape
        q, k, v = self.look(self.norm(h)).view(n, t, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)  # (n, heads, t, ...)
        mixed = (q[:, :, at] @ k.mT * (d // HEADS) ** -0.5).softmax(-1) @ v
        h = h[:, at] + self.join(mixed.transpose(1, 2).flatten(2))
        told: Tensor = h + self.think(h)
        return told


class Following(nn.Module):
    """Two layers that follow an instruction; the head reads the first symbol after it, and nothing else is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(SYMBOLS, WIDTH)
        self.positions = nn.Parameter(0.1 * torch.randn(TOKENS + LENGTH, WIDTH))
        self.first, self.last, self.norm = Layer(), Layer(), nn.LayerNorm(WIDTH)
        self.map, self.head = nn.Linear(HIDDEN, TOKENS * WIDTH), nn.Linear(WIDTH, 2)

    def after(self, prompt: Tensor, ids: Tensor) -> Tensor:
        """Prompts (n, 4, d) and strings (n, 10) -> features (n, d)."""
        h = self.first(torch.cat([prompt, self.words(ids)], 1) + self.positions)
        told: Tensor = self.norm(self.last(h, slice(TOKENS, TOKENS + 1)))[:, 0]
        return told

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.head(self.after(self.map(x["w"]).view(-1, TOKENS, WIDTH), x["ids"]))
        return logits


class Prompts(nn.Module):
    """Seven prompts, each tuned as if alone but in fewer passes: AdamW does not see the factor 1 / 7 in the loss."""

    def __init__(self, model: nn.Module, prompts: Tensor) -> None:
        super().__init__()
        self.model: Any = freeze(model)
        self.prompts, self.dropout = nn.Parameter(prompts), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Strings (n, 7, 10) -> logits (n, 2, 7)."""
        prompts = self.dropout(self.prompts.expand(len(x), -1, -1, -1))
        told = self.model.after(prompts.flatten(0, 1), x.flatten(0, 1)).view(len(x), 7, WIDTH)
        logits: Tensor = self.model.head(self.dropout(told)).mT
        return logits


def run(seed: int) -> dict[str, dict[str, float]]:
    """One frozen transformer, seven sources of 1,000 labels, a target of 48, 2,000 strings to test on."""
    generator = torch.Generator().manual_seed(seed)
    meaning = torch.randn(SYMBOLS, HIDDEN, generator=generator)

    def labelled(w: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(SYMBOLS, (*shape, LENGTH), generator=generator)
        return ids, ((meaning[ids].sum(-2) * w).sum(-1) > 0).long()

    def tuned(plan: Plan) -> nn.Module:
        return fit(plan, device="cpu", seed=seed).model

    instructions = torch.randn(1500 * 128, HIDDEN, generator=generator)
    ids, y = labelled(instructions, 1500 * 128)
    stream = Batches(x={"w": instructions, "ids": ids}, y=y, batch_size=128, seed=seed)
    with seeded(seed):
        model: nn.Module = Following()
    model = tuned(Plan(model=model, stream=stream, steps=1500, optimizer=adamw(3e-3), schedule=cosine))

    w, other = torch.randn(2, HIDDEN, generator=generator)
    aside = F.normalize(other - other @ w / (w @ w) * w, dim=0) * w.norm()
    many, own = labelled(torch.stack([c * w + (1 - c * c) ** 0.5 * aside for c in COSINES]), 1000, 7)
    few, labels = (t[:, None].expand(-1, 7, *t.shape[1:]) for t in labelled(w, 48))
    test, truth = (t[:, None].expand(-1, 7, *t.shape[1:]) for t in labelled(w, 2000))
    start = Prompts(model, torch.randn(7, TOKENS, WIDTH, generator=generator))  # as large as the symbols' vectors
    target = Batches(x=few, y=labels, batch_size=16, seed=seed)
    base = Plan(model=start, stream=target, steps=300, optimizer=adamw(1e-2))  # 100 epochs, as in the scripts

    def taught(teacher: nn.Module) -> nn.Module:
        return tuned(replace(base, stream=answered(target, teacher)).plus(panda=PANDA(None)))

    def accuracies(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return (model(test).argmax(1) == truth).double().mean(0)  # type: ignore[no-any-return]

    sources = tuned(replace(base, stream=Batches(x=many, y=own, batch_size=32, seed=seed)))
    alone, moved = tuned(base), tuned(replace(base, model=sources))
    found = {"source as it is": sources, "prompt tuning": alone, "prompt transfer": moved}
    found |= {"PANDA": taught(moved), "raw teacher": taught(sources)}
    arms = {arm: {"accuracy": float(accuracies(model).mean())} for arm, model in found.items()}
    zero_shot = accuracies(sources)
    arms["source as it is"] |= {f"cosine {c}": float(a) for c, a in zip(COSINES, zero_shot, strict=True)}
    outputs = [h for m in (sources, alone) for h in extract(m, [test[:500]]).features.view(-1, 7, WIDTH).unbind(1)]
    prompts = [p for m in (sources, alone) for p in m.get_parameter("prompts")]
    for kind in ("outputs", "mean", "tokens", "pairs"):
        near = prompt_similarity(outputs if kind in ("outputs", "mean") else prompts, kind)
        rho = float(spearmanr(near[:7, 7:10].mean(1), zero_shot).statistic)  # to three prompts of the target
        arms[f"similarity of {kind}"] = {"Spearman": rho, "Spearman at least 0.6": float(rho >= 0.6)}
    return arms | {"one seed of two": {"Spearman at least 0.6": 0.5}}
