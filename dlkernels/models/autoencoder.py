"""AutoEncoder, 784 to a code of 20 and back, and AdversarialAutoEncoder, whose codes are to lie as
a normal distribution does."""

from types import ModuleType

import torch

import dlkernels.nn
from dlkernels.models.recipe import Recipe

_RECIPE = Recipe(
    target="inputs",
    mean=0.0,  # pixels in 0 to 1, as the sigmoid gives them back
    std=1.0,
    epochs=20,
    embedded_epochs=60,
    loss="MSELoss",
    optimiser="Adam",
    lr=1e-3,
    momentum=None,
    metric="mean squared error",
)


class AutoEncoder(torch.nn.Module):
    """Reconstructions (N, 784) in 0 to 1 of images (N, 1, 28, 28) or rows (N, 784).

    Args:
        nn: the namespace of the layers.
        noise: denoising: the standard deviation of what is added to the inputs in training.
        dropout: the share of the encoder's units that are dropped in training.
    """

    recipe = _RECIPE
    picture = "reconstructions"

    def __init__(
        self, nn: ModuleType = dlkernels.nn, noise: float = 0.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.noise = noise
        self.encoder = nn.Sequential(
            nn.Linear(784, 256),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(256, 64),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(64, 20),
        )
        self.decoder = nn.Sequential(
            nn.Linear(20, 64),
            nn.ReLU(),
            nn.Linear(64, 256),
            nn.ReLU(),
            nn.Linear(256, 784),
            nn.Sigmoid(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self._encode(x))

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        if self.training and self.noise:
            x = (x + self.noise * torch.randn_like(x)).clamp(0, 1)
        return self.encoder(x)

    def show(self, images: torch.Tensor) -> torch.Tensor:
        """(2, N, 1, 28, 28): the images (N, 1, 28, 28), and below them what is made of them."""
        return torch.stack([images, self(images).view_as(images)])


class AdversarialAutoEncoder(AutoEncoder):
    """The same with a discriminator, which tells codes from draws of N(0, 1) in 20 dimensions; its
    binary cross-entropy is the distance that the encoder makes smaller.

    ``distance`` weighs it beside the reconstruction's error.
    """

    turns = {"autoencoder": ("encoder", "decoder"), "discriminator": ("discriminator",)}

    def __init__(
        self,
        nn: ModuleType = dlkernels.nn,
        noise: float = 0.0,
        dropout: float = 0.0,
        distance: float = 0.01,
    ) -> None:
        super().__init__(nn, noise, dropout)
        self.distance = distance
        self.discriminator = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1))
        self.is_normal = nn.BCEWithLogitsLoss()

    def objective(
        self, turn: str, loss: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Of the turn "autoencoder", the error and the distance; else what the discriminator takes
        for the wrong one of the two."""
        if turn == "autoencoder":
            code = self._encode(inputs)
            judged = self.discriminator(code)
            distance = self.is_normal(judged, torch.ones_like(judged))
            return loss(self.decoder(code).to(targets.dtype), targets) + self.distance * distance
        with torch.no_grad():
            code = self._encode(inputs)
        normal = torch.randn(code.shape, device=code.device).to(code.dtype)
        judged = self.discriminator(torch.cat([normal, code]))
        return self.is_normal(judged, _first_half(judged))


def _first_half(judged: torch.Tensor) -> torch.Tensor:
    """1 for the first half of the rows, 0 for the others."""
    labels = torch.zeros_like(judged)
    labels[: len(judged) // 2] = 1
    return labels
