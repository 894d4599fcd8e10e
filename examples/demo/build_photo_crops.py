"""Cut the demo's photographs (examples/demo/photos) into 64 px crops, for an unconditional DDPM.

    python examples/demo/build_photo_crops.py

Each photograph is reduced to a shorter side of 96, 160 and 256 pixels, and crops are drawn at random from each: whole
animals and buildings from the small ones, fur and masonry from the large. Sky and blurred backgrounds, in which there is
nothing to judge, are avoided. `train` and `validation` come from different photographs. The crops are kept without loss,
because a quality evaluator shall not see what a compression did: 35 MB, so they are not in the repository, but rebuilt,
bit for bit, by this command in two minutes.
"""

import argparse
import io
import random
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, Features, Image, Value, load_dataset
from PIL import Image as PILImage
from PIL import ImageStat

from acpo_utils.files import atomic_write


CROP_SIZE = 64
# Shorter side of the reduced photograph -> crops of each photograph, about as its area grows.
CROPS = {"train": {96: 10, 160: 20, 256: 40}, "validation": {96: 2, 160: 5, 256: 10}}
LEAST_CONTRAST, TRIES = 12, 10  # standard deviation of a crop's grey values, 0 to 255; after ten tries any will do
FEATURES = Features({"image": Image(), "photo": Value("string"), "scale": Value("int32")})


def crops(image: PILImage.Image, scale: int, count: int, rng: random.Random) -> Iterator[bytes]:
    """`count` random crops of `image`, reduced to a shorter side of `scale`, as lossless WebP bytes."""
    factor = scale / min(image.size)
    small = image.resize([round(side * factor) for side in image.size], PILImage.Resampling.LANCZOS)
    for _ in range(count):
        for _ in range(TRIES):
            left, top = (rng.randint(0, side - CROP_SIZE) for side in small.size)
            crop = small.crop((left, top, left + CROP_SIZE, top + CROP_SIZE))
            if ImageStat.Stat(crop.convert("L")).stddev[0] >= LEAST_CONTRAST:
                break
        buffer = io.BytesIO()
        crop.save(buffer, "WEBP", lossless=True, method=6)
        yield buffer.getvalue()


README = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: train.parquet
  - split: validation
    path: validation.parquet
---

# 64 px crops of photographs

Cut by `examples/demo/build_photo_crops.py` of acpo-diffusers (seed {seed}): {counts}. Columns: `image`; `photo`, the
photograph it is from; `scale`, the shorter side to which that was reduced. Each crop keeps the licence of its photograph:
public domain, CC0, CC-BY or CC-BY-SA, with author and source in the table of `examples/demo/photos/README.md`.
"""


def main(args: argparse.Namespace) -> None:
    counts = []
    for split, plan in CROPS.items():
        file = args.photo_dir / f"{split}.parquet"
        if not file.is_file():
            raise SystemExit(f"error: expected {file}, as build_photos.py writes it, found no such file.")
        photos = load_dataset("parquet", data_files=str(file), split="train", columns=["image", "name"])
        rng, rows = random.Random(args.seed), []
        for photo in photos:
            image = photo["image"].convert("RGB")
            for scale, count in plan.items():
                for content in crops(image, scale, count, rng):
                    rows.append({"image": {"bytes": content, "path": None}, "photo": photo["name"], "scale": scale})
        rng.shuffle(rows)
        path = args.output_dir / file.name
        with atomic_write(path) as temporary:
            Dataset.from_list(rows, features=FEATURES).to_parquet(temporary)
        print(f"{path}: {len(rows)} crops, {path.stat().st_size / 1e6:.1f} MB")
        counts.append(f"{len(rows):,} {split} crops of {len(photos)} photographs")
    with atomic_write(args.output_dir / "README.md") as temporary:
        temporary.write_text(README.format(seed=args.seed, counts=", ".join(counts)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo_dir", type=Path, default=Path(__file__).parent / "photos")
    parser.add_argument("--output_dir", type=Path, default=Path("photo-crops"))
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
