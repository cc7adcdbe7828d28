"""Attack success of retrieval: counted by hand, by sorting, and zero where nothing changed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headstart.core.validate import Refused
from headstart.measure import matcher, retrieval_attack

OF = torch.tensor([0, 0, 1, 1, 2])
X = torch.arange(3.0)[:, None] / 2
CAPTIONS = ["a", "b", "c", "d", "e"]


def fixed(before: Tensor, after: Tensor):
    """A victim that says the one of the clean pictures and the other of all else."""
    return lambda x, captions: before if torch.equal(x, X) else after


def by_hand(matches: Tensor, k: int, captions: list[str]) -> tuple[list[bool], list[bool]]:
    """Which pictures find a caption of theirs, and which captions their picture, among the first k."""
    own = [{captions[j] for j in range(5) if OF[j] == i} for i in range(3)]
    texts = [any(captions[j] in own[i] for j in matches[i].argsort(descending=True)[:k]) for i in range(3)]
    images = [any(captions[j] in own[i] for i in matches[:, j].argsort(descending=True)[:k]) for j in range(5)]
    return texts, images


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([CAPTIONS, ["a", "b", "a", "d", "e"]]))
def test_it_is_what_sorting_finds(seed, captions):
    generator = torch.Generator().manual_seed(seed)
    before, after = torch.rand(2, 3, 5, generator=generator, dtype=torch.float64)
    found = retrieval_attack({"v": fixed(before, after)}, X, captions, OF, X / 2, captions, at=(1, 2, 3))
    for column, k in enumerate((1, 2, 3)):
        first, then = by_hand(before, k, captions), by_hand(after, k, captions)
        for side, clean, moved in zip((found.texts, found.images), first, then, strict=True):
            assert side.counted[0, column] == sum(clean)
            assert side.recall[0, column] == pytest.approx(sum(clean) / len(clean))
            assert side.recall_after[0, column] == pytest.approx(sum(moved) / len(moved))
            lost = sum(c and not m for c, m in zip(clean, moved, strict=True))
            assert side.success[0, column] == pytest.approx(lost / max(sum(clean), 1))


def test_searches_that_failed_before_are_not_counted():
    right = torch.zeros(3, 5).index_put((OF, torch.arange(5)), torch.tensor(1.0))
    wrong = right.roll(1, 0)
    half = torch.cat([right[:1], wrong[1:]])
    victims = {"right": fixed(right, wrong), "half": fixed(half, wrong), "wrong": fixed(wrong, wrong)}
    found = retrieval_attack(victims, X, CAPTIONS, OF, X / 2, CAPTIONS, at=[1])
    assert found.victims == ("right", "half", "wrong")
    assert found.texts.counted.tolist() == [[3], [1], [0]]
    assert found.texts.success.tolist() == [[1.0], [1.0], [0.0]]


def test_nothing_changed_is_no_success_and_saying_nothing_finds_nothing():
    match = matcher(lambda x: torch.cat([x, 1 - x], 1) + 0.1, lambda texts: torch.eye(5)[: len(texts), :2] + 0.3)
    found = retrieval_attack({"v": match}, X, CAPTIONS, OF, X, CAPTIONS)
    assert found.texts.at == (1, 5, 10)
    assert not found.texts.success.any()
    assert not found.images.success.any()
    same = retrieval_attack({"v": lambda x, c: torch.zeros(3, 5)}, X, CAPTIONS, OF, X, CAPTIONS, at=[1, 3])
    assert same.texts.recall.tolist() == [[0.0, 0.0]]
    assert same.images.recall.tolist() == [[0.0, 1.0]]  # two pictures are wrong, and so all three are found in three


def test_lengths_of_features_are_nothing_to_a_matcher():
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.rand(3, 4, generator=generator), torch.rand(5, 4, generator=generator)
    long = torch.rand(5, 1, generator=generator) + 1
    one = matcher(lambda x: images[: len(x)], lambda t: texts[: len(t)])(X, CAPTIONS)
    two = matcher(lambda x: images[: len(x)] * 7, lambda t: (texts * long)[: len(t)])(X, CAPTIONS)
    torch.testing.assert_close(one, two)
    assert not one.requires_grad


def test_bad_input_is_refused():
    good = {"v": lambda x, c: torch.zeros(3, 5)}
    for victims, x, captions, of, moved, said, at, says in (
        ({}, X, CAPTIONS, OF, X, CAPTIONS, [1], "needs victims"),
        (good, X, CAPTIONS, OF, X[:2], CAPTIONS, [1], "Changed pairs"),
        (good, X, CAPTIONS, OF, X, CAPTIONS[:4], [1], "Changed pairs"),
        (good, X, CAPTIONS, OF[:4], X, CAPTIONS, [1], "each of 5 captions"),
        (good, X, CAPTIONS, OF.clamp(max=1), X, CAPTIONS, [1], "Each of 3 pictures"),
        (good, X, "abcde", OF, X, "abcde", [1], "list of texts"),
        (good, X, CAPTIONS, OF, X, CAPTIONS, [], "ranks"),
        (good, X, CAPTIONS, OF, X, CAPTIONS, [0, 1], "ranks"),
        (good, X, CAPTIONS, OF, X * torch.nan, CAPTIONS, [1], "finite"),
        ({"v": lambda x, c: torch.zeros(5, 3)}, X, CAPTIONS, OF, X, CAPTIONS, [1], "A matcher gives"),
        ({"v": lambda x, c: torch.full((3, 5), torch.nan)}, X, CAPTIONS, OF, X, CAPTIONS, [1], "finite"),
    ):
        with pytest.raises(Refused, match=says):
            retrieval_attack(victims, x, captions, of, moved, said, at=at)
