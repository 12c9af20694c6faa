"""Model files: naming, finding, writing, and loading them as data.

    python checkpoints.py se-multi-auc_0.9111-tfrmodel.hdf5 se-multi.keras
    python checkpoints.py log/4 se-multi.onnx

Three kinds are read: our ``.keras``, the published program's Keras 2 ``.hdf5`` (whole model or
weights only), and Keras 3's ``.h5``. Of each only names and arrays are used: our own network is
built and the arrays are assigned to it, so nothing that a file says is ever executed.
"""

import argparse
import io
import json
import math
import re
import struct
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit import backend, cli, messages
from toolkit.data.annotations import MTT_TOP_TAGS
from toolkit.data.audio import SAMPLE_RATE
from toolkit.errors import CheckpointError, UsageError
from toolkit.files import replaced_whole
from toolkit.models.exports import FORMS, export

import numpy as np

if TYPE_CHECKING:
    from model import NetworkConfig

    import keras

# Written into a .keras file beside what Keras writes: the network, its tags, and their origin.
_DESCRIPTION_NAME = "network.json"
_DESCRIPTION_FORMAT = 1
_WEIGHTS_NAME = "model.weights.h5"

# The published models' rate; .hdf5 files do not say theirs.
_MAX_ARRAY_BYTES = 2**31
_MAX_DESCRIPTION_BYTES = 2**24
_MAX_OBJECTS = 100_000
_MAX_TAGS = 100_000

# What zipfile, json and h5py raise on damaged files.
_DAMAGE = (
    zipfile.BadZipFile, OSError, EOFError, KeyError, RuntimeError, ValueError, TypeError,
    OverflowError, struct.error,
)  # fmt: skip

_CHECKPOINT_NAME = re.compile(r"ckpt-e(\d{3,})-l(\d+\.\d+)\.(keras|hdf5)")


@dataclass
class Checkpoint:
    """A network with its weights, and what its outputs mean.

    Attributes
    ----------
    network : keras.Model
        Not compiled.
    config : model.NetworkConfig
        Which network it is.
    tags : tuple of str
        Its outputs, in order.
    sample_rate : int
        Rate of the segments it takes, in Hz.
    training : dict
        What `save` was given as training state.
    """

    network: "keras.Model"
    config: "NetworkConfig"
    tags: tuple[str, ...]
    sample_rate: int = SAMPLE_RATE
    training: dict = field(default_factory=dict)


# --- Names ---------------------------------------------------------------------------------------


def checkpoint_name(epoch: int, val_loss: float) -> str:
    """Name a checkpoint by its epoch and validation loss, such as ``ckpt-e004-l0.1538.keras``."""
    return f"ckpt-e{epoch:03d}-l{val_loss:.4f}.keras"


def find_best(stage_dir: str | Path) -> Path | None:
    """Find the checkpoint of lowest validation loss, or None where there is none.

    Only epochs that improve are kept, so where two losses round to the same name's digits the
    later one is the lower.
    """
    named = []
    for path in Path(stage_dir).glob("ckpt-*"):
        if match := _CHECKPOINT_NAME.fullmatch(path.name):
            named.append((float(match[2]), -int(match[1]), path))
    return min(named)[2] if named else None


# --- Writing -------------------------------------------------------------------------------------


def save(path: str | Path, checkpoint: Checkpoint, trainer: "keras.Model | None" = None) -> None:
    """Write a ``.keras`` file, whole or not at all.

    Parameters
    ----------
    path : str or Path
        Where; an earlier file is replaced only by a complete one.
    checkpoint : Checkpoint
        What.
    trainer : keras.Model or None
        The compiled model that shares the network's layers: its optimizer's state is written too.
    """
    description = {
        "format": _DESCRIPTION_FORMAT,
        "network": checkpoint.config.to_json(),
        "tags": list(checkpoint.tags),
        "sample_rate": checkpoint.sample_rate,
        "training": checkpoint.training,
    }
    with replaced_whole(path, suffix=".keras") as temporary:
        (trainer or checkpoint.network).save(temporary)
        with zipfile.ZipFile(temporary, "a") as archive:
            archive.writestr(_DESCRIPTION_NAME, json.dumps(description, indent=1))


