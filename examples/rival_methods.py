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

from acpo_utils.anchor import without_adapter
from acpo_utils.families import stable_diffusion
from acpo_utils.families.latents import encode_images, latents_shape
from acpo_utils.late_step import decode_latents, predict_original_sample, with_guidance
from acpo_utils.losses import acpo_objective, anchor_loss, diffusion_loss
from acpo_utils.randomness import batch_randint, batch_randn


SCRIPT = Path(__file__).resolve().with_name("train_acpo_lora_sd.py")
# Of the demo's guide over drawings of the demo's base model for 64 captions of its training set, from 0 to 1.
REWARD_MEAN = 0.550
REWARD_STD = 0.107


def training_step(
    method,
    batch,
    unet,
    vae,
    decoder,
    text_encoder,
    evaluator,
    noise_scheduler,
    generator,
    anchor_weight,
    args,
):
    """One of `METHODS` in the place of the script's own step: the loss, and its terms by the names of the script's log."""
    sampler = Sampler(
        batch,
        unet,
        vae,
        decoder,
        text_encoder,
        evaluator,
        noise_scheduler,
        generator,
        args,
    )
    terms = METHODS[method](sampler)
    loss, weighed = acpo_objective(
        terms.get("loss_diffusion"),
        terms.get("loss_anchor"),
        terms["loss_quality"],
        args.diffusion_weight,
        anchor_weight,
        args.quality_weight,
    )
    return loss, weighed | terms


