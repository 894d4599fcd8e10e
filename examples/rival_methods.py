"""Other ways to train by a guide's gradient or its score, in the place of ACPO's step: ReFL, DRaFT+, AlignProp, DDPO.

    accelerate launch examples/rival_methods.py --method ddpo --num_eval_prompts 100 --output_dir ddpo

It loads train_acpo_lora_sd.py, which lies beside it, and puts the method's step in the place of its `training_step`: models,
data, LoRA, optimizer, log, checkpoints and the final table are the script's own, and so are all flags but three. `--method
acpo` is the script's own step. Either way OUTPUT_DIR/seconds.csv has the CPU seconds after every step. DRaFT-1 needs no code,
the script's flags are it. docs/method.md has the table of methods and flags; examples/compare_methods.py runs them all.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import importlib.util
import time
from functools import partial
from pathlib import Path

import torch
from diffusers import DDIMScheduler

from acpo_utils.anchor import base_prediction
from acpo_utils.families import stable_diffusion
from acpo_utils.families.latents import encode_images, latents_shape
from acpo_utils.late_step import decode_latents, predict_original_sample, without_prompt
from acpo_utils.losses import anchor_loss, diffusion_loss
from acpo_utils.randomness import batch_randint, batch_randn


SCRIPT = Path(__file__).resolve().with_name("train_acpo_lora_sd.py")
# Mean and standard deviation of the demo's guide over 64 drawings of the demo's base model, on a scale from 0 to 1.
REWARD_MEAN = 0.5398
REWARD_STD = 0.0544


def refl_step(batch, unet, vae, decoder, text_encoder, evaluator, noise_scheduler, generator, anchor_weight, args):
    """ReFL: Xu et al., "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", NeurIPS 2023.

    As published: no guidance in training; ancestral steps without gradient to a random one of the last quarter of the
    schedule (30 to 39 of 40), one prediction with gradient there, its estimate of x0; the loss relu(2 - r) of a standardised
    reward r; the pre-training loss beside it. The paper weighs them 0.001 to 1 (--quality_weight, --diffusion_weight); the
    released code has no pre-training loss (--diffusion_weight 0). Not as published: a LoRA and not all weights; the sampling
    steps are --num_inference_steps; both losses in one step of the optimizer; the guide in ImageReward's place, standardised
    by its mean and spread over drawings of the base model, as ImageReward is over its own data. The released code tells the
    U-Net the number of the sampling step where the timestep belongs, which is left out.
    """
    conditions = stable_diffusion.encode_prompts(batch, text_encoder)  # {name: (B, ...)}
    scheduler = sampling_scheduler(noise_scheduler, args, conditions)
    predict = partial(guided_prediction, unet, conditions, batch["negative_conditions"], 1.0)
    late = max(1, len(scheduler.timesteps) // 4)  # 10 of 40
    stop = len(scheduler.timesteps) - 1 - int(torch.randint(late, (), generator=generator))
    with torch.no_grad():
        latents = initial_latents(vae, conditions, generator, args)  # (B, 4, h, w)
        latents = denoise(predict, scheduler, latents, scheduler.timesteps[:stop], generator, eta=1.0)
    timesteps = scheduler.timesteps[stop].repeat(len(latents))  # (B,)
    x0 = predict_original_sample(noise_scheduler, predict(latents, timesteps), timesteps, latents)
    scores = score(evaluator, decoder, x0, batch, args)  # (B,)
    rewards = (scores - args.reward_mean) / args.reward_std  # (B,)
    loss_reward = torch.relu(2 - rewards).mean()
    loss = args.quality_weight * loss_reward
    terms = {"loss_quality": loss_reward, "score": scores}
    if args.diffusion_weight:
        terms["loss_diffusion"] = pretraining_loss(batch, conditions, unet, vae, noise_scheduler, generator, args)
        loss = loss + args.diffusion_weight * terms["loss_diffusion"]
    return loss, {"loss": loss} | terms


def pretraining_loss(batch, conditions, unet, vae, noise_scheduler, generator, args):
    latents = encode_images(batch, vae, generator).to(conditions["prompt_embeds"].dtype)  # (B, 4, h, w)
    noise = batch_randn(latents.shape, generator, latents.device, latents.dtype)
    num_train_timesteps = noise_scheduler.config.num_train_timesteps
    timesteps = batch_randint(num_train_timesteps, len(latents), generator, latents.device)  # (B,)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    model_pred = stable_diffusion.predict(unet, noisy_latents, timesteps, conditions)
    return diffusion_loss(noise_scheduler, model_pred, latents, noise, timesteps, args.snr_gamma)


def draft_plus_step(
    batch, unet, vae, decoder, text_encoder, evaluator, noise_scheduler, generator, anchor_weight, args
):
    """DRaFT+, as NVIDIA NeMo-Aligner has it: DRaFT-1 (Clark et al., ICLR 2024), held to the frozen model.

    As published: DDIM steps with guidance; gradient through the last; -r + kl_coeff mean((eps - eps_base)^2), where both
    predictions are guided and of the same latents; kl_coeff is --anchor_weight, r standardised, as kl_coeff 1 is meant for
    scores whose spread is about 1. Not as published: sizes and steps; any prediction type. The script's own flags anchor the
    prediction that has the prompt, not the guided one.
    """
    conditions = stable_diffusion.encode_prompts(batch, text_encoder)
    scheduler = sampling_scheduler(noise_scheduler, args, conditions)

    def predict(model, latents, timesteps):
        negative_conditions = batch["negative_conditions"]
        return guided_prediction(model, conditions, negative_conditions, args.guidance_scale, latents, timesteps)

    with torch.no_grad():
        latents = initial_latents(vae, conditions, generator, args)  # (B, 4, h, w)
        latents = denoise(partial(predict, unet), scheduler, latents, scheduler.timesteps[:-1], generator)
    timesteps = scheduler.timesteps[-1].repeat(len(latents))  # (B,)
    base_pred = base_prediction(unet, latents, timesteps, predict=predict)
    model_pred = predict(unet, latents, timesteps)
    x0 = predict_original_sample(noise_scheduler, model_pred, timesteps, latents)
    scores = score(evaluator, decoder, x0, batch, args)  # (B,)
    rewards = (scores - args.reward_mean) / args.reward_std  # (B,)
    loss_reward = -rewards.mean()
    loss_anchor = anchor_loss(model_pred, base_pred)
    loss = args.quality_weight * loss_reward + anchor_weight * loss_anchor
    return loss, {"loss": loss, "loss_quality": loss_reward, "loss_anchor": loss_anchor, "score": scores}


def alignprop_step(
    batch, unet, vae, decoder, text_encoder, evaluator, noise_scheduler, generator, anchor_weight, args
):
    """AlignProp: Prabhudesai et al., "Aligning Text-to-Image Diffusion Models with Reward Backpropagation", 2023.

    As published: guided DDIM steps with eta = 1; gradient through the last K, one K for each batch, of which the released
    configuration draws the complement: N(42, 5) of 50 steps have none. Not as published: sizes, and the steps, to which that
    draw is scaled; the early steps have no graph where the released code builds and detaches one; a step is checkpointed
    with --gradient_checkpointing alone; the released code shows its scorer the images at half their contrast by an error,
    which is left out.
    """
    conditions = stable_diffusion.encode_prompts(batch, text_encoder)
    scheduler = sampling_scheduler(noise_scheduler, args, conditions)
    predict = partial(guided_prediction, unet, conditions, batch["negative_conditions"], args.guidance_scale)
    cut = len(scheduler.timesteps) - truncation(len(scheduler.timesteps), generator)
    with torch.no_grad():
        latents = initial_latents(vae, conditions, generator, args)  # (B, 4, h, w)
        latents = denoise(predict, scheduler, latents, scheduler.timesteps[:cut], generator, eta=1.0)
    latents = denoise(predict, scheduler, latents, scheduler.timesteps[cut:], generator, eta=1.0)
    scores = score(evaluator, decoder, latents, batch, args)  # (B,)
    loss_reward = -scores.mean()
    loss = args.quality_weight * loss_reward
    return loss, {"loss": loss, "loss_quality": loss_reward, "score": scores}


def truncation(num_steps, generator):
    """How many of the last steps keep their gradient: at least one, at most all."""
    drawn = 42 + 5 * torch.randn((), generator=generator).item()
    return num_steps - min(num_steps - 1, max(0, round(drawn * num_steps / 50)))


def ddpo_step(batch, unet, vae, decoder, text_encoder, evaluator, noise_scheduler, generator, anchor_weight, args):
    """DDPO: Black et al., "Training Diffusion Models with Reinforcement Learning", ICLR 2024; the importance-sampling form.

    As published: guided DDIM steps with eta = 1, a policy of that many Gaussian actions; no gradient through guide or decoder;
    rewards standardised within the batch, as where a prompt is too rare for statistics of its own, and clipped at 10; the
    ratio clipped at 1e-4; log-probabilities are means over a latent's elements; one inner epoch. Not as published: sizes and
    steps, and one update for each batch of samples, in which the ratio is still 1: the gradient is REINFORCE's.
    """
    conditions = stable_diffusion.encode_prompts(batch, text_encoder)
    scheduler = sampling_scheduler(noise_scheduler, args, conditions)
    predict = partial(guided_prediction, unet, conditions, batch["negative_conditions"], args.guidance_scale)
    trajectory, old_log_probs = [], []
    with torch.no_grad():
        trajectory.append(initial_latents(vae, conditions, generator, args))  # (B, 4, h, w)
        for timestep in scheduler.timesteps:
            mean, std = action(scheduler, predict(trajectory[-1], timestep), timestep, trajectory[-1])
            noise = batch_randn(mean.shape, generator, mean.device, mean.dtype)
            trajectory.append((mean + std * noise).to(trajectory[0].dtype))
            old_log_probs.append(log_probability(trajectory[-1], mean, std))  # (B,)
        scores = score(evaluator, decoder, trajectory[-1], batch, args)  # (B,)
    advantages = ((scores - scores.mean()) / (scores.std() + 1e-8)).clamp(-10, 10)
    losses = []
    for step, timestep in enumerate(scheduler.timesteps):
        mean, std = action(scheduler, predict(trajectory[step], timestep), timestep, trajectory[step])
        ratio = torch.exp(log_probability(trajectory[step + 1], mean, std) - old_log_probs[step])  # (B,)
        clipped = ratio.clamp(1 - 1e-4, 1 + 1e-4)
        losses.append(torch.maximum(-advantages * ratio, -advantages * clipped).mean())
    loss_policy = torch.stack(losses).mean()
    loss = args.quality_weight * loss_policy
    return loss, {"loss": loss, "loss_policy": loss_policy, "score": scores}


def action(scheduler, model_pred, timestep, latents):
    """Mean (B, 4, h, w) and standard deviation () of DDIM's next latents with eta = 1 (Song et al., 2021a, eqs. 12, 16)."""
    mean = scheduler.step(
        model_pred,
        timestep,
        latents,
        eta=1.0,
        variance_noise=torch.zeros_like(latents),
    ).prev_sample
    previous = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    abar = scheduler.alphas_cumprod[timestep]
    abar_prev = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
    std = ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
    if std == 0:
        raise ValueError(
            f"--method ddpo: the last sampling step, t = {int(timestep)}, draws nothing, as the scheduler ends at the clean "
            "image: expected one with set_alpha_to_one false, or another number of --num_inference_steps"
        )
    return mean, std


