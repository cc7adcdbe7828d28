"""Streams are resumable, and a batch is cut into equal slices."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.core.rng import random_state, seeded
from headstart.core.stream import Batch, Batches, Parts, as_batch, drawn, each, position_in, share, size
from headstart.core.validate import Refused


def numbers(n: int, batch_size: int, seed: int = 0) -> Batches:
    return Batches(x=torch.arange(float(n))[:, None], y=torch.arange(n), batch_size=batch_size, seed=seed)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 23), batch_size=st.integers(1, 9), position=st.integers(0, 40), seed=st.integers(0, 3))
def test_starting_at_a_position_is_skipping_to_it(n: int, batch_size: int, position: int, seed: int) -> None:
    stream = numbers(n, batch_size, seed)
    skipped = next(islice(iter(stream), position, None))
    started = next(stream.start(position))
    assert started.y is not None
    assert skipped.y is not None
    assert torch.equal(skipped.y, started.y)
    assert torch.equal(started.x[:, 0].long(), started.y)
    assert size(started) == min(n, batch_size)


def test_an_epoch_sees_each_example_once_and_epochs_differ() -> None:
    batches = list(islice(numbers(12, 4), 6))
    first, second = (torch.cat([b.y for b in part]) for part in (batches[:3], batches[3:]))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(12))
    assert not torch.equal(first, second)
    other = torch.cat([b.y for b in islice(numbers(12, 4, seed=1), 3)])
    assert not torch.equal(first, other)


@settings(max_examples=20, deadline=None)
@given(position=st.integers(0, 20))
def test_parts_start_where_skipping_arrives(position: int) -> None:
    listed = [(torch.full((2, 1), float(k)), torch.zeros(2)) for k in range(3)]  # not resumable: replayed
    parts = Parts({"a": numbers(7, 2), "b": listed})
    skipped = next(islice(iter(parts), position, None))
    started = next(parts.start(position))
    assert torch.equal(skipped["a"].x, started["a"].x)
    assert torch.equal(skipped["b"][0], started["b"][0])
    assert float(started["b"][0][0, 0]) == position % 3


def test_a_stream_that_runs_dry_is_refused() -> None:
    dry = (b for b in [Batch(torch.ones(1, 1))])
    with pytest.raises(Refused, match="each time it is iterated"):
        list(islice(position_in(dry, 0), 2))


def test_a_replayed_stream_does_not_disturb_or_depend_on_the_callers_random_numbers() -> None:
    loader = torch.utils.data.DataLoader(list(range(20)), batch_size=4, shuffle=True)
    with seeded(1):
        before = random_state()["torch"]
        first = [b.tolist() for b in islice(drawn(loader, 0, 5), 8)]
        assert torch.equal(before, random_state()["torch"])
        torch.rand(3)
        later = [b.tolist() for b in islice(drawn(loader, 6, 5), 2)]
    assert later == first[6:]


@settings(max_examples=30, deadline=None)
@given(each_of=st.integers(1, 5), of=st.integers(1, 4))
def test_shares_make_up_the_batch(each_of: int, of: int) -> None:
    n = each_of * of
    batch = {"a": Batch({"ids": torch.arange(n)}, torch.arange(n)), "b": Batch(torch.arange(2 * n)[:, None])}
    shares = [share(batch, k, of) for k in range(of)]
    assert torch.equal(torch.cat([s["a"].x["ids"] for s in shares]), torch.arange(n))
    assert torch.equal(torch.cat([s["a"].y for s in shares]), torch.arange(n))
    assert torch.equal(torch.cat([s["b"].x for s in shares]), torch.arange(2 * n)[:, None])
    assert all(size(s["a"]) == each_of for s in shares)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(Refused, match="must divide by 2"):
        share(Batch(torch.ones(3, 1)), 0, 2)


def test_as_batch_and_each() -> None:
    x, y = torch.ones(2, 1), torch.zeros(2)
    assert as_batch((x, y)).y is y
    assert as_batch(x).x is x
    assert as_batch({"a": (x, y)})["a"].x is x
    doubled = each(lambda t: 2 * t, Batch([x, {"k": x}], y, {"w": x}))
    assert float(doubled.x[1]["k"].sum()) == float(doubled.extra["w"].sum()) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"x": torch.ones(0, 2)}, "at least one example"),
        ({"x": torch.ones(2, 2), "y": torch.ones(3)}, "one label for each of 2"),
        ({"x": torch.ones(2, 2), "batch_size": 0}, "batch_size >= 1"),
    ],
)
def test_bad_batches_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(Refused, match=message):
        Batches(**settings)


def test_augment_is_applied_and_seeded_by_the_caller() -> None:
    stream = Batches(x=torch.zeros(4, 2), batch_size=4, augment=lambda x: x + torch.rand(1))
    with seeded(3):
        a = next(iter(stream)).x
    with seeded(3):
        b = next(iter(stream)).x
    assert torch.equal(a, b)
    assert float(a.sum()) > 0
