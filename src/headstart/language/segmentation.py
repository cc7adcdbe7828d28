"""Teach a trained tokenizer the frequent words of another language; what it knew keeps its ids."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import Any

from headstart.core.validate import require

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # stands for one byte; decoders know no merged ones


def backend_of(tokenizer: Any) -> Any:
    """The `tokenizers.Tokenizer` itself, or the one inside a fast tokenizer of transformers."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    known = callable(getattr(backend, "to_str", None))
    require(known, "This needs a tokenizer of the tokenizers package, or a fast one of transformers",
            type(tokenizer).__name__, "Load it with AutoTokenizer.")  # fmt: skip
    return backend


def extend_tokenizer(tokenizer: Any, texts: Iterable[str], new: int) -> Any:
    """A tokenizer with `new` more tokens, learnt on `texts` by merging on from where the old one stopped.

    New merges come after the old ones and new ids after the old ids, so a text is first cut as before; only where new
    merges apply are its pieces joined. Characters that the old tokenizer does not know come first, the most frequent
    ones, if they occur twice.

    Args:
        tokenizer: byte-pair encoding, of the tokenizers package or a fast one of transformers; it stays as it is.
        texts: in the other language, in the same Unicode normal form as the texts to come.
        new: tokens to add, >= 0.

    Returns:
        A tokenizer of the same class.

    Cost: like training a tokenizer: each merge looks at the distinct words it occurs in. Pure Python, 1 s for 60,000
    words and 250 tokens.

    Raises:
        Refused: no text, text too small for so many tokens, a tokenizer that is not byte-pair encoding.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers, decoders
    >>> old = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("▁abc")}, merges=[]))
    >>> old.pre_tokenizer, old.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    >>> longer = extend_tokenizer(old, ["abc abc ab"], 2)
    >>> longer.encode("ab abc").tokens
    ['▁ab', '▁ab', 'c']
    """
    backend = backend_of(tokenizer)
    layout = json.loads(backend.to_str())
    bpe = layout["model"]
    prefix = bpe.get("continuing_subword_prefix")
    require(bpe["type"] == "BPE" and not prefix, "extend_tokenizer needs byte-pair encoding without a subword prefix",
            f"{bpe['type']}, prefix {prefix!r}", "Train a new tokenizer and use merge.clp_transfer.")  # fmt: skip
    require(new >= 0, "extend_tokenizer needs new >= 0", new, "Pass the number of tokens to add.")
    texts = [texts] if isinstance(texts, str) else list(texts)
    words = _words(backend, texts)
    require(bool(words), "extend_tokenizer needs texts", "no words", "Pass text of the new language.")

    ids = backend.get_vocab(with_added_tokens=True)
    bpe["vocab"] = dict(ids)  # special tokens as well: they would be numbered anew after the vocabulary
    first = max(ids.values()) + 1
    letters: Counter[str] = Counter()
    for word, count in words.items():
        for letter in word:
            letters[letter] += count
    unseen = [c for c, count in letters.most_common() if c not in bpe["vocab"] and count > 1][:new]
    bpe["vocab"].update({c: first + k for k, c in enumerate(unseen)})
    model = _tokenizer(layout).model
    cut = Counter({tuple(piece.value for piece in model.tokenize(word)): count for word, count in words.items()})
    special = {token["content"] for token in layout["added_tokens"]} | {bpe["unk_token"]}
    old_style = bool(bpe["merges"]) and isinstance(bpe["merges"][0], str)
    ranked = {tuple(merge.split(" ") if old_style else merge) for merge in bpe["merges"]}
    merges = _merges(cut, new - len(unseen), set(bpe["vocab"]), special, ranked)
    for a, b in merges:
        bpe["vocab"].setdefault(a + b, len(bpe["vocab"]) + first - len(ids))
    bpe["merges"] += [f"{a} {b}" if old_style else [a, b] for a, b in merges]
    added = len(bpe["vocab"]) - len(ids)
    require(added == new, f"extend_tokenizer needs texts that repeat enough for {new} tokens", f"{added} found",
            "Pass more text, or ask for fewer.")  # fmt: skip
    return _tokenizer(layout) if backend is tokenizer else _rebuilt(tokenizer, layout)


def _tokenizer(layout: Mapping[str, Any]) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(layout))


def _rebuilt(tokenizer: Any, layout: Mapping[str, Any]) -> Any:
    """A fast tokenizer of the same class, by way of its own files."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(layout), encoding="utf-8")
        rebuilt = type(tokenizer).from_pretrained(folder)
    rebuilt.name_or_path = tokenizer.name_or_path
    return rebuilt


def _words(backend: Any, texts: Sequence[str]) -> Counter[str]:
    """How often each word occurs, as the tokenizer itself splits; at "▁" if it leaves the splitting to the merges."""
    words: Counter[str] = Counter()
    for text in texts:
        clean = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
        if backend.pre_tokenizer is not None:
            words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(clean))
        else:
            words.update(filter(None, re.split(r"(?=▁)", clean.replace(" ", "▁"))))
    return words


def _merges(
    cut: Mapping[tuple[str, ...], int], new: int, known: set[str], special: set[str | None],
    ranked: set[tuple[str, ...]],
) -> list[tuple[str, str]]:  # fmt: skip
    """The most frequent pairs, one after the other, until they made `new` tokens; pairs that occur once are left."""
    pieces, counts = [list(word) for word in cut], list(cut.values())
    total: Counter[tuple[str, str]] = Counter()
    where: dict[tuple[str, str], set[int]] = defaultdict(set)

    def count(index: int, sign: int) -> set[tuple[str, str]]:
        pairs = [p for p in pairwise(pieces[index]) if not any(t in special or _BYTE.fullmatch(t) for t in p)]
        for pair in pairs:
            total[pair] += sign * counts[index]
            where[pair].add(index)
        return set(pairs)

    for index in range(len(pieces)):
        count(index, 1)
    heap = [(-n, pair) for pair, n in total.items()]
    heapify(heap)  # the most frequent first, equal ones in the order of their letters
    found: list[tuple[str, str]] = []
    while new > 0 and heap:
        n, pair = heappop(heap)
        if -n != total[pair] or -n < 2:  # counted anew since, and then in the heap again
            continue
        if pair not in ranked:  # an earlier merge may apply again, to a token that came about in another way
            found.append(pair)
            ranked.add(pair)
        new -= pair[0] + pair[1] not in known
        known.add(pair[0] + pair[1])
        changed: set[tuple[str, str]] = set()
        for index in sorted(where.pop(pair)):
            changed |= count(index, -1)
            pieces[index] = _joined(pieces[index], pair)
            changed |= count(index, 1)
        for other in changed:
            heappush(heap, (-total[other], other))
    return found


def _joined(word: Sequence[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for piece in word:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined
