"""The history of a training: ``training.csv``, TensorBoard events and ``training.png``."""

import csv
import time
from pathlib import Path

from toolkit import figures, messages
from toolkit.files import write_atomically
from toolkit.provenance import Provenance

HISTORY_NAME = "training.csv"
PICTURE_NAME = "training.png"  # shows all stages; is in the folder that contains their folders


def write_history(path: str | Path, history: list[dict[str, float]]) -> None:
    """Write ``training.csv``: one row per epoch."""
    lines = [",".join(history[0])]
    lines += [",".join(f"{value:.8g}" for value in row.values()) for row in history]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def read_history(path: str | Path) -> list[dict[str, float]]:
    """Read ``training.csv``: one dict per epoch."""
    with open(path, newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def plot_training(train_dir: str | Path, provenance: Provenance) -> Path:
    """Draw ``training.png`` from the ``training.csv`` of every stage.

    Parameters
    ----------
    train_dir : str or Path
        Folder that contains the folders of the stages, and to which the picture is written.
    provenance : Provenance
        Best checkpoint of the last stage, and the validation clips.

    Returns
    -------
    Path
        Path of the picture.
    """
    train_dir = Path(train_dir)
    histories = {
        int(path.parent.name): read_history(path)
        for path in train_dir.glob(f"*/{HISTORY_NAME}")
        if path.parent.name.isdecimal()
    }
    histories = {stage: histories[stage] for stage in sorted(histories) if histories[stage]}
    figures.plot_training(train_dir / PICTURE_NAME, provenance, histories)
    return train_dir / PICTURE_NAME


def update_picture(train_dir: Path, provenance: Provenance) -> None:
    """Draw ``training.png``; report an error without ending the training."""
    try:
        plot_training(train_dir, provenance)
    except Exception as error:
        reason = getattr(error, "strerror", None) or error
        messages.say(f"{train_dir / PICTURE_NAME}: cannot be drawn: {reason}")


class EventLog:
    """Writer of a stage's TensorBoard events: one point per epoch and column of the history.

    Parameters
    ----------
    stage_dir : Path
        Folder of the stage.
    history : list of dict
        Rows of the epochs so far. Rows that are missing from the folder's event files are written,
        because an earlier run may have been killed before it wrote them. Event files with epochs
        that will be trained again are deleted.
    """

    def __init__(self, stage_dir: Path, history: list[dict]):
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        paths = list(stage_dir.glob("events.out.tfevents.*"))
        written = {
            event.step
            for path in paths
            for event in EventFileLoader(str(path)).Load()
            if event.HasField("summary")
        }
        if written - {row["epoch"] for row in history}:
            written = set()
            for path in paths:
                path.unlink()
        self._writer = EventFileWriter(str(stage_dir))
        for row in history:
            if row["epoch"] not in written:
                self.write(row)

    def write(self, row: dict) -> None:
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
        """Flush and close the event file."""
        self._writer.close()
