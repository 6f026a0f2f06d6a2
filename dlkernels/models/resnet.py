"""ResNet18Cifar, ResNet18Light and ResNet18Pokemon: residual blocks, eight or four, and one linear
layer."""

from types import ModuleType

import torch

import dlkernels.nn
from dlkernels.models.recipe import IMAGENET_MEAN, IMAGENET_STD, Recipe


class _ResNet(torch.nn.Module):
    """``nn`` is the namespace of the layers. Blocks that are one op are channels_last inside, and
    so is then all of the network."""

    def __init__(self, nn: ModuleType) -> None:
        super().__init__()
        self.fused = hasattr(nn, "ResidualBlock")

    def _image(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.fused else x


class ResNet18Cifar(_ResNet):
    """Logits (N, 10) of images (N, 3, 32, 32); 11,173,962 parameters."""

    recipe = Recipe(
        data="cifar10",
        image_size=32,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        epochs=200,
        embedded_epochs=2,
        lr=0.1,
        momentum=0.9,
        weight_decay=5e-4,
        milestones=(150, 200),
        batch_size=128,
        augment=("flip",),
    )

    def __init__(self, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__(nn)
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        # With the ReLU in it, where the namespace has that.
        self.bn1 = nn.BatchNormAct2d(64) if self.fused else nn.BatchNorm2d(64)
        block = getattr(nn, "ResidualBlock", dlkernels.nn.StockResidualBlock)
        channels = 64, 64, 128, 256, 512
        for i, (before, after) in enumerate(zip(channels, channels[1:], strict=False), 1):
            stride = 1 if i == 1 else 2
            blocks = nn.Sequential(block(before, after, stride), block(after, after))
            setattr(self, f"block{i}", blocks)
        self.pool = nn.AvgPool2d(4)
        self.linear = nn.Linear(512, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(self._image(x)))  # (N, 64, 32, 32)
        x = x if self.fused else torch.relu(x)
        x = self.block2(self.block1(x))  # (N, 128, 16, 16)
        x = self.block4(self.block3(x))  # (N, 512, 4, 4)
        return self.linear(self.pool(x).flatten(1))


class _FourBlocks(_ResNet):
    """A convolution of stride 3 and four ``ResBlk`` of these channels and strides."""

    def __init__(self, nn, channels, strides, strided_shortcut) -> None:
        super().__init__(nn)
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, channels[0], 3, 3), nn.BatchNorm2d(channels[0]), nn.ReLU()
        )
        block = getattr(nn, "ResBlk", dlkernels.nn.StockResBlk)
        for i, stride in enumerate(strides, 1):
            setattr(self, f"blk{i}", block(channels[i - 1], channels[i], stride, strided_shortcut))

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(self._image(x))
        return self.blk4(self.blk3(self.blk2(self.blk1(x))))


class ResNet18Light(_FourBlocks):
    """Logits (N, 10) of images (N, 3, 32, 32); 9,553,674 parameters.

    The last block's convolutions end at one pixel, which broadcasts over the 2x2 of its shortcut;
    ``strided_shortcut`` gives the shortcut a convolution of the block's stride instead.
    """

    recipe = Recipe(
        data="cifar10",
        image_size=32,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        epochs=1000,
        embedded_epochs=10,
        optimiser="Adam",
        lr=1e-3,
        momentum=None,
        batch_size=128,
    )

    def __init__(self, nn: ModuleType = dlkernels.nn, strided_shortcut: bool = False) -> None:
        super().__init__(nn, (64, 128, 256, 512, 512), (2, 2, 2, 2), strided_shortcut)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.outlayer = nn.Linear(512, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outlayer(self.pool(self._features(x)).flatten(1))


class ResNet18Pokemon(_FourBlocks):
    """Logits (N, 5) of images (N, 3, 224, 224); 1,234,885 parameters."""

    recipe = Recipe(
        data="folders",
        classes=5,
        image_size=224,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        epochs=10,
        embedded_epochs=2,
        optimiser="Adam",
        lr=1e-3,
        momentum=None,
        batch_size=32,
        validation=0.25,  # 60, 20 and 20 of 100 with the test's
        augment=("rotate",),
    )

    def __init__(self, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__(nn, (16, 32, 64, 128, 256), (3, 3, 2, 2), False)
        self.outlayer = nn.Linear(256 * 3 * 3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outlayer(self._features(x).flatten(1))
