"""Adapter folders: read as peft reads them, written so that peft loads them, summed as its merges say, folded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from headstart.core.validate import Refused
from headstart.core.weights import LazyWeights, save_weights
from headstart.merge import Average, Ties
from headstart.merge.adapters import read_adapter, sum_adapters, write_adapter
from headstart.merge.fold_adapter import fold_adapter
from headstart.merge.low_rank import Factors

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks


class Small(nn.Module):
    """A table, two layers of which one is square, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.kernel = nn.Conv1d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(self.table(x))))


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "small":
        return Small()
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=17, n_embd=8, n_layer=2, n_head=2, n_positions=16)
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
                                      num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def adapted(kind: str, seed: int, folder: Path, **settings) -> tuple[nn.Module, Path]:
    """A peft model with factors that do something, and its saved folder."""
    model = peft.get_peft_model(model_of(kind), peft.LoraConfig(**settings))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=g))
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval(), folder


def output(model: nn.Module, kind: str) -> Tensor:
    x = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        y = model(x)
    return y if kind == "small" else y.logits


CASES = {
    "plain": ("llama", {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]}),
    "rslora": ("llama", {"r": 3, "lora_alpha": 7, "target_modules": ["v_proj"], "use_rslora": True}),
    "patterns": ("llama", {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "up_proj"],
                           "rank_pattern": {"^model.layers.1.self_attn.q_proj": 5, "up_proj": 2},
                           "alpha_pattern": {r"layers\.0.*q_proj": 1, "mlp.up_proj": 11}}),
    "transposed": ("gpt2", {"r": 2, "lora_alpha": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "embedding": ("small", {"r": 2, "lora_alpha": 3, "target_modules": ["table", "first", "head"]}),
    "gaussian": ("small", {"r": 2, "lora_alpha": 3, "target_modules": ["first"], "init_lora_weights": "gaussian"}),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    kind, settings = CASES[request.param]
    return kind, *adapted(kind, 1, tmp_path / "one", **settings), settings


def test_the_change_is_the_one_peft_merges(case):
    kind, model, folder, _ = case
    expected = model.merge_and_unload().state_dict()
    base = model_of(kind).state_dict()
    found = fold_adapter(base, read_adapter(folder))
    assert list(found) == list(base) == list(expected)
    moved = [name for name in base if not torch.equal(found[name], base[name])]
    assert moved == [name for name in base if not torch.equal(expected[name], base[name])] != []
    for name in base:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


def test_what_is_written_peft_loads_and_it_computes_the_weighted_sum(case, tmp_path):
    kind, _, first, settings = case
    _, second = adapted(kind, 2, tmp_path / "two", **settings)
    adapters = [read_adapter(first), read_adapter(second)]
    total = sum_adapters(adapters, [0.7, -0.4])
    write_adapter({layer: one.factors for layer, one in total.items()}, tmp_path / "sum", base="tiny")
    loaded = peft.PeftModel.from_pretrained(model_of(kind), tmp_path / "sum").eval()
    model = model_of(kind)
    with torch.no_grad():
        for weight, adapter in zip([0.7, -0.4], adapters, strict=True):
            for layer, factors in adapter.items():
                model.get_parameter(f"{layer}.weight").add_(weight * factors.dense())
    torch.testing.assert_close(output(loaded, kind), output(model, kind), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output(loaded, kind), output(model_of(kind), kind), atol=1e-2)


def test_written_and_read_again_is_the_same_change(case, tmp_path):
    adapter = read_adapter(case[2])
    write_adapter(adapter, tmp_path / "again")
    again = read_adapter(tmp_path / "again")
    assert set(again) == set(adapter)
    for layer, factors in adapter.items():
        assert (again[layer].layout, again[layer].shape) == (factors.layout, factors.shape)
        torch.testing.assert_close(again[layer].dense(), factors.dense(), rtol=1e-6, atol=1e-7)


def test_a_pattern_names_whole_parts(tmp_path):
    _, folder = adapted("small", 0, tmp_path, r=2, lora_alpha=3, target_modules=["first"])
    config = json.loads((folder / "adapter_config.json").read_text())
    for pattern, scale in ((("irst", 99), 1.5), (("first", 99), 49.5), (("fir", 99), 1.5)):
        config["alpha_pattern"] = dict([pattern])
        (folder / "adapter_config.json").write_text(json.dumps(config))
        assert read_adapter(folder)["first"].scale == scale


# what peft's own merges compute


def both(tmp_path, rank=(3, 3)):
    settings = CASES["plain"][1]
    model, one = adapted("llama", 1, tmp_path / "one", **settings | {"r": rank[0]})
    _, two = adapted("llama", 2, tmp_path / "two", **settings | {"r": rank[1], "lora_alpha": 2})
    model.load_adapter(tmp_path / "two", "other")
    return model, [read_adapter(one), read_adapter(two)]


def change_of(model, layer: str) -> Tensor:
    with torch.no_grad():
        return model.base_model.model.get_submodule(layer).get_delta_weight("merged")


@pytest.mark.parametrize("rank", [(3, 3), (2, 4)])
def test_peft_svd_is_the_best_approximation_of_the_sum(tmp_path, rank):
    model, adapters = both(tmp_path, rank)
    model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "merged", combination_type="svd")
    ours = sum_adapters(adapters, [0.7, 0.4], rank=max(rank))  # peft's default is the largest rank
    for layer, total in ours.items():
        torch.testing.assert_close(total.factors.dense(), change_of(model, layer), rtol=1e-4, atol=1e-5)
        assert 0 < total.discarded < 1


def test_peft_cat_is_the_exact_sum(tmp_path):
    model, adapters = both(tmp_path, (2, 4))
    model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "merged", combination_type="cat")
    for layer, total in sum_adapters(adapters, [0.7, 0.4]).items():
        torch.testing.assert_close(total.factors.dense(), change_of(model, layer), rtol=1e-4, atol=1e-5)
        assert total.discarded == 0


