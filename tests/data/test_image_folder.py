"""Folders of pictures in the forms people have them in: read, or refused in one line that says what to do."""

import json
import logging
import shutil

import datasets
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from acpo_utils.data import (
    CaptionedImages,
    check_images,
    load_captioned_images,
    load_unconditional_images,
    load_validation_images,
)
from acpo_utils.evaluation.manifest import ImageManifest
from acpo_utils.evaluation.real_images import read_real_images
from acpo_utils.evaluation.set_metrics import read_images
from acpo_utils.ratings.images import load_rated_images
from acpo_utils.ratings.sets import read_rating_set


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (number, 0, 0))


def red(dataset, column: str = "image") -> list[int]:
    """Which pictures they are, by `picture`'s number; every one of them is decoded."""
    rows = check_images(dataset, column).cast_column(column, datasets.Image())
    return [row[column].convert("RGB").getpixel((0, 0))[0] for row in rows]


def write_pictures(folder, numbers=range(3), names="{}.png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        picture(number).save(folder / names.format(number))
    return folder


def rows_of(numbers=range(3), **columns) -> list[dict]:
    return [{"file_name": f"{number}.png", "text": f"number {number}"} | columns for number in numbers]


def write_metadata(folder, rows, kind="jsonl"):
    file = folder / f"metadata.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        lines = [",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)]
        file.write_text("\n".join(lines) + "\n")
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


def refusal(function, *arguments, **options) -> str:
    with pytest.raises(ValueError) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def load(path, **options):
    return load_captioned_images(train_data_dir=str(path), **options)


# --- every form


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("named", [False, True], ids=["folder", "file"])
def test_metadata_of_every_kind_in_a_folder_or_by_its_path(tmp_path, kind, named):
    folder = write_pictures(tmp_path / "images", range(4))
    file = write_metadata(folder, list(reversed(rows_of(range(4), score=0.5))), kind)
    dataset = load(file if named else folder)
    assert red(dataset) == [3, 2, 1, 0] and dataset["text"][:] == [f"number {n}" for n in (3, 2, 1, 0)]
    assert dataset["score"][:] == [0.5] * 4
    assert red(load_unconditional_images(train_data_dir=str(file if named else folder))) == [3, 2, 1, 0]


def test_a_metadata_file_of_another_name(tmp_path):
    folder = write_pictures(tmp_path / "images")
    write_metadata(folder, rows_of([0]))
    write_metadata(folder, rows_of([2, 1])).rename(folder / "chosen.JSONL")
    write_metadata(folder, rows_of([0]))
    assert red(load(folder / "chosen.JSONL")) == [2, 1]


@pytest.mark.parametrize("ending", [".txt", ".TXT", ".caption"])
def test_captions_in_text_files_beside_the_pictures(tmp_path, ending):
    folder = write_pictures(tmp_path / "10_cat")
    write_pictures(folder / "more", [3], "{}.PNG")
    for number, name in enumerate(["0", "1", "2", "more/3"]):
        (folder / f"{name}{ending}").write_text(f"\ufeffa café,\r\nnumber {number}\n", encoding="utf-8")
    (folder / "readme.txt").write_text("")
    dataset = load(folder, caption_column="caption")
    assert dataset["caption"][:] == [f"a café, number {number}" for number in range(4)]
    assert red(dataset) == [0, 1, 2, 3]
    assert load_unconditional_images(train_data_dir=str(folder)).column_names == ["image"]


def test_a_txt_counts_before_a_caption_and_metadata_before_both(tmp_path):
    folder = write_pictures(tmp_path / "images", [0])
    (folder / "0.caption").write_text("second")
    assert load(folder)["text"][:] == ["second"]
    (folder / "0.txt").write_text("first")
    assert load(folder)["text"][:] == ["first"]
    write_metadata(folder, rows_of([0]))
    assert load(folder)["text"][:] == ["number 0"]


def saved(count: int = 3) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    columns = {"image": [picture(n) for n in range(count)], "text": [f"number {n}" for n in range(count)]}
    return datasets.Dataset.from_dict(columns, features=features)


