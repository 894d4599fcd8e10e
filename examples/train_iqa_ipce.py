"""Stage 1 of ACPO: train an IPCE evaluator on (image, prompt, mean opinion score) rows (section 3.2, eqs. 1-3).

    accelerate launch examples/train_iqa_ipce.py --clip_model ViT-B-32 --clip_pretrained openai \
        --stages agiqa-1k:PATH agiqa-3k:PATH+aigciqa2023:PATH aigiqa-20k:PATH

The result is a folder for `acpo_utils.evaluators.load_evaluator("ipce:PATH")`. docs/training-evaluators.md has the formulas and
the stages, docs/datasets.md the rating sets.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import math
import os
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from datasets import Image
from diffusers.optimization import SchedulerType
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm.auto import tqdm

from acpo_utils import check_min_version
from acpo_utils.data import to_rgb
from acpo_utils.evaluators import IPCE
from acpo_utils.randomness import EpochOrder, step_generator
from acpo_utils.ratings.agreement import agreement, agreement_table, matched_above_mismatched
from acpo_utils.ratings.best import Best, best_folder, copy_evaluator, save_evaluator
from acpo_utils.ratings.report import named_parts, predict, read_report, save_metrics, write_report
from acpo_utils.ratings.robustness import robustness_tables
from acpo_utils.ratings.sets import TARGETS
from acpo_utils.ratings.stages import ScoreMaps, load_stages, resumed_step, set_steps, value_per_stage
from acpo_utils.ratings.training import train_steps
from acpo_utils.training.arguments import check_numbers
from acpo_utils.training.hub import push_to_hub, save_model_card, settings_of
from acpo_utils.training.optimizer import build_optimizer
from acpo_utils.training.run import start_run


check_min_version("0.2.0")
logger = get_logger(__name__, log_level="INFO")


def training_step(model, batch, maps=None):
    """The published L1 loss between score and mean opinion score, both on (0, 1); the score is eqs. 1-3 in IPCE."""
    scores = score(model, batch)  # (B,) in (0, 1)
    if maps is not None:  # of stages: from the score to each rating set's own use of its scale
        scores = maps(scores, batch["sets"])  # (B,)
    return F.l1_loss(scores.float(), batch["mos"])  # mos: (B,) in [0, 1]


def score(model, batch):
    return model(batch["whole"], batch["crops"], batch["prompts"])


def measure_rows(rows, scores, predictions, args):
    """Agreement with the ratings, on their scale; pairs: how often an image's own prompt scores higher."""
    metrics = agreement(predictions, rows[args.mos_column][:])
    metrics["mean_score"] = predictions.mean().item()
    saturated = (scores < 0.01) | (scores > 0.99)
    metrics["saturated"] = saturated.double().mean().item()
    if args.mismatch_column in rows.column_names:
        metrics["pairs"] = matched_above_mismatched(
            images=rows[args.image_column][:],
            mismatches=rows[args.mismatch_column][:],
            scores=scores.tolist(),
        )
    return metrics


class RatedImages(Dataset):
    """Rows in order, or those of `samples` of an endless reproducible stream: sample n is a function of (seed, n) alone."""

    def __init__(self, stage, split, model, args, samples=None):
        self.stage, self.samples, self.args = stage, samples, args
        self.rows = stage.splits[split].cast_column(args.image_column, Image())
        self.views = model.views
        self.order = EpochOrder(len(self.rows), args.seed)

    def __len__(self):
        return len(self.rows if self.samples is None else self.samples)

    def __getitem__(self, index):
        if self.samples is None:
            return self.item(self.rows[index])
        n = self.samples[index]
        return self.item(self.rows[self.order(n)], self.args.num_crops, step_generator(self.args.seed, 1, n))

    def item(self, row, num_crops=None, generator=None):
        """A row as it is scored; given a generator as it is trained on, with random crops, and mirrored perhaps."""
        image = pil_to_tensor(to_rgb(row[self.args.image_column]))
        image = image.unsqueeze(0) / 255  # (1, 3, H, W) in [0, 1]
        if generator is not None and self.args.random_flip and torch.rand((), generator=generator) < 0.5:
            image = image.flip(-1)
        whole, crops = self.views(image, num_crops, generator)  # (1, 3, h, w), (1, N, 3, h, w)
        set_index, mos = self.stage.target(row, self.args.mos_column)
        return {
            "whole": whole[0],
            "crops": crops[0],
            "mos": mos,
            "set": set_index,
            "prompt": row[self.args.prompt_column],
        }


