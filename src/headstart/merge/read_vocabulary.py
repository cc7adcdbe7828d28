"""The vocabulary of a model folder: which token has which row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headstart.core.validate import require

from .file_values import json_object

_SAVE = "Save it with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."


def read_vocabulary(folder: Path | str) -> dict[str, int]:
    """Token -> row of the embedding, from the tokenizer's files in a model folder, in the order of the rows.

    Reads tokenizer.json; without it vocab.json or vocab.txt (one token a line), then added_tokens.json and the added
    tokens of tokenizer_config.json. No tokenizer is built and no code of the folder is run.

    Raises:
        Refused: no such file, a file of another form, a token of two rows, two tokens of one row.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "vocab.txt").write_text("[PAD]\\nthe\\n##s\\n")
    ...     _ = Path(folder, "added_tokens.json").write_text('{"<tool>": 3}')
    ...     read_vocabulary(folder)
    {'[PAD]': 0, 'the': 1, '##s': 2, '<tool>': 3}
    """
    folder = Path(folder)
    tokens: dict[str, int] = {}
    rows: dict[int, str] = {}
    for token, row in _entries(folder):
        good = isinstance(token, str) and isinstance(row, int) and not isinstance(row, bool) and row >= 0
        require(good, "A vocabulary must map tokens to rows", f"{token!r} -> {row!r} in {folder.name}", _SAVE)
        require(tokens.setdefault(token, row) == row, f"Each token of {folder.name} must have one row",
                f"{token!r} at {tokens[token]} and {row}", _SAVE)  # fmt: skip
        require(rows.setdefault(row, token) == token, f"Each row of {folder.name} must have one token",
                f"{rows[row]!r} and {token!r} at {row}", _SAVE)  # fmt: skip
    return dict(sorted(tokens.items(), key=lambda item: item[1]))


def _entries(folder: Path) -> Iterator[tuple[Any, Any]]:
    whole, table, lines = (folder / name for name in ("tokenizer.json", "vocab.json", "vocab.txt"))
    there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
    if whole.is_file():
        content = json_object(whole, _SAVE)
        model = content.get("model") or {}
        words: Any = model.get("vocab")
        require(bool(words), "tokenizer.json must hold a vocabulary", f"a model of type {model.get('type')!r}", _SAVE)
        # a unigram model lists [token, score] in the order of the rows
        yield from words.items() if isinstance(words, dict) else ((entry[0], row) for row, entry in enumerate(words))
        yield from ((entry.get("content"), entry.get("id")) for entry in content.get("added_tokens") or ())
        return
    require(table.is_file() or lines.is_file(), "A vocabulary needs tokenizer.json, vocab.json or vocab.txt", there,
            _SAVE)  # fmt: skip
    if table.is_file():
        yield from json_object(table, _SAVE).items()
    else:
        text = lines.read_text(encoding="utf-8").removesuffix("\n")
        yield from ((token.removesuffix("\r"), row) for row, token in enumerate(text.split("\n")))
    for name, key in (("added_tokens.json", ""), ("tokenizer_config.json", "added_tokens_decoder")):
        if (folder / name).is_file():
            added = json_object(folder / name, _SAVE)
            if not key:
                yield from added.items()
            else:
                yield from ((entry.get("content"), int(row)) for row, entry in (added.get(key) or {}).items())
