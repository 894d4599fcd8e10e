"""Captioned images: item n is a function of (seed, n), every image mode is read, every bad input is named."""

import io
import json
import logging
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from acpo_utils.data import (
    CaptionedImages,
    Prompts,
    check_images,
    collate,
    load_captioned_images,
    read_prompts,
    to_rgb,
    tokenize,
)
from tests.tiny_models import tiny_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def picture(number: int, size=(20, 16)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_folder(folder, count: int = 7, **changes):
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        picture(number).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"number {number}", "score": number / 10} | changes)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_parquet(path, count: int = 5):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"image": [picture(number) for number in range(count)], "text": [f"number {n}" for n in range(count)]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


@pytest.fixture
def dataset(tmp_path):
    return load_captioned_images(train_data_dir=str(write_folder(tmp_path / "images")))


def test_image_folder_parquet_and_data_set_name_are_read_alike(tmp_path):
    write_folder(tmp_path / "images", count=5)
    write_parquet(tmp_path / "parquet" / "train.parquet")
    write_parquet(tmp_path / "parquet" / "validation.parquet", count=2)
    write_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    sources = [
        {"train_data_dir": str(tmp_path / "images")},
        {"train_data_dir": str(tmp_path / "parquet")},
        {"train_data_dir": str(tmp_path / "parquet" / "train.parquet")},
        {"train_data_dir": str(tmp_path / "hub")},
        {"dataset_name": str(tmp_path / "hub")},
    ]
    for source in sources:
        stream = CaptionedImages(load_captioned_images(**source), None, resolution=16, num_samples=5, center_crop=True)
        items = {item["prompt"]: item["pixel_values"] for item in stream}
        assert sorted(items) == [f"number {n}" for n in range(5)]
        expected = np.asarray(picture(3).crop((2, 0, 18, 16))).transpose(2, 0, 1) / 127.5 - 1
        np.testing.assert_allclose(items["number 3"].numpy(), expected, atol=1e-6)
    assert len(load_captioned_images(train_data_dir=str(tmp_path / "parquet"), split="validation")) == 2


def test_item_depends_on_seed_and_number_alone(dataset, tokenizer):
    def stream(seed=3):
        return CaptionedImages(dataset, tokenizer, 8, num_samples=40, seed=seed, random_flip=True)

    forward = [stream()[n] for n in range(40)]
    same = stream()
    for n in reversed(range(40)):  # another order of access, another epoch in between
        assert same[n]["prompt"] == forward[n]["prompt"]
        assert torch.equal(same[n]["pixel_values"], forward[n]["pixel_values"])
        assert torch.equal(same[n]["input_ids"], forward[n]["input_ids"])
    assert [item["prompt"] for item in stream(seed=4)] != [item["prompt"] for item in forward]
    with pytest.raises(IndexError):
        stream()[40]

    loader = torch.utils.data.DataLoader(stream(), batch_size=4, collate_fn=collate, num_workers=2)
    for number, batch in enumerate(loader):  # worker processes draw the same
        assert batch["prompts"] == [item["prompt"] for item in forward[4 * number : 4 * number + 4]]
        assert torch.equal(batch["pixel_values"][1], forward[4 * number + 1]["pixel_values"])


