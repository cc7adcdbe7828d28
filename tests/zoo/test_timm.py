"""`timm:` sources give what timm gives; exported models come back through timm itself."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from headstart.core.surgery import with_head
from headstart.core.taps import tapped
from headstart.core.validate import Refused
from headstart.zoo.directory import load_model_directory
from headstart.zoo.export import export_model
from headstart.zoo.timm_source import timm_source

try:
    import timm
except (ImportError, RuntimeError) as problem:  # a torchvision of another torch fails with RuntimeError
    pytest.skip(f"timm cannot be imported: {problem}", allow_module_level=True)

LABELS = ["ash", "birch", "cedar", "date", "elm"]


@pytest.fixture
def save_timm(tmp_path):
    """`save_timm("resnet10t")` writes a folder as timm's own save_for_hf does."""

    def save(architecture="resnet10t", name="", **settings):
        folder = tmp_path / (name or architecture)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = timm.create_model(architecture, pretrained=False, **{"num_classes": 5, **settings})
        config = {"label_names": LABELS} if model.num_classes == 5 else {}
        timm.models.save_for_hf(model, folder, config, safe_serialization=True)
        return folder

    return save


SMALL_VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("architecture", "settings", "head"),
    [
        ("resnet10t", {}, "fc"),
        ("convnext_atto", {}, "head.fc"),
        ("mobilenetv3_small_050", {}, "classifier"),
        ("vit_tiny_patch16_224", SMALL_VIT, "head"),
    ],
)
def test_logits_and_preprocessing_are_those_of_timm(architecture, settings, head, save_timm, pictures):
    from PIL import Image

    folder = save_timm(architecture, **settings)
    source = timm_source(str(folder))
    assert (source.modality, source.kind, source.head) == ("image", "timm", head)
    assert source.classes == tuple(LABELS)
    reference: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(reference), is_training=False)
    batch = source.preprocess(pictures)
    assert torch.equal(batch, torch.stack([transform(Image.fromarray(picture)) for picture in pictures]))
    assert batch.shape[1:] == source.facts["input_size"]
    model = source.load()
    with torch.no_grad():
        assert torch.equal(model(batch), reference(batch))
    assert not model.training
    assert isinstance(model.get_submodule(head), nn.Linear)


def test_a_model_without_classes_gets_an_empty_head_over_its_features(save_timm, pictures):
    folder = save_timm("resnet10t", num_classes=0)
    source = timm_source(str(folder))
    assert (source.head, source.classes) == ("fc", ())
    model = source.load()
    batch = source.preprocess(pictures)
    reference = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad(), tapped(model, ["fc:input"]) as seen:
        assert model(batch).shape == (4, 0)
        assert torch.equal(seen["fc:input"], reference(batch))


@pytest.mark.parametrize(("start", "architecture"), [(5, "resnet10t"), (0, "resnet10t"), (5, "vit_tiny_patch16_224")])
def test_timm_reloads_an_export_with_the_same_logits(start, architecture, save_timm, pictures, tmp_path):
    settings = SMALL_VIT if "vit" in architecture else {}
    source = timm_source(str(save_timm(architecture, num_classes=start, **settings)))
    model = with_head(source.load(), 3, source.head).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    out = export_model(model, tmp_path / "m", source=source, classes=["a", "b", "c"])
    batch = source.preprocess(pictures)
    reference: Any = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    ours, preprocess, classes = load_model_directory(out)
    with torch.no_grad():
        assert torch.equal(reference(batch), model(batch))
        assert torch.equal(ours(preprocess(pictures)), model(batch))
    assert classes == ("a", "b", "c")
    assert reference.pretrained_cfg["label_names"] == ["a", "b", "c"]


def test_listing_reads_no_weights_and_loading_draws_no_random_numbers(save_timm):
    folder = save_timm()
    source = timm_source(str(folder))
    state = torch.random.get_rng_state()
    source.load()
    assert torch.equal(torch.random.get_rng_state(), state)
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(Refused, match="must hold the weights of resnet10t"):
        source.load()


@pytest.mark.parametrize(("change", "told"), [("drop", "Missing"), ("reshape", "size mismatch"), ("add", "Unexpected")])
def test_weights_that_do_not_fit_are_refused_by_name(change, told, save_timm):
    folder = save_timm()
    weights = load_file(folder / "model.safetensors")
    key = "layer1.0.conv1.weight"
    if change == "drop":
        del weights[key]
    elif change == "reshape":
        weights[key] = torch.zeros(7, 16, 1, 1)
    else:
        key = "layer9.weight"
        weights[key] = torch.zeros(2)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(Refused, match=rf"{told}.*{key}"):
        timm_source(str(folder)).load()


def test_a_pickled_checkpoint_is_never_opened(save_timm):
    folder = save_timm()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(Refused, match=r"unpickling runs.*pytorch_model\.bin"):
        timm_source(str(folder))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_args": {"checkpoint_path": "/elsewhere/x.pth"}}, "model_args"),
        ({"architecture": "hf-hub:other/model"}, "architecture that timm knows"),
        ({"architecture": "local-dir:../other"}, "architecture that timm knows"),
    ],
)
def test_a_configuration_cannot_lead_out_of_its_folder(change, told, save_timm):
    folder = save_timm()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(Refused, match=told):
        timm_source(str(folder))


def test_a_file_named_in_pretrained_cfg_is_ignored(save_timm, tmp_path):
    folder, other = save_timm(), save_timm(name="other")
    weights = load_file(other / "model.safetensors")
    save_file({key: torch.zeros_like(value) for key, value in weights.items()}, other / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"].update(file=str(other / "model.safetensors"), source="local-dir")
    (folder / "config.json").write_text(json.dumps(config))
    assert timm_source(str(folder)).load().state_dict()["fc.weight"].abs().max() > 0


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(Refused, match="Did you mean 'resnet18'"):
        timm_source("resnet_18")
    with pytest.raises(Refused, match="known weights"):
        timm_source("resnet18.no_such_tag")


def test_a_timm_name_works_offline_from_the_cache(tmp_path, monkeypatch, save_timm, pictures):
    import huggingface_hub.constants as constants

    repo = tmp_path / "cache" / ("models--" + timm.models.get_pretrained_cfg("resnet10t").hf_hub_id.replace("/", "--"))
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("c0ffee")
    (repo / "snapshots").mkdir()
    save_timm().rename(repo / "snapshots" / "c0ffee")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("resnet10t", "hf-hub:" + timm.models.get_pretrained_cfg("resnet10t").hf_hub_id):
        source = timm_source(name)
        assert source.name == f"timm:{name}"
        with torch.no_grad():
            assert source.load()(source.preprocess(pictures)).shape == (4, 5)
    with pytest.raises(Refused, match="HF_HUB_OFFLINE"):
        timm_source("resnet18")


def test_pixels_follow_the_models_own_statistics(save_timm):
    folder = save_timm()
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"].update(mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 0.125])
    (folder / "config.json").write_text(json.dumps(config))
    flat = np.full((40, 40, 3), 102, dtype=np.uint8)  # 102 / 255 = 0.4
    batch = timm_source(str(folder)).preprocess([flat])
    expected = (0.4 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.5, 0.25, 0.125])
    torch.testing.assert_close(batch[0, :, 50, 50], expected, rtol=0, atol=1e-5)
