"""Move a language model to another language: further pretraining beside source text, and instruction tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from headstart.core.loop import fit
from headstart.core.paper import Paper
from headstart.core.plan import Plan, Step, Term, adamw, cosine
from headstart.core.stream import Batches
from headstart.core.validate import require

from .bits import IGNORED, bits, encoded, nats, windows
from .mixing import Mixed

PAPER = Paper(
    title="LLaMA Beyond English: An Empirical Study on Language Capability Transfer",
    authors="Jun Zhao and Zhihao Zhang and Luhui Gao and Qi Zhang and Tao Gui and Xuanjing Huang",
    year=2024,
    arxiv="2401.01055",
    departs="The paper compares published models; here are the parts of their recipes to combine. New rows start as "
    "the mean of their old pieces, and source text is mixed in half and half, both of which the paper leaves open.",
)


class NextToken(Term):
    """Say the token that follows: the mean cross-entropy over the tokens of the batch that are scored.

    Batches are `windows` or `instructions`: x (n, t) ids, y (n, t) the ids that follow, -100 where none is scored. A
    batch in which none is scored adds 0.

    Cost: one forward pass, shared with the other terms.

    Reference: Zhao et al. 2024, further pretraining and instruction tuning.

    >>> from headstart.core.stream import Batch
    >>> step = Step(nn.Identity(), Batch(torch.zeros(1, 3, 4), torch.tensor([[-100, 2, 1]])))
    >>> round(NextToken()(step).item(), 4)  # log 4
    1.3863
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, step: Step) -> Tensor:
        require(step.batch.y is not None, "NextToken needs the tokens that follow in every batch", None,
                "Make batches with windows(...) or instructions(...).")  # fmt: skip
        total, count = nats(step.run(step.batch.x).output, step.batch.y)
        return total / count.clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """What further pretraining made of a model, and what it took.

    Attributes:
        model: in eval mode.
        characters, tokens: of the target text, all of it.
        steps: optimizer steps made.
        passes: times the target text was seen.
        watched: (ratio, bits a character of the held-out source text) before the first round and after each.
    """

    model: nn.Module = field(repr=False)
    characters: int
    tokens: int
    steps: int
    passes: float
    watched: tuple[tuple[float, float], ...]


