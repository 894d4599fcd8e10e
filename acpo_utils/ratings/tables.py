"""Score tables as publishers ship them (.csv, .xlsx, .mat, .txt), checked cell by cell; and the images they name.

Rows are dictionaries with the number that the row has in its file, from 1, a header counted: errors name file and row.
"""

import codecs
import csv
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from acpo_utils.files import one_line


Row = dict[str, object]
Scale = tuple[float, float]
Cells = list[tuple[int, list]]

TEXT = (
    "image",
    "name",
    "prompt",
    "generator",
    "reference",
    "dis_img_path",
)  # columns that hold text; all others hold numbers
# scipy takes the number of a type in a file for an index, unchecked: a wrong byte can end the process that reads it, or keep
# it busy for ever. What counts is the process's own time, which on a busy machine is far from the clock's.
READ_MAT = """
import json, sys
import numpy as np
from scipy.io import loadmat

try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
except ImportError:
    pass  # Windows
variables = {name: value for name, value in loadmat(sys.argv[1], appendmat=False).items() if not name.startswith("__")}
value = variables.get(sys.argv[2])
numbers = isinstance(value, np.ndarray) and value.dtype.kind in "iuf"
print(json.dumps({"names": list(variables), "values": value.astype(float).ravel().tolist() if numbers else None}))
"""
MAT_SECONDS = 300  # by the clock
MAX_CELLS = 10_000_000  # of a workbook's sheet, empty ones counted: twenty times the largest set's


def find_file(root: Path, *names: str) -> Path | None:
    """The first of `names` that is a file under `root`."""
    return next((root / name for name in names if (root / name).is_file()), None)


def require_file(root: Path, *names: str) -> Path:
    """As `find_file`; raises ValueError if there is none, with the tables and folders that `root` holds instead."""
    if (file := find_file(root, *names)) is None:
        tables = {".csv", ".xlsx", ".mat", ".txt"}
        found = sorted(f"{item.name}{'/' * item.is_dir()}" for item in root.iterdir())
        found = [name for name in found if name.endswith("/") or Path(name).suffix.lower() in tables][:10]
        raise ValueError(f"{root}: expected {' or '.join(names)}, found {', '.join(found) or 'no table'}.")
    return file


def read_cells(file: Path) -> Cells:
    """Rows of a .csv or of an .xlsx's first sheet that are not blank, with their numbers; empty cells are None.

    Raises ValueError for a file that is no such table, an empty one, and a csv row longer than the first one: a comma
    in a prompt without quotes would shift the scores.
    """
    rows = _read_workbook(file) if file.suffix.lower() == ".xlsx" else _read_text_table(file)
    cells = [[cell.strip() or None if isinstance(cell, str) else cell for cell in row] for row in rows]
    numbered = [(number, row) for number, row in enumerate(cells, start=1) if any(cell is not None for cell in row)]
    if not numbered:
        raise ValueError(f"{file}: expected a table, found an empty file.")
    return numbered


def _read_workbook(file: Path) -> list[Sequence]:
    from openpyxl import load_workbook  # a tenth of a second, and only where a set's table is an .xlsx

    try:
        sheet = load_workbook(file, data_only=True).worksheets[0]
        size = sheet.max_row * sheet.max_column
        rows = list(sheet.iter_rows(values_only=True)) if size <= MAX_CELLS else []
    except Exception as error:  # openpyxl passes on what zip, XML and its own parts raise
        raise ValueError(f"{file}: expected an .xlsx workbook, found something else or damage.") from error
    if size > MAX_CELLS:  # one stray cell at the far end is enough, and all up to it would be made
        raise ValueError(f"{file}: expected a table, found cells in {sheet.dimensions}: delete those far from it.")
    return rows


def _read_text_table(file: Path) -> list[Sequence]:
    content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        row, byte = content.count(b"\n", 0, error.start), f"{content[error.start]:#04x}"
        found = f"byte {byte}, as other encodings have it (cp1252, UTF-16): save it as UTF-8"
        raise ValueError(f"{file}, after row {row}: expected UTF-8 text, found {found}.") from error
    rows = []
    try:
        for row in csv.reader(io.StringIO(text, newline=""), strict=True):
            rows.append(row)
            if len(rows[0]) == 1 and (sign := next((sign for sign in ";\t" if sign in rows[0][0]), None)):
                found = f"{sign!r} in {rows[0][0]!r}: save it with commas"
                raise ValueError(f"{file}, row 1: expected commas between the columns, found {found}.")
            if len(row) > len(rows[0]):
                found = f"{len(row)} cells: put quotes around text with commas"
                raise ValueError(f"{file}, row {len(rows)}: expected {len(rows[0])} cells, found {found}.")
    except csv.Error as error:
        raise ValueError(f"{file}, row {len(rows) + 1}: expected comma-separated values, found: {error}.") from error
    return rows


