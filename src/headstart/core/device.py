"""The device, the precision and the processes of a run, from accelerate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .validate import one_of, require

if TYPE_CHECKING:
    from accelerate import Accelerator


def accelerator_for(device: str, precision: str) -> Accelerator:
    """Where to compute: "auto" takes a GPU where there is one; `accelerate launch` and `torchrun` are obeyed."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState, PartialState

    one_of("device", device, ["auto", "cpu", "cuda"])
    require(device != "cuda" or torch.cuda.is_available(), "device='cuda' needs a GPU", "none", "Use device='auto'.")
    moved = bool(PartialState._shared_state) and (PartialState().device.type == "cpu") != (device == "cpu")
    AcceleratorState._reset_state(reset_partial_state=moved)
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
