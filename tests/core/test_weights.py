"""Lazy weights are whole weights, streamed merges are whole merges, and writing is all or nothing."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from headstart.core import shards, write
from headstart.core.validate import Refused
from headstart.core.weights import (
    LazyWeights,
    MergeRule,
    Spec,
    Weights,
    aligned,
    by_tensor,
    fingerprint,
    merge_streaming,
    merged_parts,
    save_weights,
)  # fmt: skip
from headstart.merge import Average, Ties
from headstart.testing.subject import difference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool)


def state(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (7, 3), "a.bias": (7,), "scale": (), "empty": (0, 4), "b.weight": (2, 7)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**made, "count": torch.tensor(3 + seed), "half": torch.randn(5, generator=generator).bfloat16()}


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6), dtype=st.sampled_from(DTYPES),
       shard=st.integers(1, 200))  # fmt: skip
def test_lazy_weights_are_what_was_saved(sizes: list[int], dtype: torch.dtype, shard: int, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("weights")
    given_weights = {f"t{k}": torch.arange(n).to(dtype) for k, n in enumerate(sizes)}
    save_weights(given_weights, folder, shard_bytes=shard)
    lazy = LazyWeights(folder)
    assert set(lazy) == set(given_weights)
    assert len(lazy) == len(sizes)
    assert not difference(given_weights, {name: lazy[name] for name in given_weights})
    assert fingerprint(lazy) == fingerprint(given_weights)


def test_shards_carry_an_index_that_transformers_reads(tmp_path: Path) -> None:
    save_weights(state(), tmp_path, shard_bytes=60)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert all(name.endswith(f"-of-{len(files):05d}.safetensors") for name in files)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in state().values())


def test_one_shard_is_one_plain_file_and_tied_tensors_are_written_twice(tmp_path: Path) -> None:
    shared = torch.ones(3)
    save_weights({"a": shared, "b": shared, "c": shared[1:]}, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert LazyWeights(tmp_path / "model.safetensors")["c"].tolist() == [1, 1]


def test_pickles_are_refused_and_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(Refused, match=r"pytorch_model.bin.*pickled"):
        LazyWeights(tmp_path)
    with pytest.raises(Refused, match="pickle can run code"):
        LazyWeights(tmp_path / "pytorch_model.bin")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/outside.safetensors", "sub/inside.safetensors"])
def test_an_index_that_leaves_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(Refused, match="files of its own folder"):
        LazyWeights(folder)


def test_nothing_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="file or folder that exists"):
        LazyWeights(tmp_path / "nowhere")
    with pytest.raises(Refused, match="no weights"):
        LazyWeights(tmp_path)


@pytest.mark.parametrize("place", ["_claim", "_write"])
def test_a_full_disk_keeps_the_old_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    save_weights(state(0), tmp_path)

    def full(*_given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, place, full)
    with pytest.raises(OSError, match="No space left"):
        save_weights(state(1), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert fingerprint(LazyWeights(tmp_path)) == fingerprint(state(0))


def test_fewer_shards_leave_no_old_ones_behind(tmp_path: Path) -> None:
    save_weights(state(0), tmp_path, shard_bytes=60)
    save_weights(state(1), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert fingerprint(LazyWeights(tmp_path)) == fingerprint(state(1))


def test_parts_may_come_in_any_order_but_must_all_come(tmp_path: Path) -> None:
    specs = {"a": Spec(torch.float16, (2, 3)), "b": Spec(torch.float64, (2,))}
    parts = [("b", 1, torch.tensor([5.0])), ("a", 2, torch.arange(4.0)), ("b", 0, torch.tensor([4.0])),
             ("a", 0, torch.ones(2))]  # fmt: skip
    write.write_parts(iter(parts), specs, tmp_path)
    lazy = LazyWeights(tmp_path)
    assert lazy["a"].tolist() == [[1, 1, 0], [1, 2, 3]]
    assert lazy["b"].tolist() == [4, 5]
    assert lazy.part("a", 1, 4).tolist() == [1, 0, 1]
    assert load_file(tmp_path / "model.safetensors")["b"].tolist() == [4, 5]
    with pytest.raises(Refused, match=r"written once; got \['a'\]"):
        write.write_parts(iter(parts[:3]), specs, tmp_path)
    assert lazy["a"].tolist() == [[1, 1, 0], [1, 2, 3]]


@pytest.mark.parametrize(("damage", "message"), [
    (lambda data: data[:-1], "'b' at 4 to 6|'a' at 0 to 4"), (lambda data: data[:5], "of 5 bytes"),
    (lambda data: data[:8] + b"x" + data[9:], "readable header"), (lambda data: b"\xff" * 8 + data[8:], "bytes"),
])  # fmt: skip
def test_a_damaged_file_is_refused(tmp_path: Path, damage, message: str) -> None:
    save_weights({"a": torch.ones(2).half(), "b": torch.ones(1).half()}, tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(Refused, match=message):
        LazyWeights(file)


def test_a_new_folder_takes_the_old_ones_place_or_is_gone(tmp_path: Path) -> None:
    place = tmp_path / "model"
    with write.new_folder(place) as folder:
        (folder / "first").touch()

    def half() -> None:
        with write.new_folder(place) as folder:
            (folder / "half").touch()
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        half()
    assert [p.name for p in place.iterdir()] == ["first"]
    with write.new_folder(place) as folder:
        (folder / "second").touch()
    assert [p.name for p in place.iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


class Mean:
    scope: ClassVar[Literal["tensor", "model"]] = "tensor"
    symmetric = True

    def merge(self, models: Sequence[Weights], *, base: Weights | None = None,
              importance: Sequence[Weights] | None = None) -> dict[str, Tensor]:  # fmt: skip
        def combine(_name: str, stacked: Tensor, base: Tensor | None, weight: Tensor | None) -> Tensor:
            mean = stacked.mean(0) if weight is None else (weight * stacked).sum(0) / weight.sum(0)
            return mean if base is None else base + 0.5 * (mean - base)

        return by_tensor(combine, models, base, importance)


class ByNorm(Mean):
    """A rule that first surveys all tensors: the model of the largest norm counts alone."""

    scope = "model"

    def survey(self, models: Sequence[Weights], *, base: Weights | None = None,
               importance: Sequence[Weights] | None = None) -> MergeRule:  # fmt: skip
        norms = [sum(float(m[n].double().norm() ** 2) for n in m if m[n].is_floating_point()) for m in models]
        return Only(norms.index(max(norms)))

    def merge(self, models: Sequence[Weights], *, base: Weights | None = None,
              importance: Sequence[Weights] | None = None) -> dict[str, Tensor]:  # fmt: skip
        return self.survey(models, base=base).merge(models, base=base)


class Only(Mean):
    def __init__(self, index: int) -> None:
        self.index = index

    def merge(self, models: Sequence[Weights], *, base: Weights | None = None,
              importance: Sequence[Weights] | None = None) -> dict[str, Tensor]:  # fmt: skip
        return by_tensor(lambda _n, stacked, _b, _i: stacked[self.index], models, base)


@pytest.mark.parametrize("rule", [Mean(), ByNorm()])
@pytest.mark.parametrize("with_base", [False, True])
def test_streamed_is_whole_bit_for_bit(tmp_path: Path, rule: MergeRule, with_base: bool) -> None:
    models, base = [state(k) for k in range(3)], state(9) if with_base else None
    importance = [{name: torch.full_like(t, k + 1) for name, t in m.items()} for k, m in enumerate(models)]
    whole = rule.merge(models, base=base, importance=importance)
    for k, m in enumerate(models):
        save_weights(m, tmp_path / str(k), shard_bytes=50)
    lazy = [LazyWeights(tmp_path / str(k)) for k in range(3)]
    parts = merged_parts(rule, lazy, base=base, importance=importance)
    specs = {name: lazy[0].spec(name) for name in lazy[0]}
    write.write_parts(parts, specs, tmp_path / "merged", shard_bytes=50)
    assert not difference(whole, {name: LazyWeights(tmp_path / "merged")[name] for name in whole})
    assert not difference(whole, dict(merge_streaming(rule, lazy, base=base, importance=importance)))


@pytest.mark.parametrize("part", [1, 3, 1000])
def test_parts_change_nothing(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    models, base = [state(k) for k in range(3)], state(9)
    rules = [Average(weights=(1.0, 2.0, 3.0)), Ties(density=0.3), Ties(density=0.5, trim="tensor", combine="max")]
    wholes = [rule.merge(models, base=base) for rule in rules]
    monkeypatch.setattr(shards, "PART", part)
    for rule, whole in zip(rules, wholes, strict=True):
        assert not difference(whole, rule.merge(models, base=base))


def test_by_tensor_keeps_dtypes_counters_and_merges_wide() -> None:
    models = [state(k) for k in range(3)]
    merged = Mean().merge(models)
    assert {n: t.dtype for n, t in merged.items()} == {n: t.dtype for n, t in models[0].items()}
    assert int(merged["count"]) == 3
    assert int(Mean().merge(models, base=state(9))["count"]) == 12
    exact = torch.stack([m["half"].double() for m in models]).mean(0)
    assert torch.equal(merged["half"], exact.float().bfloat16())
    assert merged["count"].data_ptr() != models[0]["count"].data_ptr()


def test_aligned_names_what_is_odd() -> None:
    good = state()
    missing = {name: t for name, t in good.items() if name != "a.bias"}
    with pytest.raises(Refused, match=r"\['a.bias'\] in only one of model 0 and model 1"):
        aligned([good, missing])
    with pytest.raises(Refused, match="model 0 and base"):
        aligned([good], missing)
    with pytest.raises(Refused, match=r"'scale' must have one shape; got \(\) and \(2,\)"):
        aligned([good, {**good, "scale": torch.ones(2)}])
    with pytest.raises(Refused, match="at least one model"):
        aligned([])
    with pytest.raises(Refused, match=r"tensor 'a\.bias' must be finite"):
        Mean().merge([good, {**good, "a.bias": torch.full((7,), torch.inf)}])


def test_fingerprints_tell_bits_names_dtypes_and_shapes_apart() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    other = [
        {"a": torch.zeros(3, 2), "b": torch.ones(1)}, {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3), "c": torch.ones(1)}, {"a": -torch.zeros(2, 3), "b": torch.ones(1)},
    ]  # fmt: skip
    prints = [fingerprint(w) for w in (base, *other)]
    assert len(set(prints)) == 5
    assert fingerprint(dict(reversed(base.items()))) == prints[0]


def test_reading_on_asks_for_every_byte_once_and_only_in_order(tmp_path, monkeypatch):
    w = torch.arange(40 * shards.PART, dtype=torch.float32)
    save_weights({"w": w}, tmp_path)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(shards, "_read_on", lambda _number, start, stop: asked.append((start, stop)))
    weights = LazyWeights(tmp_path)
    scattered = weights.lend("w")
    for start in range(0, len(w), 2 * shards.PART):
        assert torch.equal(scattered(start, start + shards.PART), w[start : start + shards.PART])
    assert asked == []
    read = weights.lend("w")
    for start, stop in shards.spans(len(w)):
        assert torch.equal(read(start, stop), w[start:stop])
    begin = weights._places["w"][1]
    assert asked[0][0] == begin + 4 * shards.PART
    assert [start for start, _ in asked[1:]] == [stop for _, stop in asked[:-1]]
    assert asked[-1][1] == begin + 4 * len(w)
    assert all(stop - start <= shards.AHEAD + 4 * shards.PART for start, stop in asked)
