"""Fine-tune a LoRA of Stable Diffusion by ACPO: late-step samples are decoded and scored by a frozen evaluator, the
score's gradient trains the LoRA, and an anchor holds its predictions to the frozen base's (section 3.3, eqs. 5-9).

    accelerate launch examples/train_acpo_lora_sd.py --tmax 100

With no model named it runs the embedded demo, on a CPU in minutes. README.md has the command for SD-1.4.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
from functools import partial
from pathlib import Path

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from diffusers.optimization import SchedulerType
from torch.utils.data import DataLoader

from acpo_utils import check_min_version, data, late_step, lora, losses
from acpo_utils.anchor import ANCHOR_BUDGET, AnchorBudget, base_prediction
from acpo_utils.checkpoints import catch_signals, checkpoint_or_stop, is_due, release_signals
from acpo_utils.evaluation.comparison import compare_models
from acpo_utils.evaluation.judges import load_judges
from acpo_utils.evaluation.sampling import sample_images
from acpo_utils.evaluators import guide_parts, guide_score, load_guide
from acpo_utils.families import stable_diffusion
from acpo_utils.families.latents import (
    build_decoder,
    check_sizes,
    compile_models,
    encode_images,
    latent_factor,
    latents_shape,
    offload_encoders,
)
from acpo_utils.randomness import batch_randint, batch_randn, process_batches, shared_generator
from acpo_utils.sharding import SHARDED, WEIGHT_DTYPES, full_weights, prepare
from acpo_utils.training.arguments import at_step, read_demo_settings
from acpo_utils.training.gradient_balance import GradientBalance
from acpo_utils.training.guide_check import check_guide, decoded_examples
from acpo_utils.training.hacking_alarm import HackingAlarm
from acpo_utils.training.hub import push_to_hub, save_model_card, settings_of
from acpo_utils.training.memory_estimate import log_estimate
from acpo_utils.training.optimizer import build_optimizer
from acpo_utils.training.run import log_images, mean_terms, progress_bar, start_run, use_all_cpus
from acpo_utils.training.text_to_image import add_lora, check_text_to_image, load_data, warn_if_distilled


check_min_version("0.2.0")
logger = get_logger(__name__, log_level="INFO")


def training_step(batch, unet, vae, decoder, text_encoder, evaluator, noise_scheduler, generator, anchor_weight, args):
    """L = L_diff + anchor_weight * L_anchor + quality_weight * L_quality (eq. 9). Returns the loss and its terms."""
    loss_diffusion = loss_anchor = loss_quality = latents = noise = None
    conditions = stable_diffusion.encode_prompts(batch, text_encoder)  # {name: (B, ...)}  c
    if not args.train_prompts:  # a rollout without L_diff needs prompts only
        weight_dtype = conditions["prompt_embeds"].dtype
        latents = encode_images(batch, vae, generator).to(weight_dtype)  # (B, 4, h, w)  x0
        noise = batch_randn(latents.shape, generator, latents.device, latents.dtype)  # (B, 4, h, w)  eps

    if anchor_weight or args.quality_weight or args.diffusion_timesteps == "late":
        late_latents, late_timesteps = sample_late_latents(  # (B, 4, h, w)  z_t and (B,)  t < tmax
            latents, noise, conditions, batch["negative_conditions"], unet, vae, noise_scheduler, generator, args
        )
        if anchor_weight:  # the frozen pass first: its activations are gone before the student's graph is built
            base_pred = base_prediction(  # (B, 4, h, w)  eps_theta
                unet, late_latents, late_timesteps, conditions, predict=stable_diffusion.predict
            )
        # One student pass serves L_anchor, L_quality and, with --diffusion_timesteps late, L_diff.
        late_pred = stable_diffusion.predict(unet, late_latents, late_timesteps, conditions)  # (B, 4, h, w)  eps_phi

    if args.quality_weight:
        predict = partial(predict_noise, unet, conditions, batch["negative_conditions"], args)
        z0 = late_step.denoise_late_steps(  # (B, 4, h, w)  z_0_hat (eq. 5)
            predict,
            noise_scheduler,
            model_pred=predict(late_latents, late_timesteps, late_pred),
            timesteps=late_timesteps,
            noisy_latents=late_latents,
            num_steps=args.late_steps,
            backprop_steps=args.late_backprop_steps,
        )
        if args.decode == "crop":
            z0 = late_step.crop_latents(z0, args.decode_size // latent_factor(vae), generator)
        # x_hat = D(z_0_hat) (eq. 5)
        images = late_step.decode_latents(decoder, z0, args.decode_batch_size)  # (B, 3, H, W) in [0, 1]
        scores, score_parts = guide_score(  # (B,) in (0, 1)  Q(x_hat, c)
            evaluator, images, batch["prompts"], args.guide_perturbation, args.guide_clean_weight
        )
        loss_quality = losses.quality_loss(scores)  # L_quality = mean(1 - Q) (eq. 6)
    if anchor_weight:
        loss_anchor = losses.anchor_loss(late_pred, base_pred)  # L_anchor = ||eps_phi - eps_theta||^2 (eq. 7)
    if args.diffusion_weight:  # L_diff = ||eps - eps_phi||^2 (eq. 8)
        if args.diffusion_timesteps == "late":
            timesteps, model_pred = late_timesteps, late_pred
        else:
            num_train_timesteps = noise_scheduler.config.num_train_timesteps
            timesteps = batch_randint(num_train_timesteps, len(latents), generator, latents.device)  # (B,)
            noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)  # (B, 4, h, w)  z_t, any t
            model_pred = stable_diffusion.predict(unet, noisy_latents, timesteps, conditions)  # (B, 4, h, w)
        loss_diffusion = losses.diffusion_loss(noise_scheduler, model_pred, latents, noise, timesteps, args.snr_gamma)

    loss, terms = losses.acpo_objective(  # L (eq. 9)
        loss_diffusion, loss_anchor, loss_quality, args.diffusion_weight, anchor_weight, args.quality_weight
    )
    if args.quality_weight:
        terms |= {"score": scores, "late_timesteps": late_timesteps} | score_parts
    return loss, terms


def predict_noise(unet, conditions, negative_conditions, args, latents, timesteps, pred=None):
    """eps_phi of the scored steps, given or predicted; with --scored_guidance guided, both halves with gradient."""
    if pred is None:
        pred = stable_diffusion.predict(unet, latents, timesteps, conditions)
    if not args.scored_guidance or args.guidance_scale <= 1:
        return pred
    without_prompt = late_step.without_prompt(conditions, negative_conditions)
    negative_pred = stable_diffusion.predict(unet, latents, timesteps, without_prompt)
    return negative_pred + args.guidance_scale * (pred - negative_pred)


def sample_late_latents(latents, noise, conditions, negative_conditions, unet, vae, noise_scheduler, generator, args):
    """z_t (B, 4, h, w) and its t (B,), t < tmax: a noised real latent, or the current model's own sample."""
    if args.late_start == "data":
        late_timesteps = late_step.sample_late_timesteps(len(latents), args.tmax, generator, latents.device)
        return noise_scheduler.add_noise(latents, noise, late_timesteps), late_timesteps
    return late_step.rollout_late_latents(
        partial(stable_diffusion.predict, unet),
        noise_scheduler,
        conditions,
        negative_conditions,
        latents_shape=latents_shape(vae, len(conditions["prompt_embeds"]), args.resolution),
        tmax=args.tmax,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=generator,
    )


