"""What is exported comes back, here and in the library it came from; half a model is never left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from headstart.core.surgery import with_head
from headstart.core.validate import Refused
from headstart.zoo.directory import load_model_directory
from headstart.zoo.export import export_model
from headstart.zoo.hf_source import hf_source

CLASSES = ("ö: spruce", "fir", 'pine "x"', "yew")
TEXTS = ["a good film", "bad", "very long"]


def trained(source, classes=len(CLASSES)):
    """The source with a new head and every weight moved, as after training."""
    model = with_head(source.load(), classes, source.head).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def logits_of(model, batch):
    with torch.no_grad():
        return model(batch)


FRESH = """
import sys, torch, numpy as np
from headstart.zoo.directory import load_model_directory
rng = np.random.default_rng(0)
pictures = [rng.integers(0, 256, size=(16 + 3 * i, 20 + i, 3), dtype=np.uint8) for i in range(4)]
for folder, (modality, expected) in torch.load(sys.argv[1], weights_only=True).items():
    model, preprocess, classes = load_model_directory(folder)
    with torch.no_grad():
        logits = model(preprocess(["a good film", "bad", "very long"] if modality == "text" else pictures))
    assert torch.equal(logits, expected), folder
    assert classes == ("ö: spruce", "fir", 'pine "x"', "yew"), classes
    assert not model.training
"""


def test_a_fresh_process_gives_the_same_logits(save_model, pictures, tmp_path):
    expected = {}
    for kind in ("vit", "resnet", "convnext", "bert", "encoder", "backbone"):
        source = hf_source(str(save_model(kind)))
        model = trained(source)
        out = export_model(model, tmp_path / "out" / kind, source=source, classes=CLASSES, metrics={"accuracy": 0.75})
        raw = TEXTS if source.modality == "text" else pictures
        expected[str(out)] = (source.modality, logits_of(model, source.preprocess(raw)))
    torch.save(expected, tmp_path / "expected.pt")
    run = [sys.executable, "-c", FRESH, str(tmp_path / "expected.pt")]
    done = subprocess.run(run, capture_output=True, text=True, env=_environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("kind", ["vit", "resnet", "convnext", "bert"])
def test_transformers_reloads_the_folder_with_the_same_logits(kind, save_model, pictures, tmp_path):
    transformers: Any = pytest.importorskip("transformers")
    source = hf_source(str(save_model(kind)))
    model = trained(source)
    out = export_model(model, tmp_path / "model", source=source, classes=CLASSES)
    if source.modality == "text":
        batch: Any = dict(transformers.AutoTokenizer.from_pretrained(out)(TEXTS, padding=True, return_tensors="pt"))
        reference = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    else:
        processor = transformers.AutoImageProcessor.from_pretrained(out, backend="pil")
        batch = dict(processor(images=pictures, return_tensors="pt"))
        reference = transformers.AutoModelForImageClassification.from_pretrained(out)
    assert reference.config.id2label == dict(enumerate(CLASSES))
    ours = logits_of(model, source.preprocess(TEXTS if source.modality == "text" else pictures))
    with torch.no_grad():
        torch.testing.assert_close(reference.eval()(**batch).logits, ours, rtol=1e-5, atol=1e-6)


def test_an_encoder_stays_loadable_for_transformers(save_model, tmp_path):
    transformers: Any = pytest.importorskip("transformers")
    source = hf_source(str(save_model("encoder")))
    model = trained(source)
    out = export_model(model, tmp_path / "model", source=source, classes=CLASSES)
    again, info = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.model.state_dict()[key]), key


def test_the_card_says_where_it_came_from_and_its_front_matter_is_yaml(save_model, tmp_path):
    yaml: Any = pytest.importorskip("yaml")
    source = hf_source(str(save_model("vit")))
    out = export_model(
        trained(source),
        tmp_path / "m",
        source=source,
        classes=CLASSES,
        metrics={"accuracy": 0.9321},
        task="digits: x",
        tags=["a: b"],
    )
    text = (out / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["library_name"] == "transformers"
    assert card["base_model"] == "vit"
    assert not [file for file in out.iterdir() if str(tmp_path).encode() in file.read_bytes()]
    assert card["metrics"] == ["accuracy"]
    assert "a: b" in card["tags"]
    assert "| accuracy | 0.9321 |" in body
    assert json.loads((out / "labels.json").read_text(encoding="utf-8"))["classes"] == list(CLASSES)


def test_an_export_can_be_exported_again(save_model, pictures, tmp_path):
    from headstart.zoo.directory import sources_in

    source = hf_source(str(save_model("backbone")))
    out = export_model(trained(source), tmp_path / "one", source=source, classes=CLASSES)
    (second,), skipped = sources_in(out)
    assert not skipped
    assert second.classes == CLASSES
    model = trained(second, classes=2)
    again = export_model(model, tmp_path / "two", source=second, classes=["a", "b"])
    loaded, preprocess, classes = load_model_directory(again)
    assert classes == ("a", "b")
    assert torch.equal(logits_of(loaded, preprocess(pictures)), logits_of(model, second.preprocess(pictures)))


def test_export_leaves_the_model_as_it_is(save_model, tmp_path):
    source = hf_source(str(save_model("vit")))
    model = trained(source)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    labels = dict(model.model.config.id2label)
    state = torch.random.get_rng_state()
    export_model(model, tmp_path / "m", source=source, classes=CLASSES)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.model.config.id2label == labels
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Adapted(nn.Linear):
    """A linear layer with an adapter that nobody folded."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features)
        self.down = nn.Parameter(torch.zeros(2, plain.in_features))


