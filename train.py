"""Train a network in stages of falling learning rate.

    python train.py --data-dir ./dataset --train-dir ./log
    python train.py --block rese --batch-size 23
    python train.py --block basic --init-features 16 --num-lr-decays 2
    KERAS_BACKEND=jax python train.py

Each stage is a folder ``log/0``, ``log/1``, … with the checkpoints that improved the validation
loss, ``training.csv`` and TensorBoard's events; ``log/training.png`` shows them all. Run again
after an interruption, the same command goes on from the last finished epoch.
"""

import argparse
import csv
import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import checkpoints
import cli
import figures
from errors import Interrupted, TrainingError, UsageError
from evaluation import Scores, binary_crossentropy, check_fits, clip_mean, predict_clips, score
from input_data import (
    Dataset,
    SegmentReader,
    open_dataset,
    read_clips,
    shuffled_order,
    write_atomically,
)

import numpy as np

if TYPE_CHECKING:
    from model import NetworkConfig

    import keras
    from tqdm import tqdm

RESUME_NAME = "resume.keras"  # the last finished epoch, with all that the next one needs
HISTORY_NAME = "training.csv"
PICTURE_NAME = "training.png"  # of all stages, beside their folders
TEST_NAME = "test.json"  # the best checkpoint's test scores, once the stage is finished
# The published program's decay within a stage: lr / (1 + this x iteration).
ITERATION_DECAY = 1e-6


@dataclass(frozen=True)
class Options:
    """How to train; the network itself is `model.NetworkConfig`."""

    batch_size: int = 23
    momentum: float = 0.9
    lr: float = 0.01  # of the first stage
    lr_decay: float = 0.2  # each stage's learning rate over that of the one before
    initial_stage: int = 0
    num_lr_decays: int = 5  # stages
    patience: int = 2  # epochs without improvement that end a stage
    max_epochs: int = 100  # a stage
    seed: int = 0
    jit: str = "auto"
    mixed_precision: bool = False
    device_cache: str = "auto"
    num_read_threads: int = 8

    def stage_lr(self, stage: int) -> float:
        """Learning rate at the start of a stage."""
        return self.lr * self.lr_decay**stage


@dataclass
class StageState:
    """Where a stage stands after its last finished epoch."""

    epoch: int = -1
    best_loss: float = math.inf
    epochs_without_improvement: int = 0
    finished: bool = False
    history: list[dict] = field(default_factory=list)  # one row of training.csv an epoch

    def update(self, epoch: int, val_loss: float, patience: int, max_epochs: int) -> bool:
        """Take an epoch's validation loss into account.

        Returns
        -------
        bool
            Whether it is the lowest so far.
        """
        improved = val_loss < self.best_loss
        self.epoch = epoch
        self.best_loss = min(self.best_loss, val_loss)
        self.epochs_without_improvement = 0 if improved else self.epochs_without_improvement + 1
        self.finished = self.epochs_without_improvement >= patience or epoch + 1 >= max_epochs
        return improved


def train(
    data_dir: str | Path,
    train_dir: str | Path,
    config: "NetworkConfig",
    options: Options,
) -> dict[int, Scores]:
    """Train through all stages and test the best checkpoint of each.

    Parameters
    ----------
    data_dir : str or Path
        The dataset's folder.
    train_dir : str or Path
        Where the stages' folders go.
    config : model.NetworkConfig
        Which network; the tags and the segment's length are the dataset's.
    options : Options
        How.

    Returns
    -------
    dict of int to Scores
        The test scores of each stage that was tested now.

    Raises
    ------
    ShardError, UsageError, TrainingError, Interrupted
        The data or options do not fit, the loss is no number, or a signal came.
    """
    import keras

    dataset = open_dataset(data_dir)
    for split in ("train", "val"):
        if not dataset.splits[split].num_segments:
            raise UsageError(f"{data_dir}: no {split} segments to train with")
    # What the dataset says comes from it alone.
    config = type(config)(
        **config.to_json() | {"num_tags": len(dataset.tags), "num_samples": dataset.num_samples}
    )
    # Keras seeds TensorFlow too where it is there, on any backend: it is imported and talks.
    with cli.chatter_held():
        keras.utils.set_random_seed(options.seed % 2**32)
    if options.mixed_precision:
        keras.config.set_dtype_policy("mixed_bfloat16")
    cli.say(describe_device(choose_jit(options.jit, config.block), options.mixed_precision))

    train_dir = Path(train_dir)
    scores = {}
    with (
        stop_on_signals() as stop,
        _open_segments(dataset, options) as segments,
    ):
        for stage in range(options.initial_stage, options.num_lr_decays):
            stage_dir = train_dir / str(stage)
            state, checkpoint = _start_stage(train_dir, stage, config, dataset, options)
            if state.history:  # an end between the two files left one row too few
                _write_history(stage_dir / HISTORY_NAME, state.history)
                _draw_training(train_dir)
            if state.finished:
                cli.say(f"stage {stage}: finished earlier, best {state.best_loss:.4f}")
            else:
                _run_stage(stage_dir, stage, state, checkpoint, dataset, segments, options, stop)
            if not (stage_dir / TEST_NAME).exists():
                scores[stage] = _test(stage_dir, dataset, options, stop)
    return scores


