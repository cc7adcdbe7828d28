"""A variational autoencoder of weight vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headstart.core.validate import require


class WeightVAE(nn.Module):
    """Squeezes vectors of weights into a few numbers with a normal distribution each, and back.

    Args:
        width: entries of a vector.
        latent: numbers it becomes.
        hidden: width of the hidden layer on either side; 0 leaves it out, and both sides are linear.

    Shape: (n, width) -> reconstruction (n, width), mean (n, latent), log-variance (n, latent) in [-30, 20]. In
        training the reconstruction is that of a sample (torch's global generator), in eval mode that of the mean.

    Raises:
        Refused: a width below 1.
    """

    def __init__(self, width: int, latent: int, hidden: int = 128) -> None:
        require(min(width, latent) >= 1 and hidden >= 0, "WeightVAE needs widths >= 1", (width, latent, hidden),
                "Pass latent=24, for instance.")  # fmt: skip
        super().__init__()
        self.encoder, self.decoder = _side(width, hidden, 2 * latent), _side(latent, hidden, width)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latent, (n, latent) each."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latent: Tensor) -> Tensor:
        """Vectors (n, width) of latents (n, latent)."""
        x: Tensor = self.decoder(latent)
        return x

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encode(x)
        latent = mean + (log_variance / 2).exp() * torch.randn_like(mean) if self.training else mean
        return self.decode(latent), mean, log_variance


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of N(mean, variance) from N(0, 1), summed over the latent: (n, d) twice -> (n,).

    >>> divergence(torch.zeros(1, 4), torch.zeros(1, 4)).item()
    0.0
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)


def _side(inputs: int, hidden: int, outputs: int) -> nn.Module:
    if hidden == 0:
        return nn.Linear(inputs, outputs)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))
