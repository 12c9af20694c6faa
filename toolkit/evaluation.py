"""Scores of predictions, and bootstrap intervals of the scores."""

import warnings
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95
_NUM_PARTS = 20  # parts of the clips that the jackknife leaves out in turn
_RESAMPLES_AT_ONCE = 128  # so that their counts fit into the cache of a core


@dataclass
class Scores:
    """Scores of each tag: how well the predictions rank clips with the tag above other clips.

    Attributes
    ----------
    roc_auc, pr_auc : np.ndarray [shape=(n_tags,)]
        Area under the receiver operating characteristic of each tag, and average precision; NaN
        for tags that all clips carry or that no clip carries.
    positives : np.ndarray [shape=(n_tags,), dtype=int]
        Number of clips that carry the tag.
    """

    roc_auc: np.ndarray
    pr_auc: np.ndarray
    positives: np.ndarray

    @property
    def macro_roc_auc(self) -> float:
        """Mean ROC AUC over the tags with a score; NaN if no tag has a score."""
        return _mean(self.roc_auc)

    @property
    def macro_pr_auc(self) -> float:
        """Mean average precision over the tags with a score; NaN if no tag has a score."""
        return _mean(self.pr_auc)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def score(labels: np.ndarray, predictions: np.ndarray) -> Scores:
    """Compute ROC AUC and average precision of each tag, as scikit-learn does.

    Parameters
    ----------
    labels : np.ndarray [shape=(n_clips, n_tags)]
        0 or 1.
    predictions : np.ndarray [shape=(n_clips, n_tags)]
        Probabilities of the clips.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    labels = np.asarray(labels)
    num_tags = labels.shape[1]
    roc_auc, pr_auc = np.full(num_tags, np.nan), np.full(num_tags, np.nan)
    for tag in range(num_tags):
        # If all clips or none carry the tag, ROC AUC is undefined.
        if len(np.unique(labels[:, tag])) == 2:
            roc_auc[tag] = roc_auc_score(labels[:, tag], predictions[:, tag])
            pr_auc[tag] = average_precision_score(labels[:, tag], predictions[:, tag])
    return Scores(roc_auc, pr_auc, labels.sum(axis=0).astype(int))


@dataclass
class Resamples:
    """Scores of the clips and of resamples, from which `interval` computes intervals.

    Attributes
    ----------
    roc_auc, pr_auc : np.ndarray [shape=(n_rows, n_tags)]
        As in `Scores`. The first row contains the scores of the clips, the next 20 those of the
        clips without one part in 20, the others those of bootstrap resamples.
    """

    roc_auc: np.ndarray
    pr_auc: np.ndarray

    def __sub__(self, other: "Resamples") -> "Resamples":
        """Return the differences from another model on the same clips and resamples."""
        return Resamples(self.roc_auc - other.roc_auc, self.pr_auc - other.pr_auc)

    @property
    def macro_roc_auc(self) -> np.ndarray:
        """Mean ROC AUC of each row: (n_rows,)."""
        return _row_means(self.roc_auc)

    @property
    def macro_pr_auc(self) -> np.ndarray:
        """Mean average precision of each row: (n_rows,)."""
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
    """Score bootstrap resamples of the clips, drawn with replacement.

    The same number of clips and the same seed give the same resamples. Differences between the
    resampled scores of two models are therefore paired.

    Parameters
    ----------
    labels, predictions : np.ndarray [shape=(n_clips, n_tags)]
        As in `score`.
    num_resamples : int
        Number of resamples.
    seed : int
        Seed of the random draws.
    """
    num_clips = len(labels)
    random = np.random.default_rng(seed)
    is_kept = np.arange(num_clips)[:, np.newaxis] % _NUM_PARTS != np.arange(_NUM_PARTS)
    counts = np.hstack([np.ones((num_clips, 1), bool), is_kept])
    scores = [weighted_scores(labels, predictions, counts)]
    # A part can contain all clips of a tag. The mean over tags would change without the tag.
    scores = [[np.where(np.isnan(rows), rows[0], rows) for rows in scores[0]]]
    for start in range(0, num_resamples, _RESAMPLES_AT_ONCE):
        size = min(_RESAMPLES_AT_ONCE, num_resamples - start)
        drawn = random.integers(num_clips, size=(size, num_clips))
        counts = np.stack([np.bincount(clips, minlength=num_clips) for clips in drawn], axis=1)
        scores.append(weighted_scores(labels, predictions, counts))
    return Resamples(*(np.concatenate(rows) for rows in zip(*scores, strict=True)))


def weighted_scores(
    labels: np.ndarray, predictions: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Score predictions of clips that are weighted by counts.

    Both scores can be computed from the weight of the clips that are ranked below each positive
    clip. Clips are therefore ranked only once per tag, for all resamples.

    Parameters
    ----------
    labels, predictions : np.ndarray [shape=(n_clips, n_tags)]
        As in `score`.
    counts : np.ndarray [shape=(n_clips, n_resamples), dtype=int]
        Number of times that each clip occurs in each resample.

    Returns
    -------
    roc_auc, pr_auc : np.ndarray [shape=(n_resamples, n_tags)]
        As scikit-learn's ``roc_auc_score`` and ``average_precision_score`` with these sample
        weights; NaN for tags that all clips of a resample carry or that no clip carries.
    """
    labels = np.asarray(labels) > 0
    counts = np.ascontiguousarray(counts, np.int32)
    roc_auc, pr_auc = np.empty((2, counts.shape[1], labels.shape[1]))
    total = counts.sum(axis=0)  # (num_resamples,)
    # before[i]: weight of the i clips with the lowest predictions; positives_before[i], below:
    # weight of the i positive clips with the lowest predictions.
    before = np.zeros((len(counts) + 1, counts.shape[1]), np.int32)
    for tag in range(labels.shape[1]):
        order = np.argsort(predictions[:, tag], kind="stable")
        ranked = predictions[order, tag]
        np.cumsum(counts[order], axis=0, out=before[1:])
        places = np.flatnonzero(labels[order, tag])  # ranks of the positive clips
        weights = counts[order[places]]  # (num_positives, num_resamples)
        positives_before = np.zeros((len(places) + 1, counts.shape[1]), np.int32)
        np.cumsum(weights, axis=0, out=positives_before[1:])
        # Ranks first to last - 1 have the same prediction as the positive clip.
        first = np.searchsorted(ranked, ranked[places], "left")
        last = np.searchsorted(ranked, ranked[places], "right")
        positives_below = positives_before[np.searchsorted(places, first)]
        positives_to = positives_before[np.searchsorted(places, last)]
        negatives_below = before[first] - positives_below
        negatives_tied = before[last] - positives_to - negatives_below
        num_positives = positives_before[-1].astype(np.float64)
        num_negatives = total - num_positives
        with np.errstate(divide="ignore", invalid="ignore"):
            # A tie counts half; doubled so that the sums are integers.
            # In int64, since the sum grows with the square of the number of clips.
            won = (weights * (2 * negatives_below + negatives_tied).astype(np.int64)).sum(axis=0)
            roc_auc[:, tag] = won / (2 * num_positives * num_negatives)
            # Without the maximum, clips that were not drawn could give 0 / 0; their weight is 0.
            precision = (num_positives - positives_below) / np.maximum(total - before[first], 1)
            pr_auc[:, tag] = (weights * precision).sum(axis=0) / num_positives
        # Average precision would be 1 here for any predictions.
        pr_auc[num_negatives == 0, tag] = np.nan
    return roc_auc, pr_auc


