"""tag.py --save-embeddings: the same from every kind of model, for all files that are audio."""

import dataclasses
import shutil
import sys
from pathlib import Path

import tag
from toolkit.data.annotations import MTT_TOP_TAGS
from toolkit.models.checkpoints import save
from toolkit.models.export import export
from toolkit.prediction import load
from toolkit.tagging import tag_files

import numpy as np
import pytest
from conftest import encode_audio, synthesise
from model_files import published_checkpoint


@pytest.fixture(scope="module")
def models(golden, tmp_path_factory):
    """Return a published model as .hdf5, .keras and .onnx."""
    pytest.importorskip("onnx", reason="needs requirements/export.txt")
    folder = tmp_path_factory.mktemp("models")
    checkpoint = dataclasses.replace(published_checkpoint("rese-multi"), tags=MTT_TOP_TAGS)
    save(folder / "rese.keras", checkpoint)
    export(folder / "rese.onnx", checkpoint)
    return [golden / "checkpoints" / "rese-multi.hdf5", *sorted(folder.glob("rese.*"))]


@pytest.fixture
def music(golden, tmp_path):
    """Copy audio of ten, two and less than one segments, and a file that is not audio."""
    folder = tmp_path / "음악"
    folder.mkdir()
    shutil.copy(golden / "clips" / "gm-pop-01-take-0-29.mp3", folder / "a.mp3")
    encode_audio(folder / "b 🎷.mp3", synthesise(6))
    encode_audio(folder / "c's.wav", synthesise(1), codec="pcm_s16le", bit_rate=None)
    (folder / "cover.jpg").touch()
    return folder


def run(capsys, *arguments, status=0):
    """Run tag.py in this process; return stdout and the last line of stderr."""
    sys.argv = ["tag.py"]
    assert tag.main(list(map(str, arguments))) == status
    printed = capsys.readouterr()
    return printed.out, printed.err.splitlines()[-1]


def embed(capsys, model, *audio, status=0):
    """Return the paths and the embeddings that tag.py writes."""
    path = Path(audio[0]).parent / "written.npz"
    run(capsys, model, *audio, "--csv", "--save-embeddings", path, status=status)
    with np.load(path, allow_pickle=False) as written:
        assert written.files == ["paths", "embeddings"]
        return written["paths"].tolist(), written["embeddings"]


def test_embeddings_are_what_the_output_layer_receives(models, music, capsys):
    paths, embeddings = embed(capsys, models[0], music)
    assert paths == [str(music / name) for name in ("a.mp3", "b 🎷.mp3", "c's.wav")]
    checkpoint = load(models[0])
    assert embeddings.dtype == np.float32
    assert embeddings.shape == (3, checkpoint.config.num_features)
    assert embeddings.min() == 0 and embeddings.std(axis=0).max() > 1e-3
    kernel, bias = checkpoint.network.get_layer("tags").get_weights()
    # The layer is linear, so the mean over segments commutes with it.
    for (_, probabilities), embedding in zip(tag_files(checkpoint, paths), embeddings, strict=True):
        logits = np.log(probabilities / (1 - probabilities)).mean(axis=0)
        np.testing.assert_allclose(embedding @ kernel + bias, logits, rtol=0, atol=1e-5)

    tags = run(capsys, models[0], music, "--csv")[0]
    assert run(capsys, models[0], music, "--csv", "--save-embeddings", music / "e.npz")[0] == tags
    for model in models[1:]:
        np.testing.assert_allclose(embed(capsys, model, music)[1], embeddings, rtol=0, atol=1e-5)


def test_files_that_cannot_be_decoded_are_left_out(models, music, capsys):
    names = ["c's.wav", "cover.jpg", b"caf\xe9.wav".decode(errors="surrogateescape")]
    try:
        shutil.copy(music / names[0], music / names[2])
    except OSError:
        names[2] = names[0]
    files = [music / name for name in names]
    paths, embeddings = embed(capsys, models[-1], *files, status=1)
    assert paths == [str(files[0]), str(files[2]).replace("\udce9", "�")]
    np.testing.assert_array_equal(*embeddings)


def test_the_file_is_written_whole_or_not_at_all(models, music, tmp_path, capsys, monkeypatch):
    path = tmp_path / "e.npz"
    path.write_text("earlier")

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    error = run(capsys, models[-1], music, "--save-embeddings", path, status=1)[1]
    assert error == f"tag.py: error: {path}: No space left on device"
    assert path.read_text() == "earlier" and len(list(tmp_path.iterdir())) == 2
    other = path.with_suffix(".csv")
    error = run(capsys, models[-1], music, "--save-embeddings", other, status=2)[1]
    assert error.endswith(f"--save-embeddings {other}: expected a name that ends in .npz")


def test_an_earlier_export_has_tags_but_no_embeddings(models, music, tmp_path, capsys):
    import onnx

    model = onnx.load(models[-1])
    del model.graph.output[1]
    onnx.save(model, tmp_path / "old.onnx")
    expected = run(capsys, models[-1], music, "--json")[0]
    assert run(capsys, tmp_path / "old.onnx", music, "--json")[0] == expected
    command = (tmp_path / "old.onnx", music, "--save-embeddings", tmp_path / "e.npz")
    out, error = run(capsys, *command, status=2)
    assert out == "" and "export the model again with tools.convert_model" in error
    assert not (tmp_path / "e.npz").exists()
