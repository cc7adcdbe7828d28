"""Learn the next task and keep the last."""

from .ewc import EWC as EWC
