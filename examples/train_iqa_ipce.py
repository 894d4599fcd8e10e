"""Stage 1 of ACPO: train an IPCE evaluator on (image, prompt, mean opinion score) rows (section 3.2, eqs. 1-3).

    accelerate launch examples/train_iqa_ipce.py --train_data_dir agiqa-3k --clip_model ViT-B-32 --clip_pretrained openai

The result is a folder for `acpo_utils.evaluators.load_evaluator("ipce:PATH")`. docs/evaluators.md has the formulas.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import hashlib
import json
import logging
import math
import os
import random
import shutil
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, set_seed
from datasets import Image, get_dataset_split_names
from diffusers.optimization import SchedulerType, get_scheduler
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm.auto import tqdm

from acpo_utils.checkpoints import atomic_write, checkpoint_step, find_checkpoint, save_checkpoint
from acpo_utils.data import check_images, load_captioned_images, to_rgb
from acpo_utils.evaluators import IPCE
from acpo_utils.hub import push_to_hub, save_model_card
from acpo_utils.seeds import EpochOrder, step_generator
from acpo_utils.statistics import correlation


logger = get_logger(__name__, log_level="INFO")


def training_step(model, batch):
    """The published L1 loss between score and mean opinion score, both on (0, 1); the score is eqs. 1-3 in IPCE."""
    scores = model(batch["whole"], batch["crops"], batch["prompts"])  # (B,) in (0, 1)
    return F.l1_loss(scores.float(), batch["mos"])  # mos: (B,) in [0, 1]


class RatedImages(Dataset):
    """Rows in order (`evaluation`), or an endless reproducible stream: sample n is a function of (seed, n) alone."""

    def __init__(self, rows, model, args, num_samples=None):
        self.rows, self.args = rows.cast_column(args.image_column, Image()), args
        self.views = model.views
        self.evaluation, self.num_samples = num_samples is None, num_samples or len(rows)
        self.order = EpochOrder(len(rows), args.seed)

    def __len__(self):
        return self.num_samples

    def __getitem__(self, n):
        args, row, generator = self.args, n, None
        if not self.evaluation:
            row, generator = self.order(n), step_generator(args.seed, 1, n)
        row = self.rows[row]
        image = pil_to_tensor(to_rgb(row[args.image_column])).unsqueeze(0) / 255  # (1, 3, H, W) in [0, 1]
        if not self.evaluation and args.random_flip and torch.rand((), generator=generator) < 0.5:
            image = image.flip(-1)
        num_crops = None if self.evaluation else args.num_crops
        whole, crops = self.views(image, num_crops, generator)  # (1, 3, h, w), (1, N, 3, h, w)
        low, high = args.mos_range
        mos = (row[args.mos_column] - low) / (high - low)
        return {"whole": whole[0], "crops": crops[0], "mos": mos, "prompt": row[args.prompt_column]}


def collate(items):
    batch = {name: torch.stack([item[name] for item in items]) for name in ("whole", "crops")}
    mos = torch.tensor([item["mos"] for item in items], dtype=torch.float32)
    return batch | {"mos": mos, "prompts": [item["prompt"] for item in items]}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    # fmt: off
    # Model
    add("--head", default="alignment_structure", choices=["alignment_structure", "prompt_levels"], help="eqs. 1-3, or the published five prompts")
    add("--clip_model", default="ViT-B-32", help="open_clip model name, or a local open_clip folder")
    add("--clip_pretrained", help="open_clip tag or local weights file; default: openai, unless --clip_model is a folder")
    add("--init_evaluator", help="start from this saved IPCE (a folder) in place of --clip_model")
    add("--structure_layers", type=int, nargs="+", help="vision layers of eq. 2, from 0 or negative from the end; default: four, evenly spaced")
    add("--num_crops", type=int, default=8, help="random local crops for each image in training (head prompt_levels)")
    add("--eval_num_crops", type=int, default=15, help="evenly spaced local crops when scoring, kept in the evaluator")
    add("--lock_image", action="store_true", help="freeze the image tower")
    add("--lock_image_unlocked_groups", type=int, default=0, help="of a frozen image tower, leave the last N groups trainable")
    add("--lock_text", action="store_true", help="freeze the text tower; its embeddings are then computed once")
    add("--lock_text_unlocked_layers", type=int, default=0, help="of a frozen text tower, leave the last N layers trainable")
    add("--gradient_checkpointing", action="store_true")
    add("--weight_dtype", default="fp32", choices=["fp32", "fp16"], help="how the CLIP's weights are stored; they load as fp32")
    # Data
    add("--train_data_dir", help="folder of train/validation/test parquet files, or image folders with metadata.jsonl or .csv")
    add("--dataset_name", help="data set on the hub")
    add("--dataset_config_name")
    add("--cache_dir")
    add("--image_column", default="image")
    add("--prompt_column", default="prompt")
    add("--mos_column", default="mos")
    add("--mos_range", type=float, nargs=2, default=[0.0, 5.0], metavar=("LOW", "HIGH"), help="scale of the scores")
    add("--mismatch_column", default="mismatch", help='if there: "none" for an image\'s own prompt, otherwise what is wrong with the prompt')
    add("--group_column", help="report the test metrics also for each value of this column")
    add("--max_train_samples", type=int)
    add("--max_validation_samples", type=int)
    add("--skip_bad_images", action="store_true", help="leave unreadable images out instead of stopping")
    add("--random_flip", action="store_true")
    # Training
    add("--output_dir", default="ipce-model")
    add("--seed", type=int, default=0)
    add("--train_batch_size", type=int, default=16)
    add("--eval_batch_size", type=int, default=32)
    add("--num_train_epochs", type=int, default=30)
    add("--max_train_steps", type=int, help="overrides --num_train_epochs")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--learning_rate", type=float, default=5e-6)
    add("--head_learning_rate", type=float, default=1e-2, help="of a, b, bias (eq. 3) and the layer weights (eq. 2)")
    add("--lr_scheduler", default="cosine", choices=[name.value for name in SchedulerType])
    add("--lr_warmup_steps", type=int, default=0)
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=1e-3)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=1.0)
    add("--mixed_precision", choices=["no", "fp16", "bf16"])
    add("--allow_tf32", action="store_true")
    add("--dataloader_num_workers", type=int, default=0)
    add("--validation_steps", type=int, default=500, help="also after the last step; the best evaluator is kept")
    add("--checkpointing_steps", type=int, default=500)
    add("--checkpoints_total_limit", type=int)
    add("--resume_from_checkpoint", help='"latest" or a checkpoint-N folder')
    add("--report_to", default="tensorboard", help='tracker, or "none"')
    add("--logging_dir", default="logs")
    add("--push_to_hub", action="store_true")
    add("--hub_model_id")
    add("--hub_token")
    # fmt: on

    args = parser.parse_args()
    if not args.train_data_dir and not args.dataset_name:
        parser.error(
            "no data: pass --train_data_dir or --dataset_name. The demo's own rows are built by `python "
            "examples/demo/build_labels.py --output_dir labels`, then --train_data_dir labels"
        )
    if args.mos_range[0] >= args.mos_range[1]:
        parser.error(f"--mos_range: expected LOW below HIGH, found {args.mos_range}")
    for name in (
        "train_batch_size",
        "eval_batch_size",
        "gradient_accumulation_steps",
        "validation_steps",
        "checkpointing_steps",
    ):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, found {getattr(args, name)}")
    if args.max_train_steps is not None and args.max_train_steps < 1:
        parser.error(f"--max_train_steps: expected at least 1, found {args.max_train_steps}")
    if args.clip_pretrained is None and not os.path.isdir(args.clip_model) and ":" not in args.clip_model:
        args.clip_pretrained = "openai"
    if args.push_to_hub and args.report_to == "wandb" and args.hub_token:
        parser.error("--hub_token would be logged by wandb: use `hf auth login` instead")
    return args


def load_split(args, split):
    """One split of the data, or None if there is none of that name; the training split is whatever there is."""
    source = {"dataset_name": args.dataset_name, "train_data_dir": args.train_data_dir}
    if args.train_data_dir:
        folder = Path(args.train_data_dir)
        parquet = any(
            file.stem == split or file.stem.startswith(f"{split}-")
            for file in [*folder.glob("*.parquet"), *folder.glob("data/*.parquet")]
        )
        if (folder / split).is_dir():
            source["train_data_dir"] = str(folder / split)
        elif split != "train" and not parquet:
            return None
    elif split != "train":
        if split not in get_dataset_split_names(args.dataset_name, args.dataset_config_name):
            return None
    rows = load_captioned_images(
        **source,
        dataset_config_name=args.dataset_config_name,
        image_column=args.image_column,
        caption_column=args.prompt_column,
        max_train_samples={"train": args.max_train_samples, "validation": args.max_validation_samples}.get(split),
        cache_dir=args.cache_dir,
        seed=args.seed,
        split="train" if (source["train_data_dir"] or "") != (args.train_data_dir or "") else split,
    )
    if args.mos_column not in rows.column_names:
        raise ValueError(f"--mos_column {args.mos_column}: expected one of {rows.column_names} ({split}).")
    low, high = args.mos_range
    for number, mos in enumerate(rows[args.mos_column][:]):
        if not isinstance(mos, (int, float)) or not low <= mos <= high:
            raise ValueError(
                f"--mos_column {args.mos_column}, row {number} of {split}: expected a number from {low:g} to {high:g} "
                f"(--mos_range), found {mos!r}."
            )
    return check_images(rows, args.image_column, args.skip_bad_images)


def load_rows(args):
    """{"train", "validation", "test"}. A split that is missing takes a tenth of the training prompts, with all their
    rows, so that no prompt stands on both sides."""
    splits = {split: load_split(args, split) for split in ("train", "validation", "test")}
    prompts = sorted(set(splits["train"][args.prompt_column][:]))
    random.Random(args.seed).shuffle(prompts)
    for split in [split for split, rows in splits.items() if rows is None]:
        count = max(1, len(prompts) // 10)
        chosen, prompts = set(prompts[:count]), prompts[count:]
        if not prompts:
            raise ValueError(f"Too few prompts to split off {split}: expected at least 3, or files of its own.")
        inside = [prompt in chosen for prompt in splits["train"][args.prompt_column]]
        splits[split] = splits["train"].select([i for i, yes in enumerate(inside) if yes])
        splits["train"] = splits["train"].select([i for i, yes in enumerate(inside) if not yes])
    for split in ("validation", "test"):
        if len(set(splits[split][args.mos_column][:])) < 2:
            raise ValueError(
                f"{split}: expected at least two different scores to rank, found {len(splits[split])} rows."
            )
    return splits


def build_model(args):
    if args.init_evaluator:
        model = IPCE.from_pretrained(args.init_evaluator)
        if model.config.head != args.head:
            raise ValueError(
                f"--init_evaluator {args.init_evaluator}: expected head {args.head}, found {model.config.head}."
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


def evaluation_loader(rows, model, args):
    dataset = RatedImages(rows, model, args)
    return DataLoader(dataset, args.eval_batch_size, collate_fn=collate, num_workers=args.dataloader_num_workers)


@torch.no_grad()
def fit_head(model, rows, accelerator, args, num_rows=1000):
    """Starts a and bias of eq. 3 where the pretrained CLIP's similarities fit the ratings best (least squares).

    From arbitrary numbers, training would first bend the whole CLIP until its cosines suit them: on the demo's labels
    that cost more than the training gained.
    """
    rows = rows.select(range(0, len(rows), math.ceil(len(rows) / num_rows)))
    similarities, mos = [], []
    for batch in tqdm(
        evaluation_loader(rows, model, args), desc="head", leave=False, disable=not accelerator.is_local_main_process
    ):
        s_align, s_struct = model.similarities(batch["whole"].to(accelerator.device), batch["prompts"])
        similarities.append(torch.stack([s_align, torch.ones_like(s_align), s_struct], dim=-1))  # (B, 3)
        mos.append(batch["mos"])
    similarities, target = torch.cat(similarities).cpu().double(), torch.cat(mos).double().clamp(0.02, 0.98).logit()
    solution = torch.linalg.lstsq(
        similarities[:, :2], (target - model.b.item() * similarities[:, 2]).unsqueeze(1)
    ).solution
    model.a.fill_(solution[0].item())
    model.bias.fill_(solution[1].item())


@torch.no_grad()
def predict(model, loader, accelerator, description):
    """Scores (number of rows,) of all rows of `loader`, in order, on every process."""
    model.eval()
    scores = []
    for batch in tqdm(loader, desc=description, leave=False, disable=not accelerator.is_local_main_process):
        scores.append(
            accelerator.gather_for_metrics(model(batch["whole"], batch["crops"], batch["prompts"])).float().cpu()
        )
    return torch.cat(scores)


def measure(rows, scores, args):
    """SRCC, PLCC, KRCC and RMSE on the scale of the ratings; pairs: how often an image's own prompt scores higher."""
    low, high = args.mos_range
    predictions = scores.double() * (high - low) + low
    mos = torch.tensor(rows[args.mos_column][:], dtype=torch.float64)
    metrics = {name: float(value) for name, value in correlation(predictions.numpy(), mos.numpy()).items()}
    metrics |= {
        "count": len(rows),
        "mean_score": predictions.mean().item(),
        "saturated": ((scores < 0.01) | (scores > 0.99)).double().mean().item(),
    }
    if args.mismatch_column in rows.column_names:
        metrics["pairs"] = matched_above_mismatched(rows, scores, args)
    return metrics


