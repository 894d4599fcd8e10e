"""Rebuild the embedded photographs (examples/demo/photos) from two packages of Debian 12.

    apt-get download gcompris-qt-data=3.1-2 lomiri-wallpapers-16.04=20.04.0-2
    for package in *.deb; do dpkg -x $package packages; done
    python examples/demo/build_photos.py --package_dir packages

Only what the packages' own licence files put in the public domain, or under CC0, CC-BY or CC-BY-SA; a picture whose
licence they do not name is left out. So are paintings, drawings and pictures that were not sharp to begin with. Each
is reduced to a shorter side of 384 pixels, the size of KADID-10k's photographs; none is enlarged.
"""

import argparse
import io
import random
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage


# Activities of gcompris-qt-data that show photographs, and those of their pictures that are not for us.
ACTIVITIES = (
    "details",
    "erase",
    "explore_farm_animals",
    "explore_monuments",
    "explore_world_animals",
    "explore_world_music",
)
LEFT_OUT = {
    "castleClinton", "georgeWashingtonBirthplace", "australia",  # black and white, a scan's frame
    "italy", "japan", "ireland", "orchestra",  # stages in the dark, with noise and motion
    "Neuschwanstein_background", "TajMahal_background",  # second pictures of what explore_monuments shows
    "Gogh4_background", "Van_Gogh_The_Night_Cafe_background", "VincentVanGoghBridge_background",
    "VincentVanGogh0019_background",  # paintings
    "analogpattern_by_Peter_Nerlich", "umang_by_Abhishek_Mudgal", "greentock_by_Peter_Nerlich",  # patterns
}  # fmt: skip
LICENSE = re.compile(r"Public domain|CC0-1\.0|CC-BY(-SA)?-[1-4]\.0")
SHORTER_SIDE, LEAST_SIDE = 384, 440  # LEAST_SIDE: below it, what a picture's own compression did would still show
SPLITS = {"test": 24, "validation": 12}  # photographs; the rest is for training
COLUMNS = ("name", "author", "license", "source", "changes", "package")
FEATURES = Features({"image": Image()} | {name: Value("string") for name in COLUMNS})


def read_rcc(path: Path) -> Iterator[tuple[str, bytes]]:
    """(path inside, content) of each file in a Qt binary resource (.rcc, formats 1 to 3), stored or zlib-compressed.

    Raises ValueError if it is none; entries compressed by zstd are skipped.
    """
    raw = path.read_bytes()
    if raw[:4] != b"qres":
        raise ValueError(f"{path}: expected a Qt resource file, found one that starts with {raw[:4]!r}.")
    version, tree, data, names = struct.unpack_from(">4i", raw, 4)
    entry_size = 14 if version == 1 else 22

    def walk(index: int, folder: str) -> Iterator[tuple[str, bytes]]:
        entry = tree + index * entry_size
        name_offset, flags = struct.unpack_from(">iH", raw, entry)
        (length,) = struct.unpack_from(">H", raw, names + name_offset)
        start = names + name_offset + 6  # after the length and a hash
        inside = f"{folder}/{raw[start : start + 2 * length].decode('utf-16-be')}" if index else ""
        if flags & 2:  # a folder
            count, first = struct.unpack_from(">2i", raw, entry + 6)
            for child in range(first, first + count):
                yield from walk(child, inside)
        elif not flags & 4:
            (offset,) = struct.unpack_from(">i", raw, entry + 10)
            (size,) = struct.unpack_from(">i", raw, data + offset)
            content = raw[data + offset + 4 : data + offset + 4 + size]
            yield inside, zlib.decompress(content[4:]) if flags & 1 else content

    return walk(0, "")


def read_licenses(text: str) -> dict[str, dict[str, str]]:
    """What a README of GCompris, or a Debian copyright file, says of each picture: file name without suffix ->
    {"author", "license", "source", "changes"}. Paragraphs of another form, and those without a licence, are passed."""
    fields = {
        "Copyright": "author",
        "License": "license",
        "Source": "source",
        "Comment": "changes",
        "Comments": "changes",
    }
    licenses = {}
    for paragraph in re.split(r"\n\s*\n", text):
        about, files, last = dict.fromkeys(fields.values(), ""), [], None
        for line in paragraph.splitlines():
            key, colon, value = line.partition(":")
            if colon and key in (*fields, "Files"):
                last = fields.get(key)
                if last:
                    about[last] = value.strip()
                    continue
                line = value
            if line.strip().endswith((".webp", ".jpg")):
                files.append(Path(line.strip()).stem)
            elif last == "author":
                about["author"] += f", {line.strip()}"
        about["author"] = about["author"].removeprefix("© ").replace("/ Wikimedia Commons", "").strip(" ,")
        about["license"] = re.sub(
            r"(?i)^public domain$",
            "Public domain",
            about["license"].replace("CC-BY-SA ", "CC-BY-SA-").replace("CC-BY ", "CC-BY-"),
        )
        if about["author"] and LICENSE.fullmatch(about["license"]):
            licenses |= dict.fromkeys(files, about)
    return licenses


