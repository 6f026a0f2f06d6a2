"""The convolution of images with an activation in its epilogue, and its transpose.

For input x (N, C, H, W), weight w (K, C/groups, R, S) and bias b (K), with * over each group::

    y[n, k, p, q] = f(b[k] + Σ_crs x[n, c, p·stride − padding + r·dilation, …] · w[k, c, r, s])
    d = dL/dy · f'                 f and f' as of linear: f' follows from y
    dL/dx = the transpose of * with w, of d
    dL/dw = Σ_npq d · x            dL/db = Σ_npq d

``conv_transpose2d`` is the dL/dx of the convolution that its weight and settings describe; so its
own dL/dx is a convolution, and its dL/dw that convolution's with x and d changed about.

Raw ops: ``conv2d_forward``, ``conv2d_backward`` for those of the three gradients that are wanted,
and the same of the transpose. The host entry of each chooses by shape between our algorithms and
torch's own; ``conv2d_algorithm`` says which. An output is channels_last if the input or the weight
is, the gradient of each has that one's format. ``exact``: no algorithm that rounds more than a sum
of products. ``own``: an algorithm of ours wherever there is one.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dlkernels import config
from dlkernels.ops.common import (
    ACTIVATIONS,
    DTYPES,
    activation_named,
    active_transform,
    asked_for,
    autocast_dtype,
    before_activation,
    cast,
    empty_gradients,
    empty_image,
    has_kernel,
    is_plain,
    is_torchs,
    keep,
    kept,
    needs_gradient,
    not_differentiable,
    unfit,
    wanted_ones,
)

_OP, _TRANSPOSE = "conv2d", "conv_transpose2d"

# Below this many multiply-adds stock is done before our way through Python to a kernel of ours, of
# 25 µs more than its own forward and 100 with a gradient. A compromise, as linear's: at 2^22 stock
# takes 50 to 100 µs.
_SMALL = 2**22
_LARGEST = 2**31 - 1  # stride, padding or dilation that a kernel of ours takes

# ------------------------------------------------------------------------------------------ schemas

_TENSORS = "Tensor input, Tensor weight"
_SETTINGS = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"
_TRANSPOSED = (
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] output_padding, SymInt groups,"
    " SymInt[2] dilation, bool exact, bool own"
)
_WANTED = "bool want_input, bool want_weight, bool want_bias"
_GRADIENTS = "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
_ARGUMENTS = f"{_TENSORS}, Tensor? bias, {_SETTINGS}, str activation, bool exact, bool own"

for _schema in (
    f"conv2d({_ARGUMENTS}) -> Tensor",
    f"conv2d_forward({_ARGUMENTS}) -> Tensor",
    # An unwanted gradient comes back as an empty tensor of shape (0). ``output`` is y, wanted for
    # every activation but "none".
    f"conv2d_backward(Tensor grad_output, {_TENSORS}, Tensor? output, {_SETTINGS},"
    f" str activation, bool exact, bool own, {_WANTED}) -> {_GRADIENTS}",
    f"conv_transpose2d({_TENSORS}, Tensor? bias, {_TRANSPOSED}) -> Tensor",
    f"conv_transpose2d_forward({_TENSORS}, Tensor? bias, {_TRANSPOSED}) -> Tensor",
    f"conv_transpose2d_backward(Tensor grad_output, {_TENSORS}, {_TRANSPOSED}, {_WANTED})"
    f" -> {_GRADIENTS}",
    # What is derived from a weight for the forward, and a forward that reads it instead where the
    # algorithm it takes is the one that it is for. Of shape (0) where nothing is.
    "conv2d_prepare(Tensor weight, SymInt[2] stride, SymInt[2] dilation, SymInt groups) -> Tensor",
    f"conv2d_prepared(Tensor input, Tensor weight, Tensor prepared, Tensor? bias, {_SETTINGS},"
    " str activation, bool exact, bool own) -> Tensor",
    # The algorithms of forward, input gradient and weight gradient: "winograd, aten, direct".
    f"conv2d_algorithm({_ARGUMENTS}) -> str",
):
    torch.library.define(f"dlkernels::{_schema.split('(')[0]}", _schema[_schema.index("(") :])

_ops = torch.ops.dlkernels


def output_size(input, weight, stride, padding, dilation):
    """Height and width of a convolution's output, from the shapes of input and weight."""
    return [
        (input[d - 2] + 2 * padding[d] - dilation[d] * (weight[2 + d] - 1) - 1) // stride[d] + 1
        for d in range(2)
    ]


