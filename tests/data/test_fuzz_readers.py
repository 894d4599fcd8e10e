"""Every reader on damaged and on foreign files: something valid, or one line of ValueError with the file's name.

Nothing else: no exception of a library, and no hang. A `Reader` below is a small valid file and what may come of it.
"""

import csv
import functools
import io
import json
import math
import shutil
import signal
import struct
import warnings
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import prepare_visual_genome
import pyarrow
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from openpyxl import Workbook
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from scipy.io import loadmat, savemat
from scipy.sparse import csr_matrix

from acpo_utils.checkpoints import find_checkpoint
from acpo_utils.data import check_images, load_captioned_images, load_unconditional_images, read_image, read_prompts
from acpo_utils.data.prompt_sets import read_prompt_set
from acpo_utils.evaluation.manifest import ImageManifest
from acpo_utils.lora import load_lora, read_lora_config, save_lora
from acpo_utils.ratings import tables
from acpo_utils.ratings.images import load_rated_images
from acpo_utils.ratings.sets import read_rating_set
from acpo_utils.ratings.tables import read_numbers, read_table
from tests.test_checkpoints import lora_unet


pytest.importorskip("skimage")  # of kadid

import kadid

from tests.demo.kadid_table import write_kadid_table


datasets.disable_progress_bars()


# --- the property


class Hang(BaseException):
    """Not an Exception: a reader that catches those would hide it."""


