"""Tables as text: markdown whose columns line up, and csv."""

import csv
from collections.abc import Sequence
from pathlib import Path

from acpo_utils.checkpoints import atomic_write


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
