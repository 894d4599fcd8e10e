"""What a training of evaluators reports: agreement with the ratings, on validation rows while it trains, on test rows once.

What is measured is the script's own: `measure_rows(rows, scores, predictions, args)` returns numbers by name for `rows` (a
data set of n rows), their scores (n,) in (0, 1), and the same on the scale of the ratings, predictions (n,).
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate.logging import get_logger
from tqdm.auto import tqdm

from acpo_utils.files import atomic_write
from acpo_utils.ratings.agreement import save_scatter
from acpo_utils.ratings.best import Best, best_folder
from acpo_utils.ratings.robustness import measure_robustness, rows_to_measure
from acpo_utils.ratings.stages import Stage, to_scale


logger = get_logger(__name__, log_level="INFO")


@torch.no_grad()
def predict(model, score: Callable, loader, accelerator, description: str) -> torch.Tensor:
    """Scores (number of rows,) of all rows of `loader`, in order, on every process.

    `score(model, batch)`: (B,) in (0, 1). The model is left in evaluation mode.
    """
    model.eval()
    scores = []
    for batch in tqdm(loader, desc=description, leave=False, disable=not accelerator.is_local_main_process):
        scores.append(accelerator.gather_for_metrics(score(model, batch)).float().cpu())
    return torch.cat(scores)


def measure(stage: Stage, split: str, scores: torch.Tensor, lines: Sequence, measure_rows: Callable, args) -> dict:
    """What `measure_rows` says of each set of the stage, by name.

    Args:
        scores: of the rows of `split`. lines: slope and intercept of each set's map (`ScoreMaps.lines`).
    """
    measured = {}
    for index, name in enumerate(stage.names):
        rows = stage.of_set(split, index)
        predictions = to_scale(scores[rows], stage.scales[index], lines[index])
        measured[name] = measure_rows(stage.splits[split].select(rows), scores[rows], predictions, args)
    return measured


def log_measured(accelerator, measured: dict[str, dict], step: int, args) -> None:
    """`measured` of the validation at `step`, to the trackers and to the log."""
    for name, metrics in measured.items():
        prefix = f"validation/{name}" if args.stages else "validation"
        numbers = {f"{prefix}/{key}": value for key, value in metrics.items() if key != "pairs"}
        accelerator.log(numbers, step=step)
        line = f"step {step}: {prefix} SRCC {metrics['srcc']:.4f}, PLCC {metrics['plcc']:.4f}"
        if metrics.get("pairs"):
            line += f", pairs {metrics['pairs']['any']['share']:.4f}"
        logger.info(line)


def read_report(args, number: int) -> dict | None:
    """The report of stage `number` of --stages, if it is there: of a run that was cut after its stage's end."""
    file = best_folder(args, number) / "metrics.json"
    return json.loads(file.read_text()) if args.stages and file.is_file() else None


def write_report(
    stage: Stage, best: Best, scores: dict[str, torch.Tensor], measure_rows: Callable, evaluator, args
) -> dict:
    """The report of a stage that is finished, by the evaluator that validation chose; a scatter plot of each set's test rows.

    {"stage", "best_step", "sets": {name: {"validation", "test", of --stages "map"}}}; "test" has what `measure_robustness`
    returns, and with --group_column "groups", the same but for that for each of its values. Of --stages it is kept in the
    stage's folder.

    Args:
        scores: of the rows of validation and test. measure_rows: see above. evaluator: whose scores they are.
    """
    folder = best_folder(args, stage.number)
    sets = {name: {} for name in stage.names}
    for split in ("validation", "test"):
        for name, metrics in measure(stage, split, scores[split], best.lines, measure_rows, args).items():
            sets[name][split] = metrics
    for index, (name, metrics) in enumerate(sets.items()):
        if args.stages:
            metrics["map"] = dict(zip(("slope", "intercept"), best.lines[index]))
        rows = stage.of_set("test", index)
        table = stage.splits["test"].select(rows)
        predictions = to_scale(scores["test"][rows], stage.scales[index], best.lines[index])
        metrics["test"] |= measure_robustness(
            evaluator,
            rows_to_measure(table, args.max_robustness_samples),
            image_column=args.image_column,
            mos_column=args.mos_column,
            prompt_column=args.prompt_column,
            reference_column=args.reference_column,
            device=evaluator.device,
        )
        if args.group_column:
            metrics["test"]["groups"] = _measure_groups(table, scores["test"][rows], predictions, measure_rows, args)
        save_scatter(
            folder / f"scatter-{name}.png" if args.stages else Path(args.output_dir, "scatter.png"),
            table[args.mos_column][:],
            predictions.tolist(),
            stage.scales[index],
            "{count} test rows: SRCC {srcc:.3f}, PLCC {plcc:.3f}".format(**metrics["test"]),
        )
    report = {"stage": stage.number, "best_step": best.step, "sets": sets}
    if args.stages:
        with atomic_write(folder / "metrics.json") as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n")
    return report


def _measure_groups(table, scores: torch.Tensor, predictions: torch.Tensor, measure_rows: Callable, args) -> dict:
    groups = {}
    for row, value in enumerate(table[args.group_column][:]):
        groups.setdefault(str(value), []).append(row)
    return {
        group: measure_rows(table.select(rows), scores[rows], predictions[rows], args)
        for group, rows in sorted(groups.items())
        if len(rows) > 1  # one row has no rank
    }


def named_parts(reports: Sequence[dict], args) -> dict[str, dict]:
    """What `reports` have measured, by the name of its line in a table: "validation", "test", "test, GROUP"."""
    parts = {}
    for report in reports:
        for name, measured in report["sets"].items():
            prefix = f"stage {report['stage']}, {name}, " if args.stages else ""
            parts |= {f"{prefix}{split}": measured[split] for split in ("validation", "test")}
            parts |= {f"{prefix}test, {group}": part for group, part in measured["test"].get("groups", {}).items()}
    return parts


def save_metrics(reports: Sequence[dict], args) -> None:
    """OUTPUT_DIR/metrics.json, a run's last file. Without --stages it is the report of the one set there is."""
    metrics = {"stages": reports}
    if not args.stages:
        [measured] = reports[0]["sets"].values()
        metrics = measured | {"best_step": reports[0]["best_step"]}
    with atomic_write(Path(args.output_dir, "metrics.json")) as temporary:
        temporary.write_text(json.dumps(metrics, indent=2) + "\n")
