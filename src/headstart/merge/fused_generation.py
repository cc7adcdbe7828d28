"""Text from a large language model with what small experts learnt, through transformers' `generate`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headstart.core.validate import require

from .dynamic_logits_fusion import Direction, Mode, check_options, fuse_logits


def common_vocabulary(vocabularies: Sequence[Mapping[str, int]]) -> int:
    """How many first tokens several vocabularies share, id for id; what `vocabulary=` cuts the logits to.

    Args:
        vocabularies: token -> id of each model, as `tokenizer.get_vocab()` gives it.

    Raises:
        Refused: an id below that number stands for different tokens: the tokenizers differ.

    >>> common_vocabulary([{"a": 0, "b": 1}, {"a": 0, "b": 1, "<chat>": 2}])
    2
    """
    require(len(vocabularies) >= 2 and all(vocabularies), "common_vocabulary needs two vocabularies with tokens",
            [len(v) for v in vocabularies], "Pass tokenizer.get_vocab() of every model.")  # fmt: skip
    tokens = [{row: token for token, row in vocabulary.items()} for vocabulary in vocabularies]
    common = min(max(rows) for rows in tokens) + 1
    for row in range(common):
        named = {rows.get(row) for rows in tokens}
        require(len(named) == 1, f"Id {row} must be the same token in every vocabulary",
                sorted(map(str, named)), "Use models that share a tokenizer.")  # fmt: skip
    return common


class FusionProcessor:
    """Lets a large language model write with the skills of small fine-tuned ones: `fuse_logits` at every token.

    Hand it to `large.generate(..., logits_processor=[FusionProcessor(small, experts, attention_mask=mask)])`. The small
    models read the same prefix as the large one, with key/value caches of their own; alpha is found anew for each token
    and sequence, and kept in `weights`, (rows, experts) a token. Make one for each call of `generate`.

    Args:
        small: causal language model of transformers that the experts were fine-tuned from, in eval mode.
        experts: models fine-tuned from it.
        attention_mask: that of the prompts (n, length), padded on the left; needed where the prompts differ.
        cached: keep the small models' keys and values; False reads the whole prefix at every token.
        direction, mode, most, grid, vocabulary: as for `fuse_logits`; entries beyond `vocabulary` are never written.

    Use it when: the models share a tokenizer and a prompt format.
    Not when: the large model and the expert were trained on different prompt formats.

    Cost: a token of `small` and of every expert beside each token of the large model, and their caches.

    Notes: greedy search, sampling, several sequences a prompt, and beam search, where the caches follow the beams.
    `generate` applies temperature, top-k and top-p after this, but penalties that are given to it by name
    (repetition_penalty=...) before: list their processors after this one instead. What comes out are log-probabilities.

    Raises:
        Refused: models in training mode or with an encoder, prompts that differ without a mask, padding on the right, a
            second batch of prompts, and what `fuse_logits` refuses.

    Reference: Fan et al. 2024, section 3.
    """

    def __init__(
        self, small: Any, experts: Sequence[Any], *, attention_mask: Tensor | None = None, cached: bool = True,
        direction: Direction = "symmetric", mode: Mode = "axis", most: float = 2.0,
        grid: Sequence[float] | None = None, vocabulary: int | None = None,
    ) -> None:  # fmt: skip
        check_options(direction, mode, most, grid)
        require(len(experts) > 0, "FusionProcessor needs an expert", "none", "Pass experts=[model, ...].")
        self.models = [small, *experts]
        for name, model in ((type(model).__name__, model) for model in self.models):
            require(not model.training, "FusionProcessor needs models in eval mode", f"{name} in training mode",
                    "Call .eval() on it.")  # fmt: skip
            require(not model.config.is_encoder_decoder, "FusionProcessor needs models without an encoder", name,
                    "Use causal language models.")  # fmt: skip
        if attention_mask is not None:
            left = bool((attention_mask[:, -1] == 1).all()) and bool((attention_mask.diff(dim=1) >= 0).all())
            require(left, "The prompts must be padded on the left", "a mask that is 0 after a 1",
                    'Set tokenizer.padding_side = "left".')  # fmt: skip
        self.attention_mask, self.cached = attention_mask, cached
        self.settings: dict[str, Any] = {"direction": direction, "mode": mode, "most": most, "grid": grid}
        self.vocabulary = vocabulary
        self.weights: list[Tensor] = []
        self._prompt: Tensor | None = None
        self._caches: list[Any] = [None] * len(self.models)
        self._seen: tuple[Tensor, Tensor] | None = None  # prefix and mask that the caches hold

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The fused log-probabilities of the next token (rows, V), from the prefix and the large model's scores."""
        mask = self._mask(input_ids)
        if not self._goes_on(input_ids, mask):
            self._forget()
        logits = [self._next(k, input_ids, mask).to(scores.device) for k in range(len(self.models))]
        self._seen = (input_ids.clone(), mask) if self.cached else None
        fused, weights = fuse_logits(scores, logits[0], logits[1:], vocabulary=self.vocabulary, **self.settings)
        self.weights.append(weights)
        written = torch.full_like(scores, -torch.inf, dtype=fused.dtype)
        written[:, : fused.shape[1]] = fused.log_softmax(-1)
        return written

    def _forget(self) -> None:
        self._caches, self._seen = [None] * len(self.models), None

    def _mask(self, ids: Tensor) -> Tensor:
        """The mask of the whole prefix; begins again where the prefix is a prompt."""
        first = self._prompt
        if first is None or ids.shape[1] <= first.shape[1] or not torch.equal(ids[:, : first.shape[1]], first):
            self._begin(ids)
        full, mask = torch.ones_like(ids), self.attention_mask
        if mask is not None:
            full[:, : mask.shape[1]] = mask.to(ids.device).repeat_interleave(len(ids) // len(mask), 0)
        return full

    def _begin(self, ids: Tensor) -> None:
        require(ids.ndim == 2 and ids.numel() > 0, "FusionProcessor needs a prompt of token ids", tuple(ids.shape),
                "Pass input_ids to generate, not inputs_embeds.")  # fmt: skip
        if self.attention_mask is None:
            require(bool((ids == ids[:1]).all()), "Prompts that differ need attention_mask=", None,
                    "Pass the tokenizer's, padded on the left.")  # fmt: skip
        else:
            require(self._prompt is None or torch.equal(ids, self._prompt), "A mask belongs to one batch of prompts",
                    "another prompt", "Make a FusionProcessor for each call of generate.")  # fmt: skip
            rows, length = self.attention_mask.shape
            require(len(ids) % rows == 0 and ids.shape[1] == length, "attention_mask must be the prompts'",
                    (rows, length), f"Pass that of these prompts, {tuple(ids.shape)}.")  # fmt: skip
        self._prompt, self.weights = ids.clone(), []
        self._forget()

    def _goes_on(self, ids: Tensor, mask: Tensor) -> bool:
        """Whether these prefixes go on from what the caches hold, which are then in the order of the rows."""
        if self._seen is None or self._seen[0].shape[0] != len(ids) or self._seen[0].shape[1] >= ids.shape[1]:
            return False
        length = self._seen[0].shape[1]
        both = (ids[:, :length], mask[:, :length]), self._seen
        now, before = (rows.masked_fill(kept == 0, -1) for rows, kept in both)  # alike only where the masks are, too
        if torch.equal(now, before):
            return True
        same = (now[:, None] == before[None]).all(-1)  # (rows, rows)
        reorder: list[Any] = [getattr(cache, "reorder_cache", None) for cache in self._caches]
        if None in reorder or not bool(same.any(1).all()):
            return False
        for move in reorder:
            move(same.int().argmax(1))
        return True

    def _next(self, k: int, ids: Tensor, mask: Tensor) -> Tensor:
        """Next-token logits of one model, which reads what its cache lacks."""
        model = self.models[k]
        read = self._seen[0].shape[1] if self._seen and self._caches[k] is not None else 0
        inner = getattr(model, "get_base_model", lambda: model)()  # of peft's wrapper, which hides the arguments
        known = inspect.signature(inner.forward).parameters
        more: dict[str, Any] = {name: 1 for name in ("logits_to_keep", "num_logits_to_keep") if name in known}
        if "position_ids" in known:
            more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, read:].to(model.device)
        output = model(
            input_ids=ids[:, read:].to(model.device), attention_mask=mask.to(model.device),
            past_key_values=self._caches[k], use_cache=self.cached, **more,
        )  # fmt: skip
        self._caches[k] = output.past_key_values if self.cached else None
        logits: Tensor = output.logits[:, -1]
        return logits
