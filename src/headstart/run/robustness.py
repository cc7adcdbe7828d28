"""What a run's model bears beside the test pictures as they are: common corruptions, and small changes made to mislead.

All predictions are made before the test labels are opened. That needs no labels: of an example that counts, one that
the model first gets right, the label is what the model says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from headstart.attack import MIFGSM, PGD
from headstart.core.ascent import PASS, logits
from headstart.core.device import accelerator_for
from headstart.core.validate import Refused, require
from headstart.measure.corruptions import SEVERITIES, corrupt
from headstart.measure.distortions import CORRUPTIONS
from headstart.tasks import Task, wilson

from .attacking import moved_by, sound
from .attacks import RandomSigns, Row, control_name, radius_of
from .pixels import Sample, as_input, followed, sampled, seen_by, side_of
from .predict import Predictor

if TYPE_CHECKING:
    from .finish import Finished
    from .routes import Start
    from .settings import Tuning

OWN, OTHER = "made on this model", "made on the same network from scratch"


@dataclass(frozen=True, kw_only=True)
class Strained:
    """Predictions on the sampled pictures: class indices, before anybody looked at a label.

    Attributes:
        sample: the pictures.
        clean: as they are.
        corrupted: corruption -> at each severity.
        perturbed: row -> (attack, predictions); see `Row`.
        before: predictions on the unchanged pictures through the preprocessing as it is differentiated.
        other: what the model from scratch, on which changes are made that carry over, says of the unchanged pictures.
        refused: why there are no perturbed pictures, or "".
    """

    sample: Sample
    clean: list[int]
    corrupted: Mapping[str, list[list[int]]]
    perturbed: Mapping[str, tuple[str, list[int]]]
    before: list[int]
    other: list[int]
    refused: str


def check_possible(task: Task, tuning: Tuning) -> None:
    """Refuse --robustness where there is nothing to corrupt."""
    require(not tuning.robustness or task.modality == "image", "--robustness needs pictures",
            f"{task.name}, which is {task.modality}", "Leave it out.")  # fmt: skip


def check_followed(task: Task, start: Start, tuning: Tuning) -> None:
    """Refuse, before any training, a source whose preprocessing gradients cannot be taken through."""
    if tuning.robustness:
        preprocess = start.source.preprocess
        sample = sampled(task.test.inputs, [side_of(preprocess)], seed=tuning.seed)
        followed(start.source.name, preprocess, sample.pictures)


def strained(run: Finished, model: Predictor) -> Strained:
    """Predict on corrupted and perturbed test pictures.

    Args:
        run: whose baselines give the other model: the same network from scratch, trained with patience.
        model: the finished model.

    Cost: 75 predictions of each picture of the sample and some thirty of its gradients; what is done of the former is
    remembered.
    """
    sample = sampled(run.task.test.inputs, [side_of(model.preprocess)], seed=run.tuning.seed)
    patient = run.baselines["patient"].model
    other = Predictor(model=patient, preprocess=model.preprocess, classes=run.task.classes, modality="image")
    where = accelerator_for(run.tuning.device, "fp32").device
    homes = [(one.model, next(one.model.parameters()).device) for one in (model, other)]
    try:
        for module, _ in homes:
            module.to(where)
        clean = said(model, sample.pictures)
        corrupted = {}
        for k, name in enumerate(CORRUPTIONS):
            if run.progress:
                run.progress("corrupting pictures", k, len(CORRUPTIONS))
            corrupted[name] = run.directory.recall(
                f"corrupted {name}", partial(_corrupted, model, sample.pictures, name, run.tuning.seed)
            )
        try:
            perturbed, before, before_other = _perturbed(run, model, other, sample, where)
            refused = ""
        except Refused as problem:  # a run that has come this far is finished without
            perturbed, before, before_other, refused = {}, clean, clean, str(problem)
    finally:
        for module, home in homes:
            module.to(home)
    return Strained(sample=sample, clean=clean, corrupted=corrupted, perturbed=perturbed, before=before,
                    other=before_other, refused=refused)  # fmt: skip


def _corrupted(model: Predictor, pictures: np.ndarray, name: str, seed: int) -> list[list[int]]:
    return [said(model, corrupt(pictures, name, severity, seed=seed)) for severity in SEVERITIES]


def said(model: Predictor, pictures: np.ndarray) -> list[int]:
    """Class indices by the model's own preprocessing."""
    found: list[int] = model.logits(list(pictures)).argmax(1).tolist()
    return found


