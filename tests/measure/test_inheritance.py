"""Inherited fragility: frozen descendants have not drifted, names of classes do not matter, controls are what they say."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from headstart.core.rng import seeded
from headstart.core.surgery import with_head
from headstart.core.validate import Refused
from headstart.measure.inheritance import Inheritance, inheritance
from headstart.testing.material import digits, small_model, trained

RADIUS = 0.3


def material() -> tuple[nn.Module, nn.Module, Tensor, Tensor, dict[str, Tensor]]:
    """A base, a model of other weights, examples, and two versions of them."""
    x, y = digits()
    x, y = x[1000:1100], y[1000:1100]
    with seeded(3):
        scratch = small_model()
        for p in scratch.parameters():
            nn.init.normal_(p, std=0.3)
    moved = {"up": (x + RADIUS).clamp(0, 1), "still": x}
    return copy.deepcopy(trained()), scratch, x, y, moved


def measured(
    descendants: dict[str, nn.Module], y: Tensor | None = None, scratch: nn.Module | None = None
) -> Inheritance:
    base, other, x, labels, moved = material()
    return inheritance(moved, descendants, x, labels if y is None else y, base=base, scratch=scratch or other,
                       layers=("enter", "middle"), radius=RADIUS, resamples=5)  # fmt: skip


def test_a_descendant_with_frozen_blocks_and_a_new_head_has_not_drifted_at_all():
    descendant = with_head(trained(), 4)
    found = measured({"probe": descendant})
    assert torch.equal(found.similarity[0], torch.ones(2, dtype=torch.float64))
    base, scratch, x, _, _ = material()
    with torch.no_grad():
        a, b = base.enter(base.flat(x)), scratch.enter(scratch.flat(x))
    expected = torch.cosine_similarity(a.double(), b.double()).mean()
    assert float(found.similarity[1, 0]) == pytest.approx(float(expected), abs=1e-6)
    assert found.matrix.victims == ("probe", "from scratch")
    assert found.layers == ("enter", "middle")


class Renamed(nn.Module):
    def __init__(self, model: nn.Module, order: Tensor) -> None:
        super().__init__()
        self.enter, self.middle = model.enter, model.middle
        self.model, self.order = model, order

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[:, self.order]


def test_permuting_the_classes_of_the_victims_changes_nothing():
    base, scratch, _, y, _ = material()
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    plain = measured({"same": base})
    renamed = measured({"same": Renamed(base, order)}, order.argsort()[y], Renamed(scratch, order))
    assert torch.equal(plain.matrix.success, renamed.matrix.success)
    assert torch.equal(plain.inherited, renamed.inherited)


def test_excess_and_inheritance_are_differences_of_rates_counted_by_hand():
    base, scratch, x, y, moved = material()
    found = measured({"same": base})
    signs = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    rates = [
        [float((model(a).argmax(1) != y)[model(x).argmax(1) == y].double().mean()) for model in (base, scratch)]
        for a in (*moved.values(), (x + RADIUS * signs).clamp(0, 1))
    ]
    success = torch.tensor(rates, dtype=torch.float64)
    assert torch.equal(found.matrix.success, success)
    assert float(success[0, 0]) > 0
    assert torch.equal(found.excess, success[:2] - success[2])
    assert torch.equal(found.inherited, found.excess[:, :1] - found.excess[:, 1:])
    assert found.matrix.surrogates == ("up", "still", "random signs")


def test_modes_and_random_state_are_given_back_and_batches_do_not_matter():
    base, scratch, x, y, moved = material()
    base.train()
    before = torch.get_rng_state()
    runs = [
        inheritance(moved, {"same": base}, x, y, base=base, scratch=scratch, layers=["middle"], radius=RADIUS,
                    resamples=5, batch_size=size) for size in (100, 7)
    ]  # fmt: skip
    assert base.training
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(runs[0].matrix.success, runs[1].matrix.success)
    torch.testing.assert_close(runs[0].similarity, runs[1].similarity)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"moved": {"random signs": torch.zeros(100, 1, 8, 8)}}, "names of the controls"),
        ({"descendants": {"from scratch": nn.Identity()}}, "names of the controls"),
        ({"moved": {}}, "perturbed examples"),
        ({"radius": 0.1}, "within radius=0.1"),
        ({"radius": math.nan}, "radius"),
        ({"layers": ["inner"]}, "exist"),
        ({"layers": []}, "at least one of each"),
        ({"descendants": {}}, "at least one of each"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"moved": {"a": torch.zeros(3, 1, 8, 8)}}, "shape"),
    ],
)
def test_what_means_nothing_is_refused(wrong, says):
    base, scratch, x, y, moved = material()
    given = {"moved": moved, "descendants": {"same": base}, "x": x, "y": y, "base": base, "scratch": scratch,
             "layers": ["middle"], "radius": RADIUS, "resamples": 5}  # fmt: skip
    with pytest.raises(Refused, match=says):
        inheritance(**{**given, **wrong})
