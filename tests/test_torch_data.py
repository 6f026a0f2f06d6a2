"""PyTorch's own test data for batch_norm, conv2d, conv_transpose2d, cross_entropy, linear and (from
2.13 on) linear_cross_entropy, OpInfo and ModuleInfo, through ours.

The samples are a few rows of three classes or outputs. One of them says little of an error: stock
is often exact by luck; the errors of all samples of a dtype, of several draws, are judged together.
"""

import copy
import functools
import io
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from compare import assert_no_worse
from layouts import every_second
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import dlkernels
from dlkernels.functional import (
    batch_norm,
    conv2d,
    conv_transpose2d,
    cross_entropy,
    linear,
    linear_cross_entropy,
)

DRAWS = 3


class Op(NamedTuple):
    """An op of ours, torch's data for it, and what the tests count on in that data."""

    ours: Callable
    stock: Callable
    info: Any  # OpInfo
    module_info: Any
    modules: tuple[type, type]  # ours and stock's
    results: tuple[str, ...]
    upstream: Callable  # of inputs in float64: a gradient of the output
    least: int  # samples
    strided: int  # samples that have a tensor with gaps
    broken: Callable[..., Iterable]  # from a good sample: what is wrong, inputs, arguments
    faults: int  # different ones in `broken`
    alone: tuple[int, ...]  # inputs whose gradient is asked for without the others'
    compiled: int  # every such sample is compiled
    slow: int = 1  # every such sample goes through what takes long
    stocks: Callable = lambda arguments: False  # whether the sample with these is stock's alone
    factors: dict[str, float] = {}  # of the rule, for results in float32; 2 else
    module_settings: tuple[str, ...] = ()  # what the function has as arguments

    def dtypes(self):
        floating = (d for d in self.info.supported_dtypes("cpu") if d.is_floating_point)
        return sorted(floating, key=str)

    def module_dtypes(self):
        supported = {*self.module_info.supported_dtypes("cpu"), torch.bfloat16}
        return sorted((dtype for dtype in supported if dtype.is_floating_point), key=str)

    def samples(self, dtype, requires_grad=False):
        """(inputs, keyword arguments) of each sample."""
        drawn = self.drawn(self.info.sample_inputs, dtype, requires_grad=requires_grad)
        return [(inputs_of(s), s.kwargs) for s in drawn]

    def drawn(self, draw, dtype, **arguments):
        drawn = [s for s in draw("cpu", dtype, **arguments) if not self.stocks(s.kwargs)]
        assert len(drawn) >= self.least
        return drawn


def inputs_of(sample):
    """The tensors: a bias that is None is left out."""
    return [x for x in (sample.input, *sample.args) if x is not None]


def info_of(infos, **wanted):
    (info,) = (i for i in infos if all(getattr(i, name) == wanted[name] for name in wanted))
    return info


def broken_cross_entropy(inputs, arguments):
    x, target = inputs
    classes = x.shape[1]
    yield "weight", inputs, arguments | {"weight": torch.ones(classes + 1, dtype=x.dtype)}
    yield "smoothing", inputs, arguments | {"label_smoothing": 1.5}
    yield "reduction", inputs, arguments | {"reduction": "median"}
    yield "batch", [torch.cat([x, x]), target], arguments
    if target.is_floating_point():
        yield "ignored probability", inputs, arguments | {"ignore_index": 1}
        yield "integer probability", [x, target.long()], arguments
        yield "classes", [x, torch.cat([target, target], 1)], arguments
    else:
        yield "too large", [x, torch.full_like(target, classes)], arguments
        yield "negative", [x, torch.full_like(target, -1)], arguments
        yield "dtype", [x, target.int()], arguments
        yield "rank", [x, target.unsqueeze(0)], arguments


def broken_linear(inputs, arguments):
    x, weight, *bias = inputs
    yield "features", [torch.cat([x, x], -1), weight, *bias], arguments
    yield "weight dtype", [x, weight.to(torch.complex64), *bias], arguments
    yield "weight rank", [x, weight[None], *bias], arguments
    yield "scalar", [x.sum(), weight, *bias], arguments
    if bias and x.dim() == 2 and len(x) > 0:
        yield "bias size", [x, weight, torch.cat([*bias, *bias])], arguments
        yield "bias dtype", [x, weight, bias[0].to(torch.complex64)], arguments


