"""The embedded digits, the readers on files written here, and the resizing."""

import dataclasses
import gzip
import io
import lzma
import os
import pickle
import shutil
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dlkernels import data, trainer
from dlkernels.data import (
    augment,
    cifar10,
    diabetes,
    digits,
    folders,
    images,
    mnist,
    sine,
    text,
    vectors,
)
from dlkernels.models import NETWORKS

SIZES = {"train": 7, "t10k": 5}


def idx(array: torch.Tensor) -> bytes:
    header = struct.pack(f">HBB{array.dim()}I", 0, 0x08, array.dim(), *array.shape)
    return header + bytes(array.flatten().int().tolist())


def write_mnist(folder, dot="-", pack=lambda content: content, gz=""):
    """Four small files in ``folder``; returns what is in them, in the order of ``mnist.load``."""
    written = []
    for part, count in SIZES.items():
        images = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8)
        labels = torch.randint(0, 10, (count,), dtype=torch.uint8)
        (folder / f"{part}-images{dot}idx3-ubyte{gz}").write_bytes(pack(idx(images)))
        (folder / f"{part}-labels{dot}idx1-ubyte{gz}").write_bytes(pack(idx(labels)))
        written += [images, labels]
    return written


def test_digits_are_split_once_and_for_all():
    train_images, train_labels, test_images, test_labels = digits.load()
    assert train_images.shape == (1437, 8, 8) and test_images.shape == (360, 8, 8)
    assert train_labels.shape == (1437,) and test_labels.shape == (360,)
    assert train_images.dtype == torch.float32 and train_labels.dtype == torch.int64
    both = torch.cat([train_images, test_images])
    assert both.min() == 0 and both.max() == 1
    assert set(torch.cat([train_labels, test_labels]).tolist()) == set(range(10))
    # Nothing is lost or in both sets: the multiset of images is scikit-learn's.
    from sklearn.datasets import load_digits

    original = torch.from_numpy(load_digits().images).float() / 16
    assert sorted(map(tuple, both.flatten(1).tolist())) == sorted(
        map(tuple, original.flatten(1).tolist())
    )
    torch.manual_seed(99)  # the split does not depend on the state of the generator
    assert torch.equal(digits.load()[2], test_images)


@pytest.mark.parametrize("size", [8, 28, 32])
def test_load_resizes_and_normalises(size):
    images = data.load(size, mean=0.25, std=0.5)
    assert images.train_inputs.shape == (1437, 1, size, size)
    assert images.test_inputs.shape == (360, 1, size, size)
    raw = digits.load()[2]
    if size == 8:
        assert torch.equal(images.test_inputs[:, 0], (raw - 0.25) / 0.5)
    else:  # bilinear: no value outside the image's own range
        pixels = images.test_inputs * 0.5 + 0.25
        slack = 4 * torch.finfo(torch.float32).eps
        assert (pixels.amax((1, 2, 3)) <= raw.amax((1, 2)) + slack).all()
        assert (pixels.amin((1, 2, 3)) >= raw.amin((1, 2)) - slack).all()


def test_prepare_doubles_a_ramp_as_bilinear_does():
    ramp = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    out = data.prepare(ramp, 4, 0.0, 1.0)
    assert out.shape == (1, 1, 4, 4)
    assert torch.equal(out[0, 0], torch.tensor([0.0, 0.25, 0.75, 1.0]).expand(4, 4))


def test_grey_images_have_equal_channels():
    """A mean and a std of three numbers: the digits three times, each channel normalised."""
    mean, std = (0.5, 0.25, 0.125), (0.5, 2.0, 0.25)
    grey, images = data.load(32, 0.0, 1.0), data.load(32, mean, std)
    assert images.train_inputs.shape == (1437, 3, 32, 32)
    for channel in range(3):
        wanted = (grey.test_inputs[:, 0] - mean[channel]) / std[channel]
        assert torch.equal(images.test_inputs[:, channel], wanted)


@pytest.mark.parametrize("dot", ["-", "."])
@pytest.mark.parametrize(
    ("pack", "gz"),
    [(bytes, ""), (gzip.compress, ".gz"), (gzip.compress, ""), (bytes, ".gz")],
    ids=["plain", "gz", "gz-without-suffix", "plain-named-gz"],
)
def test_mnist_files_as_they_come(tmp_path, dot, pack, gz):
    written = write_mnist(tmp_path, dot, pack, gz)
    images, labels, test_images, test_labels = mnist.load(tmp_path)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert torch.equal(images, written[0].float() / 255)
    assert torch.equal(labels, written[1].long())
    assert torch.equal(test_images, written[2].float() / 255)
    assert torch.equal(test_labels, written[3].long())