@contextmanager
def time_limit(seconds: int = 30):
    """Of this process's own time: on a busy machine the clock's says nothing."""

    def stop(*_):
        raise Hang(f"no answer in {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def outcome(read: Callable, file: Path, name: str | None = None) -> object:
    """What `read(file)` returns; its message where it refuses `file` as it should, as a `Refusal`."""
    try:
        with time_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read(file)
    except ValueError as error:
        assert type(error) is ValueError, f"of a library: {error!r}"
        assert (name or file.name) in str(error), f"names no file: {error}"
        assert len(str(error).split("\n")) == 1, f"more than a line: {error}"
        return Refusal(str(error))


class Refusal(str):
    pass


def fuzz(check: Callable, examples: int, *strategies) -> None:
    """`check` on `examples` drawn values, the same in every run."""
    quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    settings(max_examples=examples, derandomize=True, **quiet)(given(*strategies)(check))()


# --- the readers


@dataclass(frozen=True)
class Reader:
    """`write(folder)` makes a valid file, and what it needs beside it; `read` fails where the result is not valid.

    `text`: of which a byte order mark, and other line ends, change nothing. `quick`: how often a test that is not slow
    calls it, about. `named`: what its messages name, where that is not the file but the folder that was given.
    """

    write: Callable[[Path], Path]
    read: Callable[[Path], object]
    text: bool = False
    quick: int = 60
    named: str | None = None


def is_text(text) -> bool:
    """Words that can be written in UTF-8, which half a surrogate pair cannot."""
    return isinstance(text, str) and bool(text.strip()) and not any("\ud800" <= letter <= "\udfff" for letter in text)


def prompts(file):
    result = read_prompts(file)
    assert result and all(is_text(prompt) and prompt == prompt.strip() for prompt in result)
    return result


def prompt_set(name):
    def read(file):
        result = [prompt.text for prompt in read_prompt_set(f"{name}:{file}")]
        assert result and all(map(is_text, result))
        return result

    return read


def regions(file):
    result = list(prepare_visual_genome.read_region_descriptions(file))
    assert all(isinstance(number, int) and all(map(is_text, phrases)) for number, phrases in result)
    return result


def table(file):
    columns = {"image": "image", "prompt": "prompt", "mos": "mos"}
    result = read_table(file, columns, (0.0, 5.0), optional=("std",))
    for row in result:
        assert is_text(row["image"]) and is_text(row["prompt"]) and 0 <= row["mos"] <= 5 and row.get("std", 0) >= 0
    return result


def rating_set(file):
    result = read_rating_set("csv", file, scale=(0, 5))
    for row in [row for rows in result.splits.values() for row in rows]:
        assert is_text(row["prompt"]) and 0 <= row["mos"] <= 5 and Path(row["image"]).is_file()
    return result


def numbers(file):
    result = read_numbers(file, "MOSz", 6, (0.0, 100.0))
    assert len(result) == 6 and all(isinstance(number, float) and 0 <= number <= 100 for number in result)
    return result


def kadid_scores(file):
    result = kadid.mean_opinion_scores(file)
    assert len(result) == 125 and all(0 <= score <= 100 for score in result.values())
    return result


def photographs(file):
    result = kadid.distorted_photographs(file, max_samples=2, window=4, cache_dir=str(file.parent / "cache"))
    assert len(result) == 2 and all(0 <= row["mos"] <= 100 and row["image"].size == (4, 4) for row in result)
    return result


def cache(file):
    return str(file.parent.parent / "cache")


def captioned(file):
    source = file if file.suffix == ".parquet" else file.parent
    result = check_images(load_captioned_images(train_data_dir=str(source), cache_dir=cache(file)), "image")
    for texts in result["text"]:
        texts = [texts] if isinstance(texts, str) else texts  # a list of captions
        assert texts and all(isinstance(text, str) and (is_text(text) or not text.strip()) for text in texts)
    return result


def unconditional(file):
    result = check_images(load_unconditional_images(train_data_dir=str(file), cache_dir=cache(file)), "image")
    assert len(result) and result.column_names == ["image"]
    return result


def rated(file):
    result = load_rated_images(str(file), prompt_column="text", mos_column="mos", cache_dir=cache(file))
    for row in [row for rows in result.values() for row in rows]:
        assert 0 <= row["mos"] <= 5 and isinstance(row["text"], str)
    return result


@functools.cache
def unet_for_lora():
    return lora_unet(1, 1, ["to_k"])


def lora(file):
    config = read_lora_config(file)
    assert isinstance(config["rank"], int) and config["rank"] > 0 and math.isfinite(config["alpha"])
    assert isinstance(config["target_modules"], str) or all(isinstance(name, str) for name in config["target_modules"])
    unet = unet_for_lora()
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    try:
        load_lora(unet, file)
    except ValueError:
        assert all(torch.equal(weight, before[name]) for name, weight in unet.state_dict().items()), "loaded in part"
        raise
    return config


def checkpoint(file):
    assert find_checkpoint(file.parent.parent, "latest") == file.parent
    return True


def picture(number: int, size=(6, 5)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def text_file(name: str, content: str) -> Callable:
    def write(folder):
        (folder / name).write_text(content, encoding="utf-8")
        return folder / name

    return write


def parquet_file(name: str, /, **columns) -> Callable:
    def write(folder):
        file = folder / "files" / name
        file.parent.mkdir()
        parquet.write_table(pyarrow.table(columns), file)
        return file

    return write


CELLS = [{"bytes": encoded(picture(number)), "path": None} for number in range(6)]
RATINGS = [["image", "prompt", "mos", "std"]]
RATINGS += [[f"{i}.png", f"a fox, number {i // 2}" if i else "a café", 1 + i / 2, 0.1] for i in range(6)]


def rating_csv(folder):
    for number in range(6):
        picture(number).save(folder / f"{number}.png")
    with open(folder / "ratings.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(RATINGS)
    return folder / "ratings.csv"


def rating_xlsx(folder, rows=RATINGS):
    book = Workbook()
    for row in rows:
        book.active.append(row)
    book.save(folder / "ratings.xlsx")
    return folder / "ratings.xlsx"


def rating_mat(folder, values=(1.0, 20.5, 30.0, 40.0, 50.0, 100.0), compress=False):
    savemat(folder / "mosz1.mat", {"MOSz": values}, do_compression=compress)
    return folder / "mosz1.mat"


def image_folder(folder):
    (folder / "image-folder").mkdir()
    lines = []
    for number in range(3):
        picture(number).save(folder / "image-folder" / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"number {number}"}) + "\n")
    return text_file("metadata.jsonl", "".join(lines))(folder / "image-folder")


def image_folder_with(name: str, content: str) -> Callable:
    """Pictures as in `image_folder`, and a file of this name with their metadata, or the caption of one of them."""

    def write(folder):
        image_folder(folder).unlink()
        return text_file(name, content)(folder / "image-folder")

    return write


def metadata_parquet(folder):
    image_folder(folder).unlink()
    columns = {"file_name": ["0.png", "1.png", "2.png"], "text": ["a fox", "a café", "None"]}
    parquet.write_table(pyarrow.table(columns), folder / "image-folder" / "metadata.parquet")
    return folder / "image-folder" / "metadata.parquet"


def lora_file(folder):
    return save_lora(lora_unet(1, 1, ["to_k"]), folder)


def checkpoint_file(name: str) -> Callable:
    def write(folder):
        (folder / "checkpoint-3").mkdir()
        save_lora(lora_unet(1, 1, ["to_k"]), folder / "checkpoint-3")
        for state in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
            torch.save({"step": 3, "weights": torch.zeros(2)}, folder / "checkpoint-3" / state)
        return folder / "checkpoint-3" / name

    return write


REGIONS = json.dumps(
    [
        {"id": 1, "regions": [{"region_id": 3, "phrase": "a  gray desk"}, {"phrase": "the wall"}]},
        {"image_id": 2, "regions": []},
        {"id": 3, "regions": [{"phrase": "a café"}]},
    ],
    ensure_ascii=False,
)
SCORED = {"text": [f"prompt {i // 2}" for i in range(6)], "mos": [i / 2 for i in range(6)]}

READERS = {
    "prompts.txt": Reader(text_file("prompts.txt", "a fox\n\n  a café\nan owl\n"), prompts, text=True),
    "prompts.csv": Reader(text_file("prompts.csv", 'id,prompt\n1,a fox\n2,"a café, open"\n'), prompts, text=True),
    "prompts.tsv": Reader(
        text_file("prompts.tsv", "Prompt\tNote\na fox\tx\na café\t\n"), prompt_set("partiprompts"), text=True
    ),
    "prompts.jsonl": Reader(
        text_file("prompts.jsonl", '{"text": "a fox"}\n\n{"text": "a caf\\u00e9"}\n'), prompts, text=True
    ),
    "prompts.json": Reader(
        text_file("prompts.json", '["a fox", {"prompt": "a café"},\n {"Text": "an owl", "id": 3}]\n'),
        prompts,
        text=True,
    ),
    "prompts.parquet": Reader(parquet_file("prompts.parquet", prompts=["a fox", "an owl"]), prompt_set("drawbench")),
    "diffusiondb": Reader(
        parquet_file("metadata.parquet", prompt=["a fox", "an owl"], prompt_nsfw=[0.1, 0.9]), prompt_set("diffusiondb")
    ),
    "visual-genome": Reader(text_file("regions.json", REGIONS), prompt_set("visual-genome"), text=True),
    "prepare_visual_genome": Reader(text_file("regions.json", REGIONS), regions, text=True),
    "table.csv": Reader(rating_csv, table, text=True),
    "table.xlsx": Reader(rating_xlsx, table),
    "numbers.mat": Reader(rating_mat, numbers, quick=2),
    "compressed.mat": Reader(lambda folder: rating_mat(folder, compress=True), numbers, quick=2),
    "numbers.txt": Reader(text_file("moz1.txt", "1 20.5\n30 40 50\n100\n"), numbers, text=True),
    "rating set": Reader(rating_csv, rating_set, text=True, quick=20),
    "KADID table": Reader(lambda folder: write_kadid_table(folder / "package"), kadid_scores, text=True, quick=4),
    "KADID photographs": Reader(parquet_file("train.parquet", image=CELLS[:2], name=["a", "b"]), photographs, quick=2),
    "metadata.jsonl": Reader(image_folder, captioned, text=True, quick=6, named="image-folder"),
    "metadata.csv": Reader(
        image_folder_with("metadata.csv", 'file_name,text,n\n0.png,"a fox, asleep",1\n1.png,a café,NA\n'),
        captioned,
        text=True,
        named="image-folder",
    ),
    "metadata.parquet": Reader(
        metadata_parquet, lambda file: captioned(file.parent / "its folder"), quick=20, named="image-folder"
    ),
    "caption beside": Reader(
        image_folder_with("0.txt", "a café,\nopen\n"), captioned, text=True, quick=20, named="image-folder"
    ),
    "images.parquet": Reader(parquet_file("train.parquet", image=CELLS[:3], text=["a", "b", "c"]), captioned, quick=6),
    "unconditional": Reader(parquet_file("train.parquet", img=CELLS[:3], label=[1, 2, 3]), unconditional, quick=4),
    "rated.parquet": Reader(parquet_file("train.parquet", image=CELLS, **SCORED), rated, quick=4),
    "lora": Reader(lora_file, lora),
    "optimizer.bin": Reader(checkpoint_file("optimizer.bin"), checkpoint),
    "random_states_0.pkl": Reader(checkpoint_file("random_states_0.pkl"), checkpoint),
    "checkpoint weights": Reader(checkpoint_file("pytorch_lora_weights.safetensors"), checkpoint),
}


@pytest.fixture(scope="module", params=READERS)
def reader(request, tmp_path_factory):
    """(what reads, its valid file, that file's bytes)"""
    reader = READERS[request.param]
    file = reader.write(tmp_path_factory.mktemp("reader"))
    return reader, file, file.read_bytes()


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory):
    """KADID's table as if it were installed, and no folder .hypothesis in the repository."""
    set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(write_kadid_table(tmp_path_factory.mktemp("kadid")).parents[2])
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


