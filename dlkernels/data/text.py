"""Labelled texts as rows of word numbers: the standard library's documentation, or aclImdb.

A word is a run of letters, in lower case. Words are numbered from 2 on, the most frequent of the
training texts first; 1 is one that has no number, 0 stands behind the end of a text.
"""

import ast
import collections
import math
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

# Of the standard library: 1 is about mail and networks, 0 about values and programs.
_ABOUT = {
    1: "email http urllib xmlrpc wsgiref asyncio ftplib imaplib mailbox poplib smtplib socket"
    " socketserver ssl",
    0: "argparse ast calendar collections configparser copy csv ctypes datetime _pydatetime"
    " dataclasses _pydecimal difflib enum fractions functools heapq inspect json numbers pickle"
    " pprint random re statistics string textwrap turtle types unittest",
}
_FEWEST, _MOST, _TEXTS = 8, 60, 600  # words of a docstring, and docstrings of a class


def load(
    folder: Path | None = None, words: int = 10_002, length: int = 400
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, int]]:
    """The embedded texts, or those of ``folder``, which is aclImdb: {train,test}/{pos,neg}/*.txt.

    Args:
        words: the numbers that there are, with 0 and 1.
        length: the most words of a text that are read.

    Returns ``(train_inputs, train_targets, test_inputs, test_targets, vocabulary)``: int64 (N, T),
    float32 (N, 1), 1 for pos; word -> number. Raises FileNotFoundError for a folder without such
    files.
    """
    train, test = _documentation() if folder is None else map(_reviews, _parts(folder))
    known = vocabulary((text for text, _ in train), words)

    def numbered(texts: list[tuple[list[str], int]]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [[known.get(word, 1) for word in text[:length]] or [1] for text, _ in texts]
        inputs = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for row, numbers in zip(inputs, rows, strict=True):
            row[: len(numbers)] = torch.tensor(numbers)
        return inputs, torch.tensor([[float(label)] for _, label in texts])

    return *numbered(train), *numbered(test), known


def split(text: str) -> list[str]:
    """The words of a text."""
    return re.findall(r"[a-z']+", text.lower())


def vocabulary(texts: Iterable[list[str]], words: int) -> dict[str, int]:
    """The numbers of the most frequent words; equals in the order of the alphabet."""
    counted = collections.Counter(word for text in texts for word in text)
    ranked = sorted(counted, key=lambda word: (-counted[word], word))
    return {word: number for number, word in enumerate(ranked[: words - 2], 2)}


def vectors(file: Path, known: dict[str, int], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers (N,) of the words of a ``vocabulary`` that a GloVe file has, and their vectors
    (N, size).

    Raises OSError; ValueError naming the line that is no word and ``size`` numbers, of the first
    line and of those of known words, or a file with none of them.
    """
    rows = {}
    with open(file, "rb") as lines:
        for at, line in enumerate(lines, 1):
            try:
                word, *values = line.decode().rstrip("\r\n").split(" ")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}:{at}: no UTF-8: {error.reason}") from None
            if at > 1 and word not in known:
                continue
            if len(values) != size:
                raise ValueError(
                    f"{file}:{at}: {len(values)} numbers for {word[:50]!r}, wanted {size}"
                )
            try:
                row = [float(value) for value in values]
            except ValueError as error:
                raise ValueError(f"{file}:{at}: {error}") from None
            if not all(map(math.isfinite, row)):
                raise ValueError(f"{file}:{at}: a number is not finite")
            if word in known:
                rows[known[word]] = row
    if not rows:
        raise ValueError(f"{file}: has none of the {len(known)} words")
    return torch.tensor(list(rows)), torch.tensor(list(rows.values()))


def _parts(folder: Path) -> tuple[Path, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    return folder / "train", folder / "test"


def _reviews(folder: Path) -> list[tuple[list[str], int]]:
    texts = []
    for name, label in (("pos", 1), ("neg", 0)):
        files = sorted((folder / name).glob("*.txt"))
        if not files:
            raise FileNotFoundError(f"{folder / name} has no *.txt")
        # Tags are no words.
        read = (file.read_text(encoding="utf-8", errors="replace") for file in files)
        texts += [(split(re.sub(r"<[^>]*>", " ", text)), label) for text in read]
    return texts


def _documentation() -> tuple[list[tuple[list[str], int]], list[tuple[list[str], int]]]:
    """Docstrings of the standard library, each class the same number; of five the last is for the
    test."""
    train, test = [], []
    for label, names in _ABOUT.items():
        found = dict.fromkeys(" ".join(text) for text in _docstrings(names.split()))
        chosen = list(found)[:: max(1, len(found) // _TEXTS)][:_TEXTS]
        for at, text in enumerate(chosen):
            (test if at % 5 == 4 else train).append((text.split(), label))
    return train, test


def _docstrings(names: list[str]) -> Iterator[list[str]]:
    """Of the modules and packages that this Python has, read from their files."""
    library = Path(sysconfig.get_path("stdlib"))
    for name in names:
        file = library / f"{name}.py"
        for source in [file] if file.is_file() else sorted((library / name).glob("*.py")):
            tree = ast.parse(source.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    words = split(ast.get_docstring(node) or "")
                    if _FEWEST <= len(words) <= _MOST:
                        yield words
