import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from acpo_utils.evaluation.denoising_error import MSE_TIMESTEPS, pipeline_denoising_error
from acpo_utils.evaluation.set_metrics import fid, image_features, inception, inception_score, read_images


def test_fid_against_the_distance_of_two_known_gaussians():
    """FID = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^0.5); for diagonal covariances the last term is elementwise."""
    pytest.importorskip("torchmetrics")
    rng = torch.Generator().manual_seed(0)

    def features(mean, std, n=200):
        x = torch.randn(n, 3, generator=rng, dtype=torch.float64)
        x = x - x.mean(0)
        x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1)).T)  # covariance exactly 1
        return x * torch.tensor(std, dtype=torch.float64) + torch.tensor(mean, dtype=torch.float64)

    first, second = features([0.0, 1.0, 2.0], [1.0, 2.0, 3.0]), features([1.0, 1.0, 0.0], [2.0, 2.0, 1.0])
    assert fid(first, second) == pytest.approx(1 + 4 + (1 - 2) ** 2 + (3 - 1) ** 2, abs=1e-4)
    assert fid(first, first) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match=r"found \(200, 3\) and \(1, 3\)"):
        fid(first, first[:1])


def test_inception_score_at_both_ends():
    pytest.importorskip("torchmetrics")
    sure = 100 * torch.eye(5).repeat(20, 1)  # each class equally often, every image certain of its class
    assert 3.5 < inception_score(sure) <= 5 and inception_score(sure, splits=1) == pytest.approx(5)
    assert inception_score(torch.zeros(100, 5)) == pytest.approx(1)
    state = torch.random.get_rng_state()
    assert inception_score(sure, seed=1) == inception_score(sure, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(ValueError, match="at least 10 images.*found 9"):
        inception_score(torch.zeros(9, 5))


def test_inception_without_its_package_says_how_to_get_it():
    if importlib.util.find_spec("torch_fidelity"):
        pytest.skip("torch-fidelity is installed")
    with pytest.raises(ImportError, match="pip install torchmetrics torch-fidelity"):
        inception("2048", "cpu")


def test_images_are_read_in_order_as_bytes(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for file, image in zip(files, pixels):
        Image.fromarray(image).save(file)
    batches = list(read_images(files, batch_size=2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat(batches), torch.from_numpy(pixels).permute(0, 3, 1, 2))
    features = image_features(lambda batch: batch.float().mean((2, 3)), files, "cpu", batch_size=3)
    assert np.allclose(features.numpy(), pixels.mean((1, 2)), atol=1e-4)

    Image.fromarray(pixels[0][:2]).save(files[1])
    with pytest.raises(ValueError, match="1.png: expected 6 x 4 pixels"):
        list(read_images(files))
    files[0].write_bytes(b"no image")
    with pytest.raises(ValueError, match="0.png cannot be read"):
        list(read_images(files))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_error_of_a_model_that_predicts_zero_is_the_mean_square_of_its_target(prediction_type, tmp_path):
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    from acpo_utils.losses import diffusion_target
    from acpo_utils.randomness import step_generator

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    torch.nn.init.zeros_(unet.conv_out.weight), torch.nn.init.zeros_(unet.conv_out.bias)
    pipeline = DDIMPipeline(unet, DDIMScheduler(prediction_type=prediction_type))
    images = torch.randint(256, (3, 8, 8, 3), dtype=torch.uint8)
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file, image in zip(files, images):
        Image.fromarray(image.numpy()).save(file)
    errors = pipeline_denoising_error(pipeline, files, None, seed=5, batch_size=2)

    scheduler = DDIMScheduler(prediction_type=prediction_type)
    x0, total = images[1:2].permute(0, 3, 1, 2) / 127.5 - 1, 0.0
    for k in range(MSE_TIMESTEPS):
        noise = torch.randn(3, 8, 8, generator=step_generator(5, 1, k))[None]
        timesteps = torch.tensor([int((k + 0.5) * 1000 / MSE_TIMESTEPS)])
        total += diffusion_target(scheduler, x0, noise, timesteps).square().mean().item()
    assert errors.shape == (3,) and errors[1].item() == pytest.approx(total / MSE_TIMESTEPS, rel=1e-5)
    alone = pipeline_denoising_error(pipeline, files, None, seed=5, batch_size=3)
    assert torch.allclose(errors, alone, atol=1e-6), "whatever the batch size"
    seeded = pipeline_denoising_error(pipeline, files, None, seed=6)
    assert torch.allclose(errors, seeded, atol=1e-6) == (prediction_type == "sample"), "its target has no noise in it"
