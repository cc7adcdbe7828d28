"""`choose`: the better source first, honest doubt, nothing fatal, the same answer twice, and nothing of the test."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from headstart.core.validate import Refused
from headstart.run.cache import Cache
from headstart.run.choice import Choice
from headstart.run.forecast import Forecast, around, difference, first_places, ranking
from headstart.run.measure import sample
from headstart.run.race import Gain, expected
from headstart.run.rank import choose
from headstart.run.scores import DEFAULT, every_score, scores_named
from headstart.tasks import Task, load_task
from headstart.zoo import Skipped
from headstart.zoo.source import Source


@dataclass(frozen=True)
class Flat:
    def __call__(self, raw):
        return torch.from_numpy(np.stack(raw)).float().flatten(1) / 255


def source(name: str, sees: float, seed: int = 0, **changed) -> Source:
    """A model whose first layer weighs the picture's first row with `sees` and all the rest with 1 - `sees`."""

    def load():
        generator = torch.Generator().manual_seed(seed)
        model = nn.Sequential(nn.Linear(48, 512), nn.ReLU(), nn.Linear(512, 16), nn.ReLU(), nn.Linear(16, 5))
        for p in model.parameters():
            p.data = torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5
        model[0].weight.data[:, :12] *= 5 * sees
        model[0].weight.data[:, 12:] *= 1 - sees
        return model.eval()

    made = Source(name=name, modality="image", load=load, preprocess=Flat(), head="4", classes=(), licence="CC0-1.0",
                  fingerprint=f"{name} {sees} {seed}", kind="mini")  # fmt: skip
    return replace(made, **changed)


def pictures(labels_per_class: int = 30, seed: int = 0) -> Task:
    """Three classes, told apart by the first row of the picture only."""
    rng = np.random.default_rng(0)
    y = np.arange(360) % 3
    x = rng.integers(60, 196, (360, 4, 4, 3))
    x[np.arange(360), 0, y] += 45
    return load_task((x.astype(np.uint8), y), labels_per_class=labels_per_class, seed=seed, name="rows")


ZOO = [source("tiny:blind", 0.0), source("tiny:half", 0.2, 1), source("tiny:sees", 0.9, 2), source("tiny:dim", 0.1, 3)]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Choice:
    return choose(pictures(), ZOO, cache=Cache(tmp_path_factory.mktemp("cache")), budget=1.0)


def test_the_source_that_sees_is_first_and_the_blind_one_is_surely_worse(found):
    names = [row.name for row in found.ranking]
    assert found.best == names[0] == "tiny:sees"
    assert [row.place for row in found.ranking] == [1, 2, 3, 4]
    blind = found.ranking[names.index("tiny:blind")]
    assert blind.predicted.high < found.ranking[0].predicted.low
    assert not blind.close
    assert "tiny:blind" not in found.close
    assert "tiny:sees " in found.reason.split(",")[0]


def test_every_score_has_an_interval_and_agreement_is_symmetric(found):
    for row in found.ranking:
        assert list(row.scores) == list(DEFAULT)
        assert all(score.low < score.value < score.high for score in row.scores.values())
    for one, row in found.agreement.items():
        assert row[one] == 1.0
        assert all(tau == found.agreement[other][one] for other, tau in row.items())


def test_the_interval_holds_the_accuracy_that_is_reached(found):
    """Fit the head on the labels, judge it on the sealed test: the prediction was made without it."""
    from headstart.run.probe import fit_probe

    task, inside = pictures(), 0
    for one in ZOO:
        row = next(row for row in found.ranking if row.name == one.name)
        model = one.load()
        with torch.no_grad():
            features = [model[:4](one.preprocess(list(part.inputs))) for part in (task.train, task.test)]
        weight, bias = fit_probe(features[0], task.train.labels, 3)
        accuracy = task.judge(features[1] @ weight.T + bias).accuracy
        inside += row.probe.low - 0.02 <= accuracy <= row.probe.high + 0.02
    assert inside >= 3


def test_the_stages_stay_within_the_budget_and_are_accounted_for(found):
    assert [stage.name for stage in found.stages] == ["scores", "probes", "fine-tunes"]
    assert found.cost == pytest.approx(sum(stage.cost for stage in found.stages))
    assert 0 < found.cost <= found.budget
    assert len(found.stages[2].sources) >= 2


def test_a_small_budget_leaves_no_room_for_fine_tunes(tmp_path):
    small = choose(pictures(), ZOO, cache=Cache(tmp_path), budget=0.001)
    assert small.stages[2].sources == ()
    assert "budget leaves no room" in small.stages[2].says
    assert {row.basis for row in small.ranking} == {"probe"}
    assert small.best != "tiny:blind"


