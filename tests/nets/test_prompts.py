"""Soft prompts: the same as the backbone called by hand, only prompt and head trained, keys and values in their place."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.core.evidence import extract
from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.core.surgery import with_head
from headstart.core.validate import Refused
from headstart.nets.prompts import Prefixed, Prompted, fresh_prompt, mean_prompt

transformers = pytest.importorskip("transformers", minversion="5")
D, LAYERS, P = 16, 2, 3


def bert() -> Any:
    return encoder("Bert")


@cache
def encoder(name: str) -> Any:
    settings = {
        "vocab_size": 30, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 20,
    }  # fmt: skip
    with seeded(0):
        model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings)).eval()
        for p in model.parameters():  # the usual start is so small that nothing depends on anything
            p.data += 0.3 * torch.randn_like(p)
    return model


def head(classes: int = 2) -> nn.Linear:
    with seeded(1):
        return nn.Linear(D, classes)


def prompted(pooling: str = "first", dropout: float = 0.0, seed: int = 0) -> Prompted:
    return Prompted(bert(), head(), prompt=fresh_prompt(bert(), P, seed=seed), dropout=dropout, pooling=pooling)


def prefixed(pooling: str = "first", dropout: float = 0.0, backbone: str = "Bert") -> Prefixed:
    prefix = torch.randn(P, 2 * LAYERS * D, generator=torch.Generator().manual_seed(0))
    return Prefixed(encoder(backbone), head(), prefix=prefix, dropout=dropout, pooling=pooling)


def text(n: int = 4, t: int = 6) -> Tensor:
    return torch.randint(5, 30, (n, t), generator=torch.Generator().manual_seed(2))


def padded(ids: Tensor, by: int) -> dict[str, Tensor]:
    mask = nn.functional.pad(torch.ones_like(ids), (0, by))
    return {"input_ids": nn.functional.pad(ids, (0, by)), "attention_mask": mask}


def test_it_is_the_backbone_on_prompt_and_words():
    model, ids = prompted().eval(), text()
    types = torch.tensor([0, 0, 0, 1, 1, 1]).expand(4, -1)
    words = bert().embeddings.word_embeddings(ids)
    both = torch.cat([model.prompt.expand(4, -1, -1), words], 1)
    said = bert()(inputs_embeds=both, token_type_ids=torch.cat([torch.zeros(4, P, dtype=torch.long), types], 1))
    expected = model.head(said.last_hidden_state[:, P])
    torch.testing.assert_close(model({"input_ids": ids, "token_type_ids": types}), expected)
    assert not torch.allclose(model(ids), expected, atol=1e-3), "token types must count"


@pytest.mark.parametrize("make", [prompted, prefixed])
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_padding_changes_nothing_and_every_prompt_position_counts(make, pooling):
    model, ids = make(pooling).eval(), text()
    whole = model(ids)
    torch.testing.assert_close(model(padded(ids, 4)), whole, rtol=1e-5, atol=1e-5)
    soft = next(p for name, p in model.named_parameters() if name in ("prompt", "prefix"))
    gradient = torch.autograd.grad(model(padded(ids, 4)).sum(), soft)[0]
    assert bool((gradient.abs().amax(1) > 1e-6).all())


@pytest.mark.parametrize("make", [prompted, prefixed])
def test_dropout_acts_in_training_only(make):
    model, ids = make(dropout=0.5), text()
    assert torch.equal(model.eval()(ids), model(ids))
    model.train()
    model.backbone.eval()
    assert not torch.equal(model(ids), model(ids))


def test_a_prompt_is_the_prefix_of_its_own_keys_and_values():
    model, ids = prompted("mean").eval(), text(1)
    heard = {}
    for layer, block in enumerate(model.backbone.encoder.layer):
        for side in ("key", "value"):
            module = getattr(block.attention.self, side)
            module.register_forward_hook(lambda _m, _i, out, at=(layer, side): heard.__setitem__(at, out[0, :P]))
    expected = model(ids)
    prefix = torch.cat([heard[layer, side] for layer in range(LAYERS) for side in ("key", "value")], 1).detach()
    again = Prefixed(bert(), head(), prefix=prefix, pooling="mean").eval()
    torch.testing.assert_close(again(ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backbone", ["Roberta", "Electra"])
def test_prefixes_work_on_the_cousins_of_bert(backbone):
    model = prefixed("mean", backbone=backbone).eval()
    torch.testing.assert_close(model(padded(text() % 25 + 3, 2)), model(text() % 25 + 3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("make", "numbers"), [(prompted, P * D), (prefixed, P * 2 * LAYERS * D)])
def test_only_the_prompt_and_the_head_are_trained(make, numbers):
    model, ids = make(dropout=0.1), text(32)
    before = {name: p.clone() for name, p in bert().state_dict().items()}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == numbers + D * 2 + 2
    stream = Batches(x=ids, y=ids[:, 2] % 2, batch_size=16)
    fitted = fit(Plan(model=model, stream=stream, steps=8, optimizer=adamw(1e-2)), device="cpu").model
    assert all(torch.equal(p, before[name]) for name, p in fitted.backbone.state_dict().items())
    assert all(p.grad is None for p in fitted.backbone.parameters())
    assert all(
        a.data_ptr() == b.data_ptr() for a, b in zip(fitted.backbone.parameters(), bert().parameters(), strict=True)
    )
    assert all(not torch.equal(a, b) for (_, a), (_, b) in zip(trained(fitted), trained(model), strict=True))
    assert all(p.requires_grad for p in bert().parameters()), "the caller's backbone stays as it was"


def trained(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def test_its_features_are_what_the_head_reads_and_the_head_can_be_exchanged():
    model = prompted()
    seen = extract(model, [text()])
    torch.testing.assert_close(model.head(seen.features), seen.logits)
    other = with_head(model, 5)
    assert other(text()).shape == (4, 5)
    assert torch.equal(other.prompt, model.prompt)


def test_a_fresh_prompt_is_as_large_as_words_and_leaves_the_random_state():
    words = bert().get_input_embeddings().weight
    before = torch.get_rng_state()
    prompt = fresh_prompt(bert(), 500, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(prompt, fresh_prompt(bert(), 500, seed=3))
    assert not torch.equal(prompt, fresh_prompt(bert(), 500, seed=4))
    assert prompt.std().item() == pytest.approx(words.std().item(), rel=0.05)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=4).filter(lambda s: max(s) > 0.01))
def test_a_mean_prompt_counts_sources_by_their_positive_similarity(similarities):
    prompts = [
        torch.randn(P, D, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        for k in range(len(similarities))
    ]
    total = sum(max(s, 0.0) for s in similarities)
    expected = sum(max(s, 0.0) / total * prompt for s, prompt in zip(similarities, prompts, strict=True))
    torch.testing.assert_close(mean_prompt(prompts, similarities), expected, rtol=1e-12, atol=1e-12)


GOOD = torch.ones(P, D)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_prompt([torch.ones(2, 3), torch.ones(4, 3)], [0.5, 0.5]), "one shape"),
        (lambda: mean_prompt([torch.ones(2, 3)], [-0.5]), "must be similar"),
        (lambda: mean_prompt([torch.ones(2, 3)], [float("nan")]), "must be similar"),
        (lambda: mean_prompt([torch.ones(2, 3)], [0.5, 0.5]), "belongs to each prompt"),
        (lambda: mean_prompt([], []), "one shape"),
        (lambda: Prompted(bert(), head(), prompt=torch.ones(P, D + 1)), "has shape"),
        (lambda: Prompted(bert(), head(), prompt=torch.ones(0, D)), "has shape"),
        (lambda: Prompted(bert(), head(), prompt=torch.full((P, D), torch.nan)), "must be finite"),
        (lambda: Prompted(bert(), head(), prompt=GOOD, dropout=1.0), "dropout < 1"),
        (lambda: Prompted(bert(), head(), prompt=GOOD, pooling="last"), "pooling"),
        (lambda: Prompted(nn.Linear(D, D), head(), prompt=GOOD), "get_input_embeddings"),
        (lambda: Prompted(bert(), head(), prompt=GOOD)({"input_ids": text(), "words": text()}), "An input"),
        (lambda: Prompted(bert(), head(), prompt=GOOD)({"attention_mask": text()}), "input_ids"),
        (lambda: Prompted(bert(), head(), prompt=GOOD)(text(2, 18)), "20 positions"),
        (lambda: prefixed()(text(2, 18)), "20 positions"),
        (lambda: Prefixed(bert(), head(), prefix=GOOD), "has shape"),
        (lambda: Prefixed(nn.Linear(D, D), head(), prefix=GOOD), "encoder of transformers"),
        (lambda: fresh_prompt(bert(), 0), "length >= 1"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    with pytest.raises(Refused, match=message):
        call()
