"""Train on several devices and hosts.

With JAX, one process per host trains on all devices of its host, through Keras's ``DataParallel``
(`toolkit.training.hosts` connects the processes). Every process runs the same steps of the same
program; only the first process writes files and prints messages. With TensorFlow, the devices of
one host train together, through ``tf.distribute.MirroredStrategy``.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit import backend, messages
from toolkit.errors import UsageError
from toolkit.training.hosts import NUM_PROCESSES, connected, read_environment

import numpy as np

if TYPE_CHECKING:
    import jax
    import keras
    import tensorflow as tf

BATCH_AXIS = "batch"
# Some shared file systems show a file only a minute after another host has written it.
_FOLDER_SECONDS = 90
_RETRY_SECONDS = 3


@dataclass(frozen=True)
class Job:
    """The processes and devices that train together; by default, one device.

    Attributes
    ----------
    num_processes, process : int
        Number of processes, and the number of this process.
    num_devices : int
        Number of devices of all processes; each batch is divided among them.
    mesh : jax.sharding.Mesh or None
        All devices (JAX).
    strategy : tf.distribute.Strategy or None
        All devices (TensorFlow).
    """

    num_processes: int = 1
    process: int = 0
    num_devices: int = 1
    mesh: "jax.sharding.Mesh | None" = None
    strategy: "tf.distribute.Strategy | None" = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints messages."""
        return self.process == 0

    def say(self, message: str) -> None:
        """Print a message in the first process."""
        if self.is_first:
            messages.say(message)

    def write(self, network: "keras.Model", write_files: Callable[[], None]) -> None:
        """Write files in the first process; return when all processes may read them.

        Parameters
        ----------
        network : keras.Model
            Network whose weights are written.
        write_files : callable
            Writes the files.
        """
        if self.is_first:
            import keras

            # Under a distribution, creating a variable would wait for the other processes.
            distribution = keras.distribution.distribution()
            keras.distribution.set_distribution(None)
            self.synchronise_norms(network, False)
            try:
                write_files()
            finally:
                self.synchronise_norms(network)
                keras.distribution.set_distribution(distribution)
        self.wait_for_all("write")

    def share(self, batch_size: int) -> slice:
        """Return this process's rows of a batch."""
        size = batch_size // self.num_processes
        return slice(self.process * size, (self.process + 1) * size)

    def wait_for_all(self, what: str) -> None:
        """Wait until every process has reached this point."""
        if self.num_processes > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(what)

    def check_same(self, what: str, see: Callable[[], str], advice: str) -> None:
        """Check that all processes see the same value.

        Parameters
        ----------
        what : str
            Name of the value, for the error message.
        see : callable
            Returns this process's value.
        advice : str
            What to do if the values differ.

        Raises
        ------
        UsageError
            The values differ.
        """
        if not self._agree(see):
            raise UsageError(f"{what}: not the same on all hosts: {advice}")

    def check_same_folder(self, folder: str, see: Callable[[], str]) -> None:
        """Check that all processes see the same files in a folder; retry for 90 seconds.

        Raises
        ------
        UsageError
            The files still differ.
        """
        for _ in range(_FOLDER_SECONDS // _RETRY_SECONDS):
            if self._agree(see):
                return
            time.sleep(_RETRY_SECONDS)
        self.check_same(folder, see, "use a folder that all hosts share")

    def _agree(self, see: Callable[[], str]) -> bool:
        if self.num_processes == 1:
            return True
        # JAX exchanges arrays of numbers, not text.
        digest = np.frombuffer(hashlib.sha256(see().encode()).digest(), np.uint8)
        digests = self.gather(digest[np.newaxis])  # (num_processes, 32)
        return bool((digests == digests[0]).all())

    def of_first(self, value: float) -> float:
        """Return the first process's number in every process."""
        # As bytes, because JAX would round float64 to float32.
        bits = np.array([value], np.float64).view(np.uint8)
        return float(self.gather(bits)[: len(bits)].view(np.float64)[0])

    def gather(self, part: np.ndarray) -> np.ndarray:
        """Concatenate the arrays of all processes, in every process.

        Parameters
        ----------
        part : np.ndarray [shape=(n, ...)]
            Array of this process, of a type of at most 4 bytes, since JAX would round larger ones;
            n may differ between processes.
        """
        if self.num_processes == 1:
            return part
        from jax.experimental import multihost_utils

        num_rows = multihost_utils.process_allgather(np.array(len(part), np.int32))
        # process_allgather needs the same shape in all processes.
        padded = np.zeros((num_rows.max(), *part.shape[1:]), part.dtype)
        padded[: len(part)] = part
        parts = multihost_utils.process_allgather(padded)  # (num_processes, max n, ...)
        return np.concatenate([each[:n] for each, n in zip(parts, num_rows, strict=True)])

    def check_batch_size(self, batch_size: int) -> None:
        """Raise `UsageError` if a batch cannot be divided evenly among the devices."""
        rest = batch_size % self.num_devices
        if rest:
            lower, higher = batch_size - rest, batch_size - rest + self.num_devices
            nearest = f"{lower} or {higher}" if lower else f"{higher}"
            raise UsageError(
                f"--batch-size {batch_size}: cannot be divided evenly among {self.num_devices} "
                f"devices: use {nearest}"
            )

    def choose_jit(self, choice: str, block: str) -> bool:
        """Return whether to compile the network (see `toolkit.backend.choose_jit`).

        Raises
        ------
        UsageError
            Several JAX devices train together, which needs a compiled network.
        """
        if self.strategy and choice == "auto":
            # With several devices, TensorFlow cannot compile on every kind of device.
            return False
        jit = backend.choose_jit(choice, block)
        if self.mesh and not jit:
            raise UsageError(
                "--jit off: --distribute with JAX needs a compiled network: omit --jit off"
            )
        return jit

    def describe(self, jit: bool, mixed_precision: bool) -> str:
        """Return a line that names the backend and the devices."""
        import keras

        titles = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
        names = backend.device_names()
        device = ", ".join(dict.fromkeys(names)) if names else f"CPU ({os.cpu_count()} cores)"
        if self.num_devices > 1:
            processes = f"process{'es' if self.num_processes > 1 else ''}"
            device += f", {self.num_devices} devices in {self.num_processes} {processes}"
        precision = "mixed bfloat16" if mixed_precision else "float32"
        how = "compiled" if jit else "not compiled"
        return f"{titles[keras.backend.backend()]} backend on {device}, {precision}, {how}"

    def synchronise_norms(self, network: "keras.Model", synchronised: bool = True) -> None:
        """Make batch normalisation use the statistics of the whole batch, not of a device's part.

        Only TensorFlow needs this setting. Model files must not contain the setting, because other
        backends reject it.
        """
        if self.strategy:
            for layer in network.layers:
                if type(layer).__name__ == "BatchNormalization":
                    layer.synchronized = synchronised


@contextmanager
def open_job(distribute: bool, check_stop: Callable[[], None]) -> Iterator[Job]:
    """Find the devices, connect the processes (JAX), and make Keras use all devices.

    This function must be called before Keras computes anything.

    Parameters
    ----------
    distribute : bool
        Whether to use more than one device.
    check_stop : callable
        Raises if this process received a signal. In this case the other processes probably
        received the signal too and are not reported as lost.

    Yields
    ------
    Job
        The processes and devices that train together.

    Raises
    ------
    UsageError
        The environment variables are invalid, or the backend does not support distribution.
    TrainingError
        Another host did not start or was lost.
    """
    if not distribute:
        yield Job()
        return
    import keras

    name = keras.backend.backend()
    num_processes, process = read_environment()
    if name == "tensorflow":
        if num_processes > 1:
            raise UsageError(
                f"{NUM_PROCESSES}={num_processes}: the TensorFlow backend trains on one host: "
                "several hosts need KERAS_BACKEND=jax"
            )
        job = _find_tensorflow_devices()
        # TensorFlow copies only variables that are created in the scope to all devices.
        with job.strategy.scope() if job.strategy else nullcontext():
            yield job
        return
    if name != "jax":
        raise UsageError(
            f"--distribute: needs KERAS_BACKEND=jax, or tensorflow on one host; this is {name}"
        )

    with connected(num_processes, process, check_stop):
        try:
            yield _start_jax(num_processes, process)
        finally:
            # Otherwise a later training in this process would inherit it.
            keras.distribution.set_distribution(None)


def _start_jax(num_processes: int, process: int) -> Job:
    import jax
    import keras

    # `Job.share` gives every process the same number of rows.
    if jax.device_count() != num_processes * jax.local_device_count():
        raise UsageError(
            f"{jax.local_device_count()} devices on this host, {jax.device_count()} on all "
            f"{num_processes} hosts: every host must have the same number of devices"
        )
    # Each process reads only its own rows, so Keras must not divide them again.
    keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), (BATCH_AXIS,))
    return Job(num_processes, process, num_devices=jax.device_count(), mesh=mesh)


def _find_tensorflow_devices() -> Job:
    import tensorflow as tf

    # A CPU can be divided into several devices, as the tests do.
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    names = [device.name for device in devices]
    if len(names) == 1:
        return Job()
    return Job(num_devices=len(names), strategy=tf.distribute.MirroredStrategy(names))
