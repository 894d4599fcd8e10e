"""How easily a trained evaluator is fooled, and where its gradient points (docs/training-evaluators.md), without training it.

    python examples/demo/measure_robustness.py --evaluator ipce:examples/demo/guide --ratings labels-demo/test.parquet
    python examples/demo/measure_robustness.py --evaluator ipce:examples/demo/guide --generated 300

The first on the test rows of a rating set, as the training scripts do at their end: columns image, mos, perhaps prompt and
reference. The second on what the demo's Stable Diffusion draws for the captions of data/new_combinations.parquet, each beside
the real drawing of its caption; the label is then minus the root mean square distance to it.
"""

import argparse
import io
import json
from pathlib import Path

import torch
from datasets import Dataset, Features, Image, Value, load_dataset
from diffusers import StableDiffusionPipeline
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from acpo_utils.data import read_image
from acpo_utils.evaluation.sampling import sample_images
from acpo_utils.evaluators import load_evaluator
from acpo_utils.families.loading import DTYPE
from acpo_utils.files import atomic_write, parquet_errors
from acpo_utils.ratings.robustness import check_originals, measure_robustness, robustness_tables, rows_to_measure


DEMO = Path(__file__).parent
FEATURES = Features({"image": Image(), "prompt": Value("string"), "mos": Value("float64"), "reference": Image()})


def read_ratings(file: Path) -> Dataset:
    """The rows of a parquet file, images undecoded."""
    if not file.is_file():
        raise ValueError(f"--ratings: expected a parquet file of rated images, found no {file}")
    with parquet_errors(file):
        rows = Dataset.from_parquet(str(file))
    if missing := {"image", "mos"} - set(rows.column_names):
        raise ValueError(f"--ratings {file}: expected columns image and mos, found no {' and no '.join(missing)}")
    return undecoded(rows)


def undecoded(rows: Dataset) -> Dataset:
    for column in {"image", "reference"} & set(rows.column_names):
        rows = rows.cast_column(column, Image(decode=False))
    return rows


def generated_rows(number: int, num_inference_steps: int, guidance_scale: float, seed: int, device: str) -> Dataset:
    """`number` pictures of the demo's pipeline, each with the real drawing of its caption and minus its distance to it."""
    captions = load_dataset("parquet", data_files=str(DEMO / "data" / "new_combinations.parquet"), split="train")
    if not 2 <= number <= len(captions):
        raise ValueError(f"--generated: expected 2 to {len(captions)}, found {number}")
    captions = undecoded(captions.shuffle(seed=seed).select(range(number)))
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO / "pipeline", **{DTYPE: torch.float32}).to(device)
    images = sample_images(
        pipeline,
        list(captions["text"]),
        seed,
        batch_size=20,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        description="drawing",
    )
    rows = []
    for image, caption in zip(images, captions):
        pixels = (255 * image).round().to(torch.uint8).cpu()  # (3, H, W)
        distance = (pixels / 255 - pil_to_tensor(read_image(caption["image"])) / 255).square().mean().sqrt().item()
        rows.append(
            {
                "image": {"bytes": png(pixels), "path": None},
                "prompt": caption["text"],
                "mos": -distance,
                "reference": caption["image"],
            }
        )
    return undecoded(Dataset.from_list(rows, features=FEATURES))


def png(pixels: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    to_pil_image(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def main(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    evaluator = load_evaluator(args.evaluator, device)
    if args.generated:
        rows = generated_rows(args.generated, args.num_inference_steps, args.guidance_scale, args.seed, device)
    else:
        rows = rows_to_measure(read_ratings(args.ratings), args.max_samples)
    check_originals(rows, "image", "reference")
    prompt_column = "prompt" if "prompt" in rows.column_names else None
    measured = measure_robustness(evaluator, rows, prompt_column=prompt_column, device=device)
    print(f"\n{robustness_tables({'generated' if args.generated else 'test': measured})}")
    if args.output_file:
        with atomic_write(args.output_file) as temporary:
            temporary.write_text(json.dumps(measured, indent=2) + "\n")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluator", default=f"ipce:{DEMO / 'guide'}")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ratings", type=Path, help="parquet file of rated images")
    source.add_argument("--generated", type=int, help="so many pictures of the demo's pipeline in place of rated ones")
    parser.add_argument("--max_samples", type=int, default=500, help="at most so many rows of --ratings")
    parser.add_argument("--num_inference_steps", type=int, default=15)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0, help="of the captions and of each picture's noise")
    parser.add_argument("--output_file", type=Path, help="all numbers, as JSON")
    return parser.parse_args(input_args)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
