"""Small networks, published model files, and functions that change model files."""

import io
import tempfile
import time
import zipfile
from functools import cache
from pathlib import Path

from input_data import read_clips
from model import build_network
from toolkit.errors import CheckpointError
from toolkit.models.checkpoints import Checkpoint, load, save
from toolkit.models.config import NetworkConfig

import h5py
import numpy as np
import pytest
from conftest import GOLDEN

# "se-multi-stage2" is "se-multi" with an offset in the numbers of all layer names.
GOLDEN_NAMES = (
    *(f"{b}-{multi}" for b in ("se", "rese", "res", "basic") for multi in ("multi", "nomulti")),
    "se-multi-stage2",
)
TAGS = ("guitar", "slow", "rock", "naïve ♪", 'a,b"c')


@cache
def published_checkpoint(name):
    return load(GOLDEN / "checkpoints" / f"{name}.hdf5")


@cache
def published_segments():
    """Return the 10 segments of gm-pop, then the 10 of gm-choir [shape=(20, 59049)]."""
    shards = ("train-0000-of-0001.tfrecord", "test-0000-of-0001.seq.tfrecord")
    paths = [GOLDEN / "tfrecord" / shard for shard in shards]
    return np.concatenate([clip.segments for clip in read_clips(paths)])


def noise(num_segments, num_samples):
    levels = np.linspace(0.1, 0.6, num_segments)[:, np.newaxis]
    return np.random.default_rng(1).normal(0, levels, (num_segments, num_samples)).astype("f")


@cache
def matched_checkpoint(block="se", tags=TAGS, sample_rate=16000, **options):
    """Return a small network whose batch statistics match its random weights; do not change it."""
    import keras

    sizes = {"init_features": 3, "alpha": 2, "num_tags": len(tags)}
    config = NetworkConfig(**{"block": block} | sizes | options)
    network = build_network(config)
    random = np.random.default_rng(0)
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.gamma.assign(random.uniform(0.5, 1.5, layer.gamma.shape))
            layer.beta.assign(random.uniform(-0.5, 0.5, layer.beta.shape))
            layer.momentum = 0.0  # one batch sets the statistics
    network(noise(5, config.num_samples), training=True)
    return Checkpoint(network, config, tags, sample_rate)


def small_checkpoint(block="se", seed=0, **options):
    """Return a small network with random weights and random batch statistics."""
    config = NetworkConfig(
        **{"block": block, "init_features": 3, "alpha": 2, "num_tags": len(TAGS)} | options
    )
    network = build_network(config)
    random = np.random.default_rng(seed)
    network.set_weights(
        [random.uniform(0.1, 0.5, weight.shape).astype("f") for weight in network.get_weights()]
    )
    return Checkpoint(network, config, TAGS, 16000, {"stage": 3, "state": {"epoch": 7}})


# Not to be changed by a test.
shared_checkpoint = cache(small_checkpoint)


@cache
def keras_content():
    """Return `shared_checkpoint` as the content of a .keras file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shared.keras"
        save(path, shared_checkpoint())
        return path.read_bytes()


def assert_same_weights(network, other):
    for ours, theirs in zip(network.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def rewrite_member(path, name, content, compression=zipfile.ZIP_STORED):
    """Replace a file of a .keras archive, or remove it if content is None."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for member, old in members.items():
            if member != name:
                archive.writestr(member, old)
        if content is not None:
            archive.writestr(name, content, compression)


def edit_weights(path, edit):
    """Apply a function to the weights of a .keras file, opened as an h5py.File."""
    with zipfile.ZipFile(path) as archive:
        content = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(content, "r+") as file:
        edit(file)
    rewrite_member(path, "model.weights.h5", content.getvalue())


def assert_refused(path, *parts, seconds=20):
    """Check that `load` refuses a file quickly, in one line with the given words."""
    started = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert time.process_time() - started < seconds
    assert "\n" not in message and message.startswith(f"{path}: ")
    for part in parts:
        assert part in message


class OpensFile:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")
