"""How far one's own models err together: perturbations made on some, measured on others, with each one's own eyes."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headstart.core.ascent import PASS, Attack, goal_gradient, logits, misclassify
from headstart.core.device import accelerator_for
from headstart.core.validate import Refused, finite, require
from headstart.measure import TransferMatrix, transfer_matrix
from headstart.tasks import Task, wilson

from .attacks import RandomSigns, Row, control_name
from .pixels import Sample, as_input, sampled, seen_by, side_of
from .predict import Predictor

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """What perturbations did to the victims.

    Attributes:
        rows: the sets of perturbed examples, the control first; rows of the matrix.
        matrix: success, error, intervals, clean accuracy.
        x: (n, 3, H, W) in [0, 1].
        moved: row -> the same, perturbed.
        examples: the rows of the task's test part that were looked at.
        notes: what a reader must know.
    """

    rows: tuple[Row, ...]
    matrix: TransferMatrix
    x: Tensor = field(repr=False)
    moved: Mapping[str, Tensor] = field(repr=False)
    examples: tuple[int, ...] = field(repr=False)
    notes: tuple[str, ...]

    def white_box(self, row: int, victim: int) -> bool:
        """Whether a row was made on this very victim."""
        return self.matrix.victims[victim] in self.rows[row].made_on


def attack_task(
    task: Task,
    surrogates: Mapping[str, Predictor],
    victims: Mapping[str, Predictor],
    attacks: Mapping[str, Attack],
    control: RandomSigns,
    *,
    ensemble: bool = False,
    examples: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    progress: Progress | None = None,
) -> Attacked:
    """Perturb test pictures so that each surrogate errs, and count what the victims make of them.

    Pixels move in [0, 1] at the task's own picture size; each model resizes and normalises them its own way, and
    gradients go through that.

    Args:
        task: of pictures; its test labels are looked at once.
        surrogates: name -> model with its preprocessing.
        victims: likewise; one that has a surrogate's name is that surrogate.
        attacks: name -> attack.
        control: see `RandomSigns`.
        ensemble: also perturb so that all surrogates err at once.
        examples: test pictures to draw, see `how_many`.
        device: where to compute.
        progress: called with what is going on, examples done, examples in all.

    Raises:
        Refused: no pictures, other classes, logits or gradients with NaN, an ensemble of one.
    """
    _fits(task, surrogates, victims, ensemble, examples)
    models = {**victims, **surrogates}
    sample = sampled(task.test.inputs, [side_of(one.preprocess) for one in models.values()], asked=examples,
                     seed=control.seed)  # fmt: skip
    where = accelerator_for(device, "fp32").device
    homes = {name: next(one.model.parameters()).device for name, one in models.items()}
    try:
        seen: dict[str, nn.Module] = {
            name: seen_by(name, one, task.classes, sample.pictures).to(where) for name, one in models.items()
        }
        labels = task.judge(torch.zeros(len(task.test), dtype=torch.long)).labels
        x, y = as_input(sample.pictures).to(where), labels[list(sample.rows)].to(where)
        for name, model in seen.items():
            sound(name, model, x)
        plan: list[tuple[Row, Attack, list[nn.Module]]] = [(Row(attack=control_name(control)), control, [])]
        groups = [(name,) for name in surrogates] + ([tuple(surrogates)] if ensemble else [])
        for name, attack in attacks.items():
            plan += [(Row(attack=name, made_on=group), attack, [seen[one] for one in group]) for group in groups]
        moved, doubts = dict[str, Tensor](), silent({name: seen[name] for name in surrogates}, x, y)
        for row, attack, on in plan:
            with _noted(row, doubts):
                moved[str(row)] = moved_by(row, attack, on, x, y, progress)
        matrix = transfer_matrix(moved, {name: seen[name] for name in victims}, x, y, seed=control.seed,
                                 batch_size=PASS)  # fmt: skip
    finally:
        for name, one in models.items():
            one.model.to(homes[name])
    return Attacked(rows=tuple(row for row, _, _ in plan), matrix=matrix, x=x.cpu(), examples=sample.rows,
                    moved={name: one.cpu() for name, one in moved.items()},
                    notes=(*_notes(matrix, sample, len(task.classes)), *doubts))  # fmt: skip


def _fits(
    task: Task, surrogates: Mapping[str, Any], victims: Mapping[str, Any], ensemble: bool, examples: int | None
) -> None:
    require(task.modality == "image", "attack needs pictures", f"{task.name}, which is {task.modality}",
            "There is no agreed size of a change to texts or tables.")  # fmt: skip
    require(len(task.test) > 0, "attack needs test pictures", 0, "Load the task with test_share > 0.")
    require(bool(surrogates) and bool(victims), "attack needs surrogates and victims", "none", "Name finished runs.")
    require(not ensemble or len(surrogates) > 1, "--ensemble needs two or more surrogates", len(surrogates),
            "Name another, or leave --ensemble out.")  # fmt: skip
    require(examples is None or examples >= 1, "examples must be at least 1", examples, "Leave it out for 500.")


def sound(name: str, model: nn.Module, x: Tensor) -> None:
    """Refuse a model that cannot look at the pictures, by its name."""
    try:
        with torch.inference_mode():
            said = torch.cat([logits(model, some) for some in torch.split(x, PASS)])
    except RuntimeError as problem:
        raise Refused(f"A model must take what its preprocessing gives; got {name}: {problem}. Export it "
                      "with the preprocessing it was trained with.") from problem  # fmt: skip
    finite(f"logits of {name}", said, "Check that model's weights.")


def silent(models: Mapping[str, nn.Module], x: Tensor, y: Tensor) -> list[str]:
    """A note for each model that gives some pictures no gradient: nothing can be made on it there."""
    notes = []
    for name, model in models.items():
        gradient = goal_gradient([misclassify(model, y)], x).flatten(1)
        if count := int((gradient == 0).all(1).sum()):
            notes.append(f"{name} gives {count} of {len(x)} pictures no gradient, so that nothing is made on it there; "
                         "a low rate on its own row does not mean that it is robust")  # fmt: skip
    return notes


def moved_by(
    row: Row, attack: Any, models: Sequence[nn.Module], x: Tensor, y: Tensor, progress: Progress | None
) -> Tensor:
    """One row's examples; each example's random draws follow from its own number, whatever batch it is in."""
    counted, found = "first" in {f.name for f in dataclasses.fields(attack)}, []
    for at in range(0, len(x), PASS):
        if progress:
            progress(str(row), at, len(x))
        own = dataclasses.replace(attack, first=at) if counted else attack
        some, labels = x[at : at + PASS], y[at : at + PASS]
        try:
            found.append(own.perturb(some, [misclassify(model, labels) for model in models]).detach())
        except Refused as problem:
            raise Refused(f"{row}: {problem}") from problem
    return torch.cat(found)


@contextmanager
def _noted(row: Row, doubts: list[str]) -> Iterator[None]:
    """Turn what an attack warns of into a note, once; other warnings stay warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for one in caught:
        text = f"{row}: {one.message}".rstrip(".")
        if Path(one.filename).parent.parent.name != "headstart":
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        elif text not in doubts:
            doubts.append(text)


def _notes(matrix: TransferMatrix, sample: Sample, classes: int) -> tuple[str, ...]:
    notes, n = sample.notes, len(sample.rows)
    for name, counted in zip(matrix.victims, matrix.counted.tolist(), strict=True):
        if counted == 0:
            notes.append(f"{name} is right on none of the pictures: nothing is known of it")
        elif wilson(counted, n)[0] <= 1 / classes:
            notes.append(f"{name} is right on {counted} of {n}, which may be luck")
    return tuple(notes)


def trained_on(folder: Path, task: Task) -> int:
    """How many test examples of the task a finished run has learnt from, as its split.json says; 0 without one."""
    try:
        split = json.loads((folder / "split.json").read_text(encoding="utf-8"))
        parts = {part: set(split[part]) for part in ("train", "validation", "unlabelled", "test")}
        classes = sorted(split["classes"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    own = {name for part in parts for name in getattr(task, part).names}
    same = classes == sorted(task.classes) and set().union(*parts.values()) <= own  # else it is of something else
    return len(set(task.test.names) & (parts["train"] | parts["validation"])) if same else 0
