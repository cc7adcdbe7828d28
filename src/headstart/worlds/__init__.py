"""Pictures made by code, or cut from photographs that ship inside scientific packages; deterministic by seed."""

from __future__ import annotations

from . import glyphs as glyphs
from . import gratings as gratings
from . import noise as noise
from . import photographs as photographs
from . import shapes as shapes
from .pictures import Pictures as Pictures