def test_load_of_a_folder_is_resized(tmp_path):
    write_mnist(tmp_path)
    images = data.load(32, 0.1307, 0.3081, tmp_path)
    assert images.train_inputs.shape == (7, 1, 32, 32)
    assert images.test_targets.shape == (5,)
    assert str(tmp_path) in images.name


def test_missing_folder_and_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        mnist.load(tmp_path / "nowhere")
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="has no t10k-labels-idx1-ubyte"):
        mnist.load(tmp_path)


def replaced(position: int, new: bytes):
    return lambda old: old[:position] + new + old[position + len(new) :]


DAMAGE = {  # id: file, what is done to its bytes, the message
    "truncated": ("train-images-idx3-ubyte", lambda b: b[:-1], r"5487 bytes of values.*want 5488"),
    "trailing bytes": ("t10k-images-idx3-ubyte", lambda b: b + b"\0", r"3921 bytes.*want 3920"),
    "empty file": ("train-labels-idx1-ubyte", lambda b: b"", r"0 bytes, an IDX header has 8"),
    "half a header": ("train-images-idx3-ubyte", lambda b: b[:9], r"9 bytes, an IDX header has 16"),
    "wrong magic": ("train-labels-idx1-ubyte", replaced(0, b"PK"), r"not an IDX file.*0x504b0801"),
    "dtype": ("train-images-idx3-ubyte", replaced(2, b"\x0d"), r"dtype code 0x0d, wanted 0x08"),
    "dimensions": ("train-images-idx3-ubyte", replaced(3, b"\x01"), r"1 dimensions, wanted 3"),
    "no images": (
        "t10k-images-idx3-ubyte",
        lambda b: idx(torch.zeros(0, 28, 28)),
        r"no values: dimensions \(0, 28, 28\)",
    ),
    "label out of range": ("t10k-labels-idx1-ubyte", replaced(10, b"\x0a"), r"label 10, wanted"),
    "huge dimension": (
        "train-images-idx3-ubyte",
        replaced(4, b"\xff\xff\xff\xff"),
        r"5488 bytes of values, dimensions \(4294967295, 28, 28\)",
    ),
    "one label less": (
        "train-labels-idx1-ubyte",
        lambda b: idx(torch.zeros(6)),
        r"has 7 images, .* has 6 labels",
    ),
    "gzip cut off": (
        "train-images-idx3-ubyte",
        lambda b: gzip.compress(b)[:-12],
        r"broken gzip file",
    ),
    "gzip checksum": (
        "train-images-idx3-ubyte",
        lambda b: gzip.compress(b)[:-8] + bytes(8),
        r"broken gzip file",
    ),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_file_is_named_with_what_is_wrong(tmp_path, name, damage, message):
    write_mnist(tmp_path)
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        mnist.load(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# --- cifar10 --------------------------------------------------------------------------------------

LABELS = "airplane automobile bird cat deer dog frog horse ship truck".split()


def write_cifar10(folder, counts=(11, 4), size=(32, 32)):
    """The folder of PNG files; returns what is in them, in the order of ``cifar10.load``."""
    (folder / "labels.txt").write_text("\n".join(LABELS) + "\n")
    written = []
    for part, count in zip(("train", "test"), counts, strict=True):
        (folder / part).mkdir()
        images = torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8)
        labels = torch.randint(0, 10, (count,))
        for n, (image, label) in enumerate(zip(images, labels, strict=True), 1):
            Image.fromarray(image.numpy()).save(folder / part / f"{n}_{LABELS[label]}.png")
        written += [images.permute(0, 3, 1, 2), labels]
    return written


def test_a_cifar10_folder_is_read_in_the_order_of_its_numbers(tmp_path):
    written = write_cifar10(tmp_path)  # 10 and 11 stand before 2 by name
    (tmp_path / "train" / "notes.txt").write_text("no image")
    for got, wanted in zip(cifar10.load(tmp_path), written, strict=True):
        assert torch.equal(got, wanted.float() / 255 if wanted.dim() == 4 else wanted)
        assert got.is_contiguous()


def test_cifar10_is_resized_and_normalised_by_channel(tmp_path):
    written = write_cifar10(tmp_path, size=(40, 48))
    recipe = NETWORKS["lenet5_cifar"].recipe
    examples = data.load_for(recipe, tmp_path)
    assert examples.train_inputs.shape == (11, 3, 32, 32)
    assert examples.name == f"CIFAR-10 files of {tmp_path}"
    pixels = torch.nn.functional.interpolate(
        written[2].float() / 255, size=(32, 32), mode="bilinear", align_corners=False
    )
    for channel, (mean, std) in enumerate(zip(recipe.mean, recipe.std, strict=True)):
        wanted = (pixels[:, channel] - mean) / std
        torch.testing.assert_close(examples.test_inputs[:, channel], wanted)
    assert torch.equal(examples.test_targets, written[3])


def renamed(name):
    return lambda folder: next((folder / "train").glob("1_*")).rename(folder / "train" / name)


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut_off(folder):
    path = next((folder / "test").glob("3_*"))
    path.write_bytes(path.read_bytes()[:-40])


def other_size(folder):
    Image.new("RGB", (31, 32)).save(folder / "train" / "12_cat.png")


def other_sizes(folder):
    for path in (folder / "test").iterdir():
        Image.new("RGB", (8, 9)).save(path)


DAMAGED_CIFAR10 = {  # id: what is done to the folder, the file that is named, the message
    "label": (renamed("1_cow.png"), "1_cow.png", "label 'cow' is not in labels.txt"),
    "no number": (renamed("one_cat.png"), "one_cat.png", "wanted a name as 1_frog.png"),
    "no label": (renamed("1.png"), "1.png", "wanted a name as 1_frog.png"),
    "nine labels": (
        written("labels.txt", "\n".join(LABELS[1:]).encode()),
        "labels.txt",
        "9 names, 9 different ones, wanted 10",
    ),
    "a label twice": (
        written("labels.txt", "\n".join([*LABELS[1:], "cat"]).encode()),
        "labels.txt",
        "10 names, 9 different ones, wanted 10",
    ),
    "no PNG": (written("train/99_cat.png", b"GIF89a"), "99_cat.png", "broken PNG file"),
    "cut off": (cut_off, "3_", "broken PNG file"),
    "sizes": (other_size, "12_cat.png", "32x31, 1_.*png has 32x32"),
    "sizes of the sets": (other_sizes, "", "images of 32x32 in train, of 9x8 in test"),
}


@pytest.mark.parametrize(
    ("damage", "name", "message"), DAMAGED_CIFAR10.values(), ids=DAMAGED_CIFAR10.keys()
)
def test_a_damaged_cifar10_folder_is_named_with_what_is_wrong(tmp_path, damage, name, message):
    write_cifar10(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        cifar10.load(tmp_path)
    assert str(tmp_path) in str(caught.value) and name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_cifar10_folder_lacks(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        cifar10.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no labels.txt"):
        cifar10.load(tmp_path)
    write_cifar10(tmp_path, counts=(2, 0))
    with pytest.raises(ValueError, match="test: no PNG files"):
        cifar10.load(tmp_path)
    (tmp_path / "test").rmdir()
    with pytest.raises(FileNotFoundError, match="has no folder test"):
        cifar10.load(tmp_path)


# --- cifar10, as it is published ------------------------------------------------------------------


def batches(pack, counts=(2, 1, 3, 2, 2, 4)):
    """Name -> content of the six files, and what is in them, in the order of ``cifar10.load``."""
    files, parts = {}, [[], []]
    for name, count in zip((*cifar10.TRAIN, "test_batch"), counts, strict=True):
        pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
        labels = torch.randint(0, 10, (count,))
        files[name + pack.suffix] = pack(pixels, labels)
        parts[name == "test_batch"].append((pixels, labels))
    return files, [torch.cat(x) for part in parts for x in zip(*part, strict=True)]


def binary(pixels, labels):
    return torch.cat([labels.to(torch.uint8)[:, None], pixels.flatten(1)], 1).numpy().tobytes()


def pickled(pixels, labels):
    batch = {b"data": pixels.flatten(1).numpy(), b"labels": labels.tolist(), b"filenames": [b"x"]}
    return pickle.dumps({**batch, b"batch_label": b"training batch 1 of 5"}, protocol=2)


binary.suffix, binary.names = ".bin", ("cifar-10-binary.tar.gz", "cifar-10-batches-bin")
pickled.suffix, pickled.names = "", ("cifar-10-python.tar.gz", "cifar-10-batches-py")


def write_archive(path, folder, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {**files, "readme.html": b"<html>"}.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_folder(path, files):
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)


@pytest.mark.parametrize("pack", [binary, pickled])
@pytest.mark.parametrize("archived", [True, False], ids=["archive", "folder"])
def test_cifar10_is_read_as_it_is_published(tmp_path, pack, archived):
    files, written = batches(pack)
    archive, folder = pack.names
    if archived:
        write_archive(tmp_path / archive, folder, files)
    else:
        write_folder(tmp_path / folder, files)
    for path in (tmp_path, tmp_path / (archive if archived else folder)):
        for got, wanted in zip(cifar10.load(path), written, strict=True):
            assert torch.equal(got, wanted.float() / 255 if wanted.dim() == 4 else wanted)


class Malice:
    def __reduce__(self):
        return os.mkdir, ("ran",)


DAMAGED_BATCHES = {  # id: how they are packed, the file, what is done to its bytes, the message
    "cut off": (binary, "data_batch_2.bin", lambda b: b[:-1], "3072 bytes, wanted records of 3073"),
    "empty": (binary, "test_batch.bin", lambda b: b"", "0 bytes, wanted records"),
    "label": (binary, "data_batch_1.bin", lambda b: b[:3073] + b"\x0a" + b[3074:],
              "image 2: label 10, wanted 0 to 9"),
    "missing": (binary, "data_batch_5.bin", lambda b: None, "is missing"),
    "pickle cut off": (pickled, "data_batch_3", lambda b: b[:-9], "broken pickle"),
    "no pickle": (pickled, "test_batch", lambda b: b"\x00" + b, "broken pickle"),
    "code": (pickled, "test_batch", lambda b: pickle.dumps({"data": Malice()}),
             "broken pickle: it asks for posix.mkdir"),
    "nothing in it": (pickled, "data_batch_1", lambda b: pickle.dumps({}), "broken pickle: KeyE"),
    "no dict": (pickled, "data_batch_1", lambda b: pickle.dumps([1]), "broken pickle: Attribute"),
    "shape": (pickled, "test_batch",
              lambda b: pickle.dumps({"data": np.zeros((2, 7), np.uint8), "labels": [1, 2]}),
              "no uint8 array of 2 x 3072"),
    "pickled label": (pickled, "test_batch",
                      lambda b: pickle.dumps({"data": np.zeros((1, 3072), np.uint8),
                                              "labels": [-1]}), "image 1: label -1"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("pack", "name", "damage", "message"), DAMAGED_BATCHES.values(), ids=DAMAGED_BATCHES.keys()
)
def test_a_damaged_cifar10_batch_is_named_and_runs_nothing(
    tmp_path, monkeypatch, pack, name, damage, message
):
    monkeypatch.chdir(tmp_path)
    files, _ = batches(pack)
    content = damage(files.pop(name))
    files |= {} if content is None else {name: content}
    archive, folder = pack.names
    write_folder(tmp_path / folder, files)
    write_archive(tmp_path / "a.tar.gz", folder, files)
    for path in (tmp_path / folder, tmp_path / "a.tar.gz"):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            cifar10.load(path)
        assert str(path) in str(caught.value) and name in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"GIF89a" + b])
def test_a_broken_cifar10_archive_is_named(tmp_path, damage):
    path = tmp_path / "cifar-10-binary.tar.gz"
    write_archive(path, "cifar-10-batches-bin", batches(binary)[0])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="broken archive") as caught:
        cifar10.load(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def raising(error):
    def broken(*args):
        raise error

    return broken


@pytest.mark.parametrize(
    "error", [lzma.LZMAError("Corrupt input data"), zlib.error(), EOFError(), tarfile.ReadError()]
)
def test_an_archive_that_breaks_within_a_file_is_named(tmp_path, monkeypatch, error):
    path = tmp_path / "cifar-10-binary.tar.gz"
    write_archive(path, "cifar-10-batches-bin", batches(binary)[0])

    monkeypatch.setattr(tarfile.ExFileObject, "read", raising(error))
    with pytest.raises(ValueError) as caught:
        cifar10.load(path)
    assert str(caught.value) == f"{path}: broken archive: {str(error) or type(error).__name__}"


def test_an_archive_of_damaged_lzma_is_named(tmp_path):
    path, plain = tmp_path / "a.tar.xz", tmp_path / "a.tar.gz"
    write_archive(plain, "cifar-10-batches-bin", batches(binary)[0])
    content = bytearray(lzma.compress(gzip.decompress(plain.read_bytes())))
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="broken archive: Corrupt input data"):
        cifar10.load(path)


# --- image folders --------------------------------------------------------------------------------

CLASSES = ("bulbasaur", "charmander", "mewtwo", "pikachu", "squirtle")


def write_folders(root, each=4, size=(20, 24)):
    """Images of one colour each; returns path -> colour."""
    colours = {}
    for k, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for n in range(each):
            path = f"{name}/{n:03}.{('png', 'JPG', 'jpeg')[n % 3]}"
            colours[path] = (50 * k, 60 * n, 128)
            Image.new("RGB", size, colours[path]).save(root / path, quality=100)
    (root / "mewtwo" / "notes.txt").write_text("no image")
    return colours


def test_image_folders_are_read_by_their_index(tmp_path):
    colours = write_folders(tmp_path)
    x, y, test_x, test_y = folders.load(tmp_path, 16, 5)
    assert x.shape == (16, 3, 20, 20) and test_x.shape == (4, 3, 20, 20)
    rows = [line.split(",") for line in (tmp_path / "images.csv").read_text().splitlines()]
    assert sorted(path for path, _ in rows) == sorted(colours) != [path for path, _ in rows]
    labels = torch.cat([y, test_y])
    for (path, label), image, got in zip(rows, torch.cat([x, test_x]), labels, strict=True):
        assert got == int(label) == CLASSES.index(path.partition("/")[0])
        wanted = torch.tensor(colours[path]).float()[:, None, None] / 255
        assert (image - wanted).abs().max() < 3 / 255  # JPEG
    # Written once: another order stays.
    text = "".join(f"{path},{label}\n" for path, label in sorted(rows))
    (tmp_path / "images.csv").write_text(text)
    assert folders.load(tmp_path, 16, 5)[1].tolist() == sorted(labels.tolist())[:16]
    assert (tmp_path / "images.csv").read_text() == text


def test_image_folders_are_normalised_and_cropped(tmp_path):
    write_folders(tmp_path)
    recipe = dataclasses.replace(NETWORKS["resnet18_pokemon"].recipe, image_size=16)
    examples = data.load_for(recipe, tmp_path)
    wide = data.load_for(recipe, tmp_path, margin=True)
    assert examples.train_inputs.shape == (16, 3, 16, 16) and len(examples.test_inputs) == 4
    assert wide.train_inputs.shape == (16, 3, 20, 20)
    assert torch.equal(wide.train_inputs[:, :, 2:18, 2:18], examples.train_inputs)
    assert torch.equal(wide.test_inputs, examples.test_inputs)
    raw = folders.load(tmp_path, 16, 5)[2]
    for channel, (mean, std) in enumerate(zip(recipe.mean, recipe.std, strict=True)):
        wanted = (raw[:, channel, 2:18, 2:18] - mean) / std
        torch.testing.assert_close(examples.test_inputs[:, channel], wanted)


def test_folders_are_split_into_60_20_and_20(tmp_path):
    write_folders(tmp_path)
    recipe = dataclasses.replace(NETWORKS["resnet18_pokemon"].recipe, image_size=16)
    settings = trainer.Settings.of("resnet18_pokemon", 16, {})
    parts = trainer.split(data.load_for(recipe, tmp_path, margin=True), settings)
    assert len(parts.train_inputs) == 12 and len(parts.validation_inputs) == 4
    assert parts.train_inputs.shape[2:] == (20, 20)
    assert parts.validation_inputs.shape[2:] == (16, 16)


def line_of_index(at, change):
    def damage(root):
        folders.read_index(root, 5)
        lines = (root / "images.csv").read_text().splitlines()
        lines[at - 1 : at] = change(lines[at - 1])
        (root / "images.csv").write_text("\n".join(lines) + "\n")

    return damage


def broken(root):
    path = root / "mewtwo" / "001.JPG"
    path.write_bytes(path.read_bytes()[:60])


DAMAGED_FOLDERS = {  # id: what is done to the folder, the file that is named, the message
    "image": (broken, "001.JPG", "broken JPG file"),
    "text as image": (
        lambda root: (root / "mewtwo" / "9.png").write_text("x"), "9.png", "broken PNG file"
    ),
    "stale class": (
        line_of_index(3, lambda line: [line[:-1] + "7"]), "images.csv:3", "class 7 for .*whose fold"
    ),
    "short line": (
        line_of_index(2, lambda line: [line[:-2]]), "images.csv:2", "1 columns, wanted a path and"
    ),
    "no image": (
        line_of_index(5, lambda line: ["../" + line]), "images.csv:5", "no image '../"
    ),
    "quotes": (line_of_index(20, lambda line: ['"' + line]), "images.csv:20", "unexpected end"),
    "twice": (line_of_index(1, lambda line: [line, line]), "images.csv", "is listed twice"),
    "not listed": (line_of_index(4, lambda line: []), "images.csv", "does not list .*of 1"),
    "four classes": (lambda root: shutil.rmtree(root / "mewtwo"), "", "4 folders, one for each"),
    "empty class": (lambda root: [p.unlink() for p in (root / "mewtwo").iterdir()], "mewtwo",
                    "no images"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "name", "message"), DAMAGED_FOLDERS.values(), ids=DAMAGED_FOLDERS.keys()
)
def test_damaged_image_folders_are_named_with_what_is_wrong(tmp_path, damage, name, message):
    write_folders(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        folders.load(tmp_path, 16, 5)
    assert str(tmp_path) in str(caught.value) and name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [OSError(), EOFError(), zlib.error("incorrect header check")])
def test_an_image_that_breaks_with_few_words_is_named(tmp_path, monkeypatch, error):
    path = tmp_path / "1.png"
    Image.new("RGB", (4, 4)).save(path)

    monkeypatch.setattr(Image.Image, "convert", raising(error))
    with pytest.raises(ValueError) as caught:
        images.read(path)
    assert str(caught.value) == f"{path}: broken PNG file: {str(error) or type(error).__name__}"


def test_missing_and_few_image_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        folders.load(tmp_path / "nowhere", 16, 5)
    (tmp_path / "a").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "1.png")
    with pytest.raises(ValueError, match="1 images, wanted 5 at least"):
        folders.load(tmp_path, 16, 1)


