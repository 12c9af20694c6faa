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
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from toolkit import cli, messages
from toolkit.cli import option
from toolkit.data.annotations import (
    CLIP_ID,
    FOLDER_SPLITS,
    MP3_PATH,
    NUM_TAGS,
    RESERVED_TAGS,
    SPLITS,
    draw_splits,
)
from toolkit.data.clip import ClipTable, describe_clips, is_inside, keep_top_tags
from toolkit.data.csv_file import Row, Table, listed, read_files
from toolkit.errors import AnnotationsError, UsageError

import numpy as np

# Names of columns; case is ignored.
# fmt: off
PATH_COLUMNS = (
    MP3_PATH, "path", "file", "filename", "file_name", "filepath", "file_path", "audio_path",
)
# fmt: on
TAGS_COLUMN = "tags"
SPLIT_COLUMN = "split"
FOLDER = "folder"  # for --split-by: the first folder of the path
# Words of several datasets: MTG-Jamendo writes "validation", for example.
SPLIT_NAMES = (
    dict.fromkeys(("train", "training"), "train")
    | dict.fromkeys(("val", "valid", "validation", "dev"), "val")
    | dict.fromkeys(("test", "testing"), "test")
)
# Notations of labels, as `_plain` writes them. Some spreadsheets write 1,0 with a decimal comma.
_NOTATIONS = {
    "0 and 1": {"0": 0, "1": 1, "0,0": 0, "1,0": 1},
    "True and False": {"false": 0, "true": 1},
    "yes and no": {"no": 0, "yes": 1},
}
_LIST_DELIMITERS = (",", ";", "|")


@dataclass(frozen=True)
class TableForm:
    """Options that describe your own tables; None detects the form."""

    # fmt: off
    tags_from: str | None = option(
        None, "folders: without a table, the tag of each audio file in --audio-dir is the first "
        "folder of its path, and the files of each tag are divided at random among the splits",
        shown="a table", group="your own data", choices=("folders",),
    )
    path_column: str | None = option(
        None, "column of the paths of the audio files",
        shown=f"the column named {', '.join(PATH_COLUMNS)}; case is ignored",
        group="your own data", metavar="NAME",
    )
    tags_column: str | None = option(
        None, "column that lists the tags of a clip",
        shown=f"a column named {TAGS_COLUMN}; without one, each column of 0 and 1, or of True and "
        "False, is a tag",
        group="your own data", metavar="NAME",
    )
    tags_delimiter: str | None = option(
        None, "delimiter of the tags in a list",
        shown=f"the one that occurs, of {' '.join(_LIST_DELIMITERS)}; if the column is the last, "
        "one tag per further field",
        group="your own data", metavar="TEXT",
    )
    exclude_columns: tuple[str, ...] | None = option(
        None, "columns of 0 and 1 that are not tags",
        group="your own data", nargs="+", metavar="NAME",
    )
    split_column: str | None = option(
        None, f"column of the split: {', '.join(SPLIT_NAMES)}",
        shown=f"the names of the tables, or a column named {SPLIT_COLUMN}",
        group="your own data", metavar="NAME",
    )
    split_by: str | None = option(
        None, f"draw the split at random: clips with the same value in this column, or in the same "
        f"first folder of the path if NAME is {FOLDER}, stay in one split; train, val and test "
        f"get about 75, 8 and 17 %% of the clips; with --tags-from folders, {FOLDER} is the second "
        "folder",
        group="your own data", metavar="NAME",
    )
    split_seed: int = option(
        0, "seed of a split that is drawn",
        group="your own data", type=cli.non_negative_int, metavar="N",
    )
    # fmt: on

    def __post_init__(self):
        if self.split_column and self.split_by:
            raise UsageError("--split-column and --split-by: give only one of them")
        if self.tags_delimiter == "":
            raise UsageError("--tags-delimiter: must not be empty")
        if self.split_seed and not self.split_by and not self.tags_from:
            raise UsageError("--split-seed: needs --split-by or --tags-from folders")
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
    # With other options, such as --split-by, MagnaTagATune is read like your own tables.
    is_mtt = replace(form, exclude_columns=None) == TableForm() and _is_mtt(table)
    path_column = _find_path_column(table, form)
    paths = _read_paths(table, path_column)
    id_columns = table.matching(CLIP_ID)
    # Records and reports need an identity of each clip; paths are unique, too.
    clip_ids = table.values(id_columns[0]) if id_columns else paths
    if id_columns:
        _check_unique(table, id_columns[0], clip_ids)
    excluded = [table.named(name, "--exclude-columns") for name in form.exclude_columns or ()]
    split_columns = [form.split_by, form.split_column, *table.matching(SPLIT_COLUMN)]
    # pandas writes an index as a column without a name.
    no_tags = {path_column, *id_columns[:1], *split_columns, *excluded, ""}
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

    columns = (clip_ids, paths, splits, table.rows)
    clips = keep_top_tags(rows_of, num_tags, columns, path_column)
    if any("\\" in path for path in table.values(path_column)):
        notes.append("paths are read with / for \\")
    first = f"paths are in column {path_column!r}, {notes[0]}, {split_note}"
    return clips, [first, *describe_clips(clips, len(table.rows), rows_of), *notes[1:]]


