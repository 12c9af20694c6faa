"""Atomic writes (files appear complete or not at all), lists of files, and locks of folders."""

import errno
import fcntl
import os
import resource
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from toolkit import messages
from toolkit.errors import ToolkitError

_LOCK_NAME = ".lock"
_OTHER_FILES = 256  # open files that a process needs besides those given to allow_open_files
# Errors of network file systems that do not support locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def replaced_whole(path: str | Path, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary path beside a file; on success, rename the temporary file to the file.

    Parameters
    ----------
    path : str or Path
        Path of the file, or of a folder if the caller makes a folder of the temporary path. What
        exists is replaced only after the new content is on the disk.
    suffix : str
        Suffix of the temporary path, for libraries that require one.

    Raises
    ------
    OSError
        The file cannot be written; the error names the file.
    """
    path = Path(path)
    # Unique per call: an abandoned process, on this host or another, may still be writing the
    # same file.
    writer = f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.name}.{writer}.tmp{suffix}")
    try:
        yield temporary
        if temporary.is_dir():
            _replace_folder(temporary, path)
        else:
            _flush_to_disk(temporary)
            os.replace(temporary, path)
    except OSError as error:
        # The error of a failed write names no file, or a temporary file, which users do not know.
        if error.filename is None or str(error.filename).startswith(str(temporary)):
            error.filename = str(path)
            error.filename2 = None
        raise
    except Exception as error:
        # TensorFlow reports a full disk like a lack of memory.
        no_space = os.strerror(errno.ENOSPC)
        if no_space not in str(error):
            raise
        raise OSError(errno.ENOSPC, no_space, str(path)) from error
    finally:
        _remove(temporary)


def _replace_folder(temporary: Path, path: Path) -> None:
    """Rename a folder, and remove the one that had the name."""
    for file in temporary.rglob("*"):
        if file.is_file():
            _flush_to_disk(file)
    earlier = temporary.with_name(f"{temporary.name}.earlier")
    with suppress(FileNotFoundError):
        os.rename(path, earlier)  # unlike a file, a folder cannot be replaced in one step
    try:
        os.rename(temporary, path)
    except OSError:
        with suppress(FileNotFoundError):
            os.rename(earlier, path)
        raise
    _remove(earlier)


def _remove(path: Path) -> None:
    """Remove a file, a link, or a folder, if it exists."""
    with suppress(OSError):
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def _flush_to_disk(path: Path) -> None:
    """Write a file's content from memory to the disk."""
    with open(path, "rb") as file:
        if hasattr(fcntl, "F_FULLFSYNC"):  # macOS, where fsync leaves data in the disk's own cache
            with suppress(OSError):  # not supported by network file systems
                fcntl.fcntl(file, fcntl.F_FULLFSYNC)
                return
        os.fsync(file.fileno())


@contextmanager
def written_whole(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a temporary file to write; on success, rename it to the file."""
    with replaced_whole(path) as temporary, open(temporary, "wb") as file:
        yield file


def exists(path: str | Path) -> bool:
    """Return whether a path exists; raise PermissionError if a folder above cannot be read."""
    # Path.exists hides missing permissions since Python 3.14.
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def walk_files(folder: str | Path, refuse: Callable[[OSError], None]) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders, and then those of linked folders.

    Parameters
    ----------
    folder : str or Path
        Folder to list. Links to missing files are files. Each folder that links name is read once.
    refuse : callable
        Called with the error of each folder that cannot be read, or target of a link.
    """
    seen, starts = set(), [folder]
    for start in starts:  # links are appended
        for root, folders, names in os.walk(start, onerror=refuse):
            if os.path.realpath(root) in seen:
                folders.clear()
                continue
            seen.add(os.path.realpath(root))
            if not os.access(root, os.X_OK):  # its names can be listed, but no file opened
                refuse(PermissionError(errno.EACCES, "Permission denied", root))
                continue
            starts += filter(Path.is_symlink, (Path(root, name) for name in folders))
            for file in (Path(root, name) for name in names):
                try:
                    # Not pipes, whose reading never ends; broken links, whose reading is an error.
                    if os.path.isfile(file) or not exists(file):
                        yield file
                except OSError as error:  # a link to a place without permission
                    refuse(error)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file that appears complete or not at all."""
    with written_whole(path) as file:
        file.write(content)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of killed programs; the caller holds the folder's lock."""
    for temporary in folder.glob(".*.tmp*"):
        temporary.unlink(missing_ok=True)


@contextmanager
def only_run(folder: Path, what: str, error: type[ToolkitError]) -> Iterator[None]:
    """Lock a folder; the lock is released even if the process is killed.

    Parameters
    ----------
    folder : Path
        Existing folder.
    what : str
        What the caller runs, such as ``build`` or ``training``, for messages.
    error : type of ToolkitError
        Type of the exception if the folder is locked.

    Raises
    ------
    ToolkitError
        Another process holds the lock.
    """
    with open(folder / _LOCK_NAME, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise error(f"{folder}: another {what} is already running in this folder") from None
        except OSError as reason:
            if reason.errno not in _NO_LOCKS:
                raise
            messages.say(
                f"{folder}: the folder cannot be locked ({reason.strerror}): do not start "
                f"another {what} in this folder"
            )
        yield


def allow_open_files(num_files: int) -> None:
    """Raise this process's limit of open files if necessary, at most to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = num_files + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < needed:
        # macOS has a lower limit that getrlimit does not return. Opening the files names the error.
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
