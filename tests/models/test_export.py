"""Exports: other programs compute from the written files what our networks do."""

import json
import sys
import zipfile

from input_data import read_clips
from model import build_network
from toolkit.data.annotations import MTT_TOP_TAGS
from toolkit.errors import ExportError, UsageError
from toolkit.models import export as exports
from toolkit.models.checkpoints import Checkpoint, load
from toolkit.models.config import BLOCKS, NetworkConfig
from toolkit.models.onnx_graph import describe

import keras
import numpy as np
import pytest

onnxruntime = pytest.importorskip("onnxruntime", reason="needs requirements/export.txt")
onnx = pytest.importorskip("onnx")

TAGS = ("guitar", "slow", "naïve ♪", 'a,b"c')


def run_onnx(path):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda segments: session.run(None, {"segments": segments})[0]


def run_savedmodel(path):
    tf = pytest.importorskip("tensorflow")
    serve = tf.saved_model.load(str(path)).signatures["serving_default"]
    return lambda segments: serve(segments=tf.constant(segments))["tags"].numpy()


def run_litert(path):
    litert = pytest.importorskip("ai_edge_litert.interpreter", reason="needs LiteRT")
    runner = litert.Interpreter(model_path=str(path)).get_signature_runner("serving_default")
    return lambda segments: runner(segments=segments)["tags"]


# How the file of each suffix is run: a function of segments.
RUN = {".onnx": run_onnx, ".savedmodel": run_savedmodel, ".tflite": run_litert}


def small_checkpoint(block="se", seed=0, **options):
    """A small network of random weights, with statistics that fit them."""
    config = NetworkConfig(
        **{"block": block, "init_features": 3, "alpha": 2, "num_tags": len(TAGS)} | options
    )
    network = build_network(config)
    random = np.random.default_rng(seed)
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.gamma.assign(random.uniform(0.5, 1.5, layer.gamma.shape))
            layer.beta.assign(random.uniform(-0.5, 0.5, layer.beta.shape))
            layer.momentum = 0.0  # so that one batch gives the statistics
    network(noise(5, config.num_samples), training=True)
    return Checkpoint(network, config, TAGS, 16000)


def noise(num_segments, num_samples, seed=1):
    random = np.random.default_rng(seed)
    levels = np.linspace(0.1, 0.6, num_segments)[:, np.newaxis]
    return random.normal(0, levels, (num_segments, num_samples)).astype("f")


@pytest.fixture(scope="module")
def published_segments(golden):
    """The 10 segments of gm-pop, then the 10 of gm-choir [shape=(20, 59049)]."""
    shards = ("train-0000-of-0001.tfrecord", "test-0000-of-0001.seq.tfrecord")
    paths = [golden / "tfrecord" / shard for shard in shards]
    return np.concatenate([clip.segments for clip in read_clips(paths)])


