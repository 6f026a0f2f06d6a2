"""PyTorch's own test data for cross_entropy and linear, OpInfo and ModuleInfo, through ours.

The samples are a few rows of three classes or outputs. One of them says little of an error: stock
is often exact by luck; the errors of all samples of a dtype, of several draws, are judged together.
"""

import copy
import io
import itertools

import pytest
import torch
from compare import assert_no_worse
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import dlkernels
from dlkernels.functional import cross_entropy, linear

(OP,) = (op for op in op_db if op.name == "nn.functional.cross_entropy")
(MODULE,) = (info for info in module_db if info.module_cls is torch.nn.CrossEntropyLoss)
DTYPES = sorted(OP.supported_dtypes("cpu"), key=str)
MODULE_DTYPES = sorted({*MODULE.supported_dtypes("cpu"), torch.bfloat16}, key=str)
(LINEAR,) = (op for op in op_db if op.name == "nn.functional.linear")
(LINEAR_MODULE,) = (info for info in module_db if info.module_cls is torch.nn.Linear)
LINEAR_DTYPES = sorted((d for d in LINEAR.supported_dtypes("cpu") if d.is_floating_point), key=str)
OTHER_DTYPES = sorted(LINEAR.supported_dtypes("cpu") - {*LINEAR_DTYPES}, key=str)
LINEAR_MODULE_DTYPES = sorted({*LINEAR_MODULE.supported_dtypes("cpu"), torch.bfloat16}, key=str)
DRAWS = 3

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_module_dtype = pytest.mark.parametrize("dtype", MODULE_DTYPES, ids=str)
by_linear_dtype = pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=str)
by_linear_module_dtype = pytest.mark.parametrize("dtype", LINEAR_MODULE_DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _one_thread():
    """A second thread only waits here: for milliseconds, on a machine that is busy."""
    torch.set_num_threads(1)


def samples(dtype, requires_grad=False):
    """(input, target, keyword arguments) of each sample."""
    drawn = [*OP.sample_inputs("cpu", dtype, requires_grad=requires_grad)]
    assert len(drawn) >= 20
    return [(s.input, *s.args, s.kwargs) for s in drawn]


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

    names = "loss", "grad input", "grad target"
    exact = staticmethod(F.cross_entropy)

    def __init__(self):
        self.results = {}

    def upstream(self, inputs):
        return torch.rand((), dtype=torch.float64) + 0.5

    def add(self, ours, stock, *inputs, **arguments):
        exact_inputs = [to_float64(t) for t in inputs]
        exact_arguments = {name: to_float64(value) for name, value in arguments.items()}
        upstream = self.upstream(exact_inputs)
        triples = zip(
            output_and_gradients(ours, inputs, upstream, **arguments),
            output_and_gradients(stock, inputs, upstream, **arguments),
            output_and_gradients(self.exact, exact_inputs, upstream, **exact_arguments),
            strict=True,
        )
        for name, triple in zip(self.names, triples, strict=False):
            for results, result in zip(
                self.results.setdefault(name, ([], [], [])), triple, strict=True
            ):
                results.append(result)

    def check(self):
        for name, results in self.results.items():
            assert_no_worse(name, *results)


# ------------------------------------------------------------------------------------------ OpInfo


@by_dtype
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_and_gradients(dtype, requires_grad, own, poisoned):
    """Our kernels take every sample: "own" refuses none."""
    pool = Pool()
    for _ in range(DRAWS):
        for x, target, arguments in samples(dtype, requires_grad):
            with dlkernels.config.recording() as choices:
                pool.add(cross_entropy, F.cross_entropy, x, target, **arguments)
            assert [choice.kernel for choice in choices] == [
                f"cpu/{dlkernels.config.libraries['cpu']}"
            ]
    pool.check()
    assert list(pool.results) == ["loss", "grad input", "grad target"][: 1 + 2 * requires_grad]


@by_dtype
def test_gradient_of_the_input_alone(dtype, own, poisoned):
    """The gradient made ahead, in the forward pass, which a target with a gradient switches off."""
    pool = Pool()
    for _ in range(DRAWS):
        for x, target, arguments in samples(dtype):
            pool.add(cross_entropy, F.cross_entropy, x.requires_grad_(), target, **arguments)
    pool.check()


@by_dtype
def test_references_of_the_op(dtype, own):
    """The OpInfo has no reference of its own today: its reference inputs are its samples."""
    pool = Pool()
    for _ in range(DRAWS):
        for sample in OP.reference_inputs("cpu", dtype):
            pool.add(cross_entropy, F.cross_entropy, sample.input, *sample.args, **sample.kwargs)
    pool.check()


@by_dtype
def test_noncontiguous(dtype, own, poisoned):
    pool, strided = Pool(), 0
    for _ in range(DRAWS):
        for sample in OP.sample_inputs("cpu", dtype, requires_grad=True):
            other = sample.noncontiguous()
            strided += not other.input.is_contiguous()
            torch.testing.assert_close(
                cross_entropy(other.input, *other.args, **other.kwargs),
                cross_entropy(sample.input, *sample.args, **sample.kwargs),
            )
            pool.add(cross_entropy, F.cross_entropy, other.input, *other.args, **other.kwargs)
    assert strided >= 20 * DRAWS
    pool.check()


def test_a_weight_with_a_gradient_is_stocks():
    """No sample has one; ours refuses it, and "auto" gives what stock gives. With indices stock
    refuses it too."""
    seen = 0
    for x, target, arguments in samples(torch.float32, requires_grad=True):
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


def broken(x, target, arguments):
    """(what is wrong, input, target, arguments), made from a good sample."""
    classes = x.shape[1]
    yield "weight", x, target, arguments | {"weight": torch.ones(classes + 1, dtype=x.dtype)}
    yield "smoothing", x, target, arguments | {"label_smoothing": 1.5}
    yield "reduction", x, target, arguments | {"reduction": "median"}
    yield "batch", torch.cat([x, x]), target, arguments
    if target.is_floating_point():
        yield "ignored probability", x, target, arguments | {"ignore_index": 1}
        yield "integer probability", x, target.long(), arguments
        yield "classes", x, torch.cat([target, target], 1), arguments
    else:
        yield "too large", x, torch.full_like(target, classes), arguments
        yield "negative", x, torch.full_like(target, -1), arguments
        yield "dtype", x, target.int(), arguments
        yield "rank", x, target.unsqueeze(0), arguments


@by_dtype
def test_refusals(dtype, own):
    """The OpInfo has no error inputs (with its first ones, this test asks for them): good samples,
    broken in one place, are refused with the type and the words of stock."""
    assert OP.error_inputs_func is None
    seen = set()
    for sample in samples(dtype):
        for what, x, target, arguments in broken(*sample):
            with pytest.raises(Exception) as stock:  # noqa: B017  whatever it is, ours is the same
                F.cross_entropy(x, target, **arguments)
            with pytest.raises(stock.type) as ours:
                cross_entropy(x, target, **arguments)
            assert str(ours.value).splitlines()[0] == str(stock.value).splitlines()[0], what
            seen.add(what)
    assert len(seen) == 11


def gradcheck_arguments(x, target, arguments):
    inputs = (x, target) if target.requires_grad else (x,)
    return lambda x, t=target: cross_entropy(x, t, **arguments), inputs


def test_gradcheck(own):
    for sample in samples(torch.float64, requires_grad=True):
        assert gradcheck(
            *gradcheck_arguments(*sample),
            check_forward_ad=OP.supports_forward_ad,
            check_batched_grad=OP.check_batched_grad,
            check_batched_forward_grad=OP.check_batched_forward_grad,
        )


def test_gradgradcheck(own):
    for sample in samples(torch.float64, requires_grad=True):
        assert gradgradcheck(
            *gradcheck_arguments(*sample),
            gen_non_contig_grad_outputs=True,
            check_batched_grad=OP.check_batched_gradgrad,
            check_fwd_over_rev=OP.supports_fwgrad_bwgrad,
        )


@by_dtype
def test_vmap(dtype, own):
    """Over inputs, over targets, over both; and the gradient of each of a batch."""
    for x, target, arguments in samples(dtype):
        xs, targets = torch.stack([x, x.flip(0), -x]), torch.stack([target, target.flip(0), target])
        for in_dims in ((0, 0), (0, None), (None, 0)):
            inputs = xs if in_dims[0] == 0 else x, targets if in_dims[1] == 0 else target
            for make in (lambda f: f, torch.func.grad):

                def function(f, x, target, arguments=arguments):
                    return f(x, target, **arguments).sum()

                ours, stock = (
                    torch.func.vmap(make(lambda x, t, f=f: function(f, x, t)), in_dims)  # noqa: B023
                    for f in (cross_entropy, F.cross_entropy)
                )
                assert torch.equal(ours(*inputs), stock(*inputs))
                if dtype.itemsize == 2:  # stock's own batched sum cancels: nothing to compare
                    continue
                one_by_one = torch.stack(
                    [
                        make(lambda x, t: function(cross_entropy, x, t))(  # noqa: B023
                            inputs[0][i] if in_dims[0] == 0 else x,
                            inputs[1][i] if in_dims[1] == 0 else target,
                        )
                        for i in range(3)
                    ]
                )
                torch.testing.assert_close(ours(*inputs), one_by_one)


@by_dtype
def test_forward_mode(dtype, own):
    """torch.func.jvp and dual numbers: stock's tangents, which are the gradients', not zeros."""
    for x, target, arguments in samples(dtype):
        tangent = torch.randn_like(x)

        def pushed(f, x=x, target=target, arguments=arguments, tangent=tangent):
            return torch.func.jvp(lambda x: f(x, target, **arguments), (x,), (tangent,))[1]

        wanted = pushed(F.cross_entropy)
        assert torch.equal(pushed(cross_entropy), wanted)
        with forward_ad.dual_level():
            dual = cross_entropy(forward_ad.make_dual(x, tangent), target, **arguments)
            assert torch.equal(forward_ad.unpack_dual(dual).tangent, wanted)
        if dtype == torch.float64:
            leaf = x.clone().requires_grad_()
            loss = cross_entropy(leaf, target, **arguments).sum()
            gradient = torch.autograd.grad(loss, leaf)[0]
            torch.testing.assert_close(pushed(cross_entropy).sum(), (gradient * tangent).sum())


@by_dtype
def test_compile(dtype, own):
    pool = Pool()
    for x, target, arguments in samples(dtype, requires_grad=True):
        torch._dynamo.reset()
        compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
        for _ in range(3):  # the same graph
            pool.add(compiled, F.cross_entropy, x, target, **arguments)
            with torch.no_grad():
                x.copy_(torch.randn_like(x))
    pool.check()
    torch._dynamo.reset()


# -------------------------------------------------------------------------------------- ModuleInfo


def module_cases(dtype, requires_grad=True, training=True):
    """(description, ours, stock's, input, target): the modules with the same settings."""
    cases = MODULE.module_inputs_func(
        MODULE, "cpu", dtype, requires_grad=requires_grad, training=training
    )
    assert len(cases) >= 80
    for case in cases:
        made = case.constructor_input
        modules = [
            module(*made.args, **made.kwargs)
            for module in (dlkernels.nn.CrossEntropyLoss, torch.nn.CrossEntropyLoss)
        ]
        x, target = case.forward_input.args
        # Softmax of an input with a gradient: no leaf.
        yield case.desc, *modules, x.detach().requires_grad_(requires_grad), target.detach()


def settings_of(module):
    names = ("weight", "ignore_index", "reduction", "label_smoothing")
    return {name: getattr(module, name) for name in names}


def called(module):
    """A module as a function: its settings, which float64 is given, it holds itself."""
    return lambda x, target, **settings: module(x, target)


def noncontiguous(x):
    """The values of x, every second of memory."""
    wide = x.detach().repeat_interleave(2, -1)[..., ::2]
    return wide.requires_grad_(x.requires_grad)


LAYOUTS = {
    "contiguous": lambda x: x,
    "noncontiguous": noncontiguous,
    "channels_last": lambda x: (
        x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        if x.dim() == 4
        else x
    ),
}


@by_module_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_modules(layout, dtype, own, poisoned):
    """Forward and gradient, training and evaluating, of every case and layout."""
    pool = Pool()
    for _, training in itertools.product(range(2), (True, False)):
        for _, ours, stock, x, target in module_cases(dtype, training=training):
            ours.train(training), stock.train(training)
            assert repr(ours) == repr(stock) and ours.training == stock.training
            x = LAYOUTS[layout](x)
            settings = settings_of(stock)

            pool.add(called(ours), called(stock), x, target, **settings)
    pool.check()
    assert not MODULE.train_and_eval_differ and not MODULE.module_memformat_affects_out


def test_modules_gradcheck(own):
    for desc, ours, _, x, target in module_cases(torch.float64):
        # More pixels have the same settings; of ignored rows alone the mean is NaN.
        if x.numel() > 60 or (target == ours.ignore_index).all():
            continue
        assert gradcheck(lambda x: ours(x, target), x), desc  # noqa: B023
        assert gradgradcheck(lambda x: ours(x, target), x), desc  # noqa: B023


def same(a, b, desc):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=desc)


