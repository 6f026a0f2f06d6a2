"""Where a training run writes its curves: files always, TensorBoard or visdom where asked for.

Each has ``step(row)`` and ``epoch(row)``, of names and numbers; ``picture(name, epoch, pixels)``,
pixels uint8 (C, H, W); and ``close()``. One beside the files has ``begin(files)`` too, called
first: it forgets what it was told after the steps in ``files``, which come again.
"""

import csv
import io
import json
import os
from pathlib import Path

import torch

from dlkernels.files import write_atomically

LOGS = ("steps.csv", "epochs.jsonl")


class Files:
    """``steps.csv``, ``epochs.jsonl`` and a PNG file for each picture, in the folder ``out``.

    ``sizes``, as the method gives them, cuts the two to what they were then; without, they are
    begun anew. Raises ValueError where one is shorter than that.
    """

    def __init__(self, out: Path, columns: list[str], sizes: dict[str, int]) -> None:
        self.out = out
        self._paths = {name: out / name for name in LOGS}
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

    def steps(self) -> list[dict]:
        """The rows that are there."""
        with open(self._paths["steps.csv"], newline="") as lines:
            rows = list(csv.DictReader(lines))
        whole = ("step", "epoch")
        return [{k: int(v) if k in whole else float(v) for k, v in row.items()} for row in rows]

    def epochs(self) -> list[dict]:
        """The rows that are there."""
        return [json.loads(line) for line in self._paths["epochs.jsonl"].read_text().splitlines()]

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

    def __init__(self, out: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open, self._out = SummaryWriter, out / "tensorboard"

    def begin(self, files: Files) -> None:
        self._step = len(files.steps())
        self._writer = self._open(self._out, purge_step=self._step + 1)

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
    """Curves and pictures on a visdom server, by default the one of this machine, in an
    environment named after the whole path of ``out``; ``VISDOM_SERVER`` and ``VISDOM_PORT`` name
    another.

    Raises ModuleNotFoundError without visdom, ConnectionError without a server.
    """

    def __init__(self, out: Path) -> None:
        import visdom

        where = {"server": os.environ.get("VISDOM_SERVER"), "port": os.environ.get("VISDOM_PORT")}
        self._server = visdom.Visdom(
            env="_".join(out.resolve().parts[1:]),
            raise_exceptions=True,
            use_incoming_socket=False,
            **{name: value for name, value in where.items() if value},
        )
        if not self._server.check_connection():
            raise ConnectionError("no visdom server answers: python -m visdom.server starts one")

    def begin(self, files: Files) -> None:
        self._server.close()  # all windows of the environment: points cannot be taken back
        self._steps(files.steps())
        self._epochs(files.epochs())

    def _line(self, window: str, name: str, x: list[int], y: list[float]) -> None:
        opts = {"title": window, "showlegend": True}
        self._server.line(X=x, Y=y, win=window, name=name, update="append", opts=opts)

    def _steps(self, rows: list[dict]) -> None:
        for name in rows[0] if rows else ():
            if name not in ("step", "epoch", "lr"):
                x, y = ([row[of] for row in rows] for of in ("step", name))
                self._line("training loss", name, x, y)

    def _epochs(self, rows: list[dict]) -> None:
        for name in rows[0] if rows else ():
            if name not in ("epoch", "lr", "correct", "total"):
                window = "loss by epoch" if name.endswith("_loss") else name
                x, y = ([row[of] for row in rows] for of in ("epoch", name))
                self._line(window, name, x, y)

    def step(self, row: dict) -> None:
        self._steps([row])

    def epoch(self, row: dict) -> None:
        self._epochs([row])

    def picture(self, name: str, epoch: int, pixels: torch.Tensor) -> None:
        self._server.image(pixels.numpy(), win=name, opts={"title": f"{name}, epoch {epoch}"})

    def close(self) -> None:
        pass


SINKS = {"tensorboard": TensorBoard, "visdom": Visdom}
