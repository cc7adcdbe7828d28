"""Features of many models on one set of examples: computed once, kept on disk, safe to share and to kill."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.core.validate import Refused, require

from .keys import digest, manifest, preprocess_id

if TYPE_CHECKING:
    from torch import Tensor

    from headstart.core.evidence import Evidence
    from headstart.tasks import Examples
    from headstart.zoo import Skipped, Source

FORMAT = "headstart-evidence/1"
NAMES = ("features", "logits", "operations")
Progress = Callable[[str, int, int], None]


class Halted(Refused):
    """The disk or an example fails: no source is to blame, so the whole run stops."""


def default_folder() -> Path:
    """HEADSTART_CACHE, else `headstart` in the platform's folder for caches."""
    named = os.environ.get("HEADSTART_CACHE")
    if named:
        return Path(named).expanduser()
    home = Path.home()
    by_platform = {"darwin": home / "Library" / "Caches", "win32": Path(os.environ.get("LOCALAPPDATA", home))}
    return Path(os.environ.get("XDG_CACHE_HOME") or by_platform.get(sys.platform, home / ".cache")) / "headstart"


@dataclass(frozen=True)
class Cache:
    """A folder of features and results, each named by the hash of everything it depends on.

    Nothing in it is ever changed in place: a file appears whole or not at all, so processes may share the folder, and
    a killed one loses at most its last two seconds. Deleting the folder loses nothing but time.

    Args:
        folder: where to keep it; see `default_folder`.
        chunk: examples forwarded at once; part of the key, because the size of a batch moves the last digits.
        device: "auto" (a GPU where there is one), "cpu" or "cuda".
        memory: bytes of weights to hold at once while one decoded chunk goes through many models.

    >>> Cache(Path("evidence")).chunk
    64
    """

    folder: Path = field(default_factory=default_folder)
    chunk: int = 64
    device: str = "auto"
    memory: int = 2**32

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder).expanduser())
        require(
            self.chunk >= 1, "Cache needs chunk >= 1", self.chunk, "Pass the number of examples to forward at once."
        )

    def fill(self, examples: Examples, sources: Sequence[Source], *, progress: Progress | None = None) -> list[Skipped]:
        """Extract the features that are missing; each example is decoded once for all models that miss it.

        Returns:
            The sources that could not be loaded or run, with the reason.

        Cost: one forward pass for each missing (model, example); at most 3 % more (benchmarks/cache.py). Models beyond
        `memory` wait for a second sweep, which decodes again.

        Raises:
            Refused: the folder cannot be written (disk full: nothing is lost, a rerun finishes), or an example has
                become unreadable.
        """
        from .extraction import sweep

        missing = {self.key(examples, s): s for s in sources if not self._path(self.key(examples, s)).exists()}
        return sweep(self, examples, missing, progress) if missing else []

    def evidence(self, examples: Examples, source: Source) -> Evidence:
        """Features, source logits and (where known) labels of every example; extracted when missing.

        Raises:
            Refused: the source cannot be loaded or run, or its features are not finite.
        """
        from headstart.core.evidence import Evidence

        tensors = self.stored(examples, source)
        logits = tensors["logits"] if tensors["logits"].shape[1] else None
        try:
            return Evidence(features=tensors["features"], labels=examples.labels, logits=logits)
        except Refused as refusal:
            raise Refused(f"{source.name}: {refusal}") from None

    def operations(self, examples: Examples, source: Source) -> int:
        """Floating point operations of one forward pass of one example."""
        return int(self.stored(examples, source)["operations"][0])

    def stored(self, examples: Examples, source: Source) -> dict[str, Tensor]:
        """The memory-mapped tensors of a source: features, logits, operations."""
        from safetensors import SafetensorError, safe_open

        path = self._path(self.key(examples, source))
        for _ in range(2):
            for skipped in [] if path.exists() else self.fill(examples, [source]):
                raise Refused(f"{skipped.name}: {skipped.why}")
            try:
                with safe_open(str(path), "pt") as file:
                    return {name: file.get_tensor(name) for name in NAMES}
            except (SafetensorError, FileNotFoundError):  # torn by a power cut, or deleted just now
                path.unlink(missing_ok=True)
        raise Refused(f"{path} must be readable; got a damaged file twice. Check the disk, or name another folder.")

    def recall(self, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """The JSON-able result of `compute()`, from the cache when it was computed for this key before.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [Cache(Path(folder)).recall({"x": 1}, compute) for compute in (lambda: [2], lambda: [3])]
        [[2], [2]]
        """
        found = self.find(key)
        return self.keep(key, compute()) if found is None else found

    def find(self, key: Mapping[str, Any]) -> Any:
        """The result kept under this key, None when there is none."""
        try:
            return json.loads(self._result(key).read_text())["value"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def keep(self, key: Mapping[str, Any], value: Any) -> Any:
        """Keep a JSON-able result; returns it as `find` will."""
        text = json.dumps({"key": key, "value": value})
        self.write(self._result(key), lambda file: file.write(text.encode()))
        return json.loads(text)["value"]

    def _result(self, key: Mapping[str, Any]) -> Path:
        return self.folder / "results" / f"{digest(key)}.json"

    def write(self, path: Path, writer: Callable[[Any], Any]) -> None:
        """Write a file whole or not at all; what the disk objects to becomes a refusal."""
        from headstart.core.checkpoint import write_atomically

        with writable(self.folder):
            write_atomically(path, writer)

    def key(self, examples: Examples, source: Source) -> str:
        """The hash of everything that decides a source's features on these examples."""
        parts = (source.fingerprint, preprocess_id(source.preprocess), source.head, manifest(examples))
        return digest([FORMAT, *parts, self.chunk, self.placed()])

    def placed(self) -> str:
        """ "cpu" or "cuda"."""
        if self.device != "auto":
            return self.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    def _path(self, key: str) -> Path:
        return self.folder / "features" / f"{key}.safetensors"

    def parts(self, key: str) -> Path:
        """The folder of the finished parts of an extraction that is under way."""
        return self.folder / "features" / f"{key}.parts"

    def publish(self, key: str, data: bytes) -> None:
        """Put a finished extraction in place and drop its parts."""
        self.write(self._path(key), lambda file: file.write(data))
        shutil.rmtree(self.parts(key), ignore_errors=True)


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Turn the operating system's error into a refusal that says what to do."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Halted(
            f"The cache must be writable; got {error.strerror or error} in {folder}. Free some space or name another "
            "folder (HEADSTART_CACHE), then run again: what is finished is kept."
        ) from error
