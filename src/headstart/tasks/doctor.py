"""`doctor`: what a target holds, what is wrong with it, and the command to run next."""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal

from headstart.core.validate import Refused

from . import refuse
from .diagnosis import Diagnosis, Problem, Severity, Suspect
from .found import Found, few, refuse_unreadable
from .neighbours import suspicious
from .read import Reading, read
from .split import PARTS, assign


def doctor(
    target: Any,
    *,
    image_column: str | None = None,
    text_column: str | None = None,
    feature_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    missing_labels: Literal["refuse", "unlabelled"] = "refuse",
    label_type: Literal["auto", "text"] = "auto",
    max_unreadable: float = 0.1,
) -> Diagnosis:
    """Look at a target before spending time on it: what is there, what is wrong, what to run next.

    A bad target is a diagnosis here, never an exception.

    Args:
        target: as for `load_task`, which explains the other arguments.

    Cost: one pass over the content, then at most 5,000 thumbnails compared pairwise.

    >>> doctor("wine").counts
    {'class_0': 59, 'class_1': 71, 'class_2': 48}
    """
    reading = Reading(
        image_column=image_column,
        text_column=text_column,
        feature_columns=tuple(feature_columns) if feature_columns is not None else None,
        label_column=label_column,
        split_column=split_column,
        missing_labels=missing_labels,
        label_type=label_type,
        max_unreadable=1.0,  # the pass goes on; whether it is too much is said below
    )
    try:
        found, name, again = read(target, reading)
    except Refused as refusal:
        return _unread(str(target) if isinstance(target, str) else type(target).__name__, str(refusal))
    return _diagnose(found, name, again, reading, max_unreadable)


def _diagnose(found: Found, name: str, target: str, reading: Reading, max_unreadable: float) -> Diagnosis:
    counts = {word: int((found.labels == i).sum()) for i, word in enumerate(found.classes)}
    groups = _same(found)
    across = [group for group in groups if len({found.parts[i] for i in group}) > 1] if found.parts else []
    conflicts = [group for group in groups if len({int(found.labels[i]) for i in group if found.labels[i] >= 0}) > 1]
    suspects = suspicious(found)
    sizes = sorted(found.sizes, key=lambda size: size[0] * size[1])
    problems, parts = _errors(found, max_unreadable)
    named = tuple(tuple(tuple(found.names[i] for i in group) for group in some) for some in (groups, across, conflicts))
    warnings: list[tuple[Severity, Sequence[str] | tuple[tuple[str, ...], ...], str]] = [
        ("warning", [": ".join(pair) for pair in found.skipped], "{n} unreadable examples will be skipped"),
        ("warning", named[1], "{n} contents lie in more than one part, so the test accuracy would be too high"),
        ("warning", named[2], "{n} contents appear under two labels"),
        ("warning", [w for w, c in counts.items() if 2 <= c < 10], "{n} classes have fewer than 10 examples"),
        ("hint", named[0], "{n} contents appear more than once; copies stay on one side of a split made here"),
        ("hint", [found.names[i] for i, _ in suspects], "{n} labels look unlike those of their nearest neighbours"),
    ]
    for severity, things, says in warnings:
        if things:
            words = few(thing if isinstance(thing, str) else " = ".join(thing) for thing in things)
            problems.append(Problem(severity=severity, says=f"{says.format(n=len(things))} ({words})"))
    smallest, largest = (min(counts.values()), max(counts.values())) if counts else (0, 0)
    imbalance = largest / smallest if smallest else float("inf")
    if imbalance > 10 and smallest:
        problems.append(Problem(severity="warning", says=f"the largest class has {imbalance:.0f} times the smallest"))
    return Diagnosis(
        target=target,
        modality=found.modality,
        counts=counts,
        parts=parts,
        unlabelled=int((found.labels < 0).sum()),
        imbalance=imbalance,
        unreadable=found.skipped,
        duplicates=named[0],
        across=named[1],
        conflicts=named[2],
        suspects=tuple(
            Suspect(name=found.names[i], label=found.classes[found.labels[i]], neighbours=found.classes[other])
            for i, other in suspects
        ),
        sizes=tuple(sizes[i] for i in (0, len(sizes) // 2, -1)) if sizes else (),
        problems=tuple(sorted(problems, key=lambda problem: ("error", "warning", "hint").index(problem.severity))),
        command=_command(target, name, reading, any(problem.severity == "error" for problem in problems)),
    )


def _errors(found: Found, max_unreadable: float) -> tuple[list[Problem], dict[str, int]]:
    """What `load_task` would refuse, and otherwise how many examples each part gets."""
    problems = []
    try:
        refuse_unreadable(found.skipped, len(found.names) + len(found.skipped), max_unreadable)
    except Refused as refusal:
        problems.append(Problem(severity="error", says=str(refusal)))
    try:
        refuse.classes_of(found)
        parts = assign(found.labels, found.groups or found.hashes, found.parts)
        refuse.parts_of(found, parts, None)
    except Refused as refusal:
        problems.append(Problem(severity="error", says=str(refusal)))
        return problems, dict(Counter(part for part in found.parts if part))
    return problems, {part: int((parts == part).sum()) for part in PARTS}


def _same(found: Found) -> list[list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for i, content in enumerate(found.hashes):
        groups[content].append(i)
    return [group for group in groups.values() if len(group) > 1]


def _command(target: str, name: str, reading: Reading, broken: bool) -> str:
    flags: list[str] = []
    for field in fields(Reading):
        value = getattr(reading, field.name)
        if value != field.default and field.name != "max_unreadable":
            words = value if isinstance(value, tuple) else (value,)
            flags += [f"--{field.name.replace('_', '-')}", *map(shlex.quote, words)]
    if broken:
        return " ".join(["headstart doctor", shlex.quote(target), *flags, " # after the repair"])
    return " ".join(["headstart fit", shlex.quote(target), *flags, "--out", shlex.quote(f"runs/{name}")])


def _unread(target: str, says: str) -> Diagnosis:
    return Diagnosis(
        target=target, modality=None, counts={}, parts={}, unlabelled=0, imbalance=float("inf"), unreadable=(),
        duplicates=(), across=(), conflicts=(), suspects=(), sizes=(),
        command=f"headstart doctor {shlex.quote(target)}", problems=(Problem(severity="error", says=says),),
    )  # fmt: skip