heavier = pytest.mark.parametrize("times", [1, pytest.param(50, marks=pytest.mark.slow)])


# --- damage, for all of them


def test_the_whole_file_is_read(reader):
    reader, file, valid = reader
    expected = outcome(reader.read, file, reader.named)
    assert not isinstance(expected, Refusal), expected
    if reader.text:  # as Windows writes it
        lines = valid.replace(b"\r\n", b"\n")
        for same in (lines, b"\xef\xbb\xbf" + valid, lines.replace(b"\n", b"\r\n"), valid.rstrip()):
            file.write_bytes(same)
            found = outcome(reader.read, file, reader.named)
            assert str(found) == str(expected)


@heavier
def test_a_file_that_is_cut(reader, times):
    """At every length, where that is quick; otherwise at so many lengths, the ends among them."""
    reader, file, valid = reader
    for length in np.unique(np.linspace(0, len(valid) - 1, 4 * reader.quick * times, dtype=int)).tolist():
        file.write_bytes(valid[:length])
        outcome(reader.read, file, reader.named)


@heavier
def test_bytes_that_are_flipped_inserted_or_left_out(reader, times):
    reader, file, valid = reader

    def check(changes):
        content = valid
        for kind, position, piece in changes:
            position %= len(content) + 1
            kept = {"insert": position, "overwrite": position + len(piece), "leave out": position + 64}[kind]
            content = content[:position] + (b"" if kind == "leave out" else piece) + content[kept:]
        file.write_bytes(content)
        outcome(reader.read, file, reader.named)

    changes = st.tuples(
        st.sampled_from(["insert", "overwrite", "leave out"]),
        st.integers(0, 10**6),
        st.one_of(st.binary(min_size=1, max_size=1), st.sampled_from(PIECES)),
    )
    fuzz(check, reader.quick * times, st.lists(changes, min_size=1, max_size=3))


PIECES = [b"\0", b"\xff\xfe", b'"', b",", b"\n", b"\r", b"nan", b"null", b"1e999", b"-1", b"[", b"]", b"{", b"}"]
PIECES += [b"\\ud800", "\u2028".encode(), b"9" * 5000, b"[" * 100_000, b"a" * 200_000, b"Infinity"]


