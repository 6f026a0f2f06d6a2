"""Diabetes: eight numbers of a patient and a label, from a CSV file or scikit-learn's own set.

Scikit-learn's (442 patients) has ten columns and, in place of a label, how far the disease has
come a year later. Taken from it are eight columns, scaled to -1 to 1 as in the documented file, and
the label "further than the median". The two that are left out, total and LDL cholesterol, nearly
follow from the other blood values.
"""

import gzip
import zlib
from pathlib import Path

import torch

FEATURES = 8
COLUMNS = ("age", "sex", "bmi", "bp", "s3", "s4", "s5", "s6")
NAMES = ("diabetes.csv", "diabetes.csv.gz")
SPLIT_SEED = 0


def load(path: Path | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training and test set, always the same split: a fifth of the rows is for the test.

    Args:
        path: a CSV file, or a folder that holds ``diabetes.csv``, gzipped or not; None: the
            embedded set.

    Returns ``(train_inputs, train_targets, test_inputs, test_targets)``, float32 (N, 8) and (N, 1)
    of 0 and 1. Raises FileNotFoundError; ValueError naming file, line and what is wrong with it;
    ModuleNotFoundError without scikit-learn.
    """
    inputs, targets = embedded() if path is None else read_csv(find(Path(path)))
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(SPLIT_SEED))
    test, train = order.split([len(order) // 5, len(order) - len(order) // 5])
    return inputs[train], targets[train], inputs[test], targets[test]


def embedded() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (442, 8) in -1 to 1 and labels (442, 1) of scikit-learn's set."""
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes(scaled=False)
    columns = [bunch.feature_names.index(name) for name in COLUMNS]
    x = torch.from_numpy(bunch.data[:, columns])
    low, high = x.amin(0), x.amax(0)
    progress = torch.from_numpy(bunch.target)
    labels = progress > progress.median()
    return (2 * (x - low) / (high - low) - 1).float(), labels.float()[:, None]


def find(path: Path) -> Path:
    """The file itself, or the one in the folder. Raises FileNotFoundError."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"no file or folder {path}")
    for name in NAMES:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{path} has no {' nor '.join(NAMES)}")


def read_csv(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (N, 8) and labels (N, 1) of a file of nine comma-separated numbers a line.

    Whether it is gzipped is read from its first bytes, not from its name. Raises ValueError.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: broken gzip file: {error}") from error
    rows = []
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
        if not line.strip():
            continue
        cells = line.split(",")
        if len(cells) != FEATURES + 1:
            raise ValueError(
                f"{path}:{number}: {len(cells)} columns, wanted {FEATURES} and a label"
            )
        try:
            row = [float(cell) for cell in cells]
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if row[-1] not in (0.0, 1.0):
            raise ValueError(f"{path}:{number}: label {cells[-1].strip()}, wanted 0 or 1")
        rows.append(row)
    if len(rows) < 5:
        raise ValueError(f"{path}: {len(rows)} rows, wanted 5 at least: a fifth is for the test")
    table = torch.tensor(rows)
    if not table.isfinite().all():
        raise ValueError(f"{path}: a value is not finite")
    return table[:, :FEATURES].contiguous(), table[:, FEATURES:].contiguous()
