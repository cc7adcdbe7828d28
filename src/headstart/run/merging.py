"""Merge models on disk into a folder that their own library loads, with an account of what the merge did."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.core.shards import Spec, Weights, reader, spans, spec_of
from headstart.core.validate import Refused, require
from headstart.core.weights import MergeRule, merged_parts
from headstart.core.write import new_folder, write_parts
from headstart.merge.align_vocabularies import align_vocabularies
from headstart.merge.read_vocabulary import read_vocabulary

from .conflicts import Tally, Watched, doubts
from .ingredients import Common, Ingredient, OnMismatch, Selected, common_tensors

Progress = Callable[[str, int, int], None]
RECORD = "merge.json"
_SETTINGS = (".json", ".jinja", ".model", ".txt")
_OURS = {"README.md", RECORD, "results.json", "run.json", "model.safetensors.index.json", "adapter_config.json"}


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a merge did, as merge.json has it.

    Args:
        rule: its settings, as Python would write them.
        total: over all tensors.
        tensors: name -> of each.
        common: which tensors were merged.
        warnings: doubts, for a person.
        settings_from: the ingredient whose configuration and tokenizer the result has.
        seconds: wall time.
    """

    rule: str
    total: Tally
    tensors: dict[str, Tally]
    common: Common
    warnings: tuple[str, ...]
    settings_from: str
    seconds: float


def merge_models(
    rule: MergeRule,
    models: Sequence[Ingredient],
    out: Path,
    *,
    base: Ingredient | None = None,
    importance: Sequence[Weights] | None = None,
    on_mismatch: OnMismatch = "error",
    align: bool = False,
    dtype: torch.dtype | None = None,
    finish: Callable[[Path, Merged], dict[str, Any]] | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Merge and write DIR: model.safetensors (or shards), the configuration and tokenizer, merge.json, a model card.

    Args:
        rule: any merge rule.
        models: what is merged, in the rule's order.
        out: a new or empty folder; it appears when everything is in it.
        base: the common ancestor.
        importance: for rules that need it, one mapping for each model.
        on_mismatch: what becomes of tensors that do not fit, see `common_tensors`.
        align: give the models the rows of the base's (or first model's) vocabulary, token by token.
        dtype: of the result's floating tensors; by default that of the base, or of the first model.
        finish: called with the finished folder before it appears; what it returns is added to merge.json.
        progress: called with what is going on, entries done, entries in all.

    Memory: parts of a few tensors, whatever the number and size of the models.

    Raises:
        Refused: models that do not fit, NaN, a folder that is not empty, a full disk. Nothing is left behind.
    """
    started = time.perf_counter()
    require(not out.exists() or (out.is_dir() and not any(out.iterdir())), "--out must be a new or empty folder", out,
            "Name another; nothing is overwritten.")  # fmt: skip
    origin = [] if base is None else [base]
    every: list[Weights] = [one.weights for one in (*origin, *models)]
    if align:
        every = _aligned(models, base)
    names = [one.name for one in (*origin, *models)]
    common = common_tensors(names, every, on_mismatch)
    chosen = [Selected(weights, common.merged) for weights in every]
    read = _Read(chosen[len(origin)], progress)
    watched = Watched(rule)
    kept = {*common.merged, *common.copied}
    specs = {name: _spec(every[0], name, dtype) for name in every[0] if name in kept}
    parts = merged_parts(watched, [read, *chosen[len(origin) + 1 :]], base=chosen[0] if origin else None,
                         importance=importance)  # fmt: skip
    parts = read.shown(chain(parts, _copies(every[0], common.copied)), sum(spec.entries for spec in specs.values()))
    source = (*origin, *models)[0] if align or common.copied else models[0]
    try:
        with new_folder(out) as folder:
            write_parts(parts, specs, folder)
            _copy_settings(source.folder, folder)
            total = reduce(Tally.plus, watched.tallies.values(), Tally())
            tensors = {name: watched.tallies[name] for name in common.merged if name in watched.tallies}
            warnings = doubts(total, [one.name for one in models], base is not None) if total.change else []
            merged = Merged(rule=repr(rule), total=total, tensors=tensors, common=common, warnings=tuple(warnings),
                            settings_from=source.name, seconds=time.perf_counter() - started)  # fmt: skip
            record = _record(merged, models, base, progress)
            record |= {} if finish is None else finish(folder, merged)
            (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
            (folder / "README.md").write_text(_card(out.name, record), encoding="utf-8")
    except OSError as problem:
        told = f"Writing to {out} must succeed; got {problem.strerror or problem}. Free space there and run again."
        raise Refused(told) from problem
    return replace(merged, seconds=time.perf_counter() - started)


def _aligned(models: Sequence[Ingredient], base: Ingredient | None) -> list[Weights]:
    found = align_vocabularies(
        [one.weights for one in models], [read_vocabulary(one.folder) for one in models],
        base=None if base is None else base.weights,
        base_vocabulary=None if base is None else read_vocabulary(base.folder),
    )  # fmt: skip
    return [*([] if found.base is None else [found.base]), *found.models]


def _spec(weights: Weights, name: str, dtype: torch.dtype | None) -> Spec:
    spec = spec_of(weights, name)
    return spec if dtype is None or not spec.dtype.is_floating_point else Spec(dtype, spec.shape)


def _copies(weights: Weights, names: Sequence[str]) -> Iterator[tuple[str, int, Tensor]]:
    for name in names:
        read = reader(weights, name)
        yield from ((name, start, read(start, stop)) for start, stop in spans(spec_of(weights, name).entries))


class _Read(Selected):
    """Says how far a pass has come each time a part is read, until merging says it."""

    def __init__(self, weights: Selected, progress: Progress | None) -> None:
        super().__init__(weights, list(weights))
        self.progress, self.places, self.total = progress, dict[str, int](), 0
        for name in weights:
            self.places[name] = self.total
            self.total += self.spec(name).entries

    def lend(self, name: str) -> Callable[[int, int], Tensor]:
        """As `Selected`."""
        read = super().lend(name)

        def told(start: int, stop: int) -> Tensor:
            if self.progress:
                self.progress("reading the models", self.places[name] + stop, self.total)
            return read(start, stop)

        return told

    def shown(self, parts: Iterator[tuple[str, int, Tensor]], total: int) -> Iterator[tuple[str, int, Tensor]]:
        """The merged parts, counted as they come."""
        progress, done = self.progress, 0
        for name, start, part in parts:
            self.progress = None
            yield name, start, part
            done += part.numel()
            if progress:
                progress("merging", done, total)


def _copy_settings(source: Path, folder: Path) -> None:
    """Configuration, tokenizer and preprocessing; and a head that headstart keeps in a file of its own."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in _OURS and (file.suffix in _SETTINGS or file.name == "head.safetensors"):
            shutil.copyfile(file, folder / file.name)