def test_a_folder_of_save_to_disk(tmp_path):
    saved().with_format("torch").save_to_disk(tmp_path / "one")
    dataset = load(tmp_path / "one")
    assert red(dataset) == [0, 1, 2] and dataset["text"][:] == ["number 0", "number 1", "number 2"]
    assert [item["prompt"] for item in CaptionedImages(dataset, None, 8, num_samples=3)]
    datasets.DatasetDict({"train": saved(), "validation": saved(2)}).save_to_disk(tmp_path / "two [1]")
    assert red(load(tmp_path / "two [1]")) == [0, 1, 2]
    assert red(load_validation_images(str(tmp_path / "two [1]"), 5)) == [0, 1]
    message = refusal(load, tmp_path / "two [1]", split="test")
    assert "expected a split test, found train, validation" in message
    (tmp_path / "one" / "state.json").write_text("{")
    assert "one: a damaged folder of save_to_disk" in refusal(load, tmp_path / "one")


def test_pictures_of_a_second_column(tmp_path):
    folder = write_pictures(tmp_path / "images", range(4))
    rows = [{"file_name": f"{n}.png", "mask_file_name": f"{n + 2}.png", "text": "a", "image": "no"} for n in range(2)]
    write_metadata(folder, rows)
    assert red(load(folder, image_column="mask"), "mask") == [2, 3]
    assert red(load(folder)) == [0, 1], "and not the column of the same name"


def test_parquet_in_capitals(tmp_path):
    (tmp_path / "data").mkdir()
    saved().to_parquet(tmp_path / "data" / "train.PARQUET")
    assert red(load(tmp_path)) == red(load(tmp_path / "data" / "train.PARQUET")) == [0, 1, 2]


# --- a path is a path


FOLDERS = ["cats 1", "cats [1]", "what?*", "what a", "{a,b}", "[!c]"]


@pytest.fixture
def folders(tmp_path):
    """A folder for each of `FOLDERS`, with all kinds of data, whose pictures say which folder they lie in."""
    for number, name in enumerate(FOLDERS):
        folder = write_pictures(tmp_path / name / "images [0]", [number, number + 10])
        write_metadata(folder, rows_of([number, number + 10], mos=number))
        write_pictures(tmp_path / name / "plain", [number])
        write_pictures(tmp_path / name / "txt", [number])
        (tmp_path / name / "txt" / f"{number}.txt").write_text(name)
        saved(number + 1).to_parquet(tmp_path / name / "train.parquet")
    return tmp_path


@pytest.mark.parametrize("number", range(len(FOLDERS)))
def test_brackets_and_stars_in_a_path_are_letters(folders, number, monkeypatch):
    root = folders / FOLDERS[number]
    assert red(load(root / "images [0]")) == red(load(root / "images [0]" / "metadata.jsonl")) == [number, number + 10]
    assert load(root / "txt")["text"][:] == [FOLDERS[number]]
    assert red(load_unconditional_images(train_data_dir=str(root / "plain"))) == [number]
    assert red(load(root)) == red(load(root / "train.parquet")) == list(range(number + 1))
    assert red(load_validation_images(str(root / "images [0]"), 1)) == [number]
    real = read_real_images(str(root / "images [0]"), caption_column="text")
    assert red(real.dataset) == [number, number + 10]
    monkeypatch.chdir(root)  # relative paths, in a folder of such a name
    assert red(load("images [0]")) == [number, number + 10]
    assert red(load("train.parquet")) == list(range(number + 1))


def test_a_local_folder_as_dataset_name(folders):
    message = refusal(load_captioned_images, dataset_name=str(folders / "cats [1]"))
    assert "give a folder with [, * or ? in its path as --train_data_dir" in message
    assert red(
        load_captioned_images(
            dataset_name=str(folders / "cats 1" / "images [0]" / ".." / "plain"), caption_column=None
        )
    ) == [0]


def test_ratings_and_generated_images_in_such_folders(tmp_path):
    for folder in (tmp_path / "cats 1", tmp_path / "cats [1]"):
        write_pictures(folder, range(30))
        rows = [{"image": f"{n}.png", "prompt": f"p {n // 2}", "mos": n % 5} for n in range(30)]
        table = write_metadata(folder, rows, "csv").rename(folder / "ratings.csv")
        for split in read_rating_set("csv", table, scale=(0, 5)).splits.values():
            assert all(str(folder) in image for image in split["image"])
        write_metadata(folder, rows_of(range(30), mos=1) + rows_of(range(30), mos=2))
        rated = load_rated_images(str(folder), prompt_column="text")
        assert all(str(folder) in cell["path"] for split in rated.values() for cell in split["image"])
        manifest = ImageManifest(folder / "generated [2]")
        manifest.save("a.png", picture_tensor := next(iter(read_images([folder / "7.png"])))[0] / 255, {"seed": 1})
        ImageManifest(folder / "generated [2]").merge({"a.png": {"seed": 1}})
        assert picture_tensor.shape == (3, 8, 8) and ImageManifest(folder / "generated [2]").is_finished(
            "a.png", {"seed": 1}
        )


