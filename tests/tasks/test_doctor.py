from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from headstart.tasks import doctor, load_task

Make = Callable[..., Path]


def severities(diagnosis, words: str) -> list[str]:  # type: ignore[no-untyped-def]
    return [problem.severity for problem in diagnosis.problems if words in problem.says]


def test_a_healthy_folder(folder: Make) -> None:
    root = folder({"cat": 20, "dog": 12})
    seen = doctor(root)
    assert seen.healthy
    assert seen.problems == ()
    assert (seen.modality, seen.counts, seen.unlabelled) == ("image", {"cat": 20, "dog": 12}, 0)
    assert seen.imbalance == 20 / 12
    assert seen.sizes == ((10, 12),) * 3
    assert seen.command == f"headstart fit {root} --out runs/pictures"
    task = load_task(root)
    assert seen.parts == {"train": len(task.train), "validation": len(task.validation), "test": len(task.test),
                          "unlabelled": 0}  # fmt: skip
    assert seen.lines()[-1] == f"Next: {seen.command}"


def test_unreadable_files_warn_and_too_many_are_an_error(folder: Make) -> None:
    root = folder({"cat": 20, "dog": 20})
    (root / "cat" / "zero.png").write_bytes(b"")
    seen = doctor(root)
    assert seen.unreadable == (("cat/zero.png", "empty (0 bytes)"),)
    assert severities(seen, "unreadable") == ["warning"]
    assert seen.healthy
    for i in range(6):
        (root / "cat" / f"bad{i}.png").write_bytes(b"no picture")
    seen = doctor(root)
    assert severities(seen, "at most 10%") == ["error"]
    assert seen.counts == {"cat": 20, "dog": 20}  # and the rest is still looked at
    assert not seen.healthy
    assert seen.command.startswith("headstart doctor")
    assert doctor(root, max_unreadable=0.5).healthy


def test_duplicates_within_across_and_conflicting(folder: Make) -> None:
    folder({"cat": 10, "dog": 10}, under="train")
    root = folder({"cat": 4, "dog": 4}, under="test")
    cat = (root / "train/cat/000.png").read_bytes()
    (root / "train/cat/again.png").write_bytes(cat)
    (root / "test/cat/leak.png").write_bytes((root / "train/cat/001.png").read_bytes())
    (root / "train/dog/really.png").write_bytes((root / "train/cat/002.png").read_bytes())
    seen = doctor(root)
    assert {frozenset(group) for group in seen.duplicates} == {
        frozenset({"train/cat/000.png", "train/cat/again.png"}),
        frozenset({"train/cat/001.png", "test/cat/leak.png"}),
        frozenset({"train/cat/002.png", "train/dog/really.png"}),
    }
    assert {frozenset(group) for group in seen.across} == {frozenset({"train/cat/001.png", "test/cat/leak.png"})}
    assert {frozenset(group) for group in seen.conflicts} == {frozenset({"train/cat/002.png", "train/dog/really.png"})}
    assert severities(seen, "more than one part") == ["warning"]
    assert severities(seen, "under two labels") == ["warning"]
    assert severities(seen, "more than once") == ["hint"]


def test_a_wrong_label_among_clear_clusters_is_suspicious() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0, 1, (40, 3)), rng.normal(9, 1, (40, 3))])
    y = np.repeat(["low", "high"], 40)
    y[5] = "high"
    seen = doctor((x, y))
    assert [(s.name, s.label, s.neighbours) for s in seen.suspects] == [("row 5", "high", "low")]
    assert severities(seen, "nearest neighbours") == ["hint"]


def test_suspicious_pictures_and_texts(folder: Make) -> None:
    root = folder({"dark": 0, "light": 0})
    rng = np.random.default_rng(0)
    for word, base in (("dark", 20), ("light", 200)):
        (root / word).mkdir(parents=True, exist_ok=True)
        for i in range(15):
            value = 200 if (word, i) == ("dark", 7) else base
            pixels = np.clip(rng.normal(value, 8, (20, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / word / f"{i}.png")
    assert [(s.name, s.neighbours) for s in doctor(root).suspects] == [("dark/7.png", "light")]
    texts = [f"the cat sat on mat {i}" for i in range(12)] + [f"stocks fell by {i} percent" for i in range(12)]
    labels = ["pets"] * 12 + ["money"] * 11 + ["pets"]
    assert [s.name for s in doctor((texts, labels)).suspects] == ["row 23"]


def test_labels_that_thumbnails_say_nothing_about_are_not_suspected() -> None:
    x = np.random.default_rng(0).normal(size=(200, 5))
    assert doctor((x, np.random.default_rng(1).integers(0, 2, 200))).suspects == ()


def test_imbalance_and_small_classes_warn() -> None:
    y = np.array(["many"] * 100 + ["few"] * 4)
    seen = doctor((np.random.default_rng(0).normal(size=(104, 2)), y))
    assert seen.imbalance == 25
    assert severities(seen, "25 times") == ["warning"]
    assert severities(seen, "fewer than 10") == ["warning"]


def test_what_cannot_be_loaded_is_a_diagnosis(tmp_path: Path) -> None:
    for target in (tmp_path, tmp_path / "gone", "digit", (np.zeros((4, 2)), [0, 0, 0, 0]), 7):
        seen = doctor(target)
        assert not seen.healthy
        assert seen.problems[0].severity == "error"
        assert any(seen.problems[0].says in line for line in seen.lines())
    assert "Did you mean 'digits'?" in doctor("digit").problems[0].says


def test_errors_of_load_task_are_found_and_only_those(folder: Make) -> None:
    root = folder({"cat": 5, "dog": 1})
    assert severities(doctor(root), "'dog' has 1") == ["error"]


def test_the_command_repeats_the_flags_quoted(tmp_path: Path) -> None:
    path = tmp_path / "my data.csv"
    pd.DataFrame({"a b": [0.1 * i for i in range(20)], "c": range(20), "kind": ["x", "y"] * 10}).to_csv(path)
    command = doctor(path, label_column="kind", feature_columns=["a b", "c"]).command
    assert shlex.split(command) == [
        "headstart", "fit", str(path), "--feature-columns", "a b", "c", "--label-column", "kind",
        "--out", "runs/my data",
    ]  # fmt: skip


def test_every_file_is_read_once(folder: Make, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    root = folder({"cat": 5, "dog": 5})
    read: list[Path] = []
    whole = Path.read_bytes

    def counted(self: Path) -> bytes:
        read.append(self)
        return whole(self)

    monkeypatch.setattr(Path, "read_bytes", counted)
    doctor(root)
    assert sorted(read) == sorted(root.rglob("*.png"))


def test_an_unlabelled_copy_is_no_conflict(folder: Make) -> None:
    folder({"unlabelled": 2})
    root = folder({"cat": 4, "dog": 4})
    (root / "unlabelled" / "copy.png").write_bytes((root / "cat" / "000.png").read_bytes())
    seen = doctor(root)
    assert len(seen.duplicates) == 1
    assert seen.conflicts == ()
