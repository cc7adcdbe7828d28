"""PANDA: no weight is no change, agreement costs nothing, both scales, and logits computed once instead of each step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.choose import PANDA
from headstart.choose.panda import answered, distil_from
from headstart.core.loop import fit
from headstart.core.plan import Batch, CrossEntropy, Plan, Step, adamw
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.core.surgery import with_head
from headstart.core.validate import Refused
from headstart.nets.prompts import Prompted, fresh_prompt
from headstart.testing import contract
from headstart.testing.material import digits, trained

TEACHER = trained()
test_contract = contract(
    lambda: PANDA(TEACHER, similarity=0.7),
    teachers=[TEACHER],
    optimum=lambda term: Step(TEACHER, Batch(digits()[0][:16])),
    refuses=[lambda: PANDA(TEACHER, similarity=2.0), lambda: PANDA(TEACHER, weight=-1.0)],
)


class Backbone(nn.Module):
    """Attention of one head over what it is given; symbols have no order."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.look, self.join = nn.Embedding(12, 8), nn.Linear(8, 24), nn.Linear(8, 8)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        q, k, v = self.look(inputs_embeds).chunk(3, -1)
        hidden = (q @ k.mT).masked_fill(attention_mask[:, None] == 0, -math.inf).softmax(-1) @ v
        return inputs_embeds + self.join(hidden).tanh()


def prompted(seed: int, length: int = 3, classes: int = 2, dropout: float = 0.1) -> Prompted:
    with seeded(5):
        backbone = Backbone()
    with seeded(seed):
        head = nn.Linear(8, classes)
    return Prompted(backbone, head, prompt=fresh_prompt(backbone, length, seed=seed), dropout=dropout, pooling="mean")


