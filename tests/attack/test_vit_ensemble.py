"""ViT ensembles: copies at identity are the originals, weights and steps in closed form, models left as found."""

from __future__ import annotations

import copy as copying
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

from headstart.attack import MIFGSM, ViTEnsemble, find_copies, fused
from headstart.attack.vit_copies import UNCHANGED, Copy, augmented, blocks_of, kept_heads, mixed
from headstart.attack.vit_ensemble import COPIES, shares
from headstart.attack.vit_search import RANGES, Trial, tried
from headstart.core.ascent import logits, misclassify, reach
from headstart.core.rng import seeded
from headstart.core.validate import Refused
from headstart.nets import build
from headstart.testing import contract
from headstart.testing.subject import difference, snapshot
from headstart.zoo.hf_model import Classifier

ALONE: tuple[tuple[Copy, ...], ...] = ((),)


class Torch(nn.Module):
    """Patches of 2, torch's own encoder, the mean token; post-norm or pre-norm."""

    def __init__(self, width: int = 16, heads: int = 4, depth: int = 2, first: bool = True) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.place = nn.Parameter(0.5 * torch.randn(16, width))
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.1, batch_first=True, norm_first=first)
        self.layers, self.head = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return 5 * self.head(self.layers(self.patches(x).flatten(2).mT + self.place).mean(1))


