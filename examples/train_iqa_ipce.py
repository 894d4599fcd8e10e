"""Stage 1 of ACPO: train an IPCE evaluator on (image, prompt, mean opinion score) rows (section 3.2, eqs. 1-3).

    accelerate launch examples/train_iqa_ipce.py --clip_model ViT-B-32 --clip_pretrained openai \
        --stages agiqa-1k:PATH agiqa-3k:PATH+aigciqa2023:PATH aigiqa-20k:PATH

The result is a folder for `acpo_utils.evaluators.load_evaluator("ipce:PATH")`. docs/evaluators.md has the formulas and
the stages, docs/datasets.md the rating sets.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import math
import os
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from datasets import Image
from diffusers.optimization import SchedulerType, get_scheduler
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm.auto import tqdm

from acpo_utils.checkpoints import catch_sigterm, checkpoint_or_stop, checkpoint_step, release_sigterm
from acpo_utils.data import to_rgb
from acpo_utils.evaluators import IPCE
from acpo_utils.files import atomic_write
from acpo_utils.hub import push_to_hub, save_model_card
from acpo_utils.randomness import EpochOrder, step_generator
from acpo_utils.ratings.agreement import agreement, agreement_table, matched_above_mismatched, save_scatter
from acpo_utils.ratings.images import load_rated_images
from acpo_utils.ratings.sets import TARGETS
from acpo_utils.ratings.stages import (
    Best,
    ScoreMaps,
    Stage,
    check_stage,
    copy_evaluator,
    read_stages,
    save_evaluator,
    to_scale,
    value_per_stage,
)
from acpo_utils.training.run import start_run


logger = get_logger(__name__, log_level="INFO")


def training_step(model, batch, maps=None):
    """The published L1 loss between score and mean opinion score, both on (0, 1); the score is eqs. 1-3 in IPCE."""
    scores = model(batch["whole"], batch["crops"], batch["prompts"])  # (B,) in (0, 1)
    if maps is not None:  # of stages: from the score to each rating set's own use of its scale
        scores = maps(scores, batch["sets"])  # (B,)
    return F.l1_loss(scores.float(), batch["mos"])  # mos: (B,) in [0, 1]


class RatedImages(Dataset):
    """Rows in order (`evaluation`), or an endless reproducible stream: sample n is a function of (seed, n) alone."""

    def __init__(self, stage, split, model, args, num_samples=None):
        self.stage, self.args = stage, args
        self.rows = stage.splits[split].cast_column(args.image_column, Image())
        self.views = model.views
        self.evaluation, self.num_samples = num_samples is None, num_samples or len(self.rows)
        self.order = EpochOrder(len(self.rows), args.seed)

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
        index = row["set"] if len(self.stage.names) > 1 else 0
        low, high = self.stage.scales[index]
        mos = (row[args.mos_column] - low) / (high - low)
        return {"whole": whole[0], "crops": crops[0], "mos": mos, "set": index, "prompt": row[args.prompt_column]}


def collate(items):
    batch = {name: torch.stack([item[name] for item in items]) for name in ("whole", "crops")}
    mos = torch.tensor([item["mos"] for item in items], dtype=torch.float32)
    sets = torch.tensor([item["set"] for item in items])
    return batch | {"mos": mos, "sets": sets, "prompts": [item["prompt"] for item in items]}


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
    # Data: rating sets in stages, or one data set
    add("--stages", nargs="+", metavar="NAME:PATH[+NAME:PATH]", help="one or more rating sets for each stage: agiqa-1k, agiqa-3k, aigciqa2023, aigiqa-20k, csv")
    add("--target", nargs="+", default=["quality"], choices=TARGETS, help="which score of the rating sets is learned; one, or one for each stage")
    add("--split_seed", type=int, default=0, help="which prompts of a rating set without an official split are for validation and test")
    add("--train_data_dir", help="folder of train/validation/test parquet files, or image folders with metadata.jsonl or .csv")
    add("--dataset_name", help="data set on the hub")
    add("--dataset_config_name")
    add("--cache_dir")
    add("--image_column", default="image")
    add("--prompt_column", default="prompt")
    add("--mos_column", default="mos")
    add("--mos_range", type=float, nargs=2, default=[0.0, 5.0], metavar=("LOW", "HIGH"), help="scale of the scores; of rating sets only that of a csv")
    add("--mismatch_column", default="mismatch", help='if there: "none" for an image\'s own prompt, otherwise what is wrong with the prompt')
    add("--group_column", help="report the test metrics also for each value of this column")
    add("--max_train_samples", type=int, help="at most so many rows, of each rating set")
    add("--max_validation_samples", type=int)
    add("--skip_bad_images", action="store_true", help="leave unreadable images out instead of stopping")
    add("--random_flip", action="store_true")
    # Training
    add("--output_dir", default="ipce-model")
    add("--seed", type=int, default=0)
    add("--train_batch_size", type=int, default=16)
    add("--eval_batch_size", type=int, default=32)
    add("--num_train_epochs", type=int, nargs="+", default=[30], help="one number, or one for each stage")
    add("--max_train_steps", type=int, nargs="+", help="overrides --num_train_epochs; of one stage: one number, or one for each")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--learning_rate", type=float, nargs="+", default=[5e-6], help="one number, or one for each stage")
    add("--head_learning_rate", type=float, default=1e-2, help="of a, b, bias (eq. 3), the layer weights (eq. 2) and the rating sets' maps")
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
    add("--validation_steps", type=int, default=500, help="also after a stage's last step; the best evaluator is kept")
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
    if not args.stages and not args.train_data_dir and not args.dataset_name:
        parser.error(
            "no data: pass --stages, --train_data_dir or --dataset_name. The demo's own rows are built by `python "
            "examples/demo/build_labels.py --output_dir labels`, then --train_data_dir labels"
        )
    if args.mos_range[0] >= args.mos_range[1]:
        parser.error(f"--mos_range: expected LOW below HIGH, found {args.mos_range}")
    counts = ["num_train_epochs", "max_train_steps", "train_batch_size", "eval_batch_size"]
    for name in [*counts, "gradient_accumulation_steps", "validation_steps", "checkpointing_steps"]:
        values = getattr(args, name)
        if values is not None and min(values if isinstance(values, list) else [values]) < 1:
            parser.error(f"--{name}: expected at least 1, found {values}")
    if args.stages and (args.train_data_dir or args.dataset_name):
        parser.error("expected one of --stages, --train_data_dir and --dataset_name, found several")
    if args.stages and (args.image_column, args.prompt_column, args.mos_column) != ("image", "prompt", "mos"):
        parser.error(
            "--image_column, --prompt_column and --mos_column go with other data than --stages: leave them out"
        )
    try:
        number = len(args.stages or [args.train_data_dir])
        args.learning_rate = value_per_stage("learning_rate", args.learning_rate, number)
        args.num_train_epochs = value_per_stage("num_train_epochs", args.num_train_epochs, number)
        args.max_train_steps = args.max_train_steps and value_per_stage(
            "max_train_steps", args.max_train_steps, number
        )
    except ValueError as error:
        parser.error(str(error))
    if args.clip_pretrained is None and not os.path.isdir(args.clip_model) and ":" not in args.clip_model:
        args.clip_pretrained = "openai"
    if args.push_to_hub and args.report_to == "wandb" and args.hub_token:
        parser.error("--hub_token would be logged by wandb: use `hf auth login` instead")
    return args


def load_stages(args):
    """The rows of each stage, split and checked; --train_data_dir and --dataset_name are one stage without maps."""
    limits = {"train": args.max_train_samples, "validation": args.max_validation_samples}
    if args.stages:
        return read_stages(
            args.stages, args.target, args.split_seed, tuple(args.mos_range), args.skip_bad_images, limits
        )
    splits = load_rated_images(
        train_data_dir=args.train_data_dir,
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        image_column=args.image_column,
        prompt_column=args.prompt_column,
        mos_column=args.mos_column,
        mos_range=args.mos_range,
        skip_bad_images=args.skip_bad_images,
        max_samples=limits,
        cache_dir=args.cache_dir,
        seed=args.seed,
    )
    return [Stage(names=("ratings",), scales=(tuple(args.mos_range),), splits=splits)]


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


def evaluation_loader(dataset, args):
    return DataLoader(dataset, args.eval_batch_size, collate_fn=collate, num_workers=args.dataloader_num_workers)


@torch.no_grad()
def fit_head(model, stage, accelerator, args, num_rows=1000):
    """Starts a, b and bias of eq. 3 where the pretrained CLIP's similarities fit the ratings best (least squares).

    From arbitrary numbers, training would first bend the whole CLIP until its cosines suit them: on the demo's labels
    that cost more than the training gained.
    """
    rows = RatedImages(stage, "train", model, args)
    loader = evaluation_loader(Subset(rows, range(0, len(rows), math.ceil(len(rows) / num_rows))), args)
    similarities, mos = [], []
    for batch in tqdm(loader, desc="head", leave=False, disable=not accelerator.is_local_main_process):
        s_align, s_struct = model.similarities(batch["whole"].to(accelerator.device), batch["prompts"])
        similarities.append(torch.stack([s_align, s_struct, torch.ones_like(s_align)], dim=-1))  # (B, 3)
        mos.append(batch["mos"])
    similarities, target = torch.cat(similarities).cpu().double(), torch.cat(mos).double().clamp(0.02, 0.98).logit()
    solution = torch.linalg.lstsq(similarities, target.unsqueeze(1)).solution.flatten().tolist()
    for parameter, value in zip((model.a, model.b, model.bias), solution):
        parameter.fill_(value)


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


def measure(stage, split, scores, lines, args):
    """What `measure_rows` says of each set of the stage. `lines`: slope and intercept of each set's map."""
    return {
        name: measure_rows(stage, split, index, stage.of_set(split, index), scores, lines, args)
        for index, name in enumerate(stage.names)
    }


