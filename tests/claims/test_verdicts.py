"""A kept verdict must be of the claim as it stands, and the claim's arms must be what its run gave."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from headstart.core.catalogue import claim_modules, load_claim

VERDICTS = Path(__file__).parents[2] / "src/headstart/claims/verdicts"


@pytest.mark.parametrize("slug", sorted(claim_modules()))
def test_a_kept_verdict_is_of_the_claim_as_it_stands(slug):
    record = json.loads((VERDICTS / f"{slug}.json").read_text(encoding="utf-8"))
    module = load_claim(slug)
    assert record["note"] == getattr(module, "NOTE", "")
    assert [verdict["claim"] for verdict in record["verdicts"]] == [asdict(claim) for claim in module.CLAIMS]
    for verdict, claim in zip(record["verdicts"], module.CLAIMS, strict=True):
        arms = {
            arm: [run[arm][claim.metric] for run in record["runs"][: claim.seeds]] for arm in (claim.better, claim.than)
        }
        assert verdict["arms"] == arms
        gap = sum(a - b for a, b in zip(*arms.values(), strict=True)) / claim.seeds
        assert verdict["difference"] == pytest.approx(gap)
        assert verdict["held"] == (gap > claim.by)
