"""headstart's own record of a preprocessing: a class of the zoo by name, and its settings as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from headstart.core.validate import require

from .source import Preprocess

AGAIN = "Export the model again."


def preprocess_record(preprocess: Preprocess) -> dict[str, Any]:
    """What `preprocess_from` needs to make an equal preprocessing in another process.

    Raises:
        Refused: it is not a frozen dataclass of the zoo with plain settings, so it could not be made again.
    """
    kind = type(preprocess)
    must = "A preprocessing must be a dataclass of headstart.zoo to be exported"
    ours = dataclasses.is_dataclass(preprocess) and kind.__module__.startswith("headstart.zoo.")
    require(ours, must, f"{kind.__module__}.{kind.__qualname__}", "Use the preprocessing of a zoo source.")
    assert dataclasses.is_dataclass(preprocess)
    settings = {field.name: getattr(preprocess, field.name) for field in dataclasses.fields(preprocess) if field.init}
    record = {"class": f"{kind.__module__}.{kind.__name__}", "settings": settings}
    made = preprocess_from(json.loads(json.dumps(record)))
    require(made == preprocess, must + " with plain settings", settings, "Keep numbers, strings and tuples in it.")
    return record


def preprocess_from(record: Mapping[str, Any]) -> Preprocess:
    """The preprocessing of a record; only dataclasses of headstart.zoo are ever made, whatever the file says."""
    module, _, name = str(record.get("class", "")).rpartition(".")
    zoo = module.startswith("headstart.zoo.") and name.isidentifier()
    require(zoo, "A preprocessing record must name a class of headstart.zoo", repr(record.get("class")), AGAIN)
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError):
        kind = None
    known = isinstance(kind, type) and dataclasses.is_dataclass(kind) and "__call__" in dir(kind)
    require(known and kind.__module__ == module, "A preprocessing record must name a known class", repr(name), AGAIN)
    settings = record.get("settings", {})
    fields = {field.name for field in dataclasses.fields(kind) if field.init}
    unknown = sorted(set(settings) - fields)
    require(not unknown, f"{name} must be given its own settings", f"unknown {unknown}", AGAIN)
    made: Preprocess = kind(**{key: _tupled(value) for key, value in settings.items()})
    return made


def _tupled(value: Any) -> Any:
    return tuple(_tupled(part) for part in value) if isinstance(value, list) else value
