"""The parts of a run: heads, baselines, selection, judging; and one whole run in this process."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import nn

from headstart import fit_task, load_task
from headstart.core.statistics import ClassStatistics
from headstart.core.validate import Refused
from headstart.run import judging
from headstart.run.heads import gaussian_head, gaussian_head_with_unlabelled, headed, reset
from headstart.run.prepared import Prepared, Shuffled, jitter, prepare
from headstart.run.settings import Reading, Tuning, filled
from headstart.run.trial import Tried, best_of


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADSTART_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def clusters(n, seed=0, apart=4.0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return torch.randn(n, 5, generator=g) + apart * torch.eye(5)[y], y


def test_the_gaussian_head_is_linear_discriminant_analysis_when_there_is_data_enough():
    """Many examples leave nothing to shrink, so scikit-learn's solver must agree on every score difference."""
    x, y = clusters(6_000)
    x = x @ (torch.eye(5) + 0.8 * torch.ones(5, 5))  # correlated, so that the shrinkage has to stay away
    weight, bias = gaussian_head(ClassStatistics.of(x, y, 3))
    reference = LinearDiscriminantAnalysis(solver="lsqr", priors=[1 / 3] * 3).fit(x.numpy(), y.numpy())
    ours = x[:200] @ weight.T + bias
    theirs = torch.from_numpy(reference.decision_function(x[:200].numpy())).float()
    gaps = [(s - s.mean(1, keepdim=True)) for s in (ours, theirs)]
    torch.testing.assert_close(*gaps, rtol=0.02, atol=0.05)


@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-5, 5))
def test_the_gaussian_head_does_not_care_about_units(scale, shift):
    x, y = clusters(60)
    plain = x @ (w := gaussian_head(ClassStatistics.of(x, y, 3)))[0].T + w[1]
    moved = x * scale + shift * scale
    other = moved @ (w := gaussian_head(ClassStatistics.of(moved, y, 3)))[0].T + w[1]
    assert (plain.argmax(1) == other.argmax(1)).float().mean() >= 0.98


def test_constant_duplicate_and_few_features_still_give_a_finite_head():
    for x in (torch.zeros(6, 4), torch.ones(6, 4) * 1e6, torch.randn(1, 4).repeat(6, 1), torch.randn(6, 300)):
        weight, bias = gaussian_head(ClassStatistics.of(x, torch.arange(6) % 2, 2))
        assert torch.isfinite(weight).all()
        assert torch.isfinite(bias).all()


def test_unlabelled_examples_help_where_classes_are_clusters():
    x, y = clusters(1_500, apart=2.5)
    few = torch.arange(9)
    alone = gaussian_head(ClassStatistics.of(x[few], y[few], 3))
    joined = gaussian_head_with_unlabelled(ClassStatistics.of(x[few], y[few], 3), x[9:1000])
    right = [float(((x[1000:] @ w.T + b).argmax(1) == y[1000:]).float().mean()) for w, b in (alone, joined)]
    assert right[1] > right[0]


def test_a_reset_network_has_nothing_of_the_old_weights_and_leaves_random_state_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.full((1, 3), 9.0))
            self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    model = Model()
    for p in model.parameters():
        p.data.fill_(9.0)
    before = torch.get_rng_state()
    one, other = reset(model, 0), reset(model, 0)
    assert torch.equal(torch.get_rng_state(), before)
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert not (p == 9.0).any(), name
    assert all((p == 9.0).all() for p in model.parameters())


def test_a_solved_head_is_folded_exactly():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 7))
    weight, bias = torch.randn(4, 5), torch.randn(4)
    x = torch.randn(6, 3)
    torch.testing.assert_close(headed(model, "2", weight, bias)(x), model[:2](x) @ weight.T + bias)


def test_batches_of_examples_depend_on_position_alone():
    examples = prepare([np.float32(i) for i in range(10)], lambda raw: torch.tensor(raw)[:, None])
    stream = Shuffled(examples=examples, chosen=torch.arange(9), labels=torch.arange(10), batch_size=4, seed=3)
    whole = [batch.y.tolist() for batch, _ in zip(stream, range(6), strict=False)]
    assert [next(stream.start(k)).y.tolist() for k in range(6)] == whole
    assert len({*whole[0], *whole[1]}) == 8