def measure_rows(stage, split, index, rows, scores, lines, args):
    """Agreement with the ratings, on their scale; pairs: how often an image's own prompt scores higher."""
    table, scores = stage.splits[split].select(rows), scores[rows]
    predictions = to_scale(scores, stage.scales[index], lines[index])
    metrics = agreement(predictions, table[args.mos_column][:]) | {
        "mean_score": predictions.mean().item(),
        "saturated": ((scores < 0.01) | (scores > 0.99)).double().mean().item(),
    }
    if args.mismatch_column in table.column_names:
        metrics["pairs"] = matched_above_mismatched(
            table[args.image_column][:], table[args.mismatch_column][:], scores.tolist()
        )
    return metrics


def best_folder(number, args):
    """Where the best evaluator of a stage is kept while it trains; of one of --stages also when it is finished."""
    return Path(args.output_dir, f"stage-{number}" if args.stages else "best")


def finish_stage(number, stage, best, accelerator, args):
    """A stage's test rows are looked at here, once, by the evaluator that validation chose. Returns the report."""
    folder = best_folder(number, args)
    if args.stages and (folder / "metrics.json").is_file():  # of a run that was cut after its stage's end
        return json.loads((folder / "metrics.json").read_text())
    model = IPCE.from_pretrained(folder).requires_grad_(False).to(accelerator.device)
    report = {"stage": number, "best_step": best.step, "sets": {name: {} for name in stage.names}}
    for split in ("validation", "test"):
        loader = accelerator.prepare(evaluation_loader(RatedImages(stage, split, model, args), args))
        scores = predict(model, loader, accelerator, split)
        for name, metrics in measure(stage, split, scores, best.lines, args).items():
            report["sets"][name][split] = metrics  # and of the test rows, `scores` is needed below
    if not accelerator.is_main_process:
        return None
    table = stage.splits["test"]
    for index, (name, metrics) in enumerate(report["sets"].items()):
        rows = stage.of_set("test", index)
        if args.stages:
            metrics["map"] = dict(zip(("slope", "intercept"), best.lines[index]))
        if args.group_column:
            groups, values = {}, table[args.group_column][:]
            for row in rows:
                groups.setdefault(str(values[row]), []).append(row)
            metrics["test"]["groups"] = {
                group: measure_rows(stage, "test", index, members, scores, best.lines, args)
                for group, members in sorted(groups.items())
                if len(members) > 1  # one row has no rank
            }
        save_scatter(
            folder / f"scatter-{name}.png" if args.stages else Path(args.output_dir, "scatter.png"),
            table.select(rows)[args.mos_column][:],
            to_scale(scores[rows], stage.scales[index], best.lines[index]).tolist(),
            stage.scales[index],
            "{count} test rows: SRCC {srcc:.3f}, PLCC {plcc:.3f}".format(**metrics["test"]),
        )
    if args.stages:
        with atomic_write(folder / "metrics.json") as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n")
    return report


