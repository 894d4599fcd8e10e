"""Fine-tune a LoRA of Stable Diffusion by ACPO: late-step samples are decoded and scored by a frozen evaluator, the
score's gradient trains the LoRA, and an anchor holds its predictions to the frozen base model's (section 3.3, eqs. 5-9).

    accelerate launch examples/train_acpo_lora_sd.py --tmax 100

With no model named it runs the embedded demo, on a CPU in minutes. README.md has the command for SD-1.4.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import json
from functools import partial
from pathlib import Path

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import cast_training_params
from diffusers.utils.torch_utils import randn_tensor
from peft import LoraConfig
from torch.utils.data import DataLoader
from torchvision.utils import save_image
from tqdm.auto import tqdm

from acpo_utils.anchor import ANCHOR_BUDGET, AnchorBudget, base_prediction
from acpo_utils.checkpoints import catch_sigterm, checkpoint_or_stop, find_checkpoint, release_sigterm
from acpo_utils.data import (
    CachedLatents,
    CaptionedImages,
    Prompts,
    check_images,
    collate,
    load_captioned_images,
    read_prompts,
    tokenize,
)
from acpo_utils.evaluation.denoising_error import prediction_drift
from acpo_utils.evaluation.grids import comparison_picture
from acpo_utils.evaluation.sampling import sample_images, score_images
from acpo_utils.evaluation.table import comparison_table
from acpo_utils.evaluators import check_evaluator, guide_parts, guide_weights, load_guide, load_judges
from acpo_utils.files import atomic_write
from acpo_utils.hub import push_to_hub, save_model_card, settings_of
from acpo_utils.late_step import (
    crop_latents,
    decode_latents,
    denoise_late_steps,
    rollout_late_latents,
    sample_late_timesteps,
)
from acpo_utils.lora import load_lora, read_lora_config, register_lora_hooks, save_lora
from acpo_utils.losses import acpo_objective, anchor_loss, diffusion_loss, quality_loss
from acpo_utils.randomness import batch_randint, batch_randn, own_batches, shared_generator, step_generator
from acpo_utils.sharding import SHARDED, WEIGHT_DTYPES, prepare, whole_weights
from acpo_utils.stable_diffusion import (
    build_pipeline,
    compile_models,
    encode_images,
    encode_prompts,
    latent_factor,
    latents_shape,
    load_stable_diffusion,
    load_tiny_vae,
    offload_encoders,
)
from acpo_utils.statistics import paired_comparison
from acpo_utils.training.gradient_balance import Balance
from acpo_utils.training.hacking_alarm import HackingAlarm
from acpo_utils.training.memory_estimate import log_estimate
from acpo_utils.training.run import RunState, log_images, mean_terms, resume, start_run, use_all_cpus


logger = get_logger(__name__, log_level="INFO")


def training_step(batch, unet, vae, decoder, text_encoder, evaluator, noise_scheduler, generator, args):
    """L = L_diff + anchor_weight * L_anchor + quality_weight * L_quality (eq. 9). Returns the loss and its terms."""
    loss_diffusion = loss_anchor = loss_quality = scores = None
    prompt_embeds = encode_prompts(batch, text_encoder)  # (B, tokens, dim)  c
    if batch.keys() & {"pixel_values", "latent_moments"}:  # a rollout without L_diff needs prompts only
        latents = encode_images(batch, vae, generator).to(prompt_embeds.dtype)  # (B, 4, h, w)  x0
        noise = batch_randn(latents.shape, generator, latents.device, latents.dtype)  # (B, 4, h, w)  eps

    if args.anchor_weight or args.quality_weight or args.diffusion_timesteps == "late":
        if args.late_start == "data":  # z_t, t < tmax, is a noised real latent
            late_timesteps = sample_late_timesteps(len(latents), args.tmax, generator, latents.device)  # (B,)
            late_latents = noise_scheduler.add_noise(latents, noise, late_timesteps)  # (B, 4, h, w)  z_t
        else:  # z_t is the current model's own sample
            embeds = (prompt_embeds, batch["negative_embeds"])
            window = (latents_shape(vae, len(prompt_embeds), args.resolution), args.tmax)
            sampling = (args.num_inference_steps, args.guidance_scale, generator)
            late_latents, late_timesteps = rollout_late_latents(unet, noise_scheduler, *embeds, *window, *sampling)
        if args.anchor_weight:  # the frozen pass first: its activations are gone before the student's graph is built
            base_pred = base_prediction(unet, late_latents, late_timesteps, prompt_embeds)  # (B, 4, h, w)  eps_theta
        # One student pass serves L_anchor, L_quality and, with --diffusion_timesteps late, L_diff.
        late_pred = unet(late_latents, late_timesteps, prompt_embeds, return_dict=False)[0]  # (B, 4, h, w)  eps_phi

    if args.quality_weight:
        predict = partial(predict_with_lora, unet, prompt_embeds)
        late = (late_pred, late_timesteps, late_latents, args.late_steps, args.late_backprop_steps)
        z0 = denoise_late_steps(predict, noise_scheduler, *late)  # (B, 4, h, w)  z_0_hat (eq. 5)
        if args.decode == "crop":
            z0 = crop_latents(z0, args.decode_size // latent_factor(vae), generator)
        images = decode_latents(decoder, z0, args.decode_batch_size)  # (B, 3, H, W)  x_hat = D(z_0_hat) (eq. 5)
        scores = evaluator.score(images, batch["prompts"])  # (B,) in (0, 1)  Q(x_hat, c)
        loss_quality = quality_loss(scores)  # L_quality = mean(1 - Q) (eq. 6)
    if args.anchor_weight:
        loss_anchor = anchor_loss(late_pred, base_pred)  # L_anchor = ||eps_phi - eps_theta||^2 (eq. 7)
    if args.diffusion_weight:  # L_diff = ||eps - eps_phi||^2 (eq. 8)
        if args.diffusion_timesteps == "late":
            timesteps, model_pred = late_timesteps, late_pred
        else:
            num_train_timesteps = noise_scheduler.config.num_train_timesteps
            timesteps = batch_randint(num_train_timesteps, len(latents), generator, latents.device)  # (B,)
            noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)  # (B, 4, h, w)  z_t, any t
            model_pred = unet(noisy_latents, timesteps, prompt_embeds, return_dict=False)[0]  # (B, 4, h, w)
        loss_diffusion = diffusion_loss(noise_scheduler, model_pred, latents, noise, timesteps, args.snr_gamma)

    losses = (loss_diffusion, loss_anchor, loss_quality)
    weights = (args.diffusion_weight, args.anchor_weight, args.quality_weight)
    loss, terms = acpo_objective(*losses, *weights)  # L (eq. 9)
    return loss, terms if scores is None else terms | {"score": scores, "late_timesteps": late_timesteps}


def predict_with_lora(unet, prompt_embeds, latents, timesteps):
    return unet(latents, timesteps, prompt_embeds, return_dict=False)[0]


DEMO_DIR = Path(__file__).resolve().parent / "demo"
# The embedded demo's settings, where they differ from the defaults below, which are the paper's or diffusers' own.
# A base model as weak as the demo's is moved by its own samples, not by real images that it cannot draw yet; and what its
# last step can change is detail, which is drawn by convolutions rather than by attention (examples/demo/README.md).
DEMO = {
    "pretrained_model_name_or_path": str(DEMO_DIR / "pipeline"),
    "train_data_dir": str(DEMO_DIR / "data" / "train.parquet"),
    "evaluator": f"ipce:{DEMO_DIR / 'guide'}",
    "judge": str(DEMO_DIR / "judge"),
    "eval_prompts": str(DEMO_DIR / "data" / "new_combinations.parquet"),
    "resolution": 64,
    "train_batch_size": 8,
    "rank": 8,
    "lora_target_modules": "to_k,to_q,to_v,to_out.0,conv1,conv2,conv_out",
    "late_start": "rollout",
    "quality_weight": 2.0,
    "learning_rate": 5e-4,
    "max_train_steps": 45,
    "balance_steps": 15,
    "num_eval_prompts": 300,
    "num_inference_steps": 15,
    "guidance_scale": 2.0,
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # Model and evaluator
    add("--pretrained_model_name_or_path", help="hub id or folder of a Stable Diffusion; none: the embedded demo")
    add("--revision")
    add("--variant")
    add("--evaluator", action="append", help="the frozen guide Q: ipce:PATH or docs/evaluators.md; again for several")
    add("--evaluator_weight", action="append", type=float, help="one for each of several guides; equal by default")
    add("--judge", action="append", help="guides nothing: judge:PATH or as --evaluator; again for several")
    add("--lora_path", help="continue from this saved LoRA with a new optimizer; this is not resume")
    # Data
    add("--dataset_name", help="hub data set with an image and a caption column")
    add("--dataset_config_name")
    add("--train_data_dir", help="image folder with metadata.jsonl, or parquet")
    add("--train_prompts", help="prompts alone, for --late_start rollout: .txt, .csv, .jsonl or .parquet")
    add("--image_column", default="image")
    add("--caption_column", default="text")
    add("--max_train_samples", type=int)
    add("--skip_bad_images", action="store_true", help="leave unreadable images out, and count them")
    add("--cache_dir")
    add("--resolution", type=int, default=512)
    add("--center_crop", action="store_true")
    add("--random_flip", action="store_true")
    add("--cache_latents", action="store_true", help="encode once, kept in CACHE_DIR/latents or OUTPUT_DIR/latents")
    add("--dataloader_num_workers", type=int, default=0)
    # ACPO
    add("--tmax", type=int, default=100, help="upper end of the late window: quality and anchor act at t < tmax")
    add("--quality_weight", type=float, default=0.1, help="lambda_quality of eq. 9")
    add("--anchor_weight", type=float, default=1.0, help="lambda_anchor of eq. 9")
    add(
        "--anchor_budget",
        type=float,
        nargs="?",
        const=ANCHOR_BUDGET,
        help=f"hold the mean L_anchor here (bare: {ANCHOR_BUDGET}) by adapting the weight, from --anchor_weight on",
    )
    add("--diffusion_weight", type=float, default=1.0, help="weight of L_diff; 1 in the paper")
    add("--diffusion_timesteps", choices=["full", "late"], default="full", help="late shares the late forward pass")
    add(
        "--late_start", choices=["data", "rollout"], default="data", help="z_t from real images, or sampled from noise"
    )
    add("--late_steps", type=int, default=1, help="K denoising steps from t to 0; 1 is the one-step estimate")
    add("--late_backprop_steps", type=int, help="how many of the last K steps keep their gradient; all by default")
    add("--snr_gamma", type=float, help="min-SNR weighting of L_diff")
    add(
        "--balance_steps",
        type=int,
        default=100,
        help="how often to measure each term's share of the gradient; 0: never",
    )
    add(
        "--decode",
        choices=["full", "crop", "tiny"],
        default="full",
        help="x_hat whole, a window of it, or by a tiny VAE",
    )
    add(
        "--decode_batch_size", type=int, help="decode so many samples at a time, twice, to save memory; all by default"
    )
    add("--decode_size", type=int, help="side of the window in pixels, with --decode crop")
    add(
        "--tiny_vae_name_or_path",
        help="an AutoencoderTiny of the model's latents, with --decode tiny (madebyollin/taesd)",
    )
    # LoRA and optimizer
    add("--rank", type=int, default=4)
    add("--lora_alpha", type=int, help="default: the rank")
    add("--lora_target_modules", default="to_k,to_q,to_v,to_out.0", help="comma-separated layer names of the U-Net")
    add("--train_batch_size", type=int, default=4)
    add("--max_train_steps", type=int, default=1000)
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--gradient_checkpointing", action="store_true", help="of the U-Net and of the VAE's decoder")
    add("--learning_rate", type=float, default=2e-5)
    schedules = [s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT]
    add("--lr_scheduler", choices=schedules, default="constant")
    add("--lr_warmup_steps", type=int, default=0)
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=0.0, help="0 is Adam, as in the paper")
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=1.0)
    add("--mixed_precision", choices=["no", "fp16", "bf16"])
    add("--allow_tf32", action="store_true")
    add("--torch_compile", action="store_true", help="the U-Net and the decoder, at the first step: minutes")
    # Validation and final comparison
    add("--validation_prompt", help="sampled every --validation_steps")
    add("--num_validation_prompts", type=int, default=32, help="of --eval_prompts, base beside LoRA then; 0: off")
    add("--on_hacking", choices=["warn", "stop", "keep_best"], default="warn", help="the guide rises, a judge falls")
    add("--num_validation_images", type=int, default=4)
    add("--validation_steps", type=int, default=100)
    add("--eval_prompts", help="held-out prompts for the final table: .txt, .csv, .jsonl or .parquet")
    add("--num_eval_prompts", type=int, default=128)
    add("--eval_batch_size", type=int, default=16)
    add("--num_inference_steps", type=int, default=50)
    add("--guidance_scale", type=float, default=7.5)
    # Output
    add("--output_dir", default="acpo-lora-sd")
    add("--seed", type=int, default=0)
    add("--checkpointing_steps", type=int, default=500)
    add("--checkpoints_total_limit", type=int)
    add("--resume_from_checkpoint", help='"latest", or the name of a checkpoint folder')
    add("--report_to", default="tensorboard", help='a tracker of accelerate, "all" or "none"')
    add("--logging_dir", default="logs")
    add("--push_to_hub", action="store_true")
    add("--hub_model_id")
    add("--hub_token")

    args = parser.parse_args()
    args.demo = args.pretrained_model_name_or_path is None
    if args.demo:
        if not DEMO_DIR.is_dir():
            parser.error(
                f"no --pretrained_model_name_or_path, and the demo is not at {DEMO_DIR}: name a model, or clone the repository"
            )
        parser.set_defaults(**DEMO | {"evaluator": None, "judge": None})  # what is given would be appended to them
        args = parser.parse_args(namespace=argparse.Namespace(demo=True))
        args.evaluator, args.judge = args.evaluator or [DEMO["evaluator"]], args.judge or [DEMO["judge"]]
    args.lora_alpha = args.lora_alpha or args.rank

    # What can be said without loading anything is said now.
    if sum(source is not None for source in (args.dataset_name, args.train_data_dir, args.train_prompts)) != 1:
        parser.error("need one of --dataset_name, --train_data_dir and --train_prompts")
    if args.train_prompts and (args.late_start == "data" or args.diffusion_weight):
        parser.error("--train_prompts has no images: it needs --late_start rollout and --diffusion_weight 0")
    if (args.decode == "crop") != bool(args.decode_size) or (args.decode == "tiny") != bool(
        args.tiny_vae_name_or_path
    ):
        parser.error("--decode crop goes with --decode_size, --decode tiny with --tiny_vae_name_or_path")
    if args.decode_batch_size is not None and args.decode_batch_size < 1:
        parser.error(f"--decode_batch_size must be at least 1, got {args.decode_batch_size}")
    if args.cache_latents and (args.train_prompts or not args.center_crop):
        parser.error("--cache_latents needs images and --center_crop: a random crop is another image every time")
    if args.quality_weight and args.evaluator is None:
        parser.error("--quality_weight above 0 needs an --evaluator, for example ipce:PATH (see train_iqa_ipce.py)")
    try:
        args.evaluator_weight = guide_weights(args.evaluator or [], args.evaluator_weight) or None
    except ValueError as error:
        parser.error(f"--evaluator_weight: {error}")
    if min(args.quality_weight, args.anchor_weight, args.diffusion_weight) < 0 or not (
        args.quality_weight or args.anchor_weight or args.diffusion_weight
    ):
        parser.error("the weights must not be negative, and one of them must be above 0")
    if args.anchor_budget is not None and not (args.anchor_budget > 0 and args.anchor_weight):
        parser.error("--anchor_budget must be above 0, and needs an --anchor_weight to start from")
    if args.late_start == "rollout" and args.diffusion_timesteps == "late":
        parser.error("--diffusion_timesteps late needs --late_start data: a sampled latent has no known noise")
    if args.diffusion_timesteps == "late" and not args.diffusion_weight:
        parser.error("--diffusion_timesteps late has no effect with --diffusion_weight 0")
    if args.late_steps < 1 or not 1 <= (args.late_backprop_steps or args.late_steps) <= args.late_steps:
        parser.error("expected 1 <= --late_backprop_steps <= --late_steps")
    if args.push_to_hub and args.report_to == "wandb" and args.hub_token:
        parser.error("--hub_token would be logged by wandb: use `hf auth login` instead")
    return args


def load_models(args, weight_dtype, device):
    source = (args.pretrained_model_name_or_path, args.revision, args.variant)
    noise_scheduler, tokenizer, text_encoder, vae, unet = load_stable_diffusion(*source, weight_dtype, device)
    total = noise_scheduler.config.num_train_timesteps
    if not 1 <= args.tmax <= total:
        raise ValueError(f"--tmax must be in 1..{total}, the model's number of training timesteps, got {args.tmax}")
    multiple = latent_factor(vae) * 2 ** (len(unet.config.block_out_channels) - 1)
    if args.resolution < 1 or args.resolution % multiple:
        raise ValueError(
            f"--resolution must be a multiple of {multiple} for this VAE and U-Net, got {args.resolution}"
        )
    if args.decode_size and (args.decode_size % latent_factor(vae) or not 0 < args.decode_size <= args.resolution):
        raise ValueError(
            f"--decode_size must be a multiple of {latent_factor(vae)} up to the resolution, got {args.decode_size}"
        )
    decoder = load_tiny_vae(args.tiny_vae_name_or_path, vae) if args.decode == "tiny" else vae
    return noise_scheduler, tokenizer, text_encoder, vae, decoder, unet


def add_lora(unet, args):
    """A new adapter, or the one of --lora_path; its weights in fp32, whatever the base's precision. Returns them."""
    targets = [name.strip() for name in args.lora_target_modules.split(",")]
    config = {"r": args.rank, "lora_alpha": args.lora_alpha, "target_modules": targets}
    if args.lora_path:
        saved = read_lora_config(args.lora_path)
        config = {"r": saved["rank"], "lora_alpha": saved["alpha"], "target_modules": saved["target_modules"]}
    unet.add_adapter(LoraConfig(**config, init_lora_weights="gaussian"))
    cast_training_params(unet, dtype=torch.float32)
    if args.lora_path:
        load_lora(unet, args.lora_path)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def main(args):
    accelerator = start_run(args, sharding=SHARDED)
    if args.demo:
        in_force = ", ".join(f"{name} {getattr(args, name)}" for name in DEMO if "/" not in str(getattr(args, name)))
        logger.info(
            "This is the embedded demo (a small Stable Diffusion of emoji drawings, 64 px), with its own settings: "
            f"{in_force}. For the paper's run name a model, data and a guide: --pretrained_model_name_or_path "
            "CompVis/stable-diffusion-v1-4 --train_data_dir visual-genome --evaluator ipce:PATH"
        )
        if accelerator.device.type == "cpu":
            use_all_cpus()
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint, accelerator)

    # Data and prompts are checked before any model is loaded.
    if args.train_prompts:
        dataset = read_prompts(args.train_prompts)
    else:
        dataset = load_captioned_images(
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
            dataset = check_images(dataset, args.image_column, args.skip_bad_images)
    eval_prompts = read_prompts(args.eval_prompts)[: args.num_eval_prompts] if args.eval_prompts else []
    evaluator = None
    if args.evaluator:  # with --quality_weight 0 it is for the final table alone
        evaluator = load_guide(args.evaluator, args.evaluator_weight, accelerator.device)
    judges = load_judges(args.judge or [], accelerator.device)

    weight_dtype = WEIGHT_DTYPES.get(accelerator.mixed_precision, torch.float32)
    noise_scheduler, tokenizer, text_encoder, vae, decoder, unet = load_models(args, weight_dtype, accelerator.device)
    lora_parameters = add_lora(unet, args)  # a list: an iterator would leave nothing to clip
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        decoder.enable_gradient_checkpointing()
    if args.torch_compile:
        compile_models(unet, decoder)

    # Sample n of the run is a function of (seed, n) alone, so resuming means to start counting at n.
    num_samples = (
        args.max_train_steps * args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    )
    if args.train_prompts:
        train_set = Prompts(dataset, tokenizer, num_samples, args.seed)
    else:
        options = {"num_samples": num_samples, "seed": args.seed, "random_flip": args.random_flip}
        options |= {"image_column": args.image_column, "caption_column": args.caption_column}
        if args.cache_latents:
            folder = Path(args.cache_dir or args.output_dir, "latents")
            train_set = CachedLatents(dataset, tokenizer, args.resolution, folder, dtype=weight_dtype, **options)
            train_set.build(vae, text_encoder, accelerator)
        else:
            train_set = CaptionedImages(dataset, tokenizer, args.resolution, center_crop=args.center_crop, **options)

    probe = None
    if args.quality_weight:
        batch = next(iter(DataLoader(train_set, batch_size=2, collate_fn=collate)))
        generator, on_device = step_generator(args.seed), accelerator.device
        if args.train_prompts:
            latents = randn_tensor(latents_shape(vae, 2, args.resolution), generator, on_device)
        else:
            batch = {k: v.to(on_device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            latents = encode_images(batch, vae, generator)
        with torch.no_grad():
            probe = (decode_latents(decoder, latents), batch["prompts"])
        check_evaluator(evaluator, *probe)
    models = (unet, vae, decoder, text_encoder)
    log_estimate(accelerator, training_step, models, evaluator, judges, noise_scheduler, probe, args)

    optimizer = torch.optim.AdamW(
        lora_parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )
    unet, optimizer, lr_scheduler = prepare(accelerator, unet, optimizer, lr_scheduler)
    lora_parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]  # FSDP2 replaces them
    register_lora_hooks(accelerator, unet)
    alarm, validation_prompts = None, eval_prompts[: args.num_validation_prompts]
    if evaluator and len(validation_prompts) > 1:
        scorers, keep_best = (evaluator, judges, accelerator.device), args.on_hacking == "keep_best"
        sample_fixed = partial(sample, description="validation", args=args)
        alarm = HackingAlarm(validation_prompts, sample_fixed, *scorers, args.output_dir, keep_best)
    budget = AnchorBudget(args.anchor_budget, args.anchor_weight) if args.anchor_budget else None
    balance = None
    if args.balance_steps and accelerator.distributed_type not in SHARDED:  # those have a backward pass of their own
        balance = Balance(accelerator, lora_parameters, args.tmax)
    run = RunState(accelerator, args.train_batch_size)
    accelerator.register_for_checkpointing(*filter(None, (run, alarm, budget, balance)))
    first_step = resume(accelerator, checkpoint)

    batches = iter(
        DataLoader(
            train_set,
            batch_sampler=own_batches(first_step, args.max_train_steps, args.train_batch_size, accelerator),
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            generator=torch.Generator().manual_seed(args.seed),
        )
    )
    negative_embeds = encode_prompts({"input_ids": tokenize(tokenizer, [""]).to(accelerator.device)}, text_encoder)
    if args.cache_latents:
        offload_encoders(vae, text_encoder)

    def next_batch():
        batch = next(batches) | {"negative_embeds": negative_embeds}
        return {k: v.to(accelerator.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

    accelerator.init_trackers("acpo-lora-sd", config=settings_of(args))
    logger.info("***** Running training *****")
    logger.info(
        f"  {len(dataset)} images, {sum(p.numel() for p in lora_parameters)} trained parameters, steps {first_step}..{args.max_train_steps}"
    )
    progress = tqdm(
        range(first_step, args.max_train_steps),
        initial=first_step,
        total=args.max_train_steps,
        disable=not accelerator.is_local_main_process,
    )
    catch_sigterm(accelerator)
    for step in progress:
        measured = {}
        for micro_step in range(args.gradient_accumulation_steps):
            generator = shared_generator(args.seed, step, micro_step, accelerator)
            step_args = argparse.Namespace(**vars(args) | ({"anchor_weight": budget.weight} if budget else {}))
            with accelerator.accumulate(unet):
                loss, terms = training_step(
                    next_batch(), unet, vae, decoder, text_encoder, evaluator, noise_scheduler, generator, step_args
                )
                if balance and accelerator.sync_gradients and (step + 1) % args.balance_steps == 0:
                    weights = (step_args.diffusion_weight, step_args.anchor_weight, step_args.quality_weight)
                    measured = balance.measure(terms, *weights, step + 1)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    grad_norm = run.clip(accelerator, optimizer, lora_parameters, args.max_grad_norm, step + 1)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
        # Of several guides each one's own score too.
        terms |= {f"score_{name}": score for name, score in getattr(evaluator, "last_scores", {}).items()}
        logs = mean_terms(accelerator, terms) | {"grad_norm": grad_norm, "lr": lr_scheduler.get_last_lr()[0]}
        if budget:
            logs["anchor_weight"] = budget.update(logs["loss_anchor"])
        accelerator.log(logs | measured | {"skipped_steps": run.skipped_steps}, step=step + 1)
        progress.set_postfix({name.removeprefix("loss_"): f"{value:.4g}" for name, value in logs.items()})

        if (step + 1) % args.validation_steps == 0 and (args.validation_prompt or alarm):
            hacked = [False]
            with whole_weights(accelerator, unet):
                if accelerator.is_main_process:
                    parts = (accelerator.unwrap_model(unet), vae, text_encoder, tokenizer, noise_scheduler)
                    hacked = [validate(build_pipeline(*parts), alarm, accelerator, step + 1, args)]
                    if args.cache_latents:
                        offload_encoders(vae, text_encoder)
            if broadcast_object_list(hacked)[0] and args.on_hacking != "warn":
                break
        due = (step + 1) % args.checkpointing_steps == 0
        checkpoint_or_stop(accelerator, args.output_dir, step + 1, due, args.checkpoints_total_limit)

    accelerator.wait_for_everyone()
    with whole_weights(accelerator, unet):
        if accelerator.is_main_process:
            unet = accelerator.unwrap_model(unet)
            if alarm and alarm.rang and args.on_hacking == "keep_best":
                alarm.restore_best(unet)
            save_lora(unet, args.output_dir)
            release_sigterm()  # what follows can be had again
            pipeline = build_pipeline(unet, vae, text_encoder, tokenizer, noise_scheduler)
            scorers = guide_parts(evaluator) | judges
            events = {"skipped_steps": run.skipped_steps, "hacking_alarms": alarm.rang if alarm else {}}
            finish(pipeline, scorers, eval_prompts, events, accelerator.device, args)
    accelerator.end_training()


def sample(pipeline, prompts, description, args):
    """Images (N, 3, H, W) in [0, 1]; the same prompt list and seed give the same initial noise."""
    settings = (args.seed, args.eval_batch_size, args.num_inference_steps, args.guidance_scale)
    return sample_images(pipeline, prompts, *settings, description)


def validate(pipeline, alarm, accelerator, step, args):
    """Pictures and scores while training; True if the guide is being deceived."""
    if args.validation_prompt:
        images = sample(pipeline, [args.validation_prompt] * args.num_validation_images, "validation", args)
        log_images(accelerator, "validation", images, step)
        with atomic_write(Path(args.output_dir, "validation", f"step-{step}.png")) as temporary:
            save_image(images, temporary)
    return alarm is not None and alarm.check(accelerator, pipeline, step)


def finish(pipeline, scorers, eval_prompts, events, device, args):
    """Base against fine-tuned on held-out prompts: comparison.png, metrics.json, a printed table, the model card."""
    output_dir = Path(args.output_dir)
    prompts = eval_prompts or [args.validation_prompt] * args.num_validation_images * bool(args.validation_prompt)
    table, pictures = "", []
    if prompts:
        pipeline.unet.disable_adapters()
        base = sample(pipeline, prompts, "sampling the base model", args)
        pipeline.unet.enable_adapters()
        finetuned = sample(pipeline, prompts, "sampling the fine-tuned model", args)
        comparisons, guide_scores = {}, None
        for name, scorer in scorers.items():
            if scorer is not None:
                scores = [score_images(scorer, images, prompts, device) for images in (base, finetuned)]
                comparisons[name] = paired_comparison(*scores)
                guide_scores = guide_scores or scores
        drift = prediction_drift(pipeline, base, prompts, args.seed, args.eval_batch_size)
        table = comparison_table(comparisons)
        table += f"\n\nDrift (eq. 7 on noised samples of the base model, all timesteps): {drift.mean():.3g}"
        metrics = {"comparisons": comparisons, "num_prompts": len(prompts)} | events
        metrics["sets"] = {"drift": [drift.mean().item(), drift.std().item() if len(drift) > 1 else 0.0]}
        with atomic_write(output_dir / "metrics.json") as temporary:
            temporary.write_text(json.dumps(metrics, indent=2))
        comparison_picture(output_dir / "comparison.png", base, finetuned, prompts, guide_scores)
        pictures = ["comparison.png"]
        print(f"\n{table}\n\nThe picture, the numbers and the LoRA are in {output_dir.resolve()}")
    save_model_card(
        output_dir,
        base_model=args.pretrained_model_name_or_path,
        model_description="LoRA fine-tuned by ACPO (Anchor-Constrained Perceptual Optimization).",
        tags=["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "diffusers", "lora", "acpo"],
        dataset=args.dataset_name or args.train_data_dir or args.train_prompts,
        image_files=pictures,
        metrics=table,
        settings=settings_of(args),
    )
    if args.push_to_hub:
        push_to_hub(output_dir, args.hub_model_id, args.hub_token, "End of training")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, ImportError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
