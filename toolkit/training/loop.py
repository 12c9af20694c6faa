"""Compile the network for training, and train one epoch."""

import gc
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from input_data import shuffled_order
from toolkit import messages
from toolkit.data.records import INT16_SCALE
from toolkit.errors import ToolkitError, TrainingError, UsageError
from toolkit.training.options import TrainingOptions
from toolkit.training.stage import Run

import numpy as np

if TYPE_CHECKING:
    import keras

# Within a stage, the published program decays the learning rate: lr / (1 + decay * iteration).
ITERATION_DECAY = 1e-6

# A loop takes the order of the segments and a function, trains on the segments, calls the function
# with the number of steps done and the loss of the last step, and returns the mean loss.
Loop = Callable[[np.ndarray, Callable[[int, float], None]], float]


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
    loop = _choose_loop(run, trainer)

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

            return loop(order, after_steps)

    return train_epoch


def _choose_loop(run: Run, trainer: "keras.Model") -> Loop:
    """Return the toolkit's loop if JAX compiles the network, otherwise Keras's loop."""
    import keras

    options, segments, job = run.options, run.segments, run.job
    if keras.backend.backend() == "jax" and run.jit:
        from toolkit.training.jax_loop import JaxTrainer, fits_device

        gc.collect()  # free the previous stage's segments on the device (reference cycle)
        device_cache = options.device_cache == "on" or (
            options.device_cache == "auto"
            and job.num_processes == 1  # several processes read only their share of the segments
            and fits_device(segments)
        )
        runner = JaxTrainer(trainer, segments, device_cache, job=job)
        return lambda order, after_steps: runner.run_epoch(options.batch_size, order, after_steps)
    if options.device_cache == "on":
        raise UsageError(
            "--device-cache on: needs KERAS_BACKEND=jax and a compiled network: use auto or off"
        )
    return _keras_loop(run, trainer)


def _keras_loop(run: Run, trainer: "keras.Model") -> Loop:
    import keras

    batch_size = run.options.batch_size
    read_errors = []  # TensorFlow replaces exceptions that its datasets raise

    def train_epoch(order: np.ndarray, after_steps: Callable[[int, float], None]) -> float:
        def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            try:
                yield from run.segments.batches(batch_size, order)
            except ToolkitError as error:
                read_errors.append(error)
                raise

        watch = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda step, logs: after_steps(step + 1, float(logs["loss"]))
        )
        try:
            history = trainer.fit(
                run.job.spread(batches),
                steps_per_epoch=len(order) // batch_size,
                verbose=0,
                shuffle=False,  # already shuffled
                callbacks=[watch],
            )
        except Exception as error:
            raise (read_errors[0] if read_errors else error) from None
        return float(history.history["loss"][0])

    return train_epoch


def _seed_dropout(trainer: "keras.Model", seed: int, stage: int, epoch: int) -> None:
    """Seed the dropout layers for an epoch, so that a resumed run draws the same masks.

    Keras does not save the random state of layers.
    """
    for number, layer in enumerate(trainer.layers):
        if hasattr(layer, "seed_generator"):
            drawn = np.random.default_rng((seed, stage, epoch, number)).integers(2**31)
            layer.seed_generator.state.assign(np.array([drawn, 0]))