def _transposed_size(input, weight, stride, padding, output_padding, dilation):
    return [
        (input.shape[2 + d] - 1) * stride[d]
        - 2 * padding[d]
        + dilation[d] * (weight.shape[2 + d] - 1)
        + output_padding[d]
        + 1
        for d in range(2)
    ]


@torch.library.register_fake("dlkernels::conv2d")
@torch.library.register_fake("dlkernels::conv2d_forward")
def _(input, weight, bias, stride, padding, dilation, groups, activation, exact, own):
    size = output_size(input.shape, weight.shape, stride, padding, dilation)
    return empty_image(input, weight, weight.shape[0], size)


@torch.library.register_fake("dlkernels::conv2d_prepare")
def _(weight, stride, dilation, groups):
    size = torch.library.get_ctx().new_dynamic_size()  # the loaded library's to say
    return weight.new_empty(size, dtype=torch.float32)


@torch.library.register_fake("dlkernels::conv2d_prepared")
def _(input, weight, prepared, bias, stride, padding, dilation, groups, activation, exact, own):
    size = output_size(input.shape, weight.shape, stride, padding, dilation)
    return empty_image(input, weight, weight.shape[0], size)


@torch.library.register_fake("dlkernels::conv2d_backward")
def _(
    grad_output, input, weight, output, stride, padding, dilation, groups, activation, exact, own,
    want_input, want_weight, want_bias,
):  # fmt: skip
    channels = weight.shape[0]
    return empty_gradients(input, weight, channels, (want_input, want_weight, want_bias))


@torch.library.register_fake("dlkernels::conv_transpose2d")
@torch.library.register_fake("dlkernels::conv_transpose2d_forward")
def _(input, weight, bias, stride, padding, output_padding, groups, dilation, exact, own):
    size = _transposed_size(input, weight, stride, padding, output_padding, dilation)
    return empty_image(input, weight, weight.shape[1] * groups, size)


@torch.library.register_fake("dlkernels::conv_transpose2d_backward")
def _(
    grad_output, input, weight, stride, padding, output_padding, groups, dilation, exact, own,
    want_input, want_weight, want_bias,
):  # fmt: skip
    channels = weight.shape[1] * groups
    return empty_gradients(input, weight, channels, (want_input, want_weight, want_bias))


# ---------------------------------------------------------------------------------------- reference


def conv2d_reference(input, weight, bias, stride, padding, dilation, groups, activation):
    """The definition, in torch ops: differentiable any number of times."""
    output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return ACTIVATIONS[activation](output)


# ----------------------------------------------------------------------------------------- backward


def _gradients(d, input, weight, transposed, stride, padding, dilation, output_padding, groups, of):
    """The formulas at the head of this file, in torch ops."""
    of_input, of_weight, of_bias = of
    of_input, of_weight, _ = torch.ops.aten.convolution_backward(
        d, input, weight, None, stride, padding, dilation, transposed, output_padding, groups,
        [of_input, of_weight, False],
    )  # fmt: skip
    return of_input, of_weight, d.sum((0, 2, 3)) if of_bias else None


