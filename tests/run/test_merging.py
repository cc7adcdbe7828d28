"""Merges of real models on disk: written, accounted for, and loaded again by the library they came from."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headstart.core import write
from headstart.core.validate import Refused
from headstart.core.weights import LazyWeights, fingerprint, save_weights
from headstart.merge import Average, Dare, Della, Slerp, TaskArithmetic, Ties
from headstart.run.conflicts import Watched
from headstart.run.ingredients import Selected, common_tensors, open_ingredient
from headstart.run.merging import merge_models
from headstart.testing.subject import difference

transformers = pytest.importorskip("transformers")


def small(kind: str) -> torch.nn.Module:
    """A tiny model of a family, its weights drawn by the caller's seed."""
    t = transformers
    text = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 24, "max_position_embeddings": 12}  # fmt: skip
    if kind == "bert":
        return t.BertForSequenceClassification(t.BertConfig(**text, num_labels=3))
    if kind == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**text, num_key_value_heads=1, tie_word_embeddings=True))
    if kind == "t5":
        return t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    own = {**text, "num_hidden_layers": 1, "bos_token_id": 0, "eos_token_id": 1}
    return t.CLIPModel(t.CLIPConfig(text_config=own, vision_config=vision, projection_dim=8))


def inputs(kind: str) -> dict[str, Tensor]:
    ids = torch.arange(2, 12).view(2, 5)
    more = {"t5": {"decoder_input_ids": ids}, "clip": {"pixel_values": torch.ones(1, 3, 8, 8)}}
    return {"input_ids": ids, **more.get(kind, {})}


def answer(model: torch.nn.Module, kind: str) -> Tensor:
    with torch.no_grad():
        said = model.eval()(**inputs(kind))
    return said.logits_per_text if kind == "clip" else said.logits


def family(kind: str, folder: Path, k: int = 2, dtype: torch.dtype = torch.float32) -> tuple[list[Path], Path]:
    """A base and k models a little away from it, saved by transformers."""
    places = []
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.random.manual_seed(0)
        base = small(kind)
        start = {name: value.clone() for name, value in base.state_dict().items()}
        for j in range(k + 1):
            moved = {name: value + 0.05 * torch.randn_like(value) * (j > 0) if value.is_floating_point() else value
                     for name, value in start.items()}  # fmt: skip
            base.load_state_dict(moved)
            base.tie_weights()
            places.append(folder / ("base" if j == 0 else "abc"[j - 1]))
            base.to(dtype).save_pretrained(places[-1])
            base.float()
    return places[1:], places[0]


