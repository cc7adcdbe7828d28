"""Tasks of rendered characters: letters in unseen fonts, Greek, and the typeface itself."""

from __future__ import annotations

import string

import numpy as np

from .found import Found
from .patches import pictures

GREEK = "αβγδεζηθικλμνξοπρστυφχψω"
GREEK_FONTS = ("DejaVuSans-BoldOblique", "DejaVuSansMono-Bold", "DejaVuSerif-Italic", "STIXGeneralBolIta")
TYPEFACES = {
    "sans": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    "serif": ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    "mono": ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    "times": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    "modern": ("cmr10", "cmb10", "cmti10"),
}


def glyphs() -> Found:
    """Generated capital letters, 40 of each, in fonts that the embedded zoo was not pretrained on: 32x32.

    The embedded models have seen such letters in other fonts, so this shows the machinery, not a hard transfer.
    """
    from headstart.worlds.glyphs import render

    made = render(1040, 2024, classes="upper", fonts="held-out")
    return pictures(made.images, made.labels, made.classes)


def greek() -> Found:
    """Generated small Greek letters, 40 of each of 24, in fonts that the embedded zoo was not pretrained on: 32x32."""
    from headstart.worlds.glyphs import drawn

    made = drawn(GREEK, GREEK_FONTS, 960, 2025)
    return pictures(made.images, made.labels, made.classes)


def typefaces() -> Found:
    """Which of five type families a Latin letter is set in, 120 of each: 32x32.

    Slant, pen width and colour are random, so the shapes tell: serifs, proportions, terminals. The embedded models were
    pretrained to tell letters apart in many of these fonts, that is, to overlook what is asked here.
    """
    from headstart.worlds.glyphs import drawn

    made = [drawn(string.ascii_letters, fonts, 120, 2026 + k).images for k, fonts in enumerate(TYPEFACES.values())]
    return pictures(np.concatenate(made), np.repeat(np.arange(len(made)), 120), tuple(TYPEFACES))
