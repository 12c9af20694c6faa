"""The table of clips: tags, split and shard of each clip, and checks of its paths.

This module reads MagnaTagATune's ``annotations_final.csv``: tab-separated, quoted, with a
``clip_id`` column, 188 tag columns of 0 and 1, and an ``mp3_path`` column. `toolkit.data.tables`
reads other tables.
"""

import csv
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from toolkit.errors import AnnotationsError, BuildError

import numpy as np

if TYPE_CHECKING:
    import pandas as pd  # imported by the functions that read tables: most scripts read none

ANNOTATIONS_NAME = "annotations_final.csv"
AUDIO_FOLDER = "mp3"
CLIP_ID = "clip_id"
MP3_PATH = "mp3_path"
SPLITS = ("train", "val", "test")
NUM_TAGS = 50

# Order of the 50 outputs of published checkpoints: ascending by count in the original annotations,
# with ties in the order of the published program's unstable sort.
MTT_TOP_TAGS = (
    "choral", "female voice", "metal", "country", "weird", "no voice", "cello", "harp", "beats",
    "female vocal", "male voice", "dance", "new age", "voice", "choir", "classic", "man", "solo",
    "sitar", "soft", "pop", "no vocal", "male vocal", "woman", "flute", "quiet", "loud",
    "harpsichord", "no vocals", "vocals", "singing", "male", "opera", "indian", "female", "synth",
    "vocal", "violin", "beat", "ambient", "piano", "fast", "rock", "electronic", "drums",
    "strings", "techno", "slow", "classical", "guitar",
)  # fmt: skip

# Shares of the clips, as in MagnaTagATune.
SPLIT_SHARES = {"train": 0.75, "val": 0.08, "test": 0.17}
# Limits of `draw_splits`: number of draws, and number of assigned groups in all draws together.
_NUM_DRAWS = 200
_MAX_GROUPS_DRAWN = 50_000

_FOLDER_SPLITS = (
    dict.fromkeys("0123456789ab", "train") | {"c": "val"} | dict.fromkeys("def", "test")
)


def read_mtt(path: str | Path, num_tags: int = NUM_TAGS) -> "tuple[pd.DataFrame, tuple[str, ...]]":
    """Read MagnaTagATune's annotations and keep the clips that carry a top tag.

    Parameters
    ----------
    path : str or Path
        ``annotations_final.csv``.
    num_tags : int
        Number of most frequent tags to keep.

    Returns
    -------
    clips : pd.DataFrame
        One row per clip, in the file's order: one uint8 column per tag, then ``clip_id`` (str),
        ``mp3_path`` (str) and ``split`` ('train', 'val' or 'test').
    tags : tuple of str
        Tags in model order (see `top_tags`).

    Raises
    ------
    AnnotationsError
        The file is missing or invalid; the message names row and column.
    """
    import pandas as pd

    table = _read_table(Path(path))
    tag_columns = [column for column in table.columns if column not in (CLIP_ID, MP3_PATH)]
    labels = _binary_labels(table, tag_columns, path)
    _check_unique(table, path)
    tags = top_tags(labels.sum(axis=0), tag_columns, num_tags)

    columns = [tag_columns.index(tag) for tag in tags]
    clips = pd.DataFrame(labels[:, columns], columns=list(tags))
    clips[CLIP_ID] = table[CLIP_ID]
    clips[MP3_PATH] = table[MP3_PATH]
    clips["split"] = [
        _split_of(mp3_path, row, path) for row, mp3_path in enumerate(table[MP3_PATH])
    ]
    is_tagged = labels[:, columns].any(axis=1)
    if not is_tagged.any():
        raise AnnotationsError(f"{path}: no clip carries a tag: every label is 0")
    return clips[is_tagged].reset_index(drop=True), tags


def top_tags(counts: np.ndarray, names: list[str], num_tags: int = NUM_TAGS) -> tuple[str, ...]:
    """Select the most frequent tags and return them in model order.

    Parameters
    ----------
    counts : np.ndarray [shape=(len(names),)]
        Number of clips that carry each tag.
    names : list of str
        Tags in column order.
    num_tags : int
        Number of tags to select.

    Returns
    -------
    tuple of str
        MagnaTagATune's published order if the selected tags are its top 50; otherwise ascending by
        count, ties in column order.
    """
    ascending = np.argsort(np.asarray(counts), kind="stable")
    chosen = tuple(names[column] for column in ascending[-num_tags:])
    # Some counts in the original annotations are equal. Keep the published 50 tags even if one of
    # them shares the lowest count with another tag.
    cutoff = counts[ascending[-num_tags:][0]]
    count_of = dict(zip(names, counts, strict=True))
    if num_tags == len(MTT_TOP_TAGS) and all(
        count_of.get(tag, -1) >= cutoff for tag in MTT_TOP_TAGS
    ):
        above = {name for name, count in count_of.items() if count > cutoff}
        if above <= set(MTT_TOP_TAGS):
            return MTT_TOP_TAGS
    return chosen