def test_again_gives_the_same_answer_from_the_cache_at_once(tmp_path):
    def plain(choice: Choice) -> dict:
        record = choice.to_json()
        for stage in record["stages"]:
            stage.pop("seconds")
        return record | {"seconds": 0}

    cache = Cache(tmp_path)
    first = choose(pictures(), ZOO, cache=cache, budget=0.5)
    began = time.perf_counter()
    second = choose(pictures(), [replace(one, load=lambda: pytest.fail("must not load")) for one in ZOO], cache=cache,
                    budget=0.5)  # fmt: skip
    assert time.perf_counter() - began < 1.0
    assert plain(first) == plain(second)
    other = choose(pictures(), ZOO, cache=Cache(tmp_path / "fresh"), budget=0.5)
    assert plain(other) == plain(first)
    assert Choice.from_json(json.loads(json.dumps(first.to_json()))) == first


def test_the_order_of_the_sources_does_not_matter(found, tmp_path):
    turned = choose(pictures(), ZOO[::-1], cache=Cache(tmp_path), budget=1.0)
    assert [row.predicted for row in turned.ranking] == [row.predicted for row in found.ranking]


def test_test_labels_are_never_looked_at_and_test_inputs_never_read(tmp_path):
    task = pictures()
    bare = replace(task, test=task.test.take([0]), unlabelled=task.unlabelled.take([0]))
    choose(bare, ZOO, cache=Cache(tmp_path))
    assert task.looks == bare.looks == 0


def test_sources_that_fail_are_reported_and_not_fatal(tmp_path):
    def fails():
        raise OSError("no such checkpoint")

    def nan():
        model = ZOO[2].load()
        model[0].bias.data[:] = float("nan")
        return model

    bad = [
        source("tiny:gone", 1.0, load=fails),
        source("tiny:nan", 1.0, load=nan),
        source("tiny:text", 1.0, modality="text"),
    ]
    before = Skipped(name="hf:a/b", why="offline")
    choice = choose(pictures(), [*bad, *ZOO], cache=Cache(tmp_path), skipped=[before])
    assert {row.name for row in choice.ranking} == {one.name for one in ZOO}
    why = {skip.name: skip.why for skip in choice.skipped}
    assert why["hf:a/b"] == "offline"
    assert why["tiny:gone"] == "OSError: no such checkpoint"
    assert "features must be finite" in why["tiny:nan"]
    assert why["tiny:text"] == "reads text data, the task has image"
    again = choose(pictures(), [source("tiny:gone", 1.0), *ZOO], cache=Cache(tmp_path))  # a refusal is not remembered
    assert "tiny:gone" in {row.name for row in again.ranking}


def test_numeric_data_without_a_numeric_source_is_an_honest_none(tmp_path):
    choice = choose(load_task("wine"), ZOO, cache=Cache(tmp_path))
    assert choice.best is None
    assert choice.ranking == ()
    assert choice.reason.startswith("No source fits this kind of data (numeric).")
    assert len(choice.skipped) == 4
    assert choose(load_task("wine"), [], cache=Cache(tmp_path)).best is None


def test_one_source_is_ranked_without_a_race(tmp_path):
    choice = choose(pictures(), ZOO[2:3], cache=Cache(tmp_path), budget=1.0)
    assert choice.best == "tiny:sees"
    assert choice.stages[2].says == "one source only"
    assert choice.close == ()
    assert choice.agreement == {}


def test_equal_sources_are_too_close_to_call_and_it_says_what_would_decide(tmp_path):
    twins = [ZOO[2], source("tiny:twin", 0.9, 2)]
    choice = choose(pictures(), twins, cache=Cache(tmp_path), budget=0.2)
    assert choice.close == (choice.ranking[1].name,)
    assert choice.ranking[1].close
    assert "for all 80 steps on 3 folds would say more" in choice.decide


def test_bad_settings_are_refused(tmp_path):
    for wrong in ({"budget": 0.0}, {"budget": 1.5}, {"rows": 3}):
        with pytest.raises(Refused, match="choose needs"):
            choose(pictures(), ZOO, cache=Cache(tmp_path), **wrong)
    with pytest.raises(Refused, match="workers must be a known name; got 'rays'"):
        choose(pictures(), ZOO, cache=Cache(tmp_path), workers="rays")


def test_progress_counts_to_the_end(tmp_path):
    seen = []
    choose(pictures(), ZOO, cache=Cache(tmp_path), budget=1.0, progress=lambda *what: seen.append(what))
    assert list(dict.fromkeys(what for what, _, _ in seen)) == ["features", "scores", "probes", "fine-tunes"]
    assert seen[-1][1] == seen[-1][2]


def test_many_rows_are_sampled_with_every_class(tmp_path):
    task = pictures(labels_per_class=80)
    some = sample(task.train, 30, seed=0)
    assert some.labels.bincount().tolist() == [10, 10, 10]
    assert some.names == sample(task.train, 30, seed=0).names
    assert sample(task.train, 30, seed=1).names != some.names
    assert choose(task, ZOO, cache=Cache(tmp_path), rows=30, budget=0.01).best is not None


def forecast(name: str, right: list[float], gain: Gain | None = None) -> Forecast:
    return Forecast(
        name=name,
        measured={"scores": {}, "deciding": {"KNN": 0.0, "LogME": 0.0}},
        probed={"right": right},
        gain=gain,
        expected=gain,
    )


