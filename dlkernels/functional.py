"""The public functions, under the names and signatures of ``torch.nn.functional``; those of
recurrent networks under those of ``torch``.

Every other public name of ``torch.nn.functional`` is here too: this module can stand for it.
"""

import torch

from dlkernels.ops import conv2d_few_channels as _  # noqa: F401  raw ops: schemas and fakes
from dlkernels.ops.batch_norm import batch_norm
from dlkernels.ops.conv2d import conv2d, conv_transpose2d
from dlkernels.ops.conv2d_max_pool2d import conv2d_max_pool2d
from dlkernels.ops.cross_entropy import cross_entropy
from dlkernels.ops.linear import linear
from dlkernels.ops.linear_cross_entropy import linear_cross_entropy
from dlkernels.ops.lstm import (
    gru,
    gru_cell,
    lstm,
    lstm_cell,
    rnn_relu,
    rnn_relu_cell,
    rnn_tanh,
    rnn_tanh_cell,
)
from dlkernels.ops.residual_block import ResidualLayer, residual_block

__all__ = [
    "ResidualLayer",
    "batch_norm",
    "conv2d",
    "conv2d_max_pool2d",
    "conv_transpose2d",
    "cross_entropy",
    "gru",
    "gru_cell",
    "linear",
    "linear_cross_entropy",
    "lstm",
    "lstm_cell",
    "residual_block",
    "rnn_relu",
    "rnn_relu_cell",
    "rnn_tanh",
    "rnn_tanh_cell",
]


def __getattr__(name: str):
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(torch.nn.functional, name)


def __dir__() -> list[str]:
    stock = (name for name in dir(torch.nn.functional) if not name.startswith("_"))
    return sorted({*globals(), *stock})
