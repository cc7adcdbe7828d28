from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from headstart.tasks import Images, Rows, Texts, load_task

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)
Y = np.arange(20) % 2


def back(task, name: str):  # type: ignore[no-untyped-def]
    for part in (task.train, task.validation, task.test):
        if name in part.names:
            return part.inputs[part.names.index(name)]
    raise KeyError(name)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (PIXELS, PIXELS),
        (PIXELS.astype(np.int64), PIXELS),
        (torch.from_numpy(PIXELS), PIXELS),
        (PIXELS.transpose(0, 3, 1, 2), PIXELS),
        (PIXELS / 255, PIXELS),
        ((PIXELS / 255).astype(np.float32), PIXELS),
        (list(PIXELS), PIXELS),
        (PIXELS[..., 0], np.repeat(PIXELS[..., :1], 3, axis=-1)),
        (PIXELS[..., :1], np.repeat(PIXELS[..., :1], 3, axis=-1)),
    ],
    ids=["uint8", "int64", "tensor", "channels first", "float64", "float32", "list", "grey", "one channel"],
)
def test_pictures_come_as_uint8_rgb(given: object, wanted: np.ndarray) -> None:
    task = load_task((given, Y))
    assert task.modality == "image"
    assert isinstance(task.train.inputs, Images)
    for i in range(20):
        seen = back(task, f"row {i}")
        assert seen.dtype == np.uint8
        assert np.array_equal(seen, wanted[i])


def test_scaling_and_turning_are_noted() -> None:
    task = load_task((PIXELS.transpose(0, 3, 1, 2) / 255, Y))
    assert any("channels first" in note for note in task.notes)
    assert any("[0, 1]" in note for note in task.notes)


def test_pictures_may_differ_in_size() -> None:
    mixed = [PIXELS[i, : 3 + i % 3] for i in range(20)]
    task = load_task((mixed, Y))
    assert back(task, "row 4").shape == (4, 5, 3)


def test_numbers_and_texts() -> None:
    numbers = load_task((RNG.normal(size=(20, 4)), Y))
    assert (numbers.modality, type(numbers.train.inputs), numbers.train.inputs[0].dtype) == (
        "numeric", Rows, np.dtype("float32"),
    )  # fmt: skip
    texts = load_task((np.array([f"text {i}" for i in range(20)]), list(Y)))
    assert (texts.modality, type(texts.train.inputs)) == ("text", Texts)
    assert back(texts, "row 3") == "text 3"


@pytest.mark.parametrize("keys", [("x", "y"), ("X", "y")])
def test_npz(tmp_path: Path, keys: tuple[str, str]) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, **{keys[0]: PIXELS, keys[1]: np.array(["a", "b"])[Y]})  # type: ignore[arg-type]
    task = load_task(path)
    assert (task.classes, task.name) == (("a", "b"), "data")
    assert np.array_equal(back(task, "row 7"), PIXELS[7])


def test_npz_with_parts(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x_train=PIXELS[:12], y_train=Y[:12], x_test=PIXELS[12:18], y_test=Y[12:18], x_unlabelled=PIXELS[18:])
    task = load_task(path, validation_share=0.0)
    assert (len(task.train), len(task.validation), len(task.test), len(task.unlabelled)) == (12, 0, 6, 2)
    assert np.array_equal(task.test.inputs[0], PIXELS[12])
    assert np.array_equal(task.unlabelled.inputs[1], PIXELS[19])
    assert task.judge(torch.tensor(Y[12:18])).accuracy == 1.0


def test_the_arrays_of_the_caller_are_left_alone() -> None:
    x = PIXELS.copy()
    load_task((x, Y))
    assert np.array_equal(x, PIXELS)


def test_slices_keep_the_kind() -> None:
    for kind, inputs in ((Images, Images(PIXELS)), (Texts, Texts("abc")), (Rows, Rows(np.zeros((3, 2))))):
        assert type(inputs[:2]) is kind
        assert len(inputs[:2]) == 2


def test_scaling_rounds_to_the_nearest_level() -> None:
    task = load_task((np.full((20, 2, 2, 3), 0.999), Y))
    assert (back(task, "row 0") == 255).all()
