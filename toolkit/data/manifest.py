"""The files of a dataset: names of shards, ``manifest.json``, and the progress of a build.

A build writes one small file per finished shard to ``.progress/`` and gathers them into the
manifest at the end, so that an interrupted build can be resumed.
"""

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from toolkit.data.annotations import CLIP_ID, MP3_PATH, SPLITS
from toolkit.data.csv_file import listed
from toolkit.errors import BuildError, ShardError, UsageError
from toolkit.files import exists, write_atomically

SHARD_FOLDER = "tfrecord"
MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1

_PROGRESS_FOLDER = ".progress"
_OPTIONS_NAME = "options.json"

# Numbers above 9,999 have more than four digits.
_SHARD_NAME = re.compile(r"(train|val|test)-(\d{4,})-of-(\d{4,})(\.seq)?\.tfrecord")


# --- Names ---------------------------------------------------------------------------------------


def shard_name(split: str, shard: int, num_shards: int) -> str:
    """Return the name of a shard, such as ``test-0000-of-0043.seq.tfrecord``."""
    # Names as in the published program, whose shards are read, too.
    suffix = ".seq.tfrecord" if split == "test" else ".tfrecord"
    return f"{split}-{shard:04d}-of-{num_shards:04d}{suffix}"


def check_data_dir(data_dir: str | Path) -> None:
    """Check that a folder is not that of the shards, which is inside a dataset's folder.

    Raises
    ------
    UsageError
        The folder itself contains shards, or is a file.
    """
    data_dir = Path(data_dir)
    if not exists(data_dir):
        return
    if not data_dir.is_dir():
        raise UsageError(f"--data-dir {data_dir}: not a folder")
    if any(map(_SHARD_NAME.fullmatch, os.listdir(data_dir))):
        raise UsageError(
            f"--data-dir {data_dir}: contains the shards themselves: give the folder above, "
            f"--data-dir {data_dir.absolute().parent}"
        )


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
        A shard is missing, or the shards belong to different sets.
    """
    found = {split: {} for split in SPLITS}
    totals = {split: set() for split in SPLITS}
    for path in folder.iterdir():  # raises an error without permission; glob returns nothing
        match = _SHARD_NAME.fullmatch(path.name)
        if not match:
            continue
        split, shard, total, _ = match.groups()
        # The pattern also matches "train-00001-of-0002", a second file for shard 1, and test shards
        # without ".seq", which would be decoded as another message.
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
                f"{folder}: {len(missing)} of the {split} shards are missing, the first is "
                f"{missing[0]:04d}: run build_mtt.py again to build the missing shards"
            )
    return {split: [paths[shard] for shard in sorted(paths)] for split, paths in found.items()}


# --- Manifest ------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        what_to_do = f"delete {path.parent} and build the shards again"
        raise ShardError(f"{path}: not a JSON object ({error}): {what_to_do}") from None


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
        ``shards``. Manifests that ``build_mtt.py`` writes also contain ``options``, ``skipped``
        and ``versions``.

    Raises
    ------
    ShardError
        The file is not a manifest of a known format.
    """
    manifest = _read_json(Path(path))
    if manifest.get("format") != MANIFEST_FORMAT:
        raise ShardError(
            f"{path}: not a manifest of format {MANIFEST_FORMAT}: build the shards again"
        )
    missing = {"tags", "sample_rate", "num_samples", "splits"} - manifest.keys()
    if missing:
        names = ", ".join(sorted(missing))
        raise ShardError(f"{path}: the manifest lacks {names}: build the shards again")
    # A damaged manifest must be refused here: later code relies on these types.
    is_valid = (
        isinstance(manifest["tags"], list)
        and all(isinstance(tag, str) for tag in manifest["tags"])
        and all(_is_count(manifest[name]) for name in ("sample_rate", "num_samples"))
    )
    if not is_valid:
        raise ShardError(
            f"{path}: tags, sample_rate or num_samples are invalid: build the shards again"
        )
    try:
        for split in manifest["splits"].values():
            is_valid &= _is_count(split["clips"]) and _is_count(split["segments"])
            for shard in split["shards"]:
                # Earlier versions did not record "bytes".
                is_valid &= isinstance(shard["name"], str) and _is_count(shard.get("bytes", 0))
        for row in manifest.get("skipped", ()):
            is_valid &= all(isinstance(row[name], str) for name in (CLIP_ID, MP3_PATH, "reason"))
        is_valid &= isinstance(manifest.get("options", {}).get("audio_dir", ""), str)
    except (AttributeError, KeyError, TypeError):
        is_valid = False
    if not is_valid:
        raise ShardError(
            f"{path}: invalid splits, skipped clips or options: build the shards again"
        )
    return manifest


