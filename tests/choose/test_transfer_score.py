"""Transfer Score: its known answers, slow restatements of its parts, the saturation rule, and runs that are followed."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from torch import nn

from headstart.choose import TransferScore
from headstart.choose.epochs import Follow, Saturation, saturated
from headstart.choose.transfer_score import _nearest, uniformity
from headstart.core.evidence import Evidence
from headstart.core.loop import fit
from headstart.core.plan import Plan, sgd
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.core.validate import Refused
from headstart.testing.contract import checks_of
from headstart.testing.material import digits, sample_evidence, small_model
from headstart.testing.subject import Kind, Subject


def head_of_width(d: int, classes: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(classes, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bad_inputs(_subject):
    e = sample_evidence()
    one = Evidence(features=e.features, logits=e.logits[:, :1])
    return {
        "one class": (one, head_of_width(5, 1)),
        "no logits": (Evidence(features=e.features), head_of_width(5)),
        "one example": (e.take(torch.arange(1)), head_of_width(5)),
        "a head of another width": (e, head_of_width(6)),
        "a head of other classes": (e, head_of_width(5, 3)),
        "a head that is a vector": (e, head_of_width(5)[0]),
        "a class without weights": (e, head_of_width(5) * torch.tensor([[1], [0], [1], [1]])),
        "NaN in the head": (e, head_of_width(5) / 0 * 0),
        "probabilities": (Evidence(features=e.features, logits=e.logits.softmax(1)), head_of_width(5)),
    }


# no kind of `contract`: a score that needs the head beside the evidence
KIND = Kind(
    name="score with a head", inputs=lambda _s, dtype: (sample_evidence(dtype=dtype), head_of_width(5).to(dtype)),
    use=lambda method, given: asdict(method.of(*given)), bad=bad_inputs, spoiled=lambda _s: None, checks=(),
    follows=False,
)  # fmt: skip
SUBJECT = Subject(make=TransferScore, kind=KIND)


@pytest.mark.parametrize("check", checks_of(SUBJECT), ids=lambda check: check.name)
def test_contract(check):
    check.run(SUBJECT)


@pytest.mark.parametrize("settings", [{"draws": 0}, {"share": 0.0}, {"share": 1.0}, {"batch": 1}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(Refused):
        TransferScore(**settings)


def simplex(classes: int) -> torch.Tensor:
    return torch.eye(classes, dtype=torch.float64) - 1 / classes


def test_1_uniformity_of_known_heads():
    assert uniformity(simplex(10)) == pytest.approx(0, abs=1e-12)
    assert uniformity(torch.eye(10)) == pytest.approx((math.pi / 2 - math.acos(-1 / 9)) ** 2, rel=1e-9)
    assert uniformity(torch.eye(10)) == pytest.approx(0.0123968, abs=5e-8)
    assert uniformity(torch.ones(10, 12)) == pytest.approx(math.acos(-1 / 9) ** 2, abs=1e-6)
    assert uniformity(torch.tensor([[1.0, 2.0], [-2.0, -4.0]])) == pytest.approx(0, abs=1e-12)


def test_2_uniformity_keeps_scales_and_rotations_but_not_signs():
    w = head_of_width(9, 6)
    turn = torch.linalg.qr(head_of_width(9, 9, seed=1)).Q
    assert uniformity(torch.arange(1.0, 7)[:, None] * w @ turn) == pytest.approx(uniformity(w), rel=1e-10)
    flipped = torch.tensor([-1.0, 1, 1, 1, 1, 1])[:, None] * w
    assert abs(uniformity(flipped) - uniformity(w)) > 1e-3


@pytest.mark.parametrize(("classes", "d"), [(2, 1), (3, 7), (12, 11), (40, 64)])
def test_uniformity_equals_its_definition_pair_by_pair(classes, d):
    w = head_of_width(d, classes).numpy()
    ideal, gaps = math.acos(-1 / (classes - 1)), []
    for i in range(classes):
        for j in range(classes):
            if i != j:
                cosine = w[i] @ w[j] / np.sqrt((w[i] @ w[i]) * (w[j] @ w[j]))
                gaps.append((math.acos(min(max(cosine, -1), 1)) - ideal) ** 2)
    assert uniformity(torch.from_numpy(w)) == pytest.approx(math.fsum(gaps) / len(gaps), rel=1e-9, abs=1e-12)


def test_more_classes_than_a_simplex_has_corners_warn():
    with pytest.warns(UserWarning, match="4 classes cannot spread evenly in 2"):
        assert uniformity(torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])) > 0.1
    assert uniformity(torch.tensor([[1.0, 0], [-1, 3**0.5], [-1, -(3**0.5)]])) == pytest.approx(0, abs=1e-12)


def clusters(n: int, d: int, count: int, spread: float, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(count, d, generator=g, dtype=torch.float64)
    return centres[torch.arange(n) % count] + spread * torch.randn(n, d, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("d", [2, 16, 64, 256])
def test_3_hopkins_of_even_features_is_a_half_and_of_tight_clusters_above_nine_tenths(d):
    even = torch.rand(2000, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    assert TransferScore().hopkins(even) == pytest.approx(0.5, abs=0.02)
    assert TransferScore().hopkins(clusters(2000, d, 8, 0.01)) > 0.9


@pytest.mark.parametrize(("d", "expected"), [(2, 0.76), (16, 0.66), (64, 0.62), (256, 0.61)])
def test_one_blob_scores_what_the_documentation_warns_of(d, expected):
    blobs = [
        np.mean([TransferScore().hopkins(clusters(n, d, 1, 1.0, seed)) for seed in range(6)]) for n in (1000, 4000)
    ]
    near = 0.06 if d == 2 else 0.025  # one cloud of 1,000 strays from their mean by 0.03 at d = 2, by 0.006 at 16
    assert blobs[0] == pytest.approx(expected, abs=near)
    assert blobs[1] > blobs[0] + 0.02  # more of the same blob: the box grows with its outliers


def test_3_one_point_is_a_half_and_warns():
    with pytest.warns(UserWarning, match="same point"):
        assert TransferScore().hopkins(torch.full((30, 4), 0.1)) == 0.5
    two = torch.tensor([[0.0, 1.0], [3.0, 1.0]]).repeat(20, 1)  # every example has a twin at distance 0
    assert TransferScore().hopkins(two) == 1.0


@pytest.mark.parametrize("n", [2, 3, 10, 11, 19, 20, 500])
def test_hopkins_equals_a_tree_on_the_same_draws_for_any_count(n):
    for d, power in ((1, False), (3, False), (3, True), (30, False)):
        x, g, found = clusters(n, d, 3, 0.3, seed=n), torch.Generator().manual_seed(5), []
        tree, m, low, high = cKDTree(x.numpy()), min(max(n // 20, 10), n - 1), x.amin(0), x.amax(0)
        for _ in range(4):
            rows = torch.randperm(n, generator=g)[:m]
            places = low + (high - low) * torch.rand(m, d, generator=g, dtype=torch.float64)
            u = tree.query(places.numpy())[0] ** (d if power else 1)
            w = tree.query(x[rows].numpy(), k=2)[0][:, 1] ** (d if power else 1)
            found.append(u.sum() / (u.sum() + w.sum()))
        score = TransferScore(draws=4, seed=5, by_dimension=power)
        assert score.hopkins(x) == pytest.approx(np.mean(found), rel=1e-9)


@pytest.mark.parametrize("scale", [1e-150, 1e-3, 1e8, 1e150])
def test_hopkins_does_not_see_scale_shift_or_dead_features(scale):
    x = clusters(200, 6, 4, 0.1)
    expected = TransferScore().hopkins(x)
    assert TransferScore().hopkins(scale * x) == pytest.approx(expected, rel=1e-9)
    assert TransferScore().hopkins(x + 1e4) == pytest.approx(expected, rel=1e-9)
    dead = torch.cat([torch.zeros(200, 2), x, torch.full((200, 3), 0.1)], 1)
    assert TransferScore().hopkins(dead) == expected


def test_the_printed_power_neither_overflows_nor_tells_anything_in_many_dimensions():
    blob, tight = clusters(400, 256, 1, 1.0), clusters(400, 256, 8, 1e-3)
    for x in (blob, tight):
        assert TransferScore(by_dimension=True).hopkins(x) == pytest.approx(1, abs=1e-6)
    assert TransferScore().hopkins(blob) < 0.7 < 0.99 < TransferScore().hopkins(tight)


def test_neighbours_in_chunks_are_those_of_one_piece_and_exact(monkeypatch):
    x = clusters(300, 8, 5, 1e-3)
    rows = torch.arange(0, 300, 7)
    whole = _nearest(x[rows], x, rows)
    direct = (x[rows][:, None] - x).norm(dim=2)
    direct[torch.arange(len(rows)), rows] = math.inf
    torch.testing.assert_close(whole, direct.amin(1), rtol=1e-12, atol=0)
    cut, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: cut.append(len(a[1])) or addmm(*a, **k))
    wide = torch.cat([x, torch.full((2**22, 8), 9.0, dtype=torch.float64)])  # 2^24 / n: three rows at once
    assert torch.equal(_nearest(x[rows][:7], wide, rows[:7]), whole[:7])
    assert cut == [3, 3, 1]


def mutual_information(p: np.ndarray) -> float:
    def entropy(q):
        return -math.fsum(v * math.log(v) for v in q if v > 0)

    return entropy(p.mean(0)) - math.fsum(entropy(row) for row in p) / len(p)


@pytest.mark.parametrize(("n", "classes", "scale"), [(40, 2, 1), (50, 10, 8), (7, 31, 3), (30, 4, 900), (64, 5, 1e-4)])
def test_information_equals_its_definition(n, classes, scale):
    logits = scale * torch.randn(n, classes, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    logits[: n // 2, 0] += 2 * scale  # imbalanced
    p = logits.softmax(1).numpy()
    expected = mutual_information(p) / math.log(classes)
    assert TransferScore().information(logits) == pytest.approx(expected, rel=1e-9, abs=1e-15)
    batches = [p[k : k + 8] for k in range(0, n, 8)]
    mean = sum(len(b) * mutual_information(b) for b in batches) / n / math.log(classes)
    assert TransferScore(batch=8).information(logits) == pytest.approx(mean, rel=1e-9, abs=1e-15)


def test_4_information_of_known_predictions():
    sure = 1e3 * torch.eye(5).repeat(6, 1)
    assert TransferScore().information(sure) == pytest.approx(1, rel=1e-12)
    assert TransferScore().information(sure[:1].repeat(9, 1)) == pytest.approx(0, abs=1e-12)
    assert TransferScore().information(torch.zeros(9, 5)) == pytest.approx(0, abs=1e-12)


def test_5_the_ideal_model_comes_near_two_from_below():
    labels, found = torch.arange(200) % 10, []
    for spread in (0.1, 0.01, 0.001):
        noise = spread * torch.randn(200, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        e = Evidence(features=simplex(10)[labels] + noise, logits=1e3 * simplex(10)[labels])
        found.append(TransferScore().of(e, simplex(10)).score)
    assert found == sorted(found)
    assert 1.99 < found[-1] < 2


def test_6_a_constant_sequence_is_saturated_at_its_first_window():
    assert saturated([1.5] * 6) == Saturation(epoch=0, saturated=True)
    assert saturated([0.2, 1.0, 1.5, 1.501, 1.502, 1.9]) == Saturation(epoch=4, saturated=True)
    assert saturated([0.2, 1.0, 0.4, 0.9]) == Saturation(epoch=1, saturated=False)
    assert saturated([0.5, 0.5]) == Saturation(epoch=0, saturated=False)  # fewer than a window
    # 1, 1.03, 1: deviation 0.01414 of a mean 1.01, which is 0.0140
    assert saturated([1, 1.03, 1], threshold=0.0141).saturated
    assert not saturated([1, 1.03, 1], threshold=0.0139).saturated


def test_saturation_of_scores_around_zero_and_below():
    assert saturated([-1.5] * 3) == Saturation(epoch=0, saturated=True)
    assert saturated([-1.0, 0.0, 1.0]) == Saturation(epoch=2, saturated=False)
    assert saturated([0.0, 0.0, 0.0]) == Saturation(epoch=0, saturated=False)
    assert saturated([-1.0, -0.2, -0.6]) == Saturation(epoch=1, saturated=False)  # a bare std / mean would be < 0


@pytest.mark.parametrize(
    ("scores", "choices"),
    [([], {}), ([1.0, math.nan], {}), ([1.0], {"window": 1}), ([1.0], {"threshold": 0}), ([math.inf], {}),
     ([1.0], {"threshold": math.nan})],
)  # fmt: skip
def test_saturation_refuses(scores, choices):
    with pytest.raises(Refused):
        saturated(scores, **choices)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 48), batch=st.integers(2, 12), classes=st.integers(2, 8), scale=st.floats(0, 40),
       seed=st.integers(0, 999))  # fmt: skip
def test_7_information_of_the_whole_is_at_least_that_of_batches(n, batch, classes, scale, seed):
    logits = 2 + scale * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))
    whole, parts = (TransferScore(batch=b).information(logits) for b in (None, batch))
    assert 0 <= parts <= whole + 1e-12 <= 1 + 2e-12


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 40), d=st.integers(1, 20), kinds=st.integers(1, 40), seed=st.integers(0, 999),
       dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))  # fmt: skip
def test_the_score_is_finite_and_below_two_whatever_the_features(n, d, kinds, seed, dtype):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(kinds, d, generator=g)[torch.arange(n) % kinds].relu()  # twins and dead features
    features[0, 0] = 1
    features[1:, 0] = 0  # so that not all are one point
    e = Evidence(features=features.to(dtype), logits=4 + torch.randn(n, 2, generator=g).to(dtype))
    scored = TransferScore().of(e, torch.randn(2, d, generator=g).to(dtype))
    assert all(type(value) is float for value in asdict(scored).values())
    assert 0 <= scored.hopkins <= 1
    assert 0 <= scored.information <= 1
    assert -(math.pi**2) <= scored.score <= 2  # two classes of one direction
    assert scored.score == scored.hopkins + scored.information - scored.uniformity


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_are_refused_in_every_precision_and_their_logarithms_are_not(dtype):
    logits = 3 * torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    with pytest.raises(Refused, match="softmax"):
        TransferScore().information(logits.to(dtype).softmax(1))
    logs = TransferScore().information(logits.double().log_softmax(1))
    assert logs == pytest.approx(TransferScore().information(logits), rel=1e-9)


def test_one_pass_of_a_model_gives_what_its_parts_give():
    model, (x, _) = small_model(), digits()
    model.train()
    whole = TransferScore().of_model(model, x[:300].split(64))
    features = model[:-1](x[:300]).detach()
    by_hand = TransferScore().of(Evidence(features=features, logits=model[-1](features).detach()), model[-1].weight)
    assert asdict(whole) == pytest.approx(asdict(by_hand), rel=1e-5)
    assert model.training
    with pytest.raises(Refused, match="never ends"):
        TransferScore().of_model(model, Batches(x=x))
    with pytest.raises(Refused, match="linear"):
        TransferScore().of_model(model, [x], head="bend")


def plan_of(steps: int, model: nn.Module | None = None) -> Plan:
    x, y = digits()
    with seeded(0):
        model = model or nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3),
                                       nn.Linear(16, 10))  # fmt: skip
    return Plan(model=model, stream=Batches(x=x[:256], y=y[:256]), steps=steps, optimizer=sgd(0.1))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def listed(scores, seen):
    """A score that plays back `scores`, draws random numbers, forwards the model, and keeps the weights it was shown."""

    def score(model):
        torch.rand(3)
        assert not model.training
        assert not model(digits()[0][:8]).requires_grad
        seen.append(weights(model))
        return scores[len(seen) - 1]

    return score


@pytest.mark.parametrize(
    ("scores", "epoch"),
    [([0.1, 0.5, 0.3, 0.2, 0.4], 1), ([0.1, 0.2, 0.3, 0.5, 0.9], 4), ([0.1, 1.0, 1.001, 1.0, 5.0], 2),
     ([1.001, 1.0, 1.0, 5.0, 9.0], 0)],
)  # fmt: skip
def test_a_followed_run_gives_back_the_chosen_epoch_and_trains_as_it_would(scores, epoch):
    seen, plan = [], plan_of(16)
    follow = Follow(listed(scores, seen), every=3)
    given = fit(follow.within(plan), seed=1).model
    assert follow.scores == scores
    assert follow.choice.epoch == epoch
    assert len(follow._kept) <= 3
    for name, value in given.state_dict().items():
        assert torch.equal(value, seen[epoch][name]), name
    alone: list[dict[str, torch.Tensor]] = []
    fit(replace(plan, after_step=(lambda step: alone.append(weights(step.model)),)), seed=1)
    for k in range(5):
        for name, value in seen[k].items():
            assert torch.equal(value, alone[3 * k + 2][name]), f"epoch {k}: {name}"


def test_a_followed_run_resumes_with_its_memory(tmp_path):
    scores, whole = [0.1, 0.9, 0.3, 0.5, 0.2], []
    expected = fit(Follow(listed(scores, whole), every=3).within(plan_of(15)), seed=1).model

    class Killed(Exception):
        pass

    def stop(done, _of):
        if done == 8:
            raise Killed

    path = tmp_path / "state"
    with pytest.raises(Killed):
        fit(Follow(listed(scores, []), every=3).within(plan_of(15)), seed=1, checkpoint=path, every=7, progress=stop)
    again = Follow(listed(scores[2:], []), every=3)
    resumed = fit(again.within(plan_of(15)), seed=1, checkpoint=path, resume=True, every=7).model
    assert again.scores == scores
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name


def test_frozen_weights_are_not_copied():
    plan = plan_of(4)
    plan.model[1].requires_grad_(False)
    follow = Follow(lambda _model: 1.0, every=2)
    fit(follow.within(plan))
    assert all("1.weight" not in kept and "5.weight" in kept for kept in follow._kept.values())


def test_the_transfer_score_itself_can_be_followed():
    x, _ = digits()
    follow = Follow(lambda model: TransferScore().of_model(model, x[:200].split(50)).score, every=20)
    model = fit(follow.within(plan_of(60))).model
    assert follow.scores[-1] > follow.scores[0]
    assert TransferScore().of_model(model, [x[:200]]).score == pytest.approx(max(follow.scores), rel=1e-6)


def test_follow_refuses():
    with pytest.raises(Refused, match="every"):
        Follow(lambda _m: 1.0, every=0)
    with pytest.raises(Refused, match="window"):
        Follow(lambda _m: 1.0, every=1, window=1)
    with pytest.raises(Refused, match="epoch of 9 steps"):
        Follow(lambda _m: 1.0, every=9).within(plan_of(8))
    follow = Follow(lambda _m: 1.0, every=2)
    fit(follow.within(plan_of(2)))
    with pytest.raises(Refused, match="one run"):
        follow.within(plan_of(2))
    with pytest.raises(Refused, match="surgery"):
        follow.restore(nn.Linear(2, 2))
    with pytest.raises(Refused, match="finite"):
        fit(Follow(lambda _m: math.nan, every=1).within(plan_of(2)))
