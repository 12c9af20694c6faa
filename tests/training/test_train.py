"""train.py: the arithmetic of a step, the stages, what they leave, and going on after an end."""

import contextlib
import csv
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import train
from input_data import open_dataset
from model import NetworkConfig, build_network
from toolkit import files
from toolkit.errors import TrainingError, UsageError
from toolkit.models import checkpoints
from toolkit.models.checkpoints import Checkpoint, checkpoint_name, find_best, save
from train import Options, StageState, compile_trainer

import matplotlib.image
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = [
    "epoch", "loss", "val_loss", "learning_rate", "val_roc_auc", "val_pr_auc", "seconds",
]  # fmt: skip
# A network and a dataset of a second an epoch.
SMALL = ("--block", "basic", "--init-features", "2", "--batch-size", "4", "--jit", "off")


def arguments(data_dir, train_dir, *more):
    return ["--data-dir", str(data_dir), "--train-dir", str(train_dir), *SMALL, *map(str, more)]


def weights_of(path):
    return checkpoints.load(path).network.get_weights()


def assert_same_weights(path, other):
    for one, another in zip(weights_of(path), weights_of(other), strict=True):
        np.testing.assert_array_equal(one, another)


def history_of(stage_dir):
    with open(stage_dir / "training.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == COLUMNS
    return [dict(zip(COLUMNS, map(float, row), strict=True)) for row in rows[1:]]


def names_in(folder):
    """What a stage leaves, without TensorBoard's files."""
    return sorted(path.name for path in folder.iterdir() if "tfevents" not in path.name)


@pytest.fixture(scope="module")
def trained(tiny_dataset, tmp_path_factory):
    """Two stages of two epochs, with dropout, run without interruption."""
    train_dir = tmp_path_factory.mktemp("trained") / "log"
    assert train.main(arguments(tiny_dataset, train_dir, *TWO_STAGES)) == 0
    return train_dir


ONE_STAGE = ("--num-lr-decays", 1, "--max-epochs", 2)
TWO_STAGES = ("--num-lr-decays", 2, "--max-epochs", 2, "--lr", 0.05, "--seed", 3)


def test_picture_of_all_stages(trained, tmp_path):
    picture = matplotlib.image.imread(trained / "training.png")
    assert picture.shape == (520, 830, 4)
    assert picture.std() > 0.01  # not blank
    # It is drawn from training.csv alone: the same again, and another of one stage or of new rows.
    train_dir = Path(shutil.copytree(trained, tmp_path / "log"))
    drawn = (train_dir / "training.png").read_bytes()
    assert train.plot_training(train_dir) == train_dir / "training.png"
    assert (train_dir / "training.png").read_bytes() == drawn
    shutil.rmtree(train_dir / "1")
    train.plot_training(train_dir)
    of_one_stage = (train_dir / "training.png").read_bytes()
    assert of_one_stage != drawn
    rows = (train_dir / "0" / "training.csv").read_text().splitlines()
    (train_dir / "0" / "training.csv").write_text("\n".join(rows[:-1]) + "\n")
    train.plot_training(train_dir)
    assert (train_dir / "training.png").read_bytes() not in (drawn, of_one_stage)


@pytest.mark.slow
def test_picture_that_cannot_be_drawn_does_not_end_training(tiny_dataset, tmp_path, capsys):
    train_dir = tmp_path / "log"
    (train_dir / "training.png").mkdir(parents=True)  # a folder stands in its way
    assert train.main(arguments(tiny_dataset, train_dir, *ONE_STAGE)) == 0
    assert len(history_of(train_dir / "0")) == 2
    assert capsys.readouterr().err.count(f"{train_dir / 'training.png'}: not drawn: ") == 2


def test_picture_is_kept_current(tiny_dataset, tmp_path, monkeypatch):
    """After every epoch it shows all rows there are."""
    drawn = []

    def plot(path, histories):
        drawn.append({stage: len(rows) for stage, rows in histories.items()})

    monkeypatch.setattr(train.figures, "plot_training", plot)
    options = arguments(tiny_dataset, tmp_path / "log", "--num-lr-decays", 2, "--max-epochs", 1)
    assert train.main(options) == 0
    assert drawn == [{0: 1}, {0: 1, 1: 1}]


# --- The arithmetic ------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["se", "basic"])
def test_losses_are_the_published(golden, block):
    random = np.random.RandomState(0)
    x = (random.standard_normal((20, 4, 59049)) * 0.1).astype(np.float32)
    y = (random.uniform(size=(20, 4, 50)) < 0.1).astype(np.float32)
    expected = np.loadtxt(golden / "training" / f"{block}-loss.txt")

    initial = checkpoints.load(golden / "training" / f"{block}-initial.hdf5")
    config = NetworkConfig(**initial.config.to_json() | {"dropout": 0.0})
    network = build_network(config)
    network.set_weights(initial.network.get_weights())
    trainer = compile_trainer(network, Options(), stage=0, jit=False)
    losses = []
    for segments, labels in zip(x, y, strict=True):
        trainer.reset_metrics()
        losses.append(float(trainer.train_on_batch(segments, labels)))
    differences = np.abs(np.array(losses) - expected)
    print(f"{block}: first {differences[0]:.1e}, largest of 20 {differences.max():.1e}")
    assert differences[0] <= 1e-5
    assert differences.max() <= 0.06


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("stage", [0, 2])
def test_steps_are_the_written_formula(stage, momentum):
    """Keras 2's SGD: v = m v - lr_t g, then w += m v - lr_t g, with the learning rate falling."""
    import keras

    options = Options(lr=0.3, lr_decay=0.5, momentum=momentum)
    random = np.random.default_rng(stage)
    w, b = random.standard_normal((3, 2)), np.zeros(2)
    v_w, v_b = np.zeros_like(w), np.zeros_like(b)

    inputs = keras.Input((3,))
    layer = keras.layers.Dense(2, activation="sigmoid")
    network = keras.Model(inputs, layer(inputs))
    layer.set_weights([w, b])
    trainer = compile_trainer(network, options, stage, jit=False)
    for step in range(20):
        x = random.standard_normal((4, 3))
        y = (random.uniform(size=(4, 2)) < 0.5).astype(float)
        trainer.train_on_batch(x.astype("f"), y.astype("f"))
        p = 1 / (1 + np.exp(-(x @ w + b)))
        slope = (p - y) / y.size
        lr = 0.3 * 0.5**stage / (1 + 1e-6 * step)
        for value, velocity, gradient in ((w, v_w, x.T @ slope), (b, v_b, slope.sum(axis=0))):
            velocity *= momentum
            velocity -= lr * gradient
            value += momentum * velocity - lr * gradient
    np.testing.assert_allclose(layer.get_weights()[0], w, atol=3e-6)
    np.testing.assert_allclose(layer.get_weights()[1], b, atol=3e-6)


@pytest.mark.parametrize("stage", [0, 1, 4])
def test_learning_rate_of_stage_and_iteration(stage):
    import keras

    inputs = keras.Input((2,))
    network = keras.Model(inputs, keras.layers.Dense(1, activation="sigmoid")(inputs))
    optimizer = compile_trainer(network, Options(), stage, jit=False).optimizer
    assert optimizer.nesterov and optimizer.momentum == 0.9
    for iteration in (0, 1, 1000, 1_000_000, 6_630_000):
        optimizer.iterations.assign(iteration)
        expected = 0.01 * 0.2**stage / (1 + 1e-6 * iteration)
        rate = float(keras.ops.convert_to_numpy(optimizer.learning_rate))
        assert rate == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("losses", "patience", "max_epochs", "improved", "finished_at"),
    [
        ([0.5, 0.4, 0.3], 2, 100, [1, 1, 1], None),
        ([0.5, 0.6, 0.7], 2, 100, [1, 0, 0], 2),
        ([0.5, 0.6, 0.4, 0.6, 0.5], 2, 100, [1, 0, 1, 0, 0], 4),
        ([0.5, 0.5], 1, 100, [1, 0], 1),  # the same is no improvement
        ([0.5, 0.6, 0.4, 0.41, 0.42, 0.43], 3, 100, [1, 0, 1, 0, 0, 0], 5),
        ([0.5, 0.4, 0.3], 2, 3, [1, 1, 1], 2),
        ([0.5], 2, 1, [1], 0),
    ],
)
def test_stage_state(losses, patience, max_epochs, improved, finished_at):
    state = StageState()
    for epoch, loss in enumerate(losses):
        assert not state.finished
        assert state.update(epoch, loss, patience, max_epochs) == improved[epoch]
        assert state.epoch == epoch
        assert state.best_loss == min(losses[: epoch + 1])
        assert state.finished == (epoch == finished_at)


