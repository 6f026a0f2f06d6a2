"""csrc/cpu/simd.h through tests/simd_probe.cpp, for every instruction set that this CPU can run."""

import ctypes
import itertools
import mmap
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from instruction_sets import NAMES, ROOT, compile_library, skip_if_unable

TYPES = {"float": np.float32, "double": np.float64}
# Types in memory: numpy's type of the same width, and that of the lanes.
STORED = {
    "float": (np.float32, np.float32),
    "double": (np.float64, np.float64),
    "bf16": (np.uint16, np.float32),
    "f16": (np.float16, np.float32),
}
HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}

by_type = pytest.mark.parametrize("kind", TYPES)
by_half = pytest.mark.parametrize("half", HALVES)
by_path = pytest.mark.parametrize("path", ["vectors", "elements"])


class Probe:
    """The compiled probe, called with numpy arrays."""

    def __init__(self, library: Path, fused: bool):
        self.library = ctypes.CDLL(str(library))
        self.fused = fused  # fma rounds once

    def size(self, kind: str) -> int:
        function = self.library[f"size_{kind}"]
        function.restype = ctypes.c_int64
        return function()

    def call(self, name: str, *arguments: np.ndarray | int, returns=None):
        """Arrays are passed by their address, integers as int64."""
        function = self.library[name]
        function.restype = returns
        return function(
            *(
                ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else ctypes.c_int64(a)
                for a in arguments
            )
        )

    def map(self, name: str, kind: str, *inputs: np.ndarray) -> np.ndarray:
        inputs = [np.ascontiguousarray(x, TYPES[kind]) for x in inputs]
        out = np.empty(inputs[0].size + 64, TYPES[kind])[: inputs[0].size]  # a wrong tail fits
        self.call(f"{name}_{kind}", out, out.size, *inputs)
        return out


@pytest.fixture(scope="session", params=NAMES)
def probe(request, tmp_path_factory) -> Probe:
    skip_if_unable(request.param)
    library = tmp_path_factory.mktemp("simd") / f"probe_{request.param}.so"
    source = ROOT / "tests" / "simd_probe.cpp"
    compile_library(request.param, [source], library, f"-I{ROOT / 'csrc' / 'cpu'}")
    return Probe(library, fused=request.param != "plain")


def bits(x: np.ndarray) -> np.ndarray:
    return x.view(f"u{x.itemsize}")


def ulp(reference: np.ndarray, dtype) -> np.ndarray:
    """The distance of neighbours of dtype at reference, a longdouble; never below the smallest."""
    info = np.finfo(dtype)
    exponent = np.maximum(np.frexp(reference)[1] - 1, info.minexp)
    return np.ldexp(np.longdouble(1), exponent - info.nmant)


def assert_ulps(got: np.ndarray, x: np.ndarray, reference: np.ndarray, bound: float = 2) -> None:
    errors = np.abs(got.astype(np.longdouble) - reference) / ulp(reference, got.dtype)
    worst = int(np.argmax(np.where(np.isnan(errors), np.inf, errors)))
    assert errors[worst] <= bound, (
        f"{float(errors[worst]):.3f} ulp at {x[worst]!r}: got {got[worst]!r}, "
        f"expected {reference[worst]!r}"
    )


def around(values, dtype, steps: int = 50) -> np.ndarray:
    """Each value with its neighbours on both sides."""
    values = np.asarray(values, dtype)
    whole = bits(values).astype(np.int64)
    return bits_as(dtype, (whole[:, None] + np.arange(-steps, steps + 1)).ravel())


def bits_as(dtype, whole: np.ndarray) -> np.ndarray:
    return whole.astype(f"u{np.dtype(dtype).itemsize}").view(dtype)


# --- functions ----------------------------------------------------------------------------------


