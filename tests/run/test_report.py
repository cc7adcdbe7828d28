"""The report: complete, self-contained, safe with hostile names, and readable in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headstart.core.validate import Refused
from headstart.run.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; CI installs it")


def results() -> dict[str, Any]:
    interval = [0.92, 0.97]
    row = {"source": "mini:cnn-letters", "rank": 1, "chosen": True, "licence": "Apache-2.0", "kind": "mini",
           "facts": {"parameters": 120_000, "data": "letters", "objective": "supervised"},
           "scores": {"logme": {"value": 0.51, "low": 0.4, "high": 0.6}},
           "predicted": {"accuracy": 0.94, "low": 0.9, "high": 0.97}, "probe": 0.9, "tuned": 0.94, "sure": 0.8,
           "seconds": 2.0}  # fmt: skip
    other = {**row, "source": "mini:vit-gratings", "rank": 2, "chosen": False, "tuned": None,
             "predicted": {"accuracy": 0.7, "low": 0.6, "high": 0.8}}  # fmt: skip
    selection = {"accuracy": 0.94, "low": 0.9, "high": 0.97, "folds": [0.9, 0.98], "how": "5-fold cross-validation"}
    candidate = {"name": "lpft", "role": "route", "source": "mini:cnn-letters", "route": "lpft", "selection": selection,
                 "test": {"accuracy": 0.95, "interval": interval}, "seconds": 3.2, "steps": 150, "trainable": 1000,
                 "parameters": 120_000, "chosen": True, "history": []}  # fmt: skip
    scratch = {**candidate, "name": "scratch", "role": "baseline", "source": None, "chosen": False, "seconds": 9.0}
    return {
        "format": 1,
        "task": {"name": "digits", "target": "digits", "modality": "image", "classes": ["<script>alert(1)</script>", "$x$"],
                 "train": 20, "validation": 0, "unlabelled": 100, "test": 50, "labels_per_class": 10, "seed": 0,
                 "manifest": "ab" * 32, "notes": ["skipped <b>bad</b>.png"]},
        "answer": {"verdict": "yes", "sentence": "Start from mini:cnn-letters by lpft.", "reasons": [],
                   "source": "mini:cnn-letters", "route": "lpft", "sure": 0.9, "accuracy": 0.95, "interval": interval,
                   "n": 50, "looks": 1, "predicted": {"accuracy": 0.94, "low": 0.9, "high": 0.97, "how": "by folds"},
                   "scratch": {"accuracy": 0.6, "interval": [0.5, 0.7]},
                   "random_features": {"accuracy": 0.5, "interval": [0.4, 0.6]}, "gain": 0.35, "gain_interval": [0.2, 0.4]},
        "ranking": {"scores": ["logme"], "agreement": {"mean": 0.7}, "rows": [row, other],
                    "skipped": [{"name": "hf:x/y", "why": "offline"}], "seconds": 3.0},
        "candidates": [candidate, scratch],
        "audit": {"passed": True, "before": [{"name": "keys", "ok": True, "allowed": False, "detail": "all loaded"}],
                  "after": [{"name": "head", "ok": False, "allowed": True, "detail": "a\u2028b"}]},
        "test": {"confusion": [[24, 1], [2, 23]],
                 "per_class": [{"class": "$x$", "n": 25, "recall": 0.9, "precision": None}],
                 "calibration": {"bins": [{"low": 0.9, "high": 1, "n": 50, "confidence": 0.95, "accuracy": 0.94}],
                                 "ece": 0.01, "brier": 0.1, "log_loss": 0.2},
                 "mistakes": [{"row": 3, "name": "3.png", "true": "$x$", "predicted": "<i>", "probability": 0.7}]},
        "cost": {"seconds": {"choose": 3.0, "total": 14.0}, "peak_memory": 8e8, "device": "cpu", "threads": 2},
        "reproduce": {"command": "c", "again": "headstart fit --from run.json", "predict": "headstart predict DIR FILES"},
        "model": {"directory": "model", "bytes": 500_000, "licence": "Apache-2.0"},
        "methods": ["logme"],
    }  # fmt: skip


def stored(folder: Path, records: dict[str, Any]) -> Path:
    (folder / "evidence").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(records))
    (folder / "run.json").write_text(json.dumps({"finished": "2026-01-01T00:00:00", "versions": {"torch": "2"}}))
    np.savez(folder / "evidence/mistakes.npz", rows=np.array([3]), pixels_3=np.full((8, 8, 3), 200, np.uint8))
    return folder


def test_it_answers_first_and_needs_nothing_else(tmp_path: Path) -> None:
    page = write_report(stored(tmp_path, results())).read_text()
    assert page.index("Start from mini:cnn-letters by lpft.") < page.index("95.0 %") < page.index("Which model")
    assert not re.search(r'(src|href)="(?!data:|#)[^"]', page), "a link that leaves the file"
    assert page.count("<svg") == 5
    assert "data:image/png;base64," in page


def test_names_from_the_data_are_text_only(tmp_path: Path) -> None:
    page = write_report(stored(tmp_path, results())).read_text()
    assert "<script" not in page
    assert "<b>bad</b>" not in page
    assert "&lt;script&gt;" in page


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    first = write_report(stored(tmp_path / "a", results())).read_bytes()
    assert first == write_report(stored(tmp_path / "b", results())).read_bytes()


@pytest.mark.parametrize("name", ["ranking", "candidates", "audit", "test", "cost", "reproduce", "model", "methods"])
def test_a_missing_section_is_left_out(tmp_path: Path, name: str) -> None:
    records = results()
    del records[name]
    assert "Start from mini" in write_report(stored(tmp_path, records)).read_text()


def test_a_run_that_says_no_looks_like_it(tmp_path: Path) -> None:
    records = results()
    records["answer"].update(verdict="no", reasons=["Not better than from scratch."])
    page = write_report(stored(tmp_path, records)).read_text()
    assert 'class="answer no"' in page
    assert '<p class="bad">Not better than from scratch.</p>' in page


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"results\.json"):
        write_report(tmp_path)


@browser
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_it_without_sideways_scrolling(tmp_path: Path, width: int) -> None:
    page = write_report(stored(tmp_path, results())).read_text()
    probe = "<script>document.title = document.documentElement.scrollWidth + '/' + window.innerWidth</script></body>"
    copy = tmp_path / "probe.html"
    copy.write_text(re.sub(r"<meta http-equiv[^>]*>", "", page).replace("</body>", probe))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
             f"--window-size={width},900", "--force-device-scale-factor=1", "--dump-dom"]  # fmt: skip
    dom = subprocess.run([str(CHROMIUM), *flags, copy.as_uri()], capture_output=True, text=True, timeout=120).stdout
    content, window = map(int, re.search(r"<title>(\d+)/(\d+)</title>", dom).groups())  # type: ignore[union-attr]
    assert content <= window
    assert "What it gets wrong" in dom
