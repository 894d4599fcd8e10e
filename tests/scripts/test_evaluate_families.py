"""The evaluation of the families beside Stable Diffusion 1 and DDPM: their own pipelines, LoRAs and denoising errors."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import save_image

from acpo_utils.evaluation import models
from acpo_utils.evaluation.denoising_error import MSE_TIMESTEPS, fixed_noise, pipeline_denoising_error
from acpo_utils.evaluation.sampling import image_tensor
from acpo_utils.families.latents import scale_latents
from acpo_utils.families.loading import DTYPE, denoiser
from acpo_utils.lora import save_lora
from acpo_utils.randomness import step_generator
from tests.launching import EXAMPLES, command_line, refused, run_script


SCRIPT = EXAMPLES / "evaluate_acpo.py"
PROMPTS = ["a red wall", "a blue wall", "a green wall"]
FOLDERS = [
    "tiny_sdxl_pipeline",
    "tiny_sd3_pipeline",
    "tiny_flux_pipeline",
    "tiny_z_image_pipeline",
    "tiny_klein_pipeline",
]


def save_random_lora(source: str, folder):
    folder.mkdir()
    pipeline = DiffusionPipeline.from_pretrained(source, **{DTYPE: torch.float32})
    model = denoiser(pipeline)
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    save_lora(model, folder, type(pipeline))
    return folder


@pytest.mark.parametrize("fixture", FOLDERS)
def test_images_are_those_of_the_stock_pipeline_and_the_loras_own(
    fixture, request, tmp_path, tiny_guide, captioned_images
):
    """Each picture is what the pipeline of the library draws from the same noise, the LoRA loaded by its own loader."""
    source = request.getfixturevalue(fixture)
    lora = save_random_lora(source, tmp_path / "lora")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    options = {
        "pretrained_model_name_or_path": source,
        "lora": lora,
        "prompts": tmp_path / "prompts.txt",
        "num_inference_steps": 2,
        "eval_batch_size": 2,
        "metrics": [f"ipce:{tiny_guide}", "mse"],
        "real_data_dir": captioned_images,
        "max_real_images": 3,
        "resolution": 32,
        "output_dir": tmp_path / "out",
    }
    tokens = {} if "sdxl" in fixture else {"max_sequence_length": 12}
    run_script(SCRIPT, *command_line(**options | tokens))
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert not results["unavailable"] and [row["metric"] for row in results["rows"]] == ["ipce-guide", "mse"]
    assert results["errors"]["base"] != results["errors"]["lora"]

    stock = DiffusionPipeline.from_pretrained(source, **{DTYPE: torch.float32})
    stock.set_progress_bar_config(disable=True)
    if "sdxl" in fixture:
        stock.scheduler = models.SCHEDULERS["ddim"].from_config(
            stock.scheduler.config, clip_sample=False, steps_offset=1
        )
        stock.watermark = None
    for model in ("base", "lora"):
        if model == "lora":
            stock.load_lora_weights(lora)
        expected = stock(
            prompt=PROMPTS[:2],
            num_inference_steps=2,
            height=32,
            width=32,
            generator=[step_generator(0, row) for row in range(2)],
            output_type="pt",
            **tokens,
        )
        drawn = [tmp_path / "out" / name for name in results["images"][model][:2]]
        pixels = torch.stack([read_png(path) for path in drawn])
        torch.testing.assert_close(pixels, image_tensor(expected.images), atol=0.6 / 255, rtol=0)


def read_png(path) -> torch.Tensor:
    with Image.open(path) as image:
        return pil_to_tensor(image).float() / 255


def test_the_error_of_the_exact_velocity_is_zero(tiny_sd3_pipeline, tmp_path):
    """Of flow matching the target is eps - x0: a model that knows both has no error, one that says 0 has their power."""
    pipeline = models.load_pipeline(tiny_sd3_pipeline, "StableDiffusion3Pipeline")
    torch.manual_seed(0)
    save_image(torch.rand(3, 32, 32), tmp_path / "a.png")
    zero = pipeline_denoising_error(pipeline, [tmp_path / "a.png"], ["a"], predictor=lambda *_: lambda _, z, s: 0 * z)

    def exact(pipeline, texts, size):
        pixels = read_png(tmp_path / "a.png")[None] * 2 - 1
        posterior = pipeline.vae.encode(pixels).latent_dist
        sampled = posterior.mean + posterior.std * fixed_noise(posterior.mean, 0, [0], MSE_TIMESTEPS)
        x0 = scale_latents(sampled, pipeline.vae)
        return lambda _, z, sigmas: (z - x0) / sigmas.view(-1, 1, 1, 1)

    known = pipeline_denoising_error(pipeline, [tmp_path / "a.png"], ["a"], predictor=exact)
    assert zero.item() > 0.5 and known.item() < 1e-9


def test_what_a_family_does_not_take_is_refused(tiny_sd3_pipeline, tiny_sdxl_pipeline, tiny_pipeline, tmp_path):
    lora = save_random_lora(tiny_sd3_pipeline, tmp_path / "lora")
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    flow = command_line(pretrained_model_name_or_path=tiny_sd3_pipeline, lora=lora, prompts=tmp_path / "prompts.txt")
    assert "is sampled by its own Euler steps" in refused(SCRIPT, *flow, "--scheduler", "dpm++")
    assert "expected a pipeline like the base model's" in refused(SCRIPT, *flow, "--finetuned", tiny_pipeline)
    noise = command_line(pretrained_model_name_or_path=tiny_sdxl_pipeline, lora=lora, prompts=tmp_path / "prompts.txt")
    assert "as its text encoder has places" in refused(SCRIPT, *noise, "--max_sequence_length", 8)
    assert "LoRA" in refused(SCRIPT, *noise)


@pytest.mark.parametrize(
    ("name", "steps", "scale"),
    [("StableDiffusionPipeline", 50, 7.5), ("StableDiffusion3Pipeline", 28, 7.0), ("FluxPipeline", 28, 3.5)],
)
def test_sampling_defaults_are_the_pipelines_own(name, steps, scale):
    assert models.sampling_default(name, "num_inference_steps") == steps
    assert models.sampling_default(name, "guidance_scale") == scale
