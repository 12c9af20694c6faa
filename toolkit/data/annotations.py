"""The table of clips: which clip carries which tags, and the split and shard it belongs to.

The format read here is MagnaTagATune's ``annotations_final.csv``: tab-separated, quoted, a
``clip_id`` column, 188 tag columns of 0 and 1, and an ``mp3_path`` column.
"""

import csv
import re
from pathlib import Path, PurePosixPath

from toolkit.errors import AnnotationsError

import numpy as np
import pandas as pd

ANNOTATIONS_NAME = "annotations_final.csv"
CLIP_ID = "clip_id"
MP3_PATH = "mp3_path"
SPLITS = ("train", "val", "test")
NUM_TAGS = 50

# The order is a contract: published checkpoints give their 50 outputs in it. It is ascending by
# count in the original annotations, as the published program's sort happened to break ties.
MTT_TOP_TAGS = (
    "choral", "female voice", "metal", "country", "weird", "no voice", "cello", "harp", "beats",
    "female vocal", "male voice", "dance", "new age", "voice", "choir", "classic", "man", "solo",
    "sitar", "soft", "pop", "no vocal", "male vocal", "woman", "flute", "quiet", "loud",
    "harpsichord", "no vocals", "vocals", "singing", "male", "opera", "indian", "female", "synth",
    "vocal", "violin", "beat", "ambient", "piano", "fast", "rock", "electronic", "drums",
    "strings", "techno", "slow", "classical", "guitar",
)  # fmt: skip

_FOLDER_SPLITS = (
    dict.fromkeys("0123456789ab", "train") | {"c": "val"} | dict.fromkeys("def", "test")
)