def test_peft_linear_is_not_the_sum_but_the_product_of_sums(tmp_path):
    # (Σ √(w s) B) (Σ √(w s) A): every B meets every A
    model, adapters = both(tmp_path)
    model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "merged", combination_type="linear")
    for layer, total in sum_adapters(adapters, [0.7, 0.4]).items():
        own = [
            (one[layer], (weight * one[layer].scale) ** 0.5) for one, weight in zip(adapters, [0.7, 0.4], strict=True)
        ]
        product = sum(root * f.up for f, root in own) @ sum(root * f.down for f, root in own)
        torch.testing.assert_close(product, change_of(model, layer), rtol=1e-4, atol=1e-5)
        assert float((total.factors.dense() - product).norm() / product.norm()) > 0.3


# sums


def test_a_layer_that_one_lacks_it_leaves_alone():
    f = Factors(torch.ones(3, 1), torch.ones(1, 2), 2.0)
    total = sum_adapters([{"a": f}, {"a": f, "b": f}], [1.0, 3.0])
    torch.testing.assert_close(total["a"].factors.dense(), torch.full((3, 2), 8.0))
    torch.testing.assert_close(total["b"].factors.dense(), torch.full((3, 2), 6.0))


def test_ranks_and_scales_that_differ_are_written_as_one(tmp_path):
    g = torch.Generator().manual_seed(0)
    adapter = {name: Factors(torch.randn(6, r, generator=g), torch.randn(r, 6, generator=g), scale)
               for name, r, scale in (("first", 3, 2.0), ("head", 1, 0.3))}  # fmt: skip
    write_adapter(adapter, tmp_path, task="CAUSAL_LM")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (3, 3.0, "CAUSAL_LM")
    assert "rank_pattern" not in config
    assert load_file(tmp_path / "adapter_model.safetensors")["base_model.model.head.lora_A.weight"].shape == (3, 6)
    for layer, factors in read_adapter(tmp_path).items():
        torch.testing.assert_close(factors.dense(), adapter[layer].dense())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


# folding


def folded_pair(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.randn(7, 5, generator=g).to(dtype), "a.bias": torch.randn(7, generator=g).to(dtype),
            "steps": torch.tensor(3)}  # fmt: skip
    adapters = [{"a": Factors(torch.randn(7, 2, generator=g), torch.randn(2, 5, generator=g), s)} for s in (0.5, 2.0)]
    return base, adapters


def test_folded_adapters_are_models_for_any_rule(tmp_path):
    base, adapters = folded_pair()
    save_weights(base, tmp_path)
    dense = [base | {"a.weight": base["a.weight"] + one["a"].dense()} for one in adapters]
    for origin in (base, LazyWeights(tmp_path)):
        models = [fold_adapter(origin, one) for one in adapters]
        for rule in (Average(), Ties(density=0.4)):
            found = rule.merge(models, base=origin)
            expected = rule.merge(dense, base=base)
            assert all(torch.equal(found[name], expected[name]) for name in base)


def test_folded_parts_are_the_whole(tmp_path):
    base, adapters = folded_pair(torch.bfloat16)
    save_weights(base, tmp_path)
    for dtype in (None, torch.float32):
        model = fold_adapter(LazyWeights(tmp_path), adapters[0], dtype=dtype)
        whole = model["a.weight"]
        assert whole.dtype == (dtype or torch.bfloat16) == model.spec("a.weight").dtype
        assert whole.shape == model.spec("a.weight").shape
        assert model["a.bias"].dtype == torch.bfloat16 == model.spec("a.bias").dtype
        for start, stop in ((0, 35), (3, 4), (4, 17), (34, 35), (10, 10)):
            assert torch.equal(model.part("a.weight", start, stop), whole.flatten()[start:stop])
        assert torch.equal(model.part("a.bias", 2, 5), base["a.bias"][2:5])
        exact = base["a.weight"].float() + adapters[0]["a"].dense()
        torch.testing.assert_close(whole, exact.to(whole.dtype), rtol=0, atol=1e-6 if dtype else 0)
    assert len(model) == 3


