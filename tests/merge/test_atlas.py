"""aTLAS: the card's known answers, the exact cheap gradient, and every use of it through a plan."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from headstart.core.loop import fit
from headstart.core.plan import CrossEntropy, On, Plan, Step, Term, Weighted, adamw, cosine, sgd
from headstart.core.rng import seeded
from headstart.core.stream import Batch, Batches, Parts
from headstart.core.validate import Refused
from headstart.core.weights import LazyWeights, save_weights
from headstart.merge import Atlas, TaskArithmetic, strongest
from headstart.merge.composed import Composed
from headstart.merge.finetuning_transfer import diff_vector
from headstart.merge.keep_best import KeepBest, clipped
from headstart.testing import contract
from headstart.testing.material import digits, small_model


def noise(model: nn.Module, count: int, size: float = 0.1, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Random task vectors for a model, in its dtype."""
    g = torch.Generator().manual_seed(seed)
    return {f"task {k}": {name: size * torch.randn(p.shape, generator=g, dtype=p.dtype)
                          for name, p in model.named_parameters()} for k in range(count)}  # fmt: skip


VECTORS = noise(small_model(), 3)
BROKEN = VECTORS | {"broken": VECTORS["task 0"] | {"head.bias": torch.full((10,), torch.nan)}}
test_contract = contract(
    Atlas(vectors=VECTORS),
    trainable=lambda model: 3 * 6,
    refuses=[
        lambda: Atlas(vectors={}),
        lambda: Atlas(vectors=VECTORS, partition=0),
        lambda: Atlas(vectors=VECTORS, blocks="layer"),
        lambda: Atlas(vectors=BROKEN).apply(small_model()),
        lambda: Atlas(vectors=VECTORS, keep=torch.ones(3, 5, dtype=torch.bool)).apply(small_model()),
        lambda: strongest(torch.ones(3, 6), 4),
    ],
)
test_isotropic = contract(Atlas(vectors=VECTORS, blocks="model"), trainable=lambda model: 3)
test_partitioned = contract(Atlas(vectors=VECTORS, partition=4), trainable=lambda model: 3 * 3 * 4)
test_linearised = contract(Atlas(vectors=VECTORS, linearised=True), trainable=lambda model: 3 * 6)
test_layers = contract(
    Atlas(vectors=VECTORS, blocks=lambda name: name.partition(".")[0], layers="enter,middle"), trainable=lambda model: 6
)


def placed(composed: Composed, values: Tensor | float) -> Composed:
    with torch.no_grad():
        composed.coefficients.copy_(torch.as_tensor(values).expand_as(composed.coefficients))
    return composed


