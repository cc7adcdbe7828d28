"""What names a thing in the cache: the hash of everything that decides it."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from typing import TYPE_CHECKING, Any

from headstart.tasks.examples import content_hash

if TYPE_CHECKING:
    from headstart.tasks import Examples


def digest(value: Any) -> str:
    """sha256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def manifest(examples: Examples) -> str:
    """sha256 over the content of the examples, in order; not over their names or labels."""
    return digest(list(examples.hashes) or [content_hash(item) for item in examples.inputs])


def preprocess_id(preprocess: object) -> str:
    """What tells two preprocessings apart: the class or function, and the settings that its `repr` shows."""
    kind = preprocess if inspect.isfunction(preprocess) else type(preprocess)
    return f"{kind.__module__}.{kind.__qualname__} {re.sub(r' at 0x[0-9a-f]+', '', repr(preprocess))}"
