"""The manifest and the names of shards: incomplete, mixed and invalid datasets are refused."""

import json
import shutil

from input_data import open_dataset
from toolkit.data.manifest import read_manifest, write_manifest
from toolkit.errors import ShardError

import pytest
from shards import write_published_shards, write_shard


def test_manifest_is_read_as_it_was_written(tmp_path):
    manifest = {"tags": ["ü", "b"], "sample_rate": 8, "num_samples": 3, "splits": {}}
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path / "manifest.json") == {"format": 1} | manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


VALID = {"format": 1, "tags": [], "sample_rate": 1, "num_samples": 1, "splits": {}}
CHANGES = [
    {"splits": []},
    {"splits": {"val": {}}},
    {"splits": {"val": {"clips": 1, "segments": 1, "shards": [{"name": {}}]}}},
    {"skipped": [{"clip_id": "1", "mp3_path": "0/a.mp3"}]},
    {"options": {"audio_dir": None}},
    {"tags": 3},
    {"tags": ["a", 1]},
    {"num_samples": None},
    {"num_samples": -1},
]
NO_MANIFESTS = ["", "{", "[]", "null", "{}", '{"format": 2}', '{"format": 1}', "\udcff\udcfe"]


@pytest.mark.parametrize(
    "content", NO_MANIFESTS + [json.dumps(VALID | change) for change in CHANGES]
)
def test_invalid_manifest_is_refused(tmp_path, content):
    path = tmp_path / "manifest.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ShardError, match=str(path)):
        read_manifest(path)


def refusal(data_dir):
    with pytest.raises(ShardError) as caught:
        open_dataset(data_dir)
    assert str(data_dir / "tfrecord") in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("shard", ["0000", "0001"])
def test_incomplete_set_is_refused(tmp_path, shard):
    data_dir = write_published_shards(tmp_path / "dataset", num_tags=50)
    open_dataset(data_dir)
    (data_dir / "tfrecord" / f"train-{shard}-of-0002.tfrecord").unlink()
    found = f"1 of the train shards are missing, the first is {shard}"
    assert found in refusal(data_dir)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("train-0002-of-0003.tfrecord", "train shards of different sets (of 0002 and of 0003)"),
        ("train-0002-of-0002.tfrecord", "not the name of a shard"),
        ("train-0000-of-0002.seq.tfrecord", "not the name of a shard"),
        ("test-0000-of-0001.tfrecord", "not the name of a shard"),
        ("train-00000-of-0002.tfrecord", "not the name of a shard"),
    ],
)
def test_mixed_set_is_refused(tmp_path, name, found):
    data_dir = write_published_shards(tmp_path / "dataset", num_tags=50)
    write_shard(data_dir / "tfrecord" / name)
    assert found in refusal(data_dir)


def test_missing_shards_of_the_manifest_are_refused(tmp_path, tiny_dataset):
    shutil.copytree(tiny_dataset / "tfrecord", tmp_path / "tfrecord")
    for path in (tmp_path / "tfrecord").glob("train-*"):
        path.unlink()
    assert "train-0000-of-0003.tfrecord is missing" in refusal(tmp_path)


def test_shard_that_is_not_in_the_manifest_is_refused(tmp_path, tiny_dataset):
    shutil.copytree(tiny_dataset / "tfrecord", tmp_path / "tfrecord")
    path = tmp_path / "tfrecord" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["val"]["shards"] = []
    path.write_text(json.dumps(manifest))
    assert "val-0000-of-0001.tfrecord is not in manifest.json" in refusal(tmp_path)