# --- What a run leaves ---------------------------------------------------------------------------


def test_files_and_history(trained):
    assert names_in(trained) == [".lock", "0", "1", "training.png"]
    for stage in (0, 1):
        rows = history_of(trained / str(stage))
        assert [row["epoch"] for row in rows] == [0, 1]
        best = float("inf")
        expected = ["resume.keras", "test.json", "training.csv"]
        for row in rows:
            steps = 5 * (row["epoch"] + 1)  # 21 segments in batches of 4
            assert row["learning_rate"] == pytest.approx(
                0.05 * 0.2**stage / (1 + 1e-6 * steps), rel=1e-6
            )
            assert row["loss"] > 0 and row["seconds"] > 0
            assert 0 <= row["val_roc_auc"] <= 1 and 0 <= row["val_pr_auc"] <= 1
            if row["val_loss"] < best:
                best = row["val_loss"]
                expected.append(checkpoint_name(int(row["epoch"]), best))
        assert names_in(trained / str(stage)) == sorted(expected)
        checkpoint = checkpoints.load(find_best(trained / str(stage)))
        assert checkpoint.training["stage"] == stage
        assert checkpoint.training["state"]["best_loss"] == pytest.approx(best, rel=1e-7)


def test_validation_columns_are_those_of_the_checkpoint(tiny_dataset, trained):
    """The best checkpoint, evaluated on the validation split by other means, scores as written."""
    from input_data import read_clips

    from sklearn.metrics import average_precision_score, roc_auc_score

    path = find_best(trained / "1")
    row = history_of(trained / "1")[int(path.name[6:9])]
    network = checkpoints.load(path).network
    clips = list(read_clips(open_dataset(tiny_dataset).splits["val"].shards))
    outputs = [network.predict_on_batch(clip.segments).astype(np.float64) for clip in clips]
    labels = np.array([clip.labels for clip in clips])
    means = np.array([output.mean(axis=0) for output in outputs])
    known = [len(set(column)) == 2 for column in labels.T]
    assert row["val_roc_auc"] == pytest.approx(
        roc_auc_score(labels[:, known], means[:, known]), abs=1e-6
    )
    assert row["val_pr_auc"] == pytest.approx(
        average_precision_score(labels[:, known], means[:, known]), abs=1e-6
    )
    p = np.concatenate(outputs)
    y = np.repeat(labels, [len(output) for output in outputs], axis=0)
    loss = -np.log(np.where(y, p, 1 - p)).mean()
    assert row["val_loss"] == pytest.approx(loss, abs=1e-6)
    assert path.name == checkpoint_name(int(row["epoch"]), row["val_loss"])


