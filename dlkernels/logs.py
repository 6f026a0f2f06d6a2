"""Where a training run writes its curves: files always, TensorBoard or visdom where asked for.

Each has ``step(row)`` and ``epoch(row)``, of names and numbers; ``picture(name, epoch, pixels)``,
pixels uint8 (C, H, W); and ``close()``.
"""

import csv
import io
import json
import os
from pathlib import Path

import torch

from dlkernels.files import write_atomically


class Files:
    """``steps.csv``, ``epochs.jsonl`` and a PNG file for each picture, in the folder ``out``.

    ``sizes``, as the method gives them, cuts the two to what they were then; without, they are
    begun anew. Raises ValueError where one is shorter than that.
    """

    def __init__(self, out: Path, columns: list[str], sizes: dict[str, int]) -> None:
        self.out = out
        self._paths = {name: out / name for name in ("steps.csv", "epochs.jsonl")}
        for name, path in self._paths.items():
            if name in sizes and (not path.is_file() or path.stat().st_size < sizes[name]):
                raise ValueError(f"{path}: is not what it was when last.pt was written")
        self._files = {
            # Unbuffered: a line is in the file before the checkpoint that counts it.
            name: open(path, "r+b" if name in sizes else "wb", buffering=0)  # noqa: SIM115
            for name, path in self._paths.items()
        }
        for name, file in self._files.items():
            file.truncate(sizes.get(name, 0))
            file.seek(0, io.SEEK_END)
        if not sizes:
            self._write_csv(columns)

    def _write_csv(self, cells: list) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(cells)
        self._files["steps.csv"].write(line.getvalue().encode())

    def sizes(self) -> dict[str, int]:
        """Bytes in each of the two files."""
        return {name: file.tell() for name, file in self._files.items()}

    def step(self, row: dict) -> None:
        self._write_csv(list(row.values()))

    def epoch(self, row: dict) -> None:
        self._files["epochs.jsonl"].write(json.dumps(row).encode() + b"\n")

    def picture(self, name: str, epoch: int, pixels: torch.Tensor) -> None:
        from PIL import Image

        image = io.BytesIO()
        pixels = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(image, "png")
        write_atomically(self.out / f"{name}.png", image.getvalue())

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class TensorBoard:
    """Event files in ``out/tensorboard``. Raises ModuleNotFoundError without tensorboard."""

    def __init__(self, out: Path, title: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What was written after the checkpoint is not shown: these steps come again.
        self._writer = SummaryWriter(out / "tensorboard", purge_step=step + 1)
        self._step = step

    def step(self, row: dict) -> None:
        self._step = row["step"]
        for name, value in row.items():
            if name not in ("step", "epoch"):
                self._writer.add_scalar(f"step/{name}", value, self._step)

    def epoch(self, row: dict) -> None:
        for name, value in row.items():
            if name not in ("epoch", "total"):
                self._writer.add_scalar(f"epoch/{name}", value, self._step)

    def picture(self, name: str, epoch: int, pixels: torch.Tensor) -> None:
        self._writer.add_image(name, pixels, self._step)

    def close(self) -> None:
        self._writer.close()


class Visdom:
    """Curves and pictures on a visdom server, by default the one of this machine, in the
    environment ``title``; ``VISDOM_SERVER`` and ``VISDOM_PORT`` name another.

    Raises ModuleNotFoundError without visdom, ConnectionError without a server.
    """

    def __init__(self, out: Path, title: str, step: int) -> None:
        import visdom

        where = {"server": os.environ.get("VISDOM_SERVER"), "port": os.environ.get("VISDOM_PORT")}
        self._server = visdom.Visdom(
            env=title,
            raise_exceptions=True,
            use_incoming_socket=False,
            **{name: value for name, value in where.items() if value},
        )
        if not self._server.check_connection():
            raise ConnectionError("no visdom server answers: python -m visdom.server starts one")

    def _line(self, window: str, names: list[str], values: list[float], x: int) -> None:
        for name, value in zip(names, values, strict=True):
            self._server.line(
                X=[x],
                Y=[value],
                win=window,
                name=name,
                update="append",
                opts={"title": window, "showlegend": True},
            )

    def step(self, row: dict) -> None:
        names = [name for name in row if name not in ("step", "epoch", "lr")]
        self._line("training loss", names, [row[name] for name in names], row["step"])

    def epoch(self, row: dict) -> None:
        for name, value in row.items():
            if name not in ("epoch", "correct", "total"):
                window = "loss by epoch" if name.endswith("_loss") else name
                self._line(window, [name], [value], row["epoch"])

    def picture(self, name: str, epoch: int, pixels: torch.Tensor) -> None:
        self._server.image(pixels.numpy(), win=name, opts={"title": f"{name}, epoch {epoch}"})

    def close(self) -> None:
        pass


SINKS = {"tensorboard": TensorBoard, "visdom": Visdom}