def log_probability(latents, mean, std):
    """(B,): the log-density of each of `latents` (B, ...), a mean over its elements, up to a constant."""
    return -((latents.float() - mean.float()).square() / (2 * std**2)).flatten(1).mean(1)


def sampling_scheduler(noise_scheduler, args, conditions):
    scheduler = DDIMScheduler.from_config(noise_scheduler.config)
    scheduler.set_timesteps(args.num_inference_steps, device=conditions["prompt_embeds"].device)
    return scheduler


def initial_latents(vae, conditions, generator, args):
    embeds = conditions["prompt_embeds"]
    shape = latents_shape(vae, len(embeds), args.resolution)
    return batch_randn(shape, generator, embeds.device, embeds.dtype)  # (B, 4, h, w)


def guided_prediction(unet, conditions, negative_conditions, guidance_scale, latents, timesteps):
    """(B, 4, h, w): both halves in one pass, of twice the rows; `guidance_scale` up to 1 is none."""
    if guidance_scale <= 1:
        return stable_diffusion.predict(unet, latents, timesteps, conditions)
    without = without_prompt(conditions, negative_conditions)
    both = {name: torch.cat([without[name], value]) for name, value in conditions.items()}
    if timesteps.ndim:
        timesteps = timesteps.repeat(2)
    negative, positive = stable_diffusion.predict(unet, latents.repeat(2, 1, 1, 1), timesteps, both).chunk(2)
    return negative + guidance_scale * (positive - negative)