def test_tensorboard_reads_the_events(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for stage in ("0", "1"):
        events = EventAccumulator(str(trained / stage))
        events.Reload()
        assert sorted(events.Tags()["scalars"]) == sorted(COLUMNS[1:])
        rows = history_of(trained / stage)
        for tag in COLUMNS[1:]:
            points = events.Scalars(tag)
            assert [point.step for point in points] == [row["epoch"] for row in rows]
            for point, row in zip(points, rows, strict=True):
                assert point.value == pytest.approx(row[tag], rel=1e-5)


def test_finished_stages_are_skipped(tiny_dataset, trained, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*.keras")}
    assert train.main(arguments(tiny_dataset, trained, *TWO_STAGES)) == 0
    printed = capsys.readouterr()
    assert printed.err.count("finished earlier") == 2
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*.keras")} == before


@pytest.mark.slow
def test_another_seed_gives_other_weights(tiny_dataset, trained, tmp_path):
    more = ("--num-lr-decays", 1, "--max-epochs", 1, "--lr", 0.05, "--seed", 2**40)
    assert train.main(arguments(tiny_dataset, tmp_path / "log", *more)) == 0
    kernel, other = (weights_of(find_best(log / "0"))[0] for log in (tmp_path / "log", trained))
    assert np.abs(kernel - other).max() > 0.01


def test_published_shards(golden, tmp_path):
    """Shards without a manifest train, and what was trained evaluates."""
    import eval as eval_script

    folder = tmp_path / "data" / "tfrecord"
    shutil.copytree(golden / "tfrecord", folder)
    shutil.copy(folder / "train-0000-of-0001.tfrecord", folder / "val-0000-of-0001.tfrecord")
    more = ("--num-lr-decays", 1, "--max-epochs", 1)
    assert train.main(arguments(tmp_path / "data", tmp_path / "log", *more)) == 0
    (row,) = history_of(tmp_path / "log" / "0")
    assert np.isfinite(row["val_loss"])
    best = find_best(tmp_path / "log" / "0")
    tags, clips, _, _ = eval_script.evaluate(best, tmp_path / "data")
    assert (len(tags), len(clips)) == (50, 1)
    # One clip has no two classes, and JSON no number for that.
    tested = json.loads((tmp_path / "log" / "0" / "test.json").read_text())
    assert tested == {"checkpoint": best.name, "roc_auc": None, "pr_auc": None}


def test_without_test_shards_no_stage_is_scored(tiny_dataset, trained, tmp_path, capsys):
    data_dir = Path(shutil.copytree(tiny_dataset, tmp_path / "data"))
    for path in (data_dir / "tfrecord").glob("test-*"):
        path.unlink()
    path = data_dir / "tfrecord" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["test"] = {"clips": 0, "segments": 0, "shards": []}
    path.write_text(json.dumps(manifest))
    log = Path(shutil.copytree(trained, tmp_path / "log"))
    (log / "0" / "test.json").unlink()
    config = NetworkConfig(block="basic", init_features=2)
    options = Options(batch_size=4, num_lr_decays=1, max_epochs=2, jit="off")
    assert train.train(data_dir, log, config, options) == {}
    assert "stage 0: no test shards to test the best checkpoint on\n" in capsys.readouterr().err
    assert not (log / "0" / "test.json").exists()


# --- Where a stage starts ------------------------------------------------------------------------


def start(tiny_dataset, train_dir, stage, **options):
    """Run one more epoch, or none, of a stage; give the printed line of where it began."""
    more = {"max_epochs": 3, "num_lr_decays": stage + 1, "initial_stage": stage} | options
    flags = [
        part for name, value in more.items() for part in (f"--{name.replace('_', '-')}", value)
    ]
    return train.main(arguments(tiny_dataset, train_dir, "--lr", 0.05, "--seed", 3, *flags))


def test_first_stage_starts_fresh(tiny_dataset, trained, tmp_path, capsys):
    """The same seed gives the same weights."""
    assert start(tiny_dataset, tmp_path / "log", 0, max_epochs=1) == 0
    assert "stage 0: learning rate 0.05, from epoch 0\n" in capsys.readouterr().err
    (path,) = (tmp_path / "log" / "0").glob("ckpt-*.keras")
    assert_same_weights(path, trained / "0" / path.name)


def test_own_best_where_resume_is_gone(tiny_dataset, trained, tmp_path, capsys):
    log = Path(shutil.copytree(trained, tmp_path / "log"))
    (log / "1" / "resume.keras").unlink()
    for path in (log / "1").glob("ckpt-e001-*"):
        path.unlink()  # the best is then of epoch 0, and epoch 1 is still to come
    assert start(tiny_dataset, log, 1, max_epochs=2) == 0
    assert "stage 1: learning rate 0.01, from epoch 1\n" in capsys.readouterr().err
    rows = history_of(log / "1")
    assert [row["epoch"] for row in rows] == [0, 1]
    assert rows[0] == history_of(trained / "1")[0]


def test_previous_best(tiny_dataset, trained, tmp_path, capsys):
    """A stage that starts later is the stage of an uninterrupted run."""
    shutil.copytree(trained / "0", tmp_path / "log" / "0")
    assert start(tiny_dataset, tmp_path / "log", 1, max_epochs=2) == 0
    assert "stage 1: learning rate 0.01, from epoch 0\n" in capsys.readouterr().err
    assert_same_weights(tmp_path / "log" / "1" / "resume.keras", trained / "1" / "resume.keras")


def test_no_previous_best(tiny_dataset, tmp_path, capsys):
    assert start(tiny_dataset, tmp_path / "log", 2) == 2
    message = capsys.readouterr().err
    assert f"{tmp_path / 'log' / '1'} has none" in message
    assert "--initial-stage 1" in message


def test_a_history_cut_short_is_completed(tiny_dataset, trained, tmp_path):
    """An end between the checkpoint and training.csv leaves one row too few."""
    log = Path(shutil.copytree(trained, tmp_path / "log"))
    for stage in ("0", "1"):
        path = log / stage / "training.csv"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert train.main(arguments(tiny_dataset, log, *TWO_STAGES)) == 0
    for stage in ("0", "1"):
        assert history_of(log / stage) == history_of(trained / stage)


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (("--block", "se"), "block 'basic', now 'se'"),
        (("--init-features", 4), "init_features 2, now 4"),
        (("--no-multi",), "multi True, now False"),
        (("--dropout", 0.1), "dropout 0.5, now 0.1"),
    ],
)
def test_another_network_is_refused(tiny_dataset, trained, capsys, more, part):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    assert train.main(arguments(tiny_dataset, trained, *TWO_STAGES, *more)) == 2
    message = capsys.readouterr().err
    assert part in message and "another --train-dir" in message
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_a_checkpoint_of_no_training(tiny_dataset, tmp_path, capsys):
    """A converted model says nothing of an epoch: it is no place to go on from."""
    dataset = open_dataset(tiny_dataset)
    config = NetworkConfig(block="basic", init_features=2, num_tags=len(dataset.tags))
    (tmp_path / "log" / "0").mkdir(parents=True)
    path = tmp_path / "log" / "0" / checkpoint_name(0, 0.5)
    save(path, Checkpoint(build_network(config), config, dataset.tags, dataset.sample_rate))
    assert start(tiny_dataset, tmp_path / "log", 0) == 1
    assert f"{path}: does not say where its training stood" in capsys.readouterr().err
    assert start(tiny_dataset, tmp_path / "log", 1, max_epochs=1) == 0


