"""Which weights of a model a checkpoint covers, and the refusal of one that does not fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from headstart.core.validate import one_of, require

BEFORE = ("keys", "values", "modality", "head", "input", "classes", "trains")
AFTER = ("finite", "moved", "head-moved", "frozen", "restored", "head-restored", "predictions")
KEYS = ("missing-head", "mismatched-head", "unexpected-head", "missing", "mismatched", "unexpected")
ALLOWED = (*BEFORE, *AFTER, *KEYS)


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """Which weights of a model a checkpoint covers; shares are of the model's elements, between 0 and 1."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    mismatched: tuple[str, ...]
    unexpected: tuple[str, ...]
    loaded_share: float
    missing_share: float
    mismatched_share: float
    head: str = ""


def load_report(model: nn.Module, weights: Mapping[str, Tensor], *, head: str = "") -> LoadReport:
    """Compare the weights of a checkpoint with those a model needs, by name and shape; nothing is copied.

    A tied weight that the checkpoint holds under another of its names counts as loaded.

    >>> layer = nn.Linear(2, 3)
    >>> report = load_report(layer, {"weight": layer.weight, "scale": layer.bias})
    >>> report.missing, report.unexpected, round(report.loaded_share, 3)
    (('bias',), ('scale',), 0.667)
    """
    own = model.state_dict(keep_vars=True)
    held = {id(own[key]) for key in own if key in weights}
    loaded = tuple(key for key in own if key in weights and weights[key].shape == own[key].shape)
    mismatched = tuple(key for key in own if key in weights and weights[key].shape != own[key].shape)
    tied = tuple(key for key in own if key not in weights and id(own[key]) in held)
    missing = tuple(key for key in own if key not in weights and key not in tied)
    total = max(1, sum(value.numel() for value in own.values()))

    def share(keys: tuple[str, ...]) -> float:
        return float(sum(own[key].numel() for key in keys) / total)

    return LoadReport(
        loaded=loaded + tied,
        missing=missing,
        mismatched=mismatched,
        unexpected=tuple(sorted(set(weights) - set(own))),
        loaded_share=share(loaded + tied),
        missing_share=share(missing),
        mismatched_share=share(mismatched),
        head=head,
    )


def check_loaded(report: LoadReport, allow: Collection[str] = ()) -> None:
    """Refuse a checkpoint that does not fit its model; `allow` declares exceptions such as "missing-head".

    Raises:
        Refused: names the keys that are missing, of another shape, or left over.
    """
    wrong = key_problems(report, allow)
    do = "Save the model again, or allow the exception by name: " + ", ".join(KEYS) + "."
    require(not wrong, "A checkpoint must hold exactly the weights of its model", "; ".join(wrong), do)


def key_problems(report: LoadReport, allow: Collection[str] = ()) -> list[str]:
    """What does not fit and is not allowed, as "missing KEY, KEY"."""
    for name in allow:
        one_of("allow", name, ALLOWED)
    told = []
    for kind in ("missing", "mismatched", "unexpected"):
        keys = [key for key in getattr(report, kind) if not _excused(key, kind, report.head, allow)]
        if keys:
            told.append(f"{kind} {', '.join(keys[:8])}" + (f" and {len(keys) - 8} more" if len(keys) > 8 else ""))
    return told


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], *, head: str = "", allow: Collection[str] = ()
) -> LoadReport:
    """Copy a checkpoint into a model, in place, after `check_loaded` let it pass."""
    report = load_report(model, weights, head=head)
    check_loaded(report, allow)
    model.load_state_dict({key: weights[key] for key in report.loaded if key in weights}, strict=False)
    return report


def _excused(key: str, kind: str, head: str, allow: Collection[str]) -> bool:
    in_head = bool(head) and (key == head or key.startswith(head + "."))
    return kind in allow or (in_head and f"{kind}-head" in allow)