class TimmAttention(nn.Module):
    def __init__(self, width: int, heads: int, normed: bool) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(width // heads) if normed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(self.q_norm(q), k, v).transpose(1, 2).reshape(n, t, d))


class TimmBlock(nn.Module):
    def __init__(self, width: int, heads: int, normed: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = TimmAttention(width, heads, normed)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Timm(nn.Module):
    """The layout of timm: blocks[i].attn.qkv, .proj and blocks[i].mlp, with a class token."""

    def __init__(self, width: int = 16, heads: int = 2, normed: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.cls_token, self.place = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(17, width))
        self.blocks = nn.Sequential(*[TimmBlock(width, heads, normed) for _ in range(2)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patches(x).flatten(2).mT], 1) + self.place
        return 5 * self.head(self.blocks(x)[:, 0])


class OldSelf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads = 2
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (2, 8)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Old(nn.Module):
    """How older transformers nest a layer: attention.attention.query, attention.output.dense, intermediate, output."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 16, 2, 2)
        dense = nn.ModuleDict
        self.attention = dense({"attention": OldSelf(), "output": dense({"dense": nn.Linear(16, 16)})})
        self.intermediate, self.output = dense({"dense": nn.Linear(16, 32)}), dense({"dense": nn.Linear(32, 16)})
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = x + self.attention["output"]["dense"](self.attention["attention"](x))
        x = x + self.output["dense"](F.gelu(self.intermediate["dense"](x)))
        return 5 * self.head(x[:, 0])  # mixing tokens would not change their mean


def transformers_vit(kind: str = "eager") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=8, patch_size=2,
        num_channels=1, num_labels=10, initializer_range=0.5, attn_implementation=kind,
    )  # fmt: skip
    return Classifier(transformers.ViTForImageClassification(config))


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "torch": Torch,
    "torch, post-norm": lambda: Torch(first=False),
    "timm": Timm,
    "timm, normed queries": lambda: Timm(normed=True),
    "transformers, eager": transformers_vit,
    "transformers, fused": lambda: transformers_vit("sdpa"),
    "transformers, old": Old,
}
every_layout = pytest.mark.parametrize("name", MAKERS)


def model_of(name: str = "timm", seed: int = 0) -> nn.Module:
    with seeded(seed):
        return MAKERS[name]().eval()


def pictures(n: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = Generator().manual_seed(seed)
    return torch.rand(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)


def copied(model: nn.Module, copy: Copy, x: Tensor, seed: int = 0) -> Tensor:
    with torch.no_grad(), augmented(model, copy, Generator().manual_seed(seed)):
        return model(x)


PLAIN_GOALS = {
    "optimum_of_a_linear_model": "looks into its surrogates, so that plain functions are refused",
    "all_surrogates_count": "looks into its surrogates, so that plain functions are refused",
}
test_contract = contract(
    ViTEnsemble(),
    model=model_of,
    known_failures=PLAIN_GOALS,
    refuses=[lambda: ViTEnsemble(steps=-1), lambda: ViTEnsemble(kappa=0.0), lambda: ViTEnsemble(kappa=math.inf),
             lambda: ViTEnsemble(temperature=0.0), lambda: ViTEnsemble(decay=-1.0), lambda: ViTEnsemble(norm="l1"),
             lambda: Copy(by="head", value=0.1), lambda: Copy(by="heads", value=1.0), lambda: Copy(by="scores", value=-1),
             lambda: Copy(by="features", value=1.1), lambda: Copy(by="features", value=0.5, mix="pixel"),
             lambda: Copy(by="scores", value=math.nan), lambda: Copy(by="features", value=0.5, prefix=-1)],
)  # fmt: skip
test_contract_l2 = contract(
    ViTEnsemble(radius=0.5, norm="l2"), model=lambda: model_of("torch"), known_failures=PLAIN_GOALS
)


@every_layout
def test_the_blocks_are_found(name):
    model = model_of(name)
    blocks = blocks_of(model)
    assert len(blocks) == (1 if name == "transformers, old" else 2)
    for block in blocks:
        assert block.heads == (2 if "timm" in name or "old" in name else 4)
        assert block.width == 16
        assert block.think is not None
        assert (block.think.in_features, block.think.out_features) == (32, 16)


def test_the_library_s_own_transformer_has_them_and_nets_without_attention_are_refused():
    blocks = blocks_of(build("vit", 10))
    assert [block.name for block in blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(block.heads == 4 and block.think.out_features == 96 for block in blocks)
    for architecture in ("cnn", "resnet", "convnext", "mixer", "mlp"):
        with pytest.raises(Refused, match="needs a model with attention"):
            blocks_of(build(architecture, 10))


@every_layout
@pytest.mark.parametrize("by", UNCHANGED)
def test_a_copy_that_changes_nothing_is_its_original(name, by):
    model, (x, _) = model_of(name), pictures()
    with torch.no_grad():
        assert torch.equal(copied(model, Copy(by=by, value=UNCHANGED[by]), x), model(x))
    nearly = {"heads": 1e-12, "scores": 1 + 1e-12, "features": 1 - 1e-12}[by]  # with hooks at work
    model, x = model.double(), x.double()
    with torch.no_grad():
        assert torch.allclose(copied(model, Copy(by=by, value=nearly), x), model(x), atol=1e-9)


@every_layout
@pytest.mark.parametrize("by", UNCHANGED)
def test_other_values_change_it_whether_or_not_gradients_are_asked(name, by):
    model, (x, _) = model_of(name), pictures()
    copy = Copy(by=by, value={"heads": 0.9, "scores": 3.0, "features": 0.3}[by])
    with torch.no_grad():
        changed = copied(model, copy, x)
        assert (changed - model(x)).abs().max() > 1e-3
    with augmented(model, copy, Generator().manual_seed(0)):
        said = model(x.requires_grad_())
    assert torch.allclose(said, changed, atol=1e-5)


def weights_changed(model: nn.Module, change: Callable[[str, Tensor], None]) -> nn.Module:
    changed = copying.deepcopy(model)
    with torch.no_grad():
        for name, p in changed.named_parameters():
            change(name, p)
    return changed


@every_layout
def test_dropped_heads_are_zeroed_columns_of_the_output_projection(name):
    model, (x, _) = model_of(name).double(), pictures()
    x, copy, draws = x.double(), Copy(by="heads", value=0.6), Generator().manual_seed(3)
    heads = blocks_of(model)[0].heads
    columns = iter([kept_heads(heads, copy, draws).repeat_interleave(16 // heads) for _ in blocks_of(model)])

    def change(name: str, p: Tensor) -> None:
        if any(
            part in name
            for part in ("out_proj.weight", "attn.proj.weight", "o_proj.weight", "attention.output.dense.weight")
        ):
            p.mul_(next(columns))

    with torch.no_grad():
        expected = weights_changed(model, change)(x)
    assert next(columns, None) is None
    assert torch.allclose(copied(model, copy, x, seed=3), expected, atol=1e-9)
    assert not torch.allclose(expected, model(x), atol=1e-3)


@pytest.mark.parametrize("name", [name for name in MAKERS if "normed" not in name])
def test_scaled_scores_are_scaled_rows_of_the_queries(name):
    model, (x, _) = model_of(name).double(), pictures()
    x = x.double()

    def change(name: str, p: Tensor) -> None:
        if any(part in name for part in ("in_proj", "qkv", "q_proj", ".query.")):
            p[:16] *= 0.4

    with torch.no_grad():
        expected = weights_changed(model, change)(x)
    assert torch.allclose(copied(model, Copy(by="scores", value=0.4), x), expected, atol=1e-9)


def attention_of(scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """What timm's attention gives, the scores and the values by hand; one head."""
    with seeded(0):
        layer, x = TimmAttention(8, 1, normed=False).double(), torch.randn(2, 5, 8).double()
        layer.proj.weight.data, layer.proj.bias.data = torch.eye(8).double(), torch.zeros(8).double()
    q, k, v = layer.qkv(x).chunk(3, -1)
    with torch.no_grad(), augmented(layer, Copy(by="scores", value=scale), Generator()):
        return layer(x), q @ k.mT, v


def test_scores_times_zero_are_uniform_attention_and_times_infinity_the_best_token():
    out, _, v = attention_of(0.0)
    assert torch.allclose(out, v.mean(1, keepdim=True).expand_as(v))
    out, scores, v = attention_of(1e9)
    best = scores.argmax(-1)
    assert torch.allclose(out, v[torch.arange(2)[:, None], best])


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1), st.integers(0, 3), st.sampled_from(["token", "channel", "batch"]), st.integers(0, 99))
def test_mixing_is_a_permutation_s_share_and_leaves_the_front(value, front, mix, seed):
    h = torch.randn(4, 9, 6, generator=Generator().manual_seed(seed)).double()
    found = mixed(h, Copy(by="features", value=value, mix=mix), front, Generator().manual_seed(seed))
    assert torch.equal(found[:, :front], h[:, :front])
    axis = {"token": 1, "channel": 2, "batch": 0}[mix]
    assert torch.allclose(found[:, front:].mean(axis), h[:, front:].mean(axis))
    order = torch.randperm(h[:, front:].shape[axis], generator=Generator().manual_seed(seed))
    rest = h[:, front:]
    assert torch.allclose(found[:, front:], value * rest + (1 - value) * rest.index_select(axis, order))
    still = (
        h[:, :, :1].expand_as(h)
        if mix == "channel"
        else h[:, :1].expand_as(h)
        if mix == "token"
        else h[:1].expand_as(h)
    )
    assert torch.allclose(mixed(still, Copy(by="features", value=value, mix=mix), 0, Generator()), still)