def matched_above_mismatched(rows, scores, args):
    """Over all pairs (own prompt, wrong prompt) of one picture: the share in which the own prompt scores higher."""
    pictures = defaultdict(lambda: ([], []))
    for cell, mismatch, score in zip(rows[args.image_column][:], rows[args.mismatch_column][:], scores.tolist()):
        key = hashlib.sha256(cell["bytes"] or Path(cell["path"]).read_bytes()).digest()
        if mismatch in (None, "", "none"):
            pictures[key][0].append(score)
        else:
            pictures[key][1].append((mismatch, score))
    wins = defaultdict(list)
    for matched, mismatched in pictures.values():
        for own in matched:
            for kind, score in mismatched:
                wins[kind].append(own > score)
                wins["any"].append(own > score)
    return {kind: {"share": sum(won) / len(won), "pairs": len(won)} for kind, won in sorted(wins.items())}


def save_scatter(path, rows, scores, metrics, args):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    low, high = args.mos_range
    figure, axis = plt.subplots(figsize=(5, 5), layout="constrained")
    axis.scatter(rows[args.mos_column][:], (scores * (high - low) + low).tolist(), s=6, alpha=0.4, linewidths=0)
    axis.plot([low, high], [low, high], color="grey", linewidth=1)
    axis.set(xlabel="mean opinion score", ylabel="prediction", xlim=(low, high), ylim=(low, high), aspect="equal")
    axis.set_title(f"{metrics['count']} test rows: SRCC {metrics['srcc']:.3f}, PLCC {metrics['plcc']:.3f}")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def save_evaluator(model, folder, args):
    """Written beside `folder` and renamed, so that `folder` is always whole."""
    temporary, old = Path(f"{folder}.tmp"), Path(f"{folder}.old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(temporary, dtype=torch.float16 if args.weight_dtype == "fp16" else None)
    if Path(folder).exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def copy_file(source, target):
    with atomic_write(target) as temporary:
        shutil.copyfile(source, temporary)


class Best:
    """Which validation was best so far; part of every checkpoint."""

    step, value = 0, -math.inf

    def state_dict(self):
        return {"step": self.step, "value": self.value}

    def load_state_dict(self, state):
        self.step, self.value = state["step"], state["value"]


def metrics_table(metrics):
    """Markdown: one line for validation, one for the test rows, one for each group of them."""
    lines = [
        "| rows | number | SRCC | PLCC | KRCC | RMSE | own prompt above wrong ones |",
        "|---|---|---|---|---|---|---|",
    ]
    groups = {f"test, {name}": group for name, group in metrics["test"].get("groups", {}).items()}
    for name, part in ({"validation": metrics["validation"], "test": metrics["test"]} | groups).items():
        pairs = part.get("pairs", {})
        shares = ", ".join(f"{kind} {100 * pair['share']:.1f} %" for kind, pair in pairs.items())
        numbers = " | ".join(f"{part[key]:.3f}" for key in ("srcc", "plcc", "krcc", "rmse"))
        lines.append(f"| {name} | {part['count']} | {numbers} | {shares} |")
    return "\n".join(lines)


def finish(best, splits, accelerator, args):
    """The test rows are looked at here, once, by the evaluator that validation chose."""
    output_dir = Path(args.output_dir)
    model = IPCE.from_pretrained(output_dir / "best").requires_grad_(False).to(accelerator.device)
    scores = {}
    for split in ("validation", "test"):
        loader = accelerator.prepare(evaluation_loader(splits[split], model, args))
        scores[split] = predict(model, loader, accelerator, split)
    if not accelerator.is_main_process:
        return
    metrics = {"best_step": best.step} | {split: measure(splits[split], scores[split], args) for split in scores}
    if args.group_column:
        groups = splits["test"][args.group_column][:]
        metrics["test"]["groups"] = {}
        for group in sorted(set(groups)):
            rows = [i for i, value in enumerate(groups) if value == group]
            metrics["test"]["groups"][str(group)] = measure(splits["test"].select(rows), scores["test"][rows], args)
    with atomic_write(output_dir / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=2) + "\n")
    save_scatter(output_dir / "scatter.png", splits["test"], scores["test"], metrics["test"], args)
    # A copy: a checkpoint can be resumed only beside its "best" folder.
    shutil.copytree(output_dir / "best", output_dir, copy_function=copy_file, dirs_exist_ok=True)
    table = metrics_table(metrics)
    print(f"\n{table}\n\nEvaluator: {output_dir}")
    save_model_card(
        output_dir,
        base_model=args.init_evaluator or args.clip_model,
        model_description="IPCE, an evaluator of image quality given a prompt, for ACPO (Anchor-Constrained Perceptual Optimization).",
        tags=["image-quality-assessment", "clip", "acpo"],
        dataset=args.dataset_name or args.train_data_dir,
        image_files=["scatter.png"],
        metrics=table,
        settings={k: v for k, v in vars(args).items() if v is not None and k != "hub_token"},
    )
    if args.push_to_hub:
        push_to_hub(output_dir, args.hub_model_id, args.hub_token, "End of training")


