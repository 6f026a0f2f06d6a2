"""Rows and providers of whole models: the documented networks, and others as ``swap`` makes them.

**The work.** A training step without the optimiser: the loss of a batch, of the documented size,
and ``torch.autograd.grad`` for all parameters; of a network that is trained in turns, each turn's.
Losses and the gradient of the last weight are compared with stock's. The first ones' differ by a
tenth between stock's own two layouts: a ReLU in front of them flips at 0.
``forward`` is an evaluation, without a graph. Dropout has probability 0, and what a network draws
itself is drawn from the same seed.

**The data.** The first examples of a documented network's embedded data set; random images and
words for the others.

**Stock** is ``torch.nn``'s twin of a documented network, with the same weights, eager; of images
also with channels_last weights and images, as ours. ``torch.compile`` is that of stock, ``auto
compiled`` that of ours; both may break the graph. Ours is the network of ``dlkernels.nn``; of the
others, ``swap`` of a copy.

**The bytes.** Inputs and parameters read once, gradients of parameters written once. **The flops**
are those of products and convolutions, as ``torch.utils.flop_counter`` counts them on two examples;
of an LSTM on all.
"""

import copy
import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Provider, Row

OP = "models"
FORWARD, GRADIENT = "forward", "forward+gradient"
Batch = dict[str, torch.Tensor]


class Pair(NamedTuple):
    """Two models with the same weights, and a batch for them.

    ``losses(model, loss, batch)`` are those of a training step, each with the parameters that are
    to be changed; ``loss`` is the one beside the model. ``outputs(model, batch)`` is what it says.
    """

    models: tuple[torch.nn.Module, torch.nn.Module]  # stock, ours
    loss: tuple[torch.nn.Module | None, torch.nn.Module | None]
    batch: Batch
    losses: Callable[..., list[tuple[torch.Tensor, list[torch.nn.Parameter]]]]
    outputs: Callable[..., torch.Tensor]


def _documented(name: str) -> Pair:
    from dlkernels import train
    from dlkernels.data import load_for
    from dlkernels.models import NETWORKS

    recipe = NETWORKS[name].recipe
    sides = train.twins(name, 0, torch.device("cpu"))
    data = load_for(recipe)
    size = recipe.batch_size or len(data.train_inputs)
    turns = getattr(NETWORKS[name], "turns", {"": ("",)})

    def losses(model, loss, batch):
        carried = train.Carried() if recipe.carries_state else None
        for turn, parts in turns.items():
            modules = [model.get_submodule(part) for part in parts]
            yield (
                train.objective(model, loss, turn, batch["x"], batch["y"], carried),
                [parameter for module in modules for parameter in module.parameters()],
            )

    def outputs(model, batch):
        return model(batch["x"], None)[0] if recipe.carries_state else model(batch["x"])

    batch = {"x": data.train_inputs[:size], "y": data.train_targets[:size]}
    models, loss = zip(*((side.model, side.loss) for side in sides), strict=True)
    return Pair(models, loss, batch, losses, outputs)


def _of_transformers(make: Callable[[], torch.nn.Module], draw: Callable[[], Batch]) -> Pair:
    import dlkernels

    torch.manual_seed(0)
    stock, batch = make(), draw()
    ours = dlkernels.swap(copy.deepcopy(stock), channels_last="auto")
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    return Pair(
        (stock, ours),
        (None, None),
        batch,
        lambda model, _, batch: [(model(**batch).loss, list(model.parameters()))],
        lambda model, batch: model(**{name: batch[name] for name in inputs}).logits,
    )


def _resnet() -> Pair:
    import transformers

    config = transformers.ResNetConfig(
        layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], num_labels=10
    )
    return _of_transformers(
        lambda: transformers.ResNetForImageClassification(config),
        lambda: {"pixel_values": torch.randn(64, 3, 64, 64), "labels": torch.randint(10, (64,))},
    )


def _gpt2() -> Pair:
    import transformers

    config = transformers.GPT2Config(n_layer=2, n_embd=256, n_head=4)
    words = torch.randint(config.vocab_size, (4, 128), generator=torch.Generator().manual_seed(0))
    return _of_transformers(
        lambda: transformers.GPT2LMHeadModel(config), lambda: {"input_ids": words, "labels": words}
    )


class Case(NamedTuple):
    """One line of the table below; of each a training step and an evaluation."""

    name: str
    make: Callable[[], Pair]
    reason: str
    calls: int = 1