# --- Loading -------------------------------------------------------------------------------------


def load(path: str | Path) -> Checkpoint:
    """Load a model file as one of our networks.

    Parameters
    ----------
    path : str or Path
        A ``.keras``, ``.hdf5`` or ``.h5`` file, or a stage's folder for the best checkpoint in it.

    Returns
    -------
    Checkpoint
        With weights; tags of an ``.hdf5`` are MagnaTagATune's where it has 50 outputs, and
        'tag 0', 'tag 1', … otherwise.

    Raises
    ------
    CheckpointError
        It is not such a file, or its arrays do not make one of our networks.
    """
    path = Path(path)
    if path.is_dir():
        best = find_best(path)
        if best is None:
            raise CheckpointError(f"{path}: no checkpoint in this folder")
        path = best
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    with open(path, "rb") as file:
        magic = file.read(8)
    if magic.startswith(b"PK"):
        return _load_keras(path)
    if magic == b"\x89HDF\r\n\x1a\n":
        return _load_hdf5(path)
    raise CheckpointError(f"{path}: not a model file: expected .keras, .hdf5 or .h5")


def load_optimizer(path: str | Path, trainer: "keras.Model") -> None:
    """Give a compiled model the optimizer's state that `save` wrote with its trainer.

    Raises
    ------
    CheckpointError
        The file's state is of another optimizer or network.
    """
    trainer.optimizer.build(trainer.trainable_variables)
    with _open_keras_weights(Path(path)) as file:
        datasets = _datasets(file, path)
        for number, variable in enumerate(trainer.optimizer.variables):
            place = f"optimizer/vars/{number}"
            _assign(variable, datasets.get(place), place, path)


def _load_keras(path: Path) -> Checkpoint:
    from model import NetworkConfig, build_network

    description = _read_description(path)
    try:
        config = NetworkConfig(**description["network"])
        tags = tuple(description["tags"])
        sample_rate = int(description["sample_rate"])
        training = dict(description.get("training", {}))
        is_valid = len(tags) == config.num_tags and all(isinstance(tag, str) for tag in tags)
    except (KeyError, TypeError, ValueError, OverflowError, UsageError) as error:
        raise CheckpointError(f"{path}: its description is not of our form: {error}") from None
    if not is_valid:
        raise CheckpointError(
            f"{path}: names {len(tags)} tags for a network of {config.num_tags} outputs"
        )
    with _open_keras_weights(path) as file:
        datasets = _datasets(file, path)
        _check_sizes(config, datasets, path)
        network = build_network(config)
        for layer, place in _class_places(network).items():
            for number, variable in enumerate(layer.weights):
                name = f"layers/{place}/vars/{number}"
                _assign(variable, datasets.get(name), f"{layer.name} ({name})", path)
    return Checkpoint(network, config, tags, sample_rate, training)


def _read_description(path: Path) -> dict:
    content = _read_member(path, _DESCRIPTION_NAME, _MAX_DESCRIPTION_BYTES)
    try:
        description = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    if not isinstance(description, dict) or description.get("format") != _DESCRIPTION_FORMAT:
        raise CheckpointError(f"{path}: its description is not of format {_DESCRIPTION_FORMAT}")
    return description


def _open_keras_weights(path: Path):
    import h5py

    content = _read_member(path, _WEIGHTS_NAME, path.stat().st_size)
    try:
        return h5py.File(io.BytesIO(content), "r")
    except _DAMAGE as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None


