"""What scripts share on the command line: options, errors and exit status."""

import argparse
import dataclasses
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import toolkit.minimum_python  # noqa: F401  # first: the rest needs a newer Python
from toolkit.errors import ToolkitError, UsageError
from toolkit.messages import say

# JAX, PyTorch and XLA report a lack of memory by messages; they have no common error type.
_OUT_OF_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|CUDA out of memory|can't allocate memory|ran out of memory|"
    r"Out of memory (while trying to allocate|allocating)|[Ff]ailed to allocate"
)


# --- Options -------------------------------------------------------------------------------------


def option(default, help: str, *, group: str, flag: str | None = None, **argparse_options):
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
    **argparse_options
        ``type``, ``metavar`` and ``choices``, as for ``ArgumentParser.add_argument``.
    """
    argparse_options |= {"help": help, "group": group, "flag": flag}
    return dataclasses.field(default=default, metadata=argparse_options)


def add_options(parser: argparse.ArgumentParser, *options_classes: type) -> None:
    """Add the options that dataclasses declare with `option`, in their groups.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        See `new_parser`.
    *options_classes : type
        Dataclasses; fields without `option` are skipped.
    """
    groups = {group.title: group for group in parser._action_groups}
    for field in (field for cls in options_classes for field in dataclasses.fields(cls)):
        metadata = dict(field.metadata)
        if not metadata:
            continue
        title, flag = metadata.pop("group"), metadata.pop("flag")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        if isinstance(field.default, bool):
            metadata["action"] = "store_false" if field.default else "store_true"
            shown = "off"
        elif isinstance(field.default, float):
            shown = f"{field.default:g}"
        else:
            shown = "none" if field.default is None else f"{field.default}"
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
    """Make a parser with the look that every script has; `add_general` completes it.

    Parameters
    ----------
    description : str
        What the script does, in a sentence or two.
    examples : str
        Commands that work as typed, shown at the end of ``--help``.
    """
    return argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )


def add_general(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--help`` and ``--verbose``, a group that stands last, and give the parser back."""
    add = parser.add_argument_group("general").add_argument
    add("-h", "--help", action="help", help="show this help and end")
    add("--verbose", action="store_true", help="on an error, show the traceback too (default: off)")
    return parser


def add_model(
    group: argparse._ArgumentGroup,
    name: str = "model_path",
    what: str = "a .keras, .hdf5 or .h5 file, or a stage's folder for its best checkpoint",
    **options,
) -> None:
    """Add the model to read, a positional argument; `check_model` looks whether it is there.

    Parameters
    ----------
    group : argparse group
        Where.
    name : str
        Of the attribute.
    what : str
        Its help line.
    **options
        As for ``add_argument``.
    """
    group.add_argument(name, metavar="MODEL", help=what, **options)


def check_model(path: str | Path) -> None:
    """Refuse a model that is not there, before the slow imports.

    Raises
    ------
    UsageError
        There is no such file or folder.
    """
    if not Path(path).exists():
        raise UsageError(f"{path}: no such model file")


def add_data_dir(
    group: argparse._ArgumentGroup, what: str = "folder of the dataset, which holds tfrecord/"
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
        help=f"segments a batch (default: {default})",
    )


def add_jit(group: argparse._ArgumentGroup) -> None:
    """Add ``--jit``, whether XLA compiles the network."""
    group.add_argument(
        "--jit",
        choices=("auto", "on", "off"),
        default="auto",
        help="compile the network by XLA; auto does where it was measured to pay (default: auto)",
    )


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
    """Parse a share in [0, 1), such as a dropout rate or a momentum."""
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


# --- Running a stage -----------------------------------------------------------------------------


def run(stage: Callable[[argparse.Namespace], int | None], arguments: argparse.Namespace) -> int:
    """Run a stage and turn its errors into one line and an exit status.

    Parameters
    ----------
    stage : callable
        Takes the parsed arguments, returns an exit status or None for success.
    arguments : argparse.Namespace
        The parsed command line.

    Returns
    -------
    int
        0 for success, 2 for usage errors, 1 for the rest, 128 + n after signal n.
    """
    try:
        return stage(arguments) or 0
    except ToolkitError as error:
        return _report(error, str(error), error.exit_status, arguments.verbose)
    except KeyboardInterrupt as error:
        return _report(error, "interrupted", 130, arguments.verbose)
    except BrokenPipeError:
        # The reader of our output (head, say) has left; that is its right. Standard output is
        # pointed elsewhere so that the interpreter's last flush does not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _report(error, describe_os_error(error), 1, arguments.verbose)
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        return _report(error, f"out of memory{_advice(arguments)}", 1, arguments.verbose)


def _is_out_of_memory(error: Exception) -> bool:
    """Tell Python's and the backends' errors, each of a type of its own, by name and message."""
    if isinstance(error, MemoryError):
        return True
    if type(error).__name__ in ("ResourceExhaustedError", "OutOfMemoryError"):
        return True
    return bool(_OUT_OF_MEMORY.search(str(error)))


def _advice(arguments: argparse.Namespace) -> str:
    for option in ("batch_size", "num_workers"):
        if hasattr(arguments, option):
            value = getattr(arguments, option)
            now = "" if value is None else f" (now {value})"
            less = "a smaller" if option == "batch_size" else "a lower"
            return f": {less} --{option.replace('_', '-')}{now} may help"
    return ""


def describe_os_error(error: OSError) -> str:
    """Say an operating system's error in one line that names the file."""
    # Libraries raise it with a message of their own, of several lines perhaps.
    reason = error.strerror or str(next(iter(error.args), "")) or type(error).__name__
    reason = reason.strip().splitlines()[0]
    return f"{error.filename}: {reason}" if error.filename else reason


def _report(error: BaseException, message: str, exit_status: int, verbose: bool) -> int:
    if verbose:
        traceback.print_exception(error)
    say(f"{Path(sys.argv[0]).name}: error: {message}")
    return exit_status