def test_a_gain_moves_the_prediction_and_a_loss_does_not():
    base = [1.0] * 80 + [0.0] * 20
    up = forecast("up", base, Gain(mean=0.1, error=0.03, steps=10))
    down = forecast("down", base, Gain(mean=-0.1, error=0.03, steps=10))
    rows = ranking([down, up])
    assert (rows[0].name, rows[0].basis, rows[0].predicted.value) == ("up", "fine-tune", pytest.approx(0.9))
    assert (rows[1].basis, rows[1].predicted.value) == ("probe", 0.8)
    assert rows[1].tuned.value == pytest.approx(0.7)
    assert rows[0].predicted.high - rows[0].predicted.low > around(0.9, 100, 0.0).high - around(0.9, 100, 0.0).low


def test_the_difference_is_paired():
    """Two sources right on the same examples but five differ surely; on unrelated ones they do not."""
    right = np.array([1.0] * 70 + [0.0] * 30)
    nested, apart = right.copy(), np.random.default_rng(0).permutation(right)
    nested[:8] = 0.0
    mean, error = difference(forecast("a", list(right)), forecast("b", list(nested)))
    assert mean == pytest.approx(0.08)
    assert mean > 1.96 * error
    apart[np.flatnonzero(apart)[:8]] = 0.0
    mean, error = difference(forecast("a", list(right)), forecast("c", list(apart)))
    assert mean < 1.96 * error


def gain(mean: float, error: float = 0.05) -> Gain:
    return Gain(mean=mean, error=error, steps=9)


def test_the_luck_of_a_short_race_does_not_decide():
    noise = expected({"a": gain(0.04), "b": gain(-0.04), "c": gain(0.0)}, "abcd")
    assert {name: round(one.mean, 6) for name, one in noise.items()} == dict.fromkeys("abcd", 0.0)
    assert noise["d"].steps == 0
    real = expected({"a": gain(0.4), "b": gain(-0.4), "c": gain(0.0)}, "abcd")
    assert 0.38 < real["a"].mean < 0.4
    assert real["d"].mean == pytest.approx(0.0)
    assert real["a"].error < 0.05 < real["d"].error
    assert expected({}, "ab") == {}


def test_the_share_of_first_places_says_how_sure():
    right = [1.0] * 90 + [0.0] * 10
    worse = [1.0] * 50 + [0.0] * 50
    assert first_places([forecast("a", right), forecast("b", worse)], seed=0)["a"] > 0.999
    apart = list(np.random.default_rng(0).permutation(right))
    twins = first_places([forecast("a", right), forecast("b", apart)], seed=0)
    assert 0.4 < twins["a"] < 0.65
    assert sum(twins.values()) == pytest.approx(1)
    lucky = forecast("b", apart, Gain(mean=0.1, error=0.001, steps=9))
    assert first_places([forecast("a", right), lucky], seed=0)["b"] > 0.9


def test_scores_are_named_and_every_one_can_be_asked_for(tmp_path):
    assert list(scores_named("KNN, LogME")) == ["KNN", "LogME"]
    assert list(scores_named("all")) == list(every_score())
    assert set(DEFAULT) < set(every_score())
    for bad, said in (("Logme", "LogME"), ("", "At least one"), ("KNN,", None), ("all,KNN", "A score")):
        if said is None:
            assert list(scores_named(bad)) == ["KNN"]
        else:
            with pytest.raises(Refused, match=said):
                scores_named(bad)
    few = choose(pictures(), ZOO, cache=Cache(tmp_path), budget=0.001, scores=scores_named("GBC"))
    all_of_them = choose(pictures(), ZOO, cache=Cache(tmp_path), budget=0.001)
    assert [row.name for row in few.ranking] == [row.name for row in all_of_them.ranking]
    assert {name for row in few.ranking for name in row.scores} == {"GBC"}


def test_the_scores_shown_are_those_the_benchmark_found():
    found = json.loads((Path(__file__).parents[2] / "benchmarks/results/choose.json").read_text(encoding="utf-8"))
    assert list(DEFAULT) == found["default"]


def test_every_score_gives_figures_for_a_small_zoo(tmp_path):
    choice = choose(pictures(), ZOO[:3], cache=Cache(tmp_path), budget=0.001, scores=every_score())
    assert set(choice.ranking[0].scores) == set(every_score())


def test_scores_decide_among_those_that_the_probe_cannot_tell_apart():
    def one(name, right, knn):
        measured = {"scores": {}, "deciding": {"KNN": knn, "LogME": knn}}
        return Forecast(name=name, measured=measured, probed={"right": right}, gain=None)

    probed_best, scored_best = one("probed", [1.0] * 91 + [0.0] * 9, 0.5), one("scored", [1.0] * 90 + [0.0] * 10, 0.9)
    far = one("far", [1.0] * 40 + [0.0] * 60, 1.0)
    assert [row.name for row in ranking([far, probed_best, scored_best])] == ["scored", "probed", "far"]
    worse = one("scored", [1.0] * 60 + [0.0] * 40, 0.9)
    assert [row.name for row in ranking([far, probed_best, worse])] == ["probed", "scored", "far"]
