"""Methods and claims are found by what their modules assign."""

from __future__ import annotations

from pathlib import Path

import pytest

import headstart
from headstart.core.catalogue import _assigned, catalogue, claim_modules, load_claim, modules_with
from headstart.core.paper import Paper
from headstart.core.validate import Refused

ROOT = Path(headstart.__file__).parent


def test_only_top_level_assignments_count() -> None:
    text = "PAPER = 1\nCLAIMS: tuple = ()\ndef f():\n    INNER = 2\n# OTHER = 3\n"
    assert _assigned(text) == {"PAPER", "CLAIMS"}


def test_every_entry_has_a_paper_and_slugs_are_sorted_and_unique() -> None:
    entries = catalogue()
    slugs = [entry.slug for entry in entries]
    assert slugs == sorted(set(slugs))
    for entry in entries:
        assert isinstance(entry.paper, Paper)
        assert entry.module.startswith(f"headstart.{entry.room}.")
        assert entry.slug == entry.module.rsplit(".", 1)[1].replace("_", "-")


def test_catalogue_is_every_module_in_a_verb_room_that_assigns_paper() -> None:
    by_grep = {
        f"headstart.{path.parent.name}.{path.stem}"
        for path in ROOT.glob("*/*.py")
        if any(line.startswith(("PAPER =", "PAPER:")) for line in path.read_text(encoding="utf-8").splitlines())
    }
    assert {entry.module for entry in catalogue()} == by_grep


def test_claims_are_found_loaded_and_suggested() -> None:
    known = claim_modules()
    for slug, module in known.items():
        assert module == f"headstart.claims.{slug.replace('-', '_')}"
    with pytest.raises(Refused, match="A claim must exist; got 'no such claim'"):
        load_claim("no such claim")
    if known:
        slug = sorted(known)[0]
        assert load_claim(slug).__name__ == known[slug]
        with pytest.raises(Refused, match=f"Did you mean '{slug}'"):
            load_claim(slug + "x")
    assert set(modules_with("CLAIMS", "claims")) == set(known.values())
