"""The training step of JAX: several steps per call, segments in device memory if they fit.

A segment takes 236 kB, so the host cannot deliver tens of thousands of segments per second. If the
training segments fit into the device's memory, they are copied there once, batches are gathered on
the device by segment number, and many steps run in one call. The order of the segments is the same
as with every other backend. Several devices, of one or more hosts, share each batch.
"""

from collections.abc import Iterator

from input_data import SegmentReader
from toolkit import messages
from toolkit.training.devices import BATCH_AXIS, Job
from toolkit.training.steps import KerasTrainer

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
_STEPS_PER_CALL = 16


def fits_device(segments: SegmentReader) -> bool:
    """Return whether all segments fit into the memory of a GPU or TPU together with the network."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return False
    stats = device.memory_stats() or {}
    free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    num_samples = segments.num_segments * segments.num_samples
    return num_samples * np.dtype(segments.stored_type).itemsize <= _CACHE_SHARE * free


class JaxTrainer(KerasTrainer):
    """Trains a compiled Keras model, several steps per call on a GPU; see `KerasTrainer`.

    Parameters
    ----------
    device_cache : bool
        Store all segments in the memory of every device, as int16 if the shards store int16.
    """

    def __init__(self, trainer, segments=None, job=None, device_cache: bool = False):
        super().__init__(trainer, segments, job)
        self.steps_per_call = 1 if jax.devices()[0].platform == "cpu" else _STEPS_PER_CALL
        self._cache = _read_all(segments, self._job) if device_cache else None
        self._values = None  # of the variables, between the first call and `finish`
        self._run_batches = jax.jit(self._scan_batches, donate_argnums=0)
        self._run_cached = jax.jit(self._scan_cached, donate_argnums=0)

    def run(self, *inputs: np.ndarray) -> jax.Array:
        """Run the steps of one call.

        Parameters
        ----------
        *inputs : np.ndarray
            Either segments and labels as in `KerasTrainer.run` or, with a device cache, numbers of
            segments [shape=(n_steps, batch), dtype=int32]. With several processes, only this
            process's rows of each batch.

        Returns
        -------
        jax.Array [shape=(n_steps,), dtype=float32]
            Loss of each step.
        """
        inputs = [_place(self._job, part, PartitionSpec(None, BATCH_AXIS)) for part in inputs]
        if self._values is None:
            self._values = tuple([each.value for each in group] for group in self._variables())
        if len(inputs) == 1:
            self._values, losses = self._run_cached(self._values, self._cache, *inputs)
        else:
            self._values, losses = self._run_batches(self._values, *inputs)
        return losses

    def finish(self) -> None:
        """Assign the values after the last step to the variables."""
        if self._values is None:
            return
        for variables, values in zip(self._variables(), self._values, strict=True):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
        self._values = None

    def _variables(self) -> tuple[list, list, list]:
        trainer = self._trainer
        groups = trainer.trainable_variables, trainer.non_trainable_variables
        return *groups, trainer.optimizer.variables

    def _inputs(self, rows: np.ndarray) -> Iterator[tuple]:
        if self._cache is None:
            yield from super()._inputs(rows)
            return
        for start in range(0, len(rows), self.steps_per_call):
            yield (rows[start : start + self.steps_per_call].astype(np.int32),)

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
