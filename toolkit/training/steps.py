"""The training loop: order of the segments -> batches, read in threads -> steps -> losses.

`KerasTrainer` runs Keras's own step. Its subclasses for TensorFlow
(`toolkit.training.tensorflow_loop`) and JAX (`toolkit.training.jax_loop`) replace the step.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from input_data import SegmentReader
from toolkit.training.devices import Job

import numpy as np

if TYPE_CHECKING:
    import keras


class KerasTrainer:
    """Trains a compiled Keras model, one step per call.

    Keras's ``fit`` is not used: with TensorFlow, each call of ``fit`` keeps two batches in memory
    for as long as the process runs.

    Parameters
    ----------
    trainer : keras.Model
        Compiled model.
    segments : SegmentReader or None
        Training segments; None if only `run` is called.
    job : Job or None
        The devices that share each batch; None for one device.
    """

    steps_per_call = 1

    def __init__(
        self, trainer: "keras.Model", segments: SegmentReader | None = None, job: Job | None = None
    ):
        self._trainer = trainer
        self._segments = segments
        self._job = job or Job()

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

        def take(of_call: Sequence[float]) -> None:
            for loss in np.asarray(of_call).tolist():
                losses.append(loss)
                after_steps(len(losses), loss)

        waiting = ()
        try:
            for inputs in self._inputs(rows[:, self._job.share(batch_size)]):
                running = self.run(*inputs)
                take(waiting)  # read the losses of the previous call while this one runs
                waiting = running
            take(waiting)
        finally:
            self.finish()
        return float(np.mean(losses))

    def _inputs(self, rows: np.ndarray) -> Iterator[tuple]:
        """Yield the inputs of each call, given the segment numbers of each step."""
        batch_size = rows.shape[1]

        def place(*batches: np.ndarray) -> tuple:
            shape = (-1, batch_size)  # from (n_steps * B, …) to (n_steps, B, …)
            return self.place(*(part.reshape(*shape, part.shape[1]) for part in batches))

        yield from self._segments.batches(
            self.steps_per_call * batch_size,
            rows.reshape(-1),
            prefetch=3,
            drop_remainder=False,
            place=place,
        )

    def place(self, segments: np.ndarray, labels: np.ndarray) -> tuple:
        """Convert the inputs of a call to what `run` takes; called in the threads that read."""
        return segments, labels

    def run(self, segments: np.ndarray, labels: np.ndarray) -> Sequence[float]:
        """Run the steps of one call.

        Parameters
        ----------
        segments : np.ndarray [shape=(n_steps, batch, n_samples), dtype=float32 or int16]
        labels : np.ndarray [shape=(n_steps, batch, n_tags), dtype=float32]

        Returns
        -------
        sequence of float
            Loss of each step; with JAX and TensorFlow, an array that may still be computed.
        """
        losses = []
        for x, y in zip(segments, labels, strict=True):
            self._trainer.reset_metrics()  # otherwise the loss is the mean of all steps
            losses.append(self._trainer.train_on_batch(x, y))
        return losses

    def finish(self) -> None:
        """Assign the values of the variables after the last step, if `run` keeps them elsewhere."""
