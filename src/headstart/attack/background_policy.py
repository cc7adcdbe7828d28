"""A policy that picks the background for each clip, learned from rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from headstart.core.loop import fit
from headstart.core.plan import Plan, Step, Teacher, Term, sgd
from headstart.core.stream import Batches
from headstart.core.validate import require

from .clips import mixed


class FramePolicy(nn.Module):
    """Clips (n, c, t, h, w) or pictures (n, c, h, w) -> scores of the backgrounds (n, m), from features of the frames.

    Args:
        features: frames (k, c, h, w) -> (k, width); the paper's is a ResNet-50. Freeze it to train the scores only.
        width: of the features.
        backgrounds: m, how many there are to choose from.
    """

    def __init__(self, features: nn.Module, width: int, backgrounds: int) -> None:
        super().__init__()
        self.features, self.scores = features, nn.Linear(width, backgrounds)

    def forward(self, x: Tensor) -> Tensor:
        frames = x[:, :, None] if x.ndim == 4 else x
        found = self.features(frames.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1))
        return cast(Tensor, self.scores(found.mean(1)))


class BackgroundReward(Term):
    """Make backgrounds likelier in front of which models err: the policy gradient of the reward.

    For each clip a background is drawn from the policy. Its reward is how far the surrogate's logit of the true class
    falls, plus `transfer` times the margin by which the auxiliary models err. What counts is by how much the reward
    exceeds the running mean of earlier batches, of both parts by itself.

    Args:
        backgrounds: (m, c, h, w) in [0, 1].
        surrogate: x -> logits; frozen, as the auxiliaries are.
        auxiliaries: other models of the same classes. None of them may be a victim that results are reported on.
        gamma: γ in (0, 1], the share of the clip (paper: 0.8).
        attack: weight w1 >= 0 of the first part (paper: 1).
        transfer: weight w2 >= 0 of the second part (paper: 0.3).
        every: >= 1, the auxiliaries are asked in one batch of so many (paper: 5).
        memory: of the running means, in [0, 1); the paper's code subtracts none.

    Shape: batches of x and labels (n,); the model gives scores (n, m).

    Cost: one pass of the policy, two of the surrogate, and of the auxiliaries one in `every` steps.

    Notes: each clip has the reward of its own draw, where the paper's code gives all of them the batch's mean, and the
    first part is a fall, as the paper says, where its code has a rise. Draws are torch's, which `fit` seeds.

    Raises:
        Refused: a weight out of range, a batch without labels, scores that do not fit.

    Reference: Li et al. 2025; REINFORCE: Williams 1992.
    """

    total: Tensor
    weight: Tensor
    seen: Tensor

    def __init__(
        self,
        backgrounds: Tensor,
        surrogate: nn.Module,
        auxiliaries: Sequence[nn.Module] = (),
        *,
        gamma: float = 0.8,
        attack: float = 1.0,
        transfer: float = 0.3,
        every: int = 5,
        memory: float = 0.9,
    ) -> None:
        require(backgrounds.ndim == 4 and len(backgrounds) > 0, "BackgroundReward needs backgrounds (m, c, h, w)",
                tuple(backgrounds.shape), "Stack single frames.")  # fmt: skip
        require(0 < gamma <= 1, "BackgroundReward needs 0 < gamma <= 1", gamma, "The paper uses 0.8.")
        require(0 <= attack < 1e6 and 0 <= transfer < 1e6, "BackgroundReward needs weights >= 0", (attack, transfer),
                "The paper uses 1 and 0.3.")  # fmt: skip
        require(every >= 1 and 0 <= memory < 1, "BackgroundReward needs every >= 1 and 0 <= memory < 1",
                (every, memory), "Pass 5 and 0.9.")  # fmt: skip
        super().__init__()
        self.surrogate, self.auxiliaries = Teacher(surrogate), nn.ModuleList(Teacher(m) for m in auxiliaries)
        self.gamma, self.attack, self.transfer = gamma, attack, transfer
        self.every, self.memory = every, memory
        self.register_buffer("backgrounds", backgrounds)
        self.register_buffer("total", torch.zeros(2))
        self.register_buffer("weight", torch.zeros(2))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, step: Step) -> Tensor:
        x, y = step.batch.x, step.batch.y
        require(y is not None, "BackgroundReward needs labels in every batch", None, "Pass (x, y).")
        scores = step.run(x).output.log_softmax(1)
        bank = cast(Tensor, self.backgrounds)
        require(scores.shape == (len(x), len(bank)), f"A policy must give scores {(len(x), len(bank))}",
                tuple(scores.shape), "Give it one output for each background.")  # fmt: skip
        drawn = torch.multinomial(scores.detach().exp(), 1)
        shown = mixed(x, bank[drawn[:, 0]].to(x), self.gamma)
        gain = self.attack * self._above(0, fall(self.surrogate, x, shown, y))
        if len(self.auxiliaries) and int(self.seen) % self.every == 0:
            gain = gain + self.transfer * self._above(1, error(list(self.auxiliaries), shown, y))
        self.seen += 1
        return cast(Tensor, -(scores.gather(1, drawn)[:, 0] * gain).mean())

    def _above(self, part: int, reward: Tensor) -> Tensor:
        """The rewards (n,) less the mean of earlier batches, 0 before there was one; they then count for the next."""
        mean = self.total[part] / self.weight[part].clamp_min(1 - self.memory)
        above: Tensor = reward - mean
        self.total[part] = self.memory * self.total[part] + (1 - self.memory) * reward.mean()
        self.weight[part] = self.memory * self.weight[part] + (1 - self.memory)
        return above


@torch.no_grad()
def fall(surrogate: nn.Module, x: Tensor, shown: Tensor, y: Tensor) -> Tensor:
    """How far the logit of the true class falls from x to what is shown (n,)."""
    clean, moved = surrogate(x), surrogate(shown)
    lower: Tensor = (clean - moved).gather(1, y[:, None])[:, 0]
    return lower


@torch.no_grad()
def error(models: Sequence[nn.Module], shown: Tensor, y: Tensor) -> Tensor:
    """By how much the best other class exceeds the true one, mean over the models (n,)."""
    said = torch.stack([model(shown) for model in models])  # (k, n, c)
    true = y.expand(len(models), -1)[..., None]
    other = said.scatter(2, true, -torch.inf).amax(2)
    return (other - said.gather(2, true)[..., 0]).mean(0)


def learned_policy(
    policy: nn.Module,
    x: Tensor,
    y: Tensor,
    reward: BackgroundReward,
    *,
    epochs: int = 100,
    batch_size: int = 16,
    learning_rate: float = 1e-4,
    device: str = "auto",
    seed: int = 0,
) -> nn.Module:
    """A copy of the policy that picks, for each clip, the background in front of which models err most.

    Args:
        policy: x -> scores (n, m), such as `FramePolicy`.
        x: (n, ...) examples in [0, 1], not those that are attacked afterwards.
        y: (n,) their labels.
        reward: what is rewarded.
        epochs: >= 1 (paper: 100).
        batch_size: >= 1 (paper: 16).
        learning_rate: of SGD with momentum 0.9 (paper: 1e-4).
        device: as for `fit`.
        seed: of everything random.

    Cost: epochs · n / batch_size steps.

    Raises:
        Refused: epochs < 1, and what `fit` refuses.

    Reference: Li et al. 2025; settings of the released code.
    """
    require(epochs >= 1, "learned_policy needs epochs >= 1", epochs, "The paper uses 100.")
    stream = Batches(x=x, y=y, batch_size=batch_size, seed=seed)
    steps = epochs * (len(x) // min(batch_size, len(x)))
    plan = Plan(model=policy, stream=stream, steps=steps, optimizer=sgd(learning_rate), terms={"reward": reward})
    return fit(plan, device=device, seed=seed).model