@heavier
def test_other_content(reader, times):
    """Text of any kind, what stands in the file in another encoding, and no text at all."""
    reader, file, valid = reader

    def check(content):
        file.write_bytes(content)
        outcome(reader.read, file, reader.named)

    encodings = ("utf-8", "utf-16", "utf-16-le", "utf-32", "latin-1")
    text = valid.decode("utf-8", errors="replace")
    for encoding in encodings:
        check(text.encode(encoding, errors="replace"))
    for content in (b"", b"\n \n", b"\xef\xbb\xbf", b"\0" * 1000, b"{}", b"[]", b"null", b"PK\3\4", b"PAR1" * 3):
        check(content)
    texts = st.builds(lambda text, encoding: text.encode(encoding, "replace"), st.text(), st.sampled_from(encodings))
    fuzz(check, reader.quick * times // 2, st.one_of(st.binary(), texts))


NESTED, DIGITS = b"[" * 100_000, b"9" * 5000
FOUND = {  # what raised an exception of a library, ended the process or came through, before this file was written
    "a cell beyond csv's limit": ("prompts.csv", b"prompt\n" + b"a" * 200_000),
    "UTF-16 without its mark": ("prompts.txt", "a fox\n".encode("utf-16-le")),
    "half a surrogate pair": ("prompts.jsonl", b'{"text": "a fox\\ud800"}'),
    "nested lists": ("prompts.jsonl", NESTED),
    "a number of 5,000 digits": ("prompts.jsonl", DIGITS),
    "half a surrogate pair in a phrase": ("visual-genome", b'[{"regions": [{"phrase": "a\\ud800"}]}]'),
    "nested regions": ("visual-genome", b'[{"regions": ' + NESTED),
    "a region of 5,000 digits": ("visual-genome", b'[{"regions": ' + DIGITS + b"}]"),
    "a line break in the message": ("visual-genome", b'["a\\nb"]'),
    "half a surrogate pair in a caption": (
        "prepare_visual_genome",
        b'[{"id": 1, "regions": [{"phrase": "\\ud800"}]}]',
    ),
    "nested images": ("prepare_visual_genome", b"[" + NESTED),
    "an id of 5,000 digits": ("prepare_visual_genome", b'[{"id": ' + DIGITS + b', "regions": []}]'),
    "an id without end": ("prepare_visual_genome", b'[{"id": Infinity, "regions": []}]'),
    "a line break in an image": ("prepare_visual_genome", b'["a\\nb"]'),
    "a line break in the header": ("table.csv", b'"a\nb",prompt\n1,2\n'),
    "a name too long for a file": ("rating set", b"image,prompt,mos\n" + b"a" * 300 + b",a,1\n"),
    "a line break in a name": ("rating set", b'image,prompt,mos\n"a\nb",a,1\n'),
    "no object in the first line": ("metadata.jsonl", b'null\n{"file_name": "0.png", "text": "a"}\n'),
    "nested metadata": ("metadata.jsonl", NESTED),
    "half a surrogate pair in a column's name": ("metadata.jsonl", b'{"file_name": "0.png", "\\ud800": "a"}\n'),
    "condition 0": ("KADID table", b"dis_img_path,score\nI01_00_01.png,3\n" * 2),
    "another name": ("KADID table", b"dis_img_path,score\nI01.png,3\n"),
    "other columns": ("KADID table", b"image,score\nI01_01_01.png,3\n"),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_was_found(tmp_path, case):
    name, content = FOUND[case]
    file = READERS[name].write(tmp_path)
    file.write_bytes(content)
    assert isinstance(outcome(READERS[name].read, file, READERS[name].named), Refusal)


def test_a_table_of_nothing_but_the_image_that_is_listed_twice(tmp_path):
    rows = [["image", "prompt", "mos"], *[["dreamStudio_8_9_1_1.jpg", "an alien", 1]] * 2]
    rating_xlsx(tmp_path, rows).rename(tmp_path / "AIGC_MOS_Zscore.xlsx")
    read = functools.partial(read_rating_set, "agiqa-1k")
    assert "expected rows with images" in outcome(read, tmp_path, "AIGC_MOS_Zscore.xlsx")


@pytest.mark.parametrize(
    "mos, message",
    [
        ([1.0, 2, 3, 4, 5, 9], "row 5 of train"),
        ([1.0] * 6, "two different scores"),
        ([1.0], "too few"),
    ],
)
def test_ratings_that_are_too_few_or_too_high(folder, mos, message):
    file = folder / "few.parquet"
    texts = [f"prompt {number // 2}" for number in range(len(mos))]
    parquet.write_table(pyarrow.table({"image": CELLS[: len(mos)], "text": texts, "mos": mos}), file)
    assert message in outcome(rated, file)


# --- values of the wrong kind, in files that are whole

TEXT = st.text(max_size=8)
CELL = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1, 6),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e300, 10**400, "", " ", "nan", "1_0", "a\nb", "\ud800", "\0"]),
    st.floats(0, 5),
    TEXT,
)
VALUE = st.recursive(
    CELL, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=2))
)
# Of any alphabet, U+2028 and such included.
WORDS = (
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
    .map(str.strip)
    .filter(bool)
)


