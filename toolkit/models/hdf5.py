"""Read HDF5 files from untrusted sources: arrays only, with limits on sizes, and no links.

The checks run before an array is read. They do not protect against bugs of the HDF5 library itself
(docs/reliability.md).
"""

import io
import math
import struct
import zipfile
from pathlib import Path

from toolkit.blocks import WIDTHS
from toolkit.errors import CheckpointError
from toolkit.models.config import NetworkConfig

import numpy as np

# Far beyond what networks need: the largest array of a published network has 17 MB, and the
# golden checkpoints contain up to 506 groups and arrays, nested 4 deep.
_MAX_ARRAY_BYTES = 2**31
_MAX_OBJECTS = 100_000
_MAX_DEPTH = 16

# Exceptions that zipfile, json and h5py raise on damaged files.
DAMAGE = (zipfile.BadZipFile, struct.error, OSError, EOFError, KeyError)
DAMAGE += (RuntimeError, ValueError, TypeError, OverflowError)


def open_hdf5(path: Path, content: bytes | None = None):
    """Open an HDF5 file for reading.

    Parameters
    ----------
    path : Path
        File to open, or to name in errors.
    content : bytes or None
        Content to read instead of the file's.

    Returns
    -------
    h5py.File

    Raises
    ------
    CheckpointError
        The file is damaged.
    """
    import h5py

    try:
        return h5py.File(path if content is None else io.BytesIO(content), "r")
    except DAMAGE as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None


def list_arrays(file, path: str | Path) -> dict:
    """Check the arrays of an open file; return them by their path in the file.

    Raises
    ------
    CheckpointError
        The file is damaged, contains links or external arrays, or declares more than it stores.
    """
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
                # Without opening the target, which may be another file.
                link = group.get(name, getlink=True)
                # Hard links can form cycles: a group may contain itself.
                if num_objects > _MAX_OBJECTS or prefix.count("/") > _MAX_DEPTH:
                    raise CheckpointError(
                        f"{path}: more than {_MAX_OBJECTS:,} objects, or groups nested too deeply"
                    )
                if not isinstance(link, h5py.HardLink):
                    raise CheckpointError(
                        f"{path}: {prefix}{name} is a link: links are not allowed"
                    )
                found = group[name]
                if isinstance(found, h5py.Group):
                    groups.append((f"{prefix}{name}/", found))
                elif isinstance(found, h5py.Dataset):
                    num_bytes += _check_dataset(found, f"{prefix}{name}", path)
                    datasets[f"{prefix}{name}"] = found
                else:
                    raise CheckpointError(f"{path}: {prefix}{name} is neither an array nor a group")
        file_size = file.id.get_filesize()
    except DAMAGE as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    # Hard links can list one array many times.
    if num_bytes > file_size:
        raise CheckpointError(
            f"{path}: declares arrays of {num_bytes} bytes, but has only {file_size}"
        )
    return datasets


def _check_dataset(dataset, name: str, path: str | Path) -> int:
    if dataset.external or dataset.is_virtual:
        raise CheckpointError(f"{path}: {name} is stored in another file: not allowed")
    if dataset.shape is None:
        raise CheckpointError(f"{path}: {name} is empty")
    size = math.prod(dataset.shape) * dataset.dtype.itemsize
    # Keras stores arrays uncompressed, so the declared size must be the stored size.
    if size > _MAX_ARRAY_BYTES or size != dataset.id.get_storage_size():
        raise CheckpointError(
            f"{path}: {name} declares {size} bytes and stores {dataset.id.get_storage_size()}"
        )
    if dataset.chunks is not None:  # chunks can have filters, which HDF5 loads as plug-ins
        raise CheckpointError(f"{path}: {name} is stored in chunks: expected contiguous storage")
    return size


def assign(variable, dataset, name: str, path: str | Path) -> None:
    """Assign an array of a file to a Keras variable.

    Parameters
    ----------
    variable : keras.Variable
        Variable to set.
    dataset : h5py.Dataset or None
        Array to assign; None if the file does not contain the array.
    name : str
        Name for errors.
    path : str or Path
        File for errors.

    Raises
    ------
    CheckpointError
        The array is missing, has another shape, or contains NaN or infinity.
    """
    if dataset is None:
        raise CheckpointError(f"{path}: no array for {name}")
    if tuple(dataset.shape) != tuple(variable.shape):
        raise CheckpointError(
            f"{path}: {name} has shape {tuple(dataset.shape)}: expected {tuple(variable.shape)}"
        )
    # NumPy would convert strings of digits, and drop imaginary parts with only a warning.
    if dataset.dtype.kind not in "fiu":
        raise CheckpointError(f"{path}: {name} has type {dataset.dtype}: expected numbers")
    try:
        values = dataset[()]
    except DAMAGE as error:
        raise CheckpointError(f"{path}: {name}: damaged: {error}") from None
    if not np.isfinite(values).all():
        raise CheckpointError(f"{path}: {name} contains NaN or infinity")
    variable.assign(values)


def check_sizes(config: NetworkConfig, datasets: dict, path: Path) -> None:
    """Check that a file stores enough numbers for the network that the file declares.

    Otherwise a small file could cause the allocation of a large network.

    Raises
    ------
    CheckpointError
        The file is too small for the network.
    """
    # A lower bound: the largest kernels of the last block, and the output layer.
    # A kernel has 3 * (width / 2) * width numbers: the input of the last block is half as wide.
    width = WIDTHS[-1] * config.init_features
    num_numbers = 1.5 * width**2 + width * config.num_tags
    if config.has_excitations:
        num_numbers += width * int(width * config.alpha) * 2
    num_stored = sum(dataset.size for dataset in datasets.values())
    if num_numbers > num_stored:
        raise CheckpointError(
            f"{path}: stores {num_stored} numbers, but a network of {config.init_features} "
            f"features, alpha {config.alpha:g} and {config.num_tags} tags has more "
            f"than {num_numbers:.0f}"
        )
