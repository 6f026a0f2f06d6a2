"""How a documented network is trained, as data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """What ``dlkernels.train`` needs beside the network.

    ``epochs`` is meant for the network's documented data set. The embedded digits are some forty
    times fewer, so that as many steps take more passes: ``digits_epochs``.
    """

    image_size: int  # height and width of the input, one channel
    epochs: int
    digits_epochs: int
    loss: str = "CrossEntropyLoss"  # a class of the network's namespace
    optimiser: str = "SGD"  # a class of torch.optim
    lr: float = 0.01
    momentum: float = 0.5
    batch_size: int = 64
    mean: float = 0.1307  # of MNIST's training images, pixels in 0 to 1
    std: float = 0.3081
