"""What `D2NWG` learns: it makes weights for data, and knows how far they are from those it has seen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headstart.core.validate import finite, require
from headstart.core.weights import Weights
from headstart.nets.diffusion import NoiseSchedule, ancestral
from headstart.nets.weight_vae import WeightVAE

from .weight_zoo import Layout, by_class, guarded


@dataclass(frozen=True, kw_only=True)
class WeightGenerator:
    """Makes weights of one layout for labelled examples; comes from `D2NWG.fit`."""

    layout: Layout
    extractor: str
    shots: int
    classes: int
    guided: bool
    schedule: NoiseSchedule
    scale: float
    vectors: Tensor = field(repr=False)
    mean: Tensor = field(repr=False)
    std: Tensor = field(repr=False)
    centre: Tensor = field(repr=False)
    spread: Tensor = field(repr=False)
    vae: WeightVAE = field(repr=False)
    model: Any = field(repr=False)

    @torch.no_grad()
    def generate(
        self, features: Tensor, labels: Tensor, n: int = 1, *, generator: torch.Generator | None = None,
        guidance: float = 1.0, extractor: str = "",
    ) -> list[dict[str, Tensor]]:  # fmt: skip
        """State dicts for the data, on the CPU, each from a fresh draw of its examples; keep the best by `best_of`.

        Args:
            features: (m, d) of labelled examples, at least `shots` of each class, from the zoo's extractor.
            labels: (m,) 0..c-1; unit k of a generated head means class k.
            n: how many, >= 1; the paper's script draws 50.
            generator: of the draws of examples and of all noise, on the CPU; by default one of seed 0.
            guidance: 1 takes the condition as it is, 0 leaves it out, more than 1 overdoes it.
            extractor: name of the model that made the features; must be the zoo's.

        Raises:
            Refused: another extractor, number of classes or width of features than the zoo's, too few examples,
                guidance other than 1 of a generator that was trained with drop=0.

        Notes: a number that is never negative in the zoo, such as a running variance, is not made smaller than the
        least that the zoo has.
        """
        require(n >= 1, "generate needs n >= 1", n, "Pass how many state dicts to make.")
        require(guidance == 1 or self.guided, "Guidance needs a generator trained with drop > 0", guidance,
                "Leave it at 1, or fit again.")  # fmt: skip
        require(extractor == self.extractor, "Features must come from the zoo's extractor", repr(extractor),
                f"Extract with {self.extractor!r} and name it.")  # fmt: skip
        sets = by_class(features, labels)[None]
        wanted = self.classes, len(self.centre)
        require((sets.shape[1], sets.shape[3]) == wanted, f"This generator is for {wanted} classes and features",
                (sets.shape[1], sets.shape[3]), "Use a generator of that kind.")  # fmt: skip
        fewest = int(sets[..., 0].isfinite().sum(2).min())
        require(fewest >= self.shots, f"Every class needs {self.shots} examples", fewest, "Pass more examples.")
        generator = generator or torch.Generator().manual_seed(0)
        drawn = pick((sets - self.centre) / self.spread, torch.zeros(n, dtype=torch.int64), self.shots, generator)
        pieces = self.vectors.shape[1]
        drawn, piece = drawn.repeat_interleave(pieces, 0), torch.arange(pieces).repeat(n)
        with_data, without = (self.model.condition(drawn, piece, torch.full((len(piece),), k)) for k in (1.0, 0.0))

        def predict(noisy: Tensor, t: Tensor) -> Tensor:
            def noise(condition: Tensor) -> Tensor:
                out: Tensor = self.model.denoiser({"noisy": noisy, "time": t, "condition": condition})
                return out

            if guidance in (0, 1):
                return noise(with_data if guidance else without)
            free = noise(without)
            return free + guidance * (noise(with_data) - free)

        width: int = self.model.denoiser.layers[-1].out_features
        latent = ancestral(self.schedule, predict, (n * pieces, width), generator) / self.scale
        vectors = self._restored(self.vae.decode(latent).view(n, pieces, -1))
        finite("Generated weights", vectors, "Lower the learning rate of fit, or the guidance.")
        return [self.layout.unflatten(vector) for vector in vectors]

    @torch.no_grad()
    def reconstruct(self, weights: Weights) -> dict[str, Tensor]:
        """The weights through the autoencoder and back: what samples can be at best."""
        again: Tensor = self.vae.decode(self.vae.encode(self._standard(weights))[0])
        return self.layout.unflatten(self._restored(again[None])[0])

    def nearest(self, weights: Weights) -> float:
        """Root mean square distance to the nearest zoo model, each number in its standard deviations over the zoo."""
        return float((self._all() - self._standard(weights)).square().flatten(1).mean(1).min().sqrt())

    def spacing(self) -> float:
        """The same from one zoo model to the next nearest, the median over the zoo; infinite for a zoo of one."""
        x = self._all().flatten(1)
        apart = torch.cdist(x, x).fill_diagonal_(torch.inf).min(1).values / x.shape[1] ** 0.5
        return float(apart.median())

    def _standard(self, weights: Weights) -> Tensor:
        return self._scaled(self.layout.flatten(weights))

    def _all(self) -> Tensor:
        return self._scaled(self.vectors)

    def _scaled(self, vectors: Tensor) -> Tensor:
        return ((vectors - self.mean) / guarded(self.std)).float()

    def _restored(self, standard: Tensor) -> Tensor:
        vectors = standard * self.std + self.mean
        least = self.vectors.amin(0)
        return torch.where(least >= 0, vectors.maximum(least), vectors)


def pick(sets: Tensor, rows: Tensor, shots: int, generator: torch.Generator | None = None) -> Tensor:
    """Random examples of sets (k, classes, most, d), NaN where there is none: (n, classes, shots, d) of rows (n,)."""
    absent = sets[..., 0].isnan()[rows]
    chance = torch.rand(absent.shape, generator=generator).masked_fill(absent, -1)
    chosen = chance.topk(shots, dim=2).indices
    return sets[rows[:, None, None], torch.arange(sets.shape[1])[None, :, None], chosen]
