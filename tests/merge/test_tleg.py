"""TLEG: the card's known answers, models of torch, this library and transformers, and what is refused."""

from __future__ import annotations

import copy
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from headstart.core.loop import fit
from headstart.core.plan import Batch, CrossEntropy, Plan, Step, Weighted, adamw
from headstart.core.rng import random_state, seeded
from headstart.core.stream import Batches
from headstart.core.surgery import freeze
from headstart.core.validate import Refused
from headstart.core.weights import LazyWeights, save_weights
from headstart.distill import SoftTargets
from headstart.merge import TLEG, Learngene, linearity_report
from headstart.merge.learngene import along
from headstart.nets.tokens import Attention
from headstart.testing import contract
from headstart.testing.subject import difference


class Patches(nn.Module):
    """A small transformer over the rows of a digit, of torch's own layers: (n, 1, 8, 8) -> (n, classes)."""

    def __init__(self, depth: int = 3, width: int = 12, classes: int = 10) -> None:
        super().__init__()
        self.enter, self.place = nn.Linear(8, width), nn.Parameter(torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(width, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.enter(x.flatten(1, 2)) + self.place).mean(1))


def model(depth: int = 3, width: int = 12, classes: int = 10, seed: int = 1) -> nn.Module:
    with seeded(seed):
        return Patches(depth, width, classes)


def sizes(model: nn.Module) -> tuple[int, int]:
    """Parameters of a block, and outside the blocks."""
    block = sum(p.numel() for p in model.encoder.layers[0].parameters())
    return block, sum(p.numel() for p in model.parameters()) - block * len(model.encoder.layers)


def trained(depth: int = 3, dtype: torch.dtype = torch.float32) -> Learngene:
    """A learngene with random numbers in base and slope, the norms' and biases' too."""
    learngene = TLEG(blocks="encoder.layers").apply(model(depth).to(dtype))
    with torch.no_grad(), seeded(2):
        for part in (learngene.base, learngene.slope):
            for p in part.parameters():
                p.add_(0.2 * torch.randn_like(p))
    return learngene


X = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
SURGERY = TLEG(blocks="encoder.layers")
test_contract = contract(
    SURGERY,
    model=model,
    starts_same=False,
    trainable=lambda model: 2 * sizes(model)[0] + sizes(model)[1],
    refuses=[
        lambda: TLEG(slope=-1.0),
        lambda: TLEG(start="last"),
        lambda: SURGERY.fold(nn.Linear(2, 2)),
        lambda: SURGERY.apply(model()).expand(0),
        lambda: SURGERY.apply(model()).expand(2.0),
    ],
)
test_fitted = contract(
    TLEG(blocks="encoder.layers", start="fitted"),
    model=lambda: trained().expand(4),
    trainable=lambda model: 2 * sizes(model)[0] + sizes(model)[1],
)


