"""Train a network in stages of falling learning rate.

    python train.py --data-dir ./dataset --train-dir ./log
    python train.py --block rese --batch-size 23
    python train.py --block basic --init-features 16 --num-lr-decays 2
    KERAS_BACKEND=jax python train.py
    KERAS_BACKEND=jax python train.py --distribute --batch-size 64

Each stage is a folder ``log/0``, ``log/1``, … with the checkpoints that improved the validation
loss, ``training.csv`` and TensorBoard's events; ``log/training.png`` shows them all. Run again
after an interruption, the same command goes on from the last finished epoch. With --distribute all
GPUs train together, and on JAX those of several hosts (`distribution`).
"""

import argparse
import csv
import gc
import io
import json
import math
import os
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from input_data import Dataset, SegmentReader, open_dataset, read_clips, shuffled_order
from toolkit import backend, cli, figures, messages
from toolkit.errors import ToolkitError, TrainingError, UsageError
from toolkit.evaluation import (
    Scores,
    binary_crossentropy,
    check_fits,
    clip_mean,
    predict_clips,
    score,
)
from toolkit.files import only_run, remove_leftovers, write_atomically
from toolkit.models import checkpoints
from toolkit.signals import StopRequest, stop_on_signals
from toolkit.training import distribution
from toolkit.training.distribution import Job

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
    distribute: bool = False

    def stage_lr(self, stage: int) -> float:
        """Learning rate at the start of a stage."""
        return self.lr * self.lr_decay**stage


@dataclass(frozen=True)
class Run:
    """What stays the same through all stages."""

    train_dir: Path
    dataset: Dataset
    segments: SegmentReader
    options: Options
    jit: bool
    job: Job
    stop: StopRequest

    def stage_dir(self, stage: int) -> Path:
        """Name a stage's folder."""
        return self.train_dir / str(stage)


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
    dataset = open_dataset(data_dir)
    for split in ("train", "val"):
        if not dataset.splits[split].num_segments:
            raise UsageError(f"{data_dir}: no {split} segments to train with")
    # What the dataset says comes from it alone.
    config = type(config)(
        **config.to_json() | {"num_tags": len(dataset.tags), "num_samples": dataset.num_samples}
    )
    train_dir = Path(train_dir)
    scores = {}
    with (
        stop_on_signals() as stop,
        _open_segments(dataset, options) as segments,
        _open_job(options, stop) as job,
        job.scope(),
        ExitStack() as held,
    ):
        job.check_same("options", lambda: repr((options, config)), mend="give all the same command")
        job.check_batch_size(options.batch_size)
        job.check_same(str(data_dir), lambda: _list_files(_all_shards(dataset)))
        jit = choose_jit(options.jit, config.block)
        if job.mesh and not jit:
            raise UsageError(
                "--distribute: on JAX the network must be compiled: leave out --jit off"
            )
        if job.strategy and options.jit == "auto":
            jit = False  # TensorFlow cannot compile for several devices of every kind
        job.say(describe_device(jit, options.mixed_precision, job))
        run = Run(train_dir, dataset, segments, options, jit, job, stop)
        _check_train_dir_is_shared(run)
        held.enter_context(_only_training(run))
        for stage in range(options.initial_stage, options.num_lr_decays):
            state, checkpoint = _start_stage(run, stage, config)
            if state.history and job.is_first:  # an end between the two files left one row too few
                _write_history(run.stage_dir(stage) / HISTORY_NAME, state.history)
                _draw_training(train_dir)
            if state.finished:
                job.say(f"stage {stage}: finished earlier, best {state.best_loss:.4f}")
            else:
                _run_stage(run, stage, state, checkpoint)
            _check_train_dir(run)  # all see the best of this stage
            if job.of_first(not (run.stage_dir(stage) / TEST_NAME).exists()):
                tested = _test(run, stage)
                if tested is not None:
                    scores[stage] = tested
        job.say(f"{train_dir}: all {options.num_lr_decays} stages are finished")
    return scores


