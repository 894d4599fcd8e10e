r"""The picture at the head of the README: base, ACPO with its anchor, and without it, from the same prompts and noise,
beside the drawing that a person made for the prompt.

    accelerate launch examples/train_acpo_lora_sd.py --tmax 100 --max_train_steps 120 --output_dir acpo-lora-sd-120
    accelerate launch examples/train_acpo_lora_sd.py --tmax 100 --max_train_steps 120 --anchor_weight 0 \
        --output_dir acpo-lora-sd-no-anchor
    python examples/demo/anchor_picture.py

Which four of the held-out prompts are shown is a rule and no choice: of the first 64, those whose guide's gain, with the
anchor, lies at the 80, 60, 40 and 20 % quantile. Four minutes on one CPU core.
"""

import argparse
import textwrap
from pathlib import Path

import torch
from matplotlib.figure import Figure

from acpo_utils.data import read_prompts
from acpo_utils.evaluation.judges import load_judges
from acpo_utils.evaluation.real_images import read_prompt_images
from acpo_utils.evaluation.sampling import sample_images, score_images
from acpo_utils.evaluators import load_evaluator
from acpo_utils.families.stable_diffusion import build_pipeline, load
from acpo_utils.files import atomic_write


DEMO = Path(__file__).parent
QUANTILES = (0.8, 0.6, 0.4, 0.2)
CROP = 24  # pixels, of 64


def sample_models(args, prompts):
    """{model: images (N, 3, H, W) in [0, 1]}."""
    images = {}
    for name, lora in (("base", None), ("with the anchor", args.lora), ("without it", args.no_anchor_lora)):
        noise_scheduler, tokenizer, text_encoder, vae, unet = load(
            DEMO / "pipeline",
            revision=None,
            variant=None,
            weight_dtype=torch.float32,
            device="cpu",
        )
        pipeline = build_pipeline(unet, vae, text_encoder, tokenizer, noise_scheduler)
        if lora is not None:
            pipeline.load_lora_weights(lora)
        images[name] = sample_images(
            pipeline,
            prompts,
            seed=args.seed,
            batch_size=16,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            description=name,
        )
    return images


def sharpest_window(image):
    """(top, left) of the window of CROP pixels with most edges in `image` (3, H, W)."""
    edges = image.diff(dim=-1).abs().sum(0)[:-1] + image.diff(dim=-2).abs().sum(0)[:, :-1]  # (H - 1, W - 1)
    sums = torch.nn.functional.avg_pool2d(edges[None, None], CROP - 1, stride=1)[0, 0]
    return divmod(sums.argmax().item(), sums.shape[1])


def draw(path, prompts, images, scores, rows):
    """Two prompts beside each other, each with its images, their scores, and a window of each below."""
    names = list(images)
    figure = Figure(figsize=(15.5, 8.8), layout="constrained", dpi=110)
    blocks = figure.subfigures(2, 2, wspace=0.03, hspace=0.03)
    for block, row in zip(blocks.flat, rows):
        block.suptitle(textwrap.shorten(prompts[row], 60), fontsize=11)
        axes = block.subplots(2, len(names), gridspec_kw={"height_ratios": (1, 1)})
        top, left = sharpest_window(images["base"][row])
        for column, name in enumerate(names):
            image = images[name][row].permute(1, 2, 0).numpy()
            window = image[top : top + CROP, left : left + CROP]
            for axis, pixels in zip(axes[:, column], (image, window)):
                axis.imshow(pixels, interpolation="nearest")
                axis.set_axis_off()
            axes[0, column].set_title(name, fontsize=10)
            guide, judge = (scores[metric][name][row] for metric in ("guide", "judge"))
            axes[1, column].set_title(f"guide {guide:.2f}, judge {judge:.2f}", fontsize=9)
    with atomic_write(path) as temporary:
        figure.savefig(temporary)


def main(args):
    prompt_file = DEMO / "data" / "new_combinations.parquet"
    prompts = read_prompts(prompt_file)[: args.num_prompts]
    images = sample_models(args, prompts)
    side = images["base"].shape[-1]
    real = read_prompt_images(prompt_file, len(prompts), size=(side, side))
    images["a real drawing"] = torch.stack([real[row] for row in range(len(prompts))])
    evaluators = {"guide": load_evaluator(f"ipce:{DEMO / 'guide'}")} | load_judges([str(DEMO / "judge")])
    scores = {
        metric: {name: score_images(evaluator, pictures, prompts, "cpu") for name, pictures in images.items()}
        for metric, evaluator in evaluators.items()
    }
    gain = scores["guide"]["with the anchor"] - scores["guide"]["base"]  # (N,)
    order = gain.argsort()
    rows = [order[round(quantile * (len(order) - 1))].item() for quantile in QUANTILES]
    draw(args.output, prompts, images, scores, rows)
    for metric, values in scores.items():
        print(metric, ", ".join(f"{name} {value.mean():.4f}" for name, value in values.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", type=Path, default="acpo-lora-sd-120")
    parser.add_argument("--no_anchor_lora", type=Path, default="acpo-lora-sd-no-anchor")
    parser.add_argument("--output", type=Path, default="docs/anchor.png")
    parser.add_argument("--num_prompts", type=int, default=64)
    parser.add_argument("--num_inference_steps", type=int, default=15)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
