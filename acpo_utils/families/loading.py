"""A pipeline as people have it, its parts read strictly and from safetensors, or refused in one line: for every family."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import compare_versions
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import ModelCard, hf_hub_download

from acpo_utils.families.quantization import build_quantization_config
from acpo_utils.files import load_strictly, one_line


# What from_pretrained of diffusers calls it: "dtype" is unknown before 0.40, "torch_dtype" warns since.
DTYPE = "dtype" if compare_versions("diffusers", ">=", "0.40.0") else "torch_dtype"
# In the names of models that were distilled to few steps, lower case.
DISTILLED = ("turbo", "lightning", "hyper-sd", "hypersd", "lcm", "dmd", "flash", "schnell")
# What a pipeline of each class is called, where it is not the plain one.
FAMILIES = {
    "StableDiffusionXLPipeline": "Stable Diffusion XL",
    "ZImagePipeline": "Z-Image",
    "StableDiffusion3Pipeline": "Stable Diffusion 3",
    "FluxPipeline": "FLUX.1",
    "Flux2KleinPipeline": "FLUX.2-klein",
}
# How the names of a family's pipelines begin, the longer ones first, and the script that is made for it.
SCRIPTS = {
    "StableDiffusionXL": "train_acpo_lora_sdxl.py",
    "StableDiffusion3": "train_acpo_lora_sd3.py",
    "StableDiffusion": "train_acpo_lora_sd.py",
    "ZImage": "train_acpo_lora_z_image.py",
    "DDPM": "train_acpo_ddpm.py",
    "DDIM": "train_acpo_ddpm.py",
    "Flux2Klein": "train_acpo_lora_flux2_klein.py",
    "Flux2": "diffusers' train_dreambooth_lora_flux2.py, without ACPO",
    "Flux": "train_acpo_lora_flux.py",
}


def load_pipeline_parts(
    pipeline_class: type[DiffusionPipeline],
    part_classes: dict[str, type],
    pretrained_model_name_or_path: str,
    *,
    revision: str | None,
    variant: str | None,
    dtypes: dict[str, torch.dtype],
    check_configs: Callable[[str, str | None], None],
    quantization_config_path: str | None = None,
) -> tuple[dict, dict]:
    """({part: tokenizer or model, frozen}, the scheduler's configuration) of a hub id, a folder or a .safetensors file.

    Args:
        part_classes: by the name of the part, which is its subfolder too. dtypes: of the models among them.
        check_configs: (source, revision) -> None, raises ValueError for parts that do not fit each other, before a
            weight is read.
        quantization_config_path: of the transformer, if it is to be quantised (`acpo_utils.families.quantization`).
    Raises:
        ValueError: in one line, for what is no pipeline of the family, or not all of one.
    """
    source = str(pretrained_model_name_or_path)
    if source.endswith((".ckpt", ".pt", ".bin")):
        raise ValueError(f"{source}: expected .safetensors, found a pickle, which can run any code. Convert it first.")
    try:
        if source.endswith(".safetensors"):
            folder = _configurations(source)
            if folder is not None:
                _check_family(pipeline_class, folder, None)
                check_configs(folder, None)
            pipeline = _load_single_file(pipeline_class, source, folder, dtypes)
            parts = {name: getattr(pipeline, name) for name in part_classes}
            scheduler_config = pipeline.scheduler.config
        else:
            _check_family(pipeline_class, source, revision)
            check_configs(source, revision)
            parts = {
                name: _load_part(
                    part_class,
                    source,
                    name,
                    revision,
                    variant,
                    dtypes.get(name),
                    quantization_config_path if name == "transformer" else None,
                )
                for name, part_class in part_classes.items()
            }
            scheduler_config = DDPMScheduler.load_config(source, revision=revision, subfolder="scheduler")
    except (OSError, ValueError) as error:
        family = FAMILIES.get(pipeline_class.__name__, "Stable Diffusion")
        raise ValueError(
            f"--pretrained_model_name_or_path: expected a {family} pipeline (hub id, folder, or .safetensors file), "
            f"{source!r} could not be loaded: {one_line(error)[:400]}{_variant_hint(source, variant)}"
        ) from error
    for name in dtypes:
        parts[name].requires_grad_(False)
    return parts, scheduler_config


def refuse_single_file(pipeline_class: type[DiffusionPipeline], source: str) -> None:
    """Raises ValueError, in one line, for a .safetensors file: of the families with a transformer none is read."""
    if source.endswith(".safetensors"):
        raise ValueError(
            f"--pretrained_model_name_or_path: expected a hub id or a folder, found the single file {source}: save it by "
            f"{pipeline_class.__name__}.from_single_file(...).save_pretrained(folder)"
        )


def _load_part(
    part_class: type,
    source: str,
    name: str,
    revision: str | None,
    variant: str | None,
    dtype: torch.dtype | None,
    quantization_config_path: str | None,
):
    if dtype is None:
        return part_class.from_pretrained(source, revision=revision, subfolder=name)
    keywords = {"dtype" if part_class.__module__.startswith("transformers") else DTYPE: dtype}
    if quantization_config_path:
        keywords["quantization_config"] = build_quantization_config(quantization_config_path, dtype)
    # Without peft's prepare_model_for_kbit_training of diffusers' scripts: norms stay in `dtype`, as in a base that is whole.
    try:
        return load_strictly(
            part_class.from_pretrained,
            source,
            subfolder=name,
            revision=revision,
            variant=variant,
            **keywords,
        )
    # diffusers moves a quantised model, to the GPU, before it says what is missing.
    except NotImplementedError as error:
        where = Path(source, name)
        raise ValueError(f"the weights in {where} do not fit its config.json: some are missing.") from error


def _configurations(single_file: str) -> str | None:
    """A single file has no configurations; a pipeline's folder around it has, as in the hub's repositories of SD-1.x."""
    if not Path(single_file).is_file():
        raise ValueError("there is no such file.")
    folder = Path(single_file).parent
    return str(folder) if Path(folder, "model_index.json").is_file() else None


def _load_single_file(
    pipeline_class: type[DiffusionPipeline], source: str, folder: str | None, dtypes: dict[str, torch.dtype]
) -> DiffusionPipeline:
    config = {} if folder is None else {"config": folder}
    unchecked = {}
    if pipeline_class is StableDiffusionPipeline:
        unchecked = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        vae = AutoencoderKL.from_single_file(source, subfolder="vae", **config, **{DTYPE: dtypes["vae"]})
        return pipeline_class.from_single_file(source, vae=vae, **config, **unchecked, **{DTYPE: dtypes["unet"]})
    except Exception as error:  # of many kinds: safetensors, keys that do not fit, network
        hint = ""
        if folder is None:
            hint = (
                " A single file holds no configurations: put it into its model's folder, beside model_index.json, or let "
                "diffusers take those of the hub's model of its kind, which needs the hub or an earlier download."
            )
        raise ValueError(f"{one_line(error)[:200]}{hint}") from error


def _check_family(pipeline_class: type[DiffusionPipeline], source: str, revision: str | None) -> None:
    try:
        name = DiffusionPipeline.load_config(source, revision=revision).get("_class_name", "")
    except OSError:  # a folder with the parts alone
        return
    family = _family(name)
    if family is None or family != _family(pipeline_class.__name__):
        raise ValueError(f"it is a {name}{f', for {SCRIPTS[family]}' if family else ''}.")


def _family(pipeline_name: str) -> str | None:
    return next((family for family in SCRIPTS if pipeline_name.startswith(family)), None)


def distilled_by_name(pretrained_model_name_or_path: str) -> str | None:
    """What in the name of a model says that it was distilled to few steps; None if nothing does. Of a path its last part."""
    path = Path(pretrained_model_name_or_path)
    name = (path.name if path.exists() else str(path)).lower()
    found = [word for word in DISTILLED if word in name]
    return f"{found[0]!r} is in its name" if found else None


def distilled_by_card(pretrained_model_name_or_path: str, revision: str | None = None) -> str | None:
    """The same of the card's header, of a folder's README.md or the hub's: the names of the base model, and tags."""
    path = Path(pretrained_model_name_or_path)
    try:
        card = path / "README.md" if path.exists() else hf_hub_download(str(path), "README.md", revision=revision)
        header = ModelCard.load(card).data.to_dict()
    except Exception:  # there may be no card, or no hub; a header, which people write, may be anything
        return None
    for field in ("base_model", "tags"):
        values = header.get(field) or []
        for value in [values] if isinstance(values, str) else values:
            if found := [word for word in DISTILLED if word in str(value).lower()]:
                return f"{found[0]!r} is in its card's {field}"
    return None


def distilled_by_words(pretrained_model_name_or_path: str, revision: str | None = None) -> str | None:
    """What in the name or the card of a model says that it was distilled to few steps; None if nothing does."""
    by_name = distilled_by_name(pretrained_model_name_or_path)
    return by_name or distilled_by_card(pretrained_model_name_or_path, revision)


def distilled_unet(
    pretrained_model_name_or_path: str,
    revision: str | None,
    noise_scheduler: DDPMScheduler,
    unet: UNet2DConditionModel,
) -> str | None:
    """What says that a U-Net was distilled to few steps; None if nothing does.

    Its name or its card, an input for the guidance scale (LCM), or a schedule that begins at the last timestep ("trailing",
    as SD-Turbo's, SDXL-Turbo's and Lightning's) without the noise schedule of zero terminal SNR, which also asks for that.
    """
    if by_words := distilled_by_words(pretrained_model_name_or_path, revision):
        return by_words
    if unet.config.time_cond_proj_dim is not None:
        return "its U-Net takes the guidance scale as a number"
    config = noise_scheduler.config
    if config.timestep_spacing == "trailing" and not config.rescale_betas_zero_snr:
        return "timestep_spacing of its scheduler is trailing"
    return None


def check_channels(source: str, revision: str | None) -> dict:
    """The U-Net's configuration. Raises ValueError, in one line, for one that takes more, or other, than the VAE's latents."""
    unet = UNet2DConditionModel.load_config(source, revision=revision, subfolder="unet")
    vae = AutoencoderKL.load_config(source, revision=revision, subfolder="vae")
    if unet["in_channels"] != vae["latent_channels"]:
        raise ValueError(
            f"its U-Net takes {unet['in_channels']} channels where its VAE has {vae['latent_channels']}: an inpainting or "
            "another image-conditioned model, for which there is no script here."
        )
    return unet


def check_embeddings(unet: dict, width: int) -> None:
    """Raises ValueError, in one line, for a U-Net's configuration that attends to embeddings of another width."""
    if unet["cross_attention_dim"] != width:
        raise ValueError(
            f"its U-Net attends to embeddings of {unet['cross_attention_dim']} numbers, and its text encoder gives {width}."
        )


def limit_tokenizer(tokenizer, text_encoder) -> None:
    """The text encoder's positions are the limit where a tokenizer names none, or a larger one.

    Raises ValueError for a tokenizer with more tokens than the text encoder embeds.
    """
    config = text_encoder.config
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"--pretrained_model_name_or_path: the tokenizer has {len(tokenizer)} tokens, the text encoder embeds "
            f"{config.vocab_size}: they are of different models, or tokens were added without resizing the embeddings."
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)


def denoiser(pipeline: DiffusionPipeline) -> torch.nn.Module:
    """The part that a LoRA is of: the U-Net, or the transformer of a pipeline that has one in its place."""
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def _variant_hint(source: str, variant: str | None) -> str:
    if variant is None and (found := sorted(Path(source).glob("*/*.fp16.safetensors"))):
        return f" It holds {found[0].parent.name}/{found[0].name}: give --variant fp16."
    return ""


def latent_scheduler(config: dict) -> DDPMScheduler:
    """A DDPMScheduler by the configuration of any scheduler of a latent pipeline, for training and rollouts.

    The configuration of a PNDM, Euler or DPM++ scheduler says nothing of `clip_sample`, which DDPM and DDIM would then
    switch on; latents are not pixels, and leave [-1, 1]. `steps_offset` is what the pipeline itself sets.
    """
    return DDPMScheduler.from_config(config, clip_sample=False, thresholding=False, steps_offset=1)
