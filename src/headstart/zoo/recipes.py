"""How each embedded model was made: family, pretraining pictures, objective, and length of the training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Learning = Literal["supervised", "contrastive", "variance", "rotation", "restoration"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One model of the embedded zoo.

    Args:
        name: what the user types after `mini:`.
        architecture: a name in `headstart.nets.ARCHITECTURES`.
        world: a module of `headstart.worlds`.
        world_options: passed to its `render`.
        objective: "supervised", or how the pictures set themselves a task.
        images: pictures to render for training.
        held_out: pictures to measure on, of other fonts, places or seeds.
        steps: optimizer steps.
        batch_size: pictures a step.
        learning_rate: of AdamW at its height, after a warm-up of 5 % and before a half cosine.
    """

    name: str
    architecture: str
    world: Literal["glyphs", "gratings", "noise", "photographs", "shapes"]
    world_options: Mapping[str, Any] = field(default_factory=dict)
    objective: Learning = "supervised"
    images: int = 40_000
    held_out: int = 2_000
    steps: int = 600
    batch_size: int = 128
    learning_rate: float = 3e-3


LETTERS, ALPHANUMERIC, CHARACTERS = {"classes": "letters"}, {"classes": "letters+digits"}, {"classes": "all"}

RECIPES = (
    Recipe(name="cnn-letters", architecture="cnn", world="glyphs", world_options=LETTERS),
    Recipe(name="mixer-letters", architecture="mixer", world="glyphs", world_options=LETTERS, steps=800),
    Recipe(name="cnn-letters-contrastive", architecture="cnn", world="glyphs", world_options=LETTERS,
           objective="contrastive", steps=300),
    Recipe(name="resnet-alphanumeric", architecture="resnet", world="glyphs", world_options=ALPHANUMERIC),
    Recipe(name="vit-alphanumeric", architecture="vit", world="glyphs", world_options=ALPHANUMERIC, steps=700),
    Recipe(name="cnn-characters", architecture="cnn", world="glyphs", world_options=CHARACTERS),
    Recipe(name="mlp-characters-restoration", architecture="mlp", world="glyphs", world_options=CHARACTERS,
           objective="restoration", steps=4000, learning_rate=2e-3),
    Recipe(name="cnn-shapes", architecture="cnn", world="shapes", images=30_000, steps=500),
    Recipe(name="resnet-gratings", architecture="resnet", world="gratings", images=20_000, steps=300),
    Recipe(name="convnext-noise", architecture="convnext", world="noise", images=30_000, steps=600),
    Recipe(name="resnet-photographs", architecture="resnet", world="photographs", images=30_000, steps=600),
    Recipe(name="resnet-photographs-contrastive", architecture="resnet", world="photographs",
           objective="contrastive", images=30_000, steps=350),
    Recipe(name="convnext-letters-rotation", architecture="convnext", world="glyphs", world_options=LETTERS,
           objective="rotation"),
    Recipe(name="vit-photographs-variance", architecture="vit", world="photographs", objective="variance",
           images=30_000, steps=500, learning_rate=2e-3),
)  # fmt: skip