def _perturbed(
    run: Finished, model: Predictor, other: Predictor, sample: Sample, where: torch.device
) -> tuple[dict[str, tuple[str, list[int]]], list[int], list[int]]:
    radius, seed = radius_of(run.tuning.radius), run.tuning.seed
    seen: list[nn.Module] = [seen_by("the model", one, run.task.classes, sample.pictures) for one in (model, other)]
    x = as_input(sample.pictures).to(where)
    before, before_other = (_classes(one, x) for one in seen)
    for one in seen:
        sound("the model", one, x)
    control = RandomSigns(radius=radius, seed=seed)
    rows: list[tuple[str, str, Any, list[nn.Module]]] = [
        (control_name(control), "", control, []),
        (OTHER, "mifgsm", MIFGSM(radius=radius), seen[1:]),
        (OWN, "pgd", PGD(radius=radius, seed=seed), seen[:1]),
    ]
    found = {}
    for name, attack, how, on in rows:
        moved = moved_by(Row(attack=name), how, on, x, before, run.progress)
        found[name] = (attack, _classes(seen[0], moved).tolist())
    return found, before.tolist(), before_other.tolist()


def _classes(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.inference_mode():
        found = torch.cat([logits(model, some).argmax(1) for some in torch.split(x, PASS)])
    return found.clone()


def rates(seen: Strained, labels: Tensor, tuning: Tuning) -> dict[str, Any]:
    """What results.json holds of it: shares of right predictions, now that the labels are open.

    Args:
        seen: the predictions.
        labels: of the whole test part.
        tuning: for the radius.
    """
    truth = labels[list(seen.sample.rows)]

    def right(predictions: list[int]) -> Tensor:
        return torch.tensor(predictions) == truth

    def share(predictions: list[int]) -> float:
        return float(right(predictions).double().mean())

    corrupted = {name: [share(one) for one in each] for name, each in seen.corrupted.items()}
    before, n, rows = right(seen.before), len(truth), []
    counted = int(before.sum())
    for name, (attack, predictions) in seen.perturbed.items():
        kept = int((before & right(predictions)).sum())
        low, high = wilson(counted - kept, counted) if counted else (0.0, 1.0)
        rows.append({"name": name, "attack": attack, "accuracy": kept / n, "interval": list(wilson(kept, n)),
                     "success": (counted - kept) / max(counted, 1), "success_interval": [low, high]})  # fmt: skip
    height, width = seen.sample.pictures.shape[1:3]
    every = [value for each in corrupted.values() for value in each]
    return {
        "examples": n, "of": seen.sample.of, "size": [height, width], "notes": seen.sample.notes, "seed": tuning.seed,
        "clean": share(seen.clean),
        "corruptions": {"severities": list(SEVERITIES), "accuracy": corrupted, "mean": sum(every) / len(every)},
        "perturbations": {"radius": tuning.radius, "norm": "linf", "counted": counted, "rows": rows,
                          "other": share(seen.other), "refused": seen.refused},
    }  # fmt: skip


def in_words(found: Mapping[str, Any]) -> str:
    """The records in a line."""
    rows = {row["name"]: row["accuracy"] for row in found["perturbations"]["rows"]}
    parts = [f"{found['clean']:.1%} clean", f"{found['corruptions']['mean']:.1%} under {len(CORRUPTIONS)} corruptions"]
    if rows:
        control, over, own = rows.values()
        parts.append(f"under changes of {found['perturbations']['radius']} {own:.1%} made on it, {over:.1%} carried "
                     f"over, {control:.1%} random signs")  # fmt: skip
    return "; ".join(parts) + f" ({found['examples']} test examples)"