@pytest.mark.parametrize("kind", ["bert", "llama", "t5", "clip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_of_transformers_load_again_where_they_came_from(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    models, base = family(kind, tmp_path, dtype=dtype)
    merged = merge_models(Ties(density=0.5), [open_ingredient(str(m)) for m in models], tmp_path / "out",
                          base=open_ingredient(str(base)))  # fmt: skip
    again, loading = type(small(kind)).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), "transformers found missing, unexpected or misshapen weights"
    start = type(again).from_pretrained(base)
    own = [type(again).from_pretrained(m).state_dict() for m in models]
    if kind == "llama":  # the tied output is no tensor of its own on disk
        own = [{name: w for name, w in one.items() if name != "lm_head.weight"} for one in own]
    expected = Ties(density=0.5).merge(own, base={name: start.state_dict()[name] for name in own[0]})
    on_disk = LazyWeights(tmp_path / "out")
    assert all(torch.equal(on_disk[name], expected[name]) for name in on_disk)
    assert answer(again, kind).shape == answer(start, kind).shape
    assert not torch.equal(answer(again, kind), answer(start, kind))
    assert merged.settings_from == str(models[0])
    if kind == "llama":
        assert again.lm_head.weight is again.model.embed_tokens.weight


def test_a_headstart_export_stays_one_and_a_run_counts_as_its_model(tmp_path: Path) -> None:
    from headstart.run.predict import load
    from headstart.zoo.export import export_model
    from headstart.zoo.resolve import resolve

    [source], _ = resolve("mini:cnn-letters")
    model = source.load()
    places = []
    for k in range(3):
        with torch.no_grad(), torch.random.fork_rng():
            torch.random.manual_seed(k)
            for p in model.parameters():
                p.add_(0.01 * torch.randn_like(p))
        places.append(export_model(model, tmp_path / str(k) / "model", source=source, classes=source.classes))
    out = tmp_path / "out"
    merge_models(Average(), [open_ingredient(str(place.parent)) for place in places], out)
    merged = load(out)
    assert merged.classes == source.classes
    whole = Average().merge([LazyWeights(place) for place in places])
    assert not difference(whole, {name: merged.model.state_dict()[name] for name in whole})


def test_the_account_says_what_happened(tmp_path: Path) -> None:
    base = {"w": torch.zeros(4), "v": torch.ones(2), "n": torch.tensor(3)}
    one = {"w": torch.tensor([1.0, 2.0, 0.1, 0.0]), "v": torch.ones(2), "n": torch.tensor(4)}
    two = {"w": torch.tensor([3.0, -1.0, 0.0, 0.0]), "v": torch.ones(2), "n": torch.tensor(5)}
    for name, weights in (("base", base), ("one", one), ("two", two)):
        save_weights(weights, tmp_path / name)
    models = [open_ingredient(str(tmp_path / name)) for name in ("one", "two")]
    rule = Ties(density=0.5, trim="tensor")
    merge_models(rule, models, tmp_path / "out", base=open_ingredient(str(tmp_path / "base")))
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    found = record["tensors"]["w"]
    assert found["entries"] == 4
    assert found["sign_disagreement"] == pytest.approx(1 / 3)  # one of the three places that changed
    assert found["trimmed"] == [pytest.approx(1 / 3), 0.0]  # 0.1 of the first; the second had two changes
    assert found["norm_ratio"] == pytest.approx((2**2 + 2**2) ** 0.5 / ((5.01 + 10) / 2) ** 0.5, rel=1e-5)
    assert record["total"]["distance"] == [pytest.approx((5.01 / 2) ** 0.5), pytest.approx((10 / 2) ** 0.5)]
    assert record["tensors"]["v"]["distance"] == [0, 0]
    assert "n" not in record["tensors"]
    assert int(LazyWeights(tmp_path / "out")["n"]) == 3
    assert "no common ancestor" in record["warnings"][0]
    assert eval(record["rule"], {"Ties": Ties}) == rule
    assert record["models"][0]["sha256"] == models[0].digest()
    assert "| --- |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("rule", [Average(), TaskArithmetic(), Ties(density=0.3), Dare(density=0.5), Della(), Slerp()])
def test_watching_changes_nothing(rule, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(30, 7, generator=g), "b": torch.randn(7, generator=g).half()}
    models = [{n: (w + torch.randn(w.shape, generator=g)).to(w.dtype).round(decimals=1) for n, w in base.items()}
              for _ in range(2)]  # fmt: skip
    from headstart.core.weights import merge_streaming

    watched = Watched(rule)
    assert not difference(rule.merge(models, base=base), dict(merge_streaming(watched, models, base=base)))
    assert watched.tallies["w"].entries == 210
    assert watched.tallies["w"].disputed == int(
        ((models[0]["w"] - base["w"]).sign() * (models[1]["w"] - base["w"]).sign() < 0).sum()
    )


def test_tensors_that_do_not_fit_are_refused_skipped_or_left_out(tmp_path: Path) -> None:
    one = {"body": torch.ones(2), "head": torch.ones(3, 2), "extra": torch.ones(1)}
    two = {"body": torch.zeros(2), "head": torch.zeros(5, 2)}
    with pytest.raises(Refused, match=r"'head' \[3, 2\] in A, \[5, 2\] in B; 'extra' not in B.*--on-mismatch skip"):
        common_tensors(["A", "B"], [one, two], "error")
    for name, weights in (("one", one), ("two", two)):
        save_weights(weights, tmp_path / name)
    models = [open_ingredient(str(tmp_path / name)) for name in ("one", "two")]
    merge_models(Average(), models, tmp_path / "skip", on_mismatch="skip")
    skipped = LazyWeights(tmp_path / "skip")
    assert {name: skipped[name].mean().item() for name in skipped} == {"body": 0.5, "head": 1.0, "extra": 1.0}
    merge_models(Average(), models, tmp_path / "less", on_mismatch="intersect")
    assert list(LazyWeights(tmp_path / "less")) == ["body"]
    with pytest.raises(Refused, match="a tensor in common; got none"):
        common_tensors(["A", "B"], [{"a": torch.ones(1)}, {"b": torch.ones(1)}], "skip")


def test_nothing_is_left_behind_or_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_weights({"w": torch.ones(2)}, tmp_path / "a")
    save_weights({"w": torch.tensor([1.0, torch.nan])}, tmp_path / "b")
    a, b = (open_ingredient(str(tmp_path / name)) for name in "ab")
    with pytest.raises(Refused, match="'w' must be finite"):
        merge_models(Average(), [a, b], tmp_path / "out")
    with pytest.raises(Refused, match="new or empty folder"):
        merge_models(Average(), [a, a], tmp_path / "b")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "_claim", full)
    with pytest.raises(Refused, match=r"No space left on device\. Free space"):
        merge_models(Average(), [a, a], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_ingredients_are_recognised(tmp_path: Path) -> None:
    save_weights({"w": torch.ones(2)}, tmp_path / "run" / "model")
    weights = tmp_path / "run" / "model" / "model.safetensors"
    expected = fingerprint(LazyWeights(weights))
    for where in (tmp_path / "run", tmp_path / "run" / "model", weights):
        assert fingerprint(open_ingredient(str(where)).weights) == expected
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(Refused, match="pickled; not loaded"):
        open_ingredient(str(tmp_path / "bad"))
    chosen = Selected({"a": torch.ones(2), "b": torch.ones(1)}, ["b"])
    assert list(chosen) == ["b"]
    with pytest.raises(KeyError):
        chosen["a"]
