"""The state of a stage: start or resume a stage, and write the files of an epoch."""

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
from toolkit.signals import StopRequest
from toolkit.training.devices import Job
from toolkit.training.history import HISTORY_NAME, EventLog, update_picture, write_history
from toolkit.training.options import TrainingOptions
from toolkit.training.state import RESUME_NAME, StageState, published_state, read_state

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
    """Find where a stage starts.

    A stage resumes from its last epoch (``resume.keras``) or, without this file, from its best
    checkpoint. A new stage starts from the best checkpoint of the previous stage, but a new stage 0
    starts from initial weights.

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
    own = stage_dir / RESUME_NAME
    if not own.exists():
        own = checkpoints.find_best(stage_dir)
    if own is None and stage == 0:
        network = build_network(run.config, run.options.seed)
        dataset = run.dataset
        return StageState(), Checkpoint(network, run.config, dataset.tags, dataset.sample_rate)
    path = own or _previous_best(run, stage)
    checkpoint = _load_for(run, path)
    state = StageState()
    if own and own.suffix == ".hdf5":
        state = published_state(own)
        run.job.say(
            f"stage {stage}: {own} has no training history: continuing from its weights at epoch "
            f"{state.epoch + 1}, with zero momentum"
        )
    elif own:
        state = read_state(checkpoint, own)
        # The options may be stricter than those of the earlier run.
        state.finished |= state.is_over(run.options)
    if not state.finished:
        _apply_config(run, checkpoint, path)
    if state.history:
        run.job.write(checkpoint.network, lambda: _complete_files(run, stage, state, checkpoint))
    return state, checkpoint


def _previous_best(run: Run, stage: int) -> Path:
    previous_dir = run.stage_dir(stage - 1)
    best = checkpoints.find_best(previous_dir)
    if best is None:
        raise UsageError(
            f"stage {stage} starts from the best checkpoint of stage {stage - 1}, and "
            f"{previous_dir} has none: use --initial-stage {stage - 1}"
        )
    return best


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


def _apply_config(run: Run, checkpoint: Checkpoint, path: Path) -> None:
    """Rebuild a checkpoint's network if dropout or weight decay have changed."""
    from model import build_network

    if checkpoint.config == run.config:
        return
    if path.suffix != ".hdf5":
        for name in sorted(_CHANGEABLE):
            before, now = getattr(checkpoint.config, name), getattr(run.config, name)
            if before != now:
                run.job.say(
                    f"{path}: was trained with --{name.replace('_', '-')} {before:g}, continuing "
                    f"with {now:g}"
                )
    network = build_network(run.config)
    network.set_weights(checkpoint.network.get_weights())
    checkpoint.network, checkpoint.config = network, run.config


def resume_optimizer(run: Run, stage: int, checkpoint: Checkpoint, trainer: "keras.Model") -> None:
    """Restore the optimizer of a stage's last epoch, if there is one.

    Raises
    ------
    UsageError
        The stage was trained with momentum and the options switch momentum off, or the reverse.
    """
    path = run.stage_dir(stage) / RESUME_NAME
    if not path.exists():
        return
    # Without momentum, Keras stores no velocities.
    now = run.options.momentum
    before = checkpoint.training.get("options", {}).get("momentum", now)
    if bool(before) != bool(now):
        raise UsageError(
            f"{path.parent}: was trained with --momentum {before:g}, now {now:g}: use the same "
            "momentum or another --train-dir"
        )
    checkpoints.load_optimizer(path, trainer)


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
    update_picture(run.train_dir)
