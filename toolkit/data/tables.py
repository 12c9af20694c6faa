"""Your own tables: CSV or TSV tables of audio files with their tags, and the split of their clips.

Each row describes a file. Tags are columns of 0 and 1, or a list. A list is in one column, with
delimiters, or continues in the columns that follow, as in MTG-Jamendo's tables. The split is a
column, or part of the table's name, or drawn at random for groups of clips, such as the clips of an
artist.
"""

import csv
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from toolkit import cli
from toolkit.cli import option
from toolkit.data.annotations import (
    CLIP_ID,
    MP3_PATH,
    NUM_TAGS,
    SPLITS,
    draw_splits,
    is_inside,
    read_mtt,
    top_tags,
)
from toolkit.errors import AnnotationsError, UsageError

import numpy as np
import pandas as pd

# Names of columns; upper and lower case are equal.
PATH_COLUMNS = (
    MP3_PATH, "path", "file", "filename", "file_name", "filepath", "file_path", "audio_path",
)  # fmt: skip
TAGS_COLUMN = "tags"
SPLIT_COLUMN = "split"
FOLDER = "folder"  # for --split-by: the first folder of the path
SPLIT_NAMES = {"train": "train", "test": "test"} | dict.fromkeys(
    ("val", "valid", "validation"), "val"
)
# Columns of the table of clips, which tags must not replace.
_TAKEN = (CLIP_ID, MP3_PATH, "split", "shard")
_DELIMITERS = ("\t", ",", ";")


@dataclass(frozen=True)
class TableForm:
    """Options that describe your own tables; None detects the form."""

    path_column: str | None = option(
        None, "column of the paths of the audio files",
        shown=f"the column named {', '.join(PATH_COLUMNS)}; case is ignored",
        group="your own data", metavar="NAME",
    )  # fmt: skip
    tags_column: str | None = option(
        None, "column that lists the tags of a clip",
        shown=f"a column named {TAGS_COLUMN}; without one, each column of 0 and 1 is a tag",
        group="your own data", metavar="NAME",
    )  # fmt: skip
    tags_delimiter: str | None = option(
        None, "delimiter of the tags in a list",
        shown="a comma, or one column per tag to the end of the row",
        group="your own data", metavar="TEXT",
    )  # fmt: skip
    split_column: str | None = option(
        None, f"column of the split: {', '.join(SPLIT_NAMES)}",
        shown=f"the names of the tables, or a column named {SPLIT_COLUMN}",
        group="your own data", metavar="NAME",
    )  # fmt: skip
    split_by: str | None = option(
        None, f"draw the split at random: clips with the same value in this column, or in the same "
        f"first folder of the path if NAME is {FOLDER}, stay in one split; train, val and test "
        "get about 75, 8 and 17 %% of the clips",
        group="your own data", metavar="NAME",
    )  # fmt: skip
    split_seed: int = option(
        0, "seed of --split-by", group="your own data", type=cli.non_negative_int, metavar="N"
    )

    def __post_init__(self):
        if self.split_column and self.split_by:
            raise UsageError("--split-column and --split-by: give only one of them")
        if self.tags_delimiter == "":
            raise UsageError("--tags-delimiter: must not be empty")
        if self.split_seed and not self.split_by:
            raise UsageError("--split-seed: needs --split-by")
        if self.split_seed >= 2**32:
            raise UsageError("--split-seed: must be less than 2^32")


@dataclass
class _Row:
    path: Path
    line: int
    fields: list[str]

    def error(self, column: str, reason: str) -> AnnotationsError:
        return AnnotationsError(f"{self.path}: row {self.line}, column {column!r}: {reason}")


