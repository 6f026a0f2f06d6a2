"""The rule for a numerical test: no worse than stock, against float64.

The error of ours against a float64 reference may be ``factor`` times stock's own error in the same
dtype plus one unit in the last place of the largest value, in the maximum and in the root mean
square. The factor is 2; more only where a faster algorithm is the point, and its docstring says so.
Small tensors are judged over several draws: of few numbers stock gets one exact by luck.
"""

import math

import torch

# In float64 the reference is no better than what it judges: what is left to find is a wrong formula
# or an accumulation in float32.
FLOAT64_ULPS = 2**10


def assert_no_worse(name, ours, stock, exact, factor=2.0):
    """``ours`` and ``stock`` in one dtype, ``exact`` in float64.

    Each may be a list, of the results of several draws: the errors are then of all of them.
    NaN and inf must be where they are in ``exact``; where stock alone overflows, ours may or not.
    """
    ours, stock, exact = (t if isinstance(t, list) else [t] for t in (ours, stock, exact))
    for a, b in zip(ours, stock, strict=True):
        assert a.shape == b.shape, f"{name}: {tuple(a.shape)}, stock {tuple(b.shape)}"
        assert a.dtype == b.dtype, f"{name}: {a.dtype}, stock {b.dtype}"
    ours, stock, exact = (
        torch.cat([x.detach().flatten() for x in t]) for t in (ours, stock, exact)
    )
    special = ~exact.isfinite()
    same = torch.allclose(ours[special].double(), exact[special], equal_nan=True)
    assert same, f"{name}: {ours[special]}, wanted {exact[special]}"
    overflowed = ~stock.isfinite() & ~special
    near = (ours.double() - exact).abs() <= 4 * torch.finfo(ours.dtype).eps * exact.abs()
    assert (near | (ours == stock))[overflowed].all(), f"{name}: {ours[overflowed]}"
    where = ~special & ~overflowed
    if not where.any():
        return
    assert ours[where].isfinite().all(), f"{name}: not finite where stock is"
    reference = exact[where]
    ulp = torch.finfo(ours.dtype).eps * 2.0 ** math.floor(_log2(reference.abs().max().item()))
    if ours.dtype == torch.float64:
        ulp *= FLOAT64_ULPS
    for what, norm in (("largest", _largest), ("rms", _rms)):
        error = norm(ours[where].double() - reference)
        allowed = factor * norm(stock[where].double() - reference) + ulp
        assert error <= allowed, f"{name}: {what} error {error:.2e}, allowed {allowed:.2e}"


def _log2(value):
    return math.log2(value) if value > 0 else -1074.0


def _largest(difference):
    return difference.abs().max().item()


def _rms(difference):
    return difference.square().mean().sqrt().item()