@by_type
def test_exp(probe, kind):
    dtype, ln2 = TYPES[kind], np.log(np.longdouble(2))
    lowest, highest = {"float": (-126, 127.5), "double": (-1022, 1023.5)}[kind]
    low, high = dtype(lowest * ln2), dtype(highest * ln2)
    ties = (np.arange(int(lowest) + 1, int(highest)) + 0.5) * ln2  # where n changes
    x = np.concatenate(
        [
            np.random.uniform(low, high, 500_000),
            np.random.uniform(-1, 1, 200_000),
            np.random.standard_normal(50_000) * 10.0 ** -np.random.randint(1, 20, 50_000),
            around(ties, dtype, 5),
            around([low, high, 1, -1], dtype),
            [0.0, -0.0],
        ]
    ).astype(dtype)
    x = x[(x >= low) & (x < high * dtype(1 - 1e-6))]
    reference = np.exp(x.astype(np.longdouble))
    normal = reference >= np.finfo(dtype).tiny
    assert_ulps(probe.map("exp", kind, x)[normal], x[normal], reference[normal])


@by_type
def test_exp_outside_its_range(probe, kind):
    dtype, ln2 = TYPES[kind], np.log(2.0)
    bias = {"float": 127, "double": 1023}[kind]
    largest = np.finfo(dtype).max
    inf = np.concatenate([np.linspace((bias + 0.501) * ln2, 2 * bias, 1001), [largest, np.inf]])
    assert (probe.map("exp", kind, inf) == np.inf).all()
    zero = np.concatenate([np.linspace(-(bias - 0.499) * ln2, -2e3, 1001), [-largest, -np.inf]])
    assert (probe.map("exp", kind, zero) == 0).all()
    assert np.isnan(probe.map("exp", kind, np.array([np.nan, -np.nan]))).all()
    # n is still -126 (-1022): the result is not normal, and not yet 0.
    between = np.linspace(-(bias - 0.501) * ln2, -(bias - 1) * ln2, 1001).astype(dtype)
    assert_ulps(probe.map("exp", kind, between), between, np.exp(between.astype(np.longdouble)))


@by_type
def test_log(probe, kind):
    dtype = TYPES[kind]
    info = np.finfo(dtype)
    exponents = np.arange(info.minexp, info.maxexp)
    powers = np.ldexp(dtype(1), exponents)
    roots = (powers[:-1].astype(np.longdouble) * np.sqrt(np.longdouble(2))).astype(dtype)
    first, last = bits(np.array([info.tiny, info.max], dtype)).tolist()
    x = np.concatenate(
        [
            bits_as(dtype, np.random.randint(first, last, 500_000, dtype=np.int64)),
            np.random.uniform(0.5, 2, 300_000).astype(dtype),
            (1 + np.random.standard_normal(50_000) * 10.0 ** -np.random.randint(2, 16, 50_000)),
            around(powers[1:], dtype, 3),
            around(roots, dtype, 3),
            around([1], dtype, 1000),
            [info.tiny, info.max],
        ]
    ).astype(dtype)
    assert_ulps(probe.map("log", kind, x), x, np.log(x.astype(np.longdouble)))
    assert np.isnan(probe.map("log", kind, np.array([np.nan, -np.nan]))).all()
    assert probe.map("log", kind, np.ones(1))[0] == 0


@by_type
def test_tanh(probe, kind):
    dtype = TYPES[kind]
    info = np.finfo(dtype)
    last = int(bits(np.array([info.max], dtype))[0])
    x = np.concatenate(
        [
            np.random.uniform(0, 25, 300_000),
            np.random.uniform(0, 1, 300_000),
            bits_as(dtype, np.random.randint(0, last, 100_000, dtype=np.int64)),
            around([0.625, 1, 8, 9, 20, 44, 88, 355, 710], dtype),
            [info.smallest_subnormal, info.tiny, info.max],
        ]
    ).astype(dtype)
    got = probe.map("tanh", kind, x)
    assert_ulps(got, x, np.tanh(x.astype(np.longdouble)))
    np.testing.assert_array_equal(bits(probe.map("tanh", kind, -x)), bits(-got))
    special = np.array([0.0, -0.0, np.inf, -np.inf], dtype)
    expected = np.array([0.0, -0.0, 1, -1], dtype)
    np.testing.assert_array_equal(bits(probe.map("tanh", kind, special)), bits(expected))
    assert np.isnan(probe.map("tanh", kind, np.array([np.nan, -np.nan]))).all()


