"""Write small shards of random clips, with and without a manifest."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace

from input_data import Clip
from toolkit.data.manifest import shard_name, write_manifest
from toolkit.data.records import append_records, encode_clip, index_records

import numpy as np
from conftest import GOLDEN

NUM_SAMPLES = 300
NUM_TAGS = 7
TRAIN_SHARD = "train-0000-of-0001.tfrecord"
TEST_SHARD = "test-0000-of-0001.seq.tfrecord"
SPLIT_OF = {TRAIN_SHARD: "train", TEST_SHARD: "test"}


def make_clips(num_clips=3, num_samples=NUM_SAMPLES, num_tags=NUM_TAGS, seed=0):
    random = np.random.default_rng(seed)
    clips = []
    for number in range(num_clips):
        segments = random.standard_normal((1 + number % 3, num_samples)).astype(np.float32)
        labels = random.integers(0, 2, num_tags).astype(np.uint8)
        clips.append(Clip(segments, labels, str(100 + number), f"0/clip-{number}.mp3"))
    return clips


def write_records(path, records):
    with open(path, "wb") as file:
        append_records(file, records)


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
            clips = [replace(clip, clip_id="", mp3_path="") for clip in clips]
            write_shard(folder / shard_name(split, shard, num_shards), clips)
    return data_dir


def published_shards(data_dir):
    """Copy the published shards, with the training shard also as validation shard."""
    folder = data_dir / "tfrecord"
    shutil.copytree(GOLDEN / "tfrecord", folder)
    shutil.copy(folder / TRAIN_SHARD, folder / "val-0000-of-0001.tfrecord")
    return data_dir


def add_manifest(data_dir, num_tags=50, num_samples=NUM_SAMPLES):
    """Describe shards that contain one clip per record."""
    splits = {}
    for path in sorted((data_dir / "tfrecord").glob("*.tfrecord")):
        count = len(index_records(path))
        name = path.name.split("-")[0]
        split = splits.setdefault(name, {"clips": 0, "segments": 0, "shards": []})
        split["clips"] += count
        split["segments"] += count
        entry = {"name": path.name, "clips": count, "segments": count}
        split["shards"].append(entry | {"bytes": path.stat().st_size})
    tags = [f"tag {number}" for number in range(num_tags)]
    manifest = {"tags": tags, "sample_rate": 22050, "num_samples": num_samples, "splits": splits}
    write_manifest(data_dir / "tfrecord", manifest | {"skipped": []})
    return data_dir


@contextmanager
def edited_manifest(data_dir):
    """Yield the content of manifest.json, and write it with the caller's changes."""
    path = data_dir / "tfrecord" / "manifest.json"
    manifest = json.loads(path.read_text())
    yield manifest
    path.write_text(json.dumps(manifest))


def remove_split(data_dir, split):
    """Delete the shards of a split, also in the manifest."""
    for path in (data_dir / "tfrecord").glob(f"{split}-*"):
        path.unlink()
    with edited_manifest(data_dir) as manifest:
        manifest["splits"][split] = {"clips": 0, "segments": 0, "shards": []}


def assert_same_clips(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.segments.dtype == np.float32
        assert one.labels.dtype == np.uint8
        np.testing.assert_array_equal(one.segments, other.segments)
        np.testing.assert_array_equal(one.labels, other.labels)
        assert (one.clip_id, one.mp3_path) == (other.clip_id, other.mp3_path)
