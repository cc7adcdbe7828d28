"""Bags of instances, any number each: padding, and a gated-attention network that reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headstart.core.validate import finite, require


def padded(bags: Sequence[Tensor]) -> dict[str, Tensor]:
    """Bags (K_i, d) of any sizes as one batch: "instances" (n, K, d), zero where there is none, and "mask" (n, K).

    Raises:
        Refused: no bag, an empty bag, bags of different widths, NaN.

    >>> batch = padded([torch.ones(2, 3), torch.ones(1, 3)])
    >>> batch["instances"].shape, batch["mask"].tolist()
    (torch.Size([2, 2, 3]), [[True, True], [True, False]])
    """
    shapes = [tuple(bag.shape) for bag in bags]
    good = bool(bags) and all(bag.ndim == 2 and len(bag) > 0 for bag in bags) and len({s[-1] for s in shapes}) == 1
    require(good, "Bags must be matrices (instances, d) of one width, none empty", shapes[:5], "Extract all alike.")
    for bag in bags:
        finite("A bag", bag)
    sizes = torch.tensor([len(bag) for bag in bags], device=bags[0].device)
    mask = torch.arange(int(sizes.max()), device=sizes.device) < sizes[:, None]
    return {"instances": nn.utils.rnn.pad_sequence(list(bags), batch_first=True), "mask": mask}


class ABMIL(nn.Module):
    """Attention over the instances of a bag, gated; the weighted sum of their embeddings is the bag, read by `head`.

    Args:
        inputs: width of an instance.
        outputs: of `head`.
        width: of an embedding and of the bag.
        attention: hidden width of the attention.
        dropout: on both branches of the attention, in training.

    Shape: (n, K, inputs), or a mapping with "instances" and "mask" (n, K) -> (n, outputs); `bag` gives (n, width).

    Cost: O(n K (inputs + attention) width); padding is computed and thrown away, so batch bags of similar sizes.

    Raises:
        Refused: instances of another width, a bag of which everything is masked.

    Reference: Ilse et al. 2018, equation 9.
    """

    def __init__(
        self, inputs: int, outputs: int, *, width: int = 512, attention: int = 384, dropout: float = 0.25
    ) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(inputs, width), nn.ReLU())
        self.content = nn.Sequential(nn.Linear(width, attention), nn.Tanh(), nn.Dropout(dropout))
        self.gate = nn.Sequential(nn.Linear(width, attention), nn.Sigmoid(), nn.Dropout(dropout))
        self.weigh = nn.Linear(attention, 1)
        self.head = nn.Linear(width, outputs)

    def bag(self, x: Any) -> Tensor:
        """The bag's vector (n, width); padding gets no weight."""
        instances, mask = (x["instances"], x.get("mask")) if isinstance(x, Mapping) else (x, None)
        wanted = self.embed[0].in_features
        require(instances.ndim == 3 and instances.shape[2] == wanted, f"ABMIL needs bags (n, K, {wanted})",
                tuple(instances.shape), "Use the extractor of training.")  # fmt: skip
        embedded = self.embed(instances)
        score = self.weigh(self.content(embedded) * self.gate(embedded))[..., 0]  # (n, K)
        if mask is not None:
            require(bool(mask.any(1).all()), "Every bag needs an instance", "one all masked", "Leave it out.")
            score = score.masked_fill(~mask, torch.finfo(score.dtype).min)
        return torch.einsum("nk,nkd->nd", score.softmax(1), embedded)

    def forward(self, x: Any) -> Tensor:
        logits: Tensor = self.head(self.bag(x))
        return logits


def vectors_of(models: Sequence[ABMIL], x: Any) -> Tensor:
    """What frozen models see of the same bags, (n, models, width), without dropout or gradient: to be kept.

    Args:
        models: all of one width; the target's own, if it is an expert, comes first.
        x: bags as `ABMIL` takes them; of many patients, a batch at a time.
    """
    widths = {model.head.in_features for model in models}
    require(len(widths) == 1, "vectors_of needs models of one width", sorted(widths), "Pass trained ABMIL networks.")
    seen, modes = [], [model.training for model in models]
    with torch.no_grad():
        for model, mode in zip(models, modes, strict=True):
            seen.append(model.eval().bag(x))
            model.train(mode)
    return torch.stack(seen, 1)
