"""Name, find, write and load model files.

Three kinds are read: the ``.keras`` files of this toolkit, the published program's Keras 2
``.hdf5`` (whole model or weights only), and Keras 3's ``.h5``. `load` builds the network itself and
takes only names and arrays from a file, so code in a file is never executed.
"""

import dataclasses
import json
import re
import reprlib
import zipfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.data.audio import SAMPLE_RATE
from toolkit.errors import CheckpointError, UsageError
from toolkit.files import replaced_whole
from toolkit.model_kinds import model_kind
from toolkit.models.config import NetworkConfig
from toolkit.models.hdf5 import DAMAGE, assign, check_sizes, list_arrays, open_hdf5
from toolkit.models.keras2 import load_hdf5

if TYPE_CHECKING:
    import keras

# Added to the content of a .keras file: the network, its tags and the state of training.
_DESCRIPTION_NAME = "network.json"
_DESCRIPTION_FORMAT = 1
_WEIGHTS_NAME = "model.weights.h5"
# Enough for the names of 100,000 tags and the history of any training.
_MAX_DESCRIPTION_BYTES = 2**24

_CHECKPOINT_NAME = re.compile(r"ckpt-e(\d{3,})-l(\d+\.\d+)\.(keras|hdf5)")


@dataclasses.dataclass
class Checkpoint:
    """A network with its weights and the meaning of its outputs.

    Attributes
    ----------
    network : keras.Model or OnnxNetwork
        A Keras model that is not compiled, or an exported one (see `toolkit.models.onnx_file`).
    config : NetworkConfig
        Hyper-parameters of the network.
    tags : tuple of str or None
        Names of the outputs in order; None if the file contains no tag names, such as an ``.hdf5``
        file.
    sample_rate : int
        Sample rate of the segments, in Hz.
    training : dict
        State of the training that wrote the file; empty if there is none.
    """

    network: "keras.Model"
    config: NetworkConfig
    tags: tuple[str, ...] | None
    sample_rate: int = SAMPLE_RATE  # .hdf5 files of the published program do not contain it
    training: dict = dataclasses.field(default_factory=dict)


def checkpoint_name(epoch: int, val_loss: float) -> str:
    """Name a checkpoint by its epoch and validation loss, such as ``ckpt-e004-l0.1538.keras``."""
    return f"ckpt-e{epoch:03d}-l{val_loss:.4f}.keras"


def find_best(stage_dir: str | Path) -> Path | None:
    """Find the checkpoint with the lowest validation loss in a stage's folder.

    Both ``.keras`` files and the published program's ``.hdf5`` files are found. If two file names
    contain the same loss, the later epoch is the best: only epochs that improve are saved, so the
    unrounded loss of the later epoch is lower.

    Returns
    -------
    Path or None
        None if the folder contains no checkpoint.
    """
    named = []
    for path in Path(stage_dir).glob("ckpt-*"):
        if match := _CHECKPOINT_NAME.fullmatch(path.name):
            named.append((float(match[2]), -int(match[1]), path))
    return min(named)[2] if named else None


def save(path: str | Path, checkpoint: Checkpoint, trainer: "keras.Model | None" = None) -> None:
    """Write a ``.keras`` file, completely or not at all.

    Parameters
    ----------
    path : str or Path
        File to write; an earlier file is replaced only by a complete one.
    checkpoint : Checkpoint
        Network and its description.
    trainer : keras.Model or None
        Compiled model that shares the network's layers, to save the state of its optimizer too.
    """
    description = {
        "format": _DESCRIPTION_FORMAT,
        "network": checkpoint.config.to_json(),
        "tags": None if checkpoint.tags is None else list(checkpoint.tags),
        "sample_rate": checkpoint.sample_rate,
        "training": checkpoint.training,
    }
    # Keras selects the format by the suffix, and ignores further files in its archive.
    with replaced_whole(path, suffix=".keras") as temporary:
        (trainer or checkpoint.network).save(temporary)
        with zipfile.ZipFile(temporary, "a") as archive:
            archive.writestr(_DESCRIPTION_NAME, json.dumps(description, indent=1))


