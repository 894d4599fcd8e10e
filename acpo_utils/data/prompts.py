"""Prompt files, and training on prompts alone (`--late_start rollout` needs no images)."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from pyarrow import parquet

from acpo_utils.data.captioned import token_ids
from acpo_utils.data.text_files import read_json_lines, read_separated, read_text
from acpo_utils.files import is_utf8, one_line, parquet_errors
from acpo_utils.randomness import EpochOrder


class Prompts(torch.utils.data.Dataset):
    """An endless, reproducible stream of prompts, cut at `num_samples`: item n depends on (seed, n) alone.

    Each epoch has its own order, drawn from (seed, epoch). Items are {"prompt": str, "input_ids": (L,) int64}, of several
    tokenizers as in `token_ids`, and `acpo_utils.data.captioned.collate` batches them.
    """

    def __init__(self, prompts: list[str], tokenizer, num_samples: int, seed: int = 0):
        self.prompts, self.tokenizer, self.num_samples = prompts, tokenizer, num_samples
        self._row = EpochOrder(len(prompts), seed)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, n: int) -> dict:
        if not 0 <= n < self.num_samples:
            raise IndexError(f"item {n} of {self.num_samples}")
        prompt = self.prompts[self._row(n)]
        return {"prompt": prompt} | {name: ids[0] for name, ids in token_ids(self.tokenizer, [prompt]).items()}


def read_prompts(path: str | Path, columns: Sequence[str] = ("prompt", "text")) -> list[str]:
    """Prompts of a .txt file (one per line; so is a file without an ending), .csv, .tsv, .json, .jsonl or .parquet.

    A .json file is a list of strings, or of objects. `columns`: the names of the tables' prompt column and of the
    objects' key, lower case, the first that is there counts.

    Raises ValueError naming the file (and the row) if it is missing, empty, undecodable, of another ending, or has no
    such column.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"Prompt file not found: {path}.")
    kind = path.suffix.lower()
    if kind == ".parquet":
        with parquet_errors(f"Prompt file {path}"):
            table = parquet.ParquetFile(path)
            names = [name for name in table.schema_arrow.names if name.lower() in columns]
            rows = list(enumerate(table.read(columns=names).to_pylist(), start=1))  # and not the images beside them
    elif kind == ".jsonl":
        rows = list(read_json_lines(path))
    elif kind == ".json":
        rows = _read_json(path, columns)
    elif kind in (".csv", ".tsv"):
        rows = read_separated(path, columns, delimiter="," if kind == ".csv" else "\t", header_row=0)
    elif kind in (".txt", ""):
        rows = _read_lines(path, columns[0])
    else:
        raise ValueError(
            f"Prompt file {path}: expected .txt (a prompt in each line), .csv, .tsv, .json, .jsonl or .parquet, found "
            f"{path.suffix}: save it as one of these."
        )

    prompts = []
    for number, row in rows:
        cells = {str(name).lower(): value for name, value in row.items()} if isinstance(row, dict) else {}
        prompt = next((cells[name] for name in columns if name in cells), None)
        if not isinstance(prompt, str) or not prompt.strip() or not is_utf8(prompt):
            expected = " or ".join(f"`{name}`" for name in columns)
            raise ValueError(f"Prompt file {path}, row {number}: expected text in column {expected}, found {row!r}.")
        prompts.append(prompt.strip())
    if not prompts:
        raise ValueError(f"Prompt file {path} is empty: expected at least one prompt.")
    return prompts


def _read_json(path: Path, columns: Sequence[str]) -> list[tuple[int, object]]:
    """(row, object) of a list; rows count from 1, and a string stands for an object with the first of `columns`."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON; a number of 5,000 digits; lists nested as deep
        hint = " A file with an object in each line is named .jsonl." if "Extra data" in str(error) else ""
        raise ValueError(f"Prompt file {path}: expected JSON, found: {one_line(error)}.{hint}") from error
    if not isinstance(content, list):
        names = " or ".join(f'"{name}"' for name in columns)
        found = f"an object with {', '.join(list(content)[:5])}" if isinstance(content, dict) else repr(content)
        raise ValueError(
            f"Prompt file {path}: expected a list of strings, or of objects with {names}, found {one_line(found)[:200]}."
        )
    return [(row, {columns[0]: item} if isinstance(item, str) else item) for row, item in enumerate(content, start=1)]


def _read_lines(path: Path, column: str) -> list[tuple[int, dict]]:
    """(row, {column: line}) for each line that is not blank; JSON under another name is refused."""
    text = read_text(path)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if lines and (_is_json(text) or _is_json(lines[0][1])):
        raise ValueError(f"Prompt file {path}: expected a prompt in each line, found JSON: name it .json or .jsonl.")
    return [(number, {column: line}) for number, line in lines]


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list | dict)
    except (ValueError, RecursionError):
        return False
