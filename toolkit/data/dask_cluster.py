"""Build shards on the workers of a Dask cluster.

`connect` runs in the build's process, `make_shard` on the workers. A worker imports the toolkit
from the checkout in which it was started; `connect` refuses workers with other code or packages.
Only ``build_mtt.py --scheduler`` and its workers import this module.
"""

import asyncio
import concurrent.futures
import hashlib
import importlib
import importlib.metadata
import itertools
import logging
import os
import pickle
import secrets
import shlex
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from toolkit.data import shards
from toolkit.data.audio import DECODERS
from toolkit.errors import BuildError, ToolkitError

import distributed.comm
from distributed import Client, Future, KilledWorker, Security, get_worker
from distributed.client import ClosedClientError

CONNECT_SECONDS = 10  # timeout
_CLOSE_SECONDS = 5  # timeout
_RETRY = "run the same command again to resume"
_PACKAGE = Path(__file__).parents[1]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# What this process has imported. Computed at import, because the files may change while a worker
# runs.
_CODE = b"".join(path.read_bytes() for path in sorted(_PACKAGE.rglob("*.py")))
_VERSIONS = {
    "toolkit code": hashlib.sha256(_CODE).hexdigest()[:8],
    "python": ".".join(map(str, sys.version_info[:2])),
    **{package: _version(package) for package in ("numpy", *DECODERS)},
}


@dataclass(frozen=True)
class _Requirements:
    """Files and versions that a worker needs to take part in a build."""

    # Paths are strings: pathlib's pickles differ between versions of Python.
    mark: str  # a file in the folder of the shards that exists while the build runs
    audio_dir: str
    clip: str  # path of an existing file in audio_dir
    clip_bytes: int  # size of this file
    versions: dict[str, str | None]  # of the code and packages that samples depend on
    start: str  # command that starts a worker


def _requirements(tasks: Sequence[shards.ShardTask], scheduler: str) -> _Requirements:
    """Return the requirements: the files and versions of this process."""
    first = tasks[0]
    clips = (mp3_path for task in tasks for _, mp3_path, _ in task.clips)
    clip = next(path for path in clips if os.path.isfile(first.audio_dir / path))
    # Only the decoder of this build: the other one need not be installed.
    names = ("toolkit code", "python", "numpy", first.decoder)
    return _Requirements(
        mark=str(first.path.with_name(f".build.{secrets.token_hex(4)}.tmp")),
        audio_dir=str(first.audio_dir),
        clip=clip,
        clip_bytes=(first.audio_dir / clip).stat().st_size,
        versions={name: _VERSIONS[name] for name in names},
        # Unlike the command `dask`, `python -m` can import modules of the working directory.
        start=f"cd {shlex.quote(str(_PACKAGE.parent))} && python -m dask worker {scheduler}",
    )


def _unfit(worker: str, what: str, required: _Requirements) -> BuildError:
    return BuildError(
        f"{worker} {what}: start it with `{required.start}` and the packages of "
        f"requirements/cluster.txt, or stop it, and {_RETRY}"
    )


# --- In the build's process ----------------------------------------------------------------------


@contextmanager
def connect(
    scheduler: str,
    tasks: Sequence[shards.ShardTask],
    so_far: Callable[[], str],
    say: Callable[[str], None],
) -> Iterator[tuple[Callable, Callable[[], int]]]:
    """Connect to a cluster whose workers build shards.

    Parameters
    ----------
    scheduler : str
        Address of the scheduler, such as ``tcp://node1:8786``.
    tasks : sequence of shards.ShardTask
        All shards of the build. At least one clip exists as a file.
    so_far : callable
        Describes what is complete, for error messages.
    say : callable
        Prints a message.

    Yields
    ------
    submit : callable
        Takes a task and returns a ``concurrent.futures.Future``.
    num_counted : callable
        Returns the number of clips that workers have finished. Raises BuildError if the scheduler
        is lost.

    Raises
    ------
    BuildError
        The scheduler cannot be reached or is lost, or workers die repeatedly or are unsuitable.
    """
    _silence_loggers()
    required = _requirements(tasks, scheduler)
    client = _connect_client(scheduler)
    counts = {}  # finished clips by shard name
    num_workers = None

    def on_event(event: tuple) -> None:
        _, (shard, num_clips) = event
        # A shard whose worker died is built again from its first clip.
        counts[shard] = max(num_clips, counts.get(shard, 0))

    def submit(task: shards.ShardTask) -> concurrent.futures.Future:
        # The scheduler retries tasks of workers that die, but not tasks that raise an error, which
        # would raise the same error again.
        call = pickle.dumps(_Call(pickle.dumps(task), required))
        future = client.submit(pickle.loads, call, key=f"make_shard-{secrets.token_hex(16)}")
        # Futures of Client.get_executor() never finish if a result is lost with its worker.
        return asyncio.run_coroutine_threadsafe(_result(future), client.loop.asyncio_loop)

    def num_counted() -> int:
        nonlocal num_workers
        if client.status != "running":
            raise _lost(scheduler, so_far)
        before, num_workers = num_workers, client.sync(_num_workers, client)
        if num_workers == 0 and before != 0:
            say(f"{scheduler}: no workers: waiting for workers to join")
        # Copied, because the client's thread adds shards at the same time.
        return sum(list(counts.values()))

    try:
        Path(required.mark).touch()
        client.subscribe_topic(required.mark, on_event)
        yield submit, num_counted
    except KilledWorker as error:
        raise BuildError(
            f"{error.allowed_failures + 1} workers died one after another with the same shard, the "
            f"last was {error.last_worker.address} ({so_far()}), possibly out of memory: {_RETRY}, "
            "with fewer threads per worker if they die again"
        ) from None
    except MemoryError:
        raise BuildError(
            f"a worker, or this process, ran out of memory ({so_far()}): {_RETRY}, with fewer "
            "threads per worker"
        ) from None
    except ImportError as error:
        raise _not_importable(client, error, required) from None
    except (
        ClosedClientError,
        distributed.comm.CommClosedError,
        concurrent.futures.CancelledError,
        asyncio.CancelledError,
    ):
        raise _lost(scheduler, so_far) from None
    finally:
        # An error of closing would replace the error of the build.
        with suppress(Exception):
            client.close(timeout=_CLOSE_SECONDS)


