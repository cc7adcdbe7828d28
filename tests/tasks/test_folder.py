from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headstart.tasks import load_task

Make = Callable[..., Path]


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)


def test_a_plain_folder_is_split_by_class(folder: Make) -> None:
    root = folder({"cat": 20, "dog": 12})
    task = load_task(root)
    assert (task.name, task.target, task.modality, task.classes) == ("pictures", str(root), "image", ("cat", "dog"))
    assert (len(task.train), len(task.validation), len(task.test), len(task.unlabelled)) == (19, 5, 8, 0)
    for name, label in zip(task.train.names, task.train.labels.tolist(), strict=True):
        assert name.split("/")[0] == task.classes[label]


def test_pictures_come_as_the_file_holds_them(folder: Make) -> None:
    root = folder({"cat": 4, "dog": 4})
    task = load_task(root)
    for name, picture in zip(task.test.names, task.test.inputs, strict=True):
        assert picture.dtype == np.uint8
        assert np.array_equal(picture, np.asarray(Image.open(root / name)))


def test_pictures_are_decoded_on_access_and_not_before(folder: Make) -> None:
    root = folder({"cat": 4, "dog": 4})
    task = load_task(root)
    fresh = picture(99)
    Image.fromarray(fresh).save(root / task.test.names[0])
    assert np.array_equal(task.test.inputs[0], fresh)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".gif", ".tiff", ".webp", ".jpg", ".JPEG"])
def test_every_format_is_read(folder: Make, suffix: str) -> None:
    task = load_task(folder({"a": 3, "b": 3}, suffix=suffix))
    assert len(task.train) + len(task.validation) + len(task.test) == 6
    assert task.test.inputs[0].shape == (12, 10, 3)


def test_train_val_test_folders_are_kept(folder: Make) -> None:
    for part, count in (("train", 10), ("Val", 4), ("test", 3)):
        root = folder({"cat": count, "dog": count}, under=part)
    task = load_task(root)
    assert {name.split("/")[0] for name in task.train.names} == {"train"}
    assert {name.split("/")[0] for name in task.validation.names} == {"Val"}
    assert {name.split("/")[0] for name in task.test.names} == {"test"}
    assert (len(task.train), len(task.validation), len(task.test)) == (20, 8, 6)
    assert task.test.labels is None


def test_with_few_labels_the_given_validation_is_unlabelled_too(folder: Make) -> None:
    for part, count in (("train", 6), ("val", 4), ("test", 3)):
        root = folder({"cat": count, "dog": count}, under=part)
    task = load_task(root, labels_per_class=2)
    assert (len(task.train), len(task.validation), len(task.test), len(task.unlabelled)) == (4, 0, 6, 16)


def test_missing_test_and_validation_are_carved_from_train(folder: Make) -> None:
    root = folder({"cat": 20, "dog": 20}, under="train")
    task = load_task(root)
    assert (len(task.train), len(task.validation), len(task.test)) == (24, 6, 10)


def test_the_order_of_examples_is_that_of_their_names(folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder({"cat": 20, "dog": 20})
    before = load_task(root)
    listed = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(list(listed(self, pattern))))
    assert load_task(root).train.names == before.train.names == tuple(sorted(before.train.names))


@pytest.mark.parametrize("word", ["unlabelled", "unlabeled"])
def test_an_unlabelled_folder_is_no_class(folder: Make, word: str) -> None:
    folder({word: 7})
    task = load_task(folder({"cat": 8, "dog": 8}))
    assert task.classes == ("cat", "dog")
    assert len(task.unlabelled) == 7
    assert all(name.startswith(word) for name in task.unlabelled.names)


def test_numbered_classes_are_ordered_by_value(folder: Make) -> None:
    assert load_task(folder({"10": 3, "9": 3, "0": 3})).classes == ("0", "9", "10")


def test_an_unreadable_picture_is_named_and_skipped(folder: Make) -> None:
    root = folder({"cat": 20, "dog": 20})
    (root / "cat" / "zero.png").write_bytes(b"")
    whole = (root / "dog" / "000.png").read_bytes()
    (root / "dog" / "cut.png").write_bytes(whole[: len(whole) // 2])
    task = load_task(root)
    assert sum(map(len, (task.train, task.validation, task.test))) == 40
    assert "skipped cat/zero.png: empty (0 bytes)" in task.notes
    assert any(note.startswith("skipped dog/cut.png: unreadable") for note in task.notes)
    assert len(task.notes) == 2


def test_ignored_things_are_noted(folder: Make) -> None:
    root = folder({"cat": 4, "dog": 4})
    Image.fromarray(picture(1)).save(root / "loose.png")
    (root / "empty").mkdir()
    task = load_task(root)
    assert task.classes == ("cat", "dog")
    assert "1 pictures beside the class folders were ignored" in task.notes
    assert "empty/ holds no picture and is no class" in task.notes


def test_copies_that_the_folders_put_into_train_and_test_are_noted(folder: Make) -> None:
    folder({"cat": 6, "dog": 6}, under="train")
    root = folder({"cat": 3, "dog": 3}, under="test")
    (root / "test/cat/000.png").write_bytes((root / "train/cat/000.png").read_bytes())
    assert load_task(root).notes == ("1 test examples are exact copies of training or validation examples",)


def test_an_embedded_name_wins_over_a_folder_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wine").mkdir()
    monkeypatch.chdir(tmp_path)
    task = load_task("wine")
    assert task.modality == "numeric"
    assert task.notes == ("this is the embedded task; for the local wine, write ./wine",)


def test_copies_of_a_picture_stay_on_one_side(folder: Make) -> None:
    root = folder({"cat": 9, "dog": 9})
    for file in sorted((root / "cat").iterdir()):
        (root / "cat" / f"copy{file.name}").write_bytes(file.read_bytes())
    for seed in range(5):
        task = load_task(root, seed=seed)
        assert not set(task.test.hashes) & (set(task.train.hashes) | set(task.validation.hashes))


def test_transparency_rotation_and_deep_grey_are_read_right(folder: Make) -> None:
    root = folder({"cat": 4, "dog": 4})
    clear = np.zeros((6, 6, 4), np.uint8)
    clear[:3] = (10, 20, 30, 255)
    Image.fromarray(clear).save(root / "cat" / "clear.png")
    Image.fromarray(np.full((6, 6), 32768, np.uint16)).save(root / "cat" / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned by 90 degrees
    Image.fromarray(picture(3)).save(root / "cat" / "turned.png", exif=exif)
    task = load_task(root)
    seen = {}
    for part in (task.train, task.validation, task.test):
        seen.update({name: part.inputs[i] for i, name in enumerate(part.names)})
    assert seen["cat/clear.png"][0, 0].tolist() == [10, 20, 30]
    assert seen["cat/clear.png"][5, 5].tolist() == [255, 255, 255]
    assert seen["cat/deep.png"][0, 0].tolist() == [128, 128, 128]
    assert np.array_equal(seen["cat/turned.png"], np.rot90(picture(3), -1))