def some(shape: tuple[int, ...], seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


X, Y = (t[:64] for t in digits())


# the card's known answers


@pytest.mark.parametrize("how", [{}, {"blocks": "model"}, {"partition": 2}, {"linearised": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_1_zero_is_the_base_bit_for_bit(how, dtype):
    model = small_model().to(dtype)
    assert torch.equal(Atlas(vectors=VECTORS, **how).apply(model)(X.to(dtype)), model(X.to(dtype)))


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6])
def test_1_one_for_one_vector_is_that_model_to_the_rounding_of_half_precision(size):
    model = small_model()
    vectors = noise(model, 3, size)
    composed = placed(Atlas(vectors=vectors).apply(model), torch.eye(3)[:, 1:2])
    for name, weight in composed.weights().items():
        rounding = 2.0**-11 * vectors["task 1"][name].abs() + 2.0**-23 * weight.abs() + size * 2.0**-23
        assert bool(((weight - model.get_parameter(name) - vectors["task 1"][name]).abs() <= rounding).all())
    exact = placed(Atlas(vectors=vectors, half=False).apply(model), torch.eye(3)[:, 1:2]).weights()
    assert all(torch.equal(exact[name], model.get_parameter(name) + vectors["task 1"][name]) for name in exact)


def test_tiny_vectors_do_not_underflow_in_half_precision():
    model = nn.Linear(3, 1, bias=False).requires_grad_(False)
    model.weight.zero_()
    vector = {"weight": torch.tensor([[1e-12, -3e-12, 2.5e-12]])}  # float16 ends at 6e-8
    found = placed(Atlas(vectors={"tiny": vector}).apply(model), 1.0).weights()["weight"]
    torch.testing.assert_close(found, vector["weight"], rtol=2**-11, atol=0)


@pytest.mark.parametrize("scale", [0.4, -1.0])
def test_2_one_number_for_all_is_task_arithmetic(scale):
    model = small_model()
    base = {name: p.detach() for name, p in model.named_parameters()}
    models = [{name: base[name] + vector[name] for name in base} for vector in VECTORS.values()]
    vectors = {str(k): diff_vector(other, base) for k, other in enumerate(models)}
    expected = TaskArithmetic(scale=scale).merge(models, base=base)
    for how in ({}, {"blocks": "model"}):
        atlas = Atlas(vectors=vectors, half=False, **how)
        folded = dict(atlas.fold(placed(atlas.apply(model), scale)).named_parameters())
        assert list(folded) == list(expected)
        for name in expected:
            torch.testing.assert_close(folded[name].data, expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("how", [{}, {"partition": 3}, {"blocks": "model"}, {"half": False}])
def test_3_the_gradient_is_the_inner_product_with_that_of_the_weights(how, dtype, tolerance):
    model = small_model().to(dtype)
    vectors = noise(model, 3)
    if how.get("half", True):  # what half precision keeps, so that the comparison is exact
        vectors = {who: {name: t.half().to(dtype) for name, t in vector.items()} for who, vector in vectors.items()}
    atlas = Atlas(vectors=vectors, **how)
    composed = atlas.apply(model)
    placed(composed, 0.3 * some(tuple(composed.coefficients.shape), dtype=dtype))
    F.cross_entropy(composed(X.to(dtype)), Y).backward()

    weights = {name: w.detach().requires_grad_() for name, w in composed.weights().items()}
    slopes = torch.autograd.grad(F.cross_entropy(functional_call(model, weights, (X.to(dtype),)), Y), weights.values())
    expected = torch.zeros_like(composed.coefficients)
    for (name, _), slope in zip(weights.items(), slopes, strict=True):
        for row, vector in enumerate(vectors.values()):
            products = (slope * vector[name]).flatten()
            groups = composed.changes[name].groups
            for group in range(expected[0, 0].numel()):
                own = products if groups is None else products[groups == group]
                expected[row, composed.columns[name]].view(-1)[group] += own.sum()
    size = float(expected.abs().max())
    torch.testing.assert_close(composed.coefficients.grad, expected, rtol=tolerance, atol=tolerance * size)


def test_3_the_gradient_is_that_of_a_plain_graph_through_the_sum_in_pieces_too(monkeypatch):
    monkeypatch.setattr("headstart.merge.scaled_vectors.PIECE", 100)  # every tensor in several pieces
    model = small_model().double()
    vectors = noise(model, 3)
    composed = Atlas(vectors=vectors, half=False).apply(model)
    placed(composed, some((3, 6), dtype=torch.float64))
    F.cross_entropy(composed(X.double()), Y).backward()
    free = composed.coefficients.detach().clone().requires_grad_()
    weights = {name: p.detach() + sum(free[i, j] * vector[name] for i, vector in enumerate(vectors.values()))
               for j, (name, p) in enumerate(model.named_parameters())}  # fmt: skip
    F.cross_entropy(functional_call(model, weights, (X.double(),)), Y).backward()
    torch.testing.assert_close(composed.coefficients.grad, free.grad, rtol=1e-10, atol=1e-12)
    for name, weight in composed.weights().items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-12, atol=1e-14)


def matrices() -> nn.Module:
    with seeded(3):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 12, bias=False), nn.Tanh(), nn.Linear(12, 10, bias=False))


