"""The model-selection study that applied papers run, done so that its answer can be trusted; `riceleafbd` uses it.

Candidates are trained on the same examples, chosen by macro-F1 on validation, and each reads the test once, at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headstart.choose import LogME
from headstart.core.evidence import Evidence, forward_features
from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw, cosine
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.core.surgery import replace_layers, with_head
from headstart.core.validate import require
from headstart.tasks import Examples, load_task
from headstart.zoo.resolve import resolve
from headstart.zoo.source import Source

EPOCHS, BATCH = 50, 32  # the paper's epochs
SIDE = 64  # pixels that the light network sees
Metrics = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What a trained candidate said, logits (n, c) on validation and test, and what it cost."""

    validation: Tensor
    test: Tensor
    parameters: int
    seconds: float


def measured(logits: Tensor, labels: Tensor) -> Metrics:
    """Accuracy and unweighted means over the classes of precision, recall and F1; an absent prediction counts 0.

    >>> measured(torch.eye(2)[[0, 0, 0, 0]], torch.tensor([0, 0, 1, 1]))["macro F1"]
    0.333...
    """
    from sklearn.metrics import precision_recall_fscore_support

    y, said = labels.numpy(), logits.argmax(1).numpy()
    precision, recall, f1, _ = precision_recall_fscore_support(y, said, average="macro", zero_division=0)
    return {"accuracy": float((y == said).mean()), "macro precision": float(precision), "macro recall": float(recall),
            "macro F1": float(f1)}  # fmt: skip


def mcnemar(one: Tensor, other: Tensor, labels: Tensor) -> float:
    """Exact two-sided p of as large a difference between two classifiers on the same examples; 1 when they agree."""
    from scipy.stats import binomtest

    right, wrong = (logits.argmax(1) == labels for logits in (one, other))
    b, c = int((right & ~wrong).sum()), int((~right & wrong).sum())
    return float(binomtest(b, b + c).pvalue) if b + c else 1.0


def chosen(candidates: Mapping[str, Candidate], labels: Tensor) -> str:
    """The highest macro-F1 on validation; within one standard error of it the candidate with fewer parameters."""
    scores = {name: measured(one.validation, labels)["macro F1"] for name, one in candidates.items()}
    best = max(scores.values())
    error = (best * (1 - best) / len(labels)) ** 0.5
    return min((name for name in scores if scores[name] >= best - error),
               key=lambda name: (candidates[name].parameters, -scores[name]))  # fmt: skip


def arms(
    candidates: Mapping[str, Candidate], scratch: str, validation: Tensor, test: Tensor, pretrained: str | None = None
) -> dict[str, Metrics]:
    """Every candidate's figures, then `pretrained` (by validation), `from scratch`, `chosen` and `best` (by test).

    Args:
        candidates: what was trained.
        scratch: the one that started from nothing.
        validation: labels (n,).
        test: labels (m,), looked at here for the first time.
        pretrained: the candidate to compare with `scratch`; by default the one validation prefers.
    """
    figures = {
        name: measured(one.test, test)
        | {"validation macro F1": measured(one.validation, validation)["macro F1"],
           "McNemar p": mcnemar(one.test, candidates[scratch].test, test),
           "parameters": float(one.parameters), "seconds": one.seconds}
        for name, one in candidates.items()
    }  # fmt: skip
    others = {name: one for name, one in candidates.items() if not name.startswith("scratch")}
    return figures | {
        "pretrained": figures[pretrained or chosen(others, validation)],
        "from scratch": figures[scratch],
        "chosen": figures[chosen(candidates, validation)],
        "best": max(figures.values(), key=lambda row: row["accuracy"]),
    }


def trained(
    model: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int, *, rate: float = 1e-3, batch: int = BATCH,
    schedule: Callable[[float], float] = cosine,
) -> nn.Module:  # fmt: skip
    """AdamW on whatever requires gradients."""
    stream = Batches(x=x, y=y, batch_size=batch, seed=seed)
    plan = Plan(model=model, stream=stream, steps=steps, optimizer=adamw(rate), schedule=schedule)
    return fit(plan, device="cpu", seed=seed).model


def features_of(model: nn.Module, head: str, x: Tensor) -> Tensor:
    """The head's input for every example (n, d)."""
    return torch.cat([features for features, _ in forward_features(model, torch.split(x, 128), head=head)])


def said(model: nn.Module, x: Tensor) -> Tensor:
    """Logits in eval mode."""
    return torch.cat([logits.clone() for _, logits in forward_features(model, torch.split(x, 128))])


class FrozenNorm(nn.BatchNorm2d):
    """Batch norm that keeps its statistics, also while the model around it trains."""

    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(False)
        return self


def frozen_norms(model: nn.Module) -> nn.Module:
    """A clone whose batch norms keep their statistics."""

    def make(old: nn.Module) -> nn.Module:
        assert isinstance(old, nn.BatchNorm2d)
        new = FrozenNorm(old.num_features, eps=old.eps).to(old.weight)
        new.load_state_dict(old.state_dict())
        return new.requires_grad_(old.weight.requires_grad).eval()

    return replace_layers(model, [n for n, m in model.named_modules() if type(m) is nn.BatchNorm2d], make)


def two_phase(
    model: nn.Module, head: str, x: Tensor, y: Tensor, classes: int, seed: int, epochs: int = EPOCHS
) -> nn.Module:
    """A new head on frozen features first (they are computed once), then every layer at a tenth of the rate."""
    start = with_head(model, classes, head)
    features = features_of(start, head, x)
    epoch = max(1, len(y) // BATCH)
    layer = trained(with_head(nn.Sequential(nn.Linear(features.shape[1], classes)), classes), features, y,
                    10 * epoch, seed)  # fmt: skip
    start.get_submodule(head).load_state_dict(layer[0].state_dict())  # type: ignore[index]
    return trained(frozen_norms(start).requires_grad_(True), x, y, (epochs - 10) * epoch, seed, rate=1e-4)


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
