"""Soft prompts: trained vectors in front of a frozen model that reads embeddings, and nothing else changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from headstart.core.surgery import freeze
from headstart.core.validate import finite, one_of, require


def fresh_prompt(backbone: nn.Module, length: int = 20, *, seed: int = 0) -> Tensor:
    """A random prompt (length, d), normal, with the standard deviation of the backbone's token embeddings."""
    require(length >= 1, "A prompt needs length >= 1", length, "Pass a number of tokens such as 20.")
    words = _embedding(backbone).weight.detach().float()
    noise = torch.randn(length, words.shape[1], generator=torch.Generator().manual_seed(seed))
    return (words.std().cpu() * noise).to(words)


def mean_prompt(prompts: list[Tensor], similarities: list[float]) -> Tensor:
    """Several sources' prompts as one start: their mean, weighted by similarity; negative similarities count 0.

    Raises:
        Refused: prompts of different lengths or widths, no positive similarity.

    >>> mean_prompt([torch.zeros(2, 3), torch.ones(2, 3)], [0.25, 0.75])[0]
    tensor([0.7500, 0.7500, 0.7500])
    """
    require(len(prompts) == len(similarities), "One similarity belongs to each prompt",
            f"{len(similarities)} for {len(prompts)} prompts", "Pass as many.")  # fmt: skip
    shapes = [tuple(prompt.shape) for prompt in prompts]
    require(len(set(shapes)) == 1, "Prompts that start another need one shape", shapes, "Tune them at one length.")
    weights = torch.tensor(similarities, dtype=torch.float64).clamp(min=0)
    require(bool(weights.sum() > 0), "One source at least must be similar", similarities, "Start from a fresh prompt.")
    weights = (weights / weights.sum()).to(prompts[0])
    return torch.einsum("k,kpd->pd", weights, torch.stack([prompt.detach() for prompt in prompts]))


