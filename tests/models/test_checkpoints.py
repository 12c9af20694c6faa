"""Checkpoints: .keras files store network, weights, tags and training state; errors."""

import json
import os
import pickle
import sys
import textwrap
import zipfile

from model import build_network
from toolkit.blocks import BLOCKS
from toolkit.data.annotations import MTT_TOP_TAGS
from toolkit.models.checkpoints import Checkpoint, checkpoint_name, find_best, load, save
from toolkit.models.config import NetworkConfig

import keras
import numpy as np
import pytest
from conftest import needs_proc, run_python
from model_files import (
    TAGS,
    OpensFile,
    assert_refused,
    assert_same_weights,
    edit_weights,
    keras_content,
    rewrite_member,
    shared_checkpoint,
    small_checkpoint,
)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.keras"
    path.write_bytes(keras_content())
    return path


@pytest.mark.parametrize("block", BLOCKS)
def test_saved_checkpoint_loads_unchanged(tmp_path, block):
    multi = block in ("se", "res")
    checkpoint = small_checkpoint(block, multi=multi, dropout=0.25, initializer="he")
    save(tmp_path / "ckpt.keras", checkpoint)
    loaded = load(tmp_path / "ckpt.keras")
    assert loaded.config == checkpoint.config
    assert loaded.tags == TAGS
    assert loaded.sample_rate == 16000
    assert loaded.training == checkpoint.training
    assert_same_weights(loaded.network, checkpoint.network)
    assert os.listdir(tmp_path) == ["ckpt.keras"]


def test_keras_loads_a_saved_checkpoint(path):
    x = np.random.default_rng(0).standard_normal((3, 59049)).astype(np.float32)
    ours, theirs = (
        keras.ops.convert_to_numpy(network(x, training=False))
        for network in (shared_checkpoint().network, keras.saving.load_model(path))
    )
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("tags", [None, [f"tag {number}" for number in range(5)]])
def test_file_without_tags_loads(path, tags):
    change_description(path, tags=tags)  # earlier versions wrote 'tag 0', 'tag 1', …
    assert load(path).tags is None


def test_an_interrupted_write_leaves_the_earlier_file(path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save(path, shared_checkpoint())
    assert path.read_bytes() == keras_content()
    assert os.listdir(path.parent) == [path.name]


def test_best_checkpoint_has_the_lowest_loss(tmp_path):
    assert checkpoint_name(4, 0.15376) == "ckpt-e004-l0.1538.keras"
    assert checkpoint_name(1234, 12.5) == "ckpt-e1234-l12.5000.keras"
    assert find_best(tmp_path) is None
    assert find_best(tmp_path / "none") is None
    for name in (
        "resume.keras",
        ".ckpt-e005-l0.0001.tmp.keras",
        "ckpt-e004-l0.0001.keras.part",
        "ckpt-e000-l10.0000.keras",
        "ckpt-e001-l9.0000.keras",  # lower, though later in the alphabet
        "ckpt-e002-l0.1538.keras",
        "ckpt-e1003-l0.1538.keras",  # saved later, so its unrounded loss is lower
    ):
        (tmp_path / name).touch()
    assert find_best(tmp_path).name == "ckpt-e1003-l0.1538.keras"
    (tmp_path / "ckpt-e009-l0.1537.hdf5").touch()  # as the published program names its files
    assert find_best(tmp_path).name == "ckpt-e009-l0.1537.hdf5"


# --- Files that are refused ----------------------------------------------------------------------


def test_missing_file_and_empty_folder_are_refused(tmp_path):
    assert_refused(tmp_path / "none.keras", "no such file")
    assert_refused(tmp_path, "no checkpoint in this folder")


def test_networks_of_other_programs_are_refused(tmp_path):
    segments = keras.Input((4,))
    keras.Model(segments, keras.layers.Dense(3)(segments)).save(tmp_path / "dense.keras")
    assert_refused(tmp_path / "dense.keras", "contains no network.json", "written by train.py")


def change_description(path, **fields):
    with zipfile.ZipFile(path) as archive:
        description = json.loads(archive.read("network.json"))
    if isinstance(fields.get("network"), dict):
        fields["network"] = description["network"] | fields["network"]
    rewrite_member(path, "network.json", json.dumps(description | fields))


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("format", 2, "format is 2: expected 1"),
        ("tags", ["only one"], "tags is ['only one']: expected a list of 5 different names"),
        ("tags", [1, 2, 3, 4, 5], "expected a list of 5 different names"),
        ("tags", ["a", "b", "c", "d", "a"], "expected a list of 5 different names"),
        ("sample_rate", float("inf"), "sample_rate is inf: expected an integer"),
        ("training", 3, "training is 3: expected an object"),
        ("network", [], "network is []: expected an object"),
    ],
)
def test_invalid_descriptions_are_refused(path, field, value, part):
    change_description(path, **{field: value})
    assert_refused(path, part)


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("layers", 3, "'layers': expected one of block, multi"),
        ("block", "dense", f"block must be one of {', '.join(BLOCKS)}. Received: 'dense'"),
        ("init_features", 2.5, "init_features must be an integer from 1"),
        ("init_features", -1, "Received: -1"),
        ("alpha", float("nan"), "Received: nan"),
        ("dropout", 2, "dropout must be a number from 0 to 0.999"),
        ("weight_decay", "all", "Received: 'all'"),
        ("num_samples", 10**30, "num_samples must be an integer from 59049"),
        ("multi", "no", "multi must be one of True, False"),
        ("block", "basic", "shape"),
    ],
)
def test_invalid_hyper_parameters_are_refused(path, field, value, part):
    change_description(path, network={field: value})
    assert_refused(path, part)


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, b"\xff\xfe\x00\xd8"])
def test_damaged_descriptions_are_refused(path, content):
    rewrite_member(path, "network.json", content)
    assert_refused(path)


