"""Robustify: the card's known answers, the losses written out, the rules for choosing a head, what stays frozen."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.core.loop import fit
from headstart.core.plan import Batch, CrossEntropy, Plan, Step, Term, Weighted, sgd
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.core.taps import tapped
from headstart.core.validate import Refused
from headstart.distill import (
    Consistency,
    Robustify,
    ThreeHeads,
    calibrate,
    choose_head,
    confidence,
    head_report,
    jensen_shannon,
)
from headstart.testing import contract
from headstart.testing.material import digits, small_model, trained

TEACHER = trained()


def worse(x: Tensor) -> Tensor:
    return (x + 0.3 * torch.randn_like(x)).clamp(0, 1)


def darker(x: Tensor) -> Tensor:
    return 0.5 * x


test_contract = contract(
    lambda: Robustify(TEACHER, worse, "middle"),
    known_failures={
        "composes_with_surgery": "three heads stay, so the weights have other names than the plain model's"
    },
    refuses=[
        lambda: Robustify(TEACHER, worse, "middle", rule="entropie"),
        lambda: Robustify(TEACHER, worse, "middle", weights=(0.0, 0.0, 0.0)),
        lambda: Robustify(TEACHER, worse, "middle", weights=(1.0, -1.0, 1.0)),
    ],
)


class Whole(nn.Module):
    """With everything whose behaviour depends on the mode, in the frozen part and in the tuned one."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False), nn.ReLU(),
            nn.Dropout(0.3), nn.Flatten(),
        )  # fmt: skip
        self.block = nn.Sequential(nn.Linear(384, 24), nn.BatchNorm1d(24), nn.ReLU())
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.block(self.frozen(x)))
        return logits


def whole() -> nn.Module:
    with seeded(3):
        model = Whole()
    x, y = digits()
    stream = Batches(x=x[:600], y=y[:600], batch_size=50)
    return fit(Plan(model=model, stream=stream, steps=60, optimizer=sgd(0.1)), device="cpu").model


WHOLE = whole()


def plan_of(model: nn.Module = WHOLE, steps: int = 12) -> Plan:
    x, y = digits()
    return Plan(model=model, stream=Batches(x=x[:256], y=y[:256], batch_size=32), steps=steps, optimizer=sgd(0.05))


def step_of(plan: Plan) -> Step:
    """The first step of a robustified plan, with its taps."""
    with seeded(0):
        batch = next(iter(plan.stream))
    with tapped(plan.model, [tap for term in plan.terms.values() for tap in term.taps]) as recorded:
        step = Step(plan.model, batch, recorded=recorded)
        step.on("clean").run(batch["clean"].x)
    return step


def test_before_training_every_head_is_the_original_bit_for_bit():
    x = digits()[0][:50]
    for rule in ("entropy", "kl"):
        model = Robustify(TEACHER, worse, "block", rule=rule)(plan_of()).model.eval()
        assert torch.equal(model(x), WHOLE(x))
        assert torch.equal(model.each(x), WHOLE(x).expand(3, -1, -1))


def test_what_is_not_tuned_keeps_every_bit_and_stays_in_eval_mode():
    modes: list[dict[str, bool]] = []

    def look(step: Step) -> None:
        modes.append({name: module.training for name, module in step.model.named_modules()})

    before = {name: value.clone() for name, value in WHOLE.state_dict().items()}
    plan = replace(plan_of(), after_step=(look,))
    model = fit(Robustify(TEACHER, worse, "block")(plan), device="cpu").model
    after = model.model.state_dict()
    for name, value in before.items():
        if name.startswith("frozen"):
            assert torch.equal(after[name], value), name
        elif name.startswith("block") and "num_batches" not in name:
            assert not torch.equal(after[name], value), name
    for head in ("clean", "unclean", "combined"):
        assert not torch.equal(after[f"head.{head}.weight"], before["head.weight"])
    assert all(torch.equal(value, before[name]) for name, value in WHOLE.state_dict().items())
    assert not any(mode for names in modes for name, mode in names.items() if name.startswith("model.frozen"))
    assert all(names["model.block.1"] for names in modes)