def finish(reports, args):
    """The last stage's evaluator is the result, with the reports of all stages and a model card."""
    output_dir = Path(args.output_dir)
    copy_evaluator(best_folder(len(reports), args), output_dir)
    parts = {}
    for report in reports:
        for name, measured in report["sets"].items():
            prefix = f"stage {report['stage']}, {name}, " if args.stages else ""
            parts |= {f"{prefix}{split}": measured[split] for split in ("validation", "test")}
            parts |= {f"{prefix}test, {group}": part for group, part in measured["test"].get("groups", {}).items()}
    table = agreement_table(parts)
    print(f"\n{table}\n\nEvaluator: {output_dir}")
    description = (
        "IPCE, an evaluator of image quality given a prompt, for ACPO (Anchor-Constrained Perceptual Optimization)."
    )
    if args.stages:
        description += f" Trained in stages: {'; '.join(' + '.join(report['sets']) for report in reports)}."
    save_model_card(
        output_dir,
        base_model=args.init_evaluator or args.clip_model,
        model_description=description,
        tags=["image-quality-assessment", "clip", "acpo"],
        dataset=args.dataset_name or args.train_data_dir,
        image_files=sorted(path.name for path in output_dir.glob("scatter*.png")),
        metrics=table,
        settings={k: v for k, v in vars(args).items() if v is not None and k != "hub_token"},
    )
    metrics = reports[0]["sets"].get("ratings", {}) | {"best_step": reports[0]["best_step"]}
    with atomic_write(output_dir / "metrics.json") as temporary:  # the last file: the run is complete
        temporary.write_text(json.dumps({"stages": reports} if args.stages else metrics, indent=2) + "\n")
    if args.push_to_hub:
        push_to_hub(output_dir, args.hub_model_id, args.hub_token, "End of training")


