"""The emulator that the CUDA kernels are tested on.

Each primitive against its definition in the PTX ISA, and each fault that the emulator is to find,
planted in a kernel that is right without it.
"""

import ctypes
import os
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest
import torch

from tests import emulator

FOLDER = emulator.FOLDER
SOURCES = ["primitive_kernels.cu", "fault_kernels.cu"]
KINDS = ["input", "output", "inout", "scratch"]
FULL = 0xFFFFFFFF


class TensorArgument(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("item", ctypes.c_int64),
        ("dims", ctypes.c_int64),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("kind", ctypes.c_int64),
    ]


class Shape(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_size_t),
        ("cluster", ctypes.c_uint),
        ("cooperative", ctypes.c_uint),
        ("launches", ctypes.c_uint),
    ]


def numbers_array(values):
    values = list(values)
    return (ctypes.c_int64 * max(len(values), 1))(*values)


def triple(value):
    value = (value,) if isinstance(value, int) else value
    return (ctypes.c_uint * 3)(*value, *[1] * (3 - len(value)))


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """launch_kernel of a library with all kernels and the emulator."""
    path = tmp_path_factory.mktemp("cuda_on_cpu") / "libkernels.so"
    emulator.build(path, [FOLDER / name for name in ["launch_kernel.cpp", *SOURCES]])
    function = ctypes.CDLL(str(path)).launch_kernel
    function.restype = ctypes.c_char_p
    return function


@pytest.fixture
def launch(library):
    """launch(kernel, grid, block, kind=…, tensors as [(kind, tensor)], numbers) or an exception."""

    def run(
        name, grid, block, tensors=(), numbers=(), *, shared=0, cluster=1, cooperative=0, launches=1
    ):
        arguments = (TensorArgument * max(len(tensors), 1))()
        keep = []
        for i, (kind, tensor) in enumerate(tensors):
            keep += [numbers_array(tensor.shape), numbers_array(tensor.stride())]
            arguments[i] = TensorArgument(
                f"{kind}".encode(),
                tensor.data_ptr(),
                tensor.element_size(),
                tensor.dim(),
                keep[-2],
                keep[-1],
                KINDS.index(kind if kind in KINDS else "inout"),
            )
        shape = Shape(triple(grid), triple(block), shared, cluster, cooperative, launches)
        text = library(
            name.encode(),
            ctypes.byref(shape),
            ctypes.c_int64(len(tensors)),
            arguments,
            ctypes.c_int64(len(numbers)),
            numbers_array(numbers),
        ).decode()
        if text:
            kind, _, text = text.partition(": ")
            raise {"IndexError": IndexError, "RuntimeError": RuntimeError}[kind](text)

    return run


@pytest.fixture(params=range(3), ids="seed{}".format)
def seed(request, monkeypatch):
    monkeypatch.setenv("DLKERNELS_EMULATED_SEED", str(request.param))


def make(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True)
def same_data(request):
    torch.manual_seed(sum(request.node.name.encode()))


# --- primitives -------------------------------------------------------------------------------


