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

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DModel,
)
from peft import LoraConfig
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from acpo_utils.data import check_images, load_captioned_images, read_image
from acpo_utils.data.prompt_sets import PROMPT_SETS, Prompt, read_prompt_set
from acpo_utils.evaluation.denoising_error import pipeline_denoising_error
from acpo_utils.evaluation.grids import choose_pairs, pair_grid
from acpo_utils.evaluation.html_report import write_report
from acpo_utils.evaluation.manifest import ImageManifest, model_fingerprint
from acpo_utils.evaluation.metrics import (
    LOWER_IS_BETTER,
    NEED_PROMPTS,
    NEED_REAL_IMAGES,
    SET_METRICS,
    check_metric,
    is_guide,
    metric_labels,
    read_guides,
    score_files,
    set_values,
)
from acpo_utils.evaluation.sampling import image_tensor
from acpo_utils.evaluation.table import (
    evaluation_notes,
    evaluation_table,
    finish_rows,
    paired_row,
    set_row,
    write_evaluation_tables,
)
from acpo_utils.files import atomic_write
from acpo_utils.late_step import lora_below
from acpo_utils.lora import LORA_NAME, load_lora, read_lora_config
from acpo_utils.randomness import step_generator
from acpo_utils.sharding import WEIGHT_DTYPES
from acpo_utils.stable_diffusion import DTYPE
from acpo_utils.training.run import use_all_cpus


logger = get_logger(__name__, log_level="INFO")
SCHEDULERS = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}


@torch.no_grad()
def sample(pipeline, prompts, args):
    """(B, 3, H, W) images in [0, 1]. A prompt starts from the noise of (seed, its row), whatever model draws it."""
    noise = [step_generator(args.seed, prompt.row) for prompt in prompts]
    settings = {"num_inference_steps": args.num_inference_steps, "generator": noise, "output_type": "pt"}
    if args.unconditional:
        return image_tensor(pipeline(batch_size=len(prompts), **settings).images)
    if args.resolution:
        settings |= {"height": args.resolution, "width": args.resolution}
    if acts_late(pipeline, args):
        settings |= {"callback_on_step_end": lora_below(pipeline, args.lora_tmax)}
    return pipeline([prompt.text for prompt in prompts], guidance_scale=args.guidance_scale, **settings).images


def acts_late(pipeline, args):
    return args.lora_tmax is not None and hasattr(pipeline.unet, "peft_config")


def generate(pipeline, model, prompts, accelerator, args):
    """Draws what is not finished yet, batch k on process k mod n. Returns the images' files, in the prompts' order."""
    manifest = ImageManifest(Path(args.output_dir, "images", model), accelerator.process_index)
    settings = {
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": None if args.unconditional else args.guidance_scale,
        "resolution": args.resolution,
        "scheduler": hashlib.sha256(pipeline.scheduler.to_json_string().encode()).hexdigest()[:16],
    }
    if acts_late(pipeline, args):
        settings["lora_tmax"] = args.lora_tmax
    fingerprint = model_fingerprint(*(part for part in pipeline.components.values() if hasattr(part, "state_dict")))
    made_from = {
        file_name(prompt): {"model": fingerprint, "prompt": prompt.text, "seed": [args.seed, prompt.row]} | settings
        for prompt in prompts
    }

    def unfinished(batch):
        return [p for p in batch if not manifest.is_finished(file_name(p), made_from[file_name(p)])]

    batches = [prompts[start : start + args.eval_batch_size] for start in range(0, len(prompts), args.eval_batch_size)]
    own = [(batch, unfinished(batch)) for batch in batches[accelerator.process_index :: accelerator.num_processes]]
    kept = sum(len(batch) - len(missing) for batch, missing in own)
    progress = tqdm(
        total=sum(len(batch) for batch, _ in own),
        initial=kept,
        desc=f"sampling {model}",
        disable=not accelerator.is_local_main_process,
    )
    for batch, missing in own:
        if missing:  # always the whole batch: the last bits of an image depend on who is in it
            images = sample(pipeline, batch, args)
            for prompt, image in zip(batch, images):
                if prompt in missing:
                    manifest.save(file_name(prompt), image, made_from[file_name(prompt)])
            progress.update(len(missing))
    progress.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        manifest.merge(made_from)
    return [manifest.folder / name for name in made_from]


