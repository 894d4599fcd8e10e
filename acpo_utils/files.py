"""Files as people give them: read as a whole, or refused in one line that names the file."""

import csv
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
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


@contextmanager
def parquet_errors(name: str | Path) -> Iterator[None]:
    """Around whatever reads the parquet file `name`: pyarrow's errors, of four families, become one ValueError.

    OSError is what it raises for a damaged page, UnicodeDecodeError for text, OverflowError for a date.
    """
    try:
        yield
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} is damaged or no parquet file: {one_line(error)}") from error


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` (same suffix); renamed to `path` on success, removed on an error.

    A reader therefore sees the old file or the whole new one, never a half. Example:
    `with atomic_write("metrics.json") as temporary: temporary.write_text(json.dumps(metrics))`
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_strictly(from_pretrained: Callable, path: str | Path, **kwargs):
    """What `from_pretrained` of a diffusers or transformers model reads in `path`; safetensors only, no tensor left out.

    The libraries go on to a pickle, and leave a missing tensor random or uninitialised with no more than a line in the log.
    Raises ValueError naming the file and the tensors if one is missing, of another shape, or does not belong. What does
    not belong is let through in transformers' models, whose classes take a part of a larger one's file.
    """
    model, info = from_pretrained(path, output_loading_info=True, **({"use_safetensors": True} | kwargs))
    kinds = ["missing_keys", "mismatched_keys"]
    if not hasattr(model.config, "to_diff_dict"):  # a diffusers model
        kinds.append("unexpected_keys")
    for kind in kinds:
        if keys := sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(kind) or []):
            where = Path(path, kwargs.get("subfolder") or "")
            raise ValueError(
                f"the weights in {where} do not fit its config.json: {len(keys)} {kind.replace('_keys', '')} tensors, "
                f"e.g. {', '.join(keys[:3])}. Save the model again or get an undamaged copy."
            )
    return model


def aligned_table(cells: Sequence[Sequence[str]], text_columns: int) -> str:
    """A markdown table, for the terminal as well. `cells`: the header, then the rows; all columns but the first
    `text_columns` are numbers, which stand to the right."""
    cells = [[cell.replace("|", "\\|") for cell in line] for line in cells]
    widths = [max(2, *map(len, column)) for column in zip(*cells)]

    def line(texts: Sequence[str]) -> str:
        padded = [t.ljust(w) if i < text_columns else t.rjust(w) for i, (t, w) in enumerate(zip(texts, widths))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if i < text_columns else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def write_csv(path: str | Path, fields: Sequence[str], rows: Sequence[dict]) -> None:
    """A csv file with the columns `fields`; what else a row has is left out."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def package_folder(name: str, pip_command: str) -> Path:
    """The folder of the installed package that is imported as `name`; the package itself is not imported.

    Raises ImportError with `pip_command` if it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ImportError(f"the package {name} is needed and not installed: {pip_command}")
    return Path(spec.submodule_search_locations[0])


@contextmanager
def no_pickles() -> Iterator[None]:
    """Inside, torch.load reads tensors only: torch-fidelity and pyiqa ask it to unpickle whatever they downloaded."""
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        os.environ.pop(variable) if before is None else os.environ.update({variable: before})
