"""Tables of one's own: any CSV or TSV of audio files with their tags, and how its clips are split.

A row is a file. Its tags are columns of 0 and 1, or a list in one column, between delimiters or
spread over the columns that follow, as in MTG-Jamendo's TSV files. The split is a column, or the
name of the table, or is drawn by groups of clips, such as an artist's, that stay together.
"""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from toolkit.data.annotations import (
    CLIP_ID,
    MP3_PATH,
    NUM_TAGS,
    SPLITS,
    is_inside,
    read_mtt,
    top_tags,
)
from toolkit.errors import AnnotationsError, UsageError

import numpy as np
import pandas as pd

# Names that say what a column is, without regard to case.
PATH_COLUMNS = (
    MP3_PATH, "path", "file", "filename", "file_name", "filepath", "file_path", "audio_path",
)  # fmt: skip
ID_COLUMNS = (CLIP_ID,)
TAGS_COLUMN = "tags"
SPLIT_COLUMN = "split"
FOLDER = "folder"  # in place of a column to group by: the first folder of the path
SPLIT_NAMES = {"train": "train", "test": "test"} | dict.fromkeys(
    ("val", "valid", "validation"), "val"
)
# Shares of clips, as MagnaTagATune's folders have them.
SPLIT_SHARES = {"train": 0.75, "val": 0.08, "test": 0.17}
# Columns of the table of clips that a tag's must not replace.
_TAKEN = (CLIP_ID, MP3_PATH, "split", "shard")
_DEALS = 200  # ways to deal groups to splits that are tried
_MOST_DEALT = 50_000  # groups in all of them
_DELIMITERS = ("\t", ",", ";")


@dataclass(frozen=True)
class TableForm:
    """How tables are written; None leaves it to what they show."""

    path_column: str | None = None
    tags_column: str | None = None  # of lists
    tags_delimiter: str | None = None  # within a list
    split_column: str | None = None
    split_by: str | None = None  # a column, or 'folder'
    split_seed: int = 0

    def __post_init__(self):
        if self.split_column and self.split_by:
            raise UsageError("--split-column and --split-by: the split is one or the other")
        if self.tags_delimiter == "":
            raise UsageError("--tags-delimiter: must not be empty")
        if self.split_seed and not self.split_by:
            raise UsageError("--split-seed: is of --split-by, which is not given")
        if self.split_seed >= 2**32:
            raise UsageError("--split-seed: must be less than 2^32")


@dataclass
class _Row:
    """A row and where it stands, for messages."""

    path: Path
    line: int
    fields: list[str]


@dataclass
class _Table:
    header: list[str]
    rows: list[_Row]
    delimiter: str

    def values(self, column: str) -> list[str]:
        place = self.header.index(column)
        return [row.fields[place] for row in self.rows]


