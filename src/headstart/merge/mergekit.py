"""A merge written down for mergekit, read as settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from headstart.core.validate import one_of, require

from .file_values import known, load, number, switch, table

_SIGNED = ("weight", "density")
OWN: dict[str, tuple[str, ...]] = {
    "linear": ("weight",), "slerp": (), "task_arithmetic": ("weight",), "ties": _SIGNED, "dare_linear": _SIGNED,
    "dare_ties": _SIGNED, "breadcrumbs": (*_SIGNED, "gamma"), "breadcrumbs_ties": (*_SIGNED, "gamma"),
    "della": (*_SIGNED, "epsilon"), "della_linear": (*_SIGNED, "epsilon"),
}  # fmt: skip
"""Method -> what is set for each model."""
NORMALIZED = frozenset({"linear", "ties", "della"})
RESCALED = frozenset({"dare_linear", "dare_ties", "della", "della_linear"})
_DEFAULTS = {"weight": None, "density": 1.0, "gamma": 0.01, "epsilon": 0.15}  # None must be given
_DTYPES = ("float64", "float32", "float16", "bfloat16")
_KEYS = ("base_model", "dtype", "int8_mask", "merge_method", "models", "name", "out_dtype", "parameters", "tokenizer",
         "tokenizer_source")  # fmt: skip
_INSTEAD = {
    "slices": "List whole models under models:.",
    "modules": "List whole models under models:.",
    "chat_template": "Remove it, and set it in tokenizer_config.json.",
}


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """One model of a merge.

    Attributes:
        model: folder or id.
        adapter: LoRA adapter to put on it first ("model+adapter"), or None.
        weight: what its change (linear: its weights) is multiplied by.
        density: share of the entries of its change that stay.
        gamma: share of the largest entries that go (breadcrumbs), at most 1 - density; the smallest make up the rest.
        epsilon: half the range of the probabilities to stay (della).
    """

    model: str
    adapter: str | None = None
    weight: float = 1.0
    density: float = 1.0
    gamma: float = 0.01
    epsilon: float = 0.15


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """What a mergekit file asks for, with mergekit's defaults where it says nothing.

    Attributes:
        method: a name of `OWN`.
        models: without the base; for slerp the base and the other one.
        base: folder or id of the common ancestor; None where linear has none.
        scale: lambda, which multiplies the merged change.
        normalize: divide by the sum of the weights; after an election, of those that agree.
        rescale: enlarge what stays of a change: by 1 / probability to stay (dare, della), else to the tensor's L1 norm.
        t: of slerp: 0 gives the base, 1 the other.
        dtype: of the result, or None for that of the models.
        vocabulary: policy of `align_vocabularies`, or None where the file says nothing of tokenizers.
    """

    method: str
    models: tuple[ModelSettings, ...]
    base: str | None
    scale: float = 1.0
    normalize: bool = False
    rescale: bool = False
    t: float | None = None
    dtype: str | None = None
    vocabulary: Literal["base", "union"] | None = None


def parse_mergekit(text: str) -> MergeSettings:
    """The settings of a mergekit YAML, for the methods that both have.

    What they mean there: changes are trimmed tensor by tensor; weights apply before the signs are elected; a vote of 0
    counts as +; with normalize the merged change is divided by the sum of weights (after an election, of the models
    that agree at the place), where a sum of 0 counts as 1. normalize is on by default for linear, ties and della, and
    rescale for dare and della; state them where it matters, for versions differ.

    Args:
        text: of the file; read with yaml.safe_load.

    Notes: `weight`, `density`, `gamma` and `epsilon` of a model go before those under the common `parameters`. The base
    among the models adds nothing and is left out. `int8_mask` saves memory there and is ignored, as is `name`. Sums are
    made in float32 whatever `dtype` says; it is the result's.

    Raises:
        Refused: an unknown key, method or parameter (with the nearest one), a value by layer or by filter, slices,
            modules, a missing weight, base or t, a number that is none.

    >>> found = parse_mergekit('''
    ... merge_method: ties
    ... base_model: origin
    ... models:
    ...   - model: one
    ...     parameters: {weight: 0.7, density: 0.5}
    ...   - model: two+adapter
    ...     parameters: {weight: 0.3}
    ... dtype: bfloat16
    ... ''')
    >>> found.models[1]
    ModelSettings(model='two', adapter='adapter', weight=0.3, density=1.0, gamma=0.01, epsilon=0.15)
    >>> found.base, found.normalize, found.rescale, found.scale, found.dtype
    ('origin', True, False, 1.0, 'bfloat16')
    """
    content = load(text)
    for key, do in _INSTEAD.items():
        require(not content.get(key), f"A merge must do without {key}", key, do)
    known("A merge", content, {*_KEYS, *_INSTEAD})
    method = content.get("merge_method")
    one_of("merge_method", method if isinstance(method, str) else repr(method), OWN)
    assert isinstance(method, str)
    changes = method not in ("linear", "slerp")
    common = table("parameters", content.get("parameters"))
    switches = {"t"} if method == "slerp" else {"lambda", "normalize", "rescale"} if changes else {"normalize"}
    known(f"{method}'s parameters", common, {*OWN[method], *switches, "int8_mask"})

    base = content.get("base_model")
    require(base is None or (isinstance(base, str) and "+" not in base), "base_model must be a model's name", base,
            "Write its path or id; fold an adapter first.")  # fmt: skip
    require(base is not None or method == "linear", f"{method} needs base_model", None, "Name the common ancestor.")
    entries = content.get("models")
    require(isinstance(entries, list) and bool(entries), "A merge needs models", repr(entries), "Write - model: PATH.")
    assert isinstance(entries, list)
    every = [_model(method, entry, common) for entry in entries if not (changes and _name(entry) == base)]
    require(bool(every), "A merge needs a model beside the base", base, "List the fine-tuned models.")
    if method == "slerp":
        others = [one for one, entry in zip(every, entries, strict=True) if _name(entry) != base]
        require(len(others) == 1, "slerp merges the base and one other model", [_name(entry) for entry in entries],
                "List one model beside base_model.")  # fmt: skip
        require("t" in common, "slerp needs t", sorted(common), "Write parameters: {t: 0.5}.")
        every = [_model(method, {"model": base}, common), *others]
    return MergeSettings(
        method=method,
        models=tuple(every),
        base=base,
        scale=number("lambda", common.get("lambda", 1.0)),
        normalize=switch("normalize", common.get("normalize", method in NORMALIZED)),
        rescale=switch("rescale", common.get("rescale", method in RESCALED)),
        t=number("t", common["t"]) if method == "slerp" else None,
        dtype=_dtype(content),
        vocabulary=_vocabulary(content),
    )


def _name(entry: object) -> object:
    return entry.get("model") if isinstance(entry, dict) else entry


def _model(method: str, entry: object, common: Mapping[str, Any]) -> ModelSettings:
    content = table("an entry of models", entry)
    known("A model", content, ("model", "parameters"))
    name = content.get("model")
    require(isinstance(name, str) and bool(name), "A model must be a name", repr(name), "Write - model: PATH.")
    assert isinstance(name, str)
    model, plus, adapter = name.partition("+")
    require("+" not in adapter and bool(model) and bool(adapter) == bool(plus), "A model is MODEL or MODEL+ADAPTER",
            name, "Rename a folder that has a plus.")  # fmt: skip
    own = table(f"parameters of {name}", content.get("parameters"))
    known(f"{method}'s parameters of {name}", own, {*OWN[method], "int8_mask"})
    numbers = {}
    for key in OWN[method]:
        value = own.get(key, common.get(key, _DEFAULTS[key]))
        require(value is not None, f"{method} needs a {key} for each model", name, f"Write parameters: {{{key}: 1.0}}.")
        numbers[key] = number(f"{key} of {name}", value)
    return ModelSettings(model=model, adapter=adapter or None, **numbers)


def _dtype(content: Mapping[str, Any]) -> str | None:
    for key in ("out_dtype", "dtype"):
        if content.get(key) is not None:
            one_of(key, str(content[key]), _DTYPES)
            return str(content[key])
    return None


def _vocabulary(content: Mapping[str, Any]) -> Literal["base", "union"] | None:
    tokenizer = table("tokenizer", content.get("tokenizer"))
    known("tokenizer", tokenizer, ("source",))
    source = content.get("tokenizer_source", tokenizer.get("source"))
    if source is None:
        return None
    require(source in ("base", "union"), "The tokenizer's source must be base or union", repr(source),
            "Name that model base_model, or use union.")  # fmt: skip
    return "union" if source == "union" else "base"
