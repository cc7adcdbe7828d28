"""Every bad input of a stranger at the command line: a clear message, exit 2, no traceback, nothing left behind."""

from __future__ import annotations

import pytest
import torch

from headstart.cli import main


def bad(capsys, *words: object) -> str:
    """What a refused command says; it must end with 2."""
    try:
        code = main([*map(str, words)])
    except SystemExit as leaving:  # the flags themselves were wrong
        code = leaving.code
    said = capsys.readouterr()
    assert code == 2, said
    assert "Traceback" not in said.out + said.err
    assert said.err
    return " ".join(said.err.replace("│", " ").split())


@pytest.fixture(autouse=True)
def private(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["fitt"], "Did you mean 'fit'?"),
        (["fit"], "needs a target"),
        (["fit", "digts"], "Did you mean 'digits'?"),
        (["fit", "digits", "--zoo", "mni"], "Did you mean 'mini'?"),
        (["fit", "digits", "--zoo", "mini:cnn-leters"], "Did you mean 'cnn-letters'?"),
        (["fit", "digits", "--zoo", "dir:nowhere"], "nowhere is not a folder"),
        (["fit", "digits", "--routes", "prob"], "Did you mean 'probe'?"),
        (["fit", "digits", "--labels-per-class", "100000"], "Pass at most"),
        (["fit", "digits", "--labels-per-class", "0"], "labels_per_class must be >= 1"),
        (["fit", "digits", "--budget", "0"], "budget must be a share"),
        (["fit", "digits", "--folds", "1"], "folds must be at least 2"),
        (["fit", "digits", "--seed", "-1"], "seed must be at least 0"),
        (["fit", "digits", "--allow", "movd"], "Did you mean 'moved'?"),
        (["fit", "digits", "--sed", "1"], "--seed"),
        (["fit", "digits", "--seed", "one"], "--seed"),
        (["fit", "--from", "nowhere/run.json"], "run.json of an earlier run"),
        (["fit", "--from"], "Give its path"),
        (["fit", "nowhere"], "must be a path that exists"),
        (["choose", "digits", "--budget", "2"], "0 < budget <= 1"),
        (["choose", "digits", "--scores", "Logme"], "LogME"),
        (["fit", "digits", "--scores", ","], "At least one score"),
        (["predict", "nowhere", "x.png"], "directory of a finished run"),
        (["predict", "."], "predict needs inputs"),
        (["predict", ".", "x.png", "--out", "p.xlsx"], ".csv or .jsonl"),
        (["report", "nowhere"], "finished run"),
        (["zoo", "lst"], "Did you mean 'list'?"),
        (["zoo", "build"], "needs --out"),
        (["claims", "check", "ties-mergin"], "Did you mean 'ties-merging'?"),
        (["claims", "check"], "SLUGs or --all"),
        (["claims", "check", "ewc", "--data", "x"], "reads the user's data"),
        (["cite", "loar"], "Did you mean 'lora'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused(words, says, capsys, tmp_path):
    assert says in bad(capsys, *words)
    assert not (tmp_path / "runs").exists()


def test_folders_that_are_no_task(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    bad(capsys, "fit", tmp_path / "empty")
    (tmp_path / "one" / "only").mkdir(parents=True)
    (tmp_path / "one" / "only" / "a.png").write_bytes(b"")
    bad(capsys, "fit", tmp_path / "one")


def test_tables_with_holes(capsys, tmp_path):
    (tmp_path / "t.csv").write_text("a,b,label\n1,2,x\n3,4,\n5,6,y\n7,8,y\n9,1,x\n")
    assert "label" in bad(capsys, "fit", tmp_path / "t.csv")
    assert "Did you mean 'label'" in bad(capsys, "fit", tmp_path / "t.csv", "--label-column", "labl")


def test_no_source_for_this_kind_of_data(capsys):
    assert "numeric" in bad(capsys, "fit", "wine", "--zoo", "mini:cnn-letters", "--out", "w")


def test_a_pickled_checkpoint_is_not_loaded(capsys, tmp_path):
    (tmp_path / "zoo").mkdir()
    torch.save({"weight": torch.zeros(1)}, tmp_path / "zoo" / "pytorch_model.bin")
    (tmp_path / "zoo" / "config.json").write_text('{"architecture": "resnet18"}')
    said = bad(capsys, "fit", "digits", "--labels-per-class", "5", "--zoo", f"dir:{tmp_path / 'zoo'}", "--out", "p")
    assert "pickle" in said
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("content", ["", "{}", '{"format": 1, "settings": {"reading": {"seeed": 1}, "tuning": {}}}'])
def test_a_run_json_that_is_none(content, capsys, tmp_path):
    (tmp_path / "run.json").write_text(content)
    bad(capsys, "fit", "--from", tmp_path / "run.json")


def test_what_was_not_foreseen_is_one_line_and_a_file(capsys, monkeypatch, tmp_path):
    import headstart.cli.cite

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(headstart.cli.cite, "run", lambda *_: 1 / 0)
    said = bad(capsys, "cite", "lora")
    assert "unexpected ZeroDivisionError" in said
    [kept] = tmp_path.glob("headstart-cite-*.txt")
    assert "ZeroDivisionError" in kept.read_text()
    assert str(kept) in said
