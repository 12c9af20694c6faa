"""Scores, bootstrap intervals and losses agree with their definitions."""

from toolkit.evaluation import (
    binary_crossentropy,
    bootstrap,
    interval,
    score,
    weighted_scores,
)

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score


def test_tags_of_one_class_are_left_out():
    labels = np.array([[1, 1, 0], [0, 1, 0], [1, 1, 0], [0, 1, 0]])
    predictions = np.array([[0.9, 0.1, 0.2], [0.4, 0.2, 0.3], [0.3, 0.7, 0.1], [0.2, 0.5, 0.6]])
    scores = score(labels, predictions)
    assert np.isnan(scores.roc_auc).tolist() == [False, True, True]
    assert np.isnan(scores.pr_auc).tolist() == [False, True, True]
    assert scores.macro_roc_auc == scores.roc_auc[0] == 0.75
    assert scores.positives.tolist() == [2, 4, 0]
    nothing = score(labels[:, 1:], predictions[:, 1:])
    assert np.isnan(nothing.macro_roc_auc) and np.isnan(nothing.macro_pr_auc)


# --- Intervals of scores --------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    num_clips=st.integers(1, 40),
    num_levels=st.integers(1, 8),  # distinct predictions; few levels give many ties
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_weighted_scores_equal_those_of_scikit_learn(num_clips, num_levels, share, seed):
    random = np.random.default_rng(seed)
    labels = (random.uniform(size=(num_clips, 3)) < share).astype(np.uint8)
    predictions = random.integers(num_levels, size=(num_clips, 3)) / num_levels
    counts = random.integers(0, 4, size=(num_clips, 4))
    counts[:, 0] = 1  # the original clips
    roc_auc, pr_auc = weighted_scores(labels, predictions, counts)
    assert roc_auc.shape == pr_auc.shape == (4, 3)
    for resample, weights in enumerate(counts.T):
        for tag in range(3):
            drawn = weights > 0
            if len(set(labels[drawn, tag])) < 2:
                assert np.isnan(roc_auc[resample, tag]) and np.isnan(pr_auc[resample, tag])
                continue
            of_tag = labels[drawn, tag], predictions[drawn, tag]
            expected = roc_auc_score(*of_tag, sample_weight=weights[drawn])
            assert roc_auc[resample, tag] == pytest.approx(expected, abs=1e-12)
            expected = average_precision_score(*of_tag, sample_weight=weights[drawn])
            assert pr_auc[resample, tag] == pytest.approx(expected, abs=1e-12)
    scores = score(labels, predictions)
    np.testing.assert_allclose(roc_auc[0], scores.roc_auc, atol=1e-12)
    np.testing.assert_allclose(pr_auc[0], scores.pr_auc, atol=1e-12)


def test_intervals_cover_the_true_score():
    """About 95 of 100 intervals contain the true ROC AUC, which is known for simulated tags."""
    from scipy.stats import norm

    random = np.random.default_rng(0)
    distance = np.resize([0.5, 1.0, 1.8], 300)
    labels = (random.uniform(size=(300, 300)) < 0.3).astype(np.uint8)
    predictions = random.normal(size=labels.shape) + distance * labels
    low, high = interval(bootstrap(labels, predictions, num_resamples=400).roc_auc)
    true = norm.cdf(distance / np.sqrt(2))
    covered = np.mean((low <= true) & (true <= high))
    assert 0.91 <= covered <= 0.98
    assert (low < high).all()
    # With four times as many clips, an interval is half as wide.
    wide, _ = interval(bootstrap(labels[:75], predictions[:75], num_resamples=400).roc_auc)
    ratio = np.mean(high - low) / np.mean(2 * (score(labels, predictions).roc_auc - wide))
    assert 0.4 < ratio < 0.6