def main(args):
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))
        ),
    )
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", datefmt="%H:%M:%S", level=logging.INFO
    )
    set_seed(args.seed)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    try:
        os.makedirs(args.output_dir, exist_ok=True)
        with atomic_write(Path(args.output_dir, "args.json")) as temporary:
            temporary.write_text(json.dumps({k: v for k, v in vars(args).items() if k != "hub_token"}, indent=2))
    except OSError as error:
        raise ValueError(f"--output_dir {args.output_dir} cannot be written to: {error.strerror}") from error
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint, accelerator.num_processes)
    with accelerator.main_process_first():
        splits = load_rows(args)
    if args.group_column and args.group_column not in splits["test"].column_names:
        raise ValueError(f"--group_column {args.group_column}: expected one of {splits['test'].column_names}.")
    model = build_model(args).to(accelerator.device)
    if args.head == "alignment_structure" and not args.init_evaluator and not checkpoint:
        fit_head(model, splits["train"], accelerator, args)
        logger.info(f"head at the start: a {model.a.item():.3f}, b {model.b.item():.3f}, bias {model.bias.item():.3f}")

    # Only the head's numbers are far from where they belong at the start, and they are few: a rate of their own.
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = [parameter for name, parameter in trained.items() if not name.startswith("clip.")]
    clip = [parameter for name, parameter in trained.items() if name.startswith("clip.")]
    groups = [{"params": clip, "weight_decay": args.adam_weight_decay}] if clip else []
    groups += [{"params": head, "lr": args.head_learning_rate, "weight_decay": 0.0}] if head else []
    if not groups:
        raise ValueError("Nothing to train: --lock_image and --lock_text leave head prompt_levels no parameters.")
    optimizer = torch.optim.AdamW(
        groups, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon
    )
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    steps_per_epoch = math.ceil(len(splits["train"]) / samples_per_step)
    args.max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )
    first_step = checkpoint_step(checkpoint) if checkpoint else 0
    if first_step >= args.max_train_steps and checkpoint:
        raise ValueError(f"{checkpoint} is already at step {first_step} of --max_train_steps {args.max_train_steps}.")
    samples = RatedImages(splits["train"], model, args, num_samples=args.max_train_steps * samples_per_step)
    loader = DataLoader(
        Subset(samples, range(first_step * samples_per_step, len(samples))),  # a resumed run goes on with its sample
        args.train_batch_size,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
    )
    best = Best()
    accelerator.register_for_checkpointing(best)
    validation_loader = evaluation_loader(splits["validation"], model, args)
    model, optimizer, lr_scheduler, loader, validation_loader = accelerator.prepare(
        model, optimizer, lr_scheduler, loader, validation_loader
    )
    if checkpoint:
        accelerator.load_state(str(checkpoint))
        if best.step and not Path(args.output_dir, "best").is_dir():
            raise ValueError(
                f"{checkpoint} goes with the evaluator of step {best.step} in {Path(args.output_dir, 'best')}, which is missing."
            )
    accelerator.init_trackers(
        "acpo-iqa-ipce", config={k: str(v) for k, v in vars(args).items() if v is not None and k != "hub_token"}
    )
    logger.info("***** Running training *****")
    logger.info(
        f"  rows: {', '.join(f'{len(rows)} {split}' for split, rows in splits.items())}; "
        f"{sum(p.numel() for p in clip + head)} trained parameters; steps {first_step}..{args.max_train_steps}"
    )
    progress = tqdm(
        range(first_step, args.max_train_steps),
        initial=first_step,
        total=args.max_train_steps,
        disable=not accelerator.is_local_main_process,
    )
    step, skipped_steps, skipped_in_a_row = first_step, 0, 0
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            loss = training_step(model, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(clip + head, args.max_grad_norm).item()
                finite = math.isfinite(grad_norm)
                # fp16's loss scaler skips the step itself, and must see it in order to lower its scale.
                if not finite and accelerator.scaler is None:
                    optimizer.zero_grad()
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        step += 1
        skipped_in_a_row = 0 if finite else skipped_in_a_row + 1
        skipped_steps += not finite
        if skipped_in_a_row == 10:
            raise FloatingPointError(
                f"the gradient was not finite in ten steps in a row, up to step {step}: lower --learning_rate, or use "
                f"bf16 in place of fp16. Checkpoints in {args.output_dir} are as they were."
            )
        progress.update()
        logs = {"loss": loss.item(), "grad_norm": grad_norm, "lr": lr_scheduler.get_last_lr()[0]}
        accelerator.log(logs | {"skipped_steps": skipped_steps}, step=step)
        progress.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)
        if step % args.validation_steps == 0 or step == args.max_train_steps:
            scores = predict(model, validation_loader, accelerator, "validation")
            metrics = measure(splits["validation"], scores, args)
            accelerator.log(
                {f"validation/{name}": value for name, value in metrics.items() if name != "pairs"}, step=step
            )
            pairs = metrics.get("pairs", {}).get("any", {"share": math.nan})["share"]
            logger.info(
                f"step {step}: validation SRCC {metrics['srcc']:.4f}, PLCC {metrics['plcc']:.4f}, pairs {pairs:.4f}"
            )
            value = (metrics["srcc"] + metrics["plcc"]) / 2
            if value > best.value or not best.step:
                best.step, best.value = step, value
                if accelerator.is_main_process:
                    save_evaluator(accelerator.unwrap_model(model), Path(args.output_dir, "best"), args)
            model.train()
        if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
            save_checkpoint(accelerator, args.output_dir, step, args.checkpoints_total_limit)
    progress.close()
    accelerator.wait_for_everyone()
    finish(best, splits, accelerator, args)
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
