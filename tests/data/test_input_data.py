"""Datasets of shards: what they contain, clips in parts, and shuffled batches."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import input_data
from input_data import Clip, SegmentReader, open_dataset, read_clips, shuffled_order
from toolkit.data import audio
from toolkit.data.annotations import MTT_TOP_TAGS
from toolkit.data.example_pb2 import Example, Features
from toolkit.data.manifest import shard_name
from toolkit.data.records import encode_clip, index_records
from toolkit.errors import AnnotationsError, ShardError, UsageError

import numpy as np
import pytest
from conftest import deny, run_python, write_annotations
from shards import (
    NUM_TAGS,
    SPLIT_OF,
    TEST_SHARD,
    TRAIN_SHARD,
    add_manifest,
    assert_same_clips,
    make_clips,
    write_published_shards,
    write_records,
    write_shard,
)

# --- Content of a dataset -------------------------------------------------------------------------


def test_other_shards_without_a_manifest_are_refused(tmp_path, tiny_dataset):
    """They may have other tags and another sample rate than MagnaTagATune."""
    shutil.copytree(tiny_dataset / "tfrecord", tmp_path / "tfrecord")
    (tmp_path / "tfrecord" / "manifest.json").unlink()
    with pytest.raises(ShardError, match=r"manifest\.json is missing: run build_mtt\.py again, or"):
        open_dataset(tmp_path)


def test_folder_of_the_shards_is_refused(tmp_path):
    (tmp_path / "tfrecord").mkdir()
    (tmp_path / "tfrecord" / TEST_SHARD).touch()
    with pytest.raises(UsageError, match=f"give the folder above, --data-dir {tmp_path}"):
        open_dataset(tmp_path / "tfrecord")


@pytest.mark.parametrize("folder", ["", "tfrecord"])
def test_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, folder):
    data_dir = write_published_shards(tmp_path / "dataset", num_tags=50)
    deny(monkeypatch, data_dir / folder)
    with pytest.raises(PermissionError) as caught:
        open_dataset(data_dir)
    assert Path(caught.value.filename) == data_dir / folder


def test_published_shards_have_the_published_tags(golden):
    dataset = open_dataset(golden)
    assert dataset.tags == MTT_TOP_TAGS
    assert (dataset.sample_rate, dataset.num_samples) == (22050, 59049)
    assert dataset.splits["train"].num_segments == 10
    assert dataset.splits["test"].num_clips == 1
    assert dataset.splits["train"].num_clips is dataset.splits["test"].num_segments is None
    assert dataset.splits["val"].shards == []


def test_other_tags_without_a_manifest_need_the_annotations(tmp_path):
    data_dir = write_published_shards(tmp_path / "dataset")
    with pytest.raises(AnnotationsError, match=r"annotations_final\.csv: no such file.*7 tags"):
        open_dataset(data_dir)
    tags = [f"tag {number}" for number in range(NUM_TAGS)]
    row = ["1", *[1] * NUM_TAGS, "0/a.mp3"]
    write_annotations(data_dir / "annotations_final.csv", [row], tags)
    assert open_dataset(data_dir).tags == tuple(tags)


def test_error_of_a_missing_dataset_says_what_to_download(tmp_path):
    with pytest.raises(UsageError, match="download annotations_final"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="download annotations_final"):
        open_dataset(tmp_path)


def test_error_of_missing_shards_says_how_to_build_them(tmp_path):
    (tmp_path / "tfrecord").mkdir()
    with pytest.raises(ShardError, match=f"python build_mtt.py --data-dir {tmp_path}"):
        open_dataset(tmp_path)


# --- Long clips -----------------------------------------------------------------------------------


PART = 5  # segments


def long_clips(lengths):
    """Make clips with the given numbers of segments; samples encode clip and position."""
    clips = []
    for number, length in enumerate(lengths):
        segments = np.arange(length * 4, dtype=np.float32).reshape(length, 4) + 1000 * number
        labels = np.array([1, number % 2], np.uint8)
        clips.append(Clip(segments / 128, labels, str(number), f"d/{number}.mp3"))
    return clips


def parts_of(clip):
    for part, start in enumerate(range(0, len(clip.segments), PART)):
        yield replace(clip, segments=clip.segments[start : start + PART], part=part)


@pytest.mark.parametrize("name", [TRAIN_SHARD, TEST_SHARD])
@pytest.mark.parametrize("lengths", [(4,), (10, 5, 11), (1, 23, 1)])
def test_long_clip_comes_in_parts(tmp_path, monkeypatch, name, lengths):
    monkeypatch.setattr(audio, "PART_SAMPLES", PART * 4)
    clips = long_clips(lengths)
    path = tmp_path / name
    parts = [part for clip in clips for part in parts_of(clip)]
    write_records(path, (r for part in parts for r in encode_clip(part, SPLIT_OF[name])))
    found = list(read_clips([path, path]))
    assert_same_clips(found, parts * 2)
    assert [clip.part for clip in found] == [part.part for part in parts] * 2
    # A short clip is one record of a test shard.
    if name == TEST_SHARD:
        assert len(index_records(path)) == sum(-(-length // PART) for length in lengths)


# --- Training batches -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def segments_dataset(tmp_path_factory):
    """Write a dataset of many short segments, each filled with its number."""
    data_dir = tmp_path_factory.mktemp("segments")
    (data_dir / "tfrecord").mkdir()
    number = 0
    for shard in range(4):
        clips = []
        for clip in range(10):
            numbers = np.arange(number, number + 1 + clip % 4, dtype=np.float32)
            segments = np.repeat(numbers[:, np.newaxis], 30, axis=1)  # (n_segments, n_samples)
            clips.append(Clip(segments, np.uint8([clip % 2, clip % 3 == 0] * 25)))
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


def reordered(record):
    """Serialise the features of a record in reverse order, which protobuf allows."""
    features = Example.FromString(record).features.feature
    entries = [
        Features(feature={name: features[name]}).SerializeToString()
        for name in sorted(features, reverse=True)
    ]
    content = b"".join(entries)
    return record[: len(record) - len(content)] + content


@pytest.mark.parametrize("encoding", ["float32", "int16"])
@pytest.mark.parametrize("change", [lambda record: record, reordered])
def test_reader_reads_any_layout_and_verifies_it(tmp_path, encoding, change):
    (folder := tmp_path / "tfrecord").mkdir()
    path = folder / TRAIN_SHARD
    clips = make_clips(4, num_tags=50)
    records = [change(record) for clip in clips for record in encode_clip(clip, "train", encoding)]
    write_records(path, records)
    dataset = open_dataset(add_manifest(tmp_path))
    segments, labels = direct(dataset)
    reader = SegmentReader(dataset)
    full_scale = 1 if encoding == "float32" else 32768
    found = reader.read(np.arange(len(segments)))
    assert found[0].dtype == encoding
    np.testing.assert_array_equal(found[0], segments * full_scale)
    np.testing.assert_array_equal(found[1], labels)
    start, length = index_records(path)[2]
    intact = path.read_bytes()
    for place in (records[2].index(bytes(clips[1].labels)), 200, length - 1, length + 3):
        damaged = bytearray(intact)
        damaged[start + place] ^= 1
        path.write_bytes(damaged)  # the reader has read the record before
        with pytest.raises(ShardError, match="record 2: its bytes do not match their checksum"):
            reader.read(np.arange(len(segments)))
    os.truncate(path, start + 100)
    with pytest.raises(ShardError, match="record 2: the file is truncated"):
        reader.read(np.arange(len(segments)))
    reader.close()


@pytest.mark.parametrize(
    ("clips", "encodings", "found"),
    [
        ({"num_tags": 60}, ("float32", "float32"), "labels of 60 tags, expected 50"),
        ({"num_tags": 40}, ("int16", "int16"), "labels of 40 tags, expected 50"),
        ({"num_samples": 299}, ("float32", "float32"), "segments of 299 samples, expected 300"),
        # As many bytes as a record of 300 samples of the other type.
        ({"num_samples": 600}, ("float32", "int16"), "segments of 600 samples, expected 300"),
        ({"num_samples": 150}, ("int16", "float32"), "segments of 150 samples, expected 300"),
        ({}, ("int16", "float32"), "float32 samples after records with int16"),
    ],
)
def test_reader_refuses_a_record_of_another_shape(tmp_path, clips, encodings, found):
    (tmp_path / "tfrecord").mkdir()
    made = (make_clips(2, num_tags=50), make_clips(1, **{"num_tags": 50} | clips))
    records = []
    for some, encoding in zip(made, encodings, strict=True):
        for clip in some:
            records += encode_clip(clip, "train", encoding)
    write_records(tmp_path / "tfrecord" / TRAIN_SHARD, records)
    reader = SegmentReader(open_dataset(add_manifest(tmp_path)))
    with pytest.raises(ShardError, match=f"record 3: {found}"):
        reader.read(np.arange(4))
    reader.close()


@pytest.mark.parametrize("sample", [np.nan, -np.inf, 12345, -101])
def test_samples_that_are_not_audio_are_named(tmp_path, sample):
    """Shards of earlier builds may contain such samples."""
    (tmp_path / "tfrecord").mkdir()
    clips = make_clips(3, num_tags=50)
    for clip in clips:
        clip.segments[0, :2] = -100, 99
    write_shard(tmp_path / "tfrecord" / TRAIN_SHARD, clips)
    reader = SegmentReader(open_dataset(add_manifest(tmp_path)))
    reader.read(np.arange(6))
    clips[2].segments[1, 70] = sample
    path = tmp_path / "tfrecord" / TRAIN_SHARD
    path.write_bytes(write_shard(tmp_path / TRAIN_SHARD, clips).read_bytes())  # the reader's file
    test_path = write_shard(tmp_path / "tfrecord" / TEST_SHARD, clips)
    expected = rf"clip 102 \(0/clip-2\.mp3\): sample {{}} is {sample:g}, expected at most 100"
    with pytest.raises(ShardError, match=f"{path}: record 4: " + expected.format(70)):
        reader.read(np.arange(6))
    reader.close()
    with pytest.raises(ShardError, match=f"{test_path}: record 2: " + expected.format(370)):
        list(read_clips([test_path]))


@pytest.mark.parametrize(("num_threads", "batch_size"), [(1, 7), (8, 1), (8, 23)])
def test_batches_follow_the_order(segments_dataset, num_threads, batch_size):
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


def test_smaller_last_batch_can_be_kept(reader):
    order = np.arange(reader.num_segments)
    batches = list(reader.batches(20, order, drop_remainder=False))
    np.testing.assert_array_equal(np.concatenate([batch[0][:, 0] for batch in batches]), order)
    assert len(batches[-1][0]) == reader.num_segments % 20


def test_order_is_a_permutation_of_seed_stage_and_epoch():
    order = shuffled_order(1000, seed=3, stage=1, epoch=2)
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    np.testing.assert_array_equal(order, shuffled_order(1000, seed=3, stage=1, epoch=2))
    for other in ((4, 1, 2), (3, 2, 2), (3, 1, 3)):
        assert not np.array_equal(order, shuffled_order(1000, *other))
    # Segments move as far as in a perfect shuffle, not only within a window of the order, and
    # those of a clip are separated.
    assert np.abs(order - np.arange(1000)).mean() > 250
    assert (np.abs(np.diff(order)) == 1).mean() < 0.02


def test_reader_prefetches_only_a_few_batches(reader, monkeypatch):
    batch_size, prefetch = 2, 3
    original = input_data.SegmentReader.read
    counted = []

    def counting_read(self, rows, *options):
        counted.append(len(rows))
        return original(self, rows, *options)

    monkeypatch.setattr(input_data.SegmentReader, "read", counting_read)
    batches = reader.batches(batch_size, np.arange(reader.num_segments), prefetch)
    for taken in range(1, 20):
        next(batches)
        assert len(counted) <= taken + prefetch
    batches.close()


def test_empty_split_has_no_segments(golden):
    reader = SegmentReader(open_dataset(golden), "val")
    assert reader.num_segments == 0
    assert list(reader.batches(23, shuffled_order(0, 0, 0, 0))) == []
    reader.close()


def test_limit_of_open_files_is_raised_for_many_shards(tmp_path):
    (tmp_path / "tfrecord").mkdir()
    for shard in range(12):
        write_shard(tmp_path / "tfrecord" / shard_name("train", shard, 12), make_clips(num_tags=50))
    program = """if True:
        import resource, sys
        import numpy as np
        from input_data import SegmentReader, open_dataset

        dataset = open_dataset(sys.argv[1])
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (10, hard))
        reader = SegmentReader(dataset)
        print(len(reader.read(np.arange(reader.num_segments))[0]))
    """
    finished = run_python("-c", program, add_manifest(tmp_path))
    assert finished.stdout == "72\n", finished.stderr
