"""Damaged and truncated shards give an error that names the record."""

import shutil

from input_data import SegmentReader, open_dataset, read_clips
from toolkit.data.records import index_records
from toolkit.errors import ShardError

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shards import TEST_SHARD, TRAIN_SHARD, edited_manifest, write_shard


@pytest.fixture(scope="module", params=[TRAIN_SHARD, TEST_SHARD])
def shard(request, tmp_path_factory):
    return write_shard(tmp_path_factory.mktemp("shard") / request.param)


def read_or_refuse(path, content):
    """Return the clips of a shard, or None if one line that names the record refuses the shard."""
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


def test_truncated_shard_is_noticed(shard, tmp_path):
    content = shard.read_bytes()
    clips = list(read_clips([shard]))
    ends = {0, *(int(start + length + 4) for start, length in index_records(shard))}
    places = {*range(0, len(content), 37), *(end + step for end in ends for step in (-1, 0, 1))}
    for place in sorted(place for place in places if 0 <= place < len(content)):
        found = read_or_refuse(tmp_path / shard.name, content[:place])
        # Without a manifest, truncation at the end of a record cannot be noticed.
        assert (found is not None) == (place in ends)
        segments = [segment for clip in found or [] for segment in clip.segments]
        whole = [segment for clip in clips for segment in clip.segments]
        for one, other in zip(segments, whole, strict=False):
            np.testing.assert_array_equal(one, other)


def test_missing_last_record_is_noticed_by_the_manifest(tmp_path, tiny_dataset):
    shutil.copytree(tiny_dataset / "tfrecord", tmp_path / "tfrecord")
    path = tmp_path / "tfrecord" / "train-0002-of-0003.tfrecord"
    start, length = index_records(path)[-2]
    path.write_bytes(path.read_bytes()[: start + length + 4])
    assert list(read_clips([path]))
    said = rf"{path}: \d+ bytes, but manifest\.json lists \d+: .*run build_mtt\.py again"
    with pytest.raises(ShardError, match=said):
        open_dataset(tmp_path)
    with edited_manifest(tmp_path) as manifest:  # earlier versions wrote only counts
        for split in manifest["splits"].values():
            for entry in split["shards"]:
                del entry["bytes"]
    with pytest.raises(ShardError, match=r"20 train segments, but manifest\.json lists 21"):
        SegmentReader(open_dataset(tmp_path))
