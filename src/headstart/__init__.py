"""headstart starts a new task from what trained models already know.

    import headstart as hs

    task = hs.load_task("digits", labels_per_class=10)
    choice = hs.choose(task)                       # which source, and how sure
    result = hs.fit_task(task, out="runs/digits")  # tuned, audited, judged once
    result.model.predict(task.test.inputs)

Names are imported when they are first used, so `import headstart` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core.validate import Refused as Refused
    from .run.api import choose as choose
    from .run.estimator import HeadstartClassifier as HeadstartClassifier
    from .run.fit import Result as Result
    from .run.fit import fit_task as fit_task
    from .run.predict import Predictor as Predictor
    from .run.predict import load as load
    from .tasks import Task as Task
    from .tasks import doctor as doctor
    from .tasks import load_task as load_task

try:
    __version__ = version("headstart")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0.0.0"

_HOMES = {
    "HeadstartClassifier": "run.estimator",
    "Predictor": "run.predict",
    "Refused": "core.validate",
    "Result": "run.fit",
    "Task": "tasks",
    "choose": "run.api",
    "doctor": "tasks",
    "fit_task": "run.fit",
    "load": "run.predict",
    "load_task": "tasks",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'headstart' has no attribute {name!r}")
    return getattr(import_module(f"headstart.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
