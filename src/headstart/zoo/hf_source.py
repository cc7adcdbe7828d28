"""`hf:ORG/NAME` and `hf:/path`: pictures and text models of the transformers library as sources."""

from __future__ import annotations

import re
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.core.validate import Refused, require

from .folder import Located, licence_of, parameters_in, snapshot
from .hf_config import FETCH, class_names, config_of, first_line, input_size, nature, pooling_of, preprocess_of
from .source import Kind, Modality, Preprocess, Source

if TYPE_CHECKING:
    from torch import nn

    from .hf_model import Encoder


def hf_source(where: str) -> Source:
    """A transformers model, on the hub (ORG/NAME, ORG/NAME@REVISION) or in a folder, without loading its weights.

    Raises:
        Refused: transformers is missing, the model is unreachable, pickled, brings its own code, or is of another kind.
    """
    from .directory import folder_source

    path = Path(where).expanduser()
    if path.is_dir():
        return folder_source(Located(path=path.resolve()), name=f"hf:{where}", kind="hf")
    named = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", where) is not None and not where.startswith(".")
    require(named, "hf: needs a folder or a hub name ORG/NAME", repr(where), "Check the path or the name.")
    return folder_source(Located(path=snapshot(where, weights=False), repo=where), name=f"hf:{where}", kind="hf")


def transformers_source(place: Located, *, name: str, kind: Kind) -> Source:
    """A source from a transformers folder: kind of data, head, classes and preprocessing as its configuration says."""
    import torch

    from .hf_model import Classifier

    config = config_of(place.path)
    modality, classifies = nature(config, place.path)
    with torch.device("meta"):
        shell = build(config, modality, classifies)
    head = head_of_shell(shell, config)
    preprocess = preprocess_of(place.path, modality, config)
    fixed = modality == "image" and any("position" in key for key, _ in shell.named_parameters())
    facts = {
        "family": config.model_type,
        "layout": "transformers-classifier" if isinstance(shell, Classifier) else "transformers-encoder",
        "parameters": sum(p.numel() for p in shell.parameters()),
        "stored": None if place.repo else parameters_in(place.path),
        "input_size": input_size(config) if fixed else None,
        "tokens": getattr(preprocess, "length", None),
        "objective": "supervised" if classifies else "self-supervised or unstated",
    }
    return Source(
        name=name,
        modality=modality,
        load=partial(load_transformers, place),
        preprocess=preprocess,
        head=head,
        classes=class_names(config) if classifies else (),
        licence=licence_of(place.path),
        fingerprint=place.fingerprint(),
        kind=kind,
        facts={key: value for key, value in facts.items() if value is not None},
    )


def build(config: Any, modality: Modality, classifies: bool) -> nn.Module:
    """The wrapped module of a configuration, with whatever weights a new module gets."""
    from .hf_model import Classifier, Encoder

    transformers: Any = import_module("transformers")
    heads = {
        "image": transformers.AutoModelForImageClassification,
        "text": transformers.AutoModelForSequenceClassification,
    }
    try:
        if classifies:
            return Classifier(heads[modality].from_config(config, trust_remote_code=False))
        body = transformers.AutoModel.from_config(config, trust_remote_code=False)
    except Exception as problem:  # each architecture raises its own kind on a configuration it cannot build
        raise Refused(
            f"hf: needs a model that transformers can classify with; got {first_line(problem)}. {FETCH}"
        ) from problem
    return Encoder(body, 1, "mean")  # width and pooling are found when the weights are read


def head_of_shell(shell: nn.Module, config: Any) -> str:
    """Dotted name of the head: the last linear layer with one output a class."""
    from .hf_model import Encoder, head_in

    if isinstance(shell, Encoder):
        return "head"
    head = head_in(shell, config.num_labels)
    good = bool(head) and not head.endswith(".score")  # `score` is how decoders classify every word on its own
    require(
        good, "A source must end in one linear layer over pooled features", config.architectures, "Use another model."
    )
    return head


def load_transformers(place: Located, pooling: str = "") -> nn.Module:
    """The wrapped model with its weights, in eval mode and float32.

    Raises:
        Refused: weights that the architecture needs are missing, of another shape, or left over; names them.
    """
    from .hf_model import Classifier, Encoder, quiet

    transformers: Any = import_module("transformers")
    folder = place.with_weights()
    config = config_of(folder)
    modality, classifies = nature(config, folder)
    heads = {
        "image": transformers.AutoModelForImageClassification,
        "text": transformers.AutoModelForSequenceClassification,
    }
    auto = heads[modality] if classifies else transformers.AutoModel
    try:
        with quiet():
            model, info = auto.from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are listed, and refused here by name
            )
    except Exception as problem:  # safetensors, transformers and the disk each raise their own kind
        raise Refused(
            f"{folder} must load as a transformers model; got {first_line(problem)}. Save it again."
        ) from problem
    missing, extra = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
    unpooled = not classifies and bool(missing) and all(key.startswith("pooler.") for key in missing)
    if not classifies:
        extra = []  # heads of the pretraining task, which an encoder does not have
        missing = [] if unpooled else missing
    told = [
        f"{what} {keys[:8]}"
        for what, keys in (("missing", missing), ("mismatched", mismatched), ("extra", extra))
        if keys
    ]
    require(not told, f"The checkpoint in {folder} must fit its config.json", "; ".join(told), "Save the model again.")
    if classifies:
        return Classifier(model.float()).eval()
    if unpooled:
        model.pooler = None  # it would hold random weights
    how = pooling or pooling_of(folder, modality, pooler=not unpooled)
    return _sized(Encoder(model.float(), 1, how).eval(), preprocess_of(folder, modality, config), modality)


def _sized(encoder: Encoder, preprocess: Preprocess, modality: Modality) -> nn.Module:
    """The encoder with a head as wide as what it says about one blank example."""
    import numpy as np
    import torch

    from .hf_model import as_inputs, empty_head

    blank: Any = "a" if modality == "text" else np.zeros((64, 64, 3), dtype=np.uint8)
    try:
        with torch.no_grad():
            width = encoder.pooled(as_inputs(preprocess([blank]))).shape[1]
    except Exception as problem:  # whatever its processor or the model raises on its own kind of example
        raise Refused(f"A source must read one example; got {first_line(problem)}. {FETCH}") from problem
    encoder.head = empty_head(width)
    return encoder