def file_name(prompt):
    return f"{re.sub(r'[^a-z0-9]+', '-', prompt.set.lower()).strip('-')}-{prompt.row:06d}.png"


def measure(metrics, files, errors, prompts, real, guides, device, args):
    """Rows of the table, {metric: {model: scores}} of every image, and {metric: reason} of what cannot be had."""
    labels, rows, scores, unavailable = metric_labels(metrics), [], {}, {}
    tuned = [model for model in files if model != "base"]
    sets = list(dict.fromkeys(prompt.set for prompt in prompts))
    of_set = {name: [i for i, prompt in enumerate(prompts) if prompt.set == name] for name in sets}
    texts = None if args.unconditional else [prompt.text for prompt in prompts]
    for metric in metrics:
        kind, label = metric.partition(":")[0], labels[metric]
        lower, new_rows = kind in LOWER_IS_BETTER, []
        logger.info(f"Measuring {label}")
        try:
            if kind == "mse":
                where = Path(args.real_data_dir).stem
                new_rows = [(m, where, paired_row(errors["base"], errors[m], lower_is_better=True)) for m in tuned]
            elif kind in SET_METRICS:
                for name, members in of_set.items():
                    subsets = {model: [images[i] for i in members] for model, images in files.items()}
                    values = set_values(metric, subsets, real, device)
                    new_rows += [(m, name, set_row(values["base"], values[m], len(members))) for m in tuned]
            else:
                values = score_files(metric, files, texts, device)
                for (name, members), m in itertools.product(of_set.items(), tuned):
                    base, finetuned = ([values[model][i] for i in members] for model in ("base", m))
                    new_rows.append((m, name, paired_row(base, finetuned)))
                scores[label] = values
        except (ValueError, ImportError, OSError, RuntimeError) as error:
            # Weights, packages, memory, values that are not finite: the rest goes on.
            unavailable[label] = " ".join(str(error).split())
            logger.warning(f"{label} is unavailable: {unavailable[label]}")
            continue
        for m, name, row in new_rows:
            what = {"metric": label, "guide": is_guide(metric, guides[m]), "lower_is_better": lower}
            rows.append({"model": m, "prompts": name} | what | row)
    return finish_rows(rows), scores, unavailable


DEMO_DIR = Path(__file__).resolve().parent / "demo"
# The demo's prompts by name, also for other models: combinations that nothing was trained on, and unknown concepts.
DEMO_PROMPTS = {
    "demo": str(DEMO_DIR / "data" / "new_combinations.parquet"),
    "demo-unseen": str(DEMO_DIR / "data" / "unseen_concepts.parquet"),
}
# The embedded demo's settings, where they differ from the defaults below.
DEMO = {
    "pretrained_model_name_or_path": str(DEMO_DIR / "pipeline"),
    "prompts": ["demo"],
    "max_prompts": 100,
    "max_real_images": 200,
    "num_inference_steps": 15,
    "guidance_scale": 2.0,
}


