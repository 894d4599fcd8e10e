import pytest
import torch
from torchvision.utils import save_image

from acpo_utils.evaluation.denoising_error import pipeline_denoising_error, prediction_drift
from acpo_utils.randomness import step_generator


@pytest.fixture
def pipeline(tiny_pipeline):
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v"]))
    return pipeline


def test_drift_is_exactly_zero_at_lora_initialisation_and_grows_with_the_lora(pipeline):
    images, prompts = torch.rand(3, 3, 32, 32), ["a red wall", "a blue wall", "a"]
    assert prediction_drift(pipeline, images, prompts).tolist() == [0, 0, 0]
    lora_b = [p for name, p in pipeline.unet.named_parameters() if "lora_B" in name]
    torch.nn.init.normal_(lora_b[0])
    once = prediction_drift(pipeline, images, prompts, seed=1)
    assert torch.allclose(once, prediction_drift(pipeline, images, prompts, seed=1, batch_size=2))
    with torch.no_grad():
        lora_b[0].mul_(3)
    assert (prediction_drift(pipeline, images, prompts, seed=1) > once).all() and (once > 0).all()


def test_drift_against_the_formula(pipeline):
    """Both predictions by hand at the ten timesteps 50, 150, ... 950, in float64."""
    for name, p in pipeline.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    image, unet, vae = torch.rand(1, 3, 32, 32), pipeline.unet, pipeline.vae
    abar = pipeline.scheduler.alphas_cumprod.double()
    expected = 0.0
    with torch.no_grad():
        x0 = vae.encode(image * 2 - 1).latent_dist.mean * vae.config.scaling_factor
        c = pipeline.encode_prompt(["a wall"], "cpu", 1, False)[0]
        for k, t in enumerate(range(50, 1000, 100)):
            noise = torch.randn(x0.shape[1:], generator=step_generator(5, 0, k))
            z = (abar[t].sqrt() * x0 + (1 - abar[t]).sqrt() * noise).float()
            tuned = unet(z, torch.tensor([t]), c).sample.double()
            unet.disable_adapters()
            expected += (tuned - unet(z, torch.tensor([t]), c).sample.double()).square().mean().item() / 10
            unet.enable_adapters()
    assert prediction_drift(pipeline, image, ["a wall"], seed=5).item() == pytest.approx(expected, rel=1e-4)


def test_a_vae_with_a_shift_gives_the_u_net_the_same_latents(pipeline, tmp_path):
    """Latents that the VAE shifts by a number, and its configuration shifts back: drift and error do not change."""
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    images, prompts = torch.rand(2, 3, 32, 32), ["a red wall", "a blue wall"]
    files = [tmp_path / f"{number}.png" for number in range(2)]
    for image, file in zip(images, files):
        save_image(image, file)

    def measured():
        return prediction_drift(pipeline, images, prompts), pipeline_denoising_error(pipeline, files, prompts)

    plain = measured()
    with torch.no_grad():
        pipeline.vae.quant_conv.bias[:4] += 0.7  # of the posterior's mean
    assert not torch.allclose(measured()[0], plain[0]) and not torch.allclose(measured()[1], plain[1])
    pipeline.vae.register_to_config(shift_factor=0.7)
    for shifted, expected in zip(measured(), plain):
        torch.testing.assert_close(shifted, expected, rtol=1e-4, atol=1e-6)
