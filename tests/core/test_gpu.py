"""The same on a GPU as on the CPU; skipped where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from headstart.align import DANN
from headstart.attack import MIFGSM
from headstart.choose import GBC, HScore, LogME
from headstart.core.ascent import misclassify
from headstart.core.evidence import Evidence, extract
from headstart.core.fisher import diagonal_fisher
from headstart.core.loop import fit
from headstart.core.plan import Plan, Weighted, adamw, cosine
from headstart.core.statistics import ClassStatistics
from headstart.core.stream import Batches
from headstart.distill import SoftTargets
from headstart.merge import Average, Ties

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(512, 10),
        )


def data(n: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(x[:n]).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(y[:n])


def plan(steps: int = 60) -> Plan:
    x, y = data()
    return Plan(model=model(), stream=Batches(x=x, y=y), steps=steps, optimizer=adamw(lr=3e-3), schedule=cosine)


def accuracy(trained: nn.Module) -> float:
    x, y = data()
    with torch.no_grad():
        return float((trained.cuda()(x.cuda()).argmax(1).cpu() == y).float().mean())


def test_training_without_dropout_agrees_with_the_cpu() -> None:
    still = plan(20)
    still.model[4] = nn.Identity()
    here, there = (fit(still, device=device).model.cpu().state_dict() for device in ("cpu", "cuda"))
    assert all(torch.allclose(here[name].float(), there[name].float(), atol=2e-3) for name in here)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_learns_in_every_precision(precision: str) -> None:
    assert accuracy(fit(plan(150), precision=precision).model) > 0.9


def test_resume_takes_up_the_run(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, _steps: int) -> None:
        if done == 37:
            raise Stop

    whole = fit(plan()).model.state_dict()
    with pytest.raises(Stop):
        fit(plan(), checkpoint=tmp_path / "run", every=10, progress=stop)
    resumed = fit(plan(), checkpoint=tmp_path / "run", resume=True).model.state_dict()
    assert all(torch.allclose(whole[name].float(), resumed[name].float(), atol=1e-4) for name in whole)


def test_terms_and_tactics_follow_the_device() -> None:
    x, y = data()
    tactic = DANN(Batches(x=1 - x))
    fitted = fit(tactic(plan(5)))
    distilled = fit(replace(plan(5), stream=Batches(x=x, y=y)).plus(kd=Weighted(0.5, SoftTargets(model()))))
    assert next(fitted.model.parameters()).is_cuda
    assert next(distilled.model.parameters()).is_cuda


def test_evidence_fisher_merges_and_attacks_agree_with_the_cpu() -> None:
    x, y = data(64)
    here, there = model().eval(), model().eval().cuda()
    assert torch.allclose(extract(here, [(x, y)]).features, extract(there, [(x, y)]).features, atol=1e-4)
    fishers = diagonal_fisher(here, [(x, y)]), diagonal_fisher(there, [(x.cuda(), y.cuda())])
    assert all(torch.allclose(fishers[0][name], fishers[1][name].cpu(), rtol=1e-2, atol=1e-6) for name in fishers[0])
    weights = [{name: value + k for name, value in here.state_dict().items()} for k in (0, 1)]
    moved = [{name: value.cuda() for name, value in one.items()} for one in weights]
    for rule in (Average(), Ties(density=0.5)):
        one = rule.merge(weights, base=weights[0])
        two = rule.merge(moved, base=moved[0])
        assert all(two[name].is_cuda and torch.allclose(one[name].float(), two[name].cpu().float()) for name in one)
    attack = MIFGSM(radius=0.1, steps=3)
    pair = attack.perturb(x, [misclassify(here, y)]), attack.perturb(x.cuda(), [misclassify(there, y.cuda())])
    assert ((pair[0] - pair[1].cpu()).abs() < 1e-3).float().mean() > 0.98  # signs of gradients near zero may differ


def test_statistics_on_the_gpu_are_those_of_the_cpu() -> None:
    x, y = torch.randn(300, 16, generator=torch.Generator().manual_seed(0)), torch.arange(300) % 4
    here, there = ClassStatistics.of(x, y, 4), ClassStatistics.stream([(x.cuda(), y.cuda())], 4)
    assert there.gram.is_cuda
    for name in ("gram", "sums", "squares", "counts", "cubes", "fourth"):
        assert torch.allclose(getattr(here, name), getattr(there, name).cpu(), rtol=1e-10), name
    for score in (LogME(), HScore(), GBC()):
        one, other = (score.score(Evidence(features=f, labels=g)) for f, g in ((x, y), (x.cuda(), y.cuda())))
        assert one == pytest.approx(other, rel=1e-8)
        assert score.score_from(there) == pytest.approx(one, rel=1e-8)
