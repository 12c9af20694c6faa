"""Tables of clips: paths of audio files, their tags, and the split of the clips.

Each row describes a file. Tags are columns of 0 and 1, or a list. A list is in one column, with
delimiters, or continues in the columns that follow, as in MTG-Jamendo's tables. The split is a
column, or part of the table's name, or drawn at random for groups of clips, such as the clips of an
artist.

MagnaTagATune's ``annotations_final.csv`` is one form of a table: tab-separated, with a ``clip_id``
column, 188 tag columns of 0 and 1, and an ``mp3_path`` column whose folders are the split.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path, PurePosixPath

from toolkit import cli
from toolkit.cli import option
from toolkit.data.annotations import (
    CLIP_ID,
    FOLDER_SPLITS,
    MP3_PATH,
    NUM_TAGS,
    SPLITS,
    draw_splits,
    top_tags,
)
from toolkit.data.clip import ClipTable, is_inside
from toolkit.data.csv_file import Row, Table, listed, read_files
from toolkit.errors import AnnotationsError, UsageError

import numpy as np

# Names of columns; upper and lower case are equal.
# fmt: off
PATH_COLUMNS = (
    MP3_PATH, "path", "file", "filename", "file_name", "filepath", "file_path", "audio_path",
)
# fmt: on
TAGS_COLUMN = "tags"
SPLIT_COLUMN = "split"
FOLDER = "folder"  # for --split-by: the first folder of the path
SPLIT_NAMES = {"train": "train", "test": "test"} | dict.fromkeys(
    ("val", "valid", "validation"), "val"
)


@dataclass(frozen=True)
class TableForm:
    """Options that describe your own tables; None detects the form."""

    # fmt: off
    path_column: str | None = option(
        None, "column of the paths of the audio files",
        shown=f"the column named {', '.join(PATH_COLUMNS)}; case is ignored",
        group="your own data", metavar="NAME",
    )
    tags_column: str | None = option(
        None, "column that lists the tags of a clip",
        shown=f"a column named {TAGS_COLUMN}; without one, each column of 0 and 1 is a tag",
        group="your own data", metavar="NAME",
    )
    tags_delimiter: str | None = option(
        None, "delimiter of the tags in a list",
        shown="a comma; if the column is the last, one tag per further field",
        group="your own data", metavar="TEXT",
    )
    split_column: str | None = option(
        None, f"column of the split: {', '.join(SPLIT_NAMES)}",
        shown=f"the names of the tables, or a column named {SPLIT_COLUMN}",
        group="your own data", metavar="NAME",
    )
    split_by: str | None = option(
        None, f"draw the split at random: clips with the same value in this column, or in the same "
        f"first folder of the path if NAME is {FOLDER}, stay in one split; train, val and test "
        "get about 75, 8 and 17 %% of the clips",
        group="your own data", metavar="NAME",
    )
    split_seed: int = option(
        0, "seed of --split-by", group="your own data", type=cli.non_negative_int, metavar="N"
    )
    # fmt: on

    def __post_init__(self):
        if self.split_column and self.split_by:
            raise UsageError("--split-column and --split-by: give only one of them")
        if self.tags_delimiter == "":
            raise UsageError("--tags-delimiter: must not be empty")
        if self.split_seed and not self.split_by:
            raise UsageError("--split-seed: needs --split-by")
        if self.split_seed >= 2**32:  # the limit of NumPy's RandomState
            raise UsageError("--split-seed: must be less than 2^32")


def read_tables(
    paths: Sequence[str | Path], num_tags: int = NUM_TAGS, form: TableForm | None = None
) -> tuple[ClipTable, list[str]]:
    """Read the tables of a dataset and keep the clips that carry a top tag.

    Parameters
    ----------
    paths : sequence of str or Path
        Tables with the same columns.
    num_tags : int
        Number of most frequent tags to keep; all if there are fewer.
    form : TableForm or None
        Form of the tables; None detects it.

    Returns
    -------
    clips : ClipTable
        Clips in the order of the rows, with their tags in model order (see `annotations.top_tags`).
    notes : list of str
        How the tables were interpreted, for the user.

    Raises
    ------
    AnnotationsError
        A table is missing or invalid; the message names row and column.
    UsageError
        A column that `form` names does not exist, or the split is unknown.
    """
    form = form or TableForm()
    table = read_files([Path(path) for path in paths])
    is_mtt = form == TableForm() and _is_mtt(table)
    path_column = _find_path_column(table, form)
    id_column = next(iter(table.matching(CLIP_ID)), path_column)
    _check_identities(table, path_column, id_column)
    split_columns = [form.split_by, form.split_column, *table.matching(SPLIT_COLUMN)]
    no_tags = {path_column, id_column, *split_columns, ""}
    rows_of, notes = _find_tags(table, no_tags, form, is_mtt)
    # Drawn from all clips with a tag, so that the split does not depend on the number of tags.
    is_tagged = np.zeros(len(table.rows), bool)
    for rows in rows_of.values():
        is_tagged[rows] = True
    if not is_tagged.any():
        raise AnnotationsError(f"{table.rows[0].table}: no clip carries a tag")
    if is_mtt:
        splits, split_note = _read_folders(table), "the split is that of MagnaTagATune's folders"
    else:
        splits, split_note = _find_splits(table, path_column, form, is_tagged)

    tags = top_tags(np.array([len(rows) for rows in rows_of.values()]), list(rows_of), num_tags)
    labels = np.zeros((len(table.rows), len(tags)), np.uint8)
    for number, tag in enumerate(tags):
        labels[rows_of[tag], number] = 1
    is_kept = labels.any(axis=1)
    columns = (table.values(id_column), table.values(path_column), splits, table.rows)
    kept = (list(compress(column, is_kept)) for column in columns)
    clips = ClipTable(tags, labels[is_kept], *kept, path_column)

    notes = [f"paths are in column {path_column!r}, {notes[0]}, {split_note}", *notes[1:]]
    notes.append(
        f"{len(clips.paths)} of {len(table.rows)} clips carry one or more of the "
        f"{len(clips.tags)} most frequent of {len(rows_of)} tags"
    )
    if empty := [split for split in SPLITS if split not in clips.splits]:
        notes.append(f"splits without clips: {', '.join(empty)}")
    is_untrained = ~clips.labels[np.array(clips.splits) == "train"].any(axis=0)
    if untrained := list(compress(clips.tags, is_untrained)):
        notes.append(f"tags without training clips: {', '.join(untrained)}")
    return clips, notes


def _is_mtt(table: Table) -> bool:
    """Return whether a table has the columns of MagnaTagATune's."""
    ends = (table.header[0], table.header[-1])
    is_single = len({row.table for row in table.rows}) == 1
    return (
        is_single and ends == (CLIP_ID, MP3_PATH) and not table.matching(TAGS_COLUMN, SPLIT_COLUMN)
    )


