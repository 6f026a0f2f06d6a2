"""``dlkernels compare``: what it measures, what it prints and writes, and what it refuses."""

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_data import write_cifar10, write_diabetes, write_mnist

import dlkernels
from dlkernels import cli, config, data, info, train
from dlkernels.files import write_atomically
from dlkernels.models import NETWORKS, LeNet

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--epochs", "1", "--batch-size", "400"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    return data.load(LeNet.recipe.image_size, LeNet.recipe.mean, LeNet.recipe.std)


def test_json_is_one_document_with_the_documented_keys(tmp_path, capsys):
    out = tmp_path / "a.png"
    assert (
        cli.main(["compare", "mnist_cnn", *TINY, "--seed", "5", "--json", "--out", str(out)]) == 0
    )
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {
        "network", "data", "train_examples", "test_examples", "epochs", "batch_size", "seed",
        "machine", "steps", "timed_steps", "torch.nn", "dlkernels.nn", "ratio",
        "largest_loss_difference", "layers", "picture",
    }  # fmt: skip
    assert document["network"] == "mnist_cnn"
    assert document["machine"]["cpu_library"] == info.cpu_library()
    assert document["machine"]["threads"] == torch.get_num_threads()
    assert (document["train_examples"], document["test_examples"]) == (1437, 360)
    assert (document["epochs"], document["batch_size"], document["seed"]) == (1, 400, 5)
    assert (document["steps"], document["timed_steps"]) == (4, 3)  # 400, 400, 400, 237
    stock, ours, ratio = document["torch.nn"], document["dlkernels.nn"], document["ratio"]
    for side in (stock, ours):
        assert len(side["losses"]) == 4
        assert side["test_accuracy"] == side["test_correct"] / 360
        for key in ("forward_ms", "forward_backward_ms"):
            spread = side[key]
            assert 0 < spread["lower_quartile"] <= spread["median"] <= spread["upper_quartile"]
        assert side["forward_ms"]["median"] < side["forward_backward_ms"]["median"]
    assert ratio["forward"] > 0 and ratio["forward_backward"] > 0
    assert ratio["peak_memory"] == stock["peak_memory_bytes"] / ours["peak_memory_bytes"]
    assert document["largest_loss_difference"] == max(
        abs(a - b) for a, b in zip(stock["losses"], ours["losses"], strict=True)
    )
    assert document["picture"] == str(out)
    with Image.open(out) as picture:
        picture.load()
        assert picture.format == "PNG" and picture.size == (1200, 480)
    assert os.listdir(tmp_path) == ["a.png"]


