"""Two vocabularies side by side: checked rows, the marker of a word's start, special tokens by role."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from headstart.core.validate import finite, one_of, require

Vocabulary: TypeAlias = Mapping[str, int] | Sequence[str]
"""Token -> row of the embedding, as `tokenizer.get_vocab()` gives it, or the tokens in the order of the rows."""
Roles: TypeAlias = Mapping[str, tuple[str | None, str]]
"""Role, such as "eos" -> the source's token for it (None where it has none) and the helper's."""

ROLES = ("eos", "bos", "pad", "unk")
MARKERS = ("Ġ", "▁", "##")


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where the rows of a transferred table come from.

    Attributes:
        overlap: tokens that both vocabularies have; their rows are copied.
        by_role: special tokens whose rows are copied by role.
        missing: tokens that only the helper has.
        fallback: of those, how many resemble no overlapping token and keep a random row.
        contributors: rows that effectively make up a missing one, the mean of 1 / Σ w².
        norm_ratio: mean length of the missing rows over that of the overlapping ones.
        covered: share of the target's text that overlapping tokens make up; None without `counts`.
        frequent: the 20 most frequent overlapping tokens, to look through for false friends.
    """

    overlap: int
    by_role: int
    missing: int
    fallback: int
    contributors: float
    norm_ratio: float
    covered: float | None
    frequent: tuple[str, ...]


def ids_of(name: str, vocabulary: Vocabulary, rows: Tensor) -> dict[str, int]:
    """Token -> row, in the order of the rows; a vocabulary that does not fit its table is refused.

    Rows beyond the last token are padding, as checkpoints have, and are not looked at.
    """
    require(rows.ndim == 2 and rows.is_floating_point(), f"The {name} rows must be a floating table (tokens, width)",
            f"{rows.dtype} {tuple(rows.shape)}", "Pass the weight of the input embedding.")  # fmt: skip
    pairs = list(vocabulary.items()) if isinstance(vocabulary, Mapping) else [(t, k) for k, t in enumerate(vocabulary)]
    require(bool(pairs), f"The {name} vocabulary must have tokens", "none", "Pass tokenizer.get_vocab().")
    for what, values in (("token", [token for token, _ in pairs]), ("row", [row for _, row in pairs])):
        seen: set[Any] = set()
        twice = [value for value in values if value in seen or seen.add(value)]  # type: ignore[func-returns-value]
        require(not twice, f"Each {what} of the {name} vocabulary must occur once", twice[:3], "Remove duplicates.")
    outside = [token for token, row in pairs if not 0 <= row < len(rows)]
    require(not outside, f"The {name} vocabulary must name rows 0..{len(rows) - 1}", outside[:3],
            "Pass the tokenizer that belongs to the table.")  # fmt: skip
    ids = dict(sorted(pairs, key=lambda pair: pair[1]))
    finite(f"{name} rows", rows[list(ids.values())])
    return ids


def marker_of(vocabulary: Mapping[str, int]) -> str:
    """How this family of tokenizers marks where a word starts or goes on; '' if it does not.

    >>> marker_of({"Ġthe": 0, "the": 1, "Ġof": 2}), marker_of({"a": 0})
    ('Ġ', '')
    """
    counts = {marker: sum(token.startswith(marker) for token in vocabulary) for marker in MARKERS}
    most = max(counts, key=lambda marker: counts[marker])
    return most if counts[most] else ""


def roles_of(source: Any, helper: Any) -> dict[str, tuple[str | None, str]]:
    """The special tokens of two transformers tokenizers, role by role.

    Args:
        source: the source's tokenizer.
        helper: the helper's; a role that it lacks is left out.
    """
    pairs = {role: (getattr(source, f"{role}_token", None), getattr(helper, f"{role}_token", None)) for role in ROLES}
    return {role: (theirs, ours) for role, (theirs, ours) in pairs.items() if ours is not None}


def paired(
    theirs: Mapping[str, int], ours: Mapping[str, int], roles: Roles, spelling: Callable[[str], str] | None
) -> tuple[dict[int, int], dict[int, int]]:
    """Helper's row -> source's row: of the tokens both have, and of special tokens by role (the first role counts).

    Raises:
        Refused: an unknown role or token, unlike word-start markers without `spelling`, no overlap.
    """
    special: dict[int, int] = {}
    for role, (source, helper) in roles.items():
        one_of("A role", role, ROLES)
        known = helper in ours and (source is None or source in theirs)
        require(known, "Roles must name tokens that exist", (role, source, helper), "Pass roles_of(source, helper).")
        if source is not None:
            special.setdefault(ours[helper], theirs[source])
    markers = marker_of(theirs), marker_of(ours)
    require(spelling is not None or "" in markers or markers[0] == markers[1],
            "Both vocabularies must mark word starts alike, or the overlap is accidental", markers,
            "Pass spelling=, from the helper's token to the source's spelling.")  # fmt: skip
    spell = spelling or str
    shared = {row: theirs[spell(t)] for t, row in ours.items() if spell(t) in theirs and row not in special}
    require(
        bool(shared), "The vocabularies must share tokens", "no token of both", "Check the spelling of word starts."
    )
    return shared, special


def text_of(
    ours: Mapping[str, int], shared: Mapping[int, int], counts: Mapping[str, int] | None
) -> tuple[float | None, tuple[str, ...]]:
    """Which share of the text the shared tokens are, and the 20 most frequent (without counts, the first)."""
    names = [token for token, row in ours.items() if row in shared]
    if counts is None:
        return None, tuple(names[:20])
    total = sum(counts.get(token, 0) for token in ours)
    require(total > 0, "counts must count tokens of the helper's vocabulary", "none of them", "Encode target text.")
    names.sort(key=lambda token: -counts.get(token, 0))
    return sum(counts.get(token, 0) for token in names) / total, tuple(names[:20])


def point_to(config: Any, theirs: Mapping[str, int], ours: Mapping[str, int], roles: Roles) -> None:
    """Let a configuration's special tokens name rows of the new vocabulary: by role, else by string, else none."""
    tokens = {row: token for token, row in theirs.items()}
    for role in ROLES:
        old, name = getattr(config, f"{role}_token_id", None), f"{role}_token_id"
        olds: list[Any] = old if isinstance(old, list) else [old]
        found = [ours[tokens[row]] for row in olds if row in tokens and tokens[row] in ours]
        new = ours[roles[role][1]] if role in roles else found if isinstance(old, list) else next(iter(found), None)
        if new or new == 0 or old is not None:
            setattr(config, name, None if new == [] else new)