class _Call:
    """A call of `make_shard` that is executed when its pickle is loaded.

    The scheduler unpickles what is submitted. Bytes keep the scheduler from importing the toolkit.
    """

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return make_shard, self.arguments


async def _result(future: Future) -> dict:
    return await future


async def _num_workers(client: Client) -> int | None:
    # In the client's event loop, scheduler_info returns the last known number without waiting.
    return client.scheduler_info().get("n_workers")


def _lost(scheduler: str, so_far: Callable[[], str]) -> BuildError:
    return BuildError(
        f"{scheduler}: the scheduler was lost or has dropped the tasks of this build "
        f"({so_far()}): {_RETRY}"
    )


def _not_importable(client: Client, error: ImportError, required: _Requirements) -> BuildError:
    """Find the worker that cannot import the toolkit; the error of its task does not name it."""
    worker = "a worker"
    found = client.run(importlib.import_module, __name__, on_error="return")
    for address, result in found.items():
        if isinstance(result, ImportError):
            hosts = client.run(socket.gethostname, workers=[address])
            worker, error = f"worker {address} on {hosts[address]}", result
    return _unfit(worker, f"cannot import the toolkit ({error})", required)


def _silence_loggers() -> None:
    """Suppress messages of distributed that no user can act on."""
    warnings.filterwarnings("ignore", module="distributed")
    for name in ("asyncio", *logging.root.manager.loggerDict):
        if name.partition(".")[0] in ("asyncio", "distributed", "tornado"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _connect_client(scheduler: str) -> Client:
    try:
        # Closing a client that has not connected takes long, so test the address first. This runs
        # in a thread because a notebook already runs an event loop.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, _test_address(scheduler)).result()
        return Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    # distributed raises different types for unknown protocols and invalid ports.
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BuildError(
            f"--scheduler {scheduler}: no scheduler answers: {reason}: start one with "
            "`dask scheduler` and give the address that this command prints"
        ) from None


async def _test_address(scheduler: str) -> None:
    security = Security().get_connection_args("client")
    connecting = distributed.comm.connect(scheduler, timeout=CONNECT_SECONDS, **security)
    try:
        # Another program may listen at this address and never answer.
        comm = await asyncio.wait_for(connecting, CONNECT_SECONDS + 1)
    except TimeoutError:
        raise OSError(f"Timed out waiting for an answer from {scheduler}") from None
    await comm.close()


# --- On a worker ---------------------------------------------------------------------------------


def make_shard(pickled: bytes, required: _Requirements) -> dict:
    """Build a shard on a worker of the cluster.

    Parameters
    ----------
    pickled : bytes
        A pickled `shards.ShardTask`.
    required : _Requirements
        Files and versions that the worker needs.

    Returns
    -------
    dict
        As `shards.make_shard` returns.

    Raises
    ------
    BuildError
        The worker has other versions or cannot access a folder, or the build has ended.
    OSError
        A file cannot be written.
    """
    worker = get_worker()
    name = f"worker {worker.address} on {socket.gethostname()}"
    for package, wanted in required.versions.items():
        found = _VERSIONS[package]
        if found != wanted:
            what = f"has {package} {found}" if found else f"lacks {package}"
            raise _unfit(name, f"{what}, the build has {wanted}", required)
    _check_folders(name, required)
    task = pickle.loads(pickled)
    numbers = itertools.count(1)

    def count_clip() -> None:
        # Stop workers whose build was abandoned.
        if not os.path.exists(required.mark):
            raise BuildError(f"{name}: the build of {task.path} has ended")
        _check_folders(name, required)  # a lost mount must not look like missing clips
        worker.log_event(required.mark, (task.path.name, next(numbers)))

    try:
        return shards.make_shard(task, count_clip)
    except OSError as error:
        error.filename = f"{error.filename} ({name})"
        raise
    except ToolkitError as error:
        raise BuildError(f"{name}: {error}") from None


def _check_folders(name: str, required: _Requirements) -> None:
    folder = os.path.dirname(required.mark)
    clip = os.path.join(required.audio_dir, required.clip)
    for path, is_seen in (
        (required.audio_dir, os.path.isdir(required.audio_dir)),
        (clip, os.path.isfile(clip) and os.path.getsize(clip) == required.clip_bytes),
        (folder, os.path.exists(required.mark)),
    ):
        if not is_seen:
            raise BuildError(
                f"{name} cannot access {path} as this machine does: mount the folder under the "
                f"same path, or stop this worker, and {_RETRY}"
            )