# --- augmentation ---------------------------------------------------------------------------------


def test_a_flip_reverses_the_columns_of_about_half_of_the_images():
    images = torch.randn(200, 3, 4, 5)
    flipped = augment.flip(images, None)
    as_it_was = (flipped == images).flatten(1).all(1)
    reversed_ = (flipped == images.flip(3)).flatten(1).all(1)
    assert (as_it_was ^ reversed_).all() and 60 < reversed_.sum() < 140


def test_a_rotation_turns_by_up_to_15_degrees_and_leaves_black_outside():
    recipe = NETWORKS["resnet18_pokemon"].recipe
    mean, std = (torch.tensor(n).view(3, 1, 1) for n in (recipe.mean, recipe.std))
    turned = augment.rotate((torch.ones(300, 3, 16, 48) - mean) / std, recipe) * std + mean
    torch.testing.assert_close(turned[:, :, 8, 24], torch.ones(300, 3))
    assert (turned[:, :, 0, 0].abs().amax(1) < 1e-5).sum() > 100
    # A spot on the middle line, 20 to the right, goes up and down by up to 20·sin 15° = 5.2.
    spot = torch.zeros(300, 1, 33, 49)
    spot[:, :, 16, 44] = 1.0
    plain = dataclasses.replace(recipe, mean=0.0, std=1.0)
    moved = augment.rotate(spot, plain)[:, 0]
    rows = (moved.sum(2) * torch.arange(33)).sum(1) / moved.sum((1, 2)) - 16
    assert rows.abs().max() < 5.6 and rows.max() > 4.5 and rows.min() < -4.5
    columns = (moved.sum(1) * torch.arange(49)).sum(1) / moved.sum((1, 2)) - 24
    torch.testing.assert_close(rows**2 + columns**2, torch.full((300,), 400.0), rtol=0.05, atol=0)


