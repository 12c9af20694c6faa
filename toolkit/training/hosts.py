"""Connect the processes of several hosts that train together with JAX.

The processes find each other through Keras's environment variables:

    KERAS_DISTRIBUTION_JOB_ADDRESSES   host:port of every process, or of the first one only
    KERAS_DISTRIBUTION_NUM_PROCESSES   number of processes
    KERAS_DISTRIBUTION_PROCESS_ID      number of this process, from 0
"""

import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from toolkit.errors import ToolkitError, TrainingError, UsageError

ADDRESSES = "KERAS_DISTRIBUTION_JOB_ADDRESSES"
NUM_PROCESSES = "KERAS_DISTRIBUTION_NUM_PROCESSES"
PROCESS_ID = "KERAS_DISTRIBUTION_PROCESS_ID"
_LOST_SECONDS = 30  # heartbeat timeout; the default of JAX is 100
_LAST_SECONDS = 5  # time for the other processes to print their own error
_RESUME_HINT = "run the same command on all hosts to resume from the last finished epoch"
# Messages of Gloo, NCCL and JAX's coordination service when another process is gone; their
# exceptions have no common type.
_LOST = re.compile(
    r"Gloo|NCCL|coordination service|heartbeat|Connection (closed|reset)|UNAVAILABLE|"
    r"DEADLINE_EXCEEDED"
)


def read_environment() -> tuple[int, int]:
    """Return the number of processes and the number of this process.

    Raises
    ------
    UsageError
        The environment variables are invalid.
    """
    values = []
    for name, default in ((NUM_PROCESSES, "1"), (PROCESS_ID, "0")):
        text = os.environ.get(name, default)
        if not text.isdecimal():
            raise UsageError(f"{name}={text}: expected an integer of at least 0")
        values.append(int(text))
    num_processes, process = values
    # Without the number, every host would train alone and write the same files.
    if num_processes < 1 or (ADDRESSES in os.environ and NUM_PROCESSES not in os.environ):
        found = os.environ.get(NUM_PROCESSES, "")
        raise UsageError(
            f"{NUM_PROCESSES}={found}: expected the number of processes that train together"
        )
    # Without a number, every process would be the first one.
    if num_processes > 1 and PROCESS_ID not in os.environ:
        raise UsageError(f"{PROCESS_ID}=: expected the number of this process, from 0")
    if process >= num_processes:
        raise UsageError(
            f"{PROCESS_ID}={process}: expected 0 to {num_processes - 1} "
            f"({NUM_PROCESSES}={num_processes})"
        )
    return num_processes, process


@contextmanager
def connected(num_processes: int, process: int, check_stop: Callable[[], None]) -> Iterator[None]:
    """Connect this process to the other processes; raise an error if another host is lost.

    Parameters
    ----------
    num_processes, process : int
        Number of processes, and the number of this process. A single process is not connected.
    check_stop : callable
        Raises if this process received a signal. In this case the other processes probably
        received the signal too and are not reported as lost.

    Raises
    ------
    TrainingError
        Another host did not start or was lost.
    """
    if num_processes == 1:
        yield
        return
    monitor = _start_monitor()
    try:
        with _stdout_discarded():
            _connect(_first_address(num_processes), num_processes, process)
            yield
    # Errors of this process, even if their message contains a word of _LOST.
    except (ToolkitError, OSError, MemoryError):
        raise
    except Exception as error:
        # Lack of memory: toolkit.cli suggests a smaller --batch-size.
        if "RESOURCE_EXHAUSTED" in str(error) or not _LOST.search(str(error)):
            raise
        check_stop()
        reason = str(error).splitlines()[0]
        raise TrainingError(f"another host was lost ({reason}): {_RESUME_HINT}") from error
    finally:
        # The monitor then prints nothing: this process reports its own error.
        monitor.communicate(b"finished")


def run_process(run: Callable[[], int]) -> int:
    """Run one process of a job; after an error, exit without JAX's exit handlers.

    JAX's exit handlers would wait for the other processes, which wait for this process.
    """
    try:
        status = run()
    except Exception:
        traceback.print_exc()
        status = 1
    jax = sys.modules.get("jax")
    if status and jax and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        if jax.process_index() == 0:
            # JAX's coordination service ends with the first process and aborts the others.
            time.sleep(_LAST_SECONDS)
        os._exit(status)
    return status


def _first_address(num_processes: int) -> str:
    addresses = os.environ.get(ADDRESSES, "").split(",")
    if len(addresses) not in (1, num_processes) or not re.fullmatch(r"\S+:\d+", addresses[0]):
        raise UsageError(
            f"{ADDRESSES}={','.join(addresses)}: expected host:port of the first process, or of "
            f"all {num_processes} processes, separated by commas"
        )
    return addresses[0]


def _connect(address: str, num_processes: int, process: int) -> None:
    """Connect to the other processes, as keras.distribution.initialize does."""
    import jax

    # toolkit.signals handles SIGTERM, which JAX would treat as a preemption notice.
    jax.config.update("jax_enable_preemption_service", False)
    # Python's signal handlers do not run while JAX waits, so use the default action: exit.
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        # Called directly, because Keras's function leaves the heartbeat timeout at 100 s.
        jax.distributed.initialize(
            address,
            num_processes,
            process,
            heartbeat_timeout_seconds=_LOST_SECONDS,
            # Under Slurm, JAX would otherwise use one device per process.
            cluster_detection_method="deactivate",
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"{address}: not all {num_processes} processes connected ({reason}): check "
            f"{ADDRESSES} and that every host runs the command"
        ) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def _stdout_discarded() -> Iterator[None]:
    """Discard stdout, to which Gloo prints messages about its connections."""
    sys.stdout.flush()
    # Gloo is C++ and does not use sys.stdout.
    stdout, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(null)


def _start_monitor() -> subprocess.Popen:
    """Start a small process that prints an error if this process ends without an error message.

    When a host is lost, a thread of JAX aborts this process with a stack dump that names no cause.
    Python code cannot catch this abort.
    """
    line = (
        f"{os.path.basename(sys.argv[0])}: error: stopped because another host was lost or this "
        f"process was killed: {_RESUME_HINT}\n"
    )
    program = "import sys\nif not sys.stdin.read(): sys.stderr.write(sys.argv[1])"
    return subprocess.Popen(
        [sys.executable, "-S", "-c", program, line],
        stdin=subprocess.PIPE,
        start_new_session=True,  # not stopped by Ctrl-C
    )