def denoise(predict, scheduler, latents, timesteps, generator, eta=0.0):
    """DDIM's steps at `timesteps`, of the scheduler's own: latents (B, 4, h, w) after them; eta 1 is ancestral sampling."""
    for timestep in timesteps:
        noise = batch_randn(latents.shape, generator, latents.device, latents.dtype) if eta else None
        model_pred = predict(latents, timestep)
        step = scheduler.step(model_pred, timestep, latents, eta=eta, variance_noise=noise)
        latents = step.prev_sample.to(latents.dtype)
    return latents


def score(evaluator, decoder, latents, batch, args):
    """(B,) in (0, 1): the guide's clean score of decoded latents."""
    return evaluator.score(decode_latents(decoder, latents, args.decode_batch_size), batch["prompts"])


STEPS = {
    "refl": refl_step,
    "draft+": draft_plus_step,
    "alignprop": alignprop_step,
    "ddpo": ddpo_step,
}
# They sample, and score the image as it is; the balance is of eq. 9's terms. What is given beside --method counts all the same.
FLAGS = ["--late_start", "rollout", "--guide_perturbation", "0", "--balance_steps", "0"]


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nAll other flags: {SCRIPT.name} --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--method", choices=["acpo", *STEPS], required=True)
    add("--reward_mean", type=float, default=REWARD_MEAN, help="of the guide, 0 to 1, on base drawings: refl, draft+")
    add("--reward_std", type=float, default=REWARD_STD)
    own, flags = parser.parse_known_args(input_args)
    rival = own.method != "acpo"
    args = load_script().parse_args([*FLAGS, *flags] if rival else flags)
    if rival and (args.guide_perturbation or not args.quality_weight or args.decode == "crop"):
        parser.error(f"--method {own.method} takes no --guide_perturbation, no --quality_weight 0, no --decode crop")
    vars(args).update(method=own.method, reward_mean=own.reward_mean, reward_std=own.reward_std)
    return args


def load_script():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def main(args):
    script = load_script()
    if args.method in STEPS:
        script.training_step = STEPS[args.method]
        script.log_estimate = lambda *_, **__: None  # it knows what the script's own step calls
        script.save_model_card = partial(save_card, script.save_model_card, args.method)
    script.checkpoint_or_stop = partial(note_seconds, script.checkpoint_or_stop)
    script.main(args)


def note_seconds(checkpoint_or_stop, accelerator, output_dir, step, *others):
    """The script's own, after a line of OUTPUT_DIR/seconds.csv: step, CPU seconds of this process since it began."""
    if accelerator.is_main_process:
        with open(Path(output_dir, "seconds.csv"), "a") as file:
            file.write(f"{step},{time.process_time():.3f}\n")
    checkpoint_or_stop(accelerator, output_dir, step, *others)


def save_card(save_model_card, method, output_dir, **card):
    """The script's own, which calls every LoRA one of ACPO."""
    description = f"LoRA fine-tuned by {method}, a rival of ACPO (rival_methods.py)."
    tags = [tag for tag in card["tags"] if tag != "acpo"]
    save_model_card(output_dir, **card | {"model_description": description, "tags": tags})


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, ImportError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
