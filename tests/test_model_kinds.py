"""Files that are not model files are named for what they are, before Keras is imported."""

import codecs
import errno
import gzip
import io
import os
import re
import zipfile

import eval as eval_script
from toolkit import backend
from toolkit.model_kinds import model_kind

import h5py
import numpy as np
import pytest

READABLE = "expected a .keras, .hdf5, .h5 or .onnx file"
PAGE = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"


def zip_of(*names):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, "x" * 5000)
    return content.getvalue()


def hdf5_of(*names):
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        for name in names:
            file[name] = np.zeros(1000)
    return content.getvalue()


@pytest.fixture(autouse=True)
def no_keras(monkeypatch):
    monkeypatch.setattr(backend, "import_keras", lambda: pytest.fail("imports Keras"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.hdf5", b"", "the file is empty: download or copy it again"),
        ("a.keras", b"version https://git-lfs.github.com/spec/v1\noid", "run git lfs pull"),
        ("a.onnx", b"/annex/objects/SHA256E-s1--2.onnx\n", "run git annex get"),
        ("a.hdf5", PAGE.encode(), "an HTML page, not a model file: the download failed"),
        ("a.keras", codecs.BOM_UTF8 + b"\r\n " + PAGE.encode(), "an HTML page"),
        ("a.onnx", PAGE.encode("utf-16"), "an HTML page"),
        ("a.hdf5", gzip.compress(PAGE.lower().encode()), "an HTML page"),
        ("a.hdf5", gzip.compress(b"weights"), f"a gzip archive: unpack it: {READABLE}"),
        ("a.onnx", b"404: Not Found", f"text that begins with '404: Not Found', .*{READABLE}"),
        ("a.json", b'{"class_name":\n "Model"}', "text that begins with "),
        ("a.onnx", '<?xml version="1.0"?><Error>é'.encode(), "text that begins with '<\\?xml"),
        ("a.onnx", "<Error>é</Error>".encode("utf-16"), "text that begins with '<Error>é"),
        ("a.onnx", "Não encontrado".encode("latin-1"), "text that begins with 'N.o encontrado"),
        ("a.onnx", bytes(5000), "begins with zeros: download or copy it again"),
        ("a.hdf5", hdf5_of("x").replace(b"\r\n", b"\n"), "damaged: "),
        ("a.hdf5", zip_of("se-multi.hdf5"), f"a zip archive: unpack it: {READABLE}"),
        (
            "a.tflite",
            b"\x1c\0\0\0TFL3\0\0",
            "a LiteRT model: use the .keras, .hdf5, .h5 or .onnx file that it was exported from",
        ),
        ("a.pb", b"\x08\x01\x12\x05graph", f"a TensorFlow graph: {READABLE}"),
        ("a.pt", b"\x80\x02}q\x00.", f"a pickle, .*: {READABLE}"),
        ("a.pt", zip_of("archive/data.pkl", "archive/version"), f"a PyTorch file: {READABLE}"),
        ("a.npz", zip_of("kernel.npy"), r"a NumPy archive \(.npz\)"),
        ("a.keras", zip_of("config.json", "model.weights.h5"), "contains no network.json"),
        ("a.weights.h5", hdf5_of("layers/conv1d/vars/0"), f"weights of Keras 3 .*{READABLE}"),
        ("a.hdf5", hdf5_of("model_weights/x")[:3000], r"cut off: contains 3000 of \d+ bytes"),
        ("a.keras", zip_of("network.json")[:3000], "damaged or cut off"),
        ("a.bin", bytes(range(256)) * 9, f"not a model file: {READABLE}"),
    ],
    # Archives contain the time, but all processes of a test run must name the tests alike.
    ids=lambda value: "content" if isinstance(value, bytes) else None,
)
def test_other_files_are_named(tmp_path, capsys, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    assert eval_script.main([str(path), "--data-dir", str(tmp_path / "none")]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    (message_found,) = printed.err.splitlines()
    assert f"error: {path}: " in message_found
    assert re.search(message, message_found)


@pytest.mark.parametrize(
    ("member", "message"),
    [("saved_model.pb", "a TensorFlow SavedModel"), ("model.weights.h5", "unpacked .keras file")],
)
def test_other_folders_are_named(tmp_path, capsys, member, message):
    (tmp_path / member).touch()
    assert eval_script.main([str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_kinds_of_model_files(tmp_path):
    contents = {"keras": zip_of("network.json"), "hdf5": hdf5_of("conv1d_1/x"), "onnx": b"\x08\x08"}
    for kind, content in contents.items():
        (tmp_path / f"model.{kind}").write_bytes(content)
        assert model_kind(tmp_path / f"model.{kind}") == kind
    assert model_kind(tmp_path) == "folder"


def test_a_missing_permission_names_the_folder(tmp_path, capsys, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refuse)
    assert eval_script.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith(f"error: {tmp_path}: Permission denied\n")