@contextmanager
def _open_job(options: Options, stop: StopRequest) -> Iterator[Job]:
    """Seed, then find the devices: Keras must not compute before."""
    import keras

    # Keras seeds TensorFlow too where it is there, on any backend: it is imported and talks.
    with backend.stderr_held():
        keras.utils.set_random_seed(options.seed % 2**32)
    if options.mixed_precision:
        keras.config.set_dtype_policy("mixed_bfloat16")
    with distribution.start(stop.check) if options.distribute else nullcontext(Job()) as job:
        yield job


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


def describe_device(jit: bool, mixed_precision: bool, job: Job) -> str:
    """Say which backend and devices will compute."""
    import keras

    backend = keras.backend.backend()
    names = device_names()
    device = ", ".join(dict.fromkeys(names)) if names else f"CPU ({os.cpu_count()} cores)"
    how = "compiled" if jit else "not compiled"
    precision = "mixed bfloat16" if mixed_precision else "float32"
    title = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}[backend]
    together = ""
    if job.num_devices > 1:
        together = f", {job.num_devices} devices in {job.num_processes} process"
        together += "es" if job.num_processes > 1 else ""
    return f"{title} backend on {device}{together}, {precision}, {how}"


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
    run: Run, stage: int, config: "NetworkConfig"
) -> tuple[StageState, checkpoints.Checkpoint]:
    """Find where a stage starts: its last epoch, its best, the best before it, or nothing yet."""
    from model import build_network

    train_dir, dataset = run.train_dir, run.dataset
    stage_dir = run.stage_dir(stage)
    _check_train_dir(run)
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
        previous_best = checkpoints.find_best(run.stage_dir(stage - 1))
        if previous_best is None:
            raise UsageError(
                f"stage {stage} starts from the best checkpoint of stage {stage - 1}, and "
                f"{run.stage_dir(stage - 1)} has none: use --initial-stage {stage - 1}"
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
    options = run.options
    if state.history and (
        state.epoch + 1 >= options.max_epochs
        or state.epochs_without_improvement >= options.patience
    ):
        state.finished = True  # by options that are stricter than the earlier run's
    if resume_path.exists() and run.job.is_first:
        with run.job.alone():
            _write_checkpoint(stage_dir, state, checkpoint)  # an end came before it was
    return state, checkpoint


@contextmanager
def _only_training(run: Run) -> Iterator[None]:
    """Let no other training write to the folder, and clear what killed ones left there."""
    if not run.job.is_first:
        yield
        return
    run.train_dir.mkdir(parents=True, exist_ok=True)
    with only_run(run.train_dir, "training", TrainingError):
        for folder in (run.train_dir, *run.train_dir.glob("*/")):
            remove_leftovers(folder)
        yield


def _all_shards(dataset: Dataset) -> list[Path]:
    return [path for split in dataset.splits.values() for path in split.shards]


def _list_files(paths: Iterable[Path]) -> str:
    found = []
    for path in paths:
        with suppress(FileNotFoundError):  # listed still, but gone
            found.append((path.parent.name, path.name, path.stat().st_size))
    return str(sorted(found))


# Some shared folders show only after a minute what another host wrote.
_FOLDER_PATIENCE_S = 90


def _check_train_dir(run: Run) -> None:
    """Check that all processes see the same checkpoints, and so decide alike."""
    run.job.check_same(
        str(run.train_dir),
        lambda: _list_files(run.train_dir.glob("*/[!.]*.keras")),
        patience_s=_FOLDER_PATIENCE_S,
    )


def _check_train_dir_is_shared(run: Run) -> None:
    """Check that all processes see what the first writes, before it has taken an epoch."""
    job, pattern = run.job, ".job-*"
    if job.num_processes == 1:
        return
    mark = run.train_dir / f".job-{secrets.token_hex(4)}"
    if job.is_first:
        run.train_dir.mkdir(parents=True, exist_ok=True)
        for path in (*run.train_dir.glob(pattern), mark):
            path.unlink(missing_ok=True)
        mark.touch()
    try:
        job.check_same(
            str(run.train_dir),
            lambda: str(sorted(path.name for path in run.train_dir.glob(pattern))),
            patience_s=_FOLDER_PATIENCE_S,
        )
        job.wait_for_all("shared folder")
    finally:
        if job.is_first:
            mark.unlink(missing_ok=True)


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


def _run_stage(run: Run, stage: int, state: StageState, checkpoint: checkpoints.Checkpoint) -> None:
    """Train epochs until the validation loss stops improving."""
    import keras

    options, job = run.options, run.job
    stage_dir = run.stage_dir(stage)
    job.synchronise_norms(checkpoint.network)
    trainer = compile_trainer(checkpoint.network, options, stage, run.jit)
    if (stage_dir / RESUME_NAME).exists():
        # Keras keeps no velocities where there is no momentum.
        earlier = checkpoint.training.get("options", {}).get("momentum", options.momentum)
        if bool(earlier) != bool(options.momentum):
            raise UsageError(
                f"{stage_dir}: was trained with --momentum {earlier:g}, now {options.momentum:g}: "
                "use the same, or another --train-dir"
            )
        checkpoints.load_optimizer(stage_dir / RESUME_NAME, trainer)
    run_epoch = _choose_loop(run, trainer)
    predictor = _choose_predictor(run, trainer)
    if job.is_first:
        stage_dir.mkdir(parents=True, exist_ok=True)
        events = EventLog(stage_dir, state.history)
    lr = options.stage_lr(stage)
    job.say(f"stage {stage}: learning rate {lr:g}, from epoch {state.epoch + 1}")
    while not state.finished:
        started = time.monotonic()
        epoch = state.epoch + 1
        _seed_dropout(trainer, options.seed, stage, epoch)
        order = shuffled_order(run.segments.num_segments, options.seed, stage, epoch)
        num_steps = len(order) // options.batch_size
        with messages.progress(
            total=num_steps, desc=f"epoch {epoch}", unit="step", leave=False,
            disable=not job.is_first,
        ) as bar:  # fmt: skip
            loss = run_epoch(order, _step_watch(bar, epoch, run.stop))
        val_loss, scores = _validate(run, predictor)
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
        if job.is_first:
            job.synchronise_norms(checkpoint.network, False)
            with job.alone():
                _write_epoch(run, stage, state, checkpoint, trainer)
            job.synchronise_norms(checkpoint.network)
            events.write(row)
        job.wait_for_all(f"stage {stage} epoch {epoch}")  # to be written
        job.say(
            f"stage {stage} epoch {epoch}: loss {loss:.4f}, val_loss {val_loss:.4f}, val ROC AUC "
            f"{scores.macro_roc_auc:.4f}, PR AUC {scores.macro_pr_auc:.4f}, "
            f"{messages.duration(row['seconds'])}{' *' if improved else ''}"
        )
    if job.is_first:
        events.close()


def _write_epoch(
    run: Run,
    stage: int,
    state: StageState,
    checkpoint: checkpoints.Checkpoint,
    trainer: "keras.Model",
) -> None:
    # Whenever the program is killed, what is there is the epoch before or this one: what goes on
    # is written first, and holds the checkpoint that may be missing then.
    stage_dir = run.stage_dir(stage)
    checkpoint.training = {
        "stage": stage,
        "state": asdict(state),
        "options": asdict(run.options),
    }
    checkpoints.save(stage_dir / RESUME_NAME, checkpoint, trainer)
    _write_checkpoint(stage_dir, state, checkpoint)
    _write_history(stage_dir / HISTORY_NAME, state.history)
    _draw_training(run.train_dir)


def _write_checkpoint(
    stage_dir: Path, state: StageState, checkpoint: checkpoints.Checkpoint
) -> None:
    """Write the last epoch's checkpoint, if it is the best one and not there."""
    path = stage_dir / checkpoints.checkpoint_name(state.epoch, state.best_loss)
    if state.epochs_without_improvement == 0 and not path.exists():
        checkpoints.save(path, checkpoint)


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

    trainer = keras.Model(network.input, network.outputs[0], name="trainer")
    schedule = keras.optimizers.schedules.InverseTimeDecay(
        options.stage_lr(stage), decay_steps=1, decay_rate=ITERATION_DECAY
    )
    optimizer = keras.optimizers.SGD(schedule, momentum=options.momentum, nesterov=True)
    trainer.compile(optimizer, loss="binary_crossentropy", jit_compile=jit)
    return trainer


def _choose_loop(
    run: Run, trainer: "keras.Model"
) -> Callable[[np.ndarray, Callable[[int, float], None]], float]:
    """Choose what trains an epoch in a given order: Keras's loop, or on JAX ours, which is faster.

    Either calls back with the number of steps done and the loss, and returns the mean loss.
    """
    import keras

    segments, options, job = run.segments, run.options, run.job
    batch_size = options.batch_size
    if keras.backend.backend() == "jax" and run.jit:
        from toolkit.training.jax_training import JaxTrainer, fits_device

        gc.collect()  # an earlier stage's segments, which a cycle holds on the device
        device_cache = options.device_cache == "on" or (
            options.device_cache == "auto"
            and job.num_processes == 1  # of several, each reads its share alone
            and fits_device(segments)
        )
        runner = JaxTrainer(trainer, segments, device_cache, job=job)
        return lambda order, after_steps: runner.run_epoch(batch_size, order, after_steps)
    if options.device_cache == "on":
        raise UsageError("--device-cache on: needs the JAX backend, compiled (KERAS_BACKEND=jax)")

    failed = []  # what TensorFlow's datasets would hide

    def run_epoch(order: np.ndarray, after_steps: Callable[[int, float], None]) -> float:
        def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            try:
                yield from segments.batches(batch_size, order)
            except ToolkitError as error:
                failed.append(error)
                raise

        watch = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda step, logs: after_steps(step + 1, float(logs["loss"]))
        )
        try:
            history = trainer.fit(
                job.spread(batches),
                steps_per_epoch=len(order) // batch_size,
                verbose=0,
                shuffle=False,  # the order is ours
                callbacks=[watch],
            )
        except Exception as error:
            raise (failed[0] if failed else error) from None
        return float(history.history["loss"][0])

    return run_epoch