_SMALL = "what calling costs"
_NETWORKS = {
    "lenet": "few channels",
    "lenet5_cifar": "few channels",
    "mnist_cnn": "few channels",
    "inception_net": "branches of few channels",
    "mnist_mlp": "linear layers alone",
    "mlp256": "linear layers alone",
    "mlp200": "linear layers alone",
    "resnet18_cifar": "residual blocks of large images",
    "resnet18_light": "residual blocks of small images, the last of which broadcasts",
    "resnet18_pokemon": "residual blocks of few channels, of large images",
    "autoencoder": "linear layers alone",
    "adversarial_autoencoder": "two optimisers",
    "gan": "transposed convolutions",
    "sine_rnn": _SMALL,
    "two_cell_rnn": "cells in a Python loop",
    "two_cell_lstm": "cells in a Python loop",
    "sentiment_lstm": "a packed bidirectional LSTM of two layers",
    "diabetes_mlp": _SMALL,
}
CASES = [
    *(
        Case(name, functools.partial(_documented, name), reason, 10 if reason is _SMALL else 1)
        for name, reason in _NETWORKS.items()
    ),
    Case("transformers ResNet-18 64x3x64x64", _resnet, "swap of somebody's residual blocks"),
    Case("transformers GPT-2 4x128", _gpt2, "swap of linear layers and of a large loss"),
]


def _without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(module, torch.nn.RNNBase):
            module.dropout = 0.0
    return model


def _compiled(model: torch.nn.Module) -> torch.nn.Module:
    """A copy whose calls are compiled; of a network that is trained in turns, its parts'."""
    model = copy.deepcopy(model)
    for module in model.children() if hasattr(model, "turns") else [model]:
        module.compile(dynamic=False, options={"fallback_random": True})  # draws as eager does
    return model


def _counted(pair: Pair, work: str) -> tuple[int, int]:
    """Bytes and flops."""
    model = copy.deepcopy(pair.models[0])
    examples = len(next(iter(pair.batch.values())))
    few = examples if any(isinstance(m, torch.nn.LSTM) for m in model.modules()) else 2
    batch = {name: x[:few] for name, x in pair.batch.items()}
    # mkldnn's operators are not counted, and those that stand in for them are.
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        _call(model, pair.loss[0], pair, batch, work)()
    parameters = list(model.parameters())
    once = sum(x.numel() * x.element_size() for x in (*pair.batch.values(), *parameters))
    written = sum(p.numel() * p.element_size() for p in parameters) if work == GRADIENT else 0
    return once + written, counter.get_total_flops() * examples // min(few, examples)


def _call(model, loss, pair: Pair, batch: Batch, work: str) -> Callable:
    """The timed call."""
    if work == FORWARD:
        return lambda: (pair.outputs(model, batch),)

    def step():
        made = []
        for value, parameters in pair.losses(model, loss, batch):
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            made += [value.detach(), [g for g in gradients if g is not None and g.dim() > 1][-1]]
        return tuple(made)

    return step


def providers(case: Case, row: Row, device: str) -> list[Provider]:
    """Stock, of images in both layouts, stock compiled, ours, and ours compiled."""
    torch.compiler.reset()
    pair = case.make()
    pair = pair._replace(batch={name: x.to(device) for name, x in pair.batch.items()})
    stock, ours = (_without_dropout(model.to(device)) for model in pair.models)
    for model in (stock, ours):
        model.train(row.work == GRADIENT)
    row.bytes, row.flops = _counted(pair, row.work)
    last = {"memory_format": torch.channels_last}

    def of(name: str, model, own=False, batch=pair.batch, **more) -> Provider:
        call = _call(model, pair.loss[own], pair, batch, row.work)
        return Provider(name, call, lambda: torch.manual_seed(0), **more)

    made = [
        of("stock", stock, eager_stock=True),
        of("torch.compile", _compiled(stock)),
        of("own", ours, own=True, kernels="own"),
        of("auto", ours, own=True, kernels="auto"),
        of("auto compiled", _compiled(ours), own=True, kernels="auto"),
    ]
    images = {name: x for name, x in pair.batch.items() if x.dim() == 4}
    if images:
        batch = pair.batch | {name: x.contiguous(**last) for name, x in images.items()}
        others = [copy.deepcopy(model).to(**last) for model in (stock, ours)]
        made.insert(1, of("stock channels_last", others[0], batch=batch, eager_stock=True))
        made.append(of("auto channels_last", others[1], own=True, batch=batch, kernels="auto"))
    return made


def rows(device: str) -> list[Row]:
    """All rows of a device. What they need is counted when their providers are made."""
    made = []
    for case in CASES:
        if case.name.startswith("transformers") and not importlib.util.find_spec("transformers"):
            continue
        for work, ending in ((GRADIENT, ""), (FORWARD, " forward")):
            row = Row(
                op=OP,
                name=case.name + ending,
                reason=case.reason,
                work=work,
                dtype="float32",
                shape=(),
                layout="contiguous",
                bytes=0,
                flops=0,
                providers=list,
                calls=case.calls,
            )
            row.providers = functools.partial(providers, case, row, device)
            made.append(row)
    return made