def test_large_sets_are_prepared_when_asked_for_and_give_the_same_rows():
    inputs = [np.full(3, i, np.float32) for i in range(20)]
    stack = lambda raw: torch.from_numpy(np.stack(raw))  # noqa: E731
    small, large = prepare(inputs, stack), prepare(inputs, stack, ready=10)
    assert small.ready is not None
    assert large.ready is None
    assert isinstance(large, Prepared)
    assert torch.equal(small.rows([3, 1]), large.rows([3, 1]))


def test_jitter_keeps_shape_range_and_is_small():
    x = torch.rand(4, 3, 16, 16)
    y = jitter(x)
    assert y.shape == x.shape
    assert y.min() >= x.min() - 1e-6
    assert y.max() <= x.max() + 1e-6
    assert not torch.equal(x, y)
    assert torch.allclose(jitter(x, degrees=0, shift=0, scale=0), x, atol=1e-5)


def test_ties_go_to_what_learnt_from_more_then_to_the_cheaper():
    tried = [Tried(route="probe", accuracy=0.9), Tried(route="bayes", accuracy=0.9), Tried(route="full", accuracy=0.8)]
    assert best_of(tried).route == "probe"
    assert best_of(tried, prefer="bayes").route == "bayes"
    assert best_of([Tried(route="probe"), Tried(route="lpft")]).route == "lpft"
    with pytest.raises(Refused, match="lora: no layer"):
        best_of([Tried(route="lora", why_skipped="no layer")])


def test_calibration_of_a_forecaster_that_says_what_happens():
    p = torch.tensor([[0.75, 0.25]]).repeat(400, 1)
    y = (torch.arange(400) % 4 == 0).long()
    found = judging.calibration(p, y)
    assert found["ece"] == pytest.approx(0.0, abs=1e-12)
    assert found["brier"] == pytest.approx(2 * 0.75 * 0.25)
    assert found["log_loss"] == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))


def test_gain_is_paired_and_signed():
    right, wrong = torch.ones(100, dtype=torch.bool), torch.zeros(100, dtype=torch.bool)
    gain, (low, high) = judging.gain(right, wrong)
    assert gain == 1.0
    assert 0.9 < low <= high <= 1.0
    assert judging.gain(right, right)[0] == 0.0
    assert judging.gain(wrong, right)[0] == -1.0


def test_settings_go_through_json_and_refuse_what_they_do_not_know():
    tuning = Tuning(routes=("probe",), seed=3)
    assert filled(Tuning, json.loads(json.dumps(tuning.__dict__))) == tuning
    with pytest.raises(Refused, match="Did you mean 'labels_per_class'"):
        filled(Reading, {"label_per_class": 3})
    with pytest.raises(Refused, match="seed must be"):
        filled(Tuning, {"seed": "three"})
    with pytest.raises(Refused, match="Did you mean 'lora'"):
        Tuning(routes=("lara",)).checked()


def test_a_whole_run_in_this_process(tmp_path):
    task = load_task("digits", labels_per_class=5)
    before = torch.get_rng_state()
    seen = []
    result = fit_task(task, "mini:cnn-letters", out=tmp_path / "run", routes=("probe", "bayes"),
                      progress=lambda what, done, of: seen.append(what))  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before)
    assert task.looks == 1
    assert result.accuracy > 0.85
    assert result.good
    assert result.interval[0] < result.accuracy < result.interval[1]
    assert "baseline scratch" in seen
    assert result.directory == tmp_path / "run"
    with np.load(tmp_path / "run" / "evidence" / "test.npz") as kept:
        assert (kept["predictions"] == kept["labels"]).mean() == pytest.approx(result.accuracy)
    wrong = {one["row"] for one in result.results["test"]["mistakes"]}
    assert len(wrong) == round((1 - result.accuracy) * len(task.test))
    assert result.results["answer"]["predicted"]["how"] == "5-fold cross-validation"


def test_without_out_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = load_task("digits", labels_per_class=1)
    result = fit_task(task, "mini:cnn-letters", routes=("probe", "bayes"))
    assert result.directory is None
    assert not list(tmp_path.iterdir())
    assert result.results["answer"]["predicted"] is None  # one label a class: nothing can be held out
    assert set(result.model.predict(task.test.inputs.take(range(20)))) <= set(task.classes)