# The embedded demo's settings, where they differ from the defaults below, which are the paper's or diffusers' own.
DEMO_SETTINGS = Path(__file__).resolve().parent / "demo" / "acpo_lora_sd.json"


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # Model and evaluator
    add("--pretrained_model_name_or_path", help="hub id or folder of a Stable Diffusion; none: the embedded demo")
    add("--revision")
    add("--variant")
    add("--evaluator", nargs="+", action="extend", help="the frozen guide Q: ipce:PATH, ... (docs/evaluators.md)")
    add("--evaluator_weight", nargs="+", action="extend", type=float, help="one for each guide; equal by default")
    add("--judge", nargs="+", action="extend", help="what guides nothing: judge:PATH, st-lpips:vgg or as --evaluator")
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
        help="hold the mean L_anchor here by adapting --anchor_weight",
    )
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
    add(
        "--scored_guidance",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="guide the scored step as sampling is guided",
    )
    add("--snr_gamma", type=float, help="min-SNR weighting of L_diff")
    add("--balance_steps", type=int, default=100, help="how often each loss's share of the gradient is measured")
    add(
        "--decode",
        choices=["full", "crop", "tiny", "straight_through"],
        default="full",
        help="a window, a tiny VAE, or exact images with a cheaper gradient",
    )
    add("--decode_dtype", choices=["fp32", "bf16"], default="fp32", help="of the decode that is scored in training")
    add("--decode_batch_size", type=int, help="decode so many at a time, twice, to save memory; default: all")
    add("--decode_size", type=int, help="side of the window in pixels, with --decode crop")
    add("--tiny_vae_name_or_path", help="with --decode tiny or straight_through, such as madebyollin/taesd")
    # LoRA and optimizer
    add("--rank", type=int, help="default: 4")
    add("--lora_alpha", type=float, help="default: the rank")
    add("--lora_target_modules", help="comma-separated layer names of the U-Net; default: to_k,to_q,to_v,to_out.0")
    add("--train_batch_size", type=int, default=4)
    add("--max_train_steps", type=int, default=1000)
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--gradient_checkpointing", action="store_true", help="of the U-Net and of the VAE's decoder")
    add("--learning_rate", type=float, default=2e-5)
    schedules = [s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT]
    add(
        "--lr_scheduler",
        choices=schedules,
        default="constant",
    )
    add("--lr_warmup_steps", type=int, default=0)
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=0.0, help="0 is Adam, as in the paper")
    add("--adam_epsilon", type=float, default=1e-8)
    add("--use_8bit_adam", action="store_true", help="needs bitsandbytes")
    add("--max_grad_norm", type=float, default=1.0, help="0: no clipping")
    add("--mixed_precision", choices=["no", "fp16", "bf16"])
    add("--allow_tf32", action="store_true")
    add("--torch_compile", action="store_true", help="the U-Net and the decoder, at the first step: minutes")
    # Validation and final comparison
    add("--validation_prompt", help="sampled every --validation_steps")
    add("--num_validation_prompts", type=int, default=32, help="of --eval_prompts, base beside LoRA then; 0: off")
    add(
        "--on_hacking",
        choices=["warn", "stop", "keep_best"],
        default="warn",
        help="the guide rises, a judge falls",
    )
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
    args = parser.parse_args(input_args)
    args.demo = args.pretrained_model_name_or_path is None
    if args.demo:
        if not DEMO_SETTINGS.is_file():
            parser.error(f"no model is named, and the demo's is not at {DEMO_SETTINGS.parent}: clone the repository")
        parser.set_defaults(demo=True, **read_demo_settings(DEMO_SETTINGS, given=args))
        args = parser.parse_args(input_args)
    try:
        check_text_to_image(args)
    except ValueError as error:
        parser.error(str(error))
    if not args.lora_path:  # a saved LoRA has them in its file
        args.rank = args.rank or 4
        args.lora_alpha = args.lora_alpha or args.rank
        args.lora_target_modules = args.lora_target_modules or "to_k,to_q,to_v,to_out.0"
    return args