@heavier
def test_any_text_is_a_prompt(folder, times):
    """What is valid is read, whatever letters it has."""

    def check(texts):
        text_file("a.jsonl", "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))(folder)
        assert prompts(folder / "a.jsonl") == texts
        with open(folder / "a.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["prompt"], *([text] for text in texts)])
        assert prompts(folder / "a.csv") == [text.replace("\r\n", "\n").replace("\r", "\n") for text in texts]
        parquet.write_table(pyarrow.table({"prompt": texts}), folder / "a.parquet")
        assert prompts(folder / "a.parquet") == texts
        entry = {"id": 1, "regions": [{"phrase": text} for text in texts]}
        text_file("a.json", json.dumps([entry], ensure_ascii=False))(folder)
        assert regions(folder / "a.json") == [(1, [" ".join(text.split()) for text in texts])]

    check(["a\u2028b", "a\x85b\x0cc"])  # which splitlines() would take for the ends of lines
    fuzz(check, 20 * times, st.lists(WORDS, min_size=1, max_size=3))


@heavier
def test_prompts_that_are_no_text(folder, times):
    def check(rows):
        text_file("b.jsonl", "".join(json.dumps(row) + "\n" for row in rows))(folder)
        outcome(prompts, folder / "b.jsonl")

    row = st.one_of(VALUE, st.dictionaries(st.sampled_from(["text", "Prompt", "id"]), VALUE))
    fuzz(check, 60 * times, st.lists(row, max_size=3))


@heavier
@pytest.mark.parametrize("read", [prompt_set("visual-genome"), regions], ids=["prompts", "prepare_visual_genome"])
def test_regions_of_another_form(folder, read, times):
    def check(entries):
        text_file("regions.json", json.dumps(entries))(folder)
        outcome(read, folder / "regions.json")

    region = st.one_of(VALUE, st.fixed_dictionaries({"phrase": VALUE}))
    entry = st.fixed_dictionaries(
        {}, optional={"id": VALUE, "image_id": VALUE, "regions": st.lists(region, max_size=2)}
    )
    fuzz(check, 60 * times, st.lists(st.one_of(VALUE, entry), max_size=2))


@heavier
def test_csv_cells_of_the_wrong_kind(folder, times):
    rating_csv(folder)

    def check(changes):
        rows = [list(row) for row in RATINGS]
        for row, column, cell in changes:
            rows[row][column] = cell
        with open(folder / "ratings.csv", "w", newline="", encoding="utf-8", errors="surrogatepass") as file:
            csv.writer(file).writerows(rows)
        outcome(table, folder / "ratings.csv")
        outcome(rating_set, folder / "ratings.csv")

    names = st.sampled_from(
        ["a" * 300, "../0.png", "a\0.png", "{image}", "0.png/", ".", "/", "1.png\n", "{0.__class__}"]
    )
    change = st.tuples(st.integers(0, 6), st.integers(0, 3), st.one_of(CELL, names))
    fuzz(check, 20 * times, st.lists(change, min_size=1, max_size=3))


@heavier
def test_workbook_cells_of_the_wrong_kind(folder, times):
    def check(changes):
        rows = [list(row) for row in RATINGS]
        for row, column, cell in changes:
            rows[row][column] = cell
        outcome(table, rating_xlsx(folder, rows))

    text = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=8)  # what openpyxl writes
    special = st.sampled_from(["#N/A", "=1+1", "=", "_xD800_", "a\nb", "nan", math.nan, math.inf, 10**300])
    cell = st.one_of(st.none(), st.booleans(), st.integers(-1, 6), st.floats(0, 5), st.datetimes(), text, special)
    fuzz(check, 20 * times, st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3), cell), min_size=1, max_size=3))


@heavier
def test_workbook_with_damage_inside_the_archive(folder, times):
    """Whose checksums are right: written so, and not by a torn download."""
    with zipfile.ZipFile(rating_xlsx(folder)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}

    def check(name, position, piece, length):
        content = parts[name]
        position %= len(content)
        changed = parts | {name: content[:position] + piece + content[position + length :]}
        with zipfile.ZipFile(folder / "ratings.xlsx", "w") as archive:
            for part, content in changed.items():
                archive.writestr(part, content)
        outcome(table, folder / "ratings.xlsx")

    pieces = st.one_of(st.binary(max_size=2), st.sampled_from([b"<", b">", b"&", b'"', b"9999", b"XFD1048576", b"-1"]))
    names = st.sampled_from(sorted(parts))
    fuzz(check, 40 * times, names, st.integers(0, 10**6), pieces, st.integers(0, 20))


