"""Generated weights: known answers, a zoo that is learned, what stays untouched, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw, cosine
from headstart.core.rng import random_state, seeded
from headstart.core.stream import Batch
from headstart.core.validate import Refused
from headstart.merge import D2NWG, Judged, Layout, WeightZoo, best_of, quality
from headstart.merge.d2nwg import Squeeze, alignment
from headstart.merge.weight_generator import pick
from headstart.merge.weight_zoo import by_class
from headstart.nets.weight_vae import WeightVAE
from headstart.testing.every import paper_complete
from headstart.testing.subject import Subject

FAST = D2NWG(shots=2, steps=(20, 10, 20), batch_size=16)
LABELS = torch.tensor([0, 1, 0, 1, 0, 1])


def some(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small_zoo(count=6, dtype=torch.float32, **options):
    zoo = WeightZoo(**options)
    for k in range(count):
        zoo.add({"w": some(2, 3, seed=k, dtype=dtype), "seen": torch.tensor(k)}, some(6, 4, seed=50 + k), LABELS)
    return zoo


@pytest.fixture(scope="module")
def learned():
    """Weights that are the class means of their data, 2 classes in 3 dimensions."""
    zoo = WeightZoo(keep=10)
    labels = torch.arange(20) % 2
    for k in range(200):
        means = some(2, 3, seed=k)
        zoo.add({"w": means * 0.01, "b": torch.ones(1)}, means[labels] + 0.1 * some(20, 3, seed=1000 + k), labels)
    return D2NWG(shots=3, latent=6, hidden=64, width=64, steps=(600, 0, 1000)).fit(zoo, device="cpu"), labels


# known answers


@pytest.mark.parametrize("latent", [2, 6])
def test_a_linear_autoencoder_without_divergence_leaves_the_variance_that_pca_leaves(latent):
    x = some(64, 6, dtype=torch.float64) @ some(6, 6, seed=1, dtype=torch.float64)
    x = ((x - x.mean(0)) / x.std()).float()
    with seeded(0):
        vae = WeightVAE(6, latent, hidden=0)
    plan = Plan(model=vae, stream=[Batch(x)], terms={"task": Squeeze(0.0)}, steps=800, optimizer=adamw(5e-2),
                schedule=cosine)  # fmt: skip
    error = F.mse_loss(fit(plan, device="cpu").model(x)[0], x).item()
    discarded = torch.linalg.svdvals(x.double())[latent:].square().sum().item() / x.numel()
    assert discarded - 1e-5 <= error <= discarded * 1.01 + 1e-3


names = st.lists(st.text("abc.", min_size=1, max_size=4), min_size=1, max_size=4, unique=True)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64])
shapes = st.lists(st.integers(0, 3), max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.data(), names, st.integers(1, 9) | st.none())
def test_flatten_and_back_changes_no_bit_and_padding_stays_outside(data, names, chunk):
    weights = {}
    for name in names:
        dtype, shape = data.draw(dtypes), data.draw(shapes)
        weights[name] = (1000 * some(*shape, seed=len(name), dtype=torch.float64)).to(dtype)
    count = sum(t.numel() for t in weights.values() if t.is_floating_point())
    if count == 0:
        with pytest.raises(Refused, match="floating"):
            Layout.of(weights, chunk)
        return
    layout = Layout.of(weights, chunk)
    pieces = layout.flatten(weights)
    assert pieces.numel() - count < pieces.shape[1]
    pieces.view(-1)[count:] = torch.nan  # whatever stands in the padding
    again = layout.unflatten(pieces)
    assert list(again) == [n for n in weights if weights[n].is_floating_point()] + list(layout.kept)
    for name, tensor in weights.items():
        assert again[name].dtype == tensor.dtype
        assert again[name].shape == tensor.shape
        assert torch.equal(again[name], tensor)


def test_alignment_of_identical_orthogonal_rows_is_the_entropy_of_a_target():
    n, s = 4, 1.3
    same = s * torch.eye(n, dtype=torch.float64)
    hit, miss = math.exp(s * s), 1.0
    total = hit + (n - 1) * miss
    entropy = -(hit / total * math.log(hit / total) + (n - 1) * miss / total * math.log(miss / total))
    assert alignment(same, same).item() == pytest.approx(entropy)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_alignment_equals_a_slow_restatement(tau):
    w, c = some(2, 5, 3, dtype=torch.float64)
    logits, target = torch.zeros(2, 5, 5, dtype=torch.float64)
    for i in range(5):
        for j in range(5):
            logits[i, j] = (w[i] * c[j]).sum() / tau
            target[i, j] = math.exp(((c[i] * c[j]).sum() + (w[i] * w[j]).sum()) / 2 * tau)
        target[i] /= target[i].sum()
    loss = 0.0
    for i in range(5):
        for j in range(5):
            loss -= (target[i, j] * math.log(logits[i].exp()[j] / logits[i].exp().sum())).item() / 10
            loss -= (target[j, i] * math.log(logits[j, i].exp() / logits[:, i].exp().sum())).item() / 10
    assert alignment(w, c, tau).item() == pytest.approx(loss)


@pytest.mark.parametrize("condition", ["ordered", "set"])
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_zoo_of_one_model_generates_that_model(condition, chunk, dtype):
    weights = {"w": some(2, 3).to(dtype), "var": torch.tensor([0.5, 2.0]), "n": torch.tensor(7)}
    zoo = WeightZoo(chunk=chunk)
    zoo.add(weights, some(6, 4), LABELS)
    method = D2NWG(condition=condition, shots=2, steps=(5, 5, 5))
    for made in method.fit(zoo, device="cpu").generate(some(6, 4, seed=1), LABELS, n=2):
        assert {name: (t.dtype, t.tolist()) for name, t in made.items()} == {
            name: (t.dtype, t.tolist()) for name, t in weights.items()
        }


def test_the_same_generator_gives_the_same_weights_and_nothing_is_touched():
    zoo, x = small_zoo(), some(6, 4, seed=9)
    before, state = zoo.vectors(), random_state()["torch"]

    def made(seed, own):
        found = own.generate(x, LABELS, n=3, generator=torch.Generator().manual_seed(seed))
        return torch.stack([weights["w"] for weights in found])

    first, second = FAST.fit(zoo, device="cpu"), FAST.fit(zoo, device="cpu")
    assert torch.equal(made(1, first), made(1, second))
    assert not torch.equal(made(1, first), made(2, first))
    assert not torch.equal(made(1, first), made(1, FAST.fit(zoo, device="cpu", seed=1)))
    assert torch.equal(zoo.vectors(), before)
    assert torch.equal(x, some(6, 4, seed=9))
    assert torch.equal(state, random_state()["torch"])


# what it learns


def test_weights_of_unseen_data_are_those_of_the_rule_behind_the_zoo(learned):
    made_by, labels = learned
    right, wrong, free = [], [], []
    for k in range(10):
        means = some(2, 3, seed=5000 + k)
        x, other = means[labels] + 0.1 * some(20, 3, seed=6000 + k), some(20, 3, seed=7000 + k)
        for errors, seen, guidance in ((right, x, 1.0), (wrong, other, 1.0), (free, x, 0.0)):
            made = made_by.generate(seen, labels, n=4, guidance=guidance)
            errors.append(torch.stack([F.mse_loss(weights["w"] * 100, means) for weights in made]).mean().item())
            assert all(weights["b"].tolist() == [1.0] for weights in made)
    assert sum(right) < sum(wrong) / 5
    assert sum(right) < sum(free) / 5


def test_the_order_of_classes_is_the_order_of_the_rows(learned):
    made_by, labels = learned
    means = torch.tensor([[1.0, 1.0, -1.0], [-1.0, 0.5, 1.0]])
    x = means[labels] + 0.1 * some(20, 3)
    for seen, expected in ((labels, means), (1 - labels, means.flip(0))):
        w = torch.stack([weights["w"] for weights in made_by.generate(x, seen, n=8)]).mean(0) * 100
        assert F.mse_loss(w, expected) < F.mse_loss(w, expected.flip(0)) / 5


def test_without_guidance_the_data_does_not_matter():
    made_by = FAST.fit(small_zoo(), device="cpu")
    first, other, led = (made_by.generate(x, LABELS, guidance=g)[0]["w"]
                         for x, g in ((some(6, 4), 0.0), (some(6, 4, seed=3), 0.0), (some(6, 4), 1.0)))  # fmt: skip
    assert torch.equal(first, other)
    assert not torch.equal(first, led)


def test_guidance_goes_in_a_line_through_both_predictions():
    made_by = FAST.fit(small_zoo(), device="cpu")
    near, exact = (made_by.generate(some(6, 4), LABELS, guidance=g)[0]["w"] for g in (1.0 + 1e-6, 1.0))
    torch.testing.assert_close(near, exact, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(made_by.generate(some(6, 4), LABELS, guidance=4.0)[0]["w"], exact, atol=1e-3)


def test_what_is_never_negative_in_the_zoo_stays_so():
    zoo = WeightZoo()
    for k in range(6):
        zoo.add({"running_var": some(40, seed=k).abs() ** 4 + 1e-3}, some(6, 4, seed=k), LABELS)
    least = zoo.vectors().amin(0)[0]
    for made in FAST.fit(zoo, device="cpu").generate(some(6, 4), LABELS, n=20):
        assert (made["running_var"] >= least).all()


def test_integers_are_the_first_models_and_dtype_stays():
    made = FAST.fit(small_zoo(dtype=torch.float64), device="cpu").generate(some(6, 4), LABELS)[0]
    assert made["seen"] == 0
    assert made["w"].dtype == torch.float64


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(0, 3), st.integers(0, 10**6))
def test_draws_are_of_the_class_and_never_twice_the_same(shots, more, seed):
    labels = torch.cat([torch.zeros(shots + more), torch.ones(shots)]).long()
    sets = by_class(torch.arange(len(labels)).float()[:, None], labels)[None]
    drawn = pick(sets, torch.zeros(3, dtype=torch.int64), shots, torch.Generator().manual_seed(seed))
    assert drawn.shape == (3, 2, shots, 1)
    for one in drawn[..., 0]:
        assert all(labels[int(i)] == c for c, row in enumerate(one) for i in row)
        assert one.unique().numel() == 2 * shots


def test_a_zoo_keeps_some_examples_at_random():
    zoo = WeightZoo(keep=3)
    zoo.add({"w": torch.ones(2)}, torch.arange(40.0)[:, None], torch.arange(40) % 2)
    kept = zoo.entries[0][..., 0]
    assert kept.shape == (2, 3)
    assert (kept % 2 == torch.tensor([[0.0], [1.0]])).all()
    assert kept.max() > 5


def test_an_aligned_set_encoder_trains_its_projection_only_and_learns_which_weights_are_alike():
    zoo, labels = WeightZoo(), torch.arange(12) % 2
    for k in range(64):
        means = some(2, 3, seed=k)
        zoo.add({"w": means.sum(0)}, means[labels] + 0.1 * some(12, 3, seed=900 + k), labels)
    method = D2NWG(condition="set", shots=4, latent=4, hidden=32, batch_size=32, steps=(200, 100, 1))
    aligned, not_aligned = (replace(method, steps=(200, k, 1)).fit(zoo, device="cpu") for k in (100, 1))
    frozen = {name.split(".")[0]: p.requires_grad for name, p in aligned.model.encoder.named_parameters()}
    assert frozen == {"within": False, "between": False, "project": True}

    def found(made_by):
        """Share of the weights whose own data is among the six of 64 that lie nearest."""
        latent = made_by.vae.encode((made_by.vectors - made_by.mean).div(made_by.std).float().flatten(0, 1))[0]
        conditions = made_by.model.encoder((zoo.sets(4) - made_by.centre) / made_by.spread)
        best = F.normalize(latent) @ F.normalize(conditions).T
        return (best.topk(6).indices == torch.arange(64)[:, None]).any(1).float().mean().item()

    assert found(aligned) > 0.4  # by chance 6 / 64, and a random encoder already keeps some distances
    assert found(aligned) > found(not_aligned) + 0.2


# judging


def test_distances_are_in_standard_deviations():
    made_by = FAST.fit(small_zoo(), device="cpu")
    own = made_by.layout.unflatten(made_by.vectors[2])
    assert made_by.nearest(own) == 0
    moved = made_by.layout.unflatten((made_by.vectors[2] + 1e-3 * made_by.std).float())
    assert made_by.nearest(moved) == pytest.approx(1e-3, rel=1e-2)
    standard = (made_by.vectors - made_by.mean) / made_by.std
    apart = [[(a - b).square().mean().sqrt().item() for b in standard] for a in standard]
    slow = [sorted(row)[1] for row in apart]
    assert made_by.spacing() == pytest.approx(sorted(slow)[2], rel=1e-4)


def test_the_report_says_what_samples_are_worth(learned):
    made_by, labels = learned
    tasks = []
    for k in range(3):
        means = some(2, 3, seed=k)
        score = lambda weights, means=means: -F.mse_loss(weights["w"] * 100, means).item()  # noqa: E731
        own = {"w": means * 0.01, "b": torch.ones(1)}
        tasks.append(Judged(features=means[labels] + 0.1 * some(20, 3), labels=labels, score=score, trained=own))
    report = quality(made_by, tasks, n=4)
    assert report.trained == pytest.approx(0, abs=1e-9)
    assert report.trained >= report.best > report.generated
    assert -0.1 < report.reconstructed < 0
    assert 0 < report.nearest < report.spacing * 2
    assert quality(made_by, [Judged(features=t.features, labels=labels, score=t.score) for t in tasks]).trained is None
    with pytest.raises(Refused, match="task"):
        quality(made_by, [])


def test_the_best_is_the_first_of_the_best():
    found, score = best_of([{"w": torch.tensor(k)} for k in (1, 3, 3)], lambda weights: float(weights["w"]))
    assert (found["w"].item(), score) == (3, 3.0)
    with pytest.raises(Refused, match="candidate"):
        best_of([], lambda weights: 0.0)


def test_the_paper_is_named():
    paper_complete(Subject(make=D2NWG, kind=None))


# refusals


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"w": torch.ones(2, 3)}, "tensors"),
        ({"w": torch.ones(2, 3), "seen": torch.tensor(0), "b": torch.ones(1)}, "tensors"),
        ({"w": torch.ones(3, 2), "seen": torch.tensor(0)}, "'w' must be"),
        ({"w": torch.ones(2, 3).double(), "seen": torch.tensor(0)}, "'w' must be"),
        ({"w": torch.full((2, 3), torch.nan), "seen": torch.tensor(0)}, "finite"),
    ],
)
def test_weights_of_another_layout_are_refused_and_the_zoo_stays(weights, says):
    zoo = small_zoo()
    with pytest.raises(Refused, match=says):
        zoo.add(weights, some(6, 4), LABELS)
    assert len(zoo.weights) == len(zoo.entries) == 6


@pytest.mark.parametrize(
    ("features", "labels", "says"),
    [
        (some(6, 4), LABELS[:5], "one row"),
        (some(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]), "2 classes"),
        (some(6, 4), LABELS + 1, "0..c-1"),
        (some(6, 4), LABELS - 1, "0..c-1"),
        (some(6, 4), torch.tensor([0, 2, 0, 2, 0, 2]), "0..c-1"),
        (some(6, 4), LABELS * 10**12, "0..c-1"),
        (some(6, 5), LABELS, "4"),
        (torch.full((6, 4), torch.nan), LABELS, "finite"),
        (some(6), LABELS, "shape"),
        (some(6, 4), LABELS.float(), "integers"),
    ],
)
def test_data_of_another_kind_is_refused(features, labels, says):
    zoo = small_zoo()
    with pytest.raises(Refused, match=says):
        zoo.add({"w": torch.ones(2, 3), "seen": torch.tensor(0)}, features, labels)
    with pytest.raises(Refused, match=says if "classes" not in says else "classes"):
        FAST.fit(zoo, device="cpu").generate(features, labels)


def test_too_few_examples_are_refused():
    made_by = FAST.fit(small_zoo(), device="cpu")
    with pytest.raises(Refused, match="2 examples"):
        made_by.generate(some(3, 4), torch.tensor([0, 0, 1]))
    with pytest.raises(Refused, match="7 examples"):
        D2NWG(shots=7).fit(small_zoo())


def test_a_head_of_other_classes_is_refused():
    with pytest.raises(Refused, match="a row for each of 2 classes"):
        WeightZoo(head="w").add({"w": torch.ones(3, 3)}, some(6, 4), LABELS)


def test_another_extractor_is_refused():
    made_by = FAST.fit(small_zoo(extractor="mini:cnn-letters"), device="cpu")
    assert made_by.generate(some(6, 4), LABELS, extractor="mini:cnn-letters")
    for other in ("", "mini:cnn-shapes"):
        with pytest.raises(Refused, match="extractor"):
            made_by.generate(some(6, 4), LABELS, extractor=other)


def test_arguments_out_of_range_are_refused():
    for bad in ({"shots": 0}, {"drop": 1.0}, {"drop": math.nan}, {"kl": -1.0}, {"rate": 0.0}, {"condition": "order"},
                {"schedule": "cosine"}):  # fmt: skip
        with pytest.raises(Refused):
            D2NWG(**bad)
    with pytest.raises(Refused, match="zoo with weights"):
        D2NWG().fit(WeightZoo())
    made_by = D2NWG(shots=2, drop=0.0, steps=(5, 5, 5)).fit(small_zoo(), device="cpu")
    with pytest.raises(Refused, match="n >= 1"):
        made_by.generate(some(6, 4), LABELS, n=0)
    with pytest.raises(Refused, match="drop > 0"):
        made_by.generate(some(6, 4), LABELS, guidance=2.0)
    with pytest.raises(Refused, match="keep"):
        WeightZoo(keep=0)
    with pytest.raises(Refused, match="chunk"):
        Layout.of({"w": torch.ones(2)}, chunk=0)
    with pytest.raises(Refused, match="of this layout"):
        Layout.of({"w": torch.ones(2)}).unflatten(torch.ones(1, 3))
