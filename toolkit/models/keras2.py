"""Load published checkpoints (Keras 2 ``.hdf5`` files) and weights in Keras 3's ``.h5`` files.

Only names and arrays are read. The network is inferred from the shapes of the arrays, and layers
are matched by the order in which they were created.
"""

import re
from itertools import pairwise
from pathlib import Path

from toolkit.blocks import BLOCKS, CONVOLUTIONS, SE, WIDTHS, Block
from toolkit.errors import CheckpointError, UsageError
from toolkit.models.config import NetworkConfig
from toolkit.models.hdf5 import assign, check_sizes, list_arrays, open_hdf5

# The kinds of layers with weights: the number of dimensions of the first array, and the names of
# all arrays in Keras's order.
_KINDS = {
    "Conv1D": (3, ("kernel", "bias")),
    "Dense": (2, ("kernel", "bias")),
    "BatchNormalization": (1, ("gamma", "beta", "moving_mean", "moving_variance")),
}


def load_hdf5(path: Path):
    """Load a network from an ``.hdf5`` or ``.h5`` file.

    Parameters
    ----------
    path : Path
        Whole model or weights only, written by Keras 2 or 3.

    Returns
    -------
    network : keras.Model
        Not compiled.
    config : NetworkConfig
        Inferred from the arrays; dropout and weight decay are not stored and have their defaults.

    Raises
    ------
    CheckpointError
        The file is damaged, or its arrays do not form one of the paper's networks.
    """
    from model import build_network

    with open_hdf5(path) as file:
        datasets = list_arrays(file, path)
        arrays = _layer_arrays(datasets, path)
        config = _infer_config(arrays, path)
        check_sizes(config, datasets, path)
        network = build_network(config)
        for kind, found in arrays.items():
            layers = [layer for layer in network.layers if type(layer).__name__ == kind]
            layers.sort(key=lambda layer: _creation_order(layer.name))
            # _infer_config has checked the number of layers, assign checks the shapes.
            for layer, (name, datasets) in zip(layers, found, strict=True):
                for variable, dataset in zip(layer.weights, datasets, strict=True):
                    assign(variable, dataset, name, path)
    return network, config


def _layer_arrays(datasets: dict, path: Path) -> dict[str, list]:
    """Group the arrays of a file by layer, each kind of layer in order of creation."""
    layers = {}
    for place, dataset in datasets.items():
        layer, *scopes = place.removeprefix("model_weights/").split("/")
        if layer == "optimizer_weights":
            continue
        # Keras 2 renames the scopes, but not the layer, when a model is saved again in the process
        # that loaded it: conv1d_9/conv1d_9_1/kernel:0. Only the layer gives the order.
        weight = re.sub(r":\d+$", "", scopes[-1]) if scopes else ""
        if weight in layers.setdefault(layer, {}):
            raise CheckpointError(f"{path}: layer {layer!r} has two arrays {weight!r}")
        layers[layer][weight] = dataset

    arrays = {kind: [] for kind in _KINDS}
    for layer, weights in layers.items():
        for kind, (ndim, names) in _KINDS.items():
            if weights.keys() == set(names) and weights[names[0]].ndim == ndim:
                arrays[kind].append((layer, [weights[name] for name in names]))
                break
        else:
            found = ", ".join(f"{name} {data.shape}" for name, data in sorted(weights.items()))
            raise CheckpointError(
                f"{path}: layer {layer!r} contains {found}: expected a one-dimensional "
                "convolution, a dense layer or a batch normalization"
            )
    try:
        for found in arrays.values():
            found.sort(key=lambda entry: _creation_order(entry[0]))
            for (before, _), (layer, _) in pairwise(found):
                if _creation_order(before) == _creation_order(layer):
                    raise CheckpointError(
                        f"{path}: layers {before!r} and {layer!r} have one number"
                    )
    except ValueError as error:
        raise CheckpointError(
            f"{path}: a layer is named {error}: expected a name such as conv1d_3 or block3_conv1"
        ) from None
    return arrays


def _creation_order(layer: str) -> tuple[int, int]:
    """Return a key that sorts layers of one kind by creation.

    A Keras 2 file lists layers by depth, which swaps the equal-shaped convolutions of residual
    blocks. Keras numbers automatic names in order of creation; tf.keras 1.13 adds a version
    (``batch_normalization_v1_3``). Names given by `model.build_network` contain the layer's place.
    """
    match = re.fullmatch(r"(?:conv1d|dense|batch_normalization)(?:_v\d+)?(?:_(\d+))?", layer)
    if match:
        return int(match[1] or 0), 0
    match = re.fullmatch(r"(?:block(\d)_)?(\w+?)(?:_bn)?", layer)
    places = ("conv0", *CONVOLUTIONS, *SE, "hidden", "tags")
    if not match or match[2] not in places:
        raise ValueError(repr(layer))
    block = -1 if match[2] == "conv0" else int(match[1] or len(WIDTHS))
    return block, places.index(match[2])


def _infer_config(arrays: dict[str, list], path: Path) -> NetworkConfig:
    """Infer the hyper-parameters from the number of layers and the shapes of the kernels."""
    kernels, denses, _ = ([datasets[0].shape for _, datasets in arrays[kind]] for kind in _KINDS)
    found = [len(layers) for layers in arrays.values()]
    differences = {
        name: sum(abs(a - b) for a, b in zip(found, _count_layers(block), strict=True))
        for name, block in BLOCKS.items()
    }
    name = min(differences, key=differences.get)
    if differences[name]:
        expected = _count_layers(BLOCKS[name])
        raise CheckpointError(
            f"{path}: found {found[0]} convolutions, {found[1]} dense layers and {found[2]} batch "
            f"normalizations: expected {expected[0]}, {expected[1]} and {expected[2]} for a "
            f"network of {name} blocks"
        )
    last_width = kernels[-1][2]
    has_se = BLOCKS[name].has_excitations
    try:
        return NetworkConfig(
            block=name,
            multi=denses[-2][0] != last_width,
            num_tags=denses[-1][1],
            init_features=kernels[0][2],
            # Rounding down has the least effect in the last block, which is the widest.
            alpha=denses[-4][1] / last_width if has_se and last_width else 16.0,
        )
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _count_layers(block: Block) -> tuple[int, int, int]:
    """Return the numbers of convolutions, dense layers and batch normalizations of a network."""
    # Where the width does not change, the shortcut has no convolution.
    times = {"shortcut": len(set(WIDTHS)) - 1}
    num_convolutions, num_dense = (
        sum(times.get(layer, len(WIDTHS)) for layer in block.layers if layer in kind)
        for kind in (CONVOLUTIONS, SE)
    )
    # Besides the blocks: the first convolution and the two dense layers at the end.
    return num_convolutions + 1, num_dense + 2, num_convolutions + 2