@pytest.mark.parametrize("score", ["1" + 400 * "0", "-1", "nan", "1e999", "", "TRUE"])
def test_workbook_whose_score_is_no_number(folder, score):
    with zipfile.ZipFile(rating_xlsx(folder)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    assert parts["xl/worksheets/sheet1.xml"].count(b"<v>1.5</v>") == 1
    sheet = parts["xl/worksheets/sheet1.xml"].replace(b"<v>1.5</v>", f"<v>{score}</v>".encode())
    with zipfile.ZipFile(folder / "ratings.xlsx", "w") as archive:
        for name, content in (parts | {"xl/worksheets/sheet1.xml": sheet}).items():
            archive.writestr(name, content)
    assert isinstance(outcome(table, folder / "ratings.xlsx"), Refusal)


def test_workbook_with_a_cell_far_from_the_table(folder):
    """Excel's last cell: its sheet would have 17 billion."""
    book = Workbook()
    for row in RATINGS:
        book.active.append(row)
    book.active["XFD1048576"] = "stray"
    book.save(folder / "far.xlsx")
    assert isinstance(outcome(table, folder / "far.xlsx"), Refusal)


MATLAB = {
    "text": "high",
    "complex": np.array([1.0, 2, 3, 4, 5, 6j]),
    "sparse": csr_matrix(np.arange(6.0)),
    "cell": np.array([1.0, "b", 2, 3, 4, np.zeros(2)], dtype=object),
    "structure": {"a": 1.0, "b": [1, 2]},
    "empty": np.zeros((0, 0)),
    "five": np.arange(5.0),
    "nan": np.array([1, 2, 3, 4, 5, math.nan]),
    "infinite": np.array([1, 2, 3, 4, 5, math.inf]),
    "negative": -np.arange(6.0),
    "texts": np.array(["1", "2", "3", "4", "5", "6"]),
}


@pytest.mark.parametrize("kind", MATLAB)
def test_matlab_variables_of_the_wrong_kind(folder, kind):
    savemat(folder / "wrong.mat", {"MOSz": MATLAB[kind]})
    assert isinstance(outcome(numbers, folder / "wrong.mat"), Refusal)


@pytest.mark.parametrize("number", [0, 20, 255])
def test_matlab_byte_that_ends_the_process_which_reads_it(folder, number):
    """The type of the values, which scipy (1.17) takes for an index: the process that reads it dies, and no other."""
    content = bytearray(rating_mat(folder).read_bytes())
    assert content[176] == 9  # of double
    content[176] = number
    (folder / "crash.mat").write_bytes(content)
    assert "expected a MATLAB file up to version 7.2" in outcome(numbers, folder / "crash.mat")


def test_matlab_version_4_is_refused(folder):
    savemat(folder / "old.mat", {"MOSz": np.arange(6.0)}, format="4")
    assert "expected a MATLAB file up to version 7.2" in outcome(numbers, folder / "old.mat")


def test_a_matlab_file_that_keeps_its_reader_busy_is_refused(folder, monkeypatch):
    busy = tables.READ_MAT.replace("(20, 20)", "(1, 1)").replace("variables =", "while True: pass\nvariables =")
    assert busy.count("(1, 1)") == busy.count("while") == 1
    monkeypatch.setattr(tables, "READ_MAT", busy)
    assert "expected a MATLAB file up to version 7.2" in outcome(numbers, rating_mat(folder))
    monkeypatch.setattr(tables, "MAT_SECONDS", 0.01)
    assert "that can be read in 0.01 seconds" in outcome(numbers, rating_mat(folder))


def test_matlab_version_7_3_is_refused(folder):
    hdf5 = b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + bytes(384) + b"\x89HDF\r\n\x1a\n"
    (folder / "new.mat").write_bytes(hdf5)
    assert "expected a MATLAB file up to version 7.2" in outcome(numbers, folder / "new.mat")


@heavier
def test_matlab_numbers_are_those_that_scipy_reads(folder, times):
    def check(kind, shape, compress, other):
        values = np.arange(math.prod(shape)).reshape(shape).astype(kind)
        file = folder / "whole.mat"
        savemat(file, {"a": MATLAB[other], "MOSz": values, "b": 1.5}, do_compression=compress)
        found = read_numbers(file, "MOSz", values.size, (0.0, 100.0))
        assert found == loadmat(file)["MOSz"].ravel().tolist() and read_numbers(file, "b", 1, (0.0, 2.0)) == [1.5]

    kinds = st.sampled_from(["f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "bool"])
    shapes = st.lists(st.integers(1, 4), min_size=2, max_size=3)
    fuzz(check, 4 * times, kinds, shapes, st.booleans(), st.sampled_from(sorted(MATLAB)))


def test_matlab_numbers_written_with_the_highest_byte_first(folder):
    def element(kind, data):
        return struct.pack(">2I", kind, len(data)) + data + b"\0" * (-len(data) % 8)

    matrix = element(6, struct.pack(">2I", 6, 0)) + element(5, struct.pack(">2i", 1, 6))
    matrix += struct.pack(">2H", 4, 1) + b"MOSz" + element(9, struct.pack(">6d", *range(6)))
    (folder / "big.mat").write_bytes(b"MATLAB 5.0".ljust(124) + b"\1\0MI" + element(14, matrix))
    assert numbers(folder / "big.mat") == loadmat(folder / "big.mat")["MOSz"].ravel().tolist() == list(range(6))


ARRAYS = {
    "null": pyarrow.array([None] * 6),
    "boolean": pyarrow.array([True, False] * 3),
    "integer": pyarrow.array(range(6)),
    "float": pyarrow.array([0.0, math.nan, math.inf, None, -1.0, 3.0]),
    "text": pyarrow.array(["a", "b", "", None, "\0", "3.5"]),
    "large text": pyarrow.array(["a", "b", "c", "d", "e", "f"], pyarrow.large_string()),
    "no UTF-8": pyarrow.array([b"\xff\xfe"] * 6).view(pyarrow.string()),
    "bytes": pyarrow.array([b"\xff", b"", None, b"a", b"b", b"c"]),
    "time": pyarrow.array(range(6), pyarrow.timestamp("s")),
    "list": pyarrow.array([["a", "b"], [], None, [None], ["c"], ["d"]]),
    "empty list": pyarrow.array([["a", "b"], [], ["c"], ["d"], ["e"], ["f"]]),
    "list of nothing": pyarrow.array([["a", "b"], [None], ["c"], ["d"], ["e"], ["f"]]),
    "texts": pyarrow.array([["a", "b"]] * 6),
    "structure": pyarrow.array([{"a": 1}] * 6),
    "dictionary": pyarrow.array(["a", "b"] * 3).dictionary_encode(),
    "images": pyarrow.array(CELLS, pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})),
    "no image": pyarrow.array(
        [*CELLS[:5], None], pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    ),
    "no files": pyarrow.array([{"bytes": None, "path": "nowhere.png"}, *CELLS[1:]]),
    "neither": pyarrow.array([{"bytes": None, "path": None}] * 6),
    "other structure": pyarrow.array([{"bytes": "text", "path": 1}] * 6),
}
COLUMNS = {
    "prompts": (prompt_set("drawbench"), {"prompts": "large text"}),
    "diffusiondb": (prompt_set("diffusiondb"), {"prompt": "large text", "prompt_nsfw": "float"}),
    "captioned": (captioned, {"image": "images", "text": "large text"}),
    "unconditional": (unconditional, {"img": "images"}),
    "rated": (rated, {"image": "images", "text": "large text", "mos": "integer"}),
    "photographs": (photographs, {"image": "images", "name": "large text"}),
}


def columns(reader: str, column: str, kind: str, folder: Path) -> Path:
    """A file as `reader` wants it, but for one column, which is of another kind, or missing."""
    arrays = {
        name: ARRAYS[kind if name == column and kind != "missing" else valid]
        for name, valid in COLUMNS[reader][1].items()
    }
    if kind == "missing":
        arrays[f"no {column}"] = arrays.pop(column)
    file = folder / "columns" / "train.parquet"
    file.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.table(arrays), file)
    return file


