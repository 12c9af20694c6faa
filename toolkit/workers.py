"""Local worker processes: tasks in, results out, and no hang when a worker dies.

`concurrent.futures.ProcessPoolExecutor` is not used because Python 3.11's can hang if a worker
dies while another is starting. Here each worker has a separate pipe and shares nothing else.
"""

import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection

from toolkit.errors import BuildError
from toolkit.files import allow_open_files

_FILES_PER_WORKER = 3  # open in the parent process


@contextmanager
def local_workers(
    function: Callable, num_workers: int, so_far: Callable[[], str]
) -> Iterator[tuple[Callable, Callable[[], int]]]:
    """Start processes that run a function on tasks; stop them on exit.

    Parameters
    ----------
    function : callable
        Called in a worker as ``function(task, count)``, where ``count()`` reports one finished
        item of the task. Must be importable by name.
    num_workers : int
        Maximum number of processes.
    so_far : callable
        Describes what is complete, for error messages.

    Yields
    ------
    submit : callable
        Takes a task and returns a ``concurrent.futures.Future``.
    num_counted : callable
        Returns the number of items that all workers have reported.

    Raises
    ------
    BuildError
        A worker died, or no process can be started.
    """
    workers = []
    idle = queue.SimpleQueue()

    def call(task):
        worker = idle.get()
        try:
            return worker.call(task)
        finally:
            idle.put(worker)

    allow_open_files(_FILES_PER_WORKER * num_workers)
    with ThreadPoolExecutor(num_workers) as threads:

        def submit(task) -> Future:
            try:
                if len(workers) < num_workers:
                    workers.append(_Worker(function))
                    idle.put(workers[-1])
                return threads.submit(call, task)
            # Too many threads, and too many processes (EAGAIN).
            except (RuntimeError, BlockingIOError) as error:
                raise BuildError(
                    f"no more processes or threads can be started ({error}; {so_far()}): run the "
                    "same command again with fewer --num-workers"
                ) from None

        try:
            yield submit, lambda: sum(worker.num_counted for worker in workers)
        except _WorkerDiedError:
            raise BuildError(
                f"a worker process died ({so_far()}), possibly out of memory: run the same command "
                "again to resume, with fewer --num-workers if it happens again"
            ) from None
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            # The threads wait for results, so they end only when the workers are killed.
            for worker in workers:
                # Safe at any moment, because files are written under temporary names.
                worker.kill()
            for worker in workers:
                worker.join()


def run_tasks(submit: Callable, tasks: Sequence, on_wait: Callable[[], None]) -> Iterator:
    """Yield results in order of completion.

    Parameters
    ----------
    submit : callable
        Takes a task and returns a ``concurrent.futures.Future``.
    tasks : sequence
        Tasks to submit.
    on_wait : callable
        Called several times per second: updates progress, and may raise to stop.
    """
    finished = queue.SimpleQueue()
    for task in tasks:
        submit(task).add_done_callback(finished.put)
    num_left = len(tasks)
    while num_left:
        with suppress(queue.Empty):
            future = finished.get(timeout=0.2)
            num_left -= 1
            on_wait()  # before the result: a signal may have stopped the worker too
            yield future.result()
        on_wait()


class _WorkerDiedError(Exception):
    pass


class _Worker:
    """A process that handles one task at a time."""

    def __init__(self, function: Callable):
        # Spawned, because a forked process would copy the locks that other threads hold.
        context = multiprocessing.get_context("spawn")
        self.num_counted = 0
        self._connection, worker_end = context.Pipe()
        self._process = context.Process(target=_work, args=(function, worker_end), daemon=True)
        # Ctrl-C goes to all processes of a terminal, but only the parent handles it. A child
        # inherits the mask; starting the resource tracker would unblock it.
        resource_tracker.ensure_running()
        earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
            worker_end.close()  # now the pipe closes when the worker dies

    def call(self, task):
        """Run the function on a task in the worker."""
        try:
            _send(self._connection, task)
            while (message := self._connection.recv())[0] == "counted":
                self.num_counted += 1
        except (EOFError, OSError):
            raise _WorkerDiedError from None
        kind, value = message
        if kind == "error":
            raise value
        return value

    def kill(self) -> None:
        self._process.kill()

    def join(self) -> None:
        self._process.join()


def _send(connection: Connection, message) -> None:
    """Send a message that ``connection.recv`` returns."""
    # If the pipe breaks, connection.send leaves a buffer behind that Python 3.13 cannot free
    # without a message on stderr.
    connection.send_bytes(pickle.dumps(message))


def _work(function: Callable, connection: Connection) -> None:
    """Handle tasks in a worker process: send each counted item, then the result or the error."""
    _exit_with_parent()
    with suppress(EOFError, OSError):  # the parent has closed the pipe
        while True:
            task = connection.recv()
            try:
                result = function(task, partial(_send, connection, ("counted", None)))
            except Exception as error:
                _send(connection, ("error", _picklable(error)))
            else:
                _send(connection, ("result", result))


def _exit_with_parent() -> None:
    """Exit when the parent process is gone, even if it was killed."""

    # Otherwise a worker would finish its task first.
    def wait() -> None:
        multiprocessing.parent_process().join()
        # sys.exit would end only this thread.
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _picklable(error: Exception) -> Exception:
    """Add the worker's traceback to an error, for --verbose, and make sure that it pickles."""
    # As text, because tracebacks cannot be pickled.
    stack = traceback.format_exc()
    error.add_note(stack)
    try:
        # An exception whose __init__ takes other arguments pickles, but does not unpickle.
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}\n{stack}")
    return error
