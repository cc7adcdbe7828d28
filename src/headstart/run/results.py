"""The records of a run as plain data: what results.json holds and the report draws."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headstart.tasks import Judged, wilson
from headstart.zoo.audit import Audit

from . import judging
from .settings import command
from .trial import Trained, Tried

if TYPE_CHECKING:
    from .finish import Finished

BASELINES = {"scratch": "from scratch", "random": "random features", "patient": "from scratch, with patience"}


def records(
    run: Finished, judged: Judged, logits: Mapping[str, Tensor], after: Audit, looks: int, size: int
) -> dict[str, Any]:
    """Everything but run.json; see the keys."""
    task, labels = run.task, judged.labels
    probabilities = logits["chosen"].double().softmax(1)
    right = {name: one.argmax(1) == labels for name, one in logits.items()}
    answer = answered(run, judged, right, after, looks)
    where = run.out or "DIR"
    seconds = {"read": None} | {name: round(value, 2) for name, value in run.seconds.items()}
    return {
        "format": 1,
        "task": {
            "name": task.name, "target": task.target, "modality": task.modality, "classes": list(task.classes),
            "train": len(task.train), "validation": len(task.validation), "unlabelled": len(task.unlabelled),
            "test": len(task.test), "labels_per_class": run.reading.labels_per_class, "seed": task.seed,
            "manifest": task.manifest, "notes": list(task.notes),
        },
        "answer": answer,
        "ranking": ranking(run),
        "candidates": candidates(run, judged, right),
        "audit": {
            "passed": run.before.passed and after.passed,
            "before": [asdict(one) for one in run.before.findings],
            "after": [asdict(one) for one in after.findings],
        },
        "test": {
            "confusion": judged.confusion.tolist(),
            "per_class": judging.per_class(judged.confusion, task.classes),
            "calibration": judging.calibration(probabilities, labels),
            "mistakes": judging.mistakes(probabilities, labels, task.test.names, task.classes),
        },
        "cost": {"seconds": seconds, "peak_memory": peak_memory(), "threads": torch.get_num_threads(),
                 "device": next(run.start.model.parameters()).device.type},
        "reproduce": {
            "command": command(task.target, run.reading, run.tuning, where),
            "again": f"headstart fit --from {where}/run.json --out NEW",
            "predict": f"headstart predict {where} FILES",
        },
        "model": {"directory": "model", "bytes": size, "licence": run.start.source.licence},
        "methods": methods(run),
    }  # fmt: skip


def answered(run: Finished, judged: Judged, right: Mapping[str, Tensor], after: Audit, looks: int) -> dict[str, Any]:
    """The answer first: what it is, how good, how much better than nothing, and whether the run says yes."""
    best = run.best
    equals = {name: float(right[name].double().mean()) for name in ("scratch", "random")}
    rival = max(equals, key=lambda name: equals[name])
    gain, between = judging.gain(right["chosen"], right[rival])
    reasons = []
    if gain <= 0:
        reasons.append(f"Not better than {BASELINES[rival]} ({equals[rival]:.1%}): nothing useful was transferred.")
    if not after.passed:
        reasons.append("The audit failed: " + "; ".join(f"{one.name}: {one.detail}" for one in after.failures))
    good = not reasons
    if good and between[0] <= 0:
        reasons.append(f"The lead over {BASELINES[rival]} is within chance on {judged.n} test examples.")
    patient = float(right["patient"].double().mean())
    if patient >= judged.accuracy and good:
        reasons.append(f"Trained for {run.baselines['patient'].steps} steps the same network from scratch reaches "
                       f"{patient:.1%}: here the transfer saves time, not labels.")  # fmt: skip
    source = run.start.source.name
    word = "Start from" if good else "Do not rely on"
    return {
        "verdict": "yes" if good else "no",
        "sentence": f"{word} {source} by {best.route}: {judged.accuracy:.1%} of {judged.n} test examples right, "
        f"{gain * 100:+.1f} points against {BASELINES[rival]}.",
        "reasons": reasons, "source": source, "route": best.route, "sure": run.choice.ranking[0].sure,
        "accuracy": judged.accuracy, "interval": list(judged.interval), "n": judged.n, "looks": looks,
        "predicted": None if best.accuracy is None else {
            "accuracy": best.accuracy, "low": best.low, "high": best.high, "how": best.how},
        "scratch": scored(right["scratch"]), "random_features": scored(right["random"]),
        "patient_scratch": scored(right["patient"]), "gain": gain, "gain_interval": list(between),
    }  # fmt: skip


def scored(right: Tensor) -> dict[str, Any]:
    """Accuracy with its 95 % interval."""
    hits, n = int(right.sum()), len(right)
    return {"accuracy": hits / n, "interval": list(wilson(hits, n))}


def ranking(run: Finished) -> dict[str, Any]:
    """The ranking as rows, best first."""
    choice, facts = run.choice, run.facts
    rows = []
    for one in choice.ranking:
        rows.append({
            "source": one.name, "rank": one.place, "chosen": one.name == choice.best, **facts.get(one.name, {}),
            "scores": {name: asdict(score) for name, score in one.scores.items()},
            "predicted": {"accuracy": one.predicted.value, "low": one.predicted.low, "high": one.predicted.high},
            "basis": one.basis, "probe": one.probe and one.probe.value, "tuned": one.tuned and one.tuned.value,
            "close": one.close, "sure": one.sure, "seconds": None,
        })  # fmt: skip
    return {
        "scores": list({name: None for one in choice.ranking for name in one.scores}),
        "agreement": {"pairs": choice.agreement, "mean": mean_agreement(choice.agreement)},
        "rows": rows, "skipped": [asdict(one) for one in choice.skipped], "seconds": round(choice.seconds, 2),
        "reason": choice.reason, "decide": choice.decide, "close": list(choice.close),
        "stages": [asdict(stage) for stage in choice.stages], "budget": choice.budget, "cost": choice.cost,
    }  # fmt: skip


def mean_agreement(agreement: Mapping[str, Mapping[str, float]]) -> float | None:
    """Mean correlation over the pairs of different scores; None without any."""
    values = [v for a, row in agreement.items() for b, v in row.items() if a != b and math.isfinite(v)]
    return sum(values) / len(values) if values else None


def candidates(run: Finished, judged: Judged, right: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Every route that was tried, best first, then the baselines."""
    shown = sorted(run.tried, key=lambda one: -(one.accuracy if one.accuracy is not None else -1.0))
    rows = [_route(one, run, judged) for one in shown]
    return rows + [_baseline(name, one, right[name]) for name, one in run.baselines.items()]