@pytest.mark.parametrize("kind", [*ARRAYS, "missing"])
@pytest.mark.parametrize(
    "reader, column", [("prompts", "prompts"), ("diffusiondb", "prompt"), ("diffusiondb", "prompt_nsfw")]
)
def test_prompt_columns_of_any_kind(folder, reader, column, kind):
    outcome(COLUMNS[reader][0], columns(reader, column, kind, folder))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*ARRAYS, "missing"])
@pytest.mark.parametrize(
    "reader, column",
    [
        (reader, column)
        for reader in ("captioned", "unconditional", "rated", "photographs")
        for column in COLUMNS[reader][1]
    ],
)
def test_data_columns_of_any_kind(folder, reader, column, kind):
    outcome(COLUMNS[reader][0], columns(reader, column, kind, folder))


@pytest.mark.parametrize(
    "reader, column, kind",
    [
        ("captioned", "text", "no UTF-8"),
        ("captioned", "text", "empty list"),
        ("captioned", "text", "list of nothing"),
        ("captioned", "image", "other structure"),
        ("captioned", "image", "no image"),
        ("rated", "text", "texts"),
        ("rated", "mos", "no UTF-8"),
        ("photographs", "image", "no image"),
        ("photographs", "name", "missing"),
    ],
)
def test_data_columns_that_were_once_let_through(folder, reader, column, kind):
    assert isinstance(outcome(COLUMNS[reader][0], columns(reader, column, kind, folder)), Refusal)


@heavier
def test_metadata_values_of_the_wrong_kind(folder, times):
    file = folder / "image-folder" / "metadata.jsonl"
    if not file.is_file():
        image_folder(folder)

    def check(rows):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        outcome(captioned, file, "image-folder")

    names = st.one_of(VALUE, st.sampled_from(["0.png", "1.png", "nowhere.png", "../0.png", "/"]))
    row = st.fixed_dictionaries({"file_name": names, "text": VALUE}, optional={"image": VALUE, "label": VALUE})
    fuzz(check, 6 * times, st.lists(row, min_size=1, max_size=3))


@heavier
def test_kadid_rows_of_the_wrong_kind(folder, times):
    lines = (write_kadid_table(folder / f"kadid {times}")).read_text().splitlines()
    file = folder / "KADID-10k.txt"

    def check(row, cells):
        file.write_text("\n".join([*lines[:row], ",".join(cells), *lines[row + 1 :]]), encoding="utf-8")
        outcome(kadid_scores, file)

    paths = st.sampled_from(
        ["I01_00_01.png", "I01_26_01.png", "I01_1_-1.png", "I01_01.png", "I01_a_01.png", "", "I01_01_01.png"]
    )
    scores = st.one_of(st.sampled_from(["nan", "inf", "9", "-1", "", "3"]), TEXT)
    fuzz(check, 8 * times, st.sampled_from([0, 1, 10_125]), st.tuples(paths, st.just("T"), st.just("I01.png"), scores))


LORA_METADATA = [
    "{}",
    "[]",
    "null",
    "1",
    "{",
    "[" * 100_000,
    "9" * 5000,
    *(
        json.dumps({f"unet.{key}": value})
        for key, value in [
            ("lora_alpha", "high"), ("lora_alpha", None), ("lora_alpha", math.nan), ("lora_alpha", [1]),
            ("target_modules", 3), ("target_modules", {"to_k": 1}), ("target_modules", [1, "to_k"]),
            ("target_modules", [["to_k"]]), ("target_modules", "to_k"), ("target_modules", True), ("r", "x"),
        ]
    ),
]  # fmt: skip


LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k"
LORA_NAMES = [
    f"{LAYER}{end}" for end in ("", ".alpha", ".lora_A.weight", ".lora_B.weight", ".lora.down.weight", ".lora_A.bias")
]
LORA_NAMES += [
    "",
    "a",
    "unet",
    "unet.",
    "unet.lora_A.weight",
    "unet.mid_block.lora_A.weight",
    "unet.conv_in.lora_A.weight",
]
LORA_NAMES += ["text_encoder.a", "lora_unet_a.alpha", "lora_te_a.weight", "lora_unet_mid_block.lora_down.weight"]


def lora_with(folder, name, tensor, metadata=None, others=True):
    """A LoRA file that has `tensor` as well, or instead of the one of that name; alone, if not `others`."""
    tensors = load_file(lora_file(folder)) if others else {}
    assert LAYER + ".lora_A.weight" in tensors or not others
    save_file(
        tensors | {name: tensor}, folder / "changed.safetensors", metadata and {"lora_adapter_metadata": metadata}
    )
    return folder / "changed.safetensors"


@heavier
def test_lora_tensors_and_settings_of_the_wrong_kind(folder, times):
    def check(name, shape, kind, metadata, others):
        outcome(lora, lora_with(folder, name, torch.zeros(shape, dtype=kind), metadata, others))

    shapes = st.lists(st.sampled_from([0, 1, 2, 16]), max_size=4)
    kinds = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
    metadata = st.one_of(st.none(), st.sampled_from(LORA_METADATA))
    fuzz(check, 15 * times, st.sampled_from(LORA_NAMES), shapes, kinds, metadata, st.booleans())


