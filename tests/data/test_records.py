"""Records: compatibility with TensorFlow, int16 samples, and records of other shapes."""

from input_data import Clip, read_clips
from toolkit.data.manifest import shard_name
from toolkit.data.records import encode_clip, index_records, read_records
from toolkit.errors import ShardError

import numpy as np
import pytest
from shards import (
    TEST_SHARD,
    TRAIN_SHARD,
    assert_same_clips,
    make_clips,
    write_records,
    write_shard,
)

# --- Compatibility with TensorFlow and the published program --------------------------------------


@pytest.fixture(scope="module")
def tf():
    return pytest.importorskip("tensorflow")


def parse_with_tensorflow(tf, path):
    """Yield the segments and labels of each record, as the published program reads them."""
    labels_feature = {"raw_labels": tf.io.FixedLenFeature([], tf.string)}
    for record in tf.data.TFRecordDataset(str(path)):
        if path.name.endswith(".seq.tfrecord"):
            segments_feature = {"raw_segments": tf.io.FixedLenSequenceFeature([], tf.string)}
            context, lists = tf.io.parse_single_sequence_example(
                record, labels_feature, segments_feature
            )
            yield (
                tf.io.decode_raw(lists["raw_segments"], tf.float32).numpy(),
                tf.io.decode_raw(context["raw_labels"], tf.uint8).numpy(),
            )
        else:
            features = tf.io.parse_single_example(
                record, labels_feature | {"raw_segment": tf.io.FixedLenFeature([], tf.string)}
            )
            segment = tf.io.decode_raw(features["raw_segment"], tf.float32).numpy()
            yield segment[np.newaxis], tf.io.decode_raw(features["raw_labels"], tf.uint8).numpy()


@pytest.mark.parametrize("name", [TRAIN_SHARD, TEST_SHARD])
def test_published_shard_reads_as_tensorflow_reads_it(golden, tf, name):
    path = golden / "tfrecord" / name
    expected = list(parse_with_tensorflow(tf, path))
    clips = list(read_clips([path]))
    assert len(clips) == (10 if name == TRAIN_SHARD else 1)
    assert sum(len(clip.segments) for clip in clips) == 10
    assert_same_clips(clips, [Clip(segments, labels) for segments, labels in expected])
    assert clips[0].segments.shape[1] == 59049
    assert len(clips[0].labels) == 50


@pytest.mark.parametrize("name", [TRAIN_SHARD, TEST_SHARD])
def test_records_equal_messages_of_tensorflow(tf, tmp_path, name):
    clips = make_clips()
    path = write_shard(tmp_path / name, clips)
    records = [record.numpy() for record in tf.data.TFRecordDataset(str(path))]
    if name == TEST_SHARD:
        for record, clip in zip(records, clips, strict=True):
            message = tf.train.SequenceExample.FromString(record)
            context = message.context.feature
            assert sorted(context) == ["clip_id", "mp3_path", "raw_labels"]
            assert list(message.feature_lists.feature_list) == ["raw_segments"]
            entries = message.feature_lists.feature_list["raw_segments"].feature
            assert [entry.bytes_list.value[:] for entry in entries] == [
                [segment.tobytes()] for segment in clip.segments
            ]
            assert context["raw_labels"].bytes_list.value[:] == [clip.labels.tobytes()]
            assert context["clip_id"].bytes_list.value[:] == [clip.clip_id.encode()]
    else:
        segments = [(clip, segment) for clip in clips for segment in clip.segments]
        for record, (clip, segment) in zip(records, segments, strict=True):
            features = tf.train.Example.FromString(record).features.feature
            assert sorted(features) == ["clip_id", "mp3_path", "raw_labels", "raw_segment"]
            assert features["raw_segment"].bytes_list.value[:] == [segment.tobytes()]
            assert features["raw_labels"].bytes_list.value[:] == [clip.labels.tobytes()]


# --- Framing --------------------------------------------------------------------------------------


def test_index_finds_the_records(golden):
    path = golden / "tfrecord" / TRAIN_SHARD
    index = index_records(path)
    content = path.read_bytes()
    assert len(index) == 10
    for (start, length), record in zip(index, read_records(path), strict=True):
        assert content[start : start + length] == record
    assert index[-1].sum() + 4 == len(content)


def test_index_does_not_read_the_samples(tmp_path):
    path = write_shard(tmp_path / TRAIN_SHARD)
    index = index_records(path)
    content = bytearray(path.read_bytes())
    for start, length in index:
        content[start : start + length] = bytes(length)
    path.write_bytes(content)
    np.testing.assert_array_equal(index_records(path), index)
    with pytest.raises(ShardError):
        list(read_records(path))


# --- Samples as int16 -----------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
def test_int16_is_detected_and_rounds_to_half_a_level(tmp_path, split):
    samples = np.random.default_rng(0).uniform(-1, 1, (3, 300)).astype(np.float32)
    samples[0, :4] = [1.5, -1.5, 1.0, -1.0]
    clip = Clip(samples, np.array([1, 0], np.uint8), "7", "c/a.mp3")
    path = tmp_path / shard_name(split, 0, 1)
    write_records(path, encode_clip(clip, split, "int16"))
    assert path.stat().st_size < 0.65 * samples.nbytes
    (read,) = read_clips([path])
    assert read.segments.dtype == np.float32
    inside = np.abs(samples) < 1
    assert np.abs(read.segments - samples)[inside].max() <= 2**-16
    top = np.float32(1 - 2**-15)
    np.testing.assert_array_equal(read.segments[0, :4], [top, -1, top, -1])


def test_samples_of_an_unknown_encoding_are_refused(tmp_path):
    clip = Clip(np.zeros((1, 300), np.float32), np.array([1, 0], np.uint8), "7", "c/a.mp3")
    (record,) = encode_clip(clip, "train", "int16")
    write_records(tmp_path / "train-0000-of-0001.tfrecord", [record.replace(b"int16", b"int99")])
    with pytest.raises(ShardError, match="record 0: samples are encoded as 'int99'"):
        list(read_clips([tmp_path / "train-0000-of-0001.tfrecord"]))


# --- Records of other shapes ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [TRAIN_SHARD, TEST_SHARD])
def test_record_of_another_shape_is_refused(tmp_path, name):
    for odd, found in (
        ({"num_samples": 299}, "segments of 299 samples, expected 300"),
        ({"num_tags": 8}, "labels of 8 tags, expected 7"),
    ):
        path = write_shard(tmp_path / name, make_clips(1) + make_clips(1, **odd))
        with pytest.raises(ShardError, match=f"{path}: record 1: {found}"):
            list(read_clips([path]))


def test_other_shape_than_requested_is_refused(tmp_path):
    path = write_shard(tmp_path / TRAIN_SHARD)
    with pytest.raises(ShardError, match="record 0: segments of 300 samples, expected 59049"):
        list(read_clips([path], num_samples=59049))
    with pytest.raises(ShardError, match="record 0: labels of 7 tags, expected 50"):
        list(read_clips([path], num_tags=50))


def test_features_of_another_kind_are_refused(tf, tmp_path):
    (record,) = encode_clip(make_clips(1)[0], "train")
    integers = tf.train.Feature(int64_list=tf.train.Int64List(value=[1]))
    for name in ("raw_labels", "raw_segment", "clip_id", "mp3_path"):
        message = tf.train.Example.FromString(record)
        message.features.feature[name].CopyFrom(integers)
        path = tmp_path / TRAIN_SHARD
        write_records(path, [message.SerializeToString()])
        with pytest.raises(ShardError, match=f"record 0: no feature '{name}' of bytes"):
            list(read_clips([path]))