def read_tables(
    paths: Sequence[str | Path], num_tags: int = NUM_TAGS, form: TableForm | None = None
) -> tuple[pd.DataFrame, tuple[str, ...], list[str]]:
    """Read tables of one dataset and keep the clips that carry a top tag.

    Parameters
    ----------
    paths : sequence of str or Path
        Tables of the same columns, of any split each. One alone in MagnaTagATune's form, where
        `form` says nothing else, is read as MagnaTagATune's.
    num_tags : int
        How many of the most frequent tags to keep; fewer where there are fewer.
    form : TableForm or None
        How they are written; None leaves all to what they show.

    Returns
    -------
    clips : pd.DataFrame
        As `annotations.read_mtt` returns them.
    tags : tuple of str
        In model order (see `annotations.top_tags`).
    found : list of str
        What was taken for what, in sentences for the user.

    Raises
    ------
    AnnotationsError
        A table is missing or cannot be understood; the message names row and column.
    UsageError
        A column that `form` names is not there, or nothing says the split.
    """
    form = form or TableForm()
    table = _read_all([Path(path) for path in paths])
    is_mtt = table.header[0] == CLIP_ID and table.header[-1] == MP3_PATH
    if len(paths) == 1 and form == TableForm() and is_mtt and table.delimiter == "\t":
        return *read_mtt(paths[0], num_tags), [f"{paths[0]}: read as MagnaTagATune's"]

    path_column = _find_path_column(table, form)
    id_column = next((name for name in table.header if name.casefold() in ID_COLUMNS), None)
    _check_paths(table, path_column)
    if id_column:
        _check_unique(table, id_column, table.values(id_column))
    kept_apart = {path_column, id_column, form.split_by, *_split_columns(table, form), ""}
    lists, tags_found = _find_tags(table, kept_apart, form)

    # Sorted, so that the order of rows does not matter to the order of tags with equal counts.
    counts = Counter(tag for row_tags in lists for tag in row_tags)
    in_order = tags_found.columns or sorted(counts)
    names = [name for name in in_order if counts[name]]
    if not names:
        raise AnnotationsError(f"{table.rows[0].path}: no clip carries a tag")
    tags = top_tags(np.array([counts[name] for name in names]), names, num_tags)
    place = {tag: number for number, tag in enumerate(tags)}
    labels = np.zeros((len(table.rows), len(tags)), np.uint8)
    for row, row_tags in enumerate(lists):
        labels[row, [place[tag] for tag in row_tags if tag in place]] = 1

    is_tagged = labels.any(axis=1)
    clips = pd.DataFrame(labels, columns=list(tags))
    clips[CLIP_ID] = table.values(id_column or path_column)
    clips[MP3_PATH] = table.values(path_column)
    # Of all that carry a tag: with another number of tags the split must stay the same.
    carry = [bool(row_tags) for row_tags in lists]
    clips["split"], split_found = _find_splits(table, path_column, form, carry)
    clips = clips[is_tagged].reset_index(drop=True)
    found = [f"paths are in column {path_column!r}, {tags_found.said}, {split_found}"]
    if tags_found.unused:
        unused = ", ".join(map(repr, tags_found.unused))
        found.append(f"columns that are no tags, for they hold other than 0 and 1: {unused}")
    found.append(
        f"{len(clips)} of {len(table.rows)} clips carry one or more of the {len(tags)} most "
        f"frequent of {len(names)} tags"
    )
    if empty := [split for split in SPLITS if not (clips["split"] == split).any()]:
        found.append(f"splits without a clip: {', '.join(empty)}")
    if unlearnt := [tag for tag in tags if not clips.loc[clips["split"] == "train", tag].any()]:
        found.append(f"tags without a clip in train: {', '.join(unlearnt)}")
    return clips, tags, found


# --- Reading -------------------------------------------------------------------------------------