@by_module_dtype
def test_modules_are_saved_and_copied(dtype, own):
    """state_dict there and back, pickle and deepcopy: the same bits from every case."""
    for desc, ours, stock, x, target in module_cases(dtype):
        assert list(ours.state_dict()) == list(stock.state_dict()), desc
        wanted = ours(x, target)  # NaN where the case has ignored rows alone
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        for again in (torch.load(buffer, weights_only=False), copy.deepcopy(ours)):
            assert type(again) is type(ours) and vars(again).keys() == vars(ours).keys()
            same(again(x, target), wanted, desc)
        if stock.weight is not None:
            stock.weight = torch.zeros_like(stock.weight)
        stock.load_state_dict(ours.state_dict())
        ours.load_state_dict(stock.state_dict())
        same(ours(x, target), wanted, desc)


@by_module_dtype
def test_module_errors(dtype, own):
    cases = MODULE.module_error_inputs_func(MODULE, "cpu", dtype, requires_grad=True, training=True)
    assert len(cases) >= 7
    for case in cases:
        made, called = (
            case.module_error_input.constructor_input,
            case.module_error_input.forward_input,
        )
        ours = dlkernels.nn.CrossEntropyLoss(*made.args, **made.kwargs)
        with pytest.raises(case.error_type, match=case.error_regex):
            ours(*called.args, **called.kwargs)


