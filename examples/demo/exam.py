"""The exam of a pipeline of the demo's drawings: does it draw what its prompts say, as an independent judge sees it?

    python examples/demo/exam.py --pipeline examples/demo/pipeline --output_dir exam

Draws the prompts of new_combinations.parquet (concepts that the generator knows, in combinations of concept, style and
background that it has not seen) and puts its images beside the real ones of the same prompts:

- retrieval: by the judge's score, how often an image's own text is the best (R@1) or among the best five (R@5). Once
  among the distinct captions of the prompts ("a fox on a mint background"), once among the distinct contents ("fox"
  on the background that the prompt asks for, so that only the drawing counts);
- background: the median colour of the outer three pixels is nearest to the one asked for, among the data's ten;
- KID on the judge's features against the real images;
- the mean scores of the judge and, with --guide, of the guide in its reporting range.

To pass: R@1 at least half of what the real images reach, the background right in at least 90 %.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from torchvision.utils import save_image

from acpo_utils.evaluation import models
from acpo_utils.evaluation.sampling import sample_images, score_images
from acpo_utils.evaluation.set_metrics import kid
from acpo_utils.evaluators import load_evaluator
from acpo_utils.evaluators.judge import Judge, load_judge
from acpo_utils.files import atomic_write


DEMO = Path(__file__).parent
SHEET_COLUMNS, SHEET_IMAGES = 10, 100


def retrieval(similarity: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    """Shares of rows whose own text ranks first, and in the first five: similarity (N, P), target (N,) -> R@1, R@5.

    A text that scores the same as the own one ranks above it, so that a judge without an opinion gets 0.
    """
    own = similarity.gather(1, target[:, None])  # (N, 1)
    rank = (similarity >= own).sum(1)  # 1 is best
    return {f"R@{k}": (rank <= k).float().mean().item() for k in (1, 5)}


def ring_colours(images: torch.Tensor, width: int = 3) -> torch.Tensor:
    """(N, 3, H, W) -> (N, 3): the median of each channel over the outer ring of `width` pixels."""
    ring = torch.ones(images.shape[-2:], dtype=torch.bool)
    ring[width:-width, width:-width] = False
    return images[:, :, ring].median(dim=2).values


def named_colours(images: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """The colour behind each background name, from real images, where the ring is exactly that colour."""
    colours = ring_colours(images)
    return {name: colours[names.index(name)] for name in sorted(set(names))}


def backgrounds_right(images: torch.Tensor, names: list[str], colours: dict[str, torch.Tensor]) -> torch.Tensor:
    """(N,) booleans: is the ring's colour nearest, in RGB, to the one that each image's prompt names?"""
    table = torch.stack(list(colours.values()))
    nearest = torch.cdist(ring_colours(images), table).argmin(1).tolist()
    return torch.tensor([list(colours)[i] == name for i, name in zip(nearest, names)])


def judged(judge: Judge, images: torch.Tensor, rows: dict[str, list[str]]) -> tuple[dict[str, float], torch.Tensor]:
    """The judge's part of the exam for one set of images, and their features (N, D)."""
    features = judge.features(images)
    predicted = judge.embed_features(features)  # (N, E)
    captions = [judge.canonical_prompt(text) for text in rows["text"]]
    pool = sorted(set(captions))
    caption_target = torch.tensor([pool.index(caption) for caption in captions])
    similarity = predicted @ judge.embed_prompts(pool).T  # (N, pool)
    result = {f"caption {name}": v for name, v in retrieval(similarity, caption_target).items()}
    result["judge score"] = similarity.gather(1, caption_target[:, None]).mean().item()

    # One pool for each background: every content of the prompts, on that background.
    contents = sorted(set(rows["content"]))
    phrase = {content: caption.rsplit(" on ", 1)[0] for content, caption in zip(rows["content"], captions)}
    ending = {name: caption.rsplit(" on ", 1)[1] for name, caption in zip(rows["background"], captions)}
    texts = {
        name: judge.embed_prompts([f"{phrase[content]} on {ending[name]}" for content in contents]) for name in ending
    }
    similarity = torch.stack([texts[name] @ row for name, row in zip(rows["background"], predicted)])
    content_target = torch.tensor([contents.index(content) for content in rows["content"]])
    result |= {f"content {name}": v for name, v in retrieval(similarity, content_target).items()}
    return result, features


