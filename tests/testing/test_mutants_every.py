"""Each check of every method rejects a method made wrong in that one way."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from headstart.testing.every import EVERY
from headstart.testing.merge_rule import MERGE_RULE
from headstart.testing.subject import Subject

RIGHT = '''"""The mean of models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from headstart.core.paper import Paper
from headstart.core.validate import require
from headstart.core.weights import by_tensor

PAPER = Paper(title="A Title", authors="An Author", year=2020, arxiv="2001.00001")


@dataclass(frozen=True)
class Mean:
    """The middle of several models.

    Args:
        weight: of the mean against the base, in (0, 1].

    Cost: one pass.

    Reference: none.

    >>> Mean().weight
    1.0
    """

    weight: float = 1.0
    scope: ClassVar[str] = "tensor"
    symmetric: ClassVar[bool] = True

    def merge(self, models, *, base=None, importance=None):
        require(0 < self.weight <= 1, "Mean needs 0 < weight <= 1", self.weight, "Pass a fraction.")
        def combine(name, stacked, base, importance):
            mean = stacked.mean(0)
            return mean if base is None else base + self.weight * (mean - base)
        return by_tensor(combine, models, base)
'''
RETURN = "        return by_tensor(combine, models, base)\n"
SPOIL = "        models = [{n: t.nan_to_num() if t.is_floating_point() else t for n, t in m.items()} for m in models]\n"
WIDE = (
    "        merged = by_tensor(combine, models, base)\n"
    "        return {n: t.float() if t.is_floating_point() else t for n, t in merged.items()}\n"
)

MUTANTS: dict[str, list[tuple[str, str]]] = {
    "paper_complete": [
        ('PAPER = Paper(title="A Title"', 'OTHER = Paper(title="A Title"'), ('title="A Title"', 'title=" "'),
        ("year=2020", "year=20"), ('arxiv="2001.00001"', 'arxiv="arXiv:2001.00001"'),
    ],
    "docstring_sections": [
        ("    Cost: one pass.\n", ""), ("    Reference: none.\n", ""), ("weight: of the", "other: of the"),
        (">>> Mean().weight", "Mean().weight"), ("several models.\n", "several models\n"),
    ],
    "repr_gives_it_back": [("weight: float = 1.0", "weight: float = field(default=1.0, repr=False)")],
    "nan_settings_refused": [("        require(0 < self.weight", "        require(not self.weight <= 0")],
    "inputs_untouched": [(RETURN, "        models[0]['scale'].add_(1)\n" + RETURN)],
    "random_state_untouched": [(RETURN, "        torch.rand(1)\n" + RETURN)],
    "same_result_again": [("mean = stacked.mean(0)", "mean = stacked.mean(0) + 0.01 * torch.randn(())")],
    "follows_dtype_and_device": [(RETURN, WIDE)],
    "bad_input_refused": [
        (RETURN, "        first = models[0]\n" + RETURN), (RETURN, "        if not models: return {}\n" + RETURN),
        (RETURN, "        if not models: raise ValueError('no models')\n" + RETURN),
    ],
    "nan_is_not_hidden": [(RETURN, SPOIL + RETURN)],
    "module_is_short": [(RETURN, RETURN + "# padding\n" * 180)],
    "imports_what_it_may": [
        ("import torch\n", "import torch\nfrom headstart.tasks import Task\n"),
        (RETURN, "        import headstart.zoo.source\n" + RETURN),
    ],
}  # fmt: skip
counter = itertools.count()


def subject(text: str, folder: Path) -> Subject:
    """The class Mean of a module with this source."""
    name = f"headstart_mutant_{next(counter)}"
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    refuses = (lambda: module.Mean(2.0).merge([{"w": torch.ones(1)}]),)
    return Subject(make=lambda: module.Mean(0.5), kind=MERGE_RULE, refuses=refuses)


def test_every_check_has_a_mutant() -> None:
    assert set(MUTANTS) == {check.name for check in EVERY}


@pytest.mark.parametrize("check", EVERY, ids=lambda check: check.name)
def test_the_right_method_passes(check, tmp_path: Path) -> None:
    right = subject(RIGHT, tmp_path)
    assert check.applies(right)
    check.run(right)


@pytest.mark.parametrize(("name", "old", "new"), [(name, *edit) for name, edits in MUTANTS.items() for edit in edits])
def test_the_check_rejects_its_mutant(name: str, old: str, new: str, tmp_path: Path) -> None:
    assert RIGHT.count(old) == 1
    (check,) = [check for check in EVERY if check.name == name]
    mutant = subject(RIGHT.replace(old, new), tmp_path)
    with pytest.raises(AssertionError):
        check.run(mutant)


def test_a_setting_that_should_be_refused_and_is_not(tmp_path: Path) -> None:
    (check,) = [check for check in EVERY if check.name == "bad_input_refused"]
    with pytest.raises(AssertionError, match=r"refuses\[0\] was accepted"):
        check.run(subject(RIGHT.replace("self.weight <= 1,", "self.weight,"), tmp_path))
