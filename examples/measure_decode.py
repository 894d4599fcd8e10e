"""Which decode to train by: how well the guide's gradient through each points where it points through the whole VAE, and
what each costs, on a model, a guide and images of your own.

    python examples/measure_decode.py --pretrained_model_name_or_path MODEL --train_data_dir IMAGES --evaluator ipce:PATH \
        --tiny_vae_name_or_path madebyollin/taesd

With no model named it is the embedded demo's. Images are noised into the late window, the base model estimates z_0_hat (eq. 5),
and the guide scores its decode. The gradient of the score with respect to z_0_hat is what trains a LoRA: that of each decode is
compared with the full fp32 decode's, image by image. docs/performance.md.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from tqdm.auto import tqdm

from acpo_utils import data, flow_matching
from acpo_utils.evaluation import models
from acpo_utils.evaluators import guide_score, load_guide
from acpo_utils.families.latents import (
    StraightThrough,
    check_sizes,
    decoder_in,
    encode_images,
    latent_factor,
    load_tiny_vae,
)
from acpo_utils.families.loading import denoiser
from acpo_utils.files import aligned_table, atomic_write
from acpo_utils.late_step import decode_latents, predict_original_sample, sample_late_timesteps
from acpo_utils.randomness import step_generator
from acpo_utils.sharding import WEIGHT_DTYPES
from acpo_utils.training.arguments import check_numbers
from acpo_utils.training.step_cost import cost_of


DEMO_DIR = Path(__file__).resolve().parent / "demo"
DEMO_SETTINGS = {
    "pretrained_model_name_or_path": str(DEMO_DIR / "pipeline"),
    "train_data_dir": str(DEMO_DIR / "data" / "new_combinations.parquet"),
    "evaluator": [f"ipce:{DEMO_DIR / 'guide'}"],
    "resolution": 64,
}
FULL = "full"
ROUNDED = "full, the image rounded to 8 bits"


class Decode(NamedTuple):
    """A way from z_0_hat (B, C, h, w) to images (B, 3, H, W) in [0, 1]."""

    run: Callable[[torch.Tensor], torch.Tensor]
    flags: str | None = None  # of the training scripts, which have no others
    window: tuple[int, int, int] | None = None  # top, left and side, in latents, of what is decoded; None: all


def family_of(pipeline):
    return models.FAMILIES[type(pipeline).__name__]


def late_latents(pipeline, batch, generator, args):
    """z_0_hat (B, C, h, w) of a batch of images, by the base model (eq. 5)."""
    model = denoiser(pipeline)
    latents = encode_images(batch, pipeline.vae, generator)  # (B, C, h, w)  x0
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)  # (B, C, h, w)  eps
    size = batch["pixel_values"].shape[-2:]
    predict = partial(family_of(pipeline).predictor(pipeline, batch["prompts"], size), model)
    if isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
        sigmas = flow_matching.sample_late_sigmas(len(latents), args.tmax, generator, latents.device)
        noisy_latents = flow_matching.add_noise(latents, noise, sigmas)
        model_pred = predict(noisy_latents.to(model.dtype), sigmas)
        return flow_matching.denoise_late_steps(predict, model_pred, sigmas, noisy_latents)
    timesteps = sample_late_timesteps(
        len(latents),
        args.tmax,
        generator,
        latents.device,
    )
    noisy_latents = pipeline.scheduler.add_noise(latents, noise, timesteps)
    model_pred = predict(noisy_latents.to(model.dtype), timesteps)
    return predict_original_sample(
        pipeline.scheduler,
        model_pred,
        timesteps,
        noisy_latents,
    )


def build_decoders(pipeline, args):
    """{label: (decoder, flags)} of those that decode all of z_0_hat; the full one is first."""
    vae = pipeline.vae
    in_bf16 = decoder_in(torch.bfloat16, vae)
    decoders = {
        FULL: (vae, "--decode full"),
        "full in bf16": (in_bf16, "--decode_dtype bf16"),
        "straight through, backward in bf16": (
            StraightThrough(vae, in_bf16),
            "--decode straight_through --decode_dtype bf16",
        ),
    }
    if args.tiny_vae_name_or_path:
        load_tiny = getattr(family_of(pipeline), "load_small_decoder", load_tiny_vae)  # FLUX.2 has no AutoencoderTiny
        tiny_vae = load_tiny(args.tiny_vae_name_or_path, vae)
        flags = f"--tiny_vae_name_or_path {args.tiny_vae_name_or_path}"
        decoders["tiny"] = (tiny_vae, f"--decode tiny {flags}")
        decoders["straight through, backward by the tiny VAE"] = (
            StraightThrough(vae, tiny_vae),
            f"--decode straight_through {flags}",
        )
    return decoders


def decodes_of(decoders, generator, args):
    """{label: Decode}, the full one first. The windows are drawn anew from `generator`."""
    decodes = {}
    for label, (decoder, flags) in decoders.items():
        decodes[label] = Decode(partial(decode_latents, decoder), flags)
    full = decodes[FULL].run
    factor = latent_factor(decoders[FULL][0])
    for size in args.decode_size:
        side = size // factor
        top, left = torch.randint(args.resolution // factor - side + 1, (2,), generator=generator).tolist()
        window = (top, left, side)
        decodes[f"crop, {size} px"] = Decode(
            lambda latents, window=window: full(cut(latents, window)),
            f"--decode crop --decode_size {size}",
            window,
        )
    decodes["latents at half the side"] = Decode(lambda latents: full(F.avg_pool2d(latents, 2)))
    decodes[ROUNDED] = Decode(lambda latents: rounded(full(latents)))
    return decodes


def cut(tensor, window, factor=1):
    """The window (top, left, side) of a tensor (B, C, h, w) that has `factor` rows for each latent."""
    top, left, side = (factor * number for number in window)
    return tensor[..., top : top + side, left : left + side]


def rounded(images):
    """`images` in [0, 1] as a file of 8 bits keeps them; the gradient goes through."""
    return images + ((images * 255).round() / 255 - images).detach()


def score_gradient(decode, z0, evaluator, prompts, args):
    """x_hat (B, 3, H, W) and dQ/dz_0_hat (B, C, h, w)."""
    z0 = z0.detach().requires_grad_(True)
    images = decode.run(z0)
    scores, _ = guide_score(
        evaluator,
        images,
        prompts,
        args.guide_perturbation,
        args.guide_clean_weight,
    )
    return images.detach(), torch.autograd.grad(scores.sum(), z0)[0]


def compare(decode, full, found, factor):
    """For each of B images the cosine of two gradients, and the images' root mean square difference in 255ths.

    `full`, `found`: (x_hat, dQ/dz_0_hat). Inside the window, if there is one; smaller images with means of the full one's.
    """
    images, gradient = full
    other_images, other_gradient = found
    if decode.window:
        images = cut(images, decode.window, factor)
        gradient = cut(gradient, decode.window)
        other_gradient = cut(other_gradient, decode.window)
    images = F.adaptive_avg_pool2d(images, other_images.shape[-2:])
    cosines = F.cosine_similarity(gradient.flatten(1), other_gradient.flatten(1))
    errors = 255 * (images - other_images).square().flatten(1).mean(1).sqrt()
    return cosines.tolist(), errors.tolist()


def costs(decodes, z0, repetitions):
    """{label: {seconds, TFLOP, GiB at the peak}} of one image's decode, forward and backward, without the guide.

    Seconds are the least of several rounds through all decodes: other jobs of the machine only add to them.
    """
    z0 = z0[:1].detach().requires_grad_(True)
    found = {}
    for label, decode in decodes.items():
        cost = cost_of(partial(decode.run, z0))
        flop = cost.forward + cost.backward
        found[label] = {
            "seconds": math.inf,
            "TFLOP": flop / 1e12,
            "GiB": (cost.kept + cost.passing) / 2**30,
        }
    for _ in range(repetitions):
        for label, decode in decodes.items():
            found[label]["seconds"] = min(found[label]["seconds"], seconds(decode, z0))
    return found


def seconds(decode, z0):
    wait(z0.device)
    start = time.perf_counter()
    decode.run(z0).sum().backward()
    wait(z0.device)
    return time.perf_counter() - start


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(pipeline, decoders, evaluator, dataset, args):
    """[{decode, flags, cosine, its 10 % and 90 % quantiles, error, cost}], a row for each decode."""
    device = pipeline.vae.device
    pictures = data.CaptionedImages(
        dataset,
        tokenizer=None,
        resolution=args.resolution,
        num_samples=len(dataset),
        seed=args.seed,
        center_crop=True,
        image_column=args.image_column,
        caption_column=args.caption_column,
    )
    cosines, errors = {}, {}
    for start in tqdm(range(0, len(pictures), args.batch_size), desc="gradients"):
        items = [pictures[n] for n in range(start, min(start + args.batch_size, len(pictures)))]
        batch = data.to_device(data.collate(items), device)
        generator = step_generator(args.seed, start)
        with torch.no_grad():
            z0 = late_latents(pipeline, batch, generator, args).float()
        decodes = decodes_of(decoders, generator, args)
        found = {}
        for label, decode in decodes.items():
            found[label] = score_gradient(
                decode,
                z0,
                evaluator,
                batch["prompts"],
                args,
            )
        for label, decode in decodes.items():
            cosine, error = compare(
                decode,
                found[FULL],
                found[label],
                latent_factor(pipeline.vae),
            )
            cosines.setdefault(label, []).extend(cosine)
            errors.setdefault(label, []).extend(error)
    rows = []
    for label, cost in costs(decodes, z0, args.repetitions).items():
        of_images = torch.tensor(cosines[label])
        low, high = of_images.quantile(torch.tensor([0.1, 0.9])).tolist()
        row = {"decode": label, "flags": decodes[label].flags, "cosine": of_images.mean().item()}
        row |= {"cosine_10": low, "cosine_90": high, "error": torch.tensor(errors[label]).mean().item()}
        rows.append(row | cost)
    return rows


def choose(rows, least_cosine, by="seconds"):
    """The row with the least seconds, or GiB, of those that have flags and point well enough; the full decode always does."""
    fit = [row for row in rows if row["flags"] and row["cosine"] >= least_cosine]
    return min(fit or rows[:1], key=lambda row: (row[by], -row["cosine"]))


def table(rows):
    full = rows[0]
    lines = [["decode", "cosine", "10 % to 90 %", "error of x_hat, 255ths", "time", "FLOP", "memory", "s", "GiB"]]
    for row in rows:
        line = [
            row["decode"],
            f"{row['cosine']:.3f}",
            f"{row['cosine_10']:.2f} to {row['cosine_90']:.2f}",
            f"{row['error']:.2f}",
        ]
        for name in ("seconds", "TFLOP", "GiB"):
            line.append(f"{row[name] / full[name]:.2f}")
        lines.append([*line, f"{row['seconds']:.3g}", f"{row['GiB']:.3g}"])
    return aligned_table(lines, 1)


def advice(rows, least_cosine):
    (of_rounded,) = (row for row in rows if row["decode"] == ROUNDED)
    lines = [
        f"Rounding the image to 8 bits leaves a cosine of {of_rounded['cosine']:.2f}: the guide itself keeps no more than that.",
        f"Take {choose(rows, least_cosine)['flags']}: of those with a cosine of at least {least_cosine:g} the fastest.",
    ]
    smallest = choose(rows, least_cosine, by="GiB")
    if smallest is not choose(rows, least_cosine):
        lines.append(
            f"If memory is short, {smallest['flags']}: {smallest['GiB'] / rows[0]['GiB']:.2f} of the full one's."
        )
    return "\n".join(lines)


def load_pipeline(args):
    """The base model, frozen; its VAE in fp32. Raises ValueError, in one line, for none of our families, or not all of one."""
    source = args.pretrained_model_name_or_path
    class_name = models.class_of(source, args.revision)
    if class_name in models.UNCONDITIONAL:
        raise ValueError(f"{source}: it is a {class_name}, whose images are not decoded from latents")
    return models.load_pipeline(
        source,
        class_name,
        revision=args.revision,
        variant=args.variant,
        weight_dtype=WEIGHT_DTYPES.get(args.mixed_precision, torch.float32),
        vae_dtype=torch.float32,
        device=args.device,
    )


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # What is trained, by what, on what: as for the training
    add("--pretrained_model_name_or_path", help="hub id or folder of a pipeline; none: the embedded demo")
    add("--revision")
    add("--variant")
    add("--evaluator", nargs="+", help="the guide: ipce:PATH, ... (docs/evaluators.md)")
    add("--evaluator_weight", nargs="+", type=float, help="one for each guide; equal by default")
    add("--guide_perturbation", type=float, default=0.0)
    add("--guide_clean_weight", type=float, default=0.5)
    add("--dataset_name")
    add("--dataset_config_name")
    add("--train_data_dir")
    add("--image_column", default="image")
    add("--caption_column", default="text")
    add("--cache_dir")
    add("--resolution", type=int, default=512)
    add("--tmax", type=int, help="default: 100, and 250 for flow matching, as the scripts have it")
    # What is compared
    add("--tiny_vae_name_or_path", help="such as madebyollin/taesd; without it there is no row of it")
    add(
        "--decode_size", nargs="+", type=int, help="sides of windows in pixels; default: 3/4 and 1/2 of the resolution"
    )
    add("--least_cosine", type=float, default=0.9, help="what a decode has to reach to be taken")
    add("--num_images", type=int, default=32)
    add("--batch_size", type=int, default=4)
    add("--repetitions", type=int, default=5, help="rounds in which the seconds are taken")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="of all but the decodes")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--output_file", help="the numbers as json")
    args = parser.parse_args(input_args)
    if args.pretrained_model_name_or_path is None:
        parser.set_defaults(**DEMO_SETTINGS)
        args = parser.parse_args(input_args)
    try:
        check_numbers(
            args,
            num_images=1,
            batch_size=1,
            repetitions=1,
            least_cosine=-1,
        )
    except ValueError as error:
        parser.error(str(error))
    if not args.evaluator:
        parser.error("the decodes are compared by a guide's gradient: give an --evaluator")
    return args


def main(args):
    torch.manual_seed(args.seed)
    dataset = data.load_captioned_images(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        train_data_dir=args.train_data_dir,
        image_column=args.image_column,
        caption_column=args.caption_column,
        max_train_samples=args.num_images,
        cache_dir=args.cache_dir,
        seed=args.seed,
    )
    dataset = data.check_images(dataset, args.image_column)
    evaluator = load_guide(args.evaluator, args.evaluator_weight, args.device)
    pipeline = load_pipeline(args)
    scheduler = pipeline.scheduler
    if args.tmax is None:
        args.tmax = 250 if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) else 100
    factor = latent_factor(pipeline.vae)
    if args.decode_size is None:
        args.decode_size = [factor * (quarters * args.resolution // (4 * factor)) for quarters in (3, 2)]
    for size in args.decode_size:
        check_sizes(
            scheduler,
            pipeline.vae,
            denoiser(pipeline),
            args.tmax,
            args.resolution,
            size,
        )
    decoders = build_decoders(pipeline, args)
    rows = measure(
        pipeline,
        decoders,
        evaluator,
        dataset,
        args,
    )
    print(f"\n{table(rows)}\n\n{advice(rows, args.least_cosine)}")
    if args.output_file:
        taken = choose(rows, args.least_cosine)["flags"]
        found = {"settings": vars(args), "rows": rows, "take": taken}
        with atomic_write(args.output_file) as temporary:
            temporary.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