def test_ratings_saved_by_save_to_disk_and_as_parquet_in_capitals(tmp_path):
    rated = saved(30).remove_columns("text")
    rated = rated.add_column("prompt", [f"p {n // 2}" for n in range(30)]).add_column(
        "mos", [n % 5 for n in range(30)]
    )
    parts = datasets.DatasetDict({"train": rated, "test": rated.select(range(4))})
    parts.save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    for split, rows in parts.items():
        rows.to_parquet(tmp_path / "parquet" / f"{split}-0.PARQUET")
    for folder in ("saved", "parquet"):
        read = load_rated_images(str(tmp_path / folder))
        assert red(read["test"]) == [0, 1, 2, 3] and len(read["train"]) + len(read["validation"]) == 30


# --- links


def test_linked_folders_and_files_are_followed(tmp_path):
    write_pictures(tmp_path / "far" / "away", [1, 2])
    folder = write_pictures(tmp_path / "images", [0])
    (folder / "linked").symlink_to(tmp_path / "far", target_is_directory=True)
    (folder / "a.png").symlink_to(tmp_path / "far" / "away" / "2.png")
    assert red(load_unconditional_images(train_data_dir=str(folder))) == [0, 2, 1, 2]
    for number, name in enumerate(["0", "linked/away/1", "linked/away/2", "a"]):
        (folder / f"{name}.txt").write_text(str(number))
    assert load(folder)["text"][:] == ["0", "3", "1", "2"]
    write_metadata(tmp_path / "far" / "away", rows_of([2, 1]))
    assert red(load(folder)) == [2, 1], "metadata in a linked folder"
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    assert red(load(tmp_path / "link")) == [2, 1]


def test_a_loop_of_links_is_one_line(tmp_path):
    folder = write_pictures(tmp_path / "images" / "more")
    (folder / "again").symlink_to(tmp_path / "images", target_is_directory=True)
    message = refusal(load_unconditional_images, train_data_dir=str(tmp_path / "images"))
    assert str(folder / "again") in message and "around it: remove it" in message
    assert "--skip" not in message
    (folder / "again").unlink()
    (folder / "itself").symlink_to(folder / "itself")
    assert red(load_unconditional_images(train_data_dir=str(tmp_path / "images"))) == [0, 1, 2]


def test_a_link_to_nothing_is_named(tmp_path):
    folder = write_pictures(tmp_path / "images")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    message = refusal(check_images, load_unconditional_images(train_data_dir=str(folder)), "image")
    assert "1 of 4 images cannot be read" in message and "gone.png" in message


def test_hidden_files_and_folders_stay_out(tmp_path):
    folder = write_pictures(tmp_path / ".hidden" / "__images")
    write_pictures(folder / ".thumbnails")
    write_pictures(folder / "__MACOSX")
    write_pictures(folder, range(3), "._{}.png")
    assert red(load_unconditional_images(train_data_dir=str(folder))) == [0, 1, 2]


# --- words


WORDS = ["None", "NA", "null", "nan", "N/A", "n/a", "NULL", "7", "a cat"]


def test_captions_of_a_csv_are_words(tmp_path):
    folder = write_pictures(tmp_path / "images", range(len(WORDS)))
    rows = [{"file_name": f"{n}.png", "text": word, "note": word, "mos": n / 3} for n, word in enumerate(WORDS)]
    rows[2]["mos"] = "NA"
    write_metadata(folder, rows, "csv")
    dataset = load(folder)
    assert dataset["text"][:] == WORDS == dataset["note"][:]
    assert dataset["mos"][:] == [None if n == 2 else n / 3 for n in range(len(WORDS))]
    assert [item["prompt"] for item in CaptionedImages(dataset, None, 8, num_samples=20)].count("None") in (2, 3)
    write_metadata(folder, [{"file_name": "0.png", "text": "7"}, {"file_name": "1.png", "text": "007"}], "csv")
    assert load(folder)["text"][:] == ["7", "007"]


def test_an_empty_caption_of_a_csv_is_named(tmp_path):
    folder = write_pictures(tmp_path / "images")
    write_metadata(folder, [{"file_name": "0.png", "text": "a"}, {"file_name": "1.png", "text": ""}], "csv")
    message = refusal(load, folder)
    assert "1 of 2 rows are empty, the first: " in message and "metadata.csv, row 3" in message


