"""tools.convert_model: published models become .keras or ONNX files with their tags."""

import json
import re

from toolkit.data.annotations import MTT_TOP_TAGS
from toolkit.models.checkpoints import load
from tools import convert_model

import numpy as np
import pytest

TAGS = tuple(f"tag {number} ♪" for number in range(50))


@pytest.fixture
def published(golden):
    return golden / "checkpoints" / "se-multi.hdf5"


def convert(*arguments):
    return convert_model.main([str(argument) for argument in arguments])


def test_published_model_becomes_keras_with_the_tags_of_magnatagatune(published, tmp_path, capsys):
    path = tmp_path / "se.keras"
    assert convert(published, path) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assumed, model, written = printed.err.splitlines()
    assert assumed.startswith(
        f"{published}: the file contains no tag names: assuming MagnaTagATune's 50"
    )
    assert model == f"{published}: se blocks, multi-level, 4 features, 50 tags"
    assert re.fullmatch(rf"{re.escape(str(path))}: [\d.]+ kB", written)
    converted, expected = load(path), load(published)
    assert converted.config == expected.config
    assert converted.tags == MTT_TOP_TAGS
    weights = zip(converted.network.get_weights(), expected.network.get_weights(), strict=True)
    assert all(np.array_equal(ours, theirs) for ours, theirs in weights)


def test_best_checkpoint_of_a_stage_becomes_onnx_with_its_tags(published, tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    stage = tmp_path / "0"
    stage.mkdir()
    assert convert(published, stage / "ckpt-e001-l0.1538.keras") == 0
    (stage / "ckpt-e000-l0.2000.keras").write_bytes(b"not the best, so not read")
    capsys.readouterr()
    assert convert(stage, tmp_path / "se.onnx") == 0
    printed = capsys.readouterr()
    assert "assuming" not in printed.err
    assert "differs from the network by at most" in printed.err
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "se.onnx").metadata_props}
    assert json.loads(metadata["tags"]) == list(MTT_TOP_TAGS)
    assert json.loads(metadata["sample_rate"]) == 22050


@pytest.mark.parametrize("as_manifest", [False, True], ids=["lines", "manifest"])
def test_tags_name_the_outputs(published, tmp_path, capsys, as_manifest):
    content = json.dumps({"tags": TAGS}) if as_manifest else "\n".join(TAGS)
    (tmp_path / "tags").write_text(content, encoding="utf-8")
    assert convert(published, tmp_path / "se.keras", "--tags", tmp_path / "tags") == 0
    assert "assuming" not in capsys.readouterr().err
    assert load(tmp_path / "se.keras").tags == TAGS


def test_tags_do_not_replace_those_in_the_file(published, tmp_path, capsys):
    (tmp_path / "tags").write_text("\n".join(TAGS), encoding="utf-8")
    assert convert(published, tmp_path / "se.keras") == 0
    capsys.readouterr()
    assert convert(tmp_path / "se.keras", tmp_path / "b.keras", "--tags", tmp_path / "tags") == 2
    assert "se.keras names other tags: omit --tags" in capsys.readouterr().err
    assert not (tmp_path / "b.keras").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (b"\xff\xfe\x00", "expected one tag per line, or a manifest.json"),
        (b'{"tags": 3}', "expected one tag per line, or a manifest.json"),
        (b"\n\n", "the file contains no tag names"),
        (b"guitar\nslow\nguitar\n", "line 3: 'guitar' is already line 1"),
        (b"guitar\n\nslow\n", "line 2 is empty"),
        (b'{"tags": ["guitar", "slow", "slow"]}', "tag 3: 'slow' is already tag 2"),
        (b"guitar\nslow\n", r"2 tags, but \S+se-multi.hdf5 has 50 outputs"),
    ],
)
def test_invalid_tags_are_refused(published, tmp_path, capsys, content, message):
    path = tmp_path / "tags"
    if content is not None:
        path.write_bytes(content)
    assert convert(published, tmp_path / "se.keras", "--tags", path) == 2
    error = capsys.readouterr().err
    assert re.search(f"--tags {re.escape(str(path))}: {message}", error)
    assert error.count("\n") == 1
    assert not (tmp_path / "se.keras").exists()


@pytest.mark.parametrize(
    ("model", "output", "message"),
    [
        ("se-multi.hdf5", "se.h5", "ends in .keras, .onnx, .savedmodel, .tflite"),
        ("none.hdf5", "se.keras", "no such model file"),
        ("se-multi.hdf5", "none/se.onnx", "none does not exist"),
    ],
)
def test_invalid_paths_are_refused(published, tmp_path, capsys, model, output, message):
    assert convert(published.parent / model, tmp_path / output) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err and printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
