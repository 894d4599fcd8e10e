"""What a training step costs: a plain LoRA step as in diffusers, ACPO's variants, and the steps of ReFL, AlignProp, DRaFT+
and DDPO, on the same U-Net, VAE, guide, batch and dtype.

    python examples/benchmark_step.py                        # FLOP at SD-1.4's size, CPU time of half of SD-1.4
    python examples/benchmark_step.py --measure cuda         # time and memory at SD-1.4's size, on a GPU

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
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from acpo_utils.anchor import base_prediction
from acpo_utils.evaluators import IPCE
from acpo_utils.files import atomic_write
from acpo_utils.late_step import decode_latents, predict_original_sample
from acpo_utils.losses import anchor_loss
from acpo_utils.randomness import step_generator
from acpo_utils.stable_diffusion import encode_images, encode_prompts


SCRIPT = Path(__file__).resolve().with_name("train_acpo_lora_sd.py")
DEMO_DIR = SCRIPT.parent / "demo"
VIT_B_32 = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}
SIZES = {
    "sd14": {
        "resolution": 512,
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12},
        "tiny": {},
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
        "vae": {"block_out_channels": (64, 128, 256, 256), "layers_per_block": 2},
        "tiny": {"encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4},
        "text": {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "num_hidden_layers": 12},
        "guide": VIT_B_32
        | {"vision_cfg": {"image_size": 112, "layers": 12, "width": 384, "patch_size": 16, "head_width": 64}},
    },
}
CPU_PEERS = ("ReFL",)  # the others take minutes
ACPO = {
    "tmax": 100,
    "quality_weight": 0.1,
    "anchor_weight": 1.0,
    "diffusion_weight": 1.0,
    "diffusion_timesteps": "full",
    "late_start": "data",
    "late_steps": 1,
    "late_backprop_steps": None,
    "snr_gamma": None,
    "decode": "full",
    "decode_batch_size": None,
}
# (label, latents and embeddings cached, flags)
VARIANTS = [
    ("ACPO, as shipped: encodes, a second draw of t for L_diff", False, {}),
    ("ACPO, --cache_latents", True, {}),
    ("ACPO, --cache_latents --diffusion_timesteps late", True, {"diffusion_timesteps": "late"}),
    ("ACPO, as the last, --decode crop, half the side", True, {"diffusion_timesteps": "late", "decode": "crop"}),
    ("ACPO, as the last, --decode tiny", True, {"diffusion_timesteps": "late", "decode": "tiny"}),
]


def autocast_on(device: str):
    """The losses switch autocast off, which the meta device does not know."""
    return patch.object(torch, "autocast", lambda *_, **__: nullcontext()) if device == "meta" else nullcontext()


class World:
    """Random weights of one size on one device, frozen but for the LoRA, and a batch of images and of their latents."""

    def __init__(self, size: str, device: str, dtype: torch.dtype, batch_size: int):
        config = SIZES[size]
        self.device, self.dtype, self.batch_size, self.resolution = device, dtype, batch_size, config["resolution"]
        with torch.device(device):
            self.unet = UNet2DConditionModel(**config["unet"]).requires_grad_(False)
            self.vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                latent_channels=4,
                **config["vae"],
            ).requires_grad_(False)
            self.tiny = AutoencoderTiny(**config["tiny"]).requires_grad_(False)
            self.text_encoder = CLIPTextModel(CLIPTextConfig(**config["text"])).to(dtype).requires_grad_(False)
            self.guide = IPCE(config["guide"]).requires_grad_(False)
            self.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
            side = self.resolution // 8
            pixel_values = torch.rand(batch_size, 3, self.resolution, self.resolution) * 2 - 1
            input_ids = torch.ones(batch_size, 77, dtype=torch.long)
            moments = torch.zeros(batch_size, 8, side, side)
        torch.nn.Module.to(self.unet, dtype)  # diffusers' own warns of modules that want fp32, of which there are none
        for model in (self.unet, self.vae, self.tiny):
            model.to(memory_format=torch.channels_last)
        self.parameters = [p for p in self.unet.parameters() if p.requires_grad]
        schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
        self.scheduler = DDPMScheduler(**schedule, clip_sample=False)
        self.prompts = [f"a prompt {i}" for i in range(batch_size)]
        embeds = encode_prompts({"input_ids": input_ids}, self.text_encoder)
        self.batch = {"pixel_values": pixel_values, "input_ids": input_ids, "prompts": self.prompts}
        self.cached = {"latent_moments": moments, "prompt_embeds": embeds, "prompts": self.prompts}
        self.latents_shape = (batch_size, 4, side, side)
        with autocast_on(device):
            self.guide.score(pixel_values / 2 + 0.5, self.prompts)  # its prompt embeddings are kept from here on

    def noise(self) -> torch.Tensor:
        return torch.randn(self.latents_shape, device=self.device, dtype=self.dtype)

    def timesteps(self, low: int = 0, high: int = 1000) -> torch.Tensor:
        return torch.randint(low, high, (self.batch_size,)).to(self.device)

    def predict(self, latents: torch.Tensor, timesteps, embeds: torch.Tensor) -> torch.Tensor:
        return self.unet(latents, timesteps, embeds, return_dict=False)[0]

    def predict_guided(self, latents: torch.Tensor, timestep, embeds: torch.Tensor) -> torch.Tensor:
        """Classifier-free guidance: two rows of the U-Net for each sample."""
        both = self.predict(torch.cat([latents, latents]), timestep, torch.cat([embeds, embeds]))
        unconditional, conditional = both.chunk(2)
        return unconditional + 7.5 * (conditional - unconditional)

    def reward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.guide.score(decode_latents(self.vae, latents), self.prompts)


def lora_step(world: World) -> None:
    """diffusers' train_text_to_image_lora.py: encodes images and captions at every step."""
    embeds = encode_prompts(world.batch, world.text_encoder)
    latents = encode_images(world.batch, world.vae, step_generator(0)).to(world.dtype)
    noise, timesteps = world.noise(), world.timesteps()
    noisy_latents = world.scheduler.add_noise(latents, noise, timesteps)
    (world.predict(noisy_latents, timesteps, embeds).float() - noise.float()).square().mean().backward()


