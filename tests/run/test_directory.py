"""A run directory is never overwritten, remembers what is done, and appears whole or not at all."""

from __future__ import annotations

import errno
import json

import pytest

from headstart.core.validate import Refused
from headstart.run.directory import RunDirectory, disk, refuse_or_resume

ASKED = {"seed": 0}


def opened(path, digest="a", settings=ASKED):
    return RunDirectory(path, digest, settings)


def test_what_was_computed_is_not_computed_again(tmp_path):
    first = opened(tmp_path / "run")
    assert first.recall("x", lambda: [1, 2]) == [1, 2]
    first.close()
    again = opened(tmp_path / "run")
    assert again.resumed
    assert again.recall("x", lambda: pytest.fail("computed twice")) == [1, 2]
    again.close()


def test_results_appear_together_and_the_work_folder_goes(tmp_path):
    run = opened(tmp_path / "run")
    made = run.work / "made"
    (made / "model").mkdir(parents=True)
    (made / "results.json").write_text("{}")
    run.publish(made)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["model", "results.json"]
    with pytest.raises(Refused, match="finished run"):
        opened(tmp_path / "run")


def test_publishing_goes_on_after_a_kill_between_two_moves(tmp_path):
    (tmp_path / "run").mkdir()
    run = opened(tmp_path / "run")
    (tmp_path / "run" / "model").mkdir()  # moved before the kill
    (tmp_path / "run" / "model" / "old").write_text("")
    made = run.work / "made"
    (made / "model").mkdir(parents=True)
    (made / "model" / "new").write_text("")
    (made / "results.json").write_text("{}")
    run.close()
    again = opened(tmp_path / "run")
    again.publish(made)
    assert [p.name for p in (tmp_path / "run" / "model").iterdir()] == ["new"]


def test_other_settings_are_named(tmp_path):
    opened(tmp_path / "run").close()
    with pytest.raises(Refused, match="seed: 0 -> 1"):
        opened(tmp_path / "run", "b", {"seed": 1})
    with pytest.raises(Refused, match="other data"):
        opened(tmp_path / "run", "b", ASKED)


def test_files_and_foreign_folders_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="must name a directory"):
        refuse_or_resume(tmp_path / "file", "a", ASKED)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("")
    with pytest.raises(Refused, match="other files"):
        refuse_or_resume(tmp_path / "mine", "a", ASKED)


def test_a_work_folder_without_a_word_in_it_is_taken_over(tmp_path):
    """Killed between making the folder and writing what was asked."""
    (tmp_path / "run" / ".work").mkdir(parents=True)
    assert not refuse_or_resume(tmp_path / "run", "a", ASKED)


def test_one_process_at_a_time(tmp_path):
    run = opened(tmp_path / "run")
    with pytest.raises(Refused, match="in use by another"):
        opened(tmp_path / "run")
    run.close()


def test_a_full_disk_says_what_to_do(tmp_path):
    with (
        pytest.raises(Refused, match=r"No space left.*Free some space, then run the same command again"),
        disk(tmp_path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_kept_values_are_whole(tmp_path, monkeypatch):
    """A write that fails in the middle leaves the old value."""
    run = opened(tmp_path / "run")
    run.keep("x", 1)
    with pytest.raises(TypeError):
        run.keep("x", object())
    assert json.loads((run.work / "x.json").read_text()) == 1
    run.close()