def broken_linear_cross_entropy(inputs, arguments):
    x, weight, target = inputs
    classes = weight.shape[0]
    ones = torch.ones(classes + 1, dtype=x.dtype)
    yield "features", [torch.cat([x, x], -1), weight, target], arguments
    yield "input rank", [x[None, None], weight, target], arguments
    yield "weight rank", [x, weight.flatten()[:1], target], arguments
    yield "bias", inputs, arguments | {"linear_bias": ones}
    yield "class weight", inputs, arguments | {"weight": ones}
    yield "smoothing", inputs, arguments | {"label_smoothing": 1.5}
    yield "reduction", inputs, arguments | {"reduction": "median"}
    if x.dim() == 1 and x.numel():
        yield "unbatched", [x, weight[:, None], target], arguments
    if target.is_floating_point():
        yield "ignored probability", inputs, arguments | {"ignore_index": 1}
        yield "integer probability", [x, weight, target.long()], arguments
    else:
        yield "too large", [x, weight, torch.full_like(target, classes)], arguments
        yield "negative", [x, weight, torch.full_like(target, -1)], arguments
        yield "dtype", [x, weight, target.int()], arguments


def broken_conv2d(inputs, arguments):
    x, weight, *bias = inputs
    yield "channels", [torch.cat([x, x], -3), weight, *bias], arguments
    yield "weight dtype", [x, weight.to(torch.complex64), *bias], arguments
    yield "weight rank", [x, weight[0], *bias], arguments
    yield "input rank", [x[None, None], weight, *bias], arguments
    yield "stride", inputs, arguments | {"stride": 0}
    yield "padding", inputs, arguments | {"padding": (0, -1)}
    yield "dilation", inputs, arguments | {"dilation": (1, 2, 3)}
    yield "groups", inputs, arguments | {"groups": 0}
    if bias:
        yield "bias size", [x, weight, torch.cat([*bias, *bias])], arguments
        if not isinstance(arguments.get("padding"), str):  # with words torch does not look at it
            yield "bias dtype", [x, weight, bias[0].to(torch.complex64)], arguments


def upstream_of_convolution(stock):
    return lambda *inputs, **arguments: torch.randn(
        stock(*inputs, **arguments).shape, dtype=torch.float64
    )


def over_parameters(function):
    """batch_norm as a function of input, weight and bias. Running statistics of the samples, which
    vmap cannot update, are read alone."""

    def call(x, weight=None, bias=None, *, running=(None, None), training=False, **settings):
        training = training or running[0] is None
        if training:
            running = (None, None)
        running = [t if t is None else t.to(x.dtype) for t in running]
        return function(x, *running, weight, bias, training, **settings)

    return call


def samples_over_parameters(info):
    """Those of batch_norm for ``over_parameters``. One without parameters has no second input, one
    without dimensions is stock's."""
    info = copy.copy(info)
    draw = info.sample_inputs_func

    def drawn(*arguments, **keywords):
        for sample in draw(*arguments, **keywords):
            *running, weight, bias = sample.args
            if weight is not None:
                sample.args, sample.kwargs["running"] = (weight, bias), tuple(running)
                yield sample

    info.sample_inputs_func = drawn
    return info


def broken_batch_norm(inputs, arguments):
    x, weight, bias = inputs
    channels = x.shape[1] + 1
    yield "weight size", [x, x.new_ones(channels), bias], arguments
    yield "bias size", [x, weight, x.new_ones(channels)], arguments
    yield "weight dtype", [x, weight.to(torch.complex64), bias], arguments
    yield "momentum", inputs, arguments | {"momentum": None}
    yield "eps", inputs, arguments | {"eps": -1.0}
    yield "one value", [x[:1].flatten(1)[:, : x.shape[1]], weight, bias], {"training": True}
    yield "running size", inputs, {"running": (x.new_ones(channels),) * 2}


