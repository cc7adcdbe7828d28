"""The Fisher diagonal is the slow loop over examples and classes, whatever the layers; nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.core.calls import recorded
from headstart.core.fisher import diagonal_fisher
from headstart.core.rng import random_state, seeded
from headstart.core.stream import Batches, each, size
from headstart.core.validate import Refused
from headstart.testing.subject import difference, snapshot

LABELS = ("expected", "true", "sampled")


def slow_fisher(model: nn.Module, x: Any, labels: Tensor | None = None, factors: Tensor | None = None) -> dict[str, Tensor]:
    """One example, one class, one gradient at a time; the given labels (n, s) instead of all classes."""
    model.eval()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in named.items()}
    n = size_of(x)
    for k in range(n):
        one = each(lambda t, k=k: t[k : k + 1], x)
        output = model(**one) if isinstance(one, dict) else model(one)
        logs = getattr(output, "logits", output)[0].log_softmax(0)
        for c in range(len(logs)) if labels is None else labels[k].tolist():
            gradients = torch.autograd.grad(logs[c], list(named.values()), retain_graph=True, allow_unused=True)
            weight = float(logs[c].detach().exp()) if labels is None else 1 / labels.shape[1]
            for value, g in zip(total.values(), gradients, strict=True):
                value += 0 if g is None else weight * g.double().square() / n
    return total


def size_of(x: Any) -> int:
    return len(next(iter(x.values()))) if isinstance(x, dict) else len(x)


class Encoder(nn.Module):
    """Word and position embeddings, attention written with Linear layers, norms, a mean over time."""

    def __init__(self, d: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(11, d, padding_idx=0), nn.Embedding(16, d)
        self.query, self.key, self.value = (nn.Linear(d, d, bias=k != 1) for k in range(3))
        self.before, self.after = nn.LayerNorm(d), nn.LayerNorm(d)
        self.up, self.down, self.head = nn.Linear(d, 2 * d), nn.Linear(2 * d, d), nn.Linear(d, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = self.before(self.word(ids) + self.place(torch.arange(ids.shape[1])[None]))
        scores = self.query(h) @ self.key(h).mT + (1 - mask[:, None]) * -1e9
        h = self.after(h + scores.softmax(-1) @ self.value(h))
        return self.head((h + self.down(F.gelu(self.up(h)))).mean(1))


class Positions(nn.Module):
    """Positions without an example axis: with as many examples as positions they look like rows of examples."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.enter, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(self.place(torch.arange(x.shape[1]))) + x
        return self.head(h.tanh().mean(1))


class Tied(nn.Module):
    """A layer called twice, a weight two layers share, a weight also used beside its layer, a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.a, self.b, self.beside = (nn.Linear(4, 4) for _ in range(4))
        self.b.weight = self.a.weight
        self.scale, self.head = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(self.twice(self.twice(x)).tanh()).tanh())
        return self.head((self.beside(h) @ self.beside.weight * self.scale).tanh())


class Choosing(nn.Module):
    """A choice that depends on the data, which nothing vectorises."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * self.scale if bool((x.abs() < 100).all()) else x)


class Later(nn.Module):
    """Examples along the second axis, as recurrent code likes it."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.enter(x.transpose(0, 1)).tanh().mean(0))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(5, 5, bias=False), nn.Tanh(),
                         nn.BatchNorm1d(5), nn.Linear(5, 3))  # fmt: skip


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, (3, 2), padding=(1, 0), dilation=(1, 2), groups=2), nn.GroupNorm(3, 6), nn.GELU(),
        nn.Conv2d(6, 6, 3, groups=6, bias=False, padding="same"), nn.LayerNorm([6, 4, 2]),
        nn.Conv2d(6, 2, 1, padding_mode="reflect"), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(5 * 8, 3))


def words(n: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    mask = (torch.arange(5) < torch.randint(2, 6, (n, 1), generator=g)).long()
    return {"ids": torch.randint(1, 11, (n, 5), generator=g) * mask, "mask": mask}


def numbers(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape, generator=torch.Generator().manual_seed(1)).double()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "perceptron": (perceptron, numbers(4)), "sequence": (lambda: nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.Flatten(), nn.Linear(20, 3)), numbers(5, 4)),
    "convolutions": (convolutions, numbers(2, 8, 7)), "encoder": (Encoder, words), "attention": (attention, numbers(5, 8)),
    "positions": (Positions, numbers(5, 4)), "tied": (Tied, numbers(4)), "choosing": (Choosing, numbers(4)),
    "later": (Later, numbers(5, 4)),
}  # fmt: skip


def model_of(name: str, n: int = 7, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any, Tensor]:
    with seeded(0):
        model = MODELS[name][0]().to(dtype)
        for p in model.parameters():
            nn.init.normal_(p, 0.1, 0.5)
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.uniform_(layer.running_var, 0.5, 2)
    x = each(lambda t: t.to(dtype) if t.is_floating_point() else t, MODELS[name][1](n))
    return model, x, torch.arange(n) % 3


def agree(fast: dict[str, Tensor], slow: dict[str, Tensor], rtol: float = 1e-6) -> None:
    assert fast.keys() == slow.keys()
    for name, value in slow.items():
        assert value.sum() > 0 or name == "place.weight", name
        torch.testing.assert_close(fast[name].double(), value, rtol=rtol, atol=1e-12 * float(value.max()), msg=name)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("chunk", [1, 5, 64])  # five examples are as many as positions
@pytest.mark.parametrize("name", MODELS)
def test_is_the_slow_loop_whatever_the_layers_and_the_batches(name: str, chunk: int, labels: Any) -> None:
    model, x, y = model_of(name)
    first, second = (each(lambda t, part=part: t[part], (x, y)) for part in (slice(0, 6), slice(6, 7)))
    fast = diagonal_fisher(model, [first, second], labels=labels, chunk=chunk, seed=3)
    given = {"expected": None, "true": y[:, None], "sampled": labels_drawn(model, x, chunk, seed=3)}
    agree(fast, slow_fisher(model, x, given[labels]))


def labels_drawn(model: nn.Module, x: Any, chunk: int, seed: int, samples: int = 1) -> Tensor:
    """The labels that are drawn, chunk by chunk of batches of six."""
    model.eval()
    with torch.no_grad(), seeded(seed):
        p = (model(**x) if isinstance(x, dict) else model(x)).double().softmax(1)
        batches = [part for batch in p.split(6) for part in batch.split(chunk)]
        return torch.cat([part.multinomial(samples, replacement=True) for part in batches])
