"""What a tokenizer and a language model make of a text, in units that no vocabulary changes."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.core.validate import require

from .segmentation import backend_of

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class TextFigures:
    """A language model on the held-out texts of one language.

    Attributes:
        characters: of the texts.
        tokens: they are cut into.
        fertility: tokens a character.
        bits_per_character: -log2 of the texts' probability over their characters; comparable across vocabularies.
        bits_per_byte: the same over their UTF-8 bytes; comparable across scripts.
        round_trip: share of texts that decode(encode(text)) gives back.
        scripts: share of the letters by script; a second one hints at names, code or another language.
        resegmented: share of the tokens before that the tokenizer now cuts otherwise; None without `before`.
    """

    characters: int
    tokens: int
    fertility: float
    bits_per_character: float
    bits_per_byte: float
    round_trip: float
    scripts: Mapping[str, float]
    resegmented: float | None


def encoded(tokenizer: Any, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Each text's ids, and where its tokens lie in it; no special tokens are added."""
    require(bool(texts) and all(texts), "Texts must not be empty", "an empty text" if texts else "no text",
            "Leave empty texts out.")  # fmt: skip
    if backend_of(tokenizer) is tokenizer:
        return [(e.ids, e.offsets) for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    found = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(zip(found["input_ids"], found["offset_mapping"], strict=True))


def windows(ids: Sequence[int], *, start: int, length: int = 128, overlap: int = 1) -> tuple[Tensor, Tensor]:
    """A text as inputs x and the tokens y that follow them, (n, length + overlap - 1) each; -100 where none is scored.

    Every token is scored once, after at least `overlap` tokens before it.

    Args:
        ids: of the text.
        start: stands before the text, `overlap` times, and after it to fill up the last window.
        length: tokens scored in each window, >= 1.
        overlap: tokens of context before the first of them, >= 1. A model with a context of c tokens takes c.

    >>> x, y = windows([5, 6, 7], start=0, length=2, overlap=2)
    >>> x.tolist(), y.tolist()
    ([[0, 0, 5], [5, 6, 7]], [[-100, 5, 6], [-100, 7, -100]])
    """
    require(len(ids) > 0, "windows needs tokens", "none", "Leave empty texts out.")
    require(length >= 1 and overlap >= 1, "windows needs length >= 1 and overlap >= 1", (length, overlap), "Raise it.")
    n, width = -(-len(ids) // length), length + overlap - 1
    tokens = torch.full((overlap + n * length,), start)
    tokens[overlap : overlap + len(ids)] = torch.as_tensor(ids)
    follow = tokens.clone()
    follow[overlap + len(ids) :] = IGNORED
    y = follow[1:].unfold(0, width, length).clone()
    y[:, : overlap - 1] = IGNORED
    return tokens[:-1].unfold(0, width, length), y


def nats(output: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    """The summed -log probability of the tokens y (n, t) that are not -100, and how many there are.

    Args:
        output: logits (n, p, V) of the last p <= t places, or an output of transformers that holds them.
        y: the tokens that follow.
    """
    logits: Tensor = getattr(output, "logits", output)
    asked = y != IGNORED
    unsaid = y.shape[1] - logits.shape[1]
    require(not bool(asked[:, :unsaid].any()), "A model must say what follows at each scored place",
            f"{logits.shape[1]} of {y.shape[1]} places", "Raise overlap to the model's context.")  # fmt: skip
    total = F.cross_entropy(logits.flatten(0, 1), y[:, unsaid:].flatten(), ignore_index=IGNORED, reduction="sum")
    return total, asked.sum()


@torch.no_grad()
def bits(model: nn.Module, pieces: Sequence[tuple[Tensor, Tensor]], batch: int = 64) -> float:
    """-log2 of the probability of all that is scored in `windows`; in eval mode, the model's mode is given back."""
    x, y = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        parts = zip(torch.split(x.to(device), batch), torch.split(y.to(device), batch), strict=True)
        return math.fsum(float(nats(model(a), b)[0]) for a, b in parts) / math.log(2)
    finally:
        for module, mode in modes.items():
            module.training = mode


def language_report(
    model: nn.Module, tokenizer: Any, texts: Mapping[str, Sequence[str]], *, start: int, before: Any = None,
    length: int = 128, overlap: int = 1,
) -> dict[str, TextFigures]:  # fmt: skip
    """How a language model does on each language, in bits a character, and how its tokenizer cuts it.

    Args:
        model: ids (n, t) -> logits (n, p, V).
        tokenizer: of the model.
        texts: language -> held-out texts, none empty.
        start: id that stands before each text, such as that of the end-of-text token.
        before: the tokenizer before it was extended, to see what it cuts otherwise.
        length, overlap: of the `windows` that are scored.

    Cost: one forward pass.

    Raises:
        Refused: an empty text, or a model that does not score each token.
    """
    figures = {}
    for language, some in texts.items():
        found = encoded(tokenizer, some)
        characters, tokens = sum(map(len, some)), sum(len(ids) for ids, _ in found)
        size = min(length, max(len(ids) for ids, _ in found))  # short texts need no long windows
        total = bits(model, [windows(ids, start=start, length=size, overlap=overlap) for ids, _ in found])
        decoded = [backend_of(tokenizer).decode(ids, skip_special_tokens=False) for ids, _ in found]
        letters: Counter[str] = Counter()
        for character, count in Counter("".join(some)).items():
            letters[script_of(character)] += count
        del letters[""]
        figures[language] = TextFigures(
            characters=characters, tokens=tokens, fertility=tokens / characters, bits_per_character=total / characters,
            bits_per_byte=total / sum(len(text.encode()) for text in some),
            round_trip=sum(a == b for a, b in zip(some, decoded, strict=True)) / len(some),
            scripts={script: count / letters.total() for script, count in letters.most_common()},
            resegmented=None if before is None else resegmented(before, tokenizer, some),
        )  # fmt: skip
    return figures


def fertility(tokenizer: Any, texts: Sequence[str]) -> float:
    """Tokens a character."""
    return sum(len(ids) for ids, _ in encoded(tokenizer, texts)) / sum(map(len, texts))


def resegmented(before: Any, after: Any, texts: Sequence[str]) -> float:
    """The share of the tokens of one tokenizer that another does not cut out of the same places."""
    pairs = list(zip(encoded(before, texts), encoded(after, texts), strict=True))
    kept = sum((Counter(old) & Counter(new)).total() for (_, old), (_, new) in pairs)
    return 1 - kept / sum(len(old) for (_, old), _ in pairs)


def script_of(character: str) -> str:
    """The script of a letter, by its Unicode name, such as LATIN or CJK; '' for anything but letters.

    >>> script_of("ß"), script_of("я"), script_of("語"), script_of("7")
    ('LATIN', 'CYRILLIC', 'CJK', '')
    """
    return unicodedata.name(character, "").split(" ")[0] if character.isalpha() else ""


def code_switching_rate(responses: Sequence[str], scripts: Collection[str]) -> float:
    """The share of responses with a letter of a script that was not asked for.

    Languages that share a script are not told apart.

    Args:
        responses: what the model said.
        scripts: the target's, such as {"CJK"} or {"HIRAGANA", "KATAKANA", "CJK"}; see `script_of`.

    >>> code_switching_rate(["да", "да, of course", "100"], {"CYRILLIC"})
    0.3333333333333333
    """
    require(bool(responses), "code_switching_rate needs responses", "none", "Pass strings.")
    require(bool(scripts) and not isinstance(scripts, str), "scripts must be a set of names", repr(scripts),
            'Pass {"CYRILLIC"}, for example.')  # fmt: skip
    return sum(any(script and script not in scripts for script in map(script_of, r)) for r in responses) / len(
        responses
    )
