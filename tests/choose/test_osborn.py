"""OSBORN: the card's known answers, transport by linear programming, subsets by enumeration, duplicates and refusals."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from headstart.choose import Osborn
from headstart.choose.pool import Pool, distinct, joint_entropies
from headstart.choose.transport import squared_distances, transport
from headstart.core.evidence import Evidence
from headstart.core.validate import Refused
from headstart.testing import contract


def coupled(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest coupling as the linear programme that defines it, and its cost."""
    cost = np.array([[sum((a - b) ** 2) for b in y] for a in x])
    n, m = cost.shape
    sums = [np.repeat(np.eye(n), m, 1), np.tile(np.eye(m), n)]
    solved = linprog(cost.ravel() / np.median(cost), A_eq=np.concatenate(sums), b_eq=np.r_[np.full(n, 1 / n),
                     np.full(m, 1 / m)], method="highs-ds")  # fmt: skip
    return solved.x.reshape(n, m), cost


def differences(evidence: Evidence) -> tuple[float, float]:
    """W_D and W_T from the definitions."""
    assert evidence.source is not None
    x, own = (t.double().numpy() for t in evidence.source.need("features", "labels"))
    y, labels = (t.double().numpy() for t in evidence.need("features", "labels"))
    coupling, cost = coupled(x, y)
    task = 0.0
    for b in set(labels):
        mass = coupling[:, labels == b].sum()
        for a in set(own):
            share = coupling[own == a][:, labels == b].sum()
            task -= share * math.log(share / mass) if share > 1e-15 else 0
    return float((coupling * cost).sum()), task


def left_unsaid(a: list[int], b: list[int]) -> float:
    """H(a|b) in nats from counts."""
    pairs, alone = Counter(zip(a, b, strict=True)), Counter(b)
    return -math.fsum(count / len(a) * math.log(count / alone[y]) for (_, y), count in pairs.items())


def slow(models: list[Evidence]) -> float:
    said = [e.need("logits")[0].argmax(1).tolist() for e in models]
    near = math.fsum(math.fsum(differences(e)) for e in models)
    return -near - math.fsum(left_unsaid(a, b) for a, b in itertools.permutations(said, 2))


test_contract = contract(
    Osborn(),
    invariant=("rotation", "shift", "zero columns"),
    reference=slow,
    refuses=[
        lambda: Osborn(weights=(1.0, -1.0, 1.0)), lambda: Osborn(weights=(1.0, math.nan, 1.0)),
        lambda: Osborn(weights=(1.0, 1.0)), lambda: Osborn(direction="both"), lambda: Osborn(examples=1),  # type: ignore[arg-type]
        lambda: Osborn(exact=-1), lambda: Osborn(regularisation=0), lambda: Osborn(regularisation=math.inf),
    ],
)  # fmt: skip
test_contract_unit = contract(Osborn(unit=True), invariant=("rotation", "scale", "zero columns"))


def model(seed: int, n: int = 30, own: int = 30, d: int = 4, spread: float = 1.0, classes: int = 3) -> Evidence:
    """One model of a pool: labels are the same for all seeds, imbalanced; widths of features differ by 10^±spread."""
    g = torch.Generator().manual_seed(seed)
    draw = {"generator": g, "dtype": torch.float64}
    share = torch.tensor([0.7] + [0.3 / (classes - 1)] * (classes - 1))
    labels = torch.multinomial(share, n, replacement=True, generator=torch.Generator().manual_seed(n))
    labels[:classes] = torch.arange(classes)
    theirs = torch.arange(own) % 4
    scale = 10 ** (spread * (2 * torch.rand(d, generator=g, dtype=torch.float64) - 1))
    centres = torch.randn(max(4, classes), d, **draw)
    return Evidence(
        features=(centres[labels] + torch.randn(n, d, **draw)) * scale,
        logits=2 * torch.randn(max(4, classes), 4, **draw)[labels] + torch.randn(n, 4, **draw),
        labels=labels,
        source=Evidence(features=(centres[theirs] + torch.randn(own, d, **draw)) * scale, labels=theirs),
    )


