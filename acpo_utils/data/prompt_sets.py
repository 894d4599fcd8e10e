"""Published prompt sets for evaluation, read without loading scripts, and a seeded choice from them.

Each is named alone, and then comes from the hub, or with the file as it is downloaded: `drawbench:PATH`. Anything else
is a prompt file (`acpo_utils.data.prompts.read_prompts`).
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pyarrow import parquet

from acpo_utils.data.prompts import read_prompts
from acpo_utils.data.text_files import read_text
from acpo_utils.files import is_utf8, one_line, parquet_errors


NSFW_LIMIT = 0.5  # DiffusionDB's own score of a prompt, 0 to 1


@dataclass(frozen=True)
class Prompt:
    """One prompt: the name of its set, its row there from 0, and the text; None for an unconditional model.

    The row belongs to the prompt and not to the choice, so that its noise is the same however many are chosen.
    """

    set: str
    row: int
    text: str | None


@dataclass(frozen=True)
class _PromptSet:
    name: str  # as a table shows it
    read: Callable[[Path], list[str]]
    repository: str | None  # on the hub, and the pattern of its file there
    file: str | None


def read_drawbench(path: Path) -> list[str]:
    """DrawBench (Saharia et al. 2022), 200 prompts: parquet, csv or tsv with a column `prompts` (or `prompt`)."""
    return read_prompts(path, ("prompts", "prompt"))


def read_parti_prompts(path: Path) -> list[str]:
    """PartiPrompts (Yu et al. 2022), 1,632 prompts: PartiPrompts.tsv with `Prompt`, `Category`, `Challenge`, `Note`."""
    return read_prompts(path, ("prompt",))


def read_diffusiondb(path: Path) -> list[str]:
    """DiffusionDB (Wang et al. 2023): the prompts of metadata.parquet, each once, `prompt_nsfw` below 0.5."""
    with parquet_errors(f"Prompt file {path}"):
        table = parquet.ParquetFile(path)
        columns = table.schema_arrow.names
        missing = {"prompt", "prompt_nsfw"} - set(columns)
        rows = None if missing else table.read(columns=["prompt", "prompt_nsfw"]).to_pydict()
    if rows is None:
        found = one_line(", ".join(columns))
        raise ValueError(f"Prompt file {path}: expected columns prompt and prompt_nsfw, found {found}.")
    prompts = []
    for number, (text, nsfw) in enumerate(zip(rows["prompt"], rows["prompt_nsfw"]), start=1):
        if not isinstance(text, str | None) or not isinstance(nsfw, int | float | None):
            found = f"{text!r} and {nsfw!r}"
            raise ValueError(f"Prompt file {path}, row {number}: expected text and a number, found {found}.")
        if text and (nsfw or 0) < NSFW_LIMIT:
            prompts.append(text)
    return prompts


def read_region_phrases(path: Path) -> list[str]:
    """Visual Genome's region_descriptions.json (Krishna et al. 2017): every different phrase, in order.

    [{"id" or "image_id": ..., "regions": [{"phrase": ...}, ...]}, ...], decoded one image at a time: as Python objects
    the whole file would take several GB.
    """
    text = read_text(path).strip()
    if not text.startswith("["):
        raise ValueError(f"{path}: expected a list of images with regions, found {text[:20]!r} at the beginning.")
    decoder, separator = json.JSONDecoder(), re.compile(r"\s*,?\s*")
    phrases, position, number = {}, 1, 0
    while True:
        position = separator.match(text, position).end()
        if text[position : position + 1] == "]":
            return list(phrases)
        number += 1
        start = position
        try:
            entry, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:  # also for a number of 5,000 digits, and lists nested as deep
            raise ValueError(f"{path}: malformed JSON in image {number}: {error}. Download it again.") from error
        try:
            found = [" ".join(region["phrase"].split()) for region in entry["regions"]]
        except (KeyError, TypeError, AttributeError):
            found = None
        if found is None or not all(map(is_utf8, found)):
            raise ValueError(
                f'{path}: image {number}: expected {{"regions": [{{"phrase"}}, ...]}}, found {text[start:position][:80]!r}.'
            )
        phrases |= dict.fromkeys(found)


PROMPT_SETS = {
    "drawbench": _PromptSet("DrawBench", read_drawbench, "Jialuo21/DrawBench", "*.parquet"),
    "partiprompts": _PromptSet("PartiPrompts", read_parti_prompts, "nateraw/parti-prompts", "PartiPrompts.tsv"),
    "diffusiondb": _PromptSet("DiffusionDB", read_diffusiondb, "poloclub/diffusiondb", "metadata.parquet"),
    "visual-genome": _PromptSet("Visual Genome", read_region_phrases, None, None),
}


def read_prompt_set(spec: str, max_prompts: int | None = None, seed: int = 0) -> list[Prompt]:
    """The prompts that `spec` names, each text once; at most `max_prompts`, a random choice by `seed`.

    `spec` is a name of `PROMPT_SETS`, `NAME:PATH`, or the path of a prompt file. A larger choice by the same seed
    begins with the smaller one.

    Raises ValueError, in one line, if the file is missing, damaged or empty, or cannot be had from the hub.
    """
    name, _, path = spec.partition(":")
    known = PROMPT_SETS.get(name.lower())
    if known is None:
        label, texts = Path(spec).stem, read_prompts(spec)
    else:
        file = Path(path) if path else _download(name.lower(), known)
        if not file.is_file():
            raise ValueError(f"--prompts {spec}: expected the file {file}, found none.")
        label, texts = known.name, known.read(file)
    texts = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if not texts:
        raise ValueError(f"--prompts {spec}: expected at least one prompt, found none.")
    rows = range(len(texts))
    if max_prompts is not None and max_prompts < len(texts):
        rows = np.random.default_rng(seed).permutation(len(texts))[:max_prompts].tolist()
    return [Prompt(label, row, texts[row]) for row in rows]


def _download(name: str, known: _PromptSet) -> Path:
    if known.repository is None:
        raise ValueError(
            f"--prompts {name}: expected {name}:PATH with the file as downloaded, region_descriptions.json; it is not "
            "on the hub in a form that can be read."
        )
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(known.repository, repo_type="dataset", allow_patterns=known.file))
        return next(folder.rglob(known.file))
    except Exception as error:  # of many kinds: network, offline mode, cache, a file that moved
        raise ValueError(
            f"--prompts {name}: {known.file} of the data set {known.repository} could not be downloaded "
            f"({' '.join(str(error).split())}). Download it where there is a network and name it: {name}:PATH."
        ) from error