class Prompted(nn.Module):
    """A frozen backbone behind trained prompt tokens, and a head on what it then says of the text.

    Args:
        backbone: has `get_input_embeddings()` (tokens to vectors) and takes `inputs_embeds=`, `attention_mask=` (and
            `token_type_ids=` where the inputs have them), as encoders of transformers do; it returns hidden states
            (n, t, d), or has them as `last_hidden_state`. It is frozen; its weights are shared, not copied.
        head: features (n, d) -> logits (n, c), trained as its requires_grad says.
        prompt: (P, d), where the prompt starts: `fresh_prompt(backbone)`, or a source's `prompt`.
        dropout: on the prompt and on the pooled vector, in training, in [0, 1).
        pooling: "first" token after the prompt, or the "mean" over the text.

    Shape: tokens (n, t), or a mapping with `input_ids` and maybe `attention_mask`, `token_type_ids` -> (n, c).

    Cost: attention over P more positions. Trains P d numbers and the head.

    Notes: the prompt takes positions 0 to P - 1 and the text what follows. Dropout inside the backbone is on while
    training, as in the usual training of prompts.
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Module, *, prompt: Tensor, dropout: float = 0.1, pooling: str = "first"
    ) -> None:
        width = _embedding(backbone).weight.shape[1]
        require(prompt.ndim == 2 and prompt.shape[1] == width and len(prompt) > 0, f"A prompt has shape (P, {width})",
                tuple(prompt.shape), "Take fresh_prompt(backbone), or one tuned on this backbone.")  # fmt: skip
        super().__init__()
        _check(prompt, dropout, pooling)
        self.backbone, self.prompt, self.pooling = freeze(backbone), nn.Parameter(prompt.detach().clone()), pooling
        self.dropout, self.head = nn.Dropout(dropout), head

    def forward(self, x: Any) -> Tensor:
        inputs, mask = _read(x, len(self.prompt))
        words = _embedding(self.backbone)(inputs.pop("input_ids"))
        _room(self.backbone, len(self.prompt) + words.shape[1])
        prompt = self.dropout(self.prompt.to(words.dtype).expand(len(words), -1, -1))
        if "token_type_ids" in inputs:
            inputs["token_type_ids"] = nn.functional.pad(inputs["token_type_ids"], (len(self.prompt), 0))
        said = self.backbone(inputs_embeds=torch.cat([prompt, words], 1), attention_mask=mask, **inputs)
        hidden = getattr(said, "last_hidden_state", said)[:, len(self.prompt) :]
        logits: Tensor = self.head(self.dropout(_pooled(hidden, mask[:, len(self.prompt) :], self.pooling)))
        return logits


class Prefixed(nn.Module):
    """A frozen encoder of transformers with trained keys and values in front of every layer's own (P-tuning v2).

    Args:
        backbone: a BERT, RoBERTa or ELECTRA encoder of transformers >= 5; it is frozen, its weights are shared.
        head: features (n, d) -> logits (n, c), trained as its requires_grad says.
        prefix: (P, 2 * layers * d): for each layer in turn d numbers of keys, then d of values.
        dropout: on the prefix and on the pooled vector, in training, in [0, 1).
        pooling: "first" token, or the "mean" over the text.

    Shape: as `Prompted`.

    Cost: attention to P more keys, no more queries. Trains 2 P layers d numbers and the head.
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Module, *, prefix: Tensor, dropout: float = 0.1, pooling: str = "first"
    ) -> None:
        config: Any = getattr(backbone, "config", None)
        require(config is not None, "A prefix needs an encoder of transformers", type(backbone).__name__,
                "Put a prompt in front of it.")  # fmt: skip
        width = 2 * config.num_hidden_layers * config.hidden_size
        require(prefix.ndim == 2 and prefix.shape[1] == width and len(prefix) > 0, f"A prefix has shape (P, {width})",
                tuple(prefix.shape), "It holds 2 * layers * d numbers for each position.")  # fmt: skip
        super().__init__()
        _check(prefix, dropout, pooling)
        self.backbone, self.prefix, self.pooling = freeze(backbone), nn.Parameter(prefix.detach().clone()), pooling
        self.dropout, self.head = nn.Dropout(dropout), head

    def forward(self, x: Any) -> Tensor:
        from transformers.cache_utils import DynamicCache

        inputs, mask = _read(x, len(self.prefix))
        n, t = inputs["input_ids"].shape
        _room(self.backbone, len(self.prefix) + t)
        config: Any = self.backbone.config
        heads = config.num_attention_heads
        shape = (n, len(self.prefix), 2 * config.num_hidden_layers, heads, config.hidden_size // heads)
        # (2 * layers, n, heads, P, d / heads)
        pairs = self.dropout(self.prefix.expand(n, -1, -1)).view(shape).permute(2, 0, 3, 1, 4)
        cache = DynamicCache()
        for layer in range(config.num_hidden_layers):
            cache.update(pairs[2 * layer], pairs[2 * layer + 1], layer)
        seen = (1 - mask.to(pairs.dtype)) * torch.finfo(pairs.dtype).min  # added to attention; each query sees the same
        said = self.backbone(
            **inputs, attention_mask=seen[:, None, None].expand(n, 1, t, -1), past_key_values=cache
        ).last_hidden_state
        logits: Tensor = self.head(self.dropout(_pooled(said, mask[:, len(self.prefix) :], self.pooling)))
        return logits


def _embedding(backbone: nn.Module) -> nn.Embedding:
    get = getattr(backbone, "get_input_embeddings", None)
    require(callable(get), "A backbone under a prompt must have get_input_embeddings()", type(backbone).__name__,
            "Pass an encoder that accepts inputs_embeds.")  # fmt: skip
    return cast(nn.Embedding, cast(Any, get)())


def _check(prompt: Tensor, dropout: float, pooling: str) -> None:
    finite("A prompt", prompt, "Start from a fresh one.")
    require(0 <= dropout < 1, "A prompt needs 0 <= dropout < 1", dropout, "Pass a fraction such as 0.1.")
    one_of("pooling", pooling, ["first", "mean"])


def _read(x: Any, length: int) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs without their mask, and the mask (n, P + t), 1 at every position of the prompt."""
    inputs = dict(x) if isinstance(x, Mapping) else {"input_ids": x}
    for name in inputs:
        one_of("An input of a prompted model", name, ["input_ids", "attention_mask", "token_type_ids"])
    require("input_ids" in inputs, "A prompted model needs input_ids", sorted(inputs), "Pass the tokens.")
    mask = inputs.pop("attention_mask", None)
    mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    return inputs, nn.functional.pad(mask, (length, 0), value=1)


def _room(backbone: nn.Module, needed: int) -> None:
    most = getattr(getattr(backbone, "config", None), "max_position_embeddings", None)
    require(most is None or needed <= most, f"Prompt and text must fit into {most} positions", needed, "Cut the text.")


def _pooled(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    if pooling == "first":
        return hidden[:, 0]
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
