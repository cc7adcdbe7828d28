"""Make the embedded models again: render, train with `fit`, measure on held-out pictures, write weights and cards."""

from __future__ import annotations

import hashlib
import importlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from headstart import nets
from headstart.core.loop import fit
from headstart.core.plan import CrossEntropy, Plan, Term, adamw, cosine
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.core.validate import one_of, require
from headstart.worlds import Pictures

from .objectives import RESTORED, Contrasting, Regularising, Restoring, Turning, met
from .recipes import RECIPES, Recipe

HELD_OUT = {"glyphs": {"fonts": "held-out"}, "photographs": {"part": "held-out"}}
TERMS: Mapping[str, Callable[[], Term]] = {
    "supervised": lambda: CrossEntropy(smoothing=0.05),
    "contrastive": Contrasting,
    "variance": Regularising,
    "rotation": Turning,
    "restoration": Restoring,
}
OUTPUTS = {"contrastive": 64, "variance": 128, "rotation": 4, "restoration": RESTORED**2}


def build_zoo(
    out: Path | str,
    names: Sequence[str] | None = None,
    *,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    recipes: Sequence[Recipe] = RECIPES,
) -> list[dict[str, Any]]:
    """Train the embedded models from pictures made on the spot and write `NAME.safetensors` and `NAME.json`.

    The same seed on the same machine and torch version gives the same weights, byte for byte: one thread, no GPU.

    Args:
        out: folder to write to; files of the same name are replaced.
        names: which recipes to follow; None follows all.
        seed: of the pictures, the first weights and the batches.
        progress: called with (name, steps done, steps in all).
        recipes: what may be built.

    Returns:
        the cards, in the order of the recipes. `BUILD.json` in `out` keeps the CPU seconds of each model.

    Cost: 17 minutes of one core for the whole zoo, 35 to 100 seconds a model; measured in `weights/BUILD.json`.

    Raises:
        Refused: an unknown name, or `out` is a file.
    """
    known = [recipe.name for recipe in recipes]
    for name in known if names is None else names:
        one_of("The recipe", name, known)
    folder = Path(out)
    require(not folder.is_file(), "build_zoo writes to a folder", str(out), "Pass the path of a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    cards = []
    with _one_thread():
        for recipe in recipes:
            if names is None or recipe.name in names:
                report = (lambda done, of, name=recipe.name: progress(name, done, of)) if progress else None
                cards.append(_build(recipe, folder, seed, report))
    _pictures.cache_clear()
    return cards


def _build(recipe: Recipe, folder: Path, seed: int, progress: Callable[[int, int], None] | None) -> dict[str, Any]:
    began = time.process_time()
    pictures = _pictures(recipe.world, json.dumps(dict(recipe.world_options)), recipe.images, seed)
    x = torch.from_numpy(pictures.images).permute(0, 3, 1, 2).contiguous()
    values = x.float() / 255
    mean = [round(float(v), 4) for v in values.mean((0, 2, 3))]
    std = [round(float(v), 4) for v in values.std((0, 2, 3))]
    del values
    classes = {"supervised": pictures.classes, "rotation": ("0", "90", "180", "270")}.get(recipe.objective, ())
    outputs = OUTPUTS.get(recipe.objective, len(classes))
    with seeded(seed):
        model = nets.build(recipe.architecture, outputs)
    plan = Plan(
        model=model,
        stream=Batches(
            x=x,
            y=torch.from_numpy(pictures.labels),
            batch_size=recipe.batch_size,
            seed=seed,
            augment=lambda batch: normalised(batch, mean, std),
        ),
        terms={recipe.objective: TERMS[recipe.objective]()},
        steps=recipe.steps,
        optimizer=adamw(recipe.learning_rate, weight_decay=0.02),
        schedule=lambda share: min(1.0, (share + 1 / recipe.steps) / 0.05) * cosine(share),
    )
    model = fit(plan, device="cpu", seed=seed, progress=progress).model
    stored = {name: t.half() if t.is_floating_point() else t for name, t in sorted(model.state_dict().items())}
    model.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in stored.items()})
    metric, value = measured(model, recipe, seed, mean, std)
    data = save({name: t.contiguous() for name, t in stored.items()})
    card = {
        "name": recipe.name,
        "family": recipe.architecture,
        "data": recipe.world,
        "data_options": dict(recipe.world_options),
        "objective": recipe.objective,
        "classes": list(classes),
        "outputs": outputs,
        "input_size": 32,
        "mean": mean,
        "std": std,
        "parameters": sum(p.numel() for p in model.parameters()),
        "features": model.get_submodule("head").in_features,
        "pretraining": {"images": recipe.images, "steps": recipe.steps, "batch_size": recipe.batch_size, "seed": seed},
        "metric": {"name": metric, "value": round(value, 4)},
        "cpu_seconds": round(time.process_time() - began, 1),
        "torch": torch.__version__.partition("+")[0],
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "licence": "Apache-2.0",
    }
    (folder / f"{recipe.name}.safetensors").write_bytes(data)
    (folder / f"{recipe.name}.json").write_text(json.dumps(card, indent=1) + "\n")
    _log(folder, card)
    return card


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 pictures (n, 3, H, W) as the model wants them."""
    return (images.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def measured(
    model: nn.Module, recipe: Recipe, seed: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[str, float]:
    """How well the objective is met on pictures of other fonts, places or seeds: the figure's name and value."""
    options = {**recipe.world_options, **HELD_OUT.get(recipe.world, {})}
    pictures = _render(recipe.world, options, recipe.held_out, seed + 1)
    x = normalised(torch.from_numpy(pictures.images).permute(0, 3, 1, 2), mean, std)
    with seeded(seed):
        return met(model, recipe.objective, x, torch.from_numpy(pictures.labels))


def _render(world: str, options: Mapping[str, Any], count: int, seed: int) -> Pictures:
    pictures: Pictures = importlib.import_module(f"headstart.worlds.{world}").render(count, seed, **options)
    return pictures


@lru_cache(maxsize=1)
def _pictures(world: str, options: str, count: int, seed: int) -> Pictures:
    return _render(world, json.loads(options), count, seed)


def _log(folder: Path, card: Mapping[str, Any]) -> None:
    path = folder / "BUILD.json"
    models = json.loads(path.read_text())["models"] if path.exists() else {}
    models = dict(sorted({**models, card["name"]: card["cpu_seconds"]}.items()))
    log = {"torch": card["torch"], "threads": 1, "cpu_seconds": round(sum(models.values()), 1), "models": models}
    path.write_text(json.dumps(log, indent=1) + "\n")


@contextmanager
def _one_thread() -> Iterator[None]:
    """The order of sums, and with it the last bit, depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
