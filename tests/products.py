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


def with_an_infinite_weight(function, input, weight, at, **settings):
    """(the weight infinite ``at`` an index, the function's exact result): infinite where that
    element meets a pixel, finite where it meets padding."""
    finite, only, spoiled = weight.clone(), torch.zeros_like(weight), weight.clone()
    finite[at], only[at], spoiled[at] = 0, 1, float("inf")
    met = function(input, only, **settings)
    return spoiled, function(input, finite, **settings).where(met == 0, met * float("inf"))