@dataclass
class _Table:
    header: list[str]
    rows: list[_Row]
    delimiter: str

    def values(self, column: str) -> list[str]:
        place = self.header.index(column)
        return [row.fields[place] for row in self.rows]

    def matching(self, *names: str) -> list[str]:
        """Return the columns that have one of these names; case is ignored."""
        return [column for column in self.header if column.casefold() in names]

    def named(self, column: str, flag: str) -> str:
        """Return a column that an option names; raise UsageError if there is no such column."""
        if column not in self.header:
            raise UsageError(
                f"{flag} {column}: {self.rows[0].path} has no such column; its columns are "
                f"{_listed(self.header)}"
            )
        return column

    def check_lengths(self) -> None:
        """Check that no row has more fields than the header."""
        for row in self.rows:
            if len(row.fields) > len(self.header):
                raise AnnotationsError(
                    f"{row.path}: row {row.line}: {len(row.fields)} fields, row 1 has "
                    f"{len(self.header)}: put fields that contain the delimiter in quotes"
                )


def read_tables(
    paths: Sequence[str | Path], num_tags: int = NUM_TAGS, form: TableForm | None = None
) -> tuple[pd.DataFrame, tuple[str, ...], list[str]]:
    """Read the tables of a dataset and keep the clips that carry a top tag.

    Parameters
    ----------
    paths : sequence of str or Path
        Tables with the same columns. A single table in MagnaTagATune's format, with the default
        form, is read as MagnaTagATune's.
    num_tags : int
        Number of most frequent tags to keep; all if there are fewer.
    form : TableForm or None
        Form of the tables; None detects it.

    Returns
    -------
    clips : pd.DataFrame
        As `annotations.read_mtt` returns them.
    tags : tuple of str
        Tags in model order (see `annotations.top_tags`).
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
    table = _read_all([Path(path) for path in paths])
    is_mtt = table.header[0] == CLIP_ID and table.header[-1] == MP3_PATH
    if len(paths) == 1 and form == TableForm() and is_mtt and table.delimiter == "\t":
        return *read_mtt(paths[0], num_tags), [f"{paths[0]}: read as MagnaTagATune's table"]

    path_column = _find_path_column(table, form)
    id_column = next(iter(table.matching(CLIP_ID)), None)
    _check_paths(table, path_column)
    if id_column:
        _check_unique(table, id_column, table.values(id_column))
    split_columns = [form.split_by, form.split_column, *table.matching(SPLIT_COLUMN)]
    no_tags = {path_column, id_column, *split_columns, ""}
    lists, tag_columns, notes = _find_tags(table, no_tags, form)

    # Sorted, so that the order of tags with equal counts does not depend on the order of rows.
    counts = Counter(tag for row_tags in lists for tag in row_tags)
    names = [name for name in tag_columns or sorted(counts) if counts[name]]
    if not names:
        raise AnnotationsError(f"{table.rows[0].path}: no clip carries a tag")
    tags = top_tags(np.array([counts[name] for name in names]), names, num_tags)
    labels = np.array([[tag in row_tags for tag in tags] for row_tags in lists], np.uint8)
    clips = pd.DataFrame(labels, columns=list(tags))  # (num_rows, num_tags)
    clips[CLIP_ID] = table.values(id_column or path_column)
    clips[MP3_PATH] = table.values(path_column)
    # Drawn from all clips with a tag, so that the split does not depend on the number of tags.
    clips["split"], split_note = _find_splits(table, path_column, form, list(map(bool, lists)))
    clips = clips[labels.any(axis=1)].reset_index(drop=True)

    notes = [f"paths are in column {path_column!r}, {notes[0]}, {split_note}", *notes[1:]]
    notes.append(
        f"{len(clips)} of {len(table.rows)} clips carry one or more of the {len(tags)} most "
        f"frequent of {len(names)} tags"
    )
    if empty := [split for split in SPLITS if not (clips["split"] == split).any()]:
        notes.append(f"splits without clips: {', '.join(empty)}")
    if untrained := [tag for tag in tags if not clips.loc[clips["split"] == "train", tag].any()]:
        notes.append(f"tags without training clips: {', '.join(untrained)}")
    return clips, tags, notes


# --- Reading -------------------------------------------------------------------------------------


def _read_all(paths: list[Path]) -> _Table:
    tables = [_read(path) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        if table.header != tables[0].header:
            raise AnnotationsError(
                f"{path}: its columns ({_listed(table.header)}) differ from those of {paths[0]} "
                f"({_listed(tables[0].header)}): give tables with the same columns"
            )
    rows = [row for table in tables for row in table.rows]
    return _Table(tables[0].header, rows, tables[0].delimiter)


def _read(path: Path) -> _Table:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            # The delimiter that divides the header into most columns.
            delimiter = max(
                _DELIMITERS, key=lambda one: len(next(csv.reader([first], delimiter=one), []))
            )
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = [name.strip() for name in next(reader, [])]
            rows = [_Row(path, reader.line_num, fields) for fields in reader if fields]
    except FileNotFoundError:
        raise AnnotationsError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise AnnotationsError(f"{path}: is a folder, not a table") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise AnnotationsError(f"{path}: not a CSV or TSV table in UTF-8: {error}") from None
    if not header and rows:
        raise AnnotationsError(f"{path}: row 1 is empty, expected the names of the columns")
    if not any(header) or not rows:
        raise AnnotationsError(f"{path}: the table has no rows")
    repeated = [name for name, count in Counter(header).items() if name and count > 1]
    if repeated:
        raise AnnotationsError(
            f"{path}: row 1, column {repeated[0]!r}: the name appears twice; rename one column"
        )
    for row in rows:
        if len(row.fields) < len(header):
            raise AnnotationsError(
                f"{path}: row {row.line}: {len(row.fields)} fields, row 1 has {len(header)}: "
                "every row needs a field for each column"
            )
    return _Table(header, rows, delimiter)


def _listed(names: Sequence[str], most: int = 12) -> str:
    shown = [name for name in names if name][:most]
    return ", ".join(map(repr, shown)) + (", …" if len(names) > most else "")


# --- Paths and tags ------------------------------------------------------------------------------


def _find_path_column(table: _Table, form: TableForm) -> str:
    if form.path_column:
        return table.named(form.path_column, "--path-column")
    found = table.matching(*PATH_COLUMNS)
    if len(found) != 1:
        what = "several columns of paths" if found else "no column of paths"
        raise UsageError(
            f"{table.rows[0].path}: {what} in {_listed(found or table.header)}: select one with "
            "--path-column"
        )
    return found[0]


def _check_paths(table: _Table, column: str) -> None:
    paths = table.values(column)
    for row, path in zip(table.rows, paths, strict=True):
        if not is_inside(path):
            raise row.error(column, f"{path!r} is not a path inside the audio folder")
    # 'a/./b' is the same file as 'a/b'.
    _check_unique(table, column, [str(PurePosixPath(path)) for path in paths])


def _check_unique(table: _Table, column: str, values: list[str]) -> None:
    seen = {}
    for row, value in zip(table.rows, values, strict=True):
        if not value:
            raise row.error(column, "the field is empty")
        if value in seen:
            first = seen[value]
            where = f"row {first.line}" + (f" of {first.path}" if first.path != row.path else "")
            raise row.error(column, f"{value!r} is also in {where}; each clip must have one row")
        seen[value] = row


def _find_tags(
    table: _Table, no_tags: Collection[str | None], form: TableForm
) -> tuple[list[set[str]], list[str], list[str]]:
    """Return the tags of each row, the columns of 0 and 1 (none for lists), and notes."""
    if form.tags_column:
        column = table.named(form.tags_column, "--tags-column")
        return _read_lists(table, column, form.tags_delimiter)
    for column in table.matching(TAGS_COLUMN):
        if column not in no_tags and not set(table.values(column)) <= {"0", "1"}:
            return _read_lists(table, column, form.tags_delimiter)
    if form.tags_delimiter:
        raise UsageError("--tags-delimiter: name the column of the lists with --tags-column")
    return _read_columns(table, no_tags)


def _read_columns(
    table: _Table, no_tags: Collection[str | None]
) -> tuple[list[set[str]], list[str], list[str]]:
    """Read columns of 0 and 1; other values are errors if most values of a column are 0 or 1."""
    table.check_lengths()
    lists, columns, unused = [set() for _ in table.rows], [], []
    for column in table.header:
        if column in no_tags:
            continue
        values = [value.strip() for value in table.values(column)]
        invalid = [place for place, value in enumerate(values) if value not in ("0", "1")]
        if 2 * len(invalid) >= len(values):
            unused.append(column)
            continue
        if invalid:
            expected = "expected 0 or 1 (remove the column if it is not a tag)"
            row, value = table.rows[invalid[0]], values[invalid[0]]
            raise row.error(column, f"found {value!r}, {expected}")
        columns.append(_checked_tag(column, _Row(table.rows[0].path, 1, []), column))
        for row_tags, value in zip(lists, values, strict=True):
            if value == "1":
                row_tags.add(column)
    if not columns:
        raise UsageError(
            f"{table.rows[0].path}: no column contains only 0 and 1, and none is named "
            f"{TAGS_COLUMN!r}: name the column that lists the tags with --tags-column, one of "
            f"{_listed(table.header)}"
        )
    notes = [f"tags are {len(columns)} columns of 0 and 1"]
    if unused:
        notes.append(
            f"columns that are not tags, with values other than 0 and 1: {_listed(unused)}"
        )
    return lists, columns, notes


def _read_lists(
    table: _Table, column: str, delimiter: str | None
) -> tuple[list[set[str]], list[str], list[str]]:
    """Read a column of lists, or lists that continue in the columns that follow."""
    place = table.header.index(column)
    is_spread = (
        delimiter is None
        and place == len(table.header) - 1
        and any(len(row.fields) > len(table.header) for row in table.rows)
    )
    if not is_spread:
        table.check_lengths()
    delimiter = delimiter or ","
    lists = []
    for row in table.rows:
        value = row.fields[place].strip()
        if value.startswith("[") and value.endswith("]"):
            raise row.error(column, f"found {value[:40]!r}, expected only tags, such as rock,slow")
        if is_spread and table.delimiter in value:
            reason = "is a list, but other rows continue in further columns: use one form"
            raise row.error(column, f"{value[:40]!r} {reason}")
        fields = row.fields[place:] if is_spread else value.split(delimiter)
        tags = {field.strip() for field in fields} - {""}
        lists.append({_checked_tag(tag, row, column) for tag in tags})
    how = "and the columns that follow" if is_spread else f"with delimiter {delimiter!r}"
    return lists, [], [f"tags are in column {column!r} {how}"]


def _checked_tag(tag: str, row: _Row, column: str) -> str:
    if tag in _TAKEN or re.search(r"[\x00-\x1f]", tag):
        raise row.error(column, f"{tag!r} cannot be the name of a tag: rename the tag")
    return tag


# --- Splits --------------------------------------------------------------------------------------


def _find_splits(
    table: _Table, path_column: str, form: TableForm, is_tagged: Sequence[bool]
) -> tuple[list[str], str]:
    """Find the split of each row, and a note for the user."""
    if form.split_column:
        column = table.named(form.split_column, "--split-column")
        return _read_splits(table, column)
    if form.split_by:
        return _split_by_groups(table, path_column, form, is_tagged)
    split_of = {path: _split_in_name(path) for path in {row.path for row in table.rows}}
    if len(split_of) > 1 and all(split_of.values()):
        return [split_of[row.path] for row in table.rows], "the split is in the tables' names"
    columns = table.matching(SPLIT_COLUMN)
    if len(columns) == 1:
        return _read_splits(table, columns[0])
    raise UsageError(
        f"{table.rows[0].path}: the split is unknown: name its column with --split-column, or draw "
        f"the split with --split-by and a column such as the artist, or with --split-by {FOLDER}"
    )


def _read_splits(table: _Table, column: str) -> tuple[list[str], str]:
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
    table: _Table, path_column: str, form: TableForm, is_tagged: Sequence[bool]
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
            f"{table.rows[0].path}: {what}: {len(sizes)} groups with tags, too few for "
            f"{', '.join(SPLITS)}: use another --split-by"
        )
    split_of = draw_splits(sizes, form.split_seed)
    return [split_of.get(group) for group in groups], (
        f"the split is drawn by {what} ({len(split_of)} groups, seed {form.split_seed})"
    )
