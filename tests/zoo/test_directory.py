"""`dir:PATH` finds every model in a folder, names what it leaves out, and never opens a pickle."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from headstart import nets
from headstart.core.surgery import with_head
from headstart.core.validate import Refused
from headstart.zoo.directory import load_model_directory, sources_in
from headstart.zoo.export import export_model
from headstart.zoo.mini import Squared
from headstart.zoo.source import Source


def fresh(classes: int = 5) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nets.build("cnn", classes).eval()


@pytest.fixture
def source():
    return Source(
        name="mini:made-here",
        modality="image",
        load=fresh,
        preprocess=Squared(size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)),
        head="head",
        classes=tuple("abcde"),
        licence="CC0-1.0",
        fingerprint="f" * 64,
        kind="mini",
        facts={"family": "cnn", "input_size": 32},
    )


@pytest.fixture
def exported(source, tmp_path):
    model = with_head(source.load(), 3, "head").eval()
    with torch.no_grad():
        model.get_submodule("head").weight += 0.25
    return export_model(model, tmp_path / "models" / "own", source=source, classes=["x", "y", "z"]), model


def test_headstart_layout_comes_back(exported, source, pictures):
    out, model = exported
    loaded, preprocess, classes = load_model_directory(out)
    batch = source.preprocess(pictures)
    assert torch.equal(preprocess(pictures), batch)
    with torch.no_grad():
        assert torch.equal(loaded(batch), model(batch))
    assert (classes, preprocess) == (("x", "y", "z"), source.preprocess)
    (again,), skipped = sources_in(out)
    assert not skipped
    assert (again.kind, again.licence, again.modality, again.classes) == ("dir", "CC0-1.0", "image", classes)
    second = export_model(with_head(again.load(), 2, again.head), out.parent / "next", source=again, classes=["p", "q"])
    assert load_model_directory(second)[2] == ("p", "q")


def test_a_folder_of_models_gives_one_source_each_and_names_what_is_left_out(exported, save_model):
    folder = exported[0].parent
    save_model("vit").rename(folder / "vit")
    save_model("bert").rename(folder / "words")
    (folder / "notes").mkdir()
    (folder / "notes" / "readme.txt").write_text("nothing here")
    bad = folder / "old"
    bad.mkdir()
    (bad / "config.json").write_text('{"model_type": "vit"}')
    (bad / "pytorch_model.bin").write_bytes(b"")
    found, skipped = sources_in(folder)
    assert [Path(one.name).name for one in found] == ["own", "vit", "words"]
    assert [one.modality for one in found] == ["image", "image", "text"]
    assert [Path(one.name).name for one in skipped] == ["old"]
    assert "unpickling runs" in skipped[0].why


def test_a_folder_without_models_is_skipped_with_the_reason(tmp_path):
    assert "not a folder" in sources_in(tmp_path / "no")[1][0].why
    assert "no config.json" in sources_in(tmp_path)[1][0].why


class Bomb:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "boom")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "model.pth", "model.ckpt"])
def test_a_pickle_is_refused_unopened_and_the_message_says_how_to_convert(name, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(Refused, match=rf"unpickling runs whatever code.*{name}.*Convert it once"):
        load_model_directory(folder)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(("change", "told"), [("drop", "missing"), ("reshape", "mismatched"), ("add", "unexpected")])
def test_weights_that_do_not_fit_are_refused_by_name(change, told, exported):
    out = exported[0]
    weights = load_file(out / "model.safetensors")
    key = "head.weight"
    if change == "drop":
        del weights[key]
    elif change == "reshape":
        weights[key] = torch.zeros(3, 7)
    else:
        key = "adapter.down"
        weights[key] = torch.zeros(2)
    save_file(weights, out / "model.safetensors")
    with pytest.raises(Refused, match=f"{told} {key}"):
        load_model_directory(out)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/outside.safetensors", "sub/x.safetensors", "x.bin"])
def test_a_shard_index_cannot_lead_out_of_the_folder(name, save_model):
    folder = save_model("vit")
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"classifier.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Refused, match="of its own folder"):
        load_model_directory(folder)


def test_shards_are_read_and_a_missing_one_is_named(save_model):
    folder = save_model("vit")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for i, (key, value) in enumerate(weights.items()):
        parts[sorted(parts)[i % 2]][key] = value
    for name, part in parts.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, part in parts.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model, _, classes = load_model_directory(folder)
    assert classes == ("cat", "dog", "owl")
    assert torch.equal(model.state_dict()["model.classifier.weight"], weights["classifier.weight"])
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(Refused, match=r"every shard.*model-00002"):
        load_model_directory(folder)


@pytest.mark.parametrize(
    "kind", ["os.system", "headstart.core.validate.Refused", "headstart.zoo.mini.mini_sources", "headstart.zoo.x.Y", ""]
)
def test_a_record_can_only_make_preprocessings_of_the_zoo(kind, exported):
    out = exported[0]
    record = json.loads((out / "headstart.json").read_text())
    record["preprocess"]["class"] = kind
    (out / "headstart.json").write_text(json.dumps(record))
    with pytest.raises(Refused, match="preprocessing record must name"):
        load_model_directory(out)


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("headstart.json", "{", "readable JSON"),
        ("headstart.json", "[]", "JSON object"),
        ("headstart.json", '{"layout": "headstart"}', "must say"),
        ("labels.json", '{"classes": ["x", "x", "z"]}', "each class once"),
        ("labels.json", '{"classes": ["x", "z"]}', "mismatched head.weight"),
        ("model.safetensors", "torn", "whole safetensors"),
    ],
)
def test_a_damaged_folder_is_refused(file, text, told, exported):
    (exported[0] / file).write_text(text)
    with pytest.raises(Refused, match=told):
        load_model_directory(exported[0])


def test_labels_of_another_length_than_the_head_are_refused(save_model):
    folder = save_model("vit")
    (folder / "labels.json").write_text('{"classes": ["x", "y"]}')
    with pytest.raises(Refused, match="2 labels, 3 outputs"):
        load_model_directory(folder)


def test_a_relative_path_is_kept_as_the_user_wrote_it(exported, monkeypatch):
    monkeypatch.chdir(exported[0].parent)
    found, _ = sources_in("own")
    assert found[0].name == "dir:own"
    monkeypatch.chdir("/")
    assert found[0].load().get_submodule("head").out_features == 3
    assert found[0].preprocess([np.zeros((4, 4, 3), np.uint8)]).shape == (1, 3, 32, 32)
