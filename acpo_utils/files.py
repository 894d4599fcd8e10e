"""Files as people give them: read as a whole, or refused in one line that names the file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow import ArrowException


def one_line(text: object) -> str:
    """What another library says, or a file holds, as part of a message: without line breaks."""
    return " ".join(str(text).split())


def is_utf8(text: str) -> bool:
    """Whether `text` can be encoded: JSON may hold half of a surrogate pair, which no file and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """(row, value) for each line of a JSON Lines file that is not blank; rows count from 1.

    Raises ValueError naming the file, and the row, for text that is not UTF-8 and for a line that is not JSON.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines(): U+2028 is no end of a JSON line
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, found byte {error.start} undecodable.") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:  # not JSON; a number of 5,000 digits; lists nested as deep
                raise ValueError(f"{path}, row {number}: expected a JSON object, found: {one_line(error)}.") from error
            yield number, value


@contextmanager
def parquet_errors(name: str | Path) -> Iterator[None]:
    """Around whatever reads the parquet file `name`: pyarrow's errors, of four families, become one ValueError.

    OSError is what it raises for a damaged page, UnicodeDecodeError for text, OverflowError for a date.
    """
    try:
        yield
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} is damaged or no parquet file: {one_line(error)}") from error
