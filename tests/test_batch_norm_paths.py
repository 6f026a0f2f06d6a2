"""batch_norm's raw ops on shapes that the GPU's kernels cut and walk in different ways.

tests/test_emulated.py runs this file on the kernels of csrc/cuda, test_batch_norm_triton.py on
their Triton twins; here the same shapes hold the library that is loaded.
"""

import itertools

import pytest
import torch
from compare import assert_no_worse
from torch.nn import functional as F

import dlkernels  # noqa: F401

ops = torch.ops.dlkernels
aten = torch.ops.aten
EPS = 1e-5
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

# id: shape, whether channels_last; which path it is there for. A vector is 4 or 8 elements.
PATHS = {
    "channels": ((4, 16, 5, 7), True),
    "channels_in_pieces": ((3, 8, 33, 31), True),
    "channels_of_several_blocks": ((2, 520, 3, 3), True),  # of the last one few
    "channels_of_few_pixels": ((3, 320), False),
    "channels_3d": ((2, 16, 3, 4, 5), True),
    "one_pixel": ((12, 24, 1, 1), False),
    "odd_channels": ((5, 7, 9, 11), True),
    "odd_channels_in_pieces": ((3, 5, 30, 40), True),
    "odd_channels_of_several_blocks": ((9, 77), False),
    "one_column": ((300, 1), False),
    "planes": ((3, 5, 8, 8), False),
    "planes_in_pieces": ((5, 3, 64, 64), False),
    "one_image": ((1, 12, 4, 6), False),
    "planes_3d": ((2, 3, 4, 2, 8), False),
    "cut_planes": ((3, 5, 7, 7), False),
    "cut_planes_in_pieces": ((4, 3, 73, 71), False),
    "planes_shorter_than_a_vector": ((6, 9, 3), False),
    "one_channel": ((2, 1, 11, 13), True),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES["float64"] = torch.float64
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
BEFORE = {
    "none": lambda g, y: g,
    "relu": lambda g, y: aten.threshold_backward(g, y, 0),
    "leaky_relu": lambda g, y: aten.leaky_relu_backward(g, y, 0.01, True),
    "tanh": aten.tanh_backward,
    "sigmoid": aten.sigmoid_backward,
}

paths = pytest.mark.parametrize("path", PATHS)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def laid(x, last):
    return x.contiguous(memory_format=LAST[x.dim()]) if last else x.contiguous()


def drawn(path, dtype, mean=0.0):
    shape, last = PATHS[path]
    per_channel = [-1, *[1] * (len(shape) - 2)]
    spread = torch.rand(shape[1]).view(per_channel) + 0.5
    shift = mean * torch.randn(shape[1]).view(per_channel)
    return laid((torch.randn(shape) * spread + shift).to(dtype), last)


def like(x):
    return torch.empty_like(x).copy_(torch.randn(x.shape))


def parameters(x, dtype=None):
    """weight, bias, running_mean, running_var"""
    dtype = dtype or wide(x.dtype)
    channels = x.shape[1]
    weight, bias, mean = torch.rand(channels) + 0.5, torch.randn(channels), torch.randn(channels)
    return [t.to(dtype) for t in (weight, bias, mean, torch.rand(channels) + 0.5)]


def rstd_of(var):
    return (var.double() + EPS).rsqrt().to(var.dtype)


def stock(x, weight, bias, residual, running_mean, running_var, training, activation, momentum=0.1):
    """Output, mean and rstd."""
    y, mean, rstd = aten.native_batch_norm(
        x, weight, bias, running_mean, running_var, training, momentum, EPS
    )
    return ACTIVATIONS[activation](y if residual is None else y + residual), mean, rstd


def kept(y, activation, residual=None):
    """The output as the backward takes it: None where x tells its sign."""
    signed = activation in ("relu", "leaky_relu") and residual is None
    return None if signed or activation == "none" else y


def stocks_gradients(grad, x, weight, y, mean, rstd, training, activation, var=None):
    """Of input, weight, bias and residual; statistics of the batch with their rstd, or running
    ones."""
    g = BEFORE[activation](grad, y.to(grad.dtype))
    running = [None, None] if training else [mean, var]
    saved = [mean, rstd] if training else [None, None]
    weight = torch.ones_like(mean) if weight is None else weight
    mask = [True, True, True]
    return *aten.native_batch_norm_backward(g, x, weight, *running, *saved, training, EPS, mask), g


def doubled(*tensors):
    return [t if t is None else t.double() for t in tensors]


def format_of(x):
    return x.is_contiguous(), x.dim() in LAST and x.is_contiguous(memory_format=LAST[x.dim()])


GRADIENTS = ("grad input", "grad weight", "grad bias", "grad residual")


def check(names, draws, factor=2.0):
    """Each draw: for each of the names ours, stock's and the exact result."""
    for name, *results in zip(names, *draws, strict=True):
        assert_no_worse(name, *map(list, zip(*results, strict=True)), factor)


def training_results(x, residual, activation):
    """(ours, stock's, exact) of each of TRAINED."""
    weight, bias, running_mean, running_var = parameters(x)
    running = [(running_mean.clone(), running_var.clone()) for _ in range(2)]
    running.append(doubled(running_mean, running_var))
    settings = (EPS, activation, True)
    y, mean, var, shift = ops.batch_norm_forward(
        x, weight, bias, residual, *running[0], 0.1, *settings
    )
    assert y.dtype == x.dtype and format_of(y) == format_of(x)
    assert mean.dtype == var.dtype == wide(x.dtype)
    rstd = rstd_of(var)
    stocks = stock(x, weight, bias, residual, *running[1], True, activation)
    exact = stock(*doubled(x, weight, bias, residual), *running[2], True, activation)
    forward = [(y, mean, rstd), stocks, exact]
    # A mean near 0 has no digits of its own: it is judged beside the spread.
    forward = [(y, torch.cat([mean, 1 / rstd]), rstd) for y, mean, rstd in forward]

    grad = like(x)
    saved = (x, weight, shift, kept(y, activation, residual), mean, var)
    ours = ops.batch_norm_backward(grad, *saved, True, *settings, True, True, True, True)
    for t in (ours[0], ours[3]):
        assert t.dtype == x.dtype and format_of(t) == format_of(x)
    assert ours[1].dtype == ours[2].dtype == wide(x.dtype)
    stocks = stocks_gradients(grad, x, weight, y, *stocks[1:], True, activation)
    exact = stocks_gradients(*doubled(grad, x, weight, y), *exact[1:], True, activation)
    triples = [
        triple
        for three in (forward, running, (ours, stocks, exact))
        for triple in zip(*three, strict=True)
    ]
    return [(a, b.to(a.dtype), c) for a, b, c in triples]


TRAINED = ("output", "mean and spread", "rstd", "running_mean", "running_var", *GRADIENTS)


def draws_of(path):
    """Of few channels stock has luck."""
    return range(8 // PATHS[path][0][1] + 1)


def activation_of(path):
    return list(ACTIVATIONS)[list(PATHS).index(path) % len(ACTIVATIONS)]


@dtypes
@paths
def test_training(path, dtype, poisoned):
    draws = [drawn(path, dtype) for _ in draws_of(path)]
    check(TRAINED, [training_results(x, like(x), activation_of(path)) for x in draws])


@activations
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("path", ["channels", "odd_channels_in_pieces", "planes", "cut_planes"])
def test_activations(path, with_residual, activation, poisoned):
    x = drawn(path, torch.float32)
    check(TRAINED, [training_results(x, like(x) if with_residual else None, activation)])


def given_results(x, activation):
    weight, bias, mean, var = parameters(x)
    residual, settings = like(x), (EPS, activation, True)
    y = ops.batch_norm_apply(x, weight, bias, residual, mean, var, *settings)
    stocks = stock(x, weight, bias, residual, mean, var, False, activation)[0]
    exact = stock(*doubled(x, weight, bias, residual, mean, var), False, activation)[0]
    assert format_of(y) == format_of(x)

    grad = like(x)
    saved = (x, weight, bias, kept(y, activation, residual), mean, var, False, *settings)
    ours = ops.batch_norm_backward(grad, *saved, True, True, True, True)
    alone = ops.batch_norm_backward(grad, *saved, True, False, False, False)
    assert torch.equal(alone[0], ours[0])
    return [
        (y, stocks, exact),
        *zip(
            ours,
            stocks_gradients(grad, x, weight, y, mean, None, False, activation, var),
            stocks_gradients(
                *doubled(grad, x, weight, y, mean, None), False, activation, var.double()
            ),
            strict=True,
        ),
    ]


@dtypes
@paths
def test_given_statistics(path, dtype, poisoned):
    """Eval, and its gradients: of frozen statistics."""
    draws = [drawn(path, dtype) for _ in draws_of(path)]
    check(("output", *GRADIENTS), [given_results(x, activation_of(path)) for x in draws])


@dtypes
@paths
def test_parts(path, dtype, poisoned):
    """Between which an all-reduce stands: together they are the whole."""
    x = drawn(path, dtype)
    activation = activation_of(path)
    weight, bias, *_ = parameters(x)
    settings = (EPS, activation, True)
    y, mean, var, shift = ops.batch_norm_forward(x, weight, bias, None, None, None, 0.1, *settings)
    for a, b in zip(ops.batch_norm_statistics(x, True), (mean, var), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ops.batch_norm_apply(x, weight, shift, None, mean, var, *settings), y)

    grad = like(x)
    saved = (x, weight, shift, kept(y, activation), mean, var)
    whole = ops.batch_norm_backward(grad, *saved, True, *settings, True, True, True, True)
    sums = ops.batch_norm_reduce(grad, *saved, *settings)
    assert torch.equal(sums[0], whole[2]) and torch.equal(sums[1], whole[1])
    count = x.numel() // x.shape[1]
    means = [t / count for t in sums]
    grad_input, grad_residual = ops.batch_norm_gradient(grad, *saved, *means, *settings, True)
    torch.testing.assert_close(grad_input, whole[0], rtol=1e-2, atol=1e-5)
    assert torch.equal(grad_residual, whole[3])
    assert ops.batch_norm_gradient(grad, *saved, *means, *settings, False)[1].shape == (0,)


# id: mean and variance of a channel, its weight and bias, and values of x.
TINY, INF, NAN = 2.0**-149, float("inf"), float("nan")
SIGNS = {
    "about_the_root": (0.3, 1.7, 0.9, -0.4, [0.3 + 0.4 / 0.9 * (1.7 + EPS) ** 0.5]),
    "weight_of_0": (0.5, 1.0, 0.0, -0.0, [-1.0, 0.5, 2.0, INF, NAN]),
    "bias_of_0": (0.5, 1.0, 1.5, 0.0, [0.5, -0.5, 0.5 + 2.0**-24, NAN, -INF, INF]),
    "negative_weight": (0.5, 1.0, -1.5, -0.0, [0.5, 0.5 - 2.0**-24, 1.0]),
    "0_in_float16": (
        0.0,
        1.0 - EPS,
        2.0**-20,
        0.0,
        [2.0**-e * m for e in (4, 5, 6) for m in (1, -1, 1.25)],
    ),
    "0_in_bfloat16": (
        0.0,
        1.0 - EPS,
        2.0**-120,
        0.0,
        [2.0**-e * m for e in (13, 14, 15) for m in (1, -1, 1.25)],
    ),
    "subnormal": (0.0, 1.0 - EPS, 1.0, 0.0, [TINY, -TINY, 2.0**-133, 2.0**-126, 0.0, -0.0]),
    "0_in_float32": (
        0.0,
        1.0 - EPS,
        2.0**-100,
        0.0,
        [2.0**-e * m for e in (48, 49, 50, 51) for m in (1, -1, 1.5)],
    ),
}


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@dtypes
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels", "planes"])
@pytest.mark.parametrize("width", [8, 7])
def test_the_sign_of_the_output_is_found_to_the_bit(
    width, channels_last, dtype, activation, poisoned
):
    """Where rounding, underflow and what is no number decide it; of whole vectors and others."""
    x = laid(torch.randn(2, len(SIGNS) + 8 - width, 3, width).to(dtype), channels_last)
    weight, bias, mean, var = parameters(x)
    for c, (m, v, w, b, values) in enumerate(SIGNS.values()):
        mean[c], var[c], weight[c], bias[c] = m, v, w, b
        values = torch.tensor(values).repeat(6 * width)[: 6 * width]
        x[:, c] = values.to(dtype).view(2, 3, width)
    saved, settings = (x, weight, bias), (EPS, activation, True)
    y = ops.batch_norm_apply(*saved, None, mean, var, *settings)
    grad = like(x).abs_().add_(1)
    for training in (True, False):
        *_, g = ops.batch_norm_backward(
            grad, *saved, None, mean, var, training, *settings, True, True, True, True
        )
        torch.testing.assert_close(g, BEFORE[activation](grad, y), rtol=0, atol=0)


@dtypes
@pytest.mark.parametrize("path", PATHS)
def test_the_sign_of_every_output(path, dtype, poisoned):
    """Of statistics of the batch, where a bias puts some outputs next to 0."""
    x = drawn(path, dtype)
    settings = (EPS, "relu", True)
    weight = parameters(x)[0]
    mean, var = ops.batch_norm_statistics(x, True)
    first = x[(slice(0, 1), slice(None), *[0] * (x.dim() - 2))][0]
    bias = -(first - mean) * (weight * rstd_of(var))
    y, *saved, shift = ops.batch_norm_forward(x, weight, bias, None, None, None, 0.1, *settings)
    *_, g = ops.batch_norm_backward(
        torch.ones_like(x), x, weight, shift, None, *saved, True, *settings, True, True, True, True
    )
    assert torch.equal(g != 0, y > 0)


@dtypes
@pytest.mark.parametrize("path", ["channels_in_pieces", "odd_channels", "planes", "cut_planes"])
def test_parameters_of_the_inputs_dtype(path, dtype, poisoned):
    x = drawn(path, dtype)
    weight, bias, *running = parameters(x, dtype)
    runnings = [[t.clone() for t in running], [t.clone() for t in running], doubled(*running)]
    ours = ops.batch_norm_forward(x, weight, bias, None, *runnings[0], 0.3, EPS, "relu", True)
    stocks = stock(x, weight, bias, None, *runnings[1], True, "relu", 0.3)
    exact = stock(*doubled(x, weight, bias, None), *runnings[2], True, "relu", 0.3)
    assert_no_worse("output", ours[0], stocks[0], exact[0])
    assert runnings[0][0].dtype == dtype
    for name, *three in zip(("running_mean", "running_var"), *runnings, strict=True):
        assert_no_worse(name, *three)
    y = ops.batch_norm_apply(x, weight, bias, None, *running, EPS, "none", True)
    stocks = stock(x, weight, bias, None, *running, False, "none")[0]
    exact = stock(*doubled(x, weight, bias, None, *running), False, "none")[0]
    assert_no_worse("output of eval", y, stocks, exact)


@pytest.mark.parametrize("path", PATHS)
def test_without_parameters(path, poisoned):
    x = drawn(path, torch.float32)
    settings = (EPS, "none", True)
    y, *saved, _ = ops.batch_norm_forward(x, None, None, None, None, None, 0.1, *settings)
    none = (None, None, None, None, None, True, "none")
    stocks, exact = stock(x, *none), stock(x.double(), *none)
    assert_no_worse("output", y, stocks[0], exact[0])
    grad = like(x)
    ours = ops.batch_norm_backward(
        grad, x, None, None, None, *saved, True, *settings, True, False, False, False
    )
    stocks = stocks_gradients(grad, x, None, y, *stocks[1:], True, "none")
    exact = stocks_gradients(grad.double(), x.double(), None, y, *exact[1:], True, "none")
    assert_no_worse("grad input", ours[0], stocks[0], exact[0])
    assert [tuple(t.shape) for t in ours[1:]] == [(0,)] * 3


@pytest.mark.parametrize("path", ["channels", "planes_in_pieces"])
@pytest.mark.parametrize("wanted", range(16), ids="{:04b}".format)
def test_wanted_gradients(path, wanted, poisoned):
    x = drawn(path, torch.float32)
    wants = [bool(wanted >> i & 1) for i in range(4)]
    weight, bias, *_ = parameters(x)
    settings = (EPS, "relu", True)
    y, *saved, shift = ops.batch_norm_forward(x, weight, bias, None, None, None, 0.1, *settings)
    grad = like(x)
    for training, output in itertools.product((True, False), (y, None)):
        arguments = (grad, x, weight, shift, output, *saved, training, *settings)
        all_four = ops.batch_norm_backward(*arguments, True, True, True, True)
        some = ops.batch_norm_backward(*arguments, *wants)
        for a, b, want in zip(some, all_four, wants, strict=True):
            assert torch.equal(a, b) if want else a.shape == (0,)


@pytest.mark.parametrize("path", PATHS)
def test_a_large_mean(path, poisoned):
    draws = [drawn(path, torch.float32, mean=3000.0) for _ in draws_of(path)]
    check(TRAINED, [training_results(x, None, "none") for x in draws])


@pytest.mark.parametrize("path", ["channels_in_pieces", "odd_channels", "planes", "cut_planes"])
def test_what_a_rounded_mean_loses(path, poisoned):
    """Half a unit of a mean of 3000 is 1e-4 of the output."""
    x = drawn(path, torch.float32, mean=3000.0)
    weight, bias, *_ = parameters(x)
    y, *_ = ops.batch_norm_forward(x, weight, bias, None, None, None, 0.1, EPS, "none", True)
    exact, *_ = stock(*doubled(x, weight, bias, None, None, None), True, "none")
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("path", ["channels_in_pieces", "odd_channels", "planes", "cut_planes"])
def test_constants_and_outliers(path, poisoned):
    """A channel of one value has variance 0 exactly; a first value far from all others is not what
    the sums are shifted by."""
    x = drawn(path, torch.float32)
    x[:, 0] = 7.25
    x[0, 1].view(-1)[0] = 1e6
    _, var = ops.batch_norm_statistics(x, True)
    wanted = x.transpose(0, 1).flatten(1).double().var(1, unbiased=False)
    assert var[0] == 0
    torch.testing.assert_close(var, wanted.to(var.dtype), rtol=2e-6, atol=0)


@dtypes
@pytest.mark.parametrize("path", ["channels", "one_pixel", "planes", "cut_planes"])
def test_memory_off_16_bytes(path, dtype, poisoned):
    """What lies elsewhere gives what lies well, up to the order of sums."""
    x = drawn(path, dtype)
    memory = torch.empty(x.numel() + 3, dtype=dtype)[3:]
    off = memory.as_strided(x.shape, x.stride(), memory.storage_offset()).copy_(x)
    arguments = (None, None, None, None, None, 0.1, EPS, "tanh", True)
    y, *saved, _ = ops.batch_norm_forward(x, *arguments)
    results = ops.batch_norm_forward(off, *arguments)
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(results[0], y, **close)
    grad = like(x)
    outputs = [
        ops.batch_norm_backward(
            grad, input, None, None, y, *saved, True, EPS, "tanh", True, True, True, True, True
        )
        for input in (x, off)
    ]
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(b, a, **close | {"atol": 1e-5})


@pytest.mark.parametrize("path", ["channels", "planes", "channels_3d"])
def test_other_strides(path, poisoned):
    """Inputs with gaps, and gradients, residuals and outputs of another format than the input."""
    x = drawn(path, torch.float32)
    residual, weight, bias = like(x), *parameters(x)[:2]
    other = [laid(t, not PATHS[path][1]) for t in (x, residual)]
    gaps = torch.stack([x, x], -1)[..., 0]
    arguments = (None, None, 0.1, EPS, "relu", True)
    y, *saved, shift = ops.batch_norm_forward(x, weight, bias, residual, *arguments)
    for input, added in ((x, other[1]), (gaps, residual)):
        results = ops.batch_norm_forward(input, weight, bias, added, *arguments)
        for a, b in zip(results, (y, *saved, shift), strict=True):
            torch.testing.assert_close(a, b)
    grad = like(x)
    wants = (True, EPS, "relu", True, True, True, True, True)
    wanted = ops.batch_norm_backward(grad, x, weight, shift, y, *saved, *wants)
    moved = [laid(t, not PATHS[path][1]) for t in (grad, y)]
    got = ops.batch_norm_backward(moved[0], x, weight, shift, moved[1], *saved, *wants)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("path", PATHS)
def test_the_same_bits(path):
    x = drawn(path, torch.bfloat16)
    weight, bias, *_ = parameters(x)
    grad = like(x)
    settings = (EPS, "leaky_relu", True)
    runs = []
    for _ in range(2):
        y, *saved, shift = ops.batch_norm_forward(x, weight, bias, None, None, None, 0.1, *settings)
        back = ops.batch_norm_backward(
            grad, x, weight, shift, None, *saved, True, *settings, True, True, True, True
        )
        runs.append((y, *saved, shift, *back))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 3), (0, 4, 5, 6), (2, 4, 0, 3)])