# --- diabetes -------------------------------------------------------------------------------------


def test_embedded_diabetes_is_scaled_split_and_balanced():
    x, y, test_x, test_y = diabetes.load()
    assert x.shape == (354, 8) and test_x.shape == (88, 8)
    assert y.shape == (354, 1) and test_y.shape == (88, 1)
    assert x.dtype == y.dtype == torch.float32
    inputs, labels = torch.cat([x, test_x]), torch.cat([y, test_y])
    assert (inputs.amin(0) == -1).all() and (inputs.amax(0) == 1).all()
    assert set(labels.flatten().tolist()) == {0.0, 1.0} and abs(labels.mean() - 0.5) < 0.01
    # A known column: the sex has two values; and a known relation: weight goes with the label.
    assert set(inputs[:, diabetes.COLUMNS.index("sex")].tolist()) == {-1.0, 1.0}
    weight = inputs[:, diabetes.COLUMNS.index("bmi")]
    high, low = (weight[labels[:, 0] == value].mean() for value in (1, 0))
    assert high > low + 0.2
    torch.manual_seed(99)  # the split does not depend on the state of the generator
    assert torch.equal(diabetes.load()[2], test_x)


def write_diabetes(path, rows=12, pack=bytes):
    table = torch.cat([torch.rand(rows, 8) * 2 - 1, torch.randint(2, (rows, 1)).float()], 1)
    text = "".join(",".join(repr(v) for v in row) + "\n" for row in table.tolist())
    path.write_bytes(pack(text.encode()))
    return table


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("name", ["diabetes.csv", "diabetes.csv.gz"])
def test_a_diabetes_file_is_read_as_it_comes(tmp_path, name, pack):
    table = write_diabetes(tmp_path / name, pack=pack)
    for path in (tmp_path / name, tmp_path):
        x, y, test_x, test_y = diabetes.load(path)
        assert len(x) == 10 and len(test_x) == 2
        rows = torch.cat([torch.cat([x, y], 1), torch.cat([test_x, test_y], 1)])
        assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, table.tolist()))