def read_table(
    file: Path,
    columns: dict[str, str],
    scale: Scale,
    optional: tuple[str, ...] = (),
    headerless: tuple[str, ...] = (),
    cells: Cells | None = None,
) -> list[Row]:
    """Rows {"row": number in the file, ...} with the values of `columns` (name in the file: name in the row).

    Text columns come as str; scores as float within `scale`; std_... columns as float of at least 0. Names are
    compared without case. `optional` columns may be missing or have empty cells; `headerless` is the order of the
    columns where there is no header. `cells`: what `read_cells` gave, if the file has been read already.

    Raises ValueError, in one line, naming file and row: a column that is missing, an empty cell, a number outside its
    range, no rows.
    """
    cells = cells or read_cells(file)
    first = [str(cell).lower() for cell in cells[0][1]]
    has_header = not set(columns).isdisjoint(first)
    names = first if has_header else list(headerless)[: len(first)]
    if missing := [name for name in columns if name not in names]:
        found = one_line(", ".join("(empty)" if cell is None else str(cell) for cell in cells[0][1]))
        raise ValueError(
            f"{file}, row {cells[0][0]}: expected columns {', '.join(columns)}, found no {missing[0]} in {found}."
        )
    rows = []
    for number, values in cells[has_header:]:
        cell = dict(zip(names, values))
        row = {"row": number}
        for name in (*columns, *optional):
            if name not in optional or cell.get(name) is not None:
                row[columns.get(name, name)] = _check(file, number, name, cell.get(name), scale)
        rows.append(row)
    if not rows:
        raise ValueError(f"{file}: expected rows below the header, found none.")
    return rows


def read_numbers(file: Path, key: str, count: int, scale: Scale) -> list[float]:
    """`count` numbers in `scale`: variable `key` of a .mat file, of any shape, or the words of a .txt file.

    Raises ValueError for a file that is neither, no such variable of real numbers, another count, and, with its row, a
    number outside the scale.
    """
    if file.suffix.lower() == ".mat":
        values = _read_mat(file, key)
    else:
        values = file.read_text(encoding="utf-8-sig", errors="replace").split()
    if len(values) != count:
        raise ValueError(f"{file}: expected {count} scores, found {len(values)}.")
    return [_check(file, number, "score", value, scale) for number, value in enumerate(values, start=1)]


def _read_mat(file: Path, key: str) -> list[float]:
    """Variable `key` of a MATLAB file, row after row, by scipy in a process of its own."""
    command = [sys.executable, "-P", "-c", READ_MAT, str(file), key]
    try:
        with open(file, "rb") as opened:
            if opened.read(128)[126:] not in (b"IM", b"MI"):  # the order of bytes
                raise ValueError("no header of MATLAB")
        process = subprocess.run(command, capture_output=True, text=True, timeout=MAT_SECONDS, check=True)
        found = json.loads(process.stdout)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{file}: expected a MATLAB file that can be read in {MAT_SECONDS} seconds.") from error
    except (subprocess.SubprocessError, ValueError) as error:
        raise ValueError(f"{file}: expected a MATLAB file up to version 7.2, found damage or another file.") from error
    if key not in found["names"]:
        raise ValueError(f"{file}: expected variable {key}, found {one_line(', '.join(found['names'])) or 'nothing'}.")
    if found["values"] is None:
        raise ValueError(f"{file}: expected real numbers in {key}, found another kind of variable.")
    return found["values"]


def _check(file: Path, number: int, name: str, cell: object, scale: Scale) -> str | float:
    """A cell as text, or as a number: a score within `scale`, a std of at least 0."""
    found = "an empty cell" if cell is None else repr(cell)
    if name in TEXT:
        if cell is None:
            raise ValueError(f"{file}, row {number}: expected text for {name}, found {found}.")
        return str(cell)
    low, high = (0.0, math.inf) if name.startswith("std") else scale
    try:
        value = math.nan if isinstance(cell, bool) else float(cell)  # nan is in no range
    except (TypeError, ValueError, OverflowError):  # a date, a word, a number of 400 digits
        value = math.nan
    if not low <= value <= high or math.isinf(value):
        expected = f"a number from {low:g} to {high:g}" if math.isfinite(high) else f"a number of at least {low:g}"
        raise ValueError(f"{file}, row {number}: expected {expected} for {name}, found {found}.")
    return value


def find_images(file: Path, rows: list[Row], root: Path, *patterns: str) -> list[Row]:
    """`rows` of `file` with `image` as the path of a file that exists.

    The first of `patterns` (such as "images/{image}", filled in from the row) that fits the first row must fit all of
    them. Raises ValueError, naming file and row, for an image that is missing, or listed twice.
    """
    if not rows:
        raise ValueError(f"{file}: expected rows with images, found none.")
    # os.path.isfile() is False for what cannot be a name; Path.is_file() raises OSError for one that is too long.
    pattern = next((pattern for pattern in patterns if os.path.isfile(root / pattern.format(**rows[0]))), None)
    if pattern is None:
        names = one_line(" or ".join(pattern.format(**rows[0]) for pattern in patterns))
        raise ValueError(f"{file}, row {rows[0]['row']}: expected image {names} in {root}, found none.")
    seen, found = {}, []
    for row in rows:
        image = root / pattern.format(**row)
        if image in seen:
            first = seen[image]
            raise ValueError(f"{file}, row {row['row']}: expected each image once, found {image} in row {first} too.")
        if not os.path.isfile(image):
            raise ValueError(f"{file}, row {row['row']}: expected image {one_line(image)}, found none.")
        seen[image] = row["row"]
        found.append(row | {"image": str(image)})
    return found