# --- arithmetic ---------------------------------------------------------------------------------


def pairs(dtype) -> tuple[np.ndarray, np.ndarray]:
    """Every pair of special values, and random ones; an odd count, so that the tail is not full."""
    info = np.finfo(dtype)
    special = [0, 1, 2, info.tiny, info.smallest_subnormal, info.max, np.inf, np.nan]
    special = np.array([*special, *(-value for value in special)], dtype)
    a, b = np.array(list(itertools.product(special, special)), dtype).T
    return (
        np.concatenate([a, np.random.standard_normal(1001).astype(dtype)]),
        np.concatenate([b, np.random.standard_normal(1001).astype(dtype)]),
    )


@by_type
@pytest.mark.parametrize("name", ["max", "min", "copysign", "less", "exceeds", "select", "abs"])
def test_to_the_bit(probe, kind, name):
    a, b = pairs(TYPES[kind])
    with np.errstate(invalid="ignore"):
        greater, less = a > b, a < b
    if name == "abs":
        got, expected = probe.map("abs", kind, a), np.abs(a)
    elif name == "select":
        yes, no = np.random.permutation(a), np.random.permutation(b)
        got, expected = probe.map("select", kind, a, b, yes, no), np.where(less, yes, no)
    else:
        got = probe.map(name, kind, a, b)
        expected = {
            "max": np.where(greater, a, b),
            "min": np.where(less, a, b),
            "copysign": np.copysign(a, b),
            "less": less.astype(a.dtype),
            "exceeds": (greater | np.isnan(a)).astype(a.dtype),
        }[name]
    np.testing.assert_array_equal(bits(got), bits(expected))


@by_type
def test_arithmetic(probe, kind):
    a, b = pairs(TYPES[kind])
    functions = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
    for name, function in functions.items():
        with np.errstate(all="ignore"):
            expected = function(a, b)
        got = probe.map(name, kind, a, b)
        np.testing.assert_array_equal(got, expected, err_msg=name)
        number = ~np.isnan(expected)
        np.testing.assert_array_equal(bits(got[number]), bits(expected[number]), err_msg=name)


@by_type
def test_fma(probe, kind):
    """Rounded once where the set has the instruction, at most twice where not."""
    dtype = TYPES[kind]
    a, b, c = np.random.standard_normal((3, 3001)).astype(dtype)
    c[1::2] = -(a * b)[1::2]  # only the rounding of a*b is left
    got = probe.map("fma", kind, a, b, c).astype(np.longdouble)
    product = a.astype(np.longdouble) * b
    exact, unit = product + c, np.longdouble(np.finfo(dtype).eps) / 2
    bound = unit * np.abs(exact) + 2.0**-62 * np.abs(product)
    if not probe.fused:
        bound += unit * np.abs(product) * (1 + unit)
    assert (np.abs(got - exact) <= bound).all()


@by_type
@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -np.inf])
def test_broadcast(probe, kind, value):
    out = np.full(probe.size(kind), 7, TYPES[kind])
    scalar = ctypes.c_float if kind == "float" else ctypes.c_double
    probe.library[f"broadcast_{kind}"](ctypes.c_void_p(out.ctypes.data), scalar(value))
    np.testing.assert_array_equal(bits(out), bits(np.full_like(out, value)))


