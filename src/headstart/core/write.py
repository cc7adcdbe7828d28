"""Safetensors files written in parts, whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .shards import DTYPES, INDEX, Spec, Weights, spec_of
from .validate import require

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save_weights(weights: Weights, folder: Path, *, shard_bytes: int = 5 * 2**30) -> None:
    """Write model.safetensors into `folder`, or numbered shards with an index once they pass `shard_bytes`.

    Memory: one tensor of lazy weights. What was in the folder is replaced when everything is written.
    """
    specs = {name: spec_of(weights, name) for name in weights}
    parts = ((name, 0, weights[name].detach().reshape(-1)) for name in weights)
    write_parts(parts, specs, folder, shard_bytes=shard_bytes)


def write_parts(
    parts: Iterable[tuple[str, int, Tensor]], specs: Mapping[str, Spec], folder: Path, *, shard_bytes: int = 5 * 2**30
) -> None:
    """Write model.safetensors into `folder`, or numbered shards with an index once they pass `shard_bytes`.

    Args:
        parts: (name, first entry, entries) in any order; every entry of every tensor must come.
        specs: what will come, in the order it is to be written.
        folder: made if need be. Its weights are replaced when everything is written, and not before.
        shard_bytes: the most a file holds, unless one tensor is larger.

    Memory: one part. Disk space is claimed before the first part is asked for.
    """
    shards: list[dict[str, Spec]] = [{}]
    held = 0
    for name, spec in specs.items():
        if shards[-1] and held + spec.size > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = spec
        held += spec.size
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".weights-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    try:
        count = len(shards)
        files = ["model.safetensors"] if count == 1 else [
            f"model-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]  # fmt: skip
        _fill(parts, [temporary / file for file in files], shards)
        if count > 1:
            where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
            index = {"metadata": {"total_size": sum(spec.size for spec in specs.values())}, "weight_map": where}
            (temporary / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        old = [p for p in folder.iterdir() if p.name == INDEX or p.match("model*.safetensors")]
        for path in temporary.iterdir():
            path.replace(folder / path.name)
        for path in old:
            if not (path.name in files or (path.name == INDEX and count > 1)):
                path.unlink()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fill(parts: Iterable[tuple[str, int, Tensor]], files: list[Path], shards: list[dict[str, Spec]]) -> None:
    handles = [open(file, "wb") for file in files]  # noqa: SIM115 - closed below, all together
    try:
        at = {}
        for handle, shard in zip(handles, shards, strict=True):
            entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
            start = 0
            for name, spec in sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize):  # keeps each aligned
                entries[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape),
                                 "data_offsets": [start, start + spec.size]}  # fmt: skip
                at[name] = handle.fileno(), start, spec
                start += spec.size
            header = json.dumps(entries, separators=(",", ":")).encode()
            header += b" " * (-len(header) % 8)
            handle.write(len(header).to_bytes(8, "little") + header)
            handle.flush()
            _claim(handle.fileno(), 8 + len(header) + start)
            at.update({name: (at[name][0], at[name][1] + 8 + len(header), spec) for name, spec in shard.items()})
        left = {name: spec.entries for name, (_, _, spec) in at.items()}
        for name, first, part in parts:
            number, offset, spec = at[name]
            raw = part.detach().to("cpu", spec.dtype).contiguous().view(-1).view(torch.uint8).numpy()
            _write(number, memoryview(raw), offset + first * spec.dtype.itemsize)  # type: ignore[arg-type]
            left[name] -= part.numel()
        unwritten = [name for name, count in left.items() if count]
        require(not unwritten, "Every entry of every tensor must be written once", unwritten[:3], "Report this.")
        for handle in handles:
            os.fsync(handle.fileno())
    finally:
        for handle in handles:
            handle.close()


def _claim(number: int, size: int) -> None:
    """Make the file as long as it will be, so that a full disk is found before any work."""
    allocate = getattr(os, "posix_fallocate", None)  # not on every system
    if allocate is None:
        os.truncate(number, size)
    else:
        allocate(number, 0, size)


def _write(number: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(number, data, offset)
        data, offset = data[done:], offset + done


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into, which takes its place when the block ends well and is gone when not.

    Whoever looks sees the old folder or the new one, never half of one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            old = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old")
            folder.replace(old)
            temporary.replace(folder)
            shutil.rmtree(old)
        else:
            temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