def test_only_the_block_and_the_heads_are_trained():
    model = Robustify(TEACHER, worse, "block")(plan_of()).model
    trained_names = {name for name, p in model.named_parameters() if p.requires_grad}
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == 384 * 24 + 24 + 2 * 24 + 3 * (24 * 10 + 10)
    assert all(name.startswith(("model.block.", "model.head.")) for name in trained_names)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_losses_are_those_written_out(temperature):
    tactic = Robustify(TEACHER, worse, "middle", temperature=temperature, weights=(0.5, 2.0, 3.0))
    plan = tactic(plan_of(small_model()))
    with seeded(1), torch.no_grad():
        for head in plan.model.three.children():
            head.weight.add_(0.2 * torch.randn_like(head.weight))
    step = step_of(plan)
    x, a, y = step.batch["clean"].x, step.batch["augmented"].x, step.batch["augmented"].y
    assert not torch.equal(x, a)
    with torch.no_grad():
        original, teacher = (F.softmax(model(z) / temperature, 1) for model, z in ((small_model(), x), (TEACHER, a)))
        clean, moved = plan.model.each(x), plan.model.each(a)
        sharp = F.softmax(TEACHER(a), 1)
    expected = [0.0, 0.0]
    for i in range(32):
        weight = 1 + float((sharp[i] * sharp[i].log()).sum()) / math.log(10)

        def apart(target: Tensor, logits: Tensor) -> float:
            said = F.softmax(logits / temperature, 0)
            return temperature**2 * float((target * (target.log() - said.log())).sum())

        c = apart(original[i], clean[0, i])
        u = weight * apart(teacher[i], moved[1, i])
        m = 0.5 * (apart(original[i], clean[2, i]) + weight * apart(teacher[i], moved[2, i]))
        expected[0] += (0.5 * c + 2 * u + 3 * m) / 32
        labels = [-float(F.log_softmax(moved[k, i], 0)[y[i]]) for k in (1, 2)]
        expected[1] += (2 * labels[0] + 1.5 * labels[1]) / 32
    assert plan.terms["robustify"](step).item() == pytest.approx(expected[0], rel=1e-5)
    assert plan.terms["task"](step).item() == pytest.approx(expected[1], rel=1e-5)


def test_the_clean_loss_pulls_nowhere_at_the_start_and_the_others_do():
    for weights, moves in (((1.0, 0.0, 0.0), False), ((0.0, 1.0, 0.0), True), ((0.0, 0.0, 1.0), True)):
        plan = Robustify(TEACHER, worse, "middle", weights=weights)(plan_of(small_model()))
        loss = plan.terms["robustify"](step_of(plan))
        tuned = [p for p in plan.model.parameters() if p.requires_grad]
        slopes = torch.autograd.grad(loss, tuned, allow_unused=True)
        assert (max(float(s.abs().max()) for s in slopes if s is not None) > 1e-4) == moves
        assert (loss.abs().item() > 1e-6) == moves


def test_the_original_as_teacher_without_augmentation_or_labels_changes_nothing():
    terms: dict[str, Term] = {"task": Weighted(0.0, CrossEntropy())}
    plan = replace(plan_of(trained(), steps=20), terms=terms)
    fitted = fit(Robustify(trained(), lambda x: x, "middle")(plan), device="cpu")
    x = digits()[0][:200]
    torch.testing.assert_close(fitted.model.each(x), trained()(x).expand(3, -1, -1), atol=1e-4, rtol=1e-4)


class Tapping(Term):
    """A term of the plan that reads a layer, the output, and the inputs."""

    taps = ("middle",)

    def forward(self, step: Step) -> Tensor:
        run = step.run(step.batch.x)
        return run.taps["middle"].mean() + run.output.square().mean() + step.batch.x.mean()


def test_the_plans_own_terms_see_each_head_on_augmented_inputs():
    plain = replace(plan_of(small_model()), terms={"task": CrossEntropy(), "tapping": Tapping()})
    plan = Robustify(TEACHER, darker, "enter")(plain)
    step = step_of(plan)
    a = step.batch["augmented"].x
    torch.testing.assert_close(a, 0.5 * step.batch["clean"].x)
    with tapped(plan.model, ["model.middle"]) as seen:
        heads = plan.model.each(a)
        middle = seen["model.middle"]
    expected = sum(w * (middle.mean() + heads[k].square().mean() + a.mean()) for k, w in ((1, 1.0), (2, 0.5)))
    torch.testing.assert_close(plan.terms["tapping"](step), expected)
    assert list(plan.terms) == ["task", "tapping", "robustify"]


