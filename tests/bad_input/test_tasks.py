"""Everything that a user can get wrong about a target: refused before any work, saying what and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from headstart.core.validate import Refused
from headstart.tasks import load_task

X = np.arange(40, dtype=np.float32).reshape(20, 2)
Y = ["a", "b"] * 10


def pictures(root: Path, counts: dict[str, int]) -> Path:
    rng = np.random.default_rng(0)
    for word, count in counts.items():
        (root / word).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / word / f"{i}.png")
    return root


def refused(target: Any, *words: str, **flags: Any) -> None:
    with pytest.raises(Refused) as caught:
        load_task(target, **flags)
    for word in words:
        assert word in str(caught.value)


def csv(path: Path, **columns: Any) -> Path:
    pd.DataFrame({"n": range(20), "m": np.arange(20) / 7, "label": Y} | columns).to_csv(path / "data.csv", index=False)
    return path / "data.csv"


def test_an_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, "must hold pictures", "a folder without pictures", "named after its class")


def test_a_missing_folder_suggests_its_neighbour(tmp_path: Path) -> None:
    pictures(tmp_path / "flowers", {"rose": 2, "lily": 2})
    refused(tmp_path / "flower", "a path that exists", "Did you mean 'flowers'?")
    refused(tmp_path / "no" / "way", "does not exist either")


def test_an_unknown_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    refused("texture", "'texture'", "Did you mean 'textures'?")
    refused("qqqqqq", "Embedded tasks: breast-cancer, damage, digits")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "notes.docx").write_text("x")
    refused(tmp_path / "notes.docx", "a table or .npz", ".csv")


def test_pictures_without_class_folders(tmp_path: Path) -> None:
    pictures(tmp_path, {".": 3})
    refused(tmp_path, "one folder a class", "3 pictures and no class folder")


def test_one_class(tmp_path: Path) -> None:
    refused(pictures(tmp_path, {"cat": 5}), "at least two classes", "1 (cat)")
    refused((X, ["a"] * 20), "at least two classes", "1 (a)")


def test_a_class_with_one_example(tmp_path: Path) -> None:
    refused(pictures(tmp_path, {"cat": 5, "dog": 1}), "at least two examples", "'dog' has 1")


def test_numbers_to_predict_are_no_classes() -> None:
    refused((X, np.linspace(0, 1, 20).tolist()), "look like numbers to predict")


def test_too_many_unreadable_pictures_are_named(tmp_path: Path) -> None:
    root = pictures(tmp_path, {"cat": 8, "dog": 8})
    for i in range(4):
        (root / "cat" / f"x{i}.png").write_bytes(b"" if i else b"not a picture")
    refused(root, "at most 10%", "4 of 20", "cat/x0.png: unreadable", "cat/x1.png: empty (0 bytes)", "and 1 more")
    load_task(root, max_unreadable=0.2)
    refused(root, "at most 0%", max_unreadable=0.0)
    refused(root, "max_unreadable must be a share", max_unreadable=3)


def test_a_class_that_cannot_be_read_at_all(tmp_path: Path) -> None:
    root = pictures(tmp_path, {"cat": 30, "dog": 30, "eel": 2})
    for file in (root / "eel").iterdir():
        file.write_bytes(b"")
    refused(root, "'eel' has 0")


def test_labels_per_class_larger_than_there_are(tmp_path: Path) -> None:
    root = pictures(tmp_path, {"cat": 20, "dog": 8})
    refused(root, "labels_per_class=7", "6 of 'dog' after the test split", "Pass at most 6.", labels_per_class=7)
    assert len(load_task(root, labels_per_class=6).train) == 12
    refused(root, "labels_per_class must be >= 1", labels_per_class=0)
    refused(root, "labels_per_class must be >= 1", labels_per_class=2.5)


@pytest.mark.parametrize("seed", [-1, 1.5, "0", None])
def test_a_bad_seed(seed: Any) -> None:
    refused((X, Y), "seed must be a whole number", seed=seed)


@pytest.mark.parametrize(("test", "validation"), [(0.0, 0.1), (1.0, 0.0), (0.6, 0.4), (0.2, -0.1), (float("nan"), 0.1)])
def test_bad_shares(test: float, validation: float) -> None:
    refused((X, Y), "test_share", test_share=test, validation_share=validation)


def test_a_missing_column_is_suggested(tmp_path: Path) -> None:
    path = csv(tmp_path)
    refused(path, "label_column must be a column", "'lable'", "Did you mean 'label'?", label_column="lable")
    refused(path, "text_column must be a column", text_column="review")
    refused(path, "feature_columns must be a column", "'o'", feature_columns=["n", "o"])
    refused(path, "split_column must be a column", split_column="part")


def test_no_label_column_lists_what_there_is(tmp_path: Path) -> None:
    pd.DataFrame({"width": X[:, 0], "kind": Y}).to_csv(tmp_path / "data.csv", index=False)
    refused(tmp_path / "data.csv", "needs a label column", "'width', 'kind'", "label_column=")


def test_a_label_among_the_features(tmp_path: Path) -> None:
    refused(csv(tmp_path), "must not hold the label", feature_columns=["n", "label"])


def test_two_kinds_of_input(tmp_path: Path) -> None:
    refused(csv(tmp_path, t=Y), "one kind of input", text_column="t", feature_columns=["n"])


def test_nothing_to_learn_from(tmp_path: Path) -> None:
    pd.DataFrame({"who": Y, "label": Y}).to_csv(tmp_path / "data.csv", index=False)
    refused(tmp_path / "data.csv", "no numeric column beside the label", "'who', 'label'")


def test_missing_labels_are_named_by_row(tmp_path: Path) -> None:
    labels: list[Any] = [*Y[:3], None, *Y[4:8], " ", *Y[9:]]
    refused(csv(tmp_path, label=labels), "every row needs a label", "2 of 20", "row 3, 8", "missing_labels=")
    refused((X, [*Y[:-1], float("nan")]), "1 of 20 missing or NaN (row 19)")
    refused((X, np.array([0.0, 1.0] * 9 + [np.nan, np.nan])), "2 of 20")


def test_mixed_types_among_the_labels(tmp_path: Path) -> None:
    labels = [*Y[:5], "7", *Y[6:]]
    refused(csv(tmp_path, label=labels), "mixed types", "numbers such as '7' (row 5)", "label_type=")
    refused((X, [*Y[:5], 7, *Y[6:]]), "mixed types", "numbers such as 7 (row 5)")
    refused((X, [*Y[:5], [1], *Y[6:]]), "mixed types", "a list such as [1] (row 5)")


def test_mixed_types_among_the_numbers(tmp_path: Path) -> None:
    cells = [*map(str, range(19)), "n/k"]
    refused(csv(tmp_path, n=cells), "'n' must hold numbers only", "mixed types: 1 of 20", "'n/k' (row 19)")
    refused(csv(tmp_path, n=["w"] * 19 + ["1"]), "mixed types: 19 of 20", feature_columns=["n", "m"])
    refused((np.array([[1, "a"]] * 20, dtype=object), Y), "mixed types")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_nan_or_infinite_numbers(tmp_path: Path, value: float) -> None:
    numbers = np.arange(20.0)
    numbers[4] = value
    refused(csv(tmp_path, n=numbers), "must be finite", "1 missing, NaN or infinite", "'n', row 4")
    refused((np.stack([X[:, 0], numbers], axis=1), Y), "column 1, row 4")


def test_numbers_where_texts_should_be() -> None:
    frame = pd.DataFrame({"t": ["word", 3] * 10, "label": Y})
    refused(frame, "must hold texts", "mixed types: 10 cells", text_column="t")


def test_a_strange_word_in_the_split_column(tmp_path: Path) -> None:
    refused(csv(tmp_path, part=["train"] * 19 + ["exam"]), "'exam' (row 19)", split_column="part")


def test_a_class_that_only_the_test_has(tmp_path: Path) -> None:
    part = ["test" if word == "b" else "train" for word in Y]
    refused(csv(tmp_path, part=part), "every class needs a training example", "'b'", split_column="part")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.csv", b""),
        ("data.csv", b'a,label\n"never closed,1\n2,3\n'),
        ("data.csv", "größe,label\n1,a\n".encode("latin-1")),
        ("data.jsonl", b'{"n": 1, "label": "a"}\n{"n": \n'),
        ("data.jsonl", b"[1, 2]\n"),
        ("data.parquet", b"PAR1 and nothing more"),
        ("data.npz", b"PK and nothing more"),
        ("data.csv", b"n,label\n"),
    ],
    ids=["empty", "open quote", "not UTF-8", "half a line", "no object", "parquet", "npz", "no rows"],
)
def test_damaged_tables(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, name)


def test_the_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"n": 1, "label": "a"}\n{"n": \n')
    refused(tmp_path / "data.jsonl", "line 2")


def test_pickled_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=X, y=np.array(["a", 1] * 10, dtype=object))
    refused(tmp_path / "data.npz", "plain arrays", "pickled objects")


def test_arrays_with_other_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=X, target=X)
    refused(tmp_path / "data.npz", "must be called x and y", "images, target")


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (X[:7], "one row an example"),
        (np.full((20, 4, 4, 3), 1.5), "[0, 1]"),
        (np.full((20, 4, 4, 3), -1), "[0, 255]"),
        (np.full((20, 4, 4, 3), 300), "[0, 255]"),
        (np.full((20, 4, 4, 3), np.nan), "[0, 1]"),
        (np.zeros((20, 4, 4, 7)), "1, 3 or 4 channels"),
        (np.zeros((20, 2, 2, 2, 2)), "x must be pictures"),
        (np.zeros(20), "x must be pictures"),
        ([[1.0], [1.0, 2.0]] * 10, "rows of different length"),
        (np.array([None] * 20), "x must be pictures"),
    ],
    ids=["fewer", "too bright", "negative", "wide", "NaN", "channels", "5-d", "1-d", "ragged", "None"],
)
def test_arrays_that_are_no_input(x: Any, words: str) -> None:
    refused((x, Y), words)


def test_one_hot_labels() -> None:
    refused((X, np.eye(2)[[0, 1] * 10]), "one class a row", "shape (20, 2)")


@pytest.mark.parametrize("target", [None, 7, [1, 2], (X,), {"a": X}])
def test_something_else_altogether(target: Any) -> None:
    refused(target, "must be")


def test_unknown_words() -> None:
    refused(pd.DataFrame({"n": range(20), "label": Y}), "missing_labels", missing_labels="drop")
    refused(pd.DataFrame({"n": range(20), "label": Y}), "label_type", label_type="texts")


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda split: split | {"format": "other"}, "another kind of JSON"),
        (lambda split: split | {"classes": ["a", "c"]}, "classes of the target"),
        (lambda split: split | {"train": [*split["train"], "row 77"]}, "1 missing (row 77)"),
        (lambda split: [], "another kind of JSON"),
        (lambda split: {"format": split["format"]}, "one without classes, manifest, train"),
    ],
    ids=["format", "classes", "names", "list", "incomplete"],
)
def test_a_split_of_something_else(tmp_path: Path, change: Change, words: str) -> None:
    path = tmp_path / "split.json"
    load_task((X, Y)).save_split(path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    refused((X, Y), words, split=path)


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    refused((X, Y), "a split that save_split wrote", "FileNotFoundError", split=tmp_path / "gone.json")
    refused((X, Y), "already says who is labelled", split=tmp_path / "gone.json", labels_per_class=2)


def test_a_damaged_saved_data_set(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    refused(tmp_path, "state.json", "no such file")
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    (tmp_path / "data.arrow").write_bytes(b"nothing")
    refused(tmp_path, "save_to_disk wrote")
    (tmp_path / "dataset_info.json").write_text("{")
    (tmp_path / "state.json").write_text("{")
    refused(tmp_path, "damaged JSON")
