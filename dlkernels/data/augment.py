"""Random changes of training images, drawn from torch's generator: one of its own for each."""

import math

import torch

DEGREES = 15


def flip(images: torch.Tensor, recipe) -> torch.Tensor:
    """(N, C, H, W), about half of them with their columns reversed."""
    chosen = torch.rand(len(images)).to(images.device) < 0.5
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def rotate(images: torch.Tensor, recipe) -> torch.Tensor:
    """(N, C, H, W), each turned about its centre by up to 15 degrees, bilinear; what comes from
    outside of the image is black before the normalisation."""
    count = len(images)
    angles = (2 * torch.rand(count) - 1) * math.radians(DEGREES)
    sin, cos = angles.sin().to(images.device), angles.cos().to(images.device)
    height, width = images.shape[2:]
    theta = torch.zeros(count, 2, 3, device=images.device)
    # The grid is in halves of the sides, which differ where the image is not square.
    theta[:, 0, 0], theta[:, 0, 1] = cos, -sin * height / width
    theta[:, 1, 0], theta[:, 1, 1] = sin * width / height, cos
    grid = torch.nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    mean, std = (torch.tensor(n, device=images.device) for n in (recipe.mean, recipe.std))
    black = (-mean / std).view(-1, 1, 1)
    turned = torch.nn.functional.grid_sample(images - black, grid, align_corners=False)
    return turned + black


def crop(images: torch.Tensor, size: torch.Size | tuple[int, int]) -> torch.Tensor:
    """The middle (N, C, *size) of images that are no smaller."""
    top, left = ((have - want) // 2 for have, want in zip(images.shape[2:], size, strict=True))
    return images[:, :, top : top + size[0], left : left + size[1]]


AUGMENT = {"flip": flip, "rotate": rotate}
