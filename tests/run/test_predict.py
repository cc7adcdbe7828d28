"""Predicting with a finished run: inputs of every kind, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from headstart import load
from headstart.core.validate import Refused
from headstart.run.inputs import read_inputs
from headstart.run.predict import Predictor, described, lines, raw_inputs


def stacked(raw):
    return torch.from_numpy(np.stack(raw)).float()


def predictor(modality="numeric"):
    model = nn.Linear(2, 2)
    model.weight.data, model.bias.data = torch.eye(2), torch.zeros(2)
    return Predictor(model=model, preprocess=stacked, classes=("left", "right"), modality=modality)


def test_classes_and_probabilities():
    rows = [[2.0, 0.0], [0.0, 1.0]]
    assert predictor().predict(rows) == ["left", "right"]
    p = predictor().probabilities(rows)
    assert p.dtype == torch.float64
    assert p[0, 0] == pytest.approx(np.exp(2) / (np.exp(2) + 1))


def test_csv_and_jsonl_hold_every_digit():
    records = list(described(predictor(), ["a", "b,c"], [[2.0, 0.0], [0.0, 1.0]]))
    text = lines(records, "csv").splitlines()
    assert text[0] == "input,class,probability,left,right"
    assert text[2].startswith('"b,c",right,')
    assert float(text[1].split(",")[2]) == records[0]["probability"]
    assert len(lines(records, "jsonl").splitlines()) == 2


@pytest.mark.parametrize(
    ("inputs", "modality", "says"),
    [
        ([], "image", "at least one"),
        ([1.0, 2.0], "numeric", "two dimensions"),
        ([[1.0, float("nan")]], "numeric", "finite"),
        ([3], "text", "list of str"),
        (["nowhere.png"], "image", "nowhere.png"),
        ([np.zeros((4, 4))], "image", "uint8"),
    ],
)
def test_wrong_inputs_are_refused(inputs, modality, says):
    with pytest.raises(Refused, match=says):
        raw_inputs(inputs, modality)


def test_tables_arrays_and_folders(tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("x,y,note\n1,2,hi\n3,4,ho\n")
    (tmp_path / "pics.csv").write_text("file\na.png\n")
    np.savez(tmp_path / "n.npz", x=np.ones((2, 3)))
    np.savez(tmp_path / "i.npz", x=np.ones((2, 4, 4)))
    none = tmp_path / "no-run"
    names, rows = read_inputs([str(tmp_path / "t.csv")], "numeric", None, none)
    assert names[1].endswith("t.csv:1")
    np.testing.assert_array_equal(rows, [[1, 2], [3, 4]])
    assert len(read_inputs([str(tmp_path / "n.npz")], "numeric", None, none)[1]) == 2
    assert read_inputs([str(tmp_path / "t.csv")], "text", "note", none)[1] == ["hi", "ho"]
    assert read_inputs(["just words"], "text", None, none)[1] == ["just words"]
    for given in ("pics.csv", "a.png", ""):
        assert read_inputs([str(tmp_path / given)], "image", None, none)[1][0].shape == (4, 4, 3)
    assert read_inputs([str(tmp_path / "i.npz")], "image", None, none)[1][0].max() == 255
    with pytest.raises(Refused, match="Did you mean 'note'"):
        read_inputs([str(tmp_path / "t.csv")], "text", "notes", none)
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(Refused, match=r"bad\.png"):
        read_inputs([str(tmp_path / "bad.png")], "image", None, none)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(Refused, match="directory of a finished run"):
        load(tmp_path / "nowhere")
    (tmp_path / "half" / ".work").mkdir(parents=True)
    with pytest.raises(Refused, match="unfinished"):
        load(tmp_path / "half")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused):
        load(tmp_path / "empty")