BATCH_NORM = Op(
    ours=over_parameters(batch_norm),
    stock=over_parameters(F.batch_norm),
    info=samples_over_parameters(
        info_of(op_db, name="nn.functional.batch_norm", variant_test_name="")
    ),
    module_info=info_of(module_db, module_cls=torch.nn.BatchNorm2d),
    modules=(dlkernels.nn.BatchNorm2d, torch.nn.BatchNorm2d),
    results=("output", "grad input", "grad weight", "grad bias"),
    upstream=lambda x, *parameters, **arguments: torch.randn(x.shape, dtype=torch.float64),
    least=9,
    strided=3,
    broken=broken_batch_norm,
    faults=7,
    alone=(0, 1),
    compiled=2,
    module_settings=("training", "running", "eps"),
)
BATCH_NORM1D, BATCH_NORM3D = (
    BATCH_NORM._replace(module_info=info_of(module_db, module_cls=stock), modules=(ours, stock))
    for ours, stock in (
        (dlkernels.nn.BatchNorm1d, torch.nn.BatchNorm1d),
        (dlkernels.nn.BatchNorm3d, torch.nn.BatchNorm3d),
    )
)
CONVOLUTION = {
    "results": ("output", "grad input", "grad weight", "grad bias"),
    "broken": broken_conv2d,
    "faults": 10,
    "alone": (0, 1),
    "module_settings": ("stride", "padding", "dilation", "groups"),
    "factors": {"output": 4.0, "grad input": 4.0, "grad weight": 5.0},  # 3×3 of stride 1
}
CONV2D = Op(
    ours=conv2d,
    stock=F.conv2d,
    info=info_of(op_db, name="nn.functional.conv2d"),
    module_info=info_of(module_db, module_cls=torch.nn.Conv2d),
    modules=(dlkernels.nn.Conv2d, torch.nn.Conv2d),
    upstream=upstream_of_convolution(F.conv2d),
    least=30,
    strided=30,
    compiled=11,
    slow=3,
    **CONVOLUTION,
)
CONV_TRANSPOSE2D = Op(
    ours=conv_transpose2d,
    stock=F.conv_transpose2d,
    info=info_of(op_db, name="nn.functional.conv_transpose2d"),
    module_info=info_of(module_db, module_cls=torch.nn.ConvTranspose2d),
    modules=(dlkernels.nn.ConvTranspose2d, torch.nn.ConvTranspose2d),
    upstream=upstream_of_convolution(F.conv_transpose2d),
    least=10,
    strided=10,
    compiled=5,
    # One has an output_padding beyond the stride, as its dilation allows.
    stocks=lambda arguments: arguments.get("output_padding") == (2, 3),
    **CONVOLUTION,
)
CROSS_ENTROPY = Op(
    ours=cross_entropy,
    stock=F.cross_entropy,
    info=info_of(op_db, name="nn.functional.cross_entropy"),
    module_info=info_of(module_db, module_cls=torch.nn.CrossEntropyLoss),
    modules=(dlkernels.nn.CrossEntropyLoss, torch.nn.CrossEntropyLoss),
    results=("loss", "grad input", "grad target"),
    upstream=lambda *inputs, **arguments: torch.rand((), dtype=torch.float64) + 0.5,
    least=20,
    strided=20,
    broken=broken_cross_entropy,
    faults=11,
    alone=(0,),  # made ahead, in the forward pass, which a target with a gradient switches off
    compiled=1,
)
LINEAR = Op(
    ours=linear,
    stock=F.linear,
    info=info_of(op_db, name="nn.functional.linear"),
    module_info=info_of(module_db, module_cls=torch.nn.Linear),
    modules=(dlkernels.nn.Linear, torch.nn.Linear),
    results=("output", "grad input", "grad weight", "grad bias"),
    upstream=lambda *inputs: torch.randn(F.linear(*inputs).shape, dtype=torch.float64),
    least=18,
    strided=12,
    broken=broken_linear,
    faults=6,
    alone=(0, 1),
    compiled=3,
)
OPS = {
    "batch_norm": BATCH_NORM,
    "conv2d": CONV2D,
    "conv_transpose2d": CONV_TRANSPOSE2D,
    "cross_entropy": CROSS_ENTROPY,
    "linear": LINEAR,
}
if hasattr(F, "linear_cross_entropy"):
    OPS["linear_cross_entropy"] = LINEAR_CROSS_ENTROPY = Op(
        ours=linear_cross_entropy,
        stock=F.linear_cross_entropy,
        info=info_of(op_db, name="nn.functional.linear_cross_entropy", variant_test_name=""),
        module_info=info_of(module_db, module_cls=torch.nn.LinearCrossEntropyLoss),
        modules=(dlkernels.nn.LinearCrossEntropyLoss, torch.nn.LinearCrossEntropyLoss),
        results=("loss", "grad input", "grad weight", "grad target"),
        upstream=lambda *inputs, **arguments: torch.rand((), dtype=torch.float64) + 0.5,
        least=100,
        strided=100,
        broken=broken_linear_cross_entropy,
        faults=13,
        alone=(0, 1),
        compiled=20,
        slow=7,
    )