def choose_jit(choice: str, block: str) -> bool:
    """Decide whether to compile by XLA: 'on', 'off', or 'auto' by what was measured."""
    from model import compiles_faster

    return compiles_faster(block) if choice == "auto" else choice == "on"


def device_names() -> list[str]:
    """Name the accelerators that the backend sees; none where it computes on the CPU."""
    import keras

    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if backend == "jax":
        import jax

        return [device.device_kind for device in jax.devices() if device.platform != "cpu"]
    import tensorflow as tf

    return [
        tf.config.experimental.get_device_details(device).get("device_name", device.name)
        for device in tf.config.list_physical_devices("GPU")
    ]


def describe_device(jit: bool, mixed_precision: bool) -> str:
    """Say which backend and device will compute."""
    import keras

    backend = keras.backend.backend()
    names = device_names()
    device = ", ".join(names) if names else f"CPU ({os.cpu_count()} cores)"
    how = "compiled" if jit else "not compiled"
    precision = "mixed bfloat16" if mixed_precision else "float32"
    title = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}[backend]
    return f"{title} backend on {device}, {precision}, {how}"


@contextmanager
def _open_segments(dataset: Dataset, options: Options) -> Iterator[SegmentReader]:
    reader = SegmentReader(dataset, "train", options.num_read_threads)
    try:
        if reader.num_segments < options.batch_size:
            raise UsageError(
                f"--batch-size {options.batch_size}: more than the {reader.num_segments} "
                "training segments"
            )
        yield reader
    finally:
        reader.close()


# --- A stage -------------------------------------------------------------------------------------


def _start_stage(
    train_dir: Path,
    stage: int,
    config: "NetworkConfig",
    dataset: Dataset,
    options: Options,
) -> tuple[StageState, checkpoints.Checkpoint]:
    """Find where a stage starts: its last epoch, its best, the best before it, or nothing yet."""
    from model import build_network

    stage_dir = train_dir / str(stage)
    resume_path = stage_dir / RESUME_NAME
    own_best = checkpoints.find_best(stage_dir)
    if resume_path.exists():
        checkpoint = checkpoints.load(resume_path)
        state = _state_of(checkpoint, resume_path)
    elif own_best:
        checkpoint = checkpoints.load(own_best)
        state = _state_of(checkpoint, own_best)
    elif stage == 0:
        checkpoint = checkpoints.Checkpoint(
            build_network(config), config, dataset.tags, dataset.sample_rate
        )
        return StageState(), checkpoint
    else:
        previous_best = checkpoints.find_best(train_dir / str(stage - 1))
        if previous_best is None:
            raise UsageError(
                f"stage {stage} starts from the best checkpoint of stage {stage - 1}, and "
                f"{train_dir / str(stage - 1)} has none: use --initial-stage {stage - 1}"
            )
        checkpoint = checkpoints.load(previous_best)
        state = StageState()
    check_fits(dataset, checkpoint)
    different = [
        f"{name} {getattr(checkpoint.config, name)!r}, now {value!r}"
        for name, value in config.to_json().items()
        if getattr(checkpoint.config, name) != value
    ]
    if different:
        raise UsageError(
            f"{train_dir}: holds checkpoints of another network ({'; '.join(different)}): "
            "use the same options or another --train-dir"
        )
    return state, checkpoint


