"""What a graph that is kept owes its second backward."""

import pytest
import torch


def check_second_backward(output, leaves, upstream, factor):
    """Each backward is right for its upstream gradient, ``upstream`` or a power of two times it,
    leaves the results of others alone, and has the same bits as the first for the same."""
    first = torch.autograd.grad(output, leaves, upstream, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(output, leaves, factor * upstream, retain_graph=True)
    again = torch.autograd.grad(output, leaves, upstream)
    for a, b, c, d in zip(first, kept, again, second, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
        # Exactly: the factor is a power of two. float16 has no room for the smallest.
        room = 2.0**-23 if a.dtype == torch.float16 else 0.0
        torch.testing.assert_close(a, d / factor, atol=room, rtol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(output, leaves, upstream)
