"""Load the ``.onnx`` files that tools.convert_model wrote, and predict without Keras."""

import json
from collections.abc import Sequence
from pathlib import Path

from toolkit import backend
from toolkit.errors import CheckpointError, UsageError
from toolkit.model_kinds import model_kind
from toolkit.models.checkpoints import Checkpoint, check_description

import numpy as np

SUFFIX = ".onnx"
# Execution providers in order of preference; a CUDA provider exists only in onnxruntime-gpu.
_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")


class OnnxNetwork:
    """A network that ONNX Runtime runs, with the part of `keras.Model` that prediction needs.

    Parameters
    ----------
    session : onnxruntime.InferenceSession
        An exported network (see `onnx_graph.build_onnx`).
    num_samples : int
        Samples per segment.
    outputs : sequence of str
        Names of the outputs to compute.
    """

    def __init__(self, session, num_samples: int, outputs: Sequence[str]):
        self.input_shape = (None, num_samples)
        self._session, self._outputs = session, outputs

    def __call__(self, segments: np.ndarray, training: bool = False):
        """Predict segments [shape=(n_segments, n_samples), dtype=float32]."""
        outputs = self._session.run(self._outputs, {"segments": segments})
        return outputs if len(outputs) > 1 else outputs[0]

    predict_on_batch = __call__


def load(path: str | Path, embeddings: bool = False) -> Checkpoint:
    """Load an exported model, which outputs tags and, if requested, embeddings.

    Raises
    ------
    CheckpointError
        The file does not exist, or is not an export of this toolkit.
    UsageError
        ONNX Runtime is not installed, or an earlier version exported the model without embeddings.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    model_kind(path)
    try:
        backend.import_quietly("onnxruntime")
    except ImportError:
        raise UsageError(
            f"{path}: onnxruntime is not installed: python -m pip install -r requirements/tag.txt"
        ) from None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, too
    available = onnxruntime.get_available_providers()
    providers = [name for name in _PROVIDERS if name in available]
    try:
        session = onnxruntime.InferenceSession(path, options, providers)
    except Exception as error:  # the exceptions of ONNX Runtime have no common type
        reason = str(error).strip().splitlines()[0].rpartition(" failed:")[2]
        raise CheckpointError(f"{path}: damaged, cut off or not an ONNX model: {reason}") from None
    metadata = session.get_modelmeta().custom_metadata_map
    if "network" not in metadata:
        raise CheckpointError(f"{path}: not a model that tools.convert_model wrote")
    # Other programs may add entries: the quantiser adds one that is not JSON.
    known = metadata.keys() & {"network", "tags", "sample_rate"}
    try:
        description = {name: json.loads(metadata[name]) for name in known}
    # Deeply nested JSON raises RecursionError.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: metadata: {error}") from None
    config, tags, sample_rate = check_description(description, f"{path}: metadata")
    # Other programs can change the graph without the metadata.
    sizes = {"segments": config.num_samples, "tags": config.num_tags}
    sizes["embeddings"] = config.num_features
    for value in (*session.get_inputs(), *session.get_outputs()):
        if value.shape[1:] != [sizes.pop(value.name, None)]:
            raise CheckpointError(
                f"{path}: {value.name} has shape {value.shape}, which is not that of the network "
                "in the metadata"
            )
        if value.type != "tensor(float)":
            raise CheckpointError(
                f"{path}: {value.name} is a {value.type}, expected float32: convert the network, "
                "but not its inputs and outputs (keep_io_types=True)"
            )
    if embeddings and "embeddings" in sizes:
        raise UsageError(
            f"{path}: an earlier version exported this file without embeddings: export the model "
            "again with tools.convert_model"
        )
    network = OnnxNetwork(session, config.num_samples, ["tags", "embeddings"][: 1 + embeddings])
    return Checkpoint(network, config, tags, sample_rate)