@by_type
def test_sum_and_max_element(probe, kind):
    scalar = ctypes.c_float if kind == "float" else ctypes.c_double
    size, dtype = probe.size(kind), TYPES[kind]
    eps = np.finfo(dtype).eps
    for _ in range(200):
        a = np.random.standard_normal(size).astype(dtype)
        total = probe.call(f"sum_{kind}", a, returns=scalar)
        exact = a.astype(np.longdouble).sum()
        assert abs(total - exact) <= (size - 1) * eps / 2 * np.abs(a).sum()
        assert probe.call(f"max_element_{kind}", a, returns=scalar) == a.max()
    for lane in range(size):  # every lane counts, once
        a = np.zeros(size, dtype)
        a[lane] = 3
        assert probe.call(f"sum_{kind}", a, returns=scalar) == 3
        a = np.full(size, -np.inf, dtype)
        a[lane] = -2
        assert probe.call(f"max_element_{kind}", a, returns=scalar) == -2


@by_type
def test_first(probe, kind):
    size, dtype = probe.size(kind), TYPES[kind]
    a, b = np.random.standard_normal((2, size)).astype(dtype)
    for n in range(1, size + 1):
        out = np.empty_like(a)
        probe.call(f"first_{kind}", out, n, a, b)
        np.testing.assert_array_equal(out, np.where(np.arange(size) < n, a, b))


@by_type
def test_masks_as_bits(probe, kind):
    """Lane i is bit i, both ways; a mask does not heed bits beyond its lanes."""
    size, dtype = probe.size(kind), TYPES[kind]
    yes, no = np.random.standard_normal((2, size)).astype(dtype)
    yes[0] = np.nan
    lanes = 1 << np.arange(size)
    each = range(1 << size) if size <= 8 else np.random.randint(0, 1 << size, 500)
    for wanted in (*each, 0, (1 << size) - 1, *lanes.tolist()):
        where = (int(wanted) & lanes) != 0
        less = probe.call(
            f"bits_of_{kind}", np.where(where, -1, 1).astype(dtype), np.zeros(size, dtype),
            returns=ctypes.c_uint32,
        )  # fmt: skip
        assert less == wanted
        for beyond in (0, 1 << size, (1 << 32) - (1 << size)):
            out = np.empty_like(yes)
            probe.call(f"mask_of_{kind}", out, int(wanted) | beyond, yes, no)
            np.testing.assert_array_equal(bits(out), bits(np.where(where, yes, no)))


@by_type
def test_transpose_pieces(probe, kind):
    """Rows of 16 bytes, apart from each other, to columns, and back."""
    size, dtype = probe.size(kind), TYPES[kind]
    columns, stride = 16 // dtype().itemsize, 16 // dtype().itemsize + 3
    rows = np.random.standard_normal((size, stride)).astype(dtype)
    out = np.empty((columns, size), dtype)
    probe.call(f"transpose_rows_{kind}", rows, stride, out)
    np.testing.assert_array_equal(out, rows[:, :columns].T)
    back = rows.copy()
    back[:, :columns] = np.nan
    probe.call(f"transpose_columns_{kind}", out, back, stride)
    np.testing.assert_array_equal(back, rows)


@by_type
def test_conversion_to_double(probe, kind):
    size, dtype = probe.size("double"), TYPES[kind]
    narrow = np.random.standard_normal(size).astype(dtype)
    wide, back = np.empty(size), np.empty(size, dtype)
    probe.call(f"load_double_{kind}", narrow, wide)
    np.testing.assert_array_equal(wide, narrow.astype(np.float64))
    wide = np.random.standard_normal(size)
    probe.call(f"store_rounded_{kind}", wide, back)
    np.testing.assert_array_equal(back, wide.astype(dtype))
    narrow = np.random.standard_normal(probe.size(kind)).astype(dtype)
    wide = np.empty(len(narrow))
    probe.call(f"to_doubles_{kind}", narrow, wide)
    np.testing.assert_array_equal(wide, narrow.astype(np.float64))


# --- memory -------------------------------------------------------------------------------------


