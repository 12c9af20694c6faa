"""Mistakes, thresholds, confused tags and doubtful labels, on arrays small enough to read."""

from toolkit import mistakes
from toolkit.mistakes import Doubt, Mistake

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

LABELS = np.array([[1, 0], [1, 0], [0, 0], [0, 0], [1, 0]], np.uint8)
PREDICTIONS = np.array([[0.9, 0.2], [0.6, 0.4], [0.7, 0.1], [0.2, 0.3], [0.1, 0.5]])


def simulated(num_clips=400, num_tags=3, seed=0):
    random = np.random.default_rng(seed)
    labels = (random.uniform(size=(num_clips, num_tags)) < 0.3).astype(np.uint8)
    return labels, 1 / (1 + np.exp(-random.normal(2 * labels - 1, 1)))


def test_no_other_threshold_has_a_higher_f1_score():
    labels, predictions = simulated(num_clips=50)
    thresholds = mistakes.f1_thresholds(labels, predictions)
    precision, recall = mistakes.precision_and_recall(labels, predictions, thresholds)
    for tag, threshold in enumerate(thresholds):
        truth, column = labels[:, tag], predictions[:, tag]
        best = f1_score(truth, column >= threshold)
        assert best == max(f1_score(truth, column >= other) for other in column)
        assert best == pytest.approx(2 / (1 / precision[tag] + 1 / recall[tag]))


def test_a_tag_that_no_clip_carries_has_no_threshold_and_no_mistakes():
    thresholds = mistakes.f1_thresholds(LABELS, PREDICTIONS)
    np.testing.assert_array_equal(thresholds, [0.1, np.nan])
    values = mistakes.precision_and_recall(LABELS, PREDICTIONS, thresholds)
    np.testing.assert_allclose(values, [[0.6, np.nan], [1, np.nan]])
    assert {row.tag for row in mistakes.find_mistakes(LABELS, PREDICTIONS, thresholds)} == {0}


def test_mistakes_are_ranked_by_their_distance_from_the_threshold():
    rows = mistakes.find_mistakes(LABELS, PREDICTIONS, np.array([0.65, 0.3]))
    assert rows == [
        Mistake(tag=0, clip=2, label=0, prediction=0.7, rank=1),
        Mistake(tag=0, clip=4, label=1, prediction=0.1, rank=1),
        Mistake(tag=0, clip=1, label=1, prediction=0.6, rank=2),
        Mistake(tag=1, clip=4, label=0, prediction=0.5, rank=1),
        Mistake(tag=1, clip=1, label=0, prediction=0.4, rank=2),
        Mistake(tag=1, clip=3, label=0, prediction=0.3, rank=3),
    ]
    first = mistakes.find_mistakes(LABELS, PREDICTIONS, np.array([0.65, 0.3]), num=1)
    assert first == [row for row in rows if row.rank == 1]


def test_confused_tags_and_synonyms_differ_in_their_labels():
    labels, predictions = simulated(num_tags=5)
    labels[:, 1] = labels[:, 0]
    predictions[:, 1] = 0.9 * predictions[:, 0] + 0.01
    predictions[:, 3] = predictions[:, 2] ** 2
    labels[:, 4] = 0  # no variance
    predictions[:, 4] = predictions[:, 0]
    (confused,), (synonyms,) = mistakes.correlated_tags(labels, predictions)
    assert (confused.tag, confused.other) == (2, 3)
    assert confused.of_predictions > 0.9 > 0.25 > confused.of_labels
    assert (synonyms.tag, synonyms.other, synonyms.num_both) == (0, 1, labels[:, 0].sum())
    assert mistakes.correlated_tags(labels[:, :1], predictions[:, :1]) == ([], [])


def test_labels_that_contradict_confident_predictions_are_doubtful():
    labels = np.array([[1], [1], [1], [0], [0], [0]], np.uint8)
    predictions = np.array([[0.9], [0.7], [0.02], [0.8], [0.1], [0.1]])
    missing, wrong = mistakes.doubtful_labels(labels, predictions)
    assert missing == [Doubt(clip=3, tag=0, prediction=0.8)]
    assert wrong == [Doubt(clip=2, tag=0, prediction=0.02)]
    # Predictions of a rare tag are low, also where the label is right.
    missing, wrong = mistakes.doubtful_labels(labels, predictions / 10)
    assert missing == [] and [doubt.clip for doubt in wrong] == [2]
    # A prediction of exactly 0 is the most doubtful one.
    predictions = np.where(predictions < 0.7, 0, predictions)
    assert mistakes.doubtful_labels(labels, predictions)[1] == [Doubt(clip=2, tag=0, prediction=0)]


@pytest.mark.parametrize("value", [0, 0.1, 0.7, 1])
def test_constant_predictions_contradict_no_label_and_confuse_no_tags(value):
    labels, _ = simulated()
    constant = value + np.random.default_rng(0).uniform(-1e-8, 1e-8, (2 * len(labels), 1))
    labels, predictions = np.tile(labels, (2, 1)), np.tile(constant, (1, 3))
    assert mistakes.doubtful_labels(labels, predictions) == ([], [])
    assert mistakes.correlated_tags(labels, predictions) == ([], [])


def test_thinned_curves_keep_their_ends_and_their_area():
    labels, predictions = simulated(num_clips=5000, num_tags=1)
    roc, precision_recall = mistakes.curves(labels[:, 0], predictions[:, 0])
    assert len(roc) <= 102 and len(precision_recall) <= 102
    assert roc[0].tolist() == [0, 0] and roc[-1].tolist() == [1, 1]
    area = np.trapezoid(roc[:, 1], roc[:, 0])
    assert area == pytest.approx(roc_auc_score(labels[:, 0], predictions[:, 0]), abs=2e-3)


def test_clips_are_ranked_by_the_difference_between_models():
    predictions = np.zeros((3, 4, 2))
    predictions[1, 2] = [0.9, 0.1]
    predictions[2, 1] = [0.2, 0.6]
    by_tag, overall = mistakes.differing_clips(predictions, num=2)
    np.testing.assert_array_equal(by_tag, [[2, 1], [1, 2]])
    assert overall.tolist() == [2, 1]
