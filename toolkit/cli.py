"""What scripts share at the command line: options and their types, quiet libraries, progress, how
durations and sizes are said, errors, exit status.
"""

import argparse
import importlib.util
import json
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from toolkit import minimum_python  # noqa: F401  # first: the rest needs a later Python
from toolkit.errors import ToolkitError, UsageError

from tqdm import tqdm

# Keras's backends, and what to install for each.
_BACKENDS = {
    "tensorflow": "requirements.txt",
    "jax": "requirements/backends.txt",
    "torch": "requirements/backends.txt",
}

# How JAX, PyTorch and XLA say it, whose errors are of no type of their own.
_OUT_OF_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|CUDA out of memory|can't allocate memory|ran out of memory|"
    r"Out of memory (while trying to allocate|allocating)|[Ff]ailed to allocate"
)


# --- Options -------------------------------------------------------------------------------------


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


# --- Libraries and talk --------------------------------------------------------------------------


def import_quietly(*modules: str) -> None:
    """Import libraries without the chatter that a user cannot act on.

    Parameters
    ----------
    *modules : str
        Names of modules, such as ``keras``, that talk while they are first imported.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    # TensorFlow warns of tracing again for each stage's best checkpoint, which is meant.
    for name in ("absl", "tensorflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with chatter_held():
        for module in modules:
            importlib.import_module(module)


def import_keras() -> None:
    """Import Keras and its backend quietly; `UsageError` where the backend cannot be had."""
    backend = os.environ.get("KERAS_BACKEND") or _configured_backend()
    if backend not in _BACKENDS:
        raise UsageError(f"KERAS_BACKEND={backend}: expected one of {', '.join(_BACKENDS)}")
    # Keras asks for its backend by importing it.
    if importlib.util.find_spec(backend) is None:
        raise UsageError(
            f"{backend}, Keras's backend here, is not installed: python -m pip install -r "
            f"{_BACKENDS[backend]}, or name another by KERAS_BACKEND ({', '.join(_BACKENDS)})"
        )
    import_quietly("keras")


def _configured_backend() -> str:
    """Read Keras's own file of settings as Keras does, where no environment variable says more."""
    folder = Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser()
    try:
        return json.loads((folder / "keras.json").read_text())["backend"]
    except (OSError, ValueError, KeyError, TypeError):
        return "tensorflow"


@contextmanager
def chatter_held() -> Iterator[None]:
    """Hold back what libraries write to standard error; give it out only after an exception."""
    # TensorFlow's C++ side writes to the descriptor itself before it reads any setting.
    with tempfile.TemporaryFile() as said:
        sys.stderr.flush()
        standard_error = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException:
            sys.stderr.flush()
            said.seek(0)
            os.write(standard_error, said.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(standard_error, 2)
            os.close(standard_error)


def progress(iterable=None, **options) -> tqdm:
    """Show progress on standard error: live on a terminal, a line now and then in a log.

    Parameters
    ----------
    iterable : iterable or None
        What to go through; None to call ``update`` by hand.
    **options
        As for ``tqdm.tqdm``.
    """
    # TQDM_COLOUR would put escape codes into logs, and colour where NO_COLOR is set.
    options = {"colour": None} | options
    if sys.stderr.isatty() or _is_notebook(sys.stderr):
        return tqdm(iterable, **options)
    return _LogProgress(iterable, **{"mininterval": 30, "maxinterval": 30, "ncols": 0} | options)


def _is_notebook(stream) -> bool:
    """Tell Jupyter's cells, no terminal, but they draw a line again as one does."""
    return type(stream).__module__ == "ipykernel.iostream"


class _LogProgress(tqdm):
    """Progress as whole lines, for standard error that is a file or a pipe."""

    def display(self, msg=None, pos=None):
        # Nothing is said at the start, nor of work that is done before the first line is due.
        if self.n > self.initial and self._time() - self.start_t >= self.mininterval:
            sys.stderr.write(f"{self}\n")
            sys.stderr.flush()

    def clear(self, nolock=False):
        pass  # a line that is written stays

    def close(self):
        self.leave = False
        super().close()


def count(number: int, what: str) -> str:
    """Say how many, as ``1 clip`` or ``15,250 clips``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Say a time in the two units that matter, as ``8 s``, ``3 min 5 s`` or ``2 h 4 min``."""
    if seconds < 1:
        return "under 1 s"
    if round(seconds) < 3600:
        numbers, units = divmod(round(seconds), 60), ("min", "s")
    else:
        numbers, units = divmod(round(seconds / 60), 60), ("h", "min")
    parts = zip(numbers, units, strict=True)
    return " ".join(f"{number:,} {unit}" for number, unit in parts if number)


def size(num_bytes: int) -> str:
    """Say a number of bytes, as ``871 bytes``, ``3.4 MB`` or ``50 GB``, by thousands."""
    if num_bytes < 1000:
        return count(num_bytes, "byte")
    value = float(num_bytes)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.5:
            return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"
    return f"{value / 1000:,.1f} TB"


def size_on_disk(*paths: str | Path) -> str:
    """Say the size of files, and of all files in folders."""
    files = []
    for path in map(Path, paths):
        files += [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return size(sum(file.stat().st_size for file in files))


def say(message: str) -> None:
    """Talk to the person at the terminal; standard output is kept for data."""
    tqdm.write(message, file=sys.stderr)
    sys.stderr.flush()


# --- Running a stage -----------------------------------------------------------------------------


def end_with_parent() -> None:
    """End this worker process when the one that started it is gone, which may be killed."""

    def end() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


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
