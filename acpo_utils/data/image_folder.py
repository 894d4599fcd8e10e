"""Folders of pictures: with metadata, with a .txt beside each, or alone. Links are followed; what is left out is said."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from acpo_utils.data.metadata import METADATA, read_metadata
from acpo_utils.data.text_files import read_text
from acpo_utils.files import one_line


logger = logging.getLogger(__name__)

CAPTIONS = (".txt", ".caption")  # kohya's two, the first also ComfyUI's
ARCHIVE_ENDINGS = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")


def load_image_folder(
    folder: Path, image_column: str | None = None, caption_column: str | None = None, metadata: Path | None = None
) -> datasets.Dataset:
    """The pictures below `folder`, undecoded: a column "image" of {"bytes", "path"}, and what its metadata says of each.

    Rows and their order are those of `datasets`' own imagefolder: of the metadata, or all pictures sorted by path.

    Args:
        image_column: another column of pictures, see `read_metadata`. caption_column: where there is no metadata, it
            is made of the .txt beside each picture; None: not looked for.
        metadata: the one file to read; by default every metadata.jsonl, .csv and .parquet below `folder`.
    Raises:
        ValueError: in one line, for a folder without pictures, a link to a folder around it, two metadata files in one
            folder, an empty .txt, values of several kinds in a column, and as `read_metadata` does.
    """
    files = list_files(folder)
    pictures = [file for file in files if os.path.splitext(file)[1].lower() in ImageFolder.EXTENSIONS]
    tables = [metadata] if metadata else _metadata_files(files)
    captions = {} if tables or caption_column is None else _captions_beside(pictures, files)
    if tables:
        rows = [row for table in tables for row in read_metadata(table, image_column, caption_column)]
        records, why = [record for _, record in rows], "the metadata does not name them"
    elif captions:
        records = [{"image": Path(picture), caption_column: text} for picture, text in captions.items()]
        why = "they have no .txt beside them"
    else:
        records, why = [{"image": Path(picture)} for picture in pictures], ""
    if not records:
        unpack = " Unpack archives first." if any(file.lower().endswith(ARCHIVE_ENDINGS) for file in files) else ""
        raise ValueError(
            f"--train_data_dir {folder}: found no pictures but {_endings(files)}. Expected images with a metadata.jsonl, "
            f".csv or .parquet, or with a .txt beside each, or parquet files.{unpack}"
        )
    named = {str(value) for record in records for value in record.values() if isinstance(value, Path)}
    if left_out := [picture for picture in pictures if picture not in named]:
        logger.warning(
            "%d of %d pictures in %s are left out, since %s, the first: %s",
            len(left_out), len(pictures), folder, why, left_out[0],
        )  # fmt: skip
    return _to_dataset(records, folder)


def list_files(folder: Path) -> list[str]:
    """Absolute paths of all files below `folder`, sorted. Linked folders are followed; what is hidden, by a dot before
    its name or two underscores before a folder's, is left out, as `datasets` does.

    Raises ValueError for a link to a folder around it, and for a folder that cannot be read.
    """
    return sorted(_walk(os.path.abspath(folder), ()))


def _walk(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:
        raise ValueError(f"{folder}: expected a link to another folder, found one to {real}, around it: remove it.")
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise ValueError(f"{folder}: expected a folder that can be read, found: {error.strerror}.") from error
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            if not name.startswith((".", "__")):
                yield from _walk(path, (*above, real))
        elif not name.startswith(".") and (os.path.isfile(path) or os.path.islink(path)):
            yield path  # a link to nothing, too: `check_images` names it


def row_of(source: str, picture: str) -> str | None:
    """Which row names `picture` in the metadata of `source`, a folder or that file, as "FILE, row N"; None: none does."""
    if os.path.isdir(source):  # and not Path.is_dir(), which raises OSError for what is too long for a path
        tables = _metadata_files(list_files(Path(source)))
    else:
        tables = [Path(source)] if os.path.isfile(source) and not source.lower().endswith(".parquet") else []
    for table in tables:
        for number, record in read_metadata(table):
            if picture in {str(value) for value in record.values() if isinstance(value, Path)}:
                return f"{table}, row {number}"
    return None


def _metadata_files(files: list[str]) -> list[Path]:
    tables = [Path(file) for file in files if os.path.basename(file).lower() in METADATA]
    first = {}
    for table in tables:
        if (other := first.setdefault(table.parent, table)) is not table:
            raise ValueError(f"{other}: expected one metadata file in a folder, found {table.name} too: remove one.")
    return tables


def _captions_beside(pictures: list[str], files: list[str]) -> dict[str, str]:
    """Picture: caption, in one line, for each picture with a text file of the same name."""
    texts = {}
    for ending in reversed(CAPTIONS):
        texts |= {os.path.splitext(file)[0]: file for file in files if file.lower().endswith(ending)}
    captions = {}
    for picture in pictures:
        if file := texts.get(os.path.splitext(picture)[0]):
            captions[picture] = one_line(read_text(Path(file)))
            if not captions[picture]:
                raise ValueError(f"{file}: expected a caption, found an empty file: write one, or remove the file.")
    return captions


def _endings(files: list[str]) -> str:
    endings = Counter(os.path.splitext(file)[1].lower() or "without an ending" for file in files)
    return ", ".join(f"{count} {ending}" for ending, count in endings.most_common(5)) or "no file"


def _to_dataset(records: list[dict], folder: Path) -> datasets.Dataset:
    """A column for each name in the records. Its fingerprint is that of the values, and of when each picture changed."""
    columns, digest = {}, hashlib.sha256()
    for name in dict.fromkeys(name for record in records for name in record):
        values = [record.get(name) for record in records]
        if any(isinstance(value, Path) for value in values):
            values = [{"bytes": None, "path": str(path)} if isinstance(path, Path) else None for path in values]
            times = [os.stat(cell["path"]).st_mtime_ns for cell in values if cell and os.path.isfile(cell["path"])]
            digest.update(repr(times).encode())
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise ValueError(
                f"{folder}: expected values of one kind in column {name}, found: {one_line(error)}."
            ) from error
        digest.update(f"{name} {values!r}".encode(errors="backslashreplace"))
    return datasets.Dataset(pyarrow.table(columns), fingerprint=digest.hexdigest()[:16])