@pytest.mark.parametrize(("name", "front"), [("torch", 0), ("timm", 1), ("transformers, fused", 1)])
def test_the_class_token_is_not_mixed(name, front):
    model, (x, _) = model_of(name), pictures()
    seen: list[Tensor] = []
    think = blocks_of(model)[0].think
    copy = Copy(by="features", value=0.0)
    with torch.no_grad(), augmented(model, copy, Generator().manual_seed(1)):
        handle = think.register_forward_hook(lambda _m, _i, out: seen.append(out))  # after the copy's hook
        model(x)
        handle.remove()
    handle = think.register_forward_hook(lambda _m, _i, out: seen.append(out))
    model(x)
    handle.remove()
    changed, original = seen
    assert torch.allclose(changed[:, :front], original[:, :front], atol=1e-6)
    order = torch.randperm(original.shape[1] - front, generator=Generator().manual_seed(1))
    assert torch.allclose(changed[:, front:], original[:, front:][:, order], atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.floats(0, 0.999), st.integers(0, 999))
def test_at_least_one_head_stays(heads, p, seed):
    kept = kept_heads(heads, Copy(by="heads", value=p), Generator().manual_seed(seed))
    assert kept.sum() >= 1
    assert set(kept.tolist()) <= {0.0, 1.0}
    scaled = kept_heads(heads, Copy(by="heads", value=p, rescale=True), Generator().manual_seed(seed))
    assert torch.allclose(scaled, kept / (1 - p))


def test_heads_are_dropped_as_often_as_said():
    draws, copy = Generator().manual_seed(0), Copy(by="heads", value=0.3)
    kept = torch.stack([kept_heads(12, copy, draws) for _ in range(2000)])
    assert kept.mean().item() == pytest.approx(0.7, abs=0.012)  # four standard errors


