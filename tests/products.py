"""What the tests of products of an input and a weight, with an activation behind them, share."""

import torch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ACTIVATIONS = [None, "relu", "leaky_relu", "tanh", "sigmoid"]


def evaluate(function, tensors, upstream, dtype=None, **settings):
    """Output and the gradients of input, weight and bias, in ``dtype``."""
    tensors = [
        x if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors
    ]
    output = function(*tensors, **settings)
    inputs = [x for x in tensors if x is not None]
    return output, *torch.autograd.grad(output, inputs, upstream.to(output.dtype))
