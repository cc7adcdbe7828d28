"""Did anything transfer? Keys and values before training, movement and reload after; failing is the default."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .findings import Audit as Audit
from .findings import Finding as Finding
from .findings import findings_of as findings_of
from .keys import AFTER as AFTER
from .keys import ALLOWED as ALLOWED
from .keys import BEFORE as BEFORE
from .keys import LoadReport as LoadReport
from .keys import check_loaded as check_loaded
from .keys import key_problems as key_problems
from .keys import load_report as load_report
from .keys import load_weights as load_weights
from .movement import block_of, telling_depth
from .movement import movement as movement

if TYPE_CHECKING:
    from headstart.tasks import Task

    from .source import Source


def audit_before(
    source: Source, model: nn.Module, task: Task, *, trained: nn.Module | None = None, allow: Collection[str] = ()
) -> Audit:
    """What must be right before training: weights carried over, head, input, and that something will train.

    Args:
        source: where the model comes from; loaded once more to compare with.
        model: the plain starting model, with its new head, before any surgery.
        task: what it will be trained on; one of its training examples is run through.
        trained: the model as the plan will train it (after LoRA or freezing); `model` by default.
        allow: findings that may fail, and key exceptions, by name.
    """
    pristine = source.load().state_dict()
    report = load_report(model, pristine, head=source.head)
    new_head = frozenset(allow) | {"mismatched-head", "missing-head", "unexpected-head"}
    problems = key_problems(report, new_head)
    rows = [
        ("keys", not problems, "; ".join(problems) or f"{len(report.loaded)} weights fit, {report.loaded_share:.1%}")
    ]
    rows.append(_values(model, pristine, report))
    rows.append(("modality", source.modality == task.modality, f"source {source.modality}, task {task.modality}"))
    layer = dict(model.named_modules()).get(source.head)
    fits = isinstance(layer, nn.Linear) and layer.out_features == len(task.classes)
    rows.append(("head", fits, f"{source.head}: {layer} for {len(task.classes)} classes"))
    rows.append(_input(source, model, task))
    distinct = len(set(task.classes)) == len(task.classes) >= 2
    rows.append(("classes", distinct, f"{len(task.classes)} classes, {len(set(task.classes))} distinct"))
    params = [(name, p) for name, p in (trained or model).named_parameters() if p.requires_grad]
    blocks: dict[str, int] = {}
    depth = telling_depth([name for name, _ in params])
    for name, p in params:
        blocks[block_of(name, depth)] = blocks.get(block_of(name, depth), 0) + p.numel()
    whole = sum(p.numel() for p in (trained or model).parameters())
    detail = ", ".join(f"{block} {count:,}" for block, count in blocks.items()) or "nothing"
    rows.append(("trains", bool(params), f"{sum(blocks.values()):,} of {whole:,} weights: {detail}"))
    return findings_of(rows, allow)


def _values(model: nn.Module, pristine: Mapping[str, Tensor], report: LoadReport) -> tuple[str, bool, str]:
    own = model.state_dict()
    body = [key for key in own if not (report.head and key.startswith(report.head + "."))]
    same = [key for key in body if key in report.loaded and torch.equal(own[key].cpu(), pristine[key].cpu())]
    total, kept = sum(own[key].numel() for key in body), sum(own[key].numel() for key in same)
    changed = [key for key in body if key not in same]
    detail = f"{kept / max(1, total):.1%} of the weights below the head equal the source's"
    return "values", not changed, detail + (f"; not {', '.join(changed[:5])}" if changed else "")


def _input(source: Source, model: nn.Module, task: Any) -> tuple[str, bool, str]:
    example = task.train.inputs[0]
    try:
        batch = source.preprocess([example])
        parts = batch if isinstance(batch, dict) else {"x": batch}
        shape = {name: tuple(part.shape[1:]) for name, part in parts.items()}
        with _judging(model):
            logits = _run(model, batch)
    except Exception as problem:  # whatever the model raises on a batch it cannot take is the finding
        return "input", False, f"one real example does not pass through: {type(problem).__name__}: {problem}"
    stated = source.facts.get("input_size")
    stated = (3, stated, stated) if isinstance(stated, int) else stated  # the side of a square picture
    finite = all(bool(torch.isfinite(part).all()) for part in (*parts.values(), logits) if part.is_floating_point())
    flat = source.modality == "image" and isinstance(batch, Tensor) and float(batch.float().std()) == 0.0
    fits = stated is None or not isinstance(batch, Tensor) or tuple(batch.shape[1:]) == tuple(stated)
    ok = fits and finite and not flat and logits.ndim == 2 and len(logits) == 1
    seen = shape if isinstance(batch, dict) else shape["x"]
    detail = f"one example gives {seen}, declared {stated or 'any'}, logits {tuple(logits.shape)}"
    return "input", ok, detail + ("" if finite else "; NaN or infinite") + ("; constant picture" if flat else "")


def audit_after(
    before: Mapping[str, Tensor],
    after: nn.Module,
    reloaded: nn.Module,
    batch: Tensor | Mapping[str, Tensor],
    *,
    head: str,
    frozen: Collection[str] = (),
    allow: Collection[str] = (),
) -> Audit:
    """What must be right after training: weights moved, frozen ones did not, and the saved model is the trained one.

    Args:
        before: copies of the starting model's weights, from before training.
        after: the trained model, folded back to a plain module.
        reloaded: the same model as `load_model_directory` gives it.
        batch: some preprocessed examples, run through both.
        head: dotted name of the head.
        frozen: names of weights that the plan said it would not train.
        allow: findings that may fail, by name.
    """
    own, back = after.state_dict(), reloaded.state_dict()
    bad = [key for key, value in own.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    rows = [
        ("finite", not bad, f"NaN or infinite in {', '.join(bad[:5])}" if bad else f"{len(own)} weights are finite")
    ]
    moved = movement(before, own, depth=telling_depth(list(before)))
    told = ", ".join(f"{name} {share:.2%}" if share < inf else f"{name} from zero" for name, share in moved.items())
    rows.append(
        ("moved", any(share > 0 for share in moved.values()), f"relative change: {told or 'nothing to compare'}")
    )
    in_head = [key for key in own if key.startswith(head + ".")]
    turned = [key for key in in_head if not _same(before.get(key), own[key])]
    rows.append(("head-moved", bool(turned), f"{len(turned)} of {len(in_head)} weights of {head} changed"))
    slipped = [key for key in frozen if not _same(before.get(key), own.get(key))]
    detail = f"changed although frozen: {', '.join(slipped[:5])}" if slipped else f"{len(frozen)} frozen weights kept"
    rows.append(("frozen", not slipped, detail))
    lost = sorted({key for key in own if not _same(own[key], back.get(key))} | (set(back) - set(own)))
    rows.append(
        ("restored", not lost, f"differ on reload: {', '.join(lost[:5])}" if lost else "all weights, bit for bit")
    )
    gone = [key for key in lost if key in in_head]
    rows.append(
        ("head-restored", not gone and bool(in_head), f"{len(in_head) - len(gone)} of {len(in_head)} weights equal")
    )
    rows.append(_predictions(after, reloaded, batch))
    return findings_of(rows, allow)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one.detach().cpu(), other.detach().cpu())


def _predictions(after: nn.Module, reloaded: nn.Module, batch: Any) -> tuple[str, bool, str]:
    with _judging(after, reloaded):
        ours, theirs = _run(after, batch), _run(reloaded, batch)
    if ours.shape != theirs.shape:
        return "predictions", False, f"logits of shape {tuple(ours.shape)} became {tuple(theirs.shape)}"
    apart = float((ours - theirs).abs().max()) if ours.numel() else 0.0
    agree = bool((ours.argmax(1) == theirs.argmax(1)).all()) if ours.numel() else True
    # the same weights through the same code: only a different order of additions may remain
    close = apart <= 1e-5 * max(1.0, float(ours.abs().max()) if ours.numel() else 0.0)
    return "predictions", close and agree, f"logits differ by at most {apart:.1e} on {len(ours)} examples"


@contextmanager
def _judging(*models: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside, every module's own mode back afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _run(model: nn.Module, batch: Any) -> Tensor:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    moved = {name: part.to(device) for name, part in batch.items()} if isinstance(batch, Mapping) else batch.to(device)
    logits: Tensor = model(moved)
    return logits.cpu()
