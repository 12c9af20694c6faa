"""Errors that a user can fix: one exception type per cause, each with a one-line message.

`toolkit.cli.run` prints the message to stderr and sets the exit status. Any other exception is a
bug, except for errors of the operating system.
"""


class ToolkitError(Exception):
    """Base class of errors whose message is for the user."""

    exit_status = 1


class UsageError(ToolkitError):
    """An option, or a combination of options, is invalid."""

    exit_status = 2


class AnnotationsError(ToolkitError):
    """The table of clips and tags is missing or invalid."""


class AudioError(ToolkitError):
    """An audio file cannot be decoded."""


class ShardError(ToolkitError):
    """TFRecord shards are missing, are damaged, or belong to different datasets."""


class BuildError(ToolkitError):
    """Building shards failed."""


class CheckpointError(ToolkitError):
    """A model file cannot be read as one of the paper's networks."""


class ExportError(ToolkitError):
    """A model cannot be exported."""


class TrainingError(ToolkitError):
    """Training failed."""


class Interrupted(ToolkitError):
    """A signal stopped the program; the exit status is 128 + its number, as in shells."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_status = 128 + signal_number