def _choose_predictor(run: Run, network: "keras.Model"):
    """Choose what predicts batches: the network, or in a job on JAX this host's devices."""
    if run.job.mesh:
        from toolkit.training.jax_training import JaxPredictor

        return JaxPredictor(network)
    return network


def _step_watch(bar: "tqdm", epoch: int, stop: StopRequest) -> Callable[[int, float], None]:
    """Show each step, end on a signal, and stop at a loss that is no number."""

    def watch(num_steps: int, loss: float) -> None:
        stop.check()
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {num_steps - 1} of epoch {epoch}: the best checkpoint "
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


def _validate(run: Run, predictor: "keras.Model") -> tuple[float, Scores]:
    """Loss over the validation segments, and scores over its clips."""
    labels, predictions = _predict_split(run, predictor, "val", "validating")
    num_segments = [len(of_clip) for of_clip in predictions]
    loss = binary_crossentropy(np.repeat(labels, num_segments, axis=0), np.concatenate(predictions))
    if not math.isfinite(loss):
        raise TrainingError(
            f"the validation loss is {loss}: the best checkpoint is kept; a lower --lr may help"
        )
    # Hosts may round otherwise, and must decide alike.
    return run.job.of_first(loss), _score_clips(labels, predictions)


def _test(run: Run, stage: int) -> Scores | None:
    """Score a stage's best checkpoint on the test clips and note it in ``test.json``."""
    stage_dir = run.stage_dir(stage)
    if not run.dataset.splits["test"].shards:
        run.job.say(f"stage {stage}: no test shards to test the best checkpoint on")
        return None
    best = checkpoints.find_best(stage_dir)
    checkpoint = checkpoints.load(best)
    network = checkpoint.network
    network.compile(jit_compile=run.jit)
    predictor = _choose_predictor(run, network)
    scores = _score_clips(*_predict_split(run, predictor, "test", "testing"))
    noted = {
        "checkpoint": best.name,
        # JSON has no number for what cannot be scored.
        "roc_auc": None if math.isnan(scores.macro_roc_auc) else scores.macro_roc_auc,
        "pr_auc": None if math.isnan(scores.macro_pr_auc) else scores.macro_pr_auc,
    }
    if run.job.is_first:
        write_atomically(stage_dir / TEST_NAME, json.dumps(noted).encode() + b"\n")
    run.job.say(
        f"stage {stage}: best checkpoint on test: ROC AUC {scores.macro_roc_auc:.4f}, "
        f"PR AUC {scores.macro_pr_auc:.4f}"
    )
    return scores