def test_missing_weights_are_refused(path):
    rewrite_member(path, "model.weights.h5", None)
    assert_refused(path, "contains no model.weights.h5")


@pytest.mark.parametrize(
    ("place", "values", "parts"),
    [
        ("batch_normalization_4/vars/2", None, ["no array", "batch_normalization_4/vars/2"]),
        ("conv1d/vars/0", np.zeros((6, 1, 3), "f"), ["conv0", "(6, 1, 3)", "expected (3, 1, 3)"]),
        ("dense/vars/1", np.float32([np.inf] * 6), ["block0_se_fc", "contains NaN or infinity"]),
    ],
)
def test_missing_and_invalid_arrays_are_refused(path, place, values, parts):
    def replace(file):
        del file[f"layers/{place}"]
        if values is not None:
            file[f"layers/{place}"] = values

    edit_weights(path, replace)
    assert_refused(path, *parts)


@pytest.mark.parametrize("member", ["model.weights.h5", "network.json"])
def test_compressed_content_is_refused(path, member):
    rewrite_member(path, member, bytes(2**24), zipfile.ZIP_DEFLATED)
    assert_refused(path, f"{member} is compressed")


def test_compressed_content_that_declares_a_false_size_is_refused(path):
    """The directory of the archive declares 1,000 bytes for 300 MB."""
    rewrite_member(path, "model.weights.h5", bytes(300 * 2**20), zipfile.ZIP_DEFLATED)
    content = path.read_bytes().replace((300 * 2**20).to_bytes(4, "little"), b"\xe8\x03\0\0")
    path.write_bytes(content)
    assert_refused(path, "model.weights.h5 is compressed", seconds=1)


def test_large_description_is_refused(path):
    rewrite_member(path, "network.json", b" " * (2**24 + 1))
    assert_refused(path, "network.json has 16777217 bytes: expected at most 16777216")


def test_small_file_that_declares_a_large_network_is_refused(path):
    """The network would have hundreds of gigabytes."""
    change_description(path, network={"init_features": 4096, "alpha": 256})
    assert_refused(path, "4096 features", seconds=2)


def test_code_in_a_file_is_not_run(path, tmp_path, monkeypatch):
    """Lambda layers, module names, pickles, and members with paths outside the folder."""
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')"
    (tmp_path / "planted.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    segments, ran_name = keras.Input((59049,)), str(ran)
    layer = keras.layers.Lambda(lambda x: (open(ran_name, "w").close(), x)[1], (59049,))
    with_lambda = keras.Model(segments, layer(segments)).to_json()
    ran.unlink(missing_ok=True)  # building the model may run the layer
    custom = {"class_name": "Custom", "module": "planted", "registered_name": "x>C", "config": {}}
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("../planted2.py", str(tmp_path / "planted3.py"), "assets/../../planted4.py"):
            archive.writestr(name, code)
        archive.writestr("assets/state.pkl", pickle.dumps(OpensFile(ran)))
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    for config in (with_lambda, json.dumps(custom), "not JSON"):
        rewrite_member(path, "config.json", config)
        assert_same_weights(load(path).network, shared_checkpoint().network)
    assert not ran.exists() and "planted" not in sys.modules
    assert sorted(os.listdir(tmp_path)) == ["model.keras", "planted.py"]
    pickle.loads(pickle.dumps(OpensFile(ran))).close()
    assert ran.exists()  # the pickle is able to run code


_FULL_SIZE = """
    import sys
    from toolkit.models.checkpoints import load
    count = load(sys.argv[1]).network.count_params()
    # The peak of getrusage may be that of the parent process.
    status = open("/proc/self/status").read()
    print(count, int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


@needs_proc
@pytest.mark.slow
def test_full_size_network_loads_in_bounded_memory(tmp_path):
    config = NetworkConfig(block="se")
    path = tmp_path / "se.keras"
    save(path, Checkpoint(build_network(config), config, MTT_TOP_TAGS))
    done = run_python("-c", textwrap.dedent(_FULL_SIZE), path)
    assert done.returncode == 0, done.stderr
    count, memory = map(int, done.stdout.split())
    assert count == 24_749_618
    assert memory < 1.5e9