@pytest.mark.parametrize(
    "name", [f"{block}-{multi}" for block in BLOCKS for multi in ("multi", "nomulti")]
)
def test_onnxruntime_computes_what_the_published_program_did(
    golden, published_segments, tmp_path, name
):
    path = tmp_path / "model.onnx"
    checkpoint = load(golden / "checkpoints" / f"{name}.hdf5")
    checkpoint.tags = MTT_TOP_TAGS
    exports.export(path, checkpoint)
    expected = np.load(golden / "expected.npz")[f"{name}/predictions"]
    assert np.ptp(expected) > 0.04  # so that agreement means something
    np.testing.assert_allclose(run_onnx(path)(published_segments), expected, rtol=0, atol=1e-5)
    assert [found.name for found in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(("block", "suffix"), [
    *((block, ".onnx") for block in BLOCKS),
    ("se", ".savedmodel"), ("se", ".tflite"),
    pytest.param("rese", ".savedmodel", marks=pytest.mark.slow),
    pytest.param("rese", ".tflite", marks=pytest.mark.slow),
])  # fmt: skip
def test_exports_equal_the_network_at_any_batch_size(tmp_path, block, suffix):
    if suffix == ".tflite":
        pytest.importorskip("ai_edge_litert")
    # Blocks whose frames are no multiple of 3 leave some out.
    checkpoint = small_checkpoint(block, num_samples=60_000)
    path = tmp_path / f"model{suffix}"
    said = exports.export(path, checkpoint)
    assert 0 <= said <= exports.TOLERANCE
    segments = noise(5, 60_000)
    expected = checkpoint.network.predict_on_batch(segments)
    assert np.ptp(expected, axis=0).max() > 0.01
    run = RUN[suffix](path)
    for size in (1, 5, 2):
        found = run(segments[:size])
        assert found.shape == (size, len(TAGS)) and found.dtype == np.float32
        np.testing.assert_allclose(found, expected[:size], rtol=0, atol=1e-4)


def test_onnx_says_what_its_outputs_are(tmp_path):
    checkpoint = small_checkpoint()
    exports.export(tmp_path / "model.onnx", checkpoint)
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    (segments,), (tags,) = session.get_inputs(), session.get_outputs()
    assert (segments.name, segments.shape) == ("segments", ["batch", 59049])
    assert (tags.name, tags.shape) == ("tags", ["batch", len(TAGS)])
    described = session.get_modelmeta().custom_metadata_map
    assert json.loads(described["tags"]) == list(TAGS)
    assert json.loads(described["sample_rate"]) == 16000
    assert json.loads(described["num_samples"]) == 59049
    assert NetworkConfig(**json.loads(described["network"])) == checkpoint.config
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"), full_check=True)


@pytest.mark.parametrize("suffix", [".savedmodel", ".tflite"])
def test_tensorflows_forms_carry_the_description(tmp_path, suffix):
    if suffix == ".tflite":
        pytest.importorskip("ai_edge_litert")
    checkpoint = small_checkpoint()
    path = tmp_path / f"model{suffix}"
    for _ in range(2):  # the second replaces the first
        exports.export(path, checkpoint)
    if suffix == ".tflite":
        with zipfile.ZipFile(path) as archive:
            description = archive.read(exports.DESCRIPTION_NAME)
    else:
        description = (
            path / exports.DESCRIPTION_FOLDER / exports.DESCRIPTION_NAME
        ).read_bytes()  # fmt: skip
    assert json.loads(description) == describe(checkpoint)
    assert json.loads(description)["tags"] == list(TAGS)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_an_export_that_differs_is_not_written(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    build = exports.build_onnx

    def spoilt(checkpoint):
        model = build(checkpoint)
        bias = next(array for array in model.graph.initializer if array.name == "tags/bias")
        values = onnx.numpy_helper.to_array(bias) + np.float32(0.01)
        bias.CopyFrom(onnx.numpy_helper.from_array(values, "tags/bias"))
        return model

    monkeypatch.setattr(exports, "build_onnx", spoilt)
    with pytest.raises(ExportError, match=r"not written: its outputs differ .* by \d"):
        exports.export(path, small_checkpoint())
    assert not list(tmp_path.iterdir())


def test_a_layer_without_onnx_is_named(tmp_path):
    checkpoint = small_checkpoint()
    output = keras.layers.Softmax(name="odd")(checkpoint.network.output)
    checkpoint.network = keras.Model(checkpoint.network.input, output)
    with pytest.raises(ExportError, match="layer odd: no ONNX operator for Softmax"):
        exports.export(tmp_path / "model.onnx", checkpoint)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_export_is_not_replaced(tmp_path):
    pytest.importorskip("tensorflow")
    path = tmp_path / "music.savedmodel"
    path.mkdir()
    (path / "song.mp3").touch()
    with pytest.raises(ExportError, match="exists and is not a SavedModel"):
        exports.export(path, small_checkpoint())
    assert [found.name for found in tmp_path.rglob("*")] == ["music.savedmodel", "song.mp3"]


@pytest.mark.parametrize("suffix", [".savedmodel", ".tflite"])
def test_tensorflows_forms_take_its_backend(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(UsageError, match="needs the TensorFlow backend, this is jax"):
        exports.export(tmp_path / f"model{suffix}", small_checkpoint())


@pytest.mark.parametrize(
    ("suffix", "library"), [(".onnx", "onnxruntime"), (".tflite", "ai_edge_litert.interpreter")]
)
def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch, suffix, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UsageError, match=rf"{library} is not installed.*requirements/export\.txt"):
        exports.export(tmp_path / f"model{suffix}", small_checkpoint())