# --- what is left out, and what is wrong


def test_pictures_that_the_metadata_leaves_out_are_counted(tmp_path, caplog):
    folder = write_pictures(tmp_path / "images", range(5))
    write_pictures(folder / "more", [6])
    write_metadata(folder, rows_of([1, 0]))
    with caplog.at_level(logging.WARNING):
        assert red(load(folder)) == [1, 0]
    assert [record.getMessage() for record in caplog.records] == [
        f"4 of 6 pictures in {folder} are left out, since the metadata does not name them, the first: {folder}/2.png"
    ]
    caplog.clear()
    (folder / "metadata.jsonl").unlink()
    (folder / "3.txt").write_text("three")
    assert red(load(folder)) == [3]
    assert "5 of 6 pictures" in caplog.text and "they have no .txt" in caplog.text
    caplog.clear()
    write_metadata(
        folder, [{"file_name": f"{n}.png", "text": "a"} for n in range(5)] + [{"file_name": "more/6.png", "text": "b"}]
    )
    load(folder)
    assert caplog.records == []


def test_an_empty_text_file_is_named(tmp_path):
    folder = write_pictures(tmp_path / "images")
    (folder / "1.txt").write_text(" \n")
    assert "1.txt: expected a caption, found an empty file" in refusal(load, folder)
    (folder / "1.txt").write_bytes("a café".encode("cp1252"))
    assert "1.txt: expected UTF-8 text, found byte 0xe9 in line 1" in refusal(load, folder)


def test_no_captions_at_all_says_where_they_are_read(tmp_path):
    message = refusal(load, write_pictures(tmp_path / "images"))
    assert "it has: image. Captions are read from a metadata.jsonl, .csv or .parquet, or from a .txt" in message


@pytest.mark.parametrize(
    "value",
    ["/abs/0.png", "C:\\pictures\\0.png", "../0.png", "a/../../0.png", "file:///etc/x.png", 3, ["0.png"], {"a": 1}],
)
def test_a_file_name_that_leads_elsewhere_is_named_with_its_row(tmp_path, value):
    folder = write_pictures(tmp_path / "images")
    write_metadata(folder, [*rows_of([0, 1]), {"file_name": value, "text": "a"}])
    message = refusal(load, folder)
    assert "metadata.jsonl, row 3: expected file_name to be a path from the file's own folder" in message
    assert repr(value) in message


@pytest.mark.parametrize("kind, row", [("jsonl", 3), ("csv", 4), ("parquet", 3)])
def test_a_file_that_is_missing_is_named_with_its_row(tmp_path, kind, row):
    folder = write_pictures(tmp_path / "images")
    file = write_metadata(
        folder, [*rows_of([0, 1]), {"file_name": "sub/nowhere.png", "text": "a"}, *rows_of([2])], kind
    )
    message = refusal(check_images, load(folder), "image")
    assert "1 of 4 images cannot be read, the first: " in message and "sub/nowhere.png" in message
    assert f"in {file}, row {row}. Repair or remove them, or pass --skip_bad_images." in message
    assert red(check_images(load(folder), "image", skip_bad_images=True)) == [0, 1, 2]


def test_backslashes_of_windows_are_slashes(tmp_path):
    write_pictures(tmp_path / "images" / "sub")
    write_metadata(tmp_path / "images", [{"file_name": "sub\\1.png", "text": "a"}])
    assert red(load(tmp_path / "images")) == [1]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("csv", "file_name;text\n0.png;a\n", "metadata.csv, line 1: expected commas between the columns, found semicolons"),
        ("csv", "file_name,text\n0.png,a\n1.png,a cat, asleep\n", "metadata.csv, row 3: expected 2 cells, found 3: put quotes"),
        ("csv", 'file_name,text\n0.png,"a\n1.png,b\n', "metadata.csv, row 2: expected a closing quote"),
        ("csv", "file_name,text\n0.png,caf\xe9\n".encode("cp1252"), "metadata.csv: expected UTF-8 text, found byte 0xe9 in line 2"),
        ("csv", "image,text\n0.png,a\n", "metadata.csv: expected file_name, the pictures' paths from its own folder, found image, text"),
        ("csv", "file_name,text\n", "metadata.csv: expected file_name"),
        ("jsonl", '{"file_name": "0.png", "text": "caf\xe9"}\n'.encode("cp1252"), "metadata.jsonl: expected UTF-8 text, found byte 0xe9"),
        ("jsonl", '{"file_name": "0.png", "text": "a"}\n{"file_name": \n', "metadata.jsonl, row 2: expected a JSON object"),
        ("jsonl", '["0.png"]\n', "metadata.jsonl, row 1: expected an object with file_name"),
        ("jsonl", '{"file_name": "0.png", "text": "a\\ud800"}\n', "metadata.jsonl, row 1: expected text for text, found 'a"),
        ("jsonl", '{"file": "0.png", "text": "a"}\n', "found file, text"),
        ("jsonl", "", "found no rows"),
        ("jsonl", '{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png", "text": 3}\n', "one kind in column text"),
        ("parquet", "no parquet", "metadata.parquet is damaged or no parquet file"),
    ],
)  # fmt: skip
def test_bad_metadata_is_named(tmp_path, name, content, message):
    folder = write_pictures(tmp_path / "images")
    (folder / f"metadata.{name}").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refusal(load, folder)
    assert message in refusal(load, folder / f"metadata.{name}")


