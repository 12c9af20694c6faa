"""Predictions over clips, and the scores that compare them with the labels."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from errors import UsageError
from input_data import Clip, Dataset

import numpy as np

if TYPE_CHECKING:
    from checkpoints import Checkpoint

    import keras

DEFAULT_BATCH_SIZE = 32


@dataclass
class Scores:
    """How well predictions order clips, tag by tag.

    Attributes
    ----------
    roc_auc, pr_auc : np.ndarray [shape=(n_tags,)]
        Area under each tag's receiver operating characteristic, and its average precision; NaN
        where the clips do not have both classes.
    positives : np.ndarray [shape=(n_tags,), dtype=int]
        Clips that carry the tag.
    """

    roc_auc: np.ndarray
    pr_auc: np.ndarray
    positives: np.ndarray

    @property
    def macro_roc_auc(self) -> float:
        """Mean ROC AUC over the tags that can be scored; NaN without any."""
        return _mean(self.roc_auc)

    @property
    def macro_pr_auc(self) -> float:
        """Mean average precision over the tags that can be scored; NaN without any."""
        return _mean(self.pr_auc)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def predict_clips(
    model: "keras.Model",
    clips: Iterable[Clip],
    batch_size: int = DEFAULT_BATCH_SIZE,
    after_batch: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Clip, list[np.ndarray]]]:
    """Run a model over clips, in batches that go across clips.

    Parameters
    ----------
    model : keras.Model
        From segments to one or several arrays of one row a segment.
    clips : iterable of Clip
        Clips of any number of segments.
    batch_size : int
        Segments a batch; the last one is filled up with silence, so that a compiled model sees
        one shape only.
    after_batch : callable
        Called after every batch.

    Yields
    ------
    clip : Clip
        In the order given.
    outputs : list of np.ndarray [shape=(n_segments, n_features), dtype=float32]
        The model's outputs for the clip's segments.
    """
    waiting = deque()  # (clip, its segments still to come, rows of each output so far)
    batch = np.zeros((batch_size, model.input_shape[1]), np.float32)
    owners = []

    def flush() -> None:
        outputs = model.predict_on_batch(batch)
        outputs = [outputs] if not isinstance(outputs, list | tuple) else outputs
        for row, owner in enumerate(owners):
            owner[2].append([np.asarray(output[row], np.float32) for output in outputs])
        owners.clear()
        batch.fill(0)
        after_batch()

    for clip in clips:
        owner = (clip, len(clip.segments), [])
        waiting.append(owner)
        for segment in clip.segments:
            batch[len(owners)] = segment
            owners.append(owner)
            if len(owners) == batch_size:
                flush()
        yield from _finished(waiting)
    if owners:
        flush()
    yield from _finished(waiting)


def _finished(waiting: deque) -> Iterator[tuple[Clip, list[np.ndarray]]]:
    while waiting and len(waiting[0][2]) == waiting[0][1]:
        clip, _, rows = waiting.popleft()
        yield clip, [np.stack(output) for output in zip(*rows, strict=True)]


def check_fits(dataset: Dataset, checkpoint: "Checkpoint") -> None:
    """Check that a model's inputs and outputs are those of a dataset.

    Raises
    ------
    UsageError
        Length of a segment, sample rate, or tags differ.
    """
    for what, of_model, of_data in (
        ("samples a segment", checkpoint.config.num_samples, dataset.num_samples),
        ("Hz", checkpoint.sample_rate, dataset.sample_rate),
        ("tags", checkpoint.config.num_tags, len(dataset.tags)),
    ):
        if of_model != of_data:
            raise UsageError(
                f"the model is for {of_model} {what}, {dataset.path} has {of_data}: "
                "they do not belong together"
            )
    has_names = not all(tag.startswith("tag ") for tag in checkpoint.tags)
    if has_names and checkpoint.tags != dataset.tags:
        place, pair = next(
            (place, pair)
            for place, pair in enumerate(zip(checkpoint.tags, dataset.tags, strict=True))
            if pair[0] != pair[1]
        )
        raise UsageError(
            f"tag {place} is {pair[0]!r} in the model and {pair[1]!r} in {dataset.path}: "
            "they were made for different tags"
        )


def score(labels: np.ndarray, predictions: np.ndarray) -> Scores:
    """Score the predictions of clips.

    Parameters
    ----------
    labels : np.ndarray [shape=(n_clips, n_tags)]
        0 or 1.
    predictions : np.ndarray [shape=(n_clips, n_tags)]
        Mean of the segments' probabilities.

    Returns
    -------
    Scores
        As scikit-learn's ``roc_auc_score`` and ``average_precision_score`` compute them.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    labels = np.asarray(labels)
    num_tags = labels.shape[1]
    roc_auc, pr_auc = np.full(num_tags, np.nan), np.full(num_tags, np.nan)
    for tag in range(num_tags):
        if len(np.unique(labels[:, tag])) == 2:
            roc_auc[tag] = roc_auc_score(labels[:, tag], predictions[:, tag])
            pr_auc[tag] = average_precision_score(labels[:, tag], predictions[:, tag])
    return Scores(roc_auc, pr_auc, labels.sum(axis=0).astype(int))


def binary_crossentropy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Mean loss of probabilities, as Keras computes it but in float64.

    Parameters
    ----------
    labels, predictions : np.ndarray [shape=(n_segments, n_tags)]
        0 or 1, and probabilities.
    """
    epsilon = 1e-7  # Keras's: the loss of a certain error is large, not infinite
    p = np.clip(np.asarray(predictions, np.float64), epsilon, 1 - epsilon)
    return float(-np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p)))