def load(path: str | Path) -> Checkpoint:
    """Load a model file as one of the paper's networks.

    Parameters
    ----------
    path : str or Path
        A ``.keras``, ``.hdf5`` or ``.h5`` file, or a stage's folder for its best checkpoint.

    Raises
    ------
    CheckpointError
        The file is not a model file, or its arrays do not form one of the paper's networks.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    kind = model_kind(path)
    if kind == "folder":
        best = find_best(path)
        if best is None:
            raise CheckpointError(
                f"{path}: no checkpoint in this folder: expected ckpt-*.keras or ckpt-*.hdf5"
            )
        path, kind = best, model_kind(best)
    if kind == "onnx":
        raise CheckpointError(f"{path}: an ONNX model: use the model that it was exported from")
    if kind == "keras":
        return _load_keras(path)
    network, config = load_hdf5(path)
    return Checkpoint(network, config, tags=None)


def load_optimizer(path: str | Path, trainer: "keras.Model") -> None:
    """Restore the state of the optimizer that `save` wrote.

    Raises
    ------
    CheckpointError
        The file contains the state of another optimizer or network.
    """
    with _open_keras_weights(Path(path)) as file:
        datasets = list_arrays(file, path)
        for number, variable in enumerate(trainer.optimizer.variables):
            # Keras stores the variables of an optimizer under their numbers.
            place = f"optimizer/vars/{number}"
            assign(variable, datasets.get(place), place, path)


def _load_keras(path: Path) -> Checkpoint:
    from model import build_network

    where = f"{path}: {_DESCRIPTION_NAME}"
    description = read_description(path)
    config, tags, sample_rate = check_description(description, where)
    training = description.get("training", {})
    if not isinstance(training, dict):
        raise _invalid(where, "training", training, "an object")
    with _open_keras_weights(path) as file:
        datasets = list_arrays(file, path)
        check_sizes(config, datasets, path)
        network = build_network(config)
        for layer, place in _class_places(network).items():
            for number, variable in enumerate(layer.weights):
                name = f"layers/{place}/vars/{number}"
                assign(variable, datasets.get(name), f"{layer.name} ({name})", path)
    return Checkpoint(network, config, tags, sample_rate, training)


def check_description(
    description: dict, where: str
) -> tuple[NetworkConfig, tuple[str, ...] | None, int]:
    """Check the description of a network in a model file.

    Parameters
    ----------
    description : dict
        Decoded JSON; the keys ``network``, ``tags`` and ``sample_rate`` are read.
    where : str
        The place of the description, for errors.

    Returns
    -------
    config : NetworkConfig
    tags : tuple of str or None
        None if the file contains no tag names.
    sample_rate : int
        In Hz.

    Raises
    ------
    CheckpointError
        A value is missing or invalid.
    """
    config = _read_config(description.get("network"), where)
    tags = _read_tags(description.get("tags"), config, where)
    sample_rate = description.get("sample_rate")
    if not isinstance(sample_rate, int) or sample_rate < 1:
        raise _invalid(where, "sample_rate", sample_rate, "an integer of at least 1")
    return config, tags, sample_rate


def _read_config(fields: object, where: str) -> NetworkConfig:
    if not isinstance(fields, dict):
        raise _invalid(where, "network", fields, "an object")
    known = [field.name for field in dataclasses.fields(NetworkConfig)]
    if unknown := sorted(fields.keys() - set(known)):
        raise _invalid(where, "a field of network", unknown[0], f"one of {', '.join(known)}")
    try:
        return NetworkConfig(**fields)
    # The file is wrong, not the command line, so the exit status is 1.
    except UsageError as error:
        raise CheckpointError(f"{where}: {error}") from None


def _read_tags(names: object, config: NetworkConfig, where: str) -> tuple[str, ...] | None:
    # Earlier versions wrote 'tag 0', 'tag 1', … for a converted file that named no tags.
    if names is None or names == [f"tag {number}" for number in range(config.num_tags)]:
        return None
    is_list = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    if not is_list or not len(names) == len(set(names)) == config.num_tags:
        raise _invalid(where, "tags", names, f"a list of {config.num_tags} different names")
    return tuple(names)


def _invalid(where: str, name: str, found: object, expected: str) -> CheckpointError:
    # Shortened by reprlib, since damaged files may contain megabytes in a field.
    return CheckpointError(f"{where}: {name} is {reprlib.repr(found)}: expected {expected}")


def read_description(path: Path) -> dict:
    """Read the description that `save` added to a ``.keras`` file, without building the network."""
    where = f"{path}: {_DESCRIPTION_NAME}"
    content = _read_member(path, _DESCRIPTION_NAME, _MAX_DESCRIPTION_BYTES)
    try:
        description = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    if not isinstance(description, dict):
        raise _invalid(where, "the content", description, "an object")
    if description.get("format") != _DESCRIPTION_FORMAT:
        raise _invalid(where, "format", description.get("format"), str(_DESCRIPTION_FORMAT))
    return description


def _open_keras_weights(path: Path):
    return open_hdf5(path, _read_member(path, _WEIGHTS_NAME, path.stat().st_size))


def _read_member(path: Path, name: str, max_bytes: int) -> bytes:
    """Read a file of a .keras archive; the file must be uncompressed, as Keras writes it.

    The declared size of a compressed file can be false, so decompression could fill the memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if name not in archive.namelist():
                raise CheckpointError(
                    f"{path}: contains no {name}: expected a .keras file written by train.py or "
                    "tools.convert_model"
                )
            info = archive.getinfo(name)
            if info.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{path}: {name} is compressed: expected an uncompressed one")
            if info.file_size > max_bytes:
                raise CheckpointError(
                    f"{path}: {name} has {info.file_size} bytes: expected at most {max_bytes}"
                )
            return archive.read(info)
    except PermissionError:
        raise
    except DAMAGE as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None


def _class_places(network) -> dict:
    """Return each layer's place in a Keras 3 weights file: its class name and a running number."""
    counts = Counter()
    places = {}
    for layer in network.layers:
        # As in Keras: Conv1D becomes conv1d, and the second ReLU becomes re_lu_1.
        name = re.sub(r"([a-z])([A-Z])", r"\1_\2", type(layer).__name__).lower()
        places[layer] = f"{name}_{counts[name]}" if counts[name] else name
        counts[name] += 1
    return places