def _read_member(path: Path, name: str, max_bytes: int) -> bytes:
    """Read a file of a .keras archive that is stored plain, as Keras stores all of them.

    What a packed one unpacks to is known only when it is too late: the declared size may be false.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if name not in archive.namelist():
                raise CheckpointError(f"{path}: a .keras file of another program (no {name} in it)")
            info = archive.getinfo(name)
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > max_bytes:
                raise CheckpointError(
                    f"{path}: {name} is packed or declares too many bytes ({info.file_size}): "
                    "expected it stored plain"
                )
            return archive.read(info)
    except _DAMAGE as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None


def _class_places(network) -> dict:
    """Give each layer's place in a Keras 3 weights file: its class's name and a running number."""
    counts = {}
    places = {}
    for layer in network.layers:
        name = re.sub(r"([a-z])([A-Z])", r"\1_\2", type(layer).__name__)
        name = {"Conv1D": "conv1d", "ReLU": "re_lu"}.get(type(layer).__name__, name).lower()
        number = counts[name] = counts.get(name, -1) + 1
        places[layer] = f"{name}_{number}" if number else name
    return places


def _load_hdf5(path: Path) -> Checkpoint:
    from model import build_network

    import h5py

    try:
        file = h5py.File(path, "r")
    except _DAMAGE as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    with file:
        datasets = _datasets(file, path)
        arrays = _layer_arrays(datasets, path)
        config = _infer_config(arrays, path)
        _check_sizes(config, datasets, path)
        network = build_network(config)
        for kind, layers in _layers_by_kind(network).items():
            # _infer_config has counted them; shapes are checked one by one.
            for layer, (name, datasets) in zip(layers, arrays[kind], strict=True):
                for variable, dataset in zip(layer.weights, datasets, strict=True):
                    _assign(variable, dataset, name, path)
    num_tags = config.num_tags
    is_mtt = num_tags == len(MTT_TOP_TAGS)
    tags = MTT_TOP_TAGS if is_mtt else tuple(f"tag {number}" for number in range(num_tags))
    return Checkpoint(network, config, tags)


# The layers that hold weights, and the arrays of each in Keras's order.
_KINDS = {
    "convolution": ("kernel", "bias"),
    "dense": ("kernel", "bias"),
    "batch normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
}


def _layer_arrays(datasets: dict, path: Path) -> dict[str, list]:
    """Gather an .hdf5 file's arrays by layer, each kind in the order of creation."""
    layers = {}
    for place, dataset in datasets.items():
        parts = place.split("/")
        if "optimizer_weights" in parts:
            continue
        weight = re.sub(r":\d+$", "", parts[-1])
        layer = parts[-2] if len(parts) > 1 else ""
        if weight in layers.setdefault(layer, {}):
            raise CheckpointError(f"{path}: layer {layer!r} has two arrays {weight!r}")
        layers[layer][weight] = dataset

    arrays = {kind: [] for kind in _KINDS}
    for layer, weights in layers.items():
        if weights.keys() == set(_KINDS["batch normalization"]):
            kind = "batch normalization"
        elif weights.keys() == {"kernel", "bias"} and weights["kernel"].ndim == 3:
            kind = "convolution"
        elif weights.keys() == {"kernel", "bias"} and weights["kernel"].ndim == 2:
            kind = "dense"
        else:
            found = ", ".join(f"{name} {data.shape}" for name, data in sorted(weights.items()))
            raise CheckpointError(
                f"{path}: layer {layer!r} holds {found}: expected a convolution in one dimension, "
                "a dense layer or a batch normalization"
            )
        arrays[kind].append((layer, [weights[name] for name in _KINDS[kind]]))
    for kind, found in arrays.items():
        try:
            found.sort(key=lambda entry: _creation_order(entry[0]))
        except ValueError as error:
            raise CheckpointError(
                f"{path}: a {kind} layer is named {error}: expected Keras's numbered names or ours"
            ) from None
    return arrays


def _creation_order(layer: str) -> tuple:
    """Order layers as they were made.

    A Keras 2 file lists layers by depth, in which the equal-shaped convolutions of residual
    blocks swap; the numbers in automatic names count their creation. In ours the place is the
    order: within a residual block the shortcut is made first.
    """
    if match := re.fullmatch(r"(?:conv1d|dense|batch_normalization)(?:_(\d+))?", layer):
        return (0, int(match[1] or 0), 0)
    match = re.fullmatch(r"(conv0|hidden|tags|block(\d)_(\w+?))(?:_bn)?", layer)
    parts = ("shortcut", "conv1", "conv2", "se_fc", "se_excitation")
    if not match or (match[2] and match[3] not in parts):
        raise ValueError(repr(layer))
    if match[2]:
        return (1, int(match[2]), parts.index(match[3]))
    return (1, {"conv0": -1, "hidden": 10, "tags": 11}[match[1]], 0)


