"""A run directory: never overwritten, resumed when unfinished, complete or not there at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headstart.core.checkpoint import write_atomically
from headstart.core.validate import Refused, require

WORK = ".work"
DONE = "results.json"


class RunDirectory:
    """The place a run writes to, with a memory of what is already done in `.work`.

    A directory that holds an unfinished run with the same settings is taken up again; any other directory that is not
    empty is refused. Results appear under their final names only when all of them are complete.

    Args:
        path: the directory; made when it does not exist.
        digest: what tells this run from another.
        settings: what was asked, kept to say what differs.
    """

    def __init__(self, path: Path, digest: str, settings: Mapping[str, Any]) -> None:
        self.path, self.work = path, path / WORK
        self.resumed = refuse_or_resume(path, digest, settings)
        with disk(path):
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.work / "lock", path)
            if not self.resumed:
                self.keep("asked", {"digest": digest, "settings": settings})

    def keep(self, name: str, value: Any) -> Any:
        """Store a JSON value in the work folder, whole or not at all."""
        with disk(self.path):
            write_atomically(self._file(name), lambda file: file.write(json.dumps(value).encode()))
        return value

    def recall(self, name: str, compute: Callable[[], Any]) -> Any:
        """The value kept under `name`, computed when it is not there; what comes back has been through JSON."""
        file = self._file(name)
        if not file.exists():
            self.keep(name, compute())
        return json.loads(file.read_text(encoding="utf-8"))

    def checkpoint(self, name: str) -> Path:
        """Where the training of that name keeps its state."""
        return self.work / f"{_safe(name)}.checkpoint"

    def publish(self, made: Path) -> None:
        """Move everything in `made` to the directory; `results.json`, which says that a run is finished, last."""
        with disk(self.path):
            names = sorted((entry.name for entry in made.iterdir()), key=lambda name: name == DONE)
            for name in names:
                final = self.path / name
                if final.is_dir():  # left by a kill between two of these moves
                    shutil.rmtree(final)
                os.replace(made / name, final)
            self.close()
            shutil.rmtree(self.work)

    def close(self) -> None:
        """Let another process have the directory."""
        self._lock.close()

    def _file(self, name: str) -> Path:
        return self.work / f"{_safe(name)}.json"


def refuse_or_resume(path: Path, digest: str, settings: Mapping[str, Any]) -> bool:
    """Whether the directory holds this very run, unfinished.

    Raises:
        Refused: it is a file, holds a finished run, another unfinished run, or anything else.
    """
    elsewhere = "Name another directory with --out; headstart never overwrites one."
    require(not path.exists() or path.is_dir(), "--out must name a directory", f"the file {path}", elsewhere)
    if not path.exists() or not any(path.iterdir()):
        return False
    if (path / DONE).exists():
        raise Refused(f"--out must be new or empty; got {path}, which holds a finished run. {elsewhere}")
    asked = path / WORK / "asked.json"
    if not asked.exists():
        only_work = [entry.name for entry in path.iterdir()] == [WORK]  # killed before it wrote anything
        require(only_work, "--out must be new or empty", f"{path}, which holds other files", elsewhere)
        return False
    before = json.loads(asked.read_text(encoding="utf-8"))
    if before["digest"] != digest:
        changed = _changes(before["settings"], settings)
        raise Refused(
            f"--out must be new, empty or this very run unfinished; got {path}, which holds an unfinished run with "
            f"other {'settings (' + changed + ')' if changed else 'data'}. Repeat its settings to finish it, or name "
            "another directory."
        )
    return True


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(now))
    return ", ".join(f"{k}: {before.get(k)} -> {plain.get(k)}" for k in plain if before.get(k) != plain.get(k))


def _safe(name: str) -> str:
    return re.sub(r"[^\w.+-]", "_", name)


def _locked(path: Path, directory: Path) -> Any:
    """An open file that no other process may lock; the system lets go of it even after `kill -9`."""
    file = open(path, "w")  # noqa: SIM115  the lock lasts as long as the file is open
    try:
        import fcntl
    except ImportError:  # not on Windows, where two runs in one directory go unnoticed
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise Refused(f"A run directory belongs to one process; got {directory}, in use by another one. "
                      "Wait for it, or name another directory with --out.") from None  # fmt: skip
    return file


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turn what the disk objects to into a refusal that says what to do; nothing half-written is left."""
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error), error.errno in FULL) from error


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """The same for work that mostly does other things: only a disk that is full is taken for one.

    `torch.save` says so by a RuntimeError of its archive writer.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise _unwritable(path, error.strerror or str(error), True) from error
    except RuntimeError as error:
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise _unwritable(path, "a checkpoint that could not be written", True) from error


def _unwritable(path: Path, got: str, full: bool) -> Refused:
    do = "Free some space" if full else "Check the path and its permissions"
    return Refused(
        f"The run directory must be writable; got {got} in {path}. {do}, then run the same command again: what is "
        "finished is kept."
    )
