"""DVERGE: the card's known answers, equality with the paper's loop, and what a round leaves alone."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.align import DANN
from headstart.core.loop import fit
from headstart.core.plan import CrossEntropy, Plan, Step, Term, sgd
from headstart.core.rng import seeded
from headstart.core.stream import Batch, Batches, Parts
from headstart.core.validate import Refused
from headstart.distill import SoftTargets
from headstart.harden import DVERGE, AdversarialTraining, Ensemble
from headstart.testing import contract
from headstart.testing.material import digits, small_model


class Named(Ensemble):
    """Two unlike perceptrons; the checks look for a layer called `enter`, so the first one's is shown there too."""

    def __init__(self) -> None:
        with seeded(1):
            second = nn.Sequential(
                nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 10)
            )
        super().__init__([small_model(), second])
        self.enter = self.members[0].get_submodule("enter")


test_contract = contract(DVERGE(steps=3), model=Named, refuses=[lambda: DVERGE(radius=18), lambda: DVERGE(steps=-1)])
test_contract_beside_adversarial_training = contract(
    DVERGE(steps=2, adversarial=AdversarialTraining(steps=2), different_label=True, evaluating=True), model=Named
)

LAYERS = ("0", "3", "5")


def member() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, stride=2), nn.Flatten(),
        nn.Linear(16, 10),
    )  # fmt: skip


def members(n: int = 3) -> list[nn.Module]:
    with seeded(0):
        return [member() for _ in range(n)]


def plan_of(models: list[nn.Module], steps: int = 6) -> Plan:
    x, y = digits()
    stream = Batches(x=x[:96], y=y[:96], batch_size=32)
    return Plan(model=Ensemble(models), stream=stream, steps=steps, optimizer=sgd(0.05, weight_decay=1e-4))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[name]) for name, v in a.state_dict().items())


