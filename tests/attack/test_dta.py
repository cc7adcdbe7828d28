"""DTA: the loop written out, exact zeros at the start, closed forms of a linear layer, layers chosen without a victim."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.attack import DTA
from headstart.attack.draws import generators, noise
from headstart.core.ascent import Ball
from headstart.core.rng import seeded
from headstart.core.validate import Refused
from headstart.testing import contract
from headstart.testing.material import trained

NEEDS_NO_GOAL = {
    "optimum_of_a_linear_model": "the goal of this check is not the encoder's",
    "all_surrogates_count": "goals are not used, the encoder is",
    "bad_input_refused": "no goals are needed; the rest is tested below",
    "follows_dtype_and_device": "the encoder keeps its own dtype and device; tested below",
}
test_contract = contract(
    lambda: DTA(encoder=trained(), layers=("enter", "middle"), radius=0.1),
    known_failures=NEEDS_NO_GOAL | {"targeted_raises_the_target": "no class is aimed at"},
)
test_contract_l2_and_all_layers = contract(
    lambda: DTA(encoder=trained(), layers=("enter", "middle"), radius=0.8, norm="l2", choose="all", seed=1),
    known_failures=NEEDS_NO_GOAL | {"targeted_raises_the_target": "no class is aimed at"},
)
BLOCKS = ("blocks.0", "blocks.1", "blocks.2")


class Encoder(nn.Module):
    """A small ViT with a first token of its own and dropout."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 16, batch_first=True, norm_first=True) for _ in BLOCKS
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.cls.expand(len(x), -1, -1), self.patches(x).flatten(2).mT], 1)
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.head(tokens[:, 0])
        return logits


def encoder_of(seed: int = 0) -> Encoder:
    with seeded(seed):
        return Encoder().double().eval()


def pictures(n: int = 6, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens_after(encoder: Encoder, x: Tensor, depth: int) -> Tensor:
    tokens = torch.cat([encoder.cls.expand(len(x), -1, -1), encoder.patches(x).flatten(2).mT], 1)
    for block in list(encoder.blocks)[: depth + 1]:
        tokens = block(tokens)
    return tokens


def restated(encoder: Encoder, x: Tensor, depths: list[int], radius: float, steps: int, seed: int = 0) -> Tensor:
    """Descent on the mean of the layers' average token cosines, by torch's own cosine, one example at a time."""
    found = []
    for k in range(len(x)):
        one = x[k : k + 1]
        a = (one + noise(one, Ball(radius), generators(seed, k, 1), copies=1)[0]).clamp(0, 1)
        for _ in range(steps):
            a.requires_grad_()
            cosines = [
                torch.cosine_similarity(tokens_after(encoder, a, d), tokens_after(encoder, one, d).detach(), dim=-1)
                for d in depths
            ]
            slope = torch.autograd.grad(torch.stack(cosines).mean(), a)[0]
            a = a.detach() - radius / 5 * slope.sign()
            a = (one + (a - one).clamp(-radius, radius)).clamp(0, 1)
        found.append(a.detach())
    return torch.cat(found)


@pytest.mark.parametrize(("layers", "depths"), [(BLOCKS[:1], [0]), (BLOCKS[2:], [2]), (BLOCKS, [0, 1, 2])])
def test_it_is_the_loop_written_out(layers, depths):
    found = DTA(encoder=encoder_of(), layers=layers, radius=0.1, steps=6, choose="all").perturb(pictures())
    torch.testing.assert_close(found, restated(encoder_of(), pictures(), depths, 0.1, 6), rtol=0, atol=1e-12)


def test_one_layer_needs_no_probe_and_the_rest_of_the_model_is_not_run():
    encoder, calls = encoder_of(), []
    for k, block in enumerate(encoder.blocks):
        block.register_forward_pre_hook(lambda _m, _i, k=k: calls.append(k))
    DTA(encoder=encoder, layers=BLOCKS[1:2], steps=3).perturb(pictures())
    assert calls == [0, 1] * (1 + 3)  # the clean pass, then one a step
    found = DTA(encoder=encoder, layers=BLOCKS[1:2], steps=3)
    assert torch.equal(found.perturb(pictures()), replace(found, choose="batch").perturb(pictures()))


def test_at_the_clean_input_the_slope_is_exactly_zero(monkeypatch):
    monkeypatch.setitem(DTA.perturb.__globals__, "noise", lambda x, *_a, **_k: torch.zeros_like(x)[None])
    attack, x = DTA(encoder=encoder_of(), radius=0.1, choose="all"), pictures()
    assert torch.equal(attack.similarity(x, x), torch.ones(6, 3, dtype=torch.float64))
    assert float((attack.perturb(x) - x).abs().max()) == 0.0


def test_its_slope_at_a_linear_patch_embedding_is_that_of_finite_differences():
    """One step of a hundredth: the sign of what central differences of the ATCS say, at every pixel."""
    with seeded(3):
        encoder = nn.Sequential(nn.Conv2d(1, 5, 4, 4, bias=False)).double()
    attack, x = DTA(encoder=encoder, layers=("0",), radius=0.2, step_size=0.01, steps=0), pictures(1)
    start = attack.perturb(x)
    step = (replace(attack, steps=1).perturb(x) - start) / 0.01
    points = torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8) * 1e-6
    up, down = (attack.similarity(start + sign * points, x.expand(64, -1, -1, -1))[:, 0] for sign in (1, -1))
    slope = ((up - down) / 2e-6).view_as(x)
    inside = ((start - x).abs() < 0.185) & (start > 0.02) & (start < 0.98)
    assert inside.sum() > 30
    assert torch.equal(step[inside].round(), -slope.sign()[inside])