def fenced_page() -> np.ndarray:
    """One page of bytes between two that nobody may touch."""
    page = mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, 3 * page), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    for at in (0, 2 * page):
        address = ctypes.c_void_p(memory.ctypes.data + at)
        if libc.mprotect(address, ctypes.c_size_t(page), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    return memory[page : 2 * page]


def touch(probe: Probe, kind: str) -> None:
    """Loads and stores at both ends of the page and inside, for every n; 0 is the whole vector."""
    stored, lane = STORED[kind]
    size = probe.size("double" if kind == "double" else "float")
    page, width = fenced_page(), np.dtype(stored).itemsize
    values = np.random.randint(1, 100, size).astype(lane)  # exact in every type
    if kind == "bf16":
        small = (bits(values) >> 16).astype(np.uint16)
    else:
        small = values.astype(stored)
    calls = [("", n) for n in range(size + 1)] + [("_first", n) for n in range(1, size + 1)]
    for suffix, n in calls:
        count = n or size
        for start in (0, 7 * width, page.size - count * width):
            end, case = start + count * width, f"{kind} {suffix} n={n} at {start}"
            page[:] = 0xFF  # a NaN in every type
            page[start:end] = small[:count].view(np.uint8)
            lanes = np.full(size, 5, lane)
            probe.call(f"load{suffix}_{kind}", page[start:], n, lanes)
            expected = np.where(np.arange(size) < count, values, 0)
            np.testing.assert_array_equal(lanes, expected, err_msg=f"load {case}")

            page[:] = canary = np.random.randint(0, 256, page.size, dtype=np.uint8)
            canary[start:end] = small[:count].view(np.uint8)
            probe.call(f"store{suffix}_{kind}", page[start:], n, values)
            np.testing.assert_array_equal(page, canary, err_msg=f"store {case}")


@pytest.mark.parametrize("kind", STORED)
def test_loads_and_stores_touch_nothing_else(probe, kind):
    """In a child, which a byte too far kills."""
    child = multiprocessing.get_context("fork").Process(target=touch, args=(probe, kind))
    child.start()
    child.join()
    assert child.exitcode == 0, f"exit {child.exitcode}: -11 is a touch of a forbidden page"


# --- bf16 and f16 -------------------------------------------------------------------------------


@by_half
@by_path
def test_widening_is_exact(probe, half, path):
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    expected = every.view(HALVES[half]).float().numpy()
    got = np.empty_like(expected)
    probe.call(f"widen_{path}_{half}", got, got.size, every.numpy())
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(bits(got[number]), bits(expected[number]))
    assert np.isnan(got[~number]).all()


@by_half
@by_path
def test_narrowing_rounds_to_nearest_even(probe, half, path):
    """Against torch: random bits, and every tie between neighbours with the floats beside it."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(HALVES[half]).double()
    every = every[torch.isfinite(every)].unique()
    ties = ((every[1:] + every[:-1]) / 2).float().numpy()
    largest = float(every[-1])
    overflow = np.float32(largest + (largest - float(every[-2])) / 2)  # the tie that becomes inf
    x = np.concatenate(
        [
            bits_as(np.float32, np.random.randint(0, 2**32, 1_000_000, dtype=np.int64)),
            np.random.standard_normal(200_000).astype(np.float32) * 1e-5,  # float16: not normal
            ties,
            np.nextafter(ties, np.float32(np.inf)),
            np.nextafter(ties, np.float32(-np.inf)),
            every.float().numpy(),
            around([overflow, -overflow], np.float32),
            np.array([np.inf, -np.inf, np.nan, -np.nan, 0.0, -0.0], np.float32),
            bits_as(np.float32, np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF])),
        ]
    )
    expected = torch.from_numpy(x).to(HALVES[half]).view(torch.uint16).numpy()
    got = np.empty(x.size, np.uint16)
    probe.call(f"narrow_{path}_{half}", got, got.size, x)
    number = ~np.isnan(x)
    np.testing.assert_array_equal(got[number], expected[number])
    narrowed = torch.from_numpy(got[~number]).view(HALVES[half])
    assert torch.isnan(narrowed).all()
