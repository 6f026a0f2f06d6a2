"""The benchmark house itself: that a figure means what it says. No time is asserted here."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    batch_norm,
    conv2d,
    conv2d_max_pool2d,
    cross_entropy,
    gpu_check,
    linear,
    machine,
    measure,
    models,
    records,
    report,
    run,
)

FIELDS = {
    "op": str,
    "row": str,
    "reason": str,
    "work": str,
    "dtype": str,
    "shape": list,
    "layout": str,
    "calls": int,
    "bytes": int,
    "flops": int,
    "batches": int,
    "steady": bool,
    "core_latency_ns": float | None,
    "busy_elsewhere": float | None,
    "provider": str,
    "samples": int,
    "median_ms": float | None,
    "min_ms": float | None,
    "p25_ms": float | None,
    "p75_ms": float | None,
    "ratio_to_best_stock": float | None,
    "ratio_to_eager": float | None,
    "ratio_to_compile": float | None,
    "gb_s": float | None,
    "gflop_s": float | None,
    "copy_fraction": float | None,
    "fma_fraction": float | None,
    "peak_bytes": int | None,
    "page_faults": int | None,
    "kernel": str,
    "difference": float | None,
    "missing": str | None,
    "gate": str,
    "machine": dict,
    "date": str,
    "commit": str | None,
    "command": str,
}


def provider(name, call=None, **more):
    return measure.Provider(name, call or (lambda: (torch.ones(2),)), **more)


def row_of(*providers, **more):
    fields = {
        "op": "cross_entropy",
        "name": "a row",
        "reason": "a reason",
        "work": "forward",
        "dtype": "float32",
        "shape": (2,),
        "layout": "contiguous",
        "bytes": 8_000,
        "flops": 4_000,
        "providers": lambda: list(providers),
    }
    return measure.Row(**fields | more)


@pytest.fixture
def quick(monkeypatch):
    """Two rounds a batch, and a machine that is not probed."""
    monkeypatch.setattr(measure, "ROUNDS", (2, 2))
    fields = {"device": "cpu", "cpu": "a cpu", "cores": 2, "threads": 2, "torch": "2.13"}
    fields |= {"torch_capability": "AVX2", "load_1min": 0.0, "probes_missing": None}
    fields |= {"copy_gb_s": 10.0, "fma_gflops": 100.0, "fma_lanes": 8, "library": "avx2"}
    monkeypatch.setattr(machine, "describe", lambda device, threads: dict(fields))
    monkeypatch.setattr(run, "library", lambda: "avx2")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# --------------------------------------------------------------------------------------- red gate


@pytest.mark.parametrize("body", ["assert False", "def test(): assert 1 == 2", None])
def test_a_red_gate_reports_no_speed(quick, monkeypatch, tmp_path, capsys, body):
    (tmp_path / "tests").mkdir()
    if body is not None:
        (tmp_path / "tests" / "test_cross_entropy.py").write_text(body)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(measure, "measure", lambda *_: pytest.fail("it measured"))
    out = tmp_path / "out.jsonl"
    assert run.main(["cross_entropy", "--out", str(out)]) == 1
    assert not out.exists()
    captured = capsys.readouterr()
    assert "no speed is reported" in captured.err
    assert " ms" not in captured.out


def test_a_green_gate_passes(monkeypatch, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_cross_entropy.py").write_text("def test(): pass")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    run.gate("cross_entropy")


# ---------------------------------------------------------------------------------------- results


def run_two(monkeypatch, tmp_path, *more):
    row = row_of(
        provider("stock", eager_stock=True),
        provider("stock channels_last", eager_stock=True),
        provider("own", kernels="own"),
        provider("auto", kernels="auto"),
    )
    monkeypatch.setattr(cross_entropy, "rows", lambda device: [row])
    out = tmp_path / "out.jsonl"
    assert run.main(["cross_entropy", "--no-gate", "--out", str(out), *more]) == 0
    return out


def test_results_have_the_schema(quick, monkeypatch, tmp_path):
    objects = records.read(run_two(monkeypatch, tmp_path))
    assert [one["provider"] for one in objects] == ["stock", "stock channels_last", "own", "auto"]
    for one in objects:
        assert list(one.keys() - FIELDS.keys()) == [] and list(FIELDS.keys() - one.keys()) == []
        for name, kind in FIELDS.items():
            assert isinstance(one[name], kind), f"{name}: {one[name]!r} is no {kind}"
        assert one["gate"] == "skipped"
        assert one["samples"] == 2 and one["median_ms"] > 0
        assert one["min_ms"] <= one["p25_ms"] <= one["median_ms"] <= one["p75_ms"]


def test_ratios_and_rates(quick):
    seen = [
        measure.Measured("stock", True, [4.0, 4.0, 4.0]),
        measure.Measured("stock channels_last", True, [3.0, 3.0, 3.0]),
        measure.Measured("torch.compile", False, [6.0, 6.0, 6.0]),
        measure.Measured("auto", False, [1.0, 2.0, 9.0]),
        measure.Measured("own", missing="no kernel: of this shape"),
    ]
    measured = {"providers": seen, "batches": 1, "steady": True}
    measured |= {"core_latency_ns": 40.0, "busy_elsewhere": 0.0}
    about = {"machine": machine.describe("cpu", 2)}
    stock, _, _, auto, own = records.of_row(row_of(), measured, about)
    assert auto["median_ms"] == 2.0 and auto["min_ms"] == 1.0
    assert (auto["p25_ms"], auto["p75_ms"]) == (1.5, 5.5)
    assert auto["ratio_to_best_stock"] == 1.5
    assert auto["ratio_to_eager"] == 2.0
    assert auto["ratio_to_compile"] == 3.0
    assert stock["ratio_to_best_stock"] == 0.75
    assert auto["gb_s"] == 0.004 and auto["copy_fraction"] == 0.0004
    assert auto["gflop_s"] == 0.002 and auto["fma_fraction"] == 0.0
    assert own["median_ms"] is None and own["ratio_to_eager"] is None and own["gb_s"] is None
    assert own["missing"] == "no kernel: of this shape"


def test_results_are_appended(quick, monkeypatch, tmp_path):
    first = run_two(monkeypatch, tmp_path).read_text()
    second = run_two(monkeypatch, tmp_path).read_text()
    assert second.startswith(first) and len(second.splitlines()) == 8


def test_json_prints_the_same_objects(quick, monkeypatch, tmp_path, capsys):
    out = run_two(monkeypatch, tmp_path, "--json")
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == records.read(out)


def test_a_broken_results_file_is_named(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"op": "x"}\n{"op"\n')
    with pytest.raises(ValueError, match=r"broken\.jsonl:2: not JSON"):
        records.read(path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["conv9d"], "no benchmark of 'conv9d': there are batch_norm, conv2d"),
        (["--threads", "0"], "--threads 0"),
        (["--repeats", "0"], "--repeats 0"),
        (["--rows", "no such row"], "no such row; there are "),
        (["--out", "/no/such/folder/x.jsonl"], "there is no folder /no/such/folder"),
    ],
)
def test_refusals(arguments, message, capsys):
    with pytest.raises(SystemExit) as refused:
        run.main([*arguments, "--no-gate"])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ timing


def test_providers_are_interleaved(monkeypatch):
    monkeypatch.setattr(measure, "ROUNDS", (3, 3))
    order = []

    def take(one):
        order.append(one.name)
        return float(len(order))

    batch = measure.interleaved([provider("a"), provider("b"), provider("c")], take)
    assert order == [*"abc", *"bca", *"cab"]
    assert batch.samples == {"a": [1.0, 6.0, 8.0], "b": [2.0, 4.0, 9.0], "c": [3.0, 5.0, 7.0]}


EVEN, UNEVEN, WILD = [10, 10, 10], [10, 12, 13], [10, 20, 30]


@pytest.mark.parametrize(
    "batches, kept, taken",
    [
        ([({"a": EVEN, "b": EVEN}, 0.0), None], 0, 1),
        ([({"a": EVEN, "b": WILD}, 0.0), ({"a": EVEN, "b": EVEN}, 0.0), None], 1, 2),
        ([({"a": WILD}, 0.0), ({"a": UNEVEN}, 0.0), ({"a": WILD}, 0.0)], 1, 3),
        ([({"a": EVEN}, 0.9), ({"a": WILD}, 0.0), ({"a": EVEN}, 0.5)], 1, 3),
        ([({"a": EVEN}, 0.9), ({"a": EVEN}, None), None], 1, 2),
    ],
    ids=["steady", "one_is_not", "cap", "busy_is_worse_than_uneven", "unknown_is_alone"],
)
def test_the_steadiest_batch_is_kept(batches, kept, taken):
    made = [one and measure.Batch(*one) for one in batches]
    assert measure.steadiest(iter(made).__next__, repeats=3) == (made[kept], taken)


def test_a_busy_neighbour_is_seen():
    before = measure._cpu_seconds_of_others()
    if before is None:
        pytest.skip("no /proc/stat here")
    spin = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", spin], check=True)
    assert measure._cpu_seconds_of_others() - before >= 0.4


def test_every_sample_is_prepared(quick):
    calls = []
    one = provider("stock", lambda: calls.append("call") or (torch.ones(1),), eager_stock=True)
    one.prepare = lambda: calls.append("prepare")
    measure.sample(one, row_of(calls=3), "cpu")
    assert calls == ["prepare", "call", "call", "call"]


def test_other_work_is_not_timed(quick):
    row = row_of(
        provider("stock", eager_stock=True),
        provider("close", lambda: (torch.ones(2) * 1.001,)),
        provider("wrong", lambda: (torch.tensor([1.0, 2.0]),)),
        provider("nan", lambda: (torch.tensor([1.0, math.nan]),)),
    )
    measured = measure.measure(row, "cpu", 1, lambda name: True)
    stock, close, wrong, nan = measured["providers"]
    assert len(stock.samples) == len(close.samples) == 2
    assert close.difference == pytest.approx(0.001, rel=1e-3) and close.missing is None
    assert wrong.samples == [] and "off by 0.71" in wrong.missing
    assert nan.samples == [] and "off by inf" in nan.missing


def test_no_kernel_and_a_broken_peer_are_shown(quick):
    def refuses():
        raise NotImplementedError("no kernel for complex64\nsecond line")

    def breaks():
        raise OSError("no compiler")

    row = row_of(
        provider("stock", eager_stock=True),
        provider("own", refuses, kernels="own"),
        provider("torch.compile", breaks),
    )
    own, compiled = measure.measure(row, "cpu", 1, lambda name: True)["providers"][1:]
    assert own.missing == "no kernel: no kernel for complex64" and own.samples == []
    assert compiled.missing == "OSError: no compiler" and compiled.samples == []


def test_an_error_of_ours_is_not_swallowed(quick):
    def breaks():
        raise RuntimeError("a bug")

    row = row_of(provider("stock", eager_stock=True), provider("auto", breaks, kernels="auto"))
    with pytest.raises(RuntimeError, match="a bug"):
        measure.measure(row, "cpu", 1, lambda name: True)


def test_kernels_are_chosen_and_given_back():
    from dlkernels import config

    before = config.kernels
    with pytest.raises(KeyError), measure.kernels_chosen("own"):
        assert config.kernels == "own"
        raise KeyError
    assert config.kernels == before


def test_peak_bytes():
    def call():
        kept = torch.empty(250_000)
        torch.empty(500_000)
        del kept
        return (torch.empty(125_000),)

    assert measure.peak_bytes(provider("stock", call), row_of(), "cpu") == 3_000_000


# ----------------------------------------------------------------------------- the rows of the ops


def small(case):
    shapes = {2: (6, 5), 4: (2, 3, 4, 5)}
    return case._replace(shape=shapes[len(case.shape)], calls=1)


def by_name(case):
    return case.name.replace(" ", "_")


GPU_CASES = cross_entropy.gpu_cases(1 << 40)


@pytest.mark.parametrize("case", cross_entropy.CASES + GPU_CASES, ids=by_name)
def test_bytes_are_those_of_the_tensors(case):
    data = cross_entropy.Data(small(case), case.layout, "cpu")
    data.prepare()
    results = data.work(torch.nn.functional.cross_entropy)()
    tensors = [data.logits, data.target, *results]
    bytes_, flops = cross_entropy._counted(small(case))
    assert bytes_ == sum(tensor.nbytes for tensor in tensors)
    assert flops == data.logits.numel() * (4 if case.work == "forward" else 6)


def test_bytes_of_a_known_row():
    assert cross_entropy._counted(cross_entropy.CASES[0])[0] == 2 * 4096 * 1000 * 4 + 4096 * 8 + 4


@pytest.mark.parametrize("case", cross_entropy.CASES, ids=by_name)
def test_ours_does_the_same_work_as_stock(case):
    data = cross_entropy.Data(small(case), case.layout, "cpu")
    data.prepare()
    wanted = [one.clone() for one in data.work(torch.nn.functional.cross_entropy)()]
    data.prepare()
    assert measure.difference(data.work(cross_entropy._ours)(), wanted) < measure.WRONG


@pytest.mark.parametrize("case", cross_entropy.CASES, ids=by_name)
def test_data_is_fresh_for_each_sample(case):
    data = cross_entropy.Data(small(case), case.layout, "cpu")
    data.prepare()
    assert data.logits.is_leaf == (data.leaf or case.work == "forward")
    assert data.logits.requires_grad == (case.work != "forward")
    assert data.logits.dtype == case.dtype
    assert data.logits.is_contiguous(memory_format=cross_entropy.LAYOUTS[case.layout])
    assert data.logits.std() > 1  # never zeros
    with torch.no_grad():
        data.source.zero_()
    if data.leaf:
        data.source.grad = torch.ones_like(data.source)
    data.prepare()
    assert torch.equal(data.logits, data.master) and data.source.grad is None


# The same of linear. Three passes over the data of a case, at a few numbers each.


@pytest.mark.parametrize("case", linear.CASES, ids=by_name)
def test_linear_counts_its_tensors_and_does_the_work_of_stock(case):
    case = case._replace(shape=(6, 5, 4), calls=1)
    data = linear.Data(case, "cpu")
    data.prepare()
    results = data.work(linear._stock(case))()
    tensors = [data.x, *data.parameters, *results]
    if case.work != "forward":
        tensors.append(data.upstream)
        assert len(results) == 1 + len(data.parameters) + (not case.first)
    bytes_, flops = linear._counted(case)
    assert bytes_ == sum(tensor.nbytes for tensor in tensors)
    assert flops == 2 * 6 * 5 * 4 * (1 if case.work == "forward" else 2 if case.first else 3)
    assert {tensor.dtype for tensor in tensors} == {case.dtype}
    functions = [linear._ours(case)]
    if case.work == "forward" and case.dtype != torch.float16:  # which few processors multiply
        functions.append(linear._onednn(case))
    for function in functions:
        data.prepare()
        assert measure.difference(data.work(function)(), results) < measure.WRONG


@pytest.mark.parametrize("case", [linear.CASES[0], linear._FORWARD[0]], ids=by_name)
def test_the_input_of_linear_is_fresh_for_each_sample(case):
    data = linear.Data(case._replace(shape=(6, 5, 4)), "cpu")
    data.prepare()
    assert data.x.is_leaf == (case.work == "forward") and data.x.std() > 0.3
    with torch.no_grad():
        data.source.zero_()
    data.prepare()
    assert torch.equal(data.x, data.master)


# The same of batch_norm.


@pytest.mark.parametrize("case", batch_norm.CASES, ids=by_name)
def test_batch_norm_counts_its_images_and_does_the_work_of_stock(case):
    case = case._replace(shape=(4, 6, 5, 3), calls=1)
    for layout in batch_norm.LAYOUTS:
        data = batch_norm.Data(case, layout, "cpu")
        results = data.work(batch_norm._stock(case))()
        images = [*data.images, *(t for t in results if t.dim() == 4)]
        if case.work != "forward":
            images.append(data.upstream)  # read once, and a second time the input, and the output
            images.append(data.images[0])  # whose sign a residual hides
            if case.residual and case.activation:
                images.append(results[0])
            elif case.residual:  # its gradient is the upstream one
                images.pop()
        assert batch_norm._counted(case)[0] == sum(t.nbytes for t in images)
        fresh = batch_norm.Data(case, layout, "cpu")
        ours = fresh.work(batch_norm._ours(case))()
        assert measure.difference(ours, results) < measure.WRONG
        for a, b in zip(data.running, fresh.running, strict=True):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            data.sources[0].zero_()
        data.prepare()
        assert torch.equal(data.images[0], data.masters[0])


# The same of conv2d, each direction alone.


def few_pixels(case):
    n, c, h, w, k, r, s = case.shape
    c, k, groups = min(c, 3), min(k, 4), 1
    if case.groups > 1:
        c, groups = 4, 4 if case.groups == case.shape[1] else 2
    shape = 2, c, min(h, 11), min(w, 12), k, r, s
    return case._replace(shape=shape, groups=groups, calls=1)


CONV2D = conv2d.CASES + conv2d.gpu_cases(1 << 50)
CONV2D += conv2d_max_pool2d.CASES + conv2d_max_pool2d.GPU_CASES
# Those that differ when they are small.
CONV2D = list({few_pixels(case)._replace(name="", reason=""): case for case in CONV2D}.values())


def done(case, layout, functions):
    """The data of a case, and the results of its work by two functions."""
    data = conv2d.Data(case, layout, "cpu")
    data.prepare()
    with torch.set_grad_enabled(case.work != "forward"):
        return data, data.work(*functions)()


@pytest.mark.parametrize("case", CONV2D, ids=by_name)
def test_conv2d_counts_its_tensors_and_its_products(case):
    case = few_pixels(case)
    stock = conv2d._stock(case), conv2d._stock_gradients(case)
    with FlopCounterMode(display=False) as counter:
        data, results = done(case, case.layout, stock)
    read = {
        "forward": [data.x, *data.parameters],
        "input gradient": [data.upstream, data.parameters[0]],
        "weight gradient": [data.upstream, data.x],
        "forward+gradient": [data.x, *data.parameters, data.upstream],
    }[case.work]
    assert (
        len(results)
        == {
            "forward": 1,
            "input gradient": 1,
            "weight gradient": 1 + case.bias,
            "forward+gradient": 1 + len(data.parameters) + (not case.first),
        }[case.work]
    )
    bytes_, flops = conv2d.counted(case)
    assert bytes_ == sum(tensor.nbytes for tensor in (*read, *results))
    assert {tensor.dtype for tensor in (*read, *results)} == {case.dtype}
    if case.groups == 1 and not (case.pooled and case.work == "forward+gradient"):
        assert flops == counter.get_total_flops()  # torch's own does not know groups backwards
    for tensor in (data.x, data.upstream, data.parameters[0], results[0]):
        if tensor.dim() == 4 and min(tensor.shape[1:]) > 1:
            assert tensor.is_contiguous(memory_format=conv2d.LAYOUTS[case.layout])


@pytest.mark.parametrize("case", CONV2D, ids=by_name)
def test_our_conv2d_does_the_work_of_stock(case):
    case = few_pixels(case)
    wanted = done(case, case.layout, (conv2d._stock(case), conv2d._stock_gradients(case)))[1]
    ours = conv2d._ours(case), conv2d._our_gradients(case)
    for layout in conv2d.LAYOUTS:
        got = done(case, layout, ours)[1]
        assert measure.difference(got, wanted) < measure.WRONG


@pytest.mark.parametrize("work", ["forward", "input gradient", "weight gradient", ""])
def test_what_a_layer_has_just_written_is_fresh_for_each_sample(work):
    name = f"64x64x32x32 64 3x3 {work}".strip()
    (case,) = [case for case in conv2d.CASES if case.name == name]
    data = conv2d.Data(few_pixels(case), "channels_last", "cpu")
    data.prepare()
    backward = work.endswith("gradient")
    used, master = (data.upstream, data.upstream_master) if backward else (data.x, data.master)
    assert data.x.requires_grad == (work == "") and used.std() > 0.3
    with torch.no_grad():
        (data.upstream if backward else data.source).zero_()
    data.prepare()
    assert torch.equal(data.upstream if backward else data.x, master)


def test_flops_of_a_known_convolution():
    (case,) = [case for case in conv2d.CASES if case.name == "64x64x32x32 64 3x3 weight gradient"]
    numbers = 2 * 64 * 64 * 32 * 32 + 64 * 64 * 9
    assert conv2d.counted(case) == (4 * numbers, 2 * 64 * 32 * 32 * 64 * 64 * 9)


def test_behind_a_pool_a_quarter_of_the_gradients_counts():
    case = conv2d_max_pool2d.CASES[1]
    product = 2 * 64 * 28 * 28 * 6 * 25
    assert case.first and conv2d.counted(case)[1] == product + product // 4


def test_a_small_gpu_has_no_large_rows():
    names = {case.name for case in conv2d.gpu_cases(24 << 30)}
    assert names < {case.name for case in conv2d.gpu_cases(139 << 30)}
    assert not any(name.startswith("64x128x513x513") for name in names)


def test_flops_of_a_known_row():
    case = next(case for case in linear.CASES if case.name == "1024x1024x1024 product")
    assert linear._counted(case) == (3 * 1024**2 * 4, 2 * 1024**3)


@pytest.mark.parametrize(
    ("op", "device"),
    [
        (op, device)
        for op in (batch_norm, conv2d, conv2d_max_pool2d, cross_entropy, linear)
        for device in ("cpu", "cuda")
    ],
    ids=lambda value: getattr(value, "OP", value),
)
def test_rows_have_names_of_their_own_and_reasons(op, device):
    rows = op.rows(device)
    assert len({row.name for row in rows}) == len(rows)
    assert all(row.reason and row.bytes > 0 and row.flops > 0 for row in rows)


@pytest.mark.parametrize("name", ["128x10", "128x10 forward", "1x64x64", "1x64x64 forward"])
def test_a_row_runs_from_end_to_end(quick, tmp_path, name):
    out = tmp_path / "out.jsonl"
    arguments = ["--no-gate", "--rows", f"^{name}$", "--providers", "^(own|auto)$", "--repeats=1"]
    assert run.main([*arguments, "--out", str(out)]) == 0
    objects = {one["provider"]: one for one in records.read(out)}
    assert set(objects) == {"stock", "own", "auto"}
    assert objects["stock"]["kernel"] == objects["auto"]["kernel"] == "stock"  # too small
    assert objects["own"]["kernel"].startswith("cpu/")
    assert all(one["missing"] is None and one["median_ms"] > 0 for one in objects.values())


# ----------------------------------------------------------------------------------------- machine


def test_the_machine_line():
    fields = machine.describe("cpu", 2)
    line = machine.line(fields | {"library": "avx2"})
    assert "core to core" in line and f"load {fields['load_1min']}" in line
    assert re.fullmatch(r"[a-z0-9-]+", machine.slug(fields))
    if fields["probes_missing"]:
        pytest.skip(fields["probes_missing"])
    assert 0 < fields["core_latency_ns"] < math.inf
    assert 0 < fields["copy_gb_s"] < 100_000
    assert 0 < fields["fma_gflops"] < 1_000_000
    assert fields["fma_lanes"] in (4, 8, 16)


@pytest.mark.parametrize(
    "compiler, why", [("/no/such/c++", "no compiler"), ("false", "could not build machine.cpp")]
)
def test_a_machine_without_a_compiler_says_so(monkeypatch, compiler, why):
    monkeypatch.setenv("CXX", compiler)
    machine._library.cache_clear()
    try:
        fields = machine.describe("cpu", 2)
    finally:
        machine._library.cache_clear()
    assert why in fields["probes_missing"]
    assert fields["core_latency_ns"] is fields["copy_gb_s"] is fields["fma_gflops"] is None
    assert why in machine.line(fields)


# ------------------------------------------------------------------------------------------ report


def measured_rows(quick_about, date="2026-01-01T00:00:00", gate="green", ms=2.0, name="4096x1000"):
    seen = [
        measure.Measured("stock", True, [6.0, 6.0], peak_bytes=300),
        measure.Measured("torch.compile", False, [4.0, 4.0]),
        measure.Measured("own", False, [ms, ms]),
        measure.Measured("auto", False, [ms, ms], peak_bytes=100),
        measure.Measured("auto compiled", False, [ms / 2, ms / 2]),
    ]
    measured = {"providers": seen, "batches": 1, "steady": True}
    measured |= {"core_latency_ns": 40.0, "busy_elsewhere": 0.0}
    about = {"gate": gate, "machine": quick_about, "date": date, "commit": "abc"}
    about["command"] = "python -m benchmarks.run"
    return records.of_row(row_of(name=name), measured, about)


@pytest.fixture
def results(quick, tmp_path):
    """A results file with an older and a newer run of a row, and an ungated one that is newest."""
    about = machine.describe("cpu", 2)
    path = tmp_path / "a-machine.jsonl"
    records.append(path, measured_rows(about, "2026-01-02T00:00:00"))
    records.append(path, measured_rows(about, "2026-01-01T00:00:00", ms=1.0))
    records.append(path, measured_rows(about, "2026-01-03T00:00:00", gate="skipped", ms=0.5))
    records.append(path, measured_rows(about, "2026-01-04T00:00:00", name="a row of many"))
    return path


def test_the_report_takes_the_newest_green_run(results):
    lines = report.table(report.newest(records.read(results))).splitlines()
    cells = "6 | 4 | 2 | **3.00** | 2.00 | 4.00 | 3.00 | 0% | 0% | 33% |"
    names = ("4096x1000", "a row of many")
    assert lines[2:] == [f"| cross_entropy {name} | {cells}" for name in names]


def test_the_report_takes_ours_in_its_best_layout(quick):
    ours = [
        measure.Measured("stock", True, [6.0, 6.0], peak_bytes=300),
        measure.Measured("auto", False, [3.0, 3.0], peak_bytes=100),
        measure.Measured("auto channels_last", False, [2.0, 2.0], peak_bytes=100),
    ]
    measured = {"providers": ours, "batches": 1, "steady": True}
    measured |= {"core_latency_ns": 40.0, "busy_elsewhere": 0.0}
    about = {"gate": "green", "machine": machine.describe("cpu", 2), "date": "2026", "commit": ""}
    rows = records.of_row(row_of(name="a model"), measured, about | {"command": "it"})
    assert "| 2 | **3.00** |" in report.table(report.newest(rows))


def test_the_report_writes_between_its_comments(results, tmp_path):
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert report.main([str(results), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n| op, row |")
    assert text.endswith(f"{report.END}\nafter\n") and "old" not in text
    assert "![a-machine](a-machine.png)" in text and "a row of many" not in text
    every = (tmp_path / report.ALL).read_text()
    assert "`python -m benchmarks.run` (2026-01-02, commit abc)" in every
    assert "## a-machine\n\n| op, row |" in every and every.count("\n| cross_entropy ") == 2
    assert (tmp_path / "a-machine.png").read_bytes().startswith(b"\x89PNG")
    assert report.main([str(results), "--readme", str(readme)]) == 0
    assert readme.read_text() == text


@pytest.mark.parametrize("name", ["diabetes_mlp", "sine_rnn forward", "adversarial_autoencoder"])
def test_a_row_of_a_whole_model(name):
    """Every eager way gives what stock gives, of work that was counted."""
    (row,) = (row for row in models.rows("cpu") if row.name == name)
    found = {one.name: one for one in row.providers()}
    assert row.bytes > 0 and row.flops > 0
    wanted, _ = measure._first_call(found["stock"], row)
    for ours in ("own", "auto"):
        got, kernel = measure._first_call(found[ours], row)
        assert measure.difference(got, wanted) < 1e-4
        assert ours == "auto" or kernel.startswith("cpu/")


def test_the_report_shows_rows_that_there_are():
    for op, names in report.SHOWN.items():
        rows = importlib.import_module(f"benchmarks.{op}").rows("cpu")
        assert set(names) <= {row.name for row in rows}


def test_the_report_refuses(results, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text("no place for it")
    assert report.main([str(results), "--readme", str(readme)]) == 1
    assert "must hold <!-- benchmarks:begin -->" in capsys.readouterr().err
    assert readme.read_text() == "no place for it"
    ungated = tmp_path / "ungated.jsonl"
    records.append(ungated, measured_rows(machine.describe("cpu", 2), gate="skipped"))
    assert report.main([str(ungated), "--readme", str(readme)]) == 1
    assert "behind a green gate" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- gpu_check


@pytest.fixture
def gpu_state(tmp_path):
    return gpu_check.State(tmp_path / "a-gpu.jsonl")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_check_refuses_in_one_line(capsys):
    assert gpu_check.main([]) == 2
    captured = capsys.readouterr()
    assert captured.err == "gpu_check: torch sees no CUDA device\n" and captured.out == ""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--minutes", "9"], "--minutes 9: more than 0, at most 8"),
        (["--minutes", "0"], "--minutes 0"),
        (["--minutes", "nan"], "--minutes nan"),
        (["--out", "/no/such/folder/x.jsonl"], "there is no folder /no/such/folder"),
        (["--stage", "none"], "invalid choice"),
    ],
)
def test_refusals_of_gpu_check(arguments, message, capsys):
    with pytest.raises(SystemExit) as refused:
        gpu_check.main(arguments)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_stages_keep_to_the_deadline(gpu_state, capsys):
    now, given = [0.0], []

    def takes(seconds):
        def work(state, most):
            given.append(most)
            now[0] += min(seconds, most)

        return work

    stages = [
        gpu_check.Stage("first", takes(40), 0.5),
        gpu_check.Stage("long", takes(1000), 0.5),
        gpu_check.Stage("rest", takes(1000), 1.0),
        gpu_check.Stage("too late", takes(0), 1.0),
    ]
    gpu_check.run_stages(gpu_state, gpu_check.Deadline(105, lambda: now[0]), stages)
    assert given == [50, 30, 30] and now[0] == 100  # CLOSING is left
    assert gpu_state.said == [("too late", "skipped: no time left", None)]
    assert "too late: skipped" in capsys.readouterr().out


def test_the_order_of_the_stages():
    names = ["build", "environment", "tests", "sanitizer", "benchmarks"]
    assert [stage.name for stage in gpu_check.STAGES] == names
    assert all(0 < stage.share <= 1 for stage in gpu_check.STAGES)


def test_a_command_is_cut_off_with_its_children():
    code = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    begin = time.monotonic()
    done = gpu_check.call([sys.executable, "-c", code], 3, quiet=True)
    assert done.status is None and time.monotonic() - begin < 30
    assert done.output == "begun\n" and gpu_check.verdict(done).startswith("cut off after")
    assert gpu_check.call([sys.executable, "-c", "raise SystemExit(3)"], 60).status == 3


@pytest.mark.parametrize(
    "output, found",
    [
        ("every shape ran\n========= ERROR SUMMARY: 0 errors\n", True),
        ("every shape ran\n========= ERROR SUMMARY: 1 error\n", False),
        ("every shape ran\n= RACECHECK SUMMARY: 0 hazards displayed (0 errors)\n", True),
        ("every shape ran\n= RACECHECK SUMMARY: 2 hazards displayed (2 errors)\n", False),
        ("few: ran\n========= ERROR SUMMARY: 0 errors\n", False),
        ("========= Error: Device not supported\n= ERROR SUMMARY: 0 errors\n", None),
        ("no such program\n", None),
    ],
)
def test_what_the_sanitizer_says(output, found):
    assert gpu_check.clean(output) is found


def test_the_shapes_of_the_sanitizer_run(capsys):
    gpu_check.run_shapes("cpu")
    assert capsys.readouterr().out.endswith("every shape ran\n")


def test_what_is_left_out_on_a_gpu_exists():
    from tests import on_cuda

    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    files = sorted({f"tests/{name.partition('::')[0]}" for name in on_cuda.LEFT_OUT})
    there = subprocess.run([*command, *files], cwd=run.ROOT, capture_output=True, text=True).stdout
    ids = {line.rpartition("/")[2] for line in there.splitlines() if "::" in line}
    ids |= {name.partition("[")[0] for name in ids}
    assert sorted(on_cuda.LEFT_OUT.keys() - ids) == []
    assert all(on_cuda.LEFT_OUT.values())
    assert files == sorted(set(files) & set(gpu_check.TESTS))


def test_the_plugin_leaves_out_and_sets_the_device(tmp_path):
    (tmp_path / "test_cross_entropy.py").write_text(
        "import torch\ndef test_choice(): assert False\n"
        "def test_other(): assert torch.get_default_device().type == 'meta'\n"
    )
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "tests.on_cuda", str(tmp_path)]
    environment = {**os.environ, "DLKERNELS_TESTS_ON": "meta"}
    done = subprocess.run(command, cwd=run.ROOT, env=environment, capture_output=True, text=True)
    assert "1 passed, 1 deselected" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("memory, rows", [(150 << 30, 32768), (80 << 30, 16384), (1 << 10, 1)])
def test_rows_that_fit(memory, rows):
    assert cross_entropy.rows_that_fit(262144, 2, memory) == rows


def test_the_largest_product_with_a_loss_is_timed():
    assert [row.op for row in gpu_check.rows() if row.name == gpu_check.FUSED] == [
        "linear_cross_entropy"
    ]


def test_at_most_six_rows_are_tuned():
    assert 0 < sum(case.autotune for case in GPU_CASES) <= 6
    classes = {case.shape[1] for case in GPU_CASES if case.dtype == torch.bfloat16}
    assert min(classes) == 256 and max(classes) == 262144


def of_a_gpu(name, work, shape, **medians):
    row = row_of(name=name, work=work, shape=shape, dtype="bfloat16", bytes=10**9)
    seen = [
        measure.Measured(provider.replace("_", " "), provider == "stock", [ms])
        for provider, ms in medians.items()
    ]
    for one in seen:
        one.samples *= 2
    measured = {"providers": seen, "batches": 1, "steady": True}
    measured |= {"core_latency_ns": None, "busy_elsewhere": None}
    about = {"machine": {"copy_gb_s": 4000.0}, "gate": "green", "date": "", "commit": None}
    return records.of_row(row, measured, about | {"command": ""})


def test_targets():
    made = of_a_gpu("32768x4096 bfloat16 forward", "forward", (32768, 4096), stock=1.0, own=0.26)
    made += of_a_gpu("32768x65536 bfloat16 forward", "forward", (32768, 65536), stock=1.0, own=0.3)
    made += of_a_gpu("8192x131072 bfloat16", "forward+gradient", (8192, 131072), stock=9.0, own=2.0)
    made += of_a_gpu("128x10 graph", "forward+gradient", (128, 10), stock=1.0, own=1.25)
    fused = {"stock": 60.0, "stock_chunked": 38.0, "own": 40.0}
    made += of_a_gpu(gpu_check.FUSED, "forward+gradient", (8192, 4096, 128256), **fused)
    copy, thousand, long, stock, compiled, graph, peer = gpu_check.targets(made)
    assert peer.got == f"0.95 ({gpu_check.FUSED})" and peer.met is True
    assert copy.got == "83% (32768x65536 bfloat16 forward)" and copy.met is False
    assert thousand.got == "not measured" and thousand.met is None
    assert long.got == "2 ms" and long.met is True
    assert stock.got == "3.33 (32768x65536 bfloat16 forward)" and stock.met is True
    assert compiled.met is None and graph.got == "0.80 (128x10 graph)" and graph.met is False


def test_the_best_of_compile_counts():
    medians = {"stock": 1.0, "torch.compile": 0.5, "torch.compile_max-autotune": 0.3, "own": 0.25}
    made = of_a_gpu("32768x1000 bfloat16", "forward+gradient", (32768, 1000), **medians)
    (compiled,) = [one for one in gpu_check.targets(made) if "compile" in one.what]
    assert compiled.got == "1.20 (32768x1000 bfloat16)" and compiled.met is False


def test_the_closing_table(gpu_state, capsys):
    gpu_state.say("tests", "1 failed", False)
    gpu_check.show(gpu_state, gpu_check.targets([]))
    printed = capsys.readouterr().out
    assert "1 failed" in printed and printed.count("not measured") == 7


def test_a_row_that_fails_leaves_the_others(quick, monkeypatch, tmp_path, capsys):
    def breaks():
        raise RuntimeError("a bug")

    broken = row_of(provider("stock", breaks, eager_stock=True), name="broken")
    whole = row_of(provider("stock", eager_stock=True), provider("own"), name="whole")
    take = measure.measure
    fields = machine.describe("cpu", 2) | dict.fromkeys(machine.PRODUCTS, 1.0)
    monkeypatch.setattr(machine, "describe", lambda device, threads: fields)
    monkeypatch.setattr(gpu_check, "rows", lambda: [broken, whole])
    monkeypatch.setattr(measure, "measure", lambda row, device, *more: take(row, "cpu", *more))
    out = tmp_path / "out.jsonl"
    assert gpu_check.run_rows(out, "red", 600) == 1
    objects = records.read(out)
    assert [(one["row"], one["provider"]) for one in objects] == [
        ("whole", "stock"),
        ("whole", "own"),
    ]
    assert all(one["gate"] == "red" for one in objects)
    assert gpu_check.run_rows(out, "green", 0) == 0
    assert records.read(out) == objects
    printed = capsys.readouterr().out
    assert "broken: RuntimeError: a bug" in printed and "no time left for whole" in printed