# --- Paths and tags ------------------------------------------------------------------------------


def _find_path_column(table: Table, form: TableForm) -> str:
    if form.path_column:
        return table.named(form.path_column, "--path-column")
    found = table.matching(*PATH_COLUMNS)
    if len(found) != 1:
        what = "several columns of paths" if found else "no column of paths"
        raise UsageError(
            f"{table.rows[0].table}: {what} in {listed(found or table.header)}: select one with "
            "--path-column"
        )
    return found[0]


def _check_identities(table: Table, path_column: str, id_column: str) -> None:
    paths = table.values(path_column)
    for row, path in zip(table.rows, paths, strict=True):
        if not is_inside(path):
            raise row.error(path_column, f"{path!r} is not a path inside the audio folder")
    # 'a/./b' is the same file as 'a/b'.
    _check_unique(table, path_column, [str(PurePosixPath(path)) for path in paths])
    _check_unique(table, id_column, table.values(id_column))


def _check_unique(table: Table, column: str, values: list[str]) -> None:
    seen = {}
    for row, value in zip(table.rows, values, strict=True):
        if not value:
            raise row.error(column, "the field is empty")
        first = seen.setdefault(value, row)
        if first is not row:
            where = f"row {first.number}"
            where += f" of {first.table}" if first.table != row.table else ""
            raise row.error(column, f"{value!r} is also in {where}; each clip must have one row")