def test_epochs_are_different_permutations_and_augmentation_varies(dataset):
    stream = CaptionedImages(dataset, None, 8, num_samples=21, random_flip=True)
    items = list(stream)
    epochs = [[item["prompt"] for item in items[start : start + 7]] for start in (0, 7, 14)]
    assert all(sorted(epoch) == [f"number {n}" for n in range(7)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    views = [item["pixel_values"] for item in items if item["prompt"] == "number 0"]
    assert not torch.equal(views[0], views[1]) and not torch.equal(views[1], views[2])


def test_flip_mirrors_about_half_of_the_items_and_crops_reach_both_edges(tmp_path):
    wide = Image.fromarray(np.tile(np.arange(24, dtype=np.uint8) * 10, (16, 1))).convert("RGB")
    folder = tmp_path / "images"
    folder.mkdir()
    wide.save(folder / "wide.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "wide.png", "text": "wide"}\n')
    dataset = load_captioned_images(train_data_dir=str(folder))
    rows = [item["pixel_values"][0, 0] for item in CaptionedImages(dataset, None, 16, 200, random_flip=True)]
    flipped = [bool(row[0] > row[-1]) for row in rows]
    assert 70 < sum(flipped) < 130
    left = {round(float(row.min() + 1) * 127.5 / 10) for row in rows}
    assert left == set(range(9))


def test_value_range_and_shapes(dataset, tokenizer):
    for resolution in (8, 16, 24):  # down, as it is, up
        batch = collate([CaptionedImages(dataset, tokenizer, resolution, num_samples=9)[n] for n in (0, 8)])
        assert batch["pixel_values"].shape == (2, 3, resolution, resolution)
        assert batch["pixel_values"].dtype == torch.float32
        assert -1 <= batch["pixel_values"].min() < -0.5 and 0.5 < batch["pixel_values"].max() <= 1
        assert batch["input_ids"].shape == (2, 16) and batch["input_ids"].dtype == torch.int64
    assert "input_ids" not in collate([CaptionedImages(dataset, None, 8, num_samples=1)[0]])


def test_resize_keeps_the_mean_of_a_fine_pattern(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    pattern = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(pattern).save(folder / "fine.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "fine.png", "text": "fine"}\n')
    item = CaptionedImages(load_captioned_images(train_data_dir=str(folder)), None, 16, 1)[0]
    assert item["pixel_values"].abs().max() < 0.1  # without antialiasing it would be all -1 or all 1


def test_a_list_of_captions_gives_one_of_them(tmp_path):
    folder = write_folder(tmp_path / "images", count=2, text=["one", "two", "three"])
    stream = CaptionedImages(load_captioned_images(train_data_dir=str(folder)), None, 8, num_samples=40)
    prompts = [item["prompt"] for item in stream]
    assert set(prompts) == {"one", "two", "three"}
    assert prompts == [item["prompt"] for item in stream]


def test_max_train_samples_is_a_random_subset_chosen_by_the_seed(tmp_path):
    folder = str(write_folder(tmp_path / "images", count=12))
    first = load_captioned_images(train_data_dir=folder, max_train_samples=4, seed=0)["text"][:]
    assert len(first) == 4 == len(set(first))
    assert first == load_captioned_images(train_data_dir=folder, max_train_samples=4, seed=0)["text"][:]
    assert first != load_captioned_images(train_data_dir=folder, max_train_samples=4, seed=1)["text"][:]
    assert len(load_captioned_images(train_data_dir=folder, max_train_samples=99)) == 12


def saved(image: Image.Image, format: str = "PNG", **options) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    return saved(image, transparency=0)


@pytest.mark.parametrize(
    "image, top_left, bottom_right",
    [
        (saved(Image.new("L", (4, 4), 77)), (77, 77, 77), (77, 77, 77)),
        (saved(Image.new("1", (4, 4), 1)), (255, 255, 255), (255, 255, 255)),
        (saved(Image.new("RGBA", (4, 4), (0, 0, 200, 0))), (255, 255, 255), (255, 255, 255)),
        (saved(Image.new("RGBA", (4, 4), (0, 0, 200, 255))), (0, 0, 200), (0, 0, 200)),
        (saved(Image.new("LA", (4, 4), (0, 51))), (204, 204, 204), (204, 204, 204)),
        (palette_with_transparency(), (255, 255, 255), (0, 0, 255)),
        (saved(Image.fromarray(np.full((4, 4), 128 * 257, np.uint16))), (128, 128, 128), (128, 128, 128)),
        (saved(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), (255, 0, 0), (255, 0, 0)),
    ],
    ids=["grey", "bilevel", "transparent", "opaque", "half", "palette", "16bit", "cmyk"],
)
def test_every_image_mode_becomes_rgb(image, top_left, bottom_right):
    image = to_rgb(image)
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == top_left and image.getpixel((3, 3)) == bottom_right


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    assert to_rgb(saved(image, "JPEG", exif=exif)).size == (4, 6)


def test_long_caption_is_truncated_and_told_once(tmp_path, tokenizer, caplog):
    folder = write_folder(tmp_path / "images", count=3, text="a caption of far more than sixteen tokens")
    with caplog.at_level(logging.WARNING):
        stream = CaptionedImages(load_captioned_images(train_data_dir=str(folder)), tokenizer, 8, num_samples=9)
        items = list(stream)
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "3 of 3 captions are longer than the tokenizer's limit of 16 tokens and are truncated"
    ]
    assert all(item["input_ids"].shape == (16,) for item in items)
    assert items[0]["input_ids"][-1] == tokenizer.eos_token_id


def test_caption_that_just_fits_gives_no_warning(tmp_path, tokenizer, caplog):
    folder = write_folder(tmp_path / "images", count=1, text="abcdefghijklmn")  # 14 letters + start and end = 16
    with caplog.at_level(logging.WARNING):
        CaptionedImages(load_captioned_images(train_data_dir=str(folder)), tokenizer, 8, num_samples=1)
    assert caplog.records == []
    assert tokenize(tokenizer, ["abcdefghijklmn", "ab"]).shape == (2, 16)


def one_line(function, *arguments, **options) -> str:
    with pytest.raises(ValueError) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_sources_are_one_line_errors(tmp_path):
    folder = str(write_folder(tmp_path / "images"))
    assert "found neither" in one_line(load_captioned_images)
    assert "found both" in one_line(load_captioned_images, dataset_name="x/y", train_data_dir=folder)
    assert "expected a folder" in one_line(load_captioned_images, train_data_dir=str(tmp_path / "nowhere"))
    assert "x/y" in one_line(load_captioned_images, dataset_name="x/y")
    (tmp_path / "empty").mkdir()
    assert "Expected images" in one_line(load_captioned_images, train_data_dir=str(tmp_path / "empty"))
    message = one_line(load_captioned_images, train_data_dir=folder, caption_column="caption")
    assert "--caption_column caption" in message and "image, text, score" in message
    message = one_line(load_captioned_images, train_data_dir=folder, image_column="picture")
    assert "--image_column picture" in message and "image, text, score" in message
    assert "found string" in one_line(load_captioned_images, train_data_dir=folder, image_column="text")
    assert "found float64" in one_line(load_captioned_images, train_data_dir=folder, caption_column="score")
    write_parquet(file := tmp_path / "parquet" / "train.parquet")
    parquet.ParquetWriter(file, parquet.read_schema(file)).close()  # datasets 4 cannot write what has no rows
    assert "it is empty" in one_line(load_captioned_images, train_data_dir=str(tmp_path / "parquet"))
    message = one_line(load_captioned_images, train_data_dir=str(tmp_path / "parquet"), split="test")
    assert "test.parquet" in message and "found train.parquet" in message


def test_bad_metadata_is_a_one_line_error(tmp_path):
    folder = write_folder(tmp_path / "malformed")
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": \n')
    assert "malformed" in one_line(load_captioned_images, train_data_dir=str(folder))
    folder = write_folder(tmp_path / "missing")
    (folder / "3.png").unlink()
    assert "3.png" in one_line(check_images, load_captioned_images(train_data_dir=str(folder)), "image")
    folder = write_folder(tmp_path / "null", text=None)
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "0.png", "text": "only one", "score": 0.5}\n')
    assert "7 of 8 rows are empty" in one_line(load_captioned_images, train_data_dir=str(folder))


def test_unreadable_images_are_named_or_skipped(tmp_path, caplog):
    folder = write_folder(tmp_path / "images")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:200])  # opens, but does not decode
    (folder / "5.png").write_text("not an image")
    dataset = load_captioned_images(train_data_dir=str(folder))
    message = one_line(check_images, dataset, "image")
    assert "2 of 7 images" in message and "2.png" in message and "--skip_bad_images" in message
    with caplog.at_level(logging.WARNING):
        kept = check_images(dataset, "image", skip_bad_images=True)
    assert kept["text"][:] == [f"number {n}" for n in (0, 1, 3, 4, 6)]
    assert "Skipped 2 of 7 images" in caplog.text and "2.png" in caplog.text
    assert len(list(CaptionedImages(kept, None, 8, num_samples=10))) == 10

    for file in folder.glob("*.png"):
        file.write_text("not an image")
    shutil.copytree(folder, tmp_path / "all_bad")
    dataset = load_captioned_images(train_data_dir=str(tmp_path / "all_bad"))
    assert "None of the 7 images" in one_line(check_images, dataset, "image", skip_bad_images=True)


@pytest.mark.parametrize(
    "name, text",
    [
        ("prompts.txt", "a fox\n\n  two words \n"),
        ("prompts.csv", 'id,prompt\n1,a fox\n2,"two words"\n'),
        ("prompts.tsv", "Prompt\tCategory\na fox\tAnimals\ntwo words\tAbstract\n"),
        ("prompts.jsonl", '{"text": "a fox"}\n\n{"text": "two words"}\n'),
    ],
)
def test_prompt_files(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path / name) == ["a fox", "two words"]


def test_prompts_of_a_parquet_file_beside_images(tmp_path):
    write_parquet(tmp_path / "split.parquet", count=3)
    assert read_prompts(tmp_path / "split.parquet") == ["number 0", "number 1", "number 2"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("empty.txt", b"\n \n", "empty.txt is empty"),
        ("bytes.txt", b"a fox\n\xff\xfe", "bytes.txt: expected UTF-8"),
        ("wrong.csv", b"id,caption\n1,a fox\n", "wrong.csv, row 1: expected text in column `prompt` or `text`"),
        ("blank.csv", b"prompt\na fox\n\"\"\n", "blank.csv, row 2"),
        ("broken.jsonl", b'{"prompt": "a fox"}\n{"prompt": \n', "broken.jsonl, row 2: expected a JSON object"),
        ("half.parquet", b"PAR1 and no more", "half.parquet is damaged"),
        ("list.jsonl", b'["a fox"]\n', "list.jsonl, row 1"),
    ],
)  # fmt: skip
def test_bad_prompt_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in one_line(read_prompts, tmp_path / name)
    assert "not found" in one_line(read_prompts, tmp_path / "nowhere.txt")


def test_prompts_are_an_endless_stream_of_permutations(tokenizer):
    prompts = ["a fox", "an owl", "a tree"]
    stream = Prompts(prompts, tokenizer, num_samples=9, seed=1)
    drawn = [stream[n]["prompt"] for n in range(9)]
    assert [sorted(drawn[k : k + 3]) for k in (0, 3, 6)] == [sorted(prompts)] * 3
    assert stream[7]["prompt"] == Prompts(prompts, tokenizer, num_samples=8, seed=1)[7]["prompt"]
    assert len(set(map(tuple, (drawn[:3], drawn[3:6], drawn[6:])))) > 1
    with pytest.raises(IndexError):
        stream[9]
