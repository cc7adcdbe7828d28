"""What a folder on disk says about a model before any weight is read, and what is refused in it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.core.validate import Refused, require

RECORD = "headstart.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
CONVERT = (
    "Convert it once, where you trust its author: `AutoModel.from_pretrained(OLD).save_pretrained(NEW)` with "
    "transformers, `safetensors.torch.save_file(torch.load(OLD, weights_only=True), 'model.safetensors')` for a plain "
    "state dict."
)


@dataclass(frozen=True, kw_only=True)
class Located:
    """A model folder: its configuration is in `path`; its weights too, or they still have to be fetched from `repo`."""

    path: Path
    repo: str = ""

    def with_weights(self) -> Path:
        """The folder once its safetensors files are there."""
        folder = snapshot(self.repo, weights=True) if self.repo else self.path
        weight_files(folder)
        return folder

    def fingerprint(self) -> str:
        """sha256 of everything that decides what the model says; of id and commit while it is on the hub."""
        if self.repo:
            return hashlib.sha256(f"{self.repo}@{self.path.name}".encode()).hexdigest()
        digest = hashlib.sha256()
        for file in sorted([*self.path.glob("*.json"), *self.path.glob("*.txt"), *self.path.glob("*.safetensors")]):
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def offline() -> bool:
    """Whether the user asked for no network (`HF_HUB_OFFLINE=1`)."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def snapshot(repo: str, *, weights: bool) -> Path:
    """The local folder of a hub repository ("ORG/NAME" or "ORG/NAME@REVISION"), fetched or from the cache.

    Only configuration, tokenizer and, with `weights`, safetensors files are fetched; never code, never pickles.

    Raises:
        Refused: the package is missing, there is no network and nothing in the cache, or the name is unknown.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as problem:
        raise Refused(f"hf: sources need huggingface_hub; got {problem}. Install headstart[text].") from None
    name, _, revision = repo.partition("@")
    wanted = ["*.json", "*.txt", "*.model", "README.md", *(["model*.safetensors"] if weights else [])]
    try:
        found = snapshot_download(name, revision=revision or None, allow_patterns=wanted, local_files_only=offline())
    except Exception as problem:  # the hub client, the network stack and the disk each raise their own kind
        first = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        do = "Unset HF_HUB_OFFLINE or fetch it once." if offline() else "Check the name, the network and your login."
        raise Refused(f"{repo!r} must be in the local cache or on the hub; got {first.rstrip('.')}. {do}") from problem
    folder = Path(found)
    if offline():
        weight_files(folder)
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a refusal that names the file."""
    require(path.is_file(), f"The model folder must hold {path.name}", str(path.parent), "Point at a model folder.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as problem:
        raise Refused(f"{path.name} must be readable JSON; got {problem}. Save the model again.") from None
    require(
        isinstance(value, dict), f"{path.name} must hold a JSON object", type(value).__name__, "Save the model again."
    )
    return dict(value)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, by the fixed names only; a checkpoint that needs unpickling is refused.

    Raises:
        Refused: no safetensors file, only pickled ones, or a shard index that points outside the folder.
    """
    if (folder / INDEX).is_file():
        shards = sorted({str(name) for name in dict(read_json(folder / INDEX).get("weight_map", {})).values()})
        for name in shards:
            plain = Path(name).name == name and name.endswith(".safetensors")
            require(
                plain, f"{INDEX} must name safetensors files of its own folder", repr(name), "Fetch the model again."
            )
        missing = [name for name in shards if not (folder / name).is_file()]
        require(
            bool(shards) and not missing, f"{folder} must hold every shard of its index", missing, "Fetch it again."
        )
        return [folder / name for name in shards]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
    must = "A checkpoint must be safetensors, because unpickling runs whatever code the file brings along"
    require(not pickled, must, f"only {', '.join(pickled)} in {folder}", CONVERT)
    raise Refused(f"A model folder must hold {WEIGHTS}; got {folder} without it. Save or fetch the weights there.")


def parameters_in(folder: Path) -> int | None:
    """Number of weights, from the safetensors headers alone; None while they are not there."""
    from math import prod

    from safetensors import SafetensorError, safe_open

    if not any(folder.glob("*.safetensors")):
        return None
    total = 0
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as reader:
                total += sum(prod(reader.get_slice(key).get_shape()) for key in reader.keys())  # noqa: SIM118
        except SafetensorError as problem:
            raise Refused(f"{file.name} must be a whole safetensors file; got {problem}. Fetch it again.") from None
    return total


def licence_of(folder: Path) -> str:
    """The licence named in the model card's front matter, "unknown" where there is none."""
    card = folder / "README.md"
    if card.is_file():
        lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
        if lines and lines[0].strip() == "---":
            for line in lines[1:200]:
                if line.strip() == "---":
                    break
                if line.startswith("license:") and line.partition(":")[2].strip():
                    return line.partition(":")[2].strip().strip("\"'")
    return "unknown"
