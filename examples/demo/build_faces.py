"""Rebuild the demo's faces (examples/demo/faces): avatars drawn by code, for an unconditional DDPM.

    pip install dicebear-core==10.7.0 dicebear-styles==10.6.0 resvg-py==0.5.0
    python examples/demo/build_faces.py

A DiceBear style is a set of parts that an artist drew: heads, hair, eyes, mouths, clothes. A seed picks the parts and
their colours, always the same ones, and `resvg` rasterises the drawing. Three styles, so that a small model learns
them well. No two images are the same, within a split or between the two; the same versions give the same bytes.
"""

import argparse
import io
import json
import random
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import resvg_py
from datasets import Dataset, Features, Image, Value
from dicebear import Avatar, Style
from PIL import Image as PILImage

from acpo_utils.files import atomic_write


# Style -> its scale: adventurer draws heads alone, smaller than those of the busts.
STYLES = {"adventurer": 1.2, "micah": 1.0, "toon-head": 1.0}
BACKGROUNDS = ["b6e3f4", "c0aede", "ffd5dc", "d1f4d9", "ffe8b0"]  # blue, lilac, pink, mint, cream
IMAGE_SIZE = 64
SHEET_COLUMNS, SHEET_ROWS = 12, 4
FEATURES = Features({"image": Image(), "style": Value("string"), "seed": Value("string")})


def read_style(name: str) -> dict:
    return json.loads(files("dicebear_styles").joinpath(f"{name}.json").read_text("utf-8"))


def render(style: Style, seed: str, scale: float) -> bytes:
    """One avatar as lossless WebP bytes."""
    svg = Avatar(style, {"seed": seed, "scale": [scale], "backgroundColor": BACKGROUNDS}).to_string()
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=IMAGE_SIZE, height=IMAGE_SIZE))
    buffer = io.BytesIO()
    PILImage.open(io.BytesIO(png)).convert("RGB").save(buffer, "WEBP", lossless=True, method=6)
    return buffer.getvalue()


def faces(name: str, seed: int) -> Iterator[dict]:
    """Rows of one style without end, in a fixed order; a seed that draws what an earlier one drew is passed over."""
    style, drawn, number = Style(read_style(name)), set(), 0
    while True:
        text = f"{name}-{seed}-{number}"
        content, number = render(style, text, STYLES[name]), number + 1
        if content not in drawn:
            drawn.add(content)
            yield {"image": {"bytes": content, "path": f"{text}.webp"}, "style": name, "seed": text}


def save_sheet(rows: list[dict], path: Path) -> None:
    """The first rows side by side, as PNG."""
    sheet = PILImage.new("RGB", (SHEET_COLUMNS * IMAGE_SIZE, SHEET_ROWS * IMAGE_SIZE), "white")
    for i, row in enumerate(rows[: SHEET_COLUMNS * SHEET_ROWS]):
        line, column = divmod(i, SHEET_COLUMNS)
        image = PILImage.open(io.BytesIO(row["image"]["bytes"]))
        sheet.paste(image, (column * IMAGE_SIZE, line * IMAGE_SIZE))
    with atomic_write(path) as temporary:
        sheet.save(temporary, optimize=True)


README = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: train.parquet
  - split: validation
    path: validation.parquet
---

# {count:,} faces, 64 px

What the demo's unconditional DDPM is trained on (`train`) and measured with (`validation`). Faces drawn by code: a seed
picks the parts that an artist drew and their colours. No photographs, no persons. Columns: `image`, `style`, `seed`.
`datasets.load_dataset("examples/demo/faces")` reads them.

![faces](faces.png)

| style | {splits} |
|---|{rules}
{counts}

No image stands twice. Rebuilt, bit for bit, by the two commands at the top of [`build_faces.py`](../build_faces.py)
(seed {seed}).

## Licences and attribution

The drawings keep their licences. From the styles of `dicebear-styles` 10.6.0, put together by `dicebear-core` 10.7.0 (MIT)
and rasterised at 64 px by resvg on one of five colours; `adventurer` is enlarged by {adventurer:.0%}. Nothing else was changed.

| `style` | source | author | licence |
|---|---|---|---|
{licenses}
"""


def write_readme(splits: dict[str, list[dict]], output_dir: Path, seed: int) -> None:
    counts = [
        f"| `{name}` | "
        + " | ".join(f"{sum(row['style'] == name for row in rows):,}" for rows in splits.values())
        + " |"
        for name in STYLES
    ]
    licenses = []
    for name in STYLES:
        meta = read_style(name)["meta"]
        source, author, license = (
            f"[{meta[key]['name']}]({meta[key]['url']})" for key in ("source", "creator", "license")
        )
        licenses.append(f"| `{name}` | {source} | {author} | {license} |")
    text = README.format(
        count=sum(len(rows) for rows in splits.values()),
        splits=" | ".join(splits),
        rules="---|" * len(splits),
        counts="\n".join(counts),
        seed=seed,
        adventurer=STYLES["adventurer"] - 1,
        licenses="\n".join(licenses),
    )
    with atomic_write(output_dir / "README.md") as temporary:
        temporary.write_text(text)


def main(args: argparse.Namespace) -> None:
    splits = {"train": [], "validation": []}
    for name in STYLES:
        rows = faces(name, args.seed)
        splits["train"] += [next(rows) for _ in range(args.train_faces)]
        splits["validation"] += [next(rows) for _ in range(args.validation_faces)]
    for split, rows in splits.items():
        random.Random(args.seed).shuffle(rows)
        path = args.output_dir / f"{split}.parquet"
        with atomic_write(path) as temporary:
            Dataset.from_list(rows, features=FEATURES).to_parquet(temporary)
        print(f"{path}: {len(rows)} images, {path.stat().st_size / 1e6:.1f} MB")
    save_sheet(splits["validation"], args.output_dir / "faces.png")
    write_readme(splits, args.output_dir, args.seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "faces")
    parser.add_argument("--train_faces", type=int, default=1000, help="of each style")
    parser.add_argument("--validation_faces", type=int, default=100, help="of each style")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
