"""Messages and progress bars on stderr, and human-readable numbers."""

import sys
from pathlib import Path

from tqdm import tqdm


def say(message: str) -> None:
    """Print a line to stderr without breaking a progress bar; stdout is kept for results."""
    tqdm.write(message, file=sys.stderr)
    sys.stderr.flush()


def progress(iterable=None, **options) -> tqdm:
    """Show a progress bar on a terminal, or a line every 30 seconds in a log file.

    Parameters
    ----------
    iterable : iterable or None
        What to iterate over; None to call ``update`` by hand.
    **options
        As for ``tqdm.tqdm``.
    """
    # TQDM_COLOUR would put escape codes into logs, and colours where NO_COLOR is set.
    options = {"colour": None} | options
    if sys.stderr.isatty() or _is_notebook(sys.stderr):
        return tqdm(iterable, **options)
    return _LogProgress(iterable, **{"mininterval": 30, "maxinterval": 30, "ncols": 0} | options)


def _is_notebook(stream) -> bool:
    """Return whether a stream is a Jupyter cell, which can redraw lines like a terminal."""
    return type(stream).__module__ == "ipykernel.iostream"


class _LogProgress(tqdm):
    """Progress as whole lines, for a stderr that is a file or a pipe."""

    def display(self, msg=None, pos=None):
        # Print nothing for work that is finished before the first line is due, and not after each
        # line that tqdm.write prints.
        if self.n > self.initial and self._time() - self.last_print_t >= self.mininterval:
            sys.stderr.write(f"{self}\n")
            sys.stderr.flush()

    def clear(self, nolock=False):
        pass  # a printed line cannot be cleared

    def close(self):
        self.leave = False
        super().close()


def count(number: int, what: str) -> str:
    """Format a count, such as ``1 clip`` or ``15,250 clips``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Format a duration, such as ``8 s``, ``3 min 5 s`` or ``2 h 4 min``."""
    if seconds < 1:
        return "under 1 s"
    if round(seconds) < 3600:
        numbers, units = divmod(round(seconds), 60), ("min", "s")
    else:
        numbers, units = divmod(round(seconds / 60), 60), ("h", "min")
    parts = zip(numbers, units, strict=True)
    return " ".join(f"{number:,} {unit}" for number, unit in parts if number)


def size(num_bytes: int) -> str:
    """Format a size in decimal units, such as ``871 bytes``, ``3.4 MB`` or ``50 GB``."""
    if num_bytes < 1000:
        return count(num_bytes, "byte")
    value = float(num_bytes)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.5:
            return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"
    return f"{value / 1000:,.1f} TB"


def size_on_disk(*paths: str | Path) -> str:
    """Format the total size of files, and of all files in folders."""
    files = []
    for path in map(Path, paths):
        files += [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return size(sum(file.stat().st_size for file in files))
