"""``python -m dlkernels.info``: versions, what was built, and who owns each op on each device."""

import importlib.util
import pkgutil
import platform
import sys

import torch

import dlkernels

DEVICES = ("CPU", "CUDA")
SPACE = "dlkernels::"


def cpu_library() -> str:
    """The CPU library that this process has loaded: "plain", "avx2" or "avx512"."""
    return dlkernels.config.libraries["cpu"]


def describe() -> dict[str, str]:
    """Versions and what was built, name -> text."""
    build, cuda = dlkernels._build, dlkernels._build["cuda"]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "dlkernels": f"{dlkernels.__version__} in {dlkernels._ROOT}",
        "Python": platform.python_version(),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'}, GPU {gpu})",
        "Triton": _triton(),
        "CPU": f"{platform.machine()}, torch uses {torch.backends.cpu.get_cpu_capability()}",
        "built against": f"torch {build['torch']}",
        "CPU libraries": f"{', '.join(build['cpu'])}; loaded: {cpu_library()}",
        "CUDA library": f"nvcc {cuda['nvcc']} for {', '.join(cuda['archs'])}" if cuda else "none",
    }


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "none"
    return importlib.import_module("triton").__version__


def owners() -> list[tuple[str, ...]]:
    """One row per op: its name, then for each of ``DEVICES`` its kernels, or why PyTorch's run."""
    modules = {module.name for module in pkgutil.iter_modules(dlkernels.ops.__path__)}
    ops = sorted(modules - {"common"})
    names = torch._C._dispatch_get_all_op_names()
    names = [name[len(SPACE) :] for name in names if name.startswith(SPACE)]
    raw: dict[str, list[str]] = {op: [] for op in ops}
    for name in names:
        # linear_cross_entropy_forward is of linear_cross_entropy, not of linear; conv_transpose2d's
        # are of conv2d.
        stem = name.replace("_transpose", "")
        of = max((op for op in ops if stem.startswith(f"{op}_")), key=len, default=None)
        if of and name not in ops:
            raw[of].append(name)
    return [(op, *(_owner(raw[op], device) for device in DEVICES)) for op in ops]


def _owner(raw: list[str], device: str) -> str:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = [name for name in sorted(raw) if not has(SPACE + name, device)]
    if device.lower() in dlkernels.config.libraries:
        owner = dlkernels.config.owner(device.lower())
        return f"stock: {owner} lacks {', '.join(missing)}" if missing else owner
    if not torch.version.cuda:
        return "stock: torch is a CPU build"
    return "stock: no CUDA library is built, and there is no Triton"


def main() -> int:
    """Prints both tables, through rich where it is installed; returns the exit status."""
    header = ("op", *DEVICES)
    if importlib.util.find_spec("rich") is None:
        for name, text in describe().items():
            print(f"{name}: {text}")
        for op, *kernels in owners():
            for device, kernel in zip(DEVICES, kernels, strict=True):
                print(f"{op} on {device}: {kernel}")
        return 0
    from rich.console import Console
    from rich.table import Table

    console = Console()
    versions = Table(show_header=False)
    for row in describe().items():
        versions.add_row(*row)
    ops = Table(*header)
    for row in owners():
        ops.add_row(*row)
    console.print(versions, ops)
    return 0


if __name__ == "__main__":
    sys.exit(main())
