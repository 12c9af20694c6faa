"""Shards: TensorFlow's own bytes in both directions, what a folder holds, damage, and batches."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import build_mtt
import input_data
from input_data import Clip, SegmentReader, open_dataset, read_clips, shuffled_order
from toolkit.data import audio
from toolkit.data.annotations import MTT_TOP_TAGS
from toolkit.data.manifest import read_manifest, shard_name, write_manifest
from toolkit.data.records import (
    append_records,
    encode_clip,
    index_records,
    read_records,
    write_records,
)
from toolkit.errors import AnnotationsError, ShardError
from toolkit.files import written_whole

import numpy as np
import pytest
from conftest import write_annotations, write_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
NUM_SAMPLES = 300
NUM_TAGS = 7
TRAIN_SHARD = "train-0000-of-0001.tfrecord"
TEST_SHARD = "test-0000-of-0001.seq.tfrecord"
SPLIT_OF = {TRAIN_SHARD: "train", TEST_SHARD: "test"}


def make_clips(num_clips=3, num_samples=NUM_SAMPLES, num_tags=NUM_TAGS, seed=0):
    random = np.random.default_rng(seed)
    return [
        Clip(
            random.standard_normal((1 + number % 3, num_samples)).astype(np.float32),
            random.integers(0, 2, num_tags).astype(np.uint8),
            str(100 + number),
            f"0/clip-{number}.mp3",
        )
        for number in range(num_clips)
    ]


def write_shard(path, clips=None, split=None):
    clips = make_clips() if clips is None else clips
    split = split or path.name.split("-")[0]
    write_records(path, (record for clip in clips for record in encode_clip(clip, split)))
    return path


def write_published_shards(data_dir, num_clips=3, num_tags=NUM_TAGS, num_samples=NUM_SAMPLES):
    """Write two training shards and one each of validation and test, without a manifest."""
    folder = data_dir / "tfrecord"
    folder.mkdir(parents=True)
    for split, num_shards in (("train", 2), ("val", 1), ("test", 1)):
        for shard in range(num_shards):
            clips = make_clips(num_clips, num_samples, num_tags, seed=shard)
            write_shard(folder / shard_name(split, shard, num_shards), clips)
    return data_dir


def assert_same_clips(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.segments.dtype == np.float32
        assert one.labels.dtype == np.uint8
        np.testing.assert_array_equal(one.segments, other.segments)
        np.testing.assert_array_equal(one.labels, other.labels)
        assert (one.clip_id, one.mp3_path) == (other.clip_id, other.mp3_path)


# --- TensorFlow's and the published program's bytes -----------------------------------------------


@pytest.fixture(scope="module")
def tf():
    return pytest.importorskip("tensorflow")


def parse_with_tensorflow(tf, path):
    """Read a shard as the published program reads it: segments of each record, and labels."""
    labels_feature = {"raw_labels": tf.io.FixedLenFeature([], tf.string)}
    for record in tf.data.TFRecordDataset(str(path)):
        if path.name.endswith(".seq.tfrecord"):
            context, lists = tf.io.parse_single_sequence_example(
                record, labels_feature,
                {"raw_segments": tf.io.FixedLenSequenceFeature([], tf.string)},
            )  # fmt: skip
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
def test_our_shard_of_the_published_samples_is_tensorflows_too(golden, tf, tmp_path, name):
    published = list(read_clips([golden / "tfrecord" / name]))
    path = write_shard(tmp_path / name, published)
    ours = parse_with_tensorflow(tf, path)
    theirs = parse_with_tensorflow(tf, golden / "tfrecord" / name)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


@pytest.mark.parametrize("name", [TRAIN_SHARD, TEST_SHARD])
def test_records_are_tensorflows_messages(tf, tmp_path, name):
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


def tensorflow_records(tf, clip, split):
    """Encode a clip as the published program does: no identity."""

    def feature(content):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[content]))

    labels = {"raw_labels": feature(clip.labels.tobytes())}
    segments = [feature(segment.tobytes()) for segment in clip.segments]
    if split == "test":
        lists = tf.train.FeatureLists(
            feature_list={"raw_segments": tf.train.FeatureList(feature=segments)}
        )
        context = tf.train.Features(feature=labels)
        return [tf.train.SequenceExample(context=context, feature_lists=lists)]
    return [
        tf.train.Example(features=tf.train.Features(feature=labels | {"raw_segment": segment}))
        for segment in segments
    ]


@pytest.mark.parametrize("name", [TRAIN_SHARD, TEST_SHARD])
def test_shard_that_tensorflow_wrote_is_read(tf, tmp_path, name):
    clips = make_clips()
    path = tmp_path / name
    with tf.io.TFRecordWriter(str(path)) as writer:
        for clip in clips:
            for message in tensorflow_records(tf, clip, SPLIT_OF[name]):
                writer.write(message.SerializeToString())
    if name == TEST_SHARD:
        expected = [Clip(clip.segments, clip.labels) for clip in clips]
    else:
        expected = [Clip(part[None], clip.labels) for clip in clips for part in clip.segments]
    assert_same_clips(read_clips([path]), expected)


@pytest.mark.parametrize("name", [TRAIN_SHARD, TEST_SHARD])
def test_framing_is_tensorflows_byte_for_byte(tf, tmp_path, name):
    ours = write_shard(tmp_path / name)
    theirs = tmp_path / "theirs.tfrecord"
    with tf.io.TFRecordWriter(str(theirs)) as writer:
        for record in read_records(ours):
            writer.write(bytes(record))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("name", [TRAIN_SHARD, TEST_SHARD])
def test_our_clips_come_back_whole(tmp_path, name):
    clips = make_clips(5)
    assert_same_clips(read_clips([write_shard(tmp_path / name, clips)]), clips)


# --- Long clips -----------------------------------------------------------------------------------

PART = 5  # segments


def long_clips(lengths):
    """Make clips of so many segments, which say their clip and their place in it."""
    return [
        Clip(
            np.arange(length * 4, dtype=np.float32).reshape(length, 4) + 1000 * number,
            np.array([1, number % 2], np.uint8),
            str(number),
            f"d/{number}.mp3",
        )
        for number, length in enumerate(lengths)
    ]


def parts_of(clip):
    for part, start in enumerate(range(0, len(clip.segments), PART)):
        yield replace(clip, segments=clip.segments[start : start + PART], part=part)


@pytest.mark.parametrize("name", [TRAIN_SHARD, TEST_SHARD])
@pytest.mark.parametrize("lengths", [(4,), (5,), (6,), (10, 5, 11), (1, 23, 1), (5, 5, 5)])
def test_long_clip_comes_in_parts(tmp_path, monkeypatch, name, lengths):
    monkeypatch.setattr(audio, "PART_SAMPLES", PART * 4)
    clips = long_clips(lengths)
    path = tmp_path / name
    parts = [part for clip in clips for part in parts_of(clip)]
    write_records(path, (r for part in parts for r in encode_clip(part, SPLIT_OF[name])))
    found = list(read_clips([path, path]))
    assert_same_clips(found, parts * 2)
    assert [clip.part for clip in found] == [part.part for part in parts] * 2
    # A clip that is short enough is one record of a test shard, whatever comes after it.
    if name == TEST_SHARD:
        assert len(index_records(path)) == sum(-(-length // PART) for length in lengths)


@pytest.mark.parametrize("has_names", [True, False])
def test_test_clips_without_a_manifest_are_counted_by_their_names(tmp_path, monkeypatch, has_names):
    monkeypatch.setattr(audio, "PART_SAMPLES", PART * 4)
    folder = tmp_path / "tfrecord"
    folder.mkdir()
    write_annotations(tmp_path / "annotations_final.csv", [["1", 1, 1, "0/a.mp3"]], ["a", "b"])
    clips = long_clips((12, 5, 1, 11))
    if not has_names:
        clips = [replace(clip, clip_id="") for clip in clips]
    parts = [part for clip in clips for part in parts_of(clip)]
    write_shard(folder / shard_name("test", 0, 2), parts)
    write_shard(folder / shard_name("test", 1, 2), parts)
    counted = open_dataset(tmp_path).splits["test"].num_clips
    assert counted == (8 if has_names else 16)
    found = list(read_clips(open_dataset(tmp_path).splits["test"].shards))
    assert sum(clip.part == 0 for clip in found) == counted


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(max_size=60), is_context=st.booleans())
def test_counting_takes_any_record_for_a_clip(tmp_path, noise, is_context):
    folder = tmp_path / "tfrecord"
    folder.mkdir(exist_ok=True)
    write_annotations(tmp_path / "annotations_final.csv", [["1", 1, 1, "0/a.mp3"]], ["a", "b"])
    sound = [record for clip in long_clips((1, 2)) for record in encode_clip(clip, "test")]
    write_records(folder / TEST_SHARD, [*sound, b"\x0a" * is_context + noise])
    assert open_dataset(tmp_path).splits["test"].num_clips == 3


# --- What a folder holds --------------------------------------------------------------------------


def test_index_finds_the_records(golden):
    path = golden / "tfrecord" / TRAIN_SHARD
    index = index_records(path)
    content = path.read_bytes()
    assert len(index) == 10
    for (start, length), record in zip(index, read_records(path), strict=True):
        assert content[start : start + length] == record
    assert index[-1].sum() + 4 == len(content)


def test_counting_does_not_look_at_the_samples(tmp_path):
    path = write_shard(tmp_path / TRAIN_SHARD)
    index = index_records(path)
    content = bytearray(path.read_bytes())
    for start, length in index:
        content[start : start + length] = bytes(length)
    path.write_bytes(content)
    np.testing.assert_array_equal(index_records(path), index)
    with pytest.raises(ShardError):
        list(read_records(path))


def test_manifest_says_what_the_shards_hold(tiny_dataset):
    dataset = open_dataset(tiny_dataset)
    manifest = read_manifest(tiny_dataset / "tfrecord" / "manifest.json")
    assert list(dataset.tags) == manifest["tags"]
    assert (dataset.sample_rate, dataset.num_samples) == (22050, 59049)
    assert {name: len(split.shards) for name, split in dataset.splits.items()} == {
        "train": 3, "val": 1, "test": 1,
    }  # fmt: skip
    for split in dataset.splits.values():
        clips = list(read_clips(split.shards))
        assert len(clips) == split.num_clips
        assert sum(len(clip.segments) for clip in clips) == split.num_segments
        assert {len(clip.labels) for clip in clips} == {len(dataset.tags)}


def test_shards_without_a_manifest_are_counted(tmp_path, tiny_dataset):
    data_dir = tmp_path / "dataset"
    shutil.copytree(tiny_dataset / "tfrecord", data_dir / "tfrecord")
    shutil.copy(tiny_dataset / "annotations_final.csv", data_dir)
    described = open_dataset(data_dir)
    (data_dir / "tfrecord" / "manifest.json").unlink()
    counted = open_dataset(data_dir)
    assert counted.tags == described.tags
    assert counted.num_samples == described.num_samples
    for split in ("train", "val"):
        assert counted.splits[split].num_segments == described.splits[split].num_segments
        assert counted.splits[split].num_clips is None
    assert counted.splits["test"].num_clips == described.splits["test"].num_clips
    assert counted.splits["test"].num_segments is None
    for split in ("train", "val", "test"):
        assert counted.splits[split].shards == described.splits[split].shards


def test_published_shards_alone_have_the_published_tags(golden):
    dataset = open_dataset(golden)
    assert dataset.tags == MTT_TOP_TAGS
    assert (dataset.sample_rate, dataset.num_samples) == (22050, 59049)
    assert dataset.splits["train"].num_segments == 10
    assert dataset.splits["test"].num_clips == 1
    assert dataset.splits["val"].shards == []


def test_other_tags_without_a_manifest_need_the_table(tmp_path):
    data_dir = write_published_shards(tmp_path / "dataset")
    with pytest.raises(AnnotationsError, match=r"annotations_final\.csv: no such file.*7 tags"):
        open_dataset(data_dir)
    tags = [f"tag {number}" for number in range(NUM_TAGS)]
    row = ["1", *[1] * NUM_TAGS, "0/a.mp3"]
    write_annotations(data_dir / "annotations_final.csv", [row], tags)
    assert open_dataset(data_dir).tags == tuple(tags)


def test_no_dataset_says_what_to_download(tmp_path):
    with pytest.raises(ShardError, match="download annotations_final"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(ShardError, match="download annotations_final"):
        open_dataset(tmp_path)


def test_no_shards_says_how_to_build_them(tmp_path):
    (tmp_path / "tfrecord").mkdir()
    with pytest.raises(ShardError, match=f"python build_mtt.py --data-dir {tmp_path}"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda folder: (folder / "train-0000-of-0002.tfrecord").unlink(),
         "1 of the train shards missing, the first is 0000"),
        (lambda folder: (folder / "train-0001-of-0002.tfrecord").unlink(),
         "1 of the train shards missing, the first is 0001"),
        (lambda folder: write_shard(folder / "train-0002-of-0003.tfrecord"),
         "train shards of different sets (of 0002 and of 0003)"),
        (lambda folder: write_shard(folder / "train-0002-of-0002.tfrecord"),
         "train-0002-of-0002.tfrecord: not the name of a shard"),
        (lambda folder: write_shard(folder / "train-0000-of-0002.seq.tfrecord"),
         "train-0000-of-0002.seq.tfrecord: not the name of a shard"),
        (lambda folder: write_shard(folder / "test-0000-of-0001.tfrecord"),
         "test-0000-of-0001.tfrecord: not the name of a shard"),
        (lambda folder: write_shard(folder / "train-00000-of-0002.tfrecord"),
         "train-00000-of-0002.tfrecord: not the name of a shard"),
    ],
)  # fmt: skip
def test_set_that_is_not_whole_is_refused(tmp_path, change, found):
    data_dir = write_published_shards(tmp_path / "dataset", num_tags=50)
    open_dataset(data_dir)
    change(data_dir / "tfrecord")
    with pytest.raises(ShardError) as caught:
        open_dataset(data_dir)
    assert found in str(caught.value)
    assert str(data_dir / "tfrecord") in str(caught.value)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda folder: shutil.move(folder / "val-0000-of-0001.tfrecord", folder / "val.away"),
         "val-0000-of-0001.tfrecord is missing"),
        (lambda folder: [path.unlink() for path in folder.glob("train-*")],
         "train-0000-of-0003.tfrecord is missing"),
    ],
)  # fmt: skip
def test_manifest_of_other_shards_is_refused(tmp_path, tiny_dataset, change, found):
    shutil.copytree(tiny_dataset / "tfrecord", tmp_path / "tfrecord")
    change(tmp_path / "tfrecord")
    with pytest.raises(ShardError, match=found):
        open_dataset(tmp_path)


def test_shards_that_the_manifest_does_not_list_are_refused(tmp_path, tiny_dataset):
    shutil.copytree(tiny_dataset / "tfrecord", tmp_path / "tfrecord")
    path = tmp_path / "tfrecord" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["val"]["shards"] = []
    path.write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match=r"val-0000-of-0001\.tfrecord is not in manifest\.json"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", '{"format": 2}', '{"format": 1}', b"\xff\xfe",
     '{"format": 1, "tags": [], "sample_rate": 1, "num_samples": 1, "splits": []}',
     '{"format": 1, "tags": [], "sample_rate": 1, "num_samples": 1, "splits": {"val": {}}}',
     '{"format": 1, "tags": 3, "sample_rate": 1, "num_samples": 1, "splits": {}}',
     '{"format": 1, "tags": ["a", 1], "sample_rate": 1, "num_samples": 1, "splits": {}}',
     '{"format": 1, "tags": [], "sample_rate": 1, "num_samples": null, "splits": {}}',
     '{"format": 1, "tags": [], "sample_rate": 1, "num_samples": -1, "splits": {}}',
     '{"format": 1, "tags": [], "sample_rate": 1, "num_samples": 1, "splits": {"val": '
     '{"clips": 1, "segments": 1, "shards": [{"name": {}}]}}}'],
)  # fmt: skip
def test_broken_manifest_is_refused(tmp_path, content):
    path = tmp_path / "manifest.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ShardError, match=str(path)):
        read_manifest(path)


def test_manifest_comes_back(tmp_path):
    manifest = {"tags": ["ü", "b"], "sample_rate": 8, "num_samples": 3, "splits": {}}
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path / "manifest.json") == {"format": 1} | manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_records_can_be_taken_back(tmp_path):
    first, second = (list(encode_clip(clip, "train")) for clip in make_clips(2))
    with written_whole(tmp_path / TRAIN_SHARD) as file:
        append_records(file, first)
        start = file.tell()
        append_records(file, [bytes(1 << 20)] * 3)  # more than is held before it is written
        file.seek(start)
        file.truncate()
        append_records(file, second)
        assert not (tmp_path / TRAIN_SHARD).exists()
    assert list(read_records(tmp_path / TRAIN_SHARD)) == first + second


def test_shard_that_could_not_be_finished_leaves_nothing(tmp_path):
    def records():
        yield b"first"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(tmp_path / TRAIN_SHARD, records())
    assert list(tmp_path.iterdir()) == []


# --- Damage ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[TRAIN_SHARD, TEST_SHARD])
def shard(request, tmp_path_factory):
    return write_shard(tmp_path_factory.mktemp("shard") / request.param)


def read_or_refuse(path, content):
    """Read a shard's clips, or None where it is refused in the right words."""
    path.write_bytes(content)
    try:
        return list(read_clips([path]))
    except ShardError as error:
        assert str(error).startswith(f"{path}: record ")
        assert "\n" not in str(error)
        return None


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_byte_is_noticed(shard, tmp_path, data):
    content = bytearray(shard.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    assert read_or_refuse(tmp_path / shard.name, content) is None


@pytest.mark.parametrize("bit", [0, 3, 7])
def test_flipped_bit_of_a_header_is_noticed(shard, tmp_path, bit):
    for number, (start, _) in enumerate(index_records(shard)):
        for place in range(start - 12, start):
            content = bytearray(shard.read_bytes())
            content[place] ^= 1 << bit
            path = tmp_path / shard.name
            path.write_bytes(content)
            with pytest.raises(ShardError, match=f"{path.name}: record {number}: "):
                list(read_clips([path]))


def test_shard_cut_anywhere_is_noticed(shard, tmp_path):
    content = shard.read_bytes()
    clips = list(read_clips([shard]))
    ends = {0, *(int(start + length + 4) for start, length in index_records(shard))}
    places = {*range(0, len(content), 37), *(end + step for end in ends for step in (-1, 0, 1))}
    for place in sorted(place for place in places if 0 <= place < len(content)):
        found = read_or_refuse(tmp_path / shard.name, content[:place])
        # A file that ends where a record does cannot be told from a whole one.
        assert (found is not None) == (place in ends)
        segments = [segment for clip in found or [] for segment in clip.segments]
        whole = [segment for clip in clips for segment in clip.segments]
        for one, other in zip(segments, whole, strict=False):
            np.testing.assert_array_equal(one, other)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_sound_checksums_over_any_bytes_give_clips_or_a_shard_error(tmp_path, noise):
    for name in (TRAIN_SHARD, TEST_SHARD):
        write_records(tmp_path / name, [noise])
        read_or_refuse(tmp_path / name, (tmp_path / name).read_bytes())


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_byte_under_a_sound_checksum_never_crashes(shard, tmp_path, data):
    records = [bytearray(record) for record in read_records(shard)]
    record = records[data.draw(st.integers(0, len(records) - 1))]
    record[data.draw(st.integers(0, len(record) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path / shard.name
    write_records(path, [bytes(record) for record in records])
    read_or_refuse(path, path.read_bytes())


@pytest.mark.parametrize("name", [TRAIN_SHARD, TEST_SHARD])
@pytest.mark.parametrize(
    ("odd", "found"),
    [
        ({"num_samples": 299}, "segments of 299 samples, expected 300"),
        ({"num_tags": 8}, "labels of 8 tags, expected 7"),
    ],
)
def test_record_unlike_the_others_is_refused(tmp_path, name, odd, found):
    path = write_shard(tmp_path / name, make_clips(1) + make_clips(1, **odd))
    with pytest.raises(ShardError) as caught:
        list(read_clips([path]))
    assert f"{path}: record 1: {found}" in str(caught.value)


def test_other_length_than_asked_for_is_refused(shard):
    with pytest.raises(ShardError, match="record 0: segments of 300 samples, expected 59049"):
        list(read_clips([shard], num_samples=59049))


def test_other_number_of_tags_than_asked_for_is_refused(shard):
    with pytest.raises(ShardError, match="record 0: labels of 7 tags, expected 50"):
        list(read_clips([shard], num_tags=50))


def test_features_of_another_kind_are_refused(tf, tmp_path):
    clip = make_clips(1)[0]
    integers = tf.train.Feature(int64_list=tf.train.Int64List(value=[1]))
    for name in ("raw_labels", "raw_segment", "clip_id", "mp3_path"):
        message = tensorflow_records(tf, clip, "train")[0]
        message.features.feature[name].CopyFrom(integers)
        path = tmp_path / TRAIN_SHARD
        write_records(path, [message.SerializeToString()])
        with pytest.raises(ShardError, match=f"record 0: no feature '{name}' of bytes"):
            list(read_clips([path]))


# --- Training batches -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def segments_dataset(tmp_path_factory):
    """A dataset of many short segments, each of which says its number."""
    data_dir = tmp_path_factory.mktemp("segments")
    (data_dir / "tfrecord").mkdir()
    number = 0
    for shard in range(4):
        clips = []
        for clip in range(10):
            numbers = np.arange(number, number + 1 + clip % 4, dtype=np.float32)
            segments = np.repeat(numbers[:, np.newaxis], 30, axis=1)  # (n_segments, n_samples)
            clips.append(Clip(segments, np.uint8([clip % 2, clip % 3 == 0] * 25), str(number)))
            number += len(numbers)
        write_shard(data_dir / "tfrecord" / shard_name("train", shard, 4), clips)
    return open_dataset(data_dir)


@pytest.fixture
def reader(segments_dataset):
    reader = SegmentReader(segments_dataset)
    yield reader
    reader.close()


def direct(dataset):
    """Read all segments and labels in file order, without the reader."""
    clips = list(read_clips(dataset.splits["train"].shards))
    segments = np.concatenate([clip.segments for clip in clips])
    labels = np.concatenate([np.tile(clip.labels, (len(clip.segments), 1)) for clip in clips])
    return segments, labels


def test_reader_gives_any_segments_in_any_order(segments_dataset, reader):
    segments, labels = direct(segments_dataset)
    assert reader.num_segments == len(segments) == segments_dataset.splits["train"].num_segments
    for rows in (np.arange(len(segments)), np.array([3, 90, 3, 0]), np.array([], int)):
        found = reader.read(rows)
        assert [array.dtype for array in found] == [np.float32, np.float32]
        np.testing.assert_array_equal(found[0], segments[rows])
        np.testing.assert_array_equal(found[1], labels[rows])


@pytest.mark.parametrize("num_threads", [1, 8])
@pytest.mark.parametrize("batch_size", [1, 7, 23])
def test_batches_follow_the_order_whatever_the_threads(segments_dataset, num_threads, batch_size):
    segments, labels = direct(segments_dataset)
    reader = SegmentReader(segments_dataset, num_threads=num_threads)
    order = shuffled_order(reader.num_segments, seed=1, stage=0, epoch=0)
    batches = list(reader.batches(batch_size, order))
    reader.close()
    assert len(batches) == len(order) // batch_size
    for number, (batch, batch_labels) in enumerate(batches):
        rows = order[number * batch_size : (number + 1) * batch_size]
        np.testing.assert_array_equal(batch, segments[rows])
        np.testing.assert_array_equal(batch_labels, labels[rows])


def test_last_batch_is_kept_if_asked(reader):
    order = np.arange(reader.num_segments)
    batches = list(reader.batches(20, order, drop_remainder=False))
    np.testing.assert_array_equal(np.concatenate([batch[0][:, 0] for batch in batches]), order)
    assert len(batches[-1][0]) == reader.num_segments % 20


def test_order_is_a_permutation_that_only_its_numbers_decide():
    order = shuffled_order(1000, seed=3, stage=1, epoch=2)
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    np.testing.assert_array_equal(order, shuffled_order(1000, seed=3, stage=1, epoch=2))
    for other in ((4, 1, 2), (3, 2, 2), (3, 1, 3)):
        assert not np.array_equal(order, shuffled_order(1000, *other))
    # Neighbours are torn apart as chance would have it: a perfect shuffle, not one in a window.
    assert np.abs(order - np.arange(1000)).mean() > 250


def test_reader_runs_only_a_few_batches_ahead(reader, monkeypatch):
    batch_size, prefetch = 2, 3
    original = input_data.SegmentReader.read
    counted = []

    def counting_read(self, rows):
        counted.append(len(rows))
        return original(self, rows)

    monkeypatch.setattr(input_data.SegmentReader, "read", counting_read)
    batches = reader.batches(batch_size, np.arange(reader.num_segments), prefetch)
    for taken in range(1, 20):
        next(batches)
        assert len(counted) <= taken + prefetch
    batches.close()


def test_damage_is_named_while_training(tmp_path):
    data_dir = write_published_shards(tmp_path / "dataset", num_clips=6, num_tags=50)
    path = data_dir / "tfrecord" / "train-0001-of-0002.tfrecord"
    reader_dataset = open_dataset(data_dir)
    start, _ = index_records(path)[3]
    content = bytearray(path.read_bytes())
    content[start + 100] ^= 1
    path.write_bytes(content)
    reader = SegmentReader(reader_dataset)
    with pytest.raises(ShardError, match=rf"{path}: record 3: its bytes do not match"):
        list(reader.batches(4, np.arange(reader.num_segments)))
    reader.close()


def test_shard_that_lost_whole_records_is_noticed(tmp_path, tiny_dataset):
    shutil.copytree(tiny_dataset / "tfrecord", tmp_path / "tfrecord")
    path = tmp_path / "tfrecord" / "train-0002-of-0003.tfrecord"
    start, length = index_records(path)[-2]
    path.write_bytes(path.read_bytes()[: start + length + 4])
    with pytest.raises(
        ShardError, match=rf"{path}: \d+ bytes, expected \d+ by manifest\.json: truncated"
    ):
        open_dataset(tmp_path)
    # A manifest of a build that did not note the sizes still tells by the counts.
    manifest_path = tmp_path / "tfrecord" / "manifest.json"
    manifest = json.loads(manifest_path.read_text())
    for split in manifest["splits"].values():
        for entry in split["shards"]:
            del entry["bytes"]
    manifest_path.write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match=r"20 train segments, expected 21 by manifest\.json"):
        SegmentReader(open_dataset(tmp_path))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_shard_that_ends_where_a_record_does_is_noticed_in_every_split(
    tmp_path, tiny_dataset, split
):
    shutil.copytree(tiny_dataset / "tfrecord", tmp_path / "tfrecord")
    path = sorted((tmp_path / "tfrecord").glob(f"{split}-*"))[0]
    start, length = index_records(path)[-2]
    path.write_bytes(path.read_bytes()[: start + length + 4])
    assert list(read_clips([path]))
    with pytest.raises(ShardError, match=rf"{path}: .*run build_mtt\.py again"):
        open_dataset(tmp_path)


def test_empty_split_has_no_segments(golden):
    reader = SegmentReader(open_dataset(golden), "val")
    assert reader.num_segments == 0
    assert list(reader.batches(23, shuffled_order(0, 0, 0, 0))) == []
    reader.close()


# --- Samples as int16 -----------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
def test_int16_is_read_without_being_told_and_rounds_as_stated(tmp_path, split):
    samples = np.random.default_rng(0).uniform(-1, 1, (3, 300)).astype(np.float32)
    samples[0, :4] = [1.5, -1.5, 1.0, -1.0]
    clip = Clip(samples, np.array([1, 0], np.uint8), "7", "c/a.mp3")
    for encoding in ("float32", "int16"):
        folder = tmp_path / encoding
        folder.mkdir()
        write_records(folder / shard_name(split, 0, 1), encode_clip(clip, split, encoding))
    (read,) = read_clips([tmp_path / "int16" / shard_name(split, 0, 1)])
    assert read.segments.dtype == np.float32
    inside = np.abs(samples) < 1
    assert np.abs(read.segments - samples)[inside].max() <= 2**-16
    top = np.float32(1 - 2**-15)
    np.testing.assert_array_equal(read.segments[0, :4], [top, -1, top, -1])
    sizes = {
        encoding: (tmp_path / encoding / shard_name(split, 0, 1)).stat().st_size
        for encoding in ("float32", "int16")
    }
    assert sizes["int16"] < 0.6 * sizes["float32"]


def test_samples_of_an_unknown_encoding_are_refused(tmp_path):
    clip = Clip(np.zeros((1, 300), np.float32), np.array([1, 0], np.uint8), "7", "c/a.mp3")
    (record,) = encode_clip(clip, "train", "int16")
    write_records(tmp_path / "train-0000-of-0001.tfrecord", [record.replace(b"int16", b"int99")])
    with pytest.raises(ShardError, match="record 0: samples are encoded as 'int99'"):
        list(read_clips([tmp_path / "train-0000-of-0001.tfrecord"]))


# --- How well an epoch is mixed -------------------------------------------------------------------


def same_clip_pairs(clips, batch_size):
    """Count the pairs of segments of one clip that fall into one batch."""
    batches = clips[: len(clips) // batch_size * batch_size].reshape(-1, batch_size)
    counts = [np.unique(batch, return_counts=True)[1] for batch in batches]
    return sum(int((count * (count - 1) // 2).sum()) for count in counts)


def test_an_epoch_is_mixed_as_well_as_a_perfect_shuffle(tmp_path):
    num_clips, num_segments, batch_size, num_epochs = 60, 10, 23, 40
    folder = tmp_path / "tfrecord"
    folder.mkdir()
    shards = []
    for shard in range(4):
        # Each sample says the clip and the segment's place in the shards.
        clips = [
            Clip(
                np.array([[clip, clip * num_segments + n] for n in range(num_segments)], "f4"),
                np.array([1], np.uint8),
                str(clip),
            )
            for clip in range(shard, num_clips, 4)
        ]
        name = shard_name("train", shard, 4)
        write_records(folder / name, (r for clip in clips for r in encode_clip(clip, "train")))
        shards.append({"name": name, "clips": 15, "segments": 150})
    splits = {"train": {"clips": 60, "segments": 600, "shards": shards}}
    write_manifest(
        folder, {"tags": ["a"], "sample_rate": 22050, "num_samples": 2, "splits": splits}
    )

    dataset = open_dataset(tmp_path)
    reader = SegmentReader(dataset)
    total = num_clips * num_segments
    pairs, correlations, first_places = [], [], []
    for epoch in range(num_epochs):
        order = shuffled_order(reader.num_segments, 0, 0, epoch)
        samples = np.concatenate([x for x, _ in reader.batches(batch_size, order)])
        pairs.append(same_clip_pairs(samples[:, 0], batch_size))
        stored = np.argsort(np.argsort(samples[:, 1]))
        correlations.append(np.corrcoef(np.arange(len(stored)), stored)[0, 1])
        first_places.append(np.flatnonzero(samples[:, 1] == 0)[:1])
    reader.close()

    # What a perfect shuffle gives, with four standard errors of room.
    num_batches = total // batch_size
    expected = num_batches * batch_size * (batch_size - 1) / 2 * (num_segments - 1) / (total - 1)
    room = 4 * (expected / num_epochs) ** 0.5
    assert np.mean(pairs) == pytest.approx(expected, abs=room)
    # In the stored order a batch of 23 would hold about a hundred such pairs.
    assert expected < 0.05 * same_clip_pairs(np.repeat(np.arange(num_clips), 10), batch_size)
    assert abs(np.mean(correlations)) < 4 / (total * num_epochs) ** 0.5
    assert np.ptp(np.concatenate(first_places)) > total / 2


def test_more_shards_than_files_may_be_open_at_first(tmp_path):
    data_dir = write_dataset(tmp_path, num_clips=24)
    build_mtt.build(data_dir, num_audios_per_shard=1, num_workers=2)
    program = """
        import resource, sys
        import numpy as np
        from input_data import SegmentReader, open_dataset

        dataset = open_dataset(sys.argv[1])
        assert len(dataset.splits["train"].shards) == 12
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (10, hard))
        reader = SegmentReader(dataset)
        print(len(reader.read(np.arange(reader.num_segments))[0]) == reader.num_segments)
    """
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(data_dir)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.stdout == "True\n", finished.stderr
