"""The embedded digits, the readers on files written here, and the resizing."""

import gzip
import struct

import pytest
import torch
from PIL import Image

from dlkernels import data
from dlkernels.data import cifar10, diabetes, digits, mnist, sine, text, vectors
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
    assert all(moved.device.type == "meta" for moved in examples.to(torch.device("meta"))[1:])


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
    x, y, test_x, test_y = text.load()
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
    x, y, test_x, test_y = text.load(folder)
    assert y.tolist() == [[1], [0], [0]] and test_y.tolist() == [[1], [0]]
    # By frequency, then by alphabet: good, a, bad, it's, one.
    assert x.tolist() == [[2, 2, 5, 2], [3, 4, 6, 0], [4, 3, 0, 0]]
    assert test_x.tolist() == [[2, 1], [1, 0]]
    assert text.load(folder, words=4, length=2)[0].tolist() == [[2, 2], [3, 1], [1, 3]]
    examples = data.load_for(NETWORKS["sentiment_lstm"].recipe, folder)
    assert examples.name == f"reviews of {folder}" and torch.equal(examples.train_inputs, x)


def test_a_folder_without_reviews(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        text.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"pos has no \*.txt"):
        text.load(tmp_path)


def test_vectors_of_words(tmp_path):
    file, known = tmp_path / "glove.txt", {"good": 2, "bad": 3, "none": 4}
    file.write_text("the 1 2\nbad 0.5 -1\ngood 3 4\n")
    numbers, rows = text.vectors(file, known)
    assert numbers.tolist() == [3, 2] and rows.tolist() == [[0.5, -1], [3, 4]]
    file.write_text("bad 0.5 -1\ngood 3\n")
    with pytest.raises(ValueError, match="line 2: 1 numbers for 'good'"):
        text.vectors(file, known)
    file.write_text("bad 0.5 x\n")
    with pytest.raises(ValueError, match="line 1: 'bad 0.5 x' is no vector"):
        text.vectors(file, known)


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
