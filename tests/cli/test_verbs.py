"""The other verbs: choose, predict, doctor, zoo, claims, cite, and help."""

from __future__ import annotations

import csv
import json
import os
import signal
import time

import numpy as np
import pytest

from headstart.cli import VERBS
from headstart.cli.shell import Shell


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    """A finished run."""
    from headstart.cli import main

    out = tmp_path_factory.mktemp("verbs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADSTART_CACHE", str(place / "cache"))
        main(["fit", str(place / "data"), "--zoo", f"dir:{place / 'zoo'}", "--routes", "probe", "--out", str(out)])
    return out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, headstart):
    said = headstart(verb, "--help").stdout
    assert f"usage: headstart {verb}" in said
    assert "MISSING" not in said


def test_choose_prints_a_ranking(headstart, place):
    words = ("choose", place / "data", "--zoo", f"dir:{place / 'zoo'}")
    said = headstart(*words).stdout
    assert "predicted accuracy" in said
    assert "LogME" in said
    record = json.loads(headstart(*words, "--json").stdout)
    assert record["best"].endswith("tiny")


def test_choose_without_a_fitting_source_says_no(headstart, place):
    assert "numeric" in headstart("choose", "wine", "--zoo", f"dir:{place / 'zoo'}", code=1).stdout


def test_predict_in_a_clean_process_equals_this_one(run, headstart, place, tmp_path):
    from headstart import load

    headstart("predict", run, place / "data", "--out", tmp_path / "p.csv")
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    predictor = load(run)
    files = [row["input"] for row in rows]
    here = predictor.probabilities(files)
    assert len(rows) == 32
    assert [row["class"] for row in rows] == predictor.predict(files)
    there = [[float(row[name]) for name in predictor.classes] for row in rows]
    np.testing.assert_array_equal(np.array(there), here.numpy())
    right = [row["class"] in row["input"] for row in rows]
    assert sum(right) > 24


def test_predict_reads_arrays_tables_and_writes_jsonl(run, headstart, place, tmp_path):
    pixels = np.full((3, 12, 12, 3), 200, np.uint8)
    np.savez(tmp_path / "a.npz", x=pixels)
    (tmp_path / "t.csv").write_text("picture\n" + str(place / "data" / "dark" / "0.png") + "\n")
    headstart("predict", run, tmp_path / "a.npz", tmp_path / "t.csv", "--out", tmp_path / "p.jsonl")
    records = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [one["class"] for one in records[:3]] == ["bright"] * 3
    assert len(records) == 4


def test_doctor_and_the_command_it_prints(headstart, place):
    said = headstart("doctor", place / "data").stdout
    assert "bright" in said
    assert "headstart fit" in said
    assert headstart("doctor", place / "nowhere", code=1).stdout


def test_zoo_list(headstart, place):
    assert "tiny" in headstart("zoo", "list", f"dir:{place / 'zoo'}").stdout
    assert "mini:cnn-letters" in headstart("zoo").stdout


def test_claims_are_listed_with_their_verdicts(headstart):
    said = headstart("claims").stdout
    assert "ties-merging" in said
    assert "verdict" in said.splitlines()[0]


def test_cite_a_method_and_a_run(run, headstart):
    assert "2106.09685" in headstart("cite", "lora").stdout
    assert "@article{logme" in headstart("cite", run).stdout


def test_version_and_usage(headstart):
    assert headstart("--version").stdout.strip()[0].isdigit()
    assert "headstart VERB" in headstart("--help").stdout
    assert "headstart VERB" in headstart(code=2).stdout


@pytest.mark.parametrize("swallow", [True, False])
def test_ctrl_c_stops_also_what_keeps_it_to_itself(capsys, swallow):
    shell, after = Shell(quiet=True), []

    def work() -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            if not swallow:
                raise ValueError("no shape") from None  # as compiled code does
        after.append(True)
        shell.progress("working", 1, 2)
        after.append(False)
        return 0

    shell.resume = "Run it again."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    try:
        assert shell.guarded("fit", work) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert after == [True] * swallow
    assert capsys.readouterr().err.strip() == "Stopped. Run it again."
