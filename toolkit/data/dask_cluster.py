"""Making shards on the workers of a Dask cluster: what only that needs.

`connect` is the side of the build, `make_shard` that of a worker. Workers need not have the
toolkit: the modules that the build has imported go to all of them, those that join later included.
Only ``build_mtt.py --scheduler`` imports this module, and its workers.
"""

import asyncio
import concurrent.futures
import hashlib
import importlib.metadata
import itertools
import logging
import os
import pickle
import secrets
import socket
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from toolkit.errors import BuildError, ToolkitError

import distributed.comm
from distributed import Client, Future, KilledWorker, Security, get_worker
from distributed.client import ClosedClientError
from distributed.diagnostics.plugin import UploadFile

CONNECT_SECONDS = 10
_CLOSE_SECONDS = 5
_TOPIC = "build_mtt"
# What an archive's one module does that is not in the folder of the others. Workers may have
# modules of our names from an earlier build, perhaps by other code.
_STARTER = """
import os, sys
modules = os.path.join(os.path.dirname(__file__), "modules")
if sys.path[0] != modules:
    sys.path[:] = [modules, *(path for path in sys.path if path != modules)]
    for name in {names!r}:
        sys.modules.pop(name, None)
"""


@dataclass(frozen=True)
class Terms:
    """What a worker must see and have to take part in a build."""

    # As text: paths are pickled otherwise by other versions of Python.
    mark: str  # a file beside the shards that is there as long as the build goes on
    audio_dir: str
    clip: str  # an audio file below it that is there, of `clip_bytes`
    clip_bytes: int
    versions: dict[str, str]  # of Python, and of the packages that samples depend on
    toolkit: str  # the archive of the toolkit's modules, named after what is in them


def terms(folder: Path, audio_dir: Path, clip: str, decoder: str) -> Terms:
    """Say what workers must see and have: what this process does.

    Parameters
    ----------
    folder : Path
        Where shards are made.
    audio_dir : Path
        Folder of the audio.
    clip : str
        An audio file that is there, from that folder on.
    decoder : str
        The package that decodes.
    """
    return Terms(
        mark=str(folder / f".build.{secrets.token_hex(4)}.tmp"),
        audio_dir=str(audio_dir),
        clip=clip,
        clip_bytes=(audio_dir / clip).stat().st_size,
        versions={name: _version(name) for name in ("python", "numpy", decoder)},
        toolkit=_name_toolkit(),
    )


def _version(package: str) -> str | None:
    if package == "python":
        return ".".join(map(str, sys.version_info[:2]))
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _modules() -> list[Path]:
    """Find the toolkit's modules that this process has imported."""
    here = Path(__file__).parent
    paths = {Path(getattr(module, "__file__", None) or "") for module in [*sys.modules.values()]}
    return sorted(path for path in paths if path.parent == here)


def _name_toolkit() -> str:
    content = b"".join(path.read_bytes() for path in _modules())
    return f"toolkit_{hashlib.sha256(content).hexdigest()[:16]}"


# --- The build's side ----------------------------------------------------------------------------


