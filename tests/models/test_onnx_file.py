"""ONNX files: models of other programs and damaged files are refused with one line."""

import json
import sys

from model import build_embeddings, build_network
from toolkit.data.annotations import MTT_TOP_TAGS
from toolkit.errors import CheckpointError, UsageError
from toolkit.models import onnx_file
from toolkit.models.checkpoints import Checkpoint
from toolkit.models.config import NetworkConfig
from toolkit.models.onnx_graph import build_onnx

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs requirements/export.txt")


@pytest.fixture(scope="module")
def content():
    config = NetworkConfig(block="basic", init_features=1)
    return build_onnx(Checkpoint(build_network(config), config, MTT_TOP_TAGS)).SerializeToString()


def write(path, content, **metadata):
    """Write an ONNX file with some values of its metadata replaced; None removes a value."""
    model = onnx.load_from_string(content)
    kept = {entry.key: entry.value for entry in model.metadata_props} | metadata
    onnx.helper.set_model_props(model, {k: v for k, v in kept.items() if v is not None})
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"network": None}, "not a model that tools.convert_model wrote"),
        ({"network": "{"}, "metadata: Expecting property name"),
        ({"network": json.dumps({"block": "conv"})}, "metadata: block must be one of se"),
        ({"network": json.dumps({"block": "se", "num_samples": 59050})}, "segments has shape"),
        ({"tags": '["guitar"]'}, "metadata: tags is .*: expected a list of 50 different names"),
        ({"sample_rate": "0"}, "metadata: sample_rate is 0"),
    ],
)
def test_other_descriptions_are_refused(content, tmp_path, metadata, message):
    path = write(tmp_path / "other.onnx", content, **metadata)
    with pytest.raises(CheckpointError, match=rf"^{path}: {message}") as error:
        onnx_file.load(path)
    assert "\n" not in str(error.value)


def test_metadata_of_other_programs_is_ignored(content, tmp_path):
    path = write(tmp_path / "other.onnx", content, author="not JSON", num_samples="also not")
    assert onnx_file.load(path).tags == MTT_TOP_TAGS


def test_quantised_networks_are_read(tmp_path):
    quantization = pytest.importorskip("onnxruntime.quantization")
    config = NetworkConfig(block="se", init_features=2, alpha=2)
    network = build_network(config)
    path = tmp_path / "se.onnx"
    path.write_bytes(build_onnx(Checkpoint(network, config, MTT_TOP_TAGS)).SerializeToString())
    quantization.quantize_dynamic(path, tmp_path / "small.onnx")
    loaded = onnx_file.load(tmp_path / "small.onnx")
    assert (loaded.config, loaded.tags) == (config, MTT_TOP_TAGS)
    segments = np.random.default_rng(0).normal(0, 0.2, (2, 59049)).astype(np.float32)
    np.testing.assert_allclose(loaded.network(segments), network(segments), atol=0.02)
    outputs = onnx_file.load(tmp_path / "small.onnx", embeddings=True).network(segments)
    for output, expected in zip(outputs, build_embeddings(network)(segments), strict=True):
        np.testing.assert_allclose(output, expected, atol=0.02)


def test_inputs_of_half_precision_are_refused(content, tmp_path):
    float16 = pytest.importorskip("onnxruntime.transformers.float16")
    model = float16.convert_float_to_float16(onnx.load_from_string(content))
    onnx.save(model, tmp_path / "half.onnx")
    with pytest.raises(CheckpointError, match=r"segments is a tensor\(float16\), expected float32"):
        onnx_file.load(tmp_path / "half.onnx")


def test_damaged_files_are_refused(content, tmp_path):
    path = tmp_path / "damaged.onnx"
    for damaged in (b"", b"\x08" * 1000, content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"^{path}: ") as error:
            onnx_file.load(path)
        assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match=r"none\.onnx: no such file"):
        onnx_file.load(tmp_path / "none.onnx")


def test_a_missing_onnxruntime_is_named(content, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"not installed: .*requirements/tag\.txt"):
        onnx_file.load(write(tmp_path / "model.onnx", content))
