"""What the embedded models learned from: labels, or one of four tasks that pictures set themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.core.plan import Step, Term

RESTORED = 16  # side of the grey picture that `Restoring` asks for


def view(x: Tensor) -> Tensor:
    """Another look at the same pictures: a crop, turned a little, in other light and colour, partly blurred.

    Draws from torch's global generator, which `fit` seeds.

    Shape: (n, 3, H, W), normalised -> the same.
    """
    n = len(x)
    angle, zoom = (torch.rand(n) - 0.5) * 0.6, 0.55 + 0.5 * torch.rand(n)
    shift = (torch.rand(n, 2) - 0.5) * 2 * (1.05 - zoom)[:, None]
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    maps = torch.stack([torch.stack([cos, sin, shift[:, 0]], -1), torch.stack([-sin, cos, shift[:, 1]], -1)], 1)
    grid = F.affine_grid(maps, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    grey = x.mean(1, keepdim=True)
    x = torch.lerp(x, grey.expand_as(x), (torch.rand(n, 1, 1, 1) < 0.4).float())
    x = x * (0.6 + 0.8 * torch.rand(n, 1, 1, 1)) + 0.8 * (torch.rand(n, 1, 1, 1) - 0.5)
    x = torch.where(torch.rand(n, 1, 1, 1) < 0.3, -x, x)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, 1)
    x = torch.where(torch.rand(n, 1, 1, 1) < 0.4, blurred, x)
    return x + 0.1 * torch.rand(n, 1, 1, 1) * torch.randn_like(x)


class Contrasting(Term):
    """Two views of a picture are alike, views of different pictures are not.

    Args:
        temperature: of the softmax over the batch (tau).

    Cost: one forward pass of twice the batch.

    Reference: Chen et al. 2020, SimCLR, arXiv 2002.05709, eq. 1.
    """

    def __init__(self, temperature: float = 0.2) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, step: Step) -> Tensor:
        x = step.batch.x
        n = len(x)
        points = F.normalize(step.run(torch.cat([view(x), view(x)])).output)
        alike = points @ points.T / self.temperature
        alike = alike.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=x.device), -torch.inf)
        partner = torch.arange(2 * n, device=x.device).roll(n)
        return F.cross_entropy(alike, partner)


class Regularising(Term):
    """Two views of a picture are alike, while every output keeps varying and says something of its own.

    Args:
        invariance, variance, covariance: weights of the three parts (lambda, mu, nu).

    Cost: one forward pass of twice the batch.

    Reference: Bardes et al. 2022, VICReg, arXiv 2105.04906, eq. 6, with the authors' code, which halves the
    variance part; the expander is the model's own head.
    """

    def __init__(self, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0) -> None:
        super().__init__()
        self.invariance, self.variance, self.covariance = invariance, variance, covariance

    def forward(self, step: Step) -> Tensor:
        x = step.batch.x
        one, two = step.run(torch.cat([view(x), view(x)])).output.chunk(2)
        loss = self.invariance * F.mse_loss(one, two)
        for z in (one, two):
            z = z - z.mean(0)
            spread = (z.square().sum(0) / (len(z) - 1) + 1e-4).sqrt()  # 1e-4 keeps the root's slope finite at zero
            joint = z.T @ z / (len(z) - 1)
            apart = joint.square().sum() - joint.diagonal().square().sum()
            loss = loss + self.variance * F.relu(1 - spread).mean() / 2 + self.covariance * apart / z.shape[1]
        return loss


class Turning(Term):
    """Tell by how many quarter turns each picture was rotated.

    Cost: one forward pass.

    Reference: Gidaris et al. 2018, arXiv 1803.07728; one random turn a picture instead of all four.
    """

    def forward(self, step: Step) -> Tensor:
        turns = torch.randint(0, 4, (len(step.batch.x),), device=step.batch.x.device)
        return F.cross_entropy(step.run(turned(step.batch.x, turns)).output, turns)


class Restoring(Term):
    """Draw the grey picture again from a damaged one.

    Cost: one forward pass.

    Reference: Vincent et al. 2008, denoising autoencoders, with the masked patches of He et al. 2022, arXiv 2111.06377.
    """

    def forward(self, step: Step) -> Tensor:
        return F.mse_loss(step.run(damaged(step.batch.x)).output, small_grey(step.batch.x))


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Every picture rotated by its own number of quarter turns."""
    every = torch.stack([torch.rot90(x, k, (2, 3)) for k in range(4)])
    return every[turns, torch.arange(len(x), device=x.device)]


def damaged(x: Tensor) -> Tensor:
    """Pictures with noise, and with about 40 % of their 4x4 patches blank; draws from torch's global generator."""
    n, _, height, width = x.shape
    keep = (torch.rand(n, 1, height // 4, width // 4, device=x.device) > 0.4).float()
    return (x + 0.3 * torch.randn_like(x)) * F.interpolate(keep, (height, width))


def small_grey(x: Tensor) -> Tensor:
    """What `Restoring` asks for: (n, 3, 32, 32) -> (n, 256)."""
    return F.adaptive_avg_pool2d(x.mean(1, keepdim=True), RESTORED).flatten(1)


@torch.inference_mode()
def met(model: nn.Module, objective: str, x: Tensor, labels: Tensor) -> tuple[str, float]:
    """How well a model meets the objective it was trained for: the name of the figure, and the figure.

    Draws from torch's global generator for the objectives that do.
    """
    if objective == "supervised":
        return "accuracy", _share(model(x).argmax(1) == labels)
    if objective == "rotation":
        turns = torch.randint(0, 4, (len(x),))
        return "accuracy", _share(model(turned(x, turns)).argmax(1) == turns)
    if objective == "restoration":
        wanted = small_grey(x)
        return "variance explained", 1 - float(F.mse_loss(model(damaged(x)), wanted) / wanted.var(correction=0))
    few = x[:500]
    one, two = (F.normalize(model(view(few)) - model(few).mean(0)) for _ in range(2))
    return f"found again among {len(few)}", _share((one @ two.T).argmax(1) == torch.arange(len(few)))


def _share(right: Tensor) -> float:
    return float(right.float().mean())