def load_models(args, weight_dtype, device):
    noise_scheduler, tokenizer, text_encoder, vae, unet = stable_diffusion.load(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        weight_dtype=weight_dtype,
        device=device,
    )
    for model in (vae, unet):
        model.to(memory_format=torch.channels_last)
    check_sizes(
        noise_scheduler,
        vae,
        unet,
        tmax=args.tmax,
        resolution=args.resolution,
        decode_size=args.decode_size,
    )
    reason = stable_diffusion.distilled(
        args.pretrained_model_name_or_path,
        args.revision,
        noise_scheduler,
        unet,
    )
    warn_if_distilled(reason, args.diffusion_weight)
    decoder = build_decoder(vae, args)
    return noise_scheduler, tokenizer, text_encoder, vae, decoder, unet


def build_train_set(dataset, tokenizer, vae, text_encoder, weight_dtype, accelerator, args):
    """Sample n of the run is a function of (seed, n) alone, so resuming means to start counting at n."""
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    num_samples = args.max_train_steps * samples_per_step
    if args.train_prompts:
        return data.Prompts(dataset, tokenizer, num_samples, args.seed)
    if not args.cache_latents:
        return data.CaptionedImages(
            dataset,
            tokenizer,
            args.resolution,
            num_samples,
            seed=args.seed,
            center_crop=args.center_crop,
            random_flip=args.random_flip,
            image_column=args.image_column,
            caption_column=args.caption_column,
        )
    train_set = data.CachedLatents(
        dataset,
        tokenizer,
        args.resolution,
        folder=Path(args.cache_dir or args.output_dir, "latents"),
        num_samples=num_samples,
        seed=args.seed,
        random_flip=args.random_flip,
        image_column=args.image_column,
        caption_column=args.caption_column,
        dtype=weight_dtype,
    )
    train_set.build(vae, text_encoder, accelerator, stable_diffusion.encode_prompts)
    return train_set


