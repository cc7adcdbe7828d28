"""`dir:PATH`: a folder that headstart, transformers or timm wrote, or a folder of several of them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.core.validate import Refused, require

from .folder import PICKLED, RECORD, WEIGHTS, Located, parameters_in, read_json, weight_files
from .source import Kind, Preprocess, Skipped, Source

if TYPE_CHECKING:
    from torch import nn


def sources_in(where: str | Path) -> tuple[list[Source], list[Skipped]]:
    """Every model in a folder: the folder itself, or each model folder right below it.

    Returns:
        the sources, and what was found but cannot be used, with the reason.
    """
    path = Path(where).expanduser()
    name = f"dir:{where}"
    if not path.is_dir():
        return [], [Skipped(name=name, why=f"{path} is not a folder. Check the path.")]
    own = is_model(path)
    below = [] if own else sorted(child for child in path.iterdir() if child.is_dir() and is_model(child))
    if not own and not below:
        return [], [Skipped(name=name, why=f"{path} holds no config.json and no weights, nor does a folder in it.")]
    found: list[Source] = []
    skipped: list[Skipped] = []
    for folder in [path] if own else below:
        called = name if own else f"dir:{Path(where) / folder.name}"
        try:
            found.append(folder_source(Located(path=folder.resolve()), name=called, kind="dir"))
        except Refused as problem:
            skipped.append(Skipped(name=called, why=str(problem)))
    return found, skipped


def is_model(folder: Path) -> bool:
    """Whether a folder claims to be a model, good or bad."""
    names = {file.name for file in folder.iterdir() if file.is_file()}
    return bool(names & {RECORD, "config.json", WEIGHTS}) or any(Path(name).suffix in PICKLED for name in names)


def layout_of(folder: Path) -> str:
    """ "headstart", "timm" or "transformers", from the files alone.

    Raises:
        Refused: none of them, or the weights are pickled.
    """
    if (folder / RECORD).is_file() and read_json(folder / RECORD).get("layout") == "headstart":
        return "headstart"
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        if "architecture" in config:
            return "timm"
        if "model_type" in config:
            return "transformers"
    if any(file.suffix in PICKLED for file in folder.iterdir()):
        weight_files(folder)
    do = "Export it with headstart, transformers (save_pretrained) or timm (save_for_hf)."
    raise Refused(f"A model folder needs a config.json with model_type or architecture; got none in {folder}. {do}")


def folder_source(place: Located, *, name: str, kind: Kind) -> Source:
    """A source from a model folder of any known layout; weights stay on the disk until `load()`."""
    layout = layout_of(place.path)
    if not place.repo:
        weight_files(place.path)
    record = read_json(place.path / RECORD) if (place.path / RECORD).is_file() else {}
    if layout == "headstart":
        return _own_source(place, name=name, kind=kind, record=record)
    if layout == "timm":
        from .timm_source import timm_folder_source

        return timm_folder_source(place, name=name, kind=kind)
    from .hf_source import transformers_source

    source = transformers_source(place, name=name, kind=kind)
    if record:  # a headstart export: head and labels have files of their own
        return replace(source, load=partial(_module_in, place.path), classes=labels_in(place.path) or source.classes)
    return source


def load_model_directory(path: str | Path) -> tuple[nn.Module, Preprocess, tuple[str, ...]]:
    """A model directory as a module in eval mode, its preprocessing and its classes; works in a fresh process.

    Args:
        path: what `export_model` wrote, or any folder that `dir:` accepts.

    Returns:
        the module (batch to logits), raw examples to batch, and the classes in the order of the logits.

    Raises:
        Refused: not a model folder, pickled weights, or weights that are missing, mismatched or left over (named).
    """
    folder = Path(path).expanduser()
    require(folder.is_dir(), "A model directory must be a folder", str(folder), "Point at DIR/model of a finished run.")
    folder = folder.resolve()
    source = folder_source(Located(path=folder), name=f"dir:{path}", kind="dir")
    model = source.load()
    classes = labels_in(folder) or source.classes
    head = model.get_submodule(source.head)
    rows = getattr(head, "out_features", -1)
    fits = not classes or rows == len(classes)
    require(
        fits, "labels.json must name each output of the head", f"{len(classes)} labels, {rows} outputs", "Export again."
    )
    return model, source.preprocess, classes


def labels_in(folder: Path) -> tuple[str, ...]:
    """The class names of labels.json, in the order of the logits; () without the file."""
    if not (folder / "labels.json").is_file():
        return ()
    labels = read_json(folder / "labels.json").get("classes", [])
    good = (
        isinstance(labels, list) and all(isinstance(label, str) for label in labels) and len(set(labels)) == len(labels)
    )
    require(good, "labels.json must list each class once", str(labels)[:80], "Export the model again.")
    return tuple(labels)


def _own_source(place: Located, *, name: str, kind: Kind, record: dict[str, Any]) -> Source:
    from .record import preprocess_from

    needed = {"architecture", "head", "modality", "preprocess"}
    absent = sorted(needed - set(record))
    require(not absent, f"{RECORD} must say {sorted(needed)}", f"no {absent}", "Export the model again.")
    modality = record["modality"]
    require(
        modality in ("image", "text", "numeric"), "modality must be image, text or numeric", modality, "Export again."
    )
    return Source(
        name=name,
        modality=modality,
        load=partial(_module_in, place.path),
        preprocess=preprocess_from(record["preprocess"]),
        head=str(record["head"]),
        classes=labels_in(place.path),
        licence=str(record.get("licence", "unknown")),
        fingerprint=place.fingerprint(),
        kind=kind,
        facts={**record.get("facts", {}), "architecture": record["architecture"], "layout": "headstart",
               "parameters": parameters_in(place.path)},
    )  # fmt: skip


def _module_in(folder: Path) -> nn.Module:
    """The module of a folder that headstart wrote, for any of its layouts."""
    import torch
    from safetensors.torch import load_file

    from .keys import load_weights

    record = read_json(folder / RECORD)
    place = Located(path=folder)
    if layout_of(folder) == "headstart":
        from headstart import nets

        weights = load_file(weight_files(folder)[0])
        with torch.random.fork_rng(devices=[]):  # building draws weights that are replaced at once
            model = nets.build(record["architecture"], classes=len(labels_in(folder)))
        load_weights(model, weights, head=str(record["head"]))
        return model.eval()
    from .hf_source import load_transformers

    model = load_transformers(place, pooling=str(record.get("pooling", "")))
    head = folder / "head.safetensors"
    if head.is_file():
        weights = load_file(head)
        require("weight" in weights, "head.safetensors must hold weight", sorted(weights), "Export the model again.")
        rows, width = weights["weight"].shape
        layer = torch.nn.Linear(width, rows, bias="bias" in weights, device="meta").to_empty(device="cpu")
        load_weights(layer, weights)
        model.head = layer.eval()
    return model
