"""The models that an evaluation compares: what a folder holds, and its pipeline, of every family, loaded strictly."""

import inspect
from collections.abc import Callable
from functools import partial

import diffusers
import torch
from accelerate.utils import compare_versions
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, UNet2DModel
from peft import LoraConfig

from acpo_utils.families import flux, sd3, sdxl, stable_diffusion, z_image
from acpo_utils.families.loading import DTYPE, denoiser
from acpo_utils.files import load_strictly
from acpo_utils.lora import load_lora, read_lora_config


UNCONDITIONAL = ("DDPMPipeline", "DDIMPipeline")
FAMILIES = {
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": sdxl,
    "StableDiffusion3Pipeline": sd3,
    "FluxPipeline": flux,
    "ZImagePipeline": z_image,
}
if compare_versions("diffusers", ">=", "0.37.0"):  # which has the pipeline
    from acpo_utils.families import flux2_klein

    FAMILIES["Flux2KleinPipeline"] = flux2_klein
SCHEDULERS = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}
PREDICT_NOISE = (*UNCONDITIONAL, "StableDiffusionPipeline", "StableDiffusionXLPipeline")


def class_of(source: str, revision: str | None = None) -> str:
    """The class that the model_index.json of a hub repository or folder names. Raises ValueError for any but ours."""
    known = (*FAMILIES, *UNCONDITIONAL)
    try:
        name = DiffusionPipeline.load_config(source, revision=revision)["_class_name"]
    except (OSError, KeyError) as error:
        raise ValueError(
            f"expected a pipeline (hub id or folder with model_index.json), {source!r} could not be read: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if name not in known:
        raise ValueError(f"{source}: expected one of {', '.join(known)}, found {name}")
    return name


def sampling_default(class_name: str, argument: str) -> int | float:
    """What pipelines of a class do when they are not told `argument`, such as "num_inference_steps"."""
    pipeline_class = DDIMPipeline if class_name in UNCONDITIONAL else getattr(diffusers, class_name)
    return inspect.signature(pipeline_class.__call__).parameters[argument].default


def check_sampling(class_name: str, scheduler: str | None, max_sequence_length: int | None) -> None:
    """Raises ValueError, in one line, for what pipelines of a class have no choice of."""
    if scheduler and class_name in FAMILIES and class_name not in PREDICT_NOISE:
        raise ValueError(f"--scheduler {scheduler}: a flow-matching model is sampled by its own Euler steps")
    if max_sequence_length and class_name in PREDICT_NOISE:
        raise ValueError(f"--max_sequence_length: a {class_name} reads as many tokens as its text encoder has places")


def load_pipeline(
    source: str,
    class_name: str,
    *,
    lora: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    weight_dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    scheduler: str = "ddim",
    max_sequence_length: int | None = None,
) -> DiffusionPipeline:
    """The pipeline of `source`, with the LoRA of the file or folder `lora` in it; in `weight_dtype` but for the VAE.

    Args:
        class_name: what `class_of` says of `source`.
        vae_dtype: of the VAE; None: `weight_dtype`, as people sample. The losses decode in fp32.
        scheduler: "ddim" or "dpm++", of models that predict noise. Flow-matching models have Euler steps of their own.
        max_sequence_length: tokens of a caption, of models with T5 or an LLM; None: the family's own.
    Raises ValueError, in one line, for what is no pipeline of the class, or not all of one, or no LoRA of it.
    """
    try:
        if class_name in UNCONDITIONAL:
            pipeline = _load_unconditional(source, revision, variant, weight_dtype)
        else:
            family = FAMILIES[class_name]
            tokens = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
            noise_scheduler, tokenizers, text_encoders, vae, model, *settings = family.load(
                source, revision=revision, variant=variant, weight_dtype=weight_dtype, device=device, **tokens
            )
            pipeline = family.build_pipeline(model, vae, text_encoders, tokenizers, noise_scheduler, *settings)
            pipeline.vae.to(vae_dtype or weight_dtype)
            if class_name in PREDICT_NOISE:
                pipeline.scheduler = SCHEDULERS[scheduler].from_config(noise_scheduler.config)
    except (OSError, ValueError) as error:
        raise ValueError(f"the pipeline {source!r} could not be loaded: {str(error).splitlines()[0]}") from error
    if lora is not None:
        saved = read_lora_config(lora, type(pipeline))
        config = LoraConfig(r=saved["rank"], lora_alpha=saved["alpha"], target_modules=saved["target_modules"])
        denoiser(pipeline).add_adapter(config)
        load_lora(denoiser(pipeline), lora, pipeline_class=type(pipeline))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _load_unconditional(source: str, revision, variant, weight_dtype: torch.dtype) -> DDIMPipeline:
    unet = load_strictly(
        UNet2DModel.from_pretrained,
        source,
        subfolder="unet",
        revision=revision,
        variant=variant,
        **{DTYPE: weight_dtype},
    )
    config = DDIMScheduler.load_config(source, subfolder="scheduler", revision=revision)
    return DDIMPipeline(unet, DDIMScheduler.from_config(config))


def predictor_of(class_name: str, max_sequence_length: int | None = None) -> Callable[..., Callable]:
    """The family's `predictor`, as `pipeline_denoising_error` takes it: told what L_diff tells the model."""
    more = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
    if class_name == "FluxPipeline":
        more["guidance_scale"] = 1.0
    return partial(FAMILIES[class_name].predictor, **more)