def test_4_one_group_is_block_wise_when_all_tensors_are_matrices():
    vectors = noise(matrices(), 2)
    pair = [Atlas(vectors=vectors, partition=k).apply(matrices()) for k in (None, 1)]
    values = some((2, 2))
    placed(pair[0], values)
    placed(pair[1], values[:, :, None])
    outputs = [composed(X) for composed in pair]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-6)
    for output in outputs:
        F.cross_entropy(output, Y).backward()
    torch.testing.assert_close(pair[0].coefficients.grad, pair[1].coefficients.grad[:, :, 0], rtol=1e-5, atol=1e-7)


@given(k=st.integers(1, 9), seed=st.integers(0, 5))
@settings(max_examples=20)
def test_4_groups_share_out_every_entry(k, seed):
    composed = Atlas(vectors=noise(matrices(), 1), partition=k, seed=seed).apply(matrices())
    for name, changes in composed.changes.items():
        counts = torch.bincount(changes.groups.long(), minlength=k)
        assert counts.sum() == composed.model.get_parameter(name).numel()  # each entry in one group
        assert len(counts) == k
        assert int(counts.max() - counts.min()) <= 1


def test_4_only_matrices_are_composed_in_groups():
    composed = placed(Atlas(vectors=VECTORS, partition=2).apply(small_model()), 1.0)
    assert composed.blocks == ("enter.weight", "middle.weight", "head.weight")
    assert set(composed.weights()) == set(composed.blocks)
    other = Atlas(vectors=VECTORS, partition=2, seed=1).apply(small_model())
    assert not torch.equal(composed.changes["head.weight"].groups, other.changes["head.weight"].groups)


class SquaredError(Term):
    def forward(self, step: Step) -> Tensor:
        return F.mse_loss(step.run(step.batch.x).output, step.batch.extra["value"])


def test_5_a_linear_model_finds_the_least_squares_solution():
    with seeded(0):
        model = nn.Linear(6, 2).double()
        x, value = torch.randn(40, 6).double(), torch.randn(40, 2).double()
    vectors = noise(model, 3, 1.0)
    # a feature for each vector and block, (40 * 2, 6): what it adds to the output
    features = [x @ v["weight"].T for v in vectors.values()] + [v["bias"].expand(40, 2) for v in vectors.values()]
    design = torch.stack([f.flatten() for f in features], 1)
    rest = (value - model(x)).detach().flatten()
    expected = torch.linalg.lstsq(design, rest).solution.view(2, 3).T  # (vectors, blocks)
    plan = Plan(
        model=Atlas(vectors=vectors, half=False).apply(model), stream=[Batch(x, extra={"value": value})],
        terms={"fit": SquaredError()}, steps=700, optimizer=sgd(0.05, momentum=0.9),
    )  # fmt: skip
    torch.testing.assert_close(fit(plan, device="cpu").model.coefficients.data, expected, rtol=1e-6, atol=1e-6)


def test_6_the_linearised_variant_is_affine_in_a_and_touches_the_model_at_zero():
    model, x = small_model().double(), X.double()
    composed = Atlas(vectors=noise(model, 3), linearised=True).apply(model)
    a, b = some((3, 6), 1, torch.float64), some((3, 6), 2, torch.float64)
    zero, one, two, both = (placed(composed, values)(x).detach() for values in (0.0, a, b, a + b))
    torch.testing.assert_close(both - zero, (one - zero) + (two - zero), rtol=1e-10, atol=1e-12)
    curved = Atlas(vectors=noise(model, 3)).apply(model)
    small = 1e-6
    slope = (placed(curved, small * a)(x) - placed(curved, -small * a)(x)).detach() / (2 * small)
    torch.testing.assert_close(one - zero, slope, rtol=1e-6, atol=1e-8)
    assert float((placed(curved, a)(x).detach() - one).abs().max()) > 1e-3  # the expansion is not the model


def test_6_the_linearised_gradient_matches_differences():
    model = small_model().double()
    composed = placed(Atlas(vectors=noise(model, 2), linearised=True).apply(model), some((2, 6), 1, torch.float64))
    loss = F.cross_entropy(composed(X.double()), Y)
    loss.backward()
    step = torch.zeros(2, 6, dtype=torch.float64)
    step[1, 2] = 1e-6
    values = composed.coefficients.detach().clone()
    up, down = (F.cross_entropy(placed(composed, values + sign * step)(X.double()), Y) for sign in (1, -1))
    assert float(composed.coefficients.grad[1, 2]) == pytest.approx((up - down).item() / 2e-6, rel=1e-6)


