"""Heads generated for classes that no model of the zoo was trained on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations, permutations

import torch
from torch import Tensor

from headstart.core.claim import Claim
from headstart.core.weights import Weights
from headstart.merge.d2nwg import D2NWG
from headstart.merge.d2nwg import PAPER as PAPER
from headstart.merge.weight_generator import WeightGenerator
from headstart.merge.weight_quality import Judged, best_of, quality
from headstart.merge.weight_zoo import WeightZoo
from headstart.testing.material import digits

from .linear_heads import scorer, trained


def _ahead(says: str, than: str, by: float = 0.0, metric: str = "accuracy", better: str = "generated") -> Claim:
    return Claim(says=says, metric=metric, better=better, than=than, by=by, seeds=3)


CLAIMS = (
    _ahead("Heads generated from five images of each of three unseen classes reach 85 %.", "nothing", 0.85),
    _ahead("That is 40 points more than from the images of another task.", "another task's images", 0.4),
    _ahead("It is 40 points more than from no images at all.", "no images", 0.4),
    _ahead("It is more than the mean of all training heads has.", "mean head"),
    _ahead("It is more than the nearest class mean of the same images has, on two seeds of three.", "never", 0.6,
           "ahead of the nearest class mean"),
    _ahead("Samples are no copies: the nearest training head is more than half as far as those are from each other.",
           "half the spacing of the training heads", 0.0, "distance"),
    _ahead("A condition blind to the order of the classes, the aligned set encoder's, costs 40 points.",
           "set encoder", 0.4),
    _ahead("Fine-tuned on the images, a generated head starts ahead of a random one.", "random start", 0.0,
           "before fine-tuning", "generated start"),
    _ahead("After ten steps it is not behind.", "random start", -1e-9, "after 10 steps", "generated start"),
)  # fmt: skip
NOTE = (
    "The card leaves the learning rates open: 0.05 for the heads, and 4e-3 for the rest, which was the best of 1e-3, "
    "2e-3 and 4e-3 on seeds 10 and 11, none of those recorded. The best of 5 is chosen on 105 labelled images that the "
    "condition does not see; with so many, training is better still. The set encoder's diffusion has 600 steps of 32, "
    "not 2,500 of 128: no training can tell it an order that it is not shown."
)
SHOTS, SAMPLES, EACH, TESTED = 5, 5, 40, 60
LABELS = torch.arange(3).repeat_interleave(EACH)
FEW = torch.arange(3 * EACH) % EACH < SHOTS


def run(seed: int) -> dict[str, dict[str, float]]:
    """All 720 ordered triples of digits; those of 24 of the 120 class sets are unseen, and 60 of them tested."""
    generator = torch.Generator().manual_seed(seed)
    x, y = digits()
    order = torch.randperm(len(y), generator=generator)
    halves = order.tensor_split(2)
    x = x.flatten(1) - x.flatten(1)[halves[0]].mean(0)
    _, spread, axes = torch.linalg.svd(x[halves[0]], full_matrices=False)
    x = x @ axes[:16].T / spread[:16] * len(halves[0]) ** 0.5
    train, test = ([part[y[part] == k] for k in range(10)] for part in halves)
    sets = list(combinations(range(10), 3))
    held = torch.randperm(len(sets), generator=generator)[:24].tolist()
    seen = [triple for k, classes in enumerate(sets) if k not in held for triple in permutations(classes)]
    unseen = [triple for k in held for triple in permutations(sets[k])]
    unseen = [unseen[k] for k in torch.randperm(len(unseen), generator=generator)[:TESTED].tolist()]

    def drawn(triples: Sequence[tuple[int, ...]]) -> Tensor:
        """Forty training images of each class of each task (k, 120, 16)."""
        return torch.stack([x[torch.cat([train[c][torch.randperm(len(train[c]), generator=generator)[:EACH]]
                                         for c in triple])] for triple in triples])  # fmt: skip

    def tested(triple: tuple[int, ...]) -> Callable[[Weights], float]:
        rows = [test[c] for c in triple]
        return scorer(x[torch.cat(rows)], torch.arange(3).repeat_interleave(torch.tensor([len(row) for row in rows])))

    data, own = drawn(seen), drawn(unseen)
    zero: list[Weights] = [{"weight": torch.zeros(3, 16), "bias": torch.zeros(3)}]
    heads, zoo = trained(data, LABELS, zero * len(seen)), WeightZoo(keep=EACH, head="weight")
    for weights, images in zip(heads, data, strict=True):
        zoo.add(weights, images, LABELS)
    made_by = D2NWG().fit(zoo, device="cpu", seed=seed)
    blind = D2NWG(condition="set", steps=(1500, 200, 600), batch_size=32).fit(zoo, device="cpu", seed=seed)
    mean: Weights = {name: torch.stack([weights[name] for weights in heads]).mean(0) for name in heads[0]}

    def generated(by: WeightGenerator, images: Tensor, guidance: float = 1.0) -> list[dict[str, Tensor]]:
        return by.generate(images[FEW], LABELS[FEW], SAMPLES, generator=generator, guidance=guidance)

    found: defaultdict[str, list[float]] = defaultdict(list)
    first: list[Weights] = []
    distance = []
    for triple, images, other in zip(unseen, own, own.roll(1, 0), strict=True):
        made = generated(made_by, images)
        centres = images.view(3, EACH, -1)[:, :SHOTS].mean(1)
        arms: dict[str, Sequence[Weights]] = {
            "generated": made,
            "another task's images": generated(made_by, other),
            "no images": generated(made_by, images, 0.0),
            "guidance 1.5": generated(made_by, images, 1.5),
            "set encoder": generated(blind, images),
            "best of 5": [best_of(made, scorer(images[~FEW], LABELS[~FEW]))[0]],
            "nearest class mean": [{"weight": centres, "bias": -centres.square().sum(1) / 2}],
            "mean head": [mean],
        }
        for arm, several in arms.items():
            found[arm].append(sum(map(tested(triple), several)) / len(several))
        first.append(made[0])
        distance += [made_by.nearest(weights) for weights in made]
    result = {arm: {"accuracy": sum(values) / len(values)} for arm, values in found.items()}

    def over_tasks(several: Sequence[Weights]) -> float:
        return sum(tested(triple)(weights) for triple, weights in zip(unseen, several, strict=True)) / TESTED

    result["trained on its own data"] = {"accuracy": over_tasks(trained(own, LABELS, zero * TESTED))}
    random = [{"weight": torch.rand(3, 16, generator=generator) / 2 - 0.25, "bias": torch.zeros(3)} for _ in unseen]
    starts: dict[str, Sequence[Weights]] = {
        "generated start": first, "random start": random, "mean start": [mean] * TESTED,
    }  # fmt: skip
    for arm, start in starts.items():
        tuned = trained(own[:, FEW], LABELS[FEW], start, 10)
        result[arm] = {"before fine-tuning": over_tasks(start), "after 10 steps": over_tasks(tuned)}
    known = [Judged(features=data[k], labels=LABELS, trained=heads[k], score=tested(seen[k]))
             for k in range(0, len(seen), 40)]  # fmt: skip
    report = quality(made_by, known, SAMPLES, generator=generator)
    result["seen tasks"] = {"trained": report.trained or 0.0, "reconstructed": report.reconstructed or 0.0,
                            "generated": report.generated}  # fmt: skip
    better = result["generated"]["accuracy"] > result["nearest class mean"]["accuracy"]
    result["generated"] |= {"ahead of the nearest class mean": float(better), "distance": sum(distance) / len(distance)}
    result["half the spacing of the training heads"] = {"distance": report.spacing / 2}
    return result | {"nothing": {"accuracy": 0.0}, "never": {"ahead of the nearest class mean": 0.0}}
