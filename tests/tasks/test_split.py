from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.tasks.split import PARTS, assign

counts = st.lists(st.integers(2, 40), min_size=2, max_size=6)
seeds = st.integers(0, 10_000)


def layout(sizes: list[int], seed: int = 0) -> tuple[np.ndarray, list[str]]:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    labels = np.random.default_rng(seed).permutation(labels)
    return labels, [f"content {i}" for i in range(len(labels))]


@given(counts, seeds, st.floats(0.1, 0.5), st.floats(0.0, 0.4))
def test_every_class_is_split_by_the_shares(sizes: list[int], seed: int, test: float, validation: float) -> None:
    labels, keys = layout(sizes, seed)
    parts = assign(labels, keys, seed=seed, test_share=test, validation_share=validation)
    assert set(parts) <= set(PARTS[:3])
    for label, size in enumerate(sizes):
        of_class = parts[labels == label]
        tested = (of_class == "test").sum()
        assert tested == min(max(1, round(test * size)), size - 1)
        assert abs((of_class == "validation").sum() - validation * size) <= 1.5
        assert (of_class == "train").sum() >= 1


@given(counts, seeds)
def test_same_seed_same_split_and_order_of_classes_is_kept(sizes: list[int], seed: int) -> None:
    labels, keys = layout(sizes)
    assert (assign(labels, keys, seed=seed) == assign(labels, keys, seed=seed)).all()


@given(st.lists(st.integers(8, 40), min_size=2, max_size=5), seeds, st.integers(1, 4))
def test_fewer_labels_are_a_subset_and_the_test_stays(sizes: list[int], seed: int, k: int) -> None:
    labels, keys = layout(sizes, seed)
    full, few, more = (assign(labels, keys, seed=seed, labels_per_class=n) for n in (None, k, k + 1))
    for part in (few, more):
        assert ((part == "test") == (full == "test")).all()
        assert not (part == "validation").any()
    assert set(np.flatnonzero(few == "train")) < set(np.flatnonzero(more == "train"))
    assert (np.bincount(labels[few == "train"]) == k).all()
    assert ((few == "unlabelled") == ~np.isin(few, ["train", "test"])).all()


def test_the_seed_changes_who_is_labelled_and_who_is_tested() -> None:
    labels, keys = layout([30, 30])
    one, two = (assign(labels, keys, seed=seed, labels_per_class=5) for seed in (0, 1))
    assert set(np.flatnonzero(one == "train")) != set(np.flatnonzero(two == "train"))
    assert set(np.flatnonzero(one == "test")) != set(np.flatnonzero(two == "test"))
    given_test = ["test" if i % 2 else "" for i in range(len(labels))]
    one, two = (assign(labels, keys, given_test, seed=seed, labels_per_class=5) for seed in (0, 1))
    assert set(np.flatnonzero(one == "train")) != set(np.flatnonzero(two == "train"))


@settings(max_examples=60)
@given(counts, seeds, st.integers(2, 5))
def test_copies_never_lie_on_both_sides_of_a_split(sizes: list[int], seed: int, copies: int) -> None:
    labels = np.repeat(np.arange(len(sizes)), [size * copies for size in sizes])
    keys = [f"content {i // copies}" for i in range(len(labels))]
    parts = assign(labels, keys, seed=seed)
    side: dict[str, set[str]] = {}
    for key, part in zip(keys, parts, strict=True):
        side.setdefault(key, set()).add(part)
    assert all(len(found) == 1 for found in side.values())
    for label in range(len(sizes)):
        assert {"test", "train"} <= set(parts[labels == label])


@given(counts, seeds)
def test_parts_that_came_with_the_data_are_kept(sizes: list[int], seed: int) -> None:
    labels, keys = layout(sizes, seed)
    rng = np.random.default_rng(seed)
    came = rng.choice(["train", "test", "validation"], len(labels))
    came[:2] = ["test", "validation"]
    assert (assign(labels, keys, list(came), seed=seed) == came).all()


def test_validation_is_carved_from_train_when_only_a_test_came() -> None:
    labels, keys = layout([40, 40])
    came = ["test" if i % 4 == 0 else "train" for i in range(80)]
    parts = assign(labels, keys, came, validation_share=0.2)
    assert ((parts == "test") == (np.array(came) == "test")).all()
    for label in (0, 1):
        pool = np.isin(parts, ["train", "validation"]) & (labels == label)
        assert (parts[pool] == "validation").sum() == round(0.2 * pool.sum())


def test_examples_without_label_are_unlabelled_also_in_a_given_test() -> None:
    labels = np.array([0, 1, -1, 0, 1, -1])
    parts = assign(labels, list("abcdef"), ["train", "train", "test", "test", "test", ""])
    assert parts.tolist() == ["train", "train", "unlabelled", "test", "test", "unlabelled"]


def test_a_class_of_one_content_is_still_tested() -> None:
    labels = np.array([0] * 8 + [1] * 8)
    parts = assign(labels, ["same"] * 8 + [f"{i}" for i in range(8)])
    assert {"train", "test"} <= set(parts[:8])


@pytest.mark.parametrize("n", [2, 3])
def test_tiny_classes_are_trained_and_tested(n: int) -> None:
    labels, keys = layout([n, n])
    parts = assign(labels, keys)
    for label in (0, 1):
        assert {"train", "test"} <= set(parts[labels == label])


def test_a_large_test_share_leaves_something_to_train_on() -> None:
    labels, keys = layout([2, 3])
    parts = assign(labels, keys, test_share=0.95, validation_share=0.0)
    assert [(parts[labels == label] == "train").sum() for label in (0, 1)] == [1, 1]