by_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def by_op_and(dtypes):
    pairs = {f"{name}-{dtype}": (op, dtype) for name, op in OPS.items() for dtype in dtypes(op)}
    return pytest.mark.parametrize(("op", "dtype"), pairs.values(), ids=pairs)


by_dtype, by_module_dtype = by_op_and(Op.dtypes), by_op_and(Op.module_dtypes)


@pytest.fixture(autouse=True)
def _one_thread():
    """A second thread only waits here: for milliseconds, on a machine that is busy."""
    torch.set_num_threads(1)


def differentiable(*tensors):
    return [t for t in tensors if t.requires_grad]


def to_float64(value):
    if not torch.is_tensor(value) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def output_and_gradients(function, inputs, upstream, **arguments):
    output = function(*inputs, **arguments)
    inputs = differentiable(*inputs)
    upstream = upstream.to(output.dtype).expand_as(output)
    return output, *(torch.autograd.grad(output, inputs, upstream) if inputs else ())


class Pool:
    """Results by name, of ours, of stock and of stock in float64, judged together at the end."""

    def __init__(self, op):
        self.op, self.results = op, {}

    def add(self, *inputs, ours=None, stock=None, **arguments):
        """``ours`` and ``stock`` instead of the op's functions, for this call."""
        exact_inputs = [to_float64(t) for t in inputs]
        exact_arguments = {name: to_float64(value) for name, value in arguments.items()}
        upstream = self.op.upstream(*exact_inputs, **exact_arguments)
        triples = zip(
            output_and_gradients(ours or self.op.ours, inputs, upstream, **arguments),
            output_and_gradients(stock or self.op.stock, inputs, upstream, **arguments),
            output_and_gradients(self.op.stock, exact_inputs, upstream, **exact_arguments),
            strict=True,
        )
        for name, triple in zip(self.op.results, triples, strict=False):
            for results, result in zip(
                self.results.setdefault(name, ([], [], [])), triple, strict=True
            ):
                results.append(result)

    def check(self):
        for name, results in self.results.items():
            float32 = results[0][0].dtype == torch.float32
            assert_no_worse(name, *results, self.op.factors.get(name, 2.0) if float32 else 2.0)


# ------------------------------------------------------------------------------------------ OpInfo


@by_dtype
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_and_gradients(op, dtype, requires_grad, own, poisoned):
    """Our kernels take every sample: "own" refuses none."""
    pool = Pool(op)
    for _ in range(DRAWS):
        for inputs, arguments in op.samples(dtype, requires_grad):
            with dlkernels.config.recording() as choices:
                pool.add(*inputs, **arguments)
            assert [choice.kernel for choice in choices] == [dlkernels.config.owner("cpu")]
    pool.check()
    assert list(pool.results) == [*op.results[: None if requires_grad else 1]]


@by_dtype
def test_gradient_of_one_input_alone(op, dtype, own, poisoned):
    for wanted in op.alone:
        pool = Pool(op)
        for _ in range(DRAWS):
            for inputs, arguments in op.samples(dtype):
                inputs[wanted].requires_grad_()
                pool.add(*inputs, **arguments)
        pool.check()


@by_dtype
def test_references_of_the_op(op, dtype, own):
    """The OpInfos have no reference of their own today: reference inputs are samples."""
    pool = Pool(op)
    for _ in range(DRAWS):
        for sample in op.drawn(op.info.reference_inputs, dtype):
            pool.add(*inputs_of(sample), **sample.kwargs)
    pool.check()


@by_dtype
def test_noncontiguous(op, dtype, own, poisoned):
    pool, strided = Pool(op), 0
    for _ in range(DRAWS):
        for sample in op.drawn(op.info.sample_inputs, dtype, requires_grad=True):
            other = sample.noncontiguous()
            inputs = inputs_of(other)
            strided += not all(x.is_contiguous() for x in inputs[:2])
            torch.testing.assert_close(
                op.ours(*inputs, **other.kwargs),
                op.ours(*inputs_of(sample), **sample.kwargs),
            )
            pool.add(*inputs, **other.kwargs)
    assert strided >= op.strided * DRAWS
    pool.check()


