"""Train an unconditional DDPM from scratch, or fine-tune one by ACPO: late-step samples are scored by a frozen
evaluator, the score's gradient trains the U-Net, and an anchor holds its predictions to the frozen base model's
(sections 3.3 and 4.2.1, eqs. 5-9).

    accelerate launch examples/train_acpo_ddpm.py --train_data_dir faces --use_ema --output_dir ddpm-faces
    accelerate launch examples/train_acpo_ddpm.py --train_data_dir faces --pretrained_model_name_or_path ddpm-faces \\
        --evaluator two-stream:PATH --last_steps 10

With neither data nor model named it runs the embedded demo, on a CPU in minutes. docs/unconditional.md has more.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import copy
import json
import math
from functools import partial
from pathlib import Path

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from diffusers import DDPMScheduler
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torchvision.utils import save_image
from tqdm.auto import tqdm

from acpo_utils.anchor import base_prediction, without_adapter
from acpo_utils.checkpoints import catch_sigterm, checkpoint_or_stop, find_checkpoint, release_sigterm
from acpo_utils.data import (
    UnconditionalImages,
    check_images,
    hold_out,
    load_unconditional_images,
    load_validation_images,
    to_tensor,
)
from acpo_utils.ddpm import (
    SAMPLERS,
    build_pipeline,
    load_ddpm,
    new_unet,
    register_adapter_hooks,
    save_adapter,
    save_ddpm,
    usage_example,
)
from acpo_utils.evaluation.grids import comparison_picture
from acpo_utils.evaluation.sampling import sample_unconditional
from acpo_utils.evaluation.unconditional import compare, measure, split_judges, summarise
from acpo_utils.evaluators import check_evaluator, guide_parts, guide_weights, load_guide
from acpo_utils.files import atomic_write
from acpo_utils.hub import push_to_hub, save_model_card, settings_of
from acpo_utils.late_step import denoise_late_steps, resolve_late_window, rollout_late_samples, sample_late_timesteps
from acpo_utils.losses import acpo_objective, anchor_loss, diffusion_loss, quality_loss
from acpo_utils.randomness import batch_randint, batch_randn, own_batches, shared_generator
from acpo_utils.sharding import SHARDED
from acpo_utils.training.ema import ema_weights, register_ema_hooks
from acpo_utils.training.gradient_balance import Balance
from acpo_utils.training.run import RunState, log_images, mean_terms, resume, start_run, use_all_cpus


logger = get_logger(__name__, log_level="INFO")


def training_step(batch, unet, base_unet, evaluator, noise_scheduler, generator, args):
    """L = L_diff + anchor_weight * L_anchor + quality_weight * L_quality (eq. 9). Returns the loss and its terms."""
    loss_diffusion = loss_anchor = loss_quality = scores = None
    x0 = batch["pixel_values"]  # (B, 3, H, W) in [-1, 1]  x0: the "latents" of a DDPM are pixels
    noise = batch_randn(x0.shape, generator, x0.device, x0.dtype)  # (B, 3, H, W)  eps

    if args.anchor_weight or args.quality_weight or args.diffusion_timesteps == "late":
        if args.late_start == "data":  # z_t, t < tmax, is a noised real image
            late_timesteps = sample_late_timesteps(len(x0), args.tmax, generator, x0.device)  # (B,)
            late_samples = noise_scheduler.add_noise(x0, noise, late_timesteps)  # (B, 3, H, W)  z_t
        else:  # z_t is the current model's own sample
            window, like = (args.tmax, args.ddpm_num_inference_steps, generator), (x0.device, x0.dtype)
            predict = partial(predict_noise, unet, False)
            late_samples, late_timesteps = rollout_late_samples(predict, noise_scheduler, x0.shape, *window, *like)
        if args.anchor_weight:  # the frozen pass first: its activations are gone before the student's graph is built
            base_pred = base_prediction(base_unet, late_samples, late_timesteps)  # (B, 3, H, W)  eps_theta
        # One student pass serves L_anchor, L_quality and, with --diffusion_timesteps late, L_diff.
        late_pred = unet(late_samples, late_timesteps, return_dict=False)[0]  # (B, 3, H, W)  eps_phi

    if args.quality_weight:
        predict = partial(predict_noise, unet, args.gradient_checkpointing)
        late = (late_pred, late_timesteps, late_samples, args.late_steps, args.late_backprop_steps)
        z0 = denoise_late_steps(predict, noise_scheduler, *late)  # (B, 3, H, W)  z_0_hat (eq. 5)
        images = (z0 / 2 + 0.5).clamp(0, 1)  # (B, 3, H, W) in [0, 1]  x_hat, with no D to decode by (eq. 5)
        scores = evaluator.score(images, None)  # (B,) in (0, 1)  Q(x_hat)
        loss_quality = quality_loss(scores)  # L_quality = mean(1 - Q) (eq. 6)
    if args.anchor_weight:
        loss_anchor = anchor_loss(late_pred, base_pred)  # L_anchor = ||eps_phi - eps_theta||^2 (eq. 7)
    if args.diffusion_weight:  # L_diff = ||eps - eps_phi||^2 (eq. 8)
        if args.diffusion_timesteps == "late":
            timesteps, model_pred = late_timesteps, late_pred
        else:
            num_train_timesteps = noise_scheduler.config.num_train_timesteps
            timesteps = batch_randint(num_train_timesteps, len(x0), generator, x0.device)  # (B,)
            noisy_images = noise_scheduler.add_noise(x0, noise, timesteps)  # (B, 3, H, W)  z_t, any t
            model_pred = unet(noisy_images, timesteps, return_dict=False)[0]  # (B, 3, H, W)  eps_phi
        loss_diffusion = diffusion_loss(noise_scheduler, model_pred, x0, noise, timesteps, args.snr_gamma)

    losses = (loss_diffusion, loss_anchor, loss_quality)
    weights = (args.diffusion_weight, args.anchor_weight, args.quality_weight)
    loss, terms = acpo_objective(*losses, *weights)  # L (eq. 9)
    return loss, terms if scores is None else terms | {"score": scores, "late_timesteps": late_timesteps}


def predict_noise(unet, gradient_checkpointing, samples, timesteps):
    """One step of a chain; checkpointed, the chain keeps its samples and computes each step again in `backward`."""
    if gradient_checkpointing and torch.is_grad_enabled():
        return checkpoint(unet, samples, timesteps, return_dict=False, use_reentrant=False)[0]
    return unet(samples, timesteps, return_dict=False)[0]


DEMO_DIR = Path(__file__).resolve().parent / "demo"
# The embedded demo's settings, where they differ from the defaults below, which are the paper's or diffusers' own.
DEMO = {
    "pretrained_model_name_or_path": str(DEMO_DIR / "ddpm-faces"),
    "train_data_dir": str(DEMO_DIR / "faces" / "train.parquet"),
    "validation_data_dir": str(DEMO_DIR / "faces" / "validation.parquet"),
    "evaluator": f"two-stream:{DEMO_DIR / 'two-stream'}",
    "judge": ["kid", "diversity"],
    "train_batch_size": 8,
    "rank": 8,
    "late_start": "rollout",
    "last_steps": 5,
    "quality_weight": 0.3,
    "learning_rate": 5e-4,
    "max_train_steps": 40,
    "balance_steps": 20,
    "sampler": "ddim",
    "ddpm_num_inference_steps": 20,
    "num_eval_images": 64,
}
# From scratch: the settings of diffusers' train_unconditional.py, and no ACPO.
SCRATCH = {
    "rank": 0,
    "anchor_weight": 0.0,
    "quality_weight": 0.0,
    "num_epochs": 100,
    "learning_rate": 1e-4,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 500,
    "adam_beta1": 0.95,
    "adam_weight_decay": 1e-6,
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # fmt: off
    # Model and evaluator
    add("--pretrained_model_name_or_path", help="DDPMPipeline or DDIMPipeline to fine-tune (hub id or folder), or the folder of a U-Net; none: train from scratch")
    add("--revision")
    add("--model_config_name_or_path", help="from scratch: config.json of a UNet2DModel, or its folder; default: the U-Net of diffusers' train_unconditional.py")
    add("--evaluator", action="append", help="the frozen guide Q: two-stream:PATH or docs/evaluators.md; again for several")
    add("--evaluator_weight", action="append", type=float, help="one for each of several guides; equal by default")
    add("--judge", action="append", help="of the final table, guides nothing: kid, diversity or an evaluator; again for several")
    # Data
    add("--dataset_name", help="hub data set with an image column, such as uoft-cs/cifar10")
    add("--dataset_config_name")
    add("--train_data_dir", help="image folder, or parquet")
    add("--image_column", help='default: "image", or "img" where there is only that')
    add("--max_train_samples", type=int)
    add("--skip_bad_images", action="store_true", help="leave unreadable images out, and count them")
    add("--cache_dir")
    add("--resolution", type=int, help="default: the model's own; 64 from scratch")
    add("--center_crop", action="store_true")
    add("--random_flip", action="store_true")
    add("--dataloader_num_workers", type=int, default=0)
    # ACPO
    window = parser.add_mutually_exclusive_group().add_argument
    window("--last_steps", type=int, help="the late window as the last N sampling steps; default 10. Under the schedule of --ddpm_num_inference_steps tmax is the timestep of the step before them")
    window("--tmax", type=int, help="the late window by its upper end: quality and anchor act at t < tmax")
    window("--full_trajectory", action="store_true", help="the window is all t: the paper's full fine-tuning")
    add("--quality_weight", type=float, default=1.0, help="lambda_quality of eq. 9")
    add("--anchor_weight", type=float, default=1.0, help="lambda_anchor of eq. 9")
    add("--diffusion_weight", type=float, default=1.0, help="weight of L_diff; 1 in the paper")
    add("--diffusion_timesteps", choices=["full", "late"], default="full", help="late shares the late forward pass")
    add("--late_start", choices=["data", "rollout"], default="data", help="z_t from real images, or sampled from noise")
    add("--late_steps", type=int, default=1, help="K denoising steps from t to 0; 1 is the one-step estimate")
    add("--late_backprop_steps", type=int, help="how many of the last K steps keep their gradient; all by default")
    add("--snr_gamma", type=float, help="min-SNR weighting of L_diff")
    add("--balance_steps", type=int, default=100, help="how often to measure each term's share of the gradient; 0: never")
    # LoRA, optimizer and EMA
    add("--rank", type=int, default=4, help="of the LoRA; 0 trains all weights, anchored to a frozen copy")
    add("--lora_alpha", type=int, help="default: the rank")
    add("--lora_target_modules", default="to_q,to_k,to_v,to_out.0,conv,conv1,conv2,conv_shortcut,conv_in,conv_out", help="comma-separated layer names of the U-Net")
    add("--train_batch_size", type=int, default=16)
    add("--num_epochs", type=int, help="default: 100 from scratch")
    add("--max_train_steps", type=int, help="instead of --num_epochs; default: 1000 with a pretrained model")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--gradient_checkpointing", action="store_true", help="of the U-Net, and of each step of a chain")
    add("--learning_rate", type=float, default=2e-5, help="from scratch 1e-4")
    add("--lr_scheduler", choices=[s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT], default="constant", help="from scratch cosine")
    add("--lr_warmup_steps", type=int, default=0, help="from scratch 500")
    add("--adam_beta1", type=float, default=0.9, help="from scratch 0.95")
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=0.0, help="0 is Adam, as in the paper; from scratch 1e-6")
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=1.0)
    add("--use_ema", action="store_true", help="sample and save the moving average of the weights")
    add("--ema_inv_gamma", type=float, default=1.0)
    add("--ema_power", type=float, default=3 / 4)
    add("--ema_max_decay", type=float, default=0.9999)
    add("--mixed_precision", choices=["no", "fp16", "bf16"])
    add("--allow_tf32", action="store_true")
    add("--torch_compile", action="store_true", help="the U-Net, at the first step: minutes")
    # Noise schedule: of a pretrained pipeline its own
    add("--prediction_type", choices=["epsilon", "v_prediction", "sample"], default="epsilon", help="from scratch")
    add("--ddpm_num_steps", type=int, default=1000, help="from scratch: number of training timesteps")
    add("--ddpm_beta_schedule", default="linear", help="from scratch")
    add("--ddpm_num_inference_steps", type=int, default=1000, help="sampling steps: of all pictures, of --last_steps and of rollouts")
    add("--sampler", choices=list(SAMPLERS), help="pipeline to sample by and to save; default: the pretrained one's, or ddpm")
    # Validation and final comparison
    add("--validation_data_dir", help="held-out images for the MSE: image folder, or parquet; default: the last of the training images, which are then not trained on")
    add("--num_validation_images", type=int, default=64, help="at most so many; 0: no MSE")
    add("--save_images_epochs", type=int, default=10)
    add("--save_model_epochs", type=int, default=10)
    add("--num_eval_images", type=int, default=64, help="drawn for the final table, by base and fine-tuned model from the same noise")
    add("--eval_batch_size", type=int, default=16)
    # Output
    add("--output_dir", default="acpo-ddpm")
    add("--weight_dtype", choices=["fp32", "fp16"], default="fp32", help="how the U-Net's weights are stored; they load as fp32")
    add("--seed", type=int, default=0)
    add("--checkpointing_steps", type=int, default=500)
    add("--checkpoints_total_limit", type=int)
    add("--resume_from_checkpoint", help='"latest", or the name of a checkpoint folder')
    add("--report_to", "--logger", dest="report_to", default="tensorboard", help='a tracker of accelerate, "all" or "none"')
    add("--logging_dir", default="logs")
    add("--push_to_hub", action="store_true")
    add("--hub_model_id")
    add("--hub_token")
    # fmt: on

    args = parser.parse_args()
    data_given = args.dataset_name is not None or args.train_data_dir is not None
    mode = "fine-tune" if args.pretrained_model_name_or_path else "scratch" if data_given else "demo"
    demo_model = DEMO["pretrained_model_name_or_path"]
    if mode == "demo" and not Path(demo_model).is_dir():
        parser.error(f"no data and no model are named, and the demo's is not at {demo_model}: docs/unconditional.md")
    if mode != "fine-tune":  # what is given would be appended to the demo's own lists
        parser.set_defaults(**(DEMO | {"evaluator": None, "judge": None} if mode == "demo" else SCRATCH))
        args = parser.parse_args()
    if mode == "demo":
        args.evaluator, args.judge = args.evaluator or [DEMO["evaluator"]], args.judge or DEMO["judge"]
    args.demo, args.scratch = mode == "demo", mode == "scratch"
    check_args(parser, args)
    return args


def check_args(parser, args):
    """What can be said without loading anything is said now; defaults that depend on other flags are filled in."""
    if (args.dataset_name is None) == (args.train_data_dir is None):
        parser.error("need one of --dataset_name and --train_data_dir")
    if args.scratch and (args.rank or args.anchor_weight):
        parser.error("--rank and --anchor_weight need a base model: name it by --pretrained_model_name_or_path")
    if not args.scratch and args.model_config_name_or_path:
        parser.error("--model_config_name_or_path is for training from scratch: a pretrained model has its own")
    if args.quality_weight and args.evaluator is None:
        parser.error("--quality_weight above 0 needs an --evaluator, such as two-stream:PATH (train_iqa_twostream.py)")
    try:
        args.evaluator_weight = guide_weights(args.evaluator or [], args.evaluator_weight) or None
    except ValueError as error:
        parser.error(f"--evaluator_weight: {error}")
    if args.num_eval_images in (1, 2, 3) or args.num_validation_images in (1, 2, 3):
        parser.error("--num_eval_images and --num_validation_images: expected 0 or at least 4, for the statistics")
    if "kid" in (args.judge or []) and not args.num_validation_images:
        parser.error("--judge kid compares with held-out images: it needs --num_validation_images above 0")
    if min(args.save_images_epochs, args.save_model_epochs, args.checkpointing_steps) < 1:
        parser.error("--save_images_epochs, --save_model_epochs and --checkpointing_steps must be at least 1")
    weights = (args.quality_weight, args.anchor_weight, args.diffusion_weight)
    if min(weights) < 0 or not any(weights):
        parser.error("the weights must not be negative, and one of them must be above 0")
    if args.late_start == "rollout" and args.diffusion_timesteps == "late":
        parser.error("--diffusion_timesteps late needs --late_start data: a sampled image has no known noise")
    if args.diffusion_timesteps == "late" and not args.diffusion_weight:
        parser.error("--diffusion_timesteps late has no effect with --diffusion_weight 0")
    if args.late_steps < 1 or not 1 <= (args.late_backprop_steps or args.late_steps) <= args.late_steps:
        parser.error("expected 1 <= --late_backprop_steps <= --late_steps")
    if args.push_to_hub and args.report_to == "wandb" and args.hub_token:
        parser.error("--hub_token would be logged by wandb: use `hf auth login` instead")
    if args.tmax is not None or args.full_trajectory:
        args.last_steps = None
    elif args.last_steps is None:
        args.last_steps = min(10, args.ddpm_num_inference_steps)
    if args.max_train_steps is None and args.num_epochs is None:
        args.max_train_steps = 1000
    args.lora_alpha = args.lora_alpha or args.rank


def load_data(args):
    """Training images, and held-out ones (or None): files that exist and can be read, all of them."""
    where = {"image_column": args.image_column, "cache_dir": args.cache_dir, "seed": args.seed}
    source = {"dataset_name": args.dataset_name, "dataset_config_name": args.dataset_config_name}
    source |= {"train_data_dir": args.train_data_dir, "max_train_samples": args.max_train_samples}
    dataset = check_images(load_unconditional_images(**source, **where), "image", args.skip_bad_images)
    if not args.num_validation_images:
        return dataset, None
    if args.validation_data_dir is None:
        return hold_out(dataset, args.num_validation_images)
    held_out = load_validation_images(args.validation_data_dir, args.num_validation_images, **where)
    return dataset, check_images(held_out, "image", args.skip_bad_images)


def load_models(args):
    """The U-Net, trained whole, and its noise schedule. Fills in resolution, sampler and the late window."""
    if args.scratch:
        args.resolution, args.sampler = args.resolution or 64, args.sampler or "ddpm"
        noise_scheduler, unet = None, new_unet(args.model_config_name_or_path, args.resolution)
    else:
        unet, noise_scheduler, sampler = load_ddpm(args.pretrained_model_name_or_path, args.revision)
        args.resolution, args.sampler = args.resolution or unet.config.sample_size, args.sampler or sampler
        if args.resolution != unet.config.sample_size:
            raise ValueError(f"--resolution {args.resolution}: the model draws {unet.config.sample_size} px")
    if noise_scheduler is None:
        noise_scheduler = DDPMScheduler(
            num_train_timesteps=args.ddpm_num_steps,
            beta_schedule=args.ddpm_beta_schedule,
            prediction_type=args.prediction_type,
        )
    schedule = (noise_scheduler, args.ddpm_num_inference_steps)
    args.tmax, args.last_steps = resolve_late_window(*schedule, args.tmax, args.last_steps)
    return unet, noise_scheduler


def add_lora(unet, args):
    targets = [name.strip() for name in args.lora_target_modules.split(",")]
    config = LoraConfig(r=args.rank, lora_alpha=args.lora_alpha, target_modules=targets, init_lora_weights="gaussian")
    try:
        return get_peft_model(unet, config)
    except ValueError as error:
        raise ValueError(f"--lora_target_modules {args.lora_target_modules}: {str(error).splitlines()[0]}") from error


def main(args):
    accelerator = start_run(args, sharding=(DistributedType.DEEPSPEED,))
    if accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.mixed_precision != "no":
        raise ValueError(
            f"mixed_precision {accelerator.mixed_precision} with DeepSpeed: expected no, or DDP. DeepSpeed would keep the "
            "whole U-Net in half precision, too coarse for its average (EMA)."
        )
    if args.demo:
        in_force = ", ".join(f"{name} {getattr(args, name)}" for name in DEMO if "/" not in str(getattr(args, name)))
        logger.info(
            f"This is the embedded demo (a small DDPM of drawn faces, 64 px), with its own settings: {in_force}. For a "
            "run of your own name data by --dataset_name or --train_data_dir, and a model for all but a new one."
        )
        if accelerator.device.type == "cpu":
            use_all_cpus()
    resume_from = find_checkpoint(args.output_dir, args.resume_from_checkpoint, accelerator)

    # Data is checked before any model is loaded.
    with accelerator.main_process_first():
        dataset, held_out = load_data(args)
    guide = (args.evaluator, args.evaluator_weight, accelerator.device)
    evaluator = load_guide(*guide) if args.evaluator else None
    judges = split_judges(args.judge or [], accelerator.device)
    unet, noise_scheduler = load_models(args)
    unet.train(args.scratch)  # a base model's dropout stays off: the anchor compares like with like
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.rank:
        unet = add_lora(unet, args)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]

    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    steps_per_epoch = math.ceil(len(dataset) / samples_per_step)
    if args.max_train_steps is None:
        args.max_train_steps = args.num_epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(
        parameters,
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
    unet, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)
    base_unet = None if args.scratch else unet  # with a LoRA: the same weights, the LoRA off
    if not args.scratch and not args.rank:
        base_unet = copy.deepcopy(accelerator.unwrap_model(unet)).requires_grad_(False)
    if args.torch_compile:
        for model in filter(None, (accelerator.unwrap_model(unet), base_unet)):
            model.compile()
    ema = None
    if args.use_ema:
        decay = {"decay": args.ema_max_decay, "inv_gamma": args.ema_inv_gamma, "power": args.ema_power}
        ema = EMAModel(parameters, use_ema_warmup=True, foreach=True, **decay)
        register_ema_hooks(accelerator, ema)
    if args.rank:
        register_adapter_hooks(accelerator, unet)
    balance = None
    if args.balance_steps and accelerator.distributed_type not in SHARDED:  # those have a backward pass of their own
        balance = Balance(accelerator, parameters, args.tmax)
    run = RunState(accelerator, args.train_batch_size)
    accelerator.register_for_checkpointing(*filter(None, (run, balance)))

    # Sample n of the run is a function of (seed, n) alone, so resuming means to start counting at n.
    first_step = resume(accelerator, resume_from)
    num_samples, crop = args.max_train_steps * samples_per_step, (args.center_crop, args.random_flip)
    train_set = UnconditionalImages(dataset, args.resolution, num_samples, args.seed, *crop)
    batches = iter(
        DataLoader(
            train_set,
            batch_sampler=own_batches(first_step, args.max_train_steps, args.train_batch_size, accelerator),
            num_workers=args.dataloader_num_workers,
            generator=torch.Generator().manual_seed(args.seed),
        )
    )
    if args.quality_weight:
        probe = next(iter(DataLoader(train_set, batch_size=2)))["pixel_values"].to(accelerator.device)
        check_evaluator(evaluator, (probe / 2 + 0.5).clamp(0, 1))

    accelerator.init_trackers("acpo-ddpm", config=settings_of(args))
    logger.info("***** Running training *****")
    logger.info(
        f"  {len(dataset)} images, {sum(p.numel() for p in parameters)} trained parameters, "
        f"steps {first_step}..{args.max_train_steps}, {steps_per_epoch} in an epoch"
    )
    if args.anchor_weight or args.quality_weight:
        logger.info(
            f"  late window: t < {args.tmax}, {args.last_steps} of {args.ddpm_num_inference_steps} sampling steps"
        )
    progress = tqdm(
        range(first_step, args.max_train_steps),
        initial=first_step,
        total=args.max_train_steps,
        disable=not accelerator.is_local_main_process,
    )
    catch_sigterm(accelerator)
    weights = (args.diffusion_weight, args.anchor_weight, args.quality_weight)
    for step in progress:
        measured = {}
        for micro_step in range(args.gradient_accumulation_steps):
            batch = {name: tensor.to(accelerator.device) for name, tensor in next(batches).items()}
            generator = shared_generator(args.seed, step, micro_step, accelerator)
            with accelerator.accumulate(unet):
                loss, terms = training_step(batch, unet, base_unet, evaluator, noise_scheduler, generator, args)
                if balance and accelerator.sync_gradients and (step + 1) % args.balance_steps == 0:
                    measured = balance.measure(terms, *weights, step + 1)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    grad_norm = run.clip(accelerator, optimizer, parameters, args.max_grad_norm, step + 1)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
        if ema is not None:
            ema.step(parameters)
        # Of several guides each one's own score too.
        terms |= {f"score_{name}": score for name, score in getattr(evaluator, "last_scores", {}).items()}
        logs = mean_terms(accelerator, terms) | {"grad_norm": grad_norm, "lr": lr_scheduler.get_last_lr()[0]}
        accelerator.log(logs | measured | {"skipped_steps": run.skipped_steps}, step=step + 1)
        progress.set_postfix({name.removeprefix("loss_"): f"{value:.4g}" for name, value in logs.items()})

        due = (step + 1) % args.checkpointing_steps == 0
        checkpoint_or_stop(accelerator, args.output_dir, step + 1, due, args.checkpoints_total_limit)
        epoch, rest = divmod(step + 1, steps_per_epoch)
        if rest == 0 and step + 1 < args.max_train_steps and accelerator.is_main_process:
            unet.eval()
            with ema_weights(ema, parameters):
                if epoch % args.save_images_epochs == 0:
                    pipeline = build_pipeline(accelerator.unwrap_model(unet), noise_scheduler, args.sampler)
                    settings = (args.seed, args.eval_batch_size, args.ddpm_num_inference_steps)
                    images = sample_unconditional(pipeline, args.eval_batch_size, *settings)
                    log_images(accelerator, "samples", images, step + 1)
                    with atomic_write(Path(args.output_dir, "samples", f"step-{step + 1}.png")) as temporary:
                        save_image(images, temporary)
                if epoch % args.save_model_epochs == 0:
                    save_model(accelerator.unwrap_model(unet), noise_scheduler, args)
            unet.train(args.scratch)

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unet = accelerator.unwrap_model(unet).eval()
        with ema_weights(ema, parameters):
            save_model(unet, noise_scheduler, args)
            release_sigterm()  # what follows can be had again
            held_out = held_out and to_tensor(held_out, args.resolution)  # (M, 3, H, W) in [0, 1]
            finish(unet, base_unet, noise_scheduler, evaluator, judges, held_out, run.skipped_steps, args)
    accelerator.end_training()


def save_model(unet, noise_scheduler, args):
    """A pipeline's folder, with the LoRA fused into it; the LoRA itself in `lora`."""
    if args.rank:
        save_adapter(unet, Path(args.output_dir, "lora"))
        unet = copy.deepcopy(unet).merge_and_unload()
    save_ddpm(build_pipeline(unet, noise_scheduler, args.sampler), args.output_dir, half=args.weight_dtype == "fp16")


