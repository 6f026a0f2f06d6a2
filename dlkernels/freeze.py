"""``freeze`` lets modules keep what is derived from their weights, for inference.

Otherwise whatever a kernel reads in place of a weight, as Winograd's transform of it, is made anew
at every call: no version counter tells every change of a weight. A frozen module holds it beside
its parameters: no part of ``state_dict``, and of no copy by deepcopy or pickle, which is unfrozen.

What a class does for it is in ``dlkernels.nn.Freezable``.
"""

from typing import TypeVar

import torch

from dlkernels import nn

Model = TypeVar("Model", bound=torch.nn.Module)


def freeze(model: Model) -> Model:
    """Lets the modules of ours in ``model`` keep what they derive from their weights; in place.

    It serves calls without gradients, outside of ``torch.compile`` and of autocast's casts, by the
    algorithm that it is for. ``train()``, ``load_state_dict``, and whatever goes through ``to()``
    undo it for the modules that they reach; a weight that is replaced, or seen to be written to, is
    no longer what was kept of it, and the call computes from the weight itself. What nobody can
    see is on the caller: freeze again after writing through ``.data``, NumPy or a fused optimizer.

    Returns the model. Raises RuntimeError for one in training mode, as ``torch.jit.freeze``.
    """
    modules = _freezables(model, "freeze")
    if model.training or any(module.training for module in modules):
        raise RuntimeError("freeze: a model in training mode cannot be frozen: call eval() first")
    for module in modules:
        module.keep_prepared()
    return model


def unfreeze(model: Model) -> Model:
    """Drops what ``freeze`` has let the modules of ``model`` keep; in place. Returns the model."""
    for module in _freezables(model, "unfreeze"):
        module.drop_prepared()
    return model


def _freezables(model: torch.nn.Module, caller: str) -> list[nn.Freezable]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")
    return [module for module in model.modules() if isinstance(module, nn.Freezable)]
