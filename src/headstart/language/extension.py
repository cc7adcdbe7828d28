"""Rows for the tokens that a language model's tokenizer gained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.core.validate import finite, one_of, require
from headstart.nets.token_rows import token_rows, with_token_rows

from .segmentation import backend_of

Init = Literal["subtoken_mean", "mean", "random"]


def extend_model(
    model: nn.Module, tokenizer: Any, extended: Any, *, init: Init = "subtoken_mean", rows: Tensor | None = None,
    output_rows: Tensor | None = None, seed: int = 0,
) -> tuple[nn.Module, int]:  # fmt: skip
    """A copy of a language model with rows for the tokens that its tokenizer gained; the old rows stay.

    Args:
        model: a causal language model of transformers, or one with its methods (see `nets.token_rows`).
        tokenizer: the old one.
        extended: the new one, which keeps the old ids (`extend_tokenizer`).
        init: of new rows, input and untied output alike: "subtoken_mean" (the mean of the old pieces of the token's
            text), "mean" (of all old rows) or "random" (normal, with their mean and standard deviation). The output
            bias follows, as the mean where rows are random.
        rows: new input rows (new, D) instead, such as the last ones of `merge.clp_embeddings`.
        output_rows: new output rows (new, D) likewise, for a model with untied ones.
        seed: of "random".

    Returns:
        The model, and how many new tokens have no old piece that is known; these start as the mean row.

    Use it when: the old tokenizer cuts the target so short that length or cost is the problem.
    Not when: there are less than some tens of billions of tokens to train on; with the original vocabulary and
        instruction data the paper went further. In the claim's small world that holds for "random" rows, while means
        of pieces are ahead after little text and behind after more, unless they are trained for longer.

    Cost: a copy of the model; adds new · D weights, twice where untied.

    Notes: rows of the old table beyond the old tokenizer's ids, which checkpoints have as padding, are dropped.

    Raises:
        Refused: ids that changed, a table smaller than the tokenizer, rows that do not fit, NaN.

    Reference: Zhao et al. 2024, vocabulary extension.

    >>> from headstart.core.rng import seeded
    >>> from headstart.language import extend_tokenizer
    >>> from tokenizers import Tokenizer, models
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> old = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    >>> new = extend_tokenizer(old, ["abab", "ab"], 1)
    >>> with seeded(0):
    ...     model = GPT2LMHeadModel(GPT2Config(vocab_size=2, n_positions=8, n_embd=4, n_layer=1, n_head=1))
    >>> longer, unknown = extend_model(model, old, new)
    >>> rows = longer.get_input_embeddings().weight
    >>> bool(torch.allclose(rows[2], rows[:2].mean(0))), unknown
    (True, 0)
    """
    one_of("init", init, ["subtoken_mean", "mean", "random"])
    old_ids, ids = (backend_of(t).get_vocab(with_added_tokens=True) for t in (tokenizer, extended))
    tables, first = token_rows(model), max(old_ids.values()) + 1
    added = sorted((row, token) for token, row in ids.items() if token not in old_ids)
    kept = all(ids.get(token) == row for token, row in old_ids.items())
    require(kept and [row for row, _ in added] == list(range(first, first + len(added))),
            "The extended tokenizer must keep old ids and number new tokens after them", "other ids",
            "Make it with extend_tokenizer.")  # fmt: skip
    require(len(tables[0]) >= first, f"The model must have a row for each of {first} old tokens", len(tables[0]),
            "Pass the tokenizer that belongs to the model.")  # fmt: skip
    old = backend_of(tokenizer).model
    unknown = old_ids.get(old.unk_token)
    pieces = [[piece.id for piece in old.tokenize(token) if piece.id != unknown] for _, token in added]
    new: list[Tensor | None] = []
    for table, given in zip(tables, (rows, output_rows, None), strict=True):
        require(given is None or table is not None, "output_rows= needs a model with untied output rows", "tied ones",
                "Pass rows= only.")  # fmt: skip
        if table is None:
            new.append(None)
            continue
        one = table.ndim == 1  # the bias
        how: Init = "mean" if one and init == "random" else init
        made = new_rows(table[:first].view(first, -1), pieces, how, seed + len(new)) if given is None else given
        finite("new rows", made)
        require(made.shape == (len(added), table[0].numel()), f"Rows must be ({len(added)}, {table[0].numel()})",
                tuple(made.shape), "Give one row for each new token, in the order of ids.")  # fmt: skip
        made = made.to(table)
        new.append(torch.cat([table[:first], made.flatten() if one else made]))
    require(rows is None or tables[1] is None or output_rows is not None, "An untied model needs output_rows= as well",
            None, "Place both tables in the same way.")  # fmt: skip
    assert new[0] is not None
    return with_token_rows(model, new[0], new[1], new[2]), sum(not piece for piece in pieces)


def new_rows(rows: Tensor, pieces: Sequence[Sequence[int]], init: Init = "subtoken_mean", seed: int = 0) -> Tensor:
    """Rows (new, D) for tokens, each of which is known by the old rows (V, D) of its pieces, if any.

    >>> new_rows(torch.tensor([[0.0], [2.0], [7.0]]), [[1], [0, 2], []]).flatten().tolist()
    [2.0, 3.5, 3.0]
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    mean = wide.mean(0)
    if init == "random":
        noise = torch.randn(len(pieces), rows.shape[1], generator=torch.Generator().manual_seed(seed)).to(wide)
        return (noise * wide.std(0, unbiased=False) + mean).to(rows.dtype)
    made = mean.repeat(len(pieces), 1)
    some = [k for k, piece in enumerate(pieces) if piece]
    if init == "subtoken_mean" and some:
        flat = torch.tensor([row for k in some for row in pieces[k]], device=rows.device)
        sizes = torch.tensor([len(pieces[k]) for k in some], device=rows.device)
        made[some] = F.embedding_bag(flat, wide, sizes.cumsum(0) - sizes, mode="mean")
    return made.to(rows.dtype)