def test_intervals_of_the_mean_pr_auc_have_no_bias():
    """With few clips, the average precision of the clips and even more of resamples is too large.

    Percentiles of the resamples contain the true value in 32 of 100 repetitions.
    """
    from scipy.stats import norm

    random = np.random.default_rng(0)
    shares, distances = np.geomspace(0.03, 0.4, 50), np.resize([0.8, 1.5, 2.2, 2.8], 50)
    threshold = np.linspace(-8, 11, 4000)[:, np.newaxis]
    found = shares * norm.sf(threshold - distances)
    precision = found / (found + (1 - shares) * norm.sf(threshold))
    weights = norm.pdf(threshold - distances)
    true = ((weights * precision).sum(axis=0) / weights.sum(axis=0)).mean()
    covered, moved = 0, []
    for seed in range(20):
        labels = (random.uniform(size=(150, 50)) < shares).astype(np.uint8)
        labels[:2] = [[0], [1]]  # every tag has a score
        predictions = random.normal(size=labels.shape) + distances * labels
        rows = bootstrap(labels, predictions, 200, seed).macro_pr_auc
        low, high = interval(rows)
        covered += low <= true <= high
        moved.append(np.mean(rows[21:]) - (low + high) / 2)
        assert low <= rows[0] <= high
    assert covered >= 16 and np.mean(moved) > 0.02


def test_the_seed_determines_the_resamples():
    random = np.random.default_rng(0)
    labels = (random.uniform(size=(50, 4)) < 0.4).astype(np.uint8)
    predictions = random.uniform(size=labels.shape)
    one = bootstrap(labels, predictions, num_resamples=150, seed=3)
    np.testing.assert_array_equal(one.roc_auc, bootstrap(labels, predictions, 150, 3).roc_auc)
    assert not np.array_equal(one.roc_auc, bootstrap(labels, predictions, 150, 4).roc_auc)
    assert one.macro_roc_auc == pytest.approx(one.roc_auc.mean(axis=1))
    # All tags and all models are scored on the same resamples of clips.
    other = bootstrap(labels, 3 * predictions - 1, num_resamples=150, seed=3)
    np.testing.assert_array_equal(one.pr_auc, other.pr_auc)
    ends = interval((one - other).roc_auc, lowest=-1)
    np.testing.assert_array_equal(ends, np.zeros((2, 4)))


def test_resamples_without_both_classes_are_left_out():
    labels = np.zeros((12, 3), np.uint8)
    labels[0, 0] = labels[:, 1] = 1  # one clip has tag 0, all clips tag 1, no clip tag 2
    predictions = np.random.default_rng(0).uniform(size=labels.shape)
    resamples = bootstrap(labels, predictions, num_resamples=200)
    assert 0.2 < np.isnan(resamples.roc_auc[:, 0]).mean() < 0.6
    assert np.isnan(resamples.roc_auc[:, 1:]).all()
    low, high = interval(resamples.roc_auc)
    assert np.isfinite([low[0], high[0]]).all() and np.isnan([low[1:], high[1:]]).all()
    known = resamples.roc_auc[:, 0]
    np.testing.assert_array_equal(resamples.macro_roc_auc, known)


def test_binary_crossentropy_equals_that_of_keras():
    import keras

    random = np.random.default_rng(0)
    labels = (random.uniform(size=(9, 5)) < 0.5).astype(np.float32)
    predictions = random.uniform(size=(9, 5)).astype(np.float32)
    predictions[0] = labels[0] = 1  # certain and correct
    predictions[1], labels[1] = 1, 0  # certain and wrong
    # The loss of a certain error is clipped at 1 - 1e-7, which Keras rounds in float32: the loss is
    # 15.9 instead of 16.1.
    expected = float(np.mean(np.asarray(keras.losses.binary_crossentropy(labels, predictions))))
    assert binary_crossentropy(labels, predictions) == pytest.approx(expected, rel=2e-2)
    assert binary_crossentropy(labels[2:], predictions[2:]) == pytest.approx(
        -np.log(np.where(labels, predictions, 1 - predictions)[2:]).mean(), rel=1e-6
    )