def test_the_trunk_is_forwarded_once_a_step_for_both_parts_and_all_heads():
    plan = Robustify(TEACHER, worse, "middle")(plan_of(small_model()))
    sizes: list[int] = []
    plan.model.register_forward_hook(lambda _m, inputs, _o: sizes.append(len(inputs[0])))
    step = step_of(plan)
    for term in plan.terms.values():
        term(step)
    assert sizes == [64]


def test_a_run_stopped_and_resumed_is_the_unbroken_run(tmp_path):
    def plan() -> Plan:
        return Robustify(TEACHER, worse, "block")(plan_of(steps=8))

    class Stop(Exception):
        pass

    def stop(done: int, _all: int) -> None:
        if done == 5:
            raise Stop

    with pytest.raises(Stop):
        fit(plan(), device="cpu", checkpoint=tmp_path / "run", every=4, progress=stop)
    resumed = fit(plan(), device="cpu", checkpoint=tmp_path / "run", resume=True).model.state_dict()
    unbroken = fit(plan(), device="cpu").model.state_dict()
    assert all(torch.equal(value, unbroken[name]) for name, value in resumed.items())


def restated(logits: Tensor, rule: str) -> int:
    """The rule for one example (3, c), in plain floats."""
    p = F.softmax(logits, 1).tolist()
    entropy = [-sum(v * math.log(v) for v in row if v > 0) for row in p]

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    candidates = [0, 1, 2] if rule == "entropy" else [0, 2] if kl(p[2], p[0]) < kl(p[2], p[1]) else [1, 2]
    return min(candidates, key=lambda k: entropy[k])


@given(st.sampled_from(["entropy", "kl"]), st.integers(2, 6), st.integers(0, 2**16))
def test_the_rules_are_those_written_out(rule, c, seed):
    logits = 2 * torch.randn(3, 20, c, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert choose_head(logits, rule).tolist() == [restated(logits[:, i], rule) for i in range(20)]


def test_the_two_rules_differ():
    logits = 2 * torch.randn(3, 500, 4, generator=torch.Generator().manual_seed(0))
    entropy, kl = (choose_head(logits, rule) for rule in ("entropy", "kl"))
    assert 0.05 < (entropy != kl).float().mean() < 0.5


@pytest.mark.parametrize("rule", ["entropy", "kl"])
def test_identical_heads_give_the_first_that_may_be_chosen(rule):
    logits = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1)
    first = 0 if rule == "entropy" else 1  # no strict inequality: the input does not look clean
    assert choose_head(logits, rule).tolist() == [first] * 9


@pytest.mark.parametrize("k", range(3))
@pytest.mark.parametrize("high", [200.0, math.inf])
def test_a_one_hot_head_is_believed_when_the_others_are_uniform(k, high):
    logits = torch.zeros(3, 1, 4)
    logits[k, 0] = torch.tensor([0.0, 0.0, 0.0, high]) if high < math.inf else torch.tensor([-math.inf] * 3 + [0.0])
    assert choose_head(logits).tolist() == [k]


def test_every_position_of_a_sequence_has_its_own_head():
    logits = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(choose_head(logits, "kl"), choose_head(logits.flatten(1, 2), "kl").view(4, 5))


def test_the_output_is_the_chosen_heads_and_the_report_counts_it():
    model = fit(Robustify(TEACHER, worse, "middle", rule="kl")(plan_of(small_model(), 40)), device="cpu").model
    x, y = digits()
    x, y = x[500:700], y[500:700]
    logits = model.each(x)
    index = choose_head(logits, "kl")
    assert len(index.unique()) > 1
    assert torch.equal(model(x), torch.stack([logits[k, i] for i, k in enumerate(index)]))
    report = head_report(model.train(), x, y, batch_size=37)
    assert model.training
    right = [(head.argmax(1) == y).double().mean().item() for head in (*logits, model.eval()(x))]
    assert (report.clean, report.unclean, report.combined, report.chosen) == pytest.approx(right)
    assert report.shares == pytest.approx([(index == k).double().mean().item() for k in range(3)])