def blocks_of(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    return [dict(block.named_parameters()) for block in model.encoder.layers]


def test_1_at_the_trained_depth_the_expanded_model_computes_the_auxiliary_model():
    for learngene in (trained(4), trained(4).eval()):
        expanded = learngene.expand(4)
        torch.testing.assert_close(expanded(X), learngene(X), rtol=0, atol=1e-6)
        assert type(expanded) is Patches
        assert expanded.training == learngene.training


def test_2_without_a_slope_all_blocks_are_equal():
    learngene = TLEG(blocks="encoder.layers", slope=0.0).apply(model())
    for depth in (1, 3, 8):
        first, *others = blocks_of(learngene.expand(depth))
        for other in others:
            assert all(torch.equal(first[name], other[name]) for name in first)
    assert all(torch.equal(p, dict(model().encoder.layers[0].named_parameters())[n]) for n, p in first.items())


def test_3_one_block_is_the_base_and_the_second_of_two_lies_half_a_slope_on():
    learngene = trained()
    base, slope = dict(learngene.base.named_parameters()), dict(learngene.slope.named_parameters())
    (only,) = blocks_of(learngene.expand(1))
    first, second = blocks_of(learngene.expand(2))
    for name in base:
        assert torch.equal(only[name], base[name])
        assert torch.equal(first[name], base[name])
        assert torch.equal(second[name], base[name] + slope[name] / 2)


@pytest.mark.parametrize("depth", [2, 5, 12])
def test_4_consecutive_blocks_of_every_tensor_differ_by_the_slope_over_the_depth(depth):
    learngene = trained(dtype=torch.float64)
    slope = dict(learngene.slope.named_parameters())
    each = blocks_of(learngene.expand(depth))
    assert set(slope) == set(each[0])
    assert all(p.abs().sum() > 0 for p in slope.values())  # norms and biases are part of it
    for here, after in pairwise(each):
        for name in slope:
            torch.testing.assert_close(after[name] - here[name], slope[name] / depth, rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(
    depth=st.integers(1, 24),
    times=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_5_block_k_j_of_depth_k_l_is_block_j_of_depth_l_bit_for_bit(depth, times, dtype):
    base, slope = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(depth)).to(dtype)
    few, many = along(base, slope, depth), along(base, slope, times * depth)
    assert few.dtype == dtype
    assert torch.equal(many[::times], few)


def test_6_gradients_are_the_sums_of_the_blocks_gradients():
    learngene = trained(4, torch.float64)
    expanded = learngene.expand(4)
    for one in (learngene, expanded):
        F.cross_entropy(one(X.double()), torch.tensor([0, 1, 2, 3, 4])).backward()
    each = blocks_of(expanded)
    for name, base in learngene.base.named_parameters():
        slope = learngene.slope.get_parameter(name)
        torch.testing.assert_close(base.grad, sum(one[name].grad for one in each))
        torch.testing.assert_close(slope.grad, sum(k / 4 * one[name].grad for k, one in enumerate(each)))
    torch.testing.assert_close(learngene.model.head.weight.grad, expanded.head.weight.grad)


@pytest.mark.parametrize("depth", [2, 3, 12])
def test_7_least_squares_give_base_and_slope_back(depth):
    learngene = trained(dtype=torch.float64)
    fitted = TLEG(blocks="encoder.layers", start="fitted").apply(learngene.expand(depth))
    for name, p in learngene.named_parameters():
        torch.testing.assert_close(fitted.get_parameter(name), p, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("depth", [2, 7])
def test_8_the_learngene_counts_two_blocks_and_the_shared_parts_and_so_does_its_file(depth, tmp_path):
    block, shared = sizes(model(depth))
    learngene = trained(depth)
    assert sum(p.numel() for p in learngene.parameters()) == 2 * block + shared
    save_weights(learngene.state_dict(), tmp_path)
    stored = LazyWeights(tmp_path)
    assert sum(stored[name].numel() for name in stored) == 2 * block + shared
    again = SURGERY.apply(model(4, seed=9))  # of another depth
    again.load_state_dict({name: stored[name] for name in stored})
    assert not difference(again.expand(5), learngene.expand(5))


def test_8_the_loss_of_the_first_stage_is_zero_at_the_teacher_and_cross_entropy_without_it():
    learngene, y = trained().eval(), torch.arange(5)
    step = Step(learngene, Batch(X, y))
    teacher = SoftTargets(freeze(learngene.expand(3)).eval(), temperature=1.0)
    assert teacher(step).item() == pytest.approx(0, abs=1e-6)
    other = SoftTargets(freeze(model(seed=5)), temperature=1.0)
    assert other(step).item() > 0.01
    mixed = Weighted(0.0, other)(step) + Weighted(1.0, CrossEntropy())(step)
    torch.testing.assert_close(mixed, F.cross_entropy(learngene(X), y))


def test_is_a_slow_loop_over_layers_and_tensors():
    learngene = trained(5)
    slow = model(5)
    slow.load_state_dict({k: v for k, v in learngene.model.state_dict().items() if ".layers." not in k}, strict=False)
    with torch.no_grad():
        for k, block in enumerate(slow.encoder.layers):
            for name, p in block.named_parameters():
                p.copy_(learngene.base.get_parameter(name) + k / 5 * learngene.slope.get_parameter(name))
    torch.testing.assert_close(learngene(X), slow(X))


def test_the_first_start_is_the_first_block_and_a_normal_slope_for_matrices_only():
    fresh = model(width=64)
    learngene = TLEG(blocks="encoder.layers", slope=0.05).apply(fresh)
    for name, p in learngene.slope.named_parameters():
        assert torch.equal(learngene.base.get_parameter(name), fresh.encoder.layers[0].get_parameter(name))
        if p.dim() == 1:
            assert not p.any()
        else:
            assert abs(float(p.detach().std()) / 0.05 - 1) < 0.05
            assert abs(float(p.detach().mean())) < 0.005
    other = TLEG(blocks="encoder.layers", slope=0.05, seed=1).apply(fresh)
    assert difference(dict(learngene.slope.named_parameters()), dict(other.slope.named_parameters()))


def test_a_plan_trains_it_and_the_fold_is_an_ordinary_model():
    x, y = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 10
    plan = Plan(model=model(), stream=Batches(x=x, y=y), steps=60, optimizer=adamw(lr=0.01))
    fitted = fit(plan.under(SURGERY), device="cpu")
    assert fitted.history["task"][-1] < 0.7 * fitted.history["task"][0]
    assert str(fitted.model) == str(model())
    first, second, third = blocks_of(fitted.model)
    for name in first:
        torch.testing.assert_close(third[name] - second[name], second[name] - first[name], rtol=1e-4, atol=1e-6)
    assert not any(p.data_ptr() == q.data_ptr() for p in first.values() for q in second.values())


def test_a_descendants_training_leaves_the_learngene_alone():
    learngene = trained()
    before, state = copy.deepcopy(learngene), random_state()
    expanded = learngene.expand(6)
    assert not difference(state, random_state())
    with torch.no_grad():
        for p in expanded.parameters():
            p.zero_()
    assert not difference(before, learngene)


def test_a_frozen_part_stays_frozen_and_shared():
    frozen = model()
    frozen.enter.requires_grad_(False)
    learngene = SURGERY.apply(frozen)
    assert learngene.model.enter.weight is frozen.enter.weight
    assert not learngene.expand(2).enter.weight.requires_grad


def test_half_precision_is_combined_in_float32_and_rounded_once():
    base, slope = torch.tensor([256.0, 1.0]).bfloat16(), torch.tensor([3.0, 1 / 3]).bfloat16()
    expected = (base.float() + torch.arange(4)[:, None] / 4 * slope.float()).bfloat16()
    assert torch.equal(along(base, slope, 4), expected)
    assert trained(dtype=torch.bfloat16).expand(5).head.weight.dtype == torch.bfloat16


def test_a_model_of_this_library_grows():
    with seeded(0):
        net = Attention(10, width=16, depth=2).eval()
    learngene, x = TLEG().apply(net), torch.randn(2, 3, 32, 32)
    assert not learngene.training
    with torch.no_grad():
        torch.testing.assert_close(learngene.expand(2)(x), learngene(x), rtol=0, atol=1e-6)
    assert learngene.expand(5)(x).shape == (2, 10)


def test_another_head_is_kept_only_where_it_is_said_so():
    learngene, other = trained(), model(5, classes=3)
    with pytest.raises(Refused, match=r"'head.weight' must have one shape; got \(10, 12\) in the learngene, \(3, 12\)"):
        learngene.expand(5, into=other)
    filled = learngene.expand(5, into=other, keep=("head",))
    assert torch.equal(filled.head.weight, other.head.weight)
    assert torch.equal(filled.place, learngene.model.place)
    assert not difference(blocks_of(filled), blocks_of(learngene.expand(5)))
    assert not difference(other, model(5, classes=3))


def test_a_frozen_model_to_fill_is_not_written_to():
    other = freeze(model(5, seed=8))
    filled = trained().expand(5, into=other)
    assert not difference(other, freeze(model(5, seed=8)))
    torch.testing.assert_close(filled(X), trained().expand(5)(X))


def test_blocks_that_alternate_are_cut_or_filled_but_not_copied():
    def alternating(depth: int) -> nn.Module:
        net = model(depth)
        for k, block in enumerate(net.encoder.layers):
            block.activation = (nn.GELU(), nn.ReLU())[k % 2]
        return net

    learngene = SURGERY.apply(alternating(4))
    with pytest.raises(
        Refused, match=r"of one kind; got another \['approximate', 'class'\] from block to block. .*into="
    ):
        learngene.expand(5)
    torch.testing.assert_close(learngene.expand(4)(X), learngene(X))
    assert not difference(learngene.expand(2), learngene.expand(2, into=alternating(2)))
    assert len(learngene.expand(5, into=alternating(5)).encoder.layers) == 5


def test_refuses_descendants_it_cannot_fill():
    learngene = trained()
    heads = model()
    for block in heads.encoder.layers:
        block.self_attn = nn.MultiheadAttention(12, 3, batch_first=True)
    with pytest.raises(Refused, match=r"of one kind; got another \['self_attn.head_dim', 'self_attn.num_heads'\]"):
        learngene.expand(3, into=heads)
    with pytest.raises(Refused, match="keep= needs into="):
        learngene.expand(3, keep=("encoder",))
    with pytest.raises(Refused, match="must have 5 blocks; got 4"):
        learngene.expand(5, into=model(4))
    with pytest.raises(Refused, match=r"'linear1.in_features', .*learngene's width"):
        learngene.expand(3, into=model(3, width=16))
    renamed = model()
    renamed.last = renamed._modules.pop("head")
    with pytest.raises(Refused, match=r"'head.bias', 'head.weight', 'last.bias'\] in only one"):
        learngene.expand(3, into=renamed)
    with pytest.raises(Refused, match="only one"):
        learngene.expand(3, into=renamed, keep=("last",))
    with pytest.raises(Refused, match="keep= must name parts"):
        learngene.expand(3, into=model(), keep=("haed",))
    wider = model()
    wider.encoder.layers = nn.ModuleList([nn.Linear(12, 12) for _ in range(3)])
    with pytest.raises(Refused, match=r"of one kind; got another \['activation_relu_or_gelu', 'class'"):
        learngene.expand(3, into=wider)


def test_refuses_models_without_equal_blocks_of_their_own():
    with pytest.raises(Refused, match=r"Did you mean 'encoder\.layers'"):
        TLEG(blocks="encoder.layer").apply(model())
    with pytest.raises(Refused, match="must name a list of blocks; got 'head', a Linear"):
        TLEG(blocks="head").apply(model())
    with pytest.raises(Refused, match="at least 2 blocks; got 1"):
        SURGERY.apply(model(1))
    for blocks, why in (
        ([nn.Linear(2, 2), nn.Linear(2, 3)], r"block 1 with \['bias', 'weight'\]"),
        ([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)], r"block 1 with \['bias'\]"),
        ([nn.ReLU(), nn.ReLU()], "block 0 with none"),
        ([nn.BatchNorm1d(2), nn.BatchNorm1d(2)], "no statistics of their own"),
        ([nn.Linear(2, 2)] * 2, r"own its tensors; got shared \['weight', 'bias', 'weight'\]"),
    ):
        with pytest.raises(Refused, match=why):
            TLEG().apply(nn.ModuleDict({"blocks": nn.Sequential(*blocks)}))
    tied = model()
    tied.tied = tied.encoder.layers[1].linear1
    with pytest.raises(Refused, match="own its tensors"):
        SURGERY.apply(tied)


def test_the_report_is_one_on_a_line_chance_on_noise_and_never_nan():
    line = linearity_report(trained().expand(8), "encoder.layers")
    assert line.overall == pytest.approx(1)
    assert all(share == pytest.approx(1) for share in line.explained.values())
    constant = linearity_report(TLEG(blocks="encoder.layers", slope=0.0).apply(model()).expand(3), "encoder.layers")
    assert set(constant.explained.values()) == {1.0} == {constant.overall}
    with seeded(0):
        noise = linearity_report(nn.ModuleDict({"blocks": nn.Sequential(*[nn.Linear(200, 200) for _ in range(6)])}))
    assert noise.overall == pytest.approx(noise.by_chance, rel=0.03)
    assert noise.by_chance == 1 / 5
    with pytest.raises(Refused, match="at least 3 blocks; got 2"):
        linearity_report(model(2), "encoder.layers")
    spoiled = model()
    with torch.no_grad():
        spoiled.encoder.layers[2].linear1.bias[0] = torch.nan
    with pytest.raises(Refused, match=r"'linear1\.bias' of the blocks must be finite"):
        linearity_report(spoiled, "encoder.layers")


@settings(deadline=None, max_examples=25)
@given(depth=st.integers(3, 9), seed=st.integers(0, 99))
def test_the_report_is_numpys_polynomial_fit(depth, seed):
    with seeded(seed):
        net = nn.ModuleDict({"blocks": nn.Sequential(*[nn.Linear(2, 3) for _ in range(depth)])})
    report = linearity_report(net)
    rows = torch.stack([block.weight.detach().flatten().double() for block in net["blocks"]])
    places = torch.arange(depth, dtype=torch.float64) / depth
    design = torch.stack([torch.ones_like(places), places], 1)
    left = rows - design @ torch.linalg.lstsq(design, rows).solution
    expected = 1 - left.square().sum() / (rows - rows.mean(0)).square().sum()
    assert report.explained["weight"] == pytest.approx(float(expected), abs=1e-9)


transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}


def of_transformers(kind: str) -> SimpleNamespace:
    """A tiny model, its inputs, and the name of its blocks."""
    ids = torch.tensor([[1, 5, 7, 2], [3, 3, 9, 4]])
    text, rotary = SMALL | {"vocab_size": 20}, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    made = {
        "bert": ("BertForSequenceClassification", transformers.BertConfig(**text), "bert.encoder.layer", ids),
        "vit": ("ViTForImageClassification", transformers.ViTConfig(**SMALL, image_size=8, patch_size=4), None,
                torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))),
        "qwen2": ("Qwen2ForCausalLM", transformers.Qwen2Config(**text, **rotary, num_key_value_heads=2), "model.layers", ids),
        "gpt2": ("GPT2LMHeadModel", transformers.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=20, n_positions=32, **rotary), "transformer.h", ids),
    }  # fmt: skip
    name, config, blocks, x = made[kind]
    with seeded(3):
        net = getattr(transformers, name)(config).eval()
        for p in net.parameters():  # biases too: zeros would hide a tensor that is not filled
            p.data.add_(0.05 * torch.randn_like(p))
    if blocks is None:  # the list was renamed between versions
        blocks = next(n for n, m in net.named_modules() if isinstance(m, nn.ModuleList))
    return SimpleNamespace(model=net, blocks=blocks, x=x)


