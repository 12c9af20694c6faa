"""What a result was computed from. All reports, tables and figures carry this."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import toolkit
from toolkit.models import checkpoints


@dataclass(frozen=True)
class Provenance:
    """What a result was computed from. Paths are those that the user gave.

    Attributes
    ----------
    model : str
        Name of the model (see `model_names`).
    checkpoint : str
        Path of the model file.
    dataset : str
        Path of the dataset, or of the tagged audio file.
    tags_sha256 : str
        Hash of the tags in the order of the outputs.
    num_clips : int or None
        Number of clips; None if it is unknown.
    test_sha256 : str or None
        Hash of the test shards (see `input_data.hash_dataset`); None for other data.
    toolkit : str
        Version of the toolkit.
    """

    model: str
    checkpoint: str
    dataset: str
    tags_sha256: str
    num_clips: int | None
    test_sha256: str | None
    toolkit: str = toolkit.__version__

    def to_json(self) -> dict:
        """Return the fields as a JSON-serialisable dict."""
        return asdict(self)


def describe(
    model_path: str | Path,
    dataset: str | Path,
    tags: Sequence[str],
    num_clips: int | None = None,
    test_sha256: str | None = None,
    name: str | None = None,
) -> Provenance:
    """Describe a result.

    Parameters
    ----------
    model_path : str or Path
        Model file, or a stage's folder, whose best checkpoint was used.
    dataset : str or Path
        Path of the dataset, or of the tagged audio file.
    tags : sequence of str
        Names of the tags, in the model's order.
    num_clips, test_sha256
        As in `Provenance`.
    name : str or None
        Name of the model; None for that of `model_names`.
    """
    checkpoint = Path(model_path)
    if checkpoint.is_dir():
        checkpoint = checkpoints.find_best(checkpoint) or checkpoint
    digest = hashlib.sha256(json.dumps(list(tags)).encode()).hexdigest()
    name = name or model_names([model_path])[0]
    paths = as_text(checkpoint), as_text(dataset)
    return Provenance(name, *paths, digest, num_clips, test_sha256)


def model_names(paths: Sequence[str | Path]) -> list[str]:
    """Name models by the last parts of their paths, with as many parts as make the names unique.

    The folder of a stage or a seed is a number, so its parent is always part of the name: ``log/1``
    is ``log-1``, and ``se/seed-0/4`` is ``se-seed-0-4``.
    A name is also the name of a folder in a report, and contains no slashes or ``..``.
    """
    parts = {}
    for path in paths:
        absolute = Path(os.path.normpath(Path(path).absolute()))
        if absolute.suffix in (".keras", ".hdf5", ".h5"):
            absolute = absolute.with_suffix("")
        # As text here: bytes that are not UTF-8 become equal.
        parts[path] = tuple(map(as_text, absolute.parts[1:])) or ("root",)
    lengths = {}
    for path, part in parts.items():
        is_number = [re.fullmatch(r"(seed-)?\d+", name) is not None for name in part]
        lengths[path] = [*is_number[::-1], False].index(False) + 1
    while True:
        names = {path: "-".join(part[-lengths[path] :]) for path, part in parts.items()}
        taken = Counter(names.values())
        longer = {
            path: lengths[path] + (taken[names[path]] > 1 and lengths[path] < len(part))
            for path, part in parts.items()
        }
        if longer == lengths:
            break
        lengths = longer
    result = []
    for path in paths:
        repeats = result.count(names[path])  # the same model is given twice
        result.append(names[path] + (f"-{len(result) + 1}" if repeats else ""))
    return result


def as_text(path: str | Path) -> str:
    """Return a path as valid text, even if its bytes are not UTF-8."""
    return os.fsencode(path).decode(errors="replace")
