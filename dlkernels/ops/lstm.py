"""The LSTM, the GRU and the RNN: whole sequences, and their cells.

For the input x of a step and the state h before it, with σ the sigmoid and * elementwise::

    lstm    i, f, g, o = σ, σ, tanh, σ of W_ih·x + b_ih + W_hh·h + b_hh
            c' = f*c + i*g,  h' = o*tanh(c'), or W_hr·(o*tanh(c')) with a projection
    gru     r, z = σ of W_ih·x + b_ih + W_hh·h + b_hh
            n = tanh(W_in·x + b_in + r*m), m = W_hn·h + b_hn,  h' = n + z*(h - n)
    rnn     h' = tanh or relu of W_ih·x + b_ih + W_hh·h + b_hh

and, from the last step to the first, with δ the gradient of what σ, tanh or relu is taken of::

    lstm    dc' = dc + dh'*o*(1 - tanh²c'),  δ_i = dc'*g*i*(1-i),  δ_f = dc'*c*f*(1-f)
            δ_g = dc'*i*(1-g²),  δ_o = dh'*tanh(c')*o*(1-o),  dc = dc'*f
    gru     δ_n = dh'*(1-z)*(1-n²),  δ_z = dh'*(h-n)*z*(1-z),  δ_r = δ_n*m*r*(1-r)
            in place of δ_n it is δ_n*r for W_hn, b_hn and dh, to which dh'*z is added
    all     dh = W_hhᵀ·δ,  dx = W_ihᵀ·δ,  dW_ih = Σ δ·xᵀ,  dW_hh = Σ δ·hᵀ,  db = Σ δ

Raw ops, of ONE layer with all its directions. H is the hidden size, P that of h (H without a
projection), D the directions, S the rows of all steps:

``lstm_forward``        of the input (T, B, I), or with ``batch_sizes`` packed (S, I), of hx
                        (D, B, P) and cx (D, B, H): the output (T, B, D·P) or (S, D·P), the last
                        states and, with ``save``, what the backward reads: ``gates`` (D, S, 4H),
                        i, f, g, o or r, z, n, m, and ``cells`` (D, S, H), in an order of the
                        kernel's own
``lstm_backward``       the gradients that are wanted
``lstm_cell_forward``   one step: input (B, I), states (B, H), gates (B, 4H)
``lstm_cell_backward``
``lstm_cell_backward_step``     the same without the gradients of the weights, on a CPU: what these
                        follow from goes to rows [row, row + B) of ``grad_gates`` and of ``beside``,
                        where x, its columns filled up, and h lie beside each other
``lstm_cell_backward_weights``  of those rows the gradients of the weights, in the type of sums: put
                        into w_ih, w_hh, b_ih, b_hh, or added to them where they are not ``fresh``

``weights`` are those of each direction: w_ih, w_hh, then b_ih, b_hh if there are biases, then w_hr
of a projection. What is not there comes back as an empty tensor of shape (0). Sums and cell states
are float32 inside a call (float64 for float64); h is rounded to the input's dtype at each step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dlkernels import config
from dlkernels.ops.common import (
    DTYPES,
    active_transform,
    asked_for,
    has_kernel,
    is_torchs,
    needs_gradient,
    not_differentiable,
    unfit,
)

_OP = "lstm"

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_STOCK = {mode: getattr(torch._VF, mode) for mode in GATES}
_STOCK_CELL = {mode: getattr(torch._VF, f"{mode}_cell") for mode in GATES}

# Below this many multiply-adds of a cell stock is done before our way through Python, without and
# with a gradient (benchmarks: "what calling costs"). Whole sequences are ours: stock's own overhead
# is by the step.
_SMALL = {False: 2**20, True: 2**15}

# ------------------------------------------------------------------------------------------ schemas

_STEPS = "Tensor input, Tensor? batch_sizes, Tensor hx"
_CELL = "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh"
_LAST = "Tensor output, Tensor h_n"
_WANTED = "bool want_input, bool want_states, bool want_weights"
_OF_INPUTS = "Tensor grad_input, Tensor grad_hx, Tensor grad_cx"

for _schema in (
    f"lstm_forward({_STEPS}, Tensor? cx, Tensor[] weights, str mode, bool save, bool own)"
    f" -> ({_LAST}, Tensor c_n, Tensor gates, Tensor cells)",
    # An unwanted gradient comes back as an empty tensor of shape (0), those of the weights as none.
    "lstm_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n,"
    f" {_STEPS}, Tensor? cx, Tensor[] weights, Tensor output, Tensor gates, Tensor cells, str mode,"
    f" bool own, {_WANTED}) -> ({_OF_INPUTS}, Tensor[] grad_weights)",
    f"lstm_cell_forward(Tensor input, Tensor hx, Tensor? cx, {_CELL}, str mode, bool save,"
    " bool own) -> (Tensor h, Tensor c, Tensor gates)",
    "lstm_cell_backward(Tensor? grad_h, Tensor? grad_c, Tensor input, Tensor hx, Tensor? cx,"
    f" {_CELL}, Tensor h, Tensor c, Tensor gates, str mode, bool own, {_WANTED})"
    f" -> ({_OF_INPUTS}, Tensor grad_w_ih, Tensor grad_w_hh, Tensor grad_b_ih, Tensor grad_b_hh)",
    # ``kind`` is the mode: torch's tracing of what is written to has arguments called that itself.
    "lstm_cell_backward_step(Tensor? grad_h, Tensor? grad_c, Tensor input, Tensor hx, Tensor? cx,"
    f" {_CELL}, Tensor h, Tensor c, Tensor gates, str kind, bool own, bool want_input,"
    f" bool want_states, Tensor(a!) grad_gates, Tensor(b!) beside, SymInt row) -> ({_OF_INPUTS})",
    "lstm_cell_backward_weights(Tensor grad_gates, Tensor beside, SymInt rows, str kind, bool own,"
    " bool fresh, Tensor(a!) w_ih, Tensor(b!) w_hh, Tensor(c!)? b_ih, Tensor(d!)? b_hh) -> ()",
    # The public ones, with a derivative: what they save is part of the result.
    f"lstm({_STEPS}, Tensor cx, Tensor[] weights, bool own)"
    f" -> ({_LAST}, Tensor c_n, Tensor gates, Tensor cells)",
    f"gru({_STEPS}, Tensor[] weights, bool own) -> ({_LAST}, Tensor gates)",
    f"rnn({_STEPS}, Tensor[] weights, str nonlinearity, bool own) -> ({_LAST})",
    f"lstm_cell(Tensor input, Tensor hx, Tensor cx, {_CELL}, bool own)"
    " -> (Tensor h, Tensor c, Tensor gates)",
    f"gru_cell(Tensor input, Tensor hx, {_CELL}, bool own) -> (Tensor h, Tensor gates)",
    f"rnn_cell(Tensor input, Tensor hx, {_CELL}, str nonlinearity, bool own) -> Tensor",
):
    torch.library.define(f"dlkernels::{_schema.split('(')[0]}", _schema[_schema.index("(") :])

_ops = torch.ops.dlkernels


def _computed(dtype):
    """The dtype of sums and of cell states."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("dlkernels::lstm_forward")
