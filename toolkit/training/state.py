"""The progress of a stage, and the stages in a folder; Keras is not needed."""

import math
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from toolkit.errors import TrainingError, UsageError
from toolkit.models import checkpoints
from toolkit.training.history import HISTORY_NAME, read_history
from toolkit.training.options import TrainingOptions

RESUME_NAME = "resume.keras"  # everything that is needed to continue after the last epoch
TEST_NAME = "test.json"  # test scores of a finished stage's best checkpoint


@dataclass
class StageState:
    """Progress of a stage after its last finished epoch."""

    epoch: int = -1
    best_loss: float = math.inf
    epochs_without_improvement: int = 0
    finished: bool = False
    history: list[dict] = field(default_factory=list)  # rows of training.csv
    start_loss: float | None = None  # lowest validation loss of the stage from which it started

    @property
    def best_epoch(self) -> int:
        return self.epoch - self.epochs_without_improvement

    def is_best(self, name: str) -> bool:
        """Return whether a checkpoint has the name of the best epoch."""
        try:
            epoch, loss = _parse_name(name)
        except ValueError:
            return False
        return epoch == self.best_epoch and abs(loss - self.best_loss) < 1e-4  # 4 digits in names

    def update(self, epoch: int, val_loss: float, options: TrainingOptions) -> bool:
        """Record the validation loss of an epoch.

        Returns
        -------
        bool
            Whether the loss is the lowest so far.
        """
        improved = val_loss < self.best_loss
        self.epoch = epoch
        self.best_loss = min(self.best_loss, val_loss)
        self.epochs_without_improvement = 0 if improved else self.epochs_without_improvement + 1
        self.finished = self.is_over(options)
        return improved

    def decide(self, options: TrainingOptions, before: dict) -> None:
        """Set `finished` for the options of this call; `before` are those of the last epoch.

        A finished stage goes on only if the patience or the maximum of epochs was raised: versions
        that counted patience as Keras 2.0.9 ended stages one epoch earlier.
        """
        limits = ("patience", "max_epochs")
        is_raised = any(getattr(options, name) > before.get(name, math.inf) for name in limits)
        self.finished = self.is_over(options) or (self.finished and not is_raised)

    def is_over(self, options: TrainingOptions) -> bool:
        """Return whether the options end the stage after its last epoch.

        Keras 2.0.5, which the published program used, ends training at the epoch after `patience`
        epochs without improvement. Keras 2.0.9 changed that to one epoch earlier.
        """
        return (
            self.epochs_without_improvement > options.patience
            or self.epoch + 1 >= options.max_epochs
        )


# --- Finding the stages of a folder --------------------------------------------------------------


def last_file(stage_dir: Path) -> Path | None:
    """Return ``resume.keras`` or, without this file, the best checkpoint of a stage, if any."""
    path = stage_dir / RESUME_NAME
    return path if path.exists() else checkpoints.find_best(stage_dir)


def find_state(stage_dir: Path, options: TrainingOptions) -> tuple[Path | None, StageState | None]:
    """Find where a stage continues.

    A stage continues from its last epoch (``resume.keras``) or, without this file, from its best
    checkpoint.

    Parameters
    ----------
    stage_dir : Path
        Folder of the stage.
    options : TrainingOptions
        Options of this call, which decide whether the stage is finished.

    Returns
    -------
    path : Path or None
        None if the folder has neither file.
    state : StageState or None
        Progress of the stage; None if the file contains none.
    """
    path = last_file(stage_dir)
    if path is None:
        return None, None
    if path.suffix == ".hdf5":
        return path, StageState(*_parse_name(path.name))
    training = checkpoints.read_description(path).get("training")
    state = _read_state(training)
    if state is None:
        return path, None
    if path.name != RESUME_NAME:
        # A stage that had ended, as its training.csv shows, no longer needs resume.keras.
        with suppress(OSError, ValueError, TypeError, KeyError, IndexError):
            rows = read_history(stage_dir / HISTORY_NAME)
            last, best = int(rows[-1]["epoch"]), min(rows, key=lambda row: row["val_loss"])
            num_worse = last - state.epoch
            ended = replace(state, epoch=last, epochs_without_improvement=num_worse, history=rows)
            if best["epoch"] == state.epoch and ended.is_over(options):
                state = ended
    state.decide(options, training.get("options", {}))
    return path, state


