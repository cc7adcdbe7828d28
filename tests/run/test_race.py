"""Fine-tuning from a head that works, and successive halving within an allowance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from headstart.run.cache import Cache
from headstart.run.probe import fit_probe
from headstart.run.race import Finalist, Gain, race
from headstart.run.tune import FOLDS, Pull, full_steps, predict, pull, training_cost, tune
from headstart.tasks import Examples, Rows
from headstart.zoo.source import Source


@dataclass(frozen=True)
class Stacked:
    def __call__(self, raw):
        return torch.from_numpy(np.stack(raw))


def model(seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    made = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=generator) / 3
    return made.eval()


def source(name: str = "tiny", operations: int = 0, load=model) -> Source:
    return Source(name=name, modality="numeric", load=load, preprocess=Stacked(), head="2", classes=(),
                  licence="CC0-1.0", fingerprint=name, kind="mini")  # fmt: skip


def rings(n: int = 96) -> Examples:
    """Two classes that no linear head on the raw numbers separates: inside and outside of a sphere."""
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, :3].square().sum(1) > 2.4).long()
    return Examples(inputs=Rows(x.numpy()), names=tuple(map(str, range(n))), labels=y)


def head_of(examples: Examples, start: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return fit_probe(start[:2](torch.from_numpy(examples.inputs.values)), examples.labels, 2, strength=0.03)


def test_it_starts_as_the_probe_and_learns_more_than_it():
    examples, start = rings(), model()
    x, y = torch.from_numpy(examples.inputs.values), examples.labels
    weight, bias = head_of(examples, start)
    with torch.no_grad():
        probe = start[:2](x) @ weight.T + bias
    settings = {"weight": weight, "bias": bias, "seed": 0, "device": "cpu"}
    still = tune(start, "2", x, y, 2, steps=1, learning_rate=0.0, **settings)
    assert torch.allclose(predict(still, x), probe, atol=1e-5)
    tuned = tune(start, "2", x, y, 2, steps=200, learning_rate=1e-2, **settings)
    assert (predict(tuned, x).argmax(1) == y).float().mean() > (probe.argmax(1) == y).float().mean() + 0.05
    assert not torch.equal(tuned[0].weight, start[0].weight)
    assert torch.equal(start[0].weight, model()[0].weight)  # the source stays as it was
    again = tune(start, "2", x, y, 2, steps=200, learning_rate=1e-2, **settings)
    assert torch.equal(tuned[0].weight, again[0].weight)


def test_predictions_do_not_depend_on_the_chunk():
    x = torch.from_numpy(rings().inputs.values)
    assert torch.allclose(predict(model(), x, chunk=7), predict(model(), x, chunk=64), atol=1e-6)
    assert torch.allclose(predict(nn.Linear(6, 2), x, chunk=5), predict(nn.Linear(6, 2), x)) is False


def test_a_pull_trains_on_the_other_folds_only(tmp_path):
    examples, seen = rings(), []
    found = [pull(Cache(tmp_path), examples, 2, 0, Pull(source=source(), fold=k, steps=10, strength=0.03))
             for k in range(FOLDS)]  # fmt: skip
    for result in found:
        seen += result["rows"]
        assert len(result["tuned"]) == len(result["probe"]) == len(result["rows"])
    assert sorted(seen) == list(range(96))  # every example is held out once
    held = found[0]["rows"]
    wrong = examples.labels.clone()
    wrong[held] = 1 - wrong[held]  # what the held-out labels say changes the verdict, never the predictions
    spoilt = Examples(inputs=examples.inputs, names=examples.names, labels=wrong)
    from headstart.run import tune as module

    fixed = module.folds_of(examples.labels, FOLDS, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "folds_of", lambda *_: fixed)
        other = pull(Cache(tmp_path), spoilt, 2, 0, Pull(source=source(), fold=0, steps=10, strength=0.03))
    assert [1 - right for right in other["tuned"]] == found[0]["tuned"]
    assert [1 - right for right in other["probe"]] == found[0]["probe"]


def test_a_diverging_source_gets_nothing_and_stops_nobody(tmp_path, monkeypatch):
    from headstart.run import tune as module

    monkeypatch.setattr(module, "adamw", lambda lr: lambda params: torch.optim.SGD(params, lr=1e30))
    found = pull(Cache(tmp_path), rings(), 2, 0, Pull(source=source(), fold=0, steps=10, strength=0.03))
    assert sum(found["tuned"]) == 0
    assert sum(found["probe"]) > 0


def test_gain_is_paired_and_never_certain():
    same = {"rows": [0, 1, 2, 3], "tuned": [1, 1, 0, 0], "probe": [1, 1, 0, 0]}
    more = {"rows": [4, 5, 6, 7], "tuned": [1, 1, 1, 0], "probe": [1, 0, 1, 0]}
    assert Gain.of([same, more], 9).mean == pytest.approx(1 / 8)
    assert Gain.of([same], 9).error == pytest.approx((1 / 4 / 4) ** 0.5)


def finalists(*gains: float, accuracy: float = 0.5, operations: int = 100) -> tuple[list[Finalist], dict[str, float]]:
    names = [f"s{k}" for k in range(len(gains))]
    made = [Finalist(source=source(n), accuracy=accuracy, strength=0.03, operations=operations) for n in names]
    return made, dict(zip(names, gains, strict=True))


def runner(gains: dict[str, float], log: list[Pull]):
    """Pulls whose fine-tune is right on a share 0.5 + gain of a hundred held-out examples, the probe on half."""

    def run(jobs):
        log.extend(jobs)
        for job in jobs:
            right = round(100 * (0.5 + gains[job.source.name]))
            yield {"rows": list(range(100)), "tuned": [1] * right + [0] * (100 - right), "probe": [1, 0] * 50}

    return run


def test_halving_keeps_the_better_half_and_stays_within_the_allowance():
    some, gains = finalists(0.0, 0.3, 0.1, 0.2)
    log: list[Pull] = []
    allowance = 2 * 4 * FOLDS * 30 * training_cost(100, 1, 64)
    found, spent = race(some, runner(gains, log), n=96, allowance=allowance)
    assert [job.source.name for job in log[12:]] == ["s1"] * FOLDS + ["s3"] * FOLDS
    assert {job.steps for job in log[:12]} == {30}
    assert {job.steps for job in log[12:]} == {60}
    assert spent == sum(training_cost(100, job.steps, 64) for job in log) <= allowance
    assert found["s1"].mean == pytest.approx(0.3)
    assert (found["s1"].steps, found["s0"].steps) == (60, 30)


def test_one_rung_where_two_are_too_dear_and_fewer_finalists_before_fewer_folds():
    some, gains = finalists(0.0, 0.3, 0.1, 0.2)
    log: list[Pull] = []
    race(some, runner(gains, log), n=96, allowance=3 * FOLDS * 30 * training_cost(100, 1, 64))
    assert [(job.source.name, job.fold, job.steps) for job in log] == [
        (f"s{k}", fold, 30) for k in range(3) for fold in range(FOLDS)
    ]


def test_standing_is_probe_plus_gain():
    some, gains = finalists(0.0, 0.1, 0.1)
    some[0] = Finalist(source=some[0].source, accuracy=0.9, strength=0.03, operations=100)
    log: list[Pull] = []
    race(some, runner(gains, log), n=300, allowance=1e9)
    assert "s0" in {job.source.name for job in log[9:]}


def test_no_fine_tune_is_longer_than_a_whole_one_or_too_short_to_say_anything():
    some, gains = finalists(0.0, 0.1)
    log: list[Pull] = []
    race(some, runner(gains, log), n=300, allowance=1e15)
    assert {job.steps for job in log} == {full_steps(300)}
    log.clear()
    quarter = full_steps(300) // 4
    assert race(some, runner(gains, log), n=300, allowance=2 * FOLDS * training_cost(100, quarter - 1, 200)) == ({}, 0)
    assert log == []
    race(some, runner(gains, log), n=300, allowance=2 * FOLDS * training_cost(100, quarter, 200))
    assert [(job.fold, job.steps) for job in log] == [(fold, quarter) for _ in range(2) for fold in range(FOLDS)]
    log.clear()
    assert race(some[:1], runner(gains, log), n=300, allowance=1e15) == ({}, 0.0)
