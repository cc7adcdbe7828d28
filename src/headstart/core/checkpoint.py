"""The state of a run, saved so that it can be taken up again bit for bit."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from .plan import Plan
from .rng import random_state, restore_random_state
from .validate import require

if TYPE_CHECKING:
    from accelerate import Accelerator


def path_of(checkpoint: Path | str, rank: int) -> Path:
    """Each process keeps its own file, because each has its own random state."""
    path = Path(checkpoint)
    return path if rank == 0 else path.with_name(f"{path.name}.{rank}")


class State:
    """Everything that decides the rest of a run: weights, optimizer, random state, memories, position.

    Frozen parameters are left out unless an `after_step` could change them (a moving-average teacher).
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, plan: Plan, seed: int, accelerator: Accelerator
    ) -> None:
        self.module, self.optimizer, self.accelerator = module, optimizer, accelerator
        self.memories: list[Any] = [call for call in plan.after_step if isinstance(call, Stateful)]
        frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
        self.left_out = set() if plan.after_step else frozen
        shapes = {name: list(value.shape) for name, value in self._weights().items()}
        self.identity = {"steps": plan.steps, "seed": seed, "shapes": shapes}

    def _weights(self) -> dict[str, Tensor]:
        return {name: v for name, v in self.module.state_dict().items() if name not in self.left_out}

    def save(self, path: Path, step: int, losses: list[Tensor]) -> None:
        """Write beside `path`, flush, rename: a reader finds the old state or the new one, never half of one."""
        seen = torch.stack(losses).cpu()
        require(bool(torch.isfinite(seen).all()), "The loss must stay finite", f"NaN by step {step}",
                "Lower the learning rate; the last good checkpoint is kept.")  # fmt: skip
        scaler = self.accelerator.scaler
        state = {
            "step": step, "losses": seen, "identity": self.identity, "weights": self._weights(),
            "optimizer": self.optimizer.state_dict(), "random": random_state(),
            "memories": [memory.state_dict() for memory in self.memories],
            "scaler": scaler.state_dict() if scaler else {},
        }  # fmt: skip
        write_atomically(path, lambda file: torch.save(state, file))

    def load(self, path: Path) -> tuple[int, list[Tensor]]:
        """Take up the state in `path`; returns the steps done and their losses."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        require(state["identity"] == self.identity, "A checkpoint resumes the plan it came from",
                f"{path} of another plan, seed or number of steps", "Delete it or set resume=False.")  # fmt: skip
        self.module.load_state_dict(state["weights"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        for memory, kept in zip(self.memories, state["memories"], strict=True):
            memory.load_state_dict(kept)
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        restore_random_state(state["random"])
        return state["step"], list(state["losses"].to(self.accelerator.device).unbind())


def write_atomically(path: Path, write: Any) -> None:
    """Call `write(file)` on a temporary neighbour of `path`, flush it to disk and rename it into place.

    A full disk or a kill leaves what was there before; the temporary file is removed on any error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
