"""The training loop for JAX: several steps per dispatch, segments in device memory if they fit.

A segment takes 236 kB, so the host cannot deliver tens of thousands of segments per second. If the
training segments fit into the device's memory, they are copied there once, batches are gathered on
the device by segment number, and many steps run in one call. The order of the segments is the same
as with every other backend. Several devices, of one or more hosts, share each batch.
"""

from collections.abc import Callable, Iterator

from input_data import SegmentReader
from toolkit import messages
from toolkit.training.devices import BATCH_AXIS, Job

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

# Share of the device's free memory that segments may use. The rest is for the network, whose
# activations grow with the batch size.
_CACHE_SHARE = 0.6
_CACHE_CHUNK = 256  # segments copied to the device at a time: 60 MB of float32
# A GPU may finish a step before Python prepares the next call. More steps per call need more
# memory: 16 batches of 256 segments are 1 GB.
_STEPS_PER_DISPATCH = 16


def fits_device(segments: SegmentReader) -> bool:
    """Return whether all segments fit into the memory of a GPU or TPU together with the network."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return False
    stats = device.memory_stats() or {}
    free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    num_samples = segments.num_segments * segments.num_samples
    return num_samples * np.dtype(segments.stored_type).itemsize <= _CACHE_SHARE * free


class JaxTrainer:
    """Trains a compiled Keras model, several steps per call.

    Parameters
    ----------
    trainer : keras.Model
        Compiled model. Its variables are read before each epoch and updated after it.
    segments : SegmentReader or None
        Training segments; None if only `run` is called.
    device_cache : bool
        Store all segments in the memory of every device, as int16 if the shards store int16.
    steps_per_dispatch : int or None
        Steps per call; None for 1 on a CPU and 16 on other devices.
    job : Job or None
        The devices that share each batch; None for one device.
    """

    def __init__(
        self,
        trainer: keras.Model,
        segments: SegmentReader | None = None,
        device_cache: bool = False,
        steps_per_dispatch: int | None = None,
        job: Job | None = None,
    ):
        self._trainer = trainer
        self._segments = segments
        self._job = job or Job()
        on_cpu = jax.devices()[0].platform == "cpu"
        self.steps_per_dispatch = steps_per_dispatch or (1 if on_cpu else _STEPS_PER_DISPATCH)
        self._cache = _read_all(segments, self._job) if device_cache else None
        self._run_batches = jax.jit(self._scan_batches, donate_argnums=0)
        self._run_cached = jax.jit(self._scan_cached, donate_argnums=0)

    def run_epoch(
        self, batch_size: int, order: np.ndarray, after_steps: Callable[[int, float], None]
    ) -> float:
        """Train on the segments in the given order.

        Parameters
        ----------
        batch_size : int
            Segments per step; a smaller last batch is dropped.
        order : np.ndarray [shape=(n,), dtype=int]
            Numbers of the epoch's segments.
        after_steps : callable
            Called after each step with the number of steps done and the loss of the last step.

        Returns
        -------
        float
            Mean loss of the steps.
        """
        num_steps = len(order) // batch_size
        rows = order[: num_steps * batch_size].reshape(num_steps, batch_size)
        losses = []

        def take(dispatched: jax.Array | None) -> None:
            for loss in [] if dispatched is None else np.asarray(dispatched):
                losses.append(float(loss))
                after_steps(len(losses), losses[-1])

        state = self.state()
        try:
            waiting = None
            for inputs in self._dispatches(rows):
                state, dispatched = self.run(state, *inputs)
                take(waiting)  # read the losses of the previous call while this one runs
                waiting = dispatched
            take(waiting)
        finally:
            self.set_state(state)
        return float(np.mean(losses))

    def state(self) -> tuple[list, list, list]:
        """Return the values of the trainable, non-trainable and optimizer variables."""
        return tuple([variable.value for variable in group] for group in self._variables())

    def set_state(self, state: tuple[list, list, list]) -> None:
        """Assign the values that `state` returned, or `run` updated, to the variables."""
        for variables, values in zip(self._variables(), state, strict=True):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)

    def _variables(self) -> tuple[list, list, list]:
        trainer = self._trainer
        groups = trainer.trainable_variables, trainer.non_trainable_variables
        return *groups, trainer.optimizer.variables

    def run(self, state: tuple, *inputs) -> tuple[tuple, jax.Array]:
        """Run the steps of one dispatch.

        Parameters
        ----------
        state : tuple
            Values as `state` returns them; their memory is reused (donated).
        *inputs : np.ndarray
            Either numbers of cached segments [shape=(n_steps, batch), dtype=int32], or segments
            [shape=(n_steps, batch, n_samples), dtype=float32 or int16] and labels
            [shape=(n_steps, batch, n_tags)]. With several processes, only this process's rows of
            each batch.

        Returns
        -------
        state : tuple
            Values after the steps.
        losses : jax.Array [shape=(n_steps,), dtype=float32]
            Loss of each step.
        """
        inputs = [_place(self._job, part, PartitionSpec(None, BATCH_AXIS)) for part in inputs]
        if len(inputs) == 1:
            return self._run_cached(state, self._cache, *inputs)
        return self._run_batches(state, *inputs)

    def set_cache(self, segments: np.ndarray, labels: np.ndarray) -> None:
        """Copy segments and labels to the device, so that `run` takes segment numbers."""
        self._cache = (jnp.asarray(segments), jnp.asarray(labels))

    def _dispatches(self, rows: np.ndarray) -> Iterator[tuple]:
        steps = self.steps_per_dispatch
        rows = rows[:, self._job.share(rows.shape[1])]
        if self._cache is not None:
            for start in range(0, len(rows), steps):
                yield (rows[start : start + steps].astype(np.int32),)
            return
        num_rows = rows.shape[1]
        for batch in self._segments.batches(
            steps * num_rows, rows.reshape(-1), prefetch=3, drop_remainder=False
        ):
            yield tuple(part.reshape(-1, num_rows, part.shape[-1]) for part in batch)

    def _scan_batches(self, state, segments, labels):
        return _scan(lambda s, xy: self._step(s, *xy), state, (segments, labels))

    def _scan_cached(self, state, cache, rows):
        segments, labels = cache

        def step(state, row):
            return self._step(state, segments[row[0]], labels[row[0]])

        return _scan(step, state, (rows,))

    def _step(self, state, x, y):
        trainer = self._trainer
        trainable, non_trainable, optimizer = state

        def loss_of(trainable):
            predictions, updated, penalties = trainer.stateless_call(
                trainable, non_trainable, x, training=True, return_losses=True
            )
            loss = keras.ops.mean(keras.losses.binary_crossentropy(y, predictions))
            return loss + sum(penalties), updated

        (loss, non_trainable), gradients = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        trainable, optimizer = trainer.optimizer.stateless_apply(optimizer, gradients, trainable)
        return (trainable, non_trainable, optimizer), loss


def _scan(step, state, inputs: tuple):
    """Run a step over the first axis of its inputs; without a loop if there is only one step.

    In a loop, XLA's CPU device does not use its fast convolution kernels.
    """
    if len(inputs[0]) > 1:
        return jax.lax.scan(step, state, inputs)
    state, loss = step(state, tuple(part[0] for part in inputs))
    return state, loss[jnp.newaxis]


class JaxPredictor:
    """Predicts on all devices of this host, independently of other hosts.

    Parameters
    ----------
    network : keras.Model
        Network with one output; each call uses its current weights.
    """

    def __init__(self, network: keras.Model):
        self.input_shape = network.input_shape
        self._network = network
        mesh = jax.sharding.Mesh(np.array(jax.local_devices()), (BATCH_AXIS,))
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        self._shared_out = NamedSharding(mesh, PartitionSpec(BATCH_AXIS))
        self._copied, self._copies = [], []  # the network's values, and their copies on this host
        self._predict = jax.jit(
            lambda weights, x: network.stateless_call(*weights, x, training=False)[0],
            out_shardings=self._everywhere,
        )

    def predict_on_batch(self, batch: np.ndarray) -> np.ndarray:
        """Predict a batch [shape=(batch, n_samples)] as probabilities [shape=(batch, n_tags)]."""
        weights = self._weights_of_host()
        return np.asarray(self._predict(weights, jax.device_put(batch, self._shared_out)))

    def _weights_of_host(self) -> tuple[list[jax.Array], list[jax.Array]]:
        """Return copies of the weights on this host's devices; copy them again if they changed."""
        network = self._network
        groups = network.trainable_variables, network.non_trainable_variables
        values = [variable.value for variables in groups for variable in variables]
        is_new = [before is not now for before, now in zip(self._copied, values, strict=False)]
        if any(is_new) or not self._copied:
            self._copied = values
            self._copies = [jax.device_put(np.asarray(v), self._everywhere) for v in values]
        return self._copies[: len(groups[0])], self._copies[len(groups[0]) :]


