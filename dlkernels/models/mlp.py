"""MLP256, MLP200 and MLP200Leaky: 784 to 10 through layers of 256 or of 200."""

from types import ModuleType

import torch

import dlkernels.nn
from dlkernels.models.recipe import Recipe


class MLP256(torch.nn.Module):
    """Logits (N, 10) of images (N, 1, 28, 28) or rows (N, 784); 203,530 parameters."""

    recipe = Recipe(epochs=10, embedded_epochs=60)

    def __init__(self, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        self.hidden = nn.Linear(784, 256)
        self.output = nn.Linear(256, 10)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.relu(self.hidden(x.flatten(1))))


class MLP200(torch.nn.Module):
    """The same of bare weight matrices, with a ReLU behind the logits too; 199,210 parameters.

    ``nn`` is the namespace whose ``functional`` is used.
    """

    recipe = Recipe(epochs=10, embedded_epochs=200, momentum=0.0, batch_size=200)

    def __init__(self, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        # Functions, not the namespace: a module object can be neither copied nor pickled.
        self.linear, self.relu = nn.functional.linear, nn.functional.relu
        for i, shape in enumerate(((200, 784), (200, 200), (10, 200)), 1):
            weight, bias = torch.empty(shape), torch.zeros(shape[0])
            self.register_parameter(f"w{i}", nn.Parameter(torch.nn.init.kaiming_normal_(weight)))
            self.register_parameter(f"b{i}", nn.Parameter(bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.linear(x.flatten(1), self.w1, self.b1))
        x = self.relu(self.linear(x, self.w2, self.b2))
        return self.relu(self.linear(x, self.w3, self.b3))


class MLP200Leaky(torch.nn.Module):
    """The same of layers, with LeakyReLU(0.01), in place, behind the logits too."""

    recipe = Recipe(
        epochs=10,
        embedded_epochs=200,
        momentum=0.0,
        batch_size=200,
        validation=1 / 6,  # 10,000 of MNIST's 60,000
    )

    def __init__(self, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(784, 200),
            nn.LeakyReLU(inplace=True),
            nn.Linear(200, 200),
            nn.LeakyReLU(inplace=True),
            nn.Linear(200, 10),
            nn.LeakyReLU(inplace=True),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.flatten(1))
