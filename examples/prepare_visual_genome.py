"""Turns Visual Genome, as downloaded, into an image folder with one caption per image for --train_data_dir.

    python examples/prepare_visual_genome.py --region_descriptions region_descriptions.json \\
        --image_dirs VG_100K VG_100K_2 --output_dir visual-genome --max_images 5000

The files are those of https://homes.cs.washington.edu/~ranjay/visualgenome/api.html: the region descriptions, unpacked,
and the two folders of images. Each image comes with about fifty phrases, each on one region of it; one of them becomes
its caption. The loader on the hub is a script, which `datasets` no longer runs; the result of this one is read by
`load_dataset("imagefolder", data_dir=...)`.
"""

import argparse
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from tqdm.auto import tqdm

from acpo_utils.data.text_files import read_text


SEPARATOR = re.compile(r"\s*,?\s*")


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--region_descriptions", type=Path, required=True, help="region_descriptions.json")
    add("--image_dirs", type=Path, nargs="+", required=True, help="VG_100K and VG_100K_2, which hold IMAGE_ID.jpg")
    add("--output_dir", type=Path, required=True, help="the image folder to make; must not exist")
    add("--phrase", choices=["sample", "longest"], default="sample", help="which of an image's phrases is its caption")
    add("--max_images", type=int, help="a random subset of this size; default: all")
    add("--seed", type=int, default=0, help="of the subset and of the sampled phrases")
    add("--link", choices=["hard", "symbolic"], help="link the images in place of copying them")
    args = parser.parse_args(input_args)
    if args.max_images is not None and args.max_images < 1:
        parser.error(f"--max_images: expected at least 1, found {args.max_images}")
    return args


def read_region_descriptions(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields (image id, phrases), one image at a time: as Python objects the whole file would take several GB.

    Raises ValueError, with the place, where the file is not a list of {"id" or "image_id", "regions": [{"phrase"}]}.
    """
    if not path.is_file():
        raise ValueError(f"--region_descriptions {path}: expected the file region_descriptions.json, found none.")
    text = read_text(path).strip()
    if not text.startswith("["):
        raise ValueError(f"{path}: expected a list of images, found {text[:20]!r} at the beginning.")
    decoder = json.JSONDecoder()
    position, number = 1, 0
    while True:
        position = SEPARATOR.match(text, position).end()
        if text[position : position + 1] == "]":
            return
        number += 1
        start = position
        try:
            entry, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}: malformed JSON in image {number}, line {error.lineno}, column {error.colno} "
                f"(character {error.pos} of {len(text)}): {error.msg}. Download or unpack it again."
            ) from error
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits, lists nested as deep
            raise ValueError(f"{path}: malformed JSON in image {number}: {error}.") from error
        try:
            image_id = int(entry["image_id"] if "image_id" in entry else entry["id"])
            phrases = [" ".join(region["phrase"].split()) for region in entry["regions"]]
            "".join(phrases).encode()  # raises UnicodeEncodeError for half of a surrogate pair, which JSON may hold
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:  # int(inf) overflows
            raise ValueError(
                f'{path}: image {number}: expected {{"id" or "image_id", "regions": [{{"phrase"}}, ...]}}, '
                f"found {text[start:position][:80]!r}."
            ) from error
        yield image_id, [phrase for phrase in phrases if phrase]


def find_images(folders: list[Path]) -> dict[int, Path]:
    """IMAGE_ID -> file, over all folders."""
    images = {}
    for folder in folders:
        if folder.is_file():
            raise ValueError(f"--image_dirs {folder}: expected a folder, found a file: unpack it and name its folder.")
        if not folder.is_dir():
            raise ValueError(f"--image_dirs: expected the folder {folder} with IMAGE_ID.jpg files, found none.")
        pictures = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".jpg")
        files = {int(file.stem): file for file in pictures if file.stem.isdecimal()}
        if not files:
            raise ValueError(f"--image_dirs: expected IMAGE_ID.jpg files in {folder}, found none.")
        images |= files
    return images


def main(args):
    images = find_images(args.image_dirs)
    without_entry = set(images)
    if args.output_dir.exists():
        raise ValueError(f"--output_dir {args.output_dir} exists: remove it or name another.")
    captions = {}  # {image id: its caption}
    without_phrase = without_file = 0
    for image_id, phrases in tqdm(read_region_descriptions(args.region_descriptions), desc="Reading phrases"):
        without_entry.discard(image_id)
        if image_id not in images:
            without_file += 1
        elif not phrases:
            without_phrase += 1
        else:
            captions[image_id] = choose_phrase(phrases, image_id, args)
    if not captions:
        raise ValueError(
            f"No image of {args.region_descriptions} is in {', '.join(map(str, args.image_dirs))}: "
            f"{without_file} have no file, {without_phrase} have no phrase."
        )
    chosen = sorted(captions)
    if args.max_images is not None and args.max_images < len(chosen):
        chosen = sorted(random.Random(args.seed).sample(chosen, args.max_images))
    write_image_folder(chosen, images, captions, args)
    print(
        f"{args.output_dir}: {len(chosen)} images with a caption each. Left out: {without_file} without a file, "
        f"{without_phrase} without a phrase, {len(without_entry)} without an entry in {args.region_descriptions.name}, "
        f"{len(captions) - len(chosen)} by --max_images."
    )


def choose_phrase(phrases, image_id, args):
    if args.phrase == "longest":
        return max(phrases, key=len)
    # Seeded by the image, so that its caption does not depend on which others are there.
    return random.Random(f"{args.seed} {image_id}").choice(phrases)


def write_image_folder(chosen, images, captions, args):
    """The images and metadata.jsonl, under another name until all of it is there."""
    temporary = args.output_dir.with_name(f".{args.output_dir.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with open(temporary / "metadata.jsonl", "w", encoding="utf-8") as metadata:
        for image_id in tqdm(chosen, desc="Linking images" if args.link else "Copying images"):
            name = f"{image_id}.jpg"
            source, target = images[image_id], temporary / name
            if args.link == "hard":
                os.link(source, target)
            elif args.link == "symbolic":
                target.symlink_to(source.resolve())
            else:
                shutil.copyfile(source, target)
            row = {"file_name": name, "text": captions[image_id]}
            metadata.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(temporary, args.output_dir)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