def acpo_step(world: World, training_step: Callable, cached: bool, flags: dict) -> None:
    """The script's own step."""
    args = argparse.Namespace(**(ACPO | {"decode_size": world.resolution // 2} | flags))
    batch, decoder = world.cached if cached else world.batch, world.tiny if args.decode == "tiny" else world.vae
    models = (world.unet, world.vae, decoder, world.text_encoder, world.guide, world.scheduler)
    training_step(batch, *models, step_generator(0), args)[0].backward()


def ddim(world: World, steps: int) -> DDIMScheduler:
    scheduler = DDIMScheduler.from_config(world.scheduler.config, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    return scheduler


def refl_step(world: World) -> None:
    """ReFL (Xu et al., ImageReward, 2023): 30 to 39 of 40 steps without gradient, here 34; one with; its estimate of x0."""
    embeds, scheduler, latents = encode_prompts(world.batch, world.text_encoder), ddim(world, 40), world.noise()
    with torch.no_grad():
        for timestep in scheduler.timesteps[:34]:
            latents = scheduler.step(world.predict(latents, timestep, embeds), timestep, latents).prev_sample
    timesteps = torch.full((world.batch_size,), int(scheduler.timesteps[34])).to(world.device)
    x0 = predict_original_sample(world.scheduler, world.predict(latents, timesteps, embeds), timesteps, latents)
    torch.relu(2 - world.reward(x0)).mean().backward()


def guided_rollout(world: World, embeds: torch.Tensor, scheduler: DDIMScheduler, steps: int) -> torch.Tensor:
    latents = world.noise()
    for timestep in scheduler.timesteps[:steps]:
        latents = scheduler.step(world.predict_guided(latents, timestep, embeds), timestep, latents).prev_sample
    return latents


def alignprop_step(world: World) -> None:
    """AlignProp (Prabhudesai et al., 2023), K = 1: 50 guided steps, of which the last, checkpointed, has a gradient."""
    embeds, scheduler = encode_prompts(world.batch, world.text_encoder), ddim(world, 50)
    with torch.no_grad():
        latents = guided_rollout(world, embeds, scheduler, 49)
    last = scheduler.timesteps[-1]
    checkpoint = torch.utils.checkpoint.checkpoint
    pred = checkpoint(world.predict_guided, latents, last, embeds, use_reentrant=False)
    (-world.reward(scheduler.step(pred, last, latents).prev_sample)).mean().backward()


def draft_step(world: World) -> None:
    """DRaFT+ (Clark et al., 2024, as in NVIDIA NeMo), K = 1: the last of 50 guided steps, held to the frozen model's."""
    embeds, scheduler = encode_prompts(world.batch, world.text_encoder), ddim(world, 50)
    with torch.no_grad():
        latents = guided_rollout(world, embeds, scheduler, 49)
        last = scheduler.timesteps[-1]
        base_pred = base_prediction(world.unet, torch.cat([latents, latents]), last, torch.cat([embeds, embeds]))
    unconditional, conditional = base_pred.chunk(2)
    pred = world.predict_guided(latents, last, embeds)
    loss_kl = anchor_loss(pred, unconditional + 7.5 * (conditional - unconditional))
    (loss_kl - world.reward(scheduler.step(pred, last, latents).prev_sample).mean()).backward()


def ddpo_step(world: World) -> None:
    """DDPO (Black et al., 2024): a guided rollout and its reward without gradient, then each of the 50 steps with one."""
    embeds, scheduler = encode_prompts(world.batch, world.text_encoder), ddim(world, 50)
    with torch.no_grad():
        advantages = world.reward(guided_rollout(world, embeds, scheduler, 50)) - 0.5
    for timestep in scheduler.timesteps:
        latents = world.noise()  # of the stored trajectory: another tensor costs the same
        pred = world.predict_guided(latents, timestep, embeds)
        log_prob = -(pred.float() - latents.float()).square().mean((1, 2, 3))
        (-advantages * torch.exp(log_prob - log_prob.detach())).mean().backward()


def load_script():
    spec = importlib.util.spec_from_file_location("train_acpo_lora_sd", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def steps(script) -> dict[str, Callable[[World], None]]:
    """{label: step}, forward and backward, without the optimizer, which is the same for all."""

    def variant(cached: bool, flags: dict) -> Callable[[World], None]:
        return lambda world: acpo_step(world, script.training_step, cached, flags)

    return (
        {"LoRA, as diffusers ships it": lora_step}
        | {label: variant(cached, flags) for label, cached, flags in VARIANTS}
        | {"ReFL": refl_step, "DRaFT+, K = 1": draft_step, "AlignProp, K = 1": alignprop_step, "DDPO": ddpo_step}
    )


def count(world: World, step: Callable[[World], None]) -> tuple[int, float]:
    """Rows of the U-Net and TFLOP, for each sample, forward and backward."""
    rows = []
    hook = world.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    with autocast_on("meta"), FlopCounterMode(display=False) as counter:
        step(world)
    hook.remove()
    world.unet.zero_grad()
    return sum(rows) // world.batch_size, counter.get_total_flops() / 1e12 / world.batch_size


def cpu_seconds(world: World, steps: dict[str, Callable[[World], None]], repetitions: int) -> dict[str, float]:
    """The least CPU time of each step on one thread: other jobs of the machine only add to it.

    One after the other in every round, so that what the machine does meanwhile falls on all of them.
    """
    seconds = {label: [] for label in steps}
    for label in tqdm([*steps] * (repetitions + 1), desc="CPU time of half of SD-1.4"):  # the first round warms up
        start = time.process_time()
        steps[label](world)
        seconds[label].append(time.process_time() - start)
        world.unet.zero_grad()
    return {label: min(each[1:]) for label, each in seconds.items()}


def script_seconds(world: World, script, repetitions: int) -> float:
    """The least CPU time between two steps of the whole script on `world`'s models: data, optimizer, log and all.

    Of few prompts, which the guide has seen once when these steps begin.
    """
    starts, training_step = [], script.training_step

    def timed_step(*args):
        starts.append(time.process_time())
        return training_step(*args)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        unet = UNet2DConditionModel.from_config(world.unet.config)  # without the LoRA
        tokenizer = CLIPTokenizer.from_pretrained(DEMO_DIR / "pipeline", subfolder="tokenizer")
        models = (world.vae, world.text_encoder, tokenizer, unet, world.scheduler)
        pipeline = StableDiffusionPipeline(*models, None, None, requires_safety_checker=False)
        pipeline.save_pretrained(folder / "pipeline")
        world.guide.save_pretrained(folder / "guide")
        words = f"--pretrained_model_name_or_path {folder}/pipeline --evaluator ipce:{folder}/guide --report_to none"
        words += f" --train_data_dir {DEMO_DIR}/data/train.parquet --max_train_samples 2 --output_dir {folder}/out"
        words += f" --train_batch_size {world.batch_size} --resolution {world.resolution}"
        words += f" --max_train_steps {repetitions + 3}"
        with patch.object(script, "training_step", timed_step), patch("sys.argv", [str(SCRIPT), *words.split()]):
            script.main(script.parse_args())
    starts = starts[-repetitions - 1 :]  # the estimate before the training calls it too
    return min(later - earlier for earlier, later in zip(starts, starts[1:]))


def cuda_cost(world: World, step: Callable[[World], None], repetitions: int) -> tuple[float, float]:
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


def table(rows: list[dict]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [
        [f"{row[n]:.3g}" if isinstance(row.get(n), float) else str(row.get(n, "")) for n in names] for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [names, ["---"] * len(names), *cells])


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    results = {"torch": torch.__version__, "device": "cpu"}
    script = load_script()
    every = steps(script)
    if "flop" in args.measure:
        world, rows = World("sd14", "meta", torch.float32, 1), []
        for label, step in tqdm(every.items(), desc="FLOP at SD-1.4's size"):
            unet_rows, tflop = count(world, step)
            rows.append({"step": label, "U-Net rows": unet_rows, "TFLOP": tflop})
        for row in rows:
            row["of the LoRA step"] = row["TFLOP"] / rows[0]["TFLOP"]
        results["flop"] = rows
    if "cpu" in args.measure:
        torch.set_num_threads(1)
        sizes = [("half", device, torch.float32, args.cpu_batch_size) for device in ("meta", "cpu")]
        meta, world, rows = World(*sizes[0]), World(*sizes[1]), []
        chosen = {
            label: step for label, step in every.items() if "ACPO" in label or "LoRA" in label or label in CPU_PEERS
        }
        for label, seconds in cpu_seconds(world, chosen, args.repetitions).items():
            gflop = 1e3 * count(meta, chosen[label])[1] * world.batch_size
            rows.append({"step": label, "GFLOP": gflop, "CPU s": seconds})
        real = {"step": "the script, flags as shipped", "GFLOP": rows[1]["GFLOP"]}
        rows.append(real | {"CPU s": script_seconds(world, script, args.repetitions)})
        for row in rows:
            row["FLOP of the LoRA step"] = row["GFLOP"] / rows[0]["GFLOP"]
            row["time of the LoRA step"] = row["CPU s"] / rows[0]["CPU s"]
        results["cpu"] = rows
    if "cuda" in args.measure:
        if not torch.cuda.is_available():
            raise ValueError("--measure cuda: expected a CUDA device, found none")
        results["device"], rows = torch.cuda.get_device_name(), []
        for batch_size in (1, 4, 8):
            world = World("sd14", "cuda", torch.bfloat16, batch_size)
            for label, step in tqdm(every.items(), desc=f"{results['device']}, batch {batch_size}"):
                seconds, memory = cuda_cost(world, step, args.repetitions)
                rows.append({"step": label, "batch": batch_size, "s": seconds, "peak GiB": memory})
        results["cuda"] = rows
    for name in set(args.measure) & set(results):
        print(f"\n{table(results[name])}")
    if args.output_file:
        with atomic_write(args.output_file) as temporary:
            temporary.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ["flop", "cpu", "cuda"]
    parser.add_argument("--measure", nargs="+", choices=choices, default=choices[:2])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--cpu_batch_size", type=int, default=4, help="as --train_batch_size of the script")
    parser.add_argument("--output_file", type=Path, help="the numbers as json")
    try:
        main(parser.parse_args())
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
