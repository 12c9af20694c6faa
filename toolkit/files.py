"""Files that appear whole or not at all, and folders that one run at a time writes to."""

import errno
import fcntl
import os
import resource
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from toolkit import messages
from toolkit.errors import ToolkitError

_LOCK_NAME = ".lock"
_OTHER_FILES = 256  # open files that a process needs besides those it announces
# What file systems of several machines say that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def replaced_whole(path: str | Path, suffix: str = "") -> Iterator[Path]:
    """Give a temporary name beside a file; what was written there then becomes the file.

    Parameters
    ----------
    path : str or Path
        The file; an earlier one is replaced only by one that is complete and on the disk.
    suffix : str
        How the temporary name must end for the library that writes it.

    Raises
    ------
    OSError
        It cannot be written; the error names the file.
    """
    path = Path(path)
    # Of this writing alone: a process that was given up, on this host or another, may still be
    # writing the same file.
    writer = f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.name}.{writer}.tmp{suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # A write does not say where, and the temporary name says nothing to anyone.
        if error.filename is None or str(error.filename) == str(temporary):
            error.filename = str(path)
            error.filename2 = None
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def written_whole(path: str | Path) -> Iterator[BinaryIO]:
    """Give a temporary file to write, and give it its name when all is written and flushed."""
    with replaced_whole(path) as temporary, open(temporary, "wb") as file:
        yield file


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to the disk, then give it its name."""
    with written_whole(path) as file:
        file.write(content)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of runs that were killed; only where no other run writes."""
    for temporary in folder.glob(".*.tmp*"):
        temporary.unlink(missing_ok=True)


@contextmanager
def only_run(folder: Path, what: str, error: type[ToolkitError]) -> Iterator[None]:
    """Hold a folder's lock; it is freed even when the process is killed.

    Parameters
    ----------
    folder : Path
        Which; it is there.
    what : str
        What runs: a build, a training.
    error : type of ToolkitError
        What to raise where another one runs there.
    """
    with open(folder / _LOCK_NAME, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise error(f"{folder}: another {what} is at work here") from None
        except OSError as reason:
            if reason.errno not in _NO_LOCKS:
                raise
            messages.say(
                f"{folder}: cannot be locked ({reason.strerror}): start no second {what} in it"
            )
        yield


def allow_open_files(num_files: int) -> None:
    """Raise this process's limit of open files, if it may, for this many additional files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = num_files + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