def test_one_linear_token_turns_along_its_most_sensitive_direction():
    """1 - cos(Wx, W(x + d)) ≈ |P W d|² / 2|Wx|² for small d, P the plane across Wx: d is PW's top singular vector."""
    with seeded(1):
        encoder = nn.Sequential(nn.Linear(6, 6, bias=False)).double()
    x = torch.full((1, 6), 0.5, dtype=torch.float64)
    weight = encoder[0].weight.detach()
    along = weight @ x[0] / (weight @ x[0]).norm()
    best = torch.linalg.svd(weight - along[:, None] * (along @ weight)).Vh[0]
    found = DTA(encoder=encoder, layers=("0",), radius=1e-4, norm="l2", steps=300).perturb(x) - x
    assert float((found[0] @ best).abs()) == pytest.approx(1e-4, rel=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1), st.floats(1e-3, 1), st.sampled_from(["linf", "l2"]), st.integers(0, 99), st.integers(0, 2))
def test_one_step_from_any_start_stays_in_the_ball_and_the_bounds(radius, step_size, norm, seed, steps):
    attack = DTA(encoder=encoder_of(), radius=radius, step_size=step_size, norm=norm, seed=seed, steps=steps)
    x = pictures(3, seed)
    found = attack.perturb(x)
    away = (found - x).flatten(1)
    assert (away.abs().amax(1) if norm == "linf" else away.norm(dim=1)).max() <= radius * (
        1 + 1e-9
    ) + 1e-14  # of x itself
    assert found.min() >= 0
    assert found.max() <= 1
    assert radius > 0 or torch.equal(found, x)


@pytest.mark.parametrize("select", ["lowest", "shallowest_within"])
def test_a_batch_is_its_examples_one_by_one(select):
    attack, x = DTA(encoder=encoder_of(), radius=0.1, steps=5, select=select, within=0.02), pictures(8)
    single = [replace(attack, first=k).perturb(x[k : k + 1]) for k in range(8)]
    assert torch.allclose(attack.perturb(x), torch.cat(single), atol=1e-12)
    assert torch.equal(attack.perturb(x), attack.perturb(x, [lambda a: a.flatten(1).sum(1)] * 2))


def test_each_example_gets_what_its_chosen_layer_alone_gives():
    attack, x = DTA(encoder=encoder_of(), radius=0.2, patience=None), pictures(24)
    chosen = attack.chosen(attack.probe(x))
    assert len(chosen.unique()) > 1
    alone = torch.stack([replace(attack, layers=(name,)).perturb(x) for name in BLOCKS])
    torch.testing.assert_close(attack.perturb(x), alone[chosen, torch.arange(24)], rtol=0, atol=1e-12)
    score = attack.probe(x).mean(0)
    best = replace(attack, choose="batch")
    assert torch.allclose(best.probe(x), score.expand(24, -1))
    assert torch.equal(best.perturb(x), replace(attack, layers=(BLOCKS[int(score.argmin())],)).perturb(x))


def test_a_probe_is_a_fifth_of_the_attack_judged_at_the_final_layer():
    attack, x = DTA(encoder=encoder_of(), radius=0.1, steps=10, patience=None), pictures()
    scores = attack.probe(x)
    for k, name in enumerate(BLOCKS):
        moved = replace(attack, layers=(name,), steps=2).perturb(x)
        torch.testing.assert_close(scores[:, k], attack.similarity(moved, x)[:, 2])
        torch.testing.assert_close(replace(attack, final=BLOCKS[0]).probe(x)[:, k], attack.similarity(moved, x)[:, 0])


def test_the_choice_by_scores():
    scores = torch.tensor([[0.5, 0.4, 0.3], [0.3, 0.9, 0.95], [0.2, math.inf, math.inf], [0.9, 0.44, 0.3]])
    attack = DTA(encoder=encoder_of())
    assert attack.chosen(scores).tolist() == [2, 0, 0, 2]
    near = replace(attack, select="shallowest_within")
    assert near.chosen(scores).tolist() == [1, 0, 0, 1]
    assert replace(near, within=0.0).chosen(scores).tolist() == [2, 0, 0, 2]


