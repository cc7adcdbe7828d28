"""Several classifiers as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from headstart.core.validate import require


class Ensemble(nn.Module):
    """The mean of the members' probabilities, as log-probabilities (n, c); the logits themselves of a single member.

    Args:
        members: classifiers of the same classes, trained or not. They are held, not copied.

    Cost: one forward pass of every member.

    Raises:
        Refused: no members, or two that share a parameter (the same module listed twice, for instance).

    >>> a, b = nn.Linear(2, 3), nn.Linear(2, 3)
    >>> round(Ensemble([a, b])(torch.ones(1, 2)).exp().sum().item(), 4)
    1.0
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        require(bool(members), "An ensemble needs members", "none", "Pass one classifier or more.")
        places = [{p.data_ptr() for p in member.parameters() if p.numel()} - {0} for member in members]
        shared = sum(map(len, places)) - len(set().union(*places))
        require(shared == 0, "Members of an ensemble must not share parameters", f"{shared} shared ones",
                "Give each member its own copy (copy.deepcopy).")  # fmt: skip
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.members) == 1:
            return cast(Tensor, self.members[0](x))
        likely = torch.stack([member(x).log_softmax(-1) for member in self.members])
        return likely.logsumexp(0) - math.log(len(self.members))
