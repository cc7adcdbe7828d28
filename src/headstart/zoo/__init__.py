"""What others know: pretrained models to start from (`mini:`, `timm:`, `hf:`, `dir:`)."""

from __future__ import annotations

from .source import Preprocess as Preprocess
from .source import Skipped as Skipped
from .source import Source as Source