def test_folding_refuses_a_base_that_does_not_fit():
    base, (one, _) = folded_pair()
    with pytest.raises(Refused, match=r"'b.weight'. Did you mean 'a.weight'"):
        fold_adapter(base, {"b": one["a"]})
    with pytest.raises(Refused, match=r"'a.weight', \(5, 7\).*got \(7, 5\). Set fan_in_fan_out"):
        fold_adapter({"a.weight": base["a.weight"].T}, one)
    with pytest.raises(Refused, match=r"Pass the base it was trained on"):
        fold_adapter({"a.weight": base["a.weight"][:4]}, one)


# refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["head"]}, r"modules_to_save=\['head'\]"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"something_new": 1}, "something_new=1"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"r": 4}, r"rank of adapter_config.json, 4; got \(6, 2\)"),
    ],
)
def test_refuses_what_is_not_plain_lora(tmp_path, change, message):
    _, folder = adapted("small", 0, tmp_path, r=2, target_modules=["first"])
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(Refused, match=message):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["first"], "use_dora": True}, "use_dora=True"),
        ({"target_modules": ["first"], "bias": "all"}, "bias='all'"),
        ({"target_modules": ["first"], "modules_to_save": ["head"]}, "modules_to_save"),
        ({"target_modules": ["kernel"]}, r"kernel.lora_[AB].weight' of a convolution"),
    ],
)
def test_refuses_what_peft_saves_of_other_kinds(tmp_path, settings, message):
    _, folder = adapted("small", 0, tmp_path, r=2, **settings)
    with pytest.raises(Refused, match=message):
        read_adapter(folder)


def test_refuses_ia3_as_saved(tmp_path):
    config = peft.IA3Config(target_modules=["first"], feedforward_modules=[])
    peft.get_peft_model(model_of("small"), config).save_pretrained(tmp_path)
    with pytest.raises(Refused, match=r"peft_type='IA3'. Fold it with peft"):
        read_adapter(tmp_path)


def test_refuses_files_that_are_missing_damaged_or_pickled(tmp_path):
    _, folder = adapted("small", 0, tmp_path / "good", r=2, target_modules=["first"])
    with pytest.raises(Refused, match="no such folder"):
        read_adapter(tmp_path / "nowhere")
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(Refused, match=r"adapter_model.bin.*never loaded"):
        read_adapter(pickled)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.first.lora_A.weight"
    bad = shutil.copytree(folder, tmp_path / "bad")
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != name}, r"'first' must have lora_A and lora_B; got \['B'\]"),
        (tensors | {"base_model.model.table.weight": torch.zeros(2, 2)}, "'base_model.model.table.weight'"),
        (tensors | {name: torch.full((2, 6), torch.nan)}, "12 NaN"),
        ({}, "low-rank factors only; got|low-rank factors; got none"),
    ):
        save_file(changed, bad / "adapter_model.safetensors")
        with pytest.raises(Refused, match=message):
            read_adapter(bad)
    for content, message in (
        ("[1]", "adapter_config.json must hold a JSON object; got list"),
        ("{", "must hold a JSON object; got JSONDecodeError"),
        ('{"peft_type": "LORA", "r": 2}', "must have r and lora_alpha; got {'r': 2, 'lora_alpha': None}"),
    ):
        (bad / "adapter_config.json").write_text(content)
        with pytest.raises(Refused, match=message):
            read_adapter(bad)


def test_refuses_sums_that_do_not_fit():
    f, g = Factors(torch.ones(3, 1), torch.ones(1, 2)), Factors(torch.ones(2, 1), torch.ones(1, 2))
    with pytest.raises(Refused, match="1 for 2"):
        sum_adapters([{"a": f}, {"a": f}], [1.0])
    with pytest.raises(Refused, match="0 for 0"):
        sum_adapters([])
    with pytest.raises(Refused, match="agree on layer 'a'"):
        sum_adapters([{"a": f}, {"a": g}])
    with pytest.raises(Refused, match="agree on layer 'a'"):
        sum_adapters([{"a": f}, {"a": Factors(f.up, f.down, layout="transposed")}])
    with pytest.raises(Refused, match="needs layers"):
        write_adapter({}, Path("unused"))
    with pytest.raises(Refused, match=r"stored alike; got \['linear', 'transposed'\]"):
        write_adapter({"a": f, "b": Factors(f.up, f.down, layout="transposed")}, Path("unused"))
