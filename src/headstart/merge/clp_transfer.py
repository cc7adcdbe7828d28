"""Give a trained language model the vocabulary of another language."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.core.paper import Paper
from headstart.core.validate import one_of, require
from headstart.nets.token_rows import token_rows, with_token_rows

from .vocabulary import Placed, Roles, Vocabulary, ids_of, paired, point_to, text_of

PAPER = Paper(
    title="Efficient Language Model Training through Cross-Lingual and Progressive Transfer Learning",
    authors="Malte Ostendorff and Georg Rehm",
    year=2023,
    arxiv="2301.09626",
    code="https://github.com/malteos/clp-transfer",
    departs='By default ("topk") a new row is the mean of the rows of the ten most similar tokens. All of the paper\'s '
    "weights, cosines over their sum, explode where the helper's rows are centred, and are refused. Untied output rows "
    "are placed as input rows are; special tokens go by role.",
)
Weighting = Literal["topk", "paper", "relu", "softmax"]


def clp_embeddings(
    source: Tensor, source_vocabulary: Vocabulary, helper: Tensor, helper_vocabulary: Vocabulary, *,
    weighting: Weighting = "topk", k: int = 10, temperature: float = 0.1, match_norm: bool = False,
    roles: Roles | None = None, spelling: Callable[[str], str] | None = None, counts: Mapping[str, int] | None = None,
    seed: int = 42, block: int = 1024,
) -> tuple[Tensor, Placed]:  # fmt: skip
    """A table of rows for another vocabulary: shared tokens keep theirs, the others are placed beside similar ones.

    What is similar is read from a small model of the target language, the helper: for a token that the source lacks,
    the source's rows of overlapping tokens are averaged, weighted by the cosines in the helper's space.

    Args:
        source: rows (V_s, D) of the large source model: its input embedding, output rows, or any table keyed by tokens.
        source_vocabulary: its token -> row, or its tokens in order.
        helper: rows (V_t, d) of a small target-language model; any d.
        helper_vocabulary: its token -> row; the target uses exactly this vocabulary.
        weighting: "topk" (the k largest cosines, none below 0), "relu" (all above 0), "softmax" (of cosine over
            temperature) or "paper" (all cosines, signed, over their sum).
        k: tokens that "topk" averages, >= 1.
        temperature: of "softmax", > 0.
        match_norm: stretch each missing row to the mean length of its contributors (not in the paper).
        roles: special tokens that are copied by role and contribute to no other row, see `roles_of`.
        spelling: the helper's token -> the source's spelling of it; needed where they mark word starts differently.
        counts: how often each helper token occurs in the target's text, for the report.
        seed: of the random rows that stay where nothing else is known; the paper's is 42.
        block: missing tokens handled at a time.

    Shape: (V_s, D), (V_t, d) -> (V_t, D) in the source's dtype, on its device.

    Use it when: there is a strong model, and a small one in your language, and the vocabularies share strings.
    Not when: the languages share no strings (use a dictionary), or no training on target text will follow.

    Cost: O(missing · overlap · (d + D)); memory of block · overlap similarities.

    Notes: computed in float32 or wider and rounded once. All but "paper" make convex combinations. A token whose
    helper row is zero, or has no positive cosine where those alone count, keeps a row drawn from N(mean, std) of the
    source, per dimension. Single bytes and false friends overlap too: see `frequent`.

    Raises:
        Refused: no overlap, duplicates or rows outside the table, NaN, unlike word-start markers without `spelling`,
            or signed weights that sum to less than a twentieth of their size ("paper").

    Reference: Ostendorff and Rehm 2023, cross-lingual and progressive transfer, and the released code.

    >>> helper = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
    >>> rows, report = clp_embeddings(torch.tensor([[7.0], [0.0]]), ["a", "b"], helper, ["a", "b", "c"])
    >>> [round(value, 4) for value in rows.flatten().tolist()], report.missing
    ([7.0, 0.0, 3.0], 1)
    """
    one_of("weighting", weighting, ["topk", "paper", "relu", "softmax"])
    require(k >= 1 and temperature > 0 and block >= 1, "clp_embeddings needs k >= 1, temperature > 0, block >= 1",
            (k, temperature, block), "Raise it.")  # fmt: skip
    theirs, ours = ids_of("source", source_vocabulary, source), ids_of("helper", helper_vocabulary, helper)
    pairs, special = paired(theirs, ours, roles or {}, spelling)
    place, wide = source.device, torch.promote_types(source.dtype, torch.float32)
    known = source[list(theirs.values())].to(wide)
    noise = torch.randn(max(ours.values()) + 1, source.shape[1], generator=torch.Generator().manual_seed(seed))
    table = noise.to(place, wide) * known.std(0, unbiased=False) + known.mean(0)
    for copied in (pairs, special):
        table[list(copied)] = source[list(copied.values())].to(wide)

    directions = _directions(helper.to(place, torch.promote_types(helper.dtype, torch.float32)))
    anchors, contributing = directions[list(pairs)], table[list(pairs)]  # (overlap, d), (overlap, D)
    lengths = contributing.norm(dim=1)
    missing = [row for row in ours.values() if row not in pairs and row not in special]
    fallback, effective, stretched = 0, 0.0, 0.0
    for rows in torch.split(torch.tensor(missing, dtype=torch.int64, device=place), block):
        weights = _weights(directions[rows] @ anchors.T, weighting, k, temperature)  # (block, overlap)
        alive = weights.abs().sum(1) > 0
        weights, rows = weights[alive].to(wide), rows[alive]
        placed = weights @ contributing
        if match_norm:
            size = weights.abs()
            placed *= ((size / size.sum(1, keepdim=True)) @ lengths / placed.norm(dim=1).clamp(min=1e-30))[:, None]
        table[rows] = placed
        fallback += int((~alive).sum())
        effective += float((1 / weights.square().sum(1)).sum())
        stretched += float(placed.norm(dim=1).sum())
    count = max(len(missing) - fallback, 1)
    covered, frequent = text_of(ours, pairs, counts)
    return table.to(source.dtype), Placed(
        overlap=len(pairs), by_role=len(special), missing=len(missing), fallback=fallback,
        contributors=effective / count, norm_ratio=stretched / count / max(float(lengths.mean()), 1e-30),
        covered=covered, frequent=frequent,
    )  # fmt: skip


def clp_transfer(
    model: nn.Module, source_vocabulary: Vocabulary, helper: Tensor, helper_vocabulary: Vocabulary, *,
    weighting: Weighting = "topk", k: int = 10, temperature: float = 0.1, match_norm: bool = False,
    roles: Roles | None = None, spelling: Callable[[str], str] | None = None, counts: Mapping[str, int] | None = None,
    seed: int = 42,
) -> tuple[nn.Module, Placed]:  # fmt: skip
    """A copy of a language model that speaks the helper's vocabulary; train it on target text and it catches up soon.

    Input rows, untied output rows and the output bias are replaced (bias: copied where the token is shared, else 0),
    and so are the configuration's vocabulary size and special tokens. Everything else stays.

    Args:
        model: a language model of transformers, or one with get_input_embeddings, get_output_embeddings and
            resize_token_embeddings as these have.
        source_vocabulary, helper, helper_vocabulary: as `clp_embeddings` takes them.
        weighting, k, temperature, match_norm, roles, spelling, counts, seed: likewise.

    Cost: one or two `clp_embeddings`, and a copy of the model.

    Notes: save the result with the helper's tokenizer. Without `roles` a special token of the configuration is the
    helper's token of the same string, or none.

    Raises:
        Refused: a model without such methods, and what `clp_embeddings` refuses.

    Reference: Ostendorff and Rehm 2023, cross-lingual and progressive transfer.

    >>> from headstart.core.rng import seeded
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> with seeded(0):
    ...     model = GPT2LMHeadModel(GPT2Config(vocab_size=2, n_positions=8, n_embd=4, n_layer=1, n_head=1))
    >>> new, report = clp_transfer(model, ["a", "b"], torch.eye(3) + 1, ["b", "a", "c"])
    >>> new.config.vocab_size, report.overlap, report.missing
    (3, 2, 1)
    """
    rest: dict[str, Any] = {"weighting": weighting, "k": k, "temperature": temperature, "match_norm": match_norm,
                            "roles": roles, "spelling": spelling, "counts": counts}  # fmt: skip
    old, old_output, old_bias = token_rows(model)
    rows, report = clp_embeddings(old, source_vocabulary, helper, helper_vocabulary, seed=seed, **rest)
    output = bias = None
    if old_output is not None:
        output, _ = clp_embeddings(old_output, source_vocabulary, helper, helper_vocabulary, seed=seed + 1, **rest)
    theirs, ours = ids_of("source", source_vocabulary, old), ids_of("helper", helper_vocabulary, helper)
    if old_bias is not None:
        bias = old_bias.new_zeros(len(rows))
        for copied in paired(theirs, ours, roles or {}, spelling):
            bias[list(copied)] = old_bias[list(copied.values())]
    new: Any = with_token_rows(model, rows, output, bias)
    for config in filter(None, (getattr(new, "config", None), getattr(new, "generation_config", None))):
        point_to(config, theirs, ours, roles or {})
    if (pad := getattr(getattr(new, "config", None), "pad_token_id", None)) is not None:
        new.get_input_embeddings().padding_idx = pad
    return new, report


def _directions(rows: Tensor) -> Tensor:
    """Rows of length 1; a zero row stays zero."""
    largest = rows.abs().amax(1, keepdim=True)
    scaled = rows / largest.where(largest > 0, 1)  # so that squares neither vanish nor overflow
    return F.normalize(scaled)


def _weights(cosines: Tensor, weighting: Weighting, k: int, temperature: float) -> Tensor:
    """Each row's weights, which sum to 1, or are all 0 where nothing resembles the token (b, overlap)."""
    if weighting == "softmax":
        return (cosines / temperature).softmax(1) * (cosines != 0).any(1, keepdim=True)
    raw = cosines if weighting == "paper" else cosines.clamp(min=0)
    if weighting == "topk" and k < raw.shape[1]:
        values, at = raw.topk(k, 1)
        raw = torch.zeros_like(raw).scatter(1, at, values)
    total, size = raw.sum(1, keepdim=True), raw.abs().sum(1, keepdim=True)
    unsafe = (total <= 0.05 * size) & (size > 0)
    require(not bool(unsafe.any()), "The paper's weights need cosines that are mostly positive",
            f"{int(unsafe.sum())} of {len(raw)} tokens whose cosines cancel", 'Pass weighting="topk".')  # fmt: skip
    return raw / total.where(size > 0, 1)
