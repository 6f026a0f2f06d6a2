"""conv2d and conv_transpose2d in Triton: implicit GEMMs on dense NHWC, without unfolding anything.

Three products, over images n, pixels p, channels c of the input and k of the output, taps t::

    forward          y[n, p, k]  = Σ_tc x[n, p·stride - pad + t·dilation, c] · w[k, t, c]
    input gradient   dx[n, i, c] = Σ_tk dy[n, (i + pad - t·dilation) / stride, k] · w[k, t, c]
    weight gradient  dw[k, t, c] = Σ_np dy[n, p, k] · x[n, p·stride - pad + t·dilation, c]

``_convolve`` is the first two. In the second only the taps count whose division leaves no rest:
they depend on i modulo the stride alone, so each such phase is a convolution of stride 1 with taps
in steps of stride / gcd(stride, dilation); a phase without a tap is the epilogue of 0. A tile is so
many pixels × output channels; its loop runs over taps × blocks of input channels. Programs are
persistent: each walks over tiles. Around the product a tile can have

    before    relu(x·scale_c + offset_c) of what is read, or ``NormGradient``; padding is 0 after it
    after     · factor_k + bias_k; mean and Σ (y - mean)² of the tile's rounded y; + residual, where
              its sign is set; activation; ``Rectified``

``_weight_gradient`` splits the pixels: each split writes its own sum, and ``_add_up`` adds them in
order. So it does with tiles' sums; ``_merge`` makes mean and variance of the tiles' own. The shape
alone fixes how sums are cut: the same bits come every time.

Groups: a tile stays within one, or where they are narrow holds several, as blocks on the diagonal
of one product. Zeros stand beside them: an inf of one group is a NaN of its neighbours in the tile.

On sm_90 tiles are loaded through descriptors (TMA) where memory is as they need it: the weight
where its channels are whole blocks; the input where the stride is 1, as boxes of images × rows ×
columns that cover the output with little waste. A 1×1 convolution of stride 1 is one long row of
pixels, and so a plain GEMM. Elsewhere, and on sm_80, pointers, masked at the border. Triton (3.6,
3.9) reads a box of several rows from where the copy put it as the right operand only, and takes the
left one through registers: so the product of boxes is that of the transposes, the weight left.

Few channels, of which a tile would be mostly zeros, go to ``conv2d_few_channels`` in CUDA C++ where
that library is.

NOT MEASURED: the tiles (``_TILES``), the constants below them and the choice (``_is_faster``) are
reckoned; no GPU has timed them. With ``DLKERNELS_AUTOTUNE=1`` in the environment each new shape
times the tiles of its table once, and Triton keeps the choice on disk.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.cache import get_cache_manager
from triton.tools.tensor_descriptor import TensorDescriptor

from dlkernels.kernels.common import (
    INTERPRETED,
    SLOPE,
    activate,
    alignment,
    check,
    check_activation,
    check_tensor,
    launch,
    narrow,
    register_kernels,
    trips,
    where_positive,
    where_set,
    widen,
)

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LAST = torch.channels_last

# ------------------------------------------------------------------------------------------ kernels
# Numbers that Triton would compile for anew where they are 1 or divisible by 16. Of
# channels what is known is ALIGN_IN and ALIGN_OUT, by which they come divided.
_NUMBERS = [
    "images", "in_h", "in_w", "out_h", "out_w", "depth", "width", "groups", "pad_h", "pad_w",
    "tiles", "programs", "per_split", "splits", "rows", "columns", "by_pixels", "shift_pixels",
    "by_columns", "shift_columns",
]  # fmt: skip


def _jit(function):
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[n for n in names if n in _NUMBERS])


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:  # its product of bfloat16 is of bits
        a, b = widen(a), widen(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _prepare(a, ok, channel, mask, scale, offset):
    """relu(a·scale + offset) of a tile of pixels × channels; 0 where there is no pixel."""
    s = tl.load(scale + channel, mask=mask, other=0.0).to(tl.float32)
    o = tl.load(offset + channel, mask=mask, other=0.0).to(tl.float32)
    v = tl.fma(widen(a), tl.broadcast_to(s[None, :], a.shape), tl.broadcast_to(o[None, :], a.shape))
    v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return narrow(tl.where(ok[:, None], v, 0.0), a.dtype)


@triton.jit
def _of_norm(g, y, ok, channel, mask, channels, mean, coefficients):
    """a·g + b·(y - mean) + c of tiles of pixels × channels; 0 where there is no pixel."""
    m = tl.load(mean + channel, mask=mask, other=0.0)[None, :]
    a = tl.load(coefficients + channel, mask=mask, other=0.0)[None, :]
    b = tl.load(coefficients + channels + channel, mask=mask, other=0.0)[None, :]
    c = tl.load(coefficients + 2 * channels + channel, mask=mask, other=0.0)[None, :]
    b, c = tl.broadcast_to(b, y.shape), tl.broadcast_to(c, y.shape)
    v = tl.fma(tl.broadcast_to(a, g.shape), widen(g), tl.fma(b, widen(y) - m, c))
    return narrow(tl.where(ok[:, None], v, 0.0), y.dtype)


@triton.jit
def _phase_taps(
    at, pad, K: tl.constexpr, S: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """Of the pixels at, at + S, …: the first tap, how many (in steps of STEP), what the first
    reads."""
    first = at * 0 + K
    for r in tl.static_range(STEP):
        first = tl.where((at + pad - r * D) % S == 0, r, first)
    return first, (K - first + STEP - 1) // STEP, (at + pad - first * D) // S


@triton.jit
def _tile_of(
    tile, x, w, y, factor, bias, residual, residual_signs, scale, offset, raw, raw_mean,
    coefficients, signs, before, before_scale, before_shift, before_mean, before_rstd, partial,
    images, in_h, in_w, out_h, out_w, depth, width, groups, pad_h, pad_w,
    GRADIENT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr,
    SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, STEP_H: tl.constexpr,
    STEP_W: tl.constexpr, INSIDE: tl.constexpr, WIDE: tl.constexpr, PACK: tl.constexpr,
    BOXED: tl.constexpr, BOXED_W: tl.constexpr, SWAPPED: tl.constexpr, TN: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One tile of the output, from the first product to the store."""
    TAPS: tl.constexpr = KH * KW
    tiles_n = tl.cdiv(width * PACK, BN)
    packs = tl.cdiv(groups, PACK)
    tile_n = tile % tiles_n
    tile = tile // tiles_n
    group = (tile % packs) * PACK
    tile = tile // packs
    row = tile
    if GRADIENT:
        at_h = tile % (SH * SW) // SW
        at_w = tile % SW
        tile = tile // (SH * SW)
        first_h, taps_h, h0 = _phase_taps(at_h, pad_h, KH, SH, DH, STEP_H)
        first_w, taps_w, w0 = _phase_taps(at_w, pad_w, KW, SW, DW, STEP_W)
        rows = (out_h - at_h + SH - 1) // SH
        columns = (out_w - at_w + SW - 1) // SW
    else:
        at_h, at_w, h0, w0, taps_h, taps_w, rows, columns = (
            0, 0, -pad_h, -pad_w, KH, KW, out_h, out_w,
        )  # fmt: skip

    # The pixels of the tile: which image, row and column of the output (of the phase).
    i = tl.arange(0, BM)
    if BOXED:
        wide = tl.cdiv(columns, TW)
        high = tl.cdiv(rows, TH)
        box_q = (tile % wide) * TW
        box_p = (tile // wide % high) * TH
        box_n = (tile // wide // high) * TN
        n = box_n + i // (TH * TW)
        p = box_p + i // TW % TH
        q = box_q + i % TW
        exists = (n < images) & (p < rows) & (q < columns)
    else:
        area = tl.maximum(rows * columns, 1)
        m = tile * BM + i
        exists = m < images * rows * columns
        n = m // area
        p = m % area // tl.maximum(columns, 1)
        q = m % area % tl.maximum(columns, 1)
    if WIDE:
        n = n.to(tl.int64)
    if GRADIENT:
        h, v = p, q
    else:
        h, v = p * SH, q * SW
    spot = (n * in_h + h) * in_w + v
    pixel = spot * (groups * depth) + group * depth

    here = tl.minimum(groups - group, PACK)
    j = tile_n * BN + tl.arange(0, BN)
    is_column = j < here * width
    taps = taps_h * taps_w
    safe_taps = tl.maximum(taps, 1)
    safe_taps_w = tl.maximum(taps_w, 1)
    blocks = tl.cdiv(depth * PACK, BK)
    acc = tl.zeros([BN, BM] if SWAPPED else [BM, BN], tl.float32)
    for k in range(trips(taps * blocks)):
        # Taps inside, blocks of channels outside: neighbouring taps read the same lines.
        c = k // safe_taps * BK
        t = k % safe_taps
        r = t // safe_taps_w
        s = t % safe_taps_w
        if GRADIENT:
            dh = h0 - r * (DH * STEP_H // SH)
            dw = w0 - s * (DW * STEP_W // SW)
            tap = (first_h + r * STEP_H) * KW + first_w + s * STEP_W
        else:
            dh = h0 + r * DH
            dw = w0 + s * DW
            tap = t
        kk = c + tl.arange(0, BK)
        is_deep = kk < here * depth
        if INSIDE:
            ok = exists
        else:
            ok = exists & (h + dh >= 0) & (h + dh < in_h) & (v + dw >= 0) & (v + dw < in_w)
        if BOXED:
            a = x.load([box_n, box_p + dh, box_q + dw, group * depth + c]).reshape(BM, BK)
        else:
            start = pixel + (dh * in_w + dw) * (groups * depth) + c
            pointers = x + start[:, None] + tl.arange(0, BK)[None, :]
            a = tl.load(pointers, mask=ok[:, None] & is_deep[None, :], other=0.0)
        channel = group * depth + kk
        if scale is not None:
            a = _prepare(a, ok, channel, is_deep, scale, offset)
        if raw is not None:
            if BOXED:
                z = raw.load([box_n, box_p + dh, box_q + dw, group * depth + c]).reshape(BM, BK)
            else:
                pointers = raw + start[:, None] + tl.arange(0, BK)[None, :]
                z = tl.load(pointers, mask=ok[:, None] & is_deep[None, :], other=0.0)
            if signs is not None:
                mask = ok[:, None] & is_deep[None, :]
                a = where_set(widen(a), signs, spot + dh * in_w + dw, channel, groups * depth, mask)
            a = _of_norm(a, z, ok, channel, is_deep, groups * depth, raw_mean, coefficients)
        if GRADIENT:
            if BOXED_W:
                b = w.load([group * depth + c, tap * width + tile_n * BN])
            else:
                own = is_deep[:, None] & is_column[None, :]
                local = j
                if PACK > 1:
                    own = own & ((kk // depth)[:, None] == (j // width)[None, :])
                    local = j % width
                pointers = w + ((group * depth + kk) * (TAPS * width) + tap * width)[:, None]
                b = tl.load(pointers + local[None, :], mask=own, other=0.0)
            if SWAPPED:
                b = tl.trans(b)
        else:
            if BOXED_W:
                b = w.load([group * width + tile_n * BN, tap * depth + c])
            else:
                own = is_column[:, None] & is_deep[None, :]
                local = kk
                if PACK > 1:
                    own = own & ((j // width)[:, None] == (kk // depth)[None, :])
                    local = kk % depth
                pointers = w + ((group * width + j) * (TAPS * depth) + tap * depth)[:, None]
                b = tl.load(pointers + local[None, :], mask=own, other=0.0)
            if not SWAPPED:
                b = tl.trans(b)
        if SWAPPED:
            acc = _dot(b, tl.trans(a), acc, PRECISION)
        else:
            acc = _dot(a, b, acc, PRECISION)
    if SWAPPED:
        acc = tl.trans(acc)

    channel = group * width + j
    if factor is not None:
        acc *= tl.load(factor + channel, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        acc += widen(tl.load(bias + channel, mask=is_column, other=0.0)).to(tl.float32)[None, :]
    dtype = y.dtype.element_ty
    channels = groups * width
    if partial is not None and before is None:
        z = tl.where(exists[:, None], widen(narrow(acc, dtype)), 0.0)
        count = tl.sum(exists.to(tl.float32), 0)
        about = tl.sum(z, 0) / tl.maximum(count, 1.0)
        z = tl.where(exists[:, None], z - about[None, :], 0.0)
        rest = tl.sum(z, 0) / tl.maximum(count, 1.0)
        to = partial + row.to(tl.int64) * (3 * channels) + channel
        tl.store(to, tl.broadcast_to(count, rest.shape), mask=is_column)
        tl.store(to + channels, about + rest, mask=is_column)
        square = tl.sum(z * z, 0) - count * rest * rest
        tl.store(to + 2 * channels, square, mask=is_column)
    if GRADIENT:
        p = p * SH + at_h
        q = q * SW + at_w
    spot = (n * out_h + p) * out_w + q
    pointers = (spot * channels + group * width)[:, None] + j[None, :]
    mask = exists[:, None] & is_column[None, :]
    if residual is not None:
        more = widen(tl.load(residual + pointers, mask=mask, other=0.0))
        if residual_signs is not None:
            more = where_set(more, residual_signs, spot, channel, channels, mask)
        acc += more
    acc = activate(acc, ACTIVATION)
    if before is not None:
        v = widen(tl.load(before + pointers, mask=mask, other=0.0))
        acc = where_positive(acc, v, channel, is_column, before_scale, before_shift)
        z = tl.where(mask, widen(narrow(acc, dtype)), 0.0)
        v -= tl.load(before_mean + channel, mask=is_column, other=0.0)[None, :]
        rstd = tl.load(before_rstd + channel, mask=is_column, other=0.0)
        to = partial + row.to(tl.int64) * (2 * channels) + channel
        tl.store(to, tl.sum(z, 0), mask=is_column)
        tl.store(to + channels, tl.sum(z * v, 0) * rstd, mask=is_column)
    tl.store(y + pointers, narrow(acc, dtype), mask=mask)


@_jit
def _convolve(
    x, w, y, factor, bias, residual, residual_signs, scale, offset, raw, raw_mean,
    coefficients, signs, before, before_scale, before_shift, before_mean, before_rstd, partial,
    images, in_h, in_w, out_h, out_w, depth, width, groups, pad_h, pad_w, tiles, programs,
    GRADIENT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr,
    SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, STEP_H: tl.constexpr,
    STEP_W: tl.constexpr, INSIDE: tl.constexpr, WIDE: tl.constexpr, PACK: tl.constexpr,
    ALIGN_IN: tl.constexpr, ALIGN_OUT: tl.constexpr, BOXED: tl.constexpr, BOXED_W: tl.constexpr,
    SWAPPED: tl.constexpr, TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Tiles of a convolution, or of the input gradient of one: depth channels of a group are read
    and width written."""
    depth = depth * ALIGN_IN
    width = width * ALIGN_OUT
    for tile in range(trips(tl.program_id(0)), trips(tiles), trips(programs)):
        _tile_of(
            tile, x, w, y, factor, bias, residual, residual_signs, scale, offset, raw, raw_mean,
            coefficients, signs, before, before_scale, before_shift, before_mean, before_rstd,
            partial, images, in_h, in_w, out_h, out_w, depth, width, groups, pad_h, pad_w,
            GRADIENT, KH, KW, SH, SW, DH, DW, STEP_H, STEP_W, INSIDE, WIDE, PACK,
            BOXED, BOXED_W, SWAPPED, TN, TH, TW, BM, BN, BK, PRECISION, ACTIVATION,
        )  # fmt: skip


@triton.jit
def _quotient(m, by, shift):
    """m // divisor of 0 <= m < 2³¹: by and shift are _reciprocal's."""
    twice = (m + m).to(tl.uint32)
    return (tl.umulhi(twice, by.to(tl.uint32)) >> shift.to(tl.uint32)).to(tl.int32)


@_jit
def _weight_gradient(
    d, x, partial, scale, offset, raw, raw_mean, coefficients, signs,
    images, in_h, in_w, out_h, out_w, depth, width, groups, pad_h, pad_w, per_split,
    by_pixels, shift_pixels, by_columns, shift_columns,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, INSIDE: tl.constexpr, WIDE: tl.constexpr,
    PACK: tl.constexpr, ALIGN_IN: tl.constexpr, ALIGN_OUT: tl.constexpr, BOXED: tl.constexpr,
    BOXED_D: tl.constexpr, TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    CHANNELS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output channels × (taps × input channels) of a split of the pixels.

    A tile's columns are BN channels of a tap, or where there are fewer BN / CHANNELS whole taps.
    """
    depth = depth * ALIGN_IN
    width = width * ALIGN_OUT
    TAPS: tl.constexpr = KH * KW
    ROW: tl.constexpr = BN // CHANNELS  # taps in a tile
    pid = tl.program_id(0)
    blocks = tl.cdiv(depth * PACK, CHANNELS)
    across = tl.cdiv(TAPS, ROW) * blocks
    down = tl.cdiv(width * PACK, BM)
    packs = tl.cdiv(groups, PACK)
    tile_n = pid % across
    pid = pid // across
    tile_m = pid % down
    pid = pid // down
    group = (pid % packs) * PACK
    split = pid // packs
    here = tl.minimum(groups - group, PACK)

    kk = tile_m * BM + tl.arange(0, BM)
    is_row = kk < here * width
    j = tl.arange(0, BN)
    if ROW == 1:
        tap = tile_n % TAPS
        cc = tile_n // TAPS * BN + j
        dh = tap // KW * DH - pad_h
        dw = tap % KW * DW - pad_w
        is_column = cc < here * depth
    else:
        tap = tile_n * ROW + j // CHANNELS
        cc = j % CHANNELS
        dh = (tap // KW * DH - pad_h)[None, :]
        dw = (tap % KW * DW - pad_w)[None, :]
        is_column = (cc < here * depth) & (tap < TAPS)

    acc = tl.zeros([BM, BN], tl.float32)
    for step in range(trips(per_split)):
        block = split * per_split + step
        i = tl.arange(0, BK)
        if BOXED:
            wide = tl.cdiv(out_w, TW)
            high = tl.cdiv(out_h, TH)
            box_q = (block % wide) * TW
            box_p = (block // wide % high) * TH
            box_n = (block // wide // high) * TN  # past the last image: zeros
            n = box_n + i // (TH * TW)
            p = box_p + i // TW % TH
            q = box_q + i % TW
            exists = (n < images) & (p < out_h) & (q < out_w)
        else:
            m = block * BK + i
            exists = m < images * out_h * out_w
            n = _quotient(m, by_pixels, shift_pixels)
            rest = m - n * (out_h * out_w)
            p = _quotient(rest, by_columns, shift_columns)
            q = rest - p * out_w
        if WIDE:
            n = n.to(tl.int64)
        if BOXED_D:
            a = d.load([block * BK, group * width + tile_m * BM])
        else:
            at = ((n * out_h + p) * out_w + q) * (groups * width) + group * width
            pointers = at[:, None] + kk[None, :]
            a = tl.load(d + pointers, mask=exists[:, None] & is_row[None, :], other=0.0)
        if raw is not None:
            if BOXED_D:
                z = raw.load([block * BK, group * width + tile_m * BM])
            else:
                z = tl.load(raw + pointers, mask=exists[:, None] & is_row[None, :], other=0.0)
            channel = group * width + kk
            if signs is not None:
                mask = exists[:, None] & is_row[None, :]
                spot = (n * out_h + p) * out_w + q
                a = where_set(widen(a), signs, spot, channel, groups * width, mask)
            a = _of_norm(a, z, exists, channel, is_row, groups * width, raw_mean, coefficients)
        h, v = p * SH, q * SW
        if ROW > 1:
            h, v = h[:, None], v[:, None]
            ok = exists[:, None]
        else:
            ok = exists
        if not INSIDE:
            ok = ok & (h + dh >= 0) & (h + dh < in_h) & (v + dw >= 0) & (v + dw < in_w)
        if BOXED:
            c = group * depth + tile_n // TAPS * BN
            b = x.load([box_n, box_p + dh, box_q + dw, c]).reshape(BK, BN)
        else:
            start = ((n * in_h + p * SH) * in_w + q * SW) * (groups * depth) + group * depth
            moved = (dh * in_w + dw) * (groups * depth)
            if ROW > 1:
                mask = ok & is_column[None, :]
                pointers = start[:, None] + moved + cc[None, :]
            else:
                mask = ok[:, None] & is_column[None, :]
                pointers = (start + moved)[:, None] + cc[None, :]
            b = tl.load(x + pointers, mask=mask, other=0.0)
        if scale is not None:
            s = tl.load(scale + group * depth + cc, mask=is_column, other=0.0).to(tl.float32)
            o = tl.load(offset + group * depth + cc, mask=is_column, other=0.0).to(tl.float32)
            s = tl.broadcast_to(s[None, :], b.shape)
            o = tl.broadcast_to(o[None, :], b.shape)
            value = tl.maximum(tl.fma(widen(b), s, o), 0.0, propagate_nan=tl.PropagateNan.ALL)
            if ROW == 1:
                ok = ok[:, None]
            b = narrow(tl.where(ok, value, 0.0), b.dtype)
        acc = _dot(tl.trans(a), b, acc, PRECISION)

    mask = is_row[:, None] & is_column[None, :]
    column = cc
    if PACK > 1:
        mask = mask & ((kk // width)[:, None] == (cc // depth)[None, :])
        column = cc % depth
    to = (split * groups + group).to(tl.int64) * width + kk
    to = partial + to[:, None] * (TAPS * depth) + (tap * depth + column)[None, :]
    tl.store(to, narrow(acc, partial.dtype.element_ty), mask=mask)


@_jit
def _add_up(
    x, y, second, third, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Sums of ROWS rows each of a matrix, in order, float64: a row of y each; where there is a
    second, or a third, the columns are divided between them and y."""
    blocks = tl.cdiv(columns, BLOCK)
    part = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for i in range(ROWS):
        row = (part * ROWS + i).to(tl.int64)
        end = tl.where(row < rows, columns, 0)
        total += tl.load(x + row * columns + c, mask=c < end, other=0.0).to(tl.float64)
    total = narrow(total, y.dtype.element_ty)
    if second is None:
        tl.store(y + part.to(tl.int64) * columns + c, total, mask=c < columns)
    else:
        width = columns // (2 if third is None else 3)
        tl.store(y + c, total, mask=c < width)
        tl.store(second + c - width, total, mask=(c >= width) & (c < 2 * width))
        if third is not None:
            tl.store(third + c - 2 * width, total, mask=(c >= 2 * width) & (c < columns))


@_jit
def _merge(x, y, var, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of ROWS rows each of (count, mean, Σ (z - mean)²) those of them all (Chan et al., 1979), in
    float64: a row of y each; or, where var is, mean and Σ / count."""
    blocks = tl.cdiv(columns, BLOCK)
    part = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    i = part * ROWS + tl.arange(0, ROWS)
    mask = (i < rows)[:, None] & (c < columns)[None, :]
    at = x + i.to(tl.int64)[:, None] * (3 * columns) + c[None, :]
    counts = tl.load(at, mask=mask, other=0.0).to(tl.float64)
    means = tl.load(at + columns, mask=mask, other=0.0).to(tl.float64)
    squares = tl.load(at + 2 * columns, mask=mask, other=0.0).to(tl.float64)
    count = tl.sum(counts, 0)
    mean = tl.sum(counts * means, 0) / tl.maximum(count, 1.0)
    off = means - mean[None, :]
    square = tl.sum(squares + counts * off * off, 0)
    dtype = y.dtype.element_ty
    if var is not None:
        tl.store(y + c, narrow(mean, dtype), mask=c < columns)
        tl.store(var + c, narrow(square / tl.maximum(count, 1.0), dtype), mask=c < columns)
    else:
        to = y + part.to(tl.int64) * (3 * columns) + c
        tl.store(to, narrow(count, dtype), mask=c < columns)
        tl.store(to + columns, narrow(mean, dtype), mask=c < columns)
        tl.store(to + 2 * columns, narrow(square, dtype), mask=c < columns)


# ------------------------------------------------------------------------------------------- tiles


class _Tile(NamedTuple):
    """The largest blocks of a kernel, and how it runs: programs is how many a multiprocessor
    holds."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    programs: int

    def elements(self) -> int:
        """Of the output, a thread."""
        return self.rows * self.columns // (32 * self.warps)


# (kernel, architecture, precision) -> tiles, the first one that fits and makes tiles enough is
# taken; the last resort is the last one. Reckoned, not measured:
#
# - sm_90: a warpgroup's wgmma takes 64 rows. A block of 128 × 128 × 64 of 16 bits is 512 cycles of
#   the tensor cores and 32 KB of loads, so that three hide 1000 cycles. 64 channels are the 128
#   bytes of a swizzled line; 32 of float32.
# - sm_80: mma, half the shared memory for a multiprocessor's two programs.
# - By IEEE rules there are no tensor cores: 8 x 8 sums a thread.
_TILES: dict[tuple[str, int, str], list[_Tile]] = {
    ("convolve", 90, "half"): [
        _Tile(128, 256, 64, 8, 3, 1),
        _Tile(128, 128, 64, 8, 3, 2),
        _Tile(128, 64, 64, 8, 4, 2),
        _Tile(64, 64, 64, 4, 4, 3),
        _Tile(128, 32, 64, 4, 4, 2),
        _Tile(128, 16, 64, 4, 4, 2),
    ],
    ("convolve", 90, "tf32"): [
        _Tile(128, 128, 32, 8, 3, 2),
        _Tile(128, 64, 32, 8, 4, 2),
        _Tile(64, 64, 32, 4, 4, 3),
        _Tile(128, 32, 32, 4, 4, 2),
        _Tile(128, 16, 32, 4, 4, 2),
    ],
    ("convolve", 80, "half"): [
        _Tile(128, 128, 32, 8, 3, 2),
        _Tile(128, 64, 32, 8, 4, 2),
        _Tile(64, 64, 32, 4, 4, 3),
        _Tile(128, 32, 32, 4, 4, 2),
        _Tile(128, 16, 32, 4, 4, 2),
    ],
    ("convolve", 80, "tf32"): [
        _Tile(128, 128, 16, 8, 3, 2),
        _Tile(128, 64, 16, 8, 4, 2),
        _Tile(64, 64, 32, 4, 3, 2),
        _Tile(128, 32, 32, 4, 3, 2),
        _Tile(128, 16, 32, 4, 3, 2),
    ],
    ("weight", 90, "half"): [
        _Tile(128, 256, 64, 8, 3, 1),
        _Tile(128, 128, 64, 8, 3, 2),
        _Tile(64, 128, 64, 4, 4, 2),
        _Tile(64, 64, 64, 4, 4, 3),
    ],
    ("weight", 90, "tf32"): [
        _Tile(128, 128, 32, 8, 3, 2),
        _Tile(64, 128, 32, 4, 3, 2),
        _Tile(64, 64, 32, 4, 3, 3),
    ],
    ("weight", 80, "half"): [
        _Tile(128, 128, 32, 8, 3, 2),
        _Tile(64, 128, 32, 4, 3, 2),
        _Tile(64, 64, 32, 4, 3, 3),
    ],
    ("weight", 80, "tf32"): [
        _Tile(128, 128, 16, 8, 3, 2),
        _Tile(64, 128, 16, 4, 3, 2),
        _Tile(64, 64, 16, 4, 3, 3),
    ],
}
for _kernel in ("convolve", "weight"):
    for _arch in (80, 90):
        _TILES[_kernel, _arch, "ieee"] = [_Tile(128, 64, 16, 8, 2, 2), _Tile(64, 64, 16, 4, 2, 2)]
_TILES["convolve", 80, "ieee"] += [_Tile(64, 16, 16, 2, 2, 4)]
_TILES["convolve", 90, "ieee"] += [_Tile(64, 16, 16, 2, 3, 4)]

_ENOUGH = 132  # tiles: one for each multiprocessor of an H100
_SPLITS = 264  # programs of a weight gradient, about
_STEPS = 16  # blocks of pixels in a split, at least
_PART = 64  # rows that a program of _add_up or _merge takes
_WASTE = 1.125  # of a cover by boxes, at most: pixels for each of a cover by runs of pixels
_AUTOTUNE = os.environ.get("DLKERNELS_AUTOTUNE") == "1"
_CHOICE = "tile.json"  # in Triton's cache
_HANDLED = 64  # elements a thread, at most, beside pointers or what comes before the product
_SUMMED = 32  # beside the sums of columns: with 64 they would spill
_PACKED = 32  # channels, at least, that narrow groups share a tile for


def _fitting(kind: str, arch: int, precision: str, columns: int) -> list[_Tile]:
    """The tiles that are no wider than so many columns."""
    needed = max(triton.next_power_of_2(columns), 16)
    tiles = _TILES[kind, arch, precision]
    fitting = [t for t in tiles if min(needed, 64) <= t.columns <= needed]
    return fitting or [min(tiles, key=lambda t: (t.columns, t.rows))]


def _first(tiles: list[_Tile], count: Callable[[_Tile], int]) -> _Tile:
    """The first tile that makes tiles enough; count says how many one makes."""
    return next((t for t in tiles if count(t) >= _ENOUGH), tiles[-1])


def _fastest(tiles: list[_Tile], run: Callable[[_Tile], object], shape: tuple) -> _Tile:
    """The tile that takes least time for what it runs, asked once a shape and kept in Triton's
    cache."""
    gpu = "none" if INTERPRETED else torch.cuda.get_device_name()
    key = repr((triton.__version__, gpu, _jit_source(), tiles, shape))
    manager = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    if path := manager.get_file(_CHOICE):
        return _Tile(*json.loads(Path(path).read_text()))
    fastest = min(tiles, key=lambda tile: _time(functools.partial(run, tile)))
    manager.put(json.dumps(fastest), _CHOICE, binary=False)
    return fastest


def _jit_source() -> str:
    return _convolve.cache_key + _weight_gradient.cache_key if not INTERPRETED else ""


def _time(run: Callable[[], object]) -> float:
    """Milliseconds, the median."""
    return triton.testing.do_bench(run, return_mode="median")


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _tune(tiles, run, shape, count) -> _Tile:
    """The tile for a shape: by the table, or by the clock where the user wants that."""
    if not _AUTOTUNE or len(tiles) == 1 or _is_capturing():
        return _first(tiles, count)
    return _fastest(tiles, run, shape)


def _block(size: int, most: int) -> int:
    return min(max(triton.next_power_of_2(size), 16), most)


def _pack(groups: int, depth: int, width: int) -> int:
    """How many groups share a tile."""
    if groups == 1 or min(depth, width) >= _PACKED // 2:
        return 1
    return max(1, min(triton.cdiv(_PACKED, min(depth, width)), groups, 64 // max(depth, width)))


@functools.lru_cache(1024)
def _box(images: int, rows: int, columns: int, pixels: int) -> tuple[int, int, int] | None:
    """Images × rows × columns of so many pixels that cover the output with the least waste."""

    def covered(box):
        sizes = zip((images, rows, columns), box, strict=True)
        return math.prod(triton.cdiv(size, side) * side for size, side in sizes)

    powers = [1 << i for i in range(pixels.bit_length())]
    boxes = [(pixels // h // w, h, w) for h in powers for w in powers if h * w <= pixels]
    best = min(boxes, key=lambda box: (covered(box), -box[2], -box[1]))
    runs = triton.cdiv(images * rows * columns, pixels) * pixels
    return best if covered(best) <= _WASTE * runs else None


def _boxes(images: int, rows: int, columns: int, box: tuple[int, int, int] | None) -> int:
    """How many boxes cover the output; 0 of none."""
    if box is None:
        return 0
    sizes = zip((images, rows, columns), box, strict=True)
    return math.prod(triton.cdiv(size, side) for size, side in sizes)


def _is_run(box: tuple[int, int, int], rows: int, columns: int) -> bool:
    """Whether the pixels of boxes are neighbours in memory, and the boxes too."""
    images, high, wide = box
    return wide == columns and rows % high == 0 and (images == 1 or high == rows)


def _reciprocal(divisor: int) -> tuple[int, int]:
    """What _quotient takes: ⌊m / d⌋ = ⌊2m·by / 2³²⌋ >> shift, for 0 <= m < 2³¹."""
    shift = (divisor - 1).bit_length()
    return (1 << (31 + shift)) // divisor + 1, shift


@functools.cache
def _device(index: int | None) -> tuple[int, int]:
    """(architecture whose tiles are taken, multiprocessors)."""
    if INTERPRETED or not torch.cuda.is_available():
        return 90, 3
    about = torch.cuda.get_device_properties(index)
    return 90 if about.major == 9 else 80, about.multi_processor_count


def _precision(dtype: torch.dtype, exact: bool) -> str:
    return "half" if dtype.itemsize == 2 else "ieee" if exact else "tf32"


def _descriptor(tensor: Tensor, shape: list[int], block: list[int]) -> TensorDescriptor:
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    return TensorDescriptor(tensor, shape, strides, block)


def _has_lines(tensor: Tensor, channels: int) -> bool:
    """Whether rows of so many channels begin where a descriptor may."""
    return tensor.data_ptr() % 16 == 0 and channels * tensor.element_size() % 16 == 0


# ---------------------------------------------------------------------------------------- launchers


def dense(tensor: Tensor) -> Tensor:
    """Dense and channels_last: itself, or a copy."""
    return tensor.contiguous(memory_format=_LAST)


def add_rows(x: Tensor, *sums: Tensor) -> None:
    """The sum of the rows of a matrix, in a fixed order, divided between up to three tensors."""
    while True:
        rows, columns = x.shape
        parts = triton.cdiv(rows, _PART)
        to = sums if parts == 1 else [x.new_empty((parts, columns))]
        block = min(max(triton.next_power_of_2(columns), 32), 512)
        launch(
            _add_up, parts * triton.cdiv(columns, block), x, *to, *[None] * (3 - len(to)), rows,
            columns, ROWS=min(triton.next_power_of_2(rows), _PART), BLOCK=block,
        )  # fmt: skip
        if parts == 1:
            return
        x = to[0]


def merge_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of what each row of x, (rows, 3, columns), has count, mean and
    Σ (z - mean)² of; in a fixed order."""
    while True:
        rows, _, columns = x.shape
        parts = triton.cdiv(rows, _PART)
        to, var = x.new_empty((parts, 3, columns)), None
        if parts == 1:
            to, var = x.new_empty(columns), x.new_empty(columns)
        launch(
            _merge, parts * triton.cdiv(columns, 32), x, to, var, rows, columns,
            ROWS=min(triton.next_power_of_2(rows), _PART), BLOCK=32,
        )  # fmt: skip
        if var is not None:
            return to, var
        x = to


class NormGradient(NamedTuple):
    """The gradient of a convolution's output y, of that behind its batch norm, g, as it is read:
    a·g + b·(y - mean) + c, with g only where its signs are set."""

    output: Tensor
    mean: Tensor
    coefficients: Tensor  # (3, channels)
    signs: Tensor | None

    def dense(self) -> "NormGradient":
        signs = None if self.signs is None else self.signs.contiguous()
        return NormGradient(
            dense(self.output), self.mean.contiguous(), self.coefficients.contiguous(), signs
        )


class Rectified(NamedTuple):
    """What a convolution read: relu(scale·y + shift). Its gradient is 0 where that is not above 0,
    and the batch norm before asks for Σ g and Σ g·(y - mean)·rstd."""

    output: Tensor
    scale: Tensor
    shift: Tensor
    mean: Tensor
    rstd: Tensor

    def dense(self) -> "Rectified":
        return Rectified(dense(self.output), *(t.contiguous() for t in self[1:]))


class Settings(NamedTuple):
    """Of a convolution; of a transposed one those of which it is the input gradient."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def is_pointwise(self, weight: Tensor) -> bool:
        """Whether pixels are rows of a matrix, and the whole a product of matrices."""
        sizes = (*weight.shape[2:], *self.stride, *self.padding)
        return sizes == (1, 1, 1, 1, 0, 0)


_PLAIN = Settings()


class _Walk(NamedTuple):
    """The pixels of a product: images, rows and columns that are read and written."""

    images: int
    in_h: int
    in_w: int
    out_h: int
    out_w: int

    @classmethod
    def of(cls, x: Tensor, y: Tensor, pointwise: bool) -> "_Walk":
        """Of images; of a pointwise convolution one long row of pixels."""
        images, _, in_h, in_w = x.shape
        if pointwise:
            return cls(1, 1, images * in_h * in_w, 1, images * in_h * in_w)
        return cls(images, in_h, in_w, *y.shape[2:])


def _is_wide(*tensors: Tensor) -> bool:
    return any(tensor.numel() >= 2**31 for tensor in tensors)


def _run_convolve(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    settings: Settings,
    gradient: bool,
    exact: bool,
    bias: Tensor | None = None,
    activation: str = "none",
    affine: tuple[Tensor, Tensor] | None = None,
    factor: Tensor | None = None,
    residual: Tensor | None = None,
    residual_signs: Tensor | None = None,
    statistics: bool = False,
    norm: NormGradient | None = None,
    rectified: Rectified | None = None,
) -> tuple[Tensor, Tensor] | None:
    """x times the weight into y, all dense and channels_last. Mean and variance if statistics are
    wanted; the sums of what is rectified."""
    stride, padding, dilation, groups = settings
    kernel = tuple(weight.shape[2:])
    depth, width = x.shape[1] // groups, y.shape[1] // groups
    pointwise = settings.is_pointwise(weight)
    walk = _Walk.of(x, y, pointwise)
    phases = math.prod(stride) if gradient else 1
    rows, columns = (
        triton.cdiv(n, s if gradient else 1) for n, s in zip(walk[3:], stride, strict=True)
    )
    pixels = walk.images * rows * columns
    pack = _pack(groups, depth, width)
    packs = triton.cdiv(groups, pack)
    arch, multiprocessors = _device(x.device.index)
    precision = _precision(x.dtype, exact)
    described = arch == 90 and precision != "ieee" and pack == 1
    lines = described and stride == (1, 1) and _has_lines(x, x.shape[1])
    lines = lines and (norm is None or _has_lines(norm.output, x.shape[1]))
    prepared = affine is not None or norm is not None
    raw, raw_mean, coefficients, signs = norm or (None,) * 4
    before = rectified or (None,) * 5
    inner = weight.shape[1] * math.prod(kernel)
    scale, offset = affine or (None, None)
    align_in, align_out = alignment(depth), alignment(width)
    steps = [s // math.gcd(s, d) for s, d in zip(stride, dilation, strict=True)]

    def box_of(tile: _Tile) -> tuple[int, int, int] | None:
        bn, bk = _block(width * pack, tile.columns), _block(depth * pack, tile.depth)
        if not lines or (groups > 1 and depth % bk) or not (pointwise or prepared or bn >= 64):
            return None
        return _box(walk.images, rows, columns, tile.rows)

    def run(tile: _Tile) -> Tensor | None:
        bn, bk = _block(width * pack, tile.columns), _block(depth * pack, tile.depth)
        whole = depth % bk == 0
        source, other, matrix = x, raw, weight
        box = box_of(tile)
        if box is not None:
            source = _descriptor(x, [*walk[:3], x.shape[1]], [*box, bk])
            if norm is not None:
                other = _descriptor(raw, [*walk[:3], x.shape[1]], [*box, bk])
        if gradient:
            whole = whole or groups == 1
        boxed_weight = described and whole and _has_lines(weight, weight.shape[1])
        if boxed_weight:
            block = [bk, bn] if gradient else [bn, bk]
            matrix = _descriptor(weight, [weight.shape[0], inner], block)
        tiles_m = _boxes(walk.images, rows, columns, box) or triton.cdiv(pixels, tile.rows)
        tiles = tiles_m * phases * packs * triton.cdiv(width * pack, bn)
        programs = min(tiles, tile.programs * multiprocessors)
        partial = None
        if statistics or rectified:
            sums = (tiles_m * phases, 3 if statistics else 2, y.shape[1])
            partial = x.new_empty(sums, dtype=torch.float32)
        tn, th, tw = box or (1, 1, tile.rows)
        launch(
            _convolve, programs, source, matrix, y, factor, bias, residual, residual_signs, scale,
            offset, other, raw_mean, coefficients, signs, *before, partial,
            *walk, depth // align_in, width // align_out, groups, *padding, tiles, programs,
            GRADIENT=gradient, KH=kernel[0], KW=kernel[1], SH=stride[0], SW=stride[1],
            DH=dilation[0], DW=dilation[1], STEP_H=steps[0], STEP_W=steps[1],
            INSIDE=pointwise or (padding == (0, 0) and not gradient), WIDE=_is_wide(x, y),
            PACK=pack, ALIGN_IN=align_in, ALIGN_OUT=align_out, BOXED=box is not None,
            BOXED_W=boxed_weight, SWAPPED=box is not None and not pointwise and not prepared,
            TN=tn, TH=th, TW=tw, BM=tile.rows, BN=bn, BK=bk,
            PRECISION="ieee" if precision == "ieee" else "tf32", ACTIVATION=activation,
            warps=tile.warps, stages=tile.stages,
        )  # fmt: skip
        return partial

    def count(tile: _Tile) -> int:
        tiles = triton.cdiv(pixels, tile.rows) * triton.cdiv(width * pack, tile.columns)
        return tiles * packs * phases

    given = (bias, affine, factor, residual, residual_signs, norm, signs, rectified)
    options = (gradient, activation, statistics, *(one is None for one in given))
    tiles = _fitting("convolve", arch, precision, width * pack)
    if statistics or rectified:
        tiles = [t for t in tiles if t.elements() <= _SUMMED]
    elif prepared or box_of(tiles[0]) is None:
        tiles = [t for t in tiles if t.elements() <= _HANDLED]
    shape = (tuple(x.shape), tuple(y.shape), kernel, settings, str(x.dtype), precision, options)
    partial = run(_tune(tiles, run, shape, count))
    if statistics:
        return merge_rows(partial)
    if rectified is None:
        return None
    sums = tuple(x.new_empty(y.shape[1], dtype=torch.float32) for _ in range(2))
    add_rows(partial.flatten(1), *sums)
    return sums


def _run_weight_gradient(
    d: Tensor,
    x: Tensor,
    out: Tensor,
    settings: Settings,
    exact: bool,
    affine: tuple[Tensor, Tensor] | None = None,
    norm: NormGradient | None = None,
) -> None:
    """The weight's gradient into out; d in the place of the output, x of the input. All dense and
    channels_last."""
    stride, padding, dilation, groups = settings
    kernel = tuple(out.shape[2:])
    taps = math.prod(kernel)
    depth, width = x.shape[1] // groups, d.shape[1] // groups
    pointwise = settings.is_pointwise(out)
    walk = _Walk.of(x, d, pointwise)
    images, rows, columns = walk.images, walk.out_h, walk.out_w
    pixels = images * rows * columns
    pack = _pack(groups, depth, width)
    packs = triton.cdiv(groups, pack)
    arch, _ = _device(x.device.index)
    precision = _precision(x.dtype, exact)
    lines = arch == 90 and precision != "ieee" and pack == 1 and stride == (1, 1)
    lines = lines and _has_lines(x, x.shape[1]) and _has_lines(d, d.shape[1])
    lines = lines and (norm is None or _has_lines(norm.output, d.shape[1]))
    scale, offset = affine or (None, None)
    raw, raw_mean, coefficients, signs = norm or (None,) * 4
    align_in, align_out = alignment(depth), alignment(width)

    def blocks_of(tile: _Tile) -> tuple[int, int, int]:
        """(output channels, input channels of a tap, tiles of a split)."""
        bm = min(max(triton.next_power_of_2(width * pack), 64), tile.rows)
        channels = _block(depth * pack, tile.columns)
        across = triton.cdiv(taps, tile.columns // channels) * triton.cdiv(depth * pack, channels)
        return bm, channels, across * triton.cdiv(width * pack, bm) * packs

    def run(tile: _Tile) -> None:
        bm, channels, tiles = blocks_of(tile)
        box, boxed_d, left, other, right = None, False, d, raw, x
        if lines and channels == tile.columns:
            if groups == 1 or (depth % channels == 0 and width % bm == 0):
                box = _box(images, rows, columns, tile.depth)
        if box is not None:
            right = _descriptor(x, [*walk[:3], x.shape[1]], [*box, channels])
            boxed_d = pointwise or _is_run(box, rows, columns)
        if boxed_d:
            left = _descriptor(d, [pixels, d.shape[1]], [tile.depth, bm])
            if norm is not None:
                other = _descriptor(raw, [pixels, d.shape[1]], [tile.depth, bm])
        blocks = _boxes(images, rows, columns, box) or triton.cdiv(pixels, tile.depth)
        splits = max(1, min(triton.cdiv(_SPLITS, tiles), blocks // _STEPS))
        per_split = triton.cdiv(blocks, splits)
        splits = triton.cdiv(blocks, per_split)
        to = out
        if splits > 1:
            to = x.new_empty((splits, out.numel()), dtype=torch.float32)
        tn, th, tw = box or (1, 1, tile.depth)
        launch(
            _weight_gradient, tiles * splits, left, right, to, scale, offset, other, raw_mean,
            coefficients, signs,
            *walk, depth // align_in, width // align_out, groups, *padding, per_split,
            *_reciprocal(rows * columns), *_reciprocal(columns),
            KH=kernel[0], KW=kernel[1], SH=stride[0], SW=stride[1], DH=dilation[0],
            DW=dilation[1], INSIDE=padding == (0, 0), WIDE=_is_wide(x, d), PACK=pack,
            ALIGN_IN=align_in, ALIGN_OUT=align_out, BOXED=box is not None, BOXED_D=boxed_d,
            TN=tn, TH=th, TW=tw, CHANNELS=channels, BM=bm, BN=tile.columns, BK=tile.depth,
            PRECISION="ieee" if precision == "ieee" else "tf32", warps=tile.warps,
            stages=tile.stages,
        )  # fmt: skip
        if splits > 1:
            add_rows(to, out)

    def count(tile: _Tile) -> int:
        return blocks_of(tile)[2] * max(triton.cdiv(pixels, tile.depth) // _STEPS, 1)

    tiles = _fitting("weight", arch, precision, depth * pack * taps)
    shape = (
        tuple(x.shape),
        tuple(d.shape),
        kernel,
        settings,
        str(x.dtype),
        precision,
        affine is None,
        norm is None,
        signs is None,
    )
    run(_tune(tiles, run, shape, count))


def _no_sums(image: Tensor) -> tuple[Tensor, Tensor]:
    zero = image.new_zeros(image.shape[1], dtype=torch.float32)
    return zero, zero.clone()


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    settings: Settings = _PLAIN,
    activation: str = "none",
    exact: bool = False,
    *,
    affine: tuple[Tensor, Tensor] | None = None,
    factor: Tensor | None = None,
    residual: Tensor | None = None,
    statistics: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """f(factor·conv2d(relu(x·scale + offset), weight) + bias + residual), and what batch norm asks
    of it.

    Args:
        affine: scale and offset for each channel of x; padding is 0 after them.
        factor: for each output channel.
        residual: of the output's shape, added before the activation.
        statistics: whether mean and variance are wanted, of the rounded output before residual and
            activation.

    Returns:
        The output, channels_last, and the mean and the biased variance of its channels as float32,
        or None.
    """
    y = _empty(x, (x.shape[0], weight.shape[0], *_output_size(x, weight, settings)), _LAST)
    bias, factor = (t if t is None else t.contiguous() for t in (bias, factor))
    if affine is not None:
        affine = tuple(t.contiguous() for t in affine)
    if residual is not None:
        residual = dense(residual)
    if y.numel() == 0:
        return y, _no_sums(y) if statistics else None
    with torch.cuda.device_of(x):
        found = _run_convolve(
            dense(x), dense(weight), y, settings, False, exact, bias, activation, affine, factor,
            residual, None, statistics,
        )  # fmt: skip
    return y, found


def input_gradient(
    d: Tensor,
    weight: Tensor,
    shape,
    settings: Settings = _PLAIN,
    exact: bool = False,
    *,
    bias: Tensor | None = None,
    norm: NormGradient | None = None,
    residual: Tensor | None = None,
    residual_signs: Tensor | None = None,
    rectified: Rectified | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The gradient of the input, of the shape given, channels_last; plus a bias, as the transposed
    convolution that it is, and a residual where its signs are set. Second the sums of what is
    rectified, or None."""
    dx = _empty(d, shape, _LAST)
    if bias is not None:
        bias = bias.contiguous()
    if residual is not None:
        residual = dense(residual)
    if residual_signs is not None:
        residual_signs = residual_signs.contiguous()
    if dx.numel() == 0:
        return dx, _no_sums(dx) if rectified else None
    with torch.cuda.device_of(d):
        sums = _run_convolve(
            dense(d), dense(weight), dx, settings, True, exact, bias, residual=residual,
            residual_signs=residual_signs, norm=norm and norm.dense(),
            rectified=rectified and rectified.dense(),
        )  # fmt: skip
    return dx, sums


def weight_gradient(
    d: Tensor,
    x: Tensor,
    shape,
    settings: Settings = _PLAIN,
    exact: bool = False,
    *,
    affine: tuple[Tensor, Tensor] | None = None,
    norm: NormGradient | None = None,
) -> Tensor:
    """The gradient of the weight, of the shape given, channels_last; of relu(x·scale + offset)
    where there is an affine."""
    dw = _empty(d, shape, _LAST)
    if d.numel() == 0:
        return dw.zero_()
    if affine is not None:
        affine = tuple(t.contiguous() for t in affine)
    with torch.cuda.device_of(d):
        _run_weight_gradient(dense(d), dense(x), dw, settings, exact, affine, norm and norm.dense())
    return dw


# ------------------------------------------------------------------------------------------ formats


def _suggests_last(tensor: Tensor) -> bool:
    """torch's suggest_memory_format: whether strides are in the order of channels_last."""
    least = 0
    size, stride = tensor.shape, tensor.stride()
    if stride[1] == 0:
        return False
    for d in (1, 3, 2, 0):
        if size[d] == 0 or stride[d] < least or (d == 0 and least == stride[1]):
            return False
        least = stride[d] * max(size[d], 1)
    return True


def _format(*tensors: Tensor) -> torch.memory_format:
    """channels_last if one of the tensors is; of no images contiguous."""
    if tensors[0].shape[0] and any(map(_suggests_last, tensors)):
        return _LAST
    return torch.contiguous_format


def _empty(like: Tensor, shape, format: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=format)


def formatted(tensor: Tensor, format: torch.memory_format) -> Tensor:
    """A fresh tensor, or a copy of it, in the very strides that torch gives a format: where sizes
    of 1 leave them open too."""
    strides = torch.empty(tensor.shape, device="meta", memory_format=format).stride()
    if tensor.stride() == strides:
        return tensor
    if tensor.is_contiguous(memory_format=format):
        return tensor.as_strided(tensor.shape, strides)
    return torch.empty_strided(
        tensor.shape, strides, dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)


# ------------------------------------------------------------------------------------------- choice

_GEMM, _FEW, _ATEN = "implicit_gemm", "few_channels", "aten"
_MOST_STRIDE = 8  # the search for a phase's first tap is unrolled


def _can(input: Tensor, weight: Tensor, pixels: int, settings: Settings) -> bool:
    """Whether there are kernels of ours: no float64, no empty channels or kernel, index
    arithmetic of pixels and of the weight in 32 bits."""
    return (
        input.dtype != torch.float64
        and weight.numel() > 0
        and weight.numel() < 2**31
        and pixels < 2**30
        and max(settings.stride) <= _MOST_STRIDE
        and math.prod(settings.stride) * pixels < 2**31
    )


def _is_faster(input: Tensor, weight: Tensor, settings: Settings) -> bool:
    """Whether ours is taken where the user leaves the choice: only at the cliffs of cuDNN that are
    known (64x128x513x513, 3x3, stride 2: 1.2 s against 0.03 s; grouped channels_last: 40 times the
    time of contiguous), until there are measurements."""
    grouped = settings.groups > 1 and min(input.shape[1], weight.shape[0]) > settings.groups
    return (grouped and _suggests_last(input)) or input.numel() >= 2**31


def _has_few_channels(input: Tensor, weight: Tensor, settings: Settings) -> bool:
    """Whether the CUDA C++ kernel of few channels is there and takes these, and a tile of a matrix
    unit would be mostly zeros."""
    outputs, channels, *taps = weight.shape
    stride, _, dilation, groups = settings
    return (
        input.is_cuda
        and (channels <= 4 or (channels <= 16 and outputs <= 16))
        and outputs <= 64
        and max(taps) <= 7
        and max(stride) <= 2
        and max(dilation) == 1
        and groups == 1
        and torch._C._dispatch_has_kernel_for_dispatch_key(
            "dlkernels::conv2d_few_channels_forward", "CUDA"
        )
    )


def _is_ours(input, weight, output_size, settings, own) -> bool:
    pixels = input.shape[0] * max(math.prod(output_size), math.prod(input.shape[2:]))
    return _can(input, weight, pixels, settings) and (own or _is_faster(input, weight, settings))


def is_implicit_gemm(input, weight, output_size, settings, own) -> bool:
    """Whether a convolution is a kernel's of this file."""
    return _algorithm(input, weight, output_size, settings, own) == _GEMM


def _algorithm(input, weight, output_size, settings, own) -> str:
    if not _is_ours(input, weight, output_size, settings, own):
        return _ATEN
    return _FEW if own and _has_few_channels(input, weight, settings) else _GEMM


# ------------------------------------------------------------------------------------------- checks


def _output_size(x: Tensor, weight: Tensor, settings: Settings) -> tuple[int, int]:
    sizes = zip(
        x.shape[2:], weight.shape[2:], settings.stride, settings.padding, settings.dilation,
        strict=True,
    )  # fmt: skip
    height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
    return height, width


def _transposed_size(x: Tensor, weight: Tensor, settings: Settings, more) -> tuple[int, int]:
    sizes = zip(
        x.shape[2:], weight.shape[2:], settings.stride, settings.padding, settings.dilation, more,
        strict=True,
    )  # fmt: skip
    height, width = ((n - 1) * s - 2 * p + d * (k - 1) + o + 1 for n, k, s, p, d, o in sizes)
    return height, width


def _check_settings(op, input, weight, stride, padding, dilation, groups) -> Settings:
    """The settings, once input and weight are what the kernels read."""
    for name, tensor in (("input", input), ("weight", weight)):
        wanted = f"{op}: expected {name} of dtype float32, float64, bfloat16 or float16"
        check(tensor.dtype in _DTYPES, f"{wanted}, got {tensor.dtype}")
        shape = list(tensor.shape)
        check(len(shape) == 4, f"{op}: expected {name} of 4 dimensions, got shape {shape}")
    check_tensor(op, "weight", weight, input.device, input.dtype)
    for name, pair, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        wanted = f"{op}: expected {name} of 2 numbers of at least {least}, got {list(pair)}"
        check(len(pair) == 2 and min(pair) >= least, wanted)
    check(groups >= 1, f"{op}: expected at least 1 group, got {groups}")
    return Settings(tuple(stride), tuple(padding), tuple(dilation), groups)


def check_convolution(op, input, weight, bias, stride, padding, dilation, groups):
    """The settings and the output's rows and columns; RuntimeError where there is no such
    convolution."""
    settings = _check_settings(op, input, weight, stride, padding, dilation, groups)
    k, c = weight.shape[:2]
    shapes = f"weight of shape {list(weight.shape)} for input of shape {list(input.shape)}"
    check(input.shape[1] == c * groups, f"{op}: {groups} groups: {shapes}")
    check(k % groups == 0, f"{op}: expected output channels in {groups} groups, got {k}")
    if bias is not None:
        check_tensor(op, "bias", bias, input.device, input.dtype, [k])
    size = _output_size(input, weight, settings)
    check(min(size) >= 0 and min(weight.shape[2:]) >= 1, f"{op}: no output of {shapes}")
    return settings, size


def _check_transposed(op, input, weight, bias, stride, padding, more, groups, dilation):
    settings = _check_settings(op, input, weight, stride, padding, dilation, groups)
    c, k = weight.shape[:2]
    shapes = f"weight of shape {list(weight.shape)} for input of shape {list(input.shape)}"
    check(input.shape[1] == c and c % groups == 0, f"{op}: {groups} groups: {shapes}")
    if bias is not None:
        check_tensor(op, "bias", bias, input.device, input.dtype, [k * groups])
    size = _transposed_size(input, weight, settings, more)
    check(min(size) >= 0 and min(weight.shape[2:]) >= 1, f"{op}: no output of {shapes}")
    return settings, size


def _check_gradient(op, grad_output, input, channels, size):
    shape = [input.shape[0], channels, *size]
    check_tensor(op, "grad_output", grad_output, input.device, input.dtype, shape)


# --------------------------------------------------------------------------------------- raw ops

_aten = torch.ops.aten
_ops = torch.ops.dlkernels


def _apply(y: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return torch.relu_(y)
    if activation == "leaky_relu":
        return torch.nn.functional.leaky_relu_(y, SLOPE.value)
    if activation == "tanh":
        return torch.tanh_(y)
    return torch.sigmoid_(y) if activation == "sigmoid" else y


def _before_activation(d: Tensor, output: Tensor | None, activation: str) -> Tensor:
    """The gradient before the activation, of that after it."""
    if activation == "relu":
        return _aten.threshold_backward(d, output, 0)
    if activation == "leaky_relu":
        return _aten.leaky_relu_backward(d, output, SLOPE.value, True)
    if activation == "tanh":
        return _aten.tanh_backward(d, output)
    return _aten.sigmoid_backward(d, output) if activation == "sigmoid" else d


def _conv2d(
    input, weight, bias, stride, padding, dilation, groups, activation, exact, own
):  # fmt: skip
    op = "conv2d"
    settings, size = check_convolution(op, input, weight, bias, stride, padding, dilation, groups)
    check_activation(op, activation)
    algorithm = _algorithm(input, weight, size, settings, own)
    if algorithm == _FEW:
        return _ops.conv2d_few_channels_forward(
            input, weight, bias, stride, padding, activation, False
        )[0]
    if algorithm == _ATEN:
        y = _aten.convolution(input, weight, bias, stride, padding, dilation, False, (0, 0), groups)
        y = _apply(y, activation)
    else:
        y, _ = convolve(input, weight, bias, settings, activation, exact)
    return formatted(y, _format(input, weight))


def _conv2d_prepare(weight, stride, dilation, groups):
    """Nothing: no kernel here reads anything but the weight."""
    return weight.new_empty(0, dtype=torch.float32)


def _conv2d_prepared(
    input, weight, prepared, bias, stride, padding, dilation, groups, activation, exact, own
):  # fmt: skip
    return _conv2d(input, weight, bias, stride, padding, dilation, groups, activation, exact, own)


def _conv2d_backward(
    grad_output, input, weight, output, stride, padding, dilation, groups, activation, exact, own,
    want_input, want_weight, want_bias,
):  # fmt: skip
    op = "conv2d_backward"
    settings, size = check_convolution(op, input, weight, None, stride, padding, dilation, groups)
    check_activation(op, activation)
    _check_gradient(op, grad_output, input, weight.shape[0], size)
    if activation != "none":
        check(output is not None, f"{op}: activation {activation} needs the output")
        check_tensor(op, "output", output, input.device, input.dtype, grad_output.shape)
    wanted = [want_input, want_weight, want_bias]
    algorithm = _algorithm(input, weight, size, settings, own)
    if algorithm == _FEW:
        output = grad_output if output is None else output  # of no activation it is not read
        argmax = input.new_empty(0, dtype=torch.uint8)
        return _ops.conv2d_few_channels_backward(
            grad_output, input, weight, output, argmax, stride, padding, activation, False, *wanted
        )
    d = _before_activation(grad_output, output, activation)
    if algorithm == _ATEN:
        return _gradients_of_aten(d, input, weight, settings, False, (0, 0), wanted)
    dx, dw, db = (input.new_empty(0) for _ in range(3))
    if want_input:
        dx, _ = input_gradient(d, weight, input.shape, settings, exact)
        dx = formatted(dx, _format(input))
    if want_weight:
        dw = formatted(weight_gradient(d, input, weight.shape, settings, exact), _format(weight))
    if want_bias:
        db = d.sum((0, 2, 3))
    return dx, dw, db


def _gradients_of_aten(d, input, weight, settings, transposed, more, wanted):
    stride, padding, dilation, groups = settings
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    gradients = _aten.convolution_backward(
        d, input, weight, [channels], stride, padding, dilation, transposed, more, groups, wanted
    )
    gradients = [
        g if want else input.new_empty(0) for g, want in zip(gradients, wanted, strict=True)
    ]
    for i, tensor in enumerate((input, weight)):
        if wanted[i]:
            gradients[i] = formatted(gradients[i], _format(tensor))
    return tuple(gradients)


def _conv2d_algorithm(
    input, weight, bias, stride, padding, dilation, groups, activation, exact, own
):  # fmt: skip
    settings, size = check_convolution(
        "conv2d", input, weight, bias, stride, padding, dilation, groups
    )
    return ", ".join([_algorithm(input, weight, size, settings, own)] * 3)


def _conv_transpose2d(
    input, weight, bias, stride, padding, output_padding, groups, dilation, exact, own
):  # fmt: skip
    settings, size = _check_transposed(
        "conv_transpose2d", input, weight, bias, stride, padding, output_padding, groups, dilation
    )
    if not _is_ours(input, weight, size, settings, own):
        y = _aten.convolution(
            input, weight, bias, stride, padding, dilation, True, output_padding, groups
        )
        return formatted(y, _format(input, weight))
    shape = (input.shape[0], weight.shape[1] * groups, *size)
    y, _ = input_gradient(input, weight, shape, settings, exact, bias=bias)
    return formatted(y, _format(input, weight))


def _conv_transpose2d_backward(
    grad_output, input, weight, stride, padding, output_padding, groups, dilation, exact, own,
    want_input, want_weight, want_bias,
):  # fmt: skip
    op = "conv_transpose2d_backward"
    settings, size = _check_transposed(
        op, input, weight, None, stride, padding, output_padding, groups, dilation
    )
    _check_gradient(op, grad_output, input, weight.shape[1] * groups, size)
    if not _is_ours(input, weight, size, settings, own):
        wanted = [want_input, want_weight, want_bias]
        return _gradients_of_aten(
            grad_output, input, weight, settings, True, output_padding, wanted
        )
    dx, dw, db = (input.new_empty(0) for _ in range(3))
    if want_input:
        dx, _ = convolve(grad_output, weight, None, settings, "none", exact)
        dx = formatted(dx, _format(input))
    if want_weight:
        dw = weight_gradient(input, grad_output, weight.shape, settings, exact)
        dw = formatted(dw, _format(weight))
    if want_bias:
        db = grad_output.sum((0, 2, 3))
    return dx, dw, db


def register(key: str) -> None:
    """Registers the raw ops of conv2d on a dispatch key: "CUDA", whose conv2d is Triton's; in
    tests "CPU"."""
    kernels = {
        "conv2d": _conv2d,
        "conv2d_forward": _conv2d,
        "conv2d_prepare": _conv2d_prepare,
        "conv2d_prepared": _conv2d_prepared,
        "conv2d_backward": _conv2d_backward,
        "conv2d_algorithm": _conv2d_algorithm,
        "conv_transpose2d": _conv_transpose2d,
        "conv_transpose2d_forward": _conv_transpose2d,
        "conv_transpose2d_backward": _conv_transpose2d_backward,
    }
    register_kernels(kernels, key)
