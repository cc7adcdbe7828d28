"""Rebuilding the embedded zoo, at the length of a test: the same bytes twice, and refusals before any work."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
import torch

from headstart.core.plan import Step
from headstart.core.rng import seeded
from headstart.core.stream import Batch
from headstart.core.validate import Refused
from headstart.zoo.build import build_zoo
from headstart.zoo.mini import mini_sources
from headstart.zoo.objectives import Contrasting, Regularising, Restoring, Turning, damaged, small_grey, turned, view
from headstart.zoo.recipes import RECIPES, Recipe

TINY = [
    Recipe(name="labels", architecture="mlp", world="gratings", images=128, held_out=200, steps=4, batch_size=32),
    Recipe(name="views", architecture="vit", world="gratings", objective="contrastive", images=128, held_out=200,
           steps=3, batch_size=32),
]  # fmt: skip


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path):
    first, again, other = tmp_path / "first", tmp_path / "again", tmp_path / "other"
    threads = torch.get_num_threads()
    build_zoo(first, recipes=TINY)
    torch.set_num_threads(2)
    build_zoo(again, recipes=TINY)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    build_zoo(other, recipes=TINY, seed=1)
    for recipe in TINY:
        one, two, three = ((d / f"{recipe.name}.safetensors").read_bytes() for d in (first, again, other))
        assert one == two
        assert one != three
    cards = [json.loads((d / "labels.json").read_text()) for d in (first, again)]
    assert {k: v for k, v in cards[0].items() if k != "cpu_seconds"} == {
        k: v for k, v in cards[1].items() if k != "cpu_seconds"
    }


def test_what_is_built_is_a_zoo_with_true_cards(tmp_path):
    calls = []
    cards = build_zoo(tmp_path, ["labels"], recipes=TINY, progress=lambda *call: calls.append(call))
    assert [card["name"] for card in cards] == ["labels"]
    assert calls == [("labels", done, 4) for done in (1, 2, 3, 4)]
    build_zoo(tmp_path, ["views"], recipes=TINY)
    sources = mini_sources(tmp_path)
    assert [source.name for source in sources] == ["mini:labels", "mini:views"]
    for source in sources:
        data = (tmp_path / f"{source.facts['name']}.safetensors").read_bytes()
        assert hashlib.sha256(data).hexdigest() == source.fingerprint
        assert len(data) == source.facts["bytes"]
        source.load()
    log = json.loads((tmp_path / "BUILD.json").read_text())
    assert set(log["models"]) == {"labels", "views"}


def test_training_teaches(tmp_path):
    """Sixty steps on gratings beat four, on pictures of another seed."""
    short, long = (
        replace(TINY[0], name=name, architecture="cnn", images=1500, steps=steps, learning_rate=1e-3)
        for name, steps in (("short", 4), ("long", 60))
    )
    values = [card["metric"]["value"] for card in build_zoo(tmp_path, recipes=[short, long])]
    assert values[1] > 2 * values[0]


def test_bad_orders_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(Refused, match="Did you mean 'labels'"):
        build_zoo(tmp_path / "new", ["label"], recipes=TINY)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="folder"):
        build_zoo(tmp_path / "file", recipes=TINY)


def test_recipes_have_names_of_their_own():
    names = [recipe.name for recipe in RECIPES]
    assert len(set(names)) == len(names)


X = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_quarter_turns_come_back_after_four():
    turns = torch.tensor([0, 1, 2, 3, 1, 2])
    assert torch.equal(turned(turned(X, turns), (4 - turns) % 4), X)
    assert torch.equal(turned(X, turns)[1], torch.rot90(X[1], 1, (1, 2)))


def test_views_keep_the_shape_and_differ():
    with seeded(0):
        one, two = view(X), view(X)
    assert one.shape == X.shape
    assert not torch.allclose(one, two, atol=0.1)


def test_damage_blanks_whole_patches():
    with seeded(0):
        blank = (damaged(X) == 0).all(1)
    patches = blank.view(6, 8, 4, 8, 4).float().mean((2, 4))
    assert set(patches.unique().tolist()) == {0.0, 1.0}
    assert 0.3 < float(patches.mean()) < 0.5


class Identity(torch.nn.Module):
    """Answers a batch of views with given points."""

    def __init__(self, points):
        super().__init__()
        self.points = points

    def forward(self, x):
        assert len(x) == len(self.points)
        return self.points


def test_contrasting_equals_the_loop_over_pairs():
    points = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    loss = Contrasting(temperature=0.3)(Step(Identity(points), Batch(X[:4])))
    unit = points / points.norm(dim=1, keepdim=True)
    total = 0.0
    for i in range(8):
        others = [torch.exp(unit[i] @ unit[k] / 0.3) for k in range(8) if k != i]
        total -= torch.log(torch.exp(unit[i] @ unit[(i + 4) % 8] / 0.3) / sum(others))
    assert float(loss) == pytest.approx(float(total / 8), rel=1e-5)


def test_regularising_equals_the_papers_formula():
    points = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    loss = Regularising()(Step(Identity(points), Batch(X[:4])))
    one, two = points[:4], points[4:]
    expected = 25 * (one - two).square().mean()
    for z in (one, two):
        expected = expected + 25 * (1 - (z.var(0) + 1e-4).sqrt()).clamp(min=0).mean() / 2
        joint = torch.cov(z.T)
        expected = expected + (joint - torch.diag(joint.diag())).square().sum() / 3
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


def test_turning_and_restoring_are_zero_for_a_model_that_knows():
    with seeded(5):
        turns = torch.randint(0, 4, (6,))
    with seeded(5):
        loss = Turning()(Step(Identity(100.0 * torch.eye(4)[turns]), Batch(X)))
    assert float(loss) < 1e-6
    assert float(Restoring()(Step(Identity(small_grey(X)), Batch(X)))) == 0.0