def _(input, batch_sizes, hx, cx, weights, mode, save, own):
    directions, _, size = hx.shape
    hidden = weights[0].shape[0] // GATES[mode]
    steps = input.shape[:-1]
    rows = steps[0] if batch_sizes is not None else steps[0] * steps[1]
    is_lstm, has_gates = mode == "lstm", save and GATES[mode] > 1
    return (
        input.new_empty((*steps, directions * size)),
        input.new_empty(hx.shape),
        input.new_empty(cx.shape if is_lstm else 0),
        input.new_empty((directions, rows, 4 * hidden) if has_gates else 0),
        input.new_empty(
            (directions, rows, hidden) if save and is_lstm else 0, dtype=_computed(input.dtype)
        ),
    )


def _empty_gradients(input, hx, cx, want_input, want_states):
    return (
        input.new_empty(input.shape if want_input else 0),
        input.new_empty(hx.shape if want_states else 0),
        input.new_empty(cx.shape if want_states and cx is not None else 0),
    )


@torch.library.register_fake("dlkernels::lstm_backward")
def _(
    grad_output, grad_h_n, grad_c_n, input, batch_sizes, hx, cx, weights, output, gates, cells,
    mode, own, want_input, want_states, want_weights,
):  # fmt: skip
    return (
        *_empty_gradients(input, hx, cx, want_input, want_states),
        [weight.new_empty(weight.shape) for weight in weights] if want_weights else [],
    )


@torch.library.register_fake("dlkernels::lstm_cell_forward")
def _(input, hx, cx, w_ih, w_hh, b_ih, b_hh, mode, save, own):
    batch, hidden = hx.shape
    has_gates = save and GATES[mode] > 1
    return (
        input.new_empty(hx.shape),
        input.new_empty(hx.shape if mode == "lstm" else 0),
        input.new_empty((batch, 4 * hidden) if has_gates else 0),
    )


@torch.library.register_fake("dlkernels::lstm_cell_backward")
def _(
    grad_h, grad_c, input, hx, cx, w_ih, w_hh, b_ih, b_hh, h, c, gates, mode, own, want_input,
    want_states, want_weights,
):  # fmt: skip
    return (
        *_empty_gradients(input, hx, cx, want_input, want_states),
        *(
            input.new_empty(w.shape if want_weights and w is not None else 0)
            for w in (w_ih, w_hh, b_ih, b_hh)
        ),
    )


@torch.library.register_fake("dlkernels::lstm_cell_backward_step")
def _(
    grad_h, grad_c, input, hx, cx, w_ih, w_hh, b_ih, b_hh, h, c, gates, kind, own, want_input,
    want_states, grad_gates, beside, row,
):  # fmt: skip
    return _empty_gradients(input, hx, cx, want_input, want_states)


@torch.library.register_fake("dlkernels::lstm_cell_backward_weights")
def _(grad_gates, beside, rows, kind, own, fresh, w_ih, w_hh, b_ih, b_hh):
    return None


# --------------------------------------------------------------------------------------- references


