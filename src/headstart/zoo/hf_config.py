"""What the configuration files of a transformers folder say: kind of data, head, pooling, preprocessing, classes."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from headstart.core.validate import Refused, require

from .folder import read_json
from .source import Modality, Preprocess

TOKENS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")
FETCH = "Point at a folder that save_pretrained wrote, or at a hub name ORG/NAME."


def config_of(folder: Path) -> Any:
    """The transformers configuration of a folder; never with code from the folder."""
    found = find_spec("transformers") is not None
    require(found, "transformers models need the package transformers", "not installed", "pip install headstart[text].")
    said = read_json(folder / "config.json")
    require(
        "auto_map" not in said, "A model must not bring its own code", f"auto_map in {folder}", "Use another model."
    )
    adapter = (folder / "adapter_config.json").exists()
    require(
        not adapter, "A source must be a whole model", "an adapter folder", "Merge the adapter into its base first."
    )
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as problem:
        raise Refused(
            f"config.json must name a model type transformers knows; got {first_line(problem)}. {FETCH}"
        ) from problem


def nature(config: Any, folder: Path) -> tuple[Modality, bool]:
    """Which raw examples the checkpoint reads, and whether it brings a classification head."""
    written = " ".join(config.architectures or ())
    if re.search(r"ForImageClassification\b", written):
        return "image", True
    if re.search(r"ForSequenceClassification\b", written):
        return "text", True
    towers = [name for name in ("text_config", "vision_config") if getattr(config, name, None) is not None]
    require(
        not towers, "hf: reads models with one input", f"{config.model_type} with {towers}", "Use a one-tower model."
    )
    if (folder / "preprocessor_config.json").exists():
        hides = getattr(config, "mask_ratio", None)
        do = "Save its encoder as a plain ViT (transformers.ViTModel) and use that."
        require(not hides, "A source must see the whole picture", f"{config.model_type} hiding {hides} at random", do)
        return "image", False
    if any((folder / file).exists() for file in TOKENS):
        return "text", False
    raise Refused(
        f"A model folder must say how to feed it; got neither preprocessor nor tokenizer in {folder}. {FETCH}"
    )


def pooling_of(folder: Path, modality: Modality, pooler: bool) -> str:
    """How to make one vector of many: as its sentence-transformers file says, else mean; pooler or first for images."""
    if modality == "image":
        return "pooler" if pooler else "first"
    stated = folder / "1_Pooling" / "config.json"
    return "first" if stated.is_file() and read_json(stated).get("pooling_mode_cls_token") else "mean"


def preprocess_of(folder: Path, modality: Modality, config: Any) -> Preprocess:
    """The model's own preprocessing; longest text as the folder says, at most 512 tokens."""
    from .hf_model import Pixels, Words

    if modality == "image":
        read_json(folder / "preprocessor_config.json")
        return Pixels(folder=str(folder))
    require(any((folder / file).exists() for file in TOKENS), "A text model needs its tokenizer", str(folder), FETCH)
    limits = [512, getattr(config, "max_position_embeddings", None)]
    for file, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        limits.append(read_json(folder / file).get(key) if (folder / file).is_file() else None)
    return Words(folder=str(folder), length=int(min(limit for limit in limits if limit)))


def class_names(config: Any) -> tuple[str, ...]:
    """The checkpoint's class names in order; () where they are placeholders such as LABEL_0."""
    said = getattr(config, "id2label", None) or {}
    names = tuple(str(said[index]) for index in sorted(said))
    return () if names == tuple(f"LABEL_{index}" for index in range(len(names))) else names


def input_size(config: Any) -> tuple[int, ...] | None:
    """(channels, height, width) where the configuration states a picture size."""
    size = getattr(config, "image_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return int(getattr(config, "num_channels", 3)), int(height), int(width)


def first_line(problem: Exception) -> str:
    """The first line of an error, without its full stop, for use inside a refusal."""
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0].rstrip(".")
