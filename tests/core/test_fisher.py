"""The Fisher diagonal is the slow loop over examples and classes, whatever the layers; nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
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
from headstart.core.stream import Batches, each
from headstart.core.validate import Refused
from headstart.testing.subject import difference, snapshot

LABELS = ("expected", "true", "sampled")


def slow_fisher(
    model: nn.Module, x: Any, labels: Tensor | None = None, factors: Tensor | None = None
) -> dict[str, Tensor]:
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


class Bare(nn.Module):
    """No layer at all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Vision(nn.Module):
    """A parameter before every sequence and one on its places; one of that shape which another use forbids to spread."""

    def __init__(self, odd: bool = False) -> None:
        super().__init__()
        self.first, self.place = nn.Parameter(torch.ones(1, 1, 4)), nn.Parameter(torch.ones(1, 6, 4))
        self.enter, self.head, self.odd = nn.Linear(4, 4), nn.Linear(4, 3), odd

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.first.expand(len(x), -1, -1), self.enter(x)], 1) + self.place
        return self.head(h.tanh().mean(1)) + (self.place.sum((0, 1))[:3] if self.odd else 0)


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


class Attentive(nn.Module):
    """Torch's attention with each kind of mask, examples along the second axis in one, weights that are used, across."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(8, 2, batch_first=True)
        self.second, self.third = nn.MultiheadAttention(8, 4, bias=False), nn.MultiheadAttention(8, 1, batch_first=True)
        self.across, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        later = torch.ones(t, t, dtype=torch.bool).triu(1)
        padding = torch.arange(t) >= 2 + (x[:, :1, 0] > 0).long()
        h, weights = self.first(x, x, x, key_padding_mask=padding)
        h = x + h + weights @ x
        turned = h.transpose(0, 1)
        more, each_head = self.second(
            turned, turned, turned, attn_mask=later, is_causal=True, average_attn_weights=False
        )
        h = h + more.transpose(0, 1) + each_head.sum(1) @ h
        pushed = torch.linspace(-1, 1, t).to(x.dtype).expand(n, t, t)
        h = h + self.third(h, h, h, attn_mask=pushed, need_weights=False)[0]
        return self.head((h + self.across(h, x, x)[0]).mean(1))


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
    "attentive": (Attentive, numbers(5, 8)),
    "positions": (Positions, numbers(5, 4)), "tied": (Tied, numbers(4)), "choosing": (Choosing, numbers(4)),
    "later": (Later, numbers(5, 4)), "bare": (Bare, numbers(4)),
    "vision": (Vision, numbers(5, 4)), "odd vision": (partial(Vision, True), numbers(5, 4)),
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


@pytest.mark.parametrize("name", ["perceptron", "convolutions", "encoder", "attention"])
def test_single_precision_agrees(name: str) -> None:
    model, x, _ = model_of(name, dtype=torch.float32)
    exact, more = deepcopy(model).double(), each(lambda t: t.double() if t.is_floating_point() else t, x)
    fast, slow = diagonal_fisher(model, [x]), slow_fisher(exact, more)
    for key, value in slow.items():
        assert (fast[key] - value).abs().max() <= 1e-5 * value.max() + 1e-12, key  # of 24 bits


@pytest.mark.parametrize(
    "name", ["perceptron", "sequence", "convolutions", "encoder", "attention", "vision", "later", "tied"]
)
def test_closed_forms_do_what_they_can(name: str) -> None:
    """Which layers are seen once with a row an example; without this the slow way would pass every other test."""
    model, x, _ = model_of(name)
    with torch.enable_grad():
        _, calls = recorded(model.eval(), x, dict(model.named_parameters()))
    seen = {parameter for call in calls for parameter in call.names.values()}
    left = {"later": ["enter"], "tied": ["twice", "scale", "a", "b", "beside"]}.get(name, [])
    assert seen == {parameter for parameter, _ in model.named_parameters() if parameter.split(".")[0] not in left}


def test_an_embedding_that_examples_share_is_spread_only_where_that_changes_nothing() -> None:
    class Odd(Encoder):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            place = self.place(torch.arange(ids.shape[1])[None])
            return super().forward(ids, mask) + place.sum((0, 1))[:3]  # a row for each would be summed too

    with seeded(0):
        model, x = Odd().double(), words(6)
    agree(diagonal_fisher(model, [x]), slow_fisher(model, x))


def test_several_draws_are_averaged_and_right_in_the_long_run() -> None:
    model, x, _ = model_of("perceptron")
    drawn = diagonal_fisher(model, [x[:6], x[6:]], labels="sampled", samples=3, seed=5)
    agree(drawn, slow_fisher(model, x, labels_drawn(model, x, 64, seed=5, samples=3)))
    many = [diagonal_fisher(model, [x], labels="sampled", seed=s)["6.bias"] for s in range(100)]
    mean, spread = torch.stack(many).mean(0), torch.stack(many).std(0) / 10
    error = (mean - diagonal_fisher(model, [x])["6.bias"]).abs() / spread
    assert float(error.max()) < 4  # standard errors
    assert not difference(*(diagonal_fisher(model, [x], labels="sampled", seed=1) for _ in range(2)))


def test_softmax_regression_is_the_closed_form() -> None:
    model, x = nn.Linear(4, 3).double(), numbers(4)(9)
    p = model(x).softmax(1).detach()
    found = diagonal_fisher(model, [x])
    variance = p * (1 - p)  # E_y (1[y=c] - p_c)^2
    assert torch.allclose(found["bias"].double(), variance.mean(0), rtol=1e-6)
    assert torch.allclose(found["weight"].double(), variance.T @ x.square() / len(x), rtol=1e-6)


def test_one_output_is_regression_with_unit_noise() -> None:
    model, x = nn.Linear(4, 1).double(), numbers(4)(9)
    agree(diagonal_fisher(model, [x]), {"weight": x.square().mean(0)[None], "bias": torch.ones(1).double()})
    y = torch.linspace(0, 1, 9).double()
    residual = (y - model(x)[:, 0].detach()).square()
    found = diagonal_fisher(model, [(x, y)], labels="true")
    agree(found, {"weight": (residual @ x.square() / 9)[None], "bias": residual.mean()[None]})
    drawn = diagonal_fisher(model, [x], labels="sampled", samples=4000)["bias"]
    assert abs(float(drawn) - 1) < 4 * (2 / 36_000) ** 0.5  # of 36,000 squared normal numbers


@settings(max_examples=15, deadline=None)
@given(shift=st.floats(-50, 50), seed=st.integers(0, 9), chunk=st.integers(1, 9), edge=st.integers(0, 9))
def test_order_batches_and_a_shift_of_the_logits_change_nothing(shift: float, seed: int, chunk: int, edge: int) -> None:
    model, x, _ = model_of("perceptron", 9)
    shifted = nn.Sequential(model, Shift(shift))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    one = diagonal_fisher(model, [x])
    two = diagonal_fisher(shifted, [x[order[:edge]], x[order[edge:]]], chunk=chunk)
    for name, value in one.items():
        assert torch.allclose(value, two[f"0.{name}"], rtol=1e-5, atol=1e-12)


class Shift(nn.Module):
    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, logits: Tensor) -> Tensor:
        return logits + self.shift


def test_what_does_not_reach_the_logits_has_exactly_none() -> None:
    model, x, _ = model_of("perceptron")
    with torch.no_grad():
        model[0].bias[2] = -1e3  # a unit that its ReLU never lets through
    found = diagonal_fisher(model, [x])
    assert not found["0.weight"][2].any()
    assert not found["0.bias"][2].any()
    assert found["0.weight"][1].all()
    model, x, _ = model_of("encoder")
    found = diagonal_fisher(model, [x])
    seen = x["ids"].unique()
    assert not found["word.weight"][[w for w in range(11) if w not in seen]].any()
    assert not found["place.weight"][5:].any()


def test_n_examples_ends_the_pass_even_of_an_endless_stream() -> None:
    model, x, _ = model_of("perceptron", 9)
    agree(diagonal_fisher(model, [x[:4], x[4:]], n_examples=6), slow_fisher(model, x[:6]))
    endless = Batches(x=x, batch_size=9)
    agree(diagonal_fisher(model, endless, n_examples=9), slow_fisher(model, x))
    with pytest.raises(Refused, match="never ends"):
        diagonal_fisher(model, endless)


@pytest.mark.parametrize("name", ["perceptron", "encoder", "attention", "choosing"])
def test_leaves_no_trace_and_skips_frozen_weights(name: str) -> None:
    model, x, y = model_of(name)
    model.train()
    first = next(iter(dict(model.named_parameters())))
    model.get_parameter(first).requires_grad = False
    before, state = snapshot(model), random_state()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():  # the caller's mode does not matter
        found = diagonal_fisher(model, [(x, y)], labels="sampled")
    assert 0 < len(found) == len(list(model.parameters())) - 1
    assert first not in found
    assert not difference(before, snapshot(model))
    assert not difference(state, random_state())
    assert torch.backends.mha.get_fastpath_enabled() == fast_path


def test_half_precision_is_squared_in_single() -> None:
    model, x, _ = model_of("perceptron", dtype=torch.float32)
    with torch.no_grad():
        model[6].weight.mul_(1e-3)  # squares below the least number of float16
    exact, found = diagonal_fisher(model, [x]), diagonal_fisher(model.bfloat16(), [x.bfloat16()])
    assert exact["0.weight"].max() < 1e-6
    for name, value in exact.items():
        assert found[name].dtype == torch.float32
        assert torch.allclose(found[name], value, rtol=0.2, atol=float(value.max()) / 20), name  # 8 bits


def test_a_transformer_of_the_transformers_library() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=16, num_labels=3, max_position_embeddings=8)  # fmt: skip
    with seeded(0):
        model = transformers.BertForSequenceClassification(config).double().eval()
    given = words(6)
    x = {"input_ids": given["ids"], "attention_mask": given["mask"]}
    fast, slow = diagonal_fisher(model, [x]), slow_fisher(model, x)
    for name, value in slow.items():
        assert torch.allclose(fast[name].double(), value, rtol=1e-6, atol=1e-12 * float(value.max()) + 1e-20), name
    _, calls = recorded(model, x, dict(model.named_parameters()))
    assert len([name for call in calls for name in call.names.values()]) == len(slow)


def test_refuses() -> None:
    model, x, y = model_of("perceptron")
    with pytest.raises(Refused, match="at least one example"):
        diagonal_fisher(model, [])
    with pytest.raises(Refused, match="needs labels in the stream"):
        diagonal_fisher(model, [x], labels="true")
    with pytest.raises(Refused, match=r"0\.\.2"):
        diagonal_fisher(model, [(x, y + 1)], labels="true")
    with pytest.raises(Refused, match="Did you mean 'expected'"):
        diagonal_fisher(model, [x], labels="expcted")  # type: ignore[arg-type]
    for settings_given in ({"samples": 0}, {"chunk": 0}, {"n_examples": 0}):
        with pytest.raises(Refused, match="Raise it"):
            diagonal_fisher(model, [x], **settings_given)
    with pytest.raises(Refused, match="needs logits"):
        diagonal_fisher(nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3))), [x.float()])
    with pytest.raises(Refused, match="logits must be finite"):
        diagonal_fisher(model, [x * torch.nan])
    with pytest.raises(Refused, match="trainable parameters"):
        diagonal_fisher(model.requires_grad_(False), [x])
