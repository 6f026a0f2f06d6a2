"""Classes with the paths, the modules and the forward of those of torchvision, timm and
transformers that swap knows, for tests where the packages are missing."""

import sys
import types

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def at(path):
    """Gives a class or a function this path, and lets it be found there by pickle."""

    def place(thing):
        for part in (thing, vars(thing).get("forward")):
            if part is not None:
                part.__module__ = path
                part.__qualname__ = part.__qualname__.rpartition("<locals>.")[2]
        parts = path.split(".")
        for end in range(1, len(parts) + 1):  # with the packages that it is in
            name = ".".join(parts[:end])
            MODULES.setdefault(name, types.ModuleType(name))
        setattr(MODULES[path], thing.__name__, thing)
        return thing

    return place


MODULES: dict[str, types.ModuleType] = {}


def install(modules=sys.modules) -> None:
    """Makes the modules importable, in a process of their own or under a monkeypatch."""
    modules.update(MODULES)


class _Block(nn.Module):
    expansion = 1

    def __init__(self, inplanes, planes, stride=1, downsample=None, norm_layer=nn.BatchNorm2d):
        super().__init__()
        sizes = (3, 3) if self.expansion == 1 else (1, 3, 1)
        outputs = [planes] * (len(sizes) - 1) + [planes * self.expansion]
        channels, strided = inplanes, sizes.index(3)
        for i, (size, output) in enumerate(zip(sizes, outputs, strict=True)):
            step = stride if i == strided else 1
            conv = nn.Conv2d(channels, output, size, step, size // 2, bias=False)
            setattr(self, f"conv{i + 1}", conv)
            setattr(self, f"bn{i + 1}", norm_layer(output))
            channels = output
        self._activations(len(sizes))
        self.downsample = downsample


class _OneActivation(_Block):
    def _activations(self, count):
        self.relu = nn.ReLU(inplace=True)


class _ManyActivations(_Block):
    def _activations(self, count):
        for i in range(count):
            setattr(self, f"act{i + 1}", nn.ReLU(inplace=True))
        self.drop_block, self.aa = nn.Identity(), nn.Identity()
        self.se = self.drop_path = None


def torchvision():
    path = "torchvision.models.resnet"

    @at(path)
    class BasicBlock(_OneActivation):
        def forward(self, x):
            y = self.relu(self.bn1(self.conv1(x)))
            y = self.bn2(self.conv2(y))
            y += x if self.downsample is None else self.downsample(x)
            return self.relu(y)

    @at(path)
    class Bottleneck(_OneActivation):
        expansion = 4

        def forward(self, x):
            y = self.relu(self.bn1(self.conv1(x)))
            y = self.relu(self.bn2(self.conv2(y)))
            y = self.bn3(self.conv3(y))
            y += x if self.downsample is None else self.downsample(x)
            return self.relu(y)

    return BasicBlock, Bottleneck


def timm():
    path = "timm.models.resnet"

    def end(self, y, x, act):
        y = y if self.se is None else self.se(y)
        y = y if self.drop_path is None else self.drop_path(y)
        y += x if self.downsample is None else self.downsample(x)
        return act(y)

    @at(path)
    class BasicBlock(_ManyActivations):
        def forward(self, x):
            y = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))
            return end(self, self.bn2(self.conv2(y)), x, self.act2)

    @at(path)
    class Bottleneck(_ManyActivations):
        expansion = 4

        def forward(self, x):
            y = self.act1(self.bn1(self.conv1(x)))
            y = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(y)))))
            return end(self, self.bn3(self.conv3(y)), x, self.act3)

    return BasicBlock, Bottleneck