def _is_mtt(table: Table) -> bool:
    """Return whether a table has the columns of MagnaTagATune's."""
    ends = (table.header[0], table.header[-1])
    is_single = len({row.table for row in table.rows}) == 1
    has_others = table.matching(TAGS_COLUMN, SPLIT_COLUMN)
    return is_single and ends == (CLIP_ID, MP3_PATH) and not has_others


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


def _read_paths(table: Table, column: str) -> list[str]:
    """Return the paths with slashes; check that they name different files in the audio folder."""
    paths = []
    for row, written in zip(table.rows, table.values(column), strict=True):
        # Tables that were written on Windows contain backslashes and drive letters.
        path = written.strip().replace("\\", "/")
        if re.match(r"/|[A-Za-z]:", path):
            raise row.error(
                column,
                f"{written!r} is an absolute path: write paths relative to --audio-dir, with /, "
                f"such as {PurePosixPath(path).name!r}",
            )
        if not is_inside(path):
            raise row.error(column, f"{written!r} is not a path inside the audio folder")
        paths.append(path)
    # The same file may be written as 'a/b' and 'a/./b', and with composed or other characters.
    _check_unique(table, column, [normalize("NFC", str(PurePosixPath(path))) for path in paths])
    return paths


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
        values = table.values(column)
        # A column of this name may also contain 0 and 1; it is then a tag like others.
        if column not in no_tags and any(_notation(value) is None for value in set(values)):
            return _read_lists(table, column, form.tags_delimiter)
    if form.tags_delimiter:
        raise UsageError("--tags-delimiter: name the column of the lists with --tags-column")
    return _read_columns(table, no_tags, is_mtt)


def _plain(value: str) -> str:
    """Return a field in lower case, and numbers such as 1.00 and 1e+00 in their shortest form."""
    try:
        return f"{float(value):g}"
    except ValueError:
        return value.strip().casefold()


def _notation(value: str) -> str | None:
    """Return the notation of a label, or None for other values."""
    value = _plain(value)
    return next((name for name, labels in _NOTATIONS.items() if value in labels), None)