def continue_pretraining(
    model: nn.Module, tokenizer: Any, target: Sequence[str], source: Sequence[str] = (), *, start: int, steps: int,
    ratio: float = 0.5, held: Sequence[str] = (), bound: float = 0.15, rounds: int = 4, lr: float = 2e-5,
    warmup: float = 0.03, batch_size: int = 32, length: int = 128, overlap: int = 1, seed: int = 0,
    device: str = "auto",
) -> Pretrained:  # fmt: skip
    """Train all weights of a language model on target text, mixed with source text that keeps the source language.

    Args:
        model: ids (n, t) -> logits (n, p, V); it stays as it is.
        tokenizer: of the model.
        target: texts, none empty.
        source: texts of the language to keep; without any the target is trained on alone, and the source forgotten.
        start: id that stands before each text.
        steps: optimizer steps in all. Equal text takes fewer with an extended vocabulary: compare `passes`.
        ratio: share of source text in each batch, where there is source text.
        held: held-out source texts; with them training goes in `rounds` that are looked at.
        bound: rise of their bits a character, >= 0, above which the rest of the rounds take half as much target text,
            or, without source text, are not made.
        rounds: of equal length, >= 1.
        lr, warmup: the rate rises over this share of the steps, and falls to 0 along a cosine.
        batch_size, length, overlap: of `windows`.
        seed: of everything random.
        device: as `fit` takes it.

    Use it when: there is raw text of the target, and fluency matters.
    Not when: knowledge is missing; the paper found little of it after 100 billion tokens, and more quality from a few
        hundred thousand `instructions`, with which a base model can also be tuned directly.

    Cost: steps · batch_size · (length + overlap) tokens, forward and backward.

    Notes: Adam's averages start anew with each round.

    Reference: Zhao et al. 2024, further pretraining, and the finding that joint training protects the source.
    """
    require(rounds >= 1 and steps >= rounds, "continue_pretraining needs steps >= rounds >= 1", (steps, rounds),
            "Raise steps.")  # fmt: skip
    require(bound >= 0 and 0 <= warmup < 1, "continue_pretraining needs bound >= 0 and 0 <= warmup < 1",
            (bound, warmup), "Pass numbers such as 0.15 and 0.03.")  # fmt: skip

    def pieces(texts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        return [windows(ids, start=start, length=length, overlap=overlap) for ids, _ in encoded(tokenizer, texts)]

    def batches(texts: Sequence[str]) -> tuple[Batches, int]:
        x, y = (torch.cat(parts) for parts in zip(*pieces(texts), strict=True))
        return Batches(x=x, y=y, batch_size=batch_size), int((y != IGNORED).sum())

    ratio = ratio if source else 0.0
    (own, tokens), (other, _) = batches(target), batches(source or target)
    watch, rounds = (pieces(held), rounds) if held else ([], 1)
    watched = [(ratio, bits(model, watch) / sum(map(len, held)))] if held else []
    steps, done, seen = steps // rounds, 0, 0
    for turn in range(rounds):
        if watched and watched[-1][1] > watched[0][1] + bound:
            if not source:
                break
            ratio = max(ratio, min((1 + ratio) / 2, 1 - 1 / batch_size))
        stream = Mixed(target=replace(own, seed=seed + turn), source=replace(other, seed=seed + turn), ratio=ratio)
        plan = Plan(model=model, stream=stream, terms={"text": NextToken()}, steps=steps, optimizer=adamw(lr),
                    schedule=partial(_rate, turn=turn, rounds=rounds, warmup=warmup))  # fmt: skip
        model = fit(plan, device=device, seed=seed + turn).model
        done += steps
        seen += steps * stream.shares[0] * length
        if held:
            watched.append((ratio, bits(model, watch) / sum(map(len, held))))
    return Pretrained(model=model, characters=sum(map(len, target)), tokens=tokens, steps=done, passes=seen / tokens,
                      watched=tuple(watched))  # fmt: skip


def _rate(progress: float, turn: int, rounds: int, warmup: float) -> float:
    """Of one round: its part of a rise from a tenth and a fall to 0."""
    progress = (turn + progress) / rounds
    return cosine(progress) * (min(1.0, 0.1 + 0.9 * progress / warmup) if warmup else 1.0)


def instructions(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], *, end: int, length: int = 512, mask_prompt: bool = True
) -> tuple[Tensor, Tensor]:
    """Prompts with their responses as inputs x and the tokens y that follow, (n, t) each, for `NextToken`.

    Args:
        tokenizer: of the model.
        pairs: (prompt, response), neither empty; a prompt contains whatever template the model is to know.
        end: id that ends a response, which is learnt too, and fills up what is shorter.
        length: tokens of a pair; the rest of a longer one is cut off.
        mask_prompt: learn the response only, not the prompt.

    Raises:
        Refused: an empty text, or prompts so long that no response is left.

    Reference: Zhao et al. 2024, instruction tuning.

    >>> from tokenizers import Tokenizer, models
    >>> tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 2}, merges=[]))
    >>> x, y = instructions(tokenizer, [("ab", "c"), ("a", "b")], end=9)
    >>> x.tolist(), y.tolist()
    ([[0, 1, 2], [0, 1, 9]], [[-100, 2, 9], [1, 9, -100]])
    """
    require(bool(pairs) and length >= 1, "instructions needs pairs and length >= 1", (len(pairs), length), "Pass some.")
    prompts, responses = (encoded(tokenizer, texts) for texts in zip(*pairs, strict=True))
    ids = [[*a, *b, end] for (a, _), (b, _) in zip(prompts, responses, strict=True)]
    width = min(length, max(map(len, ids)) - 1)
    x, y = torch.full((len(ids), width), end), torch.full((len(ids), width), IGNORED)
    for row, (one, (prompt, _)) in enumerate(zip(ids, prompts, strict=True)):
        first = len(prompt) - 1 if mask_prompt else 0
        x[row, : len(one) - 1] = torch.tensor(one[:-1][:width])
        y[row, first : len(one) - 1] = torch.tensor(one[first + 1 :][: max(width - first, 0)])
    require(bool((y != IGNORED).any()), "instructions needs room for a response", f"length={length}", "Raise length.")
    return x, y
