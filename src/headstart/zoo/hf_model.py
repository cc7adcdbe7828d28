"""Models of the transformers library as plain modules: one batch in, one tensor of logits out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn


def as_inputs(batch: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keyword arguments of a transformers model; columns that are padding in every row are dropped.

    Text batches have a fixed width, so that batches can be joined; attention costs the longest row only.
    """
    if isinstance(batch, Tensor):
        return {"pixel_values": batch}
    mask = batch["attention_mask"]
    used = max(1, int(mask.any(dim=0).sum()))  # padding is always on the right
    return {name: value[:, :used] for name, value in batch.items()}


def empty_head(width: int) -> nn.Linear:
    """The head of a model that knows no classes: a linear layer with no outputs, ready to be replaced."""
    head = nn.Linear(width, 1, device="meta")  # torch warns when it initialises a layer of no elements
    head.weight = nn.Parameter(torch.empty(0, width))
    head.bias = nn.Parameter(torch.empty(0))
    head.out_features = 0
    return head


class Classifier(nn.Module):
    """A transformers model with a classification head; forward gives its logits (n, c)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor | Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = self.model(**as_inputs(batch)).logits
        return logits


class Encoder(nn.Module):
    """A transformers model without a head: its pooled output goes through `head`, which starts without classes.

    Args:
        model: what AutoModel gives.
        width: length of the pooled vector.
        pooling: "mean" over the words, "first" word or patch, "pooler": the model's own, else the first or space.
    """

    def __init__(self, model: nn.Module, width: int, pooling: str) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling
        self.head = empty_head(width)

    def forward(self, batch: Tensor | Mapping[str, Tensor]) -> Tensor:
        inputs = as_inputs(batch)
        logits: Tensor = self.head(self.pooled(inputs))
        return logits

    def pooled(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """One vector an example (n, d), before the head."""
        return pooled(self.model(**inputs), self.pooling, inputs.get("attention_mask"))


def pooled(output: Any, pooling: str, mask: Tensor | None) -> Tensor:
    """One vector an example (n, d) from what a transformers encoder returns."""
    own: Tensor | None = getattr(output, "pooler_output", None)
    if pooling == "pooler" and own is not None:
        return own.flatten(1)
    hidden: Tensor = output.last_hidden_state
    if hidden.ndim == 4:  # (n, d, h, w): a convolutional encoder
        return hidden.mean(dim=(2, 3))
    if pooling == "first":
        return hidden[:, 0]
    if mask is None:
        return hidden.mean(dim=1)
    weight = mask.unsqueeze(-1).to(hidden.dtype)  # (n, t, 1)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)  # an empty text has no words to divide by


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """uint8 pictures (H, W, 3) to the tensor that a transformers vision model was trained on."""

    folder: str

    def __call__(self, raw: Sequence[Any], /) -> Tensor:
        made = _image_processor(self.folder)(images=list(raw), return_tensors="pt", input_data_format="channels_last")
        pixels: Tensor = made["pixel_values"]
        return pixels


@dataclass(frozen=True, kw_only=True)
class Words:
    """Strings to token numbers of a fixed width; longer texts are cut at `length` tokens."""

    folder: str
    length: int

    def __call__(self, raw: Sequence[Any], /) -> dict[str, Tensor]:
        made = _tokenizer(self.folder)(
            [str(text) for text in raw],
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        return {name: value for name, value in made.items() if isinstance(value, Tensor)}


@lru_cache(maxsize=8)
def _image_processor(folder: str) -> Any:
    transformers: Any = import_module("transformers")
    # the PIL processor: it needs no torchvision and gives the same pixels with and without it
    modern = int(transformers.__version__.partition(".")[0]) >= 5
    with quiet():
        if modern:
            return transformers.AutoImageProcessor.from_pretrained(
                folder, backend="pil", local_files_only=True, trust_remote_code=False
            )
        return transformers.AutoImageProcessor.from_pretrained(
            folder, use_fast=False, local_files_only=True, trust_remote_code=False
        )


@lru_cache(maxsize=8)
def _tokenizer(folder: str) -> Any:
    transformers: Any = import_module("transformers")
    with quiet():
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' own load report and bars; what matters in them is checked and refused by headstart."""
    logging: Any = import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def head_in(model: nn.Module, classes: int) -> str:
    """Dotted name of the last linear layer with `classes` outputs, "" where there is none."""
    found = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    return found[-1] if found else ""
