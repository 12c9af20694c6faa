"""Training on several devices and hosts: which they are, who does what, and what all agree on.

On JAX one process a host trains on all the host's devices, by Keras's ``DataParallel``; the
processes find each other by Keras's environment variables:

    KERAS_DISTRIBUTION_JOB_ADDRESSES   host:port of each process, or of the first alone
    KERAS_DISTRIBUTION_NUM_PROCESSES   how many there are
    KERAS_DISTRIBUTION_PROCESS_ID      which this one is, from 0

Every process runs the same program on the same step; the first alone writes and talks. On
TensorFlow the devices of one host train together, by ``tf.distribute.MirroredStrategy``.
"""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit import messages
from toolkit.errors import ToolkitError, TrainingError, UsageError

import numpy as np

if TYPE_CHECKING:
    import jax
    import keras
    import tensorflow as tf

ADDRESSES = "KERAS_DISTRIBUTION_JOB_ADDRESSES"
NUM_PROCESSES = "KERAS_DISTRIBUTION_NUM_PROCESSES"
PROCESS_ID = "KERAS_DISTRIBUTION_PROCESS_ID"
BATCH_AXIS = "batch"
# A host that is not heard of for so long is lost, and one that does not come within so long is
# not waited for.
_LOST_SECONDS = 30
_START_SECONDS = 300
_LOOK_AGAIN_SECONDS = 3
_LAST_SECONDS = 5  # that the first process leaves the others to say their own error
_GO_ON = "the same command on all hosts goes on from the last finished epoch"
# How Gloo, NCCL and JAX's coordination service say that another process is gone; their errors
# have no type of their own.
_LOST = re.compile(
    r"Gloo|NCCL|coordination service|heartbeat|Connection (closed|reset)|UNAVAILABLE|"
    r"DEADLINE_EXCEEDED"
)


