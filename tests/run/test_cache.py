"""The evidence cache: right, resumable after a kill, safe to share, and clear when the disk is full."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from headstart.core.validate import Refused
from headstart.run import cache as cache_module
from headstart.run import extraction
from headstart.run.cache import Cache, Halted, default_folder
from headstart.run.keys import manifest, preprocess_id
from headstart.tasks import Examples, Images
from headstart.zoo.source import Source

# A zoo of small random models and pictures that a clean process can make again: what the kill tests run.
STAND_INS = textwrap.dedent(
    """
    import time
    from dataclasses import dataclass
    import numpy as np, torch
    from torch import nn
    from headstart.tasks import Examples, Images
    from headstart.zoo.source import Source

    @dataclass(frozen=True)
    class Flat:
        wait: float = 0.0
        def __call__(self, raw):
            time.sleep(self.wait)
            return torch.from_numpy(np.stack(raw)).float().flatten(1) / 255

    def source(seed, wait=0.0, width=6):
        def load():
            generator = torch.Generator().manual_seed(seed)
            model = nn.Sequential(nn.Linear(48, width), nn.ReLU(), nn.Linear(width, 3))
            for p in model.parameters():
                p.data = torch.randn(p.shape, generator=generator)
            return model.eval()
        return Source(name=f"tiny:{seed}", modality="image", load=load, preprocess=Flat(wait), head="2", classes=(),
                      licence="CC0-1.0", fingerprint=f"tiny {seed} {width}", kind="mini")

    def pictures(n):
        items = np.random.default_rng(0).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
        return Examples(inputs=Images(items), names=tuple(map(str, range(n))), labels=torch.arange(n) % 2)
    """
)
scope: dict = {"__name__": "stand_ins"}
sys.modules.setdefault("stand_ins", type(sys)("stand_ins"))
exec(STAND_INS, scope)
source, pictures = scope["source"], scope["pictures"]


def expected(examples: Examples, one: Source) -> torch.Tensor:
    """Features computed example by example, without the cache."""
    model, rows = one.load(), []
    with torch.no_grad():
        for picture in examples.inputs:
            rows.append(model[1](model[0](one.preprocess([picture])))[0])
    return torch.stack(rows)


def in_process(code: str, folder: Path) -> subprocess.Popen:
    prelude = f"from headstart.run.cache import Cache\ncache = Cache({str(folder)!r}, chunk=4)\n"
    program = (
        "import sys, types\n__name__ = 'stand_ins'\nsys.modules[__name__] = types.ModuleType(__name__)\n"
        + STAND_INS
        + prelude
    )
    return subprocess.Popen([sys.executable, "-c", program + textwrap.dedent(code)])


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_features_are_those_of_each_example_alone(tmp_path):
    examples, one = pictures(10), source(1)
    evidence = Cache(tmp_path, chunk=4).evidence(examples, one)
    assert torch.allclose(evidence.features, expected(examples, one), atol=1e-6)
    assert torch.equal(evidence.labels, examples.labels)
    assert evidence.logits.shape == (10, 3)


def test_operations_are_those_of_the_layers(tmp_path):
    assert Cache(tmp_path).operations(pictures(5), source(1)) == 2 * (48 * 6 + 6 * 3)


def test_each_example_is_decoded_once_for_all_models(tmp_path):
    seen = []

    class Counting(Images):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    examples = pictures(10)
    examples = replace(examples, inputs=Counting(examples.inputs.items), hashes=tuple(map(str, range(10))))
    assert Cache(tmp_path, chunk=4).fill(examples, [source(k) for k in range(5)]) == []
    assert seen == list(range(10))
    seen.clear()
    Cache(tmp_path, chunk=4).evidence(examples, source(3))
    assert seen == []


def test_models_beyond_the_memory_wait_for_another_sweep(tmp_path):
    examples, some = pictures(6), [source(k) for k in range(3)]
    assert Cache(tmp_path, memory=1).fill(examples, some) == []
    for one in some:
        assert torch.allclose(Cache(tmp_path).evidence(examples, one).features, expected(examples, one), atol=1e-6)


@dataclass(frozen=True)
class Scaled:
    by: float

    def __call__(self, raw):
        return torch.from_numpy(np.stack(raw)).float().flatten(1) / 255 * self.by


def test_the_key_holds_weights_preprocessing_layer_content_and_chunk(tmp_path):
    examples, one, cache = pictures(6), source(1), Cache(tmp_path)
    variants = [
        (cache, examples, one),
        (cache, examples, replace(one, fingerprint="other")),
        (cache, examples, replace(one, head="0")),
        (cache, examples, replace(one, preprocess=Scaled(1.0))),
        (cache, examples, replace(one, preprocess=Scaled(2.0))),
        (cache, examples.take([1, 0, 2, 3, 4, 5]), one),
        (cache, examples.take(range(5)), one),
        (Cache(tmp_path, chunk=5), examples, one),
    ]
    assert len({c.key(e, s) for c, e, s in variants}) == len(variants)
    renamed = replace(examples, names=tuple("abcdef"), labels=None)
    assert cache.key(renamed, replace(one, name="another")) == cache.key(examples, one)
    assert preprocess_id(lambda raw: raw) == preprocess_id(lambda raw: raw)  # no address of an object in the key
    assert manifest(replace(examples, hashes=tuple("abcdef"))) != manifest(examples)


@pytest.mark.parametrize("fault", ["load", "forward", "preprocess"])
def test_a_source_that_fails_is_skipped_and_the_others_go_on(tmp_path, fault):
    def fails(*_args):
        raise RuntimeError("broken checkpoint\nwith a long tail")

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 2)
            self.forward = fails

    bad = {
        "load": replace(source(1), load=fails),
        "forward": replace(source(1), load=Broken, head="head"),
        "preprocess": replace(source(1), preprocess=fails),
    }[fault]
    cache, examples = Cache(tmp_path), pictures(6)
    [skipped] = cache.fill(examples, [bad, source(2)])
    assert (skipped.name, skipped.why) == ("tiny:1", "RuntimeError: broken checkpoint")
    assert cache.evidence(examples, source(2)).features.shape == (6, 6)
    with pytest.raises(Refused, match="tiny:1: RuntimeError: broken checkpoint"):
        cache.evidence(examples, bad)


def test_nan_features_are_refused_with_the_source_named(tmp_path):
    def load():
        model = source(1).load()
        model[0].weight.data[0, 0] = float("nan")
        return model

    bad = replace(source(1), load=load, fingerprint="nan")
    for _ in range(2):  # found anew and from the cache
        with pytest.raises(Refused, match=r"tiny:1: features must be finite; got 6 NaN"):
            Cache(tmp_path).evidence(pictures(6), bad)


@pytest.mark.parametrize("when", [1, 2, 3])
def test_a_full_disk_is_said_plainly_leaves_nothing_torn_and_a_rerun_finishes(tmp_path, monkeypatch, when):
    monkeypatch.setattr(extraction, "PAUSE", 0.0)
    calls, real = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) >= when:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    cache, examples, some = Cache(tmp_path, chunk=4), pictures(10), [source(1), source(2)]
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Halted, match=r"No space left on device .* run again: what is finished is kept"):
        cache.fill(examples, some)
    assert not [name for name in files(tmp_path) if name.endswith((".tmp", ".safetensors"))]
    monkeypatch.setattr(os, "fsync", real)
    assert cache.fill(examples, some) == []
    for one in some:
        whole = Cache(tmp_path / "unbroken", chunk=4).evidence(examples, one)
        assert torch.equal(cache.evidence(examples, one).features, whole.features)


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Halted, match="The cache must be writable"):
        Cache(tmp_path / "file").evidence(pictures(3), source(1))


def test_a_torn_file_is_extracted_again(tmp_path):
    cache, examples, one = Cache(tmp_path), pictures(6), source(1)
    before = cache.evidence(examples, one).features.clone()
    [path] = (tmp_path / "features").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:40])
    assert torch.equal(cache.evidence(examples, one).features, before)


def test_an_example_that_became_unreadable_halts_with_its_name(tmp_path):
    gone = Examples(inputs=Images([tmp_path / "gone.png"]), names=("gone.png",), hashes=("0",))
    with pytest.raises(Halted, match=r"Example 'gone.png' must stay readable; got FileNotFoundError"):
        Cache(tmp_path).fill(gone, [source(1)])


def test_kill_9_resumes_from_the_finished_parts_with_the_same_result(tmp_path):
    code = """
        from headstart.run import extraction
        extraction.PAUSE = 0.0
        cache.fill(pictures(40), [source(1, wait=0.2)])
    """
    killed = in_process(code, tmp_path)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.rglob("0*-0*"))) < 3:
        assert time.monotonic() < deadline, "the extraction never began"
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = len([name for name in files(tmp_path) if "-" in name and not name.endswith(".tmp")])
    assert 3 <= done < 10
    assert not list(tmp_path.rglob("*.safetensors"))

    seen = []
    waiting = source(1, wait=0.2)

    @dataclass(frozen=True)
    class Watched:
        inner: object

        def __call__(self, raw):
            seen.append(len(raw))
            return self.inner(raw)

    cache, examples = Cache(tmp_path, chunk=4), pictures(40)
    key = cache.key(examples, waiting)
    monkeyed = replace(waiting, preprocess=Watched(waiting.preprocess))
    extraction.sweep(cache, examples, {key: monkeyed}, None)
    assert sum(seen) == 40 - 4 * done  # only what was missing
    fresh = Cache(tmp_path / "unbroken", chunk=4).evidence(examples, source(1)).features
    assert torch.equal(cache.evidence(examples, waiting).features, fresh)
    assert not list(tmp_path.rglob("0*-0*"))  # the parts are gone once the whole is there


def test_two_processes_at_once_agree_and_leave_one_whole_file(tmp_path):
    code = """
        from headstart.run import extraction
        extraction.PAUSE = 0.0
        for seed in range(3):
            cache.evidence(pictures(24), source(seed, wait=0.01))
    """
    both = [in_process(code, tmp_path) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert len(files(tmp_path)) == 3
    examples = pictures(24)
    for seed in range(3):
        fresh = Cache(tmp_path / "alone", chunk=4).evidence(examples, source(seed, wait=0.01)).features
        assert torch.equal(Cache(tmp_path, chunk=4).evidence(examples, source(seed, wait=0.01)).features, fresh)


def test_results_are_recalled_by_content_and_a_torn_one_is_made_again(tmp_path):
    cache = Cache(tmp_path)
    assert cache.recall({"a": 1, "b": 2}, lambda: {"x": float("-inf")}) == {"x": float("-inf")}
    assert cache.recall({"b": 2, "a": 1}, lambda: pytest.fail("must not be computed")) == {"x": float("-inf")}
    assert cache.find({"a": 2}) is None
    [path] = (tmp_path / "results").iterdir()
    path.write_text(path.read_text()[:-5])
    assert cache.recall({"a": 1, "b": 2}, lambda: 7) == 7


def test_the_default_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "named"))
    assert default_folder() == tmp_path / "named"
    assert Cache().folder == tmp_path / "named"
    monkeypatch.delenv("HEADSTART_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(cache_module.sys, "platform", "linux")
    assert default_folder() == tmp_path / "xdg" / "headstart"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "headstart"


def test_a_chunk_of_none_is_refused(tmp_path):
    with pytest.raises(Refused, match="chunk >= 1"):
        Cache(tmp_path, chunk=0)
