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
import math
from functools import partial
from pathlib import Path

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from diffusers import DDPMScheduler
from diffusers.optimization import SchedulerType
from diffusers.training_utils import EMAModel
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from acpo_utils import check_min_version, data, ddpm, late_step, losses
from acpo_utils.anchor import base_prediction
from acpo_utils.checkpoints import catch_signals, checkpoint_or_stop, is_due, release_signals
from acpo_utils.ddpm import SAMPLERS
from acpo_utils.evaluation.sampling import sample_unconditional
from acpo_utils.evaluation.unconditional import compare_unconditional_models, split_judges
from acpo_utils.evaluators import guide_parts, guide_score, load_guide
from acpo_utils.lora import check_target_modules
from acpo_utils.randomness import batch_randint, batch_randn, process_batches, shared_generator
from acpo_utils.training.arguments import at_step, check_numbers, check_objective, read_demo_settings
from acpo_utils.training.ema import ema_weights, register_ema_hooks
from acpo_utils.training.gradient_balance import GradientBalance
from acpo_utils.training.guide_check import check_guide
from acpo_utils.training.hub import push_to_hub, save_model_card, settings_of
from acpo_utils.training.optimizer import build_optimizer
from acpo_utils.training.run import log_images, mean_terms, progress_bar, start_run, use_all_cpus


check_min_version("0.2.0")
logger = get_logger(__name__, log_level="INFO")


def training_step(batch, unet, base_unet, evaluator, noise_scheduler, generator, args):
    """L = L_diff + anchor_weight * L_anchor + quality_weight * L_quality (eq. 9). Returns the loss and its terms."""
    loss_diffusion = loss_anchor = loss_quality = None
    x0 = batch["pixel_values"]  # (B, 3, H, W) in [-1, 1]  x0: the "latents" of a DDPM are pixels
    noise = batch_randn(x0.shape, generator, x0.device, x0.dtype)  # (B, 3, H, W)  eps

    if args.anchor_weight or args.quality_weight or args.diffusion_timesteps == "late":
        late_samples, late_timesteps = sample_late(x0, noise, unet, noise_scheduler, generator, args)  # z_t, t < tmax
        if args.anchor_weight:  # the frozen pass first: its activations are gone before the student's graph is built
            base_pred = base_prediction(base_unet, late_samples, late_timesteps)  # (B, 3, H, W)  eps_theta
        # One student pass serves L_anchor, L_quality and, with --diffusion_timesteps late, L_diff.
        late_pred = unet(late_samples, late_timesteps, return_dict=False)[0]  # (B, 3, H, W)  eps_phi

    if args.quality_weight:
        z0 = late_step.denoise_late_steps(  # (B, 3, H, W)  z_0_hat (eq. 5)
            partial(predict_noise, unet, gradient_checkpointing=args.gradient_checkpointing),
            noise_scheduler,
            model_pred=late_pred,
            timesteps=late_timesteps,
            noisy_latents=late_samples,
            num_steps=args.late_steps,
            backprop_steps=args.late_backprop_steps,
        )
        images = (z0 / 2 + 0.5).clamp(0, 1)  # (B, 3, H, W) in [0, 1]  x_hat, with no D to decode by (eq. 5)
        scores, score_parts = guide_score(  # (B,) in (0, 1)  Q(x_hat)
            evaluator, images, None, args.guide_perturbation, args.guide_clean_weight
        )
        loss_quality = losses.quality_loss(scores)  # L_quality = mean(1 - Q) (eq. 6)
    if args.anchor_weight:
        loss_anchor = losses.anchor_loss(late_pred, base_pred)  # L_anchor = ||eps_phi - eps_theta||^2 (eq. 7)
    if args.diffusion_weight:  # L_diff = ||eps - eps_phi||^2 (eq. 8)
        if args.diffusion_timesteps == "late":
            timesteps, model_pred = late_timesteps, late_pred
        else:
            num_train_timesteps = noise_scheduler.config.num_train_timesteps
            timesteps = batch_randint(num_train_timesteps, len(x0), generator, x0.device)  # (B,)
            noisy_images = noise_scheduler.add_noise(x0, noise, timesteps)  # (B, 3, H, W)  z_t, any t
            model_pred = unet(noisy_images, timesteps, return_dict=False)[0]  # (B, 3, H, W)  eps_phi
        loss_diffusion = losses.diffusion_loss(noise_scheduler, model_pred, x0, noise, timesteps, args.snr_gamma)

    loss, terms = losses.acpo_objective(  # L (eq. 9)
        loss_diffusion, loss_anchor, loss_quality, args.diffusion_weight, args.anchor_weight, args.quality_weight
    )
    if args.quality_weight:
        terms |= {"score": scores, "late_timesteps": late_timesteps} | score_parts
    return loss, terms