def _state_of(checkpoint: checkpoints.Checkpoint, path: Path) -> StageState:
    try:
        state = StageState(**checkpoint.training["state"])
        # Compared and written below; that they are numbers must be known now.
        numbers = [state.epoch, state.best_loss, state.epochs_without_improvement]
        numbers += [value for row in state.history for value in row.values()]
        if not all(isinstance(value, int | float) for value in numbers):
            raise TypeError
        return state
    except (AttributeError, KeyError, TypeError):
        raise TrainingError(
            f"{path}: does not say where its training stood: only checkpoints of train.py go on; "
            "to start from it, put it in the folder of the stage before"
        ) from None


def _run_stage(
    stage_dir: Path,
    stage: int,
    state: StageState,
    checkpoint: checkpoints.Checkpoint,
    dataset: Dataset,
    segments: SegmentReader,
    options: Options,
    stop: "StopRequest",
) -> None:
    """Train epochs until the validation loss stops improving."""
    import keras

    stage_dir.mkdir(parents=True, exist_ok=True)
    jit = choose_jit(options.jit, checkpoint.config.block)
    trainer = compile_trainer(checkpoint.network, options, stage, jit)
    if (stage_dir / RESUME_NAME).exists():
        checkpoints.load_optimizer(stage_dir / RESUME_NAME, trainer)
    run_epoch = _choose_loop(trainer, segments, options, jit)
    events = EventLog(stage_dir)
    lr = options.stage_lr(stage)
    cli.say(f"stage {stage}: learning rate {lr:g}, from epoch {state.epoch + 1}")
    while not state.finished:
        started = time.monotonic()
        epoch = state.epoch + 1
        _seed_dropout(trainer, options.seed, stage, epoch)
        order = shuffled_order(segments.num_segments, options.seed, stage, epoch)
        num_steps = len(order) // options.batch_size
        with cli.progress(total=num_steps, desc=f"epoch {epoch}", unit="step", leave=False) as bar:
            loss = run_epoch(order, _step_watch(bar, stop))
        val_loss, scores = _validate(trainer, dataset, options, stop)
        improved = state.update(epoch, val_loss, options.patience, options.max_epochs)
        row = {
            "epoch": epoch,
            "loss": loss,
            "val_loss": val_loss,
            "learning_rate": float(keras.ops.convert_to_numpy(trainer.optimizer.learning_rate)),
            "val_roc_auc": scores.macro_roc_auc,
            "val_pr_auc": scores.macro_pr_auc,
            "seconds": time.monotonic() - started,
        }
        state.history.append(row)
        # A checkpoint stands before the state that counts on it: whenever the program is killed,
        # what is there is either the epoch before or this one.
        checkpoint.training = {"stage": stage, "state": asdict(state), "options": asdict(options)}
        if improved:
            name = checkpoints.checkpoint_name(epoch, val_loss)
            checkpoints.save(stage_dir / name, checkpoint)
        checkpoints.save(stage_dir / RESUME_NAME, checkpoint, trainer)
        _write_history(stage_dir / HISTORY_NAME, state.history)
        _draw_training(stage_dir.parent)
        events.write(row)
        cli.say(
            f"stage {stage} epoch {epoch}: loss {loss:.4f}, val_loss {val_loss:.4f}, val ROC AUC "
            f"{scores.macro_roc_auc:.4f}, PR AUC {scores.macro_pr_auc:.4f}, "
            f"{row['seconds']:.0f} s{' *' if improved else ''}"
        )
    events.close()


def compile_trainer(
    network: "keras.Model",
    options: Options,
    stage: int,
    jit: bool,
) -> "keras.Model":
    """Make the model that is fitted: it shares the network's layers and has its own optimizer.

    Stochastic gradient descent with Nesterov momentum, at iteration i with learning rate
    ``lr x lr_decay^stage / (1 + 1e-6 i)``, on binary cross-entropy.
    """
    import keras

    trainer = keras.Model(network.inputs, network.outputs[0], name="trainer")
    schedule = keras.optimizers.schedules.InverseTimeDecay(
        options.stage_lr(stage), decay_steps=1, decay_rate=ITERATION_DECAY
    )
    optimizer = keras.optimizers.SGD(schedule, momentum=options.momentum, nesterov=True)
    trainer.compile(optimizer, loss="binary_crossentropy", jit_compile=jit)
    return trainer


