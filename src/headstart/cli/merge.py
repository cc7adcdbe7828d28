"""`headstart merge`: several models into one, with an account of it, and a judgement if asked."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import tyro

from headstart.core.validate import one_of, require

from .shell import Shell, percent, table

if TYPE_CHECKING:
    from headstart.core.weights import MergeRule
    from headstart.run.ingredients import Ingredient
    from headstart.run.merging import Merged

SAYS = """Merge models into one that costs no more to run. MODEL is a folder of transformers, timm or headstart, a
.safetensors file, a finished run, hf:ORG/NAME, a PEFT adapter folder, or MODEL+ADAPTER. Weights are read part by part:
memory does not grow with the models. Exit codes: 0 done, 1 judged not worth it, 2 wrong use."""


@dataclass(frozen=True, kw_only=True)
class Common:
    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """What to merge."""
    out: Path
    """The folder to write: weights, configuration, tokenizer, merge.json and a model card."""
    base: str | None = None
    """The model that all were fine-tuned from (of diff: the new version that is built on)."""
    judge: str = ""
    """Tasks to judge every model on, as for fit; commas join."""
    data: str = ""
    """For fisher and regmean: the task each model was trained on, one or one each; commas join."""
    on_mismatch: Literal["error", "skip", "intersect"] = "error"
    """Tensors that do not fit: refuse, keep the base's (or first model's), or leave out."""
    align: bool = False
    """Give every model the rows of the base's (or first model's) vocabulary, token by token."""
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None
    """Of the result; by default that of the base, or of the first model."""
    rank: int | None = None
    """Where only adapters are summed: of the merged adapter; by default exact."""
    quiet: bool = False
    """No progress, only the answer."""


def run(arguments: list[str], shell: Shell) -> int:
    """Merge, write, and say what came of it."""
    from headstart.run.recipe import RULES

    first = arguments[0] if arguments else ""
    if first in ("", "-h", "--help"):
        rules = "\n".join(f"  {name:<16}{_first_line(kind)}" for name, kind in RULES.items())
        shell.say("usage: headstart merge RULE MODEL ... --out DIR\n       headstart merge RECIPE.yaml --out DIR\n\n"
                  f"{SAYS}\n\n{rules}\n\nheadstart merge RULE --help shows a rule's settings.")  # fmt: skip
        return 0 if first else 2
    if first.endswith((".yaml", ".yml")):
        return _recipe(Path(first), arguments[1:], shell)
    one_of("The rule", first, RULES)
    own = _settings(RULES[first])
    kind = make_dataclass("Flags", own, bases=(Common,), frozen=True, kw_only=True)
    flags: Any = shell.parse(kind, f"merge {first}", arguments[1:], f"{_first_line(RULES[first])}\n\n{SAYS}")
    rule = RULES[first](**{name: getattr(flags, name) for name, _, _ in own})
    return _merge(first, rule, flags, shell)


def _recipe(file: Path, arguments: Sequence[str], shell: Shell) -> int:
    from headstart.merge.mergekit import parse_mergekit
    from headstart.run.recipe import rule_of

    require(file.is_file(), "A recipe must be a file", file, "Check the path.")
    settings = parse_mergekit(file.read_text(encoding="utf-8"))
    written = [f"{one.model}+{one.adapter}" if one.adapter else one.model for one in settings.models]
    require(settings.vocabulary != "union", "tokenizer_source must be base", "union", "Merge the tokenizers yourself.")
    default = ["--align"] if settings.vocabulary else []
    default += ["--dtype", settings.dtype] if settings.dtype else []
    default += ["--base", settings.base] if settings.base and settings.method != "slerp" else []
    flags = shell.parse(Common, "merge RECIPE.yaml", [*default, *arguments, *written], SAYS)
    return _merge(settings.method, rule_of(settings), flags, shell)


def _settings(kind: type[Any]) -> list[tuple[str, Any, Any]]:
    """Name, type and default of a rule's settings, each with what the rule's own documentation says of it."""
    hints, text = get_type_hints(kind), inspect.getdoc(kind) or ""
    found = []
    for one in fields(kind):
        said = re.search(rf"^    {one.name}: (.*?)(?=^    \w+: |^\S|\Z)", text, re.MULTILINE | re.DOTALL)
        words = " ".join(said.group(1).split()) if said else ""
        found.append((one.name, Annotated[hints[one.name], tyro.conf.arg(help=words)], one.default))
    return found


def _first_line(kind: type[Any]) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


def _merge(name: str, rule: MergeRule, flags: Any, shell: Shell) -> int:
    import torch

    from headstart.run.ingredients import is_adapter, open_ingredient
    from headstart.run.merging import merge_models
    from headstart.run.recipe import BASED, MEASURED
    from headstart.run.worth import loadable, worth
    from headstart.tasks import load_task

    require(bool(flags.models), "merge needs models", "none", "Name folders, adapters, or hf:ORG/NAME.")
    if flags.base is None and all(map(is_adapter, flags.models)):
        return _sum(name, rule, flags, shell)
    require(flags.base is not None or name not in BASED, f"{name} needs --base", None, "Name the common ancestor.")
    base = None if flags.base is None else open_ingredient(flags.base)
    models = [open_ingredient(where, base) for where in flags.models]
    tasks = [load_task(target) for target in _several(flags.judge)]
    require(bool(flags.data) == (name in MEASURED), "--data goes with fisher and regmean, which need it", flags.data
            or "none", "Name the task each model was trained on." if name in MEASURED else "Leave it out.")  # fmt: skip
    importance = None
    if flags.data:
        from headstart.run.importance import importance_of

        importance = importance_of(name, models, _several(flags.data), shell.progress)

    def judged(folder: Path, merged: Merged) -> dict[str, Any]:
        if not tasks:
            return {}
        every = [*([] if base is None else [base]), *models]
        with loadable(every) as folders:
            answer = worth({**folders, "merged": folder}, tasks, merged="merged",
                           base=None if base is None else base.name, progress=shell.progress)  # fmt: skip
        found.update(answer)
        return {"judged": answer}

    found: dict[str, Any] = {}
    merged = merge_models(rule, models, flags.out, base=base, importance=importance, on_mismatch=flags.on_mismatch,
                          align=flags.align, dtype=None if flags.dtype is None else getattr(torch, flags.dtype),
                          finish=judged, progress=shell.progress)  # fmt: skip
    shell.stop()
    shell.say(told(merged, models, found, flags.out))
    return 1 if found and found["answer"] != "Worth it" else 0


def _sum(name: str, rule: Any, flags: Any, shell: Shell) -> int:
    """Adapters without their base: their sum is an adapter again."""
    from headstart.merge.adapters import read_adapter, sum_adapters, write_adapter

    one_of("Without --base, adapters can be merged by a rule that sums them; this one", name, _SUMS)
    count = len(flags.models)
    weights = rule.weights or (1.0,) * count
    require(len(weights) == count, f"A merge needs one weight for each of {count} models", len(weights),
            "Pass as many weights as models.")  # fmt: skip
    require(not flags.out.exists() or not any(flags.out.iterdir()), "--out must be a new or empty folder", flags.out,
            "Name another; nothing is overwritten.")  # fmt: skip
    mean = name in ("average", "linear") or getattr(rule, "normalise", False)
    share = getattr(rule, "scale", 1.0) / (sum(weights) if mean else 1.0)
    adapters = [read_adapter(Path(where).expanduser()) for where in flags.models]
    summed = sum_adapters(adapters, [share * weight for weight in weights], rank=flags.rank)
    write_adapter({layer: one.factors for layer, one in summed.items()}, flags.out)
    lost = max(one.discarded for one in summed.values())
    rank = max(one.factors.rank for one in summed.values())
    told = "exact" if lost < 1e-9 else f"{percent(lost)} of the squared change left out where it is worst"
    shell.say(f"{count} adapters summed into {flags.out}: rank {rank}, {told}")
    return 0


_SUMS = ("average", "linear", "task-arithmetic", "task_arithmetic")


def told(merged: Merged, models: Sequence[Ingredient], judged: dict[str, Any], out: Path) -> str:
    """What a person wants to know: the answer, how far the models were, where they disagreed most."""
    total = merged.total.to_json()
    lines = [f"{judged['answer']}. {judged['why']}", ""] if judged else []
    if judged:
        rows = [(row["name"], *(f"{value:.3f}" for value in row["accuracy"])) for row in judged["rows"]]
        heads = ", ".join(dict.fromkeys(judged["heads"]))
        lines += [
            table(rows, ("accuracy", *judged["tasks"])),
            f"by {heads}; look {judged['looks']} at these labels",
            "",
        ]
    trimmed = total["trimmed"] or [None] * len(models)
    rows = [(one.name, "" if far is None else f"{far:.3f}", percent(cut))
            for one, far, cut in zip(models, total["distance"], trimmed, strict=False)]  # fmt: skip
    lines += [table(rows, ("model", "distance", "dropped")), ""]
    worst = sorted(merged.tensors.items(), key=lambda item: -item[1].to_json()["sign_disagreement"])[:3]
    most = ", ".join(f"{name} {percent(tally.to_json()['sign_disagreement'])}" for name, tally in worst)
    lines.append(
        f"models disagree on the direction of {percent(total['sign_disagreement'])} of what changed; most: {most}"
    )
    if merged.common.left:
        kept = "kept from " + merged.settings_from if merged.common.copied else "left out"
        lines.append(
            f"{len(merged.common.left)} tensors do not fit and were {kept}: {', '.join(merged.common.left[:3])}"
        )
    lines += [f"warning: {text}" for text in merged.warnings]
    return "\n".join([*lines, f"{out}: configuration from {merged.settings_from}; {merged.seconds:.1f} s"])


def _several(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]
