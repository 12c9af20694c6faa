"""The command line of all scripts: options, errors and exit status."""

import argparse
import dataclasses
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from toolkit.errors import ToolkitError, UsageError
from toolkit.messages import say
from toolkit.model_kinds import model_kind
from toolkit.signals import interrupts_recorded

# JAX, PyTorch and XLA have no common exception type for a lack of memory, only these messages.
_OUT_OF_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|CUDA out of memory|can't allocate memory|ran out of memory|"
    r"Out of memory (while trying to allocate|allocating)|[Ff]ailed to allocate"
)


# --- Options -------------------------------------------------------------------------------------


def option(
    default,
    help: str,
    *,
    group: str,
    flag: str | None = None,
    shown: str | None = None,
    **argparse_options,
):
    """Declare a command line option as a field of a dataclass.

    Parameters
    ----------
    default : object
        Default value. True or False declares a switch that sets the opposite.
    help : str
        Help line; the default is appended.
    group : str
        Title of the option's group in ``--help``.
    flag : str or None
        Name on the command line; None for the field's name, such as ``--batch-size``.
    shown : str or None
        Description of the default in the help line; None for its value.
    **argparse_options
        ``type``, ``metavar``, ``choices`` and ``nargs``, as for ``ArgumentParser.add_argument``.
    """
    argparse_options |= {"help": help, "group": group, "flag": flag, "shown": shown}
    return dataclasses.field(default=default, metadata=argparse_options)


def add_options(
    parser: argparse.ArgumentParser, *options_classes: type, without: Sequence[str] = ()
) -> None:
    """Add the options that dataclasses declare with `option`, in their groups.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        See `new_parser`.
    *options_classes : type
        Dataclasses; fields without `option` are skipped.
    without : sequence of str
        Names of fields to skip.
    """
    groups = {group.title: group for group in parser._action_groups}
    for field in (field for cls in options_classes for field in dataclasses.fields(cls)):
        metadata = dict(field.metadata)
        if not metadata or field.name in without:
            continue
        title, flag, shown = (metadata.pop(name) for name in ("group", "flag", "shown"))
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        if isinstance(field.default, bool):
            metadata["action"] = "store_false" if field.default else "store_true"
            shown = "off"
        elif isinstance(field.default, float):
            shown = shown or f"{field.default:g}"
        elif shown is None:
            shown = "none" if field.default is None else field.default
        metadata["help"] += f" (default: {shown})"
        groups[title].add_argument(
            flag or f"--{field.name.replace('_', '-')}",
            dest=field.name,
            default=field.default,
            **metadata,
        )


def read_options(options_class: type, arguments: argparse.Namespace):
    """Create an options dataclass from parsed arguments."""
    names = [field.name for field in dataclasses.fields(options_class) if field.metadata]
    return options_class(**{name: getattr(arguments, name) for name in names})


def new_parser(description: str, examples: str) -> argparse.ArgumentParser:
    """Create a parser in the style of all scripts; `add_general` completes it.

    Parameters
    ----------
    description : str
        What the script does, in one or two sentences.
    examples : str
        Example commands, shown at the end of ``--help``.
    """
    return argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )


