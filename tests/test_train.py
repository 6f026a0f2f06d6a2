"""``dlkernels train``: the same run whether broken or not, what it writes, and what it refuses."""

import csv
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_data import batches, binary, write_archive, write_diabetes, write_folders, write_mnist

from dlkernels import cli, data, trainer
from dlkernels.models import GAN, NETWORKS, AdversarialAutoEncoder, LeNet

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTATION = functools.cache(data.text._documentation)


class Killed(BaseException):
    """No handler of the trainer's sees it, as with SIGKILL."""


def files(folder):
    """Name and content of each file; of a checkpoint, what is in it."""
    return {
        path.name: path.read_bytes() if path.suffix != ".pt" else flat(path)
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def flat(path):
    """A checkpoint as one tuple of names, numbers and bytes."""

    def walk(value):
        if isinstance(value, dict):
            return tuple((str(key), walk(item)) for key, item in value.items())
        if isinstance(value, list | tuple):
            return tuple(map(walk, value))
        return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value

    return walk(torch.load(path, weights_only=True))


def few(examples, train=96, test=20):
    return data.Examples(
        examples.name, *(tensor[:train] for tensor in examples.tensors[:2]),
        *(tensor[:test] for tensor in examples.tensors[2:]), examples.words,
    )  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """Few of the examples: 96 to train on and 20 for the test."""
    load_for = data.load_for
    monkeypatch.setattr(data.text, "_documentation", DOCUMENTATION)
    monkeypatch.setattr(data, "load_for", lambda *args, **kwargs: few(load_for(*args, **kwargs)))


def killed_after(steps, monkeypatch):
    """From now on a run is gone when it has done so many steps."""
    step, count = trainer.Run._step, iter(range(1, steps + 1))

    def dying(self, batch):
        if next(count, None) is None:
            raise Killed
        return step(self, batch)

    monkeypatch.setattr(trainer.Run, "_step", dying)


# A network, and options that keep state of their own beside the weights.
EXACT = {
    "momentum and schedule": [
        "lenet",
        "--schedule",
        "step:1",
        "--patience",
        "9",
        "--validation",
        "0.1",
    ],
    "two optimisers, noise": ["adversarial_autoencoder", "--schedule", "plateau:1"],
    "batch norm, samples": ["gan", "--clip", "0.5"],
    "bfloat16": ["mlp256", "--amp", "--l1", "1e-4", "--optimiser", "AdamW"],
}


@pytest.mark.parametrize("argv", EXACT.values(), ids=EXACT.keys())
@pytest.mark.parametrize("save", [[], ["--save-every", "2"]], ids=["by epoch", "by two steps"])
def test_a_run_killed_at_any_step_and_resumed_is_the_unbroken_one(
    tmp_path, monkeypatch, capsys, small, one_thread, argv, save
):
    argv = ["train", *argv, "--epochs", "2", "--batch-size", "40", *save]
    assert cli.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    whole = files(tmp_path / "whole")
    assert whole["steps.csv"].count(b"\n") == 7 and whole["epochs.jsonl"].count(b"\n") == 2
    printed = capsys.readouterr().out.replace("whole", "{}")
    for steps in range(6):
        out = tmp_path / str(steps)
        with monkeypatch.context() as dying:
            killed_after(steps, dying)
            with pytest.raises(Killed):
                cli.main([*argv, "--out", str(out)])
        assert cli.main([*argv, "--resume", "--out", str(out)]) == 0
        assert files(out) == whole, steps
        assert capsys.readouterr().out == printed.replace("{}", str(steps))


def test_a_run_killed_twice_and_prolonged_is_the_unbroken_one(
    tmp_path, monkeypatch, small, one_thread
):
    argv = ["train", "mnist_cnn", "--batch-size", "40"]
    assert cli.main([*argv, "--epochs", "3", "--out", str(tmp_path / "whole")]) == 0
    argv += ["--out", str(tmp_path / "parts")]
    for more in ([], ["--resume"]):
        with monkeypatch.context() as dying:
            killed_after(2, dying)
            with pytest.raises(Killed):
                cli.main([*argv, *more, "--epochs", "1"])
    for epochs in ("1", "1", "3"):  # the second has nothing to do
        assert cli.main([*argv, "--resume", "--epochs", epochs]) == 0
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_sigkill_leaves_what_a_resumed_run_needs(tmp_path, one_thread):
    code = (
        "import os, signal, sys\n"
        "from dlkernels import cli, trainer\n"
        "step = trainer.Run._step\n"
        "def dying(self, batch):\n"
        "    self.state.step == 4 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, batch)\n"
        "trainer.Run._step = dying\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    argv = ["train", "diabetes_mlp", "--epochs", "2", "--batch-size", "100", "--threads", "1"]
    out = ["--out", str(tmp_path / "killed"), "--save-every", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv, *out],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert cli.main([*argv, *out, "--resume"]) == 0
    assert cli.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [1, 3], ids=["within an epoch", "at its end"])
def test_an_interrupt_ends_after_the_step_with_a_checkpoint(
    tmp_path, monkeypatch, capsys, small, one_thread, number, at
):
    argv = ["train", "lenet", "--epochs", "2", "--batch-size", "40", "--out"]
    assert cli.main([*argv, str(tmp_path / "whole")]) == 0
    step = trainer.Run._step

    def interrupted(self, batch):
        loss = step(self, batch)
        if self.state.step == at:
            os.kill(os.getpid(), number)
        return loss

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(trainer.Run, "_step", interrupted)
            out = str(tmp_path / "broken")
            assert cli.main([*argv, out]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    err = capsys.readouterr().err
    assert err.endswith(f"interrupted: --resume goes on from {out}/last.pt\n"), err
    assert torch.load(f"{out}/last.pt", weights_only=True)["state"]["step"] == at
    assert cli.main([*argv, out, "--resume"]) == 0
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


@pytest.mark.parametrize("folds", [[], ["--folds", "3"]], ids=["folds known", "folds given"])
@pytest.mark.parametrize("steps", [0, 3, 7], ids=["first fold", "second", "third"])
def test_resumed_folds_have_the_settings_of_the_first(
    tmp_path, monkeypatch, capsys, small, one_thread, steps, folds
):
    argv = ["train", "mlp256", "--folds", "3", "--epochs", "1", "--batch-size", "30"]
    argv += ["--seed", "5", "--optimiser", "Adam", "--lr", "0.003", "--clip", "0.5"]
    assert cli.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    said = capsys.readouterr().out.replace("whole", "broken")
    out = tmp_path / "broken"
    with monkeypatch.context() as dying:
        killed_after(steps, dying)
        with pytest.raises(Killed):
            cli.main([*argv, "--out", str(out)])
    assert not (out / "fold3").exists() or steps == 7
    capsys.readouterr()
    assert cli.main(["train", "mlp256", "--resume", *folds, "--out", str(out)]) == 0
    assert capsys.readouterr().out == said
    for k in ("fold1", "fold2", "fold3"):
        assert files(out / k) == files(tmp_path / "whole" / k)
    for wrong, message in (
        (["--folds", "4"], "with folds 3, not 4"),
        (["--lr", "1"], "with lr 0.003, not 1.0"),
    ):
        assert cli.main(["train", "mlp256", "--resume", *wrong, "--out", str(out)]) == 2
        err = capsys.readouterr().err
        assert message in err and "fold1/last.pt" in err and err.count("\n") == 1


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch, capsys, small, one_thread):
    argv = ["train", "lenet", "--out", str(tmp_path)]
    assert cli.main([*argv, "--epochs", "1"]) == 0
    before = (tmp_path / "last.pt").read_bytes()

    def refuse(source, target):
        raise OSError("no space left")

    with monkeypatch.context() as full:
        full.setattr(os, "replace", refuse)
        assert cli.main([*argv, "--epochs", "2", "--resume"]) == 2
    assert capsys.readouterr().err.endswith("dlkernels train: no space left\n")
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


# ------------------------------------------------------------------------------ what it writes


def test_the_logs_say_what_was_computed(tmp_path, capsys, one_thread):
    """Losses are true means, the score is of the part held out, and the test's of the best."""
    out = tmp_path / "run"
    argv = ["train", "mnist_mlp", "--epochs", "3", "--batch-size", "500", "--lr", "0.3"]
    argv += ["--validation", "0.167"]
    assert cli.main([*argv, "--out", str(out), "--seed", "4"]) == 0
    with open(out / "steps.csv") as lines:
        steps = list(csv.DictReader(lines))
    epochs = [json.loads(line) for line in (out / "epochs.jsonl").read_text().splitlines()]
    assert [(row["step"], row["epoch"]) for row in steps[:4]] == [
        ("1", "1"), ("2", "1"), ("3", "1"), ("4", "2")
    ]  # fmt: skip
    for k, row in enumerate(epochs):
        losses = [float(step["loss"]) for step in steps[3 * k : 3 * k + 3]]
        sizes = (500, 500, 197)  # of 1437 less 240
        wanted = sum(a * b for a, b in zip(losses, sizes, strict=True)) / 1197
        assert row["train_loss"] == pytest.approx(wanted)
        assert (row["epoch"], row["total"], row["lr"]) == (k + 1, 240, 0.3)
        assert row["validation_accuracy"] == row["correct"] / 240
    examples = data.load_for(NETWORKS["mnist_mlp"].recipe)
    best = torch.load(out / "best.pt", weights_only=True)
    ranks = [(row["validation_accuracy"], -row["validation_loss"]) for row in epochs]
    assert best["epoch"] == 1 + ranks.index(max(ranks))
    model = NETWORKS["mnist_mlp"](nn=torch.nn)
    model.load_state_dict(best["model"])
    held = model(examples.train_inputs[-240:]).argmax(1) == examples.train_targets[-240:]
    assert held.sum() == epochs[best["epoch"] - 1]["correct"]
    right = int((model(examples.test_inputs).argmax(1) == examples.test_targets).sum())
    assert f"best of them {best['epoch']}" in (said := capsys.readouterr().out)
    assert f"[{right}/360]" in said and said.count("\n") == 1


def test_the_seed_decides(tmp_path, small, one_thread):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        argv = ["train", "mlp256", "--epochs", "1", "--seed", seed, "--out", str(tmp_path / name)]
        assert cli.main(argv) == 0
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert a == b and a["steps.csv"] != c["steps.csv"]


@pytest.mark.parametrize("network", ["autoencoder", "gan"])
def test_pictures_show_what_a_network_makes(tmp_path, small, one_thread, network):
    assert cli.main(["train", network, "--epochs", "1", "--out", str(tmp_path)]) == 0
    cls = NETWORKS[network]
    model = cls()
    model.load_state_dict(torch.load(tmp_path / "last.pt", weights_only=True)["model"])
    rows = model.eval().show(data.load_for(cls.recipe).test_inputs[:8]).detach()
    with Image.open(tmp_path / f"{cls.picture}.png") as picture:
        assert picture.size == (8 * 30, len(rows) * 30) and picture.mode == "L"
        pixels = torch.tensor(list(picture.getdata())).view(len(rows), 30, 8, 30)
    shown = pixels[:, 1:-1, :, 1:-1].permute(0, 2, 1, 3) / 255
    torch.testing.assert_close(shown, rows[:, :, 0], rtol=0, atol=0.51 / 255)


def test_the_rate_falls_by_the_schedule(tmp_path, small, one_thread):
    argv = ["train", "mlp256", "--epochs", "4", "--schedule", "multistep:1,3"]
    assert cli.main([*argv, "--out", str(tmp_path)]) == 0
    epochs = [json.loads(line) for line in (tmp_path / "epochs.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in epochs] == pytest.approx([0.01, 0.001, 0.001, 0.0001])


def test_early_stopping_counts_epochs_that_were_no_better(tmp_path, capsys, small, one_thread):
    argv = ["train", "mlp256", "--epochs", "50", "--patience", "2", "--lr", "0"]
    assert cli.main([*argv, "--out", str(tmp_path)]) == 0
    assert "3 epochs, best of them 1" in capsys.readouterr().out
    assert cli.main([*argv, "--resume", "--out", str(tmp_path)]) == 0  # it has stopped
    assert (tmp_path / "epochs.jsonl").read_text().count("\n") == 3


def test_gradients_are_clipped(tmp_path, small, one_thread):
    """By SGD of rate 1 without momentum, a step is as long as the gradient."""
    argv = ["train", "mlp256", "--epochs", "1", "--lr", "1", "--momentum", "0", "--clip", "0.01"]
    assert cli.main([*argv, "--batch-size", "96", "--out", str(tmp_path)]) == 0
    torch.manual_seed(trainer.draw(0, "weights"))
    start = NETWORKS["mlp256"]().state_dict()
    end = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    length = torch.cat([(end[key] - start[key]).flatten() for key in start]).norm()
    assert length.item() == pytest.approx(0.01, rel=1e-3)


def test_folds_hold_out_each_example_once(tmp_path, capsys, small, one_thread):
    argv = ["train", "mlp256", "--folds", "3", "--epochs", "1", "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["fold1", "fold2", "fold3"]
    assert "of 3 folds: " in capsys.readouterr().out
    assert cli.main([*argv, "--resume"]) == 0
    examples = few(data.load_for(LeNet.recipe))
    settings = trainer.Settings.of("lenet", 96, {})
    seen = []
    for k in range(3):
        parts = trainer.split(examples, dataclasses.replace(settings, fold=(k, 3)))
        assert len(parts.train_inputs) == 64 and len(parts.validation_inputs) == 32
        seen += map(tuple, parts.validation_inputs.flatten(1).tolist())
        assert not set(seen[-32:]) & set(map(tuple, parts.train_inputs.flatten(1).tolist()))
    assert sorted(seen) == sorted(map(tuple, examples.train_inputs.flatten(1).tolist()))


@pytest.mark.parametrize("name", trainer.OPTIMISERS)
def test_every_optimiser_of_torch_takes_a_step(tmp_path, capsys, small, one_thread, name):
    argv = ["train", "diabetes_mlp", "--optimiser", name, "--lr", "0.01", "--batch-size", "50"]
    if name == "Muon":  # of matrices alone
        assert cli.main([*argv, "--out", str(tmp_path / "run")]) == 2
        assert "Muon only supports 2D" in capsys.readouterr().err
        assert os.listdir(tmp_path) == []
        return
    for epochs, folder in (("1", "a"), ("2", "a"), ("2", "b")):
        more = ["--epochs", epochs, "--out", str(tmp_path / folder)]
        assert cli.main([*argv, *more, *["--resume"][: folder == "a" and epochs == "2"]]) == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")
    losses = [float(row.split(",")[3]) for row in (tmp_path / "a/steps.csv").open().readlines()[1:]]
    assert len(set(losses)) == 4


def test_tensorboard_has_the_curves_and_the_picture(tmp_path, small, one_thread):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv = ["train", "autoencoder", "--log", "tensorboard", "--batch-size", "40"]
    argv += ["--out", str(tmp_path)]
    assert cli.main([*argv, "--epochs", "1"]) == 0
    assert cli.main([*argv, "--epochs", "2", "--resume"]) == 0
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    curve = [(event.step, event.value) for event in events.Scalars("step/loss")]
    with open(tmp_path / "steps.csv") as lines:
        wanted = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(lines)]
    assert curve == [(step, pytest.approx(value)) for step, value in wanted]
    assert [event.step for event in events.Scalars("epoch/validation_loss")] == [3, 6]
    assert events.Images("reconstructions")[-1].step == 6


def test_visdom_is_sent_the_curves_and_the_picture(tmp_path, monkeypatch, small, one_thread):
    """A stand-in of the package: what is called, with what. Killed behind a checkpoint, resumed:
    each point is there once."""
    sent, windows, options = [], {}, []

    class Visdom:
        def __init__(self, **arguments):
            options.append(arguments)

        def check_connection(self):
            return True

        def close(self):
            windows.clear()

        def line(self, X, Y, win, name, update, opts):
            assert update == "append" and opts["title"] == win
            windows.setdefault((win, name), []).extend(zip(X, Y, strict=True))

        def image(self, image, win, opts):
            sent.append((win, image.shape, opts["title"]))

    monkeypatch.setitem(sys.modules, "visdom", types.SimpleNamespace(Visdom=Visdom))
    out = tmp_path / "mine"
    argv = ["train", "gan", "--log", "visdom", "--batch-size", "40", "--out"]
    assert cli.main([*argv, str(out), "--epochs", "1"]) == 0
    with monkeypatch.context() as dying:
        killed_after(5, dying)
        with pytest.raises(Killed):
            cli.main([*argv, str(out), "--epochs", "3", "--resume"])
    assert len(windows["training loss", "loss"]) == 8
    assert cli.main([*argv, str(out), "--epochs", "3", "--resume"]) == 0
    with open(out / "steps.csv") as lines:
        rows = list(csv.DictReader(lines))
    epochs = [json.loads(line) for line in (out / "epochs.jsonl").read_text().splitlines()]
    wanted = {
        ("training loss", name): [(int(row["step"]), float(row[name])) for row in rows]
        for name in ("loss", "discriminator", "generator")
    }
    for name in ("train_loss", "validation_loss", "validation_binary_accuracy"):
        window = "loss by epoch" if name.endswith("_loss") else name
        wanted[window, name] = [(row["epoch"], row[name]) for row in epochs]
    assert len(rows) == 9 and windows == wanted
    assert sent[-1] == ("samples", (1, 120, 240), "samples, epoch 3")
    # Of another run whose folder has the same name, another environment.
    assert cli.main([*argv, str(tmp_path / "b" / "mine"), "--epochs", "1"]) == 0
    environments = [arguments["env"] for arguments in options]
    assert environments[0] == environments[2] and len(set(environments)) == 2
    assert all("/" not in env and env.endswith("mine") for env in environments)
    monkeypatch.setattr(Visdom, "check_connection", lambda self: False)
    assert cli.main([*argv, str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists()


def glove(path, words, size=100):
    """A file of vectors (len(words), size), which it returns."""
    vectors = torch.randn(len(words), size)
    rows = (" ".join(map(repr, row)) for row in vectors.tolist())
    path.write_text("".join(f"{word} {row}\n" for word, row in zip(words, rows, strict=True)))
    return vectors


def test_words_start_from_vectors(tmp_path, monkeypatch, capsys, small, one_thread):
    """At a rate of 0 the embedding is what it started from."""
    known = data.load_for(NETWORKS["sentiment_lstm"].recipe).words
    vectors = glove(tmp_path / "glove.txt", ["nowhere,", "message", "string"])
    argv = ["train", "sentiment_lstm", "--batch-size", "48", "--epochs"]
    run = [*argv, "1", "--lr", "0", "--out", str(tmp_path / "run")]
    assert cli.main([*run, "--vectors", str(tmp_path / "glove.txt")]) == 0
    embedding = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    embedding = embedding["embedding.weight"]
    torch.manual_seed(trainer.draw(0, "weights"))
    wanted = NETWORKS["sentiment_lstm"]().embedding.weight.detach().clone()
    wanted[[known["message"], known["string"]]] = vectors[1:]
    assert torch.equal(embedding, wanted)

    folds = [*argv, "1", "--folds", "2", "--out", str(tmp_path / "folds")]
    with monkeypatch.context() as dying:
        killed_after(0, dying)
        with pytest.raises(Killed):
            cli.main([*folds, "--vectors", str(tmp_path / "glove.txt")])
    glove(tmp_path / "other.txt", ["message"])
    glove(tmp_path / "short.txt", ["message"], 50)
    capsys.readouterr()
    for more, message in (
        ([], f"{tmp_path}/folds/fold2 is still to begin: give its --vectors again"),
        (["--vectors", str(tmp_path / "other.txt")], "fold1/last.pt: was trained with vectors"),
        (
            ["--vectors", str(tmp_path / "short.txt")],
            "short.txt:1: 50 numbers for 'message', wanted",
        ),
    ):
        assert cli.main([*folds, "--resume", *more]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert cli.main([*run, "--resume"]) == 0  # it needs no file


def test_lbfgs_evaluates_one_function_a_step(tmp_path, monkeypatch, small, one_thread):
    """At a rate of 0, the second evaluation of a step is the first: the same noise, and
    the same state, which is the step's before."""
    losses, states = [], []
    objective = trainer.objective

    def noted(model, loss, turn, inputs, targets, carried, amp):
        states.append(carried and carried.state)
        value = objective(model, loss, turn, inputs, targets, carried, amp)
        losses.append((turn, value.item()))
        return value

    monkeypatch.setattr(trainer, "objective", noted)
    for network in ("sine_rnn", "gan"):
        losses.clear(), states.clear()
        argv = ["train", network, "--optimiser", "LBFGS", "--lr", "0", "--batch-size", "40"]
        assert cli.main([*argv, "--epochs", "1", "--out", str(tmp_path / network)]) == 0
        assert len(losses) >= 4 and losses[::2] == losses[1::2], network
        if network == "sine_rnn":
            assert states[0] is None and states[1] is None
            for before, again in zip(states[2::2], states[3::2], strict=True):
                assert before is not None and torch.equal(before, again)


# ------------------------------------------------------------------------------------- processes


def test_two_processes_train_as_one(tmp_path, capsys, one_thread):
    """Of 354 less 59 examples, batches of 32 and one of 7: parts that differ in size."""
    argv = ["train", "diabetes_mlp", "--threads", "1", "--validation", "0.1665"]
    out = ["--out", str(tmp_path / "two")]
    for more in (["--epochs", "1"], ["--epochs", "2", "--resume"]):
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
             "-m", "dlkernels.cli", *argv, *out, *more],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("diabetes_mlp on") == 1  # one of the two prints
    argv += ["--epochs", "2"]
    assert cli.main([*argv, "--out", str(tmp_path / "one")]) == 0
    one, two = (
        torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("one", "two")
    )
    assert one["state"]["step"] == two["state"]["step"] == 20
    assert two["settings"]["processes"] == 2
    for key, value in one["model"].items():
        torch.testing.assert_close(two["model"][key], value, rtol=1e-5, atol=1e-6)
    losses = []
    for name in ("one", "two"):
        with open(tmp_path / name / "steps.csv") as lines:
            losses.append([float(row["loss"]) for row in csv.DictReader(lines)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert cli.main([*argv, *out, "--resume"]) == 2  # not by one
    assert "with processes 2, not 1" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- refusals

REFUSED = {  # id: arguments, what the line must say
    "no network": ([], "required: network"),
    "unknown network": (["alexnet"], "'alexnet' (choose from"),
    "missing folder": (["lenet", "--data", "nowhere"], "no folder nowhere"),
    "nothing to resume": (["lenet", "--resume"], "no checkpoint runs/lenet/last.pt"),
    "no such log": (["lenet", "--log", "paper"], "'paper' (choose from"),
    "no such optimiser": (["lenet", "--optimiser", "Newton"], "'Newton'"),
    "schedule": (["lenet", "--schedule", "cosine"], "wanted multistep:150,200, step:30"),
    "two steps": (["lenet", "--schedule", "step:1,2"], "step takes one number"),
    "negative rate": (["lenet", "--lr=-1"], "--lr: wanted a number from 0, got '-1'"),
    "momentum of Adam": (["lenet", "--optimiser", "Adam", "--momentum", "1"], "no momentum"),
    "all held out": (["lenet", "--validation", "1"], "wanted a number below 1"),
    "one fold": (["lenet", "--folds", "1"], "wanted 2 at least"),
    "no folds to resume": (
        ["lenet", "--resume", "--folds", "3"],
        "no checkpoint runs/lenet/fold1/",
    ),
    "vectors of no words": (["lenet", "--vectors", "glove.txt"], "no --vectors for lenet"),
    "no vectors": (
        ["sentiment_lstm", "--vectors", "glove.txt"],
        "No such file or directory: 'glove.txt'",
    ),
    "more folds than points": (["linear_regression", "--folds", "9"], "9 folds of 3 examples"),
    "LBFGS in halves": (["lenet", "--optimiser", "LBFGS", "--amp"], "not with --amp"),
}


@pytest.mark.parametrize(("argv", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refusal_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("dlkernels train"), err
    assert message in err
    assert os.listdir(tmp_path) == []


def damaged(change):
    def damage(path):
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return damage


class Malice:
    def __reduce__(self):
        return os.mkdir, ("ran",)


CHECKPOINTS = {  # id: what is done to last.pt, options, what the line must say
    "another network's": (damaged(lambda c: c.update(network="gan")), [], "of gan, not of lenet"),
    "cut off": (lambda p: p.write_bytes(p.read_bytes()[:-100]), [], "not a checkpoint, or a dam"),
    "empty": (lambda p: p.write_bytes(b""), [], "not a checkpoint, or a damaged one"),
    "text": (lambda p: p.write_text("weights"), [], "not a checkpoint, or a damaged one"),
    "code": (lambda p: torch.save(Malice(), p), [], "not a checkpoint, or a damaged one"),
    "of something else": (lambda p: torch.save({"model": {}}, p), [], "not a checkpoint of dlk"),
    "no weights": (damaged(lambda c: c.pop("model")), [], "has other parameters"),
    "a weight's shape": (
        damaged(lambda c: c["model"].update({"fc3.bias": torch.zeros(9)})),
        [],
        "fc3.bias is not of shape (10,)",
    ),
    "no optimiser": (damaged(lambda c: c.pop("optimisers")), [], "not a whole checkpoint"),
    "no settings": (damaged(lambda c: c.pop("settings")), [], "not a whole checkpoint"),
    "no state": (damaged(lambda c: c.pop("state")), [], "not a whole checkpoint"),
    "other data": (damaged(lambda c: c.update(data=0)), [], "was trained on other data"),
    "other batches": (lambda p: None, ["--batch-size", "7"], "with batch_size 64, not 7"),
    "another rate": (lambda p: None, ["--lr", "1"], "with lr 0.03, not 1.0"),
    "shorter log": (lambda p: (p.parent / "steps.csv").write_text(""), [], "steps.csv: is not"),
}


@pytest.mark.parametrize(
    ("damage", "options", "message"), CHECKPOINTS.values(), ids=CHECKPOINTS.keys()
)
def test_a_wrong_checkpoint_is_refused_and_nothing_overwritten(
    tmp_path, monkeypatch, capsys, small, one_thread, damage, options, message
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "lenet", "--epochs", "1"]) == 0
    damage(Path("runs/lenet/last.pt"))
    before = {path: path.read_bytes() for path in Path("runs").rglob("*.*")}
    capsys.readouterr()
    assert cli.main(["train", "lenet", "--epochs", "2", "--resume", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err and "runs/lenet" in err, err
    assert {path: path.read_bytes() for path in Path("runs").rglob("*.*")} == before
    assert os.listdir(tmp_path) == ["runs"]


def test_a_run_is_not_overwritten_by_a_new_one(tmp_path, capsys, small, one_thread):
    argv = ["train", "lenet", "--epochs", "1", "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    before = files(tmp_path)
    assert cli.main(argv) == 2
    assert "last.pt is there: --resume goes on" in capsys.readouterr().err
    assert files(tmp_path) == before


@pytest.mark.parametrize("log", ["tensorboard", "visdom"])
def test_a_missing_log_package_is_named(tmp_path, monkeypatch, capsys, small, log):
    for name in [name for name in sys.modules if name.split(".")[0] == log]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, log, None)
    out = tmp_path / "run"
    assert cli.main(["train", "lenet", "--log", log, "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"dlkernels train needs {log}: pip install ") and err.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["best.pt", "epochs.jsonl", "steps.csv", "samples.png"])
@pytest.mark.parametrize("more", [[], ["--folds", "2"], ["--folds", "2", "--resume"]],
                         ids=["new", "folds", "resumed folds"])  # fmt: skip
def test_what_a_run_without_last_left_is_not_overwritten(
    tmp_path, capsys, small, one_thread, name, more
):
    """The second fold's is found before the first begins, or goes on."""
    argv = ["train", "gan", "--epochs", "1", "--out", str(tmp_path)]
    if "--resume" in more:
        assert cli.main([*argv, "--folds", "2"]) == 0
        for path in (tmp_path / "fold2").iterdir():
            path.unlink()
    place = tmp_path / "fold2" if more else tmp_path
    place.mkdir(exist_ok=True)
    (place / name).write_text("mine")
    capsys.readouterr()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert cli.main([*argv, *more, "--epochs", "2"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"{place / name} is there, without last.pt" in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_parts_of_other_files_stay(tmp_path, small, one_thread):
    ours = [".last.pt.7.part", ".best.pt.7.part", ".samples.png.7.part"]
    others = [".notes.part", ".thesis.tex.7.part", ".reconstructions.png.7.part"]
    for name in ours + others:
        (tmp_path / name).write_text("half")
    assert cli.main(["train", "gan", "--epochs", "1", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.glob(".*")) == sorted(others)


def test_divergence_is_an_error_and_keeps_the_last_checkpoint(tmp_path, capsys, small, one_thread):
    argv = ["train", "lenet", "--lr", "1e30", "--out", str(tmp_path)]
    assert cli.main(argv) == 1
    assert "dlkernels train: training diverged: the loss of step" in capsys.readouterr().err
    for value in torch.load(tmp_path / "last.pt", weights_only=True)["model"].values():
        assert value.isfinite().all()


def test_files_in_mnists_format_are_trained_on(tmp_path, capsys, one_thread):
    write_mnist(tmp_path)
    argv = ["train", "lenet", "--data", str(tmp_path), "--epochs", "1"]
    assert cli.main([*argv, "--out", str(tmp_path / "run")]) == 0
    assert str(tmp_path) in (said := capsys.readouterr().out) and "/5]" in said
    bad = tmp_path / "train-labels-idx1-ubyte"
    bad.write_bytes(bad.read_bytes()[:-1])
    assert cli.main([*argv, "--out", str(tmp_path / "other")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(bad) in err and not (tmp_path / "other").exists()


def test_image_folders_are_trained_on_and_resumed(tmp_path, monkeypatch, one_thread):
    """Rotated images of 1.25 times the size; 224 is for the patient."""
    cls = NETWORKS["lenet5_cifar"]
    recipe = {"data": "folders", "augment": ("flip", "rotate"), "validation": 0.25}
    monkeypatch.setattr(cls, "recipe", dataclasses.replace(cls.recipe, **recipe, classes=5))
    write_folders(tmp_path / "images")
    argv = ["train", "lenet5_cifar", "--data", str(tmp_path / "images"), "--batch-size", "5"]
    assert cli.main([*argv, "--epochs", "2", "--out", str(tmp_path / "whole")]) == 0
    for more in (["--epochs", "1"], ["--epochs", "2", "--resume"]):
        assert cli.main([*argv, *more, "--out", str(tmp_path / "parts")]) == 0
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    broken = tmp_path / "images" / "mewtwo" / "001.JPG"
    broken.write_bytes(broken.read_bytes()[:60])
    assert cli.main([*argv, "--out", str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists()


def test_the_other_documented_files_are_trained_on(tmp_path, capsys, one_thread):
    write_archive(tmp_path / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", batches(binary)[0])
    write_diabetes(tmp_path / "diabetes.csv", rows=20)
    for network in ("lenet5_cifar", "diabetes_logistic"):
        argv = ["train", network, "--data", str(tmp_path), "--epochs", "1"]
        assert cli.main([*argv, "--out", str(tmp_path / network)]) == 0
        assert "/4]" in capsys.readouterr().out
    with open(tmp_path / "diabetes.csv", "a") as lines:
        lines.write("1,2\n")
    assert cli.main([*argv, "--out", str(tmp_path / "other")]) == 2
    err = capsys.readouterr().err
    assert "diabetes.csv:21: 2 columns" in err and err.count("\n") == 1
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("network", ["lenet", "mnist_cnn"])
def test_the_digits_are_learnt(tmp_path, capsys, one_thread, network):
    argv = ["train", network, "--lr", "0.01", "--momentum", "0.5", "--epochs", "30"]
    assert cli.main([*argv, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert int(said.partition("[")[2].partition("/360]")[0]) >= 0.97 * 360, said


def test_an_autoencoder_learns_to_reconstruct(tmp_path, one_thread):
    argv = ["train", "autoencoder", "--epochs", "12", "--lr", "0.003", "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    epochs = [json.loads(line) for line in (tmp_path / "epochs.jsonl").read_text().splitlines()]
    images = data.load_for(NETWORKS["autoencoder"].recipe).train_inputs
    spread = (images - images.mean(0)).square().mean().item()  # the error of one mean image
    assert epochs[-1]["validation_mean_squared_error"] < 0.4 * spread


# ------------------------------------------------------------------------------- networks' turns


def test_each_turn_changes_its_own_part_alone():
    for cls in (GAN, AdversarialAutoEncoder):
        torch.manual_seed(0)
        model, x = cls(), torch.rand(16, 1, 28, 28)
        loss = getattr(torch.nn, cls.recipe.loss)()
        targets = torch.ones(16, 1) if cls is GAN else x.flatten(1)
        optimisers = trainer.optimisers_of(model, "SGD", {"lr": 0.1})
        for turn, parts in cls.turns.items():
            before = {key: value.clone() for key, value in model.named_parameters()}
            optimisers[turn].zero_grad()
            model.objective(turn, loss, x, targets).backward()
            optimisers[turn].step()
            changed = {
                key for key, value in model.named_parameters() if not value.equal(before[key])
            }
            assert {key.split(".")[0] for key in changed} == set(parts)