def terms(evidence: Evidence, **settings) -> tuple[float, float]:
    pool = Osborn(**settings).pool([evidence])
    return float(pool.domain[0]), float(pool.task[0])


@pytest.mark.parametrize(("n", "own", "d", "spread"), [(30, 30, 4, 0), (25, 32, 4, 3), (12, 16, 40, 1), (40, 9, 1, 1)])
def test_equals_linear_programming_and_counts(n, own, d, spread):
    models = [model(seed, n, own, d, spread) for seed in range(3)]
    pool = Osborn().pool(models)
    for k, e in enumerate(models):
        assert (float(pool.domain[k]), float(pool.task[k])) == pytest.approx(differences(e), rel=1e-9)
    assert Osborn().score_set(models) == pytest.approx(slow(models), rel=1e-9)
    assert terms(models[0], unit=True) == pytest.approx(differences(divided(models[0])), rel=1e-9)


def divided(e: Evidence) -> Evidence:
    assert e.source is not None
    size = float(e.source.features.norm(dim=1).square().mean().sqrt())
    return replace(e, features=e.features / size, source=replace(e.source, features=e.source.features / size))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(3, 9), own=st.integers(4, 9), d=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_bounds_for_any_shape(n, own, d, seed):
    models = [model(seed + k, n, own, d) for k in range(2)]
    pool = Osborn().pool(models)
    for k, e in enumerate(models):
        assert float(pool.domain[k]) == pytest.approx(differences(e)[0], rel=1e-9)  # small couplings may tie in W_T
    assert bool((pool.domain >= 0).all())
    assert bool(((pool.task >= 0) & (pool.task <= math.log(4) + 1e-12)).all())  # known answer 3
    assert bool((pool.cohesion >= 0).all())
    assert bool((pool.cohesion == pool.cohesion.T).all())
    assert pool.cohesion.diag().tolist() == [0, 0]


@pytest.mark.parametrize("n", [5, 60, 250])
def test_assignment_and_network_simplex_agree(n):
    import ot

    g = torch.Generator().manual_seed(n)
    cost = squared_distances(*torch.randn(2, n, 8, generator=g))
    found = transport(cost)
    weights = np.full(n, 1 / n)
    assert torch.allclose(found, torch.from_numpy(ot.emd(weights, weights, cost.numpy())), atol=1e-15)


def test_1_the_same_examples_are_at_no_distance():
    e = model(0, 40, 40)
    same = replace(e, source=Evidence(features=e.features, labels=e.labels))
    assert terms(same) == pytest.approx((0, 0), abs=1e-10)
    assert torch.equal(transport(squared_distances(e.features, e.features)), torch.eye(40).double() / 40)
    assert terms(replace(same, labels=e.labels.roll(1)))[1] > 0.1


def test_2_a_shift_costs_its_squared_length():
    e = model(1, 40, 40, 5)
    assert e.source is not None
    e = replace(e, features=e.source.features + 2, labels=e.source.labels, logits=torch.zeros(40, 2))
    assert terms(e)[0] == pytest.approx(20, rel=1e-12)