def read_build(data_dir: Path) -> dict:
    """Return the manifest of a dataset; empty for shards of the published program."""
    path = data_dir / SHARD_FOLDER / MANIFEST_NAME
    return read_manifest(path) if path.exists() else {}


def _is_count(value: object) -> bool:
    # JSON's true is an int in Python.
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def gather(tasks: Sequence, done: dict[str, dict], recorded: dict) -> dict:
    """Gather the entries of all shards into a manifest.

    Parameters
    ----------
    tasks : sequence of shards.ShardTask
        All shards in order.
    done : dict of str to dict
        Entry of each shard by name (see `shards.make_shard`).
    recorded : dict
        Tags, and options that determine the content of the shards.
    """
    options = dict(recorded)
    tags = options.pop("tags")
    splits = {split: {"clips": 0, "segments": 0, "shards": []} for split in SPLITS}
    skipped = []
    for task in tasks:
        entry = dict(done[task.path.name])
        skipped += entry.pop("skipped")
        split = splits[task.split]
        split["shards"].append(entry)
        split["clips"] += entry["clips"]
        split["segments"] += entry["segments"]
    return {
        "tags": tags,
        "sample_rate": options["sample_rate"],
        "num_samples": options["num_samples"],
        "splits": splits,
        "skipped": skipped,
        "options": options,
        # The samples can depend on these: FFmpeg's decoders of Vorbis and AAC differ between
        # releases.
        "versions": {"python": platform.python_version()} | _versions("av", "numpy", "madmom"),
    }


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_manifest(folder: str | Path, manifest: dict) -> None:
    """Write ``manifest.json`` atomically; the number of the format is added."""
    content = json.dumps({"format": MANIFEST_FORMAT} | manifest, indent=1, ensure_ascii=False)
    write_atomically(Path(folder) / MANIFEST_NAME, _encode(content + "\n"))


def _encode(content: str) -> bytes:
    # File names that are not UTF-8 contain surrogates, which JSON can escape.
    return content.encode(errors="backslashreplace")


# --- Progress of a build -------------------------------------------------------------------------


