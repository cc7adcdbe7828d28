"""The token tables of a language model, read and replaced, whatever its architecture and tying."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from headstart.core.rng import seeded
from headstart.core.validate import require


def token_rows(model: nn.Module) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Input rows (V, D), output rows (V, D) where they are untied from the input, output bias (V,) where there is one.

    Args:
        model: has get_input_embeddings, get_output_embeddings and resize_token_embeddings, as transformers' have.

    Raises:
        Refused: a model without them.
    """
    for method in ("get_input_embeddings", "get_output_embeddings", "resize_token_embeddings"):
        require(callable(getattr(model, method, None)), f"A language model needs {method}()", type(model).__name__,
                "Pass a causal language model of transformers.")  # fmt: skip
    kept: Any = model
    rows, output = kept.get_input_embeddings().weight, kept.get_output_embeddings()
    bias = getattr(output, "bias", None)
    untied = output is not None and output.weight is not rows
    return rows.detach(), output.weight.detach() if untied else None, None if bias is None else bias.detach()


def with_token_rows(
    model: nn.Module, rows: Tensor, output: Tensor | None = None, bias: Tensor | None = None
) -> nn.Module:
    """A copy of a language model with other token tables, as many rows as given; tied tables stay tied.

    Args:
        model: as `token_rows` takes it.
        rows: input rows (V, D).
        output, bias: the output's, where `token_rows` gives them.

    >>> from headstart.core.rng import seeded
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> with seeded(0):
    ...     model = GPT2LMHeadModel(GPT2Config(vocab_size=5, n_positions=8, n_embd=4, n_layer=1, n_head=1))
    >>> new = with_token_rows(model, torch.zeros(7, 4))
    >>> new.config.vocab_size, new.lm_head.weight is new.transformer.wte.weight
    (7, True)
    """
    _, old_output, old_bias = token_rows(model)
    same = (output is None) == (old_output is None) and (bias is None) == (old_bias is None)
    require(same, "Output rows and bias must be given where the model has its own", (output is None, bias is None),
            "Make one for each table that token_rows(model) returns.")  # fmt: skip
    new: Any = copy.deepcopy(model)
    with seeded(None):  # new rows are drawn before they are overwritten
        new.resize_token_embeddings(len(rows), mean_resizing=False)
    with torch.no_grad():
        new.get_input_embeddings().weight.copy_(rows)
        if output is not None:
            new.get_output_embeddings().weight.copy_(output)
        if bias is not None:
            new.get_output_embeddings().bias.copy_(bias)
    changed: nn.Module = new
    return changed