def build_dataloader(train_set, first_step, accelerator, args):
    return DataLoader(
        train_set,
        batch_sampler=process_batches(first_step, args.max_train_steps, args.train_batch_size, accelerator),
        collate_fn=data.collate,
        num_workers=args.dataloader_num_workers,
        generator=torch.Generator().manual_seed(args.seed),
    )


def announce_demo():
    logger.info(
        f"This is the embedded demo (a small Stable Diffusion of emoji drawings, 64 px) with the settings of "
        f"{DEMO_SETTINGS}. For the paper's run name a model, data and a guide: --pretrained_model_name_or_path "
        "CompVis/stable-diffusion-v1-4 --train_data_dir visual-genome --evaluator ipce:PATH"
    )


def main(args):
    accelerator, run = start_run(args, sharding=SHARDED)
    if args.demo:
        announce_demo()
        if accelerator.device.type == "cpu":
            use_all_cpus()

    # Data, prompts and evaluators are checked before the model is loaded.
    dataset, eval_prompts = load_data(args, accelerator)
    evaluator = None
    if args.evaluator:  # with --quality_weight 0 it is for the final table alone
        evaluator = load_guide(args.evaluator, args.evaluator_weight, accelerator.device)
    judges = load_judges(args.judge or [], accelerator.device, eval_prompts, args.eval_prompts)
    weight_dtype = WEIGHT_DTYPES.get(accelerator.mixed_precision, torch.float32)
    noise_scheduler, tokenizer, text_encoder, vae, decoder, unet = load_models(args, weight_dtype, accelerator.device)
    lora_parameters = add_lora(unet, args)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        late_step.checkpoint_decoder(decoder)
    if args.torch_compile:
        compile_models(unet, decoder)

    train_set = build_train_set(dataset, tokenizer, vae, text_encoder, weight_dtype, accelerator, args)
    guide_inputs = None
    if args.quality_weight:
        guide_inputs = decoded_examples(train_set, vae, decoder, accelerator.device, args)
        check_guide(evaluator, *guide_inputs, args.guide_perturbation)
    empty_prompt = data.to_device(data.token_ids(tokenizer, [""]), accelerator.device)
    negative_conditions = stable_diffusion.encode_prompts(empty_prompt, text_encoder)
    log_estimate(
        accelerator,
        training_step,
        models=(unet, vae, decoder, text_encoder),
        evaluator=evaluator,
        judges=judges,
        noise_scheduler=noise_scheduler,
        guide_inputs=guide_inputs,
        conditions=negative_conditions,
        args=args,
    )

    optimizer, lr_scheduler = build_optimizer(
        lora_parameters,
        accelerator,
        args,
        learning_rate=args.learning_rate,
        num_training_steps=args.max_train_steps,
    )
    unet, optimizer, lr_scheduler = prepare(accelerator, unet, optimizer, lr_scheduler)
    lora_parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]  # FSDP2 replaces them
    lora.register_lora_hooks(accelerator, unet)

    alarm = HackingAlarm(
        eval_prompts[: args.num_validation_prompts],
        partial(sample, description="validation", args=args),
        evaluator,
        judges,
        accelerator.device,
        args.output_dir,
        keep_best=args.on_hacking == "keep_best",
    )
    anchor_budget = AnchorBudget(args.anchor_budget, args.anchor_weight)
    balance = GradientBalance(accelerator, lora_parameters, args.tmax, every=args.balance_steps)
    run.keep(alarm=alarm, anchor_budget=anchor_budget, balance=balance)
    first_step = run.resume()

    batches = iter(build_dataloader(train_set, first_step, accelerator, args))
    if args.cache_latents:
        offload_encoders(vae, text_encoder)

    accelerator.init_trackers("acpo-lora-sd", config=settings_of(args))
    logger.info(
        f"***** Running training ***** {len(dataset)} images, "
        f"{sum(parameter.numel() for parameter in lora_parameters)} trained parameters, "
        f"steps {first_step}..{args.max_train_steps}"
    )
    progress = progress_bar(first_step, args.max_train_steps, accelerator)
    catch_signals(accelerator)
    for step in progress:
        step_args = at_step(args, step)
        anchor_weight = anchor_budget.weight if step_args.anchor_weight else 0.0
        for micro_step in range(args.gradient_accumulation_steps):
            batch = data.to_device(next(batches), accelerator.device) | {"negative_conditions": negative_conditions}
            generator = shared_generator(args.seed, step, micro_step, accelerator)
            with accelerator.accumulate(unet):
                loss, terms = training_step(
                    batch,
                    unet,
                    vae,
                    decoder,
                    text_encoder,
                    evaluator,
                    noise_scheduler,
                    generator,
                    anchor_weight,
                    step_args,
                )
                shares = balance.measure(terms, args.diffusion_weight, anchor_weight, args.quality_weight, step + 1)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    grad_norm = run.clip_grad_norm(optimizer, lora_parameters, args.max_grad_norm, step + 1)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
        logs = mean_terms(accelerator, terms)
        logs |= {"grad_norm": grad_norm, "lr": lr_scheduler.get_last_lr()[0]}
        logs["anchor_weight"] = anchor_budget.update(logs.get("loss_anchor"))
        accelerator.log(logs | shares | {"skipped_steps": run.skipped_steps}, step=step + 1)
        progress.set_postfix({name.removeprefix("loss_"): f"{value:.4g}" for name, value in logs.items()})

        if is_due(step + 1, args.validation_steps):
            hacked = validate(accelerator, unet, vae, text_encoder, tokenizer, noise_scheduler, alarm, step + 1, args)
            if hacked and args.on_hacking != "warn":
                break
        due = is_due(step + 1, args.checkpointing_steps)
        checkpoint_or_stop(accelerator, args.output_dir, step + 1, due, args.checkpoints_total_limit)

    accelerator.wait_for_everyone()
    with full_weights(accelerator, unet):
        if accelerator.is_main_process:
            unet = accelerator.unwrap_model(unet)
            alarm.restore_best(unet)
            lora.save_lora(unet, args.output_dir)
            release_signals()  # what follows can be had again
            pipeline = stable_diffusion.build_pipeline(unet, vae, text_encoder, tokenizer, noise_scheduler)
            scorers = guide_parts(evaluator) | judges
            events = {"skipped_steps": run.skipped_steps, "hacking_alarms": alarm.alarms}
            finish(pipeline, scorers, eval_prompts, events, accelerator.device, args)
    accelerator.end_training()