def test_windows_and_attention_that_goes_around_its_layers_are_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=8, patch_size=1, num_channels=1, embed_dim=8, depths=[1], num_heads=[2], window_size=4, num_labels=10
    )
    model, (x, _) = Classifier(transformers.SwinForImageClassification(config)).eval(), pictures()
    with pytest.raises(Refused, match="tokens in windows"):
        copied(model, Copy(by="features", value=0.5), x)
    for copy in (
        Copy(by="features", value=0.5, mix="channel"),
        Copy(by="heads", value=0.5),
        Copy(by="scores", value=0.5),
    ):
        assert copied(model, copy, x).isfinite().all()

    class Around(TimmAttention):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.qkv.weight[:8])

    with pytest.raises(Refused, match="1 of 1 blocks not reached"):
        copied(Around(8, 2, normed=False), Copy(by="scores", value=0.5), torch.ones(1, 4, 8))
    with pytest.raises(Refused, match="perceptron"):
        copied(TimmAttention(8, 2, normed=False), Copy(by="features", value=0.5), torch.ones(1, 4, 8))


@every_layout
@pytest.mark.parametrize("by", UNCHANGED)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_found_also_after_an_exception(name, by, fails):
    model, (x, _) = model_of(name), pictures()
    before, said = snapshot(model), model(x)
    model.train()
    next(model.children()).eval()
    modes = [m.training for m in model.modules()]
    forwards = [vars(m).get("forward") for m in model.modules()]

    def use() -> None:
        with augmented(model, Copy(by=by, value=0.5), Generator()):
            assert not any(m.training for m in model.modules())
            model(x)
            if fails:
                raise KeyError

    if fails:
        with pytest.raises(KeyError):
            use()
    else:
        use()
    assert [m.training for m in model.modules()] == modes
    assert [vars(m).get("forward") for m in model.modules()] == forwards
    model.eval()
    assert not difference(before, snapshot(model))
    assert torch.equal(model(x), said)


def test_an_exception_inside_the_loop_leaves_no_hooks():
    model, (x, y) = model_of(), pictures()
    model.head.register_forward_hook(lambda _m, _i, out: out * torch.nan)
    before = snapshot(model)
    with pytest.raises(Refused, match="gradient must be finite"):
        ViTEnsemble().perturb(x, [misclassify(model, y)])
    assert not difference(before, snapshot(model))


def test_alone_with_equal_weights_and_kappa_one_it_is_the_plain_attack():
    models, (x, y) = [model_of("torch", 1).double(), model_of("timm", 2).double()], pictures()
    x, goals = x.double(), [misclassify(m, y) for m in models]
    plain = ViTEnsemble(radius=0.1, kappa=1.0, temperature=math.inf, copies=ALONE)
    expected = MIFGSM(radius=0.1).perturb(x, goals)
    assert torch.allclose(plain.perturb(x, goals), expected, atol=1e-12)
    assert torch.allclose(MIFGSM(radius=0.1).perturb(x, [fused(models, y, by="loss")]), expected, atol=1e-12)
    same = tuple(Copy(by=by, value=value) for by, value in UNCHANGED.items())
    pool = ViTEnsemble(radius=0.1, kappa=1.0, temperature=math.inf, copies=(same,))
    assert torch.allclose(pool.perturb(x, goals), expected, atol=1e-12)
    fast = ViTEnsemble(radius=0.1, kappa=10.0, steps=10, temperature=math.inf, copies=ALONE).perturb(x, goals)
    assert torch.allclose(fast, MIFGSM(radius=0.1, steps=10, step_size=0.1).perturb(x, goals), atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=1, max_size=6), st.floats(0.1, 10), st.floats(-50, 50))
def test_weights(values, temperature, constant):
    v = torch.tensor(values).double()[:, None]
    w = shares(v, temperature)
    assert w.dtype == torch.float64
    assert torch.allclose(w.sum(0), torch.ones(1).double())
    assert torch.allclose(w, shares(v + constant, temperature), atol=1e-9)
    assert torch.allclose(shares(torch.full_like(v, constant), temperature), torch.full_like(v, 1 / len(v)))
    assert torch.allclose(shares(v, math.inf), torch.full_like(v, 1 / len(v)))
    least = (v == v.min()).double()
    assert torch.equal(shares(v, 1e-300), least / least.sum())
    assert torch.allclose(shares(v, -temperature), shares(-v, temperature))


