"""Pictures made by code, or cut from photographs that ship inside scientific packages; deterministic by seed."""

from __future__ import annotations

from . import glyphs as glyphs
from .pictures import Pictures as Pictures
