"""Exports: ONNX Runtime, TensorFlow and LiteRT compute the same as the network."""

import dataclasses
import json
import sys
import zipfile
from functools import partial

from toolkit.data.annotations import MTT_TOP_TAGS
from toolkit.errors import ExportError, UsageError
from toolkit.models import export as exports
from toolkit.models.config import NetworkConfig
from toolkit.models.onnx_graph import describe

import keras
import numpy as np
import onnxruntime
import pytest
from model_files import (
    GOLDEN_NAMES,
    TAGS,
    matched_checkpoint,
    noise,
    published_checkpoint,
    published_segments,
)

onnx = pytest.importorskip("onnx", reason="needs requirements/export.txt")


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


# Returns a function from segments to probabilities.
RUN = {".onnx": run_onnx, ".savedmodel": run_savedmodel, ".tflite": run_litert}


def write_earlier_export(path):
    if path.suffix == ".savedmodel":
        path.mkdir()
        (path / "saved_model.pb").touch()
    else:
        path.touch()


def read_description(path):
    if path.suffix == ".onnx":
        metadata = onnx.load(path).metadata_props
        return {entry.key: json.loads(entry.value) for entry in metadata}
    if path.suffix == ".tflite":
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read(exports.DESCRIPTION_NAME))
    file = path / exports.DESCRIPTION_FOLDER / exports.DESCRIPTION_NAME
    return json.loads(file.read_text(encoding="utf-8"))


# The numbers of frames are not multiples of 3, so pooling drops the last frames.
NUM_SAMPLES = 60_000
network_of = partial(matched_checkpoint, num_samples=NUM_SAMPLES)


@pytest.mark.parametrize(
    "name",
    [
        name if name == "rese-multi" else pytest.param(name, marks=pytest.mark.slow)
        for name in GOLDEN_NAMES[:-1]
    ],
)
def test_onnxruntime_computes_the_published_outputs(golden, tmp_path, name):
    path = tmp_path / "model.onnx"
    checkpoint = dataclasses.replace(published_checkpoint(name), tags=MTT_TOP_TAGS)
    exports.export(path, checkpoint)
    expected = np.load(golden / "expected.npz")[f"{name}/predictions"]
    assert np.ptp(expected) > 0.04  # the outputs are not all equal
    np.testing.assert_allclose(run_onnx(path)(published_segments()), expected, rtol=0, atol=1e-5)
    assert [found.name for found in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("block", "suffix"),
    [
        ("rese", ".onnx"),
        ("se", ".savedmodel"),
        pytest.param("se", ".tflite", marks=pytest.mark.slow),
        pytest.param("rese", ".savedmodel", marks=pytest.mark.slow),
        pytest.param("rese", ".tflite", marks=pytest.mark.slow),
    ],
)
def test_exports_equal_the_network_at_any_batch_size(tmp_path, block, suffix):
    if suffix == ".tflite":
        pytest.importorskip("ai_edge_litert")
    checkpoint = network_of(block)
    path = tmp_path / f"model{suffix}"
    write_earlier_export(path)
    assert 0 <= exports.export(path, checkpoint) <= exports.TOLERANCE
    assert read_description(path) == describe(checkpoint)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    segments = noise(5, NUM_SAMPLES)
    expected = keras.ops.convert_to_numpy(checkpoint.network(segments, training=False))
    assert np.ptp(expected, axis=0).max() > 0.01
    run = RUN[suffix](path)
    for size in (1, 5, 2):
        found = run(segments[:size])
        assert found.shape == (size, len(TAGS)) and found.dtype == np.float32
        np.testing.assert_allclose(found, expected[:size], rtol=0, atol=1e-4)


def test_onnx_names_its_inputs_and_outputs(tmp_path):
    checkpoint = network_of()
    exports.export(tmp_path / "model.onnx", checkpoint)
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    (segments,), (tags, embeddings) = session.get_inputs(), session.get_outputs()
    assert (segments.name, segments.shape) == ("segments", ["batch", 60_000])
    assert (tags.name, tags.shape) == ("tags", ["batch", len(TAGS)])
    assert (embeddings.name, embeddings.shape) == ("embeddings", ["batch", 3 * 8])
    described = read_description(tmp_path / "model.onnx")
    assert described["tags"] == list(TAGS)
    assert described["sample_rate"] == 16000
    assert described["num_samples"] == 60_000
    assert NetworkConfig(**described["network"]) == checkpoint.config


@pytest.mark.parametrize(
    ("array", "error", "found"),
    [("tags/bias", 0.01, r"\d"), ("tags/bias", np.nan, "nan")],
)
def test_an_export_that_differs_is_not_written(tmp_path, monkeypatch, array, error, found):
    path = tmp_path / "model.onnx"
    build = exports.build_onnx

    def spoilt(checkpoint):
        model = build(checkpoint)
        (bias,) = (found for found in model.graph.initializer if found.name == array)
        values = onnx.numpy_helper.to_array(bias) + np.float32(error)
        bias.CopyFrom(onnx.numpy_helper.from_array(values, array))
        return model

    monkeypatch.setattr(exports, "build_onnx", spoilt)
    with pytest.raises(ExportError, match=f"not written: its outputs differ .* by {found}"):
        exports.export(path, network_of())
    assert not list(tmp_path.iterdir())


def test_a_layer_without_onnx_operator_is_refused(tmp_path):
    network = network_of().network
    output = keras.layers.Softmax(name="odd")(network.output)
    network = keras.Model(network.input, output)
    checkpoint = dataclasses.replace(network_of(), network=network)
    with pytest.raises(ExportError, match="layer odd: no ONNX operator for Softmax"):
        exports.export(tmp_path / "model.onnx", checkpoint)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_other_files_is_not_replaced(tmp_path):
    pytest.importorskip("tensorflow")
    path = tmp_path / "music.savedmodel"
    path.mkdir()
    (path / "song.mp3").touch()
    with pytest.raises(ExportError, match="exists and is not a SavedModel"):
        exports.export(path, network_of())
    assert [found.name for found in tmp_path.rglob("*")] == ["music.savedmodel", "song.mp3"]


def test_a_full_disk_keeps_the_earlier_savedmodel(tmp_path, monkeypatch):
    tf = pytest.importorskip("tensorflow")
    path = tmp_path / "model.savedmodel"
    write_earlier_export(path)

    def fail(holder, folder, signatures):
        folder.mkdir()
        raise tf.errors.ResourceExhaustedError(None, None, "a.tmp; No space left on device")

    monkeypatch.setattr(tf.saved_model, "save", fail)
    with pytest.raises(OSError, match="No space left on device") as caught:
        exports.export(path, network_of())
    assert caught.value.filename == str(path)
    assert [found.name for found in tmp_path.rglob("*")] == ["model.savedmodel", "saved_model.pb"]


@pytest.mark.parametrize("suffix", [".savedmodel", ".tflite"])
def test_savedmodel_and_litert_need_the_tensorflow_backend(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(UsageError, match="needs the TensorFlow backend, this is jax"):
        exports.export(tmp_path / f"model{suffix}", network_of())


@pytest.mark.parametrize(
    ("suffix", "library"), [(".onnx", "onnx"), (".tflite", "ai_edge_litert.interpreter")]
)
def test_a_missing_library_is_named(tmp_path, monkeypatch, suffix, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UsageError, match=rf"{library} is not installed.*requirements/export\.txt"):
        exports.export(tmp_path / f"model{suffix}", network_of())
