"""What a training step costs: a plain LoRA step as in diffusers, ACPO's variants, and the steps of ReFL, AlignProp, DRaFT+
and DDPO, on the same U-Net, VAE, guide, batch and dtype.

    python examples/benchmark_step.py                        # FLOP at SD-1.4's size, CPU time of half of SD-1.4
    python examples/benchmark_step.py --measure cuda         # the GPU check: gpu_check.py with its defaults
    python examples/benchmark_step.py --measure cuda_steps   # time and memory of these steps at SD-1.4's size, on a GPU
    python examples/benchmark_step.py --family sdxl          # FLOP and memory at a larger model's size: estimate_step.py --peers

FLOP are counted on the meta device, by torch's FlopCounterMode, with random weights that nothing depends on. ACPO's steps
are `training_step` of train_acpo_lora_sd.py beside it; the peers' are our own small re-implementations of the published
algorithms, for their cost alone. docs/performance.md.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from acpo_utils.anchor import base_prediction
from acpo_utils.evaluators import IPCE
from acpo_utils.families.latents import encode_images
from acpo_utils.families.stable_diffusion import encode_prompts
from acpo_utils.files import atomic_write
from acpo_utils.late_step import decode_latents, predict_original_sample
from acpo_utils.losses import anchor_loss
from acpo_utils.randomness import step_generator


SCRIPT = Path(__file__).resolve().with_name("train_acpo_lora_sd.py")
DEMO_DIR = SCRIPT.parent / "demo"
VIT_B_32 = {
    "embed_dim": 512,
    "vision_cfg": {
        "image_size": 224,
        "layers": 12,
        "width": 768,
        "patch_size": 32,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 512,
        "heads": 8,
        "layers": 12,
    },
}
SIZES = {
    "sd14": {
        "resolution": 512,
        "unet": {
            "sample_size": 64,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        "vae": {
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
        },
        "tiny": {},
        "text": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
        },
        "guide": VIT_B_32,
    },
    # The same parts, half as wide, at half the side: for CPU time.
    "half": {
        "resolution": 256,
        "unet": {
            "sample_size": 32,
            "cross_attention_dim": 384,
            "block_out_channels": (160, 320, 640, 640),
            "attention_head_dim": 4,  # diffusers' name for the number of heads: half of them, each as wide as SD-1.4's
        },
        "vae": {
            "block_out_channels": (64, 128, 256, 256),
            "layers_per_block": 2,
        },
        "tiny": {
            "encoder_block_out_channels": (32,) * 4,
            "decoder_block_out_channels": (32,) * 4,
        },
        "text": {
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_attention_heads": 6,
            "num_hidden_layers": 12,
        },
        "guide": VIT_B_32
        | {
            "vision_cfg": {
                "image_size": 112,
                "layers": 12,
                "width": 384,
                "patch_size": 16,
                "head_width": 64,
            },
        },
    },
}
CPU_PEERS = ("ReFL",)  # the others take minutes
# Flags of the training script for each of ACPO's steps; half the side is added where there is a window.
VARIANTS = {
    "ACPO, as shipped: encodes, a second draw of t for L_diff": "",
    "ACPO, --cache_latents": "--cache_latents",
    "ACPO, --cache_latents --diffusion_timesteps late": "--cache_latents --diffusion_timesteps late",
    "ACPO, as the last, --decode crop, half the side": "--cache_latents --diffusion_timesteps late --decode crop",
    "ACPO, as the last, --decode tiny": "--cache_latents --diffusion_timesteps late --decode tiny",
}


def autocast_on(device):
    """The losses switch autocast off, which the meta device does not know."""
    if device == "meta":
        return patch.object(torch, "autocast", lambda *_, **__: nullcontext())
    return nullcontext()


class World:
    """Random weights of one size on one device, frozen but for the LoRA, and a batch of images and of their latents."""

    def __init__(self, size, device, dtype, batch_size):
        config = SIZES[size]
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size
        self.resolution = config["resolution"]
        side = self.resolution // 8
        self.latents_shape = (batch_size, 4, side, side)
        with torch.device(device):
            self.unet = UNet2DConditionModel(**config["unet"])
            self.vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                latent_channels=4,
                **config["vae"],
            )
            self.tiny = AutoencoderTiny(**config["tiny"])
            self.text_encoder = CLIPTextModel(CLIPTextConfig(**config["text"])).to(dtype)
            self.guide = IPCE(config["guide"])
            for model in (self.unet, self.vae, self.tiny, self.text_encoder, self.guide):
                model.requires_grad_(False)
            lora = LoraConfig(
                r=4,
                lora_alpha=4,
                target_modules=["to_k", "to_q", "to_v", "to_out.0"],
            )
            self.unet.add_adapter(lora)
            pixel_values = torch.rand(batch_size, 3, self.resolution, self.resolution) * 2 - 1
            input_ids = torch.ones(batch_size, 77, dtype=torch.long)
            moments = torch.zeros(batch_size, 8, side, side)
        torch.nn.Module.to(self.unet, dtype)  # diffusers' own warns of modules that want fp32, of which there are none
        for model in (self.unet, self.vae, self.tiny):
            model.to(memory_format=torch.channels_last)
        self.parameters = [p for p in self.unet.parameters() if p.requires_grad]
        self.scheduler = DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            clip_sample=False,
        )
        self.prompts = [f"a prompt {i}" for i in range(batch_size)]
        conditions = encode_prompts({"input_ids": input_ids}, self.text_encoder)
        negative_conditions = {name: value[:1] for name, value in conditions.items()}
        self.batch = {
            "pixel_values": pixel_values,
            "input_ids": input_ids,
            "prompts": self.prompts,
            "negative_conditions": negative_conditions,
        }
        self.cached = {
            "latent_moments": moments,
            "prompts": self.prompts,
            "negative_conditions": negative_conditions,
            **conditions,
        }
        with autocast_on(device):
            self.guide.score(pixel_values / 2 + 0.5, self.prompts)  # its prompt embeddings are kept from here on

    def noise(self):
        return torch.randn(self.latents_shape, device=self.device, dtype=self.dtype)

    def timesteps(self):
        return torch.randint(1000, (self.batch_size,)).to(self.device)

    def predict(self, latents, timesteps, embeds):
        return self.unet(latents, timesteps, embeds, return_dict=False)[0]

    def predict_guided(self, latents, timestep, embeds):
        """Classifier-free guidance: two rows of the U-Net for each sample."""
        latents = torch.cat([latents, latents])
        embeds = torch.cat([embeds, embeds])
        return guided(self.predict(latents, timestep, embeds))

    def reward(self, latents):
        return self.guide.score(decode_latents(self.vae, latents), self.prompts)


def guided(predictions):
    """Of (2 B, ...), unconditional ones first, the guided ones (B, ...)."""
    unconditional, conditional = predictions.chunk(2)
    return unconditional + 7.5 * (conditional - unconditional)


def lora_step(world):
    """diffusers' train_text_to_image_lora.py: encodes images and captions at every step."""
    embeds = encode_prompts(world.batch, world.text_encoder)["prompt_embeds"]
    latents = encode_images(world.batch, world.vae, step_generator(0)).to(world.dtype)
    noise = world.noise()
    timesteps = world.timesteps()
    noisy_latents = world.scheduler.add_noise(latents, noise, timesteps)
    pred = world.predict(noisy_latents, timesteps, embeds)
    loss = F.mse_loss(pred.float(), noise.float())
    loss.backward()