def _read_state(training: object) -> StageState | None:
    """Read the progress from the description of a checkpoint; None if it is missing or invalid."""
    try:
        state = StageState(**training["state"])
        numbers = [state.epoch, state.best_loss, state.epochs_without_improvement]
        numbers += [value for row in state.history for value in row.values()]
        is_valid = all(isinstance(value, int | float) for value in numbers)
    except (AttributeError, KeyError, TypeError):
        return None
    return state if is_valid else None


def _parse_name(name: str) -> tuple[int, float]:
    """Return the epoch and the validation loss in the name of a checkpoint."""
    epoch, loss = name.removeprefix("ckpt-e").rpartition(".")[0].split("-l")
    return int(epoch), float(loss)


def check_stages(train_dir: Path, options: TrainingOptions) -> bool:
    """Check that the stages in a folder belong together.

    Returns
    -------
    bool
        Whether all stages are finished.

    Raises
    ------
    UsageError
        A stage was trained from another stage than the one before it in the folder, or the folder
        contains the files of another stage.
    """
    stages = range(options.initial_stage, options.num_lr_decays)
    folders = [train_dir / str(stage) for stage in stages]
    found = [find_state(folder, options) for folder in folders]
    for stage, folder, (path, state) in zip(stages, folders, found, strict=True):
        if state is None or path.suffix == ".hdf5":
            continue
        of_stage = checkpoints.read_description(path)["training"].get("stage", stage)
        if of_stage != stage:
            raise UsageError(
                f"{path}: is a file of stage {of_stage}: restore {folder}, or delete it to train "
                "the stage again"
            )
    for number in range(1, len(folders)):
        before, folder, state = folders[number - 1], folders[number], found[number][1]
        path, earlier = found[number - 1]
        if state is None:
            continue
        what_to_do = f"restore {before}, use --initial-stage {folder.name}, or delete {folder}"
        if path is None:
            raise UsageError(
                f"{before}: no {RESUME_NAME} and no checkpoint, but {folder} was trained from its "
                f"best checkpoint: {what_to_do}"
            )
        if earlier and state.start_loss not in (None, earlier.best_loss):
            raise UsageError(
                f"{folder}: was trained from a checkpoint with validation loss "
                f"{state.start_loss:.6g}, but the lowest of {before} is {earlier.best_loss:.6g}: "
                f"{what_to_do}"
            )
    return all(state is not None and state.finished for _, state in found)


def best_checkpoint(stage_dir: Path, state: StageState | None) -> Path:
    """Return the best checkpoint of a stage; `state` is None if its progress is unknown.

    Raises
    ------
    TrainingError
        The folder does not contain the best checkpoint.
    """
    best = checkpoints.find_best(stage_dir)
    if best is None or (state and not state.is_best(best.name)):
        what = f" of epoch {state.best_epoch}, val_loss {state.best_loss:.4f}" if state else ""
        raise TrainingError(
            f"{stage_dir}: the best checkpoint{what} is missing, and {RESUME_NAME} contains only "
            "the last epoch: restore the checkpoint, or delete this folder to train the stage again"
        )
    return best


def list_stages(train_dir: Path) -> list[int]:
    """Return the numbers of the stages that have a checkpoint or ``resume.keras``."""
    folders = [path for path in train_dir.glob("*/") if path.name.isdecimal()]
    return sorted(int(path.name) for path in folders if last_file(path))


def delete_stage(stage_dir: Path) -> None:
    """Delete the files of a stage, and its folder if nothing else is in it."""
    for pattern in ("ckpt-*", RESUME_NAME, TEST_NAME, HISTORY_NAME, "events.out.tfevents.*"):
        for path in stage_dir.glob(pattern):
            path.unlink()
    with suppress(OSError):  # contains files of the user
        stage_dir.rmdir()
