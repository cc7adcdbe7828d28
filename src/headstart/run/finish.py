"""The end of a run: write the model, audit it, judge once, record, report, and publish all of it together."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headstart import __version__
from headstart.core.checkpoint import write_atomically
from headstart.core.surgery import with_head
from headstart.tasks import Judged, Task
from headstart.zoo.audit import Audit, audit_after
from headstart.zoo.directory import load_model_directory
from headstart.zoo.export import export_model

from .cache import Progress
from .choice import Choice
from .clock import Clock, now
from .directory import RunDirectory, disk
from .predict import Predictor
from .prepared import logits_of, prepare
from .results import jsonable, records
from .robustness import rates, strained
from .routes import Start
from .settings import Reading, Tuning
from .trial import Trained, Tried

PICTURES = 48  # mistakes kept as pictures


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Everything a run knows before it opens the test labels."""

    task: Task
    choice: Choice
    start: Start
    tuning: Tuning
    reading: Reading
    tried: list[Tried]
    best: Tried
    trained: Trained
    baselines: Mapping[str, Trained]
    before: Audit
    directory: RunDirectory
    seconds: Clock
    started: str
    out: str | None
    settings: Mapping[str, Any]
    digest: str
    facts: Mapping[str, Mapping[str, Any]]
    progress: Progress | None


@dataclass(frozen=True, kw_only=True)
class Done:
    """The content of results.json, and the model as it is on the disk."""

    results: dict[str, Any]
    model: Predictor


def finish(run: Finished) -> Done:
    """Export, audit, judge, record and publish; nothing appears under its final name before all of it is there."""
    made = run.directory.work / "made"
    shutil.rmtree(made, ignore_errors=True)  # of a run that was killed here
    with disk(run.directory.path):
        made.mkdir()
        export_model(
            run.trained.model.to("cpu"), made / "model", source=run.start.source, classes=run.task.classes,
            task=run.task.name, metrics={"accuracy (held out)": run.best.accuracy} if run.best.accuracy else {},
            tags=[run.best.route],
        )  # fmt: skip
    run.seconds.lap("write")
    after, predictor = audited(run, made / "model")
    run.seconds.lap("audit")
    logits = predictions(run, predictor)
    seen = None
    if run.tuning.robustness:
        seen = strained(run, predictor)
        run.seconds.lap("robustness")
    looks = run.directory.keep("looks", run.directory.recall("looks", lambda: 0) + 1)
    judged = run.task.judge(logits["chosen"])
    run.seconds.lap("judge")
    found = records(run, judged, logits, after, looks, bytes_of(made / "model"))
    results = jsonable(found if seen is None else found | {"robustness": rates(seen, judged.labels, run.tuning)})
    with disk(run.directory.path):
        evidence(made, run.task, judged, logits["chosen"], results)
        run.task.save_split(made / "split.json")
        write_json(made / "run.json", run_record(run, looks))
        write_json(made / "results.json", results)
        from .report import write_report

        write_report(made)
    run.seconds.lap("write")
    run.directory.publish(made)
    return Done(results=results, model=predictor)


def audited(run: Finished, folder: Path) -> tuple[Audit, Predictor]:
    """The audit of the model as it comes back from the disk."""
    model, preprocess, classes = load_model_directory(folder)
    plain = with_head(run.start.model, run.start.classes, run.start.source.head)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    batch = run.start.train.rows(range(min(64, len(run.start.train))))
    audit = audit_after(before, run.trained.model, model, batch, head=run.start.source.head,
                        frozen=run.trained.way.frozen, allow=run.tuning.allow)  # fmt: skip
    return audit, Predictor(model=model, preprocess=preprocess, classes=classes, modality=run.task.modality)


def predictions(run: Finished, predictor: Predictor) -> dict[str, Tensor]:
    """Test logits of the reloaded model and of every baseline, all of them fixed before the labels are opened."""
    test = prepare(run.task.test.inputs, run.start.source.preprocess)
    logits = {"chosen": logits_of(predictor.model, test)}
    return logits | {name: logits_of(one.model, test) for name, one in run.baselines.items()}


def evidence(made: Path, task: Task, judged: Judged, logits: Tensor, results: Mapping[str, Any]) -> None:
    """Arrays behind the figures: test predictions, and what was predicted wrongly as pictures or texts."""
    (made / "evidence").mkdir()
    probabilities = logits.softmax(1).numpy()
    np.savez(made / "evidence" / "test.npz", labels=judged.labels.numpy(), predictions=logits.argmax(1).numpy(),
             probabilities=probabilities.astype(np.float32))  # fmt: skip
    wrong = [one["row"] for one in results["test"]["mistakes"]]
    if task.modality == "image" and wrong:
        shown: Any = {f"pixels_{row}": task.test.inputs[row] for row in wrong[:PICTURES]}
        np.savez(made / "evidence" / "mistakes.npz", rows=np.array(wrong), **shown)
    if task.modality == "text" and wrong:
        write_json(made / "evidence" / "texts.json", {str(row): task.test.inputs[row] for row in wrong})


def run_record(run: Finished, looks: int) -> dict[str, Any]:
    """run.json: everything needed to do it again, and what it was done with."""
    from headstart.core.weights import fingerprint

    return {
        "format": 1, "settings": run.settings, "digest": run.digest, "seed": run.tuning.seed, "looks": looks,
        "started": run.started, "finished": now(), "versions": versions(),
        "hashes": {"task": run.task.manifest, "source": run.start.source.fingerprint,
                   "model": fingerprint(run.trained.model.state_dict())},
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Of Python and of what the numbers may depend on."""
    found = {"headstart": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "scikit-learn", "safetensors", "transformers", "timm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def bytes_of(folder: Path) -> int:
    """Size of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON, whole or not at all."""
    import json

    write_atomically(path, lambda file: file.write((json.dumps(value, indent=1, default=asdict) + "\n").encode()))
