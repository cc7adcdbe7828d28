"""Which room of the package may import which, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Sequence

MODULE_LINES = 200
VERBS = (
    "choose", "adapt", "align", "distill", "merge", "compress", "retain", "attack", "harden", "zeroshot", "generate",
    "language", "control", "measure",
)  # fmt: skip
_SPINE = ("core", "nets")
_DATA = (*_SPINE, "worlds", "tasks", "zoo")
ROOMS: dict[str, tuple[str, ...]] = {
    "core": (),
    "nets": ("core",),
    "worlds": ("core",),
    "tasks": (*_SPINE, "worlds"),
    "zoo": (*_SPINE, "worlds", "tasks"),
    **dict.fromkeys(VERBS, _SPINE),
    "claims": (*_DATA, *VERBS, "testing"),
    "testing": (*_DATA, *VERBS),
    "run": (*_DATA, *VERBS, "claims", "testing"),
    "cli": (*_DATA, *VERBS, "claims", "testing", "run"),
}
"""Room -> the rooms it may import, beside itself: the table of the design."""


def imported_rooms(tree: ast.Module, package: str) -> list[str]:
    """The rooms of headstart that a module's imports name, anywhere in it.

    Args:
        tree: the module.
        package: dotted name of the package it lies in, to resolve relative imports.

    >>> imported_rooms(ast.parse("from ..core.plan import Plan; import headstart.zoo"), "headstart.merge")
    ['core', 'zoo']
    """
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            stem = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
        found += [parts[1] for name in names if (parts := name.split("."))[0] == "headstart" and len(parts) > 1]
    return sorted({room for room in found if not room.startswith("__")})  # __version__ is no room


def forbidden_imports(tree: ast.Module, package: str, allowed: Sequence[str]) -> list[str]:
    """The rooms a module imports beside its own and the allowed ones."""
    parts = package.split(".")
    own = parts[1] if parts[0] == "headstart" and len(parts) > 1 else ""
    return [room for room in imported_rooms(tree, package) if room not in (own, *allowed)]
