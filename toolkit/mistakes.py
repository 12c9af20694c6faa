"""What a model gets wrong: thresholds, mistakes, confused tags and doubtful labels.

Labels are arrays of 0 and 1, and predictions arrays of probabilities, both [shape=(n_clips,
n_tags)]. Clips and tags in the results are row and column numbers of these arrays.
"""

from typing import NamedTuple

import numpy as np

NUM_MISTAKES = 10  # per tag and direction
NUM_BINS = 20
# Tags whose predictions correlate at least so much are confused if their labels correlate less than
# the second number, and synonyms otherwise.
PREDICTIONS_CORRELATE, LABELS_CORRELATE = 0.5, 0.25
_CURVE_POINTS = 100
_ROUNDING = 1e-7  # of probabilities in float32


class Mistake(NamedTuple):
    """A clip whose prediction of a tag is on the wrong side of the tag's threshold."""

    tag: int
    clip: int
    label: int
    prediction: float
    rank: int  # 1 for the prediction farthest from the threshold, per tag and label


class Pair(NamedTuple):
    """Two tags whose predictions correlate."""

    tag: int
    other: int
    of_predictions: float  # Pearson's correlation
    of_labels: float
    num_both: int  # clips with both tags


class Doubt(NamedTuple):
    """A label that contradicts a confident prediction."""

    clip: int
    tag: int
    prediction: float