@contextmanager
def connect(
    scheduler: str, agreed: Terms, so_far: Callable[[], str], say: Callable[[str], None]
) -> Iterator[tuple[Callable, Callable[[], int]]]:
    """Hold a connection to a cluster whose workers make shards.

    Parameters
    ----------
    scheduler : str
        Its address, such as ``tcp://node1:8786``.
    agreed : Terms
        What workers must see and have.
    so_far : callable
        Gives how far the build is, for errors.
    say : callable
        Takes a line for the person at the terminal.

    Yields
    ------
    submit : callable
        Takes a task of `build_mtt.make_shard` and gives a ``concurrent.futures.Future``.
    watch : callable
        Gives the number of clips that the workers are through with; raises what `connect` does.

    Raises
    ------
    BuildError
        The scheduler cannot be reached or was lost, or workers died again and again.
    """
    _silence()
    client = _connect_client(scheduler)
    counts = {}  # clips that are done, by the name of their shard
    num_workers = None

    def note(event: tuple) -> None:
        _, message = event
        if message["mark"] == agreed.mark:
            # A shard that is made again, since its worker died, is counted again.
            counts[message["shard"]] = max(message["clips"], counts.get(message["shard"], 0))

    def submit(task) -> concurrent.futures.Future:
        # Retries are for workers that die: they are the scheduler's (its allowed-failures). What a
        # worker raises would be the same again.
        call = pickle.dumps(_Call(pickle.dumps(task), agreed))
        future = client.submit(pickle.loads, call, key=f"make_shard-{secrets.token_hex(16)}")
        # Client.get_executor() would do but for a result that is lost with its worker and cannot
        # be made again: its future never ends.
        return asyncio.run_coroutine_threadsafe(_outcome(future), client.loop.asyncio_loop)

    def watch() -> int:
        nonlocal num_workers
        if client.status != "running":
            raise _lost(scheduler, so_far)
        before, num_workers = num_workers, client.sync(_num_workers, client)
        if num_workers == 0 and before != 0:
            say(f"{scheduler}: no workers here: waiting for some to join")
        return sum(list(counts.values()))

    try:
        Path(agreed.mark).touch()
        client.subscribe_topic(_TOPIC, note)
        _send_modules(client, agreed)
        yield submit, watch
    except KilledWorker as error:
        raise BuildError(
            f"{error.allowed_failures + 1} workers died one after another with the same shard, the "
            f"last was {error.last_worker.address} ({so_far()}): perhaps for lack of memory; run "
            "the same command again to go on, with fewer threads a worker if they die again"
        ) from None
    except MemoryError:
        raise BuildError(
            f"a worker, or this process, ran out of memory ({so_far()}): run the same command "
            "again to go on, with fewer threads a worker"
        ) from None
    except ModuleNotFoundError as error:
        raise BuildError(
            f"a worker could not take the toolkit's modules ({error}; {so_far()}): its log says "
            "why: run the same command again to go on"
        ) from None
    except (
        ClosedClientError,
        distributed.comm.CommClosedError,
        concurrent.futures.CancelledError,
        asyncio.CancelledError,
    ):
        raise _lost(scheduler, so_far) from None
    finally:
        _close(client, agreed.mark)


class _Call:
    """A call of `make_shard` that is made where its pickle is loaded.

    The scheduler looks into what is submitted, and so finds nothing that it would have to import.
    """

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return make_shard, self.arguments


async def _outcome(future: Future) -> dict:
    return await future


async def _num_workers(client: Client) -> int | None:
    # Asked from the client's own loop it gives what it heard last, and does not wait.
    return client.scheduler_info().get("n_workers")


def _lost(scheduler: str, so_far: Callable[[], str]) -> BuildError:
    return BuildError(
        f"{scheduler}: the scheduler was lost, or has dropped this build's work ({so_far()}): run "
        "the same command again to go on"
    )


