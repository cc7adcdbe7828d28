"""How a model folder is written for each library that will read it."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headstart.core.validate import require

from .folder import WEIGHTS
from .record import preprocess_record
from .source import Source

PREPARATION = (
    "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt",
    "vocab.json", "merges.txt", "added_tokens.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model",
    "sentence_bert_config.json",
)  # fmt: skip

DESCRIBES = ("family", "data", "objective", "input_size", "pretraining")  # facts that stay true after training


def write_layout(
    model: nn.Module, folder: Path, source: Source, classes: tuple[str, ...]
) -> tuple[str, dict[str, Any]]:
    """Write weights, configuration and preprocessing; gives the layout and what its record has to say more."""
    from .hf_model import Classifier, Encoder

    if isinstance(model, Classifier | Encoder):
        return _write_transformers(model, folder, source, classes)
    if source.facts.get("layout") == "timm":
        _write_timm(model, folder, classes)
        return "timm", {}
    architecture = source.facts.get("family" if source.kind == "mini" else "architecture")
    do = "Put the name that headstart.nets.build knows under facts['architecture']."
    require(isinstance(architecture, str), "export must know how to build the model again", architecture, do)
    from safetensors.torch import save_file

    save_file(_plain(model), folder / WEIGHTS, metadata={"format": "pt"})
    facts = {key: source.facts[key] for key in DESCRIBES if key in source.facts}
    extra = {"architecture": architecture, "preprocess": preprocess_record(source.preprocess), "facts": facts}
    write_json(folder / "config.json", {"headstart_architecture": architecture, "num_classes": len(classes)})
    return "headstart", extra


def _write_transformers(
    model: nn.Module, folder: Path, source: Source, classes: tuple[str, ...]
) -> tuple[str, dict[str, Any]]:
    from safetensors.torch import save_file

    from .hf_model import Encoder, quiet

    body: Any = copy.copy(model.model)  # shares every weight; only the configuration is its own
    body.config = copy.deepcopy(body.config)
    extra: dict[str, Any] = {}
    if isinstance(model, Encoder):
        extra["pooling"] = model.pooling
        save_file(_plain(model.head), folder / "head.safetensors", metadata={"format": "pt"})
    else:
        body.config.id2label = dict(enumerate(classes))
        body.config.label2id = {label: index for index, label in enumerate(classes)}
        body.config.problem_type = "single_label_classification"
    with quiet():
        body.save_pretrained(folder)
    origin = Path(str(getattr(source.preprocess, "folder", "")))
    for name in PREPARATION:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)
    if isinstance(model, Encoder) and (origin / "1_Pooling" / "config.json").is_file():
        (folder / "1_Pooling").mkdir()
        shutil.copyfile(origin / "1_Pooling" / "config.json", folder / "1_Pooling" / "config.json")
    return ("transformers-encoder" if isinstance(model, Encoder) else "transformers-classifier"), extra


def _write_timm(model: nn.Module, folder: Path, classes: tuple[str, ...]) -> None:
    from .timm_source import timm_package

    plain: Any = copy.deepcopy(model).cpu()
    with torch.random.fork_rng(devices=[]):  # the new head is overwritten by the trained one
        plain.reset_classifier(len(classes))  # so that timm's own records of the model follow
    plain.load_state_dict({key: value.cpu().contiguous() for key, value in model.state_dict().items()}, assign=True)
    timm_package().models.save_for_hf(plain, folder, {"label_names": list(classes)}, safe_serialization=True)


def _plain(model: nn.Module) -> dict[str, Tensor]:
    """Contiguous weights on the CPU, each stored once: of tied weights the first name."""
    once: dict[int, str] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        once.setdefault(id(value), key)
    state = model.state_dict()
    return {key: state[key].detach().cpu().contiguous() for key in once.values()}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A JSON object as a file that people can read too."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
