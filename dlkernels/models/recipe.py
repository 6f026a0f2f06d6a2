"""How a documented network is trained, as data."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """What ``dlkernels.train`` needs beside the network.

    ``epochs`` is meant for the network's documented data set. The embedded digits are some forty
    times fewer images than MNIST's, so that as many steps take more passes: ``embedded_epochs``.
    """

    epochs: int
    embedded_epochs: int | None = None  # as ``epochs``
    data: str = "images"  # or "diabetes", "line", "step": a data set of dlkernels.data
    image_size: int = 28  # height and width of the input, one channel
    mean: float = 0.1307  # of MNIST's training images, pixels in 0 to 1
    std: float = 0.3081
    loss: str = "CrossEntropyLoss"  # a class of the network's namespace
    loss_arguments: dict[str, Any] = field(default_factory=dict)
    optimiser: str = "SGD"  # a class of torch.optim
    lr: float = 0.01
    momentum: float = 0.5
    batch_size: int | None = 64  # None: all of the set
    metric: str = "accuracy"  # or "binary accuracy", "mean squared error", on the test set