def _layers_by_kind(network) -> dict[str, list]:
    kinds = {"Conv1D": "convolution", "Dense": "dense", "BatchNormalization": "batch normalization"}
    layers = {kind: [] for kind in _KINDS}
    for layer in network.layers:
        if type(layer).__name__ in kinds:
            layers[kinds[type(layer).__name__]].append(layer)
    for found in layers.values():
        found.sort(key=lambda layer: _creation_order(layer.name))
    return layers


def _infer_config(arrays: dict[str, list], path: Path):
    """Tell the network from the shapes of its kernels."""
    from model import NUM_BLOCKS, NetworkConfig

    kernels = [datasets[0].shape for _, datasets in arrays["convolution"]]
    denses = [datasets[0].shape for _, datasets in arrays["dense"]]
    found = (
        f"{len(kernels)} convolutions, {len(denses)} dense layers and "
        f"{len(arrays['batch normalization'])} batch normalizations"
    )
    is_residual = len(kernels) > 1 + NUM_BLOCKS
    has_se = len(denses) > 2
    block = {
        (False, True): "se", (True, True): "rese", (True, False): "res", (False, False): "basic",
    }[is_residual, has_se]  # fmt: skip
    # Widths change in the third and the ninth block: there the shortcut is a convolution too.
    num_convolutions = 1 + 2 * NUM_BLOCKS + 2 if is_residual else 1 + NUM_BLOCKS
    num_denses = 2 * NUM_BLOCKS + 2 if has_se else 2
    expected = (num_convolutions, num_denses, num_convolutions + 1)
    if (len(kernels), len(denses), len(arrays["batch normalization"])) != expected:
        raise CheckpointError(
            f"{path}: found {found}: expected {expected[0]}, {expected[1]} and {expected[2]} for "
            f"a network of {block} blocks"
        )
    features = kernels[0][2]
    last_width = kernels[-1][2]
    try:
        return NetworkConfig(
            block=block,
            multi=denses[-2][0] != last_width,
            num_tags=denses[-1][1],
            init_features=features,
            # Of the last block: the widest, where rounding down has lost least.
            alpha=denses[-4][1] / last_width if has_se and last_width else 16.0,
        )
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _check_sizes(config, datasets: dict, path: Path) -> None:
    """Check numbers before a network is built of them."""
    for name, kind, smallest, largest in (
        ("init_features", int, 1, 4096),
        ("alpha", int | float, 0, 256),
        ("num_tags", int, 1, _MAX_TAGS),
        ("num_samples", int, 1, 2**26),
        ("dropout", int | float, 0, 0.999),
        ("weight_decay", int | float, 0, 1e6),
    ):
        value = getattr(config, name)
        if not isinstance(value, kind) or not smallest <= value <= largest:
            raise CheckpointError(
                f"{path}: {name} is {value!r}: expected a number from {smallest} to {largest}"
            )
    # A small file must not make us allocate a large network. The last block's largest kernels
    # and the output are within a factor of the whole.
    width = 4 * config.init_features
    num_numbers = 1.5 * width**2 + width * config.num_tags
    if config.has_excitations:
        num_numbers += width * int(width * config.alpha) * 2
    num_stored = sum(dataset.size for dataset in datasets.values())
    if num_numbers > num_stored:
        raise CheckpointError(
            f"{path}: holds {num_stored} numbers: a network of {config.init_features} features, "
            f"alpha {config.alpha:g} and {config.num_tags} tags has more than {num_numbers:.0f}"
        )


