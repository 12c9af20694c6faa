"""Recognise the kind of a model file by its content, before a large library is imported."""

import codecs
import os
import re
import zipfile
import zlib
from pathlib import Path

from toolkit.errors import CheckpointError

_READABLE = ".keras, .hdf5, .h5 or .onnx file"
_EXPECTED = f"expected a {_READABLE}"
_HEAD_BYTES = 4096
# What the first bytes of a file say about the file.
_POINTERS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run git lfs pull",
    b"/annex/objects/": "a git-annex pointer, not the file itself: run git annex get",
}
_OTHER_FORMATS = {
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"BZh": "a bzip2 archive: unpack it",
    b"\xfd7zXZ": "an xz archive: unpack it",
    b"7z\xbc\xaf": "a 7-Zip archive: unpack it",
    b"Rar!": "a RAR archive: unpack it",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive: unpack it",
    b"\x93NUMPY": "a NumPy array",
    b"\x80": "a pickle, such as a PyTorch file, which is not opened because it can contain code",
}
_OTHER_SUFFIXES = {
    ".pb": "a TensorFlow graph",
    ".index": "a part of a TensorFlow checkpoint",
    ".meta": "a part of a TensorFlow checkpoint",
    ".safetensors": "a safetensors file",
}
_BYTE_ORDER_MARKS = codecs.BOM_UTF8 + codecs.BOM_UTF16_LE + codecs.BOM_UTF16_BE


def model_kind(path: str | Path) -> str:
    """Return the kind of a model file or folder.

    Parameters
    ----------
    path : str or Path
        Existing file, or folder of a stage.

    Returns
    -------
    {'keras', 'hdf5', 'onnx', 'folder'}
        An ``.onnx`` file has no signature, so it is recognised by its suffix only.

    Raises
    ------
    CheckpointError
        The file is of another kind, empty, or cut off; the message says what it is.
    """
    path = Path(path)
    kind = _kind_of_folder(path) if path.is_dir() else _kind_of_file(path)
    if kind in ("keras", "hdf5", "onnx", "folder"):
        return kind
    raise CheckpointError(f"{path}: {kind}")


def _kind_of_folder(path: Path) -> str:
    names = os.listdir(path)  # an error of a missing permission names the folder
    if "saved_model.pb" in names:
        return f"a TensorFlow SavedModel: use the {_READABLE} that it was exported from"
    if "model.weights.h5" in names:
        return "an unpacked .keras file: use the .keras file itself"
    return "folder"


def _kind_of_file(path: Path) -> str:
    """Return the kind of a file that can be read, or the reason why another cannot."""
    if not path.is_file():
        return f"not a file: {_EXPECTED}"
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head.strip(b"\0"):  # some downloads reserve the space first
        return f"{'begins with zeros' if head else 'the file is empty'}: download or copy it again"
    if head.startswith(b"\x89HDF"):  # the next bytes differ if line endings were converted
        return _kind_of_hdf5(path)
    if head.startswith(b"PK"):
        return _kind_of_zip(path)
    if head[4:8] == b"TFL3":
        return f"a LiteRT model: use the {_READABLE} that it was exported from"
    for start, what in _POINTERS.items():
        if head.startswith(start):
            return what
    if _is_html(head):
        return "an HTML page, not a model file: the download failed"
    for start, what in _OTHER_FORMATS.items():
        if head.startswith(start):
            return f"{what}: {_EXPECTED}"
    if path.suffix in _OTHER_SUFFIXES:
        return f"{_OTHER_SUFFIXES[path.suffix]}: {_EXPECTED}"
    is_utf16 = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = head.decode("utf-16" if is_utf16 else "utf-8-sig", errors="replace").split()
    if " ".join(text).isprintable():  # an ONNX model begins with control characters
        return f"text that begins with {' '.join(text)[:40]!r}, not a model file: {_EXPECTED}"
    return "onnx" if path.suffix == ".onnx" else f"not a model file: {_EXPECTED}"


def _is_html(head: bytes) -> bool:
    """Return whether a file begins with HTML, also in UTF-16, compressed or after comments."""
    if head.startswith(b"\x1f\x8b"):  # some servers send compressed pages to any client
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, _HEAD_BYTES)
        except zlib.error:
            return False
    text = head.replace(b"\0", b"").lstrip(_BYTE_ORDER_MARKS + b" \t\r\n")
    return text.startswith(b"<") and bool(re.search(rb"<(!doctype\s+html|html|head)\b", text, re.I))


def _kind_of_hdf5(path: Path) -> str:
    import h5py

    try:
        with h5py.File(path) as file:
            groups = set(file)
    except Exception as error:  # h5py has no common type
        if sizes := re.search(r"\beof = (\d+).*stored_eof = (\d+)", str(error)):
            return f"cut off: contains {sizes[1]} of {sizes[2]} bytes: download or copy it again"
        return f"damaged: {error}"
    if groups & {"layers", "_layer_checkpoint_dependencies"}:
        return f"weights of Keras 3 without their network (.weights.h5): {_EXPECTED}"
    return "hdf5"


def _kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception as error:  # on damaged archives, zipfile raises more than BadZipFile
        return f"damaged or cut off: {error}"
    if "network.json" in names:
        return "keras"
    if any(name.endswith(".npy") for name in names):
        return f"a NumPy archive (.npz): {_EXPECTED}"
    if any(name.endswith("data.pkl") for name in names):
        return f"a PyTorch file: {_EXPECTED}"
    suffixes = {Path(name).suffix for name in names}
    if suffixes & {".keras", ".hdf5", ".h5", ".onnx"} and "config.json" not in names:
        return f"a zip archive: unpack it: {_EXPECTED}"
    return (
        "contains no network.json: expected a .keras file written by train.py or "
        "tools.convert_model"
    )
