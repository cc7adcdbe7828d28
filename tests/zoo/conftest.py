"""Tiny real transformers models, made on the spot and saved as their users would save them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

PIXELS = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.25, 0.3],
    "rescale_factor": 1 / 255,
    "resample": 2,
    "size": {"height": 16, "width": 16},
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "very", "long", "##er"]


@pytest.fixture
def pictures() -> list[np.ndarray[Any, Any]]:
    """Four pictures of different sizes."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, size=(16 + 3 * i, 20 + i, 3), dtype=np.uint8) for i in range(4)]


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[..., Path]:
    """`save_model("vit" | "resnet" | "convnext" | "bert" | "encoder" | "backbone")` gives the folder it wrote."""

    def save(kind: str, name: str = "", labels: tuple[str, ...] = ("cat", "dog", "owl")) -> Path:
        transformers = pytest.importorskip("transformers")
        folder = tmp_path / (name or kind)
        named = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        vit = {**small, "image_size": 16, "patch_size": 8, "hidden_dropout_prob": 0.0}
        bert = {**small, "vocab_size": len(WORDS), "max_position_embeddings": 32}
        stages = {"hidden_sizes": [8, 12], "depths": [1, 1]}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = {
                "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**vit, **named)),
                "resnet": lambda: transformers.ResNetForImageClassification(
                    transformers.ResNetConfig(embedding_size=8, layer_type="basic", **stages, **named)
                ),
                "convnext": lambda: transformers.ConvNextForImageClassification(
                    transformers.ConvNextConfig(num_stages=2, **stages, **named)
                ),
                "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**bert, **named)),
                "encoder": lambda: transformers.BertModel(transformers.BertConfig(**bert)),
                "masked": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**bert)),
                "maps": lambda: transformers.ConvNextModel(transformers.ConvNextConfig(num_stages=2, **stages)),
                "mobile": lambda: transformers.MobileViTModel(
                    transformers.MobileViTConfig(image_size=64, neck_hidden_sizes=[8, 8, 12, 12, 16, 16, 20])
                ),
                "masked-vit": lambda: transformers.ViTMAEModel(transformers.ViTMAEConfig(**vit)),
                "backbone": lambda: transformers.ViTModel(transformers.ViTConfig(**vit)),
            }[kind]()
        model.save_pretrained(folder)
        if kind in ("bert", "encoder", "masked"):
            (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
            transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
        else:
            (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS), encoding="utf-8")
        return folder

    return save