def predict_noise(unet, samples, timesteps, gradient_checkpointing=False):
    """One step of a chain; checkpointed, the chain keeps its samples and computes each step again in `backward`."""
    if gradient_checkpointing and torch.is_grad_enabled():
        return checkpoint(unet, samples, timesteps, return_dict=False, use_reentrant=False)[0]
    return unet(samples, timesteps, return_dict=False)[0]


def sample_late(x0, noise, unet, noise_scheduler, generator, args):
    """z_t (B, 3, H, W) and its t (B,), t < tmax: a noised real image, or the current model's own sample."""
    if args.late_start == "data":
        late_timesteps = late_step.sample_late_timesteps(len(x0), args.tmax, generator, x0.device)
        return noise_scheduler.add_noise(x0, noise, late_timesteps), late_timesteps
    return late_step.rollout_late_samples(
        partial(predict_noise, unet),
        noise_scheduler,
        x0.shape,
        tmax=args.tmax,
        num_inference_steps=args.ddpm_num_inference_steps,
        generator=generator,
        device=x0.device,
        dtype=x0.dtype,
    )


# The embedded demo's settings, where they differ from the defaults below, which are the paper's or diffusers' own.
DEMO_SETTINGS = Path(__file__).resolve().parent / "demo" / "acpo_ddpm.json"
# From scratch: the settings of diffusers' train_unconditional.py, and no ACPO.
SCRATCH_SETTINGS = {
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
LORA_TARGET_MODULES = "to_q,to_k,to_v,to_out.0,conv,conv1,conv2,conv_shortcut,conv_in,conv_out"


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # Model and evaluator
    add("--pretrained_model_name_or_path", help="DDPMPipeline, DDIMPipeline or a U-Net's folder")
    add("--revision")
    add("--model_config_name_or_path", help="from scratch: a UNet2DModel's; default: diffusers'")
    add(
        "--evaluator", nargs="+", action="extend", help="the frozen guide Q: two-stream:PATH, ... (docs/evaluators.md)"
    )
    add("--evaluator_weight", nargs="+", action="extend", type=float, help="one for each guide; equal by default")
    add("--judge", nargs="+", action="extend", help="guides nothing, for the table: kid, diversity, or an evaluator")
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
    window("--last_steps", type=int, help="the late window as the last N sampling steps; default 10")
    window("--tmax", type=int, help="the late window by its upper end: quality and anchor act at t < tmax")
    window("--full_trajectory", action="store_true", help="the window is all t: the paper's full fine-tuning")
    add("--quality_weight", type=float, default=1.0, help="lambda_quality of eq. 9")
    add("--anchor_weight", type=float, default=1.0, help="lambda_anchor of eq. 9")
    add("--diffusion_weight", type=float, default=1.0, help="weight of L_diff; 1 in the paper")
    add(
        "--diffusion_timesteps",
        choices=["full", "late"],
        default="full",
        help="late shares the late forward pass",
    )
    add(
        "--late_start",
        choices=["data", "rollout"],
        default="data",
        help="z_t: noised images, or sampled",
    )
    add("--late_every", type=int, default=1, help="the late window at every n-th step; between them L_diff alone")
    add("--late_steps", type=int, default=1, help="K denoising steps from t to 0; 1 is the one-step estimate")
    add("--late_backprop_steps", type=int, help="how many of the last K steps keep their gradient; all by default")
    add(
        "--guide_perturbation", type=float, default=0.0, help="score x_hat at the worst point so many 255ths away, too"
    )
    add("--guide_clean_weight", type=float, default=0.5, help="the clean score's share with --guide_perturbation")
    add("--guide_clean_weight_end", type=float, help="its share at the last step, reached on a straight line")
    add("--snr_gamma", type=float, help="min-SNR weighting of L_diff")
    add("--balance_steps", type=int, default=100, help="how often each loss's share of the gradient is measured")
    # LoRA, optimizer and EMA
    add("--rank", type=int, default=4, help="of the LoRA; 0 trains all weights, anchored to a frozen copy")
    add("--lora_alpha", type=int, help="default: the rank")
    add("--lora_target_modules", default=LORA_TARGET_MODULES, help="comma-separated layer names of the U-Net")
    add("--train_batch_size", type=int, default=16)
    add("--num_epochs", type=int, help="default: 100 from scratch")
    add("--max_train_steps", type=int, help="instead of --num_epochs; default: 1000 with a pretrained model")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--gradient_checkpointing", action="store_true", help="of the U-Net, and of each step of a chain")
    add("--learning_rate", type=float, default=2e-5, help="from scratch 1e-4")
    schedules = [s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT]
    add(
        "--lr_scheduler",
        choices=schedules,
        default="constant",
        help="from scratch cosine",
    )
    add("--lr_warmup_steps", type=int, default=0, help="from scratch 500")
    add("--adam_beta1", type=float, default=0.9, help="from scratch 0.95")
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=0.0, help="0 is Adam, as in the paper; from scratch 1e-6")
    add("--adam_epsilon", type=float, default=1e-8)
    add("--use_8bit_adam", action="store_true", help="needs bitsandbytes")
    add("--max_grad_norm", type=float, default=1.0, help="0: no clipping")
    add("--use_ema", action="store_true", help="sample and save the moving average of the weights")
    add("--ema_inv_gamma", type=float, default=1.0)
    add("--ema_power", type=float, default=3 / 4)
    add("--ema_max_decay", type=float, default=0.9999)
    add("--mixed_precision", choices=["no", "fp16", "bf16"])
    add("--allow_tf32", action="store_true")
    add("--torch_compile", action="store_true", help="the U-Net, at the first step: minutes")
    # Noise schedule: of a pretrained pipeline its own
    add(
        "--prediction_type",
        choices=["epsilon", "v_prediction", "sample"],
        default="epsilon",
        help="from scratch",
    )
    add("--ddpm_num_steps", type=int, default=1000, help="from scratch: number of training timesteps")
    add("--ddpm_beta_schedule", default="linear", help="from scratch")
    add("--ddpm_num_inference_steps", type=int, default=1000, help="of pictures, rollouts, --last_steps")
    add(
        "--sampler",
        choices=list(SAMPLERS),
        help="pipeline to sample by and to save; default: the model's own",
    )
    # Validation and final comparison
    add("--validation_data_dir", help="held-out images for the MSE; default: the last training images")
    add("--num_validation_images", type=int, default=64, help="at most so many; 0: no MSE")
    add("--save_images_epochs", type=int, default=10)
    add("--save_model_epochs", type=int, default=10)
    add("--num_eval_images", type=int, default=64, help="for the final table, from the same noise")
    add("--eval_batch_size", type=int, default=16)
    # Output
    add("--output_dir", default="acpo-ddpm")
    add(
        "--weight_dtype",
        choices=["fp32", "fp16"],
        default="fp32",
        help="of the stored weights; they load as fp32",
    )
    add("--seed", type=int, default=0)
    add("--checkpointing_steps", type=int, default=500)
    add("--checkpoints_total_limit", type=int)
    add("--resume_from_checkpoint", help='"latest", or the name of a checkpoint folder')
    add("--report_to", "--logger", default="tensorboard", help='a tracker of accelerate, "all" or "none"')
    add("--logging_dir", default="logs")
    add("--push_to_hub", action="store_true")
    add("--hub_model_id")
    add("--hub_token")
    args = parser.parse_args(input_args)
    data_given = args.dataset_name is not None or args.train_data_dir is not None
    args.demo = args.pretrained_model_name_or_path is None and not data_given
    args.scratch = args.pretrained_model_name_or_path is None and data_given
    if args.demo:
        if not DEMO_SETTINGS.is_file():
            parser.error(f"no data and no model are named, and the demo's are not at {DEMO_SETTINGS.parent}")
        parser.set_defaults(demo=True, scratch=False, **read_demo_settings(DEMO_SETTINGS, given=args))
        args = parser.parse_args(input_args)
    elif args.scratch:
        parser.set_defaults(demo=False, scratch=True, **SCRATCH_SETTINGS)
        args = parser.parse_args(input_args)
    try:
        check_args(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check_args(args):
    """What can be said without loading anything is said now; defaults that depend on other flags are filled in."""
    check_numbers(args, rank=0)
    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise ValueError("need one of --dataset_name and --train_data_dir")
    if args.scratch and (args.rank or args.anchor_weight):
        raise ValueError("--rank and --anchor_weight need a base model: name it by --pretrained_model_name_or_path")
    if not args.scratch and args.model_config_name_or_path:
        raise ValueError("--model_config_name_or_path is for training from scratch: a pretrained model has its own")
    check_objective(args)
    if args.num_eval_images in (1, 2, 3) or args.num_validation_images in (1, 2, 3):
        raise ValueError("--num_eval_images and --num_validation_images: expected 0 or at least 4, for the statistics")
    if "kid" in (args.judge or []) and not args.num_validation_images:
        raise ValueError("--judge kid compares with held-out images: it needs --num_validation_images above 0")
    if args.tmax is not None or args.full_trajectory:
        args.last_steps = None
    elif args.last_steps is None:
        args.last_steps = min(10, args.ddpm_num_inference_steps)
    if args.max_train_steps is None and args.num_epochs is None:
        args.max_train_steps = 1000
    args.lora_alpha = args.lora_alpha or args.rank


def load_data(args):
    """The training's images, and held-out ones (or None): files that exist and can be read, all of them."""
    dataset = data.load_unconditional_images(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        train_data_dir=args.train_data_dir,
        image_column=args.image_column,
        max_train_samples=args.max_train_samples,
        cache_dir=args.cache_dir,
        seed=args.seed,
    )
    dataset = data.check_images(dataset, "image", args.skip_bad_images)
    if not args.num_validation_images:
        return dataset, None
    if args.validation_data_dir is None:
        return data.hold_out(dataset, args.num_validation_images)
    held_out = data.load_validation_images(
        args.validation_data_dir,
        args.num_validation_images,
        image_column=args.image_column,
        cache_dir=args.cache_dir,
        seed=args.seed,
    )
    return dataset, data.check_images(held_out, "image", args.skip_bad_images)


def load_models(args):
    """The U-Net, trained whole, and its noise schedule. Fills in resolution, sampler and the late window."""
    if args.scratch:
        args.resolution = args.resolution or 64
        args.sampler = args.sampler or "ddpm"
        noise_scheduler, unet = None, ddpm.new_unet(args.model_config_name_or_path, args.resolution)
    else:
        unet, noise_scheduler, sampler = ddpm.load_ddpm(args.pretrained_model_name_or_path, args.revision)
        args.resolution = args.resolution or unet.config.sample_size
        args.sampler = args.sampler or sampler
        if args.resolution != unet.config.sample_size:
            raise ValueError(f"--resolution {args.resolution}: the model draws {unet.config.sample_size} px")
    if noise_scheduler is None:
        noise_scheduler = DDPMScheduler(
            num_train_timesteps=args.ddpm_num_steps,
            beta_schedule=args.ddpm_beta_schedule,
            prediction_type=args.prediction_type,
        )
    args.tmax, args.last_steps = ddpm.resolve_late_window(
        noise_scheduler,
        args.ddpm_num_inference_steps,
        tmax=args.tmax,
        last_steps=args.last_steps,
    )
    return unet, noise_scheduler


def add_lora(unet, args):
    target_modules = [name.strip() for name in args.lora_target_modules.split(",")]
    check_target_modules(unet, target_modules)
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.lora_alpha,
        target_modules=target_modules,
        init_lora_weights="gaussian",
    )
    return get_peft_model(unet, config)


