"""Write a trained model as a folder that headstart, and the library it came from, load again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from headstart.core.validate import Refused, require

from .card import model_card, public_name
from .directory import load_model_directory
from .folder import RECORD
from .layouts import write_json, write_layout
from .source import Source


def export_model(
    model: nn.Module,
    directory: str | Path,
    *,
    source: Source,
    classes: Sequence[str],
    metrics: Mapping[str, float] | None = None,
    task: str = "",
    tags: Sequence[str] = (),
    notes: str = "",
) -> Path:
    """Write a model directory, whole or not at all, and only after it was loaded again and found equal bit for bit.

    Args:
        model: a trained model of `source`, its head replaced, every adapter folded.
        directory: a new or empty folder.
        source: what it started from.
        classes: what the head's outputs mean, in order.
        metrics, task, tags, notes: for the model card.

    Returns:
        the folder, with model.safetensors, config.json, labels.json, headstart.json, the preprocessing and README.md;
        `transformers` loads it where the source came from there with a classification head, `timm` likewise.

    Raises:
        Refused: the directory is not empty, the model does not fit the source or the classes, it does not come back
            from the disk as it is, or the disk is full. Nothing is left behind.
    """
    target = Path(directory).expanduser().absolute()
    empty = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    require(empty, "export needs a new or empty directory", str(target), "Choose another, or remove it first.")
    classes = tuple(map(str, classes))
    _check(model, source, classes)
    partial = target.parent / f".{target.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
        partial.mkdir(parents=True)
        layout, extra = write_layout(model, partial, source, classes)
        record = {
            "format": 1,
            "layout": layout,
            "source": public_name(source),
            "started_from": source.fingerprint,
            "modality": source.modality,
            "head": source.head,
            "licence": source.licence,
            "task": task,
            "metrics": dict(metrics or {}),
            **extra,
        }
        write_json(partial / "labels.json", {"classes": list(classes)})
        write_json(partial / RECORD, record)
        card = model_card(
            source, layout, title=target.name, classes=classes, metrics=metrics or {}, task=task, tags=tags, notes=notes
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
        _verify(model, partial, classes)
        for file in partial.iterdir():
            _flush(file)
        os.replace(partial, target)
        _flush(target.parent)
    except BaseException as problem:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(problem, OSError) or type(problem).__name__ == "SafetensorError":
            told = f"Writing the model to {target} must succeed; got {problem}. Free space there and run again."
            raise Refused(told) from problem
        raise
    return target


def _check(model: nn.Module, source: Source, classes: tuple[str, ...]) -> None:
    layer = dict(model.named_modules()).get(source.head)
    linear = isinstance(layer, nn.Linear)
    require(linear, f"export needs a plain linear head at {source.head}", type(layer).__name__, "Fold adapters first.")
    assert isinstance(layer, nn.Linear)
    distinct = len(classes) >= 1 and len(set(classes)) == len(classes)
    require(distinct, "export needs distinct class names", list(classes)[:8], "Name each output once.")
    fits = layer.out_features == len(classes)
    require(
        fits, "The head must have one output a class", f"{layer.out_features} for {len(classes)}", "Pass all classes."
    )
    bad = [key for key, value in model.state_dict().items() if not torch.isfinite(value).all()]
    require(
        not bad, "export needs finite weights", f"NaN or infinity in {bad[:5]}", "Train with a lower learning rate."
    )


def _verify(model: nn.Module, folder: Path, classes: tuple[str, ...]) -> None:
    do = "Fold adapters (surgery.fold) before the export."
    try:
        reloaded, _, names = load_model_directory(folder)
    except Refused as problem:
        raise Refused(f"An exported model must load again; got: {problem} {do}") from problem
    own, back = model.state_dict(), reloaded.state_dict()
    wrong = sorted(set(own) ^ set(back))
    wrong += [key for key in own if key in back and not torch.equal(own[key].cpu().double(), back[key].cpu().double())]
    require(
        not wrong and names == classes, "An exported model must come back as it is", f"differences in {wrong[:8]}", do
    )


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