def restated(models: list[nn.Module], x: Tensor, y: Tensor, attack: ViTEnsemble, sign: int) -> Tensor:
    """The method written out for two surrogates and all their copies, with the weights inside the graph, detached."""
    adv, momentum, draws = x.clone(), torch.zeros_like(x), Generator().manual_seed(attack.seed)
    for _ in range(attack.steps):
        adv = adv.detach().requires_grad_()
        losses = [sign * F.cross_entropy(m(adv), y, reduction="none") for m in models]
        for m in models:
            for copy in COPIES:
                with augmented(m, copy, draws):
                    losses.append(sign * F.cross_entropy(m(adv), y, reduction="none"))
        each = torch.stack(losses)
        weights = (-each.detach() / attack.temperature).exp()
        total = (weights / weights.sum(0) * each).sum()
        grad = torch.autograd.grad(total, adv)[0]
        momentum = attack.decay * momentum + grad / grad.abs().mean(dim=(1, 2, 3), keepdim=True)
        adv = adv + attack.kappa * attack.radius / attack.steps * momentum.sign()
        adv = (x + (adv - x).clamp(-attack.radius, attack.radius)).clamp(0, 1)
    return adv.detach()


@pytest.mark.parametrize("targeted", [False, True])
def test_it_is_the_method_written_out(targeted):
    models, (x, y) = [model_of("timm", 1).double(), model_of("torch", 2).double()], pictures()
    attack, x = ViTEnsemble(radius=0.1, steps=3, seed=5), x.double()
    goal = reach if targeted else misclassify
    found = attack.perturb(x, [goal(m, y) for m in models])
    assert torch.allclose(found, restated(models, x, y, attack, -1 if targeted else 1), atol=1e-9)
    other = ViTEnsemble(radius=0.1, steps=3, seed=6).perturb(x, [goal(m, y) for m in models])
    assert not torch.equal(found, other)
    assert torch.equal(found, attack.perturb(x, [goal(m, y) for m in models]))


def test_examples_do_not_depend_on_their_batch_unless_the_batch_is_mixed():
    model, (x, y) = model_of().double(), pictures()
    x = x.double()

    def halves(attack: ViTEnsemble) -> bool:
        whole = attack.perturb(x, [misclassify(model, y)])
        parts = [attack.perturb(x[i : i + 2], [misclassify(model, y[i : i + 2])]) for i in range(0, 6, 2)]
        return torch.allclose(whole, torch.cat(parts), atol=1e-12)

    assert halves(ViTEnsemble(radius=0.1))
    assert not halves(ViTEnsemble(radius=0.1, copies=((Copy(by="features", value=0.5, mix="batch"),),)))


@settings(max_examples=10, deadline=None)
@given(st.floats(0, 0.5), st.integers(0, 3), st.floats(0.1, 20), st.sampled_from(["linf", "l2"]), st.integers(0, 99))
def test_any_kappa_stays_in_the_ball_and_the_bounds(radius, steps, kappa, norm, seed):
    model, (x, y) = model_of(), pictures(2, seed)
    found = ViTEnsemble(radius=radius, steps=steps, kappa=kappa, norm=norm).perturb(x, [misclassify(model, y)])
    assert found.min() >= 0
    assert found.max() <= 1
    away = (found - x).flatten(1)
    assert (away.abs().amax(1) if norm == "linf" else away.norm(dim=1)).max() <= radius + 1e-6
    if radius == 0 or steps == 0:
        assert torch.equal(found, x)