@pytest.mark.parametrize(
    "name, shape, others",
    [
        (f"{LAYER}.lora_A.weight", (), True),
        (f"{LAYER}.lora_A.weight", (1,), True),
        (f"{LAYER}.lora_A.weight", (0, 16), False),  # rank 0
        (f"{LAYER}.lora_B.weight", (16,), True),
        (f"{LAYER}.lora_B.weight", (16, 2), True),  # not the rank of its A
        ("unet.mid_block.lora_A.weight", (1, 16), True),  # a block, which has no weight
        ("lora_unet_mid_block.lora_down.weight", (1, 16), False),
    ],
)
def test_lora_tensors_that_fit_no_layer(folder, name, shape, others):
    assert isinstance(outcome(lora, lora_with(folder, name, torch.zeros(shape), None, others)), Refusal)


@pytest.mark.parametrize("metadata", LORA_METADATA, ids=lambda text: text[:40])
def test_lora_settings_of_the_wrong_kind(folder, metadata):
    save_file(load_file(lora_file(folder)), folder / "changed.safetensors", {"lora_adapter_metadata": metadata})
    outcome(lora, folder / "changed.safetensors")


# --- manifests: whatever is not a line of ours is passed over


@heavier
def test_manifest_lines_of_the_wrong_kind(folder, times):
    made_from = {"prompt": "a caf\u00e9\u2028, open", "seed": 1}

    def check(lines, cut):
        images = folder / "images"
        shutil.rmtree(images, ignore_errors=True)
        ImageManifest(images).save("a.png", torch.zeros(3, 2, 2), made_from)
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        (images / "manifest-1.jsonl").write_bytes(text[: len(text) - cut] + b"\xff\n" + b"[" * 100_000)
        with time_limit():
            manifest = ImageManifest(images)
            assert manifest.is_finished("a.png", made_from)
            assert not manifest.is_finished("b.png", made_from)
            manifest.merge({"a.png": made_from})
            assert ImageManifest(images).is_finished("a.png", made_from)

    name = st.one_of(VALUE, st.sampled_from(["a.png", "b.png"]))
    line = st.fixed_dictionaries(
        {}, optional={"file": name, "sha256": VALUE, "made_from": st.one_of(VALUE, st.just(made_from))}
    )
    fuzz(check, 20 * times, st.lists(st.one_of(VALUE, line), max_size=3), st.integers(0, 5))


def test_manifest_cut_at_every_length(tmp_path):
    manifest = ImageManifest(tmp_path)
    for name in ("a.png", "b.png"):
        manifest.save(name, torch.zeros(3, 2, 2), {"prompt": "a café"})
    content = (tmp_path / "manifest-0.jsonl").read_bytes()
    first = content.index(b"\n")
    for length in range(len(content)):
        (tmp_path / "manifest-0.jsonl").write_bytes(content[:length])
        manifest = ImageManifest(tmp_path)
        assert manifest.is_finished("a.png", {"prompt": "a café"}) == (length >= first)
        assert manifest.is_finished("b.png", {"prompt": "a café"}) == (length >= len(content) - 1)


# --- images


def image_data(contents: list[bytes]) -> datasets.Dataset:
    cells = [{"bytes": content, "path": f"{number}.image"} for number, content in enumerate(contents)]
    return datasets.Dataset.from_dict(
        {"image": cells}, features=datasets.Features({"image": datasets.Image(decode=False)})
    )


def kept(contents: list[bytes]) -> datasets.Dataset:
    with time_limit(60), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return check_images(image_data(contents), "image", skip_bad_images=True)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
    ids=str,
)
def test_images_cut_at_every_length(kind, options):
    """Read to the last pixel, or named."""
    whole = encoded(picture(0, (11, 9)), kind, **options)
    expected = np.asarray(read_image({"bytes": whole, "path": None}))
    cut = [whole[:length] for length in range(len(whole))]
    rows = kept([*cut, whole])
    for row in rows:
        found = np.asarray(read_image(row["image"]))
        assert np.array_equal(found, expected), f"{row['image']['path']} of {len(whole)} bytes"
    names = [row["image"]["path"] for row in rows]
    assert names[-1] == f"{len(whole)}.image" and "0.image" not in names
    message = outcome(lambda file: check_images(image_data([whole, *cut]), "image"), Path("1.image"))
    assert f"of {len(whole) + 1} images cannot be read, the first: 1.image" in message


@heavier
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_damaged_images_are_kept_or_left_out(kind, times):
    whole = encoded(picture(0, (11, 9)), kind)

    def check(contents):
        for row in kept([*contents, whole]):
            assert read_image(row["image"]).mode == "RGB"

    def damaged(position, piece):
        return whole[: position % len(whole)] + piece + whole[position % len(whole) + len(piece) :]

    content = st.one_of(st.builds(damaged, st.integers(0, 10**6), st.binary(min_size=1, max_size=4)), st.binary())
    fuzz(check, 4 * times, st.lists(content, min_size=5, max_size=20))


def test_a_row_without_an_image_is_named(folder):
    cells = [*CELLS[:2], None, {"bytes": None, "path": None}, {"bytes": b"", "path": ""}]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = datasets.Dataset(pyarrow.table({"image": pyarrow.array(cells, features.arrow_schema.field("image").type)}))
    rows = rows.cast(features)
    assert "3 of 5 images cannot be read, the first: row 2" in outcome(
        lambda file: check_images(rows, "image"), Path("row 2")
    )
    assert len(check_images(rows, "image", skip_bad_images=True)) == 2