def _read_columns(
    table: Table, no_tags: Collection[str], is_mtt: bool
) -> tuple[dict[str, list[int]], list[str]]:
    """Read the tag columns; other columns are ignored or, in MagnaTagATune's table, refused."""
    # Only lists may have more fields than the header, as in MTG-Jamendo's tables.
    table.check_lengths()
    found = {name: {} for name in _NOTATIONS}  # rows of each tag
    unused = []
    for column in table.header:
        if column in no_tags:
            continue
        values = table.values(column)
        counts = Counter()
        # Few values are distinct: two per column in MagnaTagATune, which has 4.9 million labels.
        for value, count in Counter(values).items():
            counts[_notation(value)] += count
        notation = max(_NOTATIONS, key=lambda name: counts[name])
        num_invalid = len(values) - counts[notation]
        # A column that consists mostly of labels is a tag with a wrong value, which must not be
        # ignored. All other columns of MagnaTagATune's table are tags.
        if num_invalid and 2 * num_invalid >= len(values) and not is_mtt:
            unused.append(column)
            continue
        if num_invalid:
            place = next(n for n, value in enumerate(values) if _notation(value) != notation)
            raise table.rows[place].error(
                column,
                f"found {values[place].strip()!r}, expected {notation.replace('and', 'or')} "
                "(--exclude-columns leaves out a column that is not a tag)",
            )
        ones = {v for v in set(values) if _NOTATIONS[notation][_plain(v)]}
        found[notation][column] = [row for row, value in enumerate(values) if value in ones]
    # Columns of True and False beside columns of 0 and 1 are probably not tags.
    notation = next((name for name, rows_of in found.items() if rows_of), None)
    if notation is None:
        _, *others = _NOTATIONS
        raise UsageError(
            f"{table.rows[0].table}: no column contains only 0 and 1, or {', or '.join(others)}, "
            f"and none is named {TAGS_COLUMN!r}: write 0 for empty labels, or name the column that "
            f"lists the tags with --tags-column, one of {listed(table.header)}"
        )
    rows_of = found.pop(notation)
    unused += [column for other in found.values() for column in other]
    for column in rows_of:
        check_tag(column, Row(table.rows[0].table, 1), column)
    notes = [f"tags are {messages.count(len(rows_of), 'column')} of {notation}"]
    if unused:
        notes.append(f"columns that are not tags: {listed(unused)}")
    # Shards of the published program have a label for each tag of MagnaTagATune's table.
    return {tag: rows for tag, rows in rows_of.items() if rows or is_mtt}, notes


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
        delimiter = delimiter or _find_delimiter(table, column)
    rows_of = {}
    for number, (row, fields) in enumerate(zip(table.rows, table.fields, strict=True)):
        value = fields[place].strip()
        # pandas writes lists as "['rock', 'slow']": brackets and quotes would enter the tags.
        if re.fullmatch(r"""\[.*\]|[({]\s*['"].*[)}]""", value):
            raise row.error(column, f"found {value[:40]!r}, expected only tags, such as rock,slow")
        # A list in quotes would become one tag that contains delimiters.
        if is_spread and table.delimiter in value:
            reason = "is a list, but other rows continue in further columns: use one form"
            raise row.error(column, f"{value[:40]!r} {reason}")
        listed_tags = fields[place:] if is_spread else value.split(delimiter)
        # macOS may write "é" as two characters; lists may repeat a tag or end with a delimiter.
        for tag in {normalize("NFC", tag.strip()) for tag in listed_tags} - {""}:
            if tag not in rows_of:
                check_tag(tag, row, column)
            rows_of.setdefault(tag, []).append(number)
    if is_spread:
        how = " and the columns that follow"
    elif any(delimiter in value for value in table.values(column)):
        how = f" with delimiter {delimiter!r}"
    else:  # lists with another delimiter are read as one tag
        how = ", one per clip"
    notes = [f"tags are in column {column!r}{how}"]
    if odd := [tag for tag in sorted(rows_of) if re.search(r"""[,;|"]|^'|'$""", tag)]:
        notes.append(f"tags that contain a delimiter or a quote: {listed(odd)}")
    # Sorted, so that the order of tags with equal counts does not depend on the order of rows.
    return dict(sorted(rows_of.items())), notes


def _find_delimiter(table: Table, column: str) -> str:
    """Return the delimiter that occurs in the lists, or the first if none does."""
    found = {}
    for row, value in zip(table.rows, table.values(column), strict=True):
        for delimiter in _LIST_DELIMITERS:
            if delimiter in value:
                found.setdefault(delimiter, row)
    # A wrong choice would give tags such as "x;y".
    if len(found) > 1:
        places = ", ".join(f"{one!r} in row {row.number}" for one, row in found.items())
        raise UsageError(
            f"{table.rows[0].table}: column {column!r}: several delimiters ({places}): name the "
            "delimiter of the lists with --tags-delimiter"
        )
    return next(iter(found), _LIST_DELIMITERS[0])


def check_tag(tag: str, row: Row, column: str) -> None:
    """Raise AnnotationsError for a name that a tag cannot have."""
    # Refused here, and not by extract_excitations.py after days of training.
    if not tag or tag in RESERVED_TAGS or re.search(r"[\x00-\x1f]", tag):
        why = "it is empty or contains a control character"
        if tag in RESERVED_TAGS:
            why = f"reserved: {', '.join(RESERVED_TAGS)}"
        raise row.error(column, f"{tag!r} cannot be the name of a tag ({why}): rename the tag")


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
    """Return the split in a table's name, such as val for x-validation.tsv, if there is one."""
    # Whole words, because "latest" contains "test".
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
        groups = [normalize("NFC", group.strip()) for group in table.values(column)]
    for row, group in zip(table.rows, groups, strict=True):
        if not group:
            raise row.error(column, missing)
    # Clips without a tag are left out later, so they must not fill a split.
    sizes = Counter(group for group, tagged in zip(groups, is_tagged, strict=True) if tagged)
    if len(sizes) < len(SPLITS):
        groups_found = messages.count(len(sizes), "group")
        raise AnnotationsError(
            f"{table.rows[0].table}: {what}: {groups_found} with tags, too few for "
            f"{', '.join(SPLITS)}: use another --split-by"
        )
    split_of = draw_splits(sizes, form.split_seed)
    # Clips of the other groups carry no tag and are left out.
    return [split_of.get(group, "") for group in groups], (
        f"the split is drawn by {what} ({len(split_of)} groups, seed {form.split_seed})"
    )