def acpo_step(world, script, flags):
    """The script's own step, by its own flags."""
    args = read_flags(script, flags, world.resolution)
    loss, _ = script.training_step(
        batch=world.cached if args.cache_latents else world.batch,
        unet=world.unet,
        vae=world.vae,
        decoder=world.tiny if args.decode == "tiny" else world.vae,
        text_encoder=world.text_encoder,
        evaluator=world.guide,
        noise_scheduler=world.scheduler,
        generator=step_generator(0),
        anchor_weight=args.anchor_weight,
        args=args,
    )
    loss.backward()


def read_flags(script, flags, resolution):
    """The script's arguments: `flags`, and what it asks for besides, of which nothing is read."""
    words = f"--pretrained_model_name_or_path x --train_data_dir x --evaluator x --resolution {resolution} {flags}"
    if "--cache_latents" in flags:
        words += " --center_crop"
    if "--decode crop" in flags:
        words += f" --decode_size {resolution // 2}"
    if "--decode tiny" in flags:
        words += " --tiny_vae_name_or_path x"
    return script.parse_args(words.split())


def ddim(world, steps):
    scheduler = DDIMScheduler.from_config(world.scheduler.config, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    return scheduler


def refl_step(world):
    """ReFL (Xu et al., ImageReward, 2023): 30 to 39 of 40 steps without gradient, here 34; one with; its estimate of x0."""
    embeds = encode_prompts(world.batch, world.text_encoder)["prompt_embeds"]
    scheduler = ddim(world, 40)
    latents = world.noise()
    with torch.no_grad():
        for timestep in scheduler.timesteps[:34]:
            pred = world.predict(latents, timestep, embeds)
            latents = scheduler.step(pred, timestep, latents).prev_sample
    timesteps = torch.full((world.batch_size,), int(scheduler.timesteps[34]))
    timesteps = timesteps.to(world.device)
    pred = world.predict(latents, timesteps, embeds)
    x0 = predict_original_sample(world.scheduler, pred, timesteps, latents)
    loss = torch.relu(2 - world.reward(x0)).mean()
    loss.backward()


def guided_rollout(world, embeds, scheduler, steps):
    latents = world.noise()
    for timestep in scheduler.timesteps[:steps]:
        pred = world.predict_guided(latents, timestep, embeds)
        latents = scheduler.step(pred, timestep, latents).prev_sample
    return latents


def alignprop_step(world):
    """AlignProp (Prabhudesai et al., 2023), K = 1: 50 guided steps, of which the last, checkpointed, has a gradient."""
    embeds = encode_prompts(world.batch, world.text_encoder)["prompt_embeds"]
    scheduler = ddim(world, 50)
    with torch.no_grad():
        latents = guided_rollout(world, embeds, scheduler, 49)
    last = scheduler.timesteps[-1]
    pred = checkpoint(world.predict_guided, latents, last, embeds, use_reentrant=False)
    x0 = scheduler.step(pred, last, latents).prev_sample
    loss = -world.reward(x0).mean()
    loss.backward()


def draft_step(world):
    """DRaFT+ (Clark et al., 2024, as in NVIDIA NeMo), K = 1: the last of 50 guided steps, held to the frozen model's."""
    embeds = encode_prompts(world.batch, world.text_encoder)["prompt_embeds"]
    scheduler = ddim(world, 50)
    last = scheduler.timesteps[-1]
    with torch.no_grad():
        latents = guided_rollout(world, embeds, scheduler, 49)
        base_pred = base_prediction(
            world.unet,
            torch.cat([latents, latents]),
            last,
            torch.cat([embeds, embeds]),
        )
    pred = world.predict_guided(latents, last, embeds)
    x0 = scheduler.step(pred, last, latents).prev_sample
    loss = anchor_loss(pred, guided(base_pred)) - world.reward(x0).mean()
    loss.backward()


def ddpo_step(world):
    """DDPO (Black et al., 2024): a guided rollout and its reward without gradient, then each of the 50 steps with one."""
    embeds = encode_prompts(world.batch, world.text_encoder)["prompt_embeds"]
    scheduler = ddim(world, 50)
    with torch.no_grad():
        latents = guided_rollout(world, embeds, scheduler, 50)
        advantages = world.reward(latents) - 0.5
    for timestep in scheduler.timesteps:
        latents = world.noise()  # of the stored trajectory: another tensor costs the same
        pred = world.predict_guided(latents, timestep, embeds)
        distance = (pred.float() - latents.float()).square()
        log_prob = -distance.mean((1, 2, 3))
        ratio = torch.exp(log_prob - log_prob.detach())
        loss = (-advantages * ratio).mean()
        loss.backward()


def load_script(path=SCRIPT):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def steps(script):
    """{label: a function of the world}, forward and backward, without the optimizer, which is the same for all."""
    found = {"LoRA, as diffusers ships it": lora_step}
    for label, flags in VARIANTS.items():
        found[label] = partial(acpo_step, script=script, flags=flags)
    found["ReFL"] = refl_step
    found["DRaFT+, K = 1"] = draft_step
    found["AlignProp, K = 1"] = alignprop_step
    found["DDPO"] = ddpo_step
    return found


def count(world, step):
    """Rows of the U-Net and TFLOP, for each sample, forward and backward."""
    rows = []

    def note_rows(_, inputs):
        rows.append(len(inputs[0]))

    hook = world.unet.register_forward_pre_hook(note_rows)
    with autocast_on("meta"), FlopCounterMode(display=False) as counter:
        step(world)
    hook.remove()
    world.unet.zero_grad()
    tflop = counter.get_total_flops() / 1e12
    return sum(rows) // world.batch_size, tflop / world.batch_size


def cpu_seconds(world, steps, repetitions):
    """{label: the least CPU time of its step} on one thread: other jobs of the machine only add to it.

    One after the other in every round, so that what the machine does meanwhile falls on all of them.
    """
    seconds = {label: [] for label in steps}
    labels = [*steps] * (repetitions + 1)  # the first round warms up
    for label in tqdm(labels, desc="CPU time of half of SD-1.4"):
        start = time.process_time()
        steps[label](world)
        seconds[label].append(time.process_time() - start)
        world.unet.zero_grad()
    return {label: min(each[1:]) for label, each in seconds.items()}


def script_seconds(world, script, repetitions):
    """The least CPU time between two steps of the whole script on `world`'s models: data, optimizer, log and all.

    Of few prompts, which the guide has seen once when these steps begin.
    """
    starts = []
    training_step = script.training_step

    def timed_step(*args, **kwargs):
        starts.append(time.process_time())
        return training_step(*args, **kwargs)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        pipeline = StableDiffusionPipeline(
            vae=world.vae,
            text_encoder=world.text_encoder,
            tokenizer=CLIPTokenizer.from_pretrained(DEMO_DIR / "pipeline", subfolder="tokenizer"),
            unet=UNet2DConditionModel.from_config(world.unet.config),  # without the LoRA
            scheduler=world.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder / "pipeline")
        world.guide.save_pretrained(folder / "guide")
        words = f"--pretrained_model_name_or_path {folder}/pipeline --evaluator ipce:{folder}/guide --report_to none"
        words += f" --train_data_dir {DEMO_DIR}/data/train.parquet --max_train_samples 2 --output_dir {folder}/out"
        words += f" --train_batch_size {world.batch_size} --resolution {world.resolution}"
        words += f" --max_train_steps {repetitions + 3}"
        with patch.object(script, "training_step", timed_step):
            script.main(script.parse_args(words.split()))
    starts = starts[-repetitions - 1 :]  # the estimate before the training calls it too
    return min(later - earlier for earlier, later in zip(starts, starts[1:]))


def cuda_cost(world, step, repetitions):
    """Median seconds of a step, and the peak of allocated memory in GiB."""
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repetitions + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(world)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        world.unet.zero_grad()
    return statistics.median(seconds[3:]), torch.cuda.max_memory_allocated() / 2**30


def table(rows):
    """Markdown of [{column: number or text}], as it is printed."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names)]
    for row in rows:
        values = (row.get(name, "") for name in names)
        lines.append([format(value, ".3g" if isinstance(value, float) else "") for value in values])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measure_flop(script):
    world = World("sd14", "meta", torch.float32, batch_size=1)
    rows = []
    for label, step in tqdm(steps(script).items(), desc="FLOP at SD-1.4's size"):
        unet_rows, tflop = count(world, step)
        rows.append({"step": label, "U-Net rows": unet_rows, "TFLOP": tflop})
    for row in rows:
        row["of the LoRA step"] = row["TFLOP"] / rows[0]["TFLOP"]
    return rows


def measure_cpu(script, batch_size, repetitions):
    torch.set_num_threads(1)
    meta = World("half", "meta", torch.float32, batch_size)
    world = World("half", "cpu", torch.float32, batch_size)
    every = steps(script)
    chosen = {label: every[label] for label in every if label in CPU_PEERS or "ACPO" in label or "LoRA" in label}
    rows = []
    for label, seconds in cpu_seconds(world, chosen, repetitions).items():
        _, tflop = count(meta, chosen[label])
        rows.append({"step": label, "GFLOP": 1e3 * tflop * batch_size, "CPU s": seconds})
    whole_script = {
        "step": "the script, flags as shipped",
        "GFLOP": rows[1]["GFLOP"],
        "CPU s": script_seconds(world, script, repetitions),
    }
    rows.append(whole_script)
    for row in rows:
        row["FLOP of the LoRA step"] = row["GFLOP"] / rows[0]["GFLOP"]
        row["time of the LoRA step"] = row["CPU s"] / rows[0]["CPU s"]
    return rows


def measure_cuda(script, repetitions):
    rows = []
    for batch_size in (1, 4, 8):
        world = World("sd14", "cuda", torch.bfloat16, batch_size)
        for label, step in tqdm(steps(script).items(), desc=f"{torch.cuda.get_device_name()}, batch {batch_size}"):
            seconds, memory = cuda_cost(world, step, repetitions)
            row = {
                "step": label,
                "batch": batch_size,
                "s": seconds,
                "peak GiB": memory,
            }
            rows.append(row)
    return rows


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    either = parser.add_mutually_exclusive_group()
    choices = ["flop", "cpu", "cuda", "cuda_steps"]
    either.add_argument("--measure", nargs="+", choices=choices, default=choices[:2])
    either.add_argument("--family", help="a larger model in place of SD-1.4: sdxl, sd3, z-image, flux or flux2-klein")
    add("--repetitions", type=int, default=5)
    add("--cpu_batch_size", type=int, default=4, help="as --train_batch_size of the script")
    add("--output_file", type=Path, help="the numbers as json")
    args = parser.parse_args(input_args)
    for name in ("repetitions", "cpu_batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, found {getattr(args, name)}")
    return args


def estimate_family(args):
    estimate_step = load_script(SCRIPT.with_name("estimate_step.py"))
    words = ["--peers", "--family", args.family]
    if args.output_file:
        words += ["--output_file", str(args.output_file)]
    estimate_step.main(estimate_step.parse_args(words))


def main(args):
    if args.family:
        estimate_family(args)
        return
    on_gpu = [name for name in args.measure if name.startswith("cuda")]
    if on_gpu and not torch.cuda.is_available():
        raise ValueError(f"--measure {on_gpu[0]}: expected a CUDA device, found none")
    if "cuda" in args.measure:  # first, while this process has nothing on the GPU
        gpu_check = load_script(SCRIPT.with_name("gpu_check.py"))
        gpu_check.main(gpu_check.parse_args([]))
    torch.manual_seed(0)
    script = load_script()
    results = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }
    if "flop" in args.measure:
        results["flop"] = measure_flop(script)
    if "cpu" in args.measure:
        results["cpu"] = measure_cpu(script, args.cpu_batch_size, args.repetitions)
    if "cuda_steps" in args.measure:
        results["cuda_steps"] = measure_cuda(script, args.repetitions)
    for name in ("flop", "cpu", "cuda_steps"):
        if name in results:
            print(f"\n{table(results[name])}")
    if args.output_file:
        with atomic_write(args.output_file) as temporary:
            temporary.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    try:
        main(parse_args())
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
