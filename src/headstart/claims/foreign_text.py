"""English that ships with a package, a foreign language made of it, and a small tokenizer."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch


@cache
def words() -> list[str]:
    """The words of scikit-learn's docstrings: lower-case letters, fewer than 14."""
    import sklearn

    found: list[str] = []
    for path in sorted(Path(sklearn.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = (ast.get_docstring(node) or "").lower()
                found += [word for word in re.findall("[a-z]+", text) if len(word) < 14]
    return found


def lines(some: list[str]) -> list[str]:
    """Texts of 600 words."""
    return [" ".join(some[k : k + 600]) for k in range(0, len(some), 600)]


def foreign(some: list[str], seed: int) -> list[str]:
    """Consonants stand for other consonants, vowels for other vowels, and every six words are said backwards."""
    generator = torch.Generator().manual_seed(seed)
    alphabet = {}
    for group in ("aeiouy", "bcdfghjklmnpqrstvwxz"):
        order = torch.randperm(len(group), generator=generator).tolist()
        alphabet.update({ord(a): group[k] for a, k in zip(group, order, strict=True)})
    return [w.translate(alphabet) for k in range(0, len(some), 6) for w in reversed(some[k : k + 6])]


def trained_tokenizer(texts: list[str]) -> Any:
    """250 byte-pair merges over the letters and the mark of a word's start."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=277, show_progress=False))
    return tokenizer