def test_a_weight_with_a_gradient_is_stocks():
    """No sample has one; ours refuses it, and "auto" gives what stock gives. With indices stock
    refuses it too."""
    seen = 0
    for (x, target), arguments in CROSS_ENTROPY.samples(torch.float32, requires_grad=True):
        if "weight" not in arguments or not target.is_floating_point():
            continue
        seen += 1
        assert not arguments["weight"].requires_grad
        arguments["weight"].requires_grad_()
        dlkernels.config.kernels = "own"
        with pytest.raises(NotImplementedError, match="weight.*requires_grad=True"):
            cross_entropy(x, target, **arguments)
        dlkernels.config.kernels = "auto"
        inputs = differentiable(x, target, arguments["weight"])
        losses = [f(x, target, **arguments).sum() for f in (cross_entropy, F.cross_entropy)]
        assert torch.equal(*losses)
        for pair in zip(*(torch.autograd.grad(loss, inputs) for loss in losses), strict=True):
            assert torch.equal(*pair)
    assert seen == 3


@pytest.mark.parametrize(
    "dtype", sorted(LINEAR.info.supported_dtypes("cpu") - {*LINEAR.dtypes()}, key=str), ids=str
)
def test_linear_of_complex_and_integers_is_stocks(dtype):
    for inputs, _ in LINEAR.samples(dtype):
        dlkernels.config.kernels = "auto"
        assert torch.equal(linear(*inputs), F.linear(*inputs))
        dlkernels.config.kernels = "own"
        with pytest.raises(NotImplementedError, match=f"no kernel for {dtype}"):
            linear(*inputs)


@by_dtype
def test_refusals(op, dtype, own):
    """Good samples, broken in one place, are refused with the type and the words of stock; so are
    the error inputs of the OpInfos, where there are any."""
    assert (op.info.error_inputs_func is None) == (
        op in (BATCH_NORM, CONV_TRANSPOSE2D, CROSS_ENTROPY, LINEAR)
    )
    errors = op.info.error_inputs("cpu") if op.info.error_inputs_func else ()
    for error in errors:
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            op.ours(sample.input, *sample.args, **sample.kwargs)
    seen = set()
    for sample in op.samples(dtype):
        for what, inputs, arguments in op.broken(*sample):
            with pytest.raises(Exception) as stock:  # noqa: B017  whatever it is, ours is the same
                op.stock(*inputs, **arguments)
            with pytest.raises(stock.type) as ours:
                op.ours(*inputs, **arguments)
            assert str(ours.value).splitlines()[0] == str(stock.value).splitlines()[0], what
            seen.add(what)
    assert len(seen) == op.faults


@by_op
def test_gradcheck(op, own):
    for inputs, arguments in op.samples(torch.float64, requires_grad=True)[:: op.slow]:
        assert gradcheck(
            functools.partial(op.ours, **arguments),
            inputs,
            check_forward_ad=op.info.supports_forward_ad,
            check_batched_grad=op.info.check_batched_grad,
            check_batched_forward_grad=op.info.check_batched_forward_grad,
            fast_mode=bool(op.info.gradcheck_fast_mode),
        )


@by_op
def test_gradgradcheck(op, own):
    for inputs, arguments in op.samples(torch.float64, requires_grad=True)[:: op.slow]:
        assert gradgradcheck(
            functools.partial(op.ours, **arguments),
            inputs,
            gen_non_contig_grad_outputs=True,
            check_batched_grad=op.info.check_batched_gradgrad,
            check_fwd_over_rev=op.info.supports_fwgrad_bwgrad,
            fast_mode=bool(op.info.gradcheck_fast_mode),
        )


@by_dtype
def test_vmap(op, dtype, own):
    """Over the first input, over the second, over both; and the gradient of each of a batch."""
    for (x, y, *others), arguments in op.samples(dtype)[:: op.slow]:
        xs, ys = torch.stack([x, x.flip(0), -x]), torch.stack([y, y.flip(0), y])
        for in_dims in ((0, 0), (0, None), (None, 0)):
            inputs = xs if in_dims[0] == 0 else x, ys if in_dims[1] == 0 else y
            for make in (lambda f: f, torch.func.grad):

                def summed(f, make=make, others=others, arguments=arguments):
                    return make(lambda *pair: f(*pair, *others, **arguments).sum())

                ours, stock = (
                    torch.func.vmap(summed(f), in_dims)(*inputs) for f in (op.ours, op.stock)
                )
                assert torch.equal(ours, stock)
                if dtype.itemsize <= (2 if op.results[0] == "loss" or op is LINEAR else 4):
                    continue  # stock's own batched sum cancels: nothing to compare
                one_by_one = [
                    summed(op.ours)(
                        inputs[0][i] if in_dims[0] == 0 else x,
                        inputs[1][i] if in_dims[1] == 0 else y,
                    )
                    for i in range(3)
                ]
                torch.testing.assert_close(ours, torch.stack(one_by_one))


