"""The table of an evaluation, as the paper's tables 2 and 3: a row for each model, prompt set and metric."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from acpo_utils.evaluation.guide_family import FAMILY_MARK, family_note
from acpo_utils.files import aligned_table, atomic_write, write_csv
from acpo_utils.statistics import holm, paired_comparison, win_rate_interval


NUMBERS = (
    "base_mean",
    "finetuned_mean",
    "mean_difference",
    "std_difference",
    "t",
    "p",
    "p_holm",
    "win_rate",
    "win_rate_low",
    "win_rate_high",
    "tie_rate",
    "change",
    "change_low",
    "change_high",
    "real_mean",
)


def paired_row(base: Sequence[float], finetuned: Sequence[float], lower_is_better: bool = False) -> dict:
    """`paired_comparison` of scores of the same prompts, with Wilson's 95 % interval of the win rate.

    The difference is fine-tuned minus base, whichever is better; a win is a better score.
    Raises ValueError as `paired_comparison` does.
    """
    row = paired_comparison(base, finetuned, lower_is_better)
    low, high = win_rate_interval(round(row["win_rate"] * row["n"]), row["n"])
    return dict.fromkeys(NUMBERS) | row | {"win_rate_low": low, "win_rate_high": high}


def set_row(base: float, finetuned: float, n: int) -> dict:
    """A row of two values of whole sets of `n` images each: they have a difference, and no test of single images."""
    row = {"n": n, "base_mean": base, "finetuned_mean": finetuned, "mean_difference": finetuned - base}
    return dict.fromkeys(NUMBERS) | row


def finish_rows(rows: list[dict]) -> list[dict]:
    """Adds `p_holm`, corrected over all the rows that have a test; what is not a number becomes None, as in JSON."""
    tested = [row for row in rows if row["p"] is not None]
    for row, adjusted in zip(tested, holm([row["p"] for row in tested])):
        row["p_holm"] = adjusted
    return [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]


def metric_name(row: dict) -> str:
    """The metric as a table names it: an arrow down where lower is better, "to real" where the real images' value is best;
    "(guide)" if it guided this model, "(guide's family)" if its network is of a guide's kind."""
    name = row["metric"]
    if row["real_mean"] is not None:
        name += " → real"
    elif row["lower_is_better"]:
        name += " ↓"
    if row["guide"]:
        return f"{name} (guide)"
    return f"{name} {FAMILY_MARK}" if row.get("family") else name


def table_cells(rows: list[dict]) -> list[list[str]]:
    """The header and the rows as text; the columns model, prompts, real and change only where they say something."""

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    def win_rate(row: dict) -> str:
        if row["win_rate"] is None:
            return "–"
        return f"{100 * row['win_rate']:.1f} % [{100 * row['win_rate_low']:.1f}, {100 * row['win_rate_high']:.1f}]"

    header = ["model", "prompts", "metric", "base", "fine-tuned", "real", "difference", "change [95 %]", "std", "t"]
    cells = [[*header, "p (Holm)", "win rate [95 %]", "n"]]
    for row in rows:
        line = [
            row["model"],
            row["prompts"],
            metric_name(row),
            number(row["base_mean"], ".4f"),
            number(row["finetuned_mean"], ".4f"),
            number(row["real_mean"], ".4f"),
            number(row["mean_difference"], "+.4f"),
            change_cell(row),
            number(row["std_difference"], ".4f"),
            number(row["t"], ".2f"),
            number(row["p_holm"], ".2g"),
            win_rate(row),
            str(row["n"]),
        ]
        cells.append(line)
    single = [column for column in (0, 1) if len({line[column] for line in cells[1:]}) <= 1]
    single += [column for column in (5, 7) if {line[column] for line in cells[1:]} <= {"–"}]
    return [[cell for column, cell in enumerate(line) if column not in single] for line in cells]


def change_cell(row: dict) -> str:
    """The change in percent of the base's value, with its interval; a dash where there is none."""
    numbers = [row["change"], row["change_low"], row["change_high"]]
    if any(value is None or not math.isfinite(value) for value in numbers):
        return "–"
    change, low, high = (100 * value for value in numbers)
    return f"{change:+.1f} % [{low:+.1f}, {high:+.1f}]"


def evaluation_table(rows: list[dict]) -> str:
    """The rows as a markdown table (`aligned_table`)."""
    cells = table_cells(rows)
    return aligned_table(cells, text_columns=cells[0].index("metric") + 1)


def write_evaluation_tables(folder: str | Path, results: dict) -> None:
    """Writes table.md, table.csv (all numbers of every row) and scores.csv (every score of every image)."""
    folder = Path(folder)
    with atomic_write(folder / "table.md") as temporary:
        temporary.write_text(evaluation_table(results["rows"]) + "\n" + evaluation_notes(results), encoding="utf-8")
    fields = ["model", "prompts", "metric", "guide", "family", "lower_is_better", "n", *NUMBERS]
    write_csv(folder / "table.csv", fields, results["rows"])
    lines = []
    for model, images in results["images"].items():
        for i, (prompt, image) in enumerate(zip(results["prompts"], images)):
            scores = {metric: values[model][i] for metric, values in results["scores"].items()}
            lines.append({"model": model} | prompt | {"image": image} | scores)
    write_csv(folder / "scores.csv", ["model", "set", "row", "text", "image", *results["scores"]], lines)


def evaluation_notes(results: dict) -> str:
    """What stands below the table: the guides, what could not be measured and why."""
    lines = []
    if any(row["guide"] for row in results["rows"]):
        lines.append("guide: the model was trained to raise this score; it is no independent evidence.")
    lines += family_note(row.get("family") for row in results["rows"])
    lines += [f"{metric}: unavailable. {reason}" for metric, reason in results["unavailable"].items()]
    return "".join(f"\n{line}\n" for line in lines)


def finite_numbers(value):
    """`value`, of dictionaries and lists, as JSON can hold it: None for what is not a finite number."""
    if isinstance(value, dict):
        return {name: finite_numbers(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_numbers(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def comparison_table(comparisons: dict[str, dict]) -> str:
    """A markdown table, one row per metric, of what `paired_comparison` returned; a dash where there is no test."""

    def number(value: float, form: str) -> str:
        return format(value, form) if math.isfinite(value) else "–"

    lines = ["| metric | base | fine-tuned | difference | t | p | win rate | n |", "|---|---|---|---|---|---|---|---|"]
    for name, row in comparisons.items():
        lines.append(
            f"| {name} | {row['base_mean']:.4f} | {row['finetuned_mean']:.4f} | {row['mean_difference']:+.4f} "
            f"| {number(row['t'], '.2f')} | {number(row['p'], '.2g')} | {100 * row['win_rate']:.1f} % | {row['n']} |"
        )
    return "\n".join(lines)


def panel_table(rows: Iterable[dict]) -> str:
    """A markdown table of the panel's rows, of one model against its base."""
    lines = ["| beside real images | base | fine-tuned | real | change [95 %] | n |", "|---|---|---|---|---|---|"]
    for row in rows:
        real = "–" if row["real_mean"] is None else f"{row['real_mean']:.4f}"
        numbers = f"{row['base_mean']:.4f} | {row['finetuned_mean']:.4f} | {real} | {change_cell(row)} | {row['n']}"
        lines.append(f"| {metric_name(row)} | {numbers} |")
    return "\n".join(lines)