def f1_thresholds(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Find the threshold of each tag with the highest F1 score.

    Returns
    -------
    np.ndarray [shape=(n_tags,)]
        The lowest prediction that counts as the tag; NaN for tags that no clip carries.
    """
    from sklearn.metrics import precision_recall_curve

    thresholds = np.full(labels.shape[1], np.nan)
    for tag in np.flatnonzero(labels.any(axis=0)):
        precision, recall, found = precision_recall_curve(labels[:, tag], predictions[:, tag])
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        thresholds[tag] = found[np.argmax(f1[:-1])]
    return thresholds


def precision_and_recall(
    labels: np.ndarray, predictions: np.ndarray, thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compute precision and recall of each tag at its threshold; NaN where undefined."""
    is_found = predictions >= thresholds
    hits = (is_found & (labels > 0)).sum(axis=0)
    with np.errstate(invalid="ignore"):
        precision, recall = hits / is_found.sum(axis=0), hits / labels.sum(axis=0)
    return precision, np.where(np.isnan(thresholds), np.nan, recall)


def find_mistakes(
    labels: np.ndarray, predictions: np.ndarray, thresholds: np.ndarray, num: int = NUM_MISTAKES
) -> list[Mistake]:
    """List the mistakes of each tag and label, those farthest from the threshold first.

    Parameters
    ----------
    labels, predictions : np.ndarray [shape=(n_clips, n_tags)]
        See the module.
    thresholds : np.ndarray [shape=(n_tags,)]
        See `f1_thresholds`; tags without a threshold have no mistakes.
    num : int
        Largest number of mistakes per tag and label.
    """
    rows = []
    for tag, threshold in enumerate(thresholds):
        column = predictions[:, tag]
        for label, is_wrong in ((0, column >= threshold), (1, column < threshold)):
            clips = np.flatnonzero(is_wrong & (labels[:, tag] == label))
            order = np.argsort(-np.abs(column[clips] - threshold), kind="stable")[:num]
            for rank, clip in enumerate(clips[order], start=1):
                rows.append(Mistake(tag, int(clip), label, float(column[clip]), rank))
    return rows


def correlated_tags(
    labels: np.ndarray, predictions: np.ndarray, num: int = 20
) -> tuple[list[Pair], list[Pair]]:
    """Find tags that are confused (only the predictions correlate) and synonyms (labels do, too).

    Returns
    -------
    confused, synonyms : list of Pair
        At most `num` pairs each: confused tags by the difference of the correlations, synonyms by
        the smaller correlation, largest first.
    """
    if len(labels) < 2:
        return [], []
    # Rounding errors of constant predictions can correlate perfectly.
    predictions = np.where(np.ptp(predictions, axis=0) > _ROUNDING, predictions, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):  # tags without variance
        of_predictions, of_labels = (
            np.atleast_2d(np.corrcoef(values, rowvar=False)) for values in (predictions, labels)
        )
    confused, synonyms = [], []
    for tag, other in np.argwhere(np.triu(of_predictions >= PREDICTIONS_CORRELATE, 1)):
        both = int((labels[:, tag] & labels[:, other]).sum())
        correlations = float(of_predictions[tag, other]), float(of_labels[tag, other])
        if not np.isnan(correlations[1]):
            is_synonym = correlations[1] >= LABELS_CORRELATE
            pair = Pair(int(tag), int(other), *correlations, both)
            (synonyms if is_synonym else confused).append(pair)
    confused.sort(key=lambda pair: pair.of_labels - pair.of_predictions)
    synonyms.sort(key=lambda pair: -min(pair.of_labels, pair.of_predictions))
    return confused[:num], synonyms[:num]


def doubtful_labels(
    labels: np.ndarray, predictions: np.ndarray, num: int = 30
) -> tuple[list[Doubt], list[Doubt]]:
    """List labels that are probably missing or wrong, the most doubtful first.

    As in confident learning [1]_, each tag has two limits, the mean predictions for clips with and
    without the tag. Rare tags have low predictions, so that one limit for all tags would list only
    their labels.

    .. [1] C. Northcutt, L. Jiang and I. Chuang, "Confident Learning: Estimating Uncertainty in
       Dataset Labels", *JAIR* 70, 2021.

    Returns
    -------
    missing, wrong : list of Doubt
        Of at most `num` clips each. A label is missing if the prediction is at least 0.5 and the
        mean for clips with the tag; the highest prediction is first. A label is wrong if the
        prediction is at most the mean for clips without the tag; the smallest share of that mean
        is first. Tags that are not predicted higher for clips with the tag are left out.
    """
    is_labelled = labels > 0
    with np.errstate(invalid="ignore"):  # tags of all clips or none
        num_with = is_labelled.sum(axis=0)
        mean_with = (predictions * is_labelled).sum(axis=0) / num_with
        mean_without = (predictions * ~is_labelled).sum(axis=0) / (len(labels) - num_with)
    is_told = mean_with > mean_without + _ROUNDING  # constant predictions contradict nothing
    is_missing = is_told & ~is_labelled & (predictions >= 0.5) & (predictions >= mean_with)
    is_wrong = is_told & is_labelled & (predictions <= mean_without)
    share = predictions / np.maximum(mean_without, 1e-12)
    found = []
    for is_doubtful, key in ((is_missing, -predictions), (is_wrong, share)):
        clips, tags = np.nonzero(is_doubtful)
        order = np.argsort(key[clips, tags], kind="stable")
        rows = list(zip(clips[order].tolist(), tags[order].tolist(), strict=True))
        listed = set(list(dict.fromkeys(clip for clip, _ in rows))[:num])
        found.append([Doubt(*row, float(predictions[row])) for row in rows if row[0] in listed])
    return found[0], found[1]


def curves(labels: np.ndarray, predictions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the ROC and precision-recall curves of one tag, thinned to about 100 points each.

    Parameters
    ----------
    labels, predictions : np.ndarray [shape=(n_clips,)]
        Of clips with and without the tag.

    Returns
    -------
    roc : np.ndarray [shape=(n_points, 2)]
        False and true positive rates.
    precision_recall : np.ndarray [shape=(n_points, 2)]
        Recall and precision.
    """
    from sklearn.metrics import precision_recall_curve, roc_curve

    false, true, _ = roc_curve(labels, predictions)
    precision, recall, _ = precision_recall_curve(labels, predictions)
    precision[-1] = precision[-2]  # scikit-learn's 1 would be a vertical line if a mistake is first
    return _thin(np.stack([false, true], axis=1)), _thin(np.stack([recall, precision], axis=1))


def _thin(points: np.ndarray) -> np.ndarray:
    """Keep points at about equal distances along a curve."""
    lengths = np.abs(np.diff(points, axis=0)).sum(axis=1).cumsum()
    wanted = np.linspace(0, lengths[-1], _CURVE_POINTS)
    return points[np.unique([0, *1 + np.searchsorted(lengths, wanted[1:-1]), len(points) - 1])]


def histograms(labels: np.ndarray, predictions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count the clips with and without one tag in 20 bins of the prediction from 0 to 1."""
    with_tag, without_tag = (
        np.histogram(predictions[labels == label], NUM_BINS, (0, 1))[0] for label in (1, 0)
    )
    return with_tag, without_tag


def differing_clips(
    predictions: np.ndarray, num: int = NUM_MISTAKES
) -> tuple[np.ndarray, np.ndarray]:
    """Find the clips whose predictions by several models differ most.

    Parameters
    ----------
    predictions : np.ndarray [shape=(n_models, n_clips, n_tags)]
        The models are compared with the first.
    num : int
        Number of clips.

    Returns
    -------
    by_tag : np.ndarray [shape=(num, n_tags), dtype=int]
        For each tag, the clips with the largest difference of its prediction, largest first.
    overall : np.ndarray [shape=(num,), dtype=int]
        The clips with the largest mean difference over the tags.
    """
    distance = np.abs(predictions[1:] - predictions[0]).max(axis=0)  # (n_clips, n_tags)
    by_tag = np.argsort(-distance, axis=0, kind="stable")[:num]
    return by_tag, np.argsort(-distance.mean(axis=1), kind="stable")[:num]
