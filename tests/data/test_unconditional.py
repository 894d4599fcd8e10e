"""Images without captions: any column, any mode, and the same item n whatever was read before."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from acpo_utils.data import (
    UnconditionalImages,
    check_images,
    hold_out,
    load_unconditional_images,
    load_validation_images,
    to_tensor,
)
from tests.tiny_images import pictures


def parquet(path, columns: dict) -> str:
    """A parquet file; columns of PIL images become image columns, others text."""
    is_image = {name: isinstance(values[0], Image.Image) for name, values in columns.items()}
    features = Features({name: ImageFeature() if is_image[name] else Value("string") for name in columns})
    Dataset.from_dict(columns, features=features).to_parquet(path)
    return str(path)


def plain(colour, mode="RGB", size=(8, 8)) -> Image.Image:
    return Image.new(mode, size, colour)


@pytest.mark.parametrize("column", ["image", "img", "picture"])
def test_the_column_is_found_or_named(tmp_path, column):
    """CIFAR-10 says "img" and has labels; whatever it was called, one column "image" comes back."""
    file = parquet(tmp_path / "train.parquet", {column: [plain("red"), plain("blue")], "label": ["0", "1"]})
    if column == "picture":
        with pytest.raises(ValueError, match="--image_column image: .* has no such column, it has: picture, label"):
            load_unconditional_images(train_data_dir=file)
    dataset = load_unconditional_images(train_data_dir=file, image_column=column if column == "picture" else None)
    assert dataset.column_names == ["image"] and len(dataset) == 2
    pixels = UnconditionalImages(dataset, 8, num_samples=2)[0]["pixel_values"]
    assert sorted(pixels.amax((1, 2)).tolist()) == [-1, -1, 1]


def test_image_wins_over_img_and_text_is_refused(tmp_path):
    both = parquet(tmp_path / "both.parquet", {"img": [plain("red")], "image": [plain("blue")]})
    dataset = load_unconditional_images(train_data_dir=both)
    assert to_tensor(dataset, 8)[0, :, 0, 0].tolist() == [0, 0, 1]
    text = parquet(tmp_path / "text.parquet", {"image": ["not an image"]})
    with pytest.raises(ValueError, match="expected images, found string"):
        load_unconditional_images(train_data_dir=text)


def test_grayscale_alpha_and_palette_become_rgb(tmp_path):
    """Alpha on white: the clear half is white, the opaque half keeps its colour."""
    alpha = plain((0, 128, 0, 255), "RGBA")
    alpha.paste((0, 0, 0, 0), (0, 0, 4, 8))
    palette = plain("red").convert("P", palette=Image.Palette.ADAPTIVE)
    for i, image in enumerate([plain(51, "L"), alpha, palette, plain(51 * 257, "I;16")]):
        image.save(tmp_path / f"{i}.png")
    images = to_tensor(load_unconditional_images(train_data_dir=str(tmp_path)), 8)  # (4, 3, 8, 8)
    expected = torch.tensor([[0.2, 0.2, 0.2], [0, 128 / 255, 0], [1, 0, 0], [0.2, 0.2, 0.2]])
    assert torch.allclose(images[:, :, 4, 6], expected, atol=1e-6)
    assert torch.equal(images[1, :, :, :4], torch.ones(3, 8, 4))


@pytest.mark.parametrize("resolution", [16, 32, 64])
def test_resize_and_crop(tmp_path, resolution):
    """A picture twice as wide as high: scaled by its height, then a square; centred, or anywhere."""
    (tmp_path / "images").mkdir()
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[..., 0] = np.arange(64) * 4  # red grows from left to right
    Image.fromarray(wide).save(tmp_path / "images" / "a.png")
    dataset = load_unconditional_images(train_data_dir=str(tmp_path / "images"))
    centre = UnconditionalImages(dataset, resolution, 8, center_crop=True)[0]["pixel_values"]
    assert centre.shape == (3, resolution, resolution) and centre.dtype == torch.float32
    assert centre[0].mean().item() == pytest.approx(126 / 127.5 - 1, abs=0.01), "the middle of the ramp"
    anywhere = UnconditionalImages(dataset, resolution, 40, random_flip=True)
    means = {round(anywhere[n]["pixel_values"][0].mean().item(), 2) for n in range(40)}
    assert len(means) > 8
    slopes = {(anywhere[n]["pixel_values"][0, 0].diff().mean() > 0).item() for n in range(40)}
    assert slopes == {True, False}, "some are mirrored"


def test_item_n_depends_on_the_seed_and_n_alone(tmp_path):
    dataset = load_unconditional_images(train_data_dir=pictures(tmp_path / "images", 5))
    build = lambda seed=0, num_samples=20: UnconditionalImages(dataset, 32, num_samples, seed, random_flip=True)  # noqa: E731
    first, again = build(), build(num_samples=13)
    assert torch.equal(first[12]["pixel_values"], again[12]["pixel_values"]), "without the twelve before it"
    assert any(not torch.equal(first[n]["pixel_values"], build(seed=1)[n]["pixel_values"]) for n in range(5))
    whole = [to_tensor(dataset.select([row]), 32)[0].mean((1, 2)) for row in range(5)]
    for epoch in range(2):
        seen = [first[5 * epoch + n]["pixel_values"].mean((1, 2)) / 2 + 0.5 for n in range(5)]
        nearest = {min(range(5), key=lambda row: (mean - whole[row]).abs().sum().item()) for mean in seen}
        assert nearest == set(range(5)), "every epoch has every image once"
    with pytest.raises(IndexError):
        first[20]


def test_a_corrupt_image_is_named(tmp_path):
    folder = pictures(tmp_path / "images", 4)
    whole = (tmp_path / "images" / "02.png").read_bytes()
    (tmp_path / "images" / "02.png").write_bytes(whole[: len(whole) // 2])
    dataset = load_unconditional_images(train_data_dir=folder)
    with pytest.raises(ValueError, match=r"1 of 4 images cannot be read, the first: .*02\.png"):
        check_images(dataset, "image")
    assert len(check_images(dataset, "image", skip_bad_images=True)) == 3


def test_held_out_images_are_the_last_or_those_of_another_folder(tmp_path):
    dataset = load_unconditional_images(train_data_dir=pictures(tmp_path / "images", 6))
    train, held_out = hold_out(dataset, 2)
    names = [[row["image"]["path"][-6:] for row in part] for part in (train, held_out)]
    assert names == [[f"0{i}.png" for i in range(4)], ["04.png", "05.png"]]
    with pytest.raises(ValueError, match="6 of 6 images leaves none"):
        hold_out(dataset, 6)
    other = load_validation_images(pictures(tmp_path / "other", 3), 2)
    images = to_tensor(other, 16)
    assert images.shape == (2, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    with pytest.raises(ValueError, match="--validation_data_dir .*nowhere: expected a folder"):
        load_validation_images(str(tmp_path / "nowhere"), 2)