def parse_args():
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
    add("--metrics", nargs="+", help="docs/evaluation.md; default: the guides of the training, and independent ones")
    add("--real_data_dir", help="real images for fid, kid, judge-kid and mse: image folder or parquet")
    add("--image_column", help="default: image, or img if there is only that")
    add("--caption_column", default="text", help="of --real_data_dir, for mse")
    add("--max_real_images", type=int)
    # Output
    add("--rank_by", help="the metric whose largest gains and losses are shown; default: the first that is no guide")
    add("--num_grid_pairs", type=int, default=12, help="in each picture")
    add("--output_dir", default="acpo-evaluation")

    args = parser.parse_args()
    args.demo = args.pretrained_model_name_or_path is None
    if args.demo:
        if not DEMO_DIR.is_dir():
            parser.error(f"no --pretrained_model_name_or_path, and the demo is not at {DEMO_DIR}: name a model")
        parser.set_defaults(**DEMO)
        args = parser.parse_args(namespace=argparse.Namespace(demo=True))
        args.real_data_dir = args.real_data_dir or DEMO_PROMPTS.get(args.prompts[0], DEMO_PROMPTS["demo"])

    args.lora, args.finetuned = ([str(Path(path)) for path in paths] for paths in (args.lora, args.finetuned))
    if not args.lora and not args.finetuned:
        parser.error("nothing to compare the base model with: give --lora or --finetuned")
    at_least = {"eval_batch_size": 1, "num_inference_steps": 1, "max_prompts": 2, "num_images": 2, "num_grid_pairs": 1}
    for name, least in at_least.items():
        if (value := getattr(args, name)) is not None and value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    return args


def check_models(args):
    """{name: path} of the models, "base" first; sets `args.unconditional`. No model is loaded."""
    models = {"base": args.pretrained_model_name_or_path}
    classes = {path: pipeline_class(path, args) for path in (args.pretrained_model_name_or_path, *args.finetuned)}
    args.unconditional = classes[args.pretrained_model_name_or_path] in ("DDPMPipeline", "DDIMPipeline")
    for path, name in classes.items():
        if (name in ("DDPMPipeline", "DDIMPipeline")) != args.unconditional:
            raise ValueError(f"--finetuned {path}: expected a pipeline like the base model's, found {name}")
    if args.unconditional and (args.lora or args.prompts or args.resolution or args.scheduler != "ddim"):
        raise ValueError(
            "an unconditional base model takes no --lora, no --prompts, no --resolution, and no --scheduler but ddim"
        )
    for path in args.lora:
        read_lora_config(path)
    for path in map(Path, (*args.lora, *args.finetuned)):
        folder = path.resolve().parent if path.name == LORA_NAME else path.resolve()
        name = re.sub(r"[^-\w.]+", "-", folder.name.removesuffix(".safetensors"))
        candidates = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
        models[next(candidate for candidate in candidates if candidate not in models)] = str(path)
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
    if name not in ("StableDiffusionPipeline", "DDPMPipeline", "DDIMPipeline"):
        raise ValueError(f"{path}: expected a StableDiffusionPipeline, DDPMPipeline or DDIMPipeline, found {name}")
    return name


def is_base(path, args):
    return path == args.pretrained_model_name_or_path


