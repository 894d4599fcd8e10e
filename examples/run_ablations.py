"""Ablations: a training script run over a grid of its flags and several seeds, one table with intervals over the seeds,
and a plot for each swept flag. Run the same command again and it goes on where it was.

    python examples/run_ablations.py --grid tmax=100,300,500,1000 --grid anchor_weight=0,1 --seeds 3
    python examples/run_ablations.py --grid table10 --seeds 3 -- --pretrained_model_name_or_path PATH ...

What stands after -- goes to every run. With no model there, the scripts run their embedded demos. docs/ablations.md.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import re
import shlex
import signal
import sys
from pathlib import Path

from tqdm.auto import tqdm

from acpo_utils.ablations.check import check_flags
from acpo_utils.ablations.grid import (
    check_rows,
    folder_name,
    parse_variant,
    product_rows,
    read_flags,
    sweeps,
    variant_row,
)
from acpo_utils.ablations.plots import plot_rows, plot_sweep
from acpo_utils.ablations.runs import Run, command, execute, failure, run_status
from acpo_utils.ablations.table import (
    ablation_notes,
    ablation_table,
    read_metrics,
    summarise_rows,
    write_ablation_tables,
)


SD, DDPM = "train_acpo_lora_sd.py", "train_acpo_ddpm.py"
# Where a table of the paper has a baseline, so has the grid: the same training by the diffusion loss alone (section
# 4.1.3). The paper's other baseline, the untrained model, is every row's base.
BASELINE = {"baseline": "--quality_weight 0 --anchor_weight 0"}
# The paper's ablations: {name: (script, {row: flags})}. What a table holds fixed is its script's default, so that flags
# after -- can change it.
NAMED_GRIDS = {
    "table4": (
        SD,
        BASELINE | {f"{n}k images": f"--max_train_samples {n}000" for n in (5, 10, 60)},
    ),
    "table5": (DDPM, BASELINE | {"quality loss": ""}),
    "table6": (SD, BASELINE | {"quality loss": ""}),
    "table7": (
        DDPM,
        {f"quality weight {weight}": f"--quality_weight {weight}" for weight in (0.1, 1, 10)},
    ),
    "table8": (
        DDPM,
        BASELINE
        | {
            "full trajectory": "--full_trajectory",
            "last 1 step": "--last_steps 1",
            "last 10 steps": "--last_steps 10",
        },
    ),
    "table9": (
        SD,
        BASELINE
        | {
            "without anchor": "--anchor_weight 0",
            "with anchor": "--anchor_weight 1",
        },
    ),
    "table10": (
        SD,
        BASELINE | {f"quality weight {weight}": f"--quality_weight {weight}" for weight in (0.1, 1, 100)},
    ),
    "table11": (
        SD,
        BASELINE | {f"tmax {tmax}": f"--tmax {tmax}" for tmax in (100, 300, 500, 1000)},
    ),
    # Tables 5, 7 and 8 as one, with the anchor's part, which the paper shows for Stable Diffusion only.
    "ddpm": (
        DDPM,
        BASELINE
        | {
            "last 1 step": "--last_steps 1",
            "last 10 steps": "--last_steps 10",
            "full trajectory": "--full_trajectory",
        }
        | {f"quality weight {weight}": f"--quality_weight {weight}" for weight in (0.1, 1, 10)}
        | {"without anchor": "--anchor_weight 0"},
    ),
}
# Flags that are not for the caller to pass on, and why.
TAKEN = {
    "seed": "it is given to each run by --seeds",
    "output_dir": "each run has its own folder in the --output_dir before --",
    "resume_from_checkpoint": "an interrupted run is continued by itself",
    "push_to_hub": "a run worth it can be pushed afterwards, from its folder",
    "hub_token": "it would be written down with each run: use `hf auth login`",
}


def parse_args(input_args=None):
    words = list(sys.argv[1:] if input_args is None else input_args)
    end = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--script", help=f"the training script; default: that of the named grid, or {SD}")
    add(
        "--grid",
        action="append",
        default=[],
        help=f"flag=value,value; again for all combinations. Or one of {', '.join(NAMED_GRIDS)}",
    )
    add("--variant", action="append", default=[], help="one more row, 'NAME: --flag value ...'; again for several")
    add("--seeds", type=int, default=3, help="each row is run with the seeds 0 to N - 1")
    add("--accelerate_flags", default="", help='flags of accelerate launch: --accelerate_flags="--num_processes 2"')
    add("--output_dir", help="default: ablations, with a named grid ablations/NAME")
    add("--dry_run", action="store_true", help="check the flags, print the commands, run nothing")

    args, unknown = parser.parse_known_args(words[:end])
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)} (flags of the training script go after --)")
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {args.seeds}")
    args.words = words  # for the head of the table
    args.passed_on = words[end + 1 :]
    return args


def plan(args):
    """The rows of the table and the runs, all rows of a seed before the next seed. Fills in script and output folder."""
    named = [text for text in args.grid if "=" not in text]
    script = SD
    if unknown := [name for name in named if name not in NAMED_GRIDS]:
        raise ValueError(f"--grid: expected flag=value,value or one of {', '.join(NAMED_GRIDS)}, found {unknown[0]!r}")
    if named and len(args.grid) > 1:
        raise ValueError(f"--grid {named[0]} stands alone: add rows by --variant, change its settings after --")
    rows = [parse_variant(text) for text in args.variant]
    if named:
        script, variants = NAMED_GRIDS[named[0]]
        rows += [variant_row(name, flags) for name, flags in variants.items()]
    else:
        rows += product_rows(args.grid)
    check_rows(rows)
    args.script = args.script or str(Path(__file__).resolve().parent / script)
    args.output_dir = args.output_dir or str(Path("ablations", *named))
    if not Path(args.script).is_file():
        raise ValueError(f"--script: expected a training script, {args.script} does not exist")

    runs = []
    for seed in range(args.seeds):
        for row in rows:
            run = Run(
                row=row.name,
                seed=seed,
                folder=Path(args.output_dir, folder_name(row.name, seed)),
                script=args.script,
                accelerate_flags=tuple(shlex.split(args.accelerate_flags)),
                flags=(*args.passed_on, *row.flags, "--seed", str(seed)),
            )
            runs.append(run)
    return rows, runs


def check(rows, runs, args):
    """What can be wrong with a flag is said before the first run: by accelerate's parser and by the script's own."""
    sources = [("after --", args.passed_on)] + [(f"row {row.name!r}", row.flags) for row in rows]
    for where, flags in sources:
        for name in read_flags(flags):
            # argparse takes a flag by its beginning, too
            if name and (taken := [flag for flag in TAKEN if flag.startswith(name)]):
                raise ValueError(f"--{taken[0]} ({where}) cannot be given: {TAKEN[taken[0]]}")
    first = runs[: len(rows)]  # the seeds differ in nothing that could be wrong
    flag_lists = [[*run.flags, "--output_dir", str(run.folder)] for run in first]
    answers = check_flags(args.script, first[0].accelerate_flags, flag_lists)
    for run, answer in zip(first, answers):
        if answer["error"]:
            raise ValueError(f"row {run.row!r}: {Path(args.script).name} does not take its flags: {answer['error']}")
        found = answer["args"]
        need = "--num_eval_images above 0" if found.get("num_eval_images") == 0 else None
        if "eval_prompts" in found and not (found["eval_prompts"] or found.get("validation_prompt")):
            need = "--eval_prompts"
        if need:
            raise ValueError(f"row {run.row!r} would measure nothing, and have no metrics.json: it needs {need}")


def report(rows, runs, args):
    """Writes the tables of what has finished so far. Returns their lines, {run: reason} of what failed, and the notes."""
    metrics = {row.name: [] for row in rows}
    failed = dict.fromkeys(metrics, 0)
    failures = {}
    records = []
    for run in runs:
        status = run_status(run)
        record = {
            "row": run.row,
            "seed": run.seed,
            "folder": str(run.folder),
            "status": status,
        }
        if status == "finished":
            record["metrics"] = read_metrics(run.folder / "metrics.json")
            metrics[run.row].append(record["metrics"])
        if status == "failed":
            record["error"] = failure(run)
            failures[run.folder.name] = record["error"]
            failed[run.row] += 1
        records.append(record)
    lines = summarise_rows(metrics, failed)
    below = ablation_notes(lines, failures)
    finished = sum(record["status"] == "finished" for record in records)
    words = [word for word in args.words if word != "--dry_run"]
    command_line = shlex.join(["python", "examples/run_ablations.py", *words])
    title = f"`{command_line}`\n\n{finished} of {len(runs)} runs finished."
    settings = dict(vars(args))
    del settings["dry_run"], settings["words"]
    results = {
        "settings": settings,
        "rows": [row._asdict() for row in rows],
        "runs": records,
    }
    write_ablation_tables(args.output_dir, lines, title, below, results)
    return lines, failures, below


def plot(rows, lines, args):
    folder = Path(args.output_dir, "plots")
    plot_rows(folder / "rows.png", lines)
    for flag, sweep in sweeps(rows).items():
        plot_sweep(folder / f"{re.sub(r'[^-A-Za-z0-9_]', '-', flag)}.png", flag, sweep, lines)


def main(args):
    rows, runs = plan(args)
    status = {run: run_status(run) for run in runs}  # a folder of something else is found now
    finished = [run for run in runs if status[run] == "finished"]
    if args.dry_run or len(finished) < len(runs):
        check(rows, runs, args)
    if args.dry_run:
        for run in runs:
            print(f"# {run.folder.name}: {status[run]}\n{shlex.join(command(run))}")
        return

    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {args.output_dir} cannot be written to: {error.strerror}") from error

    def stop(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    elsewhere, interrupted = [], False
    progress = tqdm(total=len(runs), initial=len(finished), desc="runs", unit="run")
    try:
        for run in runs:
            if status[run] == "finished":
                continue
            progress.set_postfix_str(run.folder.name)
            result = execute(run)
            if result == "running elsewhere":
                elsewhere.append(run)
                tqdm.write(f"{run.folder.name} is running in another process")
            if result == "failed":
                tqdm.write(f"{run.folder.name} failed: {failure(run)} (all of it: {run.folder / 'run.log'})")
            report(rows, runs, args)
            progress.update()
    except KeyboardInterrupt:
        interrupted = True
    progress.close()
    lines, failures, below = report(rows, runs, args)
    plot(rows, lines, args)
    print(f"\n{ablation_table(lines)}\n\n{below}\n")
    skipped = f"{len(finished)} of {len(runs)} runs were finished before."
    print(f"{skipped} Tables, plots and runs are in {Path(args.output_dir).resolve()}")
    if interrupted:
        print("Interrupted: the same command goes on from here.", file=sys.stderr)
        raise SystemExit(130)
    if elsewhere:
        left = f"{len(elsewhere)} runs are left to another process"
        print(f"{left}: when it has ended, the same command makes the table whole.")
    if failures:
        raise ValueError(f"{len(failures)} of {len(runs)} runs failed; the same command tries them again")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