def add_general(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--help`` and ``--verbose`` as the last group and return the parser."""
    add = parser.add_argument_group("general").add_argument
    add("-h", "--help", action="help", help="show this help and exit")
    add("--verbose", action="store_true", help="show the traceback of an error (default: off)")
    return parser


def add_model(
    group: argparse._ArgumentGroup,
    name: str = "model_path",
    what: str = "a .keras, .hdf5 or .h5 file, or a stage's folder (its best checkpoint is used)",
    **options,
) -> None:
    """Add the positional argument for a model; `check_model` verifies that it exists.

    Parameters
    ----------
    group : argparse group
        Group to add to.
    name : str
        Name of the attribute.
    what : str
        Help line.
    **options
        As for ``add_argument``.
    """
    group.add_argument(name, metavar="MODEL", help=what, **options)


def add_tags(group: argparse._ArgumentGroup) -> None:
    """Add ``--tags``, the names of outputs for models whose file contains none."""
    group.add_argument(
        "--tags",
        metavar="FILE",
        help="names of the model's outputs, one per line, or a dataset's manifest.json (default: "
        "the names in the model file, or MagnaTagATune's 50 tags if the file contains none)",
    )


def check_model(path: str | Path) -> str:
    """Check that a model exists, before the slow imports, and return its kind.

    Raises
    ------
    UsageError
        There is no such file or folder, or the folder contains no checkpoint.
    CheckpointError
        The file is of a kind that cannot be read (see `model_kind`).
    """
    if not os.path.exists(path):
        raise UsageError(f"{path}: no such model file")
    kind = model_kind(path)
    if kind != "folder" or any(Path(path).glob("ckpt-*")):
        return kind
    folders = {checkpoint.parent.name for checkpoint in Path(path).glob("*/ckpt-*")}
    if not folders:
        raise UsageError(f"{path}: no checkpoint in this folder: expected ckpt-*.keras or .hdf5")
    *others, last = sorted(folders, key=lambda name: (len(name), name))  # numbers in order
    stages = f"stages {', '.join(others)} and {last}" if others else f"stage {last}"
    raise UsageError(f"{path}: contains {stages}: use {os.path.join(path, last)}")


def check_output(
    path: str | Path, option: str = "", is_folder: bool = False, replaces_folder: bool = False
) -> None:
    """Check that a file or folder can be written, before the slow part of a script.

    Parameters
    ----------
    path : str or Path
        File, or folder that is created if it does not exist.
    option : str
        Option that gives the path, for the message; empty for a positional argument.
    is_folder : bool
        Whether the path is that of a folder to write to.
    replaces_folder : bool
        Whether an existing folder of this name is replaced.

    Raises
    ------
    UsageError
        The path's folder does not exist, is not a folder, or may not be written to, or the path of
        a file is a folder.
    """
    path_of_option = f"{option} {path}".lstrip()
    folder = Path(path).absolute()
    if not is_folder:
        folder = folder.parent
    while is_folder and not os.path.lexists(folder):
        folder = folder.parent
    if not os.path.lexists(folder):
        raise UsageError(f"{path_of_option}: the folder {folder} does not exist")
    if not folder.is_dir():
        raise UsageError(f"{path_of_option}: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{path_of_option}: no permission to write to the folder {folder}")
    if os.path.isdir(path) and not is_folder and not replaces_folder:
        raise UsageError(f"{path_of_option}: is a folder: choose another name")


def add_data_dir(
    group: argparse._ArgumentGroup, what: str = "folder of the dataset, which contains tfrecord/"
) -> None:
    """Add ``--data-dir``; `what` is its help line without the default."""
    group.add_argument(
        "--data-dir", metavar="PATH", default="./dataset", help=f"{what} (default: ./dataset)"
    )


def add_batch_size(group: argparse._ArgumentGroup, default: int) -> None:
    """Add ``--batch-size``, in segments."""
    group.add_argument(
        "--batch-size",
        metavar="N",
        type=positive_int,
        default=default,
        help=f"segments per batch (default: {default})",
    )


JIT_HELP = "compile with XLA; auto: always with JAX; with TensorFlow, se and basic on one GPU"


def positive_int(text: str) -> int:
    """Parse an integer of at least 1."""
    return _number(int, text, lambda value: value >= 1, "a whole number of at least 1")


def non_negative_int(text: str) -> int:
    """Parse an integer of at least 0."""
    return _number(int, text, lambda value: value >= 0, "a whole number of at least 0")


def positive_float(text: str) -> float:
    """Parse a finite number above 0."""
    return _number(float, text, lambda value: 0 < value < float("inf"), "a number above 0")


def non_negative_float(text: str) -> float:
    """Parse a finite number of at least 0."""
    return _number(float, text, lambda value: 0 <= value < float("inf"), "a number of at least 0")


def seconds_or_none(text: str) -> float | None:
    """Parse a finite number of seconds above 0, or ``none``."""
    if text == "none":
        return None
    wanted = "a number of seconds above 0, or none"
    return _number(float, text, lambda value: 0 < value < float("inf"), wanted)


def rate(text: str) -> float:
    """Parse a rate in [0, 1), such as a dropout rate or a momentum."""
    return _number(float, text, lambda value: 0 <= value < 1, "a number from 0 to below 1")


def percentage(text: str) -> float:
    """Parse a number from 0 to 100."""
    return _number(float, text, lambda value: 0 <= value <= 100, "a number from 0 to 100")


def _number(kind: type, text: str, is_valid: Callable, wanted: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not is_valid(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


# --- Running a script ----------------------------------------------------------------------------


def run(script: Callable[[argparse.Namespace], int | None], arguments: argparse.Namespace) -> int:
    """Run a script's function; turn its errors into one line on stderr and an exit status.

    Parameters
    ----------
    script : callable
        Takes the parsed arguments; returns an exit status, or None for success.
    arguments : argparse.Namespace
        Parsed command line.

    Returns
    -------
    int
        0 for success, 2 for usage errors, 128 + n after signal n, 1 for other errors.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # any tag can be printed, as on stderr
    with interrupts_recorded() as was_interrupted:
        try:
            _check_not_empty(arguments)
            return script(arguments) or 0
        except BrokenPipeError:
            # The program that reads stdout, such as head, has exited. Redirect stdout so that the
            # interpreter's final flush raises no error.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except BaseException as error:
            # A library can replace the exception of Ctrl-C by another, such as ImportError.
            found = (130, "interrupted") if was_interrupted() else _describe(error, arguments)
            if found is None:
                raise
            if arguments.verbose:
                traceback.print_exception(error)
            exit_status, message = found
            say(f"{Path(sys.argv[0]).name}: error: {message}")
            return exit_status


def _check_not_empty(arguments: argparse.Namespace) -> None:
    # Such as "$REPORT" of a shell in which the variable is not set: not the current folder.
    for name, value in vars(arguments).items():
        if "" in (value if isinstance(value, list) else [value]):
            raise UsageError(f"{name.replace('_', '-')}: the value is empty")


def _describe(error: BaseException, arguments: argparse.Namespace) -> tuple[int, str] | None:
    """Return exit status and message of an error, or None if the error is a bug."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if not isinstance(error, ToolkitError | OSError):
        is_out_of_memory = _is_out_of_memory(error)
        return (1, f"out of memory{_memory_hint(arguments)}") if is_out_of_memory else None
    message = describe_os_error(error) if isinstance(error, OSError) else str(error)
    return getattr(error, "exit_status", 1), message


def _is_out_of_memory(error: Exception) -> bool:
    """Recognise out-of-memory errors of Python and the backends by type name and message."""
    if isinstance(error, MemoryError):
        return True
    if type(error).__name__ in ("ResourceExhaustedError", "OutOfMemoryError"):
        return True
    return bool(_OUT_OF_MEMORY.search(str(error)))


def _memory_hint(arguments: argparse.Namespace) -> str:
    for name in ("batch_size", "num_workers"):
        if hasattr(arguments, name):
            value = getattr(arguments, name)
            now = "" if value is None else f" (now {value})"
            return f": try a smaller --{name.replace('_', '-')}{now}"
    return ""


def describe_os_error(error: OSError) -> str:
    """Describe an error of the operating system in one line that names the file."""
    # Libraries may raise OSError with only a message, sometimes of several lines.
    reason = error.strerror or str(next(iter(error.args), "")) or type(error).__name__
    reason = reason.strip().splitlines()[0]
    return f"{error.filename}: {reason}" if error.filename else reason
