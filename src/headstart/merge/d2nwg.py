"""Weights for a data set made by a diffusion model that has seen other data sets and the weights trained on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.core.loop import fit
from headstart.core.paper import Paper
from headstart.core.plan import Plan, Step, Term, adamw, cosine
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.core.validate import one_of, require
from headstart.nets.diffusion import Conditional, Denoiser, NoiseSchedule
from headstart.nets.set_encoder import Prototypes, SetEncoder
from headstart.nets.weight_vae import WeightVAE, divergence

from .weight_generator import WeightGenerator, pick
from .weight_zoo import WeightZoo, guarded

PAPER = Paper(
    title="Diffusion-Based Neural Network Weights Generation",
    authors="Bedionita Soro and Bruno Andreis and Hayeon Lee and Wonyong Jeong and Song Chong and Frank Hutter and "
    "Sung Ju Hwang",
    year=2025,
    arxiv="2402.18153",
    code="https://github.com/sorobedio/DNNWG",
    departs="The small version: autoencoder and denoiser are perceptrons, 200 steps of noise; weights are standardised "
    "over the zoo; the autoencoder learns its variances; latents are scaled by the whole zoo and not by a first batch; "
    "the condition is dropped in training, for guidance. A class-ordered condition takes the place of the release's "
    "perceptron encoder. No moving average of the denoiser.",
)


@dataclass(frozen=True, kw_only=True)
class D2NWG:
    """Ready weights for a data set of a few labelled examples, without training on it.

    An autoencoder squeezes the zoo's weight vectors; a diffusion model learns the squeezed vectors given examples of
    the data that each was trained on. `fit(zoo)` gives a `WeightGenerator`; its `generate` makes weights for new data.

    Args:
        condition: "ordered" gives the mean of each class in order, which a classifier's head needs; "set" a set
            encoder that ignores the order of classes, aligned with the weights before the diffusion.
        shots: examples of each class that make a condition, drawn anew at each step; the paper has 5.
        latent: numbers that a weight vector becomes; the paper has 1,024 for 2,864 weights.
        hidden: width of the autoencoder's hidden layers; 0 is a linear one.
        width: of the denoiser's hidden layers.
        kl: weight of the divergence from N(0, 1), >= 0; too much, and all samples are the zoo's mean.
        drop: how often the condition is left out in training, in [0, 1); > 0 for `guidance` other than 1.
        schedule: of the noise, as in `NoiseSchedule`: "linear" over 200 steps, or the paper's "rooted" over 1,024.
        steps: of the autoencoder, of the alignment (if "set") and of the diffusion.
        rate: learning rate of all three, at its height; it falls along half a cosine.
        batch_size: of all three.

    Use it when: many models of one layout and one initialisation exist, each with its data, and new tasks come often.
    Not when: classes are new, not only their combination: the nearest class mean is better (benchmarks/d2nwg_zoo.py).
        Or models were trained from different starts: align their neurons first, or take heads only.

    Cost: the three trainings; to generate, one pass of the denoiser for each step of noise.

    Notes: hold out whole data sets, not permutations of their classes, when judging it. Compare with the nearest class
        mean of the same examples. Running statistics of batch norm are weights too; re-estimate them if in doubt.

    Raises:
        Refused: an empty zoo, fewer examples of a class than shots, an argument out of range.

    Reference: Soro et al. 2025, section 3.

    >>> zoo = WeightZoo()
    >>> zoo.add({"w": torch.ones(2, 3)}, features=torch.eye(4), labels=torch.tensor([0, 1, 0, 1]))
    >>> made = D2NWG(shots=2, steps=(5, 5, 5)).fit(zoo).generate(torch.eye(4), torch.tensor([0, 1, 0, 1]), n=1)
    >>> made[0]["w"].tolist()  # a zoo of one model knows nothing else
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """

    condition: Literal["ordered", "set"] = "ordered"
    shots: int = 5
    latent: int = 24
    hidden: int = 128
    width: int = 256
    kl: float = 1e-4
    drop: float = 0.1
    schedule: Literal["linear", "rooted"] = "linear"
    steps: tuple[int, int, int] = (1500, 500, 2500)
    rate: float = 4e-3
    batch_size: int = 128

    def __post_init__(self) -> None:
        one_of("condition", self.condition, ["ordered", "set"])
        one_of("schedule", self.schedule, ["linear", "rooted"])
        require(self.shots >= 1, "D2NWG needs shots >= 1", self.shots, "The paper has 5.")
        require(0 <= self.drop < 1, "D2NWG needs 0 <= drop < 1", self.drop, "Pass a share such as 0.1.")
        require(0 <= self.kl < torch.inf, "D2NWG needs a finite kl >= 0", self.kl, "Pass a weight such as 1e-4.")
        require(0 < self.rate < torch.inf, "D2NWG needs a finite rate > 0", self.rate, "Pass a rate such as 4e-3.")

    def fit(self, zoo: WeightZoo, *, device: str = "auto", seed: int = 0) -> WeightGenerator:
        """Learn the zoo; the same seed gives the same generator."""
        require(bool(zoo.entries), "D2NWG needs a zoo with weights", "an empty one", "Call zoo.add first.")
        assert zoo.layout is not None
        vectors, sets = zoo.vectors(), zoo.sets(self.shots)
        mean, std = vectors.double().mean(0), vectors.double().std(0, correction=0)
        examples = sets.flatten(0, 2)
        seen = examples[examples[:, 0].isfinite()]
        centre, spread = seen.mean(0), guarded(seen.std(0, correction=0))
        sets = (sets - centre) / spread
        x = ((vectors - mean) / guarded(std)).float().flatten(0, 1)  # (entries * pieces, length)
        pieces = vectors.shape[1]
        row, piece = torch.arange(len(x)) // pieces, torch.arange(len(x)) % pieces

        def trained(model: nn.Module, stream: Batches, term: Term, steps: int) -> Any:
            plan = Plan(model=model, stream=stream, terms={"task": term}, steps=steps, optimizer=adamw(self.rate),
                        schedule=cosine)  # fmt: skip
            return fit(plan, device=device, seed=seed).model.cpu()

        def batches(augment: Any = None, **columns: Tensor) -> Batches:
            return Batches(x=columns, batch_size=self.batch_size, seed=seed, augment=augment)

        def drawn(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            """A latent from its distribution, and a fresh set of examples of its data."""
            latent = batch["mean"] + batch["std"] * torch.randn_like(batch["mean"])
            return {"latent": latent, "sets": pick(sets, batch["row"], self.shots), "piece": batch["piece"]}

        with seeded(seed):
            vae = WeightVAE(x.shape[1], self.latent, self.hidden)
            encoder: nn.Module = Prototypes()
            if self.condition == "set":
                encoder = SetEncoder(sets.shape[3], self.latent, width=64, hidden=32, points=4)
            told = self.latent if self.condition == "set" else sets.shape[1] * sets.shape[3]
            denoiser = Denoiser(self.latent, told + (pieces if pieces > 1 else 0), width=self.width)
        vae = trained(vae, Batches(x=x, batch_size=self.batch_size, seed=seed), Squeeze(self.kl), self.steps[0])
        with torch.no_grad():
            middle, log_variance = vae.encode(x)
            scale = 1 / guarded((middle.var(correction=0) + log_variance.exp().mean()).sqrt())
        stream = batches(drawn, mean=middle * scale, std=(log_variance / 2).exp() * scale, row=row, piece=piece)
        if isinstance(encoder, SetEncoder):
            encoder = trained(encoder, stream, Align(), self.steps[1])
            encoder.within.requires_grad_(False)
            encoder.between.requires_grad_(False)
        schedule = NoiseSchedule.linear() if self.schedule == "linear" else NoiseSchedule.rooted()
        model = trained(
            Conditional(encoder, denoiser, pieces), stream, PredictNoise(schedule, self.drop), self.steps[2]
        )
        return WeightGenerator(
            layout=zoo.layout, extractor=zoo.extractor, shots=self.shots, classes=sets.shape[1], guided=self.drop > 0,
            vectors=vectors, mean=mean, std=std, centre=centre, spread=spread, vae=vae, model=model,
            schedule=schedule, scale=float(scale),
        )  # fmt: skip


class Squeeze(Term):
    """Reconstruct the vectors: mean squared error + kl * divergence of the latent from N(0, 1), mean over the batch."""

    def __init__(self, kl: float) -> None:
        super().__init__()
        self.kl = kl

    def forward(self, step: Step) -> Tensor:
        again, mean, log_variance = step.run(step.batch.x).output
        return F.mse_loss(again, step.batch.x) + self.kl * divergence(mean, log_variance).mean()


class Align(Term):
    """Conditions that lie to each other as the weights do: see `alignment`."""

    def forward(self, step: Step) -> Tensor:
        return alignment(step.batch.x["latent"], step.run(step.batch.x["sets"]).output)


class PredictNoise(Term):
    """Predict the noise at a random step; the condition is left out for a share `drop` of the batch."""

    def __init__(self, schedule: NoiseSchedule, drop: float) -> None:
        super().__init__()
        self.schedule, self.drop = schedule, drop

    def forward(self, step: Step) -> Tensor:
        x = step.batch.x
        latent, n = x["latent"], len(x["latent"])
        noise, kept = torch.randn_like(latent), (torch.rand(n, device=latent.device) >= self.drop).to(latent)
        t = torch.randint(len(self.schedule.betas), (n,), device=latent.device)
        seen = {"noisy": self.schedule.noisy(latent, noise, t), "time": t, "kept": kept}
        return F.mse_loss(step.run({**x, **seen}).output, noise)


def alignment(weights: Tensor, conditions: Tensor, tau: float = 1.0) -> Tensor:
    """How far conditions (n, d) are from lying to each other as the weights' latents (n, d) do: a contrastive loss.

    Reference: Soro et al. 2025, as released: the targets carry gradient, and their transpose is not normalised.
    """
    logits = weights @ conditions.T / tau
    targets = ((conditions @ conditions.T + weights @ weights.T) / 2 * tau).softmax(1)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets.T)) / 2
