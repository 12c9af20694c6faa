"""The progress of a stage, as its checkpoints record it."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from toolkit.errors import TrainingError
from toolkit.models.checkpoints import Checkpoint
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

    def is_over(self, options: TrainingOptions) -> bool:
        """Return whether the options end the stage after its last epoch.

        Keras 2.0.5, which the published program used, ends training at the epoch after `patience`
        epochs without improvement. Keras 2.0.9 changed that to one epoch earlier.
        """
        return (
            self.epochs_without_improvement > options.patience
            or self.epoch + 1 >= options.max_epochs
        )


def published_state(path: Path) -> StageState:
    """Read the progress of a stage from the file name of a published checkpoint."""
    epoch, loss = path.stem.removeprefix("ckpt-e").split("-l")
    return StageState(epoch=int(epoch), best_loss=float(loss))


def read_state(checkpoint: Checkpoint, path: Path) -> StageState:
    try:
        state = StageState(**checkpoint.training["state"])
        numbers = [state.epoch, state.best_loss, state.epochs_without_improvement]
        numbers += [value for row in state.history for value in row.values()]
        if not all(isinstance(value, int | float) for value in numbers):
            raise TypeError
        return state
    except (AttributeError, KeyError, TypeError):
        raise TrainingError(
            f"{path}: has no training state, so the stage cannot resume from this file: to start a "
            "stage from its weights, put the file in the folder of the previous stage"
        ) from None
