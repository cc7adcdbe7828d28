"""What fisher and regmean need is measured on the models that are merged, under the names of their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from headstart.core.fisher import diagonal_fisher
from headstart.core.validate import Refused
from headstart.core.weights import LazyWeights
from headstart.merge import FisherMerging, gram_matrices
from headstart.run.importance import _named, importance_of
from headstart.run.ingredients import Ingredient, open_ingredient
from headstart.run.merging import merge_models
from headstart.run.prepared import prepare
from headstart.tasks import load_task
from headstart.zoo.directory import load_model_directory
from headstart.zoo.export import export_model
from headstart.zoo.resolve import resolve


def silent(_what: str, _done: int, _of: int) -> None:
    pass


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two exports of one small model, a little apart."""
    [source], _ = resolve("mini:cnn-letters")
    model, made = source.load(), []
    for k in range(2):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + 0.01 * k)
        made.append(export_model(model, tmp_path / str(k), source=source, classes=source.classes))
    return made


@pytest.fixture
def data(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "some.npz", x=rng.integers(0, 256, (60, 12, 12, 3)).astype(np.uint8), y=np.arange(60) % 2)
    return str(tmp_path / "some.npz")


@pytest.mark.parametrize("rule", ["fisher", "regmean"])
def test_is_what_the_library_measures(rule: str, folders: list[Path], data: str) -> None:
    models = [open_ingredient(str(folder)) for folder in folders]
    found = importance_of(rule, models, [data], silent)
    module, preprocess, _ = load_model_directory(folders[1])
    batches = list(prepare(load_task(data).train.inputs, preprocess).batches(64))
    expected = (diagonal_fisher if rule == "fisher" else gram_matrices)(module, batches)
    assert set(found[1]) == set(expected) <= set(models[1].weights)
    assert all(torch.equal(found[1][name], expected[name]) for name in expected)


def test_fisher_goes_through_to_disk(folders: list[Path], data: str, tmp_path: Path) -> None:
    models = [open_ingredient(str(folder)) for folder in folders]
    importance = importance_of("fisher", models, [data], silent)
    rule = FisherMerging(floor=0.0)
    merge_models(rule, models, tmp_path / "out", importance=importance)
    expected = rule.merge([one.weights for one in models], importance=importance)
    merged = LazyWeights(tmp_path / "out")
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_what_a_model_is_wrapped_in_is_taken_off() -> None:
    inner = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    wrapped = nn.ModuleDict({"model": inner})
    values = {name: p.detach() for name, p in wrapped.named_parameters()}
    one = Ingredient(name="A", folder=Path(), weights=dict(inner.state_dict()), files=())
    assert set(_named(wrapped, one, values)) == set(inner.state_dict())
    stranger = Ingredient(name="B", folder=Path(), weights={"other": torch.ones(2)}, files=())
    with pytest.raises(Refused, match="must have the weights of its file"):
        _named(wrapped, stranger, values)


def test_refusals(folders: list[Path], data: str) -> None:
    models = [open_ingredient(str(folder)) for folder in folders]
    with pytest.raises(Refused, match="one for each of 2 models; got 3"):
        importance_of("fisher", models, [data] * 3, silent)
    adapter = Ingredient(name="A", folder=folders[0], weights=models[0].weights, files=(), whole=False)
    with pytest.raises(Refused, match=r"needs models that can be loaded; got A"):
        importance_of("fisher", [adapter], [data], silent)