def interval(
    rows: np.ndarray, lowest: float = 0, confidence: float = CONFIDENCE
) -> tuple[np.ndarray | np.float64, np.ndarray | np.float64]:
    """Compute a bias-corrected confidence interval from the scores of resamples.

    With few clips, the average precision of the clips is larger on average than that of unlimited
    data, and that of resamples is larger still. The interval consists of percentiles of the
    resamples, moved from the mean of the resamples to the score minus the jackknife's estimate of
    its bias [1]_, and of the score. docs/decisions.md gives the measured coverage.

    .. [1] B. Efron and R. Tibshirani, *An Introduction to the Bootstrap*, 1993, chapters 10 and 11.

    Parameters
    ----------
    rows : np.ndarray [shape=(n_rows, ...)]
        An array of `Resamples`; NaN values are ignored.
    lowest : float
        Lowest possible value: 0 for scores, -1 for differences of scores.
    confidence : float
        Share of the resamples inside the interval.

    Returns
    -------
    low, high : np.ndarray [shape=(...)]
        NaN where the score is NaN.
    """
    score, left_out, drawn = np.split(rows, [1, 1 + _NUM_PARTS])
    score = score[0]
    if not np.size(score):  # no tags
        return score, score
    tails = 50 * (1 - confidence), 50 * (1 + confidence)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice|Mean of empty slice", RuntimeWarning)
        bias = (_NUM_PARTS - 1) * (np.nanmean(left_out, axis=0) - score)
        shift = score - bias - np.nanmean(drawn, axis=0)
        low, high = np.nanpercentile(drawn, tails, axis=0) + shift
    return np.clip(np.minimum(low, score), lowest, 1), np.clip(np.maximum(high, score), lowest, 1)


def binary_crossentropy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Compute the mean binary cross-entropy, as Keras does, but in float64.

    Parameters
    ----------
    labels : np.ndarray [shape=(n_segments, n_tags)]
        0 or 1.
    predictions : np.ndarray [shape=(n_segments, n_tags)]
        Probabilities.
    """
    epsilon = 1e-7  # as in Keras: the loss stays finite for probabilities of 0 and 1
    p = np.clip(np.asarray(predictions, np.float64), epsilon, 1 - epsilon)
    return float(-np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p)))