def plan(model: nn.Module, steps: int = 12, y: bool = True) -> Plan:
    x = torch.randint(12, (48, 5), generator=torch.Generator().manual_seed(0))
    stream = Batches(x=x, y=(x > 5).sum(1).gt(2).long() if y else None, batch_size=16)
    return Plan(model=model, stream=stream, steps=steps, optimizer=adamw(1e-2))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def loss_and_slope(term: PANDA, model: nn.Module, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    loss = term(Step(model, batch))
    return loss.detach(), list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


BATCH = Batch(torch.randint(12, (16, 5), generator=torch.Generator().manual_seed(1)), torch.arange(16) % 2)


@pytest.mark.parametrize("settings", [{"similarity": 0.9, "weight": 0.0}, {"similarity": -0.3}, {"similarity": 0.0}])
def test_without_weight_it_is_prompt_tuning_bit_for_bit(settings):
    vanilla = fit(plan(prompted(1)), device="cpu").model
    assert same(fit(plan(prompted(1)).plus(panda=PANDA(prompted(2), **settings)), device="cpu").model, vanilla)
    assert same(distil_from(prompted(2), plan(prompted(1)), **settings, device="cpu").model, vanilla)
    assert not same(fit(plan(prompted(1)).plus(panda=PANDA(prompted(2))), device="cpu").model, vanilla)


def test_a_student_that_starts_as_its_teacher_costs_nothing_and_is_pulled_nowhere():
    teacher = prompted(2, dropout=0.0)
    loss, slopes = loss_and_slope(PANDA(teacher), prompted(2, dropout=0.0).eval(), BATCH)
    assert loss == 0
    assert all(bool((slope == 0).all()) for slope in slopes)


@given(st.integers(1, 20), st.integers(1, 6), st.floats(-1, 1), st.floats(0, 3), st.integers(0, 2**16))
def test_it_equals_a_slow_restatement_at_both_scales(n, c, similarity, weight, seed):
    model, teacher = torch.randn(2, n, c, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    total = math.fsum((a - b) ** 2 for a, b in zip(model.flatten().tolist(), teacher.flatten().tolist(), strict=True))
    step = Step(nn.Identity(), Batch(model, extra={"teacher": teacher}))
    usual, released = (PANDA(None, similarity, weight, as_released=r)(step).item() for r in (False, True))
    assert usual == pytest.approx(weight * max(similarity, 0) * total / (n * c), rel=1e-9, abs=1e-300)
    assert released == pytest.approx(usual / n, rel=1e-9, abs=1e-300)


def test_the_release_is_a_sixteenth_of_torchs_mse_at_batches_of_sixteen():
    teacher, student = prompted(2).eval(), prompted(1).eval()
    released = PANDA(teacher, similarity=1.0, weight=1.0, as_released=True)(Step(student, BATCH))
    torch.testing.assert_close(released, F.mse_loss(student(BATCH.x), teacher(BATCH.x)) / 16)
    beta = 0.1
    ours = PANDA(teacher, similarity=1.0, weight=0.1 * beta / 16)(Step(student, BATCH))
    torch.testing.assert_close(ours, PANDA(teacher, beta, 0.1, as_released=True)(Step(student, BATCH)))


def test_the_loss_is_linear_in_the_weight():
    teacher, student = prompted(2), prompted(1).eval().double()
    step = Step(student, BATCH)
    kd = F.mse_loss(student(BATCH.x), prompted(2).eval().double()(BATCH.x))
    for weight in (0.0, 0.1, 0.7, 3.0):
        total = CrossEntropy()(step) + PANDA(teacher, 0.5, weight).double()(step)
        torch.testing.assert_close(total - CrossEntropy()(step), weight * 0.5 * kd, rtol=1e-9, atol=1e-12)


def test_logits_computed_once_train_as_the_teacher_online_does():
    teacher, student = prompted(2).double(), prompted(1).double()  # rounding depends on how rows fall into batches
    online = fit(plan(student, 3).plus(panda=PANDA(teacher)), device="cpu")  # one epoch
    stored = plan(student, 3).plus(panda=PANDA(None))
    stored = fit(replace(stored, stream=answered(stored.stream, teacher)), device="cpu")
    torch.testing.assert_close(stored.losses, online.losses, rtol=1e-12, atol=1e-12)
    for a, b in zip(stored.model.parameters(), online.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_where_the_teacher_has_no_rounding_they_agree_bit_for_bit():
    class Table(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[:, 0] * 1.5, x[:, 1] - 4.0], 1)

    online = plan(prompted(1), 7).plus(panda=PANDA(Table()))
    stored = plan(prompted(1), 7).plus(panda=PANDA(None))
    stored = replace(stored, stream=answered(stored.stream, Table()))
    one, two = fit(online, device="cpu"), fit(stored, device="cpu")
    assert torch.equal(one.losses, two.losses)
    assert same(one.model, two.model)


def test_stored_answers_follow_their_inputs_and_positions():
    stream = plan(prompted(1)).stream
    teacher = prompted(2)
    kept = answered(stream, teacher)
    for position in (0, 4):
        batch, plain = next(kept.start(position)), next(stream.start(position))
        assert torch.equal(batch.x, plain.x)
        assert torch.equal(batch.y, plain.y)
        torch.testing.assert_close(batch.extra["teacher"], teacher.eval()(batch.x))
    mapped = Batches(x={"input_ids": stream.x}, y=stream.y, batch_size=16)
    torch.testing.assert_close(next(iter(answered(mapped, teacher))).extra, next(iter(kept)).extra)


def test_the_stages_are_tuning_the_source_and_distilling_it():
    base = plan(prompted(1), 40)
    source = prompted(2, length=5)  # a source of another length may teach
    teacher = fit(replace(base, model=source), device="cpu").model
    expected = fit(base.plus(panda=PANDA(teacher, 0.8, 0.5)), device="cpu")
    found = distil_from(source, base, similarity=0.8, weight=0.5, device="cpu")
    assert same(found.model, expected.model)
    assert found.history["panda"][-1] < found.history["panda"][0] / 2
    assert all(p.grad is None for p in found.model.backbone.parameters())


def test_a_prompt_without_labels_learns_its_teachers_answers():
    base = replace(plan(prompted(1, dropout=0.0), 300, y=False), terms={"panda": PANDA(prompted(2), weight=1.0)})
    found = fit(base, device="cpu").history["panda"]
    assert found[-1] < 0.05 * found[0]


def test_a_source_of_other_classes_is_refused_before_work_and_taken_with_a_new_head():
    source, base = prompted(2, classes=3), plan(prompted(1), 2)
    with pytest.raises(Refused, match=r"heads of one size; got \[3, 2\]"):
        distil_from(source, base, similarity=1.0)
    with pytest.raises(Refused, match="another label set"):
        PANDA(source)(Step(base.model, BATCH))
    distil_from(with_head(source, 2), base, similarity=1.0, device="cpu")


@pytest.mark.parametrize("similarity", [1.1, -1.1, math.nan, math.inf])
def test_a_similarity_that_is_none_is_refused(similarity):
    with pytest.raises(Refused, match="<= similarity <= 1"):
        PANDA(TEACHER, similarity)


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_a_weight_that_means_nothing_is_refused(weight):
    with pytest.raises(Refused, match="weight >= 0"):
        PANDA(TEACHER, weight=weight)


def test_missing_labels_missing_answers_nan_and_augmented_inputs_are_refused():
    base = plan(prompted(1), 2)
    with pytest.raises(Refused, match="needs labels"):
        distil_from(prompted(2), plan(prompted(1), y=False), similarity=1.0, device="cpu")
    with pytest.raises(Refused, match="a teacher or its logits"):
        fit(base.plus(panda=PANDA(None)), device="cpu")
    with pytest.raises(Refused, match="augment"):
        answered(replace(base.stream, augment=lambda x: x), prompted(2))
    broken = prompted(2)
    broken.head.weight.data[0, 0] = math.nan
    with pytest.raises(Refused, match="must stay finite"):
        fit(base.plus(panda=PANDA(broken)), device="cpu")
