"""timm models merged on disk come back through timm itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headstart.core.weights import LazyWeights
from headstart.merge import TaskArithmetic
from headstart.run.ingredients import open_ingredient
from headstart.run.merging import merge_models
from headstart.run.predict import load

try:
    import timm
except (ImportError, RuntimeError) as problem:  # a torchvision of another torch fails with RuntimeError
    pytest.skip(f"timm cannot be imported: {problem}", allow_module_level=True)


@pytest.mark.parametrize("architecture", ["resnet10t", "vit_tiny_patch16_224"])
def test_timm_loads_what_was_merged(architecture: str, tmp_path: Path) -> None:
    labels = ["ash", "birch", "cedar"]
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        model = timm.create_model(architecture, pretrained=False, num_classes=3)
        for name in ("base", "one", "two"):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.01 * torch.randn_like(p))
            timm.models.save_for_hf(model, tmp_path / name, {"label_names": labels}, safe_serialization=True)
    opened = [open_ingredient(str(tmp_path / name)) for name in ("base", "one", "two")]
    rule = TaskArithmetic(scale=0.5)
    merge_models(rule, opened[1:], tmp_path / "out", base=opened[0])
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    expected = rule.merge([one.weights for one in opened[1:]], base=opened[0].weights)
    assert set(again.state_dict()) == set(LazyWeights(tmp_path / "out"))
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    assert load(tmp_path / "out").classes == tuple(labels)
