"""Rebuild the demo's captioned images (examples/demo/data) from five emoji sets on the npm registry.

    npm pack @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 @iconify-json/fluent-emoji-flat@1.2.6 \
        @iconify-json/noto-v1@1.2.5 @iconify-json/emojione@1.2.3
    python examples/demo/build_data.py --tarball_dir .

Every picture is content x style x background: a drawing of one concept, by one of five designers, on one of ten
named colours. Four styles are for the generator; the fifth is kept for the judge and never shown to anything else.
"""

import argparse
import hashlib
import io
import json
import random
import re
import tarfile
from pathlib import Path

import resvg_py
from captions import TEMPLATE_WEIGHTS, TEMPLATES, caption
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage


GENERATOR_STYLES = {
    "noto": "noto-1.2.9",
    "twemoji": "twemoji-1.2.5",
    "fluent": "fluent-emoji-flat-1.2.6",
    "blob": "noto-v1-1.2.5",
}
JUDGE_STYLES = {"emojione": "emojione-1.2.3"}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "grey": (136, 136, 136),
    "navy": (28, 44, 92),
    "mint": (152, 236, 190),
    "sky blue": (128, 200, 250),
    "lavender": (196, 172, 240),
    "pink": (255, 168, 200),
    "yellow": (255, 226, 90),
    "orange": (250, 150, 50),
    "teal": (0, 128, 128),
}
CATEGORIES = ("Animals & Nature", "Food & Drink", "Activities", "Objects", "Travel & Places")
# Clock faces, moon phases, and a second drawing of the same thing: too alike to tell apart at 64 px.
LOOK_ALIKES = re.compile(
    r"-oclock|-thirty|moon|-face$|^sun-|^cloud-|^oncoming-|-(heart|suit|book|mailbox)$|locked|foggy|^joker$"
)
IMAGE_SIZE, DRAWING_SIZE = 64, 54
FEATURES = Features(
    {"image": Image(), **{name: Value("string") for name in ("text", "content", "style", "background")}}
)


def read_icon_set(tarball: Path) -> tuple[dict, dict]:
    """Icons by CLDR name and category by name, from an `@iconify-json` npm tarball."""
    with tarfile.open(tarball) as tar:
        icons = json.load(tar.extractfile("package/icons.json"))
        categories = json.load(tar.extractfile("package/metadata.json"))["categories"]
    return icons, {name: category for category, names in categories.items() for name in names}


def render(icon_set: dict, name: str, background: tuple[int, int, int]) -> bytes:
    """One drawing, centred on a solid colour, as lossless WebP bytes."""
    icon = icon_set["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = icon.get("width", icon_set.get("width", 16)), icon.get("height", icon_set.get("height", 16))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=DRAWING_SIZE, height=DRAWING_SIZE))
    drawing = PILImage.open(io.BytesIO(png)).convert("RGBA")
    canvas = PILImage.new("RGBA", (IMAGE_SIZE, IMAGE_SIZE), background)
    canvas.alpha_composite(drawing, ((IMAGE_SIZE - drawing.width) // 2, (IMAGE_SIZE - drawing.height) // 2))
    buffer = io.BytesIO()
    canvas.convert("RGB").save(buffer, "WEBP", lossless=True, method=6)
    return buffer.getvalue()


def main(args: argparse.Namespace) -> None:
    rng = random.Random(args.seed)
    icon_sets, categories = {}, {}
    for style, package in (GENERATOR_STYLES | JUDGE_STYLES).items():
        tarball = args.tarball_dir / f"iconify-json-{package}.tgz"
        if not tarball.is_file():
            raise SystemExit(
                f"{tarball} not found: run the `npm pack` command at the top of this file, in --tarball_dir"
            )
        icon_sets[style], set_categories = read_icon_set(tarball)
        categories = set_categories | categories
        print(f"{tarball.name}  sha256 {hashlib.sha256(tarball.read_bytes()).hexdigest()[:16]}")

    names = sorted(
        name
        for name in set.intersection(*(set(icons["icons"]) for icons in icon_sets.values()))
        if categories.get(name) in CATEGORIES and name.count("-") <= 1 and not LOOK_ALIKES.search(name)
    )
    rng.shuffle(names)
    names = sorted(names, key=lambda name: name.count("-"))[
        : args.concepts
    ]  # one-word names first: things one can name
    rng.shuffle(names)
    unseen, seen = names[: len(names) // 10], names[len(names) // 10 :]

    rows = {"train": [], "new_combinations": [], "unseen_concepts": [], "judge_style": []}

    def add(split: str, name: str, style: str, background: str, template: str = TEMPLATES[0]) -> None:
        row = {"content": name.replace("-", " "), "style": style, "background": background}
        image = {"bytes": render(icon_sets[style], name, BACKGROUNDS[background]), "path": None}
        rows[split].append({"image": image, "text": caption(row, template)} | row)

    for name in seen:
        held_out_styles = rng.sample(list(GENERATOR_STYLES), 2)
        for style in GENERATOR_STYLES:
            backgrounds = rng.sample(list(BACKGROUNDS), args.backgrounds_per_drawing + 1)
            if style in held_out_styles:
                add("new_combinations", name, style, backgrounds[0])
            for background in backgrounds[1:]:
                add("train", name, style, background, rng.choices(TEMPLATES, weights=TEMPLATE_WEIGHTS)[0])
    for name in unseen:
        for style in GENERATOR_STYLES:
            for background in rng.sample(list(BACKGROUNDS), 2):
                add("unseen_concepts", name, style, background)
    for name in names:
        for background in rng.sample(list(BACKGROUNDS), 3):
            add("judge_style", name, "emojione", background, "{a_content} on {a_background} background")

    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, split_rows in rows.items():
        rng.shuffle(split_rows)
        path = args.output_dir / f"{split}.parquet"
        Dataset.from_list(split_rows, features=FEATURES).to_parquet(path)
        print(f"{path}: {len(split_rows)} images, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tarball_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--concepts", type=int, default=330, help="a tenth of them stay unseen")
    parser.add_argument("--backgrounds_per_drawing", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
