"""`kill -9` in mid-training loses nothing but the steps since the last checkpoint."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from headstart.core.checkpoint import write_atomically
from headstart.core.loop import fit
from headstart.testing.subject import difference

SCRIPT = Path(__file__).with_name("interrupted_run.py")


def test_resuming_after_kill_nine_gives_the_unbroken_run(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("interrupted_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    path = tmp_path / "run.pt"
    victim = subprocess.Popen([sys.executable, str(SCRIPT), str(path)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 60
        while not path.exists() or torch.load(path, weights_only=True)["step"] < 5:
            assert victim.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    assert victim.returncode == -signal.SIGKILL
    done = torch.load(path, weights_only=True)["step"]
    assert 5 <= done < 40
    steps: list[int] = []
    resumed = fit(script.plan(), device="cpu", checkpoint=path, every=1, resume=True,
                  progress=lambda step, _: steps.append(step))  # fmt: skip
    unbroken = fit(script.plan(), device="cpu")
    assert steps == list(range(done + 1, 41))
    assert not difference(dict(unbroken.model.state_dict()), dict(resumed.model.state_dict()))
    assert torch.equal(unbroken.losses, resumed.losses)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    write_atomically(path, lambda file: file.write(b"old"))

    def half(file) -> None:
        file.write(b"half of the new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, half)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_a_full_disk_in_training_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("interrupted_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    path, real, calls = tmp_path / "run.pt", torch.save, []

    def save(state: object, file) -> None:
        calls.append(1)
        if len(calls) == 3:
            file.write(b"some")
            raise OSError(28, "No space left on device")
        real(state, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space left"):
        fit(script.plan(), device="cpu", checkpoint=path, every=4)
    assert torch.load(path, weights_only=True)["step"] == 8
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    resumed = fit(script.plan(), device="cpu", checkpoint=path, every=4, resume=True)
    unbroken = fit(script.plan(), device="cpu")
    assert not difference(dict(unbroken.model.state_dict()), dict(resumed.model.state_dict()))
