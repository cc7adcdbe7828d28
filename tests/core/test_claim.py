"""A claim is judged on paired runs; what happened is recorded whole."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType

import pytest
from scipy import stats

from headstart.core.claim import Claim, check, judge, write_record
from headstart.core.paper import Paper
from headstart.core.validate import Refused


def runs(gaps: list[float]) -> list[dict[str, dict[str, float]]]:
    return [{"new": {"acc": 0.5 + 0.01 * k + gap}, "old": {"acc": 0.5 + 0.01 * k}} for k, gap in enumerate(gaps)]


def claim(**changes: float) -> Claim:
    return Claim(says="new beats old", metric="acc", better="new", than="old", **changes)  # type: ignore[arg-type]


def test_the_interval_is_the_paired_t_interval() -> None:
    gaps = [0.10, 0.12, 0.08, 0.15, 0.11]
    verdict = judge(claim(), runs(gaps))
    expected = stats.t.interval(0.95, 4, loc=sum(gaps) / 5, scale=stats.sem(gaps))
    assert verdict.interval == pytest.approx(expected)
    assert verdict.difference == pytest.approx(sum(gaps) / 5)
    assert (verdict.held, verdict.certain) == (True, True)


@pytest.mark.parametrize(
    ("gaps", "by", "held", "certain"),
    [
        ([0.10, 0.12, 0.08], 0.05, True, True),
        ([0.10, 0.12, 0.08], 0.2, False, True),
        ([0.30, -0.10, 0.05], 0.0, True, False),
        ([0.10, -0.30, 0.05], 0.0, False, False),
        ([0.0, 0.0, 0.0], 0.0, False, True),  # no better at all is not better
        ([-0.1, -0.1, -0.1], 0.0, False, True),
    ],
)
def test_verdicts_on_constructed_runs(gaps: list[float], by: float, held: bool, certain: bool) -> None:
    verdict = judge(claim(by=by), runs(gaps))
    assert (verdict.held, verdict.certain) == (held, certain)


def test_nan_is_not_held() -> None:
    assert not judge(claim(), runs([0.1, math.nan])).held


def test_unknown_arms_and_single_seeds_are_refused() -> None:
    with pytest.raises(Refused, match="Did you mean 'new'"):
        judge(Claim(says="", metric="acc", better="nwe", than="old"), runs([0.1, 0.1]))
    with pytest.raises(Refused, match="seeds >= 2"):
        claim(seeds=1)


def module() -> ModuleType:
    made = ModuleType("headstart.claims.two_words")
    made.PAPER = Paper("Title", "Author", 2020)  # type: ignore[attr-defined]
    made.CLAIMS = (claim(seeds=2), claim(seeds=3, by=1.0))  # type: ignore[attr-defined]
    made.run = lambda seed: runs([0.1 + 0.01 * seed])[0]  # type: ignore[attr-defined]
    return made


def test_check_runs_each_seed_once_and_the_record_is_json(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    record = check(module(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert record["slug"] == "two-words"
    path = write_record(record, tmp_path / "verdicts")
    assert [p.name for p in path.parent.iterdir()] == ["two-words.json"]
    read = json.loads(path.read_text())
    assert [v["held"] for v in read["verdicts"]] == [True, False]
    assert [len(v["arms"]["new"]) for v in read["verdicts"]] == [2, 3]
    assert {"python", "torch", "numpy"} <= read["versions"].keys()
    assert read["paper"]["title"] == "Title"


def test_data_reaches_a_claim_that_takes_it_and_no_other() -> None:
    taking = module()
    taking.run = lambda seed, data=None: runs([0.2 if data == "mine" else 0.1])[0]  # type: ignore[attr-defined]
    assert check(taking, data="mine")["verdicts"][0]["difference"] == pytest.approx(0.2)  # type: ignore[index]
    assert check(taking)["verdicts"][0]["difference"] == pytest.approx(0.1)  # type: ignore[index]
    with pytest.raises(Refused, match="two_words"):
        check(module(), data="mine")