def build_ema(parameters, accelerator, args):
    if not args.use_ema:
        return None
    ema = EMAModel(
        parameters,
        decay=args.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=args.ema_inv_gamma,
        power=args.ema_power,
        foreach=True,
    )
    register_ema_hooks(accelerator, ema)
    return ema


def build_dataloader(dataset, first_step, num_samples, accelerator, args):
    """Sample n of the run is a function of (seed, n) alone, so resuming means to start counting at n."""
    train_set = data.UnconditionalImages(
        dataset,
        args.resolution,
        num_samples,
        seed=args.seed,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
    )
    return DataLoader(
        train_set,
        batch_sampler=process_batches(first_step, args.max_train_steps, args.train_batch_size, accelerator),
        num_workers=args.dataloader_num_workers,
        generator=torch.Generator().manual_seed(args.seed),
    )


def main(args):
    accelerator, run = start_run(args, sharding=(DistributedType.DEEPSPEED,))
    if accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.mixed_precision != "no":
        raise ValueError(
            f"mixed_precision {accelerator.mixed_precision} with DeepSpeed: expected no, or DDP. DeepSpeed would keep "
            "the whole U-Net in half precision, too coarse for its average (EMA)."
        )
    if args.demo:
        logger.info(
            "This is the embedded demo (a small DDPM of drawn faces, 64 px) with the settings of "
            f"{DEMO_SETTINGS}. For a run of your own name data by --dataset_name or --train_data_dir, and a model for all "
            "but a new one."
        )
        if accelerator.device.type == "cpu":
            use_all_cpus()

    # Data and evaluators are checked before the model is loaded.
    with accelerator.main_process_first():
        dataset, held_out = load_data(args)
    evaluator = None
    if args.evaluator:  # with --quality_weight 0 it is for the final table alone
        evaluator = load_guide(args.evaluator, args.evaluator_weight, accelerator.device)
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
    optimizer, lr_scheduler = build_optimizer(
        parameters,
        accelerator,
        args,
        learning_rate=args.learning_rate,
        num_training_steps=args.max_train_steps,
    )
    unet, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)
    base_unet = None if args.scratch else unet  # with a LoRA: the same weights, the LoRA off
    if not args.scratch and not args.rank:
        base_unet = copy.deepcopy(accelerator.unwrap_model(unet)).requires_grad_(False)
    if args.torch_compile:
        for model in filter(None, (accelerator.unwrap_model(unet), base_unet)):
            model.compile()
    ema = build_ema(parameters, accelerator, args)
    if args.rank:
        ddpm.register_adapter_hooks(accelerator, unet)
    balance = GradientBalance(accelerator, parameters, args.tmax, every=args.balance_steps)
    run.keep(balance=balance)
    first_step = run.resume()

    dataloader = build_dataloader(dataset, first_step, args.max_train_steps * samples_per_step, accelerator, args)
    if args.quality_weight:
        examples = [dataloader.dataset[n]["pixel_values"] for n in range(min(2, len(dataloader.dataset)))]
        images = (torch.stack(examples).to(accelerator.device) / 2 + 0.5).clamp(0, 1)  # as the step will score them
        check_guide(evaluator, images, None, args.guide_perturbation)

    accelerator.init_trackers("acpo-ddpm", config=settings_of(args))
    logger.info(
        f"***** Running training ***** {len(dataset)} images, "
        f"{sum(parameter.numel() for parameter in parameters)} trained parameters, "
        f"steps {first_step}..{args.max_train_steps}, {steps_per_epoch} in an epoch"
    )
    if args.anchor_weight or args.quality_weight:
        window = f"{args.last_steps} of {args.ddpm_num_inference_steps} sampling steps"
        logger.info(f"  late window: t < {args.tmax}, {window}")
    progress = progress_bar(first_step, args.max_train_steps, accelerator)
    catch_signals(accelerator)
    batches = iter(dataloader)
    for step in progress:
        step_args = at_step(args, step)
        for micro_step in range(args.gradient_accumulation_steps):
            batch = data.to_device(next(batches), accelerator.device)
            generator = shared_generator(args.seed, step, micro_step, accelerator)
            with accelerator.accumulate(unet):
                loss, terms = training_step(
                    batch,
                    unet,
                    base_unet,
                    evaluator,
                    noise_scheduler,
                    generator,
                    step_args,
                )
                shares = balance.measure(
                    terms, args.diffusion_weight, args.anchor_weight, args.quality_weight, step + 1
                )
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    grad_norm = run.clip_grad_norm(optimizer, parameters, args.max_grad_norm, step + 1)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
        if ema is not None:
            ema.step(parameters)
        logs = mean_terms(accelerator, terms)
        logs |= {"grad_norm": grad_norm, "lr": lr_scheduler.get_last_lr()[0]}
        accelerator.log(logs | shares | {"skipped_steps": run.skipped_steps}, step=step + 1)
        progress.set_postfix({name.removeprefix("loss_"): f"{value:.4g}" for name, value in logs.items()})

        due = is_due(step + 1, args.checkpointing_steps)
        checkpoint_or_stop(accelerator, args.output_dir, step + 1, due, args.checkpoints_total_limit)
        epoch, rest = divmod(step + 1, steps_per_epoch)
        if rest == 0 and step + 1 < args.max_train_steps and accelerator.is_main_process:
            end_epoch(accelerator, unet, ema, parameters, noise_scheduler, epoch, step + 1, args)

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unet = accelerator.unwrap_model(unet).eval()
        with ema_weights(ema, parameters):
            save_model(unet, noise_scheduler, args)
            release_signals()  # what follows can be had again
            held_out = held_out and data.to_tensor(held_out, args.resolution)  # (M, 3, H, W) in [0, 1]
            events = {"skipped_steps": run.skipped_steps}
            finish(unet, base_unet, noise_scheduler, evaluator, judges, held_out, events, args)
    accelerator.end_training()


