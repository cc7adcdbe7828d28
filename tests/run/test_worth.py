"""The judgement of a merge: paired, on sealed labels, with the models' own heads where they fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from headstart.core.validate import Refused
from headstart.core.weights import LazyWeights, save_weights
from headstart.run.ingredients import Ingredient
from headstart.run.worth import loadable, worth
from headstart.tasks import load_task
from headstart.zoo.export import export_model
from headstart.zoo.resolve import resolve


def pictures(n: int = 240):
    rng = np.random.default_rng(0)
    y = np.arange(n) % 2
    x = np.clip(rng.normal(90 + 70 * y[:, None, None, None], 10, (n, 16, 16, 3)), 0, 255).astype(np.uint8)
    return x, y


@pytest.fixture
def export(tmp_path):
    """`export(name, weight)` writes a model of classes "0" and "1" whose head reads brightness by `weight`."""

    [source], _ = resolve("mini:cnn-letters")

    def write(name: str, weight: float, classes=("0", "1")) -> Path:
        with torch.random.fork_rng():
            torch.random.manual_seed(0)
            model = source.load()
        head = torch.nn.Linear(model.get_submodule(source.head).in_features, 2)
        with torch.no_grad():
            head.weight.zero_()
            head.bias.copy_(torch.tensor([0.0, weight]))
        parent, _, last = source.head.rpartition(".")
        setattr(model.get_submodule(parent), last, head)
        return export_model(model.eval(), tmp_path / name, source=source, classes=classes)

    return write


def test_own_heads_are_used_where_they_have_the_classes(export):
    folders = {"A": export("a", -1.0), "B": export("b", -1.0), "merged": export("m", 1.0)}
    task = load_task(pictures(), name="bright")
    share = float((task.judge(torch.ones(len(task.test), dtype=torch.long))).accuracy)
    found = worth(folders, [task], merged="merged", base=None)
    assert found["heads"] == ["their own heads"]
    assert [row["accuracy"][0] for row in found["rows"]] == pytest.approx([1 - share, 1 - share, share])
    assert found["looks"] == 4
    assert found["gain"] == pytest.approx(2 * share - 1)
    assert found["answer"] == ("Worth it" if found["interval"][0] > 0 else "Not worth it")


def test_other_classes_are_judged_by_a_head_on_frozen_features(export):
    folders = {"A": export("a", -1.0, ("x", "y")), "base": export("b", 0.0), "merged": export("m", 1.0)}
    found = worth(folders, [load_task(pictures(), name="bright")], merged="merged", base="base")
    assert found["heads"] == ["a logistic head on frozen features"]
    accuracy = [row["accuracy"][0] for row in found["rows"]]
    assert accuracy[0] == accuracy[1] == accuracy[2] > 0.9  # the same body
    assert found["answer"] == "Not worth it"
    assert "than A, the best single model" in found["why"]
    assert "cannot show a difference" in found["why"]


def test_what_cannot_be_judged_is_refused(export, tmp_path):
    save_weights({"w": torch.ones(1)}, tmp_path / "plain")
    task = load_task(pictures(), name="bright")
    with pytest.raises(Refused, match="needs models that can be loaded; got plain"):
        worth({"plain": tmp_path / "plain", "merged": export("m", 1.0)}, [task], merged="merged", base=None)
    rows = load_task((np.arange(60.0).reshape(30, 2), np.arange(30) % 2), name="rows")
    with pytest.raises(Refused, match="reads image, rows is numeric"):
        worth({"A": export("a", 1.0), "merged": export("n", 1.0)}, [rows], merged="merged", base=None)


def test_adapters_are_written_out_to_be_loaded(export):
    folder = export("a", 1.0)
    weights = {name: w + 1 if w.is_floating_point() else w for name, w in LazyWeights(folder).items()}
    one = Ingredient(name="A+adapter", folder=folder, weights=weights, files=(), whole=False)
    with loadable([one]) as folders:
        written = LazyWeights(folders["A+adapter"])
        assert all(torch.equal(written[name], weights[name]) for name in weights)
        assert (folders["A+adapter"] / "config.json").exists()
        place = folders["A+adapter"]
    assert not place.exists()