@pytest.mark.parametrize("patience", [1, 2])
def test_probes_stop_when_the_score_worsens_again_and_again(patience):
    """By the full table of scores: after `patience` rises in a row an example takes no part."""
    with seeded(0):
        layers = [layer for _ in range(7) for layer in (nn.Linear(12, 12), nn.Tanh())]
        encoder = nn.Sequential(*layers).double()
    attack = DTA(encoder=encoder, layers=tuple(str(k) for k in range(0, 14, 2)), radius=0.1, patience=None)
    x = pictures(20).flatten(1)[:, :12]
    full, found = attack.probe(x), replace(attack, patience=patience).probe(x)
    stops = 0
    for row, mine in zip(full.tolist(), found.tolist(), strict=True):
        rises, stopped = 0, False
        for k in range(7):
            assert mine[k] == (math.inf if stopped else row[k])
            rises = rises + 1 if k and row[k] > row[k - 1] else 0
            stopped = stopped or rises == patience
        stops += mine[-1] == math.inf
    assert stops > 0


def test_tokens_of_all_kinds_and_a_convolutional_base():
    x = pictures(3)
    moved = {which: DTA(encoder=encoder_of(), tokens=which, radius=0.1).perturb(x) for which in ("all", "cls", "patch")}
    assert not torch.equal(moved["cls"], moved["patch"])
    assert not torch.equal(moved["all"], moved["patch"])
    with seeded(0):
        convolutional = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3)).double()
    attack = DTA(encoder=convolutional, layers=("0", "2"), radius=0.1)
    start, moved = (replace(attack, steps=steps).perturb(x) for steps in (0, 20))
    assert (attack.similarity(moved, x) < attack.similarity(start, x)).all()
    with pytest.raises(Refused, match="sequence"):
        replace(attack, tokens="cls").perturb(x)


def test_the_encoder_stays_as_it_was_even_when_it_raises():
    encoder = encoder_of().train()
    encoder.blocks[1].eval()
    modes, x = [m.training for m in encoder.modules()], pictures()
    DTA(encoder=encoder, steps=2).perturb(x)
    with pytest.raises(RuntimeError):
        DTA(encoder=encoder, steps=2).perturb(x[:, :, :3])
    assert [m.training for m in encoder.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in encoder.parameters())
    assert not any(m._forward_hooks for m in encoder.modules())
    assert torch.equal(DTA(encoder=encoder).perturb(x), DTA(encoder=encoder_of()).perturb(x))  # no dropout


def test_it_follows_the_dtype_of_the_encoder_and_moves_with_the_seed():
    for dtype in (torch.float32, torch.float64):
        assert DTA(encoder=encoder_of().to(dtype)).perturb(pictures().to(dtype)).dtype == dtype
    x = pictures()
    assert not torch.equal(DTA(encoder=encoder_of(), seed=1).perturb(x), DTA(encoder=encoder_of()).perturb(x))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"radius": 8.0}, "255"),
        ({"radius": math.nan}, "radius"),
        ({"steps": -1}, "steps >= 0"),
        ({"step_size": 0.0}, "0 < step_size"),
        ({"norm": "l1"}, "norm"),
        ({"choose": "eech"}, "Did you mean 'each'"),
        ({"select": "highest"}, "lowest"),
        ({"tokens": "class"}, "cls"),
        ({"within": -0.1}, "within >= 0"),
        ({"patience": 0}, "patience >= 1"),
        ({"layers": ()}, "different layers"),
        ({"layers": ("blocks.0", "blocks.0")}, "different layers"),
        ({"layers": ("block.0",)}, "Did you mean 'blocks.0'"),
        ({"final": "blocks.3"}, "Did you mean"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, says):
    with pytest.raises(Refused, match=says):
        DTA(encoder=encoder_of(), **wrong)


def test_an_encoder_without_blocks_needs_names():
    with pytest.raises(Refused, match="Name its layers"):
        DTA(encoder=nn.Linear(2, 2))


@pytest.mark.parametrize(
    "x", [torch.zeros(0, 1, 8, 8), torch.full((1, 1, 8, 8), 1.5), torch.full((1, 1, 8, 8), math.nan),
          torch.ones(1, 1, 8, 8).int()]
)  # fmt: skip
def test_inputs_that_mean_nothing_are_refused(x):
    with pytest.raises(Refused):
        DTA(encoder=encoder_of()).perturb(x)


def test_an_encoder_that_says_nan_is_refused():
    encoder = encoder_of()
    with torch.no_grad():
        encoder.patches.bias[0] = math.nan
    with pytest.raises(Refused, match="finite"):
        DTA(encoder=encoder).perturb(pictures())