def read_mtt(path: str | Path, num_tags: int = NUM_TAGS) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Read MagnaTagATune's annotations and keep the clips that carry a top tag.

    Parameters
    ----------
    path : str or Path
        ``annotations_final.csv``.
    num_tags : int
        How many of the most frequent tags to keep.

    Returns
    -------
    table : pd.DataFrame
        One row a clip, in the file's order: one uint8 column a tag, then ``clip_id`` (str),
        ``mp3_path`` (str) and ``split`` ('train', 'val' or 'test').
    tags : tuple of str
        The tags in model order (see `top_tags`).

    Raises
    ------
    AnnotationsError
        The file is missing or not in MagnaTagATune's form; the message names row and column.
    """
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
    """Choose the most frequent tags and put them in model order.

    Parameters
    ----------
    counts : np.ndarray [shape=(len(names),)]
        Number of clips that carry each tag.
    names : list of str
        Tags in column order.
    num_tags : int
        How many to keep.

    Returns
    -------
    tuple of str
        MagnaTagATune's published order where the chosen tags are its top 50; otherwise ascending
        by count, ties in column order.
    """
    ascending = np.argsort(np.asarray(counts), kind="stable")
    chosen = tuple(names[column] for column in ascending[-num_tags:])
    # Real counts tie, and ties were broken by a sort that no later NumPy repeats. A tie at the
    # last place must not push out one of the published 50 either.
    cutoff = counts[ascending[-num_tags:][0]]
    count_of = dict(zip(names, counts, strict=True))
    if num_tags == len(MTT_TOP_TAGS) and all(
        count_of.get(tag, -1) >= cutoff for tag in MTT_TOP_TAGS
    ):
        above = {name for name, count in count_of.items() if count > cutoff}
        if above <= set(MTT_TOP_TAGS):
            return MTT_TOP_TAGS
    return chosen


def assign_shards(clips: pd.DataFrame, num_audios_per_shard: int) -> pd.DataFrame:
    """Deal each split's clips to shards at random, as the published program does.

    Parameters
    ----------
    clips : pd.DataFrame
        Rows with a ``split`` column.
    num_audios_per_shard : int
        Clips a shard; the remainder is spread, so shards hold this many or a few more.

    Returns
    -------
    pd.DataFrame
        A copy with a ``shard`` column: the shard's number within its split.
    """
    # NumPy promises that RandomState's stream never changes: the same clips go to the same
    # shards on any machine and in any year. One stream serves the splits in this order.
    random = np.random.RandomState(0)
    shards = np.zeros(len(clips), dtype=np.int64)
    for split in SPLITS:
        rows = np.flatnonzero(clips["split"] == split)
        num_shards = max(1, len(rows) // num_audios_per_shard)
        shards[rows] = random.permutation(len(rows)) % num_shards
    return clips.assign(shard=shards)


def missing_dataset_message(data_dir: str | Path) -> str:
    """Say what to download, from where, and where to put it."""
    return (
        f"{data_dir}: no dataset here: download {ANNOTATIONS_NAME} and mp3.zip.001-003 from "
        "mirg.city.ac.uk/codeapps/the-magnatagatune-dataset, put the first here and unpack the "
        f"others to {Path(data_dir) / 'mp3'} (cat mp3.zip.* > mp3_all.zip; unzip mp3_all.zip)"
    )


def _read_table(path: Path) -> pd.DataFrame:
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
                f"{table.columns[0][:40]!r}; expected {CLIP_ID!r}, one column a tag, {MP3_PATH!r}"
            )
    # pandas renames the second of two like-named columns; a split's column would replace a tag's.
    repeated = [*header[header.duplicated()], *({"split", "shard"} & set(header))]
    if repeated:
        raise AnnotationsError(
            f"{path}: row 1, column {repeated[0]!r}: the name is taken; rename this column"
        )
    if len(table.columns) < 3:
        raise AnnotationsError(f"{path}: no tag columns between {CLIP_ID!r} and {MP3_PATH!r}")
    if table.empty:
        raise AnnotationsError(f"{path}: the table has no rows")
    return table


def _binary_labels(table: pd.DataFrame, tag_columns: list[str], path: str | Path) -> np.ndarray:
    values = table[tag_columns].to_numpy(dtype=str)  # (num_clips, num_columns)
    is_binary = np.isin(values, ("0", "1"))
    if not is_binary.all():
        row, column = np.argwhere(~is_binary)[0]
        raise AnnotationsError(
            f"{path}: row {row + 2}, column {tag_columns[column]!r}: found "
            f"{str(values[row, column])!r}, expected 0 or 1"
        )
    return (values == "1").astype(np.uint8)


def _check_unique(table: pd.DataFrame, path: str | Path) -> None:
    is_unnamed = (table[CLIP_ID] == "").to_numpy()
    if is_unnamed.any():
        row = int(np.flatnonzero(is_unnamed)[0])
        raise AnnotationsError(f"{path}: row {row + 2}, column {CLIP_ID!r}: found nothing")
    for column in (CLIP_ID, MP3_PATH):
        is_repeated = table[column].duplicated().to_numpy()
        if is_repeated.any():
            row = int(np.flatnonzero(is_repeated)[0])
            value = table[column].iloc[row]
            raise AnnotationsError(
                f"{path}: row {row + 2}, column {column!r}: {value!r} stands in an earlier row "
                "too; each clip must have one row"
            )


def is_inside(path: str) -> bool:
    """Tell whether a path of a table names a file inside the folder of the audio."""
    parts = PurePosixPath(path).parts
    leaves_folder = not parts or path.startswith("/") or ".." in parts or "\\" in path
    return not leaves_folder and not re.search(r"[\x00-\x1f]", path)


def _split_of(mp3_path: str, row: int, path: str | Path) -> str:
    parts = PurePosixPath(mp3_path).parts
    if not is_inside(mp3_path):
        raise AnnotationsError(
            f"{path}: row {row + 2}, column {MP3_PATH!r}: {mp3_path!r} is not a path inside mp3/"
        )
    if len(parts) < 2 or parts[0] not in _FOLDER_SPLITS:
        raise AnnotationsError(
            f"{path}: row {row + 2}, column {MP3_PATH!r}: {mp3_path!r} is not in one of the "
            "folders 0 to f, which say the split"
        )
    return _FOLDER_SPLITS[parts[0]]
