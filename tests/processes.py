"""A script in several processes that have a gloo group."""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
BEGIN = """\
import sys, torch, dlkernels, torch.distributed as dist
rank, size, tests, file = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
sys.path.insert(0, tests)
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
"""
END = "\ndist.destroy_process_group()\n"


def run(script: str, folder: Path, size: int = 2, seconds: int = 600) -> list[list[str]]:
    """The words that each process prints. A script knows its ``rank`` and the ``size``."""
    command = [sys.executable, "-c", BEGIN + script + END]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(TESTS), str(folder / "rendezvous")],
            cwd=TESTS.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    printed = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=seconds)
            assert process.returncode == 0, errors
            printed.append(output.split())
    finally:
        for process in processes:
            process.kill()
    return printed