def test_no_values(shape):
    x = torch.randn(shape)
    weight, bias, *running = parameters(x)
    kept = [t.clone() for t in running]
    arguments = (x, weight, bias, None, *running, 0.1, EPS, "relu", True)
    y, mean, var, shift = ops.batch_norm_forward(*arguments)
    assert y.shape == x.shape and not mean.any() and not var.any()
    assert all(torch.equal(a, b) for a, b in zip(running, kept, strict=True))
    assert ops.batch_norm_apply(x, weight, bias, x, *running, EPS, "relu", True).shape == x.shape
    results = ops.batch_norm_backward(
        y, x, weight, shift, None, mean, var, True, EPS, "relu", True, True, True, True, True
    )
    assert results[0].shape == results[3].shape == x.shape
    assert not results[1].any() and not results[2].any()


def test_values_that_are_not_finite():
    """NaN and inf stay in their channel."""
    x = drawn("channels", torch.float32)
    x[1, 2, 3, 4], x[0, 5, 0, 0] = float("nan"), float("inf")
    none = (None, None, None, None, None)
    y = ops.batch_norm_forward(x, *none, 0.1, EPS, "relu", True)[0]
    bad = y.isnan().transpose(0, 1).flatten(1)
    assert bad[[2, 5]].all() and not bad[[0, 1, 3, 4, *range(6, 16)]].any()


