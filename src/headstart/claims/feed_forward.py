"""A small feed-forward language model with the token tables that models of transformers have."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from headstart.core.rng import seeded


class FeedForward(nn.Module):
    """Says the next token from the last `context` ones: ids (n, t) -> logits (n, t - context + 1, tokens)."""

    def __init__(self, tokens: int, context: int, width: int, hidden: int, *, tied: bool) -> None:
        super().__init__()
        self.context, self.tied = context, tied
        self.embed = nn.Embedding(tokens, width)
        self.think = nn.Linear(context * width, hidden)
        self.join = nn.Linear(hidden, width) if tied else nn.Identity()
        self.say = nn.Linear(width if tied else hidden, tokens)
        if tied:  # so that a fresh model says every token alike
            nn.init.normal_(self.embed.weight, std=0.1)
            nn.init.zeros_(self.say.bias)
        self._tie()

    def _tie(self) -> None:
        if self.tied:
            self.say.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        seen = self.embed(ids).unfold(1, self.context, 1).transpose(2, 3)  # (n, places, context, width)
        logits: Tensor = self.say(self.join(F.relu(self.think(seen.flatten(2)))))
        return logits

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def get_output_embeddings(self) -> nn.Linear:
        return self.say

    def resize_token_embeddings(self, tokens: int, mean_resizing: bool = True) -> None:
        """Tables of another size; what stands in them is left to the caller."""
        self.embed = nn.Embedding(tokens, self.embed.embedding_dim)
        self.say = nn.Linear(self.say.in_features, tokens)
        self._tie()


def fresh(tokens: int, context: int, width: int, hidden: int, seed: int, *, tied: bool) -> FeedForward:
    """With random weights of this seed."""
    with seeded(seed):
        return FeedForward(tokens, context, width, hidden, tied=tied)