def test_command_prints_tables_on_stdout_and_progress_on_stderr(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dlkernels.cli", "compare", *TINY, "--threads", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for text in (
        "lenet on scikit-learn digits",
        "1 threads",
        "forward, ms",
        "forward + backward, ms",
        "peak memory, MiB",
        "largest difference",
        "/360]",
        "CrossEntropyLoss",
        "loss curves and step times: compare.png",
    ):
        assert text in done.stdout
    assert "4/4" in done.stderr and "4/4" not in done.stdout
    assert done.stderr.count("\n") == 2, done.stderr  # the two bars and nothing else
    assert (tmp_path / "compare.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_mnist_folder_is_trained_on(tmp_path, capsys):
    write_mnist(tmp_path)
    out = tmp_path / "b.png"
    argv = ["compare", "lenet", "--data", str(tmp_path), "--epochs", "2", "--json"]
    assert cli.main([*argv, "--out", str(out)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["train_examples"], document["test_examples"]) == (7, 5)
    assert (document["steps"], document["batch_size"]) == (2, 7)
    assert str(tmp_path) in document["data"]


def test_a_cifar10_folder_is_trained_on(tmp_path, capsys):
    write_cifar10(tmp_path)
    argv = ["compare", "lenet5_cifar", "--data", str(tmp_path), "--epochs", "2", "--json"]
    assert cli.main([*argv, "--out", str(tmp_path / "a.png")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["train_examples"], document["test_examples"]) == (11, 4)
    assert (document["steps"], document["batch_size"]) == (2, 11)
    assert document["data"] == f"CIFAR-10 files of {tmp_path}"


SCORED = {  # network: what the table says of the test, keys of the document
    "adversarial_autoencoder": ("test mean squared", {"test_mean_squared_error"}),
    "autoencoder": ("test mean squared", {"test_mean_squared_error"}),
    "gan": ("/360]", {"test_accuracy", "test_correct"}),
    "linear_regression": ("test mean squared", {"test_mean_squared_error"}),
    "logistic_regression": ("/3]", {"test_accuracy", "test_correct"}),
    "diabetes_logistic": ("/88]", {"test_accuracy", "test_correct"}),
    "diabetes_mlp": ("/88]", {"test_accuracy", "test_correct"}),
    "inception_net": ("/360]", {"test_accuracy", "test_correct"}),
    "lenet5_cifar": ("/360]", {"test_accuracy", "test_correct"}),
    "mlp200": ("/360]", {"test_accuracy", "test_correct"}),
    "mlp200_leaky": ("/360]", {"test_accuracy", "test_correct"}),
    "mlp256": ("/360]", {"test_accuracy", "test_correct"}),
}


@pytest.mark.parametrize("network", SCORED)
def test_networks_are_compared(tmp_path, capsys, network):
    argv = ["compare", network, "--epochs", "2", "--out", str(tmp_path / "a.png")]
    argv += ["--batch-size", "400"] if hasattr(NETWORKS[network], "turns") else []
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    text, keys = SCORED[network]
    assert text in out
    assert cli.main([*argv, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    for side in ("torch.nn", "dlkernels.nn"):
        assert {key for key in document[side] if key.startswith("test_")} == keys
        assert document[side]["peak_memory_bytes"] > 0
    assert document["largest_loss_difference"] < 1e-4


def test_a_diabetes_file_is_trained_on(tmp_path, capsys):
    write_diabetes(tmp_path / "patients.csv", rows=40)
    argv = ["compare", "diabetes_mlp", "--data", str(tmp_path / "patients.csv"), "--json"]
    assert cli.main([*argv, "--out", str(tmp_path / "a.png")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["train_examples"], document["test_examples"]) == (32, 8)
    assert (document["epochs"], document["steps"]) == (100, 100)
    assert "patients.csv" in document["data"]


REFUSED = {  # id: arguments, what the line must say
    "unknown network": (["alexnet"], "'alexnet' (choose from"),
    "no epochs": (["--epochs", "0"], "--epochs: wanted a whole number from 1, got '0'"),
    "half an epoch": (["--epochs", "0.5"], "got '0.5'"),
    "no batch": (["--batch-size", "0"], "--batch-size: wanted a whole number from 1, got '0'"),
    "negative batch": (["--batch-size=-4"], "got '-4'"),
    "no threads": (["--threads", "0"], "--threads: wanted"),
    "negative seed": (["--seed=-1"], "--seed: wanted a whole number from 0"),
    "seed too large": (["--seed", str(2**63)], "--seed: wanted"),
    "unknown device": (["--device", "gpu9"], "no such device: 'gpu9'"),
    "device of no use": (["--device", "meta"], "wanted cpu or cuda, got 'meta'"),
    "device not there": (["--device", "cuda:99"], "'cuda:99' is not available"),
    "second cpu": (["--device", "cpu:1"], "'cpu:1' is not available"),
    "missing folder": (["--data", "nowhere"], "no folder nowhere"),
    "empty folder": (["--data", "."], "has no train-images-idx3-ubyte"),
    "no CIFAR-10 folder": (["lenet5_cifar", "--data", "."], ". has no labels.txt"),
    "no image folders": (["resnet18_pokemon", "--data", "."], ".: 0 folders, one for each class"),
    "no file for three points": (
        ["linear_regression", "--data", "."],
        "no --data for this network: it has three points of its own",
    ),
    "missing diabetes file": (["diabetes_mlp", "--data", "."], ". has no diabetes.csv"),
    "unknown option": (["--speed=9"], "unrecognized arguments: --speed=9"),
    "no folder for the picture": (["--out", "nowhere/a.png"], "--out: no folder nowhere"),
    "picture is a folder": (["--out", "."], "--out: . is a folder"),
}


@pytest.mark.parametrize(("argv", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refusal_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    picture = tmp_path / "compare.png"
    picture.write_bytes(b"yesterday's")
    assert cli.main(["compare", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("dlkernels"), err
    assert message in err
    assert picture.read_bytes() == b"yesterday's"
    assert os.listdir(tmp_path) == ["compare.png"]


def test_corrupt_file_is_refused_by_name(tmp_path, capsys):
    write_mnist(tmp_path)
    bad = tmp_path / "train-labels-idx1-ubyte"
    bad.write_bytes(bad.read_bytes()[:-1])
    picture = tmp_path / "compare.png"
    picture.write_bytes(b"yesterday's")
    assert cli.main(["compare", "--data", str(tmp_path), "--out", str(picture)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(bad) in err
    assert picture.read_bytes() == b"yesterday's"


@pytest.mark.parametrize("argv", [[], ["fly"]], ids=["no command", "unknown command"])
def test_commands_there_are(capsys, argv):
    assert cli.main(argv) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("package", ["rich", "matplotlib", "sklearn"])
def test_missing_extra_says_what_to_install(tmp_path, monkeypatch, capsys, package):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["compare", "--out", str(tmp_path / "a.png")]) == 2
    err = capsys.readouterr().err
    assert err == f"dlkernels compare needs {package}: pip install 'dlkernels[train]'\n"
    assert os.listdir(tmp_path) == []


def test_interrupt_ends_cleanly(tmp_path, monkeypatch, capsys):
    def interrupted(side, inputs, targets, step=train.step):
        step(side, inputs, targets)
        if len(side.losses) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train, "step", interrupted)
    threads = torch.get_num_threads()
    argv = ["compare", *TINY, "--threads", str(threads + 1), "--out", str(tmp_path / "a.png")]
    # Started in the background, a process ignores this signal, and so do its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.main(argv) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("interrupted\n") and "Traceback" not in err
    assert os.listdir(tmp_path) == []
    assert torch.get_num_threads() == threads


def test_divergence_is_an_error_and_not_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(LeNet, "recipe", dataclasses.replace(LeNet.recipe, lr=1e30))
    assert cli.main(["compare", *TINY, "--out", str(tmp_path / "a.png")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "training diverged" in err
    assert os.listdir(tmp_path) == []


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def refuse(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]


def test_bench_is_the_source_trees(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "--help"])
    assert ended.value.code == 0
    assert "--device" in capsys.readouterr().out
    monkeypatch.setattr(dlkernels, "__file__", str(tmp_path / "dlkernels" / "__init__.py"))
    assert cli.main(["bench"]) == 2
    assert "source tree" in capsys.readouterr().err


def test_sides_take_turns_and_see_the_same_batches(images):
    sides = train.twins("lenet", 0, CPU)
    order, seen = [], {side.name: [] for side in sides}
    for side in sides:
        side.model.register_forward_pre_hook(
            lambda module, args, name=side.name: seen[name].append(args[0])
        )
    train.train(
        sides, images, epochs=2, batch_size=600, seed=1, on_step=lambda s: order.append(s.name)
    )
    a, b = "torch.nn", "dlkernels.nn"
    assert order == [a, b, b, a] * 3
    assert [len(batch) for batch in seen[a]] == [600, 600, 237] * 2
    for k, (x, y) in enumerate(zip(seen[a], seen[b], strict=True)):
        assert torch.equal(x, y), k
    first, second = (torch.cat(seen[a][k : k + 3]).flatten(1) for k in (0, 3))
    assert not torch.equal(first, second)  # shuffled anew
    rows = sorted(map(tuple, images.train_inputs.flatten(1).tolist()))
    assert sorted(map(tuple, first.tolist())) == rows  # all of the set, once


def test_ratio_is_the_median_over_pairs_of_warm_full_steps(images, monkeypatch):
    times = {"torch.nn": iter([9.0, 4.0, 60.0, 8.0]), "dlkernels.nn": iter([1.0, 2.0, 40.0, 8.0])}

    def timed_step(side, images, labels, step=train.step):
        step(side, images, labels)
        side.forward_backward_ms[-1] = next(times[side.name])

    monkeypatch.setattr(train, "step", timed_step)
    result = train.compare("lenet", images, epochs=1, batch_size=400)
    assert result.forward_backward_ratio == 2.0  # of 9, 2 and 1.5; the partial batch not counted
    assert result.stock.forward_backward_ms.median == 9.0
    assert result.stock.step_ms == [9.0, 4.0, 60.0, 8.0]


def test_seed_decides_the_curves(images):
    def losses(seed):
        result = train.compare("lenet", images, epochs=1, batch_size=480, seed=seed)
        return result.stock.losses, result.ours.losses

    assert losses(3) == losses(3)
    assert losses(3) != losses(4)


class Echo(torch.nn.Module):
    def forward(self, x):
        assert not self.training
        return x


def test_accuracy_counts_right_answers():
    model, logits = Echo(), torch.randn(600, 10)
    labels = logits.argmax(1)
    labels[::3] = (labels[::3] + 1) % 10
    assert train.score("accuracy", model, logits, labels) == ("accuracy", 400 / 600, 400, 600)
    assert model.training


def test_binary_accuracy_and_squared_error():
    x = torch.tensor([[0.1], [0.5], [0.9], [0.4]])
    y = torch.tensor([[0.0], [1.0], [0.0], [0.0]])
    assert train.score("binary accuracy", Echo(), x, y) == ("binary accuracy", 0.75, 3, 4)
    metric, value, correct, total = train.score("mean squared error", Echo(), x, y)
    assert (
        value == pytest.approx((0.01 + 0.25 + 0.81 + 0.16) / 4) and correct is None and total == 4
    )


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([5], [0]),
        ([5, 5, 3], [0, 1]),
        ([5] * 20 + [3], range(2, 20)),
        (([8] * 40 + [1]) * 10, [k for k in range(410) if k % 41 != 40][10:]),
    ],
    ids=["one step", "partial batch", "a tenth is warm-up", "ten are warm-up"],
)
def test_timed_steps_are_full_and_warm(sizes, expected):
    assert train.timed(sizes) == list(expected)


def test_spread():
    assert train.spread([4.0]) == (4.0, 4.0, 4.0)
    assert train.spread([5.0, 1.0, 4.0, 2.0, 3.0]) == (3.0, 2.0, 4.0)


class Temporaries(torch.nn.Module):
    """Two temporaries of ``size`` floats, one after the other; the output is one number."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.w = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        for _ in range(2):
            torch.zeros(self.size)
        return self.w * x.sum()


def test_peak_memory_is_the_highest_sum_and_not_the_total():
    size = 1_000_000
    model = Temporaries(size)
    optimiser = torch.optim.SGD(model.parameters())
    side = train.Side("x", model, lambda out, labels: out, {"": optimiser}, schedules=[])
    peak = train.peak_memory(side, torch.ones(10), torch.ones(1))
    assert 4 * size <= peak < 4 * size + 4096
    assert model.w.grad is None


def test_peak_memory_counts_activations_and_gradients(images):
    stock, _ = train.twins("mnist_mlp", 0, CPU)
    x, y = images.train_inputs[:64, :, :28, :28], images.train_targets[:64]
    gradients = sum(p.numel() * 4 for p in stock.model.parameters())
    assert gradients <= train.peak_memory(stock, x, y) < 2 * gradients


@pytest.fixture
def small(monkeypatch):
    """Products below 2^18 multiply-adds are stock's, whatever the constant is."""
    monkeypatch.setattr(importlib.import_module("dlkernels.ops.linear"), "_SMALL", 2**18)


def test_layers_say_whose_kernel_ran(images, small):
    _, ours = train.twins("lenet", 0, CPU)
    before = {key: value.clone() for key, value in ours.model.state_dict().items()}
    x, y = images.train_inputs[:64], images.train_targets[:64]
    layers = train.kernels_used(ours, x, y)
    ours_too = {"(model)": "few_channels", "fc1": "covered", "fc2": "covered"}
    assert [layer.name for layer in layers] == [*ours_too, "fc3", "relu", "loss"]
    *layers, loss = layers
    for layer in layers:
        covered = layer.name in ours_too
        assert layer.kernel == (config.owner("cpu") if covered else "stock"), layer
        assert layer.reason.startswith(ours_too.get(layer.name, ("too small", "no kernel of ours")))
    assert loss.module == "CrossEntropyLoss" and loss.reason
    with config.recording() as choices:
        ours.loss(ours.model(x), y)
    assert loss.kernel == choices[-1].kernel
    for key, value in ours.model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_layers_follow_the_forced_choice(images, monkeypatch):
    _, ours = train.twins("lenet", 0, CPU)
    x, y = images.train_inputs[:64], images.train_targets[:64]
    kernels = {}
    for choice in ("own", "stock"):
        monkeypatch.setattr(config, "kernels", choice)
        used = {layer.name: layer.kernel for layer in train.kernels_used(ours, x, y)}
        kernels[choice] = used["fc3"], used["loss"]
    own = f"cpu/{info.cpu_library()}"
    assert kernels == {"own": (own, own), "stock": ("stock", "stock")}


def test_a_network_of_bare_matrices_is_one_layer_with_all_its_choices(small):
    _, ours = train.twins("mlp200", 0, CPU)
    x, y = torch.randn(200, 784), torch.randint(10, (200,))
    model, loss = train.kernels_used(ours, x, y)
    assert (model.name, model.module, loss.name) == ("(model)", "MLP200", "loss")
    assert model.kernel == config.owner("cpu") and model.reason == "covered"
    model, _ = train.kernels_used(ours, x[:2], y[:2])
    assert model.kernel == f"{config.owner('cpu')}, stock"
    assert model.reason == "covered; too small for our call overhead"