def _record(
    merged: Merged, models: Sequence[Ingredient], base: Ingredient | None, progress: Progress | None
) -> dict[str, Any]:
    from headstart import __version__

    every = [*([] if base is None else [base]), *models]
    digests = []
    for k, one in enumerate(every, 1):
        digests.append(one.digest())
        if progress:
            progress("identifying the models", k, len(every))
    named = [{"name": one.name, "sha256": digest} for one, digest in zip(every, digests, strict=True)]
    return {
        "rule": merged.rule,
        "base": named[0] if base is not None else None,
        "models": named[1:] if base is not None else named,
        "settings_from": merged.settings_from,
        "on_mismatch": {"copied": merged.common.copied, "left": merged.common.left},
        "warnings": merged.warnings,
        "total": merged.total.to_json(),
        "tensors": {name: tally.to_json() for name, tally in merged.tensors.items()},
        "versions": {"headstart": __version__, "torch": torch.__version__},
        "seconds": round(merged.seconds, 1),
    }


def _card(title: str, record: dict[str, Any]) -> str:
    """README.md with YAML front matter that model hubs read."""
    every = [*([record["base"]] if record["base"] else []), *record["models"]]
    front = {"base_model": [one["name"].removeprefix("hf:") for one in every], "base_model_relation": "merge",
             "tags": ["headstart", "merge"]}  # fmt: skip
    total = record["total"]
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()), "---", ""]
    lines += [f"# {title}", "", f"Merged by `{record['rule']}`" + (f" on `{record['base']['name']}`." if record["base"]
              else "."), "", "| model | distance | sha256 |", "| --- | --- | --- |"]  # fmt: skip
    away = total["distance"] or [None] * len(record["models"])
    lines += [f"| {one['name']} | {'' if far is None else f'{far:.3f}'} | `{one['sha256'][:16]}` |"
              for one, far in zip(record["models"], away, strict=False)]  # fmt: skip
    lines += ["", f"Models disagree on the direction of {total['sign_disagreement']:.1%} of the weights that changed. "
              "`merge.json` has every tensor."]  # fmt: skip
    lines += [f"\n**Warning.** {text}" for text in record["warnings"]]
    if judged := record.get("judged"):
        lines += ["", f"**{judged['answer']}.** {judged['why']}", "", "| model | " + " | ".join(judged["tasks"]) + " |",
                  "| --- |" + " --- |" * len(judged["tasks"])]  # fmt: skip
        lines += [f"| {row['name']} | " + " | ".join(f"{value:.3f}" for value in row["accuracy"]) + " |"
                  for row in judged["rows"]]  # fmt: skip
    return "\n".join([*lines, ""])
