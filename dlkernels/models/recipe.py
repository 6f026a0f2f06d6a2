"""How a documented network is trained, as data."""

from dataclasses import dataclass, field
from typing import Any

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Recipe:
    """What ``dlkernels.train`` needs beside the network.

    ``epochs`` is meant for the network's documented data set. The embedded digits are some forty
    times fewer images than MNIST's, so that as many steps take more passes: ``embedded_epochs``.
    """

    epochs: int
    embedded_epochs: int | None = None  # as ``epochs``
    # A data set of dlkernels.data: or "cifar10", "folders", "diabetes", "line", "step", "sine",
    # "vectors", "text".
    data: str = "images"
    target: str = "label"  # or "inputs", flat, to be reconstructed; or "real", 1
    classes: int = 10  # of images
    image_size: int = 28  # height and width of the input
    # Of the pixels in 0 to 1: of one channel (MNIST's training images), or a number for each.
    mean: float | tuple[float, ...] = 0.1307
    std: float | tuple[float, ...] = 0.3081
    loss: str = "CrossEntropyLoss"  # a class of the network's namespace
    loss_arguments: dict[str, Any] = field(default_factory=dict)
    optimiser: str = "SGD"  # a class of torch.optim
    lr: float = 0.01
    momentum: float | None = 0.5  # None: the optimiser has none
    weight_decay: float = 0.0
    betas: tuple[float, float] | None = None  # of Adam; None: torch's
    milestones: tuple[int, ...] = ()  # epochs after which lr is a tenth
    batch_size: int | None = 64  # None: all of the set
    # Or "binary accuracy", "mean squared error", "autoregressive mean squared error": of what
    # the network's ``predict`` makes of the inputs. On the test set.
    metric: str = "accuracy"
    threshold: float = 0.5  # above which an output says yes
    # The network gives (outputs, state), and takes the state of the step before.
    carries_state: bool = False
    clip: float | None = None  # the largest norm of the gradients, to which they are scaled down
    # What ``dlkernels train`` does beside, and ``compare`` does not.
    validation: float = 0.0  # of the training set, its end: held out
    augment: tuple[str, ...] = ()  # of the training images: "flip", "rotate"; see dlkernels.data

    @property
    def optimiser_arguments(self) -> dict[str, Any]:
        """Of the optimiser's class, beside the parameters."""
        given = {"momentum": self.momentum, "betas": self.betas}
        given = {name: value for name, value in given.items() if value is not None}
        return {"lr": self.lr, "weight_decay": self.weight_decay, **given}

    @property
    def schedule(self) -> str:
        """As ``dlkernels.train.schedules_of`` reads it."""
        return f"multistep:{','.join(map(str, self.milestones))}" if self.milestones else ""

    def epochs_on(self, embedded: bool) -> int:
        """The epochs on the embedded data, or on the documented."""
        return (self.embedded_epochs if embedded else None) or self.epochs

    def batch_of(self, count: int, given: int | None = None) -> int:
        """The size of a batch of ``count`` examples, or of the one that is ``given``."""
        return min(given or self.batch_size or count, count)

    @property
    def channels(self) -> int:
        """Of an image."""
        return len(self.mean) if isinstance(self.mean, tuple) else 1