def finish(unet, base_unet, noise_scheduler, evaluator, judges, held_out, skipped_steps, args):
    """Base against fine-tuned from the same noise: comparison.png, metrics.json, a printed table, the model card.

    From scratch there is no base: the means, and a sheet of samples.
    """
    output_dir = Path(args.output_dir)
    pictures, table = [], ""
    if args.num_eval_images:
        pipeline = partial(build_pipeline, noise_scheduler=noise_scheduler, sampler=args.sampler)
        measured = partial(
            measure,
            noise_scheduler=noise_scheduler,
            evaluators=guide_parts(evaluator),
            judges=judges,
            held_out=held_out,
            num_images=args.num_eval_images,
            seed=args.seed,
            batch_size=args.eval_batch_size,
            num_inference_steps=args.ddpm_num_inference_steps,
        )
        images, *measures = measured(pipeline(unet), description="sampling the trained model")
        if base_unet is None:
            numbers, table = summarise(*measures)
            with atomic_write(output_dir / "samples.png") as temporary:
                save_image(images[:64], temporary)
        else:
            with without_adapter(base_unet) as base:
                base_images, *base_measures = measured(pipeline(base), description="sampling the base model")
            numbers, table = compare(base_measures, measures)
            scores = [values["guide"] for values, _ in (base_measures, measures)] if evaluator else None
            titles = [f"noise {i}" for i in range(args.num_eval_images)]
            comparison_picture(output_dir / "comparison.png", base_images, images, titles, scores)
        pictures = ["samples.png" if base_unet is None else "comparison.png"]
        metrics = {"num_images": args.num_eval_images, "skipped_steps": skipped_steps} | numbers
        with atomic_write(output_dir / "metrics.json") as temporary:
            temporary.write_text(json.dumps(metrics, indent=2))
        print(f"\n{table}\n\nThe picture, the numbers and the pipeline are in {output_dir.resolve()}")
    how = "trained from scratch" if args.scratch else "fine-tuned by ACPO (Anchor-Constrained Perceptual Optimization)"
    save_model_card(
        output_dir,
        base_model=args.pretrained_model_name_or_path,
        model_description=f"Unconditional DDPM {how}.",
        tags=["unconditional-image-generation", "diffusers", "ddpm"] + ["acpo"] * (not args.scratch),
        dataset=args.dataset_name or args.train_data_dir,
        image_files=pictures,
        metrics=table,
        usage=usage_example(output_dir, args.pretrained_model_name_or_path, args.ddpm_num_inference_steps),
        settings=settings_of(args),
    )
    if args.push_to_hub:
        push_to_hub(output_dir, args.hub_model_id, args.hub_token, "End of training")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, ImportError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
