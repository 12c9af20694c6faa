"""Predictions over clips: batches, means, and models that fit a dataset."""

import weakref
from dataclasses import replace

import eval as eval_script
import extract_excitations
from input_data import Clip, open_dataset, read_clips
from toolkit.errors import UsageError
from toolkit.models import checkpoints
from toolkit.prediction import load_for_dataset, predict_clips

import keras
import numpy as np
import pandas as pd
import pytest
from conftest import write_other_tags
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import published_shards
from sklearn.metrics import roc_auc_score
from test_eval import make_model


class Sums:
    """A model whose two outputs are easy to verify: sums over a segment, and its maximum."""

    input_shape = (None, 4)

    def __init__(self):
        self.batches = []

    def predict_on_batch(self, batch):
        self.batches.append(batch.shape)
        return [batch @ np.arange(8, dtype=np.float32).reshape(4, 2), batch.max(axis=1)]

    def __call__(self, batch, training):
        return self.predict_on_batch(batch)


def clips_of(lengths, seed=0):
    random = np.random.default_rng(seed)
    return [
        Clip(random.standard_normal((n, 4)).astype(np.float32), np.array([n % 2]), str(number))
        for number, n in enumerate(lengths)
    ]


def assert_predicted(result, clips):
    for prediction, clip in zip(result, clips, strict=True):
        found, (sums, maxima) = prediction.clip, prediction.outputs
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
def test_predictions_do_not_depend_on_the_batch_size(lengths, batch_size):
    clips, model, num_calls = clips_of(lengths), Sums(), []
    result = list(predict_clips(model, clips, batch_size, lambda: num_calls.append(1)))
    assert_predicted(result, clips)
    # All batches have one shape, and there are as few batches as possible. Only JAX compiles for
    # less than a batch, which is then padded.
    is_padded = keras.backend.backend() == "jax"
    num_rows = batch_size if is_padded else min(batch_size, sum(lengths))
    assert set(model.batches) <= {(num_rows, 4)}
    assert len(model.batches) == len(num_calls) == -(-sum(lengths) // batch_size)


def test_a_model_that_predicts_again_receives_only_full_batches():
    """The model of a training on several devices has no other shape."""
    clips, model = clips_of([3, 2]), Sums()
    assert_predicted(predict_clips(model, clips, batch_size=8, is_repeated=True), clips)
    assert model.batches == [(8, 4)]


def parts_of(clip, num_segments):
    for part, start in enumerate(range(0, len(clip.segments), num_segments)):
        yield replace(clip, segments=clip.segments[start : start + num_segments], part=part)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), max_size=6),
    num_segments=st.integers(1, 9),
    batch_size=st.integers(1, 40),
)
def test_the_parts_of_a_clip_are_predicted_as_one_clip(lengths, num_segments, batch_size):
    clips = clips_of(lengths)
    parts = (part for clip in clips for part in parts_of(clip, num_segments))
    assert_predicted(predict_clips(Sums(), parts, batch_size), clips)


def test_the_memory_of_predicted_parts_is_released():
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


def test_clips_are_yielded_as_soon_as_they_are_predicted():
    """At most one batch of clips is kept in memory."""
    read = []

    def reading():
        for clip in clips_of([2] * 50):
            read.append(clip)
            yield clip

    for done, _ in enumerate(predict_clips(Sums(), reading(), batch_size=6)):
        assert len(read) - done <= 4


def test_the_prediction_of_a_clip_is_the_mean_over_its_segments(tiny_dataset, tmp_path):
    """Clips of different lengths have equal weights."""
    dataset = open_dataset(tiny_dataset)
    model_path = make_model(tmp_path / "res.keras", dataset, block="res")
    clips = list(read_clips(dataset.splits["test"].shards))
    lengths = [len(clip.segments) for clip in clips]
    assert len(set(lengths)) > 1
    network = checkpoints.load(model_path).network
    expected = np.array(
        [network.predict_on_batch(clip.segments).mean(axis=0, dtype=np.float64) for clip in clips]
    )
    labels = np.array([clip.labels for clip in clips])
    known = [tag for tag in range(labels.shape[1]) if len(set(labels[:, tag])) == 2]

    tags, found, predictions, scores = eval_script.evaluate(model_path, tiny_dataset, batch_size=4)
    assert tags == dataset.tags
    assert [clip.clip_id for clip in found] == [clip.clip_id for clip in clips]
    assert predictions.shape == (len(clips), len(tags))
    np.testing.assert_allclose(predictions, expected, atol=1e-6)
    macro = roc_auc_score(labels[:, known], predictions[:, known], average="macro")
    assert scores.macro_roc_auc == pytest.approx(macro, abs=1e-12)
    assert (~np.isnan(scores.roc_auc)).nonzero()[0].tolist() == known


def test_a_model_must_fit_the_dataset(tiny_dataset, tmp_path):
    dataset = open_dataset(tiny_dataset)
    path = make_model(tmp_path / "se.keras", dataset)
    for change, message in (
        ({"tags": ("calm", *dataset.tags[1:])}, "tag 0 is 'violin' in the model, but 'calm' in "),
        ({"tags": dataset.tags[:4]}, "the model is for 12 tags, but .* has 4"),
        ({"sample_rate": 16000}, "the model is for 22050 Hz, but .* has 16000"),
        ({"num_samples": 60000}, "the model is for 59049 samples per segment, but .* has 60000"),
    ):
        with pytest.raises(UsageError, match=message):
            load_for_dataset(path, replace(dataset, **change))


def test_a_model_without_tags_is_taken_for_one_of_magnatagatune(golden, tmp_path, capsys):
    """On a dataset with 50 other tags, the scores would be plausible and wrong."""
    data_dir = published_shards(tmp_path / "data")
    path = golden / "checkpoints" / "se-multi.hdf5"
    command = [str(path), "--data-dir", str(data_dir)]
    out = ["--out", str(tmp_path / "x.parquet")]
    assert extract_excitations.main([*command, *out]) == 0
    line = f"{path}: the file contains no tag names: using those of {data_dir}"
    assert line in capsys.readouterr().err.splitlines()

    tags = write_other_tags(data_dir)
    assert open_dataset(data_dir).tags == tags
    for main, options in ((eval_script.main, []), (extract_excitations.main, out)):
        assert main([*command, *options]) == 2
        error = capsys.readouterr().err
        assert f"{path}: the file contains no tag names, and {data_dir} has other tags" in error

    (tmp_path / "tags.txt").write_text("\n".join(tags))
    command += ["--tags", str(tmp_path / "tags.txt")]
    assert eval_script.main([*command, "--report", str(tmp_path)]) == 0
    header = (tmp_path / "predictions.csv").read_text().splitlines()[0]
    assert header == ",".join(["clip_id", "mp3_path", *tags])
    assert extract_excitations.main([*command, *out]) == 0
    assert list(pd.read_parquet(tmp_path / "x.parquet").columns) == ["ex", "depth", *tags]