def _find_tags(
    table: Table, no_tags: Collection[str], form: TableForm, is_mtt: bool
) -> tuple[dict[str, list[int]], list[str]]:
    """Return the rows of each tag, in the order in which ties are broken, and notes."""
    if form.tags_column:
        column = table.named(form.tags_column, "--tags-column")
        return _read_lists(table, column, form.tags_delimiter)
    for column in table.matching(TAGS_COLUMN):
        if column not in no_tags and not set(table.values(column)) <= {"0", "1"}:
            return _read_lists(table, column, form.tags_delimiter)
    if form.tags_delimiter:
        raise UsageError("--tags-delimiter: name the column of the lists with --tags-column")
    return _read_columns(table, no_tags, is_mtt)


def _read_columns(
    table: Table, no_tags: Collection[str], is_mtt: bool
) -> tuple[dict[str, list[int]], list[str]]:
    """Read columns of 0 and 1. Other columns are no tags, but errors in MagnaTagATune's table."""
    table.check_lengths()
    rows_of, unused, num_columns = {}, [], 0
    for column in table.header:
        if column in no_tags:
            continue
        values = table.values(column)
        labels = {value: value.strip() for value in set(values)}
        if not set(labels.values()) <= {"0", "1"}:
            invalid = [row for row, value in enumerate(values) if labels[value] not in ("0", "1")]
            if 2 * len(invalid) >= len(values) and not is_mtt:
                unused.append(column)
                continue
            raise table.rows[invalid[0]].error(
                column,
                f"found {labels[values[invalid[0]]]!r}, expected 0 or 1 (remove the column if it "
                "is not a tag)",
            )
        _check_tag(column, Row(table.rows[0].table, 1), column)
        num_columns += 1
        # Shards of the published program have a label for each tag of MagnaTagATune's table.
        if is_mtt or "1" in labels.values():
            rows_of[column] = [row for row, value in enumerate(values) if labels[value] == "1"]
    if not num_columns:
        raise UsageError(
            f"{table.rows[0].table}: no column contains only 0 and 1, and none is named "
            f"{TAGS_COLUMN!r}: name the column that lists the tags with --tags-column, one of "
            f"{listed(table.header)}"
        )
    notes = [f"tags are {num_columns} columns of 0 and 1"]
    if unused:
        notes.append(f"columns that are not tags, with values other than 0 and 1: {listed(unused)}")
    return rows_of, notes


def _read_lists(
    table: Table, column: str, delimiter: str | None
) -> tuple[dict[str, list[int]], list[str]]:
    """Read a column of lists, or lists that continue in the columns that follow."""
    place = table.header.index(column)
    is_spread = (
        delimiter is None
        and place == len(table.header) - 1
        and any(len(fields) > len(table.header) for fields in table.fields)
    )
    if not is_spread:
        table.check_lengths()
    delimiter = delimiter or ","
    rows_of = {}
    for number, (row, fields) in enumerate(zip(table.rows, table.fields, strict=True)):
        value = fields[place].strip()
        if value.startswith("[") and value.endswith("]"):
            raise row.error(column, f"found {value[:40]!r}, expected only tags, such as rock,slow")
        if is_spread and table.delimiter in value:
            reason = "is a list, but other rows continue in further columns: use one form"
            raise row.error(column, f"{value[:40]!r} {reason}")
        listed = fields[place:] if is_spread else value.split(delimiter)
        for tag in {tag.strip() for tag in listed} - {""}:
            if tag not in rows_of:
                _check_tag(tag, row, column)
            rows_of.setdefault(tag, []).append(number)
    how = "and the columns that follow" if is_spread else f"with delimiter {delimiter!r}"
    # Sorted, so that the order of tags with equal counts does not depend on the order of rows.
    return dict(sorted(rows_of.items())), [f"tags are in column {column!r} {how}"]