def transformers():
    path = "transformers.models.resnet.modeling_resnet"

    @at(path)
    class ResNetConvLayer(nn.Module):
        def __init__(self, channels, outputs, size=3, stride=1, activation=nn.ReLU):
            super().__init__()
            self.convolution = nn.Conv2d(channels, outputs, size, stride, size // 2, bias=False)
            self.normalization = nn.BatchNorm2d(outputs)
            self.activation = activation()

        def forward(self, x):
            return self.activation(self.normalization(self.convolution(x)))

    @at(path)
    class ResNetShortCut(nn.Module):
        def __init__(self, channels, outputs, stride):
            super().__init__()
            self.convolution = nn.Conv2d(channels, outputs, 1, stride, bias=False)
            self.normalization = nn.BatchNorm2d(outputs)

        def forward(self, x):
            return self.normalization(self.convolution(x))

    class Layer(nn.Module):
        expansion = 1

        def __init__(self, inplanes, planes, stride=1, activation=nn.ReLU):
            super().__init__()
            last = planes * self.expansion
            projects = stride != 1 or inplanes != last
            self.shortcut = ResNetShortCut(inplanes, last, stride) if projects else nn.Identity()
            if self.expansion == 1:
                first = [ResNetConvLayer(inplanes, planes, 3, stride, activation)]
            else:
                first = [
                    ResNetConvLayer(inplanes, planes, 1, 1, activation),
                    ResNetConvLayer(planes, planes, 3, stride, activation),
                ]
            size = 3 if self.expansion == 1 else 1
            end = ResNetConvLayer(planes, last, size, 1, nn.Identity)
            self.layer, self.activation = nn.Sequential(*first, end), activation()

    @at(path)
    class ResNetBasicLayer(Layer):
        def forward(self, x):
            y = self.layer(x)
            y += self.shortcut(x)
            return self.activation(y)

    @at(path)
    class ResNetBottleNeckLayer(Layer):
        expansion = 4

        def forward(self, x):
            y = self.layer(x)
            y += self.shortcut(x)
            return self.activation(y)

    return ResNetBasicLayer, ResNetBottleNeckLayer


@at("transformers.pytorch_utils")
class Conv1D(nn.Module):
    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        rows = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return rows.view(*x.shape[:-1], self.nf)


def _mean(rows, targets, number, ignore_index):
    if number is None:
        return F.cross_entropy(rows, targets, ignore_index=ignore_index)
    return F.cross_entropy(rows, targets, ignore_index=ignore_index, reduction="sum") / number


LOSSES = "transformers.loss.loss_utils"


@at(LOSSES)
def ForCausalLMLoss(
    logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None
):
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    rows = logits.float().view(-1, vocab_size)
    return _mean(rows, shift_labels.reshape(-1), num_items_in_batch, ignore_index)


@at(LOSSES)
def ForMaskedLMLoss(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100):
    rows = logits.float().view(-1, vocab_size)
    return _mean(rows, labels.view(-1), num_items_in_batch, ignore_index)


@at(LOSSES)
def ForTokenClassification(logits, labels, config):
    return _mean(logits.view(-1, config.num_labels).float(), labels.view(-1), None, -100)


@at(LOSSES)
def ForSequenceClassificationLoss(labels, pooled_logits, config):
    if config.problem_type is None:
        several = config.num_labels > 1
        config.problem_type = "single_label_classification" if several else "regression"
    if config.problem_type == "regression":
        return F.mse_loss(pooled_logits.squeeze(), labels.squeeze())
    return F.cross_entropy(pooled_logits.view(-1, config.num_labels), labels.view(-1))


_BY_TYPE = {
    "ForCausalLM": ForCausalLMLoss,
    "ForMaskedLM": ForMaskedLMLoss,
    "ForTokenClassification": ForTokenClassification,
    "ForSequenceClassification": ForSequenceClassificationLoss,
}


@at("transformers.modeling_utils")
class PreTrainedModel(nn.Module):
    loss_type = None

    @property
    def loss_function(self):
        if "_loss_function" in vars(self):
            return self._loss_function
        return _BY_TYPE[self.loss_type or "ForCausalLM"]

    @loss_function.setter
    def loss_function(self, value):
        self._loss_function = value

    def get_output_embeddings(self):
        return getattr(self, "lm_head", None)


BLOCKS = {
    f"{maker.__name__}-{cls.__name__}": cls
    for maker in (torchvision, timm, transformers)
    for cls in maker()
}


def block(name, stride=1, projects=False, **more):
    """(a block of 16 outputs or so, the channels of its input)."""
    cls = BLOCKS[name]
    outputs = 16 * cls.expansion
    inputs = 24 if projects else outputs
    if projects and not name.startswith("transformers"):
        conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        more["downsample"] = nn.Sequential(conv, nn.BatchNorm2d(outputs))
    return cls(inputs, 16, stride, **more), inputs


class Net(nn.Module):
    """A stem, two blocks and a linear layer; the blocks may be checkpointed."""

    def __init__(self, rematerialise=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.one, _ = block("torchvision-BasicBlock")
        self.two, _ = block("timm-BasicBlock")
        self.fc = nn.Linear(16, 5)
        self.rematerialise = rematerialise

    def forward(self, x):
        x = self.stem(x)
        for layer in (self.one, self.two):
            again = self.rematerialise
            x = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        return self.fc(x.mean((2, 3)))
