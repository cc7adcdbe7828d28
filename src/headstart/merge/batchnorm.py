"""Batch normalisation that fits weights which were merged or patched."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from headstart.core.stream import Batch, as_batch, size
from headstart.core.validate import require
from headstart.core.weights import Weights


def restored_batchnorm(
    model: nn.Module, batches: Iterable[Any], *, robust: Sequence[Weights] = (), scale: float = 1.0
) -> nn.Module:
    """A copy of a patched or merged model whose running statistics are those of the data it will see.

    Statistics are reset and averaged over one pass, every example counting alike, with the rest in eval mode.

    Args:
        model: holds at least one BatchNorm layer.
        batches: inputs of the kind to come, corrupted ones after a patch; labels are not looked at.
        robust: models whose mean of the affine parameters is taken over, in every BatchNorm layer; none keeps them.
        scale: share of the new values, in [0, 1]; the rest is the model's old ones.

    Cost: one forward pass over the batches.

    Raises:
        Refused: no BatchNorm layer with running statistics, no batch, a scale outside [0, 1].

    Reference: Cai et al. 2023, and their official code.

    >>> model = nn.Sequential(nn.BatchNorm1d(1))
    >>> restored_batchnorm(model, [torch.tensor([[1.0], [3.0]])])[0].running_mean
    tensor([2.])
    """
    require(0 <= scale <= 1, "restored_batchnorm needs a scale from 0 to 1", scale, "Pass the scale of the patch.")
    new = copy.deepcopy(model).eval()
    norms = {name: m for name, m in new.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    require(bool(norms), "restored_batchnorm needs BatchNorm layers with running statistics", "none", "Leave it out.")
    momenta = {name: norm.momentum for name, norm in norms.items()}
    with torch.no_grad():
        for name, norm in norms.items():
            for part, parameter in norm.named_parameters() if robust else ():
                mean = torch.stack([one[f"{name}.{part}"].to(parameter.device).double() for one in robust]).mean(0)
                parameter.copy_(mean)
            norm.reset_running_stats()
            norm.train()
        seen = 0
        for item in batches:
            batch = as_batch(item)
            assert isinstance(batch, Batch)
            seen += size(batch)
            for norm in norms.values():
                norm.momentum = size(batch) / seen
            new(batch.x)
        require(seen > 0, "restored_batchnorm needs a batch", "none", "Pass some inputs.")
        for name, norm in norms.items():
            norm.momentum = momenta[name]
            old = dict(model.get_submodule(name).state_dict())
            for part, value in norm.state_dict().items():
                if value.is_floating_point():
                    value.copy_(_blend(old[part], value, scale))
    return new.train(model.training)


def _blend(old: Tensor, new: Tensor, scale: float) -> Tensor:
    return new if scale == 1 else torch.lerp(old.to(new.dtype), new, scale)