def by_hand(plan: Plan, layers: list[int], radius: float, other: int) -> list[nn.Sequential]:
    """The paper's loop: an optimizer a member, all distilled first, then one step each; layers[round] = depth."""
    models: list[nn.Sequential] = copy.deepcopy(list(plan.model.members)) if isinstance(plan.model, Ensemble) else []
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4) for m in models]
    stream = plan.stream
    assert isinstance(stream, Batches)
    for step, source, target in zip(range(plan.steps), stream, replace(stream, seed=other), strict=False):
        depth, made = layers[step // 3] + 1, []
        for model in models:
            wanted = model[:depth](target.x).detach()
            z, momentum = source.x.clone(), torch.zeros_like(source.x)
            for _ in range(10):
                z.requires_grad_()
                slope = torch.autograd.grad(-F.mse_loss(model[:depth](z), wanted), z)[0]
                momentum = momentum + slope / slope.abs().flatten(1).sum(1).clamp_min(1e-12).view(-1, 1, 1, 1)
                z = z.detach() + radius / 10 * momentum.sign()
                z = (source.x + (z - source.x).clamp(-radius, radius)).clamp(0, 1)
            made.append(z)
        for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            loss = sum(F.cross_entropy(model(z), source.y) for j, z in enumerate(made) if j != i)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return models


def test_it_is_the_papers_loop_with_batchnorm_in_training_mode():
    plan = plan_of([m.double() for m in members()])
    assert isinstance(plan.stream, Batches)
    plan = replace(plan, stream=replace(plan.stream, x=plan.stream.x.double()))
    tactic = DVERGE(layers=LAYERS, radius=0.2, seed=3)
    made = tactic(plan)
    drawn = [int(names[0]) for names in made.terms["task"].rounds]
    assert len(drawn) == 2
    assert len(set(drawn)) == 2, "choose a seed of two layers"
    fitted = fit(made, device="cpu").model
    assert isinstance(fitted, Ensemble)
    assert isinstance(plan.stream, Batches)
    assert isinstance(made.stream, Parts)
    wanted = by_hand(plan, drawn, 0.2, made.stream.streams["target"].seed)
    for mine, theirs in zip(fitted.members, wanted, strict=True):
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(mine.state_dict()[name], value, rtol=1e-9, atol=1e-10)
    assert not same(fitted, fit(DVERGE(layers=LAYERS, radius=0.0)(plan), device="cpu").model)


def test_radius_zero_is_plain_training_of_each_member_times_the_others():
    """Loss (K - 1) CE on clean inputs, gradients K - 1 times plain ones."""
    models = [nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double() for _ in range(3)]
    x, y = digits()
    stream = [Batch(x[:32].double(), y[:32])]
    target = [Batch(x[32:64].double(), y[32:64])]
    plan = Plan(model=Ensemble(models), stream=stream, steps=1, optimizer=sgd(0.1, momentum=0.0))
    fitted = fit(DVERGE(target=target, radius=0.0)(plan), device="cpu")
    losses = [F.cross_entropy(m(stream[0].x), stream[0].y) for m in models]
    assert fitted.history["task"][0] == pytest.approx(2 * sum(losses).item(), rel=1e-6)
    for mine, model, loss in zip(fitted.model.members, models, losses, strict=True):
        for new, old, slope in zip(
            mine.parameters(), model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            torch.testing.assert_close(new, old - 0.1 * 2 * slope, rtol=1e-9, atol=1e-12)


def test_weight_zero_beside_adversarial_training_is_that_of_each_member_alone():
    tactic = AdversarialTraining(radius=0.1, steps=3, random_start=False)
    models = members(2)
    both = fit(DVERGE(weight=0, adversarial=tactic)(plan_of(models)), device="cpu").model
    for mine, model in zip(both.members, models, strict=True):
        alone = fit(tactic(replace(plan_of(models), model=model)), device="cpu").model
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(mine.state_dict()[name], value)


def test_both_losses_add_up():
    x, y = digits()
    adversarial = AdversarialTraining(radius=0.1, steps=2, random_start=False)
    given = {"layers": ("5",), "evaluating": True, "target": [Batch(x[32:64], y[32:64])]}
    plan = replace(plan_of(members(2), steps=1), stream=[Batch(x[:32], y[:32])])
    first = {
        name: fit(tactic(plan), device="cpu").history["task"][0]
        for name, tactic in {
            "dverge": DVERGE(**given),
            "adversarial": DVERGE(weight=0, adversarial=adversarial, **given),
            "both": DVERGE(weight=0.5, adversarial=adversarial, **given),
        }.items()
    }
    assert first["both"] == pytest.approx(0.5 * first["dverge"] + first["adversarial"], rel=1e-5)


class Seen(Term):
    """Which member looked at which inputs with which labels."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[nn.Module, Tensor, Tensor | None]] = []

    def forward(self, step: Step) -> Tensor:
        self.seen.append((step.model, step.batch.x, step.batch.y))
        return 0.0 * step.run(step.batch.x).output.sum()


def test_each_member_learns_source_labels_from_the_inputs_of_the_others_and_all_terms_share_them():
    plan = plan_of(members(), steps=2).plus(seen=Seen(), again=Seen(), kd=SoftTargets(member()))
    fitted = fit(DVERGE(layers=("5",), radius=0.2)(plan), device="cpu")
    seen, again = (fitted.terms[name].term.seen for name in ("seen", "again"))
    assert len(seen) == 2 * 6
    assert [x.data_ptr() for _, x, _ in seen] == [x.data_ptr() for _, x, _ in again]
    for k, batch in enumerate([b for b, _ in zip(plan.stream, range(2), strict=False)]):
        looks = seen[6 * k : 6 * k + 6]
        who = [list(fitted.model.members).index(model) for model, _, _ in looks]
        assert who == [0, 0, 1, 1, 2, 2]
        xs = [x for _, x, _ in looks]  # x'_1, x'_2 | x'_0, x'_2 | x'_0, x'_1
        assert torch.equal(xs[0], xs[5])
        assert torch.equal(xs[1], xs[3])
        assert torch.equal(xs[2], xs[4])
        assert not torch.equal(xs[0], xs[1])
        assert all(torch.equal(y, batch.y) and (x - batch.x).abs().max() <= 0.2 + 1e-6 for _, x, y in looks)


def test_a_layer_is_drawn_for_each_epoch_and_shared():
    plan = plan_of(members(), steps=30)  # three steps an epoch
    rounds = DVERGE(layers=LAYERS)(plan).terms["task"].rounds
    assert len(rounds) == 10
    assert {len(set(names)) for names in rounds} == {1}
    assert len({names[0] for names in rounds}) > 1
    assert DVERGE(layers=LAYERS)(plan).terms["task"].rounds == rounds
    assert DVERGE(layers=LAYERS, seed=1)(plan).terms["task"].rounds != rounds
    assert len(DVERGE(layers=LAYERS, every=7)(plan).terms["task"].rounds) == 5
    assert DVERGE()(plan).terms["task"].rounds[0][0] in LAYERS
    assert set(DVERGE(layers=("3",))(plan).terms["task"].rounds) == {("3",) * 3}


def test_batch_statistics_see_distilled_inputs_unless_told_not_to():
    counts = [
        fit(DVERGE(layers=("5",), evaluating=evaluating)(plan_of(members(), steps=2)), device="cpu")
        .model.get_submodule("members.0.1")
        .num_batches_tracked.item()
        for evaluating in (False, True)
    ]
    assert counts == [2 * (1 + 10 + 2), 2 * 2]


def test_pairs_of_one_label_can_be_left_out():
    x, y = digits()
    rows = y[:32] != y[32:64]
    source, target = Batch(x[:32], y[:32]), Batch(x[32:64], y[32:64])
    plan = replace(plan_of(members(2), steps=1), stream=[source], terms={"seen": Seen()})
    fitted = fit(DVERGE(target=[target], different_label=True)(plan), device="cpu")
    assert 0 < rows.sum() < 32
    assert all(torch.equal(labels, y[:32][rows]) for _, _, labels in fitted.terms["seen"].term.seen)
    same_label = Batch(x[32:64], y[:32])
    with pytest.raises(Refused, match="two labels"):
        fit(DVERGE(target=[same_label], different_label=True)(plan), device="cpu")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"radius": 18.0}, "Divide by 255"),
        ({"radius": math.nan}, "radius"),
        ({"steps": -1}, "steps >= 0"),
        ({"step_size": 2.0}, "step_size"),
        ({"every": 0}, "every >= 1"),
        ({"weight": -1.0}, "weight"),
        ({"weight": math.nan}, "weight"),
        ({"weight": 0.0}, "neither"),
        ({"layers": ("9",)}, "must exist"),
        ({"layers": ()}, "as many layers"),
        ({"layers": (("0",), ("0", "5"), ("0",))}, "as many layers"),
        ({"layers": (("0",), ("0",))}, "as many layers"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, says):
    with pytest.raises(Refused, match=says):
        DVERGE(**wrong)(plan_of(members()))


def test_models_that_are_no_ensemble_and_terms_with_taps_are_refused():
    plan = plan_of(members())
    for model in (member(), Ensemble(members(1))):
        with pytest.raises(Refused, match="two members"):
            DVERGE()(replace(plan, model=model))
    tapping = CrossEntropy()
    tapping.taps = ("members.0.5",)
    with pytest.raises(Refused, match="without taps"):
        DVERGE()(plan.plus(tapping=tapping))


def test_streams_that_cannot_be_paired_are_refused():
    x, y = digits()
    plan = replace(plan_of(members(2), steps=1), stream=[Batch(x[:32], y[:32])])
    one, nan = Batch(x[:16], y[:16]), Batch(torch.full_like(x[:32], math.nan), y[:32])
    for target, says in ((None, "twice the same batch"), ([one], "one size"), ([nan], "finite")):
        with pytest.raises(Refused, match=says):
            fit(DVERGE(target=target)(plan), device="cpu")
    with pytest.raises(Refused, match="Pass every="):
        DVERGE()(replace(plan, stream=Parts({})))
    parts = DANN([Batch(x[:32])])(replace(plan, model=small_model()))
    with pytest.raises(Refused, match="Apply it before"):
        fit(DVERGE(every=1)(replace(plan, stream=parts.stream)), device="cpu")
