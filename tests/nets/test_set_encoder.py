"""Set encoders: what they ignore and what they do not."""

from __future__ import annotations

import pytest
import torch

from headstart.core.rng import seeded
from headstart.core.validate import Refused
from headstart.nets.set_encoder import Prototypes, SetEncoder, SetPool

SETS = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
OTHER_EXAMPLES, OTHER_CLASSES = SETS[:, :, [3, 1, 4, 0, 2]], SETS[:, [1, 2, 0]]


def encoder():
    with seeded(0):
        return SetEncoder(4, 6, width=16, hidden=8, points=3).double()


def test_the_set_encoder_ignores_the_order_of_examples_and_of_classes():
    out = encoder()(SETS)
    assert out.shape == (2, 6)
    torch.testing.assert_close(encoder()(OTHER_EXAMPLES), out)
    torch.testing.assert_close(encoder()(OTHER_CLASSES), out)


def test_it_sees_which_example_is_in_which_class():
    mixed = SETS.flatten(1, 2)[:, torch.randperm(15, generator=torch.Generator().manual_seed(1))].view_as(SETS)
    assert (encoder()(mixed) - encoder()(SETS)).abs().max() > 1e-3


def test_prototypes_keep_the_order_of_classes_only():
    out = Prototypes()(SETS)
    torch.testing.assert_close(out.view(2, 3, 4), SETS.mean(2))
    torch.testing.assert_close(Prototypes()(OTHER_EXAMPLES), out)
    assert not torch.allclose(Prototypes()(OTHER_CLASSES), out)


def test_the_size_of_a_set_is_free():
    with seeded(0):
        pool = SetPool(4, 2, hidden=8, points=3).double()
    assert pool(SETS[:, 0]).shape == pool(SETS[:, 0, :1]).shape == (2, 2)


def test_a_width_that_does_not_divide_is_refused():
    with pytest.raises(Refused, match="divide"):
        SetPool(4, 2, hidden=7)
