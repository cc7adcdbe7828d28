"""What the weights of a model matter for its own task, for the merge rules that ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from headstart.core.fisher import diagonal_fisher
from headstart.core.shards import Weights, spec_of
from headstart.core.validate import require
from headstart.merge import gram_matrices
from headstart.zoo.directory import load_model_directory

from .ingredients import Ingredient
from .prepared import prepare

EXAMPLES = 1024
"""Of a task, at most so many are looked at."""


def importance_of(
    rule: str, models: Sequence[Ingredient], targets: Sequence[str], progress: Callable[[str, int, int], None]
) -> list[Weights]:
    """Fisher information (rule "fisher") or Gram matrices of inputs ("regmean") of each model, by names of its weights.

    Args:
        rule: "fisher" or "regmean".
        models: folders that can be loaded.
        targets: the task of each model, or one for all.
        progress: called with what is going on, models done, models in all.

    Raises:
        Refused: another number of tasks, an adapter, or weights whose names the loaded model does not have.
    """
    from headstart.tasks import load_task

    require(len(targets) in (1, len(models)), f"--data names one task, or one for each of {len(models)} models",
            len(targets), "Join as many by commas.")  # fmt: skip
    found: list[Weights] = []
    for k, model in enumerate(models):
        require(model.whole, f"{rule} needs models that can be loaded", model.name, "Fold the adapter first.")
        task = load_task(targets[k % len(targets)])
        module, preprocess, _ = load_model_directory(model.folder)
        batches = list(prepare(task.train.inputs, preprocess).batches(64))[: EXAMPLES // 64]
        own = diagonal_fisher(module, batches) if rule == "fisher" else gram_matrices(module, batches)
        found.append(_named(module, model, own))
        progress(f"measuring for {rule}", k + 1, len(models))
    return found


def _named(module: nn.Module, model: Ingredient, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The values under the names that the weight file uses: what the module is wrapped in is taken off."""
    shapes = {name: spec_of(model.weights, name).shape for name in model.weights}
    parameters = {name: tuple(p.shape) for name, p in module.named_parameters()}
    inside = [name for name in parameters if name.endswith(tuple(shapes))]
    stems = {name[: len(name) - len(end)] for name in inside for end in shapes if name.endswith(end)}
    best = max(
        sorted(stems), key=lambda stem: sum(parameters.get(stem + name) == shapes[name] for name in shapes), default=""
    )
    named = {name: values[best + name] for name in shapes if best + name in values}
    require(bool(named), "The loaded model must have the weights of its file", sorted(shapes)[:3], "Save it again.")
    return named
