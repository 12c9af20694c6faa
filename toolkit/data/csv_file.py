"""CSV and TSV files: their rows, with the row numbers for errors."""

import codecs
import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO
from unicodedata import normalize

from toolkit.errors import AnnotationsError, UsageError

DELIMITERS = ("\t", ",", ";", "|")
_SAVE_AS = "save the table as CSV in UTF-8"


class Row(NamedTuple):
    """Place of a row: its table, and its number from 1; 0 for a folder instead of a table."""

    table: Path
    number: int

    def error(self, column: str, reason: str) -> AnnotationsError:
        where = f"row {self.number}, column {column!r}: " if self.number else ""
        return AnnotationsError(f"{self.table}: {where}{reason}")


@dataclass
class Table:
    header: list[str]
    rows: list[Row]
    fields: list[list[str]]  # of each row
    delimiter: str

    def values(self, column: str) -> list[str]:
        place = self.header.index(column)
        return [fields[place] for fields in self.fields]

    def matching(self, *names: str) -> list[str]:
        """Return the columns that have one of these names; case is ignored."""
        # MTG-Jamendo's columns are named PATH and TAGS.
        return [column for column in self.header if column.casefold() in names]

    def named(self, column: str, flag: str) -> str:
        """Return a column that an option names; raise UsageError if there is no such column."""
        if column not in self.header:
            raise UsageError(
                f"{flag} {column}: {self.rows[0].table} has no such column; its columns are "
                f"{listed(self.header)}"
            )
        return column

    def check_lengths(self) -> None:
        """Check that no row has more fields than the header."""
        for row, fields in zip(self.rows, self.fields, strict=True):
            if len(fields) > len(self.header):
                raise AnnotationsError(
                    f"{row.table}: row {row.number}: {len(fields)} fields, row 1 has "
                    f"{len(self.header)}: put fields that contain the delimiter in quotes"
                )


def read_files(paths: list[Path]) -> Table:
    first, *others = [_read(path) for path in paths]
    for path, table in zip(paths[1:], others, strict=True):
        if table.header != first.header:
            raise AnnotationsError(
                f"{path}: its columns ({listed(table.header)}) differ from those of {paths[0]} "
                f"({listed(first.header)}): give tables with the same columns"
            )
        first.rows += table.rows
        first.fields += table.fields
    return first


def _read(path: Path) -> Table:
    table = Table([], [], [], "")
    number = 0  # of the last row that was read
    try:
        with open(path, encoding=_encoding(path), newline="") as file:
            first = file.readline()
            file.seek(0)
            # The delimiter that divides the header into most columns. Names in quotes may contain
            # the others, so the header is parsed.
            table.delimiter = max(
                DELIMITERS, key=lambda one: len(next(csv.reader([first], delimiter=one), []))
            )
            lines = _lines(path, file)
            # Without strict, text after a closing quote is kept silently. Without skipinitialspace,
            # a quote after ", " becomes part of the tag.
            reader = csv.reader(
                lines, delimiter=table.delimiter, strict=True, skipinitialspace=True
            )
            for fields in reader:
                # If one title begins with a quote and a later one ends with a quote, the rows
                # between them would disappear in one field.
                if reader.line_num > number + 1:
                    raise csv.Error(f"it ends in row {reader.line_num}")
                number = reader.line_num
                # Spreadsheets write empty fields at the end of rows, and empty rows. Further fields
                # would look like a list that continues.
                while len(fields) > len(table.header) and not fields[-1].strip():
                    fields.pop()
                if number == 1:
                    table.header = [normalize("NFC", name.strip()) for name in fields]
                elif any(field.strip() for field in fields):
                    table.rows.append(Row(path, number))
                    table.fields.append(fields)
    except FileNotFoundError:
        raise AnnotationsError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise AnnotationsError(f"{path}: is a folder, not a table") from None
    except io.UnsupportedOperation:  # a build that is resumed reads the tables again
        raise AnnotationsError(f"{path}: is a pipe: save the table as a file") from None
    except UnicodeError:
        raise AnnotationsError(
            f"{path}: row {_first_row_not_utf8(path)}: not UTF-8: {_SAVE_AS}"
        ) from None
    except csv.Error as error:
        raise AnnotationsError(
            f"{path}: row {number + 1}: a field that begins with a quote must end with a quote, in "
            f"the same row ({error}): remove the quote, or put the field in quotes and write "
            "quotes inside it twice"
        ) from None
    _check(path, table)
    return table


def _encoding(path: Path) -> str:
    """Return UTF-16 if the file begins with its byte order mark, as Excel's "Unicode text"."""
    with open(path, "rb") as file:
        is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    # Excel begins UTF-8 with a byte order mark, too, which "utf-8-sig" removes.
    return "utf-16" if is_utf16 else "utf-8-sig"


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        # UTF-16 without a byte order mark decodes as UTF-8, with NUL bytes.
        if "\0" in line:
            raise AnnotationsError(f"{path}: row {number}: contains a NUL byte: {_SAVE_AS}")
        yield line


def _first_row_not_utf8(path: Path) -> int:
    # The decoder reads in blocks, so its error does not name the row.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1  # UTF-16 that is truncated


def _check(path: Path, table: Table) -> None:
    if not any(table.header) and table.rows:
        raise AnnotationsError(f"{path}: row 1 is empty, expected the names of the columns")
    if not table.rows:
        raise AnnotationsError(f"{path}: the table has no rows")
    # Columns without a name are never used, so there may be several.
    repeated = [name for name, count in Counter(table.header).items() if name and count > 1]
    if repeated:
        raise AnnotationsError(
            f"{path}: row 1, column {repeated[0]!r}: the name appears twice: rename one column, or "
            "join the rows of a header that has several, such as FMA's"
        )
    for row, fields in zip(table.rows, table.fields, strict=True):
        if len(fields) < len(table.header):
            raise AnnotationsError(
                f"{path}: row {row.number}: {len(fields)} fields, row 1 has {len(table.header)}: "
                "every row needs a field for each column"
            )


def listed(names: Sequence[str], most: int = 12) -> str:
    shown = [name for name in names if name][:most]
    return ", ".join(map(repr, shown)) + (", …" if len(names) > most else "")
