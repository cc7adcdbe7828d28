"""Two processes on the CPU give the weights of one: data-parallel training through `fit`, unchanged script."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = Path(__file__).with_name("two_processes_run.py")


def launch(folder: Path, processes: int) -> list[dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
               "--master_addr=127.0.0.1", f"--master_port={port}", str(SCRIPT), str(folder)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"weights.{rank}", weights_only=True) for rank in range(processes)]


def test_two_processes_give_the_weights_of_one(tmp_path: Path) -> None:
    """With summed losses, with a gradient rule, and with accumulation; both processes hold the same weights."""
    spec = importlib.util.spec_from_file_location("two_processes_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    two = launch(tmp_path, 2)
    assert [run["world"] for run in two] == [2, 2]
    for rule in script.RULES:
        one, (a, b) = script.train(rule), (run["states"][rule] for run in two)
        for name, value in one.items():
            assert torch.equal(a[name], b[name]), f"{rule}: the processes differ in {name}"
            assert float((a[name] - value).abs().max()) <= 1e-6, f"{rule}: {name}"
        assert sorted(p.name for p in tmp_path.glob(f"{rule}.pt*")) == [f"{rule}.pt", f"{rule}.pt.1"]
