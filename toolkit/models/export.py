"""Export models as ONNX, TensorFlow SavedModel and LiteRT files.

Each format takes segments [shape=(batch, num_samples), float32, full scale 1] in batches of any
size, returns probabilities [shape=(batch, num_tags), float32], and carries the description of
`onnx_graph.describe`. ONNX files also return embeddings. An exported model is run and compared with
the network before it is written. SavedModel and LiteRT need the TensorFlow backend.
"""

import dataclasses
import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from toolkit import backend, messages
from toolkit.errors import ExportError, UsageError
from toolkit.files import replaced_whole, write_atomically
from toolkit.models.checkpoints import Checkpoint
from toolkit.models.onnx_graph import build_onnx, describe

import numpy as np

# Largest allowed difference between the outputs of an export and of the network. Exports of the
# golden checkpoints differ by up to 1.2e-7, and rounding adds up in larger networks.
TOLERANCE = 1e-4
# Embeddings are not limited to 1, and the output layer reduces their differences.
_EMBEDDINGS_TOLERANCE = 1e-3
# Protocol buffers, and so ONNX files, cannot be larger.
_MAX_PROTOBUF_BYTES = 2**31 - 1
# Name of the description in a LiteRT file, which is also a zip archive, and in a SavedModel. There,
# TensorFlow reserves this folder for files of other programs.
DESCRIPTION_NAME = "network.json"
DESCRIPTION_FOLDER = "assets.extra"


