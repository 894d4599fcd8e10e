"""Metadata of an image folder: .jsonl, .csv or .parquet with a file_name in each row; errors name the file and the row."""

import csv
import io
import os
from pathlib import Path, PureWindowsPath

import pandas as pd
from pyarrow import parquet

from acpo_utils.data.text_files import read_json_lines, read_separated
from acpo_utils.files import is_utf8, one_line, parquet_errors


METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of a folder; a file named by its path may be any


def read_metadata(
    file: Path, image_column: str | None = None, caption_column: str | None = None
) -> list[tuple[int, dict[str, object]]]:
    """(row, values) of a metadata file. Rows count from 1, a csv's header counted.

    A `Path` among the values is a picture's, absolute: "image" of the row's file_name and, where `image_column` is
    "mask", "mask" of its mask_file_name; "reference" of its reference_file_name. All else is as the file has it. Cells of a
    csv are text in `caption_column`, whatever the words; in another column they are numbers if all of them are, or "NA" and
    its like, which are None.

    Raises ValueError naming the file, and the row, for a damaged or empty file, one without file_name, a row that is no
    object, a column's name or a value that is no text for half a surrogate pair, and a file_name that is not the path of
    something below the file's folder.
    """
    kind = file.suffix.lower()
    if kind == ".csv":
        rows = _read_csv(file, caption_column)
    elif kind == ".parquet":
        with parquet_errors(file):
            rows = list(enumerate(parquet.ParquetFile(file).read().to_pylist(), start=1))
    else:
        rows = list(read_json_lines(file))
    other = image_column or "img"
    targets = {"file_name": "image", f"{other}_file_name": other, "reference_file_name": "reference"}
    records = []
    for number, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{file}, row {number}: expected an object with file_name, found {row!r}.")
        record = {}
        for key, value in row.items():
            if not is_utf8(key):
                raise ValueError(f"{file}, row {number}: expected text for the name of a column, found {key!r}.")
            if isinstance(value, str) and not is_utf8(value):
                raise ValueError(f"{file}, row {number}: expected text for {key}, found {value!r}.")
            if key not in targets:
                record.setdefault(key, value)
            elif key == "file_name" or not isinstance(record.get(targets[key]), Path):  # of two, file_name counts
                record[targets[key]] = _picture_path(file, number, key, value)
        records.append((number, record))
    if not any(key in targets for _, row in rows for key in row):
        found = one_line(", ".join(map(str, rows[0][1]))) if rows else "no rows"
        raise ValueError(
            f"{file}: expected file_name, the pictures' paths from its own folder, found {found or 'none'}."
        )
    return records


def _picture_path(file: Path, number: int, key: str, value: object) -> Path | None:
    """None for an empty cell: `check_images` names that row, or leaves it out."""
    if value is None or value == "":
        return None
    # As in `datasets`: data from elsewhere must not read whatever lies on this machine.
    path = os.path.normpath(value).replace("\\", "/") if isinstance(value, str) else "/"
    outside = os.path.isabs(path) or PureWindowsPath(path).is_absolute() or path.split("/")[0] == ".."
    if outside or "://" in value:
        raise ValueError(
            f"{file}, row {number}: expected {key} to be a path from the file's own folder, and inside it, found {value!r}."
        )
    return Path(os.path.abspath(file.parent), path)


def _read_csv(file: Path, caption_column: str | None) -> list[tuple[int, dict]]:
    rows = read_separated(file, ("file_name",))
    names = dict.fromkeys(name for _, row in rows for name in row)
    columns = {name: [row.get(name) or None for _, row in rows] for name in names}
    for name, words in columns.items():
        if name != caption_column and not name.endswith("file_name"):
            columns[name] = _numbers(words)
    return [(number, dict(zip(columns, cells))) for (number, _), cells in zip(rows, zip(*columns.values()))]


def _numbers(words: list[str | None]) -> list:
    """`words` as the numbers that pandas, and so `datasets`, reads in them; as they are, if it finds a word."""
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([["column"], *([word] for word in words)])
    column = pd.read_csv(io.StringIO(text.getvalue()), low_memory=False)["column"]
    if not pd.api.types.is_numeric_dtype(column):
        return words
    return [None if pd.isna(value) else value for value in column.tolist()]