def _route(one: Tried, run: Finished, judged: Judged) -> dict[str, Any]:
    chosen, final = one.route == run.best.route, run.trained
    selection = {"accuracy": one.accuracy, "low": one.low, "high": one.high, "folds": list(one.folds), "how": one.how}
    row: dict[str, Any] = {"name": one.route, "role": "route", "source": run.start.source.name, "route": one.route,
           "selection": None if one.accuracy is None else selection, "test": None,
           "seconds": round(one.seconds, 3), "chosen": chosen,
           "steps": one.steps, "trainable": one.trainable, "parameters": one.parameters, "history": []}  # fmt: skip
    if one.why_skipped:
        row["why_skipped"] = one.why_skipped
    return row | (_cost(final) | {"test": {"accuracy": judged.accuracy, "interval": list(judged.interval)},
                                  "seconds": round(one.seconds + final.seconds, 3)} if chosen else {})  # fmt: skip


def _baseline(name: str, one: Trained, right: Tensor) -> dict[str, Any]:
    return {"name": BASELINES[name], "role": "baseline", "source": None, "route": name, "selection": None,
            "test": scored(right), "chosen": False, **_cost(one)}  # fmt: skip


def _cost(one: Trained) -> dict[str, Any]:
    return {"seconds": round(one.seconds, 3), "steps": one.steps, "trainable": one.trainable,
            "parameters": one.parameters, "history": list(one.history)}  # fmt: skip


def methods(run: Finished) -> list[str]:
    """Slugs of the published methods that took part, for `headstart cite`."""
    from headstart.core.catalogue import modules_with

    known = {name.rsplit(".", 1)[1].replace("_", "-") for name in modules_with("PAPER")}
    used = {score.lower() for one in run.choice.ranking for score in one.scores}
    used |= {slug for slug in known if slug.replace("-", "") in used}
    used |= {"corruptions", "mifgsm", "pgd"} if run.tuning.robustness else set()
    return sorted((used | {run.best.route}) & known)


def peak_memory() -> int | None:
    """The most memory this process held, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def jsonable(value: Any) -> Any:
    """The value with tuples as lists, and None for numbers that JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