def _silence() -> None:
    """Keep the library's talk, which no user can act on, from standard error."""
    warnings.filterwarnings("ignore", module="distributed")
    for name in ("asyncio", *logging.root.manager.loggerDict):
        if name.partition(".")[0] in ("asyncio", "distributed", "tornado"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _connect_client(scheduler: str) -> Client:
    try:
        # A client that fails, or is interrupted, before it is connected takes long to end.
        # In a thread: a notebook's own has a loop that runs.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, _knock(scheduler)).result()
        return Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BuildError(
            f"--scheduler {scheduler}: no scheduler answers there: {reason}: start one by "
            "`dask scheduler`, and name the address that it prints"
        ) from None


async def _knock(scheduler: str) -> None:
    security = Security().get_connection_args("client")
    connecting = distributed.comm.connect(scheduler, timeout=CONNECT_SECONDS, **security)
    try:
        # Another program may listen there that says nothing.
        comm = await asyncio.wait_for(connecting, CONNECT_SECONDS + 1)
    except TimeoutError:
        raise OSError(f"Timed out waiting for an answer from {scheduler}") from None
    await comm.close()


def _send_modules(client: Client, agreed: Terms) -> None:
    """Make the toolkit's modules known to the workers that are there and that will be."""
    modules = _modules()
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / f"{agreed.toolkit}.zip"
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for path in modules:
                file.writestr(f"modules/{path.name}", path.read_bytes())
            names = [path.stem for path in modules]
            file.writestr(f"{agreed.toolkit}.py", _STARTER.format(names=names))
        plugin = UploadFile(str(archive))
    # A worker that dies meanwhile is no loss; one that lives without them says so by its task.
    with suppress(OSError):
        client.register_plugin(plugin, name=agreed.mark)


def _close(client: Client, mark: str) -> None:
    """Leave the cluster as it was; one that does not answer must not hold us up."""
    with suppress(Exception):
        if client.status == "running":
            client.sync(client.unregister_worker_plugin, mark, callback_timeout=_CLOSE_SECONDS)
    with suppress(Exception):
        client.close(timeout=_CLOSE_SECONDS)


# --- A worker's side -----------------------------------------------------------------------------


def make_shard(pickled: bytes, agreed: Terms) -> dict:
    """Do on a worker of the cluster what `build_mtt.make_shard` does.

    Parameters
    ----------
    pickled : bytes
        The task.
    agreed : Terms
        What the worker must see and have.

    Returns
    -------
    dict
        The shard's entry in the manifest.

    Raises
    ------
    BuildError
        The worker does not see a folder, or lacks a package, or the build has ended.
    OSError
        A file cannot be written.
    """
    worker = get_worker()
    name = f"worker {worker.address} on {socket.gethostname()}"
    _check_versions(name, agreed)
    _check_folders(name, agreed)
    if agreed.toolkit not in __file__:  # of another build that works here at the same time
        raise BuildError(
            f"{name} has the toolkit of another build: restart that worker, and run the same "
            "command again to go on"
        )
    try:
        import build_mtt
    except ImportError as error:
        raise _unfit(name, f"lacks what the toolkit needs ({error})") from None
    task = pickle.loads(pickled)
    numbers = itertools.count(1)

    def count_clip() -> None:
        # A worker that was given up learns so here, and ends.
        if not os.path.exists(agreed.mark):
            raise BuildError(f"{name}: the build of {task.path} has ended")
        _check_folders(name, agreed)  # lest clips are skipped that it has lost sight of
        message = {"mark": agreed.mark, "shard": task.path.name, "clips": next(numbers)}
        worker.log_event(_TOPIC, message)

    try:
        return build_mtt.make_shard(task, count_clip)
    except OSError as error:
        error.filename = f"{error.filename} ({name})"
        raise
    except ToolkitError as error:
        raise BuildError(f"{name}: {error}") from None


def _check_versions(name: str, agreed: Terms) -> None:
    for package, wanted in agreed.versions.items():
        found = _version(package)
        if found != wanted:
            what = f"has {package} {found}" if found else f"lacks {package}"
            raise _unfit(name, f"{what}, the build has {wanted}")


def _unfit(name: str, what: str) -> BuildError:
    return BuildError(
        f"{name} {what}: install there what requirements/cluster.txt names, or stop that worker, "
        "and run the same command again to go on"
    )


def _check_folders(name: str, agreed: Terms) -> None:
    folder = os.path.dirname(agreed.mark)
    clip = os.path.join(agreed.audio_dir, agreed.clip)
    for path, is_seen in (
        (agreed.audio_dir, os.path.isdir(agreed.audio_dir)),
        (clip, os.path.isfile(clip) and os.path.getsize(clip) == agreed.clip_bytes),
        (folder, os.path.exists(agreed.mark)),
    ):
        if not is_seen:
            raise BuildError(
                f"{name} does not see {path} as this machine does: have it there under the same "
                "path, or stop that worker, and run the same command again to go on"
            )