def _read_all(paths: list[Path]) -> _Table:
    tables = [_read(path) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        if table.header != tables[0].header:
            raise AnnotationsError(
                f"{path}: its columns ({_listed(table.header)}) are not those of {paths[0]} "
                f"({_listed(tables[0].header)}): give tables of the same columns"
            )
    rows = [row for table in tables for row in table.rows]
    return _Table(tables[0].header, rows, tables[0].delimiter)


def _read(path: Path) -> _Table:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            # The delimiter that cuts the header into most columns.
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
        raise AnnotationsError(f"{path}: row 1 is empty: the columns' names must stand there")
    if not any(header) or not rows:
        raise AnnotationsError(f"{path}: the table has no rows")
    names = [name for name in header if name]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise AnnotationsError(
            f"{path}: row 1, column {repeated[0]!r}: stands there twice; rename one"
        )
    for row in rows:
        if len(row.fields) < len(header):
            raise AnnotationsError(
                f"{path}: row {row.line}: {len(row.fields)} fields, row 1 has {len(header)}"
            )
    return _Table(header, rows, delimiter)


def _listed(names: Sequence[str], most: int = 12) -> str:
    shown = [name for name in names if name][:most]
    return ", ".join(map(repr, shown)) + (", …" if len(names) > most else "")


def _refuse(row: _Row, column: str, reason: str) -> AnnotationsError:
    return AnnotationsError(f"{row.path}: row {row.line}, column {column!r}: {reason}")


def _named(table: _Table, column: str, option: str) -> str:
    if column not in table.header:
        raise UsageError(
            f"{option} {column}: {table.rows[0].path} has no such column: it has "
            f"{_listed(table.header)}"
        )
    return column


# --- Which column is what ------------------------------------------------------------------------


def _find_path_column(table: _Table, form: TableForm) -> str:
    if form.path_column:
        return _named(table, form.path_column, "--path-column")
    found = [name for name in table.header if name.casefold() in PATH_COLUMNS]
    if len(found) != 1:
        what = f"{_listed(found)} may all be" if found else f"none of {_listed(table.header)} is"
        raise UsageError(
            f"{table.rows[0].path}: {what} the column of paths: say which by --path-column"
        )
    return found[0]


def _check_paths(table: _Table, column: str) -> None:
    place = table.header.index(column)
    for row in table.rows:
        if not is_inside(row.fields[place]):
            raise _refuse(
                row, column, f"{row.fields[place]!r} is not a path inside the folder of the audio"
            )
    paths = [str(PurePosixPath(path)) for path in table.values(column)]  # 'a/./b' is 'a/b'
    _check_unique(table, column, paths)


def _check_unique(table: _Table, column: str, values: list[str]) -> None:
    seen = {}
    for row, value in zip(table.rows, values, strict=True):
        if not value:
            raise _refuse(row, column, "found nothing")
        if value in seen:
            first = seen[value]
            where = f"row {first.line}" + (f" of {first.path}" if first.path != row.path else "")
            raise _refuse(
                row, column, f"{value!r} stands in {where} too; each clip must have one row"
            )
        seen[value] = row


@dataclass
class _Tags:
    """Where the tags were found."""

    said: str
    columns: list[str]  # of 0 and 1, in the table's order; none for lists
    unused: list[str]


def _find_tags(
    table: _Table, kept_apart: set[str | None], form: TableForm
) -> tuple[list[set[str]], _Tags]:
    if form.tags_column:
        column = _named(table, form.tags_column, "--tags-column")
        return _read_lists(table, column, form.tags_delimiter)
    for column in table.header:
        is_list = column.casefold() == TAGS_COLUMN and column not in kept_apart
        if is_list and not set(table.values(column)) <= {"0", "1"}:
            return _read_lists(table, column, form.tags_delimiter)
    if form.tags_delimiter:
        raise UsageError("--tags-delimiter: say by --tags-column which column holds the lists")
    return _read_columns(table, kept_apart)


def _read_columns(table: _Table, kept_apart: set[str | None]) -> tuple[list[set[str]], _Tags]:
    """Find the columns of 0 and 1; one that mostly is has a fault, any other is no tag."""
    _check_lengths(table)
    lists, columns, unused = [set() for _ in table.rows], [], []
    for column in table.header:
        if column in kept_apart:
            continue
        values = [value.strip() for value in table.values(column)]
        faults = [place for place, value in enumerate(values) if value not in ("0", "1")]
        if 2 * len(faults) >= len(values):
            unused.append(column)
            continue
        if faults:
            raise _refuse(
                table.rows[faults[0]], column,
                f"found {values[faults[0]]!r}, expected 0 or 1 (take the column out of the table "
                "if it is no tag)",
            )  # fmt: skip
        columns.append(_checked_tag(column, table.rows[0].path, 1, column))
        for row, value in enumerate(values):
            if value == "1":
                lists[row].add(column)
    if not columns:
        raise UsageError(
            f"{table.rows[0].path}: no column holds only 0 and 1, and none is named "
            f"{TAGS_COLUMN!r}: say which column lists the tags by --tags-column, of "
            f"{_listed(table.header)}"
        )
    return lists, _Tags(f"tags are {len(columns)} columns of 0 and 1", columns, unused)


def _read_lists(table: _Table, column: str, delimiter: str | None) -> tuple[list[set[str]], _Tags]:
    """Read a column of lists, or one whose lists go on in the columns that follow."""
    place = table.header.index(column)
    is_spread = (
        delimiter is None
        and place == len(table.header) - 1
        and any(len(row.fields) > len(table.header) for row in table.rows)
    )
    if not is_spread:
        _check_lengths(table)
    delimiter = delimiter or ","
    lists = []
    for row in table.rows:
        value = row.fields[place].strip()
        if value.startswith("[") and value.endswith("]"):
            raise _refuse(
                row, column, f"found {value[:40]!r}, expected tags alone, such as rock,slow"
            )
        if is_spread and table.delimiter in value:
            raise _refuse(
                row, column,
                f"{value[:40]!r} is a list, and other rows go on in further columns: write one "
                "or the other",
            )  # fmt: skip
        fields = row.fields[place:] if is_spread else value.split(delimiter)
        tags = {field.strip() for field in fields} - {""}
        lists.append({_checked_tag(tag, row.path, row.line, column) for tag in tags})
    how = "and the columns that follow" if is_spread else f"between delimiters {delimiter!r}"
    return lists, _Tags(f"tags are in column {column!r}, {how}", [], [])


def _check_lengths(table: _Table) -> None:
    for row in table.rows:
        if len(row.fields) > len(table.header):
            raise AnnotationsError(
                f"{row.path}: row {row.line}: {len(row.fields)} fields, row 1 has "
                f"{len(table.header)}: put fields that hold the table's delimiter in quotes"
            )


def _checked_tag(tag: str, path: Path, line: int, column: str) -> str:
    if tag in _TAKEN or re.search(r"[\x00-\x1f]", tag):
        raise AnnotationsError(
            f"{path}: row {line}, column {column!r}: {tag!r} cannot be the name of a tag: rename it"
        )
    return tag


# --- Splits --------------------------------------------------------------------------------------


def _split_columns(table: _Table, form: TableForm) -> list[str]:
    """Name the column of the split, if it is a column, and any that looks like one."""
    return [form.split_column or "", *(n for n in table.header if n.casefold() == SPLIT_COLUMN)]


def _find_splits(
    table: _Table, path_column: str, form: TableForm, is_counted: Sequence[bool]
) -> tuple[list[str], str]:
    """Find each row's split; where it is drawn, some rows alone count."""
    if form.split_column:
        column = _named(table, form.split_column, "--split-column")
        return _read_splits(table, column)
    if form.split_by:
        return _split_by_groups(table, path_column, form, is_counted)
    tables = {row.path for row in table.rows}
    of_names = {path: _split_in_name(path) for path in tables}
    if len(tables) > 1 and all(of_names.values()):
        return [of_names[row.path] for row in table.rows], "the tables' names say the split"
    columns = [name for name in table.header if name.casefold() == SPLIT_COLUMN]
    if len(columns) == 1:
        return _read_splits(table, columns[0])
    raise UsageError(
        f"{table.rows[0].path}: nothing says which clips are train, val and test: name a column by "
        "--split-column, or draw them by --split-by, with an artist's column or 'folder'"
    )


def _read_splits(table: _Table, column: str) -> tuple[list[str], str]:
    splits = []
    for row, value in zip(table.rows, table.values(column), strict=True):
        split = SPLIT_NAMES.get(value.strip().casefold())
        if split is None:
            raise _refuse(row, column, f"found {value!r}, expected one of {', '.join(SPLIT_NAMES)}")
        splits.append(split)
    return splits, f"column {column!r} says the split"


def _split_in_name(path: Path) -> str | None:
    """Find the one split that a table's name says, such as val in x-validation.tsv."""
    words = re.split(r"[^a-z]+", path.stem.casefold())
    said = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    return said.pop() if len(said) == 1 else None


def _split_by_groups(
    table: _Table, path_column: str, form: TableForm, is_counted: Sequence[bool]
) -> tuple[list[str], str]:
    if form.split_by == FOLDER and FOLDER not in table.header:
        column, what = path_column, "first folder of the path"
        parts = [PurePosixPath(path).parts for path in table.values(path_column)]
        groups = [part[0] if len(part) > 1 else "" for part in parts]
    else:
        column = _named(table, form.split_by, "--split-by")
        what = f"column {column!r}"
        groups = [group.strip() for group in table.values(column)]
    for row, group in zip(table.rows, groups, strict=True):
        if not group:
            raise _refuse(row, column, "is in no folder" if what[0] == "f" else "found nothing")
    sizes = Counter(group for group, is_one in zip(groups, is_counted, strict=True) if is_one)
    if len(sizes) < len(SPLITS):
        raise AnnotationsError(
            f"{table.rows[0].path}: {what}: {len(sizes)} different with a tag, too few for "
            f"{', '.join(SPLITS)}: split by something else"
        )
    split_of = draw_splits(sizes, form.split_seed)
    return [split_of.get(group) for group in groups], (
        f"the split is drawn by {what} ({len(split_of)} groups, seed {form.split_seed})"
    )


def draw_splits(sizes: dict[str, int], seed: int) -> dict[str, str]:
    """Deal groups of clips to splits at random, near `SPLIT_SHARES` of the clips.

    Parameters
    ----------
    sizes : dict of str to int
        Clips of each group; at least three groups.
    seed : int
        Of the order in which groups are dealt.

    Returns
    -------
    dict of str to str
        The split of each group: the same for the same sizes and seed, in any order of the groups.
        No split is left without a group.
    """
    num_clips = sum(sizes.values())
    names = sorted(sizes)
    # NumPy promises that RandomState's stream never changes.
    random = np.random.RandomState(seed)
    best, least_off = {}, np.inf
    # Few groups of unlike sizes seldom add up: of many ways to deal them, take the closest.
    for _ in range(max(1, min(_DEALS, _MOST_DEALT // len(names)))):
        missing = {split: share * num_clips for split, share in SPLIT_SHARES.items()}
        split_of, empty = {}, list(SPLITS)
        for dealt, place in enumerate(random.permutation(len(names))):
            candidates = empty if len(names) - dealt <= len(empty) else SPLITS
            split = max(candidates, key=lambda one: missing[one])
            split_of[names[place]] = split
            missing[split] -= sizes[names[place]]
            if split in empty:
                empty.remove(split)
        off = sum(map(abs, missing.values()))
        if off < least_off:
            best, least_off = split_of, off
    return best
