"""Predictions over clips and their scores."""

import weakref
from dataclasses import replace
from pathlib import Path

import eval as eval_script
from input_data import Clip, Dataset, open_dataset, read_clips
from model import NetworkConfig, build_network
from toolkit.errors import UsageError
from toolkit.evaluation import (
    binary_crossentropy,
    bootstrap,
    check_fits,
    interval,
    predict_clips,
    score,
    weighted_scores,
)
from toolkit.models.checkpoints import Checkpoint, save

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score


class Sums:
    """A model of two outputs that can be checked by hand: sums over a segment, and its maximum."""

    input_shape = (None, 4)

    def __init__(self):
        self.batches = []

    def predict_on_batch(self, batch):
        self.batches.append(batch.shape)
        return [batch @ np.arange(8, dtype=np.float32).reshape(4, 2), batch.max(axis=1)]


def clips_of(lengths, seed=0):
    random = np.random.default_rng(seed)
    return [
        Clip(random.standard_normal((n, 4)).astype(np.float32), np.array([n % 2]), str(number))
        for number, n in enumerate(lengths)
    ]


def assert_predicted(result, clips):
    for (found, (sums, maxima)), clip in zip(result, clips, strict=True):
        assert (found.clip_id, found.labels, found.part) == (clip.clip_id, clip.labels, 0)
        assert found.segments.nbytes == 0 and found.segments.base is None
        expected_sums, expected_maxima = Sums().predict_on_batch(clip.segments)
        np.testing.assert_allclose(sums, expected_sums, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(maxima, expected_maxima)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), max_size=12),
    batch_size=st.integers(1, 40),
)
def test_any_batch_size_gives_the_same(lengths, batch_size):
    clips, model, num_calls = clips_of(lengths), Sums(), []
    result = list(predict_clips(model, clips, batch_size, lambda: num_calls.append(1)))
    assert_predicted(result, clips)
    # One shape only, and no more batches than there must be.
    assert set(model.batches) <= {(batch_size, 4)}
    assert len(model.batches) == len(num_calls) == -(-sum(lengths) // batch_size)


def parts_of(clip, num_segments):
    for part, start in enumerate(range(0, len(clip.segments), num_segments)):
        yield replace(clip, segments=clip.segments[start : start + num_segments], part=part)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), max_size=6),
    num_segments=st.integers(1, 9),
    batch_size=st.integers(1, 40),
)
def test_a_clip_in_parts_is_one_clip(lengths, num_segments, batch_size):
    clips = clips_of(lengths)
    parts = (part for clip in clips for part in parts_of(clip, num_segments))
    assert_predicted(predict_clips(Sums(), parts, batch_size), clips)


def test_parts_are_let_go_as_they_are_predicted():
    (clip,) = clips_of([100])
    read = []

    def reading():
        for part in parts_of(clip, 5):
            part.segments = part.segments.copy()
            read.append(weakref.ref(part.segments))
            assert sum(segments() is not None for segments in read) <= 2
            yield part

    assert_predicted(predict_clips(Sums(), reading(), batch_size=4), [clip])
    assert len(read) == 20


def test_clips_come_as_soon_as_they_are_done():
    """A long split is not held in memory: at most a batch of clips is waiting."""
    read = []

    def reading():
        for clip in clips_of([2] * 50):
            read.append(clip)
            yield clip

    for done, _ in enumerate(predict_clips(Sums(), reading(), batch_size=6)):
        assert len(read) - done <= 4


def test_scores_are_scikit_learns():
    random = np.random.default_rng(0)
    labels = (random.uniform(size=(40, 7)) < 0.3).astype(np.uint8)
    predictions = np.round(random.uniform(size=(40, 7)), 1)  # with ties
    scores = score(labels, predictions)
    assert scores.macro_roc_auc == pytest.approx(
        roc_auc_score(labels, predictions, average="macro"), abs=1e-12
    )
    assert scores.macro_pr_auc == pytest.approx(
        average_precision_score(labels, predictions, average="macro"), abs=1e-12
    )
    assert scores.roc_auc[3] == roc_auc_score(labels[:, 3], predictions[:, 3])
    assert scores.positives.tolist() == labels.sum(axis=0).tolist()


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


# --- How far scores can be trusted ----------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    num_clips=st.integers(1, 40),
    num_levels=st.integers(1, 8),  # of predictions: few make many ties
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_weighted_scores_are_scikit_learns(num_clips, num_levels, share, seed):
    random = np.random.default_rng(seed)
    labels = (random.uniform(size=(num_clips, 3)) < share).astype(np.uint8)
    predictions = random.integers(num_levels, size=(num_clips, 3)) / num_levels
    counts = random.integers(0, 4, size=(num_clips, 4))
    counts[:, 0] = 1  # the clips themselves
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
    """Tags of known ROC AUC, drawn anew: about 95 of 100 intervals must hold it."""
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
    # Four times the clips halve an interval.
    wide, _ = interval(bootstrap(labels[:75], predictions[:75], num_resamples=400).roc_auc)
    ratio = np.mean(high - low) / np.mean(2 * (score(labels, predictions).roc_auc - wide))
    assert 0.4 < ratio < 0.6


