"""Signatures in few bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headstart.core.validate import finite, one_of, require

from .robust_weight_signatures import Signature

Mode = Literal["linear", "log", "tanh"]


@dataclass(frozen=True)
class Codes:
    """One tensor as integers below the number of levels, and the range that they span."""

    codes: Tensor
    low: float
    high: float
    mode: Mode
    signed: int  # levels of each sign; 0 unless mode is "log"
    dtype: torch.dtype

    def restore(self, levels: int) -> Tensor:
        """The tensor, up to half a level."""
        codes = self.codes.long()
        index = codes % self.signed if self.signed else codes
        steps = max((self.signed or levels) - 1, 1)
        values = self.low + (self.high - self.low) * (index.double() / steps)
        values = torch.where(index == steps, self.high, values)
        if self.mode == "log":
            sign = torch.where(codes < self.signed, 1.0, -1.0) * (codes < 2 * self.signed)
            values = sign * values.exp2()
        return (values.atanh() if self.mode == "tanh" else values).to(self.dtype)


@dataclass(frozen=True)
class Quantised:
    """A signature as integers; `bytes` is what it takes once they are packed, in memory each takes whole bytes."""

    tensors: Mapping[str, Codes]
    levels: int

    def restore(self) -> dict[str, Tensor]:
        """The signature, in its own dtype."""
        return {name: codes.restore(self.levels) for name, codes in self.tensors.items()}

    @property
    def bytes(self) -> float:
        """Entries times ceil(log2 levels) / 8, and 8 for the range of each tensor."""
        entries = sum(codes.codes.numel() for codes in self.tensors.values())
        return entries * (self.levels - 1).bit_length() / 8 + 8 * len(self.tensors)

    @property
    def full_bytes(self) -> int:
        """Of the same tensors in float32."""
        return 4 * sum(codes.codes.numel() for codes in self.tensors.values())


def quantise(signature: Signature, levels: int, mode: Mode = "linear") -> Quantised:
    """A signature in ceil(log2 levels) bits an entry; linear is off by at most (max - min) / (2 (levels - 1)).

    Args:
        signature: from `extract_signature`.
        levels: how many different values (not bits) each tensor keeps, from 2 (4 for "log") to 65,536.
        mode: what is cut into equal steps between its extremes: "linear" the entries; "log" the logarithm of their
            magnitudes, half of the levels for each sign, with one level for exact zeros where there are any; "tanh"
            their tanh.

    Notes: a tensor of one value is kept as it is in every mode.

    Raises:
        Refused: levels out of range, an unknown mode, NaN, entries beyond +-8 under "tanh", which cannot tell them.

    Reference: Cai et al. 2023, quantised signatures.

    >>> small = quantise({"w": torch.tensor([0.0, 0.4, 1.0])}, levels=3)
    >>> small.restore(), small.bytes
    ({'w': tensor([0.0000, 0.5000, 1.0000])}, 8.75)
    """
    one_of("mode", mode, ["linear", "log", "tanh"])
    least = 4 if mode == "log" else 2
    require(least <= levels <= 2**16, f"quantise needs {least} to 65536 levels for {mode!r}", levels,
            "Pass a number such as 256.")  # fmt: skip
    for name, tensor in signature.items():
        finite(f"The signature at {name!r}", tensor, "Extract it anew.")
        fits = mode != "tanh" or not tensor.numel() or float(tensor.abs().max()) <= 8
        require(fits, f"tanh needs entries within +-8 in {name!r}", "larger ones", 'Use mode="log".')
    return Quantised({name: _coded(tensor.detach(), levels, mode) for name, tensor in signature.items()}, levels)


def _coded(tensor: Tensor, levels: int, mode: Mode) -> Codes:
    x = tensor.double()
    if not tensor.numel() or bool((x == x.flatten()[0]).all()):
        mode = "linear"
    known, signed = torch.ones_like(x, dtype=torch.bool), 0
    if mode == "log":
        known = x != 0
        signed = (levels - int(not bool(known.all()))) // 2
        values = x[known].abs().log2()
    else:
        values = (x.tanh() if mode == "tanh" else x).flatten()
    store = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    low, high = (float(end.to(store)) for end in values.aminmax()) if values.numel() else (0.0, 0.0)
    if signed == 1:
        low = high = (low + high) / 2
    last = (signed or levels) - 1
    index = (((values - low) / ((high - low) or 1.0)).clamp(0, 1) * last).round().long()
    if signed:
        index = index + signed * (x[known] < 0)
    codes = torch.full(x.shape, 2 * signed, device=x.device)
    codes[known] = index
    return Codes(codes.to(torch.uint8 if levels <= 256 else torch.int32), low, high, mode, signed, tensor.dtype)