def train_stage(number, stage, start, end, checkpoint, best, run, accelerator, args):
    """Steps `start` + 1 to `end` of the run, from the last stage's best evaluator, or from a checkpoint of this one."""
    model = build_model(args, best_folder(number - 1, args) if number > 1 else args.init_evaluator)
    model = model.to(accelerator.device)
    if args.head == "alignment_structure" and number == 1 and not args.init_evaluator and not checkpoint:
        fit_head(model, stage, accelerator, args)
        logger.info(f"head at the start: a {model.a.item():.3f}, b {model.b.item():.3f}, bias {model.bias.item():.3f}")

    # Only the head's numbers are far from where they belong at the start, and they are few: a rate of their own.
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = [parameter for name, parameter in trained.items() if not name.startswith("clip.")]
    clip = [parameter for name, parameter in trained.items() if name.startswith("clip.")]
    if not trained:
        raise ValueError("Nothing to train: --lock_image and --lock_text leave head prompt_levels no parameters.")
    maps = ScoreMaps(len(stage.names)).to(accelerator.device) if args.stages else None
    head += maps.parameters() if args.stages else []
    groups = [{"params": clip, "weight_decay": args.adam_weight_decay}] if clip else []
    groups += [{"params": head, "lr": args.head_learning_rate, "weight_decay": 0.0}] if head else []
    optimizer = torch.optim.AdamW(
        groups, lr=args.learning_rate[number - 1], betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=(end - start) * accelerator.num_processes,
    )
    step = checkpoint_step(checkpoint) if checkpoint else start
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    samples = RatedImages(stage, "train", model, args, num_samples=(end - start) * samples_per_step)
    rest = Subset(samples, range((step - start) * samples_per_step, len(samples)))  # a resumed run goes on there
    loader = DataLoader(rest, args.train_batch_size, collate_fn=collate, num_workers=args.dataloader_num_workers)
    validation_loader = evaluation_loader(RatedImages(stage, "validation", model, args), args)
    model, optimizer, lr_scheduler, loader, validation_loader = accelerator.prepare(
        model, optimizer, lr_scheduler, loader, validation_loader
    )
    maps = accelerator.prepare(maps) if args.stages else None
    best.load_state_dict(Best(number).state_dict())
    if checkpoint:
        run.resume()
    if checkpoint and best.step and not best_folder(number, args).is_dir():
        raise ValueError(
            f"{checkpoint} goes with the evaluator of step {best.step} in {best_folder(number, args)}, which is missing."
        )
    logger.info(f"***** Running training{f', stage {number}: ' + ', '.join(stage.names) if args.stages else ''} *****")
    logger.info(
        f"  rows: {', '.join(f'{len(rows)} {split}' for split, rows in stage.splits.items())}; "
        f"{sum(p.numel() for p in clip + head)} trained parameters; steps {step}..{end}"
    )
    progress = tqdm(total=end, initial=step, disable=not accelerator.is_local_main_process)
    catch_sigterm(accelerator)
    model.train()
    for batch in loader:
        with accelerator.accumulate(model, *([maps] if args.stages else [])):
            loss = training_step(model, batch, maps)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                grad_norm = run.clip_grad_norm(optimizer, clip + head, args.max_grad_norm, step + 1)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        step += 1
        progress.update()
        mean_loss = accelerator.reduce(loss.detach(), "mean").item()
        logs = {"loss": mean_loss, "grad_norm": grad_norm, "lr": lr_scheduler.get_last_lr()[0]}
        accelerator.log(logs | {"skipped_steps": run.skipped_steps}, step=step)
        progress.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)
        if step % args.validation_steps == 0 or step == end:
            scores = predict(model, validation_loader, accelerator, "validation")
            lines = accelerator.unwrap_model(maps).lines() if args.stages else best.lines
            measured = measure(stage, "validation", scores, lines, args)
            for name, metrics in measured.items():
                prefix = f"validation/{name}/" if args.stages else "validation/"
                accelerator.log({prefix + key: value for key, value in metrics.items() if key != "pairs"}, step=step)
                logger.info(
                    f"step {step}: {prefix[:-1]} SRCC {metrics['srcc']:.4f}, PLCC {metrics['plcc']:.4f}, "
                    f"pairs {metrics.get('pairs', {}).get('any', {'share': math.nan})['share']:.4f}"
                )
            if best.improve(step, measured, lines):
                if accelerator.is_main_process:
                    dtype = torch.float16 if args.weight_dtype == "fp16" else None
                    save_evaluator(accelerator.unwrap_model(model), best_folder(number, args), dtype=dtype)
            model.train()
        due = step % args.checkpointing_steps == 0 or step == end
        checkpoint_or_stop(accelerator, args.output_dir, step, due, args.checkpoints_total_limit)
    release_sigterm()
    progress.close()
    accelerator.wait_for_everyone()
    accelerator.free_memory()  # the next stage has an optimizer, and a schedule, of its own


