"""How the command line talks: bars on a terminal, plain lines when piped, refusals without a traceback."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

Kind = TypeVar("Kind")
PAUSE = 5.0  # seconds between two plain lines about the same thing


class Shell:
    """Where words go: answers to stdout, progress and problems to stderr.

    Args:
        quiet: no progress.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.resume = ""
        self.interrupted = False
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._last: tuple[str, float] = ("", 0.0)

    def say(self, text: str) -> None:
        """An answer."""
        sys.stdout.write(text.rstrip("\n") + "\n")
        sys.stdout.flush()

    def tell(self, text: str) -> None:
        """Something beside the answer."""
        self.stop()
        sys.stderr.write(text.rstrip("\n") + "\n")
        sys.stderr.flush()

    def progress(self, what: str, done: int, of: int) -> None:
        """`done` of `of` steps of `what`; a bar on a terminal, else a line at the start and every few seconds."""
        if self.interrupted:  # and whoever was at work kept it to himself
            raise KeyboardInterrupt
        if self.quiet:
            return
        if sys.stderr.isatty():
            self._bar(what, done, of)
        elif what != self._last[0] or time.monotonic() - self._last[1] > PAUSE:
            sys.stderr.write(f"{what}: {done} of {of}\n")
            sys.stderr.flush()
            self._last = (what, time.monotonic())

    def _bar(self, what: str, done: int, of: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self._bars is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bars = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bars.start()
        if what not in self._tasks:
            for other in self._tasks.values():
                self._bars.update(other, visible=False)
            self._tasks[what] = self._bars.add_task(what, total=of)
        self._bars.update(self._tasks[what], completed=done, total=of, visible=True)

    def stop(self) -> None:
        """Take the bars off the screen."""
        if self._bars is not None:
            self._bars.stop()
            self._bars, self._tasks = None, {}

    def guarded(self, verb: str, work: Callable[[], int]) -> int:
        """Run `work` and turn whatever it raises into words and an exit code."""
        from headstart.core.validate import Refused

        try:
            with self._watched():
                return work()
        except BrokenPipeError:  # the reader, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (Exception, KeyboardInterrupt) as problem:
            if self.interrupted or isinstance(problem, KeyboardInterrupt):  # compiled code has errors of its own for it
                self.tell(f"\nStopped. {self.resume}".rstrip())
                return 130
            if isinstance(problem, Refused):
                self.tell(f"headstart {verb}: {problem}")
            else:
                self.tell(f"headstart {verb}: unexpected {type(problem).__name__}: {_first_line(problem)}. "
                          f"This is a bug; the traceback is in {_saved(verb)}. {self.resume}".rstrip())  # fmt: skip
        finally:
            self.stop()
        return 2

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Remember Ctrl-C, which not all code hands on."""

        def interrupt(_number: int, _frame: Any) -> None:
            self.interrupted = True
            raise KeyboardInterrupt

        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if not usual or threading.current_thread() is not threading.main_thread():
            yield
            return
        signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def parse(
        self, kind: type[Kind], verb: str, arguments: Sequence[str], says: str, default: Kind | None = None
    ) -> Kind:
        """The flags of a verb as its dataclass; wrong flags end the process with 2 and a suggestion."""
        import tyro

        return tyro.cli(
            kind, prog=f"headstart {verb}", description=says, args=list(arguments),
            default=tyro.MISSING_NONPROP if default is None else default,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )  # fmt: skip


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Rows in columns as wide as they need; numbers to the right.

    >>> table([("a", "10"), ("bc", "9")], ("name", "n"))
    'name   n\\na     10\\nbc     9'
    """
    every = [list(map(str, header)), *[list(map(str, row)) for row in rows]]
    widths = [max(len(row[k]) for row in every) for k in range(len(header))]
    right = [all(_number(row[k]) for row in every[1:]) for k in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in every
    )


def percent(share: float | None) -> str:
    """A share in percent.

    >>> percent(0.9512)
    '95.1 %'
    """
    return "" if share is None else f"{100 * share:.1f} %"


def size(count: float) -> str:
    """Bytes in a unit that a person reads.

    >>> size(1_500_000)
    '1.5 MB'
    """
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _number(text: str) -> bool:
    return not text.strip() or text.strip(" %+-.,()eskMBG0123456789") == ""


def _first_line(problem: Exception) -> str:
    return (str(problem).strip().splitlines() or ["no message"])[0].rstrip(".")


def _saved(verb: str) -> str:
    handle, path = tempfile.mkstemp(prefix=f"headstart-{verb}-", suffix=".txt")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        traceback.print_exc(file=file)
    return path
