"""Residual blocks for the tests of several devices: their layers, and the same by torch."""

import torch
from torch.nn import functional as F

from dlkernels.functional import ResidualLayer


def drawn(input, convolutions, shortcut, dtype, device="cpu"):
    """(input, layers, shortcut or None) of shapes.

    ``convolutions`` are (outputs, size of the filter, stride), padded so that only the stride makes
    images smaller; ``shortcut`` is one of them or None. Weights require gradients.
    """

    def layer(channels, outputs, size, stride):
        weight = torch.randn(outputs, channels, size, size, device=device)
        numbers = torch.randn(4, outputs, device=device)
        return ResidualLayer(
            (weight / (channels * size**2) ** 0.5).to(dtype).requires_grad_(),
            None,
            (numbers[0] / 4 + 1).requires_grad_(),
            (numbers[1] / 4).requires_grad_(),
            numbers[2] / 4,
            numbers[3].abs() + 0.5,
            stride=(stride, stride),
            padding=(size // 2, size // 2),
        )

    x = torch.randn(input, device=device).to(dtype)
    layers, channels = [], input[1]
    for convolution in convolutions:
        layers.append(layer(channels, *convolution))
        channels = convolution[0]
    around = None if shortcut is None else layer(input[1], *shortcut)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_(), layers, around


def copied(block, dtype=None, device=None):
    """The same numbers in tensors of their own; in a dtype or on a device if it is given."""

    def copy(x):
        if not torch.is_tensor(x):
            return x
        x_ = x.detach().to(device or x.device, dtype or x.dtype, copy=True)
        return x_.requires_grad_(x.requires_grad)

    x, layers, shortcut = block
    layers = [layer._make(map(copy, layer)) for layer in layers]
    return copy(x), layers, shortcut and shortcut._make(map(copy, shortcut))


def every(block):
    """All layers, the shortcut's last."""
    _, layers, shortcut = block
    return [*layers, *([shortcut] if shortcut else [])]


def leaves(block):
    """What has a gradient."""
    return [block[0], *(x for layer in every(block) for x in layer.parameters if x is not None)]


def running(block):
    """The running statistics."""
    return [x for layer in every(block) for x in (layer.running_mean, layer.running_var)]


def stock(input, layers, shortcut=None, *, training=False):
    """By torch's functions."""

    def run(x, layer):
        y = F.conv2d(
            x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
        )
        return F.batch_norm(
            y, layer.running_mean, layer.running_var, layer.norm_weight, layer.norm_bias, training,
            layer.momentum, layer.eps,
        )  # fmt: skip

    x = input
    for layer in layers[:-1]:
        x = F.relu(run(x, layer))
    return F.relu(run(x, layers[-1]) + (run(input, shortcut) if shortcut else input))


def evaluate(function, block, d, training):
    """Output, gradients and running statistics."""
    y = function(*block, training=training)
    return [y, *torch.autograd.grad(y, leaves(block), d.to(y.dtype)), *running(block)]
