"""`headstart fit` from the outside: what it leaves, says and refuses, and what a kill costs."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """One finished run, in this process."""
    from headstart.cli import main

    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADSTART_CACHE", str(place / "cache"))
        words = ["fit", place / "data", "--zoo", f"dir:{place / 'zoo'}", "--routes", "probe", "full", "--folds", "2"]
        code = main([*map(str, words), "--out", str(out)])
    return out, code


def results(path):
    return json.loads((path / "results.json").read_text())


def test_everything_is_there_and_says_the_same(finished):
    out, code = finished
    assert sorted(p.name for p in out.iterdir()) == [
        "evidence", "model", "report.html", "results.json", "run.json", "split.json",
    ]  # fmt: skip
    answer, run = results(out)["answer"], json.loads((out / "run.json").read_text())
    assert code == (0 if answer["verdict"] == "yes" else 1)
    assert run["looks"] == answer["looks"] == 1
    assert answer["interval"][0] <= answer["accuracy"] <= answer["interval"][1]
    assert {one["route"] for one in results(out)["candidates"]} == {"probe", "full", "scratch", "random", "patient"}
    assert run["settings"]["tuning"]["folds"] == 2
    assert len(run["hashes"]["model"]) == 64


def test_a_transfer_that_gains_nothing_ends_with_1(finished):
    """The source is untrained, so it cannot beat random features of the same kind by anything but luck."""
    out, code = finished
    answer = results(out)["answer"]
    if answer["gain"] <= 0:
        assert code == 1
        assert answer["sentence"].startswith("Do not rely on")
        assert "nothing useful was transferred" in answer["reasons"][0]
    else:
        assert code == 0


def test_repeating_a_run_gives_the_same_model(finished, headstart, tmp_path):
    out, code = finished
    said = headstart("fit", "--from", out / "run.json", "--out", tmp_path / "again", code=code)
    assert "test accuracy" in said.stdout
    first, second = (json.loads((p / "run.json").read_text()) for p in (out, tmp_path / "again"))
    assert first["hashes"] == second["hashes"]
    assert first["settings"] == second["settings"]
    assert results(out)["answer"] == results(tmp_path / "again")["answer"]


def test_a_finished_directory_is_never_overwritten(finished, headstart, fit_words):
    out, _ = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    said = headstart(*fit_words, "--out", out, code=2)
    assert "holds a finished run" in said.stderr
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}


def test_a_directory_with_other_files_is_refused(headstart, fit_words, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert "holds other files" in headstart(*fit_words, "--out", tmp_path / "mine", code=2).stderr
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def started(headstart, words, until, how):
    """Start a run, wait until `until()` holds, stop it with the signal `how`; returns the process."""
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # ignored in the background
    code = heard + "import sys; from headstart.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *map(str, words)]
    process = subprocess.Popen(
        command, env=headstart.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not until() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(how)
    return process, *process.communicate(timeout=60)


STAGES = {
    "choosing": lambda out: True,
    "folds": lambda out: bool(list(out.glob(".work/held_out_*"))),
    "baselines": lambda out: bool(list(out.glob(".work/baseline*"))),
    "writing": lambda out: (out / ".work" / "made").exists(),
    "judged": lambda out: (out / ".work" / "looks.json").exists(),
}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_run_again_gives_the_same_result(stage, finished, headstart, fit_words, tmp_path):
    out, code = tmp_path / "run", finished[1]
    words = (*fit_words, "--out", out)
    process, _, _ = started(headstart, words, lambda: STAGES[stage](out), signal.SIGKILL)
    if (out / "results.json").exists() and not (out / ".work").exists():
        pytest.skip("it finished before the signal")
    assert process.returncode == -signal.SIGKILL
    headstart(*words, code=code)
    again, first = results(out), results(finished[0])
    for key in ("accuracy", "interval", "route", "gain", "scratch", "random_features", "patient_scratch", "predicted"):
        assert again["answer"][key] == first["answer"][key], key
    hashes = [json.loads((p / "run.json").read_text())["hashes"] for p in (out, finished[0])]
    assert hashes[0] == hashes[1]
    assert not (out / ".work").exists()
    looks = json.loads((out / "run.json").read_text())["looks"]
    assert looks >= 1 if stage == "judged" else looks == 1


def test_interrupted_says_how_to_go_on(headstart, fit_words, tmp_path):
    out = tmp_path / "run"
    process, _, err = started(
        headstart, (*fit_words, "--out", out), lambda: (out / ".work" / "asked.json").exists(), signal.SIGINT
    )
    assert process.returncode == 130
    assert "To go on where it stopped, run: headstart fit" in err
    assert f"--out {out}" in err
    assert "Traceback" not in err


def test_an_unfinished_run_with_other_settings_is_refused(headstart, fit_words, tmp_path):
    out = tmp_path / "run"
    started(headstart, (*fit_words, "--out", out), lambda: (out / ".work" / "asked.json").exists(), signal.SIGKILL)
    said = headstart(*fit_words, "--seed", "5", "--out", out, code=2)
    assert "unfinished run with other settings" in said.stderr
    assert (out / ".work").exists()


def test_two_processes_do_not_share_a_directory(headstart, fit_words, tmp_path):
    out = tmp_path / "run"
    words = (*fit_words, "--out", out)
    command = [sys.executable, "-c", "import sys; from headstart.cli import main; sys.exit(main())", *map(str, words)]
    first = subprocess.Popen(command, env=headstart.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (out / ".work" / "asked.json").exists() and first.poll() is None:
            time.sleep(0.002)
        first.send_signal(signal.SIGSTOP)  # so that it cannot finish in the meantime
        assert "in use by another one" in headstart(*words, code=2).stderr
    finally:
        first.kill()
        first.wait()


def test_a_full_disk_leaves_nothing_half_written(headstart, fit_words, tmp_path, finished):
    """The shell's limit on file size stands in for the disk: writing the model fails in the middle."""
    out = tmp_path / "run"
    words = shlex.join(map(str, (*fit_words, "--out", out)))
    code = (
        "import sys, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "from headstart.cli import main; sys.exit(main())"
    )
    script = f"ulimit -f 200; exec {shlex.quote(sys.executable)} -c {shlex.quote(code)} {words}"
    done = subprocess.run(
        ["bash", "-c", script], env=headstart.environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "run the same command again" in done.stderr or "run again" in done.stderr
    assert not out.exists() or {p.name for p in out.iterdir()} <= {".work"}
    headstart(*fit_words, "--out", out, code=finished[1])
    assert results(out)["answer"]["accuracy"] == results(finished[0])["answer"]["accuracy"]


def test_dry_run_writes_nothing(headstart, fit_words, tmp_path):
    said = headstart(*fit_words, "--out", tmp_path / "run", "--dry-run")
    assert "16 steps each" in said.stdout
    assert not (tmp_path / "run").exists()


def test_quiet_and_piped_output(headstart, fit_words, tmp_path, finished):
    said = headstart(*fit_words, "--out", tmp_path / "run", "--quiet", code=finished[1])
    assert said.stderr == ""
    for word in ("source", "predicted", "same network from scratch", "95 % interval", "cost", "report"):
        assert word in said.stdout
    assert "\x1b" not in said.stdout


def test_copies_of_a_run_still_report(finished, headstart, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    os.remove(copy / "report.html")
    headstart("report", copy)
    assert (copy / "report.html").stat().st_size > 10_000
