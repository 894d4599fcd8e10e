"""The rating sets in the layouts they are published in, each variant of them, and what a damaged copy is told."""

import csv
import io
from pathlib import Path

import pytest
from openpyxl import Workbook
from PIL import Image
from scipy.io import savemat

from acpo_utils.ratings.sets import FEATURES, read_rating_set


def picture(kind):
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, kind)
    return file.getvalue()


PICTURES = {".png": picture("PNG"), ".jpg": picture("JPEG")}


def write_images(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(PICTURES[Path(name).suffix])


def write_table(file, rows):
    """A .csv, or an .xlsx as Excel leaves it: a sheet named Sheet1."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".xlsx":
        book = Workbook()
        book.active.title = "Sheet1"
        for row in rows:
            book.active.append(row)
        book.save(file)
    else:
        with open(file, "w", newline="") as text:
            csv.writer(text).writerows(rows)


def by_name(rated):
    """{file name: row}, of all splits together."""
    return {Path(row["image"]).name: row | {"split": split} for split, rows in rated.splits.items() for row in rows}


def prompts_of(rated):
    return {split: set(rows["prompt"][:]) for split, rows in rated.splits.items()}


# --- AGIQA-1K


def agiqa_1k(root, suffix=".xlsx", folder="file"):
    """The last image is listed twice with two scores, as in the published sheet; AIGC_all.csv is another label."""
    objects, actions = ["bird", "cat", "dog"], ["driving aircraft", "driving bike", "driving car"]
    rows = [
        [f"{model}_{i}_{j}_0_{k}.jpg", f"{objects[i]}, {actions[j]}, city, {style} style", (i + j + k) / 2]
        for i in range(3)
        for j in range(3)
        for k, style in enumerate(["anime", "realistic"])
        for model in ["deepai"]
    ]
    rows += [["dreamStudio_8_9_1_1.jpg", "alien, wearing shirt, wild, realistic style", mos] for mos in (0.44, 2.08)]
    write_table(root / f"AIGC_MOS_Zscore{suffix}", [["Image", "Prompt", "MOS"], *rows])
    write_table(root / "AIGC_all.csv", [["Image", "Score"], *([row[0], 4.5] for row in reversed(rows))])
    write_images(root / folder, [row[0] for row in rows])
    return rows


@pytest.mark.parametrize("suffix, folder", [(".xlsx", "file"), (".csv", "images"), (".xlsx", ".")])
def test_agiqa_1k(tmp_path, suffix, folder, caplog):
    rows = agiqa_1k(tmp_path, suffix, folder)
    rated = read_rating_set("AGIQA-1K", tmp_path, target="quality")
    found = by_name(rated)
    assert {name: row["mos"] for name, row in found.items()} == {name: mos for name, _, mos in rows[:-2]}
    assert "dreamStudio_8_9_1_1.jpg twice" in caplog.text  # which of its two scores holds, nobody knows
    row = found["deepai_2_1_0_1.jpg"]
    assert row["prompt"] == "dog, driving bike, city, realistic style" and row["generator"] == "deepai"
    assert row["quality"] == row["mos"] == 2.0 and row["alignment"] is None and row["std"] is None
    assert (rated.name, rated.scale, rated.drawn) == ("agiqa-1k", (0.0, 5.0), ("validation", "test"))
    assert rated.splits["train"].features == FEATURES


# --- AGIQA-3K

AGIQA_3K_HEADER = "name,prompt,adj1,adj2,style,mos_quality,std_quality,mos_align,std_align".split(",")


def agiqa_3k(root, folder="."):
    rows = []
    for i in range(20):
        adjectives = [["", ""], ["colorful", ""], ["colorful", "detailed"]][i % 3]
        for generator in ("AttnGAN_normal", "sd1.5_lowstep"):
            name, prompt = f"{generator}_{i:03d}.jpg", f"a tray of sushi, number {i}"
            rows.append([name, prompt, *adjectives, ["", "anime"][i % 2], i / 5, 0.2 + i / 100, 4 - i / 5, 0.5])
    write_table(root / "data.csv", [AGIQA_3K_HEADER, *rows])
    write_images(root / folder, [row[0] for row in rows])
    return rows


@pytest.mark.parametrize("folder", [".", "AGIQA-3K", "image", "images"])
def test_agiqa_3k_wherever_its_images_are(tmp_path, folder):
    agiqa_3k(tmp_path, folder)
    row = by_name(read_rating_set("agiqa-3k", tmp_path, target="quality"))["sd1.5_lowstep_004.jpg"]
    assert Path(row["image"]) == tmp_path / folder / "sd1.5_lowstep_004.jpg"
    assert (row["mos"], row["quality"], row["alignment"], row["std"]) == pytest.approx((0.8, 0.8, 3.2, 0.24))
    assert row["generator"] == "sd1.5_lowstep" and row["prompt"] == "a tray of sushi, number 4"


def test_targets_and_their_synonym(tmp_path):
    agiqa_3k(tmp_path)
    for target in ("alignment", "correspondence"):
        rated = read_rating_set("agiqa-3k", tmp_path, target=target)
        row = by_name(rated)["AttnGAN_normal_005.jpg"]
        assert rated.target == target and row["mos"] == row["alignment"] == 3.0 and row["std"] == 0.5
        assert row["quality"] == 1.0
    with pytest.raises(ValueError, match="agiqa-3k has no score for authenticity: expected quality or alignment"):
        read_rating_set("agiqa-3k", tmp_path, target="authenticity")


def test_split_by_prompt(tmp_path):
    """No prompt on two sides, however it is spelled; the seed alone decides."""
    rows = agiqa_3k(tmp_path)
    rows[1][1] = rows[1][1].upper().replace(" ", "  ")  # still the prompt of row 0
    write_table(tmp_path / "data.csv", [AGIQA_3K_HEADER, *rows])
    first, again = (read_rating_set("agiqa-3k", tmp_path, target="quality", split_seed=3) for _ in range(2))
    assert {split: len(rows) for split, rows in first.splits.items()} == {"train": 32, "validation": 4, "test": 4}
    sides = {split: {" ".join(p.lower().split()) for p in prompts} for split, prompts in prompts_of(first).items()}
    assert not sides["train"] & sides["validation"] and not (sides["train"] | sides["validation"]) & sides["test"]
    assert prompts_of(first) == prompts_of(again)
    other = read_rating_set("agiqa-3k", tmp_path, target="quality", split_seed=4)
    assert prompts_of(first) != prompts_of(other)


# --- AIGCIQA2023

GENERATORS = ["Controlnet", "DALLE", "Glide", "Lafite", "stable-diffusion", "Unidiffuser"]


def aigciqa2023(root, scores=".mat", images="Image/allimg", header=False):
    """Score n of aspect k is 20 + 10 k + n / 100, so that each says where it comes from."""
    prompts = [["Basic", "Animals", f"a corgi, {i}"] for i in range(100)]
    write_table(root / "AIGCIQA2023_Prompts.xlsx", ([["Style", "Object", "prompt"]] if header else []) + prompts)
    for aspect in (1, 2, 3):
        values = [20 + 10 * aspect + n / 100 for n in range(2400)]
        if scores == ".mat":
            for folder in ("MOS", "STD"):
                (root / "DATA" / folder).mkdir(parents=True, exist_ok=True)
            savemat(root / f"DATA/MOS/mosz{aspect}.mat", {"MOSz": [[value] for value in values]})
            savemat(root / f"DATA/STD/SD{aspect}.mat", {"SD": [[value / 10] for value in values]})
        else:
            (root / f"moz{aspect}.txt").write_text("\n".join(map(str, values)) + "\n")
    if images:
        write_images(root / images, [f"{n}.png" for n in range(2400)])
    else:
        for generator in GENERATORS:
            names = [f"{scene:03d}-{take}.png" for scene in range(100) for take in (1, 2, 3, 4)]
            write_images(root / "Image" / generator, names)


def test_aigciqa2023_classic_package(tmp_path):
    aigciqa2023(tmp_path)
    rated = read_rating_set("aigciqa2023", tmp_path, target="authenticity")
    found = by_name(rated)
    assert len(found) == 2400 and rated.scale == (0.0, 100.0)
    row = found["1623.png"]  # generator 4, image 23 of it: prompt 5, take 4
    assert row["generator"] == "stable-diffusion" and row["prompt"] == "a corgi, 5"
    assert (row["mos"], row["std"]) == pytest.approx((56.23, 5.623))
    assert (row["quality"], row["alignment"]) == pytest.approx((46.23, 66.23))
    assert [len(rated.splits[split]) for split in ("train", "validation", "test")] == [1920, 240, 240]
    # mosz1 is quality, although the released code of IPCE takes mosz2
    quality = by_name(read_rating_set("aigciqa2023", tmp_path, target="quality"))["0.png"]
    assert (quality["mos"], quality["std"]) == (30.0, 3.0)


def test_aigciqa2023_newer_package_and_folders_by_generator(tmp_path):
    aigciqa2023(tmp_path / "new", scores=".txt", images="allimg", header=True)
    row = by_name(read_rating_set("aigciqa2023", tmp_path / "new", target="alignment"))["2399.png"]
    assert row["mos"] == row["alignment"] == pytest.approx(73.99) and row["std"] is None
    assert row["generator"] == "Unidiffuser" and row["prompt"] == "a corgi, 99"

    aigciqa2023(tmp_path / "folders", images=None)
    rated = read_rating_set("aigciqa2023", tmp_path / "folders", target="correspondence")
    rows = {row["image"]: row for rows in rated.splits.values() for row in rows}
    row = rows[str(tmp_path / "folders/Image/DALLE/037-2.png")]
    assert row["mos"] == pytest.approx(50 + (400 + 37 * 4 + 1) / 100) and row["prompt"] == "a corgi, 37"


# --- AIGIQA-20K


def aigiqa_20k(root, suffix=".xlsx", header=True, rated=("train", "val", "test"), complete=False):
    tables = {"train": 12, "val": 3, "test": 4}
    everything, start = [], 0
    for split, number in tables.items():
        generators = ["LCM_Pixart", "DALLE2"]
        rows = [[f"{generators[i % 2]}_{i:04d}.png", f"a {i}, on a hill", i / 4] for i in range(start, start + number)]
        start += number
        everything += rows
        columns = 3 if split in rated else 2
        table = ([["name", "prompt", "mos"]] if header else []) + rows
        write_table(root / f"info_{split}{suffix}", [row[:columns] for row in table])
        write_images(root / split, [row[0] for row in rows])
    if complete:
        write_table(root / "data.csv", [["name", "prompt", "mos"], *everything])


@pytest.mark.parametrize("name", ["aigiqa-20k", "AIGCQA-30K-Image"])
@pytest.mark.parametrize("suffix", [".xlsx", ".csv"])
@pytest.mark.parametrize("header", [True, False])
def test_aigiqa_20k_official_split(tmp_path, name, suffix, header):
    aigiqa_20k(tmp_path, suffix, header)
    rated = read_rating_set(name, tmp_path, target="quality")
    assert [len(rated.splits[split]) for split in ("train", "validation", "test")] == [12, 3, 4]
    assert rated.drawn == () and rated.name == "aigiqa-20k"
    row = by_name(rated)["LCM_Pixart_0000.png"]  # a table without header loses no row
    assert (row["mos"], row["generator"], row["prompt"]) == (0.0, "LCM_Pixart", "a 0, on a hill")
    assert Path(by_name(rated)["LCM_Pixart_0014.png"]["image"]).parent.name == "val"


@pytest.mark.parametrize("header", [True, False])
def test_aigiqa_20k_as_the_challenge_published_it(tmp_path, header, caplog):
    """Validation and test without scores: looked up in data.csv, and without it taken out of train, by prompt."""
    aigiqa_20k(tmp_path, header=header, rated=("train",))
    rated = read_rating_set("aigiqa-20k", tmp_path, target="quality")
    assert rated.drawn == ("validation", "test") and "info_val.xlsx has no scores" in caplog.text
    assert [len(rated.splits[split]) for split in ("train", "validation", "test")] == [10, 1, 1]
    (tmp_path / "info_test.xlsx").unlink()
    assert read_rating_set("aigiqa-20k", tmp_path, target="quality").drawn == ("validation", "test")

    aigiqa_20k(tmp_path, header=header, rated=("train",), complete=True)
    rated = read_rating_set("aigiqa-20k", tmp_path, target="quality")
    assert rated.drawn == () and by_name(rated)["DALLE2_0013.png"]["mos"] == 3.25
    assert by_name(rated)["DALLE2_0013.png"]["split"] == "validation"


# --- a plain csv


def plain_csv(file, header=("image", "prompt", "mos"), rows=None):
    rows = rows or [[f"pictures/{i}.png", f"prompt {i // 2}", 1 + i / 4, 0.1, "mine"] for i in range(12)]
    write_table(file, [header, *(row[: len(header)] for row in rows)])
    write_images(file.parent / "pictures", [f"{i}.png" for i in range(12)])


def test_csv(tmp_path):
    plain_csv(tmp_path / "ratings.csv", ("Image", "prompt", "mos", "std", "generator"))
    rated = read_rating_set("csv", tmp_path / "ratings.csv", target="authenticity", scale=(1, 5))
    row = by_name(rated)["7.png"]
    assert (row["mos"], row["std"], row["generator"], row["quality"]) == (2.75, 0.1, "mine", None)
    assert [len(rated.splits[split]) for split in ("train", "validation", "test")] == [8, 2, 2]
    plain_csv(tmp_path / "ratings.csv")
    row = by_name(read_rating_set("csv", tmp_path / "ratings.csv", target="quality", scale=(1, 5)))["7.png"]
    assert (row["mos"], row["std"], row["generator"], row["quality"]) == (2.75, None, None, 2.75)
    assert row["reference"] is None


def test_a_csv_may_name_originals(tmp_path):
    """Paths from the csv's folder, one original of several images, none of some."""
    rows = [[f"pictures/{i}.png", f"prompt {i // 2}", 1 + i / 4, ["originals/a.png", ""][i % 2]] for i in range(12)]
    plain_csv(tmp_path / "ratings.csv", ("image", "prompt", "mos", "reference"), rows)
    write_images(tmp_path / "originals", ["a.png"])
    found = by_name(read_rating_set("csv", tmp_path / "ratings.csv", target="quality", scale=(1, 5)))
    assert found["6.png"]["reference"] == str(tmp_path / "originals/a.png") and found["7.png"]["reference"] is None
    (tmp_path / "originals/a.png").unlink()
    with pytest.raises(ValueError, match="row 2: expected reference .*originals/a.png, found none") as error:
        read_rating_set("csv", tmp_path / "ratings.csv", target="quality", scale=(1, 5))
    assert "\n" not in str(error.value)


# --- what is refused


def refusal(name, path, **arguments):
    with pytest.raises(ValueError) as error:
        read_rating_set(name, path, **({"target": "quality"} | arguments))
    message = str(error.value)
    assert "\n" not in message
    return message


def test_wrong_calls_are_refused(tmp_path):
    assert "expected one of agiqa-1k, agiqa-3k" in refusal("koniq", tmp_path)
    assert "expected a folder at" in refusal("agiqa-3k", tmp_path / "nothing")
    assert "expected a file at" in refusal("csv", tmp_path, scale=(0, 5))
    assert "csv, scale: expected its lowest and highest score, found None" in refusal("csv", tmp_path)
    assert "expected none, its scale is (0.0, 5.0)" in refusal("agiqa-3k", tmp_path, scale=(0, 5))
    assert "lowest score before the highest, found (5.0, 1.0)" in refusal("csv", tmp_path, scale=(5, 1))
    (tmp_path / "AGIQA-3K").mkdir()
    (tmp_path / "other.csv").write_text("")
    assert "expected data.csv, found AGIQA-3K/, other.csv" in refusal("agiqa-3k", tmp_path)


def bad_cell(row, column, value):
    def change(rows):
        rows[row - 2][column] = value

    return change


@pytest.mark.parametrize(
    "change, expected",
    [
        (bad_cell(3, 5, 7.5), "data.csv, row 3: expected a number from 0 to 5 for mos_quality, found '7.5'"),
        (bad_cell(4, 7, "high"), "data.csv, row 4: expected a number from 0 to 5 for mos_align, found 'high'"),
        (bad_cell(5, 5, "nan"), "data.csv, row 5: expected a number from 0 to 5 for mos_quality, found 'nan'"),
        (bad_cell(6, 6, -1), "data.csv, row 6: expected a number of at least 0 for std_quality, found '-1'"),
        (bad_cell(7, 5, ""), "data.csv, row 7: expected a number from 0 to 5 for mos_quality, found an empty cell"),
        (bad_cell(8, 1, " "), "data.csv, row 8: expected text for prompt, found an empty cell"),
        (bad_cell(2, 0, "gone.jpg"), "data.csv, row 2: expected image gone.jpg or AGIQA-3K/gone.jpg"),
        (bad_cell(9, 0, "gone.jpg"), "data.csv, row 9: expected image"),
        (bad_cell(9, 0, "AttnGAN_normal_001.jpg"), "data.csv, row 9: expected each image once"),
        (lambda rows: rows[2].append("a comma"), "data.csv, row 4: expected 9 cells, found 10"),
        (lambda rows: rows.clear(), "data.csv: expected rows below the header, found none"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, expected):
    rows = agiqa_3k(tmp_path)
    change(rows)
    write_table(tmp_path / "data.csv", [AGIQA_3K_HEADER, *rows])
    assert expected in refusal("agiqa-3k", tmp_path)


def test_broken_tables_are_named(tmp_path):
    rows = agiqa_3k(tmp_path)
    write_table(tmp_path / "data.csv", [[*AGIQA_3K_HEADER[:5], "mos"], *rows[:1]])
    assert "row 2: expected 6 cells, found 9" in refusal("agiqa-3k", tmp_path)
    write_table(tmp_path / "data.csv", [["name", "prompt", "mos"], ["a.jpg", "b", 3]])
    assert "row 1: expected columns name, prompt, mos_quality" in refusal("agiqa-3k", tmp_path)
    (tmp_path / "data.csv").write_text(",".join(AGIQA_3K_HEADER) + '\n"a.jpg" b,c\n')
    assert "data.csv, row 2: expected comma-separated values" in refusal("agiqa-3k", tmp_path)
    (tmp_path / "data.csv").write_bytes(b"name,prompt\nx.jpg,caf\xe9\n")
    assert "data.csv, after row" in refusal("agiqa-3k", tmp_path)
    assert "after row 1: expected UTF-8 text, found byte 0xe9" in refusal("agiqa-3k", tmp_path)
    (tmp_path / "data.csv").write_text(";".join(AGIQA_3K_HEADER) + "\na.jpg;a fox, asleep;3\n")
    assert "row 1: expected commas between the columns, found ';' in 'name;prompt" in refusal("agiqa-3k", tmp_path)
    (tmp_path / "data.csv").write_text("\n\n")
    assert "expected a table, found an empty file" in refusal("agiqa-3k", tmp_path)
    (tmp_path / "AIGC_MOS_Zscore.xlsx").write_bytes(b"no zip")
    assert "expected an .xlsx workbook" in refusal("agiqa-1k", tmp_path)


def test_too_few_prompts_to_split(tmp_path):
    plain_csv(tmp_path / "ratings.csv", rows=[[f"pictures/{i}.png", f"prompt {i % 2}", 3] for i in range(12)])
    assert "more than 2 prompts to split, found 2" in refusal("csv", tmp_path / "ratings.csv", scale=(1, 5))


def test_damaged_aigciqa2023(tmp_path):
    aigciqa2023(tmp_path, scores=".txt", images="allimg")
    scores = (tmp_path / "moz2.txt").read_text().split()
    (tmp_path / "moz2.txt").write_text("\n".join(scores[:-1]))
    assert "moz2.txt: expected 2400 scores, found 2399" in refusal("aigciqa2023", tmp_path)
    (tmp_path / "moz2.txt").write_text("\n".join([*scores[:6], "101", *scores[7:]]))
    assert "moz2.txt, row 7: expected a number from 0 to 100" in refusal("aigciqa2023", tmp_path)
    (tmp_path / "DATA" / "MOS").mkdir(parents=True)
    savemat(tmp_path / "DATA/MOS/mosz1.mat", {"MOS": [1.0]})
    assert "mosz1.mat: expected variable MOSz, found MOS" in refusal("aigciqa2023", tmp_path)
    (tmp_path / "DATA/MOS/mosz1.mat").write_bytes(b"MATLAB 7.3 is HDF5")
    assert "mosz1.mat: expected a MATLAB file up to version 7.2" in refusal("aigciqa2023", tmp_path)
    write_table(tmp_path / "AIGCIQA2023_Prompts.csv", [["style", "object", "a corgi"]])
    assert "AIGCIQA2023_Prompts.csv: expected 100 prompts, found 1" in refusal("aigciqa2023", tmp_path)


def test_damaged_aigiqa_20k(tmp_path):
    aigiqa_20k(tmp_path, rated=("train",), complete=True)
    write_table(tmp_path / "data.csv", [["name", "prompt", "mos"], ["DALLE2_0001.png", "a", 3]])
    assert "info_val.xlsx, row 2: expected a score of LCM_Pixart_0012.png in" in refusal("aigiqa-20k", tmp_path)
    (tmp_path / "info_train.xlsx").unlink()
    assert "expected info_train.csv or info_train.xlsx, found data.csv" in refusal("aigiqa-20k", tmp_path)