def end_epoch(accelerator, unet, ema, parameters, noise_scheduler, epoch, step, args):
    """The pictures and the model of --save_images_epochs and --save_model_epochs, with averaged weights if any."""
    unet.eval()
    with ema_weights(ema, parameters):
        model = accelerator.unwrap_model(unet)
        if is_due(epoch, args.save_images_epochs):
            images = sample_unconditional(
                ddpm.build_pipeline(model, noise_scheduler, args.sampler),
                args.eval_batch_size,
                seed=args.seed,
                batch_size=args.eval_batch_size,
                num_inference_steps=args.ddpm_num_inference_steps,
            )
            log_images(accelerator, "samples", images, step)
        if is_due(epoch, args.save_model_epochs):
            save_model(model, noise_scheduler, args)
    unet.train(args.scratch)


def save_model(unet, noise_scheduler, args):
    """A pipeline's folder, with the LoRA fused into it; the LoRA itself in `lora`."""
    if args.rank:
        ddpm.save_adapter(unet, Path(args.output_dir, "lora"))
        unet = copy.deepcopy(unet).merge_and_unload()
    pipeline = ddpm.build_pipeline(unet, noise_scheduler, args.sampler)
    ddpm.save_ddpm(pipeline, args.output_dir, half=args.weight_dtype == "fp16")