GOOD = "0,0,0,0,0,0,0,0,1\n"
DAMAGED_CSV = {  # id: content, the message
    "columns": (GOOD + "1,2,3\n" + 5 * GOOD, ":2: 3 columns, wanted 8 and a label"),
    "no number": (GOOD * 2 + GOOD.replace("1", "a") + GOOD * 5, ":3: could not convert"),
    "header": ("a,b,c,d,e,f,g,h,y\n" + GOOD * 5, ":1: could not convert"),
    "label": (GOOD * 5 + GOOD.replace("1", "2"), ":6: label 2, wanted 0 or 1"),
    "not finite": (GOOD * 5 + "nan" + GOOD[1:], "a value is not finite"),
    "empty": ("", "0 rows, wanted 5 at least"),
    "few rows": (GOOD * 4 + "\n", "4 rows, wanted 5 at least"),
    "binary": (b"\x89PNG\r\n", ":1: 1 columns"),
    "gzip cut off": (gzip.compress(GOOD.encode() * 9)[:-9], "broken gzip file"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED_CSV.values(), ids=DAMAGED_CSV.keys())
def test_a_damaged_diabetes_file_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "patients.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        diabetes.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_diabetes_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder .*nowhere"):
        diabetes.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no diabetes.csv nor diabetes.csv.gz"):
        diabetes.load(tmp_path)


