"""Safetensors files read in parts, for weights larger than memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from .validate import require

PART = 1 << 16
"""Entries that are read, merged and written at a time: 256 kB of float32, so that caches hold them."""

AHEAD = 1 << 22
"""Bytes of each file that the system is asked to read while the part before them is worked on."""

Weights: TypeAlias = Mapping[str, Tensor]
"""A plain state dict, or a lazy one over safetensors shards."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Spec:
    """The dtype and shape of a tensor that need not be in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def entries(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.entries * self.dtype.itemsize


class LazyWeights(Mapping[str, Tensor]):
    """The tensors of a safetensors file or sharded folder, read from disk when asked for, whole or in parts.

    Args:
        path: a .safetensors file, or a folder with model.safetensors or model.safetensors.index.json.

    Memory: what is asked for; nothing is mapped or kept.

    Raises:
        Refused: nothing there, a pickled checkpoint, a damaged file, or an index that names a file outside the folder.
    """

    def __init__(self, path: Path | str) -> None:
        self._places: dict[str, tuple[Path, int, Spec]] = {}
        self._open: dict[Path, int] = {}
        for file in _files(Path(path)):
            self._places.update(_places(file))

    def __getitem__(self, name: str) -> Tensor:
        spec = self.spec(name)
        return self.part(name, 0, spec.entries).view(spec.shape)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files the tensors are in."""
        return tuple(sorted({file for file, _, _ in self._places.values()}))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def spec(self, name: str) -> Spec:
        """Dtype and shape, without reading the tensor."""
        return self._places[name][2]

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Entries start..stop-1 of the flattened tensor."""
        return self.lend(name, stop - start)(start, stop)

    def lend(self, name: str, most: int = PART) -> Callable[[int, int], Tensor]:
        """A function (start, stop) -> those entries, up to `most`, in a buffer that its next call fills anew."""
        file, offset, spec = self._places[name]
        width = spec.dtype.itemsize
        buffer = torch.empty(min(most, spec.entries), dtype=spec.dtype)
        raw = memoryview(buffer.view(torch.uint8).numpy()) if len(buffer) else memoryview(b"")  # type: ignore[arg-type]
        number, end = self._number(file), offset + spec.size
        last = asked = -1  # where the last read ended, and how far the system was asked to read on

        def read(start: int, stop: int) -> Tensor:
            nonlocal last, asked
            done, size = 0, (stop - start) * width
            if last == offset + start * width and asked < min(last + size + AHEAD // 2, end):
                begin, asked = max(last, asked), min(last + size + AHEAD, end)
                _read_on(number, begin, asked)
            last = offset + stop * width
            while done < size:
                got = os.preadv(number, [raw[done:size]], offset + start * width + done)
                require(got > 0, "A weight file must stay as it was opened", f"a shorter {file.name}",
                        "Do not change it while it is read.")  # fmt: skip
                done += got
            return buffer[: stop - start]

        return read

    def _number(self, file: Path) -> int:
        """The number of the file, which is opened when it is first read and closed with the last reader."""
        if file not in self._open:
            self._open[file] = os.open(file, os.O_RDONLY)
            weakref.finalize(self, os.close, self._open[file])
        return self._open[file]


@runtime_checkable
class Parted(Protocol):
    """Weights that tell what they hold and give parts of it without reading whole tensors."""

    def spec(self, name: str) -> Spec: ...

    def part(self, name: str, start: int, stop: int) -> Tensor: ...


def spec_of(weights: Weights, name: str) -> Spec:
    """Dtype and shape of a tensor; lazy weights answer without reading it."""
    if isinstance(weights, Parted):
        return weights.spec(name)
    return Spec(weights[name].dtype, tuple(weights[name].shape))


def reader(weights: Weights, name: str) -> Callable[[int, int], Tensor]:
    """A function (start, stop) -> those entries of the flattened tensor; lazy weights are read part by part."""
    if isinstance(weights, Parted):
        return partial(weights.part, name)
    flat = weights[name].detach().reshape(-1)
    return lambda start, stop: flat[start:stop]


@runtime_checkable
class Lender(Protocol):
    """Weights that read into a buffer of their own, which spares a new one for every part."""

    def lend(self, name: str) -> Callable[[int, int], Tensor]: ...


def borrowed(weights: Weights, name: str) -> Callable[[int, int], Tensor]:
    """As `reader`, but a part may be overwritten by the next call: for whoever is done with it by then."""
    return weights.lend(name) if isinstance(weights, Lender) else reader(weights, name)


def spans(entries: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the parts of a flattened tensor; an empty one has one empty part.

    >>> list(spans(0)), list(spans(PART + 1))
    ([(0, 0)], [(0, 65536), (65536, 65537)])
    """
    return ((start, min(start + PART, entries)) for start in range(0, max(entries, 1), PART))


def fingerprint(weights: Weights) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of names; the same for lazy and loaded weights."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_on(number: int, start: int, stop: int) -> None:
    """Ask the system to fetch bytes of a file in the background; a hint, which some systems do not take."""
    if sys.platform == "linux":
        os.posix_fadvise(number, start, stop - start, os.POSIX_FADV_WILLNEED)


def _places(file: Path) -> dict[str, tuple[Path, int, Spec]]:
    """Name -> file, first byte and spec, from the header: 8 bytes of its length, then JSON, then the tensors."""
    must, do = "A weight file must be whole safetensors", "Copy or download it again."
    size = file.stat().st_size
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        require(size >= 8 and length <= size - 8, must, f"{file.name} of {size} bytes", do)
        try:
            header = json.loads(handle.read(length))
        except ValueError:
            header = None
    require(isinstance(header, dict), must, f"{file.name} without a readable header", do)
    assert isinstance(header, dict)
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        dtype = DTYPES.get(entry["dtype"])
        require(dtype is not None, "Weights must be of a dtype that torch has", f"{name!r} of {entry['dtype']}",
                "Convert the file.")  # fmt: skip
        assert dtype is not None
        spec, (start, stop) = Spec(dtype, tuple(entry["shape"])), entry["data_offsets"]
        require(stop - start == spec.size and start >= 0 and 8 + length + stop <= size, must,
                f"{name!r} at {start} to {stop} of {file.name}", do)  # fmt: skip
        found[name] = file, 8 + length + start, spec
    return found


def _files(path: Path) -> list[Path]:
    require(path.exists(), "Weights need a file or folder that exists", path, "Check the path.")
    if path.is_file():
        require(path.suffix == ".safetensors", "Weights are read from safetensors only, since a pickle can run code",
                path.name, "Convert it where you trust it: safetensors.torch.save_file(state_dict, PATH).")  # fmt: skip
        return [path]
    index = path / INDEX
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
        require(not outside, "A weight index must name files of its own folder", outside, "Do not load this folder.")
        missing = [name for name in names if not (path / name).exists()]
        require(not missing, "A weight index must name files that are there", missing[:3], "Copy them again.")
        return [path / name for name in names]
    single = path / "model.safetensors"
    pickles = sorted(p.name for p in (*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")))
    require(single.exists(), "A model folder needs model.safetensors", f"{pickles} (pickled; not loaded)" if pickles
            else "no weights", "Save it with save_pretrained(..., safe_serialization=True).")  # fmt: skip
    return [single]