def refl(sampler):
    """ReFL: Xu et al., "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", NeurIPS 2023.

    As published: no guidance in training; ancestral steps without gradient to a random one of the last quarter of the
    schedule (30 to 39 of 40), one prediction with gradient there, its estimate of x0; the loss relu(2 - r) of a standardised
    reward r; the pre-training loss beside it. The paper weighs them 0.001 to 1 (--quality_weight, --diffusion_weight); the
    released code has no pre-training loss (--diffusion_weight 0). Not as published: a LoRA and not all weights; as many sampling
    steps as --num_inference_steps; both losses in one step of the optimizer; the guide in ImageReward's place, standardised by
    its mean and spread over drawings of the base model. The released code tells the U-Net the number of the sampling step in
    place of its timestep; here it is the timestep.
    """
    num_steps = len(sampler.timesteps)
    late = max(1, num_steps // 4)
    back = torch.randint(late, (), generator=sampler.generator)
    stop = num_steps - 1 - int(back)
    with torch.no_grad():
        latents = sampler.start()  # (B, 4, h, w)
        for timestep in sampler.timesteps[:stop]:
            latents = sampler.ancestral(sampler.unguided, latents, timestep)
    x0, _ = sampler.estimate(sampler.unguided, latents, stop)
    scores = sampler.score(x0)  # (B,)
    rewards = sampler.standardised(scores)
    hinge = torch.relu(2 - rewards)
    terms = {"loss_quality": hinge.mean(), "score": scores}
    if sampler.args.diffusion_weight:
        terms["loss_diffusion"] = sampler.pretraining_loss()
    return terms


def draft_plus(sampler):
    """DRaFT+, as NVIDIA NeMo-Aligner has it: DRaFT-1 (Clark et al., ICLR 2024), held to the frozen model.

    As published: DDIM steps with guidance, gradient through the last, whose estimate of x0 is scored; the loss is
    -r + kl_coeff mean((eps - eps_base)^2) of two guided predictions at the same latents; kl_coeff is --anchor_weight. Not as
    published: sizes and steps; any prediction type; r is standardised, as a kl_coeff of 1 is of scores that differ by about 1.
    The script's own anchor is on the prediction that has the prompt, not on the guided one.
    """
    last = len(sampler.timesteps) - 1
    with torch.no_grad():
        latents = sampler.start()  # (B, 4, h, w)
        for timestep in sampler.timesteps[:last]:
            latents = sampler.ddim(sampler.guided, latents, timestep)
        with without_adapter(sampler.unet):
            _, base_pred = sampler.estimate(sampler.guided, latents, last)
    x0, model_pred = sampler.estimate(sampler.guided, latents, last)
    scores = sampler.score(x0)  # (B,)
    rewards = sampler.standardised(scores)
    return {
        "loss_quality": -rewards.mean(),
        "loss_anchor": anchor_loss(model_pred, base_pred),
        "score": scores,
    }


def alignprop(sampler):
    """AlignProp: Prabhudesai et al., "Aligning Text-to-Image Diffusion Models with Reward Backpropagation", 2023.

    As published: guided DDIM steps with eta = 1; gradient through the last K, one K for each batch, of which the released
    configuration draws the complement: N(42, 5) of 50 steps have none. Not as published: sizes, and the steps, to which that
    draw is scaled; steps without gradient have no graph, where the released code builds and detaches one; steps with one are
    checkpointed with --gradient_checkpointing alone. The released code hands its scorer (x + 1) / 2 of images in [0, 1]; here
    it sees the images.
    """
    num_steps = len(sampler.timesteps)
    cut = num_steps - truncation(num_steps, sampler.generator)
    with torch.no_grad():
        latents = sampler.start()  # (B, 4, h, w)
        for timestep in sampler.timesteps[:cut]:
            latents = sampler.ancestral(sampler.guided, latents, timestep)
    for timestep in sampler.timesteps[cut:]:
        latents = sampler.ancestral(sampler.guided, latents, timestep)
    scores = sampler.score(latents)  # (B,)
    return {
        "loss_quality": -scores.mean(),
        "score": scores,
    }


def truncation(num_steps, generator):
    """K: how many of the last steps keep their gradient, at least one, at most all."""
    drawn = 42 + 5 * torch.randn((), generator=generator)
    without_gradient = round(drawn.item() * num_steps / 50)
    return min(num_steps, max(1, num_steps - without_gradient))


def ddpo(sampler):
    """DDPO: Black et al., "Training Diffusion Models with Reinforcement Learning", ICLR 2024; the importance-sampling form.

    As published: guided DDIM steps with eta = 1, each a Gaussian action; no gradient through guide or decoder; rewards
    standardised within the batch, as where a prompt is too rare for statistics of its own, and clipped at 10; the ratio
    clipped at 1e-4; log-probabilities are means over a latent's elements; one inner epoch. Not as published: sizes and steps,
    and one update for each batch of samples, where the ratio is still 1: the gradient is REINFORCE's. A last step that draws
    nothing, where a scheduler ends at the clean image, is no action.
    """
    old_log_probs = []
    with torch.no_grad():
        trajectory = [sampler.start()]  # of (B, 4, h, w)
        for timestep in sampler.timesteps:
            mean, std = sampler.action(sampler.guided, trajectory[-1], timestep)
            taken = mean + std * sampler.noise()
            trajectory.append(taken.to(sampler.dtype))
            old_log_probs.append(log_probability(trajectory[-1], mean, std))  # (B,)
        scores = sampler.score(trajectory[-1])  # (B,)
    spread = scores.std(correction=0) + 1e-8
    advantages = (scores - scores.mean()) / spread
    advantages = advantages.clamp(-10, 10)
    losses = []
    for step, timestep in enumerate(sampler.timesteps):
        mean, std = sampler.action(sampler.guided, trajectory[step], timestep)
        if std == 0:
            continue
        log_probs = log_probability(trajectory[step + 1], mean, std)
        ratio = torch.exp(log_probs - old_log_probs[step])  # (B,)
        clipped = ratio.clamp(1 - 1e-4, 1 + 1e-4)
        worse = torch.maximum(-advantages * ratio, -advantages * clipped)
        losses.append(worse.mean())
    return {
        "loss_quality": torch.stack(losses).mean(),
        "score": scores,
    }


def log_probability(latents, mean, std):
    """(B,): the log-density of each of `latents` (B, ...), a mean over its elements, up to a constant."""
    difference = latents.float() - mean.float()
    squares = (difference / std).square()
    return -squares.flatten(1).mean(1) / 2


class Sampler:
    """DDIM's schedule of --num_inference_steps, the model's predictions for one batch of prompts, and the guide's scores."""

    def __init__(
        self,
        batch,
        unet,
        vae,
        decoder,
        text_encoder,
        evaluator,
        noise_scheduler,
        generator,
        args,
    ):
        self.batch = batch
        self.unet = unet
        self.vae = vae
        self.decoder = decoder
        self.evaluator = evaluator
        self.noise_scheduler = noise_scheduler
        self.generator = generator
        self.args = args
        self.conditions = stable_diffusion.encode_prompts(batch, text_encoder)  # {name: (B, ...)}
        embeds = self.conditions["prompt_embeds"]
        self.device = embeds.device
        self.dtype = embeds.dtype
        self.shape = latents_shape(vae, len(embeds), args.resolution)
        self.scheduler = DDIMScheduler.from_config(noise_scheduler.config)
        self.scheduler.set_timesteps(args.num_inference_steps, device=self.device)
        self.timesteps = self.scheduler.timesteps
        self.guided = with_guidance(
            partial(stable_diffusion.predict, unet),
            self.conditions,
            batch["negative_conditions"],
            args.guidance_scale,
        )

    def noise(self):
        return batch_randn(self.shape, self.generator, self.device, self.dtype)  # (B, 4, h, w)

    def start(self):
        return self.noise() * self.scheduler.init_noise_sigma

    def unguided(self, latents, timestep):
        return stable_diffusion.predict(self.unet, latents, timestep, self.conditions)

    def estimate(self, predict, latents, step):
        """x0 (B, 4, h, w) as the prediction at a step of the schedule has it, and the prediction."""
        pred = predict(latents, self.timesteps[step])
        timesteps = self.timesteps[step].repeat(len(latents))  # (B,)
        x0 = predict_original_sample(self.noise_scheduler, pred, timesteps, latents)
        return x0, pred

    def ddim(self, predict, latents, timestep):
        pred = predict(latents, timestep)
        step = self.scheduler.step(pred, timestep, latents)
        return step.prev_sample.to(self.dtype)

    def ancestral(self, predict, latents, timestep):
        mean, std = self.action(predict, latents, timestep)
        taken = mean + std * self.noise()
        return taken.to(self.dtype)

    def action(self, predict, latents, timestep):
        """Mean (B, 4, h, w) and standard deviation () of DDIM's next latents with eta = 1 (Song et al. 2021a, eqs. 12, 16)."""
        scheduler = self.scheduler
        step = scheduler.step(
            predict(latents, timestep),
            timestep,
            latents,
            eta=1.0,
            variance_noise=torch.zeros_like(latents),
        )
        interval = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        abar = scheduler.alphas_cumprod[timestep]
        abar_prev = scheduler.final_alpha_cumprod
        if timestep >= interval:
            abar_prev = scheduler.alphas_cumprod[timestep - interval]
        variance = (1 - abar_prev) / (1 - abar)
        variance = variance * (1 - abar / abar_prev)
        return step.prev_sample, variance.sqrt()

    def score(self, latents):
        """(B,) in (0, 1): the guide's clean score of decoded latents."""
        images = decode_latents(self.decoder, latents, self.args.decode_batch_size)
        return self.evaluator.score(images, self.batch["prompts"])

    def standardised(self, scores):
        return (scores - self.args.reward_mean) / self.args.reward_std

    def pretraining_loss(self):
        latents = encode_images(self.batch, self.vae, self.generator)  # (B, 4, h, w)
        latents = latents.to(self.dtype)
        noise = self.noise()
        timesteps = batch_randint(
            self.noise_scheduler.config.num_train_timesteps,
            len(latents),
            self.generator,
            self.device,
        )
        noisy_latents = self.noise_scheduler.add_noise(latents, noise, timesteps)
        return diffusion_loss(
            self.noise_scheduler,
            self.unguided(noisy_latents, timesteps),
            latents,
            noise,
            timesteps,
            self.args.snr_gamma,
        )


METHODS = {
    "refl": refl,
    "draft+": draft_plus,
    "alignprop": alignprop,
    "ddpo": ddpo,
}
# They sample, and score the image as it is; the balance is of eq. 9's terms. What is given beside --method counts all the same.
FLAGS = [
    "--late_start",
    "rollout",
    "--late_every",
    "1",
    "--guide_perturbation",
    "0",
    "--balance_steps",
    "0",
]


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nAll other flags: {SCRIPT.name} --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--method", choices=["acpo", *METHODS], required=True)
    add(
        "--reward_mean",
        type=float,
        default=REWARD_MEAN,
        help="of the guide, 0 to 1, on drawings of the base model: refl, draft+",
    )
    add(
        "--reward_std",
        type=float,
        default=REWARD_STD,
    )
    own, flags = parser.parse_known_args(input_args)
    if own.method in METHODS:
        flags = FLAGS + flags
    args = load_script().parse_args(flags)
    if own.method in METHODS:
        if args.guide_perturbation or args.decode == "crop":
            parser.error(f"--method {own.method} takes no --guide_perturbation and no --decode crop")
        if args.late_every > 1:
            parser.error(f"--method {own.method} takes no --late_every: it samples at every step")
        if not args.quality_weight:
            parser.error(f"--method {own.method} needs a --quality_weight above 0")
    vars(args).update(vars(own))
    return args


def load_script():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def main(args):
    script = load_script()
    if args.method in METHODS:
        script.training_step = partial(training_step, args.method)
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
    card["model_description"] = f"LoRA fine-tuned by {method}, a rival of ACPO (rival_methods.py)."
    card["tags"] = [tag for tag in card["tags"] if tag != "acpo"]
    save_model_card(output_dir, **card)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, ImportError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
