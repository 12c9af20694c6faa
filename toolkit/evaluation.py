"""Predictions over clips, and the scores that compare them with the labels."""

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from input_data import Clip, Dataset
from toolkit.errors import UsageError

import numpy as np

if TYPE_CHECKING:
    from toolkit.models.checkpoints import Checkpoint

    import keras

DEFAULT_BATCH_SIZE = 32
NUM_RESAMPLES = 1000
CONFIDENCE = 0.95
_RESAMPLES_AT_ONCE = 128  # their counts stay in a core's cache


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
        Clips of any number of segments, long ones in parts (see `input_data.read_clips`).
    batch_size : int
        Segments a batch; the last one is filled up with silence, so that a compiled model sees
        one shape only.
    after_batch : callable
        Called after every batch.

    Yields
    ------
    clip : Clip
        In the order given, whole, and without its segments: they are let go as they are predicted.
    outputs : list of np.ndarray [shape=(n_segments, n_features), dtype=float32]
        The model's outputs for the clip's segments, those of all its parts.
    """
    waiting = deque()  # [clip, its segments so far, rows of each output so far]
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
        if clip.part == 0:  # so the clips before it are whole
            yield from _finished(waiting)
            waiting.append([replace(clip, segments=clip.segments[:0].copy()), 0, []])
        owner = waiting[-1]
        owner[1] += len(clip.segments)
        for segment in clip.segments:
            batch[len(owners)] = segment
            owners.append(owner)
            if len(owners) == batch_size:
                flush()
    if owners:
        flush()
    yield from _finished(waiting)


def clip_mean(outputs: np.ndarray) -> np.ndarray:
    """Take a clip's value as the mean of its segments', in float64 so that near-ties stay ordered.

    Parameters
    ----------
    outputs : np.ndarray [shape=(n_segments, n_features)]
        A clip's outputs, as `predict_clips` yields them.

    Returns
    -------
    np.ndarray [shape=(n_features,), dtype=float64]
    """
    return outputs.mean(axis=0, dtype=np.float64)


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


@dataclass
class Resamples:
    """Scores of bootstrap resamples of the clips.

    Attributes
    ----------
    roc_auc, pr_auc : np.ndarray [shape=(n_resamples, n_tags)]
        As in `Scores`; NaN where a resample does not have both classes.
    """

    roc_auc: np.ndarray
    pr_auc: np.ndarray

    @property
    def macro_roc_auc(self) -> np.ndarray:
        """Mean ROC AUC of each resample: (n_resamples,)."""
        return _row_means(self.roc_auc)

    @property
    def macro_pr_auc(self) -> np.ndarray:
        """Mean average precision of each resample: (n_resamples,)."""
        return _row_means(self.pr_auc)


def _row_means(values: np.ndarray) -> np.ndarray:
    is_known = ~np.isnan(values)
    sums = np.where(is_known, values, 0).sum(axis=1)
    with np.errstate(invalid="ignore"):
        return sums / is_known.sum(axis=1)


def bootstrap(
    labels: np.ndarray,
    predictions: np.ndarray,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Resamples:
    """Score resamples of the clips, drawn with replacement.

    A resample is the same clips for every tag, and for every model that is scored on as many clips
    with the same seed: differences between models are paired.

    Parameters
    ----------
    labels, predictions : np.ndarray [shape=(n_clips, n_tags)]
        As in `score`.
    num_resamples : int
        How many.
    seed : int
        Of the clips that are drawn.
    """
    num_clips, num_tags = np.shape(labels)
    random = np.random.default_rng(seed)
    roc_auc, pr_auc = np.empty((2, num_resamples, num_tags))
    for start in range(0, num_resamples, _RESAMPLES_AT_ONCE):
        rows = slice(start, min(start + _RESAMPLES_AT_ONCE, num_resamples))
        drawn = random.integers(num_clips, size=(rows.stop - start, num_clips))
        counts = np.stack([np.bincount(clips, minlength=num_clips) for clips in drawn], axis=1)
        roc_auc[rows], pr_auc[rows] = weighted_scores(labels, predictions, counts)
    return Resamples(roc_auc, pr_auc)


def weighted_scores(
    labels: np.ndarray, predictions: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Score predictions where each clip counts as many times as is said.

    Both scores follow from how much lies below each positive clip, so clips are ranked once a tag
    for all resamples.

    Parameters
    ----------
    labels, predictions : np.ndarray [shape=(n_clips, n_tags)]
        As in `score`.
    counts : np.ndarray [shape=(n_clips, n_resamples), dtype=int]
        How often each clip is in each resample.

    Returns
    -------
    roc_auc, pr_auc : np.ndarray [shape=(n_resamples, n_tags)]
        As scikit-learn's ``roc_auc_score`` and ``average_precision_score`` give them with these
        weights; NaN where there are not both classes.
    """
    labels = np.asarray(labels) > 0
    counts = np.ascontiguousarray(counts, np.int32)
    roc_auc, pr_auc = np.empty((2, counts.shape[1], labels.shape[1]))
    total = counts.sum(axis=0)  # (num_resamples,)
    # Weight of the clips before each place, from the lowest prediction up, and of the positives.
    before = np.zeros((len(counts) + 1, counts.shape[1]), np.int32)
    for tag in range(labels.shape[1]):
        order = np.argsort(predictions[:, tag], kind="stable")
        ranked = predictions[order, tag]
        np.cumsum(counts[order], axis=0, out=before[1:])
        places = np.flatnonzero(labels[order, tag])  # of the positives
        weights = counts[order[places]]  # (num_positives, num_resamples)
        positives_before = np.zeros((len(places) + 1, counts.shape[1]), np.int32)
        np.cumsum(weights, axis=0, out=positives_before[1:])
        # Clips with the same prediction as a positive one: places from first to before last.
        first = np.searchsorted(ranked, ranked[places], "left")
        last = np.searchsorted(ranked, ranked[places], "right")
        positives_below = positives_before[np.searchsorted(places, first)]
        positives_to = positives_before[np.searchsorted(places, last)]
        negatives_below = before[first] - positives_below
        negatives_tied = before[last] - positives_to - negatives_below
        num_positives = positives_before[-1].astype(np.float64)
        num_negatives = total - num_positives
        with np.errstate(divide="ignore", invalid="ignore"):
            # In halves, so that sums stay whole.
            won = (weights * (2 * negatives_below + negatives_tied).astype(np.int64)).sum(axis=0)
            roc_auc[:, tag] = won / (2 * num_positives * num_negatives)
            precision = (num_positives - positives_below) / np.maximum(total - before[first], 1)
            pr_auc[:, tag] = (weights * precision).sum(axis=0) / num_positives
        pr_auc[num_negatives == 0, tag] = np.nan
    return roc_auc, pr_auc


def interval(
    values: np.ndarray, confidence: float = CONFIDENCE
) -> tuple[np.ndarray | np.float64, np.ndarray | np.float64]:
    """Find between which values resamples lie, by their percentiles.

    Parameters
    ----------
    values : np.ndarray [shape=(n_resamples, ...)]
        Scores of resamples, or differences of such; NaN ones are left out.
    confidence : float
        Share of the resamples within the interval.

    Returns
    -------
    low, high : np.ndarray [shape=(...)]
        NaN where every resample is NaN.
    """
    if not np.size(values):  # no tags
        nothing = np.full(np.shape(values)[1:], np.nan)
        return nothing, nothing
    tails = 50 * (1 - confidence), 50 * (1 + confidence)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        low, high = np.nanpercentile(values, tails, axis=0)
    return low, high


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
