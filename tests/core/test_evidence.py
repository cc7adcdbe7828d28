"""Evidence is checked once, when it is made."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headstart.core.evidence import Evidence, classes_of, extract, forward_features
from headstart.core.stream import Batch
from headstart.core.validate import Refused
from headstart.testing.subject import difference, snapshot


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"features": torch.zeros(0, 2)}, "n > 0"),
        ({"features": torch.zeros(2, 2, 2)}, "Flatten"),
        ({"features": torch.tensor([[torch.nan]])}, "1 NaN or infinite values of 1"),
        ({"features": torch.tensor([[torch.inf, 1.0]])}, "features must be finite"),
        ({"features": torch.zeros(2, 2), "labels": torch.zeros(3, dtype=torch.long)}, "one row for each of 2"),
        ({"features": torch.zeros(2, 2), "labels": torch.zeros(2)}, "labels must be integers"),
        ({"features": torch.zeros(2, 2), "labels": torch.zeros(2, 1, dtype=torch.long)}, "labels must be integers"),
        ({"features": torch.zeros(1, 2), "logits": torch.tensor([[torch.nan]])}, "logits must be finite"),
    ],
)
def test_bad_evidence_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(Refused, match=message):
        Evidence(**fields)


def test_need_returns_in_order_and_names_what_is_missing() -> None:
    e = Evidence(features=torch.zeros(2, 2), labels=torch.arange(2))
    labels, features = e.need("labels", "features")
    assert labels is e.labels
    assert features is e.features
    with pytest.raises(Refused, match=r"evidence with logits; got features, labels only\. Pass logits="):
        e.need("labels", "logits")


def test_take_keeps_rows_together() -> None:
    e = Evidence(features=torch.arange(3.0)[:, None], labels=torch.arange(3), logits=torch.arange(3.0)[:, None])
    rows = torch.tensor([2, 0, 2])
    t = e.take(rows)
    assert t.labels is not None
    assert t.logits is not None
    assert t.labels.tolist() == t.features[:, 0].tolist() == t.logits[:, 0].tolist() == [2, 0, 2]
    assert Evidence(features=torch.zeros(3, 1)).take(rows).labels is None


def test_classes_of_renumbers_and_refuses_one_class() -> None:
    renumbered, count = classes_of(torch.tensor([90, 2, 90, 7]))
    assert renumbered.tolist() == [2, 0, 2, 1]
    assert count == 3
    with pytest.raises(Refused, match="at least two classes"):
        classes_of(torch.zeros(4, dtype=torch.long))


def test_extract_is_the_input_of_the_head_in_eval_mode() -> None:
    model = perceptron().train()
    x, y = torch.randn(7, 4), torch.arange(7) % 2
    before = snapshot(model)
    e = extract(model, [(x[:5], y[:5]), Batch(x[5:], y[5:])])
    assert not difference(before, snapshot(model))
    model.eval()
    assert torch.allclose(e.features, model[:3](x), atol=1e-6)
    assert e.logits is not None
    assert torch.allclose(e.logits, model(x), atol=1e-6)
    assert e.labels is not None
    assert torch.equal(e.labels, y)
    assert not e.features.requires_grad


def test_extract_without_all_labels_has_none_and_refuses_no_batches() -> None:
    x = torch.randn(2, 4)
    assert extract(perceptron(), [(x, torch.arange(2)), x]).labels is None
    with pytest.raises(Refused, match="at least one batch"):
        extract(perceptron(), [])


def test_modes_come_back_when_the_reader_stops_early_or_the_model_raises() -> None:
    model = perceptron().train()
    reader = forward_features(model, iter([torch.randn(2, 4)] * 3))
    next(reader)
    reader.close()
    assert all(m.training for m in model.modules())
    with pytest.raises(RuntimeError):
        list(forward_features(model, [torch.randn(2, 9)]))
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())


def test_another_head_may_be_named() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(2, 4)
    features, _ = next(forward_features(model, [x], head="0"))
    assert torch.equal(features, x)