def sample(pipeline, prompts, description, args):
    """Images (N, 3, H, W) in [0, 1]; the same prompt list and seed give the same initial noise."""
    return sample_images(
        pipeline,
        prompts,
        seed=args.seed,
        batch_size=args.eval_batch_size,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        description=description,
    )


def validate(accelerator, unet, vae, text_encoder, tokenizer, noise_scheduler, alarm, step, args):
    """Pictures and scores while training; True, on every process, if the guide is being deceived."""
    if not (args.validation_prompt or alarm.enabled):
        return False
    hacked = False
    with full_weights(accelerator, unet):
        if accelerator.is_main_process:
            pipeline = stable_diffusion.build_pipeline(
                accelerator.unwrap_model(unet), vae, text_encoder, tokenizer, noise_scheduler
            )
            if args.validation_prompt:
                prompts = [args.validation_prompt] * args.num_validation_images
                log_images(accelerator, "validation", sample(pipeline, prompts, "validation", args), step)
            hacked = alarm.check(accelerator, pipeline, step)
            if args.cache_latents:
                offload_encoders(vae, text_encoder)
    return broadcast_object_list([hacked])[0]


def finish(pipeline, scorers, eval_prompts, events, device, args):
    """Base against fine-tuned on held-out prompts: comparison.png, metrics.json, a printed table, the model card."""
    prompts = eval_prompts
    if args.validation_prompt and not prompts:
        prompts = [args.validation_prompt] * args.num_validation_images
    table, pictures = compare_models(
        pipeline,
        prompts,
        scorers,
        args.output_dir,
        seed=args.seed,
        batch_size=args.eval_batch_size,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        device=device,
        events=events,
        prompt_file=args.eval_prompts,
    )
    save_model_card(
        args.output_dir,
        base_model=args.pretrained_model_name_or_path,
        model_description="LoRA fine-tuned by ACPO (Anchor-Constrained Perceptual Optimization).",
        tags=["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "diffusers", "lora", "acpo"],
        dataset=args.dataset_name or args.train_data_dir or args.train_prompts,
        image_files=pictures,
        metrics=table,
        settings=settings_of(args),
    )
    if args.push_to_hub:
        push_to_hub(args.output_dir, args.hub_model_id, args.hub_token, "End of training")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, ImportError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