# -------------------------------------------------------------------------------- OpInfo of linear


class LinearPool(Pool):
    names = "output", "grad input", "grad weight", "grad bias"
    exact = staticmethod(F.linear)

    def upstream(self, inputs):
        return torch.randn(F.linear(*inputs).shape, dtype=torch.float64)


def linear_samples(dtype, requires_grad=False):
    """[input, weight] or [input, weight, bias] of each sample."""
    drawn = [*LINEAR.sample_inputs("cpu", dtype, requires_grad=requires_grad)]
    assert len(drawn) >= 18 and not any(s.kwargs for s in drawn)
    return [[s.input, *s.args] for s in drawn]


@by_linear_dtype
@pytest.mark.parametrize("requires_grad", [False, True])
def test_linear_forward_and_gradients(dtype, requires_grad, own, poisoned):
    """Our kernels take every sample: "own" refuses none."""
    pool = LinearPool()
    for _ in range(DRAWS):
        for inputs in linear_samples(dtype, requires_grad):
            with dlkernels.config.recording() as choices:
                pool.add(linear, F.linear, *inputs)
            assert [choice.kernel for choice in choices] == [dlkernels.config.owner("cpu")]
    pool.check()
    assert list(pool.results) == list(pool.names[: 1 + 3 * requires_grad])