def _backward(ctx, grad_output):
    """The three gradients by the kernel; in torch ops where they are differentiated again."""
    if grad_output is None:
        return None, None, None
    input, weight, output = kept(ctx, grad_output)
    wanted = asked_for(ctx)[:3]
    stride, padding, dilation, groups, activation, *_ = ctx.settings
    if is_torchs(grad_output):
        d = before_activation(grad_output, output, activation)
        return _gradients(
            d, input, weight, False, stride, padding, dilation, (0, 0), groups, wanted
        )
    with torch._C._AutoDispatchBelowAutograd():
        gradients = _ops.conv2d_backward(grad_output, input, weight, output, *ctx.settings, *wanted)
    return wanted_ones(gradients, wanted)


def _backward_of_transpose(ctx, grad_output):
    """The same of conv_transpose2d."""
    if grad_output is None:
        return None, None, None
    input, weight = kept(ctx, grad_output)
    wanted = asked_for(ctx)[:3]
    stride, padding, output_padding, groups, dilation, *_ = ctx.settings
    if is_torchs(grad_output):
        return _gradients(
            grad_output, input, weight, True, stride, padding, dilation, output_padding, groups,
            wanted,
        )  # fmt: skip
    with torch._C._AutoDispatchBelowAutograd():
        gradients = _ops.conv_transpose2d_backward(
            grad_output, input, weight, *ctx.settings, *wanted
        )
    return wanted_ones(gradients, wanted)


def _forward(*arguments):
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.conv2d_forward(*arguments)


def prepare(weight, stride, dilation, groups):
    """What ``conv2d`` takes as ``prepared`` for this weight; None where there is no such thing."""
    pairs = _pair(stride, 1), _pair(dilation, 1)
    if None in pairs or unfit((weight,)) or weight.dtype not in DTYPES or weight.dim() != 4:
        return None
    if weight.numel() == 0 or not has_kernel("conv2d_prepare", weight.device.type):
        return None
    with torch._C._AutoDispatchBelowAutograd():
        made = _ops.conv2d_prepare(weight, *pairs, groups)
    return made if made.numel() else None


def _forward_of_transpose(*arguments):
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.conv_transpose2d_forward(*arguments)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, *settings):
        output = _forward(input, weight, bias, *settings)
        ctx.settings = settings
        keep(ctx, input, weight, output if settings[4] != "none" else None)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        return *_backward(ctx, grad_output), *(None,) * len(ctx.settings)


class _ConvTranspose2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, *settings):
        output = _forward_of_transpose(input, weight, bias, *settings)
        ctx.settings = settings
        keep(ctx, input, weight)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        return *_backward_of_transpose(ctx, grad_output), *(None,) * len(ctx.settings)


# The public ops: functional, for export, opcheck and compile.


def _setup_context(ctx, inputs, output):
    input, weight, _, *ctx.settings = inputs
    keep(ctx, input, weight, output if ctx.settings[4] != "none" else None)


def _backward_of_op(ctx, grad_output):
    return *_backward(ctx, grad_output), *(None,) * len(ctx.settings)


def _setup_context_of_transpose(ctx, inputs, output):
    input, weight, _, *ctx.settings = inputs
    keep(ctx, input, weight)


def _backward_of_transposed_op(ctx, grad_output):
    return *_backward_of_transpose(ctx, grad_output), *(None,) * len(ctx.settings)


torch.library.register_autograd("dlkernels::conv2d", _backward_of_op, setup_context=_setup_context)
torch.library.register_autograd(
    "dlkernels::conv_transpose2d",
    _backward_of_transposed_op,
    setup_context=_setup_context_of_transpose,
)

not_differentiable(_OP, "conv2d_forward", "conv2d_prepare", "conv2d_prepared", "conv2d_backward")
not_differentiable(_TRANSPOSE, "conv_transpose2d_forward", "conv_transpose2d_backward")


# ------------------------------------------------------------------------------------------- choice


@torch.compiler.assume_constant_result
def is_exact(device):
    """Whether the user wants a sum of products, and nothing that rounds more."""
    backend = "cuda" if device == "cuda" else "mkldnn"
    precision = torch._C._get_fp32_precision_getter(backend, "conv")  # of the parents, if unset
    return precision == "ieee" or not config.allows_winograd()


