"""The shards of a dataset as files: their folder, their names, and ``manifest.json``."""

import json
import re
from pathlib import Path

from toolkit.data.annotations import SPLITS
from toolkit.errors import ShardError
from toolkit.files import write_atomically

SHARD_FOLDER = "tfrecord"
MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1

_SHARD_NAME = re.compile(r"(train|val|test)-(\d{4,})-of-(\d{4,})(\.seq)?\.tfrecord")


# --- Names ---------------------------------------------------------------------------------------


def shard_name(split: str, shard: int, num_shards: int) -> str:
    """Return the name of a shard, such as ``test-0000-of-0043.seq.tfrecord``."""
    suffix = ".seq.tfrecord" if split == "test" else ".tfrecord"
    return f"{split}-{shard:04d}-of-{num_shards:04d}{suffix}"


def find_shards(folder: Path) -> dict[str, list[Path]]:
    """Find the shards of each split in a folder and check that each set is complete.

    Parameters
    ----------
    folder : Path
        Folder of the shards; other files are ignored.

    Returns
    -------
    dict of str to list of Path
        Shards of each split in order; a split may have none.

    Raises
    ------
    ShardError
        A shard is missing, or shards belong to different sets.
    """
    found = {split: {} for split in SPLITS}
    totals = {split: set() for split in SPLITS}
    for path in folder.glob("*.tfrecord"):
        match = _SHARD_NAME.fullmatch(path.name)
        if not match:
            continue
        split, shard, total, _ = match.groups()
        if path.name != shard_name(split, int(shard), int(total)) or int(shard) >= int(total):
            raise ShardError(
                f"{path}: not the name of a shard, expected a name such as "
                f"{shard_name(split, 0, int(total))}: keep one set of shards or build again"
            )
        found[split][int(shard)] = path
        totals[split].add(int(total))
    for split, paths in found.items():
        if not paths:
            continue
        if len(totals[split]) > 1:
            sizes = " and ".join(f"of {total:04d}" for total in sorted(totals[split]))
            raise ShardError(
                f"{folder}: {split} shards of different sets ({sizes}): keep one set or build again"
            )
        missing = sorted(set(range(totals[split].pop())) - paths.keys())
        if missing:
            raise ShardError(
                f"{folder}: {len(missing)} of the {split} shards missing, the first is "
                f"{missing[0]:04d}: run build_mtt.py again to build the missing shards"
            )
    return {split: [paths[shard] for shard in sorted(paths)] for split, paths in found.items()}


# --- Manifest ------------------------------------------------------------------------------------


def read_manifest(path: str | Path) -> dict:
    """Read ``manifest.json``.

    Parameters
    ----------
    path : str or Path
        The file.

    Returns
    -------
    dict
        ``tags``, ``sample_rate``, ``num_samples`` and, per split, ``clips``, ``segments`` and
        ``shards``; shards that `build_mtt` built also have ``options``, ``skipped`` and
        ``versions``.

    Raises
    ------
    ShardError
        The file is not a manifest of a known format.
    """
    try:
        manifest = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ShardError(f"{path}: not JSON ({error}): build the shards again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise ShardError(f"{path}: not a manifest of format {MANIFEST_FORMAT}")
    missing = {"tags", "sample_rate", "num_samples", "splits"} - manifest.keys()
    if missing:
        raise ShardError(f"{path}: the manifest lacks {', '.join(sorted(missing))}")
    is_valid = (
        isinstance(manifest["tags"], list)
        and all(isinstance(tag, str) for tag in manifest["tags"])
        and all(_is_count(manifest[name]) for name in ("sample_rate", "num_samples"))
    )
    if not is_valid:
        raise ShardError(f"{path}: tags, sample_rate or num_samples are invalid")
    try:
        for split in manifest["splits"].values():
            is_valid &= _is_count(split["clips"]) and _is_count(split["segments"])
            for shard in split["shards"]:
                is_valid &= isinstance(shard["name"], str) and _is_count(shard.get("bytes", 0))
    except (AttributeError, KeyError, TypeError):
        is_valid = False
    if not is_valid:
        raise ShardError(f"{path}: the manifest does not list the shards of the splits")
    return manifest


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def write_manifest(folder: str | Path, manifest: dict) -> None:
    """Write ``manifest.json`` atomically; its format is added."""
    content = json.dumps({"format": MANIFEST_FORMAT} | manifest, indent=1, ensure_ascii=False)
    # File names that are not UTF-8 contain surrogates, which JSON can escape.
    encoded = content.encode(errors="backslashreplace")
    write_atomically(Path(folder) / MANIFEST_NAME, encoded + b"\n")
