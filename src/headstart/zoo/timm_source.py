"""`timm:NAME`, `timm:hf-hub:ORG/NAME` and timm folders as sources, with the preprocessing they were trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headstart.core.validate import Refused, require, suggestion

from .folder import Located, licence_of, parameters_in, read_json, snapshot, weight_files
from .source import Kind, Source

if TYPE_CHECKING:
    from torch import nn

# arguments of timm.create_model that a folder's model_args must not set: they would fetch or unpickle other files
FORBIDDEN = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "scriptable")


@dataclass(frozen=True, kw_only=True)
class TimmPixels:
    """uint8 pictures (H, W, 3) to the tensor a timm model was trained on: resized, cropped and normalised its way."""

    input_size: tuple[int, ...]
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    crop_mode: str

    def __call__(self, raw: Sequence[Any], /) -> Tensor:
        from PIL import Image

        transform = _transform(self)
        return torch.stack([transform(Image.fromarray(picture)) for picture in raw])


@lru_cache(maxsize=8)
def _transform(pixels: TimmPixels) -> Any:
    settings = {field.name: getattr(pixels, field.name) for field in fields(pixels)}
    return timm_package().data.create_transform(**settings, is_training=False)


def timm_package() -> Any:
    """The timm library, or a refusal that says what is missing."""
    try:
        return import_module("timm")
    except (ImportError, RuntimeError) as problem:
        raise Refused(f"timm: sources need timm and torchvision; got {problem}. Install headstart[vision].") from None


def timm_source(where: str) -> Source:
    """A timm model by name, from the hub or from a folder, without loading its weights.

    Raises:
        Refused: timm is missing, the name is unknown (the nearest is suggested), or its weights cannot be reached.
    """
    from .directory import folder_source

    path = Path(where).expanduser()
    if path.is_dir():
        return folder_source(Located(path=path.resolve()), name=f"timm:{where}", kind="timm")
    timm = timm_package()
    repo = where.removeprefix("hf-hub:").removeprefix("hf_hub:")
    if repo == where:
        known = timm.models.is_model(where)
        do = "" if known else suggestion(where.partition(".")[0], timm.list_models())
        require(known, "timm: needs a name that timm knows", repr(where), do)
        try:
            stated = timm.models.get_pretrained_cfg(where)
        except RuntimeError as problem:
            tags = timm.list_pretrained(where.partition(".")[0] + "*")
            raise Refused(f"timm: needs known weights; got {problem}. {suggestion(where, tags)}") from None
        repo = str(getattr(stated, "hf_hub_id", None) or "")
        require(bool(repo), "timm: needs safetensors weights on the hub", f"none for {where}", "Choose another model.")
    return folder_source(Located(path=snapshot(repo, weights=False), repo=repo), name=f"timm:{where}", kind="timm")


def timm_folder_source(place: Located, *, name: str, kind: Kind) -> Source:
    """A source from a folder with timm's config.json (architecture, num_classes, pretrained_cfg)."""
    timm = timm_package()
    config = timm_config(place.path)
    shell = _shell(config)
    head = head_name(shell)
    data = timm.data.resolve_model_data_config(shell)
    stated = config["pretrained_cfg"].get("label_names") or config.get("label_names") or ()
    pixels = TimmPixels(
        input_size=tuple(data["input_size"]),
        interpolation=str(data["interpolation"]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        crop_pct=float(data["crop_pct"]),
        crop_mode=str(data["crop_mode"]),
    )
    return Source(
        name=name,
        modality="image",
        load=partial(load_timm, place),
        preprocess=pixels,
        head=head,
        classes=tuple(map(str, stated)) if isinstance(stated, list) and len(stated) == config["num_classes"] else (),
        licence=str(config["pretrained_cfg"].get("license") or licence_of(place.path)),
        fingerprint=place.fingerprint(),
        kind=kind,
        facts={
            "family": config["architecture"],
            "layout": "timm",
            "parameters": sum(p.numel() for p in shell.parameters()),
            "stored": None if place.repo else parameters_in(place.path),
            "input_size": pixels.input_size,
            "objective": "supervised" if config["num_classes"] else "self-supervised or unstated",
        },
    )


def timm_config(folder: Path) -> dict[str, Any]:
    """timm's config.json in its newer form, with every name checked that could lead out of the folder."""
    said = read_json(folder / "config.json")
    config = {"model_args": {}, **(said if "pretrained_cfg" in said else {**said, "pretrained_cfg": dict(said)})}
    architecture = config.get("architecture")
    known = isinstance(architecture, str) and timm_package().models.is_model(architecture)
    require(known, "config.json must name an architecture that timm knows", repr(architecture), "Update timm.")
    config.setdefault("num_classes", config["pretrained_cfg"].get("num_classes", 1000))
    bad = sorted(set(config["model_args"]) & set(FORBIDDEN))
    require(not bad, "model_args must only describe the architecture", bad, "Remove them from config.json.")
    return config


def load_timm(place: Located) -> nn.Module:
    """The timm model with its weights, in eval mode and float32; only safetensors are read.

    Raises:
        Refused: weights are missing, of another shape or left over; names them.
    """
    folder = place.with_weights()
    config = timm_config(folder)
    file, *more = weight_files(folder)
    require(not more, "A timm model must be one safetensors file", f"{len(more) + 1} shards", "Join the shards first.")
    try:
        with torch.random.fork_rng(devices=[]):  # building draws weights that are replaced at once
            model = _create(config, pretrained=True, file=str(file))
    except Exception as problem:  # timm, safetensors and the disk each raise their own kind
        must, told = f"{folder} must hold the weights of {config['architecture']}", " ".join(str(problem).split())
        raise Refused(f"{must}; got {told}. Save the model again.") from problem
    return _with_linear_head(model).float().eval()


def head_name(model: nn.Module) -> str:
    """Dotted name of a timm model's classifier; refused where it is not one linear layer."""
    layer: Any = model.get_classifier()  # type: ignore[operator]
    linear = isinstance(layer, torch.nn.Linear)
    require(linear, "A source must end in one linear layer", type(layer).__name__, "Use a model with a plain head.")
    return str(next(name for name, module in model.named_modules() if module is layer))


def _create(config: dict[str, Any], *, pretrained: bool, file: str = "") -> nn.Module:
    timm = timm_package()
    known = {field.name for field in fields(timm.models.PretrainedCfg)}
    cfg = {key: value for key, value in config["pretrained_cfg"].items() if key in known}
    cfg.update(num_classes=config["num_classes"], file=file or None, url=None, hf_hub_id=None, custom_load=False)
    cfg.pop("source", None)
    args = {**config["model_args"], "num_classes": config["num_classes"]}
    made: nn.Module = timm.create_model(config["architecture"], pretrained=pretrained, pretrained_cfg=cfg, **args)
    return made


def _shell(config: dict[str, Any]) -> nn.Module:
    try:
        with torch.device("meta"):
            return _with_linear_head(_create(config, pretrained=False))
    except (NotImplementedError, RuntimeError):  # some architectures read a number while they are built
        with torch.random.fork_rng(devices=[]):
            return _with_linear_head(_create(config, pretrained=False))


def _with_linear_head(model: nn.Module) -> nn.Module:
    """A model without classes gets timm's own head for it, emptied; others are left alone."""
    if not isinstance(model.get_classifier(), torch.nn.Identity):  # type: ignore[operator]
        return model
    from .hf_model import empty_head

    model.reset_classifier(1)  # type: ignore[operator]
    name = head_name(model)
    parent, _, child = name.rpartition(".")
    layer = model.get_submodule(name)
    setattr(model.get_submodule(parent), child, empty_head(int(layer.in_features)))  # type: ignore[arg-type]
    return model
