"""Fine-tuning transfer: the card's known answers, task arithmetic, rounding, added rows, and the line between models."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headstart.core.rng import random_state
from headstart.core.validate import Refused
from headstart.core.weights import LazyWeights, merge_streaming, save_weights
from headstart.merge import (
    DiffTransfer,
    Padded,
    TaskArithmetic,
    apply_diff,
    connectivity,
    diff_vector,
    recycle,
    transfer_report,
)
from headstart.testing import contract
from headstart.testing.subject import difference, snapshot

test_contract = contract(
    DiffTransfer(),
    models=2,
    known_failures={"copies_give_it_back": "a copy has changed nothing: the base comes back (card, answer 2)"},
    refuses=[lambda: DiffTransfer(scale=math.inf)],
)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def model(seed: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"embed": (6, 4), "scalar": (), "empty": (0, 3), "body.weight": (5, 4), "body.bias": (5,), "head": (6, 4)}
    state = {name: (spread * torch.randn(shape, generator=g)).to(dtype) for name, shape in shapes.items()}
    return state | {"steps": torch.tensor(seed)}


def near(state: dict[str, Tensor], seed: int, spread: float = 0.1) -> dict[str, Tensor]:
    change = model(seed, spread=spread)
    return {
        name: (t + change[name]).to(t.dtype) if t.is_floating_point() else change[name] for name, t in state.items()
    }


def flat(state) -> Tensor:
    return torch.cat([t.flatten().double() for t in state.values() if t.is_floating_point()])


# known answers of the card, by number


@pytest.mark.parametrize("dtype", DTYPES)
def test_1_between_equal_bases_the_fine_tuned_model_comes_back_bit_for_bit(dtype):
    old, tuned = model(0, dtype), model(1, dtype, spread=0.01)  # far apart, so that the difference needs more digits
    result = DiffTransfer().merge([tuned, old], base=old)
    exact = dtype != torch.float64  # float64 has no wider type to be exact in
    assert all(torch.equal(result[n], tuned[n]) for n in old if old[n].is_floating_point() and exact)
    torch.testing.assert_close(flat(result), flat(tuned), rtol=0, atol=0 if exact else 1e-15)
    assert result["steps"] == 0  # the new version's own


def test_2_no_scale_or_no_change_gives_the_new_version():
    old, new = model(0), model(1)
    tuned = near(old, 2)
    for result in (DiffTransfer(scale=0).merge([tuned, old], base=new), DiffTransfer().merge([old, old], base=new),
                   apply_diff(new, diff_vector(tuned, old), scale=0), apply_diff(new, diff_vector(old, old))):  # fmt: skip
        assert not difference(new, result)


@given(seed=st.integers(0, 10_000), a=st.floats(-2, 2), b=st.floats(-2, 2))
@settings(max_examples=40, deadline=None)
def test_3_linear_and_undone_within_a_rounding(seed, a, b):
    new, one, two = model(seed), diff_vector(model(seed + 1), model(seed + 2)), diff_vector(model(3), model(seed + 4))
    both = apply_diff(new, {name: a * one[name] + b * two[name] for name in one})
    stepwise = apply_diff(apply_diff(new, one, scale=a), two, scale=b)
    torch.testing.assert_close(flat(stepwise), flat(both), rtol=0, atol=5e-6)
    back = apply_diff(apply_diff(new, one), one, scale=-1)
    largest = torch.maximum(flat(new).abs(), flat(apply_diff(new, one)).abs())
    assert bool(((flat(back) - flat(new)).abs() <= largest * 2.0**-23).all())


def quadratic(hessian: Tensor, rate: float, steps: int):
    """Gradient descent on (w - best) H (w - best) / 2: start -> end."""
    best = torch.linspace(-1, 1, len(hessian), dtype=torch.float64)

    def descend(start: Tensor) -> Tensor:
        for _ in range(steps):
            start = start - rate * hessian @ (start - best)
        return start

    return descend, best


def test_4_the_error_on_a_quadratic_is_the_bases_difference_as_far_as_it_was_trained():
    g = torch.Generator().manual_seed(0)
    root = torch.randn(6, 3, generator=g, dtype=torch.float64)
    hessian, rate, steps = root @ root.T, 0.02, 30  # rank 3 of 6
    descend, best = quadratic(hessian, rate, steps)
    old, new = torch.randn(2, 6, generator=g, dtype=torch.float64)
    trained = torch.eye(6, dtype=torch.float64) - torch.linalg.matrix_power(
        torch.eye(6, dtype=torch.float64) - rate * hessian, steps
    )
    carried = diff_vector({"w": descend(old)}, {"w": old})["w"]
    torch.testing.assert_close(carried, trained @ (best - old))
    torch.testing.assert_close(carried - (descend(new) - new), trained @ (new - old))
    null = torch.linalg.eigh(hessian).eigenvectors[:, :3]  # of eigenvalue 0
    beside = old + null @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    moved = apply_diff({"w": beside}, {"w": carried})["w"]
    torch.testing.assert_close(moved, descend(beside))


def test_5_trained_to_the_end_it_misses_by_the_bases_difference():
    descend, best = quadratic(torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)), 0.2, 400)
    old, new = torch.tensor([[0.5, 0.0, 2.0], [0.7, -1.0, 2.0]], dtype=torch.float64)
    moved = DiffTransfer().merge([{"w": descend(old)}, {"w": old}], base={"w": new})["w"]
    torch.testing.assert_close(moved, best + (new - old))


@pytest.mark.parametrize("dtype", DTYPES)
def test_6_added_rows_are_the_fine_tuned_ones_exactly(dtype):
    g = torch.Generator().manual_seed(1)
    old, new, tuned = ({"embed": torch.randn(n, 4, generator=g).to(dtype)} for n in (10, 10, 12))
    diff = diff_vector(tuned, old)
    for moved in (apply_diff(new, diff), DiffTransfer().merge([tuned, Padded(old, tuned)], base=Padded(new, tuned))):
        assert moved["embed"].shape == (12, 4)
        assert torch.equal(moved["embed"][10:], tuned["embed"][10:])
        expected = new["embed"].double() + (tuned["embed"][:10].double() - old["embed"].double())
        torch.testing.assert_close(moved["embed"][:10].double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_6_added_rows_from_disk(tmp_path):
    old, new, tuned = model(0), model(1), near(model(0), 2)
    tuned["head"] = torch.cat([tuned["head"], torch.ones(2, 4)])
    for name, state in (("old", old), ("new", new), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_weights(state, tmp_path / name)
    lazy = {name: LazyWeights(tmp_path / name) for name in ("old", "new", "tuned")}
    streamed = dict(
        merge_streaming(
            DiffTransfer(), [lazy["tuned"], Padded(lazy["old"], tuned)], base=Padded(lazy["new"], lazy["tuned"])
        )
    )
    whole = apply_diff(new, diff_vector(tuned, old))
    torch.testing.assert_close(flat({name: streamed[name] for name in whole}), flat(whole), rtol=0, atol=1e-6)
    assert torch.equal(streamed["head"][6:], torch.ones(2, 4))
    assert streamed["steps"] == 1


def test_7_without_training_the_change_stays_what_it_was():
    bases = [model(k, torch.float64) for k in range(4)]
    first = model(9, torch.float64, spread=0.1)
    rounds = iter([first, *[dict.fromkeys(first, 0)] * 3])

    def finetune(start):
        change = next(rounds)
        return {name: tensor + change[name] if tensor.is_floating_point() else tensor for name, tensor in start.items()}

    tuned = list(recycle(bases, finetune))
    for base, result in zip(bases, tuned, strict=True):
        torch.testing.assert_close(flat(diff_vector(result, base)), flat(first), rtol=0, atol=1e-12)
    assert [int(result["steps"]) for result in tuned] == [0, 1, 2, 3]


def test_7_rounds_accumulate_and_versions_stay():
    bases = [{"w": torch.tensor([0.0, 10.0 * k])} for k in range(3)]
    before = snapshot(bases)

    def finetune(start):
        start["w"] += torch.tensor([1.0, 0.5])  # in place, as an optimizer does
        return start

    assert [result["w"].tolist() for result in recycle(bases, finetune)] == [[1, 0.5], [2, 11.0], [3, 21.5]]
    assert not difference(before, snapshot(bases))


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.3, 1.0, 1.25])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_8_is_task_arithmetic_with_one_vector_on_another_base(dtype, scale):
    peft = pytest.importorskip("peft.utils.merge_utils")
    old, new = model(0, dtype), model(1, dtype)
    tuned = near(old, 2)
    result, diff = DiffTransfer(scale=scale).merge([tuned, old], base=new), diff_vector(tuned, old)
    for name, change in diff.items():
        expected = new[name].double() + peft.task_arithmetic(
            [change.double()], torch.tensor([scale], dtype=torch.float64)
        )
        for found in (result[name], apply_diff(new, diff, scale=scale)[name]):
            assert found.dtype == dtype
            close = 4 * torch.finfo(dtype).eps if dtype == torch.float64 else torch.finfo(dtype).eps / 2
            torch.testing.assert_close(found.double(), expected, rtol=close, atol=1e-6 if close > 1e-9 else 1e-14)


@pytest.mark.parametrize("scale", [-1.0, 0.3, 1.0])
def test_8_is_this_library_s_task_arithmetic_too(scale):
    old, new = model(0, torch.float64), model(1, torch.float64)
    tuned = near(old, 2)
    as_if_tuned = apply_diff(new, diff_vector(tuned, old))
    expected = TaskArithmetic(scale=scale).merge([as_if_tuned], base=new)
    torch.testing.assert_close(flat(DiffTransfer(scale=scale).merge([tuned, old], base=new)), flat(expected))


# what the functions do besides


def test_only_what_is_chosen_changes():
    old, new = model(0), model(1)
    tuned = near(old, 2)
    tuned["embed"] = torch.cat([tuned["embed"], torch.ones(1, 4)])
    diff = diff_vector(tuned, old)
    everything = apply_diff(new, {**diff, "embed": diff["embed"][:6]})
    moved = apply_diff(new, diff, include="body.*, head", exclude="*.bias")
    for name in new:
        expected = everything if name in ("body.weight", "head") else new
        assert torch.equal(moved[name], expected[name]), name
        assert moved[name].data_ptr() != new[name].data_ptr() or not new[name].numel()


def test_inputs_and_random_state_stay():
    old, new = model(0), model(1)
    tuned = near(old, 2)
    before, state = snapshot([old, new, tuned]), random_state()
    apply_diff(new, diff_vector(tuned, old))
    transfer_report(tuned, old, new)
    connectivity(old, new, lambda weights: float(flat(weights).square().mean()), points=3)
    assert not difference(before, snapshot([old, new, tuned]))
    assert not difference(state, random_state())


def test_half_precision_is_rounded_once():
    old, tuned, new = ({"w": torch.tensor([w], dtype=torch.bfloat16)} for w in (1.0, 1.0078125, 1.0078125))
    assert diff_vector(tuned, old)["w"].dtype == torch.float32
    third = apply_diff(new, diff_vector(tuned, old), scale=1.5)["w"]
    assert third.tolist() == [torch.tensor(1.0078125 + 1.5 * 0.0078125).bfloat16().item()]


def test_the_report_counts_what_rounding_swallows():
    half = torch.bfloat16
    old = {"w": torch.tensor([0.0, 0.0, 0.0, 5.0], dtype=half), "tied": torch.zeros(0, dtype=half)}
    tuned = {"w": torch.tensor([0.001, 0.5, 0.5, 5.0], dtype=half), "tied": torch.zeros(0, dtype=half)}
    new = {"w": torch.tensor([8.0, 8.0, 0.0, 5.0], dtype=half), "tied": torch.zeros(0, dtype=half)}
    report = transfer_report(tuned, old, new)
    assert report["w"].arrived == pytest.approx(2 / 3)  # 8 + 0.001 is 8 in bfloat16
    assert report["w"].change == pytest.approx(math.sqrt(0.5), rel=1e-5)
    assert report["w"].apart == pytest.approx(math.sqrt(128))
    assert report["w"].ratio == pytest.approx(1 / 16, rel=1e-5)
    assert report["tied"] == type(report["w"])(change=0.0, apart=0.0, arrived=1.0)
    assert report["tied"].ratio == math.inf
    assert report[""] == report["w"]
    twice = [{**state, "tied": state["w"]} for state in (tuned, old, new)]
    assert transfer_report(*twice)[""] == report["w"], "a tied weight counts once"


def test_the_report_of_two_tensors_is_that_of_one():
    old, new = model(0, torch.float64), model(1, torch.float64)
    tuned = near(old, 2)
    whole = transfer_report(tuned, old, new)[""]
    assert whole.change == pytest.approx(float((flat(tuned) - flat(old)).norm()))
    assert whole.apart == pytest.approx(float((flat(new) - flat(old)).norm()))
    assert whole.arrived == 1


def test_the_barrier_of_a_double_well_and_of_a_bowl():
    ends = {"w": torch.tensor([-1.0])}, {"w": torch.tensor([1.0])}
    wells = connectivity(*ends, lambda w: float((w["w"] ** 2 - 1) ** 2))
    assert len(wells.losses) == 11
    assert wells.barrier == pytest.approx(1.0)
    tilted = connectivity(*ends, lambda w: float((w["w"] ** 2 - 1) ** 2 + 3 * w["w"]))
    assert tilted.barrier == pytest.approx(1.0)  # a slope is no barrier
    bowl = connectivity(*ends, lambda w: float(w["w"] ** 2), points=5)
    assert bowl.barrier == 0
    assert min(bowl.excess) == pytest.approx(-1.0)


def test_the_line_keeps_dtypes_counters_and_ends():
    a, b = model(0, torch.bfloat16), model(1, torch.bfloat16)
    seen = []
    connectivity(a, b, lambda weights: seen.append(weights) or 0.0, points=3)
    first, middle, last = seen
    assert not difference(a, first)
    assert not difference({**b, "steps": a["steps"]}, last)
    assert middle["head"].dtype == torch.bfloat16
    torch.testing.assert_close(flat(middle), (flat(a) + flat(b)) / 2, rtol=2**-8, atol=1e-6)


# refusals


def refuse(match: str, call) -> None:
    with pytest.raises(Refused, match=match):
        call()


def test_refuses_what_cannot_be_transferred():
    old, new = model(0), model(1)
    tuned, rule = near(old, 2), DiffTransfer()
    refuse("needs base=", lambda: rule.merge([tuned, old]))
    refuse("1 models", lambda: rule.merge([tuned], base=new))
    refuse("3 models", lambda: rule.merge([tuned, tuned, old], base=new))
    refuse("importance", lambda: rule.merge([tuned, old], base=new, importance=[old, old]))
    refuse("'head'.*1 NaN", lambda: rule.merge([tuned, old], base=spoiled(new)))
    refuse("'head'", lambda: diff_vector(spoiled(tuned), old))
    refuse("'head'", lambda: apply_diff(new, spoiled(diff_vector(tuned, old))))
    refuse("'head'", lambda: apply_diff(spoiled(new), diff_vector(tuned, old)))
    refuse("finite scale", lambda: apply_diff(new, diff_vector(tuned, old), scale=math.nan))
    refuse("leave a tensor.*nothing", lambda: apply_diff(new, diff_vector(tuned, old), include="nothing"))
    refuse("leave a tensor", lambda: apply_diff(new, diff_vector(tuned, old), exclude="*"))


def spoiled(state):
    head = state["head"].clone()
    head[1, 2] = math.nan
    return {**state, "head": head}


def test_refuses_other_architectures_by_name():
    old, new = model(0), model(1)
    tuned = near(old, 2)
    diff = diff_vector(tuned, old)
    without = {name: tensor for name, tensor in tuned.items() if name != "body.bias"}
    refuse("body.bias", lambda: diff_vector(without, old))
    refuse("body.bias", lambda: apply_diff(without, diff))
    refuse("body.bias", lambda: apply_diff(new, {n: t for n, t in diff.items() if n != "body.bias"}))
    wide = {**tuned, "head": torch.zeros(6, 5)}
    refuse(r"'head' may lack rows at its end only.*\(6, 4\) for \(6, 5\)", lambda: diff_vector(wide, old))
    refuse("'head' may lack rows", lambda: diff_vector(tuned, {**old, "head": torch.zeros(7, 4)}))  # fewer rows
    refuse("'scalar' may lack rows", lambda: diff_vector({**tuned, "scalar": torch.zeros(1)}, old))
    refuse("'head' must have one shape", lambda: DiffTransfer().merge([tuned, old], base={**new, "head": wide["head"]}))


def test_refuses_quantised_matrices_but_not_masks_or_counters():
    old = {"w": torch.ones(2), "q": torch.zeros(2, 2, dtype=torch.int8), "mask": torch.ones(2, 2, dtype=torch.bool)}
    tuned = {**old, "q": torch.ones(2, 2, dtype=torch.int8)}
    refuse(r"'q' must hold floating numbers.*int8", lambda: diff_vector(tuned, old))
    assert list(diff_vector(old, old)) == ["w"]


def test_refuses_a_line_without_a_middle_or_with_a_hole():
    a, b = model(0), model(1)
    refuse("points >= 3", lambda: connectivity(a, b, lambda _: 0.0, points=2))
    refuse("finite between", lambda: connectivity(a, b, lambda _: math.nan))