def test_an_adapter_that_was_not_folded_is_refused(save_model, tmp_path):
    source = hf_source(str(save_model("vit")))
    model = trained(source)
    owner = model.get_submodule("model.vit")
    name = next(name for name, layer in owner.named_modules() if isinstance(layer, nn.Linear))
    parent, _, child = name.rpartition(".")
    setattr(owner.get_submodule(parent), child, Adapted(owner.get_submodule(name)))
    with pytest.raises(Refused, match=r"extra .*down.*Fold adapters"):
        export_model(model, tmp_path / "m", source=source, classes=CLASSES)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(("m", "partial"))]


def test_wrong_requests_are_refused_before_anything_is_written(save_model, tmp_path):
    source = hf_source(str(save_model("vit")))
    model = trained(source)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    with pytest.raises(Refused, match="new or empty directory"):
        export_model(model, full, source=source, classes=CLASSES)
    assert (full / "mine.txt").read_text() == "keep"
    with pytest.raises(Refused, match="4 for 3"):
        export_model(model, tmp_path / "m", source=source, classes=["a", "b", "c"])
    with pytest.raises(Refused, match="distinct"):
        export_model(model, tmp_path / "m", source=source, classes=["a", "b", "c", "a"])
    with torch.no_grad():
        model.get_submodule(source.head).bias[0] = float("nan")
    with pytest.raises(Refused, match="finite weights"):
        export_model(model, tmp_path / "m", source=source, classes=CLASSES)
    assert not (tmp_path / "m").exists()


EXPORT = """
import os, signal, sys, torch
from headstart import nets
from headstart.core.validate import Refused
from headstart.zoo.export import export_model
from headstart.zoo.mini import Squared
from headstart.zoo.source import Source
source = Source(
    name="mini:made-here", modality="image", load=lambda: nets.build("cnn", 2), head="head", classes=(),
    preprocess=Squared(size=32, mean=(0.5,) * 3, std=(0.25,) * 3), licence="CC0-1.0", fingerprint="", kind="mini",
    facts={{"family": "cnn"}},
)
model = source.load().eval()
{before}
try:
    export_model(model, sys.argv[1], source=source, classes=["a", "b"])
except Refused as problem:
    print(problem, file=sys.stderr)
    raise SystemExit(2)
"""


def run_export(out: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-c", EXPORT.format(before=before), str(out)]
    return subprocess.run(run, env=_environment(), capture_output=True, text=True, check=False)


def test_kill_before_the_rename_leaves_no_model_and_the_next_run_finishes(tmp_path):
    out = tmp_path / "out"
    assert run_export(out, "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)").returncode == -9
    assert not out.exists()
    assert (tmp_path / ".out.partial").exists()
    assert run_export(out).returncode == 0
    assert load_model_directory(out)[2] == ("a", "b")
    assert not (tmp_path / ".out.partial").exists()


def test_a_disk_that_takes_no_more_bytes_is_refused_and_nothing_is_left(tmp_path):
    out = tmp_path / "out"
    small = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nimport resource\n"
    small += "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))"
    done = run_export(out, small)
    assert done.returncode == 2, done.stderr
    assert "Free space" in done.stderr
    assert not out.exists()
    assert not (tmp_path / ".out.partial").exists()


def test_weights_are_safetensors_only(save_model, tmp_path):
    source = hf_source(str(save_model("vit")))
    out = export_model(trained(source), tmp_path / "m", source=source, classes=CLASSES)
    assert {path.name for path in out.iterdir()} == {
        "README.md", "config.json", "headstart.json", "labels.json", "model.safetensors", "preprocessor_config.json"
    }  # fmt: skip
    assert load_file(out / "model.safetensors")


def _environment() -> dict[str, str]:
    source = str(Path(__file__).parents[2] / "src")
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
