"""What all tests share: one thread, no network, small models that do not depend on random state."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

torch.set_num_threads(1)

pytest_plugins = ["pytester"]