def _datasets(file, path: str | Path) -> dict:
    """List a file's arrays by place, following no link and trusting no declared size."""
    import h5py

    datasets = {}
    groups = [("", file)]
    num_objects = 0
    num_bytes = 0
    try:
        while groups:
            prefix, group = groups.pop()
            for name in group:
                num_objects += 1
                link = group.get(name, getlink=True)
                if num_objects > _MAX_OBJECTS or prefix.count("/") > 16:
                    raise CheckpointError(f"{path}: holds far more than a network")
                if not isinstance(link, h5py.HardLink):
                    raise CheckpointError(f"{path}: {prefix}{name} is a link: links are refused")
                found = group[name]
                if isinstance(found, h5py.Group):
                    groups.append((f"{prefix}{name}/", found))
                elif isinstance(found, h5py.Dataset):
                    num_bytes += _check_dataset(found, f"{prefix}{name}", path)
                    datasets[f"{prefix}{name}"] = found
                else:
                    raise CheckpointError(f"{path}: {prefix}{name} is neither array nor group")
        file_size = file.id.get_filesize()
    except _DAMAGE as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    if num_bytes > file_size:
        raise CheckpointError(f"{path}: arrays of {num_bytes} bytes in a file of {file_size}")
    return datasets


def _check_dataset(dataset, name: str, path: str | Path) -> int:
    if dataset.external or dataset.is_virtual:
        raise CheckpointError(f"{path}: {name} lies in another file: refused")
    if dataset.shape is None:
        raise CheckpointError(f"{path}: {name} is empty")
    size = math.prod(dataset.shape) * dataset.dtype.itemsize
    # Keras writes arrays plain: one that claims more bytes than the file gives it is no array.
    if size > _MAX_ARRAY_BYTES or size != dataset.id.get_storage_size():
        raise CheckpointError(
            f"{path}: {name} declares {size} bytes and stores {dataset.id.get_storage_size()}"
        )
    if dataset.chunks is not None:  # a filter of chunks would be looked for on this machine
        raise CheckpointError(f"{path}: {name} is stored in chunks: expected it stored plain")
    return size


def _assign(variable, dataset, name: str, path: str | Path) -> None:
    if dataset is None:
        raise CheckpointError(f"{path}: no array for {name}")
    if tuple(dataset.shape) != tuple(variable.shape):
        raise CheckpointError(
            f"{path}: {name} has shape {tuple(dataset.shape)}: expected {tuple(variable.shape)}"
        )
    if dataset.dtype.kind not in "fiu":
        raise CheckpointError(f"{path}: {name} holds {dataset.dtype}: expected numbers")
    try:
        values = dataset[()]
    except _DAMAGE as error:
        raise CheckpointError(f"{path}: {name}: damaged: {error}") from None
    if not np.isfinite(values).all():
        raise CheckpointError(f"{path}: {name} holds values that are no numbers")
    variable.assign(values)


# --- Command line --------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "Convert a model file: to our .keras, or to a form that other programs run.",
        "  python checkpoints.py se-multi-auc_0.9111-tfrmodel.hdf5 se-multi.keras\n"
        "  python checkpoints.py log/4 se-multi.onnx",
    )
    files = parser.add_argument_group("model files")
    cli.add_model(files)
    files.add_argument(
        "output",
        metavar="OUTPUT",
        help="the .keras or .onnx file, the .savedmodel folder (TensorFlow) or the .tflite file "
        "(LiteRT) to write",
    )
    return cli.add_general(parser)


def main(argv: list[str] | None = None) -> int:
    return cli.run(_convert, build_parser().parse_args(argv))


def _convert(arguments: argparse.Namespace) -> None:
    output = Path(arguments.output)
    if output.suffix not in (".keras", *FORMS):
        raise UsageError(f"{output}: expected a name that ends in .keras, {', '.join(FORMS)}")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"{output}: no folder {output.absolute().parent} to write it in")
    cli.check_model(arguments.model_path)
    backend.import_keras()
    checkpoint = load(arguments.model_path)
    config = checkpoint.config
    messages.say(
        f"{arguments.model_path}: {config.block} blocks{', multi-level' if config.multi else ''}, "
        f"{messages.count(config.init_features, 'feature')}, {messages.count(config.num_tags, 'tag')}"
    )
    compared = ""
    if output.suffix == ".keras":
        save(output, checkpoint)
    else:
        difference = export(output, checkpoint)
        compared = f", differs from the network by at most {difference:.1e}"
    messages.say(f"{output}: {messages.size_on_disk(output)}{compared}")


if __name__ == "__main__":
    sys.exit(main())
