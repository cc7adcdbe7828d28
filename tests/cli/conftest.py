"""A tiny zoo and a tiny task, made once, and the command line as a stranger runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """zoo/tiny: an untrained mlp; data/: 2 classes of 16 pictures, bright and dark."""
    from headstart import nets
    from headstart.zoo import Source
    from headstart.zoo.export import export_model
    from headstart.zoo.mini import Squared

    root = tmp_path_factory.mktemp("place")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nets.build("mlp", 4).eval()
    source = Source(
        name="test:tiny", modality="image", load=lambda: model,
        preprocess=Squared(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        head="head", classes=("a", "b", "c", "d"), licence="Apache-2.0", fingerprint="0" * 64, kind="mini",
        facts={"architecture": "mlp", "family": "mlp"},
    )  # fmt: skip
    export_model(model, root / "zoo" / "tiny", source=source, classes=source.classes)
    random = np.random.default_rng(0)
    for name, level in (("bright", 170), ("dark", 80)):
        (root / "data" / name).mkdir(parents=True)
        for i in range(16):
            pixels = np.clip(random.normal(level, 25, (12, 12, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "data" / name / f"{i}.png")
    return root


@pytest.fixture
def headstart(place, tmp_path):
    """Runs `headstart ...` in a process of its own, in an empty folder."""
    environment = {**os.environ, "HEADSTART_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

    def run(*words: object, code: int | None = 0, cwd: Path = tmp_path, **more) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-c",
            "import sys; from headstart.cli import main; sys.exit(main())",
            *map(str, words),
        ]
        done = subprocess.run(
            command, env={**environment, **more}, cwd=cwd, capture_output=True, text=True, timeout=120
        )
        assert code is None or done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stdout + done.stderr
        return done

    run.environment = environment
    return run


@pytest.fixture
def fit_words(place):
    """The words of a fit that takes a few seconds."""
    return ("fit", place / "data", "--zoo", f"dir:{place / 'zoo'}", "--routes", "probe", "full", "--folds", "2")