@by_linear_dtype
@pytest.mark.parametrize("wanted", [0, 1])
def test_linear_gradient_of_one_input_alone(wanted, dtype, own, poisoned):
    pool = LinearPool()
    for _ in range(DRAWS):
        for inputs in linear_samples(dtype):
            inputs[wanted].requires_grad_()
            pool.add(linear, F.linear, *inputs)
    pool.check()


@by_linear_dtype
def test_references_of_linear(dtype, own):
    pool = LinearPool()
    for _ in range(DRAWS):
        for sample in LINEAR.reference_inputs("cpu", dtype):
            pool.add(linear, F.linear, sample.input, *sample.args)
    pool.check()


@by_linear_dtype
def test_linear_noncontiguous(dtype, own, poisoned):
    pool, strided = LinearPool(), 0
    for _ in range(DRAWS):
        for sample in LINEAR.sample_inputs("cpu", dtype, requires_grad=True):
            other = sample.noncontiguous()
            strided += not (other.input.is_contiguous() and other.args[0].is_contiguous())
            pool.add(linear, F.linear, other.input, *other.args)
    assert strided >= 12 * DRAWS
    pool.check()


@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
def test_linear_of_complex_and_integers_is_stocks(dtype):
    for inputs in linear_samples(dtype):
        dlkernels.config.kernels = "auto"
        assert torch.equal(linear(*inputs), F.linear(*inputs))
        dlkernels.config.kernels = "own"
        with pytest.raises(NotImplementedError, match=f"no kernel for {dtype}"):
            linear(*inputs)


