"""Base model against its ACPO fine-tunes: the same prompts, the same initial noise, the same scheduler; a table as the
paper's tables 2 and 3, every score of every image, pictures of gains and losses, and a report that opens offline.

    accelerate launch examples/evaluate_acpo.py --lora acpo-lora-sd

With no base model named it is the embedded demo's. Run it again and it goes on where it was: finished images are kept.
docs/evaluation.md has the prompt sets, the metrics, and the commands for SD-1.4 and DDPM.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import hashlib
import itertools
import json
import logging
import re
from pathlib import Path

import diffusers
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from PIL import Image
from tqdm.auto import tqdm

from acpo_utils.data.prompt_sets import PROMPT_SETS, Prompt, read_prompt_set
from acpo_utils.evaluation import models
from acpo_utils.evaluation.denoising_error import pipeline_denoising_error
from acpo_utils.evaluation.gains_plot import gains_plot
from acpo_utils.evaluation.grids import gains_and_losses
from acpo_utils.evaluation.guide_family import shared_family
from acpo_utils.evaluation.html_report import write_report
from acpo_utils.evaluation.manifest import ImageManifest, model_fingerprint
from acpo_utils.evaluation.metrics import (
    LOWER_IS_BETTER,
    NEED_PROMPTS,
    NEED_REAL_IMAGES,
    SET_METRICS,
    check_metric,
    expand_panel,
    is_guide,
    metric_labels,
    read_guides,
    score_files,
    set_values,
)
from acpo_utils.evaluation.panel import MEMBERS, PAIRED, measure_panel_of_sets
from acpo_utils.evaluation.real_images import read_real_images, write_real_images
from acpo_utils.evaluation.real_pairs import pairs_by_caption
from acpo_utils.evaluation.sampling import image_tensor
from acpo_utils.evaluation.table import (
    evaluation_notes,
    evaluation_table,
    finish_rows,
    paired_row,
    set_row,
    write_evaluation_tables,
)
from acpo_utils.families.loading import denoiser
from acpo_utils.files import atomic_write, one_line
from acpo_utils.late_step import lora_below
from acpo_utils.lora import LORA_NAME, read_lora_config
from acpo_utils.randomness import step_generator
from acpo_utils.sharding import WEIGHT_DTYPES
from acpo_utils.training.arguments import check_numbers, read_demo_settings
from acpo_utils.training.run import use_all_cpus


logger = get_logger(__name__, log_level="INFO")


@torch.no_grad()
def sample(pipeline, prompts, args):
    """(B, 3, H, W) images in [0, 1]. A prompt starts from the noise of (seed, its row), whatever model draws it."""
    noise = [step_generator(args.seed, prompt.row) for prompt in prompts]
    if args.unconditional:
        output = pipeline(
            batch_size=len(prompts),
            num_inference_steps=args.num_inference_steps,
            generator=noise,
            output_type="pt",
        )
        return image_tensor(output.images)
    callback = None
    if acts_late(pipeline, args):
        callback = lora_below(pipeline, args.lora_tmax)
    more = {}
    if args.max_sequence_length:
        more["max_sequence_length"] = args.max_sequence_length
    output = pipeline(
        prompt=[prompt.text for prompt in prompts],
        height=args.resolution,
        width=args.resolution,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=noise,
        output_type="pt",
        callback_on_step_end=callback,
        **more,
    )
    return output.images


def acts_late(pipeline, args):
    return args.lora_tmax is not None and hasattr(denoiser(pipeline), "peft_config")


def generate(pipeline, model, prompts, accelerator, args):
    """Draws what is not finished yet, batch k on process k mod n. Returns the images' files, in the prompts' order."""
    manifest = ImageManifest(Path(args.output_dir, "images", model), accelerator.process_index)
    made_from = origins(pipeline, prompts, args)
    batches = []
    for start in range(0, len(prompts), args.eval_batch_size):
        batches.append(prompts[start : start + args.eval_batch_size])
    own_batches = batches[accelerator.process_index :: accelerator.num_processes]

    def unfinished(batch):
        names = {file_name(prompt): prompt for prompt in batch}
        return [prompt for name, prompt in names.items() if not manifest.is_finished(name, made_from[name])]

    missing_of = [unfinished(batch) for batch in own_batches]
    total = sum(len(batch) for batch in own_batches)
    progress = tqdm(
        total=total,
        initial=total - sum(len(missing) for missing in missing_of),
        desc=f"sampling {model}",
        disable=not accelerator.is_local_main_process,
    )
    for batch, missing in zip(own_batches, missing_of):
        if not missing:
            continue
        images = sample(pipeline, batch, args)  # the whole batch: the last bits of an image depend on who is in it
        for prompt, image in zip(batch, images):
            if prompt in missing:
                name = file_name(prompt)
                manifest.save(name, image, made_from[name])
        progress.update(len(missing))
    progress.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        manifest.merge(made_from)
    return [manifest.folder / name for name in made_from]


def origins(pipeline, prompts, args):
    """{file name: what its image is made from}: an image of anything else is drawn again."""
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    scheduler = pipeline.scheduler.to_json_string().encode()
    settings = {
        "model": model_fingerprint(*modules),
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": None if args.unconditional else args.guidance_scale,
        "resolution": args.resolution,
        "scheduler": hashlib.sha256(scheduler).hexdigest()[:16],
    }
    if args.max_sequence_length:
        settings["max_sequence_length"] = args.max_sequence_length
    if acts_late(pipeline, args):
        settings["lora_tmax"] = args.lora_tmax
    made_from = {}
    for prompt in prompts:
        own = {"prompt": prompt.text, "seed": [args.seed, prompt.row]}
        made_from[file_name(prompt)] = settings | own
    return made_from


def file_name(prompt):
    return f"{file_slug(prompt.set)}-{prompt.row:06d}.png"


def file_slug(prompt_set):
    return re.sub(r"[^a-z0-9]+", "-", prompt_set.lower()).strip("-")


def measure(metrics, files, errors, prompts, real, pairs, guides, device, args):
    """Rows of the table, {metric: {model: scores}} of every image, and {metric: reason} of what cannot be had."""
    rows, scores, unavailable = [], {}, {}

    def add_rows(metric, label, comparisons):
        for (model, prompt_set), numbers in comparisons.items():
            row = {
                "model": model,
                "prompts": prompt_set,
                "metric": label,
                "guide": is_guide(metric, guides[model]),
                "family": shared_family(metric, guides[model]),
                "lower_is_better": kind_of(metric) in LOWER_IS_BETTER,
            }
            rows.append(row | numbers)

    for metric, label in metric_labels(metrics).items():
        if metric in MEMBERS:
            continue
        logger.info(f"Measuring {label}")
        try:
            comparisons, of_images = measure_metric(metric, files, errors, prompts, real, device, args)
        except (ValueError, ImportError, OSError, RuntimeError) as error:
            # Weights, packages, memory, values that are not finite: the rest goes on.
            unavailable[label] = one_line(error)
            logger.warning(f"{label} is unavailable: {unavailable[label]}")
            continue
        if of_images:
            scores[label] = of_images
        add_rows(metric, label, comparisons)

    members = [metric for metric in metrics if metric in MEMBERS]
    if members:
        logger.info(f"Measuring the panel: {', '.join(members)}")
        panel = measure_panel_of_sets(members, files, rows_of_sets(prompts), real, pairs, device, args.seed)
        for label, comparisons in panel.rows.items():
            add_rows(label, label, comparisons)
        for label, reason in panel.unavailable.items():
            unavailable[label] = reason
            logger.warning(f"{label} is unavailable: {reason}")
    return finish_rows(rows), scores, unavailable


def rows_of_sets(prompts):
    """{prompt set: which of the prompts}"""
    rows = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt.set, []).append(row)
    return rows


def measure_metric(metric, files, errors, prompts, real, device, args):
    """{(model, prompt set): numbers of its row}, and {model: scores} of every image where the metric is of one image."""
    tuned = [model for model in files if model != "base"]
    rows = {}
    if metric == "mse":
        where = Path(args.real_data_dir).stem
        for model in tuned:
            rows[model, where] = paired_row(errors["base"], errors[model], lower_is_better=True)
        return rows, {}
    if kind_of(metric) in SET_METRICS:
        for prompt_set, members in rows_of_sets(prompts).items():
            subsets = {model: [images[i] for i in members] for model, images in files.items()}
            values = set_values(metric, subsets, real, device)
            for model in tuned:
                rows[model, prompt_set] = set_row(values["base"], values[model], len(members))
        return rows, {}
    texts = None if args.unconditional else [prompt.text for prompt in prompts]
    scores = score_files(metric, files, texts, device)
    for prompt_set, members in rows_of_sets(prompts).items():
        base = [scores["base"][i] for i in members]
        for model in tuned:
            rows[model, prompt_set] = paired_row(base, [scores[model][i] for i in members])
    return rows, scores


def kind_of(metric):
    return metric.partition(":")[0]


DEMO_DIR = Path(__file__).resolve().parent / "demo"
# The demo's prompts by name, also for other models: combinations that nothing was trained on, and unknown concepts.
DEMO_PROMPTS = {
    "demo": str(DEMO_DIR / "data" / "new_combinations.parquet"),
    "demo-unseen": str(DEMO_DIR / "data" / "unseen_concepts.parquet"),
}
DEMO_SETTINGS = DEMO_DIR / "evaluation.json"  # where the demo's settings differ from the defaults below


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # Models
    add("--pretrained_model_name_or_path", help="base: hub id or folder; none: the demo")
    add("--revision")
    add("--variant")
    add(
        "--lora",
        nargs="+",
        default=[],
        help="LoRA folders or files, as the train_acpo_lora_ scripts write them",
    )
    add(
        "--lora_tmax",
        type=int,
        help="the LoRAs act at timesteps below this alone, as trained; default: at all",
    )
    add(
        "--finetuned",
        nargs="+",
        default=[],
        help="whole fine-tuned pipelines, of the base model's kind",
    )
    # Prompts and noise
    add(
        "--prompts",
        nargs="+",
        help=f"{', '.join(PROMPT_SETS)}, NAME:PATH, demo, demo-unseen, or .txt, .csv, ...",
    )
    add("--max_prompts", type=int, help="of each set, by --seed; default: all")
    add("--num_images", type=int, default=500, help="of an unconditional model")
    add("--seed", type=int, default=0, help="of the noise and of the choices")
    # Sampling
    add("--scheduler", choices=models.SCHEDULERS, help="default: ddim, or the flow's own")
    add("--num_inference_steps", type=int, help="default: the pipeline's own")
    add("--guidance_scale", type=float, help="default: the pipeline's own")
    add(
        "--max_sequence_length",
        type=int,
        help="tokens of a caption, of T5 or an LLM; default: the pipeline's own",
    )
    add("--resolution", type=int, help="default: the model's own")
    add("--eval_batch_size", type=int, default=16)
    add("--mixed_precision", choices=["no", "fp16", "bf16"])
    # Metrics
    add("--metrics", nargs="+", help="see docs/evaluation.md; default: the guides, and others")
    add(
        "--real_data_dir",
        help="real images for the panel, fid and mse: image folder or parquet",
    )
    add("--image_column", help="default: image, or img if there is only that")
    add(
        "--caption_column",
        default="text",
        help="of --real_data_dir, for mse and real images of the prompts",
    )
    add("--max_real_images", type=int)
    # Output
    add(
        "--rank_by",
        help="the metric whose largest gains and losses are shown; default: the first that is no guide",
    )
    add("--num_grid_pairs", type=int, default=12, help="in each picture")
    add("--output_dir", default="acpo-evaluation")

    args = parser.parse_args(input_args)
    args.demo = args.pretrained_model_name_or_path is None
    if args.demo:
        if not DEMO_SETTINGS.is_file():
            parser.error(f"no model is named, and the demo's is not at {DEMO_DIR}: clone the repository")
        parser.set_defaults(demo=True, **read_demo_settings(DEMO_SETTINGS, given=args))
        args = parser.parse_args(input_args)
        args.real_data_dir = args.real_data_dir or DEMO_PROMPTS.get(args.prompts[0], DEMO_PROMPTS["demo"])
    args.lora = [str(Path(path)) for path in args.lora]
    args.finetuned = [str(Path(path)) for path in args.finetuned]
    if not args.lora and not args.finetuned:
        parser.error("nothing to compare the base model with: give --lora or --finetuned")
    try:
        check_numbers(
            args,
            lora_tmax=1,
            max_prompts=2,
            num_images=2,
            max_real_images=1,
            max_sequence_length=1,
            num_grid_pairs=1,
        )
    except ValueError as error:
        parser.error(str(error))
    return args


def check_models(args):
    """{name: path} of the models, "base" first; no model is loaded. Sets `args.pipeline_class`, `args.unconditional`, and
    what the command line does not say of sampling."""
    base = args.pretrained_model_name_or_path
    args.pipeline_class = models.class_of(base, args.revision)
    args.unconditional = args.pipeline_class in models.UNCONDITIONAL
    for path in args.finetuned:
        name = models.class_of(path)
        if name != args.pipeline_class and not (args.unconditional and name in models.UNCONDITIONAL):
            raise ValueError(f"--finetuned {path}: expected a pipeline like the base model's, found {name}")
    if args.unconditional and (args.lora or args.prompts or args.resolution or args.scheduler not in (None, "ddim")):
        raise ValueError(
            "an unconditional base model takes no --lora, no --prompts, no --resolution, and no --scheduler but ddim"
        )
    models.check_sampling(args.pipeline_class, args.scheduler, args.max_sequence_length)
    if args.num_inference_steps is None:
        args.num_inference_steps = models.sampling_default(
            args.pipeline_class,
            "num_inference_steps",
        )
    if args.guidance_scale is None and not args.unconditional:
        args.guidance_scale = models.sampling_default(
            args.pipeline_class,
            "guidance_scale",
        )
    for path in args.lora:
        read_lora_config(path, getattr(diffusers, args.pipeline_class))
    compared = {"base": base}
    for path in map(Path, (*args.lora, *args.finetuned)):
        folder = path.resolve().parent if path.name == LORA_NAME else path.resolve()
        name = re.sub(r"[^-\w.]+", "-", folder.name.removesuffix(".safetensors"))
        numbered = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
        free = next(candidate for candidate in numbered if candidate not in compared)
        compared[free] = str(path)
    return compared


def load_model(path, args, weight_dtype, device):
    """The base pipeline, the base with the LoRA of `path` in it, or a pipeline of its own."""
    base = args.pretrained_model_name_or_path
    is_lora = path in args.lora
    source = base if is_lora else path
    return models.load_pipeline(
        source,
        args.pipeline_class,
        lora=path if is_lora else None,
        revision=args.revision if source == base else None,
        variant=args.variant if source == base else None,
        weight_dtype=weight_dtype,
        device=device,
        scheduler=args.scheduler or "ddim",
        max_sequence_length=args.max_sequence_length,
    )


def read_all_prompts(args):
    if args.unconditional:
        return [Prompt("unconditional", row, None) for row in range(args.num_images)]
    if not args.prompts:
        raise ValueError(f"--prompts: expected {', '.join(PROMPT_SETS)}, demo, demo-unseen or a file, found none")
    chosen = []
    seen = {}  # {name of the files: spec}
    for spec in dict.fromkeys(args.prompts):
        source = DEMO_PROMPTS.get(spec, spec)
        prompts = read_prompt_set(source, args.max_prompts, args.seed)
        if len(prompts) < 2:
            raise ValueError(f"--prompts {spec}: expected at least two prompts to compare, found {len(prompts)}")
        name = file_slug(prompts[0].set)
        if name in seen:
            raise ValueError(f"--prompts {spec}: has the name of {seen[name]}; rename one of the two files")
        seen[name] = spec
        chosen += prompts
    return chosen


def choose_metrics(args, guides):
    """The metrics asked for; by default the guides of the trainings, and some that guided nothing."""
    if args.metrics is None:
        metrics = [guide for of_model in guides.values() for guide in of_model]
        if args.demo:
            metrics += ["judge", "panel", "mse"]
        else:
            metrics += ["hyperiqa", "maniqa"] if args.unconditional else ["clipscore", "pickscore"]
            metrics += ["panel", "kid", "fid", "mse"] if args.real_data_dir else []
    else:
        metrics = args.metrics
    # The embedded judge by name alone.
    metrics = [f"judge:{DEMO_DIR / 'judge'}" if metric == "judge" else metric for metric in expand_panel(metrics)]
    for metric in metrics:
        if args.metrics is not None:
            check_metric(metric)
        if metric in NEED_REAL_IMAGES and not args.real_data_dir:
            raise ValueError(f"--metrics {metric} compares with real images: give --real_data_dir")
        if kind_of(metric) in NEED_PROMPTS and args.unconditional:
            raise ValueError(f"--metrics {metric} needs prompts, and the model is unconditional")
    return metrics


def draw_grids(results, files, real_of, guides, metrics, args):
    """Pictures of the largest gains, the largest losses and a random draw; their paths, relative to the output."""
    captions = [prompt["text"] or f"image {prompt['row']}" for prompt in results["prompts"]]
    grids = []
    for model in guides:
        metric = args.rank_by or ranking_metric(results["scores"], metrics, guides[model])
        scores = results["scores"].get(metric)
        grids += gains_and_losses(
            Path(args.output_dir, "grids"),
            model,
            pairs=list(zip(files["base"], files[model], real_of)),
            captions=captions,
            metric=metric,
            scores=scores and (scores["base"], scores[model]),
            count=args.num_grid_pairs,
            seed=args.seed,
        )
    return [path.relative_to(args.output_dir).as_posix() for path in grids]


def ranking_metric(scores, metrics, guides):
    """The first metric of single images that did not guide the model, else the first one, else None."""
    for metric, label in metric_labels(metrics).items():
        if label in scores and not is_guide(metric, guides):
            return label
    return next(iter(scores), None)


def main(args):
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%H:%M:%S",
        level=logging.INFO,
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if args.demo and accelerator.device.type == "cpu" and accelerator.num_processes == 1:
        use_all_cpus()

    # Everything that can be wrong in a path, a column or a name is found before a model is loaded.
    compared = check_models(args)
    prompts = read_all_prompts(args)
    guides = {model: read_guides(path) for model, path in compared.items() if model != "base"}
    metrics = choose_metrics(args, guides)
    labels = [label for metric, label in metric_labels(metrics).items() if metric not in MEMBERS]
    if args.rank_by and args.rank_by not in labels:
        raise ValueError(f"--rank_by: expected one of {', '.join(labels)}, got {args.rank_by}")
    real = None
    if args.real_data_dir and any(metric in (*NEED_REAL_IMAGES, *MEMBERS) for metric in metrics):
        in_pairs = not args.unconditional and any(metric in PAIRED for metric in metrics)
        captioned = not args.unconditional and "mse" in metrics
        real = read_real_images(
            args.real_data_dir,
            image_column=args.image_column,
            caption_column=args.caption_column if captioned or in_pairs else None,
            max_real_images=args.max_real_images,
            seed=args.seed,
            optional_captions=not captioned,
        )
    pairs = {}  # {row of the prompt: row of its real image}
    if real and real.captions and not args.unconditional:
        pairs = dict(pairs_by_caption([prompt.text for prompt in prompts], real.captions))
        logger.info(f"{len(pairs)} of {len(prompts)} prompts have a real image")
    output_dir = Path(args.output_dir)
    try:
        with atomic_write(output_dir / "args.json") as temporary:
            temporary.write_text(json.dumps(vars(args), indent=2))
    except OSError as error:
        raise ValueError(f"--output_dir {args.output_dir} cannot be written to: {error.strerror}") from error

    weight_dtype = WEIGHT_DTYPES.get(accelerator.mixed_precision, torch.float32)
    files = {}  # {model: its images}
    errors = {}  # {model: MSE of each real image}
    predictor = None
    if not args.unconditional:
        predictor = models.predictor_of(args.pipeline_class, args.max_sequence_length)
    real_files = None
    for model, path in compared.items():
        pipeline = load_model(path, args, weight_dtype, accelerator.device)
        files[model] = generate(pipeline, model, prompts, accelerator, args)
        if real and accelerator.is_main_process:
            if real_files is None:
                with Image.open(files[model][0]) as image:
                    real_files = write_real_images(real, image.size, output_dir / "real_images")
            if "mse" in metrics:
                mse = pipeline_denoising_error(
                    pipeline,
                    real_files,
                    real.captions,
                    seed=args.seed,
                    batch_size=args.eval_batch_size,
                    predictor=predictor,
                )
                errors[model] = mse.tolist()
        del pipeline
    accelerator.end_training()  # what is left is short, and is done by one process
    if not accelerator.is_main_process:
        return

    rows, scores, unavailable = measure(
        metrics,
        files,
        errors,
        prompts,
        real_files,
        pairs,
        guides,
        accelerator.device,
        args,
    )
    results = {
        "settings": vars(args),
        "models": compared,
        "guides": guides,
        "prompts": [vars(prompt) for prompt in prompts],
        "images": {},
        "rows": rows,
        "scores": scores,
        "errors": errors if any(row["metric"] == "mse" for row in rows) else {},
        "unavailable": unavailable,
    }
    for model, paths in files.items():
        results["images"][model] = [path.relative_to(output_dir).as_posix() for path in paths]
    real_of = [None] * len(prompts)  # each prompt's real image
    results["real_images"] = [None] * len(prompts)
    for row, number in pairs.items():
        real_of[row] = real_files[number]
        results["real_images"][row] = real_files[number].relative_to(output_dir).as_posix()
    results["grids"] = draw_grids(results, files, real_of, guides, metrics, args)
    with atomic_write(output_dir / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1, allow_nan=False))
    write_evaluation_tables(output_dir, results)
    gains_plot(output_dir / "gains.png", rows)
    report = write_report(output_dir, results)
    print(f"\n{evaluation_table(rows)}\n{evaluation_notes(results)}")
    print(f"The report is {report.resolve()}, the numbers are beside it.")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