# --- by recipe ------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_a_recipes_data_is_what_its_loss_takes(network):
    recipe = NETWORKS[network].recipe
    examples = data.load_for(recipe)
    loss = getattr(torch.nn, recipe.loss)(**recipe.loss_arguments)
    for x, y in (examples[1:3], examples[3:5]):
        assert len(x) == len(y) > 0
        outputs = NETWORKS[network](nn=torch.nn)(x[:64])
        outputs = outputs[0] if recipe.carries_state else outputs
        assert loss(outputs, y[:64]).isfinite()
    moved = examples.to(torch.device("meta"))
    assert moved.words == examples.words
    assert all(tensor.device.type == "meta" for tensor in moved.tensors)


def test_the_sine():
    x, y, test_x, test_y = sine.load(batches=40)
    assert x.shape == y.shape == (40, 49, 1) and test_x.shape == test_y.shape == (9, 25, 1)
    assert torch.equal(x[:, 1:], y[:, :-1])
    starts = {0.0: 0, 1.0: 0, 2.0: 0}
    for row in x[..., 0]:
        (start,) = (t for t in starts if torch.allclose(row[0], torch.tensor(t).sin()))
        starts[start] += 1
        torch.testing.assert_close(row, torch.sin(start + torch.linspace(0, 10, 50))[:-1])
    assert all(starts.values())
    torch.testing.assert_close(test_y[0, :, 0], torch.sin(torch.linspace(0, 10, 50))[25:])