def test_all_surrogates_and_all_copies_count_and_a_network_without_attention_may_join():
    with seeded(0):
        plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    models, (x, y) = [model_of(seed=1), model_of(seed=2)], pictures()
    goals = [misclassify(m, y) for m in models]
    both = ViTEnsemble(radius=0.1, steps=3).perturb(x, goals)
    for one in goals:
        assert not torch.equal(both, ViTEnsemble(radius=0.1, steps=3).perturb(x, [one]))
    for without in range(3):
        fewer = tuple(c for k, c in enumerate(COPIES) if k != without)
        assert not torch.equal(both, ViTEnsemble(radius=0.1, steps=3, copies=(fewer,)).perturb(x, goals))
    joined = [*goals, misclassify(plain, y)]
    with pytest.raises(Refused, match=r"copies=\(\(\),\)"):
        ViTEnsemble(radius=0.1, steps=3).perturb(x, joined)
    mixed_pool = ViTEnsemble(radius=0.1, steps=3, copies=(COPIES, COPIES, ())).perturb(x, joined)
    assert not torch.equal(mixed_pool, both)
    with pytest.raises(Refused, match="each of 3"):
        ViTEnsemble(copies=(COPIES, COPIES)).perturb(x, joined)
    with pytest.raises(Refused, match="one model each"):
        ViTEnsemble().perturb(x, [lambda a: a.flatten(1).sum(1)])


def calibration() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A model, inputs labelled as it sees them, and the same perturbed."""
    model, (x, _) = model_of(), pictures(64)
    with torch.no_grad():  # all classes about as often, as in a trained model, and firmly
        model.head.bias -= model(x).mean(0) / 5
        model.head.weight *= 8
        model.head.bias *= 8
    y = logits(model, x).argmax(1)
    return model, x, y, MIFGSM(radius=0.1).perturb(x, [misclassify(model, y)])


def test_the_grid_takes_the_best_copy_that_keeps_enough_accuracy():
    model, x, y, moved = calibration()
    found = find_copies(model, x, y, moved, draws=2, seed=3)
    assert [copy.by for copy in found] == list(RANGES)
    refused = 0
    for copy in found:
        trials = [
            tried(model, Copy(by=copy.by, value=v), x, y, moved, draws=2, seed=3)
            for v in np.linspace(*RANGES[copy.by], 9).tolist()
        ]
        good = [t for t in trials if t.kept >= 0.9]
        original = Copy(by=copy.by, value=UNCHANGED[copy.by])
        assert copy == (max(good, key=lambda t: t.relief).copy if good else original)
        refused += copy != max(trials, key=lambda t: t.relief).copy
    assert refused  # the constraint decides here
    assert ViTEnsemble(copies=(found,)).perturb(x, [misclassify(model, y)]).shape == x.shape


def test_a_trial_counts_by_hand():
    model, x, y, moved = calibration()
    copy = Copy(by="scores", value=0.5)
    found = tried(model, copy, x, y, moved)
    with torch.no_grad():
        assert found.relief == pytest.approx(
            float(F.cross_entropy(model(moved), y) - F.cross_entropy(copied(model, copy, moved), y)), abs=1e-5
        )
    assert found.kept == pytest.approx(float((copied(model, copy, x).argmax(1) == y).float().mean()))
    same = tried(model, Copy(by="scores", value=1.0), x, y, moved)
    assert (same.relief, same.kept) == (0.0, 1.0)


def test_bayes_does_about_as_well_as_a_fine_grid_and_keeps_to_the_constraint():
    model, x, y, moved = calibration()

    def found(**search: object) -> Trial:
        (copy,) = find_copies(model, x, y, moved, by=["scores"], draws=1, **search)
        return tried(model, copy, x, y, moved, draws=1)

    mine, fine, coarse = found(search="bayes"), found(points=61), found(points=9)
    assert mine.kept >= 0.9
    assert coarse.relief <= fine.relief
    assert mine.relief >= fine.relief - 0.1 * abs(fine.relief)
    assert mine == found(search="bayes")


def test_where_nothing_keeps_enough_accuracy_the_copy_is_the_original():
    model, x, y, moved = calibration()
    (found,) = find_copies(model, x, y, moved, by=["scores"], keep=1.0, points=2, draws=1)
    assert found == Copy(by="scores", value=1.0)


def test_a_search_refuses_what_it_cannot_use():
    model, x, y, moved = calibration()
    for wrong, says in (({"search": "random"}, "search"), ({"keep": 2.0}, "keep"), ({"points": 1}, "points"),
                        ({"guided": -1}, "guided"), ({"draws": 0}, "draws"), ({"by": ["tokens"]}, "by"),
                        ({"moved": moved[:2]}, "perturbed"), ({"y": y[:2]}, "labels"), ({"y": (y + 1) % 10}, "right on some")):  # fmt: skip
        given = {"x": x, "y": y, "moved": moved} | wrong
        with pytest.raises(Refused, match=says):
            find_copies(model, **given)