@dataclass(frozen=True)
class Job:
    """The processes and devices that train together; one device, unless `start` found more.

    Attributes
    ----------
    num_processes, process : int
        How many there are, and which this one is.
    num_devices : int
        Of all processes; a batch is shared out among them.
    mesh : jax.sharding.Mesh or None
        All devices, on JAX.
    strategy : tf.distribute.Strategy or None
        All devices, on TensorFlow.
    """

    num_processes: int = 1
    process: int = 0
    num_devices: int = 1
    mesh: "jax.sharding.Mesh | None" = None
    strategy: "tf.distribute.Strategy | None" = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes and talks."""
        return self.process == 0

    def say(self, message: str) -> None:
        """Talk, in the first process."""
        if self.is_first:
            messages.say(message)

    def share(self, batch_size: int) -> slice:
        """Give this process's rows of a batch."""
        size = batch_size // self.num_processes
        return slice(self.process * size, (self.process + 1) * size)

    def scope(self):
        """Give the context in which variables are made."""
        return self.strategy.scope() if self.strategy else nullcontext()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let Keras make here what the other processes do not: it would wait for them."""
        import keras

        earlier = keras.distribution.distribution()
        keras.distribution.set_distribution(None)
        try:
            yield
        finally:
            keras.distribution.set_distribution(earlier)

    def wait_for_all(self, what: str) -> None:
        """Wait until every process has come to this point."""
        if self.num_processes > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(what)

    def check_same(
        self,
        what: str,
        see: Callable[[], str],
        mend: str = "give a folder that all of them see",
        patience_s: float = 0,
    ) -> None:
        """Check that all processes see the same.

        Parameters
        ----------
        what : str
            The folder, or whatever is seen.
        see : callable
            Describes what this process sees.
        mend : str
            What to do where they differ.
        patience_s : float
            Seconds to look again and again before it is taken for a difference.

        Raises
        ------
        UsageError
            They do not.
        """
        if self.num_processes == 1:
            return
        from jax.experimental import multihost_utils

        for turn in range(1 + int(patience_s / _LOOK_AGAIN_SECONDS)):
            if turn:
                time.sleep(_LOOK_AGAIN_SECONDS)
            digest = np.frombuffer(hashlib.sha256(see().encode()).digest(), np.uint8)
            digests = multihost_utils.process_allgather(digest)  # (num_processes, 32)
            if (digests == digests[0]).all():
                return
        raise UsageError(f"{what}: not the same on all hosts: {mend}")

    def of_first(self, value: float) -> float:
        """Give the first process's number in every process."""
        bits = np.array([value], np.float64).view(np.uint8)
        return float(self.gather(bits)[: len(bits)].view(np.float64)[0])

    def gather(self, part: np.ndarray) -> np.ndarray:
        """Put all processes' arrays one after the other, in every process.

        Parameters
        ----------
        part : np.ndarray [shape=(n, ...)]
            This process's; others may have another number of rows. Of 4 bytes a value at most.
        """
        if self.num_processes == 1:
            return part
        from jax.experimental import multihost_utils

        num_rows = multihost_utils.process_allgather(np.array(len(part), np.int32))
        filled = np.zeros((num_rows.max(), *part.shape[1:]), part.dtype)
        filled[: len(part)] = part
        parts = multihost_utils.process_allgather(filled)  # (num_processes, most rows, ...)
        return np.concatenate([each[:n] for each, n in zip(parts, num_rows, strict=True)])

    def check_batch_size(self, batch_size: int) -> None:
        """Check that a batch can be shared out.

        Raises
        ------
        UsageError
            It is no multiple of the number of devices.
        """
        rest = batch_size % self.num_devices
        if rest:
            lower, higher = batch_size - rest, batch_size - rest + self.num_devices
            nearest = f"{lower} or {higher}" if lower else f"{higher}"
            raise UsageError(
                f"--batch-size {batch_size}: cannot be shared out evenly among "
                f"{self.num_devices} devices: use {nearest}"
            )

    def spread(self, make_batches: Callable[[], Iterator]):
        """Give Keras's loop batches in the form in which it shares each out among devices.

        On TensorFlow that is a dataset of one shape, which may be started more than once; for one
        device it is the batches themselves.
        """
        if self.strategy is None:
            return make_batches()
        import tensorflow as tf

        first = next(make_batches())
        signature = tuple(tf.TensorSpec(part.shape, part.dtype) for part in first)
        return tf.data.Dataset.from_generator(make_batches, output_signature=signature)

    def synchronise_norms(self, network: "keras.Model", is_on: bool = True) -> None:
        """Let batch normalisation take its statistics over the whole batch, not a device's share.

        On JAX it does so by itself. Written files must not ask for it: other backends refuse it.
        """
        if self.strategy:
            for layer in network.layers:
                if type(layer).__name__ == "BatchNormalization":
                    layer.synchronized = is_on


@contextmanager
def start(check_stop: Callable[[], None]) -> Iterator[Job]:
    """Find the devices and, on JAX, the other processes, and let Keras spread over them.

    Called before anything is computed.

    Parameters
    ----------
    check_stop : callable
        Raises where this process was asked to end: then others ended too, and were not lost.

    Yields
    ------
    Job
        All that train together.

    Raises
    ------
    UsageError
        The environment's variables are wrong, or the backend cannot do it.
    TrainingError
        Another host did not come, or was lost.
    """
    import keras

    backend = keras.backend.backend()
    num_processes, process = _read_environment()
    if backend == "tensorflow":
        if num_processes > 1:
            raise UsageError(
                f"{NUM_PROCESSES}={num_processes}: the TensorFlow backend trains on one host: "
                "several need KERAS_BACKEND=jax"
            )
        yield _start_tensorflow()
        return
    if backend != "jax":
        raise UsageError("--distribute: needs KERAS_BACKEND=jax, or tensorflow on one host")

    watch = _watch_end() if num_processes > 1 else None
    try:
        with _output_held() if num_processes > 1 else nullcontext():
            yield _start_jax(num_processes, process)
    except (ToolkitError, OSError, MemoryError):
        raise
    except Exception as error:
        is_of_memory = "RESOURCE_EXHAUSTED" in str(error)
        if num_processes == 1 or is_of_memory or not _LOST.search(str(error)):
            raise
        check_stop()
        reason = str(error).splitlines()[0]
        raise TrainingError(f"another host was lost ({reason}): {_GO_ON}") from error
    finally:
        keras.distribution.set_distribution(None)
        if watch:
            watch.communicate(b"ended")