def _pair(value, least):
    """One number or two as a pair, none below ``least``; None for what torch refuses, or reads in a
    way of its own."""
    if type(value) is not tuple or len(value) != 2:
        value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        if len(value) == 1:
            value = (*value, *value)
        if len(value) != 2:
            return None
    for number in value:
        if type(number) is not int and not isinstance(number, torch.SymInt):
            return None
        if not least <= number <= _LARGEST:
            return None
    return value


def _same(padding, kernel, stride, dilation):
    """A padding in words as (pair, (columns, rows) more behind the image); None for an unknown."""
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding != "same" or stride != (1, 1):
        return None
    total = [dilation[d] * (kernel[d] - 1) for d in range(2)]
    return (total[0] // 2, total[1] // 2), (total[1] % 2, total[0] % 2)


def _refusal(input, weight, bias, groups, transposed):
    """Why our kernels do not take these tensors: torch refuses them, or only torch can."""
    if input is None or weight is None:
        return "no tensor"
    if reason := unfit((input, weight, bias)):
        return reason
    device = input.device.type
    if not has_kernel("conv2d_forward", device):
        return f"no kernel for device {device}"
    dtype = autocast_dtype(input, device)
    if dtype not in DTYPES:
        return f"no kernel for {dtype}"
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != dtype and autocast_dtype(tensor, device) != dtype:
            return f"{name} of {tensor.dtype} beside input of {input.dtype}"
    shape, kernel = input.shape, weight.shape
    if len(kernel) != 4 or len(shape) not in (3, 4):
        return f"weight of shape {tuple(kernel)} for input of {tuple(shape)}"
    if 0 in kernel or shape[-3] == 0 or shape[-2] == 0 or shape[-1] == 0:
        return "an empty image or kernel"
    if type(groups) is not int and not isinstance(groups, torch.SymInt):
        return f"groups={groups}"
    first, second = kernel[0], kernel[1] * groups
    channels, outputs = (first, second) if transposed else (second, first)
    if groups < 1 or first % groups:
        return f"groups={groups} for weight of shape {tuple(kernel)}"
    if shape[-3] != channels:
        return f"weight of shape {tuple(kernel)} for input of {tuple(shape)}"
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != outputs):
        return f"bias of shape {tuple(bias.shape)} for weight of {tuple(kernel)}"
    return None


_NO_PAIR = "a stride, padding or dilation that is not two numbers in range"


def settings_of(input, weight, bias, stride, padding, dilation, groups):
    """(why no kernel of ours takes these arguments, (stride, padding, dilation, groups), what more
    padding there is behind the image)."""
    if reason := _refusal(input, weight, bias, groups, transposed=False):
        return reason, None, None
    stride, dilation, behind = _pair(stride, 1), _pair(dilation, 1), (0, 0)
    if stride is None or dilation is None:
        return _NO_PAIR, None, None
    _, _, rows, columns = weight.shape
    if isinstance(padding, str):
        padding, behind = _same(padding, (rows, columns), stride, dilation) or (None, None)
    else:
        padding = _pair(padding, 0)
    if padding is None:
        return _NO_PAIR, None, None
    *_, height, width = input.shape
    if height + 2 * padding[0] + behind[1] <= dilation[0] * (rows - 1) or width + 2 * padding[
        1
    ] + behind[0] <= dilation[1] * (columns - 1):
        return f"input of {tuple(input.shape)} below the kernel's size", None, None
    return None, (stride, padding, dilation, groups), behind