# --- What goes wrong -----------------------------------------------------------------------------


def test_a_loss_that_is_no_number(tiny_dataset, trained, tmp_path, capsys):
    log = Path(shutil.copytree(trained, tmp_path / "log"))
    best = find_best(log / "1").read_bytes()
    more = ("--lr", 1e30, "--num-lr-decays", 3, "--max-epochs", 2)
    assert train.main(arguments(tiny_dataset, log, *more)) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"error: the loss is (nan|inf) at step \d+ of epoch 0", message)
    assert "--lr" in message
    assert find_best(log / "1").read_bytes() == best
    assert not list(log.glob("2/*.keras"))


def test_a_damaged_shard(tiny_dataset, tmp_path, capsys):
    """What the reading threads find comes out as the same one line."""
    data_dir = Path(shutil.copytree(tiny_dataset, tmp_path / "data"))
    shard = sorted((data_dir / "tfrecord").glob("train-*"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    more = ("--num-lr-decays", 1, "--max-epochs", 1)
    assert train.main(arguments(data_dir, tmp_path / "log", *more)) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.endswith("build_mtt.py again")
    assert f"error: {shard}: record " in message


@pytest.mark.parametrize(
    ("more", "status", "part"),
    [
        (("--batch-size", 22), 2, "--batch-size 22: more than the 21 training segments"),
        (("--initial-stage", 5), 2, "--initial-stage 5: there are 5 stages"),
        (("--block", "se", "--alpha", 0.1), 2, "alpha 0.1"),
    ],
)
def test_options_that_do_not_fit(tiny_dataset, tmp_path, capsys, more, status, part):
    assert train.main(arguments(tiny_dataset, tmp_path / "log", *more)) == status
    assert part in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "log").exists()


def test_errors_are_of_python_too(tiny_dataset, tmp_path):
    config = NetworkConfig(block="basic", init_features=2)
    with pytest.raises(UsageError, match="batch-size 99"):
        train.train(tiny_dataset, tmp_path, config, Options(batch_size=99))
    with pytest.raises(TrainingError, match="the loss is"):
        train.train(tiny_dataset, tmp_path, config, Options(batch_size=4, lr=1e30, jit="off"))


def test_published_options(capsys):
    with pytest.raises(SystemExit) as caught:
        train.main(["--help"])
    assert caught.value.code == 0
    shown = re.sub(r"\s+", " ", capsys.readouterr().out.split("data and output:")[1])
    entries = re.split(r" (?=--[a-z])", shown)
    for option, default in {
        "--data-dir": "./dataset",
        "--train-dir": "./log",
        "--block": "se",
        "--alpha": "16",
        "--batch-size": "23",
        "--momentum": "0.9",
        "--lr": "0.01",
        "--lr-decay": "0.2",
        "--dropout": "0.5",
        "--weight-decay": "0",
        "--initial-stage": "0",
        "--patience": "2",
        "--num-lr-decays": "5",
        "--num-audios-per-shard": "100",
        "--num-segments-per-audio": "10",
        "--num-read-threads": "8",
    }.items():
        # An entry is the option, its help, and its default last; defaults have no parenthesis.
        entry = next(part for part in entries if part.startswith(f"{option} "))
        assert f"(default: {default})" in entry, option
        value = getattr(train.build_parser().parse_args([]), option[2:].replace("-", "_"))
        assert value == type(value)(default), option
    assert "--no-multi" in shown


def test_a_second_training_is_refused(tiny_dataset, trained, tmp_path, capsys):
    log = Path(shutil.copytree(trained, tmp_path / "log"))
    options = arguments(tiny_dataset, log, *TWO_STAGES)
    leftover = log / "0" / ".resume.keras.node1.123.0badcafe.tmp.keras"
    leftover.touch()
    with files.only_run(log, "training", TrainingError):
        assert train.main(options) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"{Path(sys.argv[0]).name}: error: {log}: another training is at work here"
    assert leftover.exists(), "it may be the other's"
    assert train.main(options) == 0
    assert not leftover.exists()


def unfinished(trained, log):
    """Copy a training, as if an earlier command had asked for more epochs of its first stage."""
    shutil.copytree(trained, log)
    shutil.rmtree(log / "1")
    path = log / "0" / "resume.keras"
    checkpoint = checkpoints.load(path)
    checkpoint.training["state"]["finished"] = False
    trainer = compile_trainer(checkpoint.network, Options(lr=0.05), stage=0, jit=False)
    checkpoints.load_optimizer(path, trainer)
    save(path, checkpoint, trainer)


def test_fewer_epochs_than_there_are_train_no_more(tiny_dataset, trained, tmp_path, capsys):
    unfinished(trained, tmp_path / "log")
    options = ("--num-lr-decays", 1, "--max-epochs", 1, "--lr", 0.05, "--seed", 3)
    assert train.main(arguments(tiny_dataset, tmp_path / "log", *options)) == 0
    assert "stage 0: finished earlier" in capsys.readouterr().err
    assert history_of(tmp_path / "log" / "0") == history_of(trained / "0")


def test_lower_patience_than_there_was_trains_no_more(tiny_dataset, trained, tmp_path, capsys):
    unfinished(trained, tmp_path / "log")
    path = tmp_path / "log" / "0" / "resume.keras"
    checkpoint = checkpoints.load(path)
    checkpoint.training["state"]["epochs_without_improvement"] = 1
    save(path, checkpoint)
    options = ("--num-lr-decays", 1, "--max-epochs", 3, "--patience", 1, "--lr", 0.05)
    assert train.main(arguments(tiny_dataset, tmp_path / "log", *options)) == 0
    assert "stage 0: finished earlier" in capsys.readouterr().err
    assert history_of(tmp_path / "log" / "0") == history_of(trained / "0")


def test_going_on_without_the_momentum_there_was_is_refused(
    tiny_dataset, trained, tmp_path, capsys
):
    unfinished(trained, tmp_path / "log")
    options = ("--num-lr-decays", 1, "--max-epochs", 3, "--lr", 0.05, "--momentum", 0)
    assert train.main(arguments(tiny_dataset, tmp_path / "log", *options)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path / 'log' / '0'}: was trained with --momentum 0.9, now 0: use the same" in last


def test_events_that_an_end_has_kept_are_written_later(tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    rows = [{"epoch": epoch, "loss": 0.5 - 0.1 * epoch} for epoch in range(3)]
    for history, row in ((rows[:0], rows[0]), (rows[:1], rows[1]), (rows[:3], None)):
        events = train.EventLog(tmp_path, history)
        if row:
            events.write(row)
        events.close()
    steps = sorted(
        event.step
        for path in tmp_path.glob("events.out.tfevents.*")
        for event in EventFileLoader(str(path)).Load()
        if event.HasField("summary")
    )
    assert steps == [0, 1, 2]


# --- Interruptions -------------------------------------------------------------------------------


class Run:
    """A training in a process of its own, whose talk is followed line by line."""

    def __init__(self, *options):
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *options],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "KERAS_BACKEND": "tensorflow"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.talk = ""

    def read_until(self, words):
        """Read what is said until these words come, at most two minutes."""
        deadline = time.monotonic() + 120
        while words not in self.talk:
            character = self.process.stderr.read(1)
            assert character and time.monotonic() < deadline, self.talk
            self.talk += character

    def end(self, signal_number=None):
        """Send a signal, wait for the end, and give the exit status."""
        if signal_number is not None:
            self.process.send_signal(signal_number)
        printed, talk = self.process.communicate(timeout=120)
        self.talk += talk
        assert printed == ""
        return self.process.returncode


def assert_same_runs(log, other):
    """Check that two runs of two stages left the same, but for the time they took."""
    for stage in ("0", "1"):
        assert_same_weights(log / stage / "resume.keras", other / stage / "resume.keras")
        assert names_in(log / stage) == names_in(other / stage)
        for row, expected in zip(history_of(log / stage), history_of(other / stage), strict=True):
            assert row | {"seconds": 0} == expected | {"seconds": 0}


@pytest.mark.slow
def test_a_run_ended_by_sigterm_goes_on_to_the_same_weights(
    tiny_dataset, trained, tmp_path, capsys
):
    options = arguments(tiny_dataset, tmp_path / "log", *TWO_STAGES)
    run = Run(*options)
    run.read_until("stage 0 epoch 0: loss")
    assert run.end(signal.SIGTERM) == 143
    assert run.talk.splitlines()[-1].endswith(
        "train.py: error: ended by SIGTERM: the same command goes on from the last finished epoch"
    )
    assert len(history_of(tmp_path / "log" / "0")) == 1
    assert train.main(options) == 0
    assert "stage 0: learning rate 0.05, from epoch 1\n" in capsys.readouterr().err
    assert_same_runs(tmp_path / "log", trained)


@pytest.mark.parametrize(
    ("failing", "epoch"),
    [
        ("ckpt-e000", 0),
        pytest.param("resume.keras", 0, marks=pytest.mark.slow),
        pytest.param("ckpt-e001", 1, marks=pytest.mark.slow),
        pytest.param("resume.keras", 1, marks=pytest.mark.slow),
        pytest.param("training.csv", 1, marks=pytest.mark.slow),
    ],
)
def test_a_write_that_fails_loses_nothing(
    tiny_dataset, trained, tmp_path, capsys, monkeypatch, failing, epoch
):
    """In an epoch, the best one so far, no space is left for one of its files."""
    log = tmp_path / "log" / "0"
    options = arguments(tiny_dataset, tmp_path / "log", *TWO_STAGES)
    rename = os.replace
    num_renamed = Counter()

    def replace(source, target):
        name = Path(target).name
        if name.startswith(failing) and num_renamed[name] == (0 if "ckpt" in name else epoch):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        num_renamed[name] += 1
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        assert train.main(options) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {log / failing}" in last and last.endswith(": No space left on device")
    for path in log.glob("*.keras"):
        checkpoints.load(path)
        if path.name.startswith("ckpt"):
            assert_same_weights(path, trained / "0" / path.name)
    assert not [path for path in log.iterdir() if ".tmp" in path.name]
    assert train.main(options) == 0
    for path in (trained / "0").glob("ckpt-*"):
        assert_same_weights(log / path.name, path)
    assert_same_runs(tmp_path / "log", trained)


@pytest.mark.slow
def test_a_full_disk_loses_nothing(tiny_dataset, trained, small_disk):
    options = arguments(tiny_dataset, small_disk / "log", *TWO_STAGES)
    run = Run(*options)
    run.read_until("stage 0 epoch 0: loss")
    with contextlib.suppress(OSError), open(small_disk / "filler", "wb") as file:
        while True:
            file.write(bytes(4096))
    assert run.end() == 1
    assert "Traceback" not in run.talk
    assert "No space left on device" in run.talk.splitlines()[-1]
    log = small_disk / "log" / "0"
    best = find_best(log)
    assert_same_weights(best, trained / "0" / best.name)
    checkpoints.load(log / "resume.keras")
    (small_disk / "filler").unlink()
    run = Run(*options)
    assert run.end() == 0, run.talk
    assert_same_runs(small_disk / "log", trained)


@pytest.mark.slow
def test_runs_killed_at_random_moments_go_on_to_the_same_weights(tiny_dataset, trained, tmp_path):
    """The environment variable TRAINING_KILLS says how many times."""
    options = arguments(tiny_dataset, tmp_path / "log", *TWO_STAGES)
    random = np.random.default_rng(0)
    ends = Counter()
    for number in range(int(os.environ.get("TRAINING_KILLS", "8"))):
        if number % 4 == 0:
            shutil.rmtree(tmp_path / "log", ignore_errors=True)
        run = Run(*options)
        run.read_until("TensorFlow backend on")
        time.sleep(random.uniform(0, 6))
        name = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGINT")[number % 4]
        status = run.end(signal.Signals[name])
        ends[name if status else "too late"] += 1
        assert status in (0, {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130}[name]), run.talk
        for path in (tmp_path / "log").rglob("*.keras"):
            if not path.name.startswith("."):
                checkpoints.load(path)
        for stage in ("0", "1"):
            for path in (tmp_path / "log" / stage).glob("ckpt-*"):
                assert_same_weights(path, trained / stage / path.name)
        if number % 4 == 3:
            assert train.main(options) == 0
            assert_same_runs(tmp_path / "log", trained)
    print(dict(ends))  # shown by pytest -rP


@pytest.mark.slow
def test_interrupted_runs_go_on_to_the_same_weights(tiny_dataset, trained, tmp_path):
    """SIGTERM and SIGINT within an epoch, then SIGKILL, then to the end."""
    options = arguments(tiny_dataset, tmp_path / "log", *TWO_STAGES)
    log = tmp_path / "log"

    run = Run(*options)
    run.read_until("stage 0: learning rate")
    assert run.end(signal.SIGTERM) == 143
    lines = run.talk.splitlines()
    assert lines[-1].endswith(
        "train.py: error: ended by SIGTERM: the same command goes on from the last finished epoch"
    )
    assert not list(log.rglob("*.keras")), "no epoch was finished"

    run = Run(*options)
    run.read_until("stage 0 epoch 0: loss")
    assert run.end(signal.SIGINT) == 130
    assert "ended by SIGINT: the same command goes on" in run.talk.splitlines()[-1]
    assert "Traceback" not in run.talk
    assert len(history_of(log / "0")) == 1

    run = Run(*options)
    run.read_until("stage 0: learning rate 0.05, from epoch 1")
    run.read_until("stage 1 epoch 0: loss")
    assert run.end(signal.SIGKILL) == -signal.SIGKILL

    run = Run(*options)
    assert run.end() == 0, run.talk
    assert "stage 0: finished earlier" in run.talk
    assert "stage 1: learning rate 0.01, from epoch 1" in run.talk
    assert run.talk.endswith("log: all 2 stages are finished\n")

    assert_same_runs(log, trained)