@by_dtype
def test_forward_mode(op, dtype, own):
    """torch.func.jvp and dual numbers, in each input: stock's tangents, which are the gradients',
    not zeros."""
    for inputs, arguments in op.samples(dtype)[:: op.slow]:
        for at, x in enumerate(inputs):
            if not x.is_floating_point():
                continue
            tangent = torch.randn_like(x)

            def function(f, x, at=at, inputs=inputs, arguments=arguments):
                return f(*inputs[:at], x, *inputs[at + 1 :], **arguments)

            ours, stock = (
                torch.func.jvp(functools.partial(function, f), (x,), (tangent,))[1]
                for f in (op.ours, op.stock)
            )
            assert torch.equal(ours, stock)
            assert op is not LINEAR or 0 in (x.numel(), stock.numel()) or stock.any()
            with forward_ad.dual_level():  # in half precision stock's two ways may round apart
                ours_dual, stock_dual = (
                    forward_ad.unpack_dual(function(f, forward_ad.make_dual(x, tangent))).tangent
                    for f in (op.ours, op.stock)
                )
            assert torch.equal(ours_dual, stock_dual)
            if op not in (BATCH_NORM, OPS.get("linear_cross_entropy")):
                assert torch.equal(ours_dual, stock)
            if dtype == torch.float64:
                leaf = x.clone().requires_grad_()
                gradient = torch.autograd.grad(function(op.ours, leaf).sum(), leaf)[0]
                torch.testing.assert_close(ours.sum(), (gradient * tangent).sum())


@by_dtype
def test_compile(op, dtype, own):
    pool = Pool(op)
    for inputs, arguments in op.samples(dtype, requires_grad=True)[:: op.compiled]:
        torch._dynamo.reset()
        compiled = torch.compile(op.ours, fullgraph=True, backend="aot_eager")
        for _ in range(3):  # the same graph
            pool.add(*inputs, **arguments, ours=compiled)
            with torch.no_grad():
                inputs[0].copy_(torch.randn_like(inputs[0]))
    pool.check()
    torch._dynamo.reset()


# -------------------------------------------------------------------------------------- ModuleInfo


def module_inputs(op, dtype, requires_grad, training, least):
    """torch's cases: their description, constructor arguments, forward arguments, reference."""
    cases = op.module_info.module_inputs_func(
        op.module_info, "cpu", dtype, requires_grad=requires_grad, training=training
    )
    assert len(cases) >= least
    for case in cases:
        made, given = case.constructor_input, case.forward_input
        given = [*given.args, *given.kwargs.values()]
        yield case.desc, (made.args, made.kwargs), given, case.reference_fn


def module_cases(dtype, requires_grad=True, training=True):
    """(description, ours, stock's, input, target): the modules with the same settings."""
    for desc, (args, kwargs), (x, target), _ in module_inputs(
        CROSS_ENTROPY, dtype, requires_grad, training, 80
    ):
        modules = [module(*args, **kwargs) for module in CROSS_ENTROPY.modules]
        # Softmax of an input with a gradient: no leaf.
        yield desc, *modules, x.detach().requires_grad_(requires_grad), target.detach()


def modules_of(op, least):
    """Of torch's cases (description, ours, stock's, input, reference): the modules with the same
    parameters."""

    def cases(dtype, requires_grad=True, training=True):
        for desc, (args, kwargs), (x,), reference in module_inputs(
            op, dtype, requires_grad, training, least
        ):
            ours, stock = (module(*args, **kwargs, dtype=dtype) for module in op.modules)
            stock.load_state_dict(ours.state_dict())
            yield desc, ours, stock, x.detach().requires_grad_(requires_grad), reference

    return cases