def test_resamples_are_those_of_the_seed():
    random = np.random.default_rng(0)
    labels = (random.uniform(size=(50, 4)) < 0.4).astype(np.uint8)
    predictions = random.uniform(size=labels.shape)
    one = bootstrap(labels, predictions, num_resamples=150, seed=3)
    np.testing.assert_array_equal(one.roc_auc, bootstrap(labels, predictions, 150, 3).roc_auc)
    assert not np.array_equal(one.roc_auc, bootstrap(labels, predictions, 150, 4).roc_auc)
    assert one.macro_roc_auc == pytest.approx(one.roc_auc.mean(axis=1))
    # Every tag and every model is scored on the same clips.
    other = bootstrap(labels, 3 * predictions - 1, num_resamples=150, seed=3)
    np.testing.assert_array_equal(one.pr_auc, other.pr_auc)
    ends = interval(one.roc_auc - other.roc_auc)
    np.testing.assert_array_equal(ends, np.zeros((2, 4)))


def test_resamples_without_both_classes_are_left_out():
    labels = np.zeros((12, 3), np.uint8)
    labels[0, 0] = labels[:, 1] = 1  # a rare tag, one that all carry and one that none does
    predictions = np.random.default_rng(0).uniform(size=labels.shape)
    resamples = bootstrap(labels, predictions, num_resamples=200)
    assert 0.2 < np.isnan(resamples.roc_auc[:, 0]).mean() < 0.6
    assert np.isnan(resamples.roc_auc[:, 1:]).all()
    low, high = interval(resamples.roc_auc)
    assert np.isfinite([low[0], high[0]]).all() and np.isnan([low[1:], high[1:]]).all()
    known = resamples.roc_auc[:, 0]
    np.testing.assert_array_equal(resamples.macro_roc_auc, known)


def test_binary_crossentropy_is_keras():
    import keras

    random = np.random.default_rng(0)
    labels = (random.uniform(size=(9, 5)) < 0.5).astype(np.float32)
    predictions = random.uniform(size=(9, 5)).astype(np.float32)
    predictions[0] = labels[0] = 1  # certain, and right
    predictions[1], labels[1] = 1, 0  # certain, and wrong
    # Keras's float32 rounds 1 - 1e-7, where a certain error is clipped: 15.9 instead of 16.1.
    expected = float(np.mean(np.asarray(keras.losses.binary_crossentropy(labels, predictions))))
    assert binary_crossentropy(labels, predictions) == pytest.approx(expected, rel=2e-2)
    assert binary_crossentropy(labels[2:], predictions[2:]) == pytest.approx(
        -np.log(np.where(labels, predictions, 1 - predictions)[2:]).mean(), rel=1e-6
    )


@pytest.fixture(scope="module")
def model_path(tiny_dataset, tmp_path_factory):
    dataset = open_dataset(tiny_dataset)
    config = NetworkConfig(
        block="res", init_features=2, alpha=2, num_tags=len(dataset.tags),
        num_samples=dataset.num_samples,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model") / "res.keras"
    save(path, Checkpoint(build_network(config), config, dataset.tags, dataset.sample_rate))
    return path


def test_a_clip_is_the_mean_of_its_segments(tiny_dataset, model_path):
    """Clips of different lengths weigh as one clip each."""
    from toolkit.models import checkpoints

    dataset = open_dataset(tiny_dataset)
    clips = list(read_clips(dataset.splits["test"].shards))
    lengths = [len(clip.segments) for clip in clips]
    assert len(set(lengths)) > 1
    network = checkpoints.load(model_path).network
    expected = np.array(
        [network.predict_on_batch(clip.segments).mean(axis=0, dtype=np.float64) for clip in clips]
    )
    labels = np.array([clip.labels for clip in clips])
    known = [tag for tag in range(labels.shape[1]) if len(set(labels[:, tag])) == 2]

    for batch_size in (1, 4, 32):
        tags, found, predictions, scores = eval_script.evaluate(
            model_path, tiny_dataset, batch_size
        )
        assert tags == dataset.tags
        assert [clip.clip_id for clip in found] == [clip.clip_id for clip in clips]
        assert predictions.shape == (len(clips), len(tags))
        np.testing.assert_allclose(predictions, expected, atol=1e-6)
        assert scores.macro_roc_auc == pytest.approx(
            roc_auc_score(labels[:, known], predictions[:, known], average="macro"), abs=1e-12
        )
        assert (~np.isnan(scores.roc_auc)).nonzero()[0].tolist() == known


def test_evaluation_keeps_no_audio(tiny_dataset, model_path):
    _, clips, _, _ = eval_script.evaluate(model_path, tiny_dataset)
    for clip in clips:
        assert clip.segments.nbytes == 0
        assert clip.segments.base is None, "a view keeps the segments in memory"


def fitting(**options):
    config = NetworkConfig(**{"init_features": 2, "alpha": 2, "num_tags": 3} | options)
    dataset = Dataset(Path("data"), ("a", "b", "c"), 22050, 59049, {})
    return dataset, Checkpoint(None, config, ("a", "b", "c"))


def test_check_fits():
    dataset, checkpoint = fitting()
    check_fits(dataset, checkpoint)
    checkpoint.tags = ("tag 0", "tag 1", "tag 2")  # as an .hdf5 without names
    check_fits(dataset, checkpoint)
    checkpoint.tags = ("a", "c", "b")
    with pytest.raises(UsageError, match="tag 1 is 'c' in the model and 'b' in data"):
        check_fits(dataset, checkpoint)
    dataset, checkpoint = fitting()
    checkpoint.sample_rate = 16000
    with pytest.raises(UsageError, match="16000 Hz, data has 22050"):
        check_fits(dataset, checkpoint)
    dataset, checkpoint = fitting(num_samples=60000)
    with pytest.raises(UsageError, match="60000 samples a segment, data has 59049"):
        check_fits(dataset, checkpoint)
    dataset, checkpoint = fitting(num_tags=4)
    with pytest.raises(UsageError, match="4 tags, data has 3"):
        check_fits(dataset, checkpoint)