def print_table(real: dict[str, float], generated: dict[str, float]) -> None:
    print(f"\n{'':<20}{'real':>10}{'generated':>12}{'ratio':>8}")
    for name, value in generated.items():
        reference = real.get(name)
        percent = name == "background right" or "R@" in name
        shown = [f"{100 * v:.1f} %" if percent else f"{v:.4f}" for v in (reference, value) if v is not None]
        ratio = f"{value / reference:.2f}" if reference else ""
        print(f"{name:<20}{shown[0] if reference is not None else '':>10}{shown[-1]:>12}{ratio:>8}")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=DEMO / "pipeline")
    parser.add_argument(
        "--data", type=Path, default=DEMO / "data" / "new_combinations.parquet", help="or unseen_concepts"
    )
    parser.add_argument("--judge", type=Path, default=DEMO / "judge")
    parser.add_argument("--guide", default=None, help='an evaluator such as "ipce:examples/demo/guide" to report too')
    parser.add_argument("--num_prompts", type=int, default=500)
    parser.add_argument("--scheduler", choices=models.SCHEDULERS, help="default: ddim, or the flow's own")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--max_sequence_length", type=int, help="of a StableDiffusion3Pipeline")
    parser.add_argument("--batch_size", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of prompts and of each image's noise")
    parser.add_argument("--output_dir", type=Path, default=Path("exam"))
    parser.add_argument("--sheet", type=Path, default=None, help="10 x 10 samples, default OUTPUT_DIR/sheet.png")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    if not (args.pipeline / "model_index.json").is_file():
        raise SystemExit(f"--pipeline: expected a pipeline folder, found no {args.pipeline}/model_index.json")
    class_name = models.class_of(str(args.pipeline))
    models.check_sampling(class_name, args.scheduler, args.max_sequence_length)
    if not args.data.is_file():
        raise SystemExit(f"--data: expected a parquet file of captioned images, found no {args.data}")
    judge = load_judge(args.judge)
    dataset = load_dataset("parquet", data_files=str(args.data), split="train")
    if not 1 <= args.num_prompts <= len(dataset):
        raise SystemExit(
            f"--num_prompts: expected 1 to {len(dataset)}, the images in {args.data}, found {args.num_prompts}"
        )
    dataset = dataset.shuffle(seed=args.seed).select(range(args.num_prompts))
    rows = {name: list(dataset[name]) for name in ("text", "content", "background")}
    real = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in dataset["image"]])
    real = real.permute(0, 3, 1, 2).float() / 255

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = models.load_pipeline(
        str(args.pipeline),
        class_name,
        device=device,
        scheduler=args.scheduler or "ddim",
        max_sequence_length=args.max_sequence_length,
    )
    images = sample_images(
        pipeline,
        rows["text"],
        seed=args.seed,
        batch_size=args.batch_size,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        description="drawing",
        **({"max_sequence_length": args.max_sequence_length} if args.max_sequence_length else {}),
    )

    judge = judge.to(device)
    colours = named_colours(real, rows["background"])
    results, features = {}, {}
    for name, pictures in (("real", real), ("generated", images)):
        results[name], features[name] = judged(judge, pictures, rows)
        results[name]["background right"] = (
            backgrounds_right(pictures, rows["background"], colours).float().mean().item()
        )
    if min(len(images), len(real)) >= 4:
        results["generated"]["KID"], results["generated"]["KID std"] = kid(features["real"], features["generated"])
    if args.guide:
        guide = load_evaluator(args.guide, device)
        for name, pictures in (("real", real), ("generated", images)):
            results[name]["guide score"] = score_images(guide, pictures, rows["text"], device).mean().item()
    print_table(results["real"], results["generated"])

    passed = {
        f"{pool} R@1 at least half of the real images'": (
            results["generated"][f"{pool} R@1"] >= 0.5 * results["real"][f"{pool} R@1"]
        )
        for pool in ("caption", "content")
    } | {"background right in at least 90 %": results["generated"]["background right"] >= 0.9}
    for name, ok in passed.items():
        print(f"{'passed' if ok else 'FAILED'}: {name}")

    sheet = args.sheet or args.output_dir / "sheet.png"
    with atomic_write(sheet) as temporary:
        save_image(images[:SHEET_IMAGES], temporary, nrow=SHEET_COLUMNS, padding=2, pad_value=1.0)
    settings = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}
    with atomic_write(args.output_dir / "metrics.json") as temporary:
        temporary.write_text(json.dumps({"settings": settings, "passed": passed} | results, indent=2) + "\n")
    print(f"Wrote {args.output_dir / 'metrics.json'} and {sheet}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, ImportError) as error:  # bad input, in one line; the traceback would add nothing
        raise SystemExit(str(error)) from None
