"""Models of different vocabularies brought to one, row by row of the same token, so that they can be merged."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headstart.core.validate import one_of, require
from headstart.core.weights import Weights, spec_of

from .row_view import RowView

INPUTS = frozenset({"embed_in", "embed_tokens", "embeddings", "shared", "tok_embeddings", "word_embeddings", "wte"})
"""What models call the layer of their input embedding."""
OUTPUTS = frozenset({"embed_out", "generator_lm_head", "lm_head", "predictions", "proj_out", "vocab_projector"})
"""What they call the layer of their output rows, or the part that it is in."""


@dataclass(frozen=True)
class Counts:
    """How one model's vocabulary compares with the common one.

    Attributes:
        shared: tokens it has in common with the base.
        moved: of those, how many have another row.
        missing: tokens of the common vocabulary that it lacks.
        dropped: its tokens that the common vocabulary leaves out.
    """

    shared: int
    moved: int
    missing: int
    dropped: int


@dataclass(frozen=True)
class Alignment:
    """Models with the same rows for the same tokens.

    Attributes:
        models: in the order given; views that read when asked.
        base: the base, or None if none was given.
        vocabulary: token -> row of all of them.
        rows: of each vocabulary tensor; at least the tokens, as checkpoints are padded. Set vocab_size to it.
        counts: of each model.
        averaged: tokens that the base lacks; its rows for them are means of the models that have them.
    """

    models: tuple[Weights, ...]
    base: Weights | None
    vocabulary: dict[str, int]
    rows: int
    counts: tuple[Counts, ...]
    averaged: tuple[str, ...]


def align_vocabularies(
    models: Sequence[Weights], vocabularies: Sequence[Mapping[str, int]], *, base: Weights | None = None,
    base_vocabulary: Mapping[str, int] | None = None, policy: Literal["base", "union"] = "base",
    tensors: Collection[str] | None = None,
) -> Alignment:  # fmt: skip
    """The same models with the embedding and output rows of each token in the same place.

    Args:
        models: weights; only rows of `tensors` are touched.
        vocabularies: token -> row of each model, see `read_vocabulary`.
        base: the common ancestor, whose order of rows is kept; without it the first model's.
        base_vocabulary: the base's, if there is a base.
        policy: "base" keeps the base's tokens and leaves out others; "union" puts the others after the base's rows.
        tensors: names of the tensors whose first dimension is the vocabulary; None finds them (`vocabulary_tensors`).

    Use it when: fine-tuned models added special tokens, or padded or resized their embeddings.
    Not when: the tokenizers split text differently; shared strings then mean little, and rows are no common language.

    Cost: nothing until a tensor is read; then it, and where tokens are missing, the base's.

    Notes: a token that a model lacks takes the base's row, so that its change is zero; so does a row without a token
    (padding) unless the model has no token there either. A token that the base lacks takes the mean of the models that
    have it, in the base and in models that lack it: with one such model its row comes out unchanged, whatever the rule.
    The merged model needs a tokenizer of `vocabulary`.

    Raises:
        Refused: rows outside a tensor, two tokens of one row, no tensor found, or another tensor that has the
            vocabulary's size where rows move.

    >>> one, two = {"wte": torch.tensor([[1.0], [2.0]])}, {"wte": torch.tensor([[5.0], [4.0], [3.0]])}
    >>> found = align_vocabularies([one, two], [{"a": 0, "b": 1}, {"<x>": 0, "b": 1, "a": 2}], policy="union")
    >>> [model["wte"].flatten().tolist() for model in found.models], found.counts[1]
    ([[1.0, 2.0, 5.0], [3.0, 4.0, 5.0]], Counts(shared=2, moved=1, missing=0, dropped=0))
    """
    one_of("policy", policy, ["base", "union"])
    require(len(models) == len(vocabularies) >= 1, "Each model needs its vocabulary",
            f"{len(vocabularies)} for {len(models)} models", "Read one from each folder.")  # fmt: skip
    require((base is None) == (base_vocabulary is None), "A base comes with its vocabulary", "one without the other",
            "Pass base= and base_vocabulary=, or neither.")  # fmt: skip
    reference = models[0] if base is None else base
    known = dict(vocabularies[0] if base_vocabulary is None else base_vocabulary)
    names = tuple(vocabulary_tensors(reference, known) if tensors is None else tensors)
    for who, weights, vocabulary in (("the base", reference, known), *(
        (f"model {k}", *pair) for k, pair in enumerate(zip(models, vocabularies, strict=True)))):  # fmt: skip
        _fits(who, names, weights, vocabulary, reference)
    kept = spec_of(reference, names[0]).shape[0]
    others = (sorted(v.keys() - known.keys(), key=v.__getitem__) for v in vocabularies)
    new = dict.fromkeys(token for tokens in others for token in tokens) if policy == "union" else {}
    common = known | {token: kept + k for k, token in enumerate(new)}
    rows = kept + len(new)
    lengths = [min(spec_of(weights, name).shape[0] for name in names) for weights in models]
    places = [_places(common, v, rows, min(kept, n)) for v, n in zip(vocabularies, lengths, strict=True)]
    donors = list(zip(models, places, strict=True))
    first = (reference, _places(common, known, rows, kept))
    views = [RowView(names, weights, own, reference, kept, donors) for weights, own in [first, *donors]]
    changed = [view for view in views if not view.same]
    if changed and tensors is None:
        odd = [n for n in reference if n not in names and kept in spec_of(reference, n).shape]
        require(not odd, "It must be clear which tensors have a row for each token", f"{odd[:3]} of size {kept} too",
                f"Name all that have: tensors={list(names)}, or more.")  # fmt: skip
    lazy = [view.weights if view.same else view for view in views]
    counts = tuple(_counts(vocabulary, known, common) for vocabulary in vocabularies)
    return Alignment(tuple(lazy[1:]), None if base is None else lazy[0], common, rows, counts, tuple(new))


def vocabulary_tensors(weights: Weights, vocabulary: Mapping[str, int]) -> list[str]:
    """Names of the tensors with a row for each token: of `INPUTS` and `OUTPUTS`, as long as the longest input.

    Raises:
        Refused: there is none that holds all rows of the vocabulary.
    """
    lengths = {name: spec_of(weights, name).shape[:1] for name in weights}
    inputs = [name for name in weights if name.split(".")[-2:][0] in INPUTS]
    (rows,) = max((lengths[name] for name in inputs if lengths[name]), default=(0,))
    needed = max(vocabulary.values(), default=0) + 1
    require(rows >= needed, f"An embedding must have a row for each of {needed} tokens", f"{rows} in {inputs[:3]}",
            "Name the tensors, or pass the tokenizer that belongs to the model.")  # fmt: skip
    return [name for name, length in lengths.items()
            if length == (rows,) and (name in inputs or OUTPUTS & set(name.split(".")))]  # fmt: skip


def _fits(who: str, names: Sequence[str], weights: Weights, vocabulary: Mapping[str, int], reference: Weights) -> None:
    require(bool(names) and bool(vocabulary), "Vocabularies and the tensors of their rows must not be empty",
            f"{len(names)} tensors, {len(vocabulary)} tokens of {who}", "Name tensors, pass tokens.")  # fmt: skip
    taken = list(vocabulary.values())
    require(len(set(taken)) == len(taken) and min(taken) >= 0, f"Each token of {who} must have a row of its own",
            f"{len(set(taken))} rows for {len(taken)} tokens", "Pass token -> row.")  # fmt: skip
    for name in names:
        require(name in weights, f"All models must have {name!r}", f"{who} without it", "Merge models of one kind.")
        own, shape = spec_of(weights, name).shape, spec_of(reference, name).shape
        require(len(own) >= 1 and own[1:] == shape[1:], f"Rows of {name!r} must have one shape, {shape[1:]}",
                f"{own[1:]} in {who}", "Merge models of one width.")  # fmt: skip
        require(own[0] > max(taken), f"{name!r} must have a row for each token", f"{own[0]} rows in {who} and row "
                f"{max(taken)}", "Pass the tokenizer that belongs to the model.")  # fmt: skip
    length = {spec_of(reference, name).shape[0] for name in names}
    require(len(length) == 1, "Vocabulary tensors of the base must have one length", sorted(length), "Name fewer.")


def _places(common: Mapping[str, int], vocabulary: Mapping[str, int], rows: int, padded: int) -> Tensor:
    """Of each common row, the model's own row, or -1; (rows,). Below `padded`, what is no token in both stays."""
    own = torch.full((rows,), -1)
    own[:padded] = torch.arange(padded)
    tokens = torch.tensor([*vocabulary.values(), *common.values()], dtype=torch.int64)
    own[tokens[tokens < rows]] = -1
    pairs = [(row, vocabulary[token]) for token, row in common.items() if token in vocabulary]
    own[[new for new, _ in pairs]] = torch.tensor([old for _, old in pairs], dtype=torch.int64)
    return own


def _counts(vocabulary: Mapping[str, int], known: Mapping[str, int], common: Mapping[str, int]) -> Counts:
    shared = vocabulary.keys() & known.keys()
    inside = len(vocabulary.keys() & common.keys())
    moved = sum(vocabulary[token] != known[token] for token in shared)
    return Counts(len(shared), moved, len(common) - inside, len(vocabulary) - inside)