def linear_loss_modules(dtype, requires_grad=True, training=True):
    """(description, ours, stock's, input, target): the modules with the same parameters."""
    for desc, (args, kwargs), (x, target), _ in module_inputs(
        LINEAR_CROSS_ENTROPY, dtype, requires_grad, training, 200
    ):
        if kwargs["options"] is None:
            ours, stock = (module(*args, **kwargs) for module in LINEAR_CROSS_ENTROPY.modules)
            stock.load_state_dict(ours.state_dict())
            yield desc, ours, stock, x.detach().requires_grad_(requires_grad), target.detach()


MODULE_CASES = {
    torch.nn.BatchNorm1d: modules_of(BATCH_NORM1D, 6),
    torch.nn.BatchNorm2d: modules_of(BATCH_NORM, 6),
    torch.nn.BatchNorm3d: modules_of(BATCH_NORM3D, 6),
    torch.nn.Conv2d: modules_of(CONV2D, 4),
    torch.nn.ConvTranspose2d: modules_of(CONV_TRANSPOSE2D, 2),
    torch.nn.CrossEntropyLoss: module_cases,
    torch.nn.Linear: modules_of(LINEAR, 3),
}
if "linear_cross_entropy" in OPS:
    MODULE_CASES[torch.nn.LinearCrossEntropyLoss] = linear_loss_modules


def settings_of(module):
    names = ("weight", "ignore_index", "reduction", "label_smoothing")
    return {name: getattr(module, name) for name in names}


def called(module):
    """A module as a function: its settings, which float64 is given, it holds itself."""
    return lambda x, target, **settings: module(x, target)


LAYOUTS = {
    "contiguous": lambda x: x,
    "noncontiguous": lambda x: every_second(x.detach()).requires_grad_(x.requires_grad),
    "channels_last": lambda x: (
        x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        if x.dim() == 4
        else x
    ),
}