@pytest.mark.parametrize("kind", ["bert", "vit", "qwen2", "gpt2"])
def test_models_of_transformers_grow_save_and_reload(kind, tmp_path):
    of = of_transformers(kind)
    learngene = TLEG(blocks=of.blocks, slope=0.3).apply(of.model)
    with torch.no_grad():
        torch.testing.assert_close(learngene.expand(3)(of.x).logits, learngene(of.x).logits, rtol=0, atol=1e-6)
    for depth in (2, 6):
        grown = learngene.expand(depth)
        assert (grown.config.num_hidden_layers, of.model.config.num_hidden_layers) == (depth, 3)
        grown.save_pretrained(tmp_path / str(depth))
        again, seen = type(of.model).from_pretrained(tmp_path / str(depth), output_loading_info=True)
        assert not any(seen[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            assert torch.equal(again.eval()(of.x).logits, grown(of.x).logits)
        for k, block in enumerate(again.get_submodule(of.blocks)):
            for name, p in block.named_parameters():
                expected = learngene.base.get_parameter(name) + k / depth * learngene.slope.get_parameter(name)
                torch.testing.assert_close(p, expected)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_a_grown_language_model_numbers_its_layers_so_that_its_cache_works(kind):
    of = of_transformers(kind)
    grown = TLEG(blocks=of.blocks, slope=0.3).apply(of.model).expand(6)
    told = [m.layer_idx for _, m in grown.named_modules() if "layer_idx" in vars(m)]
    assert told == list(range(6))
    with_cache, without = (
        grown.generate(of.x, attention_mask=torch.ones_like(of.x), max_new_tokens=6, do_sample=False, use_cache=cached)
        for cached in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_refuses_configurations_that_would_be_wrong():
    of = of_transformers("qwen2")
    of.model.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(Refused, match="Blocks must be of one kind"):
        TLEG(blocks=of.blocks).apply(of.model).expand(4)
    with seeded(0):
        config = transformers.BartConfig(d_model=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                                         decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, vocab_size=20)  # fmt: skip
        bart = transformers.BartModel(config)
    learngene = TLEG(blocks="encoder.layers").apply(bart)
    with pytest.raises(Refused, match=r"num_hidden_layers.*pass it as into="):
        learngene.expand(4)
    config = copy.deepcopy(bart.config)
    config.encoder_layers = 4
    with seeded(0):
        assert len(learngene.expand(4, into=transformers.BartModel(config)).encoder.layers) == 4


def test_a_vision_transformer_of_timm_grows():
    timm = pytest.importorskip("timm")
    build = timm.models.vision_transformer.VisionTransformer
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "num_heads": 2, "num_classes": 5,
               "class_token": False, "global_pool": "avg"}  # fmt: skip
    with seeded(0):
        net, deep = (build(**options, depth=depth).eval() for depth in (3, 7))
    learngene, x = TLEG().apply(net), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(learngene.expand(3)(x), learngene(x), rtol=0, atol=1e-6)
        assert torch.equal(learngene.expand(7, into=deep)(x), learngene.expand(7)(x))