REFUSALS = {
    "1d": (lambda x: {"input": x[:, 0, 0, 0]}, "2 to 5 dimensions"),
    "integers": (lambda x: {"input": x.long()}, "dtype float32, float64, bfloat16 or float16"),
    "weight_shape": (lambda x: {"weight": torch.ones(5)}, r"weight of shape \[16\], got \[5\]"),
    "bias_dtype": (lambda x: {"bias": torch.ones(16).double()}, "bias of dtype"),
    "residual_shape": (lambda x: {"residual": x[:1]}, "residual of shape"),
    "residual_dtype": (lambda x: {"residual": x.half()}, "residual of dtype"),
    "running_shape": (lambda x: {"running_var": torch.ones(1)}, "running_var of shape"),
    "activation": (lambda x: {"activation": "gelu"}, "leaky_relu, tanh.* sigmoid, got gelu"),
    "one_value": (lambda x: {"input": x[:1, :, :1, :1]}, "more than 1 value per channel"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    x = drawn("channels", torch.float32)
    change, message = REFUSALS[case]
    arguments = dict.fromkeys(("weight", "bias", "residual", "running_mean", "running_var"))
    arguments = {"input": x, **arguments, "momentum": 0.1, "eps": EPS, "activation": "none"}
    with pytest.raises(RuntimeError, match=message):
        ops.batch_norm_forward(**arguments | change(x), own=True)


def test_refusals_of_the_backward():
    x = drawn("channels", torch.float32)
    mean, var = torch.zeros(16), torch.ones(16)
    rest = (True, True, True, True, True)
    for arguments, activation, message in (
        ((x[:1], x, None, None, x, mean, var), "relu", "grad_output of shape"),
        ((x, x, None, None, None, mean, var), "tanh", "expected the output"),
        ((x, x, None, None, x, mean, var), "none", "expected the output"),
        ((x, x, None, None, x[:1], mean, var), "relu", "output of shape"),
        ((x, x, None, mean[:3], None, mean, var), "relu", "shift of shape"),
        ((x, x, None, None, x, mean.double(), var), "relu", "mean of dtype"),
        ((x, x, None, None, x, mean, var[:3]), "relu", "var of shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.batch_norm_backward(*arguments, True, EPS, activation, *rest)