def _choose_loop(
    trainer: "keras.Model", segments: SegmentReader, options: Options, jit: bool
) -> Callable[[np.ndarray, Callable[[int, float], None]], float]:
    """Choose what trains an epoch in a given order: Keras's loop, or on JAX ours, which is faster.

    Either calls back with the number of steps done and the loss, and returns the mean loss.
    """
    import keras

    batch_size = options.batch_size
    if keras.backend.backend() == "jax" and jit:
        from jax_training import JaxTrainer, fits_device

        device_cache = options.device_cache == "on" or (
            options.device_cache == "auto"
            and fits_device(segments.num_segments, segments.num_samples)
        )
        runner = JaxTrainer(trainer, segments, device_cache)
        return lambda order, after_steps: runner.run_epoch(batch_size, order, after_steps)
    if options.device_cache == "on":
        raise UsageError("--device-cache on: needs the JAX backend, compiled (KERAS_BACKEND=jax)")

    def run_epoch(order: np.ndarray, after_steps: Callable[[int, float], None]) -> float:
        watch = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda step, logs: after_steps(step + 1, float(logs["loss"]))
        )
        history = trainer.fit(
            segments.batches(batch_size, order),
            steps_per_epoch=len(order) // batch_size,
            verbose=0,
            shuffle=False,  # the order is ours
            callbacks=[watch],
        )
        return float(history.history["loss"][0])

    return run_epoch


def _step_watch(bar: "tqdm", stop: "StopRequest") -> Callable[[int, float], None]:
    """Show each step, end on a signal, and stop at a loss that is no number."""

    def watch(num_steps: int, loss: float) -> None:
        stop.check()
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {num_steps - 1} of {bar.desc}: the best checkpoint "
                "is kept; a lower --lr may help"
            )
        bar.update(num_steps - bar.n)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

    return watch


def _seed_dropout(trainer, seed: int, stage: int, epoch: int) -> None:
    """Draw an epoch's dropout by seed, stage and epoch, as its order is: nothing to carry over.

    Keras does not store the random state of its layers.
    """
    for number, layer in enumerate(trainer.layers):
        if hasattr(layer, "seed_generator"):
            drawn = np.random.default_rng((seed, stage, epoch, number)).integers(2**31)
            layer.seed_generator.state.assign(np.array([drawn, 0]))


def _validate(
    trainer, dataset: Dataset, options: Options, stop: "StopRequest"
) -> tuple[float, Scores]:
    """Loss over the validation segments, and scores over its clips."""
    labels, segment_labels, means, segment_predictions = [], [], [], []
    clips = read_clips(dataset.splits["val"].shards, dataset.num_samples, len(dataset.tags))
    for clip, (predictions,) in predict_clips(trainer, clips, options.batch_size, stop.check):
        labels.append(clip.labels)
        means.append(clip_mean(predictions))
        segment_labels.append(np.repeat(clip.labels[np.newaxis], len(predictions), axis=0))
        segment_predictions.append(predictions)
    loss = binary_crossentropy(np.concatenate(segment_labels), np.concatenate(segment_predictions))
    if not math.isfinite(loss):
        raise TrainingError(
            f"the validation loss is {loss}: the best checkpoint is kept; a lower --lr may help"
        )
    return loss, score(np.array(labels), np.array(means))


def _test(
    stage_dir: Path, dataset: Dataset, options: Options, stop: "StopRequest"
) -> Scores | None:
    """Score a stage's best checkpoint on the test clips and note it in ``test.json``."""
    test = dataset.splits["test"]
    if not test.shards:
        cli.say(f"stage {stage_dir.name}: no test shards to test the best checkpoint on")
        return None
    best = checkpoints.find_best(stage_dir)
    checkpoint = checkpoints.load(best)
    network = checkpoint.network
    network.compile(jit_compile=choose_jit(options.jit, checkpoint.config.block))
    labels, means = [], []
    clips = cli.progress(
        read_clips(test.shards, dataset.num_samples, len(dataset.tags)),
        total=test.num_clips, unit="clip", desc="testing", leave=False,
    )  # fmt: skip
    for clip, (predictions,) in predict_clips(network, clips, options.batch_size, stop.check):
        labels.append(clip.labels)
        means.append(clip_mean(predictions))
    scores = score(np.array(labels), np.array(means))
    noted = {
        "checkpoint": best.name,
        "roc_auc": scores.macro_roc_auc,
        "pr_auc": scores.macro_pr_auc,
    }
    write_atomically(stage_dir / TEST_NAME, json.dumps(noted).encode() + b"\n")
    cli.say(
        f"stage {stage_dir.name}: best checkpoint on test: ROC AUC {scores.macro_roc_auc:.4f}, "
        f"PR AUC {scores.macro_pr_auc:.4f}"
    )
    return scores


