"""Path-PKT: the survival loss by hand, the routing against loops, concordance against pairs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from headstart.choose.path_pkt import MoEPKT, Routing, SurvivalNLL
from headstart.choose.survival import binned, concordance, risk
from headstart.choose.transfer_study import TransferStudy, pooled_risk, positive_sources, zero_transfer
from headstart.core.loop import fit
from headstart.core.plan import Plan, Step, adamw
from headstart.core.rng import seeded
from headstart.core.stream import Batch
from headstart.core.validate import Refused
from headstart.nets.bags import ABMIL, padded, vectors_of
from headstart.testing import contract


def patients() -> Batch:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    return Batch(x, torch.tensor([0, 1, 2, 3, 3, 1]), {"event": torch.tensor([1.0, 0, 1, 1, 0, 0])})


def linear() -> nn.Module:
    with seeded(1):
        return nn.Sequential(nn.Linear(5, 4))


test_contract = contract(
    SurvivalNLL(), model=linear, batch=patients,
    refuses=[lambda: SurvivalNLL(alpha=2), lambda: SurvivalNLL(floor=0)],
)  # fmt: skip
test_contract_of_routing = contract(
    Routing(layer="0"), model=linear, batch=patients, refuses=[lambda: Routing(balance=-1), lambda: Routing(z=-1)]
)


def loss(hazards: list[float], bin_: int, event: float, **settings: float) -> float:
    logits = torch.tensor([hazards], dtype=torch.float64).logit()
    batch = Batch(logits, torch.tensor([bin_]), {"event": torch.tensor([event])})
    return SurvivalNLL(**settings)(Step(nn.Identity(), batch)).item()


def test_1_and_2_the_loss_by_hand():
    h = [0.1, 0.2, 0.3, 0.4]
    assert (
        loss(h, 2, 1)
        == pytest.approx(-math.log(0.9 * 0.8) - math.log(0.3), abs=1e-9)
        == pytest.approx(1.532477, abs=1e-6)
    )
    assert (
        loss(h, 2, 0) == pytest.approx(-0.5 * math.log(0.9 * 0.8 * 0.7), abs=1e-9) == pytest.approx(0.342590, abs=1e-6)
    )
    assert loss(h, 2, 0, alpha=1.0) == 0
    assert loss(h, 2, 0, alpha=0.0) == pytest.approx(-math.log(0.9 * 0.8 * 0.7))
    assert loss([1 - 1e-12] * 4, 3, 0, alpha=0.0) == pytest.approx(-math.log(1e-7))


def test_the_loss_equals_products_patient_by_patient():
    batch = patients()
    logits = linear()(batch.x).detach().double()
    h, total = logits.sigmoid(), 0.0
    for i, (j, e) in enumerate(zip(batch.y.tolist(), batch.extra["event"].tolist(), strict=True)):
        survive = [float((1 - h[i, : k + 1]).prod()) for k in range(4)]
        before = survive[j - 1] if j else 1.0
        total += -math.log(before) - math.log(float(h[i, j])) if e else -0.5 * math.log(survive[j])
    step = Step(nn.Identity(), Batch(logits, batch.y, batch.extra))
    assert SurvivalNLL()(step).item() == pytest.approx(total / 6, rel=1e-9)


def test_bad_survival_input():
    batch = patients()
    with pytest.raises(Refused, match="bins in y"):
        SurvivalNLL()(Step(linear(), Batch(batch.x)))
    with pytest.raises(Refused, match=r"0\.\.3"):
        SurvivalNLL()(Step(linear(), Batch(batch.x, batch.y + 3, batch.extra)))
    with pytest.raises(Refused, match="0 or 1"):
        SurvivalNLL()(Step(linear(), Batch(batch.x, batch.y, {"event": batch.extra["event"] * torch.nan})))
    with pytest.raises(Refused, match="0 or 1"):
        SurvivalNLL()(Step(linear(), Batch(batch.x, batch.y, {"event": torch.ones(6, 1)})))
    with pytest.raises(Refused, match="finite"):
        binned(torch.tensor([1.0, torch.nan]))
    with pytest.raises(Refused, match="bins >= 1"):
        binned(torch.ones(2), bins=0)
    with pytest.raises(Refused, match="> 0"):
        binned(torch.tensor([1.0, 0.0]))
    assert binned(torch.tensor([364.9, 11680.0, 1e9])).tolist() == [0, 31, 31]


def pairs(r: list[float], t: list[float], e: list[bool]) -> float:
    right, count = 0.0, 0
    for i in range(len(r)):
        for j in range(len(r)):
            if e[i] and (t[i] < t[j] or (t[i] == t[j] and not e[j])):
                count += 1
                right += 0.5 if abs(r[i] - r[j]) <= 1e-8 else float(r[i] > r[j])
    return right / count


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5), st.booleans()), min_size=2, max_size=12))
def test_concordance_equals_the_loop_over_pairs(rows):
    r, t, e = ([float(a) for a, _, _ in rows], [float(b) for _, b, _ in rows], [c for _, _, c in rows])
    given_ = torch.tensor(r), torch.tensor(t), torch.tensor(e)
    try:
        expected = pairs(r, t, e)
    except ZeroDivisionError:
        with pytest.raises(Refused, match="can be compared"):
            concordance(*given_)
    else:
        assert concordance(*given_) == pytest.approx(expected)


def crowd(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(n)
    return (torch.randn(n, generator=g, dtype=torch.float64).mul(5).round() / 5, torch.randint(1, 99, (n,), generator=g),
            torch.rand(n, generator=g) < 0.6)  # fmt: skip


def test_concordance_of_several_blocks_equals_one():
    r, t, e = crowd(4000)  # blocks of 1,048 rows
    after = ((t[:, None] < t) | ((t[:, None] == t) & ~e)) & e[:, None]
    gap = r[:, None] - r
    expected = (after & (gap > 1e-8)).sum() + (after & (gap.abs() <= 1e-8)).sum() / 2
    assert concordance(r, t, e) == pytest.approx((expected / after.sum()).item(), rel=1e-6)


def test_concordance_equals_scikit_survivals():
    sksurv = pytest.importorskip("sksurv.metrics")
    for n in (20, 300):
        r, t, e = crowd(n)
        theirs = sksurv.concordance_index_censored(e.numpy(), t.double().numpy(), r.numpy())[0]
        assert concordance(r, t, e) == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, t, e: (r[:-1], t, e), "one risk, time and event"),
        (lambda r, t, e: (r * torch.nan, t, e), "finite"),
        (lambda r, t, e: (r, t, e * 2), "0 or 1"),
        (lambda r, t, e: (r[:0], t[:0], e[:0]), "can be compared"),
    ],
)
def test_bad_rankings_are_refused(change, message):
    with pytest.raises(Refused, match=message):
        concordance(*change(*crowd(9)))


def test_3_concordance_at_its_limits():
    t, e = torch.arange(1.0, 9.0), torch.ones(8, dtype=torch.bool)
    assert concordance(-t, t, e) == 1
    assert concordance(t, t, e) == 0
    assert concordance(torch.ones(8), t, e) == 0.5
    r = torch.randn(8, generator=torch.Generator().manual_seed(0))
    assert concordance(-r, t, e) == pytest.approx(1 - concordance(r, t, e))
    with pytest.raises(Refused, match="can be compared"):
        concordance(r, t, torch.zeros(8))
    early, late = torch.tensor([[4.0, 0, 0]]), torch.tensor([[-4.0, 0, 0]])
    assert (risk(early) > risk(late)).all()
    h = torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64)
    assert risk(h.logit()).item() == pytest.approx(-(0.9 + 0.9 * 0.8 + 0.9 * 0.8 * 0.7))


def moe(**changes) -> MoEPKT:
    with seeded(0):
        return MoEPKT(5, 3, 2, **{"width": 4, "top": 2, "attention": 3, **changes}).double().eval()


def bags(n: int = 4) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    return {"instances": torch.randn(n, 6, 5, generator=g, dtype=torch.float64),
            "experts": torch.randn(n, 3, 4, generator=g, dtype=torch.float64)}  # fmt: skip


@pytest.mark.parametrize(("top", "transform"), [(1, False), (2, True), (3, False)])
def test_4_the_output_is_the_weighted_sum_of_the_best_experts(top, transform):
    model, x = moe(top=top, transform=transform), bags()
    for i, logits in enumerate(model(x)):
        p = model.router(model.trunk.bag({"instances": x["instances"][i : i + 1]}))[0].softmax(0)
        total = torch.zeros(4, dtype=torch.float64)
        for e in p.argsort(descending=True)[:top].tolist():
            seen = x["experts"][i, e]
            total += p[e] * ((seen @ model.weight[e] + model.bias[e]).relu() if transform else seen)
        assert torch.allclose(logits, model.head(total))
        assert p.max().item() < 1
        said = model.weights(x)[i]
        assert (said > 0).sum() == top
        assert said.sum().item() == pytest.approx(p.topk(top).values.sum().item())


def test_5_experts_in_another_order():
    model, x, order = moe(), bags(), torch.tensor([2, 0, 1])
    expected = model(x)
    with torch.no_grad():
        for p in (model.router.weight, model.weight, model.bias):
            p.copy_(p[order].clone())
    assert torch.allclose(model({**x, "experts": x["experts"][:, order]}), expected)


def test_5_and_7_instances_in_another_order_and_padded():
    model, x = moe(), bags()
    expected = model(x)
    assert torch.allclose(model({**x, "instances": x["instances"].flip(1)}), expected)
    more = padded([*x["instances"], torch.ones(9, 5, dtype=torch.float64)])
    assert torch.allclose(model({k: v[:4] for k, v in more.items()} | {"experts": x["experts"]}), expected)


def routing(r: torch.Tensor, **settings) -> float:
    return Routing(**settings)(Step(nn.Identity(), Batch(torch.zeros(len(r), 1)), recorded={"router": r})).item()


def test_6_routing_losses_of_a_router_that_cannot_decide():
    even = torch.zeros(5, 4, dtype=torch.float64)
    assert routing(even, balance=1.0, z=0.0) == pytest.approx(1 / 4)
    assert routing(even, balance=0.0, z=1.0) == pytest.approx(math.log(4) ** 2)
    assert routing(even + 3, balance=1.0, z=0.0) == pytest.approx(1 / 4)
    assert routing(even + 3, balance=0.0, z=1.0) > math.log(4) ** 2
    shared = 9.0 * torch.eye(4, dtype=torch.float64)
    one = 9.0 * torch.eye(4, dtype=torch.float64)[[0, 0, 0, 0]]
    assert routing(shared, balance=1.0, z=0.0, true_balance=True) == pytest.approx(1)
    assert routing(one, balance=1.0, z=0.0, true_balance=True) > 3.9
    with pytest.raises(Refused, match="weights >= 0"):
        Routing(z=-1)


def test_frozen_models_are_read_once_and_stay_as_they_are():
    with seeded(0):
        models = [ABMIL(5, 2, width=4, attention=3) for _ in range(3)]
    x = {"instances": torch.randn(2, 6, 5)}
    seen = vectors_of(models, x)
    assert seen.shape == (2, 3, 4)
    assert not seen.requires_grad
    assert all(model.training for model in models)
    assert torch.equal(seen[:, 1], models[1].eval().bag(x).detach())


def test_padded_bags_train_the_router_and_the_experts_but_no_source():
    with seeded(0):
        sources = [ABMIL(5, 2, width=4, attention=3) for _ in range(3)]
        model = MoEPKT(5, 3, 2, width=4, top=2, attention=3)
        x = padded([torch.randn(k, 5) for k in (2, 7, 3, 5)])
    x["experts"] = vectors_of(sources, x)
    batch = Batch(x, torch.tensor([0, 1, 1, 0]), {"event": torch.tensor([1.0, 0, 1, 1])})
    terms = {"task": SurvivalNLL(), "routing": Routing()}
    tuned = fit(Plan(model=model, stream=[batch], steps=5, terms=terms, optimizer=adamw(1e-2)), device="cpu").model
    still = [name for name, p in model.named_parameters() if torch.equal(p, tuned.get_parameter(name))]
    assert still == []
    assert torch.equal(vectors_of(sources, x), x["experts"])


def test_bad_routers_are_refused():
    with pytest.raises(Refused, match="top <= experts"):
        moe(top=4)
    with pytest.raises(Refused, match="one vector an expert"):
        moe()({**bags(), "experts": torch.zeros(4, 2, 4, dtype=torch.float64)})
    with pytest.raises(Refused, match="one width"):
        vectors_of([], torch.zeros(1, 1, 1))
    with pytest.raises(Refused, match="one width"):
        vectors_of([ABMIL(5, 2, width=4), ABMIL(5, 2, width=8)], torch.zeros(1, 1, 5))
    with pytest.raises(Refused, match="needs bags"):
        moe()({**bags(), "instances": torch.zeros(4, 6, 7, dtype=torch.float64)})


def test_the_study_reads_rows_columns_and_signs():
    folds = torch.tensor([[[0.8, 0.8], [0.6, 0.62]], [[0.3, 0.32], [0.7, 0.7]]])
    study = TransferStudy.of(folds)
    assert study.signs().tolist() == [[1, 1], [-1, 1]]
    assert study.transferability.tolist() == pytest.approx([0.61, 0.31])
    assert study.receptiveness.tolist() == pytest.approx([0.31, 0.61])
    assert study.error[0, 1] == pytest.approx(0.01)
    other = TransferStudy.of(folds, own=False)
    assert other.transferability.tolist() == pytest.approx([0.705, 0.505])
    assert TransferStudy.of(torch.tensor([[[0.4, 0.6]]]), own=False).signs().tolist() == [[0]]
    for bad in (torch.zeros(2, 2), torch.zeros(2, 2, 1), torch.zeros(2, 3, 2)):
        with pytest.raises(Refused, match="needs"):
            TransferStudy.of(bad)
    with pytest.raises(Refused, match="finite"):
        TransferStudy.of(folds * torch.nan)


def test_zero_transfer_judges_each_model_as_it_is_on_each_fold():
    with seeded(0):
        models = [ABMIL(5, 3, width=4, attention=3).train() for _ in range(2)]
    _, t, e = crowd(40)
    x, folds = torch.randn(40, 6, 5, generator=torch.Generator().manual_seed(3)), torch.arange(40) % 4
    found = zero_transfer(models, torch.split(x, 7), t, e, folds)
    assert found.shape == (2, 4)
    assert all(model.training for model in models)
    for s, model in enumerate(models):
        for k in range(4):
            r = risk(model.eval()(x[folds == k]).detach())
            # in batches of another size float32 rounds differently, which could only swap risks alike to 1e-6
            assert found[s, k].item() == pytest.approx(concordance(r, t[folds == k], e[folds == k]))
    with pytest.raises(Refused, match="a bag, time, event and fold"):
        zero_transfer(models, [x[:-1]], t, e, folds)
    with pytest.raises(Refused, match="two folds"):
        zero_transfer(models, [x], t, e, folds * 0)
    with pytest.raises(Refused, match="can be compared"):
        zero_transfer(models, [x], t, e * 0, folds)
    with pytest.raises(Refused, match="needs a model"):
        zero_transfer([], [x], t, e, folds)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), test=st.integers(0, 4))
def test_the_choice_of_sources_does_not_look_at_the_fold_tested_on(seed, test):
    g = torch.Generator().manual_seed(seed)
    folds = 0.3 + 0.5 * torch.rand(4, 4, 5, generator=g)
    chosen = positive_sources(folds, test)
    folds[:, :, test] = torch.rand(4, 4, generator=g)
    assert torch.equal(positive_sources(folds, test), chosen)
    assert not chosen.diagonal().any()


def test_the_choice_of_sources_is_by_a_standard_error_on_the_other_folds():
    folds = torch.tensor([[[0.60, 0.62, 0.0]], [[0.40, 0.62, 1.0]], [[0.38, 0.40, 1.0]]])
    assert positive_sources(folds, 2, own=False)[:, 0].tolist() == [True, False, False]
    for bad in ((folds, 3), (folds[:, :, :2], 0)):
        with pytest.raises(Refused, match="three folds"):
            positive_sources(*bad, own=False)


def test_a_pooled_risk_is_the_mean_of_standardised_risks():
    r = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [100.0], [7.0]])
    expected = sum((row - row.mean()) / row.std(correction=0) for row in r[:2].double()) / 2
    assert torch.allclose(pooled_risk(r, torch.tensor([True, True, False])), expected)
    with pytest.raises(Refused, match="positive source"):
        pooled_risk(r, torch.zeros(3, dtype=torch.bool))
    with pytest.raises(Refused, match="one flag a source"):
        pooled_risk(r, torch.ones(2, dtype=torch.bool))
    with pytest.raises(Refused, match="finite"):
        pooled_risk(r * torch.nan, torch.ones(3, dtype=torch.bool))