def finish(unet, base_unet, noise_scheduler, evaluator, judges, held_out, events, args):
    """Base against fine-tuned from the same noise: comparison.png, metrics.json, a printed table, the model card.

    From scratch there is no base: the means, and a sheet of samples.
    """
    table, pictures = compare_unconditional_models(
        partial(ddpm.build_pipeline, noise_scheduler=noise_scheduler, sampler=args.sampler),
        unet,
        base_unet,
        noise_scheduler,
        guide_parts(evaluator),
        judges,
        held_out,
        args.output_dir,
        num_images=args.num_eval_images,
        seed=args.seed,
        batch_size=args.eval_batch_size,
        num_inference_steps=args.ddpm_num_inference_steps,
        events=events,
    )
    how = "trained from scratch" if args.scratch else "fine-tuned by ACPO (Anchor-Constrained Perceptual Optimization)"
    save_model_card(
        args.output_dir,
        base_model=args.pretrained_model_name_or_path,
        model_description=f"Unconditional DDPM {how}.",
        tags=["unconditional-image-generation", "diffusers", "ddpm"] + ["acpo"] * (not args.scratch),
        dataset=args.dataset_name or args.train_data_dir,
        image_files=pictures,
        metrics=table,
        usage=ddpm.usage_example(
            args.output_dir,
            base_model=args.pretrained_model_name_or_path,
            num_inference_steps=args.ddpm_num_inference_steps,
        ),
        settings=settings_of(args),
    )
    if args.push_to_hub:
        push_to_hub(args.output_dir, args.hub_model_id, args.hub_token, "End of training")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, ImportError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