def _score_clips(labels: np.ndarray, predictions: list[np.ndarray]) -> Scores:
    return score(labels, np.array([clip_mean(of_clip) for of_clip in predictions]))


def _predict_split(
    run: Run, predictor: "keras.Model", split: str, doing: str
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Predict a split's clips; each process takes its share of the shards, and gets all results.

    Returns
    -------
    labels : np.ndarray [shape=(n_clips, n_tags), dtype=uint8]
    predictions : list of np.ndarray [shape=(n_segments, n_tags), dtype=float32]
        One array a clip.
    """
    dataset, job = run.dataset, run.job
    num_tags = len(dataset.tags)
    found = dataset.splits[split]
    shards = found.shards[job.process :: job.num_processes]
    clips = messages.progress(
        predict_clips(
            predictor,
            read_clips(shards, dataset.num_samples, num_tags),
            run.options.batch_size,
            run.stop.check,
        ),
        total=found.num_clips if job.num_processes == 1 else None,
        unit="clip", desc=doing, leave=False, disable=not job.is_first,
    )  # fmt: skip
    labels, num_segments = [np.zeros((0, num_tags), np.uint8)], []
    predictions = [np.zeros((0, num_tags), np.float32)]
    for clip, (of_clip,) in clips:
        labels.append(clip.labels[np.newaxis])
        num_segments.append(len(of_clip))
        predictions.append(of_clip)
    labels, num_segments, predictions = (
        job.gather(part)
        for part in (
            np.concatenate(labels),
            np.array(num_segments, np.int32),
            np.concatenate(predictions),
        )
    )
    by_clip = np.split(predictions, np.cumsum(num_segments)[:-1])
    return labels, by_clip[: len(num_segments)]  # no clips are split into one, too


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
        messages.say(f"{train_dir / PICTURE_NAME}: not drawn: {error}")


class EventLog:
    """TensorBoard's events of a stage: one point an epoch, those that are missing included."""

    def __init__(self, stage_dir: Path, history: list[dict]):
        # TensorBoard imports TensorFlow where it finds it, which talks, on any backend.
        with backend.stderr_held():
            from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            written = {
                event.step
                for path in stage_dir.glob("events.out.tfevents.*")
                for event in EventFileLoader(str(path)).Load()
                if event.HasField("summary")
            }
            self._writer = EventFileWriter(str(stage_dir))
        for row in history:  # an end may have come before the last one was written
            if row["epoch"] not in written:
                self.write(row)

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


# --- Command line --------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "Train a network in stages of falling learning rate.",
        "  python train.py --data-dir ./dataset --train-dir ./log\n"
        "  python train.py --block rese --no-multi --train-dir ./log-rese",
    )
    data = parser.add_argument_group("data and output")
    cli.add_data_dir(data)
    add = data.add_argument
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
    cli.add_jit(machine)
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
    add(
        "--distribute",
        action="store_true",
        help="train on all GPUs, and on JAX on those of all hosts that the environment names, one "
        f"process a host: {distribution.ADDRESSES}, {distribution.NUM_PROCESSES}, "
        f"{distribution.PROCESS_ID} (default: off)",
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
    return cli.add_general(parser)


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    status = 1
    try:
        status = cli.run(_train, arguments)
    except Exception:
        if not arguments.distribute:
            raise
        traceback.print_exc()  # the other processes must not wait for this one
    if arguments.distribute:
        distribution.leave(status)
    return status


def _train(arguments: argparse.Namespace) -> None:
    open_dataset(arguments.data_dir)  # say what is wrong with it before the slow imports
    backend.import_keras()
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
        distribute=arguments.distribute,
    )
    if options.initial_stage >= options.num_lr_decays:
        raise UsageError(
            f"--initial-stage {options.initial_stage}: there are {options.num_lr_decays} stages, "
            "the first is 0 (--num-lr-decays)"
        )
    train(arguments.data_dir, arguments.train_dir, config, options)


if __name__ == "__main__":
    sys.exit(main())
