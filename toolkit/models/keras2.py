"""Load published checkpoints (Keras 2 ``.hdf5`` files) and weights in Keras 3's ``.h5`` files.

Only names and arrays are read. The network is inferred from the shapes of the arrays, and layers
are matched by the order in which they were created.
"""

import re
from pathlib import Path

from toolkit.errors import CheckpointError, UsageError
from toolkit.models.config import NetworkConfig
from toolkit.models.hdf5 import assign, check_sizes, list_arrays, open_hdf5

# The kinds of layers with weights, and the arrays of each in Keras's order.
_KINDS = {
    "convolution": ("kernel", "bias"),
    "dense": ("kernel", "bias"),
    "batch normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
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
        for kind, layers in _layers_by_kind(network).items():
            # _infer_config has checked the number of layers, assign checks the shapes.
            for layer, (name, datasets) in zip(layers, arrays[kind], strict=True):
                for variable, dataset in zip(layer.weights, datasets, strict=True):
                    assign(variable, dataset, name, path)
    return network, config


def _layer_arrays(datasets: dict, path: Path) -> dict[str, list]:
    """Group the arrays of a file by layer, each kind of layer in order of creation."""
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
                f"{path}: layer {layer!r} contains {found}: expected a one-dimensional "
                "convolution, a dense layer or a batch normalization"
            )
        arrays[kind].append((layer, [weights[name] for name in _KINDS[kind]]))
    for kind, found in arrays.items():
        try:
            found.sort(key=lambda entry: _creation_order(entry[0]))
        except ValueError as error:
            raise CheckpointError(
                f"{path}: a {kind} layer is named {error}: expected a name such as conv1d_3 or "
                "block3_conv1"
            ) from None
    return arrays


def _creation_order(layer: str) -> tuple:
    """Return a key that sorts layers by creation.

    A Keras 2 file lists layers by depth, which swaps the equal-shaped convolutions of residual
    blocks. Keras numbers automatic names in order of creation. Names given by `model.build_network`
    contain the layer's place; in a residual block the shortcut is created first.
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


def _infer_config(arrays: dict[str, list], path: Path) -> NetworkConfig:
    """Infer the hyper-parameters from the shapes of the kernels."""
    from model import NUM_BLOCKS

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
    # In the third and the ninth block the width changes, so the shortcut is a convolution.
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
            # Rounding down has the least effect in the last block, which is the widest.
            alpha=denses[-4][1] / last_width if has_se and last_width else 16.0,
        )
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}") from None
