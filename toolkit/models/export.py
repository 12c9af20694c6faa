"""Leaving the toolkit: models as ONNX, TensorFlow SavedModel and LiteRT files.

``checkpoints.py`` is their command line. Each form takes segments [shape=(batch, num_samples),
float32, full scale 1] for any batch size, gives probabilities [shape=(batch, num_tags), float32],
carries the description of `describe`, and is run and compared with the network before it is
written. The ONNX graph is made of the network's own layers, on any Keras backend; the two others
are TensorFlow's work, and need its backend.
"""

import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit import backend, messages
from toolkit.errors import ExportError, UsageError
from toolkit.files import write_atomically

import numpy as np

if TYPE_CHECKING:
    from toolkit.models.checkpoints import Checkpoint

    import onnx

# The largest difference from the network's own outputs that an export may have.
TOLERANCE = 1e-4
# Of an ONNX file: old enough for the runtimes of 2022, new enough for every operator used.
_OPSET = 17
_IR_VERSION = 8
_MAX_PROTOBUF_BYTES = 2**31 - 1
# Where the description lies in a LiteRT file, which is also a zip archive of what comes with it;
# and in a SavedModel, in the folder that TensorFlow leaves to others.
DESCRIPTION_NAME = "network.json"
DESCRIPTION_FOLDER = "assets.extra"


def export(path: str | Path, checkpoint: "Checkpoint") -> float:
    """Write a model in the form that the path's suffix names, whole or not at all.

    Parameters
    ----------
    path : str or Path
        Where: one of `FORMS`; an earlier export is replaced.
    checkpoint : Checkpoint
        What.

    Returns
    -------
    float
        Largest absolute difference of the written model's outputs from the network's.

    Raises
    ------
    UsageError
        The suffix is none of `FORMS`, or a library or the backend it takes is not there.
    ExportError
        The written model differs by more than `TOLERANCE`, or is too large for its form.
    """
    path = Path(path)
    if path.suffix not in FORMS:
        raise UsageError(f"{path}: expected a name that ends in {', '.join(FORMS)}")
    return FORMS[path.suffix](path, checkpoint)


def describe(checkpoint: "Checkpoint") -> dict:
    """Give what a program needs to know to use a model, as values for JSON.

    Returns
    -------
    dict
        ``tags``, the outputs in order; ``sample_rate`` in Hz; ``num_samples`` of a segment;
        ``network``, its configuration.
    """
    return {
        "tags": list(checkpoint.tags),
        "sample_rate": checkpoint.sample_rate,
        "num_samples": checkpoint.config.num_samples,
        "network": checkpoint.config.to_json(),
    }


def _difference(
    path: Path, checkpoint: "Checkpoint", predict: Callable[[np.ndarray], np.ndarray]
) -> float:
    """Compare an export with the network, on batches of one and of three segments."""
    random = np.random.default_rng(0)
    largest = 0.0
    for level in (0.01, 0.3):
        segments = random.normal(0, level, (3, checkpoint.config.num_samples)).astype(np.float32)
        expected = np.asarray(checkpoint.network.predict_on_batch(segments), np.float64)
        for batch in (slice(1), slice(3)):
            found = np.asarray(predict(segments[batch]), np.float64)
            if found.shape != expected[batch].shape:
                raise ExportError(
                    f"{path}: not written: gives outputs of shape {found.shape}, "
                    f"the network {expected[batch].shape}"
                )
            largest = max(largest, float(np.abs(found - expected[batch]).max()))
    if not largest <= TOLERANCE:
        raise ExportError(
            f"{path}: not written: its outputs differ from the network's by {largest:.1e}, "
            f"more than {TOLERANCE:g}"
        )
    return largest


# --- ONNX ----------------------------------------------------------------------------------------


def _export_onnx(path: Path, checkpoint: "Checkpoint") -> float:
    try:
        backend.import_quietly("onnx", "onnxruntime")
    except ImportError as error:
        raise _missing(path, error) from None
    import onnxruntime

    num_bytes = sum(weight.nbytes for weight in checkpoint.network.get_weights())
    if num_bytes > _MAX_PROTOBUF_BYTES:
        raise ExportError(
            f"{path}: not written: {messages.size(num_bytes)} of weights, ONNX takes "
            f"{messages.size(_MAX_PROTOBUF_BYTES)}"
        )
    content = build_onnx(checkpoint).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    largest = _difference(
        path, checkpoint, lambda segments: session.run(["tags"], {"segments": segments})[0]
    )
    write_atomically(path, content)
    return largest