def _check_tag(tag: str, row: Row, column: str) -> None:
    if tag in (CLIP_ID, MP3_PATH) or re.search(r"[\x00-\x1f]", tag):
        raise row.error(column, f"{tag!r} cannot be the name of a tag: rename the tag")


# --- Splits --------------------------------------------------------------------------------------


def _find_splits(
    table: Table, path_column: str, form: TableForm, is_tagged: np.ndarray
) -> tuple[list[str], str]:
    """Find the split of each row, and a note for the user."""
    if form.split_column:
        column = table.named(form.split_column, "--split-column")
        return _read_splits(table, column)
    if form.split_by:
        return _split_by_groups(table, path_column, form, is_tagged)
    split_of = {path: _split_in_name(path) for path in {row.table for row in table.rows}}
    if len(split_of) > 1 and all(split_of.values()):
        return [split_of[row.table] for row in table.rows], "the split is in the tables' names"
    columns = table.matching(SPLIT_COLUMN)
    if len(columns) == 1:
        return _read_splits(table, columns[0])
    raise UsageError(
        f"{table.rows[0].table}: the split is unknown: name its column with --split-column, or "
        f"draw the split with --split-by and a column such as the artist, or with --split-by "
        f"{FOLDER}"
    )


def _read_folders(table: Table) -> list[str]:
    """Return the split of each row of MagnaTagATune's table."""
    splits = []
    for row, path in zip(table.rows, table.values(MP3_PATH), strict=True):
        folder, *rest = PurePosixPath(path).parts
        if not rest or folder not in FOLDER_SPLITS:
            raise row.error(
                MP3_PATH,
                f"{path!r} is not in one of the folders 0 to f, which determine the split of "
                "MagnaTagATune: use --split-column or --split-by for another split",
            )
        splits.append(FOLDER_SPLITS[folder])
    return splits


def _read_splits(table: Table, column: str) -> tuple[list[str], str]:
    splits = []
    for row, value in zip(table.rows, table.values(column), strict=True):
        split = SPLIT_NAMES.get(value.strip().casefold())
        if split is None:
            raise row.error(column, f"found {value!r}, expected one of {', '.join(SPLIT_NAMES)}")
        splits.append(split)
    return splits, f"the split is in column {column!r}"


def _split_in_name(path: Path) -> str | None:
    """Return the only split in a table's name, such as val of x-validation.tsv."""
    words = re.split(r"[^a-z]+", path.stem.casefold())
    found = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    return found.pop() if len(found) == 1 else None


def _split_by_groups(
    table: Table, path_column: str, form: TableForm, is_tagged: np.ndarray
) -> tuple[list[str], str]:
    if form.split_by == FOLDER and FOLDER not in table.header:
        column, what, missing = path_column, "first folder of the path", "the path has no folder"
        parts = [PurePosixPath(path).parts for path in table.values(path_column)]
        groups = [part[0] if len(part) > 1 else "" for part in parts]
    else:
        column = table.named(form.split_by, "--split-by")
        what, missing = f"column {column!r}", "the field is empty"
        groups = [group.strip() for group in table.values(column)]
    for row, group in zip(table.rows, groups, strict=True):
        if not group:
            raise row.error(column, missing)
    sizes = Counter(group for group, tagged in zip(groups, is_tagged, strict=True) if tagged)
    if len(sizes) < len(SPLITS):
        raise AnnotationsError(
            f"{table.rows[0].table}: {what}: {len(sizes)} groups with tags, too few for "
            f"{', '.join(SPLITS)}: use another --split-by"
        )
    split_of = draw_splits(sizes, form.split_seed)
    # Clips of the other groups carry no tag and are left out.
    return [split_of.get(group, "") for group in groups], (
        f"the split is drawn by {what} ({len(split_of)} groups, seed {form.split_seed})"
    )