# --- What a stage leaves -------------------------------------------------------------------------


def _write_history(path: Path, history: list[dict]) -> None:
    lines = [",".join(history[0])]
    lines += [",".join(f"{value:.8g}" for value in row.values()) for row in history]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def read_history(path: str | Path) -> list[dict[str, float]]:
    """Read a stage's ``training.csv``, a row an epoch."""
    with open(path, newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def plot_training(train_dir: str | Path) -> Path:
    """Draw ``training.png`` from the ``training.csv`` of every stage.

    Parameters
    ----------
    train_dir : str or Path
        Holds the stages' folders, and the picture then.

    Returns
    -------
    Path
        The picture.
    """
    train_dir = Path(train_dir)
    histories = {
        int(path.parent.name): read_history(path)
        for path in train_dir.glob(f"*/{HISTORY_NAME}")
        if path.parent.name.isdecimal()
    }
    drawn = io.BytesIO()
    figures.plot_training(
        drawn, {stage: histories[stage] for stage in sorted(histories) if histories[stage]}
    )
    write_atomically(train_dir / PICTURE_NAME, drawn.getvalue())
    return train_dir / PICTURE_NAME


def _draw_training(train_dir: Path) -> None:
    """Keep the picture current; whatever is wrong with it, training goes on."""
    try:
        plot_training(train_dir)
    except Exception as error:
        cli.say(f"{train_dir / PICTURE_NAME}: not drawn: {error}")


class EventLog:
    """TensorBoard's events of a stage: one point an epoch."""

    def __init__(self, stage_dir: Path):
        # TensorBoard imports TensorFlow where it finds it, which talks, on any backend.
        with cli.chatter_held():
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            self._writer = EventFileWriter(str(stage_dir))

    def write(self, row: dict) -> None:
        """Write an epoch's row of ``training.csv``."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name != "epoch"
        ]
        self._writer.add_event(
            Event(wall_time=time.time(), step=row["epoch"], summary=Summary(value=values))
        )
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()


class StopRequest:
    """Whether a signal has asked to end."""

    def __init__(self):
        self.signal_number = None

    def check(self) -> None:
        """Raise `Interrupted` after SIGTERM or Ctrl-C."""
        if self.signal_number is not None:
            name = signal.Signals(self.signal_number).name
            raise Interrupted(
                f"ended by {name}: the same command goes on from the last finished epoch",
                self.signal_number,
            )


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Let SIGTERM and Ctrl-C end the program after the step at hand; a second one ends it now."""
    stop = StopRequest()

    def note(signal_number, _):
        stop.signal_number = signal_number
        signal.signal(signal_number, signal.SIG_DFL)

    earlier = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


# --- Command line --------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "Train a network in stages of falling learning rate.",
        "  python train.py --data-dir ./dataset --train-dir ./log\n"
        "  python train.py --block rese --no-multi --train-dir ./log-rese",
    )
    add = parser.add_argument
    add(
        "--data-dir",
        metavar="PATH",
        default="./dataset",
        help="folder of the dataset, which holds tfrecord/ (default: ./dataset)",
    )
    add(
        "--train-dir",
        metavar="PATH",
        default="./log",
        help="folder for event logs and checkpoints (default: ./log)",
    )
    network = parser.add_argument_group("network")
    add = network.add_argument
    add(
        "--block",
        choices=("se", "rese", "res", "basic"),
        default="se",
        help="building block (default: se)",
    )
    add(
        "--no-multi",
        action="store_true",
        help="aggregate the last block only, not the last three (default: off)",
    )
    add(
        "--alpha",
        metavar="A",
        type=cli.positive_float,
        default=16,
        help="width of an SE block's hidden layer over its input's (default: 16)",
    )
    add(
        "--init-features",
        metavar="N",
        type=cli.positive_int,
        default=128,
        help="features of the first convolution (default: 128)",
    )
    add(
        "--initializer",
        choices=("published", "he"),
        default="published",
        help="initial weights of the convolutions: the published program's, which are smaller "
        "than he_uniform and train better, or he_uniform (default: published)",
    )
    add(
        "--dropout",
        metavar="DO",
        type=cli.rate,
        default=0.5,
        help="dropout rate before the output (default: 0.5)",
    )
    add(
        "--weight-decay",
        metavar="WD",
        type=cli.non_negative_float,
        default=0.0,
        help="L2 penalty of the convolutions' weights (default: 0)",
    )
    training = parser.add_argument_group("training")
    add = training.add_argument
    add(
        "--batch-size",
        metavar="N",
        type=cli.positive_int,
        default=23,
        help="segments a step (default: 23)",
    )
    add(
        "--momentum",
        metavar="M",
        type=cli.rate,
        default=0.9,
        help="momentum of the stochastic gradient descent (default: 0.9)",
    )
    add(
        "--lr",
        metavar="LR",
        type=cli.positive_float,
        default=0.01,
        help="learning rate of the first stage (default: 0.01)",
    )
    add(
        "--lr-decay",
        metavar="DC",
        type=cli.positive_float,
        default=0.2,
        help="a stage's learning rate over the previous stage's (default: 0.2)",
    )
    add(
        "--initial-stage",
        metavar="N",
        type=cli.non_negative_int,
        default=0,
        help="stage to start at (default: 0)",
    )
    add(
        "--patience",
        metavar="N",
        type=cli.positive_int,
        default=2,
        help="epochs without a lower validation loss that end a stage (default: 2)",
    )
    add(
        "--num-lr-decays",
        metavar="N",
        type=cli.positive_int,
        default=5,
        help="number of stages (default: 5)",
    )
    add(
        "--max-epochs",
        metavar="N",
        type=cli.positive_int,
        default=100,
        help="most epochs a stage (default: 100)",
    )
    add(
        "--seed",
        metavar="N",
        type=cli.non_negative_int,
        default=0,
        help="seed of weights, shuffling and dropout (default: 0)",
    )
    machine = parser.add_argument_group("machine")
    add = machine.add_argument
    add(
        "--mixed-precision",
        action="store_true",
        help="compute in bfloat16 where that is safe (default: off)",
    )
    add(
        "--jit",
        choices=("auto", "on", "off"),
        default="auto",
        help="compile the network by XLA; auto does where it was measured to pay (default: auto)",
    )
    add(
        "--device-cache",
        choices=("auto", "on", "off"),
        default="auto",
        help="on JAX, keep the training segments in the device's memory; auto does where they fit "
        "an accelerator's (default: auto)",
    )
    add(
        "--num-read-threads",
        metavar="N",
        type=cli.positive_int,
        default=8,
        help="threads that read shards (default: 8)",
    )
    said = parser.add_argument_group("accepted as before, now said by the shards themselves")
    add = said.add_argument
    add(
        "--num-audios-per-shard",
        metavar="N",
        type=cli.positive_int,
        default=100,
        help="clips a shard: counted from the shards, this value is not used (default: 100)",
    )
    add(
        "--num-segments-per-audio",
        metavar="N",
        type=cli.positive_int,
        default=10,
        help="segments a clip: counted from the shards, this value is not used (default: 10)",
    )
    return parser  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    return cli.run(_train, build_parser().parse_args(argv))


