"""The audit fails on each way in which nothing, or the wrong thing, was transferred."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from headstart import nets
from headstart.core.surgery import with_head
from headstart.core.validate import Refused
from headstart.tasks import load_task
from headstart.zoo.audit import (
    audit_after,
    audit_before,
    check_loaded,
    load_report,
    load_weights,
    movement,
)
from headstart.zoo.mini import Squared
from headstart.zoo.source import Source


def fresh(classes: int = 26) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nets.build("resnet", classes).eval()


@pytest.fixture(scope="module")
def task():
    return load_task("digits", labels_per_class=2)


@pytest.fixture
def source():
    return Source(
        name="mini:made-here",
        modality="image",
        load=fresh,
        preprocess=Squared(size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)),
        head="head",
        classes=tuple("abcdefghijklmnopqrstuvwxyz"),
        licence="CC0-1.0",
        fingerprint="f" * 64,
        kind="mini",
        facts={"family": "resnet", "input_size": 32},
    )


@pytest.fixture
def model(source):
    return with_head(source.load(), 10, "head").eval()


def failed(audit):
    return [finding.name for finding in audit.failures]


def test_shares_count_elements_of_the_model():
    layer = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2))
    weights = {"0.weight": torch.zeros(3, 4), "1.weight": torch.zeros(2, 9), "2.bias": torch.zeros(1)}
    report = load_report(layer, weights)
    assert (report.loaded, report.mismatched) == (("0.weight",), ("1.weight",))
    assert (report.missing, report.unexpected) == (("1.bias",), ("2.bias",))
    assert (report.loaded_share, report.mismatched_share, report.missing_share) == (12 / 20, 6 / 20, 2 / 20)


def test_a_tied_weight_is_loaded_under_either_name():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    report = load_weights(model, {"1.weight": torch.full((3, 3), 2.0)})
    assert not report.missing
    assert report.loaded_share == 1.0
    assert (model[0].weight == 2).all()


@pytest.mark.parametrize(
    ("weights", "allow", "told"),
    [
        ({"0.weight": 0, "head.weight": 0, "head.bias": 0}, (), None),
        ({"0.weight": 0}, (), "missing head.weight, head.bias"),
        ({"0.weight": 0}, ("missing-head",), None),
        ({"head.weight": 0, "head.bias": 0}, ("missing-head",), "missing 0.weight"),
        ({"head.weight": 0, "head.bias": 0}, ("missing",), None),
        ({"0.weight": 0, "head.weight": 1, "head.bias": 0}, (), "mismatched head.weight"),
        ({"0.weight": 0, "head.weight": 1, "head.bias": 0}, ("mismatched-head",), None),
        ({"0.weight": 0, "head.weight": 0, "head.bias": 0, "heads": 0}, ("unexpected-head",), "unexpected heads"),
        ({"0.weight": 0, "head.weight": 0, "head.bias": 0, "head.scale": 0}, ("unexpected-head",), None),
    ],
)
def test_only_declared_exceptions_pass(weights, allow, told):
    model = nn.ModuleDict({"0": nn.Linear(2, 2, bias=False), "head": nn.Linear(2, 2)})
    own = model.state_dict()
    held = {key: torch.zeros(7) if wrong else own.get(key, torch.zeros(1)).clone() for key, wrong in weights.items()}
    report = load_report(model, held, head="head")
    if told is None:
        check_loaded(report, allow)
    else:
        with pytest.raises(Refused, match=told):
            check_loaded(report, allow)


def test_an_unknown_exception_is_refused_with_the_nearest():
    with pytest.raises(Refused, match="Did you mean 'missing-head'"):
        check_loaded(load_report(nn.Linear(2, 2), {}), {"missing-heads"})


def test_nothing_is_copied_when_the_checkpoint_is_refused():
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    with pytest.raises(Refused):
        load_weights(model, {"weight": torch.zeros(2, 2)})
    assert torch.equal(model.weight, before)


def test_a_right_start_passes_and_says_what_will_train(source, model, task):
    audit = audit_before(source, model, task)
    assert audit.passed, audit.failures
    detail = {finding.name: finding.detail for finding in audit.findings}
    assert "100.0%" in detail["values"]
    assert "(3, 32, 32)" in detail["input"]
    assert f"{sum(p.numel() for p in model.parameters()):,} of" in detail["trains"]
    assert "head" in detail["trains"]


def test_reinitialised_weights_are_found(source, task):
    with torch.random.fork_rng():
        scratch = nets.build("resnet", 10).eval()
    audit = audit_before(source, scratch, task)
    assert failed(audit) == ["values"]
    assert audit_before(source, scratch, task, allow={"values"}).passed


def test_one_layer_that_lost_its_weights_is_named(source, model, task):
    key = next(key for key, value in model.named_parameters() if value.ndim == 4)
    with torch.no_grad():
        model.get_parameter(key).zero_()
    (finding,) = audit_before(source, model, task).failures
    assert finding.name == "values"
    assert key in finding.detail


def test_missing_layers_are_found(source, task):
    other = nets.build("cnn", 10).eval()
    assert "keys" in failed(audit_before(source, other, task))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"modality": "text"}, "modality"),
        ({"preprocess": Squared(size=16, mean=(0.4,) * 3, std=(0.2,) * 3)}, "input"),
        ({"preprocess": Squared(size=32, mean=(0.4,) * 3, std=(float("nan"),) * 3)}, "input"),
        ({"preprocess": lambda raw: torch.zeros(len(raw), 3, 32, 32)}, "input"),
        ({"preprocess": lambda raw: torch.randn(len(raw), 1, 32, 32)}, "input"),
        ({"facts": {"input_size": (3, 64, 64)}}, "input"),
    ],
)
def test_a_source_that_does_not_fit_the_task_is_found(change, name, source, model, task):
    assert failed(audit_before(replace(source, **change), model, task)) == [name]


def test_a_head_of_the_wrong_width_is_found(source, task):
    assert failed(audit_before(source, with_head(source.load(), 7, "head").eval(), task)) == ["head"]


def test_a_plan_that_trains_nothing_is_found(source, model, task):
    frozen = fresh(10).requires_grad_(False)
    assert failed(audit_before(source, model, task, trained=frozen)) == ["trains"]


def test_the_audit_changes_nothing(source, model, task):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    model.train()
    audit_before(source, model, task)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.fixture
def after(model):
    """(before, after, reloaded, batch) of a run that went well."""
    trained = with_head(model, 10, "head").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    reloaded = nets.build("resnet", 10).eval()
    reloaded.load_state_dict(trained.state_dict())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    return before, trained, reloaded, torch.rand(5, 3, 32, 32, generator=generator)


def test_a_good_run_passes(after):
    audit = audit_after(*after, head="head")
    assert audit.passed, audit.failures
    assert [finding.name for finding in audit.findings][:3] == ["finite", "moved", "head-moved"]


def test_movement_is_the_relative_norm_of_each_block():
    before = {"a.w": torch.tensor([3.0, 4.0]), "b.w": torch.zeros(2), "a.count": torch.tensor(1)}
    after = {"a.w": torch.tensor([3.0, 4.5]), "b.w": torch.zeros(2), "a.count": torch.tensor(9)}
    assert movement(before, after) == {"a": 0.1, "b": 0.0}
    assert movement({"b.w": torch.zeros(2)}, {"b.w": torch.ones(2)}) == {"b": float("inf")}


def test_a_run_that_moved_nothing_is_found(after):
    _, trained, reloaded, batch = after
    same = {key: value.clone() for key, value in trained.state_dict().items()}
    assert failed(audit_after(same, trained, reloaded, batch, head="head")) == ["moved", "head-moved"]


def test_a_head_that_never_trained_is_found(after):
    before, trained, reloaded, batch = after
    for key in ("head.weight", "head.bias"):
        before[key] = trained.state_dict()[key].clone()
    audit = audit_after(before, trained, reloaded, batch, head="head")
    assert failed(audit) == ["head-moved"]
    assert audit_after(before, trained, reloaded, batch, head="head", allow={"head-moved"}).passed


def test_a_frozen_weight_that_moved_is_found(after):
    key = next(key for key in after[0] if not key.startswith("head"))
    (finding,) = audit_after(*after, head="head", frozen=[key]).failures
    assert finding.name == "frozen"
    assert key in finding.detail


def test_a_head_lost_on_reload_is_found(after):
    with torch.no_grad():
        after[2].get_submodule("head").weight[0, 0] += 1e-7
        after[2].get_submodule("head").weight[1] += 1
    assert failed(audit_after(*after, head="head")) == ["restored", "head-restored", "predictions"]


def test_one_bit_lost_on_reload_is_found(after):
    with torch.no_grad():
        value = after[2].get_submodule("head").bias
        value[0] = torch.nextafter(value[0], torch.tensor(9.0))
    assert failed(audit_after(*after, head="head")) == ["restored", "head-restored"]


def test_a_reloaded_model_that_computes_something_else_is_found(after):
    before, trained, reloaded, batch = after
    reloaded.register_forward_hook(lambda module, inputs, output: output.flip(1))
    assert failed(audit_after(before, trained, reloaded, batch, head="head")) == ["predictions"]


def test_exploded_weights_are_found(after):
    with torch.no_grad():
        for model in after[1:3]:
            model.get_submodule("head").weight[0, 0] = float("inf")
    assert "finite" in failed(audit_after(*after, head="head"))


def test_training_mode_is_given_back(after):
    after[1].train()
    audit_after(*after, head="head")
    assert after[1].training
    assert not after[2].training


def test_blocks_of_a_wrapped_model_are_told_apart(after):
    before, trained, reloaded, batch = after
    outer, again = nn.ModuleDict({"model": trained}), nn.ModuleDict({"model": reloaded})
    outer.forward, again.forward = trained.forward, reloaded.forward
    wrapped = {f"model.{key}": value for key, value in before.items()}
    audit = audit_after(wrapped, outer, again, batch, head="model.head")
    assert audit.passed, audit.failures
    assert "model.head from zero" in next(finding.detail for finding in audit.findings if finding.name == "moved")
