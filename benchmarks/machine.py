"""The machine line: what a time was measured on, and the ceilings that it is held against.

The probes are in ``machine.cpp``: a ping-pong of two pinned threads on one cache line, a copy, and
a loop of multiply-adds. They are compiled at run time by ``$CXX`` or ``g++``; without a compiler
they are null, and ``probes_missing`` says why.

The ping-pong matters most. Virtual cores move between core complexes, and a run in which the two
cores are far apart (some 190 ns instead of some 45) must not be compared with one in which they
are near. So it is measured again beside every row.
"""

import ctypes
import functools
import os
import platform
import re
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("machine.cpp")


class ProbeError(RuntimeError):
    """A probe cannot run here; the message says why."""


@functools.cache
def _library() -> ctypes.CDLL:
    # One failure is reported for all probes: functools.cache does not keep exceptions, so each
    # probe raises the same message again.
    compiler = os.environ.get("CXX") or "g++"
    command = compiler.split()
    if shutil.which(command[0]) is None:
        raise ProbeError(f"no compiler: {compiler!r} is not on PATH (set CXX)")
    with tempfile.TemporaryDirectory(prefix="dlkernels-machine-") as folder:
        built = os.path.join(folder, "machine.so")
        command += ["-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", str(SOURCE), "-o", built]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            first = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise ProbeError(f"{compiler} could not build {SOURCE.name}: {first}")
        library = ctypes.CDLL(built)  # stays mapped after the folder is gone
    library.core_latency_ns.restype = ctypes.c_double
    library.core_latency_ns.argtypes = [ctypes.c_int, ctypes.c_int]
    library.copy_gb_s.restype = ctypes.c_double
    library.copy_gb_s.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int]
    library.fma_gflops.restype = ctypes.c_double
    library.fma_gflops.argtypes = [
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_int),
    ]
    return library


def core_latency_ns(trips: int = 20_000, trials: int = 3) -> float:
    """Nanoseconds that a cache line takes from one core to another: half a round trip."""
    value = _library().core_latency_ns(trips, trials)
    if value == -1:
        raise ProbeError("the core latency needs two CPUs that this process may use")
    if value < 0:
        raise ProbeError("threads cannot be pinned here, so the core latency has no meaning")
    return value


def copy_gb_s(threads: int, bytes_: int = 1 << 28, trials: int = 5) -> float:
    """GB/s of a copy far larger than the caches, bytes read and bytes written together."""
    value = _library().copy_gb_s(threads, bytes_, trials)
    if value < 0:
        raise ProbeError(f"no memory for a copy of {bytes_} bytes")
    return value


def fma_gflops(threads: int, steps: int = 20_000_000, trials: int = 3) -> tuple[float, int]:
    """GFLOP/s of float32 multiply-adds in registers, and the vector lanes that were used."""
    lanes = ctypes.c_int()
    return _library().fma_gflops(threads, steps, trials, ctypes.byref(lanes)), lanes.value


def median_seconds(work, trials: int = 15) -> float:
    """The median, by CUDA events, of a call that the GPU finds queued."""
    times = []
    work()
    for _ in range(trials):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(200_000)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times)


PRODUCTS = {  # field: dtype, precision of float32 products
    "gemm_gflops": (torch.bfloat16, "highest"),
    "gemm_fp16_gflops": (torch.float16, "highest"),
    "gemm_tf32_gflops": (torch.float32, "high"),
    "gemm_fp32_gflops": (torch.float32, "highest"),
}


