"""Published checkpoints: networks are recognised and compute the published outputs."""

import json
import pickle
import shutil
import sys
from pathlib import Path

from model import build_excitations
from toolkit.blocks import BLOCKS
from toolkit.models.checkpoints import load

import h5py
import keras
import numpy as np
import pytest
from conftest import run_python
from model_files import (
    GOLDEN_NAMES,
    OpensFile,
    assert_refused,
    assert_same_weights,
    published_checkpoint,
    published_segments,
    small_checkpoint,
)


@pytest.fixture
def old_file(golden, tmp_path):
    return Path(shutil.copy(golden / "checkpoints" / "se-multi.hdf5", tmp_path / "old.hdf5"))


def replace_array(layer, name, values):
    del layer[name]
    layer[name] = values


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_published_networks_compute_the_published_outputs(golden, name):
    expected = np.load(golden / "expected.npz")
    checkpoint = published_checkpoint(name)
    config, network = checkpoint.config, checkpoint.network
    block, multi = name.split("-")[:2]
    assert (config.block, config.multi) == (block, multi == "multi")
    assert (config.init_features, config.num_tags, config.num_samples) == (4, 50, 59049)
    assert config.alpha == (2 if "se" in name else 16)
    assert (checkpoint.tags, checkpoint.sample_rate) == (None, 22050)

    def assert_equal(found, key):
        found = keras.ops.convert_to_numpy(found)
        np.testing.assert_allclose(found, expected[f"{name}/{key}"], rtol=0, atol=1e-5)

    assert_equal(network(published_segments(), training=False), "predictions")
    if "se" in name:
        excitations = build_excitations(network)(published_segments(), training=False)
        for depth, found in zip(range(9), excitations, strict=True):
            assert_equal(found, f"excitations_{depth}")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_published_networks_compute_the_published_outputs_on_other_backends(backend):
    pytest.importorskip(backend)
    test = f"{__file__}::test_published_networks_compute_the_published_outputs"
    done = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", test, KERAS_BACKEND=backend)
    assert done.returncode == 0, done.stdout
    assert f"{len(GOLDEN_NAMES)} passed" in done.stdout


def test_weights_only_file_is_read(golden, tmp_path):
    path = tmp_path / "weights.hdf5"
    with (
        h5py.File(golden / "checkpoints" / "rese-multi.hdf5") as old,
        h5py.File(path, "w") as new,
    ):
        for layer in old["model_weights"]:
            old.copy(f"model_weights/{layer}", new)
    loaded, expected = load(path), published_checkpoint("rese-multi")
    assert loaded.config == expected.config
    assert_same_weights(loaded.network, expected.network)


def saved_again(file):
    """Rename scopes as Keras 2 does when a process saves a model that it has loaded.

    The second convolution of a block gets the scope of the first one in another network.
    """
    for layer, group in file["model_weights"].items():
        for scope in list(group):
            group.move(scope, f"{layer}_1" if layer != "conv1d_4" else "conv1d_3")


def saved_by_tf_1_13(file):
    for layer in list(file["model_weights"]):
        if layer.startswith("batch_normalization"):
            name = layer.replace("batch_normalization", "batch_normalization_v1")
            file["model_weights"].move(layer, name)


@pytest.mark.parametrize("rename", [saved_again, saved_by_tf_1_13])
def test_files_of_other_programs_have_other_names(golden, tmp_path, rename):
    path = Path(shutil.copy(golden / "checkpoints" / "rese-multi.hdf5", tmp_path / "renamed.hdf5"))
    with h5py.File(path, "r+") as file:
        rename(file)
    loaded, expected = load(path), published_checkpoint("rese-multi")
    assert loaded.config == expected.config
    assert_same_weights(loaded.network, expected.network)


def test_number_of_tags_is_inferred(golden, old_file):
    with h5py.File(old_file, "r+") as file:
        layer = file["model_weights/dense_20/dense_20"]
        for name in ("kernel:0", "bias:0"):
            replace_array(layer, name, layer[name][..., :7])
    checkpoint = load(old_file)
    assert checkpoint.config.num_tags == 7
    predictions = keras.ops.convert_to_numpy(checkpoint.network(published_segments()))
    expected = np.load(golden / "expected.npz")["se-multi/predictions"][:, :7]
    np.testing.assert_allclose(predictions, expected, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_h5_file_of_keras_3_is_read(tmp_path, block):
    # An alpha of 1.5 gives 4, 9 and 18 hidden units for 3, 6 and 12 channels.
    alpha = 1.5 if BLOCKS[block].has_excitations else 16
    checkpoint = small_checkpoint(block, multi=False, alpha=alpha)
    checkpoint.network.save(tmp_path / "network.h5")
    loaded = load(tmp_path / "network.h5")
    assert loaded.config == checkpoint.config
    assert loaded.tags is None
    assert_same_weights(loaded.network, checkpoint.network)


# --- Files that are refused ----------------------------------------------------------------------


def test_another_network_is_refused(tmp_path):
    segments = keras.Input((4,))
    keras.Model(segments, keras.layers.Dense(3)(segments)).save(tmp_path / "dense.h5")
    assert_refused(
        tmp_path / "dense.h5",
        "0 convolutions, 1 dense layers and 0 batch normalizations",
        "expected 10, 2 and 11 for a network of basic blocks",
    )


def test_missing_layer_is_refused(old_file):
    with h5py.File(old_file, "r+") as file:
        del file["model_weights/conv1d_10"]
    assert_refused(old_file, "9 convolutions, 20 dense", "expected 10, 20 and 11", "se blocks")


def test_missing_array_is_refused(old_file):
    with h5py.File(old_file, "r+") as file:
        del file["model_weights/conv1d_3/conv1d_3/bias:0"]
    assert_refused(old_file, "conv1d_3", "kernel (3, 4, 4)", "expected a one-dimensional conv")


def test_unknown_layer_name_is_refused(old_file):
    with h5py.File(old_file, "r+") as file:
        file["model_weights"].move("conv1d_3", "my_conv")
    assert_refused(old_file, "'my_conv'", "expected a name such as conv1d_3")


def test_two_layers_of_one_number_are_refused(old_file):
    with h5py.File(old_file, "r+") as file:
        file["model_weights"].move("batch_normalization_4", "batch_normalization_v1_5")
    assert_refused(old_file, "batch_normalization_5", "batch_normalization_v1_5", "have one number")


def test_small_file_that_declares_a_large_network_is_refused(old_file):
    """The network would have hundreds of gigabytes."""
    with h5py.File(old_file, "r+") as file:
        layer = file["model_weights/conv1d_1/conv1d_1"]
        replace_array(layer, "kernel:0", np.zeros((3, 1, 4096), np.float32))
    assert_refused(old_file, "4096 features", seconds=2)


def test_code_in_a_file_is_not_run(old_file, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    (tmp_path / "planted.py").write_text(f"open({str(ran)!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = {"class_name": "Custom", "module": "planted", "registered_name": "x>C", "config": {}}
    with h5py.File(old_file, "r+") as file:
        file.attrs["model_config"] = json.dumps(config).encode()
        file.attrs["training_config"] = np.void(pickle.dumps(OpensFile(ran)))
    assert_same_weights(load(old_file).network, published_checkpoint("se-multi").network)
    assert not ran.exists() and "planted" not in sys.modules
