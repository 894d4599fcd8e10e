"""Text as people save it: UTF-8, or named with the row; JSON Lines; separated values whose rows fit their header."""

import codecs
import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from acpo_utils.files import one_line


ARCHIVE_MARKS = {b"PK\3\4": "a zip archive", b"\x1f\x8b": "a gzip archive"}


def read_text(path: Path) -> str:
    """The file's text, without a byte order mark and with "\\n" at the ends of its lines.

    Raises ValueError naming the file, and the row where there is one, for an archive and for what is not UTF-8.
    """
    content = path.read_bytes()
    for mark, name in ARCHIVE_MARKS.items():
        if content.startswith(mark):
            raise ValueError(f"{path}: expected UTF-8 text, found {name}: unpack it and name the file inside.")
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        row = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: expected UTF-8 text, found byte {content[error.start]:#04x} in line {row}, as other encodings have "
            "it (cp1252, UTF-16): save it as UTF-8."
        ) from error
    if "\0" in text:  # UTF-16 without its mark
        row = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{path}: expected UTF-8 text, found a zero byte in line {row}: save it as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """(row, value) for each line of a JSON Lines file that is not blank; rows count from 1.

    Raises ValueError naming the file, and the row, for text that is not UTF-8 and for a line that is not JSON.
    """
    lines = read_text(path).split("\n")  # not splitlines(): U+2028 is no end of a JSON line
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:  # not JSON; a number of 5,000 digits; lists nested as deep
                raise ValueError(f"{path}, row {number}: expected a JSON object, found: {one_line(error)}.") from error
            yield number, value


def read_separated(
    path: Path, columns: Sequence[str], delimiter: str = ",", header_row: int = 1
) -> list[tuple[int, dict[str, str]]]:
    """(row, cells by the names in the header) of a .csv or .tsv file; cells at a row's end may be missing.

    Args:
        columns: names in lower case. A header with none of them, but with another sign between its names, is refused.
        header_row: the header's number; the rows below it count on.
    Raises:
        ValueError: naming file and row, for text that is not UTF-8, such a header, a row with more cells than the
            header has names, and a quote that is never closed.
    """
    text, end = read_text(path), "the end of the file"
    rows, numbered = [], []
    try:
        for row in csv.reader(io.StringIO(f"{text}\n{end}", newline=""), delimiter=delimiter):
            if row:
                rows.append(row)
    except csv.Error as error:
        raise ValueError(
            f"{path}, row {header_row + len(rows)}: expected a table of separated values, found: {error}."
        ) from error
    if rows.pop() != [end]:  # it became part of a cell
        raise ValueError(f"{path}, row {header_row + len(rows)}: expected a closing quote, found none up to the end.")
    header = rows[0] if rows else []
    if {name.lower() for name in header}.isdisjoint(columns):
        line = delimiter.join(header)
        for sign, name in {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}.items():
            if sign in line and sign != delimiter:
                wanted = {",": "commas", "\t": "tabs"}[delimiter]
                raise ValueError(
                    f"{path}, line 1: expected {wanted} between the columns, found {name} in {line!r}: save it "
                    f"with {wanted}."
                )
    for number, row in enumerate(rows[1:], start=header_row + 1):
        if any(row[len(header) :]):
            raise ValueError(
                f"{path}, row {number}: expected {len(header)} cells, found {len(row)}: put quotes around text that has "
                f"a {'tab' if delimiter == chr(9) else 'comma'} in it."
            )
        numbered.append((number, dict(zip(header, row))))
    return numbered