def main(args):
    accelerator, run = start_run(args)
    checkpoint = run.checkpoint
    with accelerator.main_process_first():
        stages = load_stages(args)
    for stage in stages:
        if args.group_column and args.group_column not in stage.splits["test"].column_names:
            raise ValueError(
                f"--group_column {args.group_column}: expected one of {stage.splits['test'].column_names}."
            )
    if not args.max_train_steps:
        samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        steps_per_epoch = [math.ceil(len(stage.splits["train"]) / samples_per_step) for stage in stages]
        args.max_train_steps = [epochs * steps for epochs, steps in zip(args.num_train_epochs, steps_per_epoch)]
    ends = list(accumulate(args.max_train_steps))  # the step of the run at which each stage ends
    first_step = checkpoint_step(checkpoint) if checkpoint else 0
    if first_step > ends[-1] or (first_step == ends[-1] and Path(args.output_dir, "metrics.json").is_file()):
        raise ValueError(f"{checkpoint} is already at step {first_step} of --max_train_steps {ends[-1]}.")
    if checkpoint:
        check_stage(checkpoint, first_step, ends)
    best = Best()
    run.keep(best=best)
    accelerator.init_trackers(
        "acpo-iqa-ipce", config={k: str(v) for k, v in vars(args).items() if v is not None and k != "hub_token"}
    )
    reports = []
    for number, (stage, start, end) in enumerate(zip(stages, [0, *ends], ends), start=1):
        if first_step <= end:
            resumed = checkpoint if first_step > start else None
            train_stage(number, stage, start, end, resumed, best, run, accelerator, args)
        elif not (report := best_folder(number, args) / "metrics.json").is_file():
            raise ValueError(f"{checkpoint} comes after stage {number}: expected its report {report}, found none.")
        reports.append(finish_stage(number, stage, best, accelerator, args))
        accelerator.free_memory()
    if accelerator.is_main_process:
        finish(reports, args)
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