def broken_linear(x, weight, bias=None):
    """(what is wrong, inputs), made from a good sample."""
    yield "features", [torch.cat([x, x], -1), weight, bias]
    yield "weight dtype", [x, weight.to(torch.complex64), bias]
    yield "weight rank", [x, weight[None], bias]
    yield "scalar", [x.sum(), weight, bias]
    if bias is not None and x.dim() == 2 and len(x) > 0:
        yield "bias size", [x, weight, torch.cat([bias, bias])]
        yield "bias dtype", [x, weight, bias.to(torch.complex64)]


@by_linear_dtype
def test_linear_refusals(dtype, own):
    """The OpInfo has no error inputs (with its first ones, this test asks for them): good samples,
    broken in one place, are refused with the type and the words of stock."""
    assert LINEAR.error_inputs_func is None
    seen = set()
    for sample in linear_samples(dtype):
        for what, inputs in broken_linear(*sample):
            with pytest.raises(Exception) as stock:  # noqa: B017  whatever it is, ours is the same
                F.linear(*inputs)
            with pytest.raises(stock.type) as ours:
                linear(*inputs)
            assert str(ours.value).splitlines()[0] == str(stock.value).splitlines()[0], what
            seen.add(what)
    assert len(seen) == 6


def test_linear_gradcheck(own):
    for inputs in linear_samples(torch.float64, requires_grad=True):
        assert gradcheck(
            linear,
            inputs,
            check_forward_ad=LINEAR.supports_forward_ad,
            check_batched_grad=LINEAR.check_batched_grad,
            check_batched_forward_grad=LINEAR.check_batched_forward_grad,
        )


def test_linear_gradgradcheck(own):
    for inputs in linear_samples(torch.float64, requires_grad=True):
        assert gradgradcheck(
            linear,
            inputs,
            gen_non_contig_grad_outputs=True,
            check_batched_grad=LINEAR.check_batched_gradgrad,
            check_fwd_over_rev=LINEAR.supports_fwgrad_bwgrad,
        )


@by_linear_dtype
def test_linear_vmap(dtype, own):
    """Over inputs, over weights, over both; and the gradient of each of a batch."""
    for x, weight, *bias in linear_samples(dtype):
        xs, weights = torch.stack([x, -x]), torch.stack([weight, weight.flip(0)])
        for in_dims in ((0, 0), (0, None), (None, 0)):
            inputs = [all_ if d == 0 else one for d, all_, one in
                      zip(in_dims, (xs, weights), (x, weight), strict=True)]  # fmt: skip
            for make in (lambda f: f, torch.func.grad):
                ours, stock = (
                    torch.func.vmap(make(lambda x, w, f=f: f(x, w, *bias).sum()), in_dims)  # noqa: B023
                    for f in (linear, F.linear)
                )
                assert torch.equal(ours(*inputs), stock(*inputs))


