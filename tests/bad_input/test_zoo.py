"""Bad models and names: refused before work, with what must hold, what was given and what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.core.validate import Refused
from headstart.zoo.directory import load_model_directory
from headstart.zoo.resolve import resolve

TEMPLATE = re.compile(r".+[;] got:? .*[.?] \S.+", re.DOTALL)
transformers: Any = pytest.importorskip("transformers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good picture model of a few kilobytes."""
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = transformers.ViTConfig(**small, image_size=16, patch_size=8, num_labels=2)
    with torch.random.fork_rng():
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    pixels = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(pixels))
    return tmp_path / "model"


def edit(name: str, **change: Any) -> Callable[[Path], None]:
    """Change fields of a JSON file."""

    def do(folder: Path) -> None:
        said = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**said, **change}))

    return do


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def torn(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def decoder(folder: Path) -> None:
    config = transformers.GPT2Config(vocab_size=len(WORDS), n_positions=8, n_embd=8, n_layer=1, n_head=1, num_labels=2)
    for file in folder.iterdir():
        file.unlink()
    with torch.random.fork_rng():
        transformers.GPT2ForSequenceClassification(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))


def two_towers(folder: Path) -> None:
    config = {"architectures": ["CLIPModel"], "model_type": "clip", "text_config": {}, "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(config))


CASES: list[tuple[Callable[[Path], None], str]] = [
    (remove("config.json"), "needs a config.json"),
    (remove("model.safetensors"), "must hold model.safetensors"),
    (remove("preprocessor_config.json"), "must hold preprocessor_config.json"),
    (write("config.json", "{"), "readable JSON"),
    (write("config.json", "[1]"), "JSON object"),
    (write("config.json", "{}"), "model_type or architecture"),
    (edit("config.json", model_type="vitt"), "model type transformers knows"),
    (edit("config.json", auto_map={"AutoModel": "evil.Model"}), "must not bring its own code"),
    (edit("config.json", num_hidden_layers=2), "missing .*layer.*1"),
    (edit("config.json", hidden_size=16), "mismatched"),
    (write("adapter_config.json", "{}"), "whole model"),
    (pickled, "unpickling runs"),
    (torn, "safetensors"),
    (decoder, "one linear layer over pooled features"),
    (two_towers, "models with one input"),
]


@pytest.mark.parametrize(("damage", "told"), CASES)
def test_a_bad_folder_is_refused_and_skipped_by_the_ranking(damage, told, folder):
    damage(folder)
    with pytest.raises(Refused, match=told) as refused:
        load_model_directory(folder)
    assert TEMPLATE.match(str(refused.value)), refused.value
    found, skipped = resolve(f"dir:{folder}")
    for source in found:  # what only the weights tell is refused when they are read
        with pytest.raises(Refused, match=told):
            source.load()
    assert len(found) + len(skipped) == 1
    for one in skipped:
        assert re.search(told, one.why)


def test_an_architecture_without_a_classifier_is_used_as_an_encoder(folder):
    edit("config.json", architectures=["ViTForMaskedImageModeling"])(folder)
    (source,), _ = resolve(f"dir:{folder}")
    assert (source.head, source.classes) == ("head", ())
    assert source.load().get_submodule("head").out_features == 0


@pytest.mark.parametrize(
    ("zoo", "told"),
    [
        ("minni", "Did you mean 'mini'"),
        ("mini:no-such-model-at-all", "must be a known name"),
        ("imagenet", "must be a known name"),
        ("dir:", "name after the colon"),
        ("", "at least one source"),
    ],
)
def test_an_unknown_zoo_is_refused_with_a_suggestion(zoo, told):
    with pytest.raises(Refused, match=told) as refused:
        resolve(zoo)
    assert TEMPLATE.match(str(refused.value)), refused.value


@pytest.mark.parametrize("make", ["nothing", "file", "empty"])
def test_a_path_that_is_no_model_folder_is_refused(make, tmp_path):
    path = tmp_path / "x"
    if make == "file":
        path.write_text("hello")
    if make == "empty":
        path.mkdir()
    with pytest.raises(Refused) as refused:
        load_model_directory(path)
    assert TEMPLATE.match(str(refused.value)), refused.value
    found, skipped = resolve(f"dir:{path}")
    assert not found
    assert len(skipped) == 1