@contextmanager
def _output_held() -> Iterator[None]:
    """Drop what is written to standard output: Gloo says there whom it meets, now and then."""
    sys.stdout.flush()
    output, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(output, 1)
        os.close(output)
        os.close(nowhere)


def leave(status: int) -> None:
    """End this process at once after an error; JAX would wait for the others, in vain."""
    jax = sys.modules.get("jax")
    if status and jax and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        if jax.process_index() == 0:
            # JAX's service ends with it, and aborts those that have not said their own error yet.
            time.sleep(_LAST_SECONDS)
        os._exit(status)


def _read_environment() -> tuple[int, int]:
    values = []
    for name, default in ((NUM_PROCESSES, "1"), (PROCESS_ID, "0")):
        text = os.environ.get(name, default)
        if not text.isdecimal():
            raise UsageError(f"{name}={text}: not a whole number")
        values.append(int(text))
    num_processes, process = values
    if num_processes < 1 or (ADDRESSES in os.environ and NUM_PROCESSES not in os.environ):
        raise UsageError(f"{NUM_PROCESSES}: expected how many processes train together")
    if num_processes > 1 and PROCESS_ID not in os.environ:
        raise UsageError(f"{PROCESS_ID}: expected which of the processes this is, from 0")
    if process >= num_processes:
        raise UsageError(
            f"{PROCESS_ID}={process}: the processes are 0 to {num_processes - 1} "
            f"({NUM_PROCESSES}={num_processes})"
        )
    return num_processes, process


def _first_address(num_processes: int) -> str:
    addresses = os.environ.get(ADDRESSES, "").split(",")
    if len(addresses) not in (1, num_processes) or not re.fullmatch(r"\S+:\d+", addresses[0]):
        raise UsageError(
            f"{ADDRESSES}={','.join(addresses)}: expected host:port of the first process, or of "
            f"all {num_processes}, with commas between them"
        )
    return addresses[0]


def _start_jax(num_processes: int, process: int) -> Job:
    import jax
    import keras

    if num_processes > 1:
        address = _first_address(num_processes)
        # SIGTERM is ours: JAX would take it for a notice of the host's end.
        jax.config.update("jax_enable_preemption_service", False)
        # Within JAX no Python runs: a signal must end the waiting there by itself.
        earlier = {
            number: signal.signal(number, signal.SIG_DFL)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            # As keras.distribution.initialize does, which leaves the heartbeat at 100 s.
            jax.distributed.initialize(
                address,
                num_processes,
                process,
                initialization_timeout=_START_SECONDS,
                heartbeat_timeout_seconds=_LOST_SECONDS,
                # Under Slurm JAX would otherwise take one device a process.
                cluster_detection_method="deactivate",
            )
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise TrainingError(
                f"{address}: not all {num_processes} processes came together ({reason}): check "
                f"{ADDRESSES} and that each host runs the command"
            ) from error
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)
    if jax.device_count() != num_processes * jax.local_device_count():
        raise UsageError(
            f"{jax.local_device_count()} devices here, {jax.device_count()} on all {num_processes} "
            "hosts: each must have as many"
        )
    data_parallel = keras.distribution.DataParallel(auto_shard_dataset=False)
    keras.distribution.set_distribution(data_parallel)
    job = Job(
        num_processes,
        process,
        num_devices=jax.device_count(),
        mesh=jax.sharding.Mesh(np.array(jax.devices()), (BATCH_AXIS,)),
    )
    job.wait_for_all("start")
    return job


def _start_tensorflow() -> Job:
    import tensorflow as tf

    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    names = [device.name for device in devices]
    if len(names) == 1:
        return Job()
    return Job(num_devices=len(names), strategy=tf.distribute.MirroredStrategy(names))


def _watch_end() -> subprocess.Popen:
    """Start a small process that says so when this one ends without saying why.

    When a host is lost, JAX ends the process from a thread of its own, with a dump of addresses
    that names no cause; Python has no say in it.
    """
    line = (
        f"{os.path.basename(sys.argv[0])}: error: ended because another host was lost, or killed: "
        f"{_GO_ON}\n"
    )
    program = "import sys\nif not sys.stdin.read(): sys.stderr.write(sys.argv[1])"
    return subprocess.Popen(
        [sys.executable, "-S", "-c", program, line],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is not for it
    )