def test_the_vectors_can_be_told_apart():
    x, y, test_x, test_y = vectors.load()
    assert x.shape == (2000, 10, 100) and test_x.shape == (500, 10, 100)
    means = torch.stack([x[y == which].mean((0, 1)) for which in range(20)])
    nearest = (test_x.mean(1)[:, None] - means).square().sum(2).argmin(1)
    assert (nearest == test_y).float().mean() > 0.95


# --- texts ----------------------------------------------------------------------------------------


def test_the_documentation_as_texts():
    x, y, test_x, test_y, known = text.load()
    assert sorted(known.values()) == list(range(2, int(x.max()) + 1))
    assert len(x) == 4 * len(test_x) > 500 and x.shape[1] <= 60
    for inputs, targets in ((x, y), (test_x, test_y)):
        assert targets.mean() == 0.5 and inputs.dtype == torch.int64
        ends = (inputs == 0).long()
        assert torch.equal(ends.cummax(1).values, ends), "a gap in a text"
        assert (inputs[:, :8] > 0).all() and inputs.max() < 10_002
    assert (test_x == 1).any() and not (x == 1).any()


def reviews(folder, parts):
    for part, texts in parts.items():
        for at, words in enumerate(texts):
            file = folder / part / f"{at}_7.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(words)
    return folder


