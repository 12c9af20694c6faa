"""Small training runs that several tests use."""

import csv
import shutil

import train
from input_data import open_dataset, read_clips
from toolkit.models import checkpoints
from toolkit.training.loop import compile_trainer
from toolkit.training.options import TrainingOptions

import numpy as np

COLUMNS = ["epoch", "loss", "val_loss", "learning_rate", "val_roc_auc", "val_pr_auc", "seconds"]
# A network that trains about one epoch per second on `tiny_dataset`.
SMALL = ("--block", "basic", "--init-features", "2", "--batch-size", "4")
ONE_EPOCH = ("--num-lr-decays", 1, "--max-epochs", 1)
TWO_STAGES = ("--num-lr-decays", 2, "--max-epochs", 2, "--lr", 0.05, "--seed", 3)


def arguments(data_dir, train_dir, *more):
    return ["--data-dir", str(data_dir), "--train-dir", str(train_dir), *SMALL, *map(str, more)]


def train_two_stages(data_dir, train_dir):
    assert train.main(arguments(data_dir, train_dir, *TWO_STAGES)) == 0
    return train_dir


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


def names_in(stage_dir):
    """Return the names of the files of a stage, except TensorBoard events."""
    return sorted(path.name for path in stage_dir.iterdir() if "tfevents" not in path.name)


def assert_same_runs(log, other):
    """Check that two runs of two stages wrote the same results, except for times."""
    for stage in ("0", "1"):
        assert_same_weights(log / stage / "resume.keras", other / stage / "resume.keras")
        assert names_in(log / stage) == names_in(other / stage)
        for row, expected in zip(history_of(log / stage), history_of(other / stage), strict=True):
            assert row | {"seconds": 0} == expected | {"seconds": 0}


def edit_state(log, max_epochs=2, **changes):
    """Change state and option in stage 0's resume.keras, and delete stage 1."""
    shutil.rmtree(log / "1")
    path = log / "0" / "resume.keras"
    checkpoint = checkpoints.load(path)
    checkpoint.training["state"] |= changes
    checkpoint.training["options"]["max_epochs"] = max_epochs
    trainer = compile_trainer(checkpoint.network, TrainingOptions(lr=0.05), stage=0, jit=False)
    checkpoints.load_optimizer(path, trainer)
    checkpoints.save(path, checkpoint, trainer)


def predict_validation(path, data_dir):
    """Predict the validation split; return the labels and a list of outputs per clip."""
    network = checkpoints.load(path).network
    dataset = open_dataset(data_dir)
    clips = list(read_clips(dataset.splits["val"].shards, dataset.num_samples, len(dataset.tags)))
    outputs = [network.predict_on_batch(clip.segments).astype(np.float64) for clip in clips]
    return np.array([clip.labels for clip in clips]), outputs


def validation_loss_of(path, data_dir, weight_decay=0.0):
    """Compute binary cross-entropy over segments plus the L2 penalty, from the definitions."""
    labels, outputs = predict_validation(path, data_dir)
    p = np.concatenate(outputs)
    y = np.repeat(labels, [len(output) for output in outputs], axis=0)
    kernels = [array for array in weights_of(path) if array.ndim == 3]
    assert len(kernels) == 10  # of a basic or se network
    penalty = sum(np.square(kernel, dtype=np.float64).sum() for kernel in kernels)
    return -np.log(np.where(y, p, 1 - p)).mean() + weight_decay * penalty
