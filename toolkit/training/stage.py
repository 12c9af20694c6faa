"""Start or resume a stage, and write the files of an epoch."""

import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from input_data import Dataset, SegmentReader
from toolkit.errors import TrainingError, UsageError
from toolkit.files import only_run, remove_leftovers
from toolkit.models import checkpoints
from toolkit.models.checkpoints import Checkpoint
from toolkit.models.config import NetworkConfig
from toolkit.prediction import load_for_dataset
from toolkit.provenance import describe
from toolkit.signals import StopRequest
from toolkit.training.devices import Job
from toolkit.training.history import HISTORY_NAME, EventLog, update_picture, write_history
from toolkit.training.options import TrainingOptions
from toolkit.training.state import (
    RESUME_NAME,
    StageState,
    best_checkpoint,
    delete_stage,
    find_state,
    list_stages,
)

import numpy as np

if TYPE_CHECKING:
    import keras

# Fields of NetworkConfig that published checkpoints do not record. The weights can be loaded with
# any value of these fields.
_NOT_IN_HDF5 = {"dropout", "weight_decay", "initializer"}
# Fields of NetworkConfig that may change between stages and on resume.
_CHANGEABLE = {"dropout", "weight_decay"}


@dataclass(frozen=True)
class Run:
    """The data, options and devices that all stages share."""

    train_dir: Path
    dataset: Dataset
    segments: SegmentReader
    config: NetworkConfig
    options: TrainingOptions
    jit: bool
    job: Job
    stop: StopRequest

    def stage_dir(self, stage: int) -> Path:
        return self.train_dir / str(stage)

    def check_folder(self) -> None:
        """Check that all processes see the same checkpoints, so that all choose the same one."""
        self.job.check_same_folder(
            str(self.train_dir),
            lambda: list_files(
                path
                for path in self.train_dir.glob("*/[!.]*")
                if path.suffix in (".keras", ".hdf5")
            ),
        )


# --- The folder of a training --------------------------------------------------------------------


@contextmanager
def locked_folder(train_dir: Path, job: Job) -> Iterator[None]:
    """Lock the folder against other trainings, and remove temporary files of killed trainings.

    Raises
    ------
    TrainingError
        Another training is running in the folder.
    UsageError
        The hosts do not share the folder.
    """
    _check_shared(train_dir, job)
    if not job.is_first:
        yield
        return
    train_dir.mkdir(parents=True, exist_ok=True)
    with only_run(train_dir, "training", TrainingError):
        for folder in (train_dir, *train_dir.glob("*/")):
            remove_leftovers(folder)
        yield


def _check_shared(train_dir: Path, job: Job) -> None:
    """Check that all processes see a file that the first one creates."""
    if job.num_processes == 1:
        return
    mark = train_dir / f".job-{secrets.token_hex(4)}"
    if job.is_first:
        train_dir.mkdir(parents=True, exist_ok=True)
        for path in (*train_dir.glob(".job-*"), mark):
            path.unlink(missing_ok=True)
        mark.touch()
    try:
        job.check_same_folder(
            str(train_dir), lambda: str(sorted(path.name for path in train_dir.glob(".job-*")))
        )
        job.wait_for_all("shared folder")
    finally:
        if job.is_first:
            mark.unlink(missing_ok=True)


def list_files(paths: Iterable[Path]) -> str:
    """Describe files by folder, name and size."""
    found = []
    for path in paths:
        with suppress(FileNotFoundError):  # deleted since it was listed
            found.append((path.parent.name, path.name, path.stat().st_size))
    return str(sorted(found))


# --- Starting and resuming -----------------------------------------------------------------------


def start_stage(run: Run, stage: int) -> tuple[StageState, Checkpoint]:
    """Load the network with which a stage starts or continues.

    A stage continues from its last epoch (``resume.keras``) or, without this file, from its best
    checkpoint. A new stage starts from the best checkpoint of the previous stage, but a new stage 0
    starts from initial weights. If a stage continues, the files of later stages are deleted,
    because these stages started from its best checkpoint so far.

    Returns
    -------
    state : StageState
        Progress of the stage.
    checkpoint : Checkpoint
        Network to train, and the metadata that the stage's checkpoints will have.

    Raises
    ------
    UsageError, TrainingError, CheckpointError
        There is no checkpoint to start from, or the checkpoint does not fit the dataset or the
        options.
    """
    from model import build_network

    run.check_folder()
    stage_dir = run.stage_dir(stage)
    own, state = find_state(stage_dir, run.options)
    if own is None and stage == 0:
        network = build_network(run.config, run.options.seed)
        dataset = run.dataset
        return StageState(), Checkpoint(network, run.config, dataset.tags, dataset.sample_rate)
    if own is None:
        path, state = _previous_best(run, stage)
        checkpoint = _load_for(run, path)
        _apply_config(run, checkpoint)
        return state, checkpoint
    checkpoint = _load_for(run, own)
    if state is None:
        raise TrainingError(
            f"{own}: has no training state, so the stage cannot resume from this file: to start a "
            "stage from its weights, put the file in the folder of the previous stage"
        )
    if not state.finished:
        if own.name != RESUME_NAME:
            run.job.say(
                f"stage {stage}: {stage_dir} has no {RESUME_NAME}: continuing from {own.name} at "
                f"epoch {state.epoch + 1}, with zero momentum"
            )
        elif state.epochs_without_improvement:
            best_checkpoint(stage_dir, state)  # raise before training, not after it
        _apply_config(run, checkpoint)
        _delete_later(run, stage, checkpoint)
    if state.history:
        run.job.write(checkpoint.network, lambda: _complete_files(run, stage, state, checkpoint))
    return state, checkpoint