@by_linear_dtype
def test_linear_forward_mode(dtype, own):
    """torch.func.jvp and dual numbers: stock's tangents, which are not zeros."""
    for x, weight, *bias in linear_samples(dtype):
        tangent = torch.randn_like(weight)

        def pushed(f, x=x, weight=weight, bias=bias, tangent=tangent):
            return torch.func.jvp(lambda w: f(x, w, *bias), (weight,), (tangent,))[1]

        wanted = pushed(F.linear)
        assert torch.equal(pushed(linear), wanted) and (x.numel() == 0 or wanted.any())
        with forward_ad.dual_level():
            dual = linear(x, forward_ad.make_dual(weight, tangent), *bias)
            assert torch.equal(forward_ad.unpack_dual(dual).tangent, wanted)


@by_linear_dtype
def test_linear_compile(dtype, own):
    pool = LinearPool()
    for inputs in linear_samples(dtype, requires_grad=True)[::3]:
        torch._dynamo.reset()
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
        for _ in range(2):  # the same graph
            pool.add(compiled, F.linear, *inputs)
            with torch.no_grad():
                inputs[0].copy_(torch.randn_like(inputs[0]))
    pool.check()
    torch._dynamo.reset()


# ---------------------------------------------------------------------------- ModuleInfo of Linear


def linear_modules(dtype, requires_grad=True, training=True):
    """(description, ours, stock's, input, reference): the modules with the same parameters."""
    cases = LINEAR_MODULE.module_inputs_func(
        LINEAR_MODULE, "cpu", dtype, requires_grad=requires_grad, training=training
    )
    assert len(cases) >= 3
    for case in cases:
        made = case.constructor_input
        ours, stock = (
            module(*made.args, **made.kwargs, dtype=dtype)
            for module in (dlkernels.nn.Linear, torch.nn.Linear)
        )
        stock.load_state_dict(ours.state_dict())
        given = case.forward_input
        (x,) = [*given.args, *given.kwargs.values()]
        yield case.desc, ours, stock, x.detach().requires_grad_(requires_grad), case.reference_fn


def with_own_parameters(module):
    """A module as a function of its parameters too, which float64 is given instead."""
    return lambda x, *parameters: torch.func.functional_call(
        module, dict(zip(dict(module.named_parameters()), parameters, strict=True)), (x,)
    )


@by_linear_module_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_modules(layout, dtype, own, poisoned):
    """Forward and gradients, training and evaluating, of every case and layout."""
    pool = LinearPool()
    for _, training in itertools.product(range(8), (True, False)):
        for desc, ours, stock, x, reference in linear_modules(dtype, training=training):
            ours.train(training), stock.train(training)
            assert repr(ours) == repr(stock) and ours.training == stock.training
            x = LAYOUTS[layout](x)
            parameters = [*ours.parameters()]
            functions = [with_own_parameters(module) for module in (ours, stock)]
            pool.add(*functions, x, *parameters)
            if dtype == torch.float64:
                torch.testing.assert_close(ours(x), reference(ours, x), msg=desc)
    pool.check()
    assert (
        not LINEAR_MODULE.train_and_eval_differ and not LINEAR_MODULE.module_memformat_affects_out
    )


def test_linear_modules_gradcheck(own):
    for desc, ours, _, x, _ in linear_modules(torch.float64):
        inputs = (x, *ours.parameters())
        assert gradcheck(with_own_parameters(ours), inputs), desc
        assert gradgradcheck(with_own_parameters(ours), inputs), desc


@by_linear_module_dtype
def test_linear_modules_are_saved_and_copied(dtype, own):
    """state_dict there and back, pickle and deepcopy: the same bits from every case."""
    for desc, ours, stock, x, _ in linear_modules(dtype):
        assert list(ours.state_dict()) == list(stock.state_dict()), desc
        wanted = ours(x)
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        for again in (torch.load(buffer, weights_only=False), copy.deepcopy(ours)):
            assert type(again) is type(ours) and vars(again).keys() == vars(ours).keys()
            same(again(x), wanted, desc)
        stock.reset_parameters()
        stock.load_state_dict(ours.state_dict())
        ours.load_state_dict(stock.state_dict())
        same(ours(x), wanted, desc)


def test_linear_has_no_error_cases_of_torchs():
    """With its first ones, this test asks for them."""
    assert LINEAR_MODULE.module_error_inputs_func is None
