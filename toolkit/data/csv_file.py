"""CSV and TSV files: their rows, with the row numbers for errors."""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from toolkit.errors import AnnotationsError, UsageError

DELIMITERS = ("\t", ",", ";")


class Row(NamedTuple):
    """Place of a row: its table, and its number from 1."""

    table: Path
    number: int

    def error(self, column: str, reason: str) -> AnnotationsError:
        return AnnotationsError(f"{self.table}: row {self.number}, column {column!r}: {reason}")


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
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            # The delimiter that divides the header into most columns.
            table.delimiter = max(
                DELIMITERS, key=lambda one: len(next(csv.reader([first], delimiter=one), []))
            )
            reader = csv.reader(file, delimiter=table.delimiter, strict=True)
            table.header = [name.strip() for name in next(reader, [])]
            for fields in reader:
                if fields:
                    table.rows.append(Row(path, reader.line_num))
                    table.fields.append(fields)
    except FileNotFoundError:
        raise AnnotationsError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise AnnotationsError(f"{path}: is a folder, not a table") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise AnnotationsError(f"{path}: not a CSV or TSV table in UTF-8: {error}") from None
    if not table.header and table.rows:
        raise AnnotationsError(f"{path}: row 1 is empty, expected the names of the columns")
    if not any(table.header) or not table.rows:
        raise AnnotationsError(f"{path}: the table has no rows")
    repeated = [name for name, count in Counter(table.header).items() if name and count > 1]
    if repeated:
        raise AnnotationsError(
            f"{path}: row 1, column {repeated[0]!r}: the name appears twice; rename one column"
        )
    for row, fields in zip(table.rows, table.fields, strict=True):
        if len(fields) < len(table.header):
            raise AnnotationsError(
                f"{path}: row {row.number}: {len(fields)} fields, row 1 has {len(table.header)}: "
                "every row needs a field for each column"
            )
    return table


def listed(names: Sequence[str], most: int = 12) -> str:
    shown = [name for name in names if name][:most]
    return ", ".join(map(repr, shown)) + (", …" if len(names) > most else "")
