"""Learning from sure answers: whose labels are trusted, what counts, and that it helps a shifted model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.core.loop import fit
from headstart.core.plan import Plan, Step, adamw, cosine
from headstart.core.stream import Batch, Batches
from headstart.core.validate import Refused
from headstart.merge.atlas import Atlas
from headstart.merge.confident import Confident, trusted
from headstart.merge.finetuning_transfer import diff_vector
from headstart.merge.keep_best import clipped
from headstart.testing import contract
from headstart.testing.material import digits, trained

test_contract = contract(
    lambda: Confident(strong=lambda x: x, threshold=0.1),
    known_failures={"paper_complete": "a part of aTLAS, whose paper is in atlas.py"},
    refuses=[lambda: Confident(strong=torch.neg, threshold=1.0), lambda: Confident(strong=torch.neg, temperature=0.0)],
)


def loss(logits: Tensor, y: Tensor | None = None, strong=lambda x: x, **settings) -> Tensor:
    return Confident(strong=strong, **settings)(Step(nn.Identity(), Batch(logits, y)))


def test_only_sure_examples_count_and_none_gives_zero():
    sure, unsure = torch.tensor([[6.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    alone = loss(sure)
    assert torch.equal(loss(torch.cat([sure, unsure])), alone)
    nothing = unsure.clone().requires_grad_()
    value = loss(nothing)
    value.backward()
    assert value.item() == 0
    assert not nothing.grad.any()


def test_the_answer_is_a_distribution_without_gradient():
    x = torch.tensor([[6.0, 0.0]], requires_grad=True)
    value = loss(x, strong=lambda x: -x)
    value.backward()
    p, q = x.detach().softmax(1), (-x.detach()).softmax(1)
    torch.testing.assert_close(value.detach(), -(p * q.log()).sum())
    torch.testing.assert_close(x.grad, -(q - p))


def test_trusted_labels_take_the_place_of_answers_and_count_even_where_unsure():
    x = torch.tensor([[1.0, 0.0], [6.0, 0.0], [0.3, 0.0]])
    expected = (F.cross_entropy(x[:1], torch.tensor([1])) + loss(x[1:2])) / 2
    torch.testing.assert_close(loss(x, torch.tensor([1, -1, -1])), expected)
    with pytest.raises(Refused, match=r"below 2, the classes of the head; got 2"):
        loss(x, torch.tensor([2, -1, -1]))


def test_sharpening_squares_at_one_half():
    x = torch.tensor([[2.0, 0.0, -1.0]])
    p = x.softmax(1).square()
    p = p / p.sum()
    torch.testing.assert_close(loss(x, threshold=0.0, temperature=0.5), -(p * x.log_softmax(1)).sum())
    assert p.max() > 0.97 > 0.9 > x.softmax(1).max()
    assert loss(x, threshold=0.97) == 0
    assert loss(x, threshold=0.97, temperature=0.5) > 0


@given(n=st.integers(1, 60), c=st.integers(2, 6), each=st.integers(0, 8), seed=st.integers(0, 99))
def test_trusted_is_the_slow_definition(n, c, each, seed):
    logits = torch.randn(n, c, generator=torch.Generator().manual_seed(seed))
    each = min(each, n)
    p = logits.double().softmax(1)
    wanted: dict[int, list[int]] = {}
    for label in range(c):
        for row in sorted(range(n), key=lambda i: -float(p[i, label]))[:each]:
            wanted.setdefault(row, []).append(label)
    expected = [max(wanted[i], key=lambda k: float(p[i, k])) if i in wanted else -1 for i in range(n)]
    assert trusted(logits, each).tolist() == expected


def test_the_papers_count_of_trusted_inputs():
    assert (trusted(torch.randn(399, 4)) >= 0).sum() <= 4 * 9
    identity = torch.eye(4).repeat(100, 1) + 0.01 * torch.rand(400, 4)
    assert torch.bincount(trusted(identity)[trusted(identity) >= 0]).tolist() == [10] * 4
    assert (trusted(torch.randn(39, 4)) == -1).all()
    many = torch.eye(2).repeat(2000, 1) + 0.01 * torch.rand(4000, 2)
    assert torch.bincount(trusted(many) + 1)[1:].tolist() == [100, 100]
    with pytest.raises(Refused, match="must be finite"):
        trusted(torch.full((3, 2), torch.nan))
    with pytest.raises(Refused, match="from 0 to 3; got 4"):
        trusted(torch.ones(3, 2), each=4)


def test_coefficients_adapt_to_inputs_without_labels():
    """A dimmed and noisy copy; vectors from other dimming, the target's labels only to measure."""
    x, y = digits()
    base = trained()

    def dim(x: Tensor, by: float) -> Tensor:
        return by * x + 0.3 * (1 - by)

    vectors = {}
    for by in (0.6, 0.25, -0.5):
        plan = Plan(model=base.requires_grad_(True), stream=Batches(x=dim(x[:1000], by), y=y[:1000], batch_size=64),
                    steps=100, optimizer=adamw(3e-3))  # fmt: skip
        vectors[str(by)] = diff_vector(fit(plan, device="cpu").model.state_dict(), base.state_dict())
    target, hidden = dim(x[1000:], 0.4), y[1000:]

    def noisy(x: Tensor) -> Tensor:
        return x + 0.05 * torch.randn_like(x)

    def accuracy(model: nn.Module) -> float:
        return float((model(target).argmax(1) == hidden).float().mean())

    with torch.no_grad():
        sure = trusted(base(target))
    plan = Plan(
        model=base, stream=Batches(x=target, y=sure, batch_size=64), terms={"answers": Confident(strong=noisy)},
        steps=150, optimizer=clipped(adamw(1e-2, weight_decay=0.1)), schedule=cosine,
    )  # fmt: skip
    adapted = fit(plan.under(Atlas(vectors=vectors)), device="cpu").model
    assert accuracy(adapted) > accuracy(base) + 0.05, (accuracy(base), accuracy(adapted))
