"""Files that other tools wrote: objects, known keys, and one value for the whole model."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from headstart.core.validate import Refused, require, suggestion


def json_object(path: Path, do: str) -> dict[str, Any]:
    """The object that a JSON file holds."""
    content: Any
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        content = error
    require(isinstance(content, dict), f"{path.name} must hold a JSON object", type(content).__name__, do)
    return dict(content)


def load(text: str) -> Mapping[str, Any]:
    """The mapping that a YAML text holds; no objects are made."""
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise Refused(f"A merge file must be YAML; got {' '.join(str(error).split())}. Correct it.") from None
    return table("a merge file", content)


def table(name: str, content: object) -> Mapping[str, Any]:
    """A mapping with names as keys; nothing is an empty one."""
    require(content is None or isinstance(content, dict), f"{name} must hold keys and values", repr(content),
            "Write KEY: VALUE.")  # fmt: skip
    return {} if content is None else {str(key): value for key, value in content.items()}  # type: ignore[attr-defined]


def known(who: str, given: Mapping[str, Any], choices: Collection[str]) -> None:
    """Refuse keys outside `choices`, with the nearest one suggested."""
    for key in given:
        require(key in choices, f"{who} must have known keys", repr(key), suggestion(key, choices))


def number(name: str, value: Any) -> float:
    """One finite number for the whole model."""
    value = _scalar(name, value)
    try:  # YAML reads 1e-3 as text
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    require(math.isfinite(found), f"{name} must be a finite number", repr(value), "Write a number such as 0.5.")
    return found


def switch(name: str, value: Any) -> bool:
    """Yes or no for the whole model."""
    value = _scalar(name, value)
    require(value in (True, False), f"{name} must be true or false", repr(value), "Write true or false.")
    return bool(value)


def _scalar(name: str, value: Any) -> Any:
    """One value for the whole model; a list of layers or filters is refused, unless it is one value for all."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict) and value.get("filter") is None and set(value) <= {"filter", "value"}:
        value = value.get("value")
    filtered = isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict) for v in value))
    kind = "values by filter" if filtered else "a gradient over layers"
    require(not isinstance(value, list | dict), f"{name} must be one value for the whole model", f"{kind}, {value}",
            "Write one value, or merge with mergekit itself.")  # fmt: skip
    return value
