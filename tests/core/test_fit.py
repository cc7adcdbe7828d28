"""`fit`: reproducible, resumable, careful with what it was given."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from headstart.core.loop import fit
from headstart.core.objective import Fitted
from headstart.core.plan import CrossEntropy, Plan, Step, Term, adamw, cosine, sgd
from headstart.core.rng import random_state
from headstart.core.stream import Batch, Batches
from headstart.core.surgery import freeze
from headstart.core.validate import Refused
from headstart.testing.subject import difference, snapshot


def data(n: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=generator)
    return x, (x[:, 0] + x[:, 1] > 0).long()


def perceptron(norm: bool = True, dropout: float = 0.3) -> nn.Module:
    generator_state = torch.get_rng_state()
    torch.random.default_generator.manual_seed(1)
    middle = [nn.BatchNorm1d(8)] if norm else []
    model = nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 2))
    torch.set_rng_state(generator_state)
    return model


def plan(steps: int = 12, **changes: object) -> Plan:
    x, y = data()
    settings = {"model": perceptron(), "stream": Batches(x=x, y=y, batch_size=16), "schedule": cosine,
                "optimizer": adamw(0.02)}  # fmt: skip
    return Plan(**{**settings, "steps": steps, **changes})  # type: ignore[arg-type]


def weights(fitted: Fitted) -> dict[str, Tensor]:
    return dict(fitted.model.state_dict())


def same(a: Fitted, b: Fitted) -> bool:
    return not difference(weights(a), weights(b)) and torch.equal(a.losses, b.losses)


def test_the_plan_and_the_callers_random_state_stay() -> None:
    p = plan()
    before, state = snapshot(p), random_state()
    fitted = fit(p)
    assert not difference(before, snapshot(p))
    assert not difference(state, random_state())
    assert not fitted.model.training
    assert difference(weights(fitted), dict(p.model.state_dict()))


def test_seeds_decide() -> None:
    p = plan()
    torch.rand(5)
    first, again, other = fit(p, seed=3), fit(p, seed=3), fit(p, seed=4)
    assert same(first, again)
    assert not same(first, other)


def test_it_is_the_loop_a_person_would_write() -> None:
    p = plan(model=perceptron(dropout=0.0), optimizer=sgd(0.1))
    model = copy.deepcopy(p.model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for k, batch in zip(range(p.steps), p.stream, strict=False):
        optimizer.param_groups[0]["lr"] = 0.1 * cosine(k / p.steps)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch.x), batch.y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    fitted = fit(p)
    assert not difference(weights(fitted), dict(model.state_dict()))
    assert fitted.history == {"task": pytest.approx(losses)}


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulating_is_the_whole_batch(accumulate: int) -> None:
    p = plan(model=perceptron(norm=False, dropout=0.0))
    whole, sliced = fit(p), fit(p, accumulate=accumulate)
    for a, b in zip(weights(whole).values(), weights(sliced).values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert torch.allclose(whole.losses, sliced.losses, atol=1e-6)


def test_accumulate_refuses_batches_that_do_not_divide() -> None:
    with pytest.raises(Refused, match="must divide by 3"):
        fit(plan(), accumulate=3)


def summed(losses: Mapping[str, Tensor], params: Sequence[nn.Parameter]) -> None:
    for p, g in zip(params, torch.autograd.grad(sum(losses.values()), params, allow_unused=True), strict=True):
        p.grad = g


class Decay(Term):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, step: Step) -> Tensor:
        return self.scale * 0.1 * sum(p.square().sum() for p in step.model.parameters())


def test_a_gradient_rule_that_sums_is_the_default() -> None:
    p = plan().plus(decay=Decay())
    plain, ruled = fit(p), fit(replace(p, gradient=summed))
    for a, b in zip(weights(plain).values(), weights(ruled).values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert float(plain.terms["decay"].scale.detach()) != 1  # a term's own parameters train along


def test_a_gradient_rule_refuses_slices_and_fp16() -> None:
    with pytest.raises(Refused, match="whole fp32 or bf16"):
        fit(plan(gradient=summed), accumulate=2)


class Average:
    """A moving average of the weights, a memory that is checkpointed."""

    def __init__(self) -> None:
        self.mean: dict[str, Tensor] = {}

    def __call__(self, step: Step) -> None:
        for name, p in step.model.named_parameters():
            old = self.mean.get(name, torch.zeros_like(p))
            self.mean[name] = old.detach() * 0.9 + p.detach() * 0.1

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.mean)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.mean = dict(state)


class Stop(Exception):
    pass


def stop_at(step: int):
    def progress(done: int, _total: int) -> None:
        if done == step:
            raise Stop

    return progress


def streams() -> dict[str, object]:
    x, y = data()
    shuffled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16, shuffle=True)
    noisy = Batches(x=x, y=y, batch_size=16, augment=lambda t: t + 0.1 * torch.randn_like(t))
    return {"batches": Batches(x=x, y=y, batch_size=16), "augmented": noisy, "loader": shuffled}


@pytest.mark.parametrize("kind", ["batches", "augmented", "loader"])
@pytest.mark.parametrize("stop", [3, 7])
def test_stop_and_resume_is_an_unbroken_run_bit_for_bit(tmp_path: Path, kind: str, stop: int) -> None:
    unbroken_memory, memory = Average(), Average()
    p = plan(stream=streams()[kind])
    unbroken = fit(replace(p, after_step=(unbroken_memory,)))
    path = tmp_path / "run.pt"
    with pytest.raises(Stop):
        fit(replace(p, after_step=(Average(),)), checkpoint=path, every=3, progress=stop_at(stop))
    torch.rand(7)
    resumed = fit(replace(p, after_step=(memory,)), checkpoint=path, every=3, resume=True)
    assert same(unbroken, resumed)
    assert not difference(unbroken_memory.mean, memory.mean)


def test_resuming_a_finished_run_returns_it(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    first = fit(plan(), checkpoint=path)
    assert same(first, fit(plan(), checkpoint=path, resume=True))


def test_without_resume_a_checkpoint_is_not_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    with pytest.raises(Stop):
        fit(plan(), checkpoint=path, every=3, progress=stop_at(6))
    assert same(fit(plan()), fit(plan(), checkpoint=path))


@pytest.mark.parametrize("other", [{"steps": 13}, {"model": nn.Sequential(nn.Linear(6, 2))}])
def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path, other: dict) -> None:
    path = tmp_path / "run.pt"
    fit(plan(), checkpoint=path)
    with pytest.raises(Refused, match="resumes the plan it came from"):
        fit(plan(**other), checkpoint=path, resume=True)
    with pytest.raises(Refused, match="resumes the plan it came from"):
        fit(plan(), checkpoint=path, resume=True, seed=1)


class Diverge(Term):
    def __init__(self, at: float) -> None:
        super().__init__()
        self.at = at

    def forward(self, step: Step) -> Tensor:
        factor = torch.nan if step.progress >= self.at else 1.0
        return factor * CrossEntropy()(step)


def test_a_nan_loss_is_refused_and_the_last_good_checkpoint_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    with pytest.raises(Refused, match=r"must stay finite.*step 6"):
        fit(plan(terms={"task": Diverge(0.5)}))
    with pytest.raises(Refused, match="last good checkpoint is kept"):
        fit(plan(terms={"task": Diverge(0.5)}), checkpoint=path, every=4)
    kept = torch.load(path, weights_only=True)
    assert kept["step"] == 4
    assert all(bool(torch.isfinite(v).all()) for v in kept["weights"].values())
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_frozen_weights_share_storage_and_stay() -> None:
    model = perceptron()
    for p in model[0].parameters():
        p.requires_grad = False
    before = model[0].weight.detach().clone()
    fitted = fit(plan(model=model))
    assert fitted.model[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert torch.equal(fitted.model[0].weight, before)
    assert fitted.model[4].weight.data_ptr() != model[4].weight.data_ptr()


def test_statistics_of_a_frozen_norm_stay_and_of_a_trained_one_move() -> None:
    frozen, trained = perceptron(), perceptron()
    for p in frozen[1].parameters():
        p.requires_grad = False
    assert torch.equal(fit(plan(model=frozen)).model[1].running_mean, frozen[1].running_mean)
    assert not torch.equal(fit(plan(model=trained)).model[1].running_mean, trained[1].running_mean)


def test_a_wholly_frozen_plan_is_refused() -> None:
    with pytest.raises(Refused, match="parameters to train"):
        fit(plan(model=freeze(perceptron())))


def test_bf16_runs_and_keeps_fp32_weights() -> None:
    fitted = fit(plan(), precision="bf16")
    assert all(p.dtype == torch.float32 for p in fitted.model.parameters())
    assert bool(torch.isfinite(fitted.losses).all())
    assert not same(fitted, fit(plan()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"precision": "bf61"}, "Did you mean 'bf16'"), ({"device": "gpu"}, "device must be a known name"),
     ({"accumulate": 0}, "accumulate >= 1"), ({"every": 0}, "every >= 1")],
)  # fmt: skip
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(Refused, match=message):
        fit(plan(), **settings)


def test_batches_may_be_pairs_parts_or_bare_tensors() -> None:
    class Norm(Term):
        def forward(self, step: Step) -> Tensor:
            whole = step.batch if isinstance(step.batch, Batch) else step.batch["a"]
            return step.run(whole.x).output.square().mean()

    x, _ = data()
    for stream in ([x[:4]], [(x[:4],)], [{"a": Batch(x[:4])}], [{"a": x[:4], "b": x[4:8]}]):
        assert len(fit(plan(stream=stream, terms={"norm": Norm()}, steps=2)).history["norm"]) == 2


def test_finish_is_applied_once_in_order_and_progress_is_told() -> None:
    seen: list[object] = []
    p = plan(steps=3, finish=(lambda m: nn.Sequential(m), lambda m: nn.Sequential(m, nn.Identity())))
    fitted = fit(p, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert isinstance(fitted.model[1], nn.Identity)
    assert not fitted.model[0][0].training


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    model[1].weight = model[0].weight
    fitted = fit(plan(model=model))
    assert fitted.model[1].weight is fitted.model[0].weight
