"""The one training loop: every method of this library is trained by `fit`."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint as saved
from .device import accelerator_for
from .objective import Fitted, Objective
from .plan import Plan
from .rng import seeded
from .stream import as_batch, drawn, each, share
from .taps import tapped
from .validate import one_of, require


def fit(
    plan: Plan,
    *,
    device: str = "auto",
    precision: str = "fp32",
    seed: int = 0,
    accumulate: int = 1,
    checkpoint: Path | str | None = None,
    every: int = 100,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Fitted:
    """Train a copy of the plan's model and hand it back; the plan and the caller's random state stay as they were.

    Under `torchrun` or `accelerate launch` the same call trains on all processes: each takes its equal slice of every
    batch, so without batch statistics the weights are those of one process.

    Args:
        plan: what to train, on what, towards what.
        device: "auto" (an accelerator where there is one), "cpu" or "cuda".
        precision: "fp32", "bf16" or "fp16" (autocast; weights stay fp32).
        seed: of everything random; the same seed gives the same weights on the same machine.
        accumulate: slices a batch is cut into, to save memory; the result is that of the whole batch.
        checkpoint: file to save the run's state to, every `every` steps and at the end.
        resume: continue from `checkpoint` if it exists, bit for bit on the CPU as if never stopped.
        progress: called with (steps done, steps in all) after each step.

    Cost: per step one forward and backward of the model, plus about 0.1 ms (benchmarks/loop.py).

    Raises:
        Refused: nothing to train, a loss that is not finite, a checkpoint of another plan, batches that do not share.

    >>> from headstart.core.plan import adamw
    >>> from headstart.core.stream import Batches
    >>> x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    >>> stream = Batches(x=x, y=(x[:, 0] > 0).long())
    >>> fitted = fit(Plan(model=torch.nn.Linear(2, 2), stream=stream, steps=50, optimizer=adamw(lr=0.1)))
    >>> fitted.history["task"][-1] < fitted.history["task"][0]
    True
    """
    require(bool(plan.trainable()), "fit needs parameters to train", "every one is frozen", "Unfreeze some layers.")
    one_of("precision", precision, ["fp32", "bf16", "fp16"])
    require(
        accumulate >= 1 and every >= 1, "fit needs accumulate >= 1 and every >= 1", (accumulate, every), "Raise it."
    )
    simple = plan.gradient is None
    require(simple or (accumulate == 1 and precision != "fp16"), "A gradient rule sees whole fp32 or bf16 batches",
            f"accumulate={accumulate}, precision={precision}", "Use accumulate=1 and no fp16.")  # fmt: skip
    began = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(seeded(None))
        accelerator = accelerator_for(device, precision)
        stack.enter_context(seeded(seed))
        frozen = [p for m in (plan.model, *plan.terms.values()) for p in m.parameters() if not p.requires_grad]
        model, terms = copy.deepcopy((plan.model, dict(plan.terms)), {id(p): p for p in frozen})
        objective = Objective(model, terms).train().to(accelerator.device)
        params = [p for p in objective.parameters() if p.requires_grad]
        optimizer = plan.optimizer(params)
        rates = [group["lr"] for group in optimizer.param_groups]
        recorded = stack.enter_context(tapped(model, [tap for term in terms.values() for tap in term.taps]))
        wrapped = accelerator.prepare(objective) if simple else objective  # a rule reduces gradients itself
        optimizer = accelerator.prepare(optimizer)
        if accelerator.scaler is None:  # accelerate's wrapper looks for a package on disk at every step
            optimizer = optimizer.optimizer
        world, rank = accelerator.num_processes, accelerator.process_index
        state = saved.State(objective, optimizer, plan, seed, accelerator)
        path = None if checkpoint is None else saved.path_of(checkpoint, rank)
        first, losses = state.load(path) if path and resume and path.exists() else (0, [])
        if first == 0:
            torch.default_generator.manual_seed(seed + rank)
        batches = drawn(plan.stream, first, seed)
        for index in range(first, plan.steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * plan.schedule(index / plan.steps)
            batch = as_batch(next(batches))
            optimizer.zero_grad()
            total: list[Tensor] = []
            for k in range(accumulate):
                part = each(lambda t: t.to(accelerator.device), share(batch, rank * accumulate + k, world * accumulate))
                last = k == accumulate - 1
                with nullcontext() if last or world == 1 else accelerator.no_sync(wrapped):
                    parts = wrapped(part, index / plan.steps, recorded)
                    if plan.gradient is None:
                        loss = reduce(torch.add, parts.values())
                        accelerator.backward(loss if accumulate == 1 else loss / accumulate)
                    else:
                        plan.gradient(parts, params)
                        for p in params if world > 1 else ():
                            p.grad = None if p.grad is None else accelerator.reduce(p.grad, "mean")
                total.append(torch.stack([loss.detach().float() for loss in parts.values()]))
            losses.append(total[0] if accumulate == 1 else torch.stack(total).mean(0))
            optimizer.step()
            assert objective.step is not None
            for call in plan.after_step:
                call(objective.step)
            objective.step = None
            if path and ((index + 1) % every == 0 or index + 1 == plan.steps):
                state.save(path, index + 1, losses)
            if progress:
                progress(index + 1, plan.steps)
        _check(losses)
        for change in plan.finish:
            model = change(model)
    return Fitted(model=model.eval(), terms=terms, seconds=time.perf_counter() - began, losses=torch.stack(losses))


def _check(losses: list[Tensor]) -> None:
    bad = ~torch.isfinite(torch.stack(losses)).all(1)
    at = int(bad.float().argmax())
    require(
        not bool(bad.any()), "The loss must stay finite", f"NaN or infinity at step {at}", "Lower the learning rate."
    )
