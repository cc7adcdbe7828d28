"""Whether a merge was worth it: every ingredient, the base and the result on the same test examples."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headstart.core.evidence import forward_features
from headstart.core.validate import Refused, require
from headstart.core.weights import save_weights

from .ingredients import Ingredient
from .judging import gain
from .predict import Predictor, load
from .prepared import prepare
from .probe import cross_validated, fit_probe

if TYPE_CHECKING:
    from headstart.tasks import Task

Progress = Callable[[str, int, int], None]


def worth(
    folders: Mapping[str, Path],
    tasks: Sequence[Task],
    *,
    merged: str,
    base: str | None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Accuracy of every model on every task, and the answer.

    A model answers with its own head where the heads of all models have the task's classes; else each gets a logistic
    head on its frozen features, trained on the task's training examples. The merge is worth it when it is right more
    often than the best single ingredient over all tasks, by more than chance allows.

    Args:
        folders: name -> model folder; the merged model, the base and the ingredients.
        tasks: what to judge on; each model is one look at the test labels.
        merged: the name of the merged model.
        base: the name of the base, which is no alternative.
        progress: called with what is going on, models done, models in all.

    Raises:
        Refused: a model that cannot be loaded, or that reads another kind of data.
    """
    right: dict[str, list[Tensor]] = {name: [] for name in folders}
    heads, looks, done = [], 0, 0
    for task in tasks:
        models = {name: _loaded(name, folder) for name, folder in folders.items()}
        for name, model in models.items():
            require(model.modality == task.modality, "Models to judge must read the task's kind of data",
                    f"{name} reads {model.modality}, {task.name} is {task.modality}", "Judge on another.")  # fmt: skip
        own = all(set(task.classes) <= set(model.classes) for model in models.values())
        heads.append("their own heads" if own else "a logistic head on frozen features")
        for name, model in models.items():
            said = _own_head(model, task) if own else _probed(model, folders[name], task)
            judged = task.judge(said)
            looks = judged.look
            right[name].append(said == judged.labels)
            done += 1
            if progress:
                progress("judging", done, len(tasks) * len(folders))
    accuracy = {name: [float(hits.float().mean()) for hits in every] for name, every in right.items()}
    mean = {name: sum(values) / len(values) for name, values in accuracy.items()}
    single = max((name for name in folders if name not in (merged, base)), key=mean.__getitem__)
    more, (low, high) = gain(torch.cat(right[merged]), torch.cat(right[single]))
    answer = "Worth it" if low > 0 else "Not worth it"
    doubt = "" if low > 0 or high <= 0 else "; these examples cannot show a difference"
    return {
        "answer": answer,
        "why": f"The merged model is right {100 * more:+.1f} points more often than {single}, the best single model "
               f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f}){doubt}.",
        "tasks": [task.name for task in tasks],
        "heads": heads,
        "rows": [{"name": name, "accuracy": values} for name, values in accuracy.items()],
        "gain": more,
        "interval": [low, high],
        "looks": looks,
    }  # fmt: skip


def _loaded(name: str, folder: Path) -> Predictor:
    try:
        return load(folder)
    except Refused as problem:
        raise Refused(f"--judge needs models that can be loaded; got {name}: {problem}") from problem


def _own_head(model: Predictor, task: Task) -> Tensor:
    columns = [model.classes.index(name) for name in task.classes]
    return model.logits(task.test.inputs)[:, columns].argmax(1)


def _probed(model: Predictor, folder: Path, task: Task) -> Tensor:
    from headstart.zoo.resolve import resolve

    [source], _ = resolve(f"dir:{folder}")

    def features(inputs: Sequence[Any]) -> Tensor:
        batches = prepare(inputs, model.preprocess).batches()
        return torch.cat([f.cpu() for f, _ in forward_features(model.model, batches, head=source.head)])

    train, labels = features(task.train.inputs), task.train.labels
    assert labels is not None
    strength = cross_validated(train, labels, repeats=1).strength
    weight, bias = fit_probe(train, labels, len(task.classes), strength=strength)
    return (features(task.test.inputs) @ weight.T + bias).argmax(1)


@contextmanager
def loadable(ingredients: Sequence[Ingredient]) -> Iterator[dict[str, Path]]:
    """Name -> a folder that can be loaded; adapters are written out on their base for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="headstart-merge-") as place:
        found = {}
        for k, one in enumerate(ingredients):
            found[one.name] = one.folder
            if not one.whole:
                folder = Path(place) / str(k)
                shutil.copytree(one.folder, folder, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin"))
                save_weights(one.weights, folder)
                found[one.name] = folder
        yield found
