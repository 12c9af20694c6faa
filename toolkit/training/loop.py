"""Compile the network for training, and train one epoch."""

import gc
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from input_data import SegmentReader, shuffled_order
from toolkit import messages
from toolkit.data.records import INT16_SCALE
from toolkit.errors import TrainingError, UsageError
from toolkit.training.devices import Job
from toolkit.training.options import TrainingOptions
from toolkit.training.stage import Run
from toolkit.training.steps import KerasTrainer

import numpy as np

if TYPE_CHECKING:
    import keras

# Within a stage, the published program decays the learning rate: lr / (1 + decay * iteration).
ITERATION_DECAY = 1e-6


def compile_trainer(
    network: "keras.Model", options: TrainingOptions, stage: int, jit: bool
) -> "keras.Model":
    """Compile a model that shares the network's layers and has its own optimizer.

    The loss is binary cross-entropy plus the L2 penalty of the convolution kernels. The optimizer
    is stochastic gradient descent with Nesterov momentum; its learning rate at iteration i is
    ``lr * lr_decay**stage / (1 + 1e-6 * i)``. The model also takes int16 samples, as shards may
    store them, so that only half the bytes are copied to the device.

    Parameters
    ----------
    network : keras.Model
        Network to train. With TensorFlow on a CPU, operations that train slowly are replaced in it
        (see `toolkit.training.tensorflow_cpu`).
    options : TrainingOptions
        Learning rate, decay of the learning rate, and momentum.
    stage : int
        Number of the stage, from 0.
    jit : bool
        Whether to compile with XLA.
    """
    import keras

    trainer = keras.Model(network.input, network.outputs[0], name="trainer")
    # Not a layer, because the model's files would then contain it.
    call = trainer.call
    trainer.call = lambda segments, **more: call(_as_float32(segments), **more)
    schedule = keras.optimizers.schedules.InverseTimeDecay(
        options.stage_lr(stage), decay_steps=1, decay_rate=ITERATION_DECAY
    )
    optimizer = keras.optimizers.SGD(schedule, momentum=options.momentum, nesterov=True)
    trainer.compile(optimizer, loss="binary_crossentropy", jit_compile=jit)
    # TensorFlow would trace the step a second time if the first trace created these variables.
    optimizer.build(trainer.trainable_variables)
    if keras.backend.backend() == "tensorflow" and not jit:
        from toolkit.training.tensorflow_cpu import replace_operations

        replace_operations(network)
    return trainer


def _as_float32(segments):
    import keras

    if keras.backend.standardize_dtype(segments.dtype) != "int16":
        return segments
    return keras.ops.cast(segments, "float32") / INT16_SCALE


def make_epoch(run: Run, stage: int, trainer: "keras.Model") -> Callable[[int], float]:
    """Return a function that trains one epoch, given its number, and returns the mean loss.

    Raises
    ------
    UsageError
        The options request a device cache that the backend does not support.
    """
    options, segments = run.options, run.segments
    run.job.synchronise_norms(trainer)
    gc.collect()  # free the previous stage, whose objects refer to each other
    runner = choose_trainer(trainer, segments, run.job, options.device_cache)

    def train_epoch(epoch: int) -> float:
        _seed_dropout(trainer, options.seed, stage, epoch)
        order = shuffled_order(segments.num_segments, options.seed, stage, epoch)
        num_steps, hidden = len(order) // options.batch_size, not run.job.is_first
        with messages.progress(
            total=num_steps, desc=f"epoch {epoch}", unit="step", leave=False, disable=hidden
        ) as bar:

            def after_steps(num_done: int, loss: float) -> None:
                run.stop.check()
                if not math.isfinite(loss):
                    raise TrainingError(
                        f"the loss is {loss} at step {num_done - 1} of epoch {epoch}: a lower "
                        "--lr may help; the best checkpoint is kept"
                    )
                bar.update(num_done - bar.n)
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

            return runner.run_epoch(options.batch_size, order, after_steps)

    return train_epoch


def choose_trainer(
    trainer: "keras.Model",
    segments: SegmentReader | None = None,
    job: Job | None = None,
    device_cache: str = "off",
) -> KerasTrainer:
    """Return the object that runs the steps of a compiled model on its backend.

    Parameters
    ----------
    trainer : keras.Model
        Result of `compile_trainer`.
    segments, job
        See `KerasTrainer`.
    device_cache : {'auto', 'on', 'off'}
        Whether to keep the segments in device memory; ``auto`` keeps them if they fit.

    Raises
    ------
    UsageError
        The backend does not support a device cache.
    """
    import keras

    name = keras.backend.backend()
    if name == "jax" and trainer.jit_compile:
        from toolkit.training.jax_loop import JaxTrainer, fits_device

        if device_cache == "auto":  # several processes read only their share of the segments
            device_cache = "on" if job.num_processes == 1 and fits_device(segments) else "off"
        return JaxTrainer(trainer, segments, job, device_cache == "on")
    if device_cache == "on":
        raise UsageError(
            "--device-cache on: needs KERAS_BACKEND=jax and a compiled network: use auto or off"
        )
    if name == "tensorflow":
        from toolkit.training.tensorflow_loop import TensorFlowTrainer

        return TensorFlowTrainer(trainer, segments, job)
    return KerasTrainer(trainer, segments, job)


def _seed_dropout(trainer: "keras.Model", seed: int, stage: int, epoch: int) -> None:
    """Seed the dropout layers for an epoch, so that a resumed run draws the same masks.

    Keras does not save the random state of layers.
    """
    for number, layer in enumerate(trainer.layers):
        if hasattr(layer, "seed_generator"):
            drawn = np.random.default_rng((seed, stage, epoch, number)).integers(2**31)
            layer.seed_generator.state.assign(np.array([drawn, 0]))
