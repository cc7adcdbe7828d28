from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from headstart.tasks import Task, load_task

Make = Callable[..., Path]


def frame(n: int = 40) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "width": rng.normal(size=n).round(6),
            "height": rng.integers(0, 99, n),
            "remark": [f"text {i}" for i in range(n)],
            "kind": np.where(np.arange(n) % 2, "b", "a"),
        }
    )


def write(table: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


def row(name: str) -> int:
    return int(name.removeprefix("row "))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_numbers_and_labels_come_row_by_row(tmp_path: Path, suffix: str) -> None:
    table = frame()
    task = load_task(write(table, tmp_path / f"data{suffix}"), label_column="kind", feature_columns=["height", "width"])
    assert (task.modality, task.classes, task.name) == ("numeric", ("a", "b"), "data")
    for i, name in enumerate(task.train.names):
        assert task.train.inputs[i].tolist() == pytest.approx(table.loc[row(name), ["height", "width"]].tolist())
        assert task.classes[task.train.labels[i]] == table.kind[row(name)]


def same(one: Task, two: Task) -> bool:
    return one.manifest == two.manifest and torch.equal(one.train.labels, two.train.labels)


def test_all_formats_and_the_frame_give_one_task(tmp_path: Path) -> None:
    flags = {"label_column": "kind", "feature_columns": ["width", "height"]}
    tasks = [load_task(write(frame(), tmp_path / f"data.{s}"), **flags) for s in ("csv", "tsv", "jsonl", "parquet")]
    tasks.append(load_task(frame(), **flags))
    assert all(same(tasks[0], task) for task in tasks)


def test_numeric_columns_are_the_default_and_others_are_noted(tmp_path: Path) -> None:
    task = load_task(write(frame(), tmp_path / "data.csv"), label_column="kind")
    assert task.train.inputs.columns == ("width", "height")
    assert task.notes == ("columns that hold no numbers were ignored: remark",)


def test_usual_names_need_no_flag(tmp_path: Path) -> None:
    table = frame().rename(columns={"kind": "Label", "remark": "text"})
    task = load_task(write(table, tmp_path / "data.csv"))
    assert task.modality == "text"
    assert task.train.inputs[0] == f"text {row(task.train.names[0])}"


def test_a_text_column_is_taken_by_name(tmp_path: Path) -> None:
    task = load_task(write(frame(), tmp_path / "data.csv"), text_column="remark", label_column="kind")
    assert task.modality == "text"
    assert {*task.train.inputs, *task.validation.inputs, *task.test.inputs} == set(frame().remark)


def test_picture_files_are_relative_to_the_table(folder: Make) -> None:
    root = folder({"cat": 6, "dog": 6})
    files = sorted(path.relative_to(root.parent).as_posix() for path in root.rglob("*.png"))
    table = pd.DataFrame({"shot": files, "label": [Path(file).parent.name for file in files]})
    task = load_task(write(table, root.parent / "data.csv"), image_column="shot")
    assert task.modality == "image"
    for i, name in enumerate(task.test.names):
        assert np.array_equal(task.test.inputs[i], np.asarray(Image.open(root.parent / name)))


def test_a_missing_picture_is_named_and_skipped(folder: Make) -> None:
    root = folder({"cat": 10, "dog": 10})
    files = [*sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png")), "cat/gone.png"]
    table = pd.DataFrame({"image": files, "label": [Path(file).parent.name for file in files]})
    task = load_task(write(table, root / "data.csv"))
    assert task.notes == ("skipped cat/gone.png: missing",)
    assert sum(map(len, (task.train, task.validation, task.test))) == 20


def test_labels_stay_as_written(tmp_path: Path) -> None:
    table = frame().assign(kind=np.where(np.arange(40) % 2, "01", "1"))
    assert load_task(write(table, tmp_path / "data.csv"), label_column="kind").classes == ("01", "1")


def test_a_class_may_be_called_none(tmp_path: Path) -> None:
    table = frame().assign(kind=np.where(np.arange(40) % 2, "None", "some"))
    assert load_task(write(table, tmp_path / "data.csv"), label_column="kind").classes == ("None", "some")


def test_whole_numbers_and_booleans_become_words() -> None:
    assert load_task(frame().assign(kind=np.arange(40.0) % 2 + 9), label_column="kind").classes == ("9", "10")
    assert load_task(frame().assign(kind=np.arange(40) % 2 == 0), label_column="kind").classes == ("False", "True")


def test_categories_keep_their_order() -> None:
    kind = pd.Categorical(frame().kind, categories=["b", "a", "never"])
    task = load_task(frame().assign(kind=kind), label_column="kind")
    assert task.classes == ("b", "a")
    assert "class 'never' is declared and has no example" in task.notes


def test_a_split_column_decides_and_is_no_feature() -> None:
    part = ["train"] * 20 + ["Valid"] * 8 + ["TEST"] * 8 + ["unlabelled"] * 4
    task = load_task(frame().assign(part=part), label_column="kind", split_column="part")
    assert task.test.names == tuple(f"row {i}" for i in range(28, 36))
    assert task.validation.names == tuple(f"row {i}" for i in range(20, 28))
    assert task.unlabelled.names == tuple(f"row {i}" for i in range(36, 40))
    assert task.train.inputs.columns == ("width", "height")


def test_a_row_marked_unlabelled_needs_no_label() -> None:
    table = frame().assign(part=["train"] * 38 + ["unlabelled"] * 2)
    table.loc[38:, "kind"] = None
    assert len(load_task(table, label_column="kind", split_column="part").unlabelled) == 2


def test_rows_without_label_can_be_unlabelled() -> None:
    table = frame()
    table.loc[[3, 8], "kind"] = None
    task = load_task(table, label_column="kind", missing_labels="unlabelled")
    assert task.unlabelled.names == ("row 3", "row 8")


def test_numbers_beside_words_can_be_class_names() -> None:
    table = frame().assign(kind=np.where(np.arange(40) % 2, "7", "G"))
    assert load_task(table, label_column="kind", label_type="text").classes == ("7", "G")


def test_an_empty_text_is_named_and_skipped() -> None:
    table = frame()
    table.loc[5, "remark"] = "  "
    task = load_task(table, label_column="kind", text_column="remark")
    assert task.notes == ("skipped row 5: no text",)
    assert "row 5" not in (*task.train.names, *task.validation.names, *task.test.names)
    for i, name in enumerate(task.train.names):
        assert task.train.inputs[i] == f"text {row(name)}"
        assert task.classes[task.train.labels[i]] == table.kind[row(name)]
