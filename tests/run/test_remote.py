"""Ranking on a Ray cluster: the same numbers, and a worker may die."""

from __future__ import annotations

import importlib.util
import os
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from headstart.core.validate import Refused
from headstart.run.cache import Cache
from headstart.run.rank import choose
from headstart.run.remote import crew
from headstart.tasks import load_task
from headstart.zoo.source import Source


def test_here_is_a_map_in_order():
    assert list(crew("here")(lambda x: 2 * x, [3, 1, 2])) == [6, 2, 4]


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"workers='ray' needs the package ray; got none. Run `pip install"):
        crew("ray")


def make_zoo(marker: str | None):
    """Two sources, defined inside so that they travel by value; the second kills its process the first time."""

    @dataclass(frozen=True)
    class Flat:
        def __call__(self, raw):
            return torch.from_numpy(np.stack(raw)).float().flatten(1) / 255

        def __repr__(self):
            return "Flat()"

    def load(seed):
        if seed == 1 and marker and not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        generator = torch.Generator().manual_seed(seed)
        model = nn.Sequential(nn.Linear(48, 512), nn.ReLU(), nn.Linear(512, 16), nn.ReLU(), nn.Linear(16, 5))
        for p in model.parameters():
            p.data = torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5
        return model.eval()

    common = {
        "modality": "image",
        "preprocess": Flat(),
        "head": "4",
        "classes": (),
        "licence": "CC0-1.0",
        "kind": "mini",
    }
    return [Source(name=f"tiny:{k}", load=partial(load, k), fingerprint=f"tiny {k}", **common) for k in range(2)]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `scale`")
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_local_cluster_gives_the_same_numbers_though_a_worker_dies(tmp_path):
    import ray

    rng = np.random.default_rng(0)
    y = np.arange(240) % 3
    x = rng.integers(60, 196, (240, 4, 4, 3))
    x[np.arange(240), 0, y] += 45
    task = load_task((x.astype(np.uint8), y), labels_per_class=20, name="rows")
    marker = tmp_path / "died"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        far = choose(task, make_zoo(str(marker)), cache=Cache(tmp_path / "ray"), budget=0.99, workers="ray")
    finally:
        ray.shutdown()
    assert marker.exists()
    near = choose(task, make_zoo(None), cache=Cache(tmp_path / "here"), budget=0.99)
    assert set(far.stages[2].sources) == {"tiny:0", "tiny:1"}
    assert far.ranking == near.ranking
    assert far.cost == near.cost
    assert (far.best, far.skipped, far.agreement) == (near.best, near.skipped, near.agreement)
