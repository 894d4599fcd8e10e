"""Prompt files, and training on prompts alone (`--late_start rollout` needs no images)."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from pyarrow import parquet

from acpo_utils.data.captioned import tokenize
from acpo_utils.files import is_utf8, parquet_errors, read_json_lines
from acpo_utils.randomness import EpochOrder


class Prompts(torch.utils.data.Dataset):
    """An endless, reproducible stream of prompts, cut at `num_samples`: item n depends on (seed, n) alone.

    Each epoch has its own order, drawn from (seed, epoch). Items are {"prompt": str, "input_ids": (L,) int64}, and
    `acpo_utils.data.captioned.collate` batches them.
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
        return {"prompt": prompt, "input_ids": tokenize(self.tokenizer, [prompt])[0]}


def read_prompts(path: str | Path, columns: Sequence[str] = ("prompt", "text")) -> list[str]:
    """Prompts of a text file (one per line), or of a .csv, .tsv, .jsonl or .parquet file.

    `columns`: the names of their prompt column, lower case, the first that is there counts.

    Raises ValueError naming the file (and the row) if it is missing, empty, undecodable, or has no such column.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"Prompt file not found: {path}.")
    if path.suffix == ".parquet":
        with parquet_errors(f"Prompt file {path}"):
            table = parquet.ParquetFile(path)
            names = [name for name in table.schema_arrow.names if name.lower() in columns]
            rows = list(enumerate(table.read(columns=names).to_pylist(), start=1))  # and not the images beside them
    elif path.suffix == ".jsonl":
        rows = list(read_json_lines(path))
    else:
        rows = _read_text(path, columns[0])

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


def _read_text(path: Path, column: str) -> list[tuple[int, dict]]:
    """(row, cells) of a .csv or .tsv file; of any other, each line that is not blank as its one `column`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"Prompt file {path}: expected UTF-8 text, found byte {error.start} undecodable.") from error
    if "\0" in text:  # UTF-16 without its mark
        raise ValueError(f"Prompt file {path}: expected UTF-8 text, found zero bytes. Save it as UTF-8.")
    if path.suffix not in (".csv", ".tsv"):
        return [(number, {column: line}) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
        return list(enumerate(rows, start=1))
    except csv.Error as error:
        raise ValueError(f"Prompt file {path}: expected a table of separated values, found: {error}.") from error