class _Weights(NamedTuple):
    """Those of one direction."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None


def _of_directions(weights, directions):
    each = len(weights) // directions
    for at in range(0, len(weights), each):
        some = weights[at : at + each]
        yield _Weights(*some[:2], None, None, some[2]) if each == 3 else _Weights(*some)


def _advance(x, h, c, weights, mode):
    """(h', c') from W_ih·x + b_ih."""
    hidden = F.linear(h, weights.w_hh, weights.b_hh)
    if mode == "lstm":
        i, f, g, o = (x + hidden).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (h if weights.w_hr is None else F.linear(h, weights.w_hr)), c
    if mode == "gru":
        (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, 1), hidden.chunk(3, 1)
        n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
        return n + torch.sigmoid(x_z + h_z) * (h - n), c
    return getattr(torch, mode.removeprefix("rnn_"))(x + hidden), c


def _widened(tensors):
    return [None if x is None else x.to(_computed(x.dtype)) for x in tensors]


def layer_reference(input, batch_sizes, hx, cx, *weights, mode):
    """The definition of a layer, in torch ops: (output, h_n[, c_n]), differentiable any number of
    times."""
    dtype = input.dtype
    input, hx, cx, *weights = _widened((input, hx, cx, *weights))
    if batch_sizes is None:
        rows = [input.shape[1]] * input.shape[0]
    else:
        rows = batch_sizes.tolist()
    outputs, last = [], []
    for d, of_one in enumerate(_of_directions(weights, hx.shape[0])):
        x = F.linear(input, of_one.w_ih, of_one.b_ih)
        x = x.unbind(0) if batch_sizes is None else x.split(rows)
        h, c, steps = hx[d], None if cx is None else cx[d], {}
        for t in reversed(range(len(rows))) if d else range(len(rows)):
            n = rows[t]  # those behind have not begun, or have ended
            new, new_c = _advance(x[t], h[:n], c if c is None else c[:n], of_one, mode)
            h, steps[t] = torch.cat([new, h[n:]]), new
            c = c if c is None else torch.cat([new_c, c[n:]])
        join = torch.stack if batch_sizes is None else torch.cat
        outputs.append(join([steps[t] for t in range(len(rows))]))
        last.append((h, c))
    states = [torch.stack(s).to(dtype) for s in zip(*last, strict=True) if s[0] is not None]
    return torch.cat(outputs, -1).to(dtype), *states


def cell_reference(input, hx, cx, *weights, mode):
    """The definition of a cell, likewise: (h[, c])."""
    dtype = input.dtype
    input, hx, cx, *weights = _widened((input, hx, cx, *weights))
    weights = _Weights(*weights)
    states = _advance(F.linear(input, weights.w_ih, weights.b_ih), hx, cx, weights, mode)
    return tuple(state.to(dtype) for state in states if state is not None)


# ----------------------------------------------------------------------------------------- backward


def _by_torch(function, grads, tensors, wanted):
    """The gradients of ``function(*tensors)``, computed again, in a graph of their own."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: a tensor that depends on another, or is another, counts as itself alone.
        views = [x.view_as(x) if want else x for x, want in zip(tensors, wanted, strict=True)]
        pairs = [(y, g) for y, g in zip(function(*views), grads, strict=True) if g is not None]
        gradients = torch.autograd.grad(
            [y for y, _ in pairs],
            [x for x, want in zip(views, wanted, strict=True) if want],
            [g for _, g in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    gradients = iter(gradients)
    return [next(gradients) if want else None for want in wanted]


def _contiguous(tensors):
    return [x if x is None or x.is_contiguous() else x.contiguous() for x in tensors]


def _save(ctx, mode, own, kept, results, grads):
    """``kept`` and ``results`` are what the backward reads, ``grads`` how many gradients come."""
    ctx.set_materialize_grads(False)
    ctx.settings, ctx.inputs, ctx.grads = (mode, own), len(kept), grads
    ctx.save_for_backward(*kept, *results)


def _layer_backward(ctx, grads, wanted):
    """The gradients of input, hx, cx and weights."""
    if all(g is None for g in grads):
        return [None] * len(wanted)
    (mode, own), saved = ctx.settings, ctx.saved_tensors
    inputs, results = saved[: ctx.inputs], saved[ctx.inputs :]
    batch_sizes, input, hx, cx, *weights = inputs
    if any(map(is_torchs, grads)):
        return _by_torch(
            lambda input, *others: layer_reference(input, batch_sizes, *others, mode=mode),
            grads,
            inputs[1:],
            wanted,
        )
    of_input, of_h, of_c, *of_weights = wanted
    grads = [*_contiguous(grads), *[None] * (3 - len(grads))]
    with torch._C._AutoDispatchBelowAutograd():
        *gradients, grad_weights = _ops.lstm_backward(
            *grads, input, batch_sizes, hx, cx, weights, *results, mode, own,
            of_input, of_h or of_c, any(of_weights),
        )  # fmt: skip
    gradients += grad_weights or [None] * len(weights)
    return [g if want else None for g, want in zip(gradients, wanted, strict=True)]


def _cell_backward(ctx, grads, wanted, owed=None):
    """The gradients of input, hx, cx and the four weights, but for those that are ``owed``."""
    if all(g is None for g in grads):
        return [None] * len(wanted)
    (mode, own), saved = ctx.settings, ctx.saved_tensors
    inputs, results = saved[: ctx.inputs], saved[ctx.inputs :]
    if any(map(is_torchs, grads)):

        def function(*inputs):
            return cell_reference(*inputs, mode=mode)

        return _by_torch(function, grads, inputs, wanted)
    of_input, of_h, of_c, *of_weights = wanted
    grads = [*_contiguous(grads), *[None] * (2 - len(grads))]
    if owed is not None and 2 * inputs[0].shape[0] <= _ROWS and not torch.compiler.is_compiling():
        number = torch._C._current_graph_task_id()
        if number not in owed:
            owed[number] = _Sums(mode, own, inputs[0], inputs[3:])
        gradients = owed[number].step(grads, inputs, results, of_input, of_h or of_c)
        gradients = *gradients, *[None] * len(of_weights)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            gradients = _ops.lstm_cell_backward(
                *grads, *inputs, *results, mode, own, of_input, of_h or of_c, any(of_weights)
            )
    return [g if want else None for g, want in zip(gradients, wanted, strict=True)]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mode, own, batch_sizes, input, hx, cx, *weights):
        with torch._C._AutoDispatchBelowAutograd():
            output, h_n, c_n, gates, cells = _ops.lstm_forward(
                input, batch_sizes, hx, cx, weights, mode, True, own
            )
        kept = batch_sizes, input, hx, cx, *weights
        _save(ctx, mode, own, kept, (output, gates, cells), 3 if mode == "lstm" else 2)
        return (output, h_n, c_n) if mode == "lstm" else (output, h_n)

    @staticmethod
    def backward(ctx, *grads):
        return None, None, None, *_layer_backward(ctx, grads, asked_for(ctx)[3:])


# A loop of cells. With a gradient of the weights for each step autograd would add as many matrices
# of their size as there are steps. A step whose state is that of another step with the same leaves
# as weights gets a token, a tensor without elements, that joins it to one node before the weights,
# _Gather, which autograd reaches after all such steps of a backward pass. Steps are joined to the
# weights themselves as well, for what _Sums does not compute.

_ROWS = 256  # of steps whose part is computed at once


class _Shared:
    """What the steps of a loop share: each holds it, nothing else does. ``owed`` has the sums of
    each backward pass that is under way, by its number; those of one that failed go with the graph.
    """

    def __init__(self, ids, weights):
        self.ids, self.owed = ids, {}
        self.token = _Gather.apply(self.owed, *weights)


def _shared_by(hx, cx, weights):
    """None where no step with these weights is before this one, or they are not all leaves that
    want a gradient."""
    for state in (hx, cx):
        before = getattr(state, "grad_fn", None)
        if type(before) is not _Cell._backward_cls:
            continue
        given = [weight for weight in weights if weight is not None]
        if not all(weight.requires_grad and weight.is_leaf for weight in given):
            return None
        # Nobody else has the ids of leaves to which a graph leads.
        ids, shared = tuple(map(id, given)), getattr(before, "shared", None)
        if shared is not None and shared.ids == ids:
            return shared
        leaves = (getattr(node, "variable", None) for node, _ in before.next_functions[-len(ids) :])
        if ids == tuple(map(id, leaves)):
            return _Shared(ids, weights)
    return None


class _Sums:
    """The gradients of a cell's weights, of the steps of one backward pass: of those whose rows are
    here, and of those before. Rows are copies: inputs and states may change before the weights'
    turn comes."""

    def __init__(self, mode, own, input, weights):
        def rows(columns):
            # An odd number of cache lines: columns are read too.
            line = 64 // input.itemsize
            return input.new_empty(_ROWS, (-(-columns // line) | 1) * line)

        (_, features), (gates, hidden) = weights[0].shape, weights[1].shape
        self.settings, self.used, self.fresh = (mode, own), 0, True
        self.grad_gates = rows(4 * hidden if mode == "gru" else gates)
        # x's columns are filled up to whole vectors of any instruction set.
        self.beside = input.new_empty(_ROWS, -(-features // 16) * 16 + hidden)
        self.sums = [
            w if w is None else w.new_empty(w.shape, dtype=_computed(w.dtype)) for w in weights
        ]

    def step(self, grads, inputs, results, want_input, want_states):
        """The gradients of input, hx and cx of a step."""
        batch = inputs[0].shape[0]
        if self.used + batch > _ROWS:
            self.compute()
        with torch._C._AutoDispatchBelowAutograd():
            gradients = _ops.lstm_cell_backward_step(
                *grads, *inputs, *results, *self.settings, want_input, want_states,
                self.grad_gates, self.beside, self.used,
            )  # fmt: skip
        self.used += batch
        return gradients

    def compute(self):
        with torch._C._AutoDispatchBelowAutograd():
            _ops.lstm_cell_backward_weights(
                self.grad_gates, self.beside, self.used, *self.settings, self.fresh, *self.sums
            )
        self.used, self.fresh = 0, False


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, owed, *weights):
        ctx.set_materialize_grads(False)
        ctx.owed, ctx.dtype = owed, weights[0].dtype
        return weights[0].new_empty(0)

    @staticmethod
    def backward(ctx, _):
        owed = ctx.owed.pop(torch._C._current_graph_task_id(), None)
        if owed is None:
            return None, *(None for _ in ctx.needs_input_grad[1:])
        owed.compute()
        wanted = zip(owed.sums, ctx.needs_input_grad[1:], strict=True)
        return None, *(g.to(ctx.dtype) if want else None for g, want in wanted)


class _Cell(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mode, own, shared, token, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            h, c, gates = _ops.lstm_cell_forward(*inputs, mode, True, own)
        _save(ctx, mode, own, inputs, (h, c, gates), 2 if mode == "lstm" else 1)
        if shared is not None:
            ctx.shared = shared
        return (h, c) if mode == "lstm" else h

    @staticmethod
    def backward(ctx, *grads):
        needs = asked_for(ctx)
        owed = ctx.shared.owed if needs[3] else None
        return None, None, None, None, *_cell_backward(ctx, grads, needs[4:], owed)


# The public ops: functional, for export, opcheck and compile.


def _layer_of(name, arguments):
    """(mode, own, batch_sizes, input, hx, cx, weights) of the arguments of a public op."""
    input, batch_sizes, hx, *rest = arguments
    cx = rest.pop(0) if name == "lstm" else None
    weights, own = rest[0], rest[-1]
    mode = f"rnn_{rest[1]}" if name == "rnn" else name
    return mode, own, batch_sizes, input, hx, cx, weights


def _cell_of(name, arguments):
    """(mode, own, input, hx, cx, w_ih, w_hh, b_ih, b_hh) likewise."""
    input, hx, *rest = arguments
    cx = rest.pop(0) if name == "lstm" else None
    mode = f"rnn_{rest[4]}" if name == "rnn" else name
    return mode, rest[-1], input, hx, cx, *rest[:4]


# Of what the raw ops return, what a public op does.
_RETURNED = {"lstm": (0, 1, 2, 3, 4), "gru": (0, 1, 3), "rnn": (0, 1)}
_RETURNED_OF_CELL = {"lstm": (0, 1, 2), "gru": (0, 2), "rnn": (0,)}


def _register(name):
    def forward(*arguments):
        mode, own, batch_sizes, input, hx, cx, weights = _layer_of(name, arguments)
        results = _ops.lstm_forward(input, batch_sizes, hx, cx, weights, mode, True, own)
        return tuple(results[i] for i in _RETURNED[name])

    def setup_context(ctx, inputs, output):
        mode, own, batch_sizes, input, hx, cx, weights = _layer_of(name, inputs)
        empty = input.new_empty(0)
        results = [empty] * 5
        for i, result in zip(_RETURNED[name], output, strict=True):
            results[i] = result
        states = 3 if name == "lstm" else 2
        ctx.mark_non_differentiable(*output[states:])
        kept = batch_sizes, input, hx, cx, *weights
        _save(ctx, mode, own, kept, (results[0], *results[3:]), states)
        ctx.rest = len(inputs) - (5 if name == "lstm" else 4)

    def backward(ctx, *grads):
        needs = ctx.needs_input_grad
        if name == "lstm":
            of_input, _, of_h, of_c, of_weights, *_ = needs
        else:
            of_input, _, of_h, of_weights, *_ = needs
            of_c = False
        wanted = of_input, of_h, of_c, *of_weights
        g_input, g_h, g_c, *g_weights = _layer_backward(ctx, grads[: ctx.grads], wanted)
        states = (g_h, g_c) if name == "lstm" else (g_h,)
        return g_input, None, *states, g_weights, *(None,) * ctx.rest

    _register_op(name, forward, setup_context, backward)


def _register_cell(name):
    def forward(*arguments):
        mode, own, *inputs = _cell_of(name, arguments)
        results = _ops.lstm_cell_forward(*inputs, mode, True, own)
        results = tuple(results[i] for i in _RETURNED_OF_CELL[name])
        return results[0] if name == "rnn" else results

    def setup_context(ctx, inputs, output):
        mode, own, *kept = _cell_of(name, inputs)
        output = (output,) if name == "rnn" else output
        results = [kept[0].new_empty(0)] * 3
        for i, result in zip(_RETURNED_OF_CELL[name], output, strict=True):
            results[i] = result
        states = 2 if name == "lstm" else 1
        ctx.mark_non_differentiable(*output[states:])
        _save(ctx, mode, own, kept, results, states)
        ctx.rest = len(inputs) - (7 if name == "lstm" else 6)

    def backward(ctx, *grads):
        needs = list(ctx.needs_input_grad[: -ctx.rest])
        if name != "lstm":
            needs.insert(2, False)
        gradients = _cell_backward(ctx, grads[: ctx.grads], needs)
        if name != "lstm":
            gradients.pop(2)
        return *gradients, *(None,) * ctx.rest

    _register_op(f"{name}_cell", forward, setup_context, backward)


def _register_op(name, forward, setup_context, backward):
    torch.library.impl(f"dlkernels::{name}", "CompositeExplicitAutograd", forward)
    torch.library.register_fake(f"dlkernels::{name}", forward)
    torch.library.register_autograd(f"dlkernels::{name}", backward, setup_context=setup_context)


for _name in ("lstm", "gru", "rnn"):
    _register(_name)
    _register_cell(_name)

not_differentiable("lstm", "lstm_forward", "lstm_backward")
not_differentiable("lstm_cell", "lstm_cell_forward", "lstm_cell_backward")
not_differentiable("lstm_cell", "lstm_cell_backward_step", "lstm_cell_backward_weights")


def _below_autograd(raw, *arguments):
    if torch.compiler.is_compiling():
        return raw(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return raw(*arguments)


def _run_layer(mode, own, batch_sizes, input, hx, cx, weights):
    """(output, h_n[, c_n])."""
    if not needs_gradient(input, hx, cx, *weights):
        results = _below_autograd(
            _ops.lstm_forward, input, batch_sizes, hx, cx, weights, mode, False, own
        )
        return results[:3] if mode == "lstm" else results[:2]
    if not torch.compiler.is_compiling():
        return _Layer.apply(mode, own, batch_sizes, input, hx, cx, *weights)
    if mode == "lstm":
        return _ops.lstm(input, batch_sizes, hx, cx, weights, own)[:3]
    if mode == "gru":
        return _ops.gru(input, batch_sizes, hx, weights, own)[:2]
    return _ops.rnn(input, batch_sizes, hx, weights, mode.removeprefix("rnn_"), own)


def _run_cell(mode, own, *inputs):
    """(h, c) of an LSTM, h of the others."""
    if not needs_gradient(*inputs):
        h, c, _ = _below_autograd(_ops.lstm_cell_forward, *inputs, mode, False, own)
        return (h, c) if mode == "lstm" else h
    if not torch.compiler.is_compiling():
        shared = _shared_by(*inputs[1:3], inputs[3:]) if inputs[0].is_cpu else None
        return _Cell.apply(mode, own, shared, shared and shared.token, *inputs)
    if mode == "lstm":
        return _ops.lstm_cell(*inputs, own)[:2]
    input, hx, _, *weights = inputs
    if mode == "gru":
        return _ops.gru_cell(input, hx, *weights, own)[0]
    return _ops.rnn_cell(input, hx, *weights, mode.removeprefix("rnn_"), own)


# ------------------------------------------------------------------------------------------- choice


def _autocast(mode, input, state, onednn=True):
    """The dtype that autocast computes in; None where it does nothing.

    On a CPU it casts the arguments of a product alone, but for a whole LSTM that oneDNN has: where
    a float32 state is added to a product, the sum is float32. What it would refuse, as float64, is
    not cast."""
    device = input.device.type
    if not torch.is_autocast_enabled(device):
        return None
    dtype = torch.get_autocast_dtype(device)
    if input.dtype == torch.float64 or state.dtype == torch.float64:
        return None
    if device == "cpu" and (mode == "gru" or (mode == "lstm" and not onednn)):
        return torch.promote_types(dtype, state.dtype)
    return dtype


def _cast(dtype, tensors):
    return tensors if dtype is None else [None if x is None else x.to(dtype) for x in tensors]


def _unsupported(tensors, raw, cast):
    """Why no kernel takes tensors like these, whatever their shapes."""
    if not isinstance(tensors[0], Tensor):
        return "no tensor"
    if reason := unfit(tensors):
        return reason
    input = tensors[0]
    if not has_kernel(raw, input.device.type):
        return f"no kernel for device {input.device.type}"
    if input.dtype not in DTYPES:
        return f"no kernel for {input.dtype}"
    if cast is None:
        for tensor in tensors:
            if tensor is not None and tensor.dtype != input.dtype:
                return f"{tensor.dtype} beside input of {input.dtype}"
    elif not all(tensor is None or tensor.is_floating_point() for tensor in tensors):
        return "no floating point"
    return None


def _misfit(mode, input, batch_sizes, hx, cx, params, biases, layers, bidirectional, batch_first):
    """What of the shapes torch refuses."""
    directions, packed = 2 if bidirectional else 1, batch_sizes is not None
    each = 2 + 2 * biases
    if mode == "lstm" and len(params) == layers * directions * (each + 1):
        each += 1
    if layers < 1 or len(params) != layers * directions * each:
        return f"{len(params)} weights"
    if input.dim() != (2 if packed else 3):
        return f"input of {input.dim()} dimensions"
    if packed:
        if batch_sizes.device.type != "cpu" or batch_sizes.dtype != torch.int64:
            return f"batch_sizes of {batch_sizes.dtype} on {batch_sizes.device}"
        if batch_sizes.dim() != 1 or batch_sizes.shape[0] == 0:
            return f"batch_sizes of shape {tuple(batch_sizes.shape)}"
    elif input.shape[1 if batch_first else 0] == 0:
        return "a sequence of no steps"
    if hx.dim() != 3 or hx.shape[0] != layers * directions:
        return f"hx of shape {tuple(hx.shape)}"
    batch, size = hx.shape[1:]
    if packed and not torch.compiler.is_compiling() and batch != int(batch_sizes[0]):
        return f"hx of shape {tuple(hx.shape)} for {int(batch_sizes[0])} sequences"
    if not packed and input.shape[0 if batch_first else 1] != batch:
        return f"hx of shape {tuple(hx.shape)} for input of {tuple(input.shape)}"
    rows = params[0].shape[0] if params[0].dim() == 2 else 0
    hidden = rows // GATES[mode]
    if hidden == 0 or rows != hidden * GATES[mode]:
        return f"weight of shape {tuple(params[0].shape)}"
    projected = each % 2 == 1
    if (size >= hidden) if projected else (size != hidden):
        return f"hx of shape {tuple(hx.shape)} for {hidden} hidden units"
    if cx is not None and cx.shape != (layers * directions, batch, hidden):
        return f"cx of shape {tuple(cx.shape)}"
    features = input.shape[-1]
    for at, weight in enumerate(params):
        which, layer = at % each, at // (each * directions)
        if which == 0:
            wanted = rows, directions * size if layer else features
        elif which == 1:
            wanted = rows, size
        elif projected and which == each - 1:
            wanted = size, hidden
        else:
            wanted = (rows,)
        if weight.shape != wanted:
            return f"weight of shape {tuple(weight.shape)} where {wanted} is wanted"
    return None


def _torchs():
    """Why a call is torch's whatever its arguments."""
    if transform := active_transform():
        return transform
    if config.forced() == "stock":
        return "dlkernels.config.kernels is 'stock'"
    return None


def _is_vmapped():
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack() or []
    return any(interpreter.key() == functorch.TransformType.Vmap for interpreter in stack)


def _chosen(op, input, reason, stocks):
    """Records who does it: ours where there is no reason against. Under "own" that is an error."""
    if reason is not None and config.forced() == "own" and active_transform() is None:
        stocks()  # bad input is torch's to refuse
        raise NotImplementedError(f"{op}: no kernel of ours: {reason}")
    if not torch.compiler.is_compiling() and config.is_recording():
        kernel = config.owner(input.device.type) if reason is None else "stock"
        config.record(op, kernel, reason or "covered")


# ------------------------------------------------------------------------------------------- public


def _all_layers(run, tensors, num_layers, dropout, train, bidirectional, batch_first):
    """(output, h_n[, c_n]) of all layers, each by ``run(input, hx, cx, weights)``."""
    output, *others = tensors
    hx, cx, *params = _contiguous(others)
    if batch_first:
        output = output.transpose(0, 1)
    if output.stride(-1) != 1:
        output = output.contiguous()
    directions, each, last = 2 if bidirectional else 1, len(params) // num_layers, []
    for layer in range(num_layers):
        if layer and train and dropout > 0:
            output = F.dropout(output, dropout)
        h, c = hx, cx
        if num_layers > 1:
            of_layer = slice(layer * directions, (layer + 1) * directions)
            h, c = hx[of_layer], None if cx is None else cx[of_layer]
        output, *states = run(output, h, c, params[layer * each : (layer + 1) * each])
        last.append(states)
    if batch_first:
        output = output.transpose(0, 1)
    if num_layers == 1:
        return output, *last[0]
    return output, *(torch.cat(states) for states in zip(*last, strict=True))


def _recurrent(
    mode, input, hx, cx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first,
    batch_sizes,
):  # fmt: skip
    settings = has_biases, num_layers, dropout, train, bidirectional

    def stocks():
        states = hx if cx is None else [hx, cx]
        if batch_sizes is None:
            return _STOCK[mode](input, states, params, *settings, batch_first)
        return _STOCK[mode](input, batch_sizes, states, params, *settings)

    tensors, dtype = (input, hx, cx, *params), None
    projected = len(params) == num_layers * (1 + bidirectional) * (3 + 2 * has_biases)
    batch_first = batch_first and batch_sizes is None

    def layers(run, tensors):
        return _all_layers(run, tensors, num_layers, dropout, train, bidirectional, batch_first)

    if _is_vmapped():
        config.record(mode, "reference", "stock has no batching rule")
        return layers(
            lambda input, h, c, weights: layer_reference(
                input, batch_sizes, h, c, *weights, mode=mode
            ),
            tensors,
        )
    reason = _torchs()
    if reason is None:
        if isinstance(input, Tensor) and isinstance(hx, Tensor):
            dtype = _autocast(mode, input, hx, onednn=not projected and batch_sizes is None)
        reason = _unsupported(tensors, "lstm_forward", dtype)
    if reason is None:
        reason = _misfit(
            mode, input, batch_sizes, hx, cx, params, has_biases, num_layers, bidirectional,
            batch_first,
        )  # fmt: skip
    if reason is None and not 0 <= dropout <= 1:
        reason = f"dropout={dropout}"
    _chosen(mode, input, reason, stocks)
    if reason is not None:
        return stocks()

    own = config.forced() == "own"
    results = layers(
        lambda *arguments: _run_layer(mode, own, batch_sizes, *arguments), _cast(dtype, tensors)
    )
    if dtype is not None and projected:  # h is a product
        h_dtype = torch.get_autocast_dtype(input.device.type)
        return *(result.to(h_dtype) for result in results[:2]), results[2]
    return results


def lstm(
    input: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
    *,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.lstm``: what ``torch.nn.LSTM`` calls.

    Args:
        input: (T, B, I), (B, T, I) with ``batch_first``, in any strides; or with ``batch_sizes``
            the rows (S, I) of a ``PackedSequence``. float32, float64, bfloat16 or float16: sums and
            cell states are float32 (float64 for float64), h is rounded at each step.
        hx: the states h (L·D, B, P) and c (L·D, B, H) of L layers and D directions; P is H, or the
            rows of ``w_hr``.
        params: of each layer, of each direction: w_ih, w_hh, with ``has_biases`` b_ih, b_hh, and
            w_hr if there are projections.
        dropout: in training, of the outputs of each layer but the last. The same numbers are drawn
            as by torch on a CPU.
        batch_sizes: int64, on the CPU, those of a ``PackedSequence``.

    Returns:
        The output (T, B, D·P), (B, T, D·P) or (S, D·P), and the last states, of the shapes of
        ``hx``; of the input's dtype, under autocast of that which torch's have.

    Raises:
        What torch raises, with its words. NotImplementedError under
        ``dlkernels.config.kernels = "own"``, where there is no kernel of ours.
    """
    h, c = hx
    return _recurrent(
        "lstm", input, h, c, params, has_biases, num_layers, dropout, train, bidirectional,
        batch_first, batch_sizes,
    )  # fmt: skip


def _without_cell(mode, text):
    def function(
        input: Tensor,
        hx: Tensor,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool = False,
        *,
        batch_sizes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return _recurrent(
            mode, input, hx, None, params, has_biases, num_layers, dropout, train, bidirectional,
            batch_first, batch_sizes,
        )  # fmt: skip

    function.__name__ = function.__qualname__ = mode
    function.__doc__ = text
    return function


gru = _without_cell(
    "gru",
    """``torch.gru``: as ``lstm``, of one state ``hx`` (L·D, B, H); (output, h_n).""",
)
rnn_tanh = _without_cell(
    "rnn_tanh",
    """``torch.rnn_tanh``: as ``lstm``, of one state ``hx`` (L·D, B, H); (output, h_n).""",
)
rnn_relu = _without_cell(
    "rnn_relu",
    """``torch.rnn_relu``: as ``lstm``, of one state ``hx`` (L·D, B, H); (output, h_n).""",
)


def _is_small(input, hx, cx, w_ih, w_hh, b_ih, b_hh):
    """Whether stock would be done before our way through Python. A traced size is not asked."""
    if config.forced() != "auto" or torch.compiler.is_compiling():
        return False
    if not (isinstance(input, Tensor) and isinstance(w_hh, Tensor) and isinstance(w_ih, Tensor)):
        return False
    if not input.is_cpu or input.dim() != 2:
        return False
    work = input.shape[0] * (w_ih.numel() + w_hh.numel())
    return work < _SMALL[False] and work < _SMALL[needs_gradient(input, w_ih, w_hh)]


def _misfit_of_cell(mode, input, hx, cx, w_ih, w_hh, b_ih, b_hh):
    """What of the shapes torch refuses, or broadcasts."""
    if input.dim() != 2 or hx.dim() != 2 or w_ih.dim() != 2:
        return f"input of {input.dim()} dimensions, hx of {hx.dim()}"
    batch, features = input.shape
    rows, hidden = w_ih.shape[0], hx.shape[1]
    if hx.shape[0] != batch or (cx is not None and cx.shape != hx.shape):
        return f"states of other shapes than {(batch, hidden)}"
    if hidden == 0 or rows != GATES[mode] * hidden or w_ih.shape[1] != features:
        return f"w_ih of shape {tuple(w_ih.shape)}"
    if w_hh.shape != (rows, hidden):
        return f"w_hh of shape {tuple(w_hh.shape)}"
    if b_ih is None and b_hh is None:
        return None
    if b_ih is None or b_hh is None or b_ih.shape != (rows,) or b_hh.shape != (rows,):
        return f"biases of other shapes than {(rows,)}"
    return None


def _cell(mode, input, hx, cx, *weights):
    def stocks():
        return _STOCK_CELL[mode](input, hx if cx is None else (hx, cx), *weights)

    tensors, dtype = (input, hx, cx, *weights), None
    if _is_vmapped():
        config.record(f"{mode}_cell", "reference", "stock has no batching rule")
        states = cell_reference(*tensors, mode=mode)
        return states if mode == "lstm" else states[0]
    if _is_small(*tensors):
        if config.is_recording():
            config.record(f"{mode}_cell", "stock", "too small for our call overhead")
        return stocks()
    reason = _torchs()
    if reason is None:
        if isinstance(input, Tensor) and isinstance(hx, Tensor):
            dtype = _autocast(mode, input, hx if cx is None else cx, onednn=False)
        reason = _unsupported(tensors, "lstm_cell_forward", dtype)
    if reason is None:
        reason = _misfit_of_cell(mode, *tensors)
    _chosen(f"{mode}_cell", input, reason, stocks)
    if reason is not None:
        return stocks()
    return _run_cell(mode, config.forced() == "own", *_contiguous(_cast(dtype, tensors)))


def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``torch.lstm_cell``: one step of an LSTM.

    Args:
        input: (B, I); float32, float64, bfloat16 or float16.
        hx: the states h and c, (B, H).
        w_ih, w_hh, b_ih, b_hh: (4H, I), (4H, H), (4H), (4H), of the gates i, f, g, o.

    Returns:
        The new h and c, of the input's dtype; under autocast of that which torch's have.

    Raises:
        As ``lstm``.
    """
    h, c = hx
    return _cell("lstm", input, h, c, w_ih, w_hh, b_ih, b_hh)


def _one_state_cell(mode, text):
    def function(
        input: Tensor,
        hx: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor:
        return _cell(mode, input, hx, None, w_ih, w_hh, b_ih, b_hh)

    function.__name__ = function.__qualname__ = f"{mode}_cell"
    function.__doc__ = text
    return function


gru_cell = _one_state_cell(
    "gru",
    """``torch.gru_cell``: as ``lstm_cell``, of one state and the gates r, z, n; the new state.""",
)
rnn_tanh_cell = _one_state_cell(
    "rnn_tanh",
    """``torch.rnn_tanh_cell``: as ``lstm_cell``, of one state and no gates; the new state.""",
)
rnn_relu_cell = _one_state_cell(
    "rnn_relu",
    """``torch.rnn_relu_cell``: as ``rnn_tanh_cell``, with a ReLU.""",
)
