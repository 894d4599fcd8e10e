"""What --train_data_dir may be: an image folder or its metadata file, parquet files, or a folder of `save_to_disk`."""

import glob
import os
from pathlib import Path

import datasets
from pyarrow import parquet

from acpo_utils.data.image_folder import ARCHIVE_ENDINGS, load_image_folder
from acpo_utils.data.metadata import METADATA
from acpo_utils.files import one_line, parquet_errors


def open_local(
    path: Path,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    cache_dir: str | None = None,
) -> datasets.Dataset:
    """The rows of `path`; `split` is one of its parquet files, or of a saved DatasetDict, and all there is otherwise.

    Raises ValueError, in one line that says what to do, for anything else, and for what cannot be read.
    """
    if path.is_dir():
        if is_saved(path):
            return _load_saved(path, split)
        if found := parquet_files(path):
            files = [file for file in found if file.stem == split or file.stem.startswith(f"{split}-")]
            if not files:
                names = ", ".join(file.name for file in found)
                raise ValueError(
                    f"--train_data_dir {path}: expected {split}.parquet or {split}-*.parquet, found {names}."
                )
            return _load_parquet(path, files, split, cache_dir)
        return load_image_folder(path, image_column, caption_column)
    kind = path.suffix.lower()
    if not path.is_file():
        raise ValueError(f"--train_data_dir {path}: expected a folder or a .parquet file, found nothing there.")
    if kind in (".jsonl", ".csv") or kind == ".parquet" and _is_metadata(path):
        return load_image_folder(path.parent, image_column, caption_column, metadata=path)
    if kind == ".parquet":
        return _load_parquet(path, [path], split, cache_dir)
    if kind in ARCHIVE_ENDINGS:
        raise ValueError(
            f"--train_data_dir {path}: expected a folder, found an archive: unpack it and name its folder."
        )
    raise ValueError(
        f"--train_data_dir {path}: expected a folder, a .parquet file, or the metadata of pictures (.jsonl, .csv, "
        f".parquet), found a file{f' of ending {kind}' if kind else ''}: name the folder that holds the pictures."
    )


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of a Dataset or of a DatasetDict wrote `folder`."""
    names = ("state.json", "dataset_info.json")
    return (folder / "dataset_dict.json").is_file() or all((folder / name).is_file() for name in names)


def parquet_files(folder: Path) -> list[Path]:
    """Those that hold rows, in `folder` or its "data", sorted: not the metadata of pictures beside it."""
    places = [place for place in (folder, folder / "data") if place.is_dir()]
    files = [file for place in places for file in place.iterdir() if file.suffix.lower() == ".parquet"]
    return sorted(file for file in files if not file.name.startswith(".") and file.name.lower() not in METADATA)


def _is_metadata(file: Path) -> bool:
    with parquet_errors(file):
        return file.name.lower() in METADATA and "file_name" in parquet.read_schema(file).names


def _load_parquet(source: Path, files: list[Path], split: str, cache_dir: str | None) -> datasets.Dataset:
    # Absolute and escaped: `datasets` takes a path for a pattern, and "cats [1]" for the folder "cats 1".
    patterns = [glob.escape(os.path.abspath(file)) for file in files]
    try:
        return datasets.load_dataset("parquet", data_files={split: patterns}, split=split, cache_dir=cache_dir)
    except Exception as error:  # datasets raises a dozen unrelated types here; the reader needs the sentence
        raise ValueError(
            f"Data set {source} ({split}) cannot be loaded: {reason(error)} Expected images with a metadata.jsonl, or "
            "parquet files."
        ) from error


def _load_saved(folder: Path, split: str) -> datasets.Dataset:
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # as above
        raise ValueError(f"--train_data_dir {folder}: a damaged folder of save_to_disk: {reason(error)}") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(f"--train_data_dir {folder}: expected a split {split}, found {', '.join(saved)}.")
        saved = saved[split]
    return saved.with_format(None)


def reason(error: BaseException) -> str:
    """What `datasets` says, in one line."""
    error = error.__cause__ or error  # "An error occurred while generating the dataset" says nothing; its cause does
    text = one_line(error) or type(error).__name__
    if "corresponds to no data" in text:
        text = "it is empty."
    if "scripts are no longer supported" in text:
        text += " Turn it into an image folder first (for Visual Genome: examples/prepare_visual_genome.py)."
    return text