def test_geometry(launch, seed):
    grid, block = (3, 2, 2), (7, 3, 2)
    out = torch.empty(12 * 42, 14, dtype=torch.int32)
    launch("geometry", grid, block, [("output", out)])
    rows = iter(out.tolist())
    for bz, by, bx in np.ndindex(2, 2, 3):
        for rank, (tz, ty, tx) in enumerate(np.ndindex(2, 3, 7)):
            place = [tx, ty, tz, bx, by, bz]
            assert next(rows) == place + [*block, *grid, rank % 32, rank // 32]


SOURCES_OF_LANES = {  # PTX ISA, shfl.sync with the clamp of a whole warp
    "xor": lambda lane, b: lane ^ b,
    "down": lambda lane, b: lane + b if lane + b < 32 else lane,
    "up": lambda lane, b: lane - b if lane >= b else lane,
    "from": lambda lane, b: b % 32,
}


@pytest.mark.parametrize("mask", [FULL, 0x0000FF00, 0x55555555, 1 << 31], ids=hex)
@pytest.mark.parametrize("way", SOURCES_OF_LANES)
def test_shuffles(launch, seed, way, mask):
    lanes = [lane for lane in range(32) if mask >> lane & 1]
    # For each lane an argument whose source is in the mask.
    arguments = torch.zeros(64, dtype=torch.int32)
    sources = torch.zeros(64, dtype=torch.int64)
    for i in range(64):
        lane = i % 32
        if lane in lanes:
            fits = [b for b in range(32) if SOURCES_OF_LANES[way](lane, b) in lanes]
            arguments[i] = fits[int(torch.randint(len(fits), ()))]
            sources[i] = i - lane + SOURCES_OF_LANES[way](lane, int(arguments[i]))
    x, y = make(64), make(64, dtype=torch.float64)
    a, b = torch.empty(64), torch.empty(64, dtype=torch.float64)
    tensors = [("input", x), ("input", y), ("output", a), ("output", b), ("input", arguments)]
    launch("shuffles", 1, 64, tensors, [list(SOURCES_OF_LANES).index(way), 0, mask])
    takes_part = torch.tensor([i % 32 in lanes for i in range(64)])
    torch.testing.assert_close(a, torch.where(takes_part, x[sources], 0), rtol=0, atol=0)
    torch.testing.assert_close(b, torch.where(takes_part, y[sources], 0), rtol=0, atol=0)


@pytest.mark.parametrize("mask", [FULL, 0x00FF00F0, 1], ids=hex)
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_votes(launch, seed, mask, share):
    p = (torch.rand(64) < share).int()
    out = torch.empty(64, 3, dtype=torch.int32)
    launch("votes", 1, 64, [("input", p), ("output", out)], [mask])
    for i in range(64):
        warp = p[i // 32 * 32 :][:32].tolist()
        votes = sum(1 << lane for lane in range(32) if mask >> lane & 1 and warp[lane])
        wanted = [votes, votes != 0, votes == mask] if mask >> i % 32 & 1 else [0, 0, 0]
        assert [out[i, 0].item() & FULL, *out[i, 1:].tolist()] == [int(v) for v in wanted]


def test_atomics(launch, seed):
    blocks, threads = 5, 96
    n = blocks * threads
    counters = torch.zeros(10, dtype=torch.int32)
    before = [torch.empty(n, dtype=torch.int32) for _ in range(2)]
    wide, wide_before = torch.zeros(5, dtype=torch.int64), torch.empty(n, dtype=torch.int64)
    sums = torch.zeros(2, dtype=torch.float64)
    tensors = [("inout", counters), *[("output", b) for b in before]]
    tensors += [("inout", wide), ("output", wide_before), ("inout", sums)]
    launch("atomics", blocks, threads, tensors)
    for five, olds in [(counters[:5], before[0]), (counters[5:], before[1]), (wide, wide_before)]:
        count, highest, won, winner, last = five.tolist()
        assert sorted(olds.tolist()) == list(range(n))
        assert (count, highest) == (n, n - 1)
        assert won == winner and 1 <= won <= n and 0 <= last < n
    assert sums[:1].view(torch.float32)[0] == n / 2 and sums[1] == n / 4


def test_atomics_in_shared_memory(launch, seed):
    out = torch.empty(3, 64, dtype=torch.int32)
    launch("shared_atomics", 3, 64, [("output", out)], shared=16)
    assert [sorted(row) for row in out.tolist()] == [list(range(64))] * 3


@pytest.mark.parametrize("n", [0, 4, 124, 128])
def test_async_copy_fills_with_zeros(launch, seed, n):
    x, out = make(n), torch.empty(128)
    launch("zero_fill", 1, 32, [("input", x), ("output", out)], [n], shared=512)
    assert torch.equal(out, torch.cat([x, torch.zeros(128 - n)]))


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(launch, seed, transposed):
    """PTX ISA, ldmatrix: thread 4i + j holds elements 2j and 2j + 1 of row i, of each matrix."""
    matrices = torch.randperm(256).to(torch.int16).view(4, 8, 8)
    out = torch.empty(32, 4, dtype=torch.int32)
    shared = matrices.contiguous().view(torch.int32)
    launch("load_matrices", 1, 32, [("input", shared), ("output", out)], [transposed], shared=512)
    got = out.view(torch.int16).view(32, 4, 2)
    for lane, matrix, half in np.ndindex(32, 4, 2):
        row, column = lane // 4, 2 * (lane % 4) + half
        wanted = matrices[matrix, column, row] if transposed else matrices[matrix, row, column]
        assert got[lane, matrix, half] == wanted


def fragment_16(group, thread, i):
    """Row and column of element i of a fragment of A, PTX ISA, m16n8k16 with 16-bit types."""
    row = group if i < 2 or 4 <= i < 6 else group + 8
    return row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mma_of_16_bits(launch, seed, dtype):
    a, b, c = make(16, 16, dtype=dtype), make(16, 8, dtype=dtype), make(16, 8)
    x, y, d = torch.empty(32, 8, dtype=dtype), torch.empty(32, 4, dtype=dtype), torch.empty(32, 4)
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        for i in range(8):
            x[lane, i] = a[fragment_16(group, thread, i)]
        for i in range(4):
            y[lane, i] = b[thread * 2 + (i & 1) + (8 if i >= 2 else 0), group]
            d[lane, i] = c[group if i < 2 else group + 8, thread * 2 + (i & 1)]
    tensors = [("input", x.view(torch.int32)), ("input", y.view(torch.int32)), ("inout", d)]
    launch("multiply_matrices", 1, 32, tensors, [int(dtype == torch.float16)])
    wanted = c.double() + a.double() @ b.double()
    for lane, i in np.ndindex(32, 4):
        element = wanted[lane // 4 if i < 2 else lane // 4 + 8, lane % 4 * 2 + (i & 1)]
        assert abs(d[lane, i] - element) <= 1e-5 * (1 + abs(element))


def test_mma_of_tf32(launch, seed):
    """The low 13 bits of each number are not read."""
    a, b, c = make(16, 8), make(8, 8), make(16, 8)
    x, y, d = torch.empty(32, 4), torch.empty(32, 2), torch.empty(32, 4)
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        for i in range(4):
            x[lane, i] = a[group if i in (0, 2) else group + 8, thread if i < 2 else thread + 4]
            d[lane, i] = c[group if i < 2 else group + 8, thread * 2 + (i & 1)]
        for i in range(2):
            y[lane, i] = b[thread if i == 0 else thread + 4, group]
    launch("multiply_matrices", 1, 32, [("input", x), ("input", y), ("inout", d)], [2])
    short = [(m.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for m in (a, b)]
    wanted = c.double() + short[0] @ short[1]
    for lane, i in np.ndindex(32, 4):
        element = wanted[lane // 4 if i < 2 else lane // 4 + 8, lane % 4 * 2 + (i & 1)]
        assert abs(d[lane, i] - element) <= 1e-6 * (1 + abs(element))


def test_widening_every_pattern(launch):
    out = [torch.empty(65536), torch.empty(65536), torch.empty(65536, 2), torch.empty(65536, 2)]
    launch("widen", 128, 512, [("output", t) for t in out])
    bits = torch.arange(65536).to(torch.int16)
    pairs = torch.stack([bits, ~bits], 1)
    for dtype, one, two in [(torch.bfloat16, out[0], out[2]), (torch.float16, out[1], out[3])]:
        same = {"rtol": 0, "atol": 0, "equal_nan": True}
        torch.testing.assert_close(one, bits.view(dtype).float(), **same)
        torch.testing.assert_close(two, pairs.view(dtype).float(), **same)
        zero = one == 0
        assert torch.equal(one[zero].signbit(), bits.view(dtype)[zero].signbit())


def test_narrowing(launch):
    """All upper halves of a float, with lower halves around every point of rounding."""
    low = [0, 1, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    low = torch.tensor(low).repeat_interleave(65536)
    bits = torch.arange(65536).repeat(12) << 16 | low
    x = bits.to(torch.int32).view(torch.float32)
    bf16, f16 = torch.empty(x.numel(), dtype=torch.int16), torch.empty(x.numel(), dtype=torch.int16)
    pairs = [torch.empty(x.numel() // 2, dtype=torch.int32) for _ in range(2)]
    outputs = [("output", t) for t in (bf16, f16, *pairs)]
    count = x.numel() // 2
    launch("narrow", count // 512, 512, [("input", x), *outputs], [count])
    for dtype, got, packed in [(torch.bfloat16, bf16, pairs[0]), (torch.float16, f16, pairs[1])]:
        wanted = torch.where(x.isnan(), 0x7FFF, x.to(dtype).view(torch.int16))
        assert torch.equal(got, wanted.to(torch.int16))
        assert torch.equal(packed.view(torch.int16), got)


def test_approximations(launch):
    x = torch.linspace(-140, 140, 4096 - 16)
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-39, -1e-39, 1, -1, 2, 0.5]
    x = torch.cat([x, torch.tensor([*special, 1e-38, 3e38, 127.99, -126.0, -126.5])])
    exp2, log2, tanh = torch.empty(4096), torch.empty(4096), torch.empty(4096)
    tensors = [("input", x), ("output", exp2), ("output", log2), ("output", tanh)]
    launch("approximations", 16, 256, tensors)
    flushed = torch.where(x.abs() < 2.0**-126, 0, x).double()  # .ftz
    wanted = torch.exp2(flushed)
    wanted = torch.where(wanted < 2.0**-126, 0, wanted)
    wanted = torch.where(wanted >= 2.0**128, float("inf"), wanted)
    torch.testing.assert_close(exp2.double(), wanted, rtol=2**-22, atol=0, equal_nan=True)
    wanted = torch.log2(flushed)
    torch.testing.assert_close(log2.double(), wanted, rtol=2**-22, atol=2**-22, equal_nan=True)
    wanted = torch.tanh(x.double())
    torch.testing.assert_close(tanh.double(), wanted, rtol=2**-22, atol=0, equal_nan=True)


def test_launches_of_an_entry_are_in_order(launch, seed):
    x = torch.zeros(4, 64, dtype=torch.int32)
    launch("increment", 4, 64, [("inout", x)], launches=5)
    assert torch.equal(x, torch.full_like(x, 5))


# --- faults -----------------------------------------------------------------------------------

BLOCKS, THREADS = 4, 64
RACE = "data race: "
FAULTS = {  # kernel: (how it is launched, what is reported of each fault)
    "reverse": ({}, [RACE, RACE]),
    "lanes_through_shared": ({}, [RACE + "read of 4 bytes at offset .* of shared memory"]),
    "broadcast": ({}, [RACE]),
    "divergent": ({}, ["barrier divergence"] * 3),
    "chain": ({}, [RACE + ".* of shared memory|never written"] * 2),
    "named": (
        {},
        [
            RACE + "|never written",
            r"deadlock: .*64 threads wait at sync_named\(3, 96\)",
            r"sync_named\(3, \d+\) while thread .* waits at sync_named",
        ],
    ),
    "masks": (
        {},
        [
            "shuffle_down: mask 0xfffffff7 lacks the caller, lane 3",
            "lanes 0x80 of mask 0xffffffff never come: they have ended|lane 7 never comes",
            "lane .* never comes: it waits at shuffle_(up|xor)",
            "deadlock: lanes 0x800 never come to shuffle_from .*: lane 11 waits at sync_block",
            "lane .* reads lane .*, which is not in the mask",
            "a vote with mask 0x.* never comes: it waits at a vote",
        ],
    ),
    "stuck": ({}, ["deadlock: .*mbarrier_wait of parity 1", "deadlock: .*spins"]),
    "rows": (
        {},
        [
            r"out of bounds: read of 4 bytes at .*, offset \d+ of `input` \(1024 bytes\)",
            r"out of bounds: write of 4 bytes at .*, offset \d+ of `output` \(1024 bytes\)",
            "out of bounds: read of 4 bytes at .*, offset -4 of `input`",
            "out of bounds: read of 4 bytes at .*, which is not tracked memory",
        ],
    ),
    "tail": ({}, [r"1 of 256 elements of output `output` are not written, the first at \[3, 63\]"]),
    "scale": ({}, ["write to an input: write of 4 bytes at offset .* of `input`"]),
    "shared_bounds": (
        {"shared": 4 * THREADS},
        [
            r"out of bounds: write of 4 bytes at .* offset 256 of shared memory \(256 bytes\)",
            "out of bounds: read of 4 bytes at .* offset 256 of shared memory",
            "out of bounds: read of 4 bytes at .* offset -4 of shared memory",
        ],
    ),
    "unwritten": (
        {},
        [
            "never written: read of 4 bytes at offset 36 of shared memory",
            "never written: read of 4 bytes at offset .* of `scratch`",
            "never written: read of 4 bytes at offset .* of `output`",
        ],
    ),
    "alignment": ({}, ["misaligned: read of 16 bytes", "misaligned: read of 4 bytes"]),
    "local_memory": ({}, ["local memory of another thread: read"]),
    "streaming": ({}, ["load_streaming of memory that this launch writes: .* `scratch`"]),
    "total": ({}, [RACE + ".* of `counters`"] * 2),
    "last_block": ({}, [RACE + ".* of `scratch`"] * 2 + [RACE + ".*`counters`", RACE]),
    "neighbours": ({"cooperative": 1}, [RACE + "|never written"]),
    "flag": ({"cooperative": 1}, [RACE + ".*`counters`", RACE + "|never written", RACE]),
    "ring": (
        {"cluster": 4},
        [
            "before any barrier of the cluster: read",
            RACE + "|never written",
            "the block ends, and nothing lets it wait|shared memory of an ended block",
            "the block ends, and nothing lets it wait|shared memory of an ended block",
        ],
    ),
    "split": (
        {"cluster": 4},
        [
            RACE + ".* of shared memory|never written",
            "cluster_arrive twice without cluster_wait",
            "ends between cluster_arrive and cluster_wait|ends, and nothing lets it wait",
            "cluster_wait without cluster_arrive",
        ],
    ),
    "steps": ({"cooperative": 1}, [RACE + ".*`output`"]),
    "pipeline": (
        {},
        [
            "async copy not waited for: read",
            "async copy not waited for: read",
            "async copy not waited for: read|never written|" + RACE,
            "async copy not waited for: read|" + RACE,
            "async copy not waited for: read",
        ],
    ),
    "bulk": (
        {},
        [
            "async copy not waited for: read|never written",
            "deadlock: .*mbarrier_wait of parity 0",
            "async copy not waited for: read|never written|" + RACE,
        ],
    ),
    "specialised": ({}, ["async copy not waited for|" + RACE + "|more arrivals"] + [RACE] * 2),
}
CASES = [
    pytest.param(name, fault, id=f"{name}-{fault}")
    for name, (_, reports) in FAULTS.items()
    for fault in range(len(reports) + 1)
]


def apart(tensor):
    """The same, with memory around it that is no other tensor's."""
    margin = 4 * THREADS
    whole = torch.empty(tensor.numel() + 2 * margin, dtype=tensor.dtype)
    return whole[margin:-margin].view_as(tensor).copy_(tensor)


def fault_tensors(blocks):
    x = make(blocks, THREADS)
    tensors = {"input": x, "output": x, "scratch": x, "counters": torch.zeros(2, dtype=torch.int32)}
    return [(kind, apart(tensor)) for kind, tensor in tensors.items()]


def wanted_output(name, x):
    """What the kernels that do more than copy write, where they are right."""
    if name == "reverse":
        return x.flip(1) + 1
    if name == "lanes_through_shared":
        return x.view(-1, 2).flip(1).view_as(x)
    if name == "broadcast":
        return (3 * x[:, :1] + 3).expand_as(x)
    if name == "chain":
        return 2 * x.view(-1, 2, 32)[:, :, :1].expand(-1, 2, 32).reshape(x.shape)
    if name == "steps":
        return x.roll(-3, 0)
    if name == "specialised":
        lanes = x.view(-1, 16, 2).sum(0).flip(1).flatten()
        return torch.cat([torch.zeros(32), lanes]).expand_as(x)
    if name in ("neighbours", "ring", "split"):
        return x.roll(-1, 0)
    if name in ("pipeline", "bulk"):
        return x.sum(0).flip(0).expand_as(x)
    if name == "flag":
        return x[:1].expand_as(x)
    return {"scale": 2 * x, "unwritten": 2 * x}.get(name, x)


@pytest.mark.parametrize("name, fault", CASES)
def test_faults_are_found(launch, seed, name, fault):
    options, reports = FAULTS[name]
    options = {"shared": 4096, **options}
    blocks = options.pop("blocks", BLOCKS)
    tensors = fault_tensors(blocks)
    elsewhere = (ctypes.c_float * 64)()  # memory of the host that is no tensor
    numbers = [fault, ctypes.addressof(elsewhere)]

    def run():
        launch(name, blocks, THREADS, tensors, numbers, **options)

    if fault:
        with pytest.raises(RuntimeError, match=reports[fault - 1]) as error:
            run()
        known = fault == 1 and name == "tail"  # found when the entry ends
        place = rf"kernel {name}(, block \(\d+, 0, 0\), thread \(\d+, 0, 0\))?: "
        assert known or re.match(place, str(error.value))
        return
    run()
    x, out = tensors[0][1], tensors[1][1]
    if name == "last_block":
        rows = (out != x).any(1)
        assert rows.sum() == 1
        torch.testing.assert_close(out[rows][0], x.sum(0))
    elif name not in ("named", "masks"):
        torch.testing.assert_close(out, wanted_output(name, x))


def test_a_report_names_lines_and_both_threads(launch, monkeypatch):
    monkeypatch.setenv("DLKERNELS_EMULATED_SEED", "1")
    with pytest.raises(RuntimeError) as error:
        launch("total", BLOCKS, THREADS, fault_tensors(BLOCKS), [1])
    lines = (FOLDER / "fault_kernels.cu").read_text().splitlines()
    (line,) = (i for i, text in enumerate(lines, 1) if "COUNTERS[0] += 1" in text)
    here = rf"fault_kernels\.cu:{line}"
    block = r"\(\d, 0, 0\)"
    assert re.fullmatch(
        rf"kernel total, block {block}, thread \(0, 0, 0\): {here}: data race: "
        rf"read of 4 bytes at offset 0 of `counters` \(8 bytes\); "
        rf"thread \(0, 0, 0\) of block {block} wrote it at {here}, and nothing orders the two "
        r"\(DLKERNELS_EMULATED_SEED=1\)",
        str(error.value),
    )


def test_a_failed_index_check_is_an_index_error(launch, seed):
    tensors = fault_tensors(BLOCKS)
    with pytest.raises(IndexError, match=r"^Target 1099511627776 is out of bounds\.$"):
        launch("target", BLOCKS, THREADS, tensors, [1])
    launch("target", BLOCKS, THREADS, tensors, [0])
    assert torch.equal(tensors[1][1], tensors[0][1])


def test_a_stack_overflow_is_reported(launch):
    with pytest.raises(RuntimeError, match="the stack of a thread overflows"):
        launch("deep", 1, 64, [("input", make(4)), ("output", torch.empty(64))])


@pytest.mark.parametrize(
    "grid, block, options, report",
    [
        (1, 1025, {}, "a block has 1 to 1024 threads"),
        (0, 32, {}, "an empty grid"),
        ((1, 70000), 32, {}, "too large a grid"),
        (1, 32, {"shared": 228 << 10}, "a block has at most 232448 bytes"),
        (6, 32, {"cluster": 4}, "no multiple of the cluster"),
        (16, 32, {"cluster": 16}, "a cluster has 1 to 8 blocks"),
        (1000, 1024, {"cooperative": 1}, "a cooperative grid has at most 8 blocks"),
    ],
)
def test_impossible_launches(launch, grid, block, options, report):
    with pytest.raises(RuntimeError, match=report):
        launch("many_barriers", grid, block, [], [1], **options)


def test_there_are_no_clusters_before_sm_90(launch, monkeypatch):
    monkeypatch.setenv("DLKERNELS_EMULATED_CC", "80")
    with pytest.raises(RuntimeError, match="clusters need compute capability 9.0"):
        launch("ring", 4, THREADS, fault_tensors(4), [0], shared=4096, cluster=4)
    with pytest.raises(RuntimeError, match="a block has at most 166912 bytes"):
        launch("many_barriers", 1, 32, [], [1], shared=200 << 10)


def test_a_grid_barrier_needs_a_cooperative_launch(launch):
    with pytest.raises(RuntimeError, match="sync_grid in a launch that is not cooperative"):
        launch("neighbours", BLOCKS, THREADS, fault_tensors(BLOCKS), [0])


# --- tracked memory ---------------------------------------------------------------------------


def test_an_output_may_be_its_input(launch, seed):
    x = make(BLOCKS, THREADS)
    wanted = 2 * x
    tensors = [("input", x), ("output", x), ("scratch", torch.empty(1)), ("counters", x)]
    with pytest.raises(RuntimeError, match=RACE):  # a row is read that another block has written
        launch("pipeline", BLOCKS, THREADS, tensors[:2], [0], shared=4096)
    x.copy_(wanted / 2)
    launch("scale", BLOCKS, THREADS, tensors[:2], [0])
    assert torch.equal(x, wanted)


def test_gaps_of_an_output_stay(launch, seed):
    whole = torch.full((BLOCKS, 2 * THREADS), 7.0)
    x, out = make(BLOCKS, THREADS), whole[:, :THREADS]
    with pytest.raises(RuntimeError, match=r"128 of 256 elements .* the first at \[2, 0\]"):
        launch("tail", BLOCKS, THREADS, [("input", x), ("output", out)], [0])


def test_a_part_of_an_output_is_still_the_output(launch, seed):
    x, out = make(BLOCKS, THREADS), torch.empty(BLOCKS, THREADS)
    tensors = [("input", x), ("output", out), ("output", out[1])]
    launch("tail", BLOCKS, THREADS, tensors, [0])
    with pytest.raises(RuntimeError, match=r"1 of 256 elements .* the first at \[3, 63\]"):
        launch("tail", BLOCKS, THREADS, tensors, [1])
    halves = [("input", x), ("output", out[:3]), ("output", out[2:])]
    with pytest.raises(RuntimeError, match="`output` overlaps `output`"):
        launch("tail", BLOCKS, THREADS, halves, [0])


# --- around it --------------------------------------------------------------------------------


def test_launches_from_several_threads(launch):
    failures = []

    def work():
        try:
            for _ in range(20):
                tensors = fault_tensors(BLOCKS)
                launch("reverse", BLOCKS, THREADS, tensors, [0], shared=4096)
                assert torch.equal(tensors[1][1], tensors[0][1].flip(1) + 1)
                with pytest.raises(RuntimeError, match=RACE):
                    launch("reverse", BLOCKS, THREADS, tensors, [1], shared=4096)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_launch_in_a_forked_child(launch):
    tensors = fault_tensors(BLOCKS)
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            launch("many_barriers", 1, 32, [], [100])

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(5):
            child = os.fork()
            if child == 0:
                try:
                    launch("reverse", BLOCKS, THREADS, tensors, [0], shared=4096)
                    os._exit(0)
                finally:
                    os._exit(1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        thread.join()


@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("source", SOURCES)
def test_the_kernels_are_cuda(source, architecture, tmp_path):
    command = ["nvcc", "-std=c++20", f"-arch={architecture}", "-Werror", "all-warnings", "-cubin"]
    subprocess.run([*command, FOLDER / source, "-o", tmp_path / "kernels.cubin"], check=True)