def _place(job: Job, part: np.ndarray, spec: PartitionSpec):
    """Copy this process's part of an array to its devices."""
    if job.mesh is None:
        return part
    return jax.make_array_from_process_local_data(NamedSharding(job.mesh, spec), part)


def _read_all(segments: SegmentReader, job: Job) -> tuple[jax.Array, jax.Array]:
    """Copy all segments to every device, in chunks, so that the host stores only few of them."""
    everywhere = job.mesh and NamedSharding(job.mesh, PartitionSpec())
    num_rows = segments.num_segments
    samples = jnp.zeros((num_rows, segments.num_samples), segments.stored_type, device=everywhere)
    labels = jnp.zeros((num_rows, segments.num_tags), jnp.float32, device=everywhere)

    def place(whole, part, start):
        return jax.lax.dynamic_update_slice(whole, part, (start, 0))

    # The argument is donated, so that a device does not store the segments twice.
    place = jax.jit(place, donate_argnums=0, out_shardings=everywhere)
    order = np.arange(num_rows)
    start = 0
    with messages.progress(
        total=num_rows, unit="segment", desc="copying to the device", leave=False
    ) as bar:
        for x, y in segments.batches(_CACHE_CHUNK, order, drop_remainder=False):
            x, y = (_place(job, part, PartitionSpec()) for part in (x, y))
            samples, labels = place(samples, x, start), place(labels, y, start)
            start += len(x)
            bar.update(len(x))
    return samples, labels