def photographs(package_dir: Path) -> Iterator[tuple[dict, bytes]]:
    """(metadata, file) of every picture that may be used, in a fixed order."""
    for activity in ACTIVITIES:
        entries = dict(read_rcc(find(package_dir, f"{activity}.rcc")))
        readme = next(content for inside, content in entries.items() if inside.endswith("/README"))
        licenses = read_licenses(readme.decode())
        for inside, content in sorted(entries.items()):
            stem = Path(inside).stem
            if inside.endswith(".webp") and stem in licenses and stem not in LEFT_OUT:
                name = f"{activity}/{stem.removesuffix('_background')}"
                yield {"name": name, "package": "gcompris-qt-data 3.1-2"} | licenses[stem], content
    package = "lomiri-wallpapers-16.04"
    licenses = read_licenses(find(package_dir, f"{package}/copyright").read_text())
    for path in sorted(find(package_dir, "share/backgrounds").glob("*.jpg")):
        if path.stem in licenses and path.stem not in LEFT_OUT:
            name = f"lomiri/{path.stem.partition('_by_')[0]}"
            about = {"name": name, "package": f"{package} 20.04.0-2"} | licenses[path.stem]
            yield (
                about | {"source": "https://gitlab.com/ubports/development/core/lomiri-wallpapers"},
                path.read_bytes(),
            )


def find(package_dir: Path, ending: str) -> Path:
    found = sorted(package_dir.glob(f"**/{ending}"))
    if not found:
        raise SystemExit(f"{package_dir}: expected .../{ending} in it, found none. The commands at the top unpack it.")
    return found[0]


def reduce(content: bytes) -> bytes | None:
    """The picture at a shorter side of 384 pixels, as JPEG of quality 95; None if it is too small."""
    image = PILImage.open(io.BytesIO(content)).convert("RGB")
    if min(image.size) < LEAST_SIDE:
        return None
    scale = SHORTER_SIDE / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), PILImage.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0, optimize=True)
    return buffer.getvalue()


README = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: train.parquet
  - split: validation
    path: validation.parquet
  - split: test
    path: test.parquet
---

# {count} photographs

What the two-stream evaluator of the demo was trained on (`train`), chosen by (`validation`) and measured with (`test`),
after distortion: see [`docs/demo-evaluators.md`](../../../docs/demo-evaluators.md). A photograph stands in one split only. Shorter
side 384 pixels, JPEG of quality 95 without chroma subsampling. `datasets.load_dataset("examples/demo/photos")` reads them;
columns `image`, {columns}.

{counts}. Rebuilt by the commands at the top of [`build_photos.py`](../build_photos.py) (seed 0).

[`build_photo_crops.py`](../build_photo_crops.py) cuts `train` and `validation` into 64 px crops for an unconditional DDPM,
5,950 and 204. They are 36 MB, kept without loss, so they are not here: the script writes them to `photo-crops` in two
minutes, the same ones every time, each with the name of its photograph.

## Licences and attribution

The photographs keep their licences, which are not this repository's. Changes: every one was reduced in size and
compressed again by us; what was done before is in the last column. From Debian's packages {packages}, as their licence
files say.

| split | photograph | author | licence | source | earlier changes |
|---|---|---|---|---|---|
{table}

CC0-1.0: https://creativecommons.org/publicdomain/zero/1.0/. CC-BY and CC-BY-SA: https://creativecommons.org/licenses/by/4.0/,
https://creativecommons.org/licenses/by-sa/4.0/, and the like for versions 2.0 and 3.0.
"""


def write_readme(splits: dict[str, list[dict]], output_dir: Path) -> None:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("](", "] (")

    rows = [(split, row) for split, part in splits.items() for row in sorted(part, key=lambda row: row["name"])]
    table = [
        " | ".join(["", split, *(cell(row[name]) for name in ("name", "author", "license", "source", "changes")), ""])
        for split, row in rows
    ]
    text = README.format(
        count=len(rows),
        columns=", ".join(f"`{name}`" for name in COLUMNS),
        counts=", ".join(f"{len(part)} {split}" for split, part in splits.items()),
        packages=" and ".join(f"`{name}`" for name in sorted({row["package"] for _, row in rows})),
        table="\n".join(line.strip() for line in table),
    )
    (output_dir / "README.md").write_text(text)


def main(args: argparse.Namespace) -> None:
    rows = []
    for about, content in photographs(args.package_dir):
        if (image := reduce(content)) is not None:
            rows.append(about | {"image": {"bytes": image, "path": f"{about['name'].replace('/', '_')}.jpg"}})
    random.Random(args.seed).shuffle(rows)
    splits, start = {}, 0
    for split, count in SPLITS.items():
        splits[split], start = rows[start : start + count], start + count
    splits = {"train": rows[start:], "validation": splits["validation"], "test": splits["test"]}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, part in splits.items():
        path = args.output_dir / f"{split}.parquet"
        Dataset.from_list(part, features=FEATURES).to_parquet(path)
        print(f"{path}: {len(part)} photographs, {path.stat().st_size / 1e6:.1f} MB")
    write_readme(splits, args.output_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "photos")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
