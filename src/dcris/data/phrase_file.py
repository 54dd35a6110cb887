"""Phrases of annotations in a file of their own: read them, and list the objects that need some."""

import csv
import io
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dcris.data.table import bad, check_text, shown
from dcris.data.tools.annotation import Texts, texts, whole
from dcris.errors import DcrisError
from dcris.utils.files import read_json, read_text, reading, write_file
from dcris.utils.text_tables import declared_delimiter

COLUMNS = ("annotation", "image", "category", "box", "phrase")
"""Columns of the list of objects without a phrase. `box` is left, top, width and height in
pixels."""

_MAX_BYTES = 50_000_000
"""Limit on the size of a CSV file."""

_MAX_ROWS = 1_000_000
"""Limit on its rows."""

_FORMULA = re.compile(r"^'(?=[=+\-@\t\r])")
"""The mark before a cell that a spreadsheet would take for a formula."""


@dataclass(frozen=True, slots=True)
class Phrases:
    """Content of a phrase file."""

    by_annotation: Mapping[str, Texts]
    """By the key of an annotation, see `key_of`."""
    by_category: Mapping[str, Texts]
    """By category name."""


def key_of(source: int | str) -> str:
    """Return the identifier of an annotation in the form in which all its spellings are equal.

    Spreadsheets write the number 11 as 11.0.
    """
    number = whole(source)
    return str(source) if number is None else str(number)


def read_phrases(path: Path, annotations: Collection[str], categories: Collection[str]) -> Phrases:
    """Read a phrase file: phrases by annotation or category.

    JSON: {"71": "left cup", "cup": ["a cup", "the mug"]}. CSV: a header with the columns
    `annotation` or `category`, and `phrase`, then one phrase per row; rows without a phrase are
    ignored. The list that `write_list` writes is such a file.

    Args:
        path: the file.
        annotations: the keys of the annotations.
        categories: names of the categories.

    Raises:
        DcrisError: the file is malformed, or a key is neither an annotation nor a category, or
            could be both.
    """
    by_annotation: dict[str, dict[str, None]] = {}
    by_category: dict[str, dict[str, None]] = {}
    by: str | None
    rows: Iterable[tuple[str, Texts, str]]
    by, rows = _read_csv(path) if path.suffix.lower() == ".csv" else (None, _read_mapping(path))
    for name, phrases, where in rows:
        key = key_of(name)
        is_annotation = by != "category" and key in annotations
        is_category = by != "annotation" and name in categories
        if is_annotation and is_category:
            raise bad(
                path,
                f"{where} is both an annotation and a category; use CSV, whose header distinguishes them",
            )
        if is_annotation:
            by_annotation.setdefault(key, {}).update(dict.fromkeys(phrases))
        elif is_category:
            by_category.setdefault(name, {}).update(dict.fromkeys(phrases))
        else:
            problem = (
                "neither the id of an annotation nor the name of a category" if by is None else "not in the export"
            )
            raise bad(path, f"{where} is {problem}")
    return Phrases(
        {key: tuple(phrases) for key, phrases in by_annotation.items()},
        {name: tuple(phrases) for name, phrases in by_category.items()},
    )


def write_list(path: Path, rows: Iterable[tuple[str, str, str, str]]) -> None:
    """Write the list of objects that need a phrase, with an empty column for it.

    Args:
        path: the CSV file.
        rows: for each object the first four of COLUMNS.

    Raises:
        DcrisError: the file exists already, or cannot be written.
    """
    if path.exists():
        raise DcrisError(f"{path} exists already, perhaps with phrases; delete it or choose another file")
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    # The apostrophe keeps a spreadsheet from taking a name of unknown origin for a formula.
    writer.writerows([*(f"'{cell}" if _FORMULA.match(f"'{cell}") else cell for cell in row), ""] for row in rows)
    write_file(path, text.getvalue())


def _read_mapping(path: Path) -> Iterator[tuple[str, Texts, str]]:
    content = read_json(path, "the phrase file")
    if type(content) is not dict:
        raise bad(path, "it is not an object with phrases by annotation id or category name")
    for key, value in content.items():
        yield key, texts(value, path, f"the entry {shown(key)}", "phrase"), f"the key {shown(key)}"


def _read_csv(path: Path) -> tuple[str, Iterable[tuple[str, Texts, str]]]:
    with reading(path):
        text = read_text(path, _MAX_BYTES)
    declared, text = declared_delimiter(text)
    lines = io.StringIO(text, newline="")
    if declared:
        lines.readline()  # its line end
    header = lines.readline()
    # Excel's delimiter depends on the language. The header alone decides: csv.Sniffer would also
    # guess from phrases, which contain commas.
    delimiter = declared or next((mark for mark in ",;\t" if mark in header), ",")
    columns = [name.strip(' "').lower() for name in header.strip().split(delimiter)]
    by = next((name for name in ("annotation", "category") if name in columns), None)
    if by is None or "phrase" not in columns:
        raise bad(path, f"its header is neither `annotation,phrase` nor `category,phrase`: {shown(header.strip())}")
    return by, _read_rows(path, lines, delimiter, columns, by)


def _read_rows(
    path: Path, lines: io.StringIO, delimiter: str, columns: list[str], by: str
) -> Iterator[tuple[str, Texts, str]]:
    key_column, text_column = columns.index(by), columns.index("phrase")
    try:
        for number, row in enumerate(csv.reader(lines, delimiter=delimiter), 2):
            if number > _MAX_ROWS:
                raise bad(path, f"it has more than {_MAX_ROWS:,} rows")
            key, text = (row[column].strip() if column < len(row) else "" for column in (key_column, text_column))
            if text:
                key, where = _FORMULA.sub("", key), f"row {number}"
                yield key, (check_text(text, path, where, "phrase"),), f"{where}, with the {by} {shown(key)},"
    except csv.Error as error:
        raise bad(path, f"it is not CSV ({error})") from error