def test_calibration_undoes_an_overconfident_head_and_keeps_every_heads_answers():
    model = fit(Robustify(TEACHER, worse, "middle")(plan_of(small_model(), 40)), device="cpu").model
    x, y = digits()
    x, y = x[500:900], y[500:900]
    fair = calibrate(model, x, y)
    with torch.no_grad():
        for p in model.three.unclean.parameters():
            p.mul_(5)
    loud = calibrate(model, x, y)
    assert loud.three.temperatures[1] == pytest.approx(5 * float(fair.three.temperatures[1]), rel=1e-3)
    assert model.three.temperatures.tolist() == [1, 1, 1]
    shares = [head_report(m, x, y).shares[1] for m in (model, loud, fair)]
    assert shares[0] > 0.95 > shares[1]
    assert shares[1] == pytest.approx(shares[2], abs=0.01)
    assert (loud(x).argmax(1) == fair(x).argmax(1)).float().mean() > 0.99
    at = F.cross_entropy(fair.each(x)[0] / fair.three.temperatures[0], y)
    assert all(at <= F.cross_entropy(fair.each(x)[0] / (fair.three.temperatures[0] * f), y) for f in (0.98, 1.02))


def test_confidence_runs_from_uniform_to_one_hot():
    rows = torch.tensor([[0.0, 0.0, 0.0, 0.0], [500.0, 0.0, 0.0, 0.0], [0.0, -math.inf, -math.inf, -math.inf]])
    assert confidence(rows).tolist() == [0, 1, 1]
    half = torch.tensor([[0.0, 0.0, -math.inf, -math.inf]])
    assert confidence(half).item() == pytest.approx(0.5)
    many = confidence(5 * torch.randn(1000, 7, generator=torch.Generator().manual_seed(0)))
    assert 0 <= many.min() < many.max() <= 1


@given(st.integers(0, 2**16))
def test_jensen_shannon_is_symmetric_and_bounded(seed):
    logits = 4 * torch.randn(3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = jensen_shannon(logits)
    p = F.softmax(logits, 2)
    middle = p.mean(0)
    torch.testing.assert_close(found, (p * (p / middle).log()).sum(2).mean(0))
    for order in ([1, 2, 0], [0, 2, 1]):
        torch.testing.assert_close(jensen_shannon(logits[order]), found)
    assert bool(((found > 0) & (found <= math.log(3))).all())
    assert jensen_shannon(logits[:1].expand(3, -1, -1)).abs().max() < 1e-12
    apart = 1e3 * torch.eye(3).view(3, 1, 3)
    assert jensen_shannon(apart).item() == pytest.approx(math.log(3))


def test_consistency_is_their_distance_for_x_and_two_versions():
    drawn: list[Tensor] = []

    def augment(x: Tensor) -> Tensor:
        drawn.append(worse(x))
        return drawn[-1]

    x = digits()[0][:16]
    with seeded(0):
        loss = Consistency(augment, strength=3.0)(Step(TEACHER, Batch(x)))
    expected = 3 * jensen_shannon(torch.stack([TEACHER(z) for z in (x, *drawn)])).mean()
    assert len(drawn) == 2
    torch.testing.assert_close(loss, expected)


class Softened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = nn.Linear(64, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.head(self.block(x.flatten(1))), 1)


def test_what_cannot_work_is_refused_before_training():
    plan, other = plan_of(small_model()), nn.Sequential(nn.Flatten(), nn.Linear(64, 9))
    for method, plain, says in (
        (Robustify(other, worse, "middle"), plan, "logits of one shape"),
        (Robustify(TEACHER, worse, "block"), plan_of(Softened()), "output must be the model's"),
        (Robustify(TEACHER, worse, "head"), plan, "beside the head"),
        (Robustify(TEACHER, worse, "bend"), plan, "layers with weights"),
        (Robustify(TEACHER, worse, "no.such"), plan, "must match a layer"),
        (Robustify(TEACHER, worse, "middle"), replace(plan, stream=[{"a": Batch(digits()[0][:4])}]), "stream of"),
        (Robustify(TEACHER, worse, "middle"), replace(plan, stream=[]), "stream of"),
    ):
        with pytest.raises(Refused, match=says):
            method(plain)
    broken = small_model()
    broken.get_parameter("enter.weight").data[0, 0] = torch.nan
    with pytest.raises(Refused, match="weight 'enter"):
        ThreeHeads(broken, "middle")
    with pytest.raises(Refused, match="strength >= 0"):
        Consistency(worse, -1.0)
    with pytest.raises(Refused, match="known name"):
        choose_head(torch.zeros(3, 1, 2), "best")
    with pytest.raises(Refused, match="One label"):
        head_report(ThreeHeads(small_model(), "middle"), digits()[0][:3], digits()[1][:2])
