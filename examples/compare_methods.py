"""What ACPO and its rivals reach in the same CPU time: one guide, one data set, one LoRA, on the embedded demo.

    python examples/compare_methods.py                                  # all methods: hours
    python examples/compare_methods.py --methods refl ddpo --seeds 0    # a part; the same command later adds the rest

Each method is trained by rival_methods.py for --seconds of CPU time on one core, seed 0 at every one of --learning_rates. The
rate whose pictures the guide likes best on captions that the table does not use is taken for the other seeds. Every run is
measured after a quarter, a half and all of its time. What is finished is kept: run the command again and it goes on.
docs/reproduce.md has what came out.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import functools
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from acpo_utils.ablations.curves import plot_curves
from acpo_utils.ablations.table import mean_interval
from acpo_utils.data import read_prompts
from acpo_utils.evaluation.denoising_error import prediction_drift
from acpo_utils.evaluation.judges import load_judges
from acpo_utils.evaluation.models import class_of, load_pipeline
from acpo_utils.evaluation.panel import measure_panel
from acpo_utils.evaluation.real_images import read_prompt_images
from acpo_utils.evaluation.sampling import sample_images, score_images
from acpo_utils.evaluators import load_evaluator
from acpo_utils.files import aligned_table, atomic_write, write_csv
from acpo_utils.lora import LORA_NAME


SCRIPT = Path(__file__).resolve().with_name("rival_methods.py")
DEMO_DIR = SCRIPT.parent / "demo"
PROMPTS = DEMO_DIR / "data" / "new_combinations.parquet"
# Flags of rival_methods.py. The demo's settings stand behind them: a LoRA of rank 8, batches of 8, 15 sampling steps with
# guidance 2, the last of which, at t = 66, is the window's only one. docs/method.md has the reasons.
ALL = (
    "--late_every 1 --guide_perturbation 0 --balance_steps 0 --num_validation_prompts 0 --num_eval_prompts 0 "
    "--report_to none"
)
METHODS = {
    "acpo-rollout": "--method acpo",
    "acpo-data": "--method acpo --late_start data --no-scored_guidance",
    "acpo-cheapest": "--method acpo --late_start data --no-scored_guidance --diffusion_timesteps late --cache_latents "
    "--center_crop",
    "acpo-full": "--method acpo --guide_perturbation 2",
    "draft-1": "--method acpo --quality_weight 1 --anchor_weight 0 --diffusion_weight 0",
    "draft+": "--method draft+ --quality_weight 1 --anchor_weight 1",
    "refl": "--method refl --quality_weight 0.001 --diffusion_weight 1",
    "refl-released": "--method refl --quality_weight 0.001 --diffusion_weight 0",
    "alignprop": "--method alignprop --quality_weight 0.01",
    "ddpo": "--method ddpo --quality_weight 1",
}
RATE_SEED = 0
SHARES = (0.25, 0.5, 1)  # of the time, at which a run is measured
DRIFT_IMAGES = 32
# Of the panel, and what the table calls its rows: the change in % of the base model's value. Lower is better.
MEMBERS = ("kid:vgg", "st-lpips:vgg", "st-lpips:alex", "swd")
ROWS = {
    "kid:vgg": "KID VGG",
    "st-lpips:vgg": "ST-LPIPS VGG",
    "st-lpips:alex": "ST-LPIPS Alex",
    "swd-64": "SWD 64 px",
}


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME", help=", ".join(METHODS))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the training")
    add(
        "--learning_rates",
        nargs="+",
        type=float,
        default=[1e-4, 3e-4, 1e-3],
        help="tried with seed 0",
    )
    add("--seconds", type=float, default=150, help="CPU time of a training's steps")
    add("--calibration_steps", type=int, default=8, help="of which all but the first are timed")
    add("--num_prompts", type=int, default=100, help="held-out captions of the table")
    add("--num_rate_prompts", type=int, default=48, help="others, by which the learning rate is chosen")
    add("--flags", default="", help='more flags of rival_methods.py for every run: --flags="--train_batch_size 4"')
    add("--table_only", action="store_true", help="train nothing: the table and the pictures of what is there")
    add("--output_dir", default="method-comparison")
    args = parser.parse_args(input_args)
    for name in ("seconds", "calibration_steps", "num_prompts", "num_rate_prompts"):
        least = 1 if name == "seconds" else 2
        if getattr(args, name) < least:
            parser.error(f"--{name}: expected at least {least}, found {getattr(args, name)}")
    return args


def flags_of(method, args, **more):
    """The words of a run's command line after the script's name."""
    words = shlex.split(f"{ALL} {METHODS[method]} {args.flags}")
    if "--cache_latents" in words:
        words += [
            "--cache_dir",
            str(Path(args.output_dir, "cache")),
        ]  # of all runs: it is filled once, outside of their time
    for name, value in more.items():
        words += [f"--{name}", str(value)]
    return words


def train(folder, words):
    """Runs rival_methods.py on one core to its end, from its latest checkpoint where there is one."""
    record = folder / "command.json"
    if record.is_file():
        if json.loads(record.read_text()) != words:
            raise ValueError(f"{folder} holds a run of other flags: remove it, or choose another --output_dir")
    else:
        with atomic_write(record) as temporary:
            temporary.write_text(json.dumps(words))
    if (folder / LORA_NAME).is_file():
        return
    command = [
        sys.executable,
        str(SCRIPT),
        *words,
        "--output_dir",
        str(folder),
    ]
    if any(folder.glob("checkpoint-*")):
        command += ["--resume_from_checkpoint", "latest"]
    print(f"training {folder.parent.name} {folder.name}", flush=True)
    with open(folder / "run.log", "a") as log:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            preexec_fn=on_one_core,
        )
    if done.returncode:
        raise ValueError(f"the training in {folder} ended with status {done.returncode}: see {folder / 'run.log'}")


def on_one_core():
    """The demo takes a thread for each core that it may use."""
    if hasattr(os, "sched_setaffinity"):  # Linux
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def training_seconds(folder):
    """CPU seconds of the steps up to each one, [0] of none.

    A line of seconds.csv is a step and the time of its process. What the first step of a process took is not known, as the
    time before it is that of loading models: it is taken for the median of the others.
    """
    taken = {}
    previous_step, previous_time = None, None
    for line in (folder / "seconds.csv").read_text().splitlines():
        step, seconds = line.split(",")
        step, seconds = int(step), float(seconds)
        taken[step] = None
        if previous_step == step - 1 and seconds > previous_time:
            taken[step] = seconds - previous_time
        previous_step, previous_time = step, seconds
    known = [seconds for seconds in taken.values() if seconds is not None]
    typical = statistics.median(known)
    total = [0.0]
    for step in range(1, max(taken) + 1):
        seconds = taken.get(step)
        total.append(total[-1] + (typical if seconds is None else seconds))
    return total


def calibrate(method, args):
    """How many steps, a multiple of four, --seconds are, by the mean of a few. Written down in calibration.json."""
    file = Path(args.output_dir, method, "calibration.json")
    if not file.is_file():
        folder = file.parent / "calibration"
        words = flags_of(
            method,
            args,
            seed=RATE_SEED,
            max_train_steps=args.calibration_steps,
        )
        train(folder, words)
        total = training_seconds(folder)
        timed = len(total) - 2
        found = {
            "seconds_per_step": (total[-1] - total[1]) / timed,
            "timed_steps": timed,
        }
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps(found, indent=1))
    per_step = json.loads(file.read_text())["seconds_per_step"]
    return 4 * max(1, round(args.seconds / per_step / 4))


def train_run(method, rate, seed, num_steps, args):
    """The folder of a finished run, with checkpoints at each quarter of its steps."""
    folder = Path(args.output_dir, method, f"lr={rate:g},seed={seed}")
    words = flags_of(
        method,
        args,
        learning_rate=rate,
        seed=seed,
        max_train_steps=num_steps,
        checkpointing_steps=num_steps // 4,
    )
    train(folder, words)
    return folder


class World:
    """The demo's base model, guide and judge, the held-out captions with their drawings, and the base model's own."""

    def __init__(self, args):
        self.args = args
        self.settings = json.loads((DEMO_DIR / "acpo_lora_sd.json").read_text())
        self.source = str(DEMO_DIR / "pipeline")
        self.class_name = class_of(self.source)
        captions = read_prompts(PROMPTS)
        order = np.random.default_rng(0).permutation(len(captions)).tolist()
        number = args.num_prompts
        if number + args.num_rate_prompts > len(order):
            raise ValueError(f"--num_prompts and --num_rate_prompts: {PROMPTS.name} has {len(order)} captions in all")
        self.rows = order[:number]
        self.prompts = [captions[row] for row in self.rows]
        self.rate_prompts = [captions[row] for row in order[number : number + args.num_rate_prompts]]
        self.num_captions = len(captions)

    @functools.cached_property
    def guide(self):
        return load_evaluator(f"ipce:{DEMO_DIR / 'guide'}")

    @functools.cached_property
    def judge(self):
        (judge,) = load_judges([str(DEMO_DIR / "judge")], "cpu").values()
        return judge

    @functools.cached_property
    def real(self):
        """All drawings of the held-out captions, (N, 3, H, W) in [0, 1], of which those of `rows` have prompts."""
        side = self.settings["resolution"]
        images = read_prompt_images(PROMPTS, self.num_captions, (side, side))
        return torch.stack(list(images.values()))

    @functools.cached_property
    def base_images(self):
        file = Path(self.args.output_dir, f"base-{len(self.prompts)}.safetensors")
        if not file.is_file():
            images = self.sample(self.pipeline(None), self.prompts)
            with atomic_write(file) as temporary:
                save_file({"images": images}, temporary)
        return load_file(file)["images"]

    def pipeline(self, lora):
        return load_pipeline(self.source, self.class_name, lora=lora)

    def sample(self, pipeline, prompts):
        """(N, 3, H, W) in [0, 1], from the same noise whatever the model and its seed."""
        return sample_images(
            pipeline,
            prompts,
            seed=0,
            batch_size=16,
            num_inference_steps=self.settings["num_inference_steps"],
            guidance_scale=self.settings["guidance_scale"],
        )


def guide_on_rate_prompts(world, folder):
    """The guide's mean score of a finished run's pictures of the captions that the table does not use."""
    file = folder / "rate.json"
    if not file.is_file():
        images = world.sample(world.pipeline(folder), world.rate_prompts)
        scores = score_images(world.guide, images, world.rate_prompts, "cpu")
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps({"guide": scores.mean().item()}))
    return json.loads(file.read_text())["guide"]


def evaluate(world, folder, num_steps):
    """Writes evaluation.json: of each share of the time the step, the CPU seconds, and every measure against the base."""
    file = folder / "evaluation.json"
    if file.is_file():
        return
    print(f"evaluating {folder.parent.name} {folder.name}", flush=True)
    images = {"base": world.base_images}
    drift = {}
    for share in SHARES:
        step = round(share * num_steps)
        pipeline = world.pipeline(str(folder / f"checkpoint-{step}"))
        images[share] = world.sample(pipeline, world.prompts)
        few = slice(DRIFT_IMAGES)
        distances = prediction_drift(pipeline, world.base_images[few], world.prompts[few])
        drift[share] = distances.mean().item()
    pairs = list(enumerate(world.rows))
    panel = measure_panel(MEMBERS, images, world.real, pairs, "cpu")
    if panel.unavailable:
        raise ValueError(f"the panel is not whole: {panel.unavailable}")
    scores = {}
    for name, part in images.items():
        scores[name] = {
            "guide": score_images(world.guide, part, world.prompts, "cpu").mean().item(),
            "judge": score_images(world.judge, part, world.prompts, "cpu").mean().item(),
        }
    seconds = training_seconds(folder)
    points = []
    for share in SHARES:
        step = round(share * num_steps)
        point = {
            "share": share,
            "step": step,
            "seconds": seconds[step],
            "drift": drift[share],
        }
        for name in ("guide", "judge"):
            point[name] = scores[share][name] - scores["base"][name]
        for label, name in ROWS.items():
            row = panel.rows[label][share]
            change = row["finetuned_mean"] / row["base_mean"] - 1
            point[name] = 100 * change
        points.append(point)
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps({"base": scores["base"], "points": points}, indent=1))


def run_method(world, method, args):
    """Trains and measures what is missing of a method."""
    num_steps = calibrate(method, args)
    guided = {}
    for rate in args.learning_rates:
        folder = train_run(method, rate, RATE_SEED, num_steps, args)
        guided[rate] = guide_on_rate_prompts(world, folder)
    best = max(guided, key=guided.get)
    with atomic_write(Path(args.output_dir, method, "rates.json")) as temporary:
        temporary.write_text(json.dumps({"best": best, "guide": guided, "steps": num_steps}, indent=1))
    for seed in args.seeds:
        folder = train_run(method, best, seed, num_steps, args)
        evaluate(world, folder, num_steps)
        report(args)


def read_results(output_dir):
    """{method: {"rates": ..., "runs": [evaluation, ...]}} of every method with a run that is measured."""
    results = {}
    for method in METHODS:
        file = Path(output_dir, method, "rates.json")
        if not file.is_file():
            continue
        rates = json.loads(file.read_text())
        runs = []
        for found in sorted(file.parent.glob(f"lr={rates['best']:g},seed=*/evaluation.json")):
            runs.append(json.loads(found.read_text()))
        if runs:
            results[method] = {"rates": rates, "runs": runs}
    return results


def report(args):
    """table.md, table.csv and two pictures of what is there. Returns the table."""
    results = read_results(args.output_dir)
    if not results:
        return "Nothing is measured yet."
    measures = ["guide", "judge", *ROWS.values(), "drift"]
    rows = []
    cells = [["method", "rate", "steps", "CPU s", "runs", *measures]]
    for method, found in results.items():
        ends = [run["points"][-1] for run in found["runs"]]
        line = [
            method,
            f"{found['rates']['best']:g}",
            str(ends[0]["step"]),
            f"{statistics.mean(end['seconds'] for end in ends):.0f}",
            str(len(ends)),
        ]
        for name in measures:
            mean, low, high = mean_interval([end[name] for end in ends])
            line.append(cell(name, mean, high - mean))
            rows.append(
                {
                    "method": method,
                    "measure": name,
                    "mean": mean,
                    "low": low,
                    "high": high,
                    "runs": len(ends),
                    "learning_rate": found["rates"]["best"],
                    "steps": ends[0]["step"],
                }
            )
        cells.append(line)
    table = aligned_table(cells, text_columns=1)
    output_dir = Path(args.output_dir)
    with atomic_write(output_dir / "table.md") as temporary:
        temporary.write_text(f"{table}\n")
    write_csv(output_dir / "table.csv", list(rows[0]), rows)
    curves = {method: [run["points"] for run in found["runs"]] for method, found in results.items()}
    titles = {name: f"{name}, change in %" if name in ROWS.values() else name for name in measures}
    plot_curves(
        output_dir / "over-seconds.png",
        curves,
        x="seconds",
        measures=titles,
        x_label="CPU seconds of training",
    )
    plot_curves(
        output_dir / "over-guide.png",
        curves,
        x="guide",
        measures={name: title for name, title in titles.items() if name != "guide"},
        x_label="guide",
    )
    return table


def cell(name, mean, half):
    """The mean over the seeds, with the half-width of its 95 % interval where there are several."""
    form = "+.1f"
    if name in ("guide", "judge"):
        form = "+.4f"
    if name == "drift":
        form = ".4f"
    text = f"{mean:{form}}"
    if np.isfinite(half):
        text += f" ± {half:{form.removeprefix('+')}}"
    return text


def main(args):
    torch.set_num_threads(1)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    failures = []
    if not args.table_only:
        world = World(args)
        for method in args.methods:
            try:
                run_method(world, method, args)
            except ValueError as error:
                failures.append(method)
                print(f"{method} is left: {error}", flush=True)
    print(f"\n{report(args)}\n")
    print(
        "Fine-tuned minus base; KID, ST-LPIPS and SWD in % of the base's, lower is better; ±: 95 % interval over the seeds."
    )
    print(f"The table, its numbers and the pictures are in {Path(args.output_dir).resolve()}")
    if failures:
        raise ValueError(f"{', '.join(failures)} failed; the same command tries again")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
