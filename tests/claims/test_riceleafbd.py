"""The model-selection study: its figures, what phase one leaves alone, and a folder of one's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, f1_score
from torch import nn

from headstart.claims import model_selection as study
from headstart.claims import own_pictures, riceleafbd, two_phase
from headstart.core.claim import check
from headstart.core.surgery import freeze, with_head
from headstart.core.validate import Refused
from headstart.tasks import load_task, wilson


def candidate(validation: torch.Tensor, test: torch.Tensor, parameters: int = 10) -> study.Candidate:
    return study.Candidate(validation=validation, test=test, parameters=parameters, seconds=0.0)


def test_1_figures_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    logits, y = torch.randn(60, 4, generator=generator), torch.randint(4, (60,), generator=generator)
    found = study.measured(logits, y)
    said = logits.argmax(1)
    assert found["macro F1"] == f1_score(y, said, average="macro", zero_division=0)
    assert found["accuracy"] == confusion_matrix(y, said).trace() / 60


@pytest.mark.parametrize("classes", [2, 4, 7])
def test_2_perfect_and_constant_predictors(classes):
    y = torch.arange(classes).repeat_interleave(5)
    perfect = study.measured(torch.eye(classes)[y], y)
    assert perfect["accuracy"] == perfect["macro F1"] == 1
    constant = study.measured(torch.eye(classes)[torch.zeros_like(y)], y)
    assert constant["accuracy"] == pytest.approx(1 / classes)
    assert constant["macro F1"] == pytest.approx(2 / (classes * (classes + 1)))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))


def test_5_and_6_a_head_on_cached_features_is_the_head_of_a_frozen_network():
    model = network().double().eval()
    x, y = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double(), torch.arange(40) % 10
    frozen = two_phase.frozen_norms(freeze(with_head(model, 10, "4")))
    frozen.get_submodule("4").requires_grad_(True)
    through = two_phase.trained(frozen, x, y, 12, seed=0)
    cached = two_phase.trained(
        with_head(nn.Sequential(nn.Linear(144, 10).double()), 10), two_phase.features_of(model, "4", x), y, 12, 0
    )
    assert torch.allclose(through[4].weight, cached[0].weight, atol=1e-9)
    for name, value in through.state_dict().items():
        if not name.startswith("4."):
            assert torch.equal(value, model.state_dict()[name]), name


def test_the_second_phase_keeps_the_statistics_of_batch_norm_and_moves_the_rest():
    model = network()
    x, y = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 3
    tuned = two_phase.two_phase(model, "4", x, y, 3, seed=0, epochs=12)
    assert torch.equal(tuned[1].running_mean, model[1].running_mean)
    assert not torch.equal(tuned[0].weight, model[0].weight)
    assert tuned(x).shape == (64, 3)


def test_7_the_wilson_interval_of_285_of_311():
    low, high = wilson(285, 311)
    assert (low, high) == (pytest.approx(0.880, abs=5e-4), pytest.approx(0.942, abs=5e-4))
    assert wilson(0, 9)[0] >= 0
    assert wilson(9, 9)[1] <= 1


def test_8_mcnemar():
    y = torch.zeros(20, dtype=torch.long)
    right, wrong = torch.eye(2)[torch.zeros(20, dtype=torch.long)], torch.eye(2)[torch.ones(20, dtype=torch.long)]
    ten = torch.cat([wrong[:10], right[:10]])
    assert study.mcnemar(right, ten, y) == pytest.approx(0.001953, abs=1e-6)
    assert study.mcnemar(right, right, y) == 1
    assert study.mcnemar(torch.cat([wrong[:5], right[:15]]), torch.cat([right[:15], wrong[:5]]), y) == 1


def test_9_the_choice_does_not_look_at_the_test():
    generator = torch.Generator().manual_seed(0)
    y, test = torch.randint(3, (50,), generator=generator), torch.randint(3, (70,), generator=generator)
    candidates = {name: candidate(torch.randn(50, 3, generator=generator) + k * torch.eye(3)[y],
                                  torch.randn(70, 3, generator=generator), parameters=10 - k)
                  for k, name in enumerate(("scratch", "a", "b"))}  # fmt: skip
    once = study.arms(candidates, "scratch", y, test)
    again = study.arms(candidates, "scratch", y, test[torch.randperm(70, generator=generator)])
    assert once["chosen"]["validation macro F1"] == again["chosen"]["validation macro F1"]
    assert study.chosen(candidates, y) == "b"


def test_a_tie_within_one_standard_error_goes_to_the_smaller():
    y = torch.arange(100) % 2
    good, better = torch.eye(2)[y], torch.eye(2)[y]
    good[:12], better[:10] = good[:12].flip(1), better[:10].flip(1)
    assert study.chosen({"large": candidate(better, y, 100), "small": candidate(good, y, 10)}, y) == "small"


def test_a_folder_of_ones_own(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for k, word in enumerate(("blight", "healthy")):
        (tmp_path / word).mkdir()
        for i in range(30):
            picture = rng.integers(0, 120, (20, 24, 3))
            picture[..., k] += 100
            Image.fromarray(picture.astype(np.uint8)).save(tmp_path / word / f"{i}.png")
    monkeypatch.setattr(riceleafbd, "study", lambda data, seed: own_pictures.study(
        data, seed, zoo="mini:cnn-shapes,mini:vit-alphanumeric", best=1, epochs=12))  # fmt: skip
    record = check(riceleafbd, data=str(tmp_path))
    found = record["runs"][0]
    assert {"scratch", "pretrained", "from scratch", "chosen", "best"} < set(found)
    assert found["best"]["accuracy"] > 0.8
    with pytest.raises(Refused, match="needs pictures"):
        own_pictures.study("wine", 0)


def test_the_split_is_stratified_and_the_same_for_a_seed():
    task = load_task("digits", test_share=0.15, validation_share=0.15, seed=3)
    for part in (task.train, task.validation):
        share = part.labels.bincount().double() / len(part)
        assert (share - 0.1).abs().max() < 0.01
    assert task.train.names == load_task("digits", test_share=0.15, validation_share=0.15, seed=3).train.names
