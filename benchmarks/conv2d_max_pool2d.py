"""Rows of conv2d_max_pool2d: a convolution, an activation and a 2x2 max-pool, as one op.

Work, data, layouts, bytes and flops are those of ``benchmarks/conv2d.py``; of the output only the
pooled one counts, and behind the pool three of four gradients of the convolution are 0.
"""

import torch

from benchmarks.conv2d import FORWARD, GRADIENT, Case, case_of, counted, providers
from benchmarks.measure import Row, rows_of

OP = "conv2d_max_pool2d"


def _pooled(shape: tuple[int, ...], reason: str, **more) -> list[Case]:
    more = {"works": (FORWARD, GRADIENT), "padding": 0, "layout": "contiguous", **more}
    return case_of(shape, reason, bias=True, pooled=True, **more)


CASES = [
    *_pooled(
        (64, 1, 32, 32, 6, 5, 5), "LeNet's first layer", activation="relu", first=True, calls=5
    ),
    *_pooled((64, 6, 14, 14, 16, 5, 5), "LeNet's second layer", activation="relu", calls=5),
    *_pooled(
        (64, 6, 14, 14, 16, 5, 5),
        "the same in the other layout",
        layout="channels_last",
        label="channels_last",
        activation="relu",
        calls=5,
    ),
    *_pooled((64, 1, 28, 28, 10, 5, 5), "MnistCNN's first layer", first=True, calls=5),
    *_pooled((64, 10, 12, 12, 20, 5, 5), "MnistCNN's second layer", calls=5),
    *_pooled((128, 3, 32, 32, 16, 5, 5), "LeNet5Cifar's first layer", first=True),
    *_pooled((128, 16, 14, 14, 32, 5, 5), "LeNet5Cifar's second layer"),
    *_pooled(
        (64, 64, 32, 32, 64, 3, 3),
        "many channels, as in VGG: the convolution weighs most",
        layout="channels_last",
        label="p1",
        padding=1,
        activation="relu",
    ),
    *_pooled(
        (1, 1, 32, 32, 6, 5, 5), "one image: the cost of calling", activation="relu", calls=100
    ),
]

GPU_CASES = [
    case._replace(name=f"{case.name} bfloat16", dtype=torch.bfloat16, calls=1)
    for case in (
        *_pooled((1024, 1, 32, 32, 6, 5, 5), "LeNet's first layer", activation="relu", first=True),
        *_pooled((1024, 6, 14, 14, 16, 5, 5), "LeNet's second layer", activation="relu"),
        *_pooled((1024, 3, 32, 32, 16, 5, 5), "LeNet5Cifar's first layer", first=True),
    )
]


def rows(device: str) -> list[Row]:
    """All rows of a device."""
    cases = CASES + GPU_CASES if device == "cuda" else CASES
    return rows_of(OP, cases, counted, providers, device)