def _settings_of_transpose(input, weight, bias, stride, padding, output_padding, groups, dilation):
    """(why no kernel of ours takes these arguments, (stride, padding, output_padding, groups,
    dilation), the size of the output)."""
    if reason := _refusal(input, weight, bias, groups, transposed=True):
        return reason, None, None
    stride, dilation = _pair(stride, 1), _pair(dilation, 1)
    padding, output_padding = _pair(padding, 0), _pair(output_padding, 0)
    if None in (stride, dilation, padding, output_padding):
        return _NO_PAIR, None, None
    if output_padding[0] >= stride[0] or output_padding[1] >= stride[1]:
        return "an output_padding that is not below the stride", None, None
    image = input if input.dim() == 4 else input.unsqueeze(0)
    size = _transposed_size(image, weight, stride, padding, output_padding, dilation)
    if size[0] < 1 or size[1] < 1:
        return f"input of {tuple(input.shape)} below the padding's size", None, None
    return None, (stride, padding, output_padding, groups, dilation), size


def is_small(input, weight, stride, transposed=False, least=None):
    """Whether stock would be done before our way through Python. A traced size is not asked."""
    if config.forced() != "auto" or torch.compiler.is_compiling():
        return False
    if not (is_plain(input) and is_plain(weight) and input.is_cpu and input.dim() >= 3):
        return False
    # Of N·C·H·W and K·C·R·S; of the transpose the first has as many channels too.
    channels = input.shape[-3]
    work = input.numel() * weight.numel()
    if not transposed and (type(stride) is not int or stride != 1):
        pair = _pair(stride, 1) or (1, 1)
        work //= pair[0] * pair[1]
    return work < (_SMALL if least is None else least) * channels


_DIRECTIONS = ("forward", "input gradient", "weight gradient")


def _algorithms(input, weight, *settings):
    image = input if input.dim() == 4 else input.unsqueeze(0)
    return _ops.conv2d_algorithm(image, weight, None, *settings).split(", ")


# Key of a call -> whether torch does all of it. To ask takes 60 µs, a key 4.
_torchs: dict[tuple, bool] = {}
_MOST_KEYS = 4096
_REAL = (Tensor, torch.nn.Parameter)


def _key(op, input, weight, *settings):
    """What the choice depends on; None where it is not to be remembered: somebody traces, listens,
    or has forced it."""
    if torch.compiler.is_compiling() or config.forced() != "auto" or config.is_recording():
        return None
    if type(input) not in _REAL or type(weight) not in _REAL:
        return None
    if torch._C._len_torch_dispatch_stack() or active_transform():
        return None
    device, graded = input.device, torch.is_grad_enabled()
    if device.type not in config.libraries:
        return None
    key = (
        op, input.shape, input.stride(), input.dtype, device, weight.shape, weight.stride(),
        graded and input.requires_grad, graded and weight.requires_grad,
        torch.is_autocast_enabled(device.type), is_exact(device.type), *settings,
    )  # fmt: skip
    try:
        hash(key)
    except TypeError:  # a list for a pair
        return None
    return key


def _remember(key, torchs):
    if key is not None:
        if len(_torchs) >= _MOST_KEYS:
            _torchs.clear()
        _torchs[key] = torchs


def _may_ask(key, own):
    """Whether the algorithms are asked for: they may all be torch's; or somebody wants to know."""
    if torch.compiler.is_compiling():
        return False
    return own or config.is_recording() or (key is not None and key not in _torchs)


def _hand_over(op, algorithms, input, weight, own):
    """Whether torch does all that is asked for. Under "own" an error where it does any of it."""
    graded = torch.is_grad_enabled()
    asked = (True, graded and input.requires_grad, graded and weight.requires_grad)
    torchs = {
        what: algorithm == "aten"
        for what, algorithm, wanted in zip(_DIRECTIONS, algorithms, asked, strict=True)
        if wanted
    }
    if own and any(torchs.values()):
        which = ", ".join(what for what, by_torch in torchs.items() if by_torch)
        raise NotImplementedError(f"{op}: no kernel of ours: torch does the {which}")
    return all(torchs.values())


