"""Folders that `datasets` itself has written."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headstart.tasks import load_task

datasets = pytest.importorskip("datasets")
WORDS = ["zebra", "ant"]


def pictures(n: int) -> list[dict[str, object]]:
    made: list[dict[str, object]] = []
    for i in range(n):
        buffer = io.BytesIO()
        Image.fromarray(np.full((5, 4, 3), i, np.uint8)).save(buffer, "PNG")
        made.append({"bytes": buffer.getvalue(), "path": None})
    return made


def saved(path: Path, labels: list[int], **columns: object) -> Path:
    features = {"label": datasets.ClassLabel(names=WORDS)}
    features |= {name: kind for name, (kind, _) in columns.items()}  # type: ignore[misc]
    content = {"label": labels} | {name: values for name, (_, values) in columns.items()}  # type: ignore[misc]
    datasets.Dataset.from_dict(content, features=datasets.Features(features)).save_to_disk(str(path))
    return path


def test_pictures_and_class_names_in_declared_order(tmp_path: Path) -> None:
    labels = [i % 2 for i in range(12)]
    task = load_task(saved(tmp_path / "set", labels, photo=(datasets.Image(), pictures(12))))
    assert (task.modality, task.classes) == ("image", ("zebra", "ant"))
    for i, name in enumerate(task.train.names):
        number = int(name.split()[1])
        assert (task.train.inputs[i] == number).all()
        assert task.train.labels[i] == labels[number]


def test_minus_one_is_no_label(tmp_path: Path) -> None:
    labels = [0, 1] * 6 + [-1, -1]
    task = load_task(saved(tmp_path / "set", labels, text=(datasets.Value("string"), [f"t{i}" for i in range(14)])))
    assert task.modality == "text"
    assert set(task.unlabelled.inputs) == {"t12", "t13"}


def test_a_dictionary_of_splits(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=WORDS)})
    parts = {
        name: datasets.Dataset.from_dict(
            {"text": [f"{name} {i}" for i in range(8)], "label": [i % 2 for i in range(8)]}, features=features
        )
        for name in ("train", "validation", "test", "odd")
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    task = load_task(tmp_path / "set")
    assert set(task.test.inputs) == {f"test {i}" for i in range(8)}
    assert set(task.validation.inputs) == {f"validation {i}" for i in range(8)}
    assert any("'odd' was ignored" in note for note in task.notes)
