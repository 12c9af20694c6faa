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
def test_invalid_manifest_is_refused(tmp_path, content):
    path = tmp_path / "manifest.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ShardError, match=str(path)):
        read_manifest(path)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda folder: (folder / "train-0000-of-0002.tfrecord").unlink(),
         "1 of the train shards are missing, the first is 0000"),
        (lambda folder: (folder / "train-0001-of-0002.tfrecord").unlink(),
         "1 of the train shards are missing, the first is 0001"),
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
def test_incomplete_or_mixed_set_is_refused(tmp_path, change, found):
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
def test_missing_shard_of_the_manifest_is_refused(tmp_path, tiny_dataset, change, found):
    shutil.copytree(tiny_dataset / "tfrecord", tmp_path / "tfrecord")
    change(tmp_path / "tfrecord")
    with pytest.raises(ShardError, match=found):
        open_dataset(tmp_path)


def test_shard_that_is_not_in_the_manifest_is_refused(tmp_path, tiny_dataset):
    shutil.copytree(tiny_dataset / "tfrecord", tmp_path / "tfrecord")
    path = tmp_path / "tfrecord" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["val"]["shards"] = []
    path.write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match=r"val-0000-of-0001\.tfrecord is not in manifest\.json"):
        open_dataset(tmp_path)