def collate(items):
    return {
        "whole": torch.stack([item["whole"] for item in items]),  # (B, 3, h, w)
        "crops": torch.stack([item["crops"] for item in items]),  # (B, N, 3, h, w)
        "mos": torch.tensor([item["mos"] for item in items], dtype=torch.float32),
        "sets": torch.tensor([item["set"] for item in items]),
        "prompts": [item["prompt"] for item in items],
    }


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    # Model
    add(
        "--head",
        choices=["alignment_structure", "prompt_levels"],
        default="alignment_structure",
        help="eqs. 1-3, or the published five prompts",
    )
    add("--clip_model", default="ViT-B-32", help="open_clip model name, or a local open_clip folder")
    add("--clip_pretrained", help="open_clip tag or weights file; default: openai, unless --clip_model is a folder")
    add("--init_evaluator", help="start from this saved IPCE (a folder) in place of --clip_model")
    add(
        "--structure_layers",
        type=int,
        nargs="+",
        help="vision layers of eq. 2, from 0 or negative from the end; default: four, evenly spaced",
    )
    add("--num_crops", type=int, default=8, help="random local crops of each training image (head prompt_levels)")
    add("--eval_num_crops", type=int, default=15, help="evenly spaced crops when scoring, kept in the evaluator")
    add("--lock_image", action="store_true", help="freeze the image tower")
    add("--lock_image_unlocked_groups", type=int, default=0, help="but for its last N groups")
    add("--lock_text", action="store_true", help="freeze the text tower; its embeddings are then computed once")
    add("--lock_text_unlocked_layers", type=int, default=0, help="but for its last N layers")
    add("--gradient_checkpointing", action="store_true")
    add("--weight_dtype", choices=["fp32", "fp16"], default="fp32", help="of the saved CLIP; it loads as fp32")
    # Data: rating sets in stages, or one data set
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
    add("--prompt_column", default="prompt")
    add("--mos_column", default="mos")
    add(
        "--mos_range",
        type=float,
        nargs=2,
        default=[0.0, 5.0],
        metavar=("LOW", "HIGH"),
        help="scale of the scores; of rating sets only that of a csv",
    )
    add(
        "--mismatch_column",
        default="mismatch",
        help='if there: "none" for an image\'s own prompt, otherwise what is wrong with the prompt',
    )
    add(
        "--reference_column",
        default="reference",
        help="if there: each image's original, of its size; the report says how far the score's gradient points there",
    )
    add("--group_column", help="report the test metrics also for each value of this column")
    add("--max_train_samples", type=int, help="at most so many rows, of each rating set")
    add("--max_validation_samples", type=int)
    add("--skip_bad_images", action="store_true", help="leave unreadable images out instead of stopping")
    add("--random_flip", action="store_true")
    # Training
    add("--train_batch_size", type=int, default=16)
    add(
        "--num_train_epochs",
        type=int,
        nargs="+",
        default=[30],
        help="one number, or one for each stage",
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
        default=[5e-6],
        help="one number, or one for each stage",
    )
    add(
        "--head_learning_rate",
        type=float,
        default=1e-2,
        help="of a, b, bias (eq. 3), the layer weights (eq. 2) and the rating sets' maps",
    )
    schedules = [s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT]
    add("--lr_scheduler", choices=schedules, default="cosine")
    add("--lr_warmup_steps", type=int, default=0)
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=1e-3)
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
    add("--eval_batch_size", type=int, default=32)
    add("--validation_steps", type=int, default=500, help="also after a stage's last step; the best is kept")
    add(
        "--max_robustness_samples",
        type=int,
        default=500,
        help="at most so many test rows, of each rating set, are attacked for the report",
    )
    # Output
    add("--output_dir", default="ipce-model")
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
    local = os.path.isdir(args.clip_model) or ":" in args.clip_model
    if args.clip_pretrained is None and not local:
        args.clip_pretrained = "openai"
    try:
        check_args(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check_args(args):
    """What can be said without loading anything is said now."""
    check_numbers(args)
    sources = [args.stages, args.train_data_dir, args.dataset_name]
    if not any(sources):
        raise ValueError(
            "no data: pass --stages, --train_data_dir or --dataset_name. The demo's own rows are built by `python "
            "examples/demo/build_labels.py --output_dir labels`, then --train_data_dir labels"
        )
    if sum(map(bool, sources)) > 1:
        raise ValueError("expected one of --stages, --train_data_dir and --dataset_name, found several")
    if args.mos_range[0] >= args.mos_range[1]:
        raise ValueError(f"--mos_range: expected LOW below HIGH, found {args.mos_range}")
    for name in ("image", "prompt", "mos", "reference"):
        if args.stages and getattr(args, f"{name}_column") != name:
            raise ValueError(f"--{name}_column goes with data other than --stages: leave it out")
    number = len(args.stages) if args.stages else 1
    args.learning_rate = value_per_stage("learning_rate", args.learning_rate, number)
    args.num_train_epochs = value_per_stage("num_train_epochs", args.num_train_epochs, number)
    if args.max_train_steps:
        args.max_train_steps = value_per_stage("max_train_steps", args.max_train_steps, number)
    if args.push_to_hub and args.report_to == "wandb" and args.hub_token:
        raise ValueError("--hub_token would be logged by wandb: use `hf auth login` instead")


def build_model(args, init_evaluator):
    if init_evaluator:
        model = IPCE.from_pretrained(init_evaluator)
        if model.config.head != args.head:
            raise ValueError(
                f"--init_evaluator {init_evaluator}: expected head {args.head}, found {model.config.head}."
            )
    else:
        model = IPCE.from_open_clip(
            args.clip_model,
            args.clip_pretrained,
            head=args.head,
            structure_layers=args.structure_layers,
            num_crops=args.eval_num_crops,
        )
    if args.lock_image:
        model.clip.lock_image_tower(args.lock_image_unlocked_groups)
    if args.lock_text:
        model.clip.lock_text_tower(args.lock_text_unlocked_layers)
    if args.gradient_checkpointing:
        model.clip.set_grad_checkpointing(True)
    return model


def parameter_groups(model, maps, args):
    """What is trained, as an optimizer takes it."""
    # Only the head's numbers are far from where they belong at the start, and they are few: a rate of their own.
    clip, head = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (clip if name.startswith("clip.") else head).append(parameter)
    if not clip and not head:
        raise ValueError("Nothing to train: --lock_image and --lock_text leave head prompt_levels no parameters.")
    if maps is not None:
        head += maps.parameters()
    groups = [
        {"params": clip, "weight_decay": args.adam_weight_decay},
        {"params": head, "lr": args.head_learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def evaluation_loader(stage, split, model, args):
    return DataLoader(
        RatedImages(stage, split, model, args),
        args.eval_batch_size,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
    )


@torch.no_grad()
def fit_head(model, stage, accelerator, args, num_rows=1000):
    """Starts a, b and bias of eq. 3 where the pretrained CLIP's similarities fit the ratings best (least squares).

    From arbitrary numbers, training would first bend the whole CLIP until its cosines suit them: on the demo's labels
    that cost more than the training gained.
    """
    rows = RatedImages(stage, "train", model, args)
    every = math.ceil(len(rows) / num_rows)
    loader = DataLoader(
        Subset(rows, range(0, len(rows), every)),
        args.eval_batch_size,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
    )
    similarities, mos = [], []
    for batch in tqdm(loader, desc="head", leave=False, disable=not accelerator.is_local_main_process):
        images = batch["whole"].to(accelerator.device)
        s_align, s_struct = model.similarities(images, batch["prompts"])
        one = torch.ones_like(s_align)
        similarities.append(torch.stack([s_align, s_struct, one], dim=-1))  # (B, 3)
        mos.append(batch["mos"])
    similarities = torch.cat(similarities).cpu().double()  # (N, 3)
    target = torch.cat(mos).double().clamp(0.02, 0.98).logit()  # (N,)
    solution = torch.linalg.lstsq(similarities, target.unsqueeze(1)).solution  # (3, 1)
    a, b, bias = solution.flatten().tolist()
    model.a.fill_(a)
    model.b.fill_(b)
    model.bias.fill_(bias)
    logger.info(f"head at the start: a {a:.3f}, b {b:.3f}, bias {bias:.3f}")


def train_stage(stage, first_step, best, run, accelerator, args):
    """The stage's steps, from the last stage's best evaluator, or from the run's checkpoint if it is of this stage."""
    step = max(first_step, stage.start)
    init_evaluator = args.init_evaluator
    if stage.number > 1:
        init_evaluator = best_folder(args, stage.number - 1)
    model = build_model(args, init_evaluator).to(accelerator.device)
    if args.head == "alignment_structure" and not init_evaluator and not step:
        fit_head(model, stage, accelerator, args)
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
        RatedImages(stage, "train", model, args, stage.samples(step, samples_per_step)),
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
        validation_loader=evaluation_loader(stage, "validation", model, args),
        training_step=training_step,
        score=score,
        image_keys=["whole", "crops"],
        measure_rows=measure_rows,
        save=partial(save_evaluator, dtype=torch.float16 if args.weight_dtype == "fp16" else None),
        best=best,
        run=run,
        accelerator=accelerator,
        args=args,
    )


def finish_stage(stage, best, accelerator, args):
    """A stage's test rows are looked at here, once, by the evaluator that validation chose. Returns the report."""
    if report := read_report(args, stage.number):
        return report
    model = IPCE.from_pretrained(best_folder(args, stage.number))
    model = model.requires_grad_(False).to(accelerator.device)
    scores = {}
    for split in ("validation", "test"):
        loader = accelerator.prepare(evaluation_loader(stage, split, model, args))
        scores[split] = predict(model, score, loader, accelerator, split)
    if accelerator.is_main_process:
        return write_report(stage, best, scores, measure_rows, model, args)


def finish(reports, args):
    """The last stage's evaluator is the result, with the reports of all stages and a model card."""
    copy_evaluator(best_folder(args, len(reports)), args.output_dir)
    parts = named_parts(reports, args)
    tables = f"{agreement_table(parts)}\n\n{robustness_tables(parts)}"
    print(f"\n{tables}\n\nEvaluator: {args.output_dir}")
    description = (
        "IPCE, an evaluator of image quality given a prompt, for ACPO (Anchor-Constrained Perceptual Optimization)."
    )
    if args.stages:
        description += f" Trained in stages: {'; '.join(' + '.join(report['sets']) for report in reports)}."
    pictures = sorted(path.name for path in Path(args.output_dir).glob("scatter*.png"))
    save_model_card(
        args.output_dir,
        base_model=args.init_evaluator or args.clip_model,
        model_description=description,
        tags=["image-quality-assessment", "clip", "acpo"],
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
    }
    with accelerator.main_process_first():
        stages = load_stages(args, max_samples)
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    stages = set_steps(stages, samples_per_step, args)
    first_step = resumed_step(run.checkpoint, stages, args)
    best = Best()
    run.keep(best=best)
    accelerator.init_trackers("acpo-iqa-ipce", config=settings_of(args))
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
