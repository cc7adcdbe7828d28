from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from headstart.core.validate import Refused
from headstart.tasks import Task, load_task, wilson
from headstart.tasks.task import Seal

X = np.arange(80, dtype=np.float32).reshape(40, 2)
Y = np.array(["yes", "no"] * 20)


def task(**flags: object) -> Task:
    return load_task((X, Y), **flags)  # type: ignore[arg-type]


def truth(of: Task) -> torch.Tensor:
    return torch.tensor([of.classes.index(Y[int(name.split()[1])]) for name in of.test.names])


def test_the_judge_is_right_and_counts_looks() -> None:
    t = task()
    right = truth(t)
    assert t.looks == 0
    assert t.judge(right).accuracy == 1.0
    flipped = right.clone()
    flipped[:3] = 1 - flipped[:3]
    judged = t.judge(flipped)
    assert (judged.look, t.looks) == (2, 2)
    assert judged.accuracy == pytest.approx(1 - 3 / len(right))
    assert torch.equal(judged.labels, right)
    for true in (0, 1):
        for guess in (0, 1):
            assert judged.confusion[true, guess] == ((right == true) & (flipped == guess)).sum()


def test_logits_and_indices_are_judged_alike() -> None:
    t = task()
    guess = torch.arange(len(t.test)) % 2
    assert t.judge(torch.nn.functional.one_hot(guess).float()).accuracy == t.judge(guess).accuracy
    assert t.judge(guess.tolist()).accuracy == t.judge(guess.numpy()).accuracy  # type: ignore[arg-type]


@pytest.mark.parametrize(("right", "n"), [(0, 5), (5, 5), (3, 10), (93, 100), (449, 450)])
def test_the_interval_is_scipys_wilson(right: int, n: int) -> None:
    reference = binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right, n) == pytest.approx((reference.low, reference.high), abs=1e-12)


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(3, dtype=torch.long),
        torch.zeros(10),
        torch.zeros(10, 3),
        torch.full((10,), 2),
        torch.full((10,), -1),
        torch.full((10, 2), float("nan")),
    ],
    ids=["too few", "floats", "three classes", "index too large", "negative", "NaN"],
)
def test_bad_predictions_are_refused_and_cost_no_look(bad: torch.Tensor) -> None:
    t = task()
    assert len(t.test) == 10
    with pytest.raises(Refused):
        t.judge(bad)
    assert t.looks == 0


def test_test_labels_are_nowhere_but_in_the_seal() -> None:
    t = task(labels_per_class=3)
    assert t.test.labels is None
    assert t.unlabelled.labels is None
    assert "tensor" not in repr(t.seal)
    for copied in (copy.deepcopy(t), pickle.loads(pickle.dumps(t))):
        with pytest.raises(Refused, match="carries no test labels"):
            copied.judge(torch.zeros(10, dtype=torch.long))
    assert t.looks == 0


def test_changing_judged_labels_does_not_change_the_seal() -> None:
    seal = Seal(torch.tensor([0, 1]))
    seal.open().zero_()
    assert seal.open().tolist() == [0, 1]


def test_a_saved_split_comes_back(tmp_path: Path) -> None:
    first = task(seed=3, labels_per_class=4)
    path = tmp_path / "new" / "split.json"
    first.save_split(path)
    again = task(seed=8, split=path)
    for part in ("train", "validation", "test", "unlabelled"):
        assert getattr(first, part).names == getattr(again, part).names
    assert first.manifest == again.manifest
    assert torch.equal(first.train.labels, again.train.labels)


def test_a_saved_split_keeps_the_order_of_classes(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    first = task()
    first.save_split(path)
    content = json.loads(path.read_text())
    content["classes"] = ["yes", "no"]
    path.write_text(json.dumps(content))
    turned = task(split=path)
    assert (first.classes, turned.classes) == (("no", "yes"), ("yes", "no"))
    assert torch.equal(turned.train.labels, 1 - first.train.labels)
    assert torch.equal(turned.judge(truth(turned)).labels, 1 - first.judge(truth(first)).labels)


def test_a_saved_split_holds_no_label(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    task().save_split(path)
    assert set(json.loads(path.read_text())) == {
        "format", "target", "seed", "manifest", "classes", "train", "validation", "test", "unlabelled",
    }  # fmt: skip


def test_new_rows_beside_a_saved_split_are_left_out_with_a_note(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    load_task((X[:30], Y[:30])).save_split(path)
    t = task(split=path)
    assert sum(map(len, (t.train, t.validation, t.test, t.unlabelled))) == 30
    assert t.notes == ("10 examples are not in the saved split and were left out",)


def test_changed_content_beside_a_saved_split_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    task().save_split(path)
    changed = X.copy()
    changed[3] = -1
    assert task(split=path).notes == ()
    assert load_task((changed, Y), split=path).notes == ("content or labels have changed since the split was saved",)


def test_the_manifest_follows_content_labels_and_split() -> None:
    changed = X.copy()
    changed[7, 0] += 1
    swapped = Y.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    manifests = [
        t.manifest
        for t in (task(), task(seed=1), load_task((changed, Y)), load_task((X, swapped)), task(test_share=0.4))
    ]
    assert len(set(manifests)) == 5
    assert task().manifest == manifests[0]


def test_take_keeps_inputs_names_labels_and_hashes_together() -> None:
    train = task().train
    some = train.take(torch.tensor([4, 1]))
    assert some.names == (train.names[4], train.names[1])
    assert some.labels.tolist() == [train.labels[4].item(), train.labels[1].item()]
    assert some.hashes == (train.hashes[4], train.hashes[1])
    assert np.array_equal(some.inputs[0], train.inputs[4])
    assert len(train.take([])) == 0