@pytest.mark.parametrize("dtype", CROSS_ENTROPY.module_dtypes(), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_modules(layout, dtype, own, poisoned):
    """Forward and gradient, training and evaluating, of every case and layout."""
    pool = Pool(CROSS_ENTROPY)
    for _, training in itertools.product(range(2), (True, False)):
        for _, ours, stock, x, target in module_cases(dtype, training=training):
            ours.train(training), stock.train(training)
            assert repr(ours) == repr(stock) and ours.training == stock.training
            x = LAYOUTS[layout](x)
            settings = settings_of(stock)
            pool.add(x, target, ours=called(ours), stock=called(stock), **settings)
    pool.check()
    info = CROSS_ENTROPY.module_info
    assert not info.train_and_eval_differ and not info.module_memformat_affects_out


def test_modules_gradcheck(own):
    for desc, ours, _, x, target in module_cases(torch.float64):
        # More pixels have the same settings; of ignored rows alone the mean is NaN.
        if x.numel() > 60 or (target == ours.ignore_index).all():
            continue
        assert gradcheck(lambda x: ours(x, target), x), desc  # noqa: B023
        assert gradgradcheck(lambda x: ours(x, target), x), desc  # noqa: B023


def setting_of(module, name):
    if name == "running":  # copies: a call in training moves them
        return tuple(
            t if t is None else t.clone() for t in (module.running_mean, module.running_var)
        )
    return getattr(module, name)


def with_own_parameters(module):
    """A module as a function of its parameters too, which float64 is given instead; its settings it
    holds itself."""
    return lambda x, *parameters, **settings: torch.func.functional_call(
        module, dict(zip(dict(module.named_parameters()), parameters, strict=True)), (x,)
    )


LAYERS = {
    "batch_norm1d": BATCH_NORM1D,
    "batch_norm2d": BATCH_NORM,
    "batch_norm3d": BATCH_NORM3D,
    "conv2d": CONV2D,
    "conv_transpose2d": CONV_TRANSPOSE2D,
    "linear": LINEAR,
}
BATCH_NORMS = (BATCH_NORM, BATCH_NORM1D, BATCH_NORM3D)
LAYERS_AND_DTYPES = {
    f"{name}-{dtype}": (op, dtype) for name, op in LAYERS.items() for dtype in op.module_dtypes()
}


@pytest.mark.parametrize(("op", "dtype"), LAYERS_AND_DTYPES.values(), ids=LAYERS_AND_DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers(layout, op, dtype, own, poisoned):
    """Forward and gradients, training and evaluating, of every case and layout."""
    pool = Pool(op)
    for _, training in itertools.product(range(8), (True, False)):
        for desc, ours, stock, x, reference in MODULE_CASES[op.modules[1]](
            dtype, training=training
        ):
            ours.train(training), stock.train(training)
            assert repr(ours) == repr(stock) and ours.training == stock.training
            x = LAYOUTS[layout](x)
            parameters = [*ours.parameters()]
            functions = [with_own_parameters(module) for module in (ours, stock)]
            settings = {name: setting_of(ours, name) for name in op.module_settings}
            pool.add(x, *parameters, ours=functions[0], stock=functions[1], **settings)
            if dtype == torch.float64 and reference is not None:
                torch.testing.assert_close(ours(x), reference(ours, x), msg=desc)
    pool.check()
    info = op.module_info
    assert info.train_and_eval_differ == (op in BATCH_NORMS)
    assert info.module_memformat_affects_out == (op not in (*BATCH_NORMS, LINEAR))


@pytest.mark.parametrize("op", LAYERS.values(), ids=LAYERS)
def test_layers_gradcheck(op, own):
    for desc, ours, _, x, _ in MODULE_CASES[op.modules[1]](torch.float64):
        inputs = (x, *ours.parameters())
        assert gradcheck(with_own_parameters(ours), inputs, fast_mode=op is not LINEAR), desc
        assert gradgradcheck(with_own_parameters(ours), inputs, fast_mode=op is not LINEAR), desc


def with_own_weight(module):
    """A module as a function of its weight too, which float64 is given instead."""
    return lambda x, w, target, **settings: torch.func.functional_call(
        module, {"linear.weight": w.flatten(0, -2)}, (x, target)
    )


@pytest.mark.skipif("linear_cross_entropy" not in OPS, reason="torch below 2.13")
@pytest.mark.parametrize("dtype", CROSS_ENTROPY.module_dtypes(), ids=str)
def test_linear_cross_entropy_modules(dtype, own, poisoned):
    """Forward and gradients of every case."""
    pool = Pool(LINEAR_CROSS_ENTROPY)
    for desc, ours, stock, x, target in linear_loss_modules(dtype):
        assert repr(ours) == repr(stock), desc
        linear, outputs = ours.linear, (ours.num_classes, *ours.out_features)
        bias = None if linear.bias is None else linear.bias.detach().view(outputs)
        weight = linear.weight.detach().view(*outputs, -1).requires_grad_()
        functions = [with_own_weight(module) for module in (ours, stock)]
        settings = settings_of(stock) | {"linear_bias": bias}
        pool.add(x, weight, target, ours=functions[0], stock=functions[1], **settings)
    pool.check()


def same(a, b, desc):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=desc)


@by_module_dtype
def test_modules_are_saved_and_copied(op, dtype, own):
    """state_dict there and back, pickle and deepcopy: the same bits from every case."""
    cases = MODULE_CASES[op.modules[1]](dtype)
    for desc, ours, stock, *inputs in cases:
        inputs = [x for x in inputs if torch.is_tensor(x)]
        assert list(ours.state_dict()) == list(stock.state_dict()), desc
        wanted = ours(*inputs)  # NaN where a case of cross_entropy has ignored rows alone
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        for again in (torch.load(buffer, weights_only=False), copy.deepcopy(ours)):
            assert type(again) is type(ours) and vars(again).keys() == vars(ours).keys()
            same(again(*inputs), wanted, desc)
        stock = copy.deepcopy(stock)  # a case's modules share the weight of the loss
        stock.load_state_dict({k: torch.zeros_like(v) for k, v in stock.state_dict().items()})
        stock.load_state_dict(ours.state_dict())
        ours.load_state_dict(stock.state_dict())
        same(ours(*inputs), wanted, desc)


@by_module_dtype
def test_module_errors(op, dtype, own):
    info = op.module_info
    if op in LAYERS.values() and op not in BATCH_NORMS:
        assert info.module_error_inputs_func is None  # with its first ones, this test asks for them
        return
    cases = info.module_error_inputs_func(info, "cpu", dtype, requires_grad=True, training=True)
    assert len(cases) >= (2 if op in BATCH_NORMS else 5)
    for case in cases:
        error = case.module_error_input
        made, called = error.constructor_input, error.forward_input
        with pytest.raises(case.error_type, match=case.error_regex):
            op.modules[0](*made.args, **made.kwargs)(*called.args, **called.kwargs)
