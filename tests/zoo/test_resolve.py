"""What the user types becomes sources; what cannot be used here is told, never fatal."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from headstart.core.validate import Refused
from headstart.zoo import Source
from headstart.zoo.resolve import resolve


def named(name: str) -> Source:
    return Source(
        name=name,
        modality="image",
        load=lambda: torch.nn.Linear(2, 2),
        preprocess=lambda raw: torch.zeros(len(raw), 2),
        head="",
        classes=(),
        licence="unknown",
        fingerprint=name,
        kind="mini",
    )


@pytest.fixture
def minis(monkeypatch):
    from headstart.zoo import mini

    monkeypatch.setattr(mini, "mini_sources", lambda: [named("mini:cnn-letters"), named("mini:vit-shapes")])


def names(zoo):
    return [source.name for source in resolve(zoo)[0]]


def test_mini_is_all_of_them_and_a_name_is_one(minis):
    assert names("mini") == ["mini:cnn-letters", "mini:vit-shapes"]
    assert names("mini:vit-shapes") == ["mini:vit-shapes"]
    assert names(" mini:vit-shapes , mini ,") == ["mini:vit-shapes", "mini:cnn-letters"]


def test_sources_pass_through_and_each_name_comes_once(minis):
    mine = named("mine")
    found, skipped = resolve([mine, "mini", mine, "mini:vit-shapes"])
    assert [source.name for source in found] == ["mine", "mini:cnn-letters", "mini:vit-shapes"]
    assert found[0] is mine
    assert not skipped


@pytest.mark.parametrize(
    ("zoo", "told"),
    [
        ("mini:cnn-leters", "Did you mean 'cnn-letters'"),
        ("tim:resnet18", "Did you mean 'timm'"),
        ("resnet18", "must be a known name"),
        ("hf:", "needs a name after the colon"),
        ("", "at least one source"),
        (",,", "at least one source"),
        ([], "at least one source"),
    ],
)
def test_a_zoo_that_does_not_exist_is_refused(zoo, told, minis):
    with pytest.raises(Refused, match=told):
        resolve(zoo)


def test_what_cannot_be_used_here_is_skipped_with_the_reason(minis, tmp_path, monkeypatch, save_model):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    good = save_model("vit")
    found, skipped = resolve(f"mini:vit-shapes,hf:ada/owl,dir:{tmp_path / 'no'},hf:{good},hf:../../etc/x y")
    assert [source.name for source in found] == ["mini:vit-shapes", f"hf:{good}"]
    why = {one.name: one.why for one in skipped}
    assert "HF_HUB_OFFLINE" in why["hf:ada/owl"]
    assert "not a folder" in why[f"dir:{tmp_path / 'no'}"]
    assert "hub name ORG/NAME" in why["hf:../../etc/x y"]


def test_a_missing_package_is_a_reason_to_skip(monkeypatch, save_model):
    folder = save_model("vit")
    real = importlib.util.find_spec
    from headstart.zoo import hf_config

    monkeypatch.setattr(hf_config, "find_spec", lambda name: None if name == "transformers" else real(name))
    found, skipped = resolve(f"hf:{folder}")
    assert not found
    assert "pip install headstart[text]" in skipped[0].why


def test_timm_without_its_packages_is_skipped(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    found, skipped = resolve("timm:resnet18")
    assert not found
    assert "headstart[vision]" in skipped[0].why
