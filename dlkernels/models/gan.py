"""GAN: a generator of images from noise, and a discriminator of real ones, trained in turns."""

from types import ModuleType

import torch

import dlkernels.nn
from dlkernels.models.recipe import Recipe

NOISE = 64


class GAN(torch.nn.Module):
    """The probability (N, 1) that images (N, 1, 28, 28) of pixels in -1 to 1 are real.

    ``nn`` is the namespace of the layers; ``generate`` makes images.
    """

    recipe = Recipe(
        target="real",
        mean=0.5,
        std=0.5,
        epochs=20,
        embedded_epochs=40,
        loss="BCELoss",
        optimiser="Adam",
        lr=2e-4,
        momentum=None,
        betas=(0.5, 0.999),
        metric="binary accuracy",
    )
    turns = {"discriminator": ("discriminator",), "generator": ("generator",)}
    picture = "samples"

    def __init__(self, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(NOISE, 64, 7, bias=False),  # (N, 64, 7, 7)
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False),  # (N, 32, 14, 14)
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 1, 4, 2, 1),  # (N, 1, 28, 28)
            nn.Tanh(),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, 32, 4, 2, 1),  # (N, 32, 14, 14)
            nn.LeakyReLU(0.2),
            nn.Conv2d(32, 64, 4, 2, 1),  # (N, 64, 7, 7)
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 1),
        )
        # Of logits: the same number as BCELoss of probabilities, also where those are 0 or 1.
        self.is_real = nn.BCEWithLogitsLoss()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.discriminator(x))

    def generate(self, noise: torch.Tensor) -> torch.Tensor:
        """Images (N, 1, 28, 28) in -1 to 1 of noise (N, 64), standard normal."""
        return self.generator(noise[:, :, None, None])

    def objective(
        self, turn: str, loss: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Binary cross-entropy, real being positive: of real and made images where the
        discriminator is to tell them apart; of made ones where the generator is to pass."""
        noise = torch.randn(len(inputs), NOISE, device=inputs.device).to(inputs.dtype)
        if turn == "generator":
            judged = self.discriminator(self.generate(noise))
            return self.is_real(judged, torch.ones_like(judged))
        with torch.no_grad():
            made = self.generate(noise)
        real, fake = self.discriminator(inputs), self.discriminator(made)
        return self.is_real(real, targets.to(real.dtype)) + self.is_real(
            fake, torch.zeros_like(fake)
        )

    def show(self, images: torch.Tensor) -> torch.Tensor:
        """(4, N, 1, 28, 28) in 0 to 1: images that are made, always of the same noise."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(4 * len(images), NOISE, generator=generator).to(images)
        return (self.generate(noise).view(4, *images.shape) + 1) / 2
