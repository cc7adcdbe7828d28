"""The embedded zoo: cards that tell the truth, weights that load bit for bit, preprocessing that keeps rows apart."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from headstart.core.validate import Refused
from headstart.zoo.mini import WEIGHTS, Squared, mini_sources
from headstart.zoo.recipes import RECIPES

SOURCES = mini_sources()
EACH = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)


def pictures(*shapes):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


def test_the_zoo_is_as_varied_as_promised():
    assert len(SOURCES) >= 12
    facts = [source.facts for source in SOURCES]
    assert len({fact["family"] for fact in facts}) >= 4
    assert len({fact["data"] for fact in facts}) >= 4
    assert len({fact["objective"] for fact in facts}) >= 3
    assert {fact["name"] for fact in facts} == {recipe.name for recipe in RECIPES}
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) <= 20e6


def test_cards_agree_with_the_recipes_and_the_log():
    log = json.loads((WEIGHTS / "BUILD.json").read_text())
    by_name = {source.facts["name"]: source.facts for source in SOURCES}
    for recipe in RECIPES:
        fact = by_name[recipe.name]
        assert (fact["family"], fact["data"], fact["objective"]) == (
            recipe.architecture, recipe.world, recipe.objective,
        )  # fmt: skip
        assert fact["pretraining"]["steps"] == recipe.steps
        assert fact["pretraining"]["images"] == recipe.images
        assert log["models"][recipe.name] == fact["cpu_seconds"]
    assert log["cpu_seconds"] == pytest.approx(sum(log["models"].values()), abs=0.1)


@EACH
def test_weights_are_those_of_the_card_and_loading_draws_no_random_numbers(source):
    before = torch.get_rng_state()
    model, again = source.load(), source.load()
    assert torch.equal(before, torch.get_rng_state())
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == source.facts["parameters"]
    head = model.get_submodule(source.head)
    assert isinstance(head, nn.Linear)
    assert head.in_features == source.facts["features"]
    assert not source.classes or head.out_features == len(source.classes)
    assert all(p.requires_grad and p.dtype == torch.float32 and not p.is_meta for p in model.parameters())
    with torch.no_grad():
        next(model.parameters()).zero_()
        assert bool(next(again.parameters()).any()), "each load must be a copy of its own"


@EACH
def test_the_model_reads_what_preprocessing_gives(source):
    model = source.load()
    raw = pictures((8, 8), (25, 25), (64, 48), (8, 8), (32, 32))
    with torch.inference_mode():
        logits = model(source.preprocess(raw))
    assert logits.shape == (5, model.get_submodule(source.head).out_features)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    "source", [s for s in SOURCES if s.facts["objective"] == "supervised"], ids=lambda source: source.name
)
def test_supervised_models_know_their_own_pictures(source):
    """The figure on the card, measured again on other pictures: the weights, classes and preprocessing fit together."""
    import importlib

    fact = source.facts
    held_out = {"glyphs": {"fonts": "held-out"}, "photographs": {"part": "held-out"}}.get(fact["data"], {})
    world = importlib.import_module(f"headstart.worlds.{fact['data']}")
    images, labels, classes = world.render(500, 77, **{**fact["data_options"], **held_out})
    assert classes == source.classes
    with torch.inference_mode():
        right = source.load()(source.preprocess(list(images))).argmax(1).numpy() == labels
    deviation = (fact["metric"]["value"] * (1 - fact["metric"]["value"]) / 500) ** 0.5
    assert abs(right.mean() - fact["metric"]["value"]) < 4 * deviation + 0.01


def test_a_row_does_not_depend_on_the_batch():
    squared = Squared(size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    raw = pictures((8, 8), (40, 50), (8, 8), (33, 32), (40, 50))
    whole = squared(raw)
    for row, picture in enumerate(raw):
        assert torch.equal(squared([picture])[0], whole[row])


def test_resizing_and_normalising_equal_the_slow_definition():
    raw = pictures((32, 32), (64, 64))
    out = Squared(size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))(raw)
    by_hand = (raw[0].astype(np.float64) / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    np.testing.assert_allclose(out[0].permute(1, 2, 0).numpy(), by_hand, atol=1e-5)
    # halving with an antialiased triangle: weights 1 3 3 1 over 8 on four neighbours, away from the border
    grey = raw[1][..., 0].astype(np.float64) / 255
    kernel = np.array([1, 3, 3, 1]) / 8
    inner = kernel @ grey[9:13, 19:23] @ kernel
    assert float(out[1, 0, 5, 10]) == pytest.approx((inner - 0.5) / 0.2, abs=1e-4)


def test_pictures_larger_than_a_chunk_are_cut_into_several():
    squared = Squared(size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    raw = pictures((1500, 1500)) * 4  # 4 x 6.75 million numbers against 2 ** 24 a chunk
    out = squared(raw)
    assert torch.equal(out[0], out[3])
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(
    "raw",
    [
        [],
        [np.zeros((8, 8), np.uint8)],
        [np.zeros((8, 8, 4), np.uint8)],
        [np.zeros((8, 8, 3))],
        [np.zeros((0, 8, 3), np.uint8)],
    ],
)
def test_what_is_no_picture_is_refused(raw):
    with pytest.raises(Refused):
        SOURCES[0].preprocess(raw)


def test_sources_travel_to_other_processes():
    source = pickle.loads(pickle.dumps(SOURCES[0]))
    x = source.preprocess(pictures((8, 8)))
    assert torch.equal(source.load()(x), SOURCES[0].load()(x))


def test_damaged_or_missing_weights_are_refused(tmp_path):
    name = SOURCES[0].facts["name"]
    for ending in ("json", "safetensors"):
        shutil.copy(WEIGHTS / f"{name}.{ending}", tmp_path)
    path = tmp_path / f"{name}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    (source,) = mini_sources(tmp_path)
    with pytest.raises(Refused, match="match its card"):
        source.load()
    path.unlink()
    with pytest.raises(Refused, match="headstart zoo build"):
        source.load()
