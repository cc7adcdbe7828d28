"""The model-selection study on the user's own pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from headstart.choose import LogME
from headstart.core.evidence import Evidence
from headstart.core.rng import seeded
from headstart.core.validate import require
from headstart.tasks import Examples, load_task
from headstart.zoo.resolve import resolve
from headstart.zoo.source import Source

from .model_selection import Candidate, Metrics, arms
from .two_phase import BATCH, features_of, said, trained, two_phase

EPOCHS = 50  # the paper's
SIDE = 64  # pixels that the light network sees


def light_cnn(classes: int) -> nn.Module:
    """Three convolutions of 32, 64 and 128 channels, a dense layer of 128 with dropout: the paper's baseline."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    wide = 128 * (SIDE // 8) ** 2
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(wide, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, classes)
    )


def study(data: str, seed: int, *, zoo: str = "mini", best: int = 3, epochs: int = EPOCHS) -> dict[str, Metrics]:
    """The study on the user's pictures: LogME's best sources and a light network from scratch.

    Args:
        data: what `load_task` takes: a folder with one folder a class, for instance. Pictures with the same content
            stay on one side of the split.
        seed: of the split and of training.
        zoo: the backbones.
        best: how many of them are trained.
        epochs: passes over the training part.

    Cost: one pass of every source, then `best` + 1 trainings.
    """
    task = load_task(data, seed=seed, test_share=0.15, validation_share=0.15)
    require(task.modality == "image", "This study needs pictures", task.modality, "Pass a folder of pictures.")
    y, validation = task.train.labels, task.validation.labels
    assert y is not None
    assert validation is not None
    parts = (task.train, task.validation, task.test)
    sources, _ = resolve(zoo)
    seen = {source.name: _logme(source, task.train) for source in sources if source.modality == "image"}
    ranked = sorted(seen, key=lambda name: -seen[name])[:best]
    candidates = {}
    for source in (source for source in sources if source.name in ranked):
        began = time.perf_counter()
        x, *rest = (_seen_by(source, part) for part in parts)
        model = two_phase(source.load(), source.head, x, y, len(task.classes), seed, epochs)
        candidates[source.name] = _candidate(model, rest, began)
    began = time.perf_counter()
    x, *rest = (_pixels(part) for part in parts)
    with seeded(seed):
        start = light_cnn(len(task.classes))
    model = trained(start, x, y, epochs * max(1, len(y) // BATCH), seed)
    candidates["scratch"] = _candidate(model, rest, began)
    test = task.judge(candidates["scratch"].test).labels
    return arms(candidates, "scratch", validation, test)


def _candidate(model: nn.Module, rest: Sequence[Tensor], began: float) -> Candidate:
    validation, test = (said(model, x) for x in rest)
    count = sum(p.numel() for p in model.parameters())
    return Candidate(validation=validation, test=test, parameters=count, seconds=time.perf_counter() - began)


def _logme(source: Source, examples: Examples) -> float:
    features = features_of(source.load(), source.head, _seen_by(source, examples))
    return LogME().score(Evidence(features=features, labels=examples.labels))


def _seen_by(source: Source, examples: Examples) -> Tensor:
    x = source.preprocess([examples.inputs[i] for i in range(len(examples))])
    assert isinstance(x, Tensor)
    return x


def _pixels(examples: Examples) -> Tensor:
    """(n, 3, SIDE, SIDE) in [0, 1]."""
    import numpy as np
    from PIL import Image

    small = [
        Image.fromarray(examples.inputs[i]).resize((SIDE, SIDE), Image.Resampling.BOX) for i in range(len(examples))
    ]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in small])).permute(0, 3, 1, 2).float() / 255