def load_pipeline(path, args, weight_dtype, device):
    """The base pipeline, the base with the LoRA of `path` in it, or a pipeline of its own."""
    source = args.pretrained_model_name_or_path if path in args.lora else path
    hub = {"revision": args.revision, "variant": args.variant} if is_base(source, args) else {}
    kwargs = {"use_safetensors": True, DTYPE: weight_dtype} | hub
    try:
        if args.unconditional:
            unet = UNet2DModel.from_pretrained(source, subfolder="unet", **kwargs)
            config = DDIMScheduler.load_config(source, subfolder="scheduler", revision=hub.get("revision"))
            pipeline = DDIMPipeline(unet, DDIMScheduler.from_config(config))
        else:
            unchecked = {"safety_checker": None, "requires_safety_checker": False}  # it blackens images
            pipeline = StableDiffusionPipeline.from_pretrained(source, **unchecked, **kwargs)
            pipeline.scheduler = SCHEDULERS[args.scheduler].from_config(pipeline.scheduler.config)
    except OSError as error:
        raise ValueError(f"the pipeline {source!r} could not be loaded: {str(error).splitlines()[0]}") from error
    if path in args.lora:
        config = read_lora_config(path)
        adapter = {"r": config["rank"], "lora_alpha": config["alpha"], "target_modules": config["target_modules"]}
        pipeline.unet.add_adapter(LoraConfig(**adapter))
        load_lora(pipeline.unet, path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def read_all_prompts(args):
    if args.unconditional:
        return [Prompt("unconditional", row, None) for row in range(args.num_images)]
    if not args.prompts:
        raise ValueError(f"--prompts: expected {', '.join(PROMPT_SETS)}, demo, demo-unseen or a file, found none")
    sets = {spec: read_prompt_set(DEMO_PROMPTS.get(spec, spec), args.max_prompts, args.seed) for spec in args.prompts}
    seen = {}
    for spec, prompts in sets.items():
        if len(prompts) < 2:
            raise ValueError(f"--prompts {spec}: expected at least two prompts to compare, found {len(prompts)}")
        if other := seen.get(file_name(prompts[0])[:-11]):
            raise ValueError(f"--prompts {spec}: has the name of {other}; rename one of the two files")
        seen[file_name(prompts[0])[:-11]] = spec
    return [prompt for prompts in sets.values() for prompt in prompts]


def choose_metrics(args, guides):
    """The metrics asked for; by default the guides of the trainings, and some that guided nothing."""
    named = {"judge": f"judge:{DEMO_DIR / 'judge'}", "judge-kid": f"judge-kid:{DEMO_DIR / 'judge'}"}
    if args.metrics is None:
        metrics = [guide for of_model in guides.values() for guide in of_model]
        independent = ["hyperiqa", "maniqa"] if args.unconditional else ["clipscore", "pickscore"]
        metrics += ["judge", "judge-kid"] if args.demo else independent
        metrics += ["mse"] if args.demo else ["fid", "mse"] if args.real_data_dir else []
    else:
        for metric in args.metrics:
            check_metric(named.get(metric, metric))
        metrics = args.metrics
    metrics = list(dict.fromkeys(named.get(metric, metric) for metric in metrics))
    for kind, metric in ((metric.partition(":")[0], metric) for metric in metrics):
        if kind in NEED_REAL_IMAGES and not args.real_data_dir:
            raise ValueError(f"--metrics {metric} compares with real images: give --real_data_dir")
        if kind in NEED_PROMPTS and args.unconditional:
            raise ValueError(f"--metrics {metric} needs prompts, and the model is unconditional")
    return metrics


def read_real_images(metrics, args):
    """The data set of --real_data_dir, every image of it checked, and the name of its image column."""
    caption_column = args.caption_column if "mse" in metrics and not args.unconditional else None
    try:
        dataset = load_captioned_images(
            train_data_dir=args.real_data_dir,
            image_column=args.image_column,
            caption_column=caption_column,
            max_train_samples=args.max_real_images,
            seed=args.seed,
        )
    except ValueError as error:
        raise ValueError(str(error).replace("--train_data_dir", "--real_data_dir")) from error
    image_column = args.image_column or ("image" if "image" in dataset.column_names else "img")
    return check_images(dataset, image_column), image_column


def write_real_images(dataset, image_column, size, args):
    """Real images at the size of the generated ones, (width, height), the shorter side resized, the centre cut out."""
    folder = Path(args.output_dir, "real_images")
    files = []
    for number, row in enumerate(tqdm(dataset.select_columns(image_column), desc="resizing real images")):
        files.append(folder / f"{number:06d}.png")
        with atomic_write(files[-1]) as temporary:
            ImageOps.fit(read_image(row[image_column]), size, Image.Resampling.LANCZOS).save(temporary)
    return files


def draw_grids(results, files, guides, metrics, args):
    """Pictures of the largest gains, the largest losses and a random draw; their paths, relative to the output."""
    labels = {label: spec for spec, label in metric_labels(metrics).items()}
    grids = []
    for model in (model for model in files if model != "base"):
        independent = [m for m in results["scores"] if not is_guide(labels[m], guides[model])]
        metric = args.rank_by or next(iter([*independent, *results["scores"]]), None)
        base, finetuned = (results["scores"].get(metric, {}).get(name) for name in ("base", model))
        changes = np.subtract(finetuned, base) if base else np.zeros(len(files[model]))
        for kind, chosen in choose_pairs(changes, args.num_grid_pairs, args.seed).items():
            path = Path("grids", f"{model}-{kind}.png")
            Path(args.output_dir, path).unlink(missing_ok=True)
            if not chosen:
                continue
            captions = [results["prompts"][i]["text"] or f"image {results['prompts'][i]['row']}" for i in chosen]
            if base:
                captions = [f"{text}\n{base[i]:.3f} to {finetuned[i]:.3f}" for text, i in zip(captions, chosen)]
            title = f"{model}: {'a random draw' if kind == 'random' else f'largest {kind}'}"
            title += f", {metric} under each" if base else ""
            pairs = [(files["base"][i], files[model][i]) for i in chosen]
            pair_grid(Path(args.output_dir, path), title, pairs, captions)
            grids.append(path.as_posix())
    return grids


def main(args):
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", datefmt="%H:%M:%S", level=logging.INFO
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if args.demo and accelerator.device.type == "cpu" and accelerator.num_processes == 1:
        use_all_cpus()

    # Everything that can be wrong in a path, a column or a name is found before a model is loaded.
    models = check_models(args)
    prompts = read_all_prompts(args)
    guides = {model: read_guides(path) for model, path in models.items() if model != "base"}
    metrics = choose_metrics(args, guides)
    if args.rank_by and args.rank_by not in metric_labels(metrics).values():
        raise ValueError(
            f"--rank_by: expected one of {', '.join(metric_labels(metrics).values())}, got {args.rank_by}"
        )
    needs_real = any(metric.partition(":")[0] in NEED_REAL_IMAGES for metric in metrics)
    if needs_real:
        dataset, image_column = read_real_images(metrics, args)
    output_dir = Path(args.output_dir)
    try:
        with atomic_write(output_dir / "args.json") as temporary:
            temporary.write_text(json.dumps(vars(args), indent=2))
    except OSError as error:
        raise ValueError(f"--output_dir {args.output_dir} cannot be written to: {error.strerror}") from error

    weight_dtype = WEIGHT_DTYPES.get(accelerator.mixed_precision, torch.float32)
    files, errors, real = {}, {}, None
    for model, path in models.items():
        pipeline = load_pipeline(path, args, weight_dtype, accelerator.device)
        files[model] = generate(pipeline, model, prompts, accelerator, args)
        if needs_real and accelerator.is_main_process:
            with Image.open(files[model][0]) as image:
                real = real or write_real_images(dataset, image_column, image.size, args)
            if "mse" in metrics:
                captions = None if args.unconditional else dataset[args.caption_column][:]
                captions = captions and [text if isinstance(text, str) else text[0] for text in captions]
                errors[model] = pipeline_denoising_error(
                    pipeline, real, captions, args.seed, args.eval_batch_size
                ).tolist()
        del pipeline
    accelerator.end_training()  # what is left is short, and is done by one process
    if not accelerator.is_main_process:
        return

    rows, scores, unavailable = measure(metrics, files, errors, prompts, real, guides, accelerator.device, args)
    results = {
        "settings": vars(args),
        "models": models,
        "guides": guides,
        "prompts": [vars(prompt) for prompt in prompts],
        "images": {m: [path.relative_to(output_dir).as_posix() for path in paths] for m, paths in files.items()},
        "rows": rows,
        "scores": scores,
        "errors": errors if "mse" in {row["metric"] for row in rows} else {},
        "unavailable": unavailable,
    }
    results["grids"] = draw_grids(results, files, guides, metrics, args)
    with atomic_write(output_dir / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1, allow_nan=False))
    write_evaluation_tables(output_dir, results)
    report = write_report(output_dir, results)
    print(
        f"\n{evaluation_table(rows)}\n{evaluation_notes(results)}\nThe report is {report.resolve()}, the numbers are beside it."
    )


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
