"""Arrays of numbers from a .mat file, as MATLAB writes it from version 5 to 7.2.

`scipy.io.loadmat` reads more kinds of variables, but takes the number of a type for an index, unchecked: a wrong byte in
a file can end the process. https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf has the format.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np


MATRIX, COMPRESSED = 14, 15  # types of elements; those of numbers, as numpy names them:
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}


def read_mat(file: Path) -> dict[str, np.ndarray | None]:
    """{name of a variable: its values (n,), row after row}, None for one that is no array of real numbers.

    Raises ValueError naming the file if it is damaged, of another version, or no MATLAB file.
    """
    data, variables = memoryview(file.read_bytes()), {}
    try:
        order = {b"IM": "<", b"MI": ">"}[bytes(data[126:128])]
        for kind, content in _elements(data[128:], order):
            if kind == COMPRESSED:
                [(kind, content)] = _elements(memoryview(zlib.decompress(content)), order)
            if kind != MATRIX:
                raise ValueError(f"element of type {kind}")
            name, values = _variable(content, order)
            variables[name] = values
    except (KeyError, ValueError, struct.error, zlib.error) as error:
        raise ValueError(f"{file}: expected a MATLAB file up to version 7.2, found damage or another file.") from error
    return variables


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """(type, content) of what stands one after another in a file, or in a variable of it."""
    while data:
        kind, size = struct.unpack_from(f"{order}2I", data)
        short = kind >> 16  # at most four bytes: their number stands here, and they where it would stand
        kind, start, size = (kind & 0xFFFF, 4, short) if short else (kind, 8, size)
        if start + size > (8 if short else len(data)):
            raise ValueError("element of more bytes than there are")
        yield kind, data[start : start + size]
        data = data[8 if short else start + size + (-size % 8 if kind != COMPRESSED else 0) :]


def _variable(content: memoryview, order: str) -> tuple[str, np.ndarray | None]:
    (_, flags), (_, shape), (_, name), *parts = _elements(content, order)
    (flags, _), name = struct.unpack(f"{order}2I", flags), bytes(name).decode("latin-1")
    is_numeric, is_complex = 6 <= flags & 0xFF <= 15, bool(flags & 0x800)
    if not is_numeric or is_complex:
        return name, None
    [(kind, values)] = parts
    values = np.frombuffer(values, order + NUMBERS[kind])
    return name, values.reshape(np.frombuffer(shape, f"{order}i4"), order="F").ravel()
