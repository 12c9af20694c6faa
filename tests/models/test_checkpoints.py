"""Model files: the published ones load as they were, ours round trip, all others are refused."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

from model import build_network
from toolkit.data.annotations import MTT_TOP_TAGS
from toolkit.errors import CheckpointError
from toolkit.models.checkpoints import Checkpoint, checkpoint_name, find_best, load, save
from toolkit.models.config import BLOCKS, NetworkConfig

import h5py
import numpy as np
import pytest
from conftest import opened

ROOT = Path(__file__).resolve().parents[2]
# "se-multi-stage2" is "se-multi" with the numbers in all layer names offset.
GOLDEN_NAMES = (
    *(f"{block}-{multi}" for block in BLOCKS for multi in ("multi", "nomulti")),
    "se-multi-stage2",
)
TAGS = ("guitar", "slow", "rock", "naïve ♪", 'a,b"c')


def published_segments(golden):
    """The 10 segments of gm-pop, then the 10 of gm-choir [shape=(20, 59049)]."""
    from input_data import read_clips

    shards = ("train-0000-of-0001.tfrecord", "test-0000-of-0001.seq.tfrecord")
    paths = [golden / "tfrecord" / shard for shard in shards]
    return np.concatenate([clip.segments for clip in read_clips(paths)])


def small_checkpoint(block="se", seed=0, **options):
    """A small network of random weights, batch normalisation's statistics too."""
    config = NetworkConfig(
        **{"block": block, "init_features": 3, "alpha": 2, "num_tags": len(TAGS)} | options
    )
    network = build_network(config)
    random = np.random.default_rng(seed)
    network.set_weights(
        [random.uniform(0.1, 0.5, weight.shape).astype("f") for weight in network.get_weights()]
    )
    return Checkpoint(network, config, TAGS, 16000, {"stage": 3, "state": {"epoch": 7}})


def assert_same_weights(network, other):
    ours, theirs = network.get_weights(), other.get_weights()
    assert len(ours) == len(theirs)
    for one, another in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, another)


def rewrite_member(path, name, content, compression=zipfile.ZIP_STORED):
    """Replace a file of a .keras archive, or take it out where content is None."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for member, old in members.items():
            if member != name:
                archive.writestr(member, old)
        if content is not None:
            archive.writestr(name, content, compression)


def edit_weights(path, edit):
    """Apply a function to the arrays of a .keras file, seen as an h5py.File."""
    with zipfile.ZipFile(path) as archive:
        content = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(content, "r+") as file:
        edit(file)
    rewrite_member(path, "model.weights.h5", content.getvalue())


def refused(path, *parts, seconds=5):
    """Check that a file is refused in one line with these words, and in little processor time."""
    started = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert time.process_time() - started < seconds
    assert "\n" not in message and message.startswith(f"{path}: ")
    for part in parts:
        assert part in message
    return message


@pytest.fixture
def old_file(golden, tmp_path):
    """A copy of a published file, to be spoilt."""
    return Path(shutil.copy(golden / "checkpoints" / "se-multi.hdf5", tmp_path / "old.hdf5"))


@pytest.fixture
def new_file(tmp_path):
    """A file of ours, to be spoilt."""
    path = tmp_path / "new.keras"
    save(path, small_checkpoint())
    return path


# --- Published files ---------------------------------------------------------------------------

_ON_BACKEND = """
    import json, sys
    import numpy as np
    sys.path[:0] = [sys.argv[1] + folder for folder in ("", "/tests", "/tests/models")]
    from pathlib import Path
    import keras
    from toolkit.models.checkpoints import load
    from model import build_excitations
    from test_checkpoints import GOLDEN_NAMES, published_segments

    golden = Path(sys.argv[2])
    expected = np.load(golden / "expected.npz")
    segments = published_segments(golden)
    worst = {}
    for name in GOLDEN_NAMES:
        checkpoint = load(golden / "checkpoints" / f"{name}.hdf5")
        network, excitations = checkpoint.network, []
        if checkpoint.config.has_excitations:
            excitations = build_excitations(network).outputs
        # Both in one model, and so compiled once.
        both = keras.Model(network.input, [*network.outputs, *excitations])
        outputs = both.predict_on_batch(segments)
        predictions, *outputs = outputs if isinstance(outputs, list) else [outputs]
        worst[name] = [float(np.abs(predictions - expected[f"{name}/predictions"]).max()), None]
        if outputs:
            worst[name][1] = max(
                float(np.abs(output - expected[f"{name}/excitations_{depth}"]).max())
                for depth, output in enumerate(outputs)
            )
    print(json.dumps({"backend": keras.backend.backend(), "worst": worst}))