def _note(op, device, algorithms):
    """Records who does what: a forward by torch is no kernel of ours."""
    if not config.is_recording():
        return
    reason = ", ".join(
        f"{what}: {algorithm}" for what, algorithm in zip(_DIRECTIONS, algorithms, strict=True)
    )
    owner = config.owner("cpu") if device == "cpu" else "triton"
    config.record(op, "stock" if algorithms[0] == "aten" else owner, reason)


def torchs_reason():
    """Why a call is torch's before its arguments are looked at, if it is."""
    if transform := active_transform():
        return transform
    return "dlkernels.config.kernels is 'stock'" if config.forced() == "stock" else None


def refused(op, reason, stocks):
    """The call that our kernels do not take, by torch: ``stocks()``. Bad input is its to refuse."""
    if config.forced() == "own":
        stocks()
        raise NotImplementedError(f"{op}: no kernel of ours: {reason}")
    return stocks()


# ------------------------------------------------------------------------------------------- public


def run_kernel(public, function, raw, input, weight, bias, *settings):
    """The output of a kernel for batches, with a derivative where one is needed: by the public op
    while compiling, by an autograd.Function, or by the raw op."""
    batched = input.dim() == 4
    if not batched:
        input = input.unsqueeze(0)
    if torch.compiler.is_compiling():
        output = public(input, weight, bias, *settings)
    elif needs_gradient(input, weight, bias):
        output = function.apply(input, weight, bias, *settings)
    else:
        output = raw(input, weight, bias, *settings)
    return output if batched else output.squeeze(0)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    prepared: Tensor | None = None,
) -> Tensor:
    """``torch.nn.functional.conv2d``, and an activation with it where one is named.

    Args:
        input: (N, C, H, W) or (C, H, W), in any strides; channels_last is the fast layout. float32,
            float64, bfloat16 or float16, computed in float32 (float64 for float64).
        weight: (K, C / groups, R, S), of the input's dtype, in any strides.
        bias: (K), of the input's dtype.
        stride, dilation: a number, or one for rows and one for columns.
        padding: likewise; or ``"valid"``, or ``"same"``, for a stride of 1 alone.
        groups: into how many groups the channels of input and output are cut.
        activation: None, ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"tanh"`` or ``"sigmoid"``:
            applied before the output is rounded and written.
        prepared: what a frozen module keeps of this weight, read in its place where no gradient is
            needed.

    Returns:
        (N, K, P, Q) or (K, P, Q), channels_last if input or weight is, of the input's dtype; under
        autocast, of autocast's. In float32 a 3×3 convolution of stride 1 may be off by up to 4
        times the error of a sum of products (5 in the weight's gradient) unless
        ``torch.backends.mkldnn.conv.fp32_precision`` is ``"ieee"`` or ``dlkernels.config.winograd``
        ``"off"``: errors are relative to the largest value of a tile of 6×6 pixels, and an infinity
        makes all outputs of its tiles NaN.

    Raises:
        What torch raises, with its words: RuntimeError for shapes and dtypes, TypeError for no
        tensor. ValueError for another activation. NotImplementedError under
        ``dlkernels.config.kernels = "own"``, where there is no kernel of ours.
    """
    activation = activation_named(_OP, activation)
    torchs = "stock" if activation == "none" else "reference"

    def stocks():
        return conv2d_reference(input, weight, bias, stride, padding, dilation, groups, activation)

    key = None
    if activation == "none":
        key = _key(_OP, input, weight, stride, padding, dilation, groups)
        if _torchs.get(key):
            return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if is_small(input, weight, stride):
        if config.is_recording():
            config.record(_OP, torchs, "too small for our call overhead")
        _remember(key, True)
        return stocks()
    if reason := torchs_reason():
        config.record(_OP, torchs, reason)
        return stocks()
    reason, settings, behind = settings_of(input, weight, bias, stride, padding, dilation, groups)
    if reason is not None:
        config.record(_OP, torchs, reason)
        return refused(_OP, reason, stocks)
    arguments = input, weight, bias, stride, padding, dilation, groups
    if behind != (0, 0):
        input = F.pad(input, (0, behind[0], 0, behind[1]))
    given = weight
    input, weight, bias = cast(input, weight, bias)
    device = input.device.type
    own = config.forced() == "own"
    settings = (*settings, activation, is_exact(device), own)
    if _may_ask(key, own):
        algorithms = _algorithms(input, weight, *settings)
        all_by_torch = _hand_over(_OP, algorithms, input, weight, own)
        _note(_OP, device, algorithms)
        _remember(key, all_by_torch)
        if all_by_torch and activation == "none":  # without our way around it
            return F.conv2d(*arguments)
    forward = _forward
    if prepared is not None and weight is given:

        def forward(input, weight, *others):
            with torch._C._AutoDispatchBelowAutograd():
                return _ops.conv2d_prepared(input, weight, prepared, *others)

    return run_kernel(_ops.conv2d, _Conv2d, forward, input, weight, bias, *settings)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    output_padding: int | tuple[int, int] = 0,
    groups: int = 1,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """``torch.nn.functional.conv_transpose2d``: the input gradient of a convolution, as an op.

    Args:
        input: (N, C, H, W) or (C, H, W), in any strides and dtype that ``conv2d`` takes.
        weight: (C, K / groups, R, S), of the input's dtype, in any strides.
        bias: (K), of the input's dtype.
        stride, padding, dilation: those of the convolution; numbers or pairs.
        output_padding: rows and columns more, below the stride (or the dilation, which is stock's).
        groups: into how many groups the channels of input and output are cut.

    Returns:
        (N, K, (H − 1)·stride − 2·padding + dilation·(R − 1) + output_padding + 1, …) or without N,
        in the format, dtype and precision of ``conv2d``.

    Raises:
        What torch raises, with its words; NotImplementedError as ``conv2d``.
    """

    def stocks():
        return F.conv_transpose2d(
            input, weight, bias, stride, padding, output_padding, groups, dilation
        )

    key = _key(_TRANSPOSE, input, weight, stride, padding, output_padding, groups, dilation)
    if _torchs.get(key):
        return stocks()
    if is_small(input, weight, stride, transposed=True):
        if config.is_recording():
            config.record(_TRANSPOSE, "stock", "too small for our call overhead")
        _remember(key, True)
        return stocks()
    if reason := torchs_reason():
        config.record(_TRANSPOSE, "stock", reason)
        return stocks()
    reason, settings, size = _settings_of_transpose(
        input, weight, bias, stride, padding, output_padding, groups, dilation
    )
    if reason is not None:
        config.record(_TRANSPOSE, "stock", reason)
        return refused(_TRANSPOSE, reason, stocks)
    arguments = input, weight, bias, stride, padding, output_padding, groups, dilation
    input, weight, bias = cast(input, weight, bias)
    device = input.device.type
    own, exact = config.forced() == "own", is_exact(device)
    if _may_ask(key, own):
        # As the convolution of an image of the output's size: its gradient is our forward.
        stride, padding, _, groups, dilation = settings
        batch = input if input.dim() == 4 else input.unsqueeze(0)
        image = empty_image(batch, weight, weight.shape[1] * groups, size)
        gradient, forward, of_weight = _algorithms(
            image, weight, stride, padding, dilation, groups, "none", exact, own
        )
        algorithms = forward, gradient, of_weight
        all_by_torch = _hand_over(_TRANSPOSE, algorithms, input, weight, own)
        _note(_TRANSPOSE, device, algorithms)
        _remember(key, all_by_torch)
        if all_by_torch:
            return F.conv_transpose2d(*arguments)
    return run_kernel(
        _ops.conv_transpose2d,
        _ConvTranspose2d,
        _forward_of_transpose,
        input,
        weight,
        bias,
        *settings,
        exact,
        own,
    )
