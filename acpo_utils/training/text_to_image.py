"""What the text-to-image scripts do alike before a training: flags that contradict each other, data, the LoRA to train."""

import torch
from accelerate.logging import get_logger
from diffusers.training_utils import cast_training_params
from peft import LoraConfig

from acpo_utils import data, lora
from acpo_utils.families.quantization import check_quantization
from acpo_utils.training.arguments import check_numbers, check_objective


logger = get_logger(__name__, log_level="INFO")


def check_text_to_image(args) -> None:
    """What can be said of a script's arguments without loading anything. Raises ValueError, in one line."""
    check_numbers(args)
    if sum(source is not None for source in (args.dataset_name, args.train_data_dir, args.train_prompts)) != 1:
        raise ValueError("need one of --dataset_name, --train_data_dir and --train_prompts")
    if args.train_prompts and (args.late_start == "data" or args.diffusion_weight):
        raise ValueError("--train_prompts has no images: it needs --late_start rollout and --diffusion_weight 0")
    crop, tiny, straight = (args.decode == way for way in ("crop", "tiny", "straight_through"))
    if crop != bool(args.decode_size) or (not straight and tiny != bool(args.tiny_vae_name_or_path)):
        raise ValueError("--decode crop goes with --decode_size, --decode tiny with --tiny_vae_name_or_path")
    if straight and not args.tiny_vae_name_or_path and args.decode_dtype == "fp32":
        raise ValueError(
            "--decode straight_through needs what its gradient goes through: --decode_dtype bf16 for the VAE in bf16, or "
            "--tiny_vae_name_or_path"
        )
    if args.cache_latents and (args.train_prompts or not args.center_crop):
        raise ValueError("--cache_latents needs images and --center_crop: a random crop is another image every time")
    check_objective(args)


def check_flow_matching(args) -> None:
    """The flags that only the scripts of flow-matching models have. Raises ValueError or ImportError, in one line."""
    if args.max_sequence_length > 512:  # the pipelines' limit
        raise ValueError(f"--max_sequence_length: expected at most 512 tokens, found {args.max_sequence_length}")
    if args.weighting_scheme == "sigma_sqrt" and args.diffusion_timesteps == "late":
        raise ValueError(
            "--weighting_scheme sigma_sqrt weighs by 1 / sigma^2, which has no bound near sigma = 0: it needs "
            "--diffusion_timesteps full"
        )
    check_quantization(args.bnb_quantization_config_path)


def warn_if_distilled(reason: str | None, diffusion_weight: float) -> None:
    """Warns of a training by L_diff that would undo a distillation. `reason`: what a family's `distilled` says."""
    if reason and diffusion_weight:
        logger.warning(
            f"This model seems to be distilled to few steps ({reason}), and L_diff would undo that. Its mode is "
            "--diffusion_weight 0 --late_start rollout with its own --num_inference_steps and --guidance_scale, and a "
            "--tmax above the last of these steps (docs/sdxl.md and docs/flow-matching.md)."
        )


def load_data(args, accelerator):
    """The training's images or prompts, and the held-out prompts: files that exist and can be read, all of them."""
    if args.train_prompts:
        dataset = data.read_prompts(args.train_prompts)
    else:
        dataset = data.load_captioned_images(
            dataset_name=args.dataset_name,
            dataset_config_name=args.dataset_config_name,
            train_data_dir=args.train_data_dir,
            image_column=args.image_column,
            caption_column=args.caption_column,
            max_train_samples=args.max_train_samples,
            cache_dir=args.cache_dir,
            seed=args.seed,
        )
        with accelerator.main_process_first():
            dataset = data.check_images(dataset, args.image_column, args.skip_bad_images)
    eval_prompts = data.read_prompts(args.eval_prompts)[: args.num_eval_prompts] if args.eval_prompts else []
    return dataset, eval_prompts


def add_lora(model, args, pipeline_class: type | None = None) -> list[torch.nn.Parameter]:
    """A new adapter, or the one of --lora_path; its weights in fp32, whatever the base's precision. Returns them.

    `pipeline_class`: as in `acpo_utils.lora.save_lora`. Raises ValueError, in one line, for layers that cannot take a LoRA,
    and for a file that is none, is of another model or has other options than the flags say.
    """
    given = args.lora_target_modules
    target_modules = [name.strip() for name in given.split(",")] if given else None
    if args.lora_path:
        saved = lora.read_lora_config(args.lora_path, pipeline_class)
        lora.check_lora_options(
            model, saved, rank=args.rank, lora_alpha=args.lora_alpha, target_modules=target_modules
        )
        args.rank = saved["rank"]
        args.lora_alpha = saved["alpha"]
        target_modules = saved["target_modules"]
    else:
        lora.check_target_modules(model, target_modules)
    lora_config = LoraConfig(
        r=args.rank,
        lora_alpha=args.lora_alpha,
        target_modules=target_modules,
        init_lora_weights="gaussian",
    )
    model.add_adapter(lora_config)
    cast_training_params(model, dtype=torch.float32)
    if args.lora_path:
        lora.load_lora(model, args.lora_path, pipeline_class=pipeline_class)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