def _train(arguments: argparse.Namespace) -> None:
    open_dataset(arguments.data_dir)  # say what is wrong with it before the slow imports
    cli.import_quietly("keras")
    from model import NetworkConfig

    config = NetworkConfig(
        block=arguments.block,
        multi=not arguments.no_multi,
        init_features=arguments.init_features,
        alpha=arguments.alpha,
        dropout=arguments.dropout,
        weight_decay=arguments.weight_decay,
        initializer=arguments.initializer,
    )
    options = Options(
        batch_size=arguments.batch_size,
        momentum=arguments.momentum,
        lr=arguments.lr,
        lr_decay=arguments.lr_decay,
        initial_stage=arguments.initial_stage,
        num_lr_decays=arguments.num_lr_decays,
        patience=arguments.patience,
        max_epochs=arguments.max_epochs,
        seed=arguments.seed,
        jit=arguments.jit,
        mixed_precision=arguments.mixed_precision,
        device_cache=arguments.device_cache,
        num_read_threads=arguments.num_read_threads,
    )
    if options.initial_stage >= options.num_lr_decays:
        raise UsageError(
            f"--initial-stage {options.initial_stage}: there are {options.num_lr_decays} stages, "
            "the first is 0 (--num-lr-decays)"
        )
    train(arguments.data_dir, arguments.train_dir, config, options)
    cli.say(f"{arguments.train_dir}: all {options.num_lr_decays} stages are finished")


if __name__ == "__main__":
    sys.exit(main())