def cuda_ceilings(n: int = 8192, bytes_: int = 1 << 31) -> dict[str, float]:
    """GB/s of a device copy far larger than L2 (read + written), and GFLOP/s of products of n x n
    random matrices (of zeros they are faster): bfloat16, float16, float32 as tf32 and in full."""
    source = torch.empty(bytes_, dtype=torch.uint8, device="cuda").fill_(1)
    to = torch.empty_like(source)
    ceilings = {"copy_gb_s": 2 * bytes_ / median_seconds(lambda: to.copy_(source)) * 1e-9}
    before = torch.get_float32_matmul_precision()
    try:
        for name, (dtype, precision) in PRODUCTS.items():
            torch.set_float32_matmul_precision(precision)
            a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
            to = torch.empty_like(a)
            seconds = median_seconds(functools.partial(torch.mm, a, b, out=to))
            ceilings[name] = 2 * n**3 / seconds * 1e-9
    finally:
        torch.set_float32_matmul_precision(before)
    return {name: round(value, 1) for name, value in ceilings.items()}


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:  # absent in containers and on other kernels: the field is null then
        return None


def _cpu_model() -> str:
    fields = dict(
        (part.strip() for part in line.split(":", 1))
        for line in (_read("/proc/cpuinfo") or "").split("\n\n")[0].splitlines()
        if ":" in line
    )
    return fields.get("model name") or platform.processor() or platform.machine()


def _chosen(setting: str | None) -> str | None:
    """'always [madvise] never' -> 'madvise'."""
    found = re.search(r"\[(.+?)\]", setting or "")
    return found.group(1) if found else setting


def describe(device: str = "cpu", threads: int = 2) -> dict:
    """All fields of the machine line; takes about two seconds, most of it in the probes.

    Args:
        device: "cpu" or "cuda"; with "cuda" the copy and product ceilings are the GPU's.
        threads: threads of the copy and multiply-add probes, the same as the rows will use.
    """
    fields = {
        "device": device,
        "cpu": _cpu_model(),
        "arch": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "huge_pages": _chosen(_read("/sys/kernel/mm/transparent_hugepage/enabled")),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "core_latency_ns": None,
        "copy_gb_s": None,
        "fma_gflops": None,
        "fma_lanes": None,
        "probes_missing": None,
    }
    try:
        fields["core_latency_ns"] = round(core_latency_ns(), 1)
    except ProbeError as missing:
        fields["probes_missing"] = str(missing)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        fields |= {
            "gpu": properties.name,
            "sm": f"{properties.major}{properties.minor}",
            "cuda": torch.version.cuda,
            **cuda_ceilings(),
        }
        return fields
    try:
        fields["copy_gb_s"] = round(copy_gb_s(threads), 2)
        gflops, fields["fma_lanes"] = fma_gflops(threads)
        fields["fma_gflops"] = round(gflops, 1)
    except ProbeError as missing:
        fields["probes_missing"] = str(missing)
    return fields


def line(fields: dict) -> str:
    """The fields on one line, for people."""

    def value(name: str, unit: str = "") -> str:
        return "?" if fields.get(name) is None else f"{fields[name]}{unit}"

    parts = [
        fields["gpu"] + f" sm_{fields['sm']} CUDA {fields['cuda']}" if "gpu" in fields else None,
        f"{fields['cpu']} ({fields['cores']} cores, {fields['threads']} threads)",
        f"library {value('library')}",
        f"torch {fields['torch']} {fields['torch_capability']}",
        f"core to core {value('core_latency_ns', ' ns')}",
        f"copy {value('copy_gb_s', ' GB/s')}",
        f"product {value('gemm_gflops', ' GF/s')}"
        if "gpu" in fields
        else f"FMA {value('fma_gflops', ' GF/s')} ({value('fma_lanes')} lanes)",
        f"governor {value('governor')}",
        f"huge pages {value('huge_pages')}",
        f"load {fields['load_1min']}",
        f"probes missing: {fields['probes_missing']}" if fields["probes_missing"] else None,
    ]
    return "; ".join(part for part in parts if part)


def slug(fields: dict) -> str:
    """The name of the results file: 'amd-epyc-2-cores-avx2', 'nvidia-h200'."""
    name = fields.get("gpu") or (
        f"{fields['cpu']} {fields['cores']} cores {fields['torch_capability']}"
    )
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
