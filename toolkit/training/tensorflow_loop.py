"""The training step of TensorFlow: several steps per call, on one or several devices of a host."""

from input_data import ALIGNMENT
from toolkit.backend import device_names
from toolkit.training.steps import KerasTrainer

import numpy as np
import tensorflow as tf

# A GPU may finish a step before Python prepares the next one. On a CPU, more steps per call would
# only delay the reaction to Ctrl-C.
_STEPS_PER_CALL = 16


class TensorFlowTrainer(KerasTrainer):
    """Trains a compiled Keras model, several steps per call on a GPU; see `KerasTrainer`."""

    def __init__(self, trainer, segments=None, job=None):
        super().__init__(trainer, segments, job)
        self.steps_per_call = _STEPS_PER_CALL if device_names() else 1
        self._step = tf.function(self._step, autograph=False, jit_compile=trainer.jit_compile)
        self.run = tf.function(self._run, autograph=False, reduce_retracing=True)

    def place(self, segments: np.ndarray, labels: np.ndarray) -> tuple[tf.Tensor, tf.Tensor]:
        if segments.ctypes.data % ALIGNMENT:  # TensorFlow aborts if a tensor is not aligned
            return tf.convert_to_tensor(segments), tf.convert_to_tensor(labels)
        shared = tf.experimental.dlpack.from_dlpack(segments.__dlpack__())  # without a copy
        return shared, tf.convert_to_tensor(labels)

    def _run(self, segments: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        if segments.shape[0] == 1:  # in a loop, a step's segments are copied
            return self._step(segments[0], labels[0])[tf.newaxis]
        return tf.map_fn(
            lambda step: self._step(segments[step], labels[step]),
            tf.range(tf.shape(segments)[0]),
            fn_output_signature=tf.float32,
            parallel_iterations=1,
        )

    def _step(self, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        strategy = tf.distribute.get_strategy()
        losses = strategy.run(self._replica_step, (x, y))
        return strategy.reduce("SUM", losses, axis=None)

    def _replica_step(self, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        """Train on this device's part of a batch; the loss is divided by the number of devices."""
        trainer, replica = self._trainer, tf.distribute.get_replica_context()
        size = x.shape[0] // replica.num_replicas_in_sync
        start = replica.replica_id_in_sync_group * size
        x, y = x[start : start + size], y[start : start + size]
        loss = trainer.compute_loss(x, y, trainer(x, training=True))
        variables = trainer.trainable_variables
        # A gradient tape would not see the gradient of convolutions in tensorflow_cpu.py.
        gradients = tf.gradients(loss, [variable.value for variable in variables])
        if tf.distribute.has_strategy():
            trainer.optimizer.apply(gradients, variables)
        else:
            # In a replica, `apply` would sum the gradients of all devices. The sum registers a
            # gradient, which would keep the graph in memory (see tensorflow_cpu.py).
            replica.merge_call(lambda strategy: trainer.optimizer.apply(gradients, variables))
        return loss