def build_onnx(checkpoint: "Checkpoint") -> "onnx.ModelProto":
    """Write a network as an ONNX graph.

    Parameters
    ----------
    checkpoint : Checkpoint
        The network and its tags.

    Returns
    -------
    onnx.ModelProto
        From ``segments`` to ``tags``; each value of `describe` is in its metadata, as JSON.

    Raises
    ------
    ExportError
        The network has a layer that this does not know.
    """
    import onnx

    graph = _Graph()
    network = checkpoint.network
    for layer in network.operations:
        graph.add(layer)
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph.node("Identity", [graph.names[id(network.output)]], "tags")
    inputs, outputs = (
        [helper.make_tensor_value_info(name, kind, ["batch", size])]
        for name, size in (
            ("segments", checkpoint.config.num_samples), ("tags", len(checkpoint.tags)),
        )
    )  # fmt: skip
    model = helper.make_model(
        helper.make_graph(graph.nodes, network.name, inputs, outputs, graph.arrays),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="sample-level CNNs for music auto-tagging",
    )
    description = describe(checkpoint)
    helper.set_model_props(
        model,
        {name: json.dumps(value, ensure_ascii=False) for name, value in description.items()},
    )
    onnx.checker.check_model(model, full_check=True)
    return model


class _Graph:
    """An ONNX graph in the making: Keras's layers one by one, their names kept.

    ONNX puts channels before time: what is (B, N, C) in Keras is (B, C, N) here.
    """

    def __init__(self):
        self.nodes = []
        self.arrays = []
        self.names = {}  # of a Keras tensor, by its id

    def add(self, layer) -> None:
        kind = type(layer).__name__
        if kind == "InputLayer":
            self.names[id(layer.output)] = layer.name
            return
        write = getattr(self, f"_{kind.lower()}", None)
        if write is None:
            raise ExportError(f"layer {layer.name}: no ONNX is known for {kind}")
        tensors = layer.input if isinstance(layer.input, list) else [layer.input]
        inputs = [self.names[id(tensor)] for tensor in tensors]
        self.names[id(layer.output)] = write(layer, inputs)

    def node(self, operator: str, inputs: list[str], name: str, **attributes) -> str:
        import onnx

        self.nodes.append(onnx.helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def array(self, name: str, values) -> str:
        import onnx

        self.arrays.append(onnx.numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def weights(self, layer, *names: str) -> list[str]:
        """Enter a layer's arrays under its name."""
        values = [np.asarray(value, np.float32) for value in layer.get_weights()]
        return [
            # Keras has a kernel as (width, in, out), ONNX as (out, in, width).
            self.array(f"{layer.name}/{name}", value.T if value.ndim == 3 else value)
            for name, value in zip(names, values, strict=True)
        ]

    def _conv1d(self, layer, inputs):
        frames, (width,), (stride,) = layer.input.shape[1], layer.kernel_size, layer.strides
        missing = 0
        if layer.padding == "same":
            missing = max(0, (-(-frames // stride) - 1) * stride + width - frames)
        arrays = self.weights(layer, "kernel", "bias")
        return self.node(
            "Conv", [*inputs, *arrays], layer.name,
            kernel_shape=[width], strides=[stride], pads=[missing // 2, missing - missing // 2],
        )  # fmt: skip

    def _batchnormalization(self, layer, inputs):
        arrays = self.weights(layer, "gamma", "beta", "moving_mean", "moving_variance")
        return self.node(
            "BatchNormalization", [*inputs, *arrays], layer.name, epsilon=layer.epsilon
        )

    def _dense(self, layer, inputs):
        sums = f"{layer.name}/sums"
        self.node("Gemm", [*inputs, *self.weights(layer, "kernel", "bias")], sums)
        operators = {"linear": "Identity", "relu": "Relu", "sigmoid": "Sigmoid"}
        activation = layer.activation.__name__
        if activation not in operators:
            raise ExportError(f"layer {layer.name}: no ONNX is known for {activation}")
        return self.node(operators[activation], [sums], f"{layer.name}/{activation}")

    def _reshape(self, layer, inputs):
        shape = layer.target_shape
        if len(shape) == 3 and shape[1] == 3:
            return inputs[0]  # frames by threes, of which _max takes the maxima
        if len(shape) == 2 and 1 in shape:  # (B, N) -> (B, 1, N), or (B, C) -> (B, C, 1)
            axis = 1 if shape[1] == 1 else 2
            axes = self.array(f"{layer.name}/axes", np.array([axis], np.int64))
            return self.node("Unsqueeze", [*inputs, axes], layer.name)
        raise ExportError(f"layer {layer.name}: no ONNX is known for this reshape to {shape}")

    def _getitem(self, layer, inputs):
        return inputs[0]  # the frames that are cut off before pooling: MaxPool leaves them out

    def _max(self, layer, inputs):
        name = f"{inputs[0]}/pooled"
        return self.node("MaxPool", inputs, name, kernel_shape=[3], strides=[3])

    def _relu(self, layer, inputs):
        return self.node("Relu", inputs, layer.name)

    def _dropout(self, layer, inputs):
        return inputs[0]  # only training drops

    def _globalaveragepooling1d(self, layer, inputs):
        means = self.node("GlobalAveragePool", inputs, f"{layer.name}/means")
        return self.node("Flatten", [means], layer.name)

    def _globalmaxpooling1d(self, layer, inputs):
        maxima = self.node("GlobalMaxPool", inputs, f"{layer.name}/maxima")
        return self.node("Flatten", [maxima], layer.name)

    def _multiply(self, layer, inputs):
        return self.node("Mul", inputs, layer.name)

    def _add(self, layer, inputs):
        return self.node("Add", inputs, layer.name)

    def _concatenate(self, layer, inputs):
        return self.node("Concat", inputs, layer.name, axis=1)


# --- TensorFlow ----------------------------------------------------------------------------------


def _export_savedmodel(path: Path, checkpoint: "Checkpoint") -> float:
    _check_backend(path)
    import tensorflow as tf

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with backend.stderr_held():
            _save_signature(temporary, checkpoint)
            serve = tf.saved_model.load(temporary).signatures["serving_default"]
            largest = _difference(
                path, checkpoint, lambda segments: serve(segments=tf.constant(segments))["tags"]
            )
        folder = temporary / DESCRIPTION_FOLDER
        folder.mkdir()
        (folder / DESCRIPTION_NAME).write_text(_description_text(checkpoint), encoding="utf-8")
        _replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return largest


def _save_signature(folder: Path, checkpoint: "Checkpoint") -> None:
    import tensorflow as tf

    network = checkpoint.network
    holder = tf.Module()
    holder.weights = [variable.value for variable in network.weights]  # or they are not saved
    holder.serve = tf.function(
        lambda segments: {"tags": network(segments, training=False)},
        input_signature=[
            tf.TensorSpec((None, checkpoint.config.num_samples), tf.float32, "segments")
        ],
    )
    tf.saved_model.save(holder, folder, signatures={"serving_default": holder.serve})


def _replace_folder(temporary: Path, path: Path) -> None:
    """Put a folder in the place of an earlier export, and of nothing else."""
    if path.exists() or path.is_symlink():
        if not (path / "saved_model.pb").is_file():
            raise ExportError(f"{path}: there is something else of this name: not replaced")
        shutil.rmtree(path)
    os.replace(temporary, path)


def _export_litert(path: Path, checkpoint: "Checkpoint") -> float:
    _check_backend(path)
    try:
        backend.import_quietly("ai_edge_litert.interpreter")
    except ImportError as error:
        raise _missing(path, error) from None
    import tensorflow as tf
    from ai_edge_litert.interpreter import Interpreter

    with tempfile.TemporaryDirectory() as folder, backend.stderr_held():
        _save_signature(Path(folder), checkpoint)
        file = io.BytesIO(tf.lite.TFLiteConverter.from_saved_model(folder).convert())
        # LiteRT reads no further than its own part, before which zip archives need nothing.
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr(DESCRIPTION_NAME, _description_text(checkpoint))
        run = Interpreter(model_content=file.getvalue()).get_signature_runner("serving_default")
        largest = _difference(path, checkpoint, lambda segments: run(segments=segments)["tags"])
    write_atomically(path, file.getvalue())
    return largest


def _check_backend(path: Path) -> None:
    import keras

    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise UsageError(
            f"{path}: {path.suffix} takes the TensorFlow backend, this is {backend}: "
            "set KERAS_BACKEND=tensorflow, or write .onnx"
        )


def _description_text(checkpoint: "Checkpoint") -> str:
    return json.dumps(describe(checkpoint), indent=1, ensure_ascii=False) + "\n"


def _missing(path: Path, error: ImportError) -> UsageError:
    return UsageError(
        f"{path}: {error.name or error} is not installed: "
        "python -m pip install -r requirements/export.txt"
    )


FORMS = {
    ".onnx": _export_onnx,
    ".savedmodel": _export_savedmodel,
    ".tflite": _export_litert,
}