def hash_tables(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of a table's bytes, or of the names and hashes of several tables."""
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    # The first versions recorded this hash.
    if len(paths) == 1:
        return hashes[0]
    # Names of several tables may determine the split.
    return hash_lines(f"{path.name} {digest}" for path, digest in zip(paths, hashes, strict=True))


def hash_lines(lines: Iterable[str]) -> str:
    """Return the SHA-256 of lines."""
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def check_options(folder: Path, options: dict, unrecorded: dict, tables: list[Path]) -> dict:
    """Check that the shards in a folder were built with the same options.

    ``audio_dir`` may differ, because shards depend on the audio files and not on their place.

    Parameters
    ----------
    folder : Path
        Folder of the shards, which may be empty.
    options : dict
        Options of this build that determine the shards, the tags, and ``clips_sha256``
        (see `clip.ClipTable.sha256`). Tags from folders also have ``files``, after the hash.
    unrecorded : dict
        Values of the options that builds of earlier versions did not record.
    tables : list of Path
        Tables of this build, for errors.

    Returns
    -------
    dict
        Options of the earlier build; empty if there is none.

    Raises
    ------
    BuildError
        An option differs, or the tables have changed or are read differently.
    """
    # An interrupted build recorded its options here, a finished one in the manifest.
    path = folder / _PROGRESS_FOLDER / _OPTIONS_NAME
    if path.exists():
        earlier = _read_json(path)
    elif (folder / MANIFEST_NAME).exists():
        manifest = read_manifest(folder / MANIFEST_NAME)
        earlier = {"tags": manifest["tags"]} | manifest.get("options", {})
    else:
        return {}
    earlier = unrecorded | earlier
    # Builds of earlier versions recorded no hash, and the tags only in the manifest.
    expected = {name: options[name] for name in ("tags", "clips_sha256")} | earlier
    for name, value in options.items():
        if name == "audio_dir" or expected.get(name) == value:
            continue
        if name in ("tags", "clips_sha256"):
            what = "this version of the toolkit reads the tables differently"
            raise another_build(folder, what, "use the other version")
        if name != "annotations_sha256":
            what = changed_option(name, expected.get(name), value)
        elif "files" in options:
            changed = set(options["files"]) ^ set(earlier["files"])
            what = f"new or missing audio files: {listed(sorted(changed))}"
            raise another_build(folder, what, "use the same files")
        elif len(tables) == 1:
            what = f"{tables[0].name} has changed since"
        else:
            what = "the tables or their order have changed since"
        raise another_build(folder, what)
    return earlier


def changed_option(name: str, was: object, value: object) -> str:
    """Describe a changed option, such as ``--stop was 29, now none``."""
    return f"--{name.replace('_', '-')} was {as_typed(was)}, now {as_typed(value)}"


def another_build(folder: Path, what: str, instead: str = "use the same options") -> BuildError:
    """Return the error for a folder with shards of another build; `what` says what differs."""
    return BuildError(
        f"{folder}: contains shards of another build: {what}: {instead}, or delete this folder to "
        "build from scratch"
    )


def as_typed(value: object) -> str:
    """Format the value of an option as on the command line."""
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return " ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def start_progress(folder: Path, options: dict) -> None:
    """Record the options of a build, before its first shard."""
    # Otherwise the shards of a killed build could be mixed with those of other options.
    (folder / _PROGRESS_FOLDER).mkdir(exist_ok=True)
    write_atomically(folder / _PROGRESS_FOLDER / _OPTIONS_NAME, json.dumps(options).encode())


def write_progress(folder: Path, entry: dict) -> None:
    """Record a finished shard by its entry (see `shards.make_shard`)."""
    content = json.dumps(entry, ensure_ascii=False)
    write_atomically(folder / _PROGRESS_FOLDER / f"{entry['name']}.json", _encode(content))


def read_progress(folder: Path, shard_of: dict[str, str]) -> dict[str, dict]:
    """Read the entries of shards that an earlier run finished.

    Parameters
    ----------
    folder : Path
        Folder of the shards.
    shard_of : dict of str to str
        Name of the shard of each clip_id, for the skipped clips of a manifest.

    Returns
    -------
    dict of str to dict
        Entry of each finished shard by name (see `shards.make_shard`).
    """
    entries = {}
    if (folder / MANIFEST_NAME).exists():
        manifest = read_manifest(folder / MANIFEST_NAME)
        for split in manifest["splits"].values():
            for entry in split["shards"]:
                # `gather` has moved the skipped clips of all shards into one list.
                entries[entry["name"]] = entry | {"skipped": []}
        for row in manifest["skipped"]:
            name = shard_of.get(row["clip_id"])  # None if the tables are read differently now
            if name in entries:
                entries[name]["skipped"].append(row)
    # Newer than the manifest: shards that an interrupted build has built again.
    progress = folder / _PROGRESS_FOLDER
    # Without its options, it is not known what was built.
    for path in progress.glob("*.tfrecord.json") if (progress / _OPTIONS_NAME).exists() else ():
        entry = _read_json(path)
        entries[entry["name"]] = entry
    return entries


def remove_progress(folder: Path) -> None:
    """Remove the progress of a build whose manifest is written."""
    shutil.rmtree(folder / _PROGRESS_FOLDER)
