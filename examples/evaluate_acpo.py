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

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)
from peft import LoraConfig
from PIL import Image
from tqdm.auto import tqdm

from acpo_utils.data.prompt_sets import PROMPT_SETS, Prompt, read_prompt_set
from acpo_utils.evaluation.denoising_error import pipeline_denoising_error
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
from acpo_utils.families.loading import DTYPE
from acpo_utils.families.stable_diffusion import build_pipeline
from acpo_utils.families.stable_diffusion import load as load_stable_diffusion
from acpo_utils.files import atomic_write, load_strictly, one_line
from acpo_utils.late_step import lora_below
from acpo_utils.lora import LORA_NAME, load_lora, read_lora_config
from acpo_utils.randomness import step_generator
from acpo_utils.sharding import WEIGHT_DTYPES
from acpo_utils.training.arguments import check_numbers, read_demo_settings
from acpo_utils.training.run import use_all_cpus


logger = get_logger(__name__, log_level="INFO")
UNCONDITIONAL = ("DDPMPipeline", "DDIMPipeline")
SCHEDULERS = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}


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
    output = pipeline(
        [prompt.text for prompt in prompts],
        height=args.resolution,
        width=args.resolution,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=noise,
        output_type="pt",
        callback_on_step_end=lora_below(pipeline, args.lora_tmax) if acts_late(pipeline, args) else None,
    )
    return output.images


def acts_late(pipeline, args):
    return args.lora_tmax is not None and hasattr(pipeline.unet, "peft_config")


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
    add("--pretrained_model_name_or_path", help="base: hub id or folder of a Stable Diffusion or DDPM; none: the demo")
    add("--revision")
    add("--variant")
    add("--lora", nargs="+", default=[], help="LoRA folders or files, as train_acpo_lora_sd.py writes them")
    add("--lora_tmax", type=int, help="the LoRAs act at timesteps below this alone, as trained; default: at all")
    add("--finetuned", nargs="+", default=[], help="whole fine-tuned pipelines: folders of a DDPM or Stable Diffusion")
    # Prompts and noise
    add("--prompts", nargs="+", help=f"{', '.join(PROMPT_SETS)}, NAME:PATH, demo, demo-unseen, or .txt, .csv, ...")
    add("--max_prompts", type=int, help="of each set, a random choice by --seed; default: all")
    add("--num_images", type=int, default=500, help="of an unconditional model")
    add("--seed", type=int, default=0, help="of the noise and of the choices")
    # Sampling
    add("--scheduler", choices=SCHEDULERS, default="ddim")
    add("--num_inference_steps", type=int, default=50)
    add("--guidance_scale", type=float, default=7.5)
    add("--resolution", type=int, help="default: the model's own")
    add("--eval_batch_size", type=int, default=16)
    add("--mixed_precision", choices=["no", "fp16", "bf16"])
    # Metrics
    add("--metrics", nargs="+", help="see docs/evaluation.md; default: the guides, and others")
    add("--real_data_dir", help="real images for the panel, fid and mse: image folder or parquet")
    add("--image_column", help="default: image, or img if there is only that")
    add("--caption_column", default="text", help="of --real_data_dir, for mse and real images of the prompts")
    add("--max_real_images", type=int)
    # Output
    add("--rank_by", help="the metric whose largest gains and losses are shown; default: the first that is no guide")
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
            num_grid_pairs=1,
        )
    except ValueError as error:
        parser.error(str(error))
    return args


def check_models(args):
    """{name: path} of the models, "base" first; sets `args.unconditional`. No model is loaded."""
    base = args.pretrained_model_name_or_path
    args.unconditional = pipeline_class(base, args) in UNCONDITIONAL
    for path in args.finetuned:
        name = pipeline_class(path, args)
        if (name in UNCONDITIONAL) != args.unconditional:
            raise ValueError(f"--finetuned {path}: expected a pipeline like the base model's, found {name}")
    if args.unconditional and (args.lora or args.prompts or args.resolution or args.scheduler != "ddim"):
        raise ValueError(
            "an unconditional base model takes no --lora, no --prompts, no --resolution, and no --scheduler but ddim"
        )
    for path in args.lora:
        read_lora_config(path)
    models = {"base": base}
    for path in map(Path, (*args.lora, *args.finetuned)):
        folder = path.resolve().parent if path.name == LORA_NAME else path.resolve()
        name = re.sub(r"[^-\w.]+", "-", folder.name.removesuffix(".safetensors"))
        numbered = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
        free = next(candidate for candidate in numbered if candidate not in models)
        models[free] = str(path)
    return models


def pipeline_class(path, args):
    """The class that the model_index.json of a hub repository or folder names."""
    try:
        revision = args.revision if is_base(path, args) else None
        name = DiffusionPipeline.load_config(path, revision=revision)["_class_name"]
    except (OSError, KeyError) as error:
        raise ValueError(
            f"expected a Stable Diffusion or DDPM pipeline (hub id or folder with model_index.json), {path!r} could not "
            f"be read: {str(error).splitlines()[0]}"
        ) from error
    if name not in ("StableDiffusionPipeline", *UNCONDITIONAL):
        raise ValueError(f"{path}: expected a StableDiffusionPipeline, DDPMPipeline or DDIMPipeline, found {name}")
    return name


def is_base(path, args):
    return path == args.pretrained_model_name_or_path


def load_pipeline(path, args, weight_dtype, device):
    """The base pipeline, the base with the LoRA of `path` in it, or a pipeline of its own."""
    source = args.pretrained_model_name_or_path if path in args.lora else path
    revision = variant = None
    if is_base(source, args):
        revision = args.revision
        variant = args.variant
    try:
        if args.unconditional:
            unet = load_strictly(
                UNet2DModel.from_pretrained,
                source,
                subfolder="unet",
                revision=revision,
                variant=variant,
                **{DTYPE: weight_dtype},
            )
            config = DDIMScheduler.load_config(source, subfolder="scheduler", revision=revision)
            pipeline = DDIMPipeline(unet, DDIMScheduler.from_config(config))
        else:
            noise_scheduler, tokenizer, text_encoder, vae, unet = load_stable_diffusion(
                source,
                revision=revision,
                variant=variant,
                weight_dtype=weight_dtype,
                vae_dtype=weight_dtype,
                device=device,
            )
            pipeline = build_pipeline(unet, vae, text_encoder, tokenizer, noise_scheduler)
            pipeline.scheduler = SCHEDULERS[args.scheduler].from_config(noise_scheduler.config)
    except (OSError, ValueError) as error:
        raise ValueError(f"the pipeline {source!r} could not be loaded: {str(error).splitlines()[0]}") from error
    if path in args.lora:
        saved = read_lora_config(path)
        config = LoraConfig(
            r=saved["rank"],
            lora_alpha=saved["alpha"],
            target_modules=saved["target_modules"],
        )
        pipeline.unet.add_adapter(config)
        load_lora(pipeline.unet, path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


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
    models = check_models(args)
    prompts = read_all_prompts(args)
    guides = {model: read_guides(path) for model, path in models.items() if model != "base"}
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
    real_files = None
    for model, path in models.items():
        pipeline = load_pipeline(path, args, weight_dtype, accelerator.device)
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
        "models": models,
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
    report = write_report(output_dir, results)
    print(f"\n{evaluation_table(rows)}\n{evaluation_notes(results)}")
    print(f"The report is {report.resolve()}, the numbers are beside it.")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