def export(path: str | Path, checkpoint: Checkpoint) -> float:
    """Write a model in the format that the suffix selects, completely or not at all.

    Parameters
    ----------
    path : str or Path
        File or folder to write, with a suffix of `FORMATS`; an earlier export is replaced.
    checkpoint : Checkpoint
        Model to export; it must name its tags.

    Returns
    -------
    float
        Largest absolute difference between the probabilities of the export and of the network.

    Raises
    ------
    UsageError
        The suffix is unknown, or the library or backend that the format needs is missing.
    ExportError
        The exported model differs by more than `TOLERANCE`, or is too large for the format.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise UsageError(f"{path}: expected a name that ends in {', '.join(FORMATS)}")
    return FORMATS[path.suffix](path, checkpoint)


def _difference(
    path: Path,
    checkpoint: Checkpoint,
    predict: Callable[[np.ndarray], np.ndarray],
    tolerance: float = TOLERANCE,
) -> float:
    """Compare an export with the network, on batches of one and of three segments."""
    import keras

    random = np.random.default_rng(0)
    largest = 0.0
    for level in (0.01, 0.3):  # a quiet and a loud recording, as a fraction of full scale
        segments = random.normal(0, level, (3, checkpoint.config.num_samples)).astype(np.float32)
        expected = keras.ops.convert_to_numpy(checkpoint.network(segments, training=False))
        # An export to which tracing gave a fixed batch size fails here.
        for batch in (slice(1), slice(3)):
            found = np.asarray(predict(segments[batch]))
            if found.shape != expected[batch].shape:
                raise ExportError(
                    f"{path}: not written: its outputs have shape {found.shape}, the "
                    f"network's {expected[batch].shape}"
                )
            # Unlike max, np.maximum keeps NaN, which no tolerance allows.
            largest = float(np.maximum(largest, np.abs(found - expected[batch]).max()))
    if not largest <= tolerance:
        raise ExportError(
            f"{path}: not written: its outputs differ from the network's by {largest:.1e}, "
            f"more than {tolerance:g}"
        )
    return largest


# --- ONNX ----------------------------------------------------------------------------------------


def _export_onnx(path: Path, checkpoint: Checkpoint) -> float:
    try:
        backend.import_quietly("onnx", "onnxruntime")
    except ImportError as error:
        raise _missing(path, error) from None
    import keras
    import onnxruntime

    num_bytes = sum(weight.nbytes for weight in checkpoint.network.get_weights())
    if num_bytes > _MAX_PROTOBUF_BYTES:
        raise ExportError(
            f"{path}: not written: {messages.size(num_bytes)} of weights, but ONNX files store at "
            f"most {messages.size(_MAX_PROTOBUF_BYTES)}: write .savedmodel"
        )
    content = build_onnx(checkpoint).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def predict(output: str) -> Callable[[np.ndarray], np.ndarray]:
        return lambda segments: session.run([output], {"segments": segments})[0]

    largest = _difference(path, checkpoint, predict("tags"))
    network = checkpoint.network
    hidden = keras.Model(network.input, network.get_layer("hidden_relu").output)
    of_hidden = dataclasses.replace(checkpoint, network=hidden)
    _difference(path, of_hidden, predict("embeddings"), _EMBEDDINGS_TOLERANCE)
    write_atomically(path, content)
    return largest


# --- TensorFlow ----------------------------------------------------------------------------------


def _export_savedmodel(path: Path, checkpoint: Checkpoint) -> float:
    _check_backend(path)
    # An earlier export is replaced; a folder of other files must not be.
    if (path.exists() or path.is_symlink()) and not (path / "saved_model.pb").is_file():
        raise ExportError(f"{path}: exists and is not a SavedModel: choose another name")
    import tensorflow as tf

    # The folder that a link leads to is replaced, not the link.
    with replaced_whole(path.resolve()) as temporary, backend.stderr_held():
        _save_signature(temporary, checkpoint)
        serve = tf.saved_model.load(temporary).signatures["serving_default"]
        largest = _difference(
            path, checkpoint, lambda segments: serve(segments=tf.constant(segments))["tags"]
        )
        folder = temporary / DESCRIPTION_FOLDER
        folder.mkdir()
        (folder / DESCRIPTION_NAME).write_text(_description_text(checkpoint), encoding="utf-8")
    return largest


def _save_signature(folder: Path, checkpoint: Checkpoint) -> None:
    import tensorflow as tf

    network = checkpoint.network
    holder = tf.Module()
    # TensorFlow saves only variables that are attributes of the module.
    holder.weights = [variable.value for variable in network.weights]
    holder.serve = tf.function(
        lambda segments: {"tags": network(segments, training=False)},
        input_signature=[
            tf.TensorSpec((None, checkpoint.config.num_samples), tf.float32, "segments")
        ],
    )
    tf.saved_model.save(holder, folder, signatures={"serving_default": holder.serve})


def _export_litert(path: Path, checkpoint: Checkpoint) -> float:
    _check_backend(path)
    try:
        backend.import_quietly("ai_edge_litert.interpreter")
    except ImportError as error:
        raise _missing(path, error) from None
    import tensorflow as tf
    from ai_edge_litert.interpreter import Interpreter

    with (
        replaced_whole(path) as temporary,
        tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder,
        backend.stderr_held(),
    ):
        _save_signature(Path(folder), checkpoint)
        file = io.BytesIO(tf.lite.TFLiteConverter.from_saved_model(folder).convert())
        # LiteRT ignores bytes after its content, and zip readers ignore bytes before the archive.
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr(DESCRIPTION_NAME, _description_text(checkpoint))
        # With the archive, as the file is written.
        run = Interpreter(model_content=file.getvalue()).get_signature_runner("serving_default")
        largest = _difference(path, checkpoint, lambda segments: run(segments=segments)["tags"])
        temporary.write_bytes(file.getvalue())
    return largest


def _check_backend(path: Path) -> None:
    import keras

    name = keras.backend.backend()
    if name != "tensorflow":
        raise UsageError(
            f"{path}: {path.suffix} needs the TensorFlow backend, this is {name}: set "
            "KERAS_BACKEND=tensorflow, or write .onnx"
        )


def _description_text(checkpoint: Checkpoint) -> str:
    return json.dumps(describe(checkpoint), indent=1, ensure_ascii=False) + "\n"


def _missing(path: Path, error: ImportError) -> UsageError:
    return UsageError(
        f"{path}: {error.name or error} is not installed: "
        "python -m pip install -r requirements/export.txt"
    )


FORMATS = {
    ".onnx": _export_onnx,
    ".savedmodel": _export_savedmodel,
    ".tflite": _export_litert,
}