"""


@pytest.mark.parametrize(
    "backend",
    ["tensorflow", *(pytest.param(name, marks=pytest.mark.slow) for name in ("torch", "jax"))],
)
def test_published_files_compute_what_they_did(golden, backend):
    pytest.importorskip(backend)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_ON_BACKEND), str(ROOT), str(golden)],
        env=os.environ | {"KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(result))  # shown by pytest -rP
    assert result["backend"] == backend
    assert sorted(result["worst"]) == sorted(GOLDEN_NAMES)
    for name, (predictions, excitations) in result["worst"].items():
        assert predictions <= 1e-5, name
        assert (excitations is not None) == ("se" in name), name
        assert excitations is None or excitations <= 1e-5, name


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_published_files_say_their_network(golden, name):
    block, multi = name.split("-")[:2]
    checkpoint = load(golden / "checkpoints" / f"{name}.hdf5")
    config = checkpoint.config
    assert (config.block, config.multi) == (block, multi == "multi")
    assert (config.init_features, config.num_tags, config.num_samples) == (4, 50, 59049)
    if config.has_excitations:
        assert config.alpha == 2
    assert checkpoint.tags is None
    assert checkpoint.sample_rate == 22050


@pytest.mark.parametrize("name", ["rese-multi", "se-multi-stage2", "basic-nomulti"])
def test_weights_only_file(golden, tmp_path, name):
    path = tmp_path / "weights.hdf5"
    whole = golden / "checkpoints" / f"{name}.hdf5"
    with h5py.File(whole) as old, h5py.File(path, "w") as new:
        for layer in old["model_weights"]:
            old.copy(f"model_weights/{layer}", new)
        for key, value in old["model_weights"].attrs.items():
            new.attrs[key] = value
    loaded, expected = load(path), load(whole)
    assert loaded.config == expected.config
    assert_same_weights(loaded.network, expected.network)


def test_number_of_tags_is_inferred(golden, tmp_path):
    """A published file of a network of 7 tags: its outputs have no names."""
    path = Path(shutil.copy(golden / "checkpoints" / "se-multi.hdf5", tmp_path / "seven.hdf5"))
    with h5py.File(path, "r+") as file:
        layer = file["model_weights/dense_20/dense_20"]
        for name in ("kernel:0", "bias:0"):
            kept = layer[name][..., :7]
            del layer[name]
            layer[name] = kept
    checkpoint = load(path)
    assert checkpoint.config.num_tags == 7
    assert checkpoint.tags is None
    predictions = checkpoint.network.predict_on_batch(published_segments(golden))
    expected = np.load(golden / "expected.npz")["se-multi/predictions"][:, :7]
    np.testing.assert_allclose(predictions, expected, atol=1e-5)


# --- Files of ours, and of Keras 3 ---------------------------------------------------------------


@pytest.mark.parametrize("multi", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
def test_keras_file_round_trip(tmp_path, block, multi):
    checkpoint = small_checkpoint(block, multi=multi, dropout=0.25, initializer="he")
    path = tmp_path / "ckpt.keras"
    save(path, checkpoint)
    loaded = load(path)
    assert loaded.config == checkpoint.config
    assert loaded.tags == TAGS
    assert loaded.sample_rate == 16000
    assert loaded.training == checkpoint.training
    assert_same_weights(loaded.network, checkpoint.network)
    assert os.listdir(tmp_path) == ["ckpt.keras"]


def test_plain_keras_loads_our_file(tmp_path):
    import keras

    x = np.random.default_rng(0).standard_normal((3, 59049)).astype(np.float32)
    for block in ("se", "res"):
        checkpoint = small_checkpoint(block)
        path = tmp_path / f"{block}.keras"
        save(path, checkpoint)
        network = keras.saving.load_model(path)
        np.testing.assert_array_equal(
            network.predict_on_batch(x), checkpoint.network.predict_on_batch(x)
        )


@pytest.mark.parametrize(
    ("block", "multi"), [("se", True), ("rese", False), ("res", True), ("basic", False)]
)
def test_h5_of_keras_3_round_trip(tmp_path, block, multi):
    # The alphas of 1.5 leave 4, 9 and 18 hidden units of 3, 6 and 12 channels.
    checkpoint = small_checkpoint(block, multi=multi, alpha=1.5)
    checkpoint.network.save(tmp_path / "network.h5")
    loaded = load(tmp_path / "network.h5")
    assert (loaded.config.block, loaded.config.multi) == (block, multi)
    assert loaded.tags is None
    assert_same_weights(loaded.network, checkpoint.network)


def test_an_interrupted_write_leaves_the_earlier_file(new_file, monkeypatch):
    before = new_file.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save(new_file, small_checkpoint(seed=1))
    assert new_file.read_bytes() == before
    assert os.listdir(new_file.parent) == [new_file.name]


# --- Files that are not our networks -------------------------------------------------------------


def test_missing_file_and_folder(tmp_path):
    refused(tmp_path / "none.keras", "no such file")
    refused(tmp_path, "no checkpoint in this folder")


@pytest.mark.parametrize("name", ["model.keras", "model.hdf5", "model.h5"])
@pytest.mark.parametrize("content", [b"", b"epoch,loss\n1,0.2\n", bytes(range(256)) * 40])
def test_other_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, "not a model file", ".keras, .hdf5 or .h5")


@pytest.mark.parametrize("magic", [b"PK\x03\x04", b"\x89HDF\r\n\x1a\n"])
def test_random_bytes_after_the_magic(tmp_path, magic):
    path = tmp_path / "model"
    path.write_bytes(magic + np.random.default_rng(0).bytes(5000))
    refused(path, "damaged")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_files_cut_short(old_file, new_file, share):
    for path in (old_file, new_file):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        refused(path)


def test_other_zip_and_other_keras_file(tmp_path):
    import keras

    with zipfile.ZipFile(tmp_path / "other.keras", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path / "other.keras", "contains no network.json", "written by train.py")
    segments = keras.Input((4,))
    other = keras.Model(segments, keras.layers.Dense(3)(segments))
    other.save(tmp_path / "dense.keras")
    refused(tmp_path / "dense.keras", "contains no network.json", "written by train.py")
    other.save(tmp_path / "dense.h5")
    refused(
        tmp_path / "dense.h5",
        "0 convolutions, 1 dense layers and 0 batch normalizations",
        "expected 10, 2 and 11 for a network of basic blocks",
    )


def test_wrong_number_of_layers(old_file):
    with h5py.File(old_file, "r+") as file:
        del file["model_weights/conv1d_10"]
    refused(old_file, "9 convolutions, 20 dense", "expected 10, 20 and 11", "se blocks")


def test_other_kernel_shape(old_file, new_file):
    def widen(layer, name):
        values = np.repeat(layer[name][()], 5 if layer[name].shape[0] == 1 else 2, axis=0)
        del layer[name]
        layer[name] = values

    with h5py.File(old_file, "r+") as file:
        widen(file["model_weights/conv1d_3/conv1d_3"], "kernel:0")
    refused(old_file, "conv1d_3", "(6, 4, 4)", "expected (3, 4, 4)")
    edit_weights(new_file, lambda file: widen(file["layers/conv1d/vars"], "0"))
    refused(new_file, "conv0", "(6, 1, 3)", "expected (3, 1, 3)")


def test_missing_array(old_file, new_file):
    with h5py.File(old_file, "r+") as file:
        del file["model_weights/conv1d_3/conv1d_3/bias:0"]
    refused(old_file, "conv1d_3", "kernel (3, 4, 4)", "expected a one-dimensional convolution")

    def delete(file):
        del file["layers/batch_normalization_4/vars/2"]

    edit_weights(new_file, delete)
    refused(new_file, "no array", "layers/batch_normalization_4/vars/2")


def test_layers_of_unknown_names(old_file):
    with h5py.File(old_file, "r+") as file:
        weights = file["model_weights"]
        weights.move("conv1d_3/conv1d_3", "conv1d_3/my_conv")
    refused(old_file, "'my_conv'", "expected a name such as conv1d_3")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_of_nan_or_infinity(old_file, new_file, value):
    def spoil(dataset):
        dataset[0] = value

    with h5py.File(old_file, "r+") as file:
        spoil(file["model_weights/dense_3/dense_3/bias:0"])
    refused(old_file, "dense_3", "contains NaN or infinity")
    edit_weights(new_file, lambda file: spoil(file["layers/dense/vars/1"]))
    refused(new_file, "block0_se_fc", "contains NaN or infinity")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"format": 2}, "format is 2: expected 1"),
        ({"tags": ["only one"]}, "expected a list of 5 names"),
        ({"tags": [1, 2, 3, 4, 5]}, "expected a list of 5 names"),
        ({"tags": "abcde"}, "expected a list of 5 names"),
        ({"sample_rate": float("inf")}, "sample_rate is inf"),
        ({"training": 3}, "training is 3"),
        ({"network": []}, "network is []: expected an object"),
        ({"network": {"layers": 3}}, "'layers'"),
        ({"network": {"block": "dense"}}, "block must be one of"),
        ({"network": {"init_features": 2.5}}, "init_features must be an integer from 1"),
        ({"network": {"init_features": "128"}}, "Received: '128'"),
        ({"network": {"init_features": -1}}, "Received: -1"),
        ({"network": {"alpha": float("inf")}}, "Received: inf"),
        ({"network": {"alpha": float("nan")}}, "Received: nan"),
        ({"network": {"dropout": 2}}, "dropout must be a number from 0 to 0.999"),
        ({"network": {"weight_decay": "all"}}, "Received: 'all'"),
        ({"network": {"num_samples": 10**30}}, "num_samples must be an integer from 59049"),
        ({"network": {"multi": "no"}}, "multi must be one of True, False"),
        ({"network": {"multi": False}}, "shape"),
        ({"network": {"block": "basic"}}, "shape"),
        ({"network": {"block": "rese"}}, ""),
    ],
)
def test_other_descriptions(new_file, change, part):
    with zipfile.ZipFile(new_file) as archive:
        description = json.loads(archive.read("network.json"))
    if isinstance(change.get("network"), dict):
        change = {"network": description["network"] | change["network"]}
    rewrite_member(new_file, "network.json", json.dumps(description | change))
    refused(new_file, part)


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, b"\xff\xfe\x00\xd8"])
def test_damaged_descriptions(new_file, content):
    rewrite_member(new_file, "network.json", content)
    refused(new_file)


def test_no_weights(new_file):
    rewrite_member(new_file, "model.weights.h5", None)
    refused(new_file, "model.weights.h5")


# --- Files meant to harm -------------------------------------------------------------------------

KERNEL = "model_weights/dense_19/dense_19/kernel:0"


def secret(tmp_path):
    path = tmp_path / "secret.bin"
    path.write_bytes(np.random.default_rng(0).bytes(2**16))
    return path


def external_link(file, tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["kernel"] = np.zeros((32, 32), np.float32)
    file[KERNEL] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/kernel")
    return "link"


def soft_link(file, tmp_path):
    file["elsewhere"] = np.zeros((32, 32), np.float32)
    file[KERNEL] = h5py.SoftLink("/elsewhere")
    return "link"


def external_storage(file, tmp_path):
    file.create_dataset(KERNEL, (32, 32), "f4", external=[(str(secret(tmp_path)), 0, 4096)])
    return "another file"


def virtual_dataset(file, tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["kernel"] = np.zeros((32, 32), np.float32)
    layout = h5py.VirtualLayout((32, 32), "f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "kernel", (32, 32))
    file.create_virtual_dataset(KERNEL, layout)
    return "another file"


def compressed(file, tmp_path):
    file.create_dataset(KERNEL, data=np.zeros((32, 32), np.float32), compression="gzip")
    return "declares 4096 bytes and stores"


def ten_terabytes_chunked(file, tmp_path):
    file.create_dataset(KERNEL, (1_600_000, 1_600_000), "f4", chunks=(1000, 1000))
    return "declares 10240000000000 bytes and stores 0"


def ten_terabytes_unallocated(file, tmp_path):
    file.create_dataset(KERNEL, (1_600_000, 1_600_000), "f4")
    return "declares 10240000000000 bytes and stores 0"


def chunked(file, tmp_path):
    file.create_dataset(KERNEL, data=np.zeros((32, 32), np.float32), chunks=(32, 32))
    return "in chunks"


def root_in_a_group(file, tmp_path):
    """A cycle of hard links through the root."""
    file["model_weights/again"] = file["/"]
    file[KERNEL] = np.zeros((32, 32), np.float32)
    return "contains more objects than any network"


def group_in_itself(file, tmp_path):
    group = file.create_group("loop")
    for number in range(20):
        group[str(number)] = group
    file[KERNEL] = np.zeros((32, 32), np.float32)
    return "contains more objects than any network"


def strings(file, tmp_path):
    file[KERNEL] = np.full((32, 32), b"1234", "S4")
    return "expected numbers"


def objects_of_variable_length(file, tmp_path):
    file.create_dataset(KERNEL, data=["x" * 4] * 32)
    return ""


def complex_numbers(file, tmp_path):
    file[KERNEL] = np.zeros((32, 32), np.complex64)
    return "expected numbers"


def empty(file, tmp_path):
    file[KERNEL] = h5py.Empty("f4")
    return "is empty"


def named_type(file, tmp_path):
    file[KERNEL] = np.dtype("f4")
    return "is neither an array nor a group"


@pytest.mark.parametrize(
    "attack",
    [
        external_link, soft_link, external_storage, virtual_dataset, compressed,
        ten_terabytes_chunked, ten_terabytes_unallocated, group_in_itself, root_in_a_group,
        chunked, strings,
        objects_of_variable_length, complex_numbers, empty, named_type,
    ],
)  # fmt: skip
def test_attacks_by_hdf5(old_file, tmp_path, attack):
    with h5py.File(old_file, "r+") as file:
        del file[KERNEL]
        part = attack(file, tmp_path)
    refused(old_file, part)


@pytest.mark.parametrize("attack", [external_link, soft_link, external_storage, virtual_dataset])
def test_attacks_by_the_arrays_of_a_keras_file(new_file, tmp_path, attack):
    edit_weights(new_file, lambda file: attack(file, tmp_path))
    refused(new_file)


@pytest.mark.parametrize("member", ["model.weights.h5", "network.json"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_bombs(new_file, member, compression):
    rewrite_member(new_file, member, bytes(2**24), compression)
    refused(new_file, f"{member} is compressed")


def test_zip_bomb_that_declares_little(new_file):
    """A packed file of 300 MB whose directory says that it is of 1,000 bytes."""
    rewrite_member(new_file, "model.weights.h5", bytes(300 * 2**20), zipfile.ZIP_DEFLATED)
    content = new_file.read_bytes().replace((300 * 2**20).to_bytes(4, "little"), b"\xe8\x03\0\0")
    new_file.write_bytes(content)
    refused(new_file, "model.weights.h5 is compressed", seconds=1)


def test_small_files_that_declare_large_networks(old_file, new_file):
    """Four thousand features would take hundreds of gigabytes."""
    with zipfile.ZipFile(new_file) as archive:
        description = json.loads(archive.read("network.json"))
    description["network"] |= {"init_features": 4096, "alpha": 256}
    rewrite_member(new_file, "network.json", json.dumps(description))
    refused(new_file, "4096 features", seconds=2)
    with h5py.File(old_file, "r+") as file:
        del file["model_weights/conv1d_1/conv1d_1/kernel:0"]
        file["model_weights/conv1d_1/conv1d_1/kernel:0"] = np.zeros((3, 1, 4096), np.float32)
    refused(old_file, "4096 features", seconds=2)


def test_attacks_by_the_model_config_run_nothing(new_file, old_file, tmp_path):
    """What a file says its layers are is never read, let alone run."""
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')"
    config = json.dumps({"class_name": "Lambda", "config": {"function": code}, "module": "os"})
    rewrite_member(new_file, "config.json", config)
    rewrite_member(new_file, "metadata.json", "not JSON")
    with h5py.File(old_file, "r+") as file:
        file.attrs["model_config"] = config.encode()
    assert load(new_file).config.block == load(old_file).config.block == "se"
    assert not ran.exists()


def save_lambda(path, ran):
    """Save a model by Keras whose Lambda layer runs code for whoever loads it by other means."""
    import keras

    segments, ran_name = keras.Input((59049,)), str(ran)
    layer = keras.layers.Lambda(lambda x: (open(ran_name, "w").close(), x)[1], (59049,))
    keras.Model(segments, layer(segments)).save(path)
    ran.unlink(missing_ok=True)  # building the model may have run it


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_lambda_layers_run_nothing(tmp_path, suffix):
    ran = tmp_path / "ran"
    path = tmp_path / f"lambda{suffix}"
    save_lambda(path, ran)
    refused(path)
    assert not ran.exists()


class _Runs:
    """What a pickle of it does when it is read."""

    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return open, (str(self.ran), "w")


def test_what_a_loaded_archive_carries_beside_its_arrays_is_not_touched(new_file, tmp_path):
    """Code, pickles, module paths and members whose names lead out of the folder."""
    ran, expected = tmp_path / "ran", load(new_file)
    code = f"open({str(ran)!r}, 'w')"
    save_lambda(tmp_path / "lambda.keras", ran)
    with zipfile.ZipFile(tmp_path / "lambda.keras") as archive:
        rewrite_member(new_file, "config.json", archive.read("config.json"))
    evil = tmp_path / "planted.py"
    with zipfile.ZipFile(new_file, "a") as archive:
        for name in ("../planted.py", str(evil), "assets/../../planted.py", "keras/__init__.py"):
            archive.writestr(name, code)
        archive.writestr("assets/state.pkl", pickle.dumps(_Runs(ran)))
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    before = sorted(tmp_path.rglob("*"))
    assert_same_weights(load(new_file).network, expected.network)
    assert not ran.exists()
    assert sorted(tmp_path.rglob("*")) == before
    pickle.loads(pickle.dumps(_Runs(ran))).close()
    assert ran.exists(), "the pickle would have told"


@pytest.mark.parametrize(
    "config",
    [
        {"class_name": "Custom", "module": "planted", "registered_name": "x>Custom", "config": {}},
        {"class_name": "function", "module": "os", "config": "system"},
        {"class_name": "__lambda__", "config": {"value": "4wEAAAA="}},
    ],
)
def test_custom_classes_and_module_paths_are_not_imported(
    new_file, old_file, tmp_path, monkeypatch, config
):
    ran = tmp_path / "ran"
    (tmp_path / "planted.py").write_text(f"open({str(ran)!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    rewrite_member(new_file, "config.json", json.dumps(config))
    with h5py.File(old_file, "r+") as file:
        file.attrs["model_config"] = json.dumps(config).encode()
        file.attrs["training_config"] = np.void(pickle.dumps(_Runs(ran)))
    assert load(new_file).config.block == load(old_file).config.block == "se"
    assert not ran.exists() and "planted" not in sys.modules


@pytest.mark.parametrize("attack", [external_link, external_storage, virtual_dataset])
def test_other_files_are_not_opened(old_file, tmp_path, attack):
    with h5py.File(old_file, "r+") as file:
        del file[KERNEL]
        attack(file, tmp_path)
    other = tmp_path / ("secret.bin" if attack is external_storage else "other.h5")
    with opened(other) as was_opened:
        refused(old_file)
        assert not was_opened()


# --- Names, size ---------------------------------------------------------------------


def test_names_and_the_best(tmp_path):
    assert checkpoint_name(4, 0.15376) == "ckpt-e004-l0.1538.keras"
    assert checkpoint_name(1234, 12.5) == "ckpt-e1234-l12.5000.keras"
    assert find_best(tmp_path) is None
    assert find_best(tmp_path / "none") is None
    for name in (
        "ckpt-e000-l10.0000.keras",
        "ckpt-e001-l9.0000.keras",  # lower, though later in the alphabet
        "ckpt-e002-l0.1538.keras",
        "ckpt-e1003-l0.1538.keras",  # later, and so lower in the digits not shown
        "resume.keras",
        ".ckpt-e005-l0.0001.tmp.keras",
        "ckpt-e004-l0.0001.keras.part",
    ):
        (tmp_path / name).touch()
        assert name.startswith("ckpt-e000") or find_best(tmp_path) is not None
    assert find_best(tmp_path).name == "ckpt-e1003-l0.1538.keras"
    (tmp_path / "ckpt-e009-l0.1537.hdf5").touch()  # as the published program names its files
    assert find_best(tmp_path).name == "ckpt-e009-l0.1537.hdf5"


_FULL_SIZE = """
    import sys, time
    sys.path.insert(0, sys.argv[1])
    import keras
    from toolkit.models.checkpoints import load
    started = time.process_time()
    count = load(sys.argv[2]).network.count_params()
    seconds = time.process_time() - started
    # The peak that getrusage gives may be that of the process which started this one.
    status = open("/proc/self/status").read()
    print(count, seconds, int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


@pytest.mark.slow
def test_full_size_loads_in_bounded_memory(tmp_path):
    config = NetworkConfig(block="se")
    path = tmp_path / "se.keras"
    save(path, Checkpoint(build_network(config), config, MTT_TOP_TAGS))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_FULL_SIZE), str(ROOT), str(path)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    count, seconds, memory = map(float, done.stdout.split())
    print(f"full-size se: loaded in {seconds:.1f} s, {memory / 1e9:.2f} GB resident at most")
    assert count == 24_749_618
    assert memory < 1.5e9