def test_a_folder_of_reviews(tmp_path):
    folder = reviews(
        tmp_path,
        {
            "train/pos": ["Good, good!<br />It's GOOD"],
            "train/neg": ["a bad one", "bad a"],
            "test/pos": ["good ones"],
            "test/neg": [""],
        },
    )
    x, y, test_x, test_y, known = text.load(folder)
    assert known == {"good": 2, "a": 3, "bad": 4, "it's": 5, "one": 6}
    assert y.tolist() == [[1], [0], [0]] and test_y.tolist() == [[1], [0]]
    # By frequency, then by alphabet: good, a, bad, it's, one.
    assert x.tolist() == [[2, 2, 5, 2], [3, 4, 6, 0], [4, 3, 0, 0]]
    assert test_x.tolist() == [[2, 1], [1, 0]]
    assert text.load(folder, words=4, length=2)[0].tolist() == [[2, 2], [3, 1], [1, 3]]
    examples = data.load_for(NETWORKS["sentiment_lstm"].recipe, folder)
    assert examples.name == f"reviews of {folder}" and torch.equal(examples.train_inputs, x)
    assert examples.words == known


def test_a_folder_without_reviews(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        text.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"pos has no \*.txt"):
        text.load(tmp_path)


def test_vectors_of_words(tmp_path):
    file, known = tmp_path / "glove.txt", {"good": 2, "bad": 3, "none": 4}
    file.write_text("the 1 2\nbad 0.5 -1\ngood 3 4\n")
    numbers, rows = text.vectors(file, known, 2)
    assert numbers.tolist() == [3, 2] and rows.tolist() == [[0.5, -1], [3, 4]]


DAMAGED_VECTORS = {  # id: what is in the file, the message behind its name
    "short": (b"bad 0.5 -1\ngood 3\n", ":2: 1 numbers for 'good', wanted 2"),
    "of another size": (b"the 1 2 3\nbad 4 5 6\n", ":1: 3 numbers for 'the', wanted 2"),
    "a header": (b"400000 2\nbad 0.5 -1\n", ":1: 1 numbers for '400000', wanted 2"),
    "no number": (b"bad 0.5 x\n", ":1: could not convert string to float: 'x'"),
    "not finite": (b"bad 0.5 nan\n", ":1: a number is not finite"),
    "no UTF-8": (b"the 1 2\nb\xe4d 0.5 1\n", ":2: no UTF-8: "),
    "other words": (b"the 1 2\n", ": has none of the 3 words"),
    "empty": (b"", ": has none of the 3 words"),
}


@pytest.mark.parametrize(
    ("content", "message"), DAMAGED_VECTORS.values(), ids=DAMAGED_VECTORS.keys()
)
def test_damaged_vectors_are_named_with_their_line(tmp_path, content, message):
    file = tmp_path / "glove.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        text.vectors(file, {"good": 2, "bad": 3, "none": 4}, 2)
    assert str(caught.value).startswith(f"{file}{message}")
    assert "\n" not in str(caught.value)


def test_points():
    line, step = (
        data.load_for(NETWORKS[name].recipe)
        for name in ("linear_regression", "logistic_regression")
    )
    assert line.train_inputs.tolist() == step.train_inputs.tolist() == [[1.0], [2.0], [3.0]]
    assert line.train_targets.tolist() == [[2.0], [4.0], [6.0]]
    assert (line.test_inputs.item(), line.test_targets.item()) == (4.0, 8.0)
    assert step.train_targets.tolist() == step.test_targets.tolist() == [[0.0], [0.0], [1.0]]
    with pytest.raises(ValueError, match="three points of its own, not some.csv"):
        data.load_for(NETWORKS["linear_regression"].recipe, "some.csv")
