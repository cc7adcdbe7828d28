"""Find every method by walking the modules that carry a `PAPER`."""

from __future__ import annotations

import ast
import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from .paper import Paper
from .validate import require, suggestion


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method: its slug, its room, the module that holds it and the paper it comes from."""

    slug: str
    room: str
    module: str
    paper: Paper


@cache
def modules_with(name: str, room: str | None = None) -> tuple[str, ...]:
    """Dotted names of the package's modules that assign the top-level `name`; parsed, not imported.

    >>> "headstart.merge.ties" in modules_with("PAPER")
    True
    """
    root = Path(__file__).parents[1]
    found = []
    for path in sorted((root / room if room else root).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if name in text and name in _assigned(text):
            found.append("headstart." + ".".join(path.relative_to(root).with_suffix("").parts))
    return tuple(found)


def _assigned(text: str) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(text).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names.update(target.id for target in targets if isinstance(target, ast.Name))
    return names


@cache
def catalogue() -> tuple[Entry, ...]:
    """Every method with a paper, sorted by slug. Cost: imports those modules once."""
    entries = []
    for module in modules_with("PAPER"):
        _, room, *rest = module.split(".")
        entries.append(Entry(slug=rest[-1].replace("_", "-"), room=room, module=module,
                             paper=importlib.import_module(module).PAPER))  # fmt: skip
    return tuple(sorted(entries, key=lambda entry: entry.slug))


def claim_modules() -> dict[str, str]:
    """Slug -> module of every claim; nothing is imported."""
    return {name.rsplit(".", 1)[1].replace("_", "-"): name for name in modules_with("CLAIMS", "claims")}


def load_claim(slug: str) -> ModuleType:
    """The claim module of a slug, or a refusal that suggests the nearest one."""
    known = claim_modules()
    require(slug in known, "A claim must exist", repr(slug), suggestion(slug, known))
    return importlib.import_module(known[slug])