def test_7_of_a_vector_given_twice_only_the_sum_counts():
    model = small_model()
    one = VECTORS["task 0"]
    composed = Atlas(vectors={"a": one, "b": one}).apply(model)
    outputs = [placed(composed, torch.tensor([[a], [1.5 - a]]))(X) for a in (0.0, 0.5, 3.0)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs[0], outputs[2], rtol=1e-5, atol=1e-5)
    F.cross_entropy(outputs[2], Y).backward()
    torch.testing.assert_close(composed.coefficients.grad[0], composed.coefficients.grad[1], rtol=1e-5, atol=1e-7)


# blocks and budgets


def test_blocks_are_columns_and_share_their_gradient():
    model = small_model()
    by = {how: Atlas(vectors=VECTORS, blocks=blocks).apply(model)
          for how, blocks in (("tensor", "tensor"), ("layer", lambda n: n.split(".")[0]), ("model", "model"))}  # fmt: skip
    assert by["layer"].blocks == ("enter", "middle", "head")
    assert by["model"].coefficients.shape == (3, 1)
    for composed in by.values():
        F.cross_entropy(composed(X), Y).backward()
    fine = by["tensor"].coefficients.grad
    torch.testing.assert_close(by["layer"].coefficients.grad, fine.view(3, 3, 2).sum(2), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(by["model"].coefficients.grad[:, 0], fine.sum(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("blocks", ["tensor", "model"])
def test_scores_are_the_gradient_at_zero_and_read_vectors_from_disk(blocks, tmp_path):
    model = small_model().train()
    composed = Atlas(vectors=VECTORS, blocks=blocks, half=False).apply(model)
    F.cross_entropy(composed(X), Y).backward()
    for who, vector in VECTORS.items():
        save_weights(vector, tmp_path / who)
    lazy = {who: LazyWeights(tmp_path / who) for who in VECTORS}
    scores = Atlas(vectors=lazy, blocks=blocks).score_blocks(model, (X, Y))
    torch.testing.assert_close(scores.float(), composed.coefficients.grad, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training


def test_a_budget_keeps_the_strongest_and_no_memory_for_the_rest():
    model = small_model()
    atlas = Atlas(vectors=VECTORS)
    scores = atlas.score_blocks(model, (X, Y))
    kept = strongest(scores, 1)
    assert kept.sum(0).tolist() == [1] * 6
    assert torch.equal(kept.int().argmax(0), scores.abs().argmax(0))
    composed = replace(atlas, keep=kept).apply(model)
    assert [len(changes.values) for changes in composed.changes.values()] == [1] * 6
    values = some((3, 6))
    full = placed(atlas.apply(model), values * kept)
    torch.testing.assert_close(placed(composed, values)(X), full(X), rtol=1e-5, atol=1e-5)
    F.cross_entropy(composed(X), Y).backward()
    assert not composed.coefficients.grad[~kept].any()
    assert composed.coefficients.grad[kept].all()


# through a plan


def shot(steps: int = 30, **how) -> Plan:
    plan = Plan(
        model=small_model(), stream=[Batch(X, Y)], steps=steps, schedule=cosine,
        optimizer=clipped(adamw(0.1, weight_decay=0.1)),
    )  # fmt: skip
    return plan.under(Atlas(vectors=noise(small_model(), 8, 0.2), **how))


@pytest.mark.parametrize("how", [{}, {"blocks": "model"}, {"partition": 4}, {"linearised": True}])
def test_few_shots_lower_the_loss_and_come_out_plain(how):
    fitted = fit(shot(**how), device="cpu")
    assert fitted.history["task"][-1] < fitted.history["task"][0] - 0.02
    if "linearised" not in how:
        assert str(fitted.model) == str(small_model())
        assert list(fitted.model.state_dict()) == list(small_model().state_dict())


def test_stopped_and_resumed_is_unbroken(tmp_path):
    plan = shot(steps=6)
    whole = fit(plan, device="cpu").model.state_dict()
    done = []

    def stop(step: int, _steps: int) -> None:
        done.append(step)
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(plan, device="cpu", checkpoint=tmp_path / "state", every=3, progress=stop)
    again = fit(plan, device="cpu", checkpoint=tmp_path / "state", resume=True).model.state_dict()
    assert done == [1, 2, 3]
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_bf16_autocast_sums_weights_in_full_precision():
    composed = placed(Atlas(vectors=VECTORS).apply(small_model()), 0.3)
    plain = {name: weight.detach() for name, weight in composed.weights().items()}
    with torch.autocast("cpu", torch.bfloat16):
        mixed = composed.weights()
    assert all(torch.equal(mixed[name], plain[name]) for name in plain)
    fitted = fit(shot(), device="cpu", precision="bf16")
    assert fitted.history["task"][-1] < fitted.history["task"][0]


class Headed(Term):
    """Cross-entropy through a frozen head of its own."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head.requires_grad_(False)

    def forward(self, step: Step) -> Tensor:
        return F.cross_entropy(self.head(step.run(step.batch.x).output), step.batch.y)


def test_task_addition_sums_over_data_sets_of_unlike_length_each_with_its_own_head():
    with seeded(0):
        heads = {"parity": nn.Linear(10, 2), "size": nn.Linear(10, 3)}
    labels = {"parity": Y % 2, "size": Y // 4}
    parts = {name: Batches(x=X[: 64 - 20 * k], y=labels[name][: 64 - 20 * k], batch_size=8 * (k + 1))
             for k, name in enumerate(heads)}  # fmt: skip
    plan = Plan(
        model=small_model(), stream=Parts(parts), terms={name: On(name, Headed(h)) for name, h in heads.items()},
        steps=60, optimizer=clipped(adamw(1e-2, weight_decay=0.1)),
    )  # fmt: skip
    fitted = fit(plan.under(Atlas(vectors=noise(small_model(), 8, 0.2))), device="cpu")
    for losses in fitted.history.values():
        assert sum(losses[-10:]) < sum(losses[:10])
    assert all(torch.equal(fitted.terms[n].term.head.weight, heads[n].weight) for n in heads)


def test_negation_forgets_the_target_and_keeps_the_control():
    x, y = (t[:512] for t in digits())
    low = y < 5
    plan = Plan(model=small_model(), stream=Batches(x=x, y=y), steps=150, optimizer=adamw(3e-3))
    model = fit(plan, device="cpu").model
    tuned = fit(replace(plan, model=model, stream=Batches(x=x[low], y=y[low]), steps=50), device="cpu").model
    vectors = {"low": diff_vector(tuned.state_dict(), model.state_dict())}

    def accuracy(model: nn.Module, rows: Tensor) -> float:
        return float((model(x[rows]).argmax(1) == y[rows]).float().mean())

    def score(model: nn.Module) -> float:
        return -accuracy(model, low) if accuracy(model, ~low) >= 0.95 * control else -math.inf

    target, control = accuracy(model, low), accuracy(model, ~low)
    parts = {"target": Batches(x=x[low], y=y[low]), "control": Batches(x=x[~low], y=y[~low])}
    terms = {"forget": Weighted(-1.0, On("target", CrossEntropy())), "keep": On("control", CrossEntropy())}
    forget = Plan(model=model, stream=Parts(parts), terms=terms, steps=60, optimizer=clipped(adamw(0.05)))
    found = fit(KeepBest(score=score, every=5)(forget.under(Atlas(vectors=vectors))), device="cpu").model
    assert accuracy(found, ~low) >= 0.95 * control > 0.85
    assert accuracy(found, low) < target - 0.1


# names, ties, buffers, copies


class Tied(nn.Module):
    """A table that is also the head, and batch normalisation in between."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(7, 4), nn.BatchNorm1d(4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.bare = nn.BatchNorm1d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bare(self.norm(self.table(x))))


def tied() -> tuple[Tied, dict[str, dict[str, Tensor]]]:
    """The model, and two fine-tuned copies' differences with all that a state dict has."""
    with seeded(4):
        model, others = Tied(), []
        for _ in range(2):
            other = copy.deepcopy(model)
            with torch.no_grad():
                for p in other.parameters():
                    p.add_(0.3 * torch.randn_like(p))
            other.norm.running_mean += 5
            others.append(diff_vector(other.state_dict(), model.state_dict()))
    return model, {str(k): vector for k, vector in enumerate(others)}


def test_tied_weights_count_once_and_stay_tied_and_buffers_stay_the_base():
    model, vectors = tied()
    assert "norm.running_mean" in vectors["0"]
    atlas = Atlas(vectors=vectors)
    composed = atlas.apply(model)
    assert composed.blocks == ("table.weight", "norm.weight", "norm.bias")
    x = torch.arange(7).repeat(3)
    plan = Plan(model=composed, stream=[(x, x.flip(0))], steps=5, optimizer=adamw(0.1))
    trained = fit(plan, device="cpu").model
    folded = atlas.fold(trained)
    assert folded.head.weight is folded.table.weight
    assert not torch.equal(folded.table.weight, model.table.weight)
    for name, buffer in model.named_buffers():
        assert torch.equal(folded.get_buffer(name), buffer), name
    torch.testing.assert_close(folded.eval()(x), trained.eval()(x), rtol=1e-6, atol=1e-6)


def test_either_name_of_a_tied_weight_will_do_but_not_two_meanings():
    model, vectors = tied()
    want = placed(Atlas(vectors=vectors).apply(model), 0.5).weights()["table.weight"]
    only = {who: {name: t for name, t in v.items() if name != "table.weight"} for who, v in vectors.items()}
    assert torch.equal(placed(Atlas(vectors=only).apply(model), 0.5).weights()["table.weight"], want)
    apart = vectors | {"1": vectors["1"] | {"head.weight": torch.ones(7, 4)}}
    with pytest.raises(Refused, match=r"'1' must change tied weights alike; got \['table.weight', 'head.weight'\]"):
        Atlas(vectors=apart).apply(model)


def test_names_decide_and_not_places():
    shuffled = {who: dict(reversed(vector.items())) for who, vector in VECTORS.items()}
    pair = [placed(Atlas(vectors=v).apply(small_model()), some((3, 6)))(X) for v in (VECTORS, shuffled)]
    assert torch.equal(*pair)


def test_a_frozen_head_is_left_out_and_may_be_trained_along():
    vectors = {who: {name: t for name, t in v.items() if "head" not in name} for who, v in VECTORS.items()}
    with pytest.raises(Refused, match=r"'task 0' must name each tensor.*no \['head.weight', 'head.bias'\]"):
        Atlas(vectors=vectors).apply(small_model())
    atlas = Atlas(vectors=vectors, layers="enter,middle")
    composed = atlas.apply(small_model())
    assert composed.coefficients.shape == (3, 4)
    composed.model.head.requires_grad_()
    plan = Plan(model=composed, stream=[(X, Y)], steps=5, optimizer=adamw(0.1), finish=(atlas.fold,))
    folded = fit(plan, device="cpu").model
    assert not torch.equal(folded.head.weight, small_model().head.weight)
    assert torch.equal(composed.model.head.weight, small_model().head.weight)


def test_low_rank_vectors_are_vectors_and_untouched_tensors_take_no_memory():
    zero = {name: torch.zeros_like(p) for name, p in small_model().named_parameters()}
    low = {"low rank": zero | {"enter.weight": some((32, 2)) @ some((2, 64))}}
    composed = placed(Atlas(vectors=low | VECTORS).apply(small_model()), 0.1)
    assert [len(changes.values) for changes in composed.changes.values()] == [4, 3, 3, 3, 3, 3]
    composed(X).sum().backward()
    assert composed.coefficients.grad[0].ne(0).tolist() == [True] + [False] * 5


def test_attention_that_reads_weights_behind_its_layers_sees_the_sum():
    with seeded(0):
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    atlas, x = Atlas(vectors=noise(layer, 2)), some((4, 5, 8))
    for training in (True, False):
        composed = placed(atlas.apply(layer), 0.7).train(training)
        with torch.no_grad():
            folded = atlas.fold(composed).train(training)(x)
            torch.testing.assert_close(composed(x), folded, rtol=1e-5, atol=1e-5)
            assert float((folded - layer.train(training)(x)).abs().max()) > 0.01


def test_a_language_model_with_tied_weights_and_named_inputs():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=17, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    with seeded(0):
        model = transformers.GPT2LMHeadModel(config).eval()
    atlas, tokens = Atlas(vectors=noise(model, 2)), torch.arange(10).reshape(2, 5)
    composed = placed(atlas.apply(model), 0.5)
    output = composed(input_ids=tokens, labels=tokens)
    folded = atlas.fold(composed)
    assert folded.lm_head.weight is folded.transformer.wte.weight
    torch.testing.assert_close(folded(input_ids=tokens).logits, output.logits, rtol=1e-5, atol=1e-6)
    output.loss.backward()
    assert composed.coefficients.grad.all()


def test_copies_share_vectors_but_not_coefficients_and_dtype_changes_leave_half_precision():
    composed = Atlas(vectors=VECTORS).apply(small_model())
    other = copy.deepcopy(composed)
    placed(other, 1.0)
    assert not composed.coefficients.any()
    for name, changes in composed.changes.items():
        assert other.changes[name].values.data_ptr() == changes.values.data_ptr()
    assert composed.double().changes["enter.weight"].values.dtype == torch.float16


def test_coefficients_travel_with_names_and_the_base_they_belong_to():
    composed = placed(Atlas(vectors=VECTORS, partition=2).apply(small_model()), some((3, 3, 2)))
    kept = composed.mixture()
    fresh = Atlas(vectors=VECTORS, partition=2).apply(small_model())
    fresh.take(kept)
    assert torch.equal(fresh(X), composed(X))
    other = small_model()
    other.head.bias.data += 1
    renamed = {f"my {who}": vector for who, vector in VECTORS.items()}
    for what, wrong in {
        "base": Atlas(vectors=VECTORS, partition=2).apply(other),
        "vectors": Atlas(vectors=renamed, partition=2).apply(small_model()),
        "blocks": Atlas(vectors=VECTORS, partition=2, blocks="model").apply(small_model()),
        "seed": Atlas(vectors=VECTORS, partition=2, seed=1).apply(small_model()),
        "shape": Atlas(vectors=VECTORS, partition=3).apply(small_model()),
    }.items():
        with pytest.raises(Refused, match=f"the same {what}"):
            wrong.take(kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.bais": torch.zeros(10)}, r"'bad' must name tensors.*\['head.bais'\]. Did you mean 'head.bias'"),
        ({"head.bias": torch.zeros(9)}, r"'head.bias' of task vector 'bad'.*got \(\(9,\), \(10,\)\)"),
        ({"head.bias": torch.full((10,), torch.inf)}, r"'head.bias' of task vector 'bad' must be finite; got 10"),
        ({"head.bias": None}, r"'bad' must name each tensor that is composed; got no \['head.bias'\]"),
    ],
)
def test_vectors_that_do_not_fit_are_refused_by_name(change, message):
    changed = {name: t for name, t in (VECTORS["task 0"] | change).items() if t is not None}
    with pytest.raises(Refused, match=message):
        Atlas(vectors=VECTORS | {"bad": changed}).apply(small_model())


def test_a_vector_that_changes_nothing_is_pointed_out():
    zero = {name: torch.zeros_like(p) for name, p in small_model().named_parameters()}
    with pytest.warns(UserWarning, match=r"change nothing: \['zero'\]"):
        Atlas(vectors=VECTORS | {"zero": zero}).apply(small_model())
    part = zero | {"head.bias": torch.ones(10)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Atlas(vectors={"part": part}).apply(small_model())