def _previous_best(run: Run, stage: int) -> tuple[Path, StageState]:
    """Return the checkpoint from which a new stage starts, and the state of the new stage."""
    previous_dir = run.stage_dir(stage - 1)
    found, previous = find_state(previous_dir, run.options)
    if found is None:
        raise UsageError(
            f"stage {stage} starts from the best checkpoint of stage {stage - 1}, and "
            f"{previous_dir} has none: use --initial-stage {stage - 1}"
        )
    path = best_checkpoint(previous_dir, previous)
    return path, StageState(start_loss=previous.best_loss if previous else None)


def _delete_later(run: Run, stage: int, checkpoint: Checkpoint) -> None:
    later = [run.stage_dir(number) for number in list_stages(run.train_dir) if number > stage]
    if later:
        names = ", ".join(map(str, later))
        run.job.say(
            f"stage {stage}: training continues: deleting {names}, trained from its earlier best "
            "checkpoint"
        )
        run.job.write(checkpoint.network, lambda: [delete_stage(folder) for folder in later])


def _load_for(run: Run, path: Path) -> Checkpoint:
    """Load a checkpoint; check that the checkpoint fits the dataset and the options."""
    checkpoint = load_for_dataset(path, run.dataset, run.job.say)
    is_published = path.suffix == ".hdf5"
    different = [
        f"{name} {getattr(checkpoint.config, name)!r}, now {value!r}"
        for name, value in run.config.to_json().items()
        if getattr(checkpoint.config, name) != value
        and name not in (_NOT_IN_HDF5 if is_published else _CHANGEABLE)
    ]
    if different:
        raise UsageError(
            f"{run.train_dir}: contains checkpoints of another network ({'; '.join(different)}): "
            "use the same options or another --train-dir"
        )
    return checkpoint


def _apply_config(run: Run, checkpoint: Checkpoint) -> None:
    """Rebuild a checkpoint's network if dropout or weight decay have changed."""
    from model import build_network

    if checkpoint.config == run.config:
        return
    network = build_network(run.config)
    network.set_weights(checkpoint.network.get_weights())
    checkpoint.network, checkpoint.config = network, run.config


# --- Writing -------------------------------------------------------------------------------------


@contextmanager
def epoch_writer(
    run: Run, stage: int, checkpoint: Checkpoint, trainer: "keras.Model", history: list[dict]
) -> Iterator[Callable[[StageState], None]]:
    """Open the folder of a stage and yield a function that writes a finished epoch."""
    stage_dir = run.stage_dir(stage)
    events = None
    if run.job.is_first:
        stage_dir.mkdir(parents=True, exist_ok=True)
        events = EventLog(stage_dir, history)

    def write_files(state: StageState) -> None:
        # Crash safety: write resume.keras first. Everything else can be rebuilt from it.
        checkpoints.save(stage_dir / RESUME_NAME, checkpoint, trainer)
        _complete_files(run, stage, state, checkpoint)
        events.write(state.history[-1])

    def write_epoch(state: StageState) -> None:
        # A finite loss does not exclude it: batch normalisation divides by infinite variances.
        weights = checkpoint.network.get_weights()
        if not run.job.of_first(all(np.isfinite(array).all() for array in weights)):
            raise TrainingError(
                f"weights are NaN or infinite after epoch {state.epoch}: a lower --lr may help; "
                "the best checkpoint is kept"
            )
        options = asdict(run.options)
        checkpoint.training = {"stage": stage, "state": asdict(state), "options": options}
        run.job.write(checkpoint.network, lambda: write_files(state))

    yield write_epoch
    if events:
        events.close()


def _complete_files(run: Run, stage: int, state: StageState, checkpoint: Checkpoint) -> None:
    """Write the history, the picture and, if the last epoch is the best, its checkpoint."""
    stage_dir = run.stage_dir(stage)
    best = stage_dir / checkpoints.checkpoint_name(state.epoch, state.best_loss)
    if state.epochs_without_improvement == 0 and not best.exists():
        checkpoints.save(best, checkpoint)
    write_history(stage_dir / HISTORY_NAME, state.history)
    clips = run.dataset.splits["val"].num_clips
    update_picture(run.train_dir, describe(stage_dir, run.dataset.path, run.dataset.tags, clips))