def test_3_labels_that_follow_the_transport_cost_nothing_and_independent_ones_their_entropy():
    x = 100.0 * torch.eye(4)[torch.arange(24) % 4] + torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    logits, own = torch.zeros(24, 2), torch.arange(24) % 4
    e = Evidence(features=x + 0.1, labels=own, logits=logits, source=Evidence(features=x, labels=own))
    assert terms(e)[1] == pytest.approx(0, abs=1e-12)
    merged = replace(e, labels=own // 2)  # two source classes go to each target class
    assert terms(merged)[1] == pytest.approx(math.log(2), rel=1e-12)
    assert terms(merged, direction="target given source")[1] == pytest.approx(0, abs=1e-12)
    split = replace(e, source=Evidence(features=x, labels=own // 2))
    assert terms(split)[1] == pytest.approx(0, abs=1e-12)
    assert terms(split, direction="target given source")[1] == pytest.approx(math.log(2), rel=1e-12)
    independent = replace(e, labels=torch.arange(24) // 4 % 2)  # each source class half and half, or a third
    table = Counter(zip(own.tolist(), independent.labels.tolist(), strict=True))  # type: ignore[union-attr]
    assert set(table.values()) == {3}
    assert terms(independent)[1] == pytest.approx(math.log(4), rel=1e-12)  # H(source), the most there is


def test_4_cohesion_of_copies_renamed_copies_and_a_constant():
    g = torch.Generator().manual_seed(4)
    said = torch.randint(5, (200,), generator=g)
    joint = joint_entropies(torch.stack([said, said, (3 * said + 2) % 5, torch.full_like(said, 3)]))
    own = left_unsaid(said.tolist(), [0] * 200)
    given = joint - joint.diag()  # H(i|j)
    assert given[:3, :3].abs().max() < 1e-12
    assert given[3, :3].abs().max() < 1e-12
    assert given[:3, 3].tolist() == pytest.approx([own] * 3, rel=1e-12)
    onehot = torch.eye(5)
    models = [replace(model(0, 200), logits=onehot[s]) for s in (said, (said + 1) % 5, torch.zeros_like(said))]
    cohesion = Osborn(weights=(0.0, 0.0, 1.0)).pool(models)
    assert cohesion.score([0, 1]) == pytest.approx(0, abs=1e-12)
    assert cohesion.score([0, 2]) == cohesion.score([2, 1]) == pytest.approx(-own, rel=1e-12)


def six(seed: int = 0, standardised: bool = True) -> Pool:
    pool = Osborn().pool([model(10 * seed + k, 40, 40) for k in range(6)])
    return pool.standardised() if standardised else pool


def gain(pool: Pool, models: set[int], one: int) -> float:
    return pool.score([*models, one]) - (pool.score(list(models)) if models else 0.0)


@pytest.mark.parametrize("standardised", [False, True])
def test_5_gains_only_fall(standardised):
    pool = six(0, standardised)
    everyone = range(6)
    nested = [set(s) for size in range(6) for s in itertools.combinations(everyone, size)]
    for small, large in itertools.product(nested, nested):
        if small <= large:
            for one in set(everyone) - large:
                assert gain(pool, large, one) <= gain(pool, small, one) + 1e-12
    assert gain(pool, {0, 1, 2}, 3) < gain(pool, set(), 3) - 0.1
    centred = replace(pool, cohesion=pool.cohesion - 10)  # what the card warns of
    assert gain(centred, {0, 1, 2}, 3) > gain(centred, set(), 3)


def test_6_it_is_not_monotone_and_all_models_come_in_the_order_of_falling_gains():
    pool = six()
    sets = [set(s) for size in range(6) for s in itertools.combinations(range(6), size)]
    gains = [gain(pool, s, one) for s in sets for one in set(range(6)) - s]
    assert min(gains) < 0 < max(gains)
    order = pool.select(6)
    assert sorted(order) == list(range(6))
    taken = [gain(pool, set(order[:k]), one) for k, one in enumerate(order)]
    assert taken == sorted(taken, reverse=True)
    for k, one in enumerate(order):
        rest = set(range(6)) - set(order[:k])
        assert one == max(rest, key=lambda m, k=k: gain(pool, set(order[:k]), m))


def test_7_one_model_scores_its_two_differences():
    e = model(7)
    assert Osborn().score_set([e]) == pytest.approx(-math.fsum(differences(e)), rel=1e-9)


def test_8_turning_and_shifting_change_nothing_and_scale_enters_squared():
    e = model(8, 30, 25)
    assert e.source is not None
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    domain, task = terms(e)
    for change, factor in ((lambda x: x @ turn, 1), (lambda x: x + 1000, 1), (lambda x: 3 * x, 9)):
        changed = replace(e, features=change(e.features), source=replace(e.source, features=change(e.source.features)))
        assert terms(changed) == pytest.approx((factor * domain, task), rel=1e-9)


def test_subsets_score_as_sets_and_weights_multiply_the_terms():
    models = [model(k) for k in range(5)]
    pool = Osborn(weights=(0.5, 2.0, 3.0)).pool(models)
    subsets = list(itertools.combinations(range(5), 3))
    found = pool.scores(subsets)
    for subset, value in zip(subsets, found.tolist(), strict=True):
        e = [models[m] for m in subset]
        parts = [Osborn(weights=w).score_set(e) for w in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))]
        assert value == pytest.approx(0.5 * parts[0] + 2 * parts[1] + 3 * parts[2], rel=1e-9)
    sums = np.array([[float(t) for t in pool.terms([s])[0]] for s in subsets])
    expected = -((sums - sums.mean(0)) / sums.std(0)) @ [0.5, 2, 3]
    assert pool.scores(subsets, standardise=True).tolist() == pytest.approx(expected.tolist(), rel=1e-9)


def test_select_standardises_and_adds_the_least_each_time():
    models = [model(k) for k in range(7)]
    raw = Osborn().pool(models)
    domain, task = ((t.numpy() - t.numpy().mean()) / t.numpy().std() for t in (raw.domain, raw.task))
    pairs = raw.cohesion.numpy() / raw.cohesion.numpy()[np.triu_indices(7, 1)].std()
    chosen: list[int] = []
    for _ in range(4):
        rest = [m for m in range(7) if m not in chosen]
        chosen.append(min(rest, key=lambda m: domain[m] + task[m] + sum(pairs[m, c] for c in chosen)))
    assert Osborn().select(models, k=4) == tuple(chosen)
    assert Osborn().select(models) == tuple(chosen[:3])
    narrow = [replace(e, features=e.features / 50, source=replace(e.source, features=e.source.features / 50)) for e in models]  # fmt: skip
    assert Osborn().select(narrow, k=4) == tuple(chosen)  # a unit common to all changes nothing


def test_a_term_that_is_the_same_for_all_counts_nothing():
    pool = Pool(domain=torch.tensor([0.1] * 3).double(), task=torch.tensor([2.0, 1, 3]).double(),
                cohesion=0.3 * (1 - torch.eye(3).double())).standardised()  # fmt: skip
    assert pool.select(3) == (1, 0, 2)
    assert pool.domain.tolist() == [0, 0, 0]
    assert Osborn().select([model(0)], k=1) == (0,)


def test_copies_are_rewarded_and_distinct_drops_them():
    first, second = model(0), model(1)
    assert first.logits is not None
    renamed = replace(first, logits=first.logits[:, [1, 2, 3, 0]])
    nearly = first.logits.clone()
    nearly[0] = nearly[0].roll(1)  # 29 of 30
    zoo = [first, renamed, second, replace(first, logits=nearly)]
    assert Osborn().score_set([first, renamed]) == pytest.approx(2 * Osborn().score_set([first]), rel=1e-9)
    assert distinct(zoo) == (0, 2)
    assert distinct(zoo, agreement=0.98) == (0, 2, 3)
    assert distinct(zoo[::-1]) == (0, 1)
    assert distinct([second, first]) == (0, 1)
    with pytest.raises(Refused, match="0 < agreement <= 1"):
        distinct(zoo, agreement=0)


def test_a_collapsed_model_wins_on_domain():
    good, collapsed = model(0, 40, 40), model(1, 40, 40)
    assert collapsed.source is not None
    tiny = replace(collapsed, features=collapsed.features * 1e-3,
                   source=replace(collapsed.source, features=collapsed.source.features * 1e-3))  # fmt: skip
    assert terms(tiny)[0] < 1e-3 * terms(good)[0]
    assert terms(tiny, unit=True)[0] == pytest.approx(terms(collapsed, unit=True)[0], rel=1e-9)


def test_rows_are_drawn_with_equal_classes_the_same_for_all_models():
    models = [model(k, 300, 200) for k in range(3)]
    assert models[0].labels is not None
    few = Osborn(examples=60).pool(models)
    assert few.domain.tolist() == Osborn(examples=60).pool(models).domain.tolist()
    assert few.domain.tolist() != Osborn(examples=60, seed=1).pool(models).domain.tolist()
    assert not torch.equal(few.cohesion, Osborn().pool(models).cohesion)
    counts = torch.bincount(models[0].labels)
    assert counts[0] > 2.5 * counts[1:].max()
    flat = replace(models[0], logits=torch.eye(4)[models[0].labels])  # says the label: its entropy shows the draw
    constant = replace(models[0], logits=torch.zeros(300, 4))
    shown = Osborn(weights=(0.0, 0.0, 1.0), examples=60).score_set([flat, constant])
    assert -shown == pytest.approx(math.log(3), rel=1e-9)  # 20 of each


@pytest.mark.parametrize("outlier", [0, 1000])
def test_sinkhorn_nears_the_exact_cost_from_above_without_warnings(outlier):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 6, generator=g), torch.randn(170, 6, generator=g) + 0.3
    x[0] += outlier  # exp(-cost / regularisation) of its whole row is 0
    cost = squared_distances(x, y)
    exact = float((transport(cost) * cost).sum())
    last = math.inf
    for regularisation in (0.1, 0.02):
        coupling = transport(cost, exact=0, regularisation=regularisation)
        assert torch.allclose(coupling.sum(1), torch.tensor(1 / 200).double(), atol=1e-6)
        assert torch.allclose(coupling.sum(0), torch.tensor(1 / 170).double(), atol=1e-6)
        found = float((coupling * cost).sum())
        assert exact < found < last
        last = found
    assert last < exact * 1.1
    e = model(0, 40, 50)
    assert terms(e, exact=49)[0] > terms(e)[0] == terms(e, exact=50)[0]


def test_refusals_say_what_to_do(monkeypatch):
    e = model(0, 30, 40)
    assert e.source is not None
    assert e.labels is not None
    with pytest.raises(Refused, match=r"none in model 1\. .*ELEEP or MSLEEP"):
        Osborn().score_set([e, replace(e, source=None)])
    with pytest.raises(Refused, match="same examples"):
        Osborn().select([e, replace(e, labels=e.labels.roll(1))])
    with pytest.raises(Refused, match="labels"):
        Osborn().score_set([replace(e, source=replace(e.source, labels=None))])
    with pytest.raises(Refused, match="two classes"):
        Osborn().score_set([replace(e, source=Evidence(features=e.source.features, labels=torch.zeros(40).long()))])
    with pytest.raises(Refused, match="logits"):
        Osborn().score_set([replace(e, logits=None)])
    for k in (0, 3):
        with pytest.raises(Refused, match="1 <= k <= 2"):
            Osborn().select([e, e], k=k)
    pool = Osborn().pool([e, e])
    for subset in ([], [0, 0], [2], [-1]):
        with pytest.raises(Refused, match=r"different models of 0\.\.1"):
            pool.score(subset)
    with pytest.raises(Refused, match="one size"):
        pool.scores([[0], [0, 1]], standardise=True)
    x, y = torch.randn(2, 50, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(Refused, match="marginals"):
        transport(squared_distances(1e3 * x**3, y[:40]), exact=0, regularisation=1e-6)
    monkeypatch.setattr("headstart.choose.transport.find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"headstart\[ot\]"):
        Osborn().score_set([e])
    assert math.isfinite(Osborn().score_set([model(0, 30, 30)]))  # one size needs no POT
