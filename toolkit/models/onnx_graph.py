"""The network as an ONNX graph, layer by layer, on any Keras backend."""

import json
from typing import TYPE_CHECKING

from toolkit.errors import ExportError
from toolkit.models.checkpoints import Checkpoint

import numpy as np

if TYPE_CHECKING:
    import onnx

# The runtimes of 2022 support these versions, which contain every operator that is used.
_OPSET = 17
_IR_VERSION = 8


def describe(checkpoint: Checkpoint) -> dict:
    """Return the metadata that a program needs to use a model, as a JSON-serialisable dict.

    Returns
    -------
    dict
        ``tags``, names of the outputs in order; ``sample_rate``, in Hz; ``num_samples`` per
        segment; ``network``, the hyper-parameters.
    """
    return {
        "tags": list(checkpoint.tags),
        "sample_rate": checkpoint.sample_rate,
        "num_samples": checkpoint.config.num_samples,
        "network": checkpoint.config.to_json(),
    }


def build_onnx(checkpoint: Checkpoint) -> "onnx.ModelProto":
    """Build the ONNX graph of a network.

    Parameters
    ----------
    checkpoint : Checkpoint
        Network and tags.

    Returns
    -------
    onnx.ModelProto
        Maps ``segments`` [shape=(batch, num_samples), float32] to ``tags`` [shape=(batch,
        num_tags), float32] and ``embeddings`` [shape=(batch, num_features), float32] (see
        `model.build_embeddings`). Its metadata contains each value of `describe` as JSON.

    Raises
    ------
    ExportError
        The network has a layer without an ONNX operator.
    """
    import onnx

    graph = _Graph()
    network = checkpoint.network
    # `network.layers` lacks the slices and maxima of `model.pool_relu`.
    for layer in network.operations:
        graph.add(layer)
    # Programs request the outputs by these names, whatever the layers are called.
    graph.node("Identity", [graph.names[id(network.output)]], "tags")
    hidden = network.get_layer("hidden_relu")
    graph.node("Identity", [graph.names[id(hidden.output)]], "embeddings")
    helper = onnx.helper
    inputs, *outputs = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", size])
        for name, size in (
            ("segments", checkpoint.config.num_samples),
            ("tags", len(checkpoint.tags)),
            ("embeddings", checkpoint.config.num_features),
        )
    )
    model = helper.make_model(
        helper.make_graph(graph.nodes, network.name, [inputs], outputs, graph.arrays),
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
    """An ONNX graph under construction; nodes have the names of Keras's layers.

    ONNX puts channels before time: (B, N, C) in Keras is (B, C, N) here.
    """

    def __init__(self):
        self.nodes = []
        self.arrays = []
        self.names = {}  # id of a Keras tensor -> name in the graph

    def add(self, layer) -> None:
        kind = type(layer).__name__
        if kind == "InputLayer":
            self.names[id(layer.output)] = layer.name
            return
        write = getattr(self, f"_{kind.lower()}", None)
        if write is None:
            raise ExportError(f"layer {layer.name}: no ONNX operator for {kind}")
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
        """Add a layer's arrays under its name."""
        values = [np.asarray(value, np.float32) for value in layer.get_weights()]
        return [
            # A kernel is (width, in, out) in Keras and (out, in, width) in ONNX.
            self.array(f"{layer.name}/{name}", value.T if value.ndim == 3 else value)
            for name, value in zip(names, values, strict=True)
        ]

    def _conv1d(self, layer, inputs):
        frames, (width,), (stride,) = layer.input.shape[1], layer.kernel_size, layer.strides
        missing = 0
        if layer.padding == "same":
            missing = max(0, (-(-frames // stride) - 1) * stride + width - frames)
        sizes = {"kernel_shape": [width], "strides": [stride]}
        # As in TensorFlow, the larger half of the padding is at the end.
        sizes["pads"] = [missing // 2, missing - missing // 2]
        return self.node(
            "Conv", [*inputs, *self.weights(layer, "kernel", "bias")], layer.name, **sizes
        )

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
            raise ExportError(f"layer {layer.name}: no ONNX operator for {activation}")
        return self.node(operators[activation], [sums], f"{layer.name}/{activation}")

    def _reshape(self, layer, inputs):
        shape = layer.target_shape
        if len(shape) == 3 and shape[1] == 3:
            return inputs[0]  # groups of three frames: _max pools them
        if len(shape) == 2 and 1 in shape:  # (B, N) -> (B, 1, N), or (B, C) -> (B, C, 1)
            axis = 1 if shape[1] == 1 else 2
            axes = self.array(f"{layer.name}/axes", np.array([axis], np.int64))
            # Not the layer's name: ONNX Runtime's quantiser gives a tensor block0_se a scale
            # named block0_se_scale, which is the name of a layer.
            return self.node("Unsqueeze", [*inputs, axes], f"{layer.name}/unsqueezed")
        raise ExportError(f"layer {layer.name}: no ONNX operator for this reshape to {shape}")

    def _getitem(self, layer, inputs):
        return inputs[0]  # drops the last frames before pooling, which MaxPool does itself

    def _max(self, layer, inputs):
        name = f"{inputs[0]}/pooled"
        return self.node("MaxPool", inputs, name, kernel_shape=[3], strides=[3])

    def _relu(self, layer, inputs):
        return self.node("Relu", inputs, layer.name)

    def _dropout(self, layer, inputs):
        return inputs[0]  # active only in training

    def _globalaveragepooling1d(self, layer, inputs):
        # ONNX keeps the axis of the frames: (B, C, 1).
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