def test_two_metadata_files_in_one_folder(tmp_path):
    folder = write_pictures(tmp_path / "images")
    for kind in ("csv", "jsonl"):
        write_metadata(folder, rows_of(), kind)
    assert "expected one metadata file in a folder, found metadata.jsonl too" in refusal(load, folder)
    assert red(load(folder / "metadata.csv")) == [0, 1, 2]
    (folder / "metadata.csv").unlink()
    shutil.copytree(folder, folder / "sub")
    assert red(load(folder)) == [0, 1, 2, 0, 1, 2], "one in each folder is fine, in the order of their paths"


@pytest.mark.parametrize(
    "name, message",
    [
        ("a.zip", "a.zip: expected a folder, found an archive: unpack it and name its folder"),
        ("a.tar.gz", "found an archive"),
        ("a.json", "found a file of ending .json: name the folder that holds the pictures"),
        ("0.png", "found a file of ending .png"),
        ("pictures", "found a file: name the folder"),
    ],
)
def test_other_files_are_named(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"PK\3\4")
    assert message in refusal(load, tmp_path / name)
    assert "--validation_data_dir" in refusal(load_validation_images, str(tmp_path / name), 2)


def test_a_folder_of_other_files_says_what_it_holds(tmp_path):
    for name in ("a.zip", "b.zip", "c.heic"):
        (tmp_path / name).write_bytes(b"PK\3\4")
    message = refusal(load, tmp_path)
    assert "found no pictures but 2 .zip, 1 .heic. Expected images with a metadata.jsonl" in message
    assert message.endswith("Unpack archives first.")


def test_the_fingerprint_changes_with_a_picture_and_with_a_caption(tmp_path):
    """By which latents that were kept are known to be of these data."""
    folder = write_pictures(tmp_path / "images")
    write_metadata(folder, rows_of())
    first = load(folder)._fingerprint
    assert load(folder)._fingerprint == first
    picture(9).save(folder / "1.png")
    second = load(folder)._fingerprint
    assert second != first
    write_metadata(folder, rows_of(score=1))
    assert load(folder)._fingerprint not in (first, second)


def test_rows_are_those_of_datasets_own_image_folder(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    names = [f"{'ab'[n % 2]}/{'Zz1'[n % 3]}{n}" for n in range(12)]
    for number, name in enumerate(names):
        write_pictures((folder / name).parent, [number], names[number].split("/")[1] + ".png")
    expected = datasets.load_dataset("imagefolder", data_files={"train": str(folder / "**")}, split="train")
    numbers = [row["image"].getpixel((0, 0))[0] for row in expected]
    assert red(load_unconditional_images(train_data_dir=str(folder))) == numbers and len(set(numbers)) == 12
    rows = [
        {"file_name": f"{names[n]}.png", "text": f"number {n}", "mos": float(rng.random())}
        for n in rng.permutation(12)
    ]
    for kind in ("jsonl", "csv", "parquet"):
        file = write_metadata(folder, rows, kind)
        expected = datasets.load_dataset("imagefolder", data_files={"train": str(folder / "**")}, split="train")
        found = load(folder)
        assert found.column_names == expected.column_names == ["image", "text", "mos"]
        assert red(found) == [row["image"].getpixel((0, 0))[0] for row in expected]
        assert [found[name][:] for name in ("text", "mos")] == [expected[name][:] for name in ("text", "mos")]
        file.unlink()
