"""The convolution of few channels, with an activation and a 2×2 max-pool: raw ops of a GPU.

They take what ``conv2d`` and ``conv2d_max_pool2d`` take, restricted to 1 to 16 channels in, 1 to 64
out, no groups, no dilation, kernels of up to 7×7, strides of 1 and 2, and float32, bfloat16 and
float16; the launchers of those ops hand them such shapes. Formats are as of ``conv2d``.

With ``pool``, ``argmax`` is uint8: 2·row + column of the largest of each 2×2, the first of equals,
the last NaN. Without, it is an empty tensor of shape (0).
"""

import torch

from dlkernels.ops.common import empty_image, format_of, not_differentiable
from dlkernels.ops.conv2d import output_size

_SETTINGS = "SymInt[2] stride, SymInt[2] padding, str activation, bool pool"

for _schema in (
    f"conv2d_few_channels_forward(Tensor input, Tensor weight, Tensor? bias, {_SETTINGS})"
    " -> (Tensor output, Tensor argmax)",
    # An unwanted gradient comes back as an empty tensor of shape (0). ``output`` is read for every
    # activation but "none".
    "conv2d_few_channels_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor output,"
    f" Tensor argmax, {_SETTINGS}, bool want_input, bool want_weight, bool want_bias)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
):
    torch.library.define(f"dlkernels::{_schema.split('(')[0]}", _schema[_schema.index("(") :])


@torch.library.register_fake("dlkernels::conv2d_few_channels_forward")
def _(input, weight, bias, stride, padding, activation, pool):
    size = output_size(input.shape, weight.shape, stride, padding, (1, 1))
    if pool:
        size = [side // 2 for side in size]
    output = empty_image(input, weight, weight.shape[0], size)
    if not pool:
        return output, input.new_empty(0, dtype=torch.uint8)
    return output, torch.empty_like(output, dtype=torch.uint8)


@torch.library.register_fake("dlkernels::conv2d_few_channels_backward")
def _(
    grad_output, input, weight, output, argmax, stride, padding, activation, pool,
    want_input, want_weight, want_bias,
):  # fmt: skip
    return (
        torch.empty_like(input, memory_format=format_of(input))
        if want_input
        else input.new_empty(0),
        torch.empty_like(weight) if want_weight else input.new_empty(0),
        input.new_empty(weight.shape[0]) if want_bias else input.new_empty(0),
    )


not_differentiable("conv2d", "conv2d_few_channels_forward", "conv2d_few_channels_backward")
