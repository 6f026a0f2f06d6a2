"""cross_entropy on shapes that are cut otherwise than those of test_cross_entropy.py.

The GPU's kernels choose by length, strides and alignment. tests/test_emulated.py runs this file on
them; here the same shapes hold the library that is loaded.
"""

import pytest
import torch
from compare import assert_no_worse
from test_cross_entropy import check, lay_out, problem, upstream_of, with_extras
from torch.nn import functional as F

from dlkernels.functional import cross_entropy

# id: shape, layout, dtype; which path it is there for.
PATHS = {
    "one_block_of_rows": ((5, 900), None, torch.bfloat16),
    "a_block_for_each_row": ((40, 9000), None, torch.float32),
    "cluster_of_few_rows": ((3, 150000), None, torch.float16),
    "rows_begin_anywhere": ((6, 50257), None, torch.bfloat16),
    "cluster_of_8": ((3, 262144), None, torch.bfloat16),
    "cluster_of_8_in_one_block_each": ((2, 262144), None, torch.float32),
    "row_that_is_read_twice": ((2, 262144), None, torch.float64),
    "padded_vocabulary": ((7, 1003), "padded", torch.bfloat16),
    "rows_of_inner": ((2, 1000, 3, 5), "channels_last", torch.float32),
    "base_off_16_bytes": ((9, 2000), "offset", torch.float16),
    "targets_beyond_one_warp": ((1500, 100), None, torch.float32),
    "few_in_many_blocks": ((5000, 21), None, torch.bfloat16),
    "few_rows_meet_in_banks": ((700, 32), None, torch.float32),
    "few_off_16_bytes": ((300, 12), "offset", torch.float32),
    "columns_in_slices": ((2, 150, 32, 32), None, torch.bfloat16),
    "columns_in_many_slices": ((1, 1500, 8, 16), None, torch.float32),
    "columns_that_are_read_twice": ((1, 20000, 4, 4), None, torch.float64),
    "columns_off_16_bytes": ((2, 40, 33, 31), None, torch.bfloat16),
    "columns_of_one_class": ((2, 1, 40, 40), None, torch.float32),
    "long_matrix_transposed": ((64, 3000), "transposed", torch.float32),
}


def draws(size, layout, dtype, kind, **arguments):
    x, target, arguments = problem(size, dtype, None, kind, **arguments)
    if layout == "padded":  # every row of the logits on 16 bytes, none of the gradient
        x = torch.nn.functional.pad(x, (0, 1024 - size[1]))[:, : size[1]]
    else:
        x = lay_out(x, layout)
        target = lay_out(target, layout) if kind == "probability" else target
    return x, target, arguments, upstream_of(target, kind, arguments["reduction"])


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("path", PATHS)
def test_index_targets(path, reduction, own, poisoned):
    check(
        lambda: draws(*PATHS[path], "index", reduction=reduction, ignored=True),
        factor=4.0,  # of few rows stock has luck
        rows=6,
    )


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("path", [path for path in PATHS if PATHS[path][0][1] > 1])
def test_every_option_at_once(path, kind, own, poisoned):
    arguments = {"reduction": "mean", "label_smoothing": 0.1, "weighted": True, "ignored": True}
    arguments |= {"softcap": 5.0, "z_loss": 1e-3}
    check(lambda: draws(*PATHS[path], kind, **arguments), stock=with_extras, factor=4.0, rows=6)


@pytest.mark.parametrize("path", ["targets_beyond_one_warp", "few_in_many_blocks"])
def test_weights_of_more_targets_than_one_piece(path, own):
    """33000 rows: the divisor of the mean in two pieces."""
    (_, classes), _, dtype = PATHS[path]
    check(lambda: draws((33000, classes), None, dtype, "index", weighted=True, reduction="mean"))


@pytest.mark.parametrize("path", ["cluster_of_8", "row_that_is_read_twice", "columns_in_slices"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_special_logits(path, value, own):
    """A row of nothing else, and one that begins with a class of it."""
    (rows, classes, *pixels), _, dtype = PATHS[path]
    x = torch.randn(rows, classes, *pixels).to(dtype)
    x[0], x[1, 0] = value, value
    target = torch.full((rows, *pixels), classes - 1)
    results = []
    for function, wide in ((cross_entropy, dtype), (F.cross_entropy, torch.float64)):
        y = x.to(wide).detach().requires_grad_()
        loss = function(y, target, reduction="none")
        results.append((loss, torch.autograd.grad(loss.sum(), y)[0]))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=1e-2, rtol=1e-2, equal_nan=True)


def test_offsets_beyond_two_to_the_31(own):
    """The second row begins 2^31 elements after the first; what lies between is never touched."""
    classes = 3000
    memory = torch.empty(2**31 + classes, dtype=torch.bfloat16)
    x = memory.as_strided((2, classes), (2**31, 1))
    x.copy_(torch.randn(2, classes))
    target = torch.tensor([5, 2999])
    weight = torch.rand(classes).bfloat16()
    ours = x.requires_grad_()
    loss = cross_entropy(ours, target, weight, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), ours)
    exact = x.detach().double().contiguous().requires_grad_()
    wanted = F.cross_entropy(exact, target, weight.double(), reduction="none")
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), exact)
    assert_no_worse("loss", loss, wanted.bfloat16(), wanted)
    assert_no_worse("grad input", gradient, wanted_gradient.bfloat16(), wanted_gradient)


@pytest.mark.parametrize("path", PATHS)
def test_the_same_bits_twice(path, own):
    x, target, arguments, upstream = draws(*PATHS[path], "index", weighted=True, reduction="mean")
    x.requires_grad_()
    results = []
    for _ in range(2):
        loss = cross_entropy(x, target, **arguments)
        results.append((loss, torch.autograd.grad(loss, x, upstream.to(loss.dtype))[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "path", ["cluster_of_8", "targets_beyond_one_warp", "few_in_many_blocks", "columns_in_slices"]
)
def test_a_target_out_of_range(path, own):
    """Also where its weight would be read before its logit is."""
    x, target, arguments, _ = draws(*PATHS[path], "index", weighted=True, reduction="mean")
    target.view(-1)[-1] = x.shape[1]
    with pytest.raises(IndexError, match=f"Target {x.shape[1]} is out of bounds"):
        cross_entropy(x.requires_grad_(), target, **arguments)
