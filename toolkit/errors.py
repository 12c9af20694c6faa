"""What can go wrong that a user can mend: one exception type per cause, with a one-line message.

Scripts turn any of them into that line on standard error and an exit status (``cli.run``);
everything else that is raised, but for what the operating system refuses, is a bug.
"""


class ToolkitError(Exception):
    """Base of every error whose message is meant for the user."""

    exit_status = 1


class UsageError(ToolkitError):
    """An option, or a combination of options, that cannot work."""

    exit_status = 2


class AnnotationsError(ToolkitError):
    """The table of clips and tags is missing or not what it should be."""


class AudioError(ToolkitError):
    """An audio file cannot be decoded."""


class ShardError(ToolkitError):
    """TFRecord shards are missing, damaged, or do not belong together."""


class BuildError(ToolkitError):
    """Building the shards could not go on."""


class CheckpointError(ToolkitError):
    """A model file cannot be read as one of our networks."""


class ExportError(ToolkitError):
    """A model cannot be written in another program's form."""


class TrainingError(ToolkitError):
    """Training could not go on."""


class Interrupted(ToolkitError):
    """A signal asked the program to end; the exit status says which, as shells do."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_status = 128 + signal_number
