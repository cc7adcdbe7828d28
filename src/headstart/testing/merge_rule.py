"""Checks of every `MergeRule`: models -> model."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.core.weights import LazyWeights, Surveyed, Weights, merge_streaming, save_weights

from .subject import Check, Kind, Subject, cast, close, difference, refusal

State = dict[str, Tensor]
SHAPES = {"body.weight": (7, 5), "body.bias": (7,), "norm.running_mean": (7,), "scale": (), "head.weight": (2, 7)}


def _model(seed: int, spread: float, centre: State | None = None) -> State:
    generator = torch.Generator().manual_seed(seed)
    state = {name: spread * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    if centre is not None:
        state = {name: centre[name] + value for name, value in state.items()}
    state["norm.num_batches_tracked"] = torch.tensor(100 + 3 * seed**2)
    return state


def sample_models(subject: Subject, dtype: torch.dtype = torch.float32, k: int = 0) -> dict[str, Any]:
    """k models around a base, with a buffer and a counter, as keyword arguments of `merge`; by default as declared."""
    k = k or subject.models
    base = _model(0, 1.0)
    given: dict[str, Any] = {"models": [_model(1 + j, 0.1, base) for j in range(k)], "base": base}
    if "importance" in subject.needs:
        given["importance"] = [{n: t.abs() + 0.1 for n, t in _floats(_model(50 + j, 1.0)).items()} for j in range(k)]
        for weights in given["importance"]:
            weights["norm.num_batches_tracked"] = torch.tensor(1)
    if "grams" in subject.needs:
        given["importance"] = [_grams(60 + j) for j in range(k)]
    return dict(cast(given if "base" in subject.needs else {k: v for k, v in given.items() if k != "base"}, dtype))


def _grams(seed: int) -> State:
    """XᵀX of the inputs of each weight with two axes."""
    widths = {name: shape[1] for name, shape in SHAPES.items() if len(shape) == 2}
    generator = torch.Generator().manual_seed(seed)
    inputs = {name: torch.randn(20, width, generator=generator) for name, width in widths.items()}
    return {name: x.T @ x for name, x in inputs.items()}


def _floats(state: Weights) -> State:
    return {name: value for name, value in state.items() if value.is_floating_point()}


def _merge(subject: Subject, given: dict[str, Any]) -> State:
    merged = subject.make().merge(**given)
    assert list(merged) == list(given["models"][0]), "the result must have the models' names in their order"
    for name, value in merged.items():
        assert value.shape == given["models"][0][name].shape, f"{name} has shape {tuple(value.shape)}"
    return dict(merged)


def copies_give_it_back(subject: Subject) -> None:
    """Copies of one model merge to that model."""
    given = sample_models(subject)
    given["models"] = [given["models"][0]] * subject.models
    merged = _merge(subject, given)
    assert close(_floats(merged), _floats(given["models"][0]), 1e-6), "copies of a model did not give it back"


def all_equal_to_base(subject: Subject) -> None:
    """Models that never left the base merge to the base."""
    given = sample_models(subject)
    given["models"] = [_model(0, 1.0)] * subject.models
    assert close(_floats(_merge(subject, given)), _floats(_model(0, 1.0)), 1e-6), "models equal to base gave another"


def order_as_declared(subject: Subject) -> None:
    """`symmetric` is what another order of the models shows."""
    given = sample_models(subject)
    turned = {k: v if k == "base" else [v[-1], *v[:-1]] for k, v in given.items()}
    same = close(_floats(_merge(subject, given)), _floats(_merge(subject, turned)), 1e-5)
    declared = subject.make().symmetric
    assert same == declared, f"symmetric={declared} is declared; another order {'keeps' if same else 'changes'} it"


def counters_survive(subject: Subject) -> None:
    """Integer tensors keep dtype and a value that a model or the base had."""
    given = sample_models(subject)
    name = "norm.num_batches_tracked"
    value = _merge(subject, given)[name]
    had = [int(m[name]) for m in (*given["models"], *([given["base"]] if "base" in given else []))]
    assert (value.dtype, int(value) in had) == (torch.int64, True), f"{name} became {value} ({value.dtype}); had {had}"


def tied_weights_survive(subject: Subject) -> None:
    """Two names of one tensor stay equal."""
    given = sample_models(subject)
    for states in given.values():
        for state in [states] if isinstance(states, dict) else states:
            state["embed.weight"] = state["head.weight"]
    merged = _merge(subject, given)
    assert torch.equal(merged["embed.weight"], merged["head.weight"]), "tied tensors came apart"


def half_precision(subject: Subject) -> None:
    """bf16 and fp16 in, the same out, merged in float32 or wider and rounded once (but for one number in twenty)."""
    for dtype in (torch.bfloat16, torch.float16):
        given = sample_models(subject, dtype)
        merged = _floats(_merge(subject, given))
        assert all(value.dtype == dtype for value in merged.values()), f"{dtype} models gave another dtype"
        exact = _floats(_merge(subject, cast(given, torch.float64)))
        once = {name: value.to(dtype) for name, value in exact.items()}
        odd = sum(int((once[name] != value).sum()) for name, value in merged.items())
        count = sum(value.numel() for value in merged.values())
        assert odd <= count / 20, f"{odd} of {count} numbers of {dtype} models were rounded more than once"


def mismatch_names_the_tensor(subject: Subject) -> None:
    """A missing or misshapen tensor, or NaN, is refused by name."""
    for change in ("missing", "misshapen", "nan"):
        given = sample_models(subject)
        state = given["models"][1]
        if change == "missing":
            del state["head.weight"]
        else:
            state["head.weight"] = torch.zeros(3, 7) if change == "misshapen" else torch.full((2, 7), torch.nan)
        message = refusal(partial(subject.make().merge, **given), f"a {change} tensor")
        assert "head.weight" in message, f"the refusal of a {change} tensor does not name it: {message}"


def small_tensors(subject: Subject) -> None:
    """Tensors of 0, 1, 2 and 7 elements, and one model only."""
    for k in (1, 3) if subject.models == 3 else (subject.models,):
        given = sample_models(subject, k=k)
        for states in given.values():
            for j, state in enumerate([states] if isinstance(states, dict) else states):
                state.update({f"t{n}": torch.arange(float(n)) * (j + 1) + 0.5 for n in (0, 1, 2, 7)})
        merged = _merge(subject, given)
        bad = [name for name, value in _floats(merged).items() if not bool(torch.isfinite(value).all())]
        assert not bad, f"{k} models with tensors of 0, 1, 2, 7 elements gave NaN or infinity in {bad}"


def streamed_equals_whole(subject: Subject) -> None:
    """Tensor by tensor from lazy safetensors files, bit for bit what `merge` gives in memory."""
    given = sample_models(subject)
    whole = _merge(subject, given)
    rule = subject.make()
    assert rule.scope == "tensor" or isinstance(rule, Surveyed), "a rule of scope 'model' needs survey() to stream"
    with tempfile.TemporaryDirectory() as folder:
        for k, model in enumerate(given["models"]):
            save_weights(model, Path(folder) / str(k), shard_bytes=100)
        lazy = [LazyWeights(Path(folder) / str(k)) for k in range(len(given["models"]))]
        streamed = dict(merge_streaming(rule, lazy, **{k: v for k, v in given.items() if k != "models"}))
    assert not (at := difference(whole, streamed)), f"streamed differs from whole at {at}"


def _bad(subject: Subject) -> dict[str, Any]:
    given = sample_models(subject)
    no_models = {**given, "models": []}
    other = {**given, "models": [*given["models"][:-1], {"other": torch.zeros(1)}]}
    return {"no models": no_models, "a model of another architecture": other}


def _spoiled(subject: Subject) -> Any:
    given = sample_models(subject)
    given["models"][-1]["body.bias"][3] = torch.nan
    return given


MERGE_RULE = Kind(
    name="merge rule",
    inputs=sample_models,
    use=lambda method, given: method.merge(**given),
    bad=_bad,
    spoiled=_spoiled,
    checks=(
        Check(copies_give_it_back), Check(all_equal_to_base), Check(order_as_declared), Check(counters_survive),
        Check(tied_weights_survive), Check(half_precision), Check(mismatch_names_the_tensor), Check(small_tensors),
        Check(streamed_equals_whole),
    ),
)  # fmt: skip