def assign_shards(clips: "pd.DataFrame", num_audios_per_shard: int) -> "pd.DataFrame":
    """Assign the clips of each split to shards at random, as the published program does.

    Parameters
    ----------
    clips : pd.DataFrame
        Rows with a ``split`` column.
    num_audios_per_shard : int
        Clips per shard. The remainder is distributed, so shards have this many or a few more.

    Returns
    -------
    pd.DataFrame
        A copy with a ``shard`` column: the shard's number within its split.
    """
    # NumPy guarantees that RandomState's stream never changes, so the same clips are in the same
    # shards on every machine. The splits use one stream, in this order.
    random = np.random.RandomState(0)
    shards = np.zeros(len(clips), dtype=np.int64)
    for split in SPLITS:
        rows = np.flatnonzero(clips["split"] == split)
        num_shards = max(1, len(rows) // num_audios_per_shard)
        shards[rows] = random.permutation(len(rows)) % num_shards
    return clips.assign(shard=shards)


def draw_splits(sizes: dict[str, int], seed: int) -> dict[str, str]:
    """Assign groups of clips to splits at random, close to `SPLIT_SHARES` of the clips.

    Parameters
    ----------
    sizes : dict of str to int
        Number of clips of each group; at least three groups.
    seed : int
        Seed of the order in which groups are assigned.

    Returns
    -------
    dict of str to str
        Split of each group; equal for equal sizes and seed, in any order of the groups. Every
        split has at least one group.
    """
    num_clips = sum(sizes.values())
    names = sorted(sizes)
    random = np.random.RandomState(seed)  # NumPy guarantees that its stream never changes
    best, smallest_error = {}, np.inf
    # Few groups of different sizes rarely match the shares, so use the best of many draws.
    for _ in range(max(1, min(_NUM_DRAWS, _MAX_GROUPS_DRAWN // len(names)))):
        missing = {split: share * num_clips for split, share in SPLIT_SHARES.items()}
        split_of, empty = {}, list(SPLITS)
        for num_assigned, place in enumerate(random.permutation(len(names))):
            candidates = empty if len(names) - num_assigned <= len(empty) else SPLITS
            split = max(candidates, key=lambda one: missing[one])
            split_of[names[place]] = split
            missing[split] -= sizes[names[place]]
            if split in empty:
                empty.remove(split)
        error = sum(map(abs, missing.values()))
        if error < smallest_error:
            best, smallest_error = split_of, error
    return best


def missing_dataset_message(data_dir: str | Path) -> str:
    """Return an error message that says what to download and where to put it."""
    return (
        f"{data_dir}: no dataset found: download {ANNOTATIONS_NAME} and mp3.zip.001-003 from "
        "mirg.city.ac.uk/codeapps/the-magnatagatune-dataset, put the table into this folder and "
        f"unpack the others (cat mp3.zip.* > mp3_all.zip; unzip mp3_all.zip -d "
        f"{Path(data_dir) / AUDIO_FOLDER})"
    )


def hash_tables(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of a table's bytes, or of the names and hashes of several tables."""
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    if len(paths) == 1:
        return hashes[0]
    # Names of several tables may determine the split.
    lines = [f"{path.name} {digest}\n" for path, digest in zip(paths, hashes, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# --- Paths of audio files ------------------------------------------------------------------------


def is_inside(path: str) -> bool:
    """Return whether a path in a table names a file inside the audio folder."""
    parts = PurePosixPath(path).parts
    leaves_folder = not parts or path.startswith("/") or ".." in parts or "\\" in path
    return not leaves_folder and not re.search(r"[\x00-\x1f]", path)


def with_suffix(paths: Iterable[str], suffix: str) -> list[str]:
    """Replace the file name extension of each path, for example with ``.low.mp3``.

    Raises
    ------
    BuildError
        A path becomes invalid, or two paths become equal.
    """
    changed = []
    for path in paths:
        other = str(PurePosixPath(path).with_suffix("")) + suffix
        if not is_inside(other):
            raise BuildError(
                f"--audio-suffix {suffix!r}: {path} becomes {other!r}, which is not a path inside "
                "the audio folder"
            )
        changed.append(other)
    if len(set(changed)) < len(changed):
        first = next(path for path in changed if changed.count(path) > 1)
        raise BuildError(f"--audio-suffix {suffix!r}: two clips become {first}")
    return changed


def check_links(
    paths: Iterable[str], names: Iterable[str], audio_dir: Path, tables: Sequence[Path]
) -> None:
    """Check that no symbolic link leads out of the audio folder; the folder itself may be a link.

    Parameters
    ----------
    paths : iterable of str
        Paths of the clips, relative to `audio_dir`.
    names : iterable of str
        The same paths as written in the tables, for errors.
    audio_dir : Path
        Audio folder.
    tables : sequence of Path
        Tables that contain the names.

    Raises
    ------
    AnnotationsError
        A link leads out; the message names row and column.
    """
    inside = os.path.realpath(audio_dir)
    resolve_folder = cache(os.path.realpath)
    for path, name in zip(paths, names, strict=True):
        place = audio_dir / path
        target = Path(resolve_folder(place.parent), place.name)
        if os.path.islink(target):
            target = Path(os.path.realpath(target))
        if not target.is_relative_to(inside):
            raise AnnotationsError(
                f"{_find_in(tables, name)}: a link leads from {path} out of {audio_dir}, to "
                f"{target}: replace the link with the file"
            )


def _find_in(tables: Sequence[Path], value: str) -> str:
    """Return the table, row and column of a value."""
    for table in tables:
        for delimiter in "\t,;":
            with open(table, encoding="utf-8-sig", newline="") as file:
                rows = list(csv.reader(file, delimiter=delimiter))
            for number, row in enumerate(rows, start=1):
                if value in row:
                    return f"{table}: row {number}, column {rows[0][row.index(value)]!r}"
    return str(tables[0])


# --- Reading annotations_final.csv ---------------------------------------------------------------


def _read_table(path: Path) -> "pd.DataFrame":
    import pandas as pd

    form = {
        "sep": "\t", "dtype": str, "keep_default_na": False, "quoting": csv.QUOTE_MINIMAL,
        "encoding": "utf-8-sig",
    }  # fmt: skip
    try:
        table = pd.read_csv(path, **form)
        header = pd.read_csv(path, header=None, nrows=1, **form).iloc[0]
    except FileNotFoundError:
        raise AnnotationsError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise AnnotationsError(f"{path}: is a folder, not a table") from None
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        reason = str(error).strip().splitlines()[0]
        raise AnnotationsError(f"{path}: not a tab-separated UTF-8 table: {reason}") from None
    if len(table.columns) == 1 and "," in table.columns[0]:
        raise AnnotationsError(f"{path}: fields are separated by commas: expected tabs")
    for column in (CLIP_ID, MP3_PATH):
        if column not in table.columns:
            raise AnnotationsError(
                f"{path}: no column {column!r}: found {len(table.columns)} columns, the first "
                f"{table.columns[0][:40]!r}; expected {CLIP_ID!r}, one column per tag, {MP3_PATH!r}"
            )
    # pandas renames the second of two columns with the same name. The columns split and shard,
    # which the toolkit adds, would replace tags with these names.
    repeated = [*header[header.duplicated()], *({"split", "shard"} & set(header))]
    if repeated:
        raise AnnotationsError(
            f"{path}: row 1, column {repeated[0]!r}: this name is reserved or appears "
            "twice; rename the column"
        )
    if len(table.columns) < 3:
        raise AnnotationsError(f"{path}: no tag columns between {CLIP_ID!r} and {MP3_PATH!r}")
    if table.empty:
        raise AnnotationsError(f"{path}: the table has no rows")
    return table


def _binary_labels(table: "pd.DataFrame", tag_columns: list[str], path: str | Path) -> np.ndarray:
    values = table[tag_columns].to_numpy(dtype=str)  # (num_clips, num_columns)
    is_binary = np.isin(values, ("0", "1"))
    if not is_binary.all():
        row, column = np.argwhere(~is_binary)[0]
        raise AnnotationsError(
            f"{path}: row {row + 2}, column {tag_columns[column]!r}: found "
            f"{str(values[row, column])!r}, expected 0 or 1"
        )
    return (values == "1").astype(np.uint8)


def _check_unique(table: "pd.DataFrame", path: str | Path) -> None:
    is_unnamed = (table[CLIP_ID] == "").to_numpy()
    if is_unnamed.any():
        row = int(np.flatnonzero(is_unnamed)[0])
        raise AnnotationsError(f"{path}: row {row + 2}, column {CLIP_ID!r}: the field is empty")
    for column in (CLIP_ID, MP3_PATH):
        is_repeated = table[column].duplicated().to_numpy()
        if is_repeated.any():
            row = int(np.flatnonzero(is_repeated)[0])
            value = table[column].iloc[row]
            raise AnnotationsError(
                f"{path}: row {row + 2}, column {column!r}: {value!r} is also in an earlier row; "
                "each clip must have one row"
            )


def _split_of(mp3_path: str, row: int, path: str | Path) -> str:
    parts = PurePosixPath(mp3_path).parts
    if not is_inside(mp3_path):
        raise AnnotationsError(
            f"{path}: row {row + 2}, column {MP3_PATH!r}: {mp3_path!r} is not a path inside mp3/"
        )
    if len(parts) < 2 or parts[0] not in _FOLDER_SPLITS:
        raise AnnotationsError(
            f"{path}: row {row + 2}, column {MP3_PATH!r}: {mp3_path!r} is not in one of the "
            "folders 0 to f, which determine the split"
        )
    return _FOLDER_SPLITS[parts[0]]
