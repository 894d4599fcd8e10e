"""Train the demo's text-to-image pipeline on the demo's train split, given its VAE and a tokenizer.

    accelerate launch examples/demo/train_pipeline.py --vae vae-demo --tokenizer clip-demo --output_dir pipeline-demo

What has to be learned here is mostly which drawing a text means. A U-Net learns that slowly, at half a second a step, so
the text encoder learns it first and alone, at a fifth of a second: its last tokens are to hold the drawing's latents, as a
linear map reads them (`layout_loss`). Cross-attention is such a map, so the U-Net has little left to do but to read them.
Then both learn together, the text encoder still by both losses.

To know drawings by heart, Muon is three times as fast as AdamW (Jordan et al. 2024; timm's, which scales its updates to
AdamW's): of the text encoder alone, on held-out combinations, a squared error of 0.27 after 1,000 steps, where AdamW took
3,000.

Velocity prediction on a schedule that ends in pure noise (Salimans and Ho 2022; Lin et al. 2024), with half of the
timesteps from the last quarter, where the text decides. The text enters by cross-attention and, pooled, by the time
embedding, which scales and shifts every block (`addition_embed_type="text"`).

What is saved is the exponential moving average, as a StableDiffusionPipeline folder in fp16, with a sheet of samples
beside it. `--mixed_precision bf16` is 1.5 times as fast on a CPU with AVX-512 BF16, and ten times slower without it.
"""

import argparse
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from captions import ATTRIBUTES, TEMPLATE_WEIGHTS, TEMPLATES, caption
from datasets import load_dataset
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from timm.optim import Muon
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedModel

from acpo_utils.data import tokenize
from acpo_utils.families.loading import DTYPE
from acpo_utils.training.ema import ema_weights


def training_step(latents, prompt_embeds, unet, noise_scheduler, generator) -> torch.Tensor:
    num_train_timesteps = noise_scheduler.config.num_train_timesteps
    noise = torch.randn(latents.shape, generator=generator).to(latents)  # (B, 4, 16, 16)
    share = 1 - torch.rand(latents.shape[:1], generator=generator) ** 2  # (B,) in (0, 1], the density rises towards 1
    timesteps = (share * num_train_timesteps).long().clamp(max=num_train_timesteps - 1).to(latents.device)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
    model_pred = unet(noisy_latents, timesteps, prompt_embeds, return_dict=False)[0]
    return F.mse_loss(model_pred.float(), noise_scheduler.get_velocity(latents, noise, timesteps))


def layout_loss(prompt_embeds: torch.Tensor, latents: torch.Tensor, head: torch.nn.Linear) -> torch.Tensor:
    """How far a linear map of the last 8 tokens is from 8 patches of the latents, each of 8 rows and 4 columns.

    The last tokens are padding behind the caption, and causal attention lets them see all of it.
    """
    return F.mse_loss(head(prompt_embeds[:, -8:].float()), patches(latents))


def patches(latents: torch.Tensor) -> torch.Tensor:
    """(B, 4, 16, 16) -> (B, 8, 128)."""
    return latents.view(-1, 4, 2, 8, 4, 4).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


DATA = Path(__file__).parent / "data"
SHEET_PROMPTS = 40
MUON = {"betas": (0.9, 0.99), "weight_decay": 0.01, "nesterov": True}


def new_unet(cross_attention_dim: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 224),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=8,
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=8,
            max_position_embeddings=tokenizer.model_max_length,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize_captions(tokenizer: CLIPTokenizer, rows: list[dict[str, str]]) -> torch.Tensor:
    """(N, templates, tokens): what can be said of each image."""
    texts = [caption(row, template) for row in rows for template in TEMPLATES]
    return tokenize(tokenizer, texts).view(len(rows), len(TEMPLATES), -1)


def draw_captions(input_ids: torch.Tensor, chosen: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(B, tokens) of the chosen images, each by another template every time.

    With one fixed caption for each image, "a fox on a pink background" would be the name of a single drawing.
    """
    weights = torch.tensor(TEMPLATE_WEIGHTS, dtype=torch.float)
    return input_ids[chosen, torch.multinomial(weights, len(chosen), replacement=True, generator=generator)]


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: list) -> torch.Tensor:
    """(N, 4, 16, 16) scaled latents: the posterior's means, computed once."""
    latents = []
    for i in tqdm(range(0, len(images), 64), desc="encoding images", mininterval=10):
        pixel_values = torch.stack([pil_to_tensor(image) for image in images[i : i + 64]]).float().div(127.5).sub(1)
        pixel_values = pixel_values.to(vae.device, memory_format=torch.channels_last)
        latents.append(vae.encode(pixel_values).latent_dist.mode() * vae.config.scaling_factor)
    return torch.cat(latents)


def parameter_groups(*modules: torch.nn.Module, learning_rate: float) -> list[dict]:
    """What Muon is for, and what AdamW does: embedding tables, and convolutions, where Muon's time is not won back.

    Muon's updates are scaled to AdamW's, so one learning rate is for both; vectors are AdamW's in either group.
    """
    layers = [layer for module in modules for layer in module.modules()]
    plain = [layer.weight for layer in layers if isinstance(layer, torch.nn.Embedding | torch.nn.Conv2d)]
    known = {id(weight) for weight in plain}
    matrices = [p for module in modules for p in module.parameters() if id(p) not in known]
    return [
        {"params": matrices, "lr": learning_rate},
        {"params": plain, "lr": learning_rate, "use_fallback": True},
    ]


def fit_text_encoder(
    text_encoder: CLIPTextModel, input_ids: torch.Tensor, latents: torch.Tensor, args: argparse.Namespace
) -> None:
    """Teaches the text encoder alone which drawing a caption means."""
    head = fit_head(text_encoder, input_ids[:, 0], latents)
    parameters = [*text_encoder.parameters(), *head.parameters()]
    optimizer = Muon(parameter_groups(text_encoder, head, learning_rate=2e-3), **MUON)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=100, num_training_steps=args.text_encoder_steps)
    generator = torch.Generator().manual_seed(args.seed)
    losses: list[float] = []
    progress = tqdm(range(args.text_encoder_steps), desc="text encoder", mininterval=30)
    for _ in progress:
        chosen = torch.randint(len(latents), (args.train_batch_size,), generator=generator)
        captions = draw_captions(input_ids, chosen, generator)
        loss = layout_loss(text_encoder(captions, return_dict=False)[0], latents[chosen], head)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress.set_postfix(layout=f"{sum(losses[-100:]) / len(losses[-100:]):.4f}", refresh=False)


@torch.no_grad()
def fit_head(text_encoder: CLIPTextModel, input_ids: torch.Tensor, latents: torch.Tensor) -> torch.nn.Linear:
    """The linear map of `layout_loss` by least squares."""
    tokens = torch.cat([text_encoder(rows, return_dict=False)[0][:, -8:] for rows in input_ids.split(256)])
    tokens = tokens.flatten(0, 1)  # (8 N, width)
    ones = torch.ones_like(tokens[:, :1])
    solution = torch.linalg.lstsq(torch.cat([tokens, ones], 1), patches(latents).flatten(0, 1)).solution
    head = torch.nn.Linear(tokens.shape[1], 128).to(latents.device)
    head.weight.copy_(solution[:-1].T)
    head.bias.copy_(solution[-1])
    return head


def save_pipeline(models: dict, prompts: list[str], output_dir: Path, seed: int) -> None:
    """The models in an fp16 pipeline folder, and a sheet of samples for held-out prompts."""
    build_pipeline = partial(
        StableDiffusionPipeline, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline = build_pipeline(**models | {"scheduler": DDIMScheduler.from_config(models["scheduler"].config)})
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    images = pipeline(prompts, num_inference_steps=20, guidance_scale=2.0, generator=generator).images
    to_pil_image(make_grid([pil_to_tensor(image) for image in images], nrow=10, padding=0)).save(f"{output_dir}.png")
    save_in_half(build_pipeline, models, output_dir)


def save_in_half(build_pipeline: Callable[..., DiffusionPipeline], models: dict, output_dir: Path) -> None:
    """The folder of a pipeline of `models`, by name, in fp16, in the place of one that is there; they stay as they are."""
    halves = {}
    text_encoders = [name for name, model in models.items() if isinstance(model, PreTrainedModel)]
    for name, model in models.items():
        if name in text_encoders:
            halves[name] = type(model)(model.config)
        elif isinstance(model, torch.nn.Module):
            config = {key: value for key, value in model.config.items() if key != "_name_or_path"}
            halves[name] = type(model).from_config(config)
    for name, half in halves.items():
        half.load_state_dict(models[name].state_dict())
        half.half()
    temporary = output_dir.with_name(output_dir.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    build_pipeline(**models | halves).save_pretrained(temporary)
    # diffusers loads fp16 files as fp32; transformers loads what its config.json says, and the two would not fit.
    for name in text_encoders:
        config = temporary / name / "config.json"
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    shutil.rmtree(output_dir, ignore_errors=True)
    temporary.rename(output_dir)


def main(args: argparse.Namespace) -> None:
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed)
    files = {split: str(DATA / f"{split}.parquet") for split in ("train", "new_combinations")}
    dataset = load_dataset("parquet", data_files=files)
    if args.continue_from:
        pipeline = StableDiffusionPipeline.from_pretrained(args.continue_from, **{DTYPE: torch.float32})
        tokenizer, text_encoder, vae, unet = (
            pipeline.components[name] for name in ("tokenizer", "text_encoder", "vae", "unet")
        )
    else:
        tokenizer = CLIPTokenizer.from_pretrained(args.tokenizer)
        text_encoder = new_text_encoder(tokenizer)
        unet = new_unet(text_encoder.config.hidden_size)
    if args.vae:
        vae = AutoencoderKL.from_pretrained(args.vae)
    vae.eval().requires_grad_(False).to(accelerator.device)
    text_encoder.train().to(accelerator.device)
    unet.train().to(memory_format=torch.channels_last)
    if accelerator.device.type == "cpu" and args.mixed_precision == "bf16":
        # The backward of the fused attention takes a third of a step in bf16 there.
        unet.set_attn_processor(AttnProcessor())
    latents = encode_images(vae.to(memory_format=torch.channels_last), dataset["train"]["image"][:])
    rows = dataset["train"].select_columns(list(ATTRIBUTES)).to_list()
    input_ids = tokenize_captions(tokenizer, rows).to(accelerator.device)
    unconditional = tokenize(tokenizer, [""]).to(accelerator.device)
    if args.text_encoder_steps and not args.resume:
        fit_text_encoder(text_encoder, input_ids, latents, args)
    head = fit_head(text_encoder, input_ids[:, 0], latents)

    noise_scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
    )
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    groups = parameter_groups(unet, learning_rate=args.learning_rate)
    groups += parameter_groups(text_encoder, head, learning_rate=args.text_encoder_learning_rate)
    optimizer = Muon(groups, **MUON)
    lr_scheduler = get_scheduler(
        "cosine", optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    average = EMAModel(parameters, decay=args.ema_decay, use_ema_warmup=True, power=3 / 4)
    models = {"unet": unet, "vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    models |= {"scheduler": noise_scheduler}
    unet, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)
    average.to(accelerator.device)
    # Not prepared, so that autocast leaves them alone: they cost next to nothing.
    accelerator.register_for_checkpointing(average, text_encoder, head)
    state_dir, first_step = Path(f"{args.output_dir}-state"), 0
    if args.resume:
        accelerator.load_state(state_dir)
        first_step = int((state_dir / "step.txt").read_text())

    sheet_prompts = dataset["new_combinations"]["text"][:SHEET_PROMPTS]
    progress = tqdm(
        range(first_step, args.max_train_steps), initial=first_step, total=args.max_train_steps, mininterval=30
    )
    losses: list[tuple[float, float]] = []
    for step in progress:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        chosen = torch.randint(len(latents), (args.train_batch_size,), generator=generator)
        # Classifier-free guidance needs an unconditional model: a tenth of the captions are emptied.
        dropped = torch.rand(args.train_batch_size, generator=generator) < 0.1
        captions = draw_captions(input_ids, chosen, generator)
        captions = torch.where(dropped[:, None].to(captions.device), unconditional, captions)
        prompt_embeds = text_encoder(captions, return_dict=False)[0]  # (B, tokens, dim)
        with accelerator.autocast():
            loss = training_step(latents[chosen], prompt_embeds, unet, noise_scheduler, generator)
        layout = layout_loss(prompt_embeds[~dropped], latents[chosen][~dropped], head)
        accelerator.backward(loss + layout)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        average.step(parameters)
        losses.append((loss.item(), layout.item()))
        loss, layout = (sum(values) / len(values) for values in zip(*losses[-100:]))
        progress.set_postfix(loss=f"{loss:.4f}", layout=f"{layout:.4f}", refresh=False)
        if (step + 1) % args.checkpointing_steps == 0 or step + 1 == args.max_train_steps:
            accelerator.save_state(state_dir)
            (state_dir / "step.txt").write_text(str(step + 1))
            with ema_weights(average, parameters):
                save_pipeline(models, sheet_prompts, args.output_dir, args.seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, help="folder written by train_vae.py")
    parser.add_argument("--tokenizer", type=Path, help="a folder with a CLIPTokenizer, as train_clip.py writes it")
    parser.add_argument(
        "--continue_from", type=Path, help="a pipeline folder that learns on, with its own VAE or --vae"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("pipeline-demo"))
    parser.add_argument("--max_train_steps", type=int, default=5000)
    parser.add_argument("--train_batch_size", type=int, default=32)
    parser.add_argument(
        "--text_encoder_steps", type=int, help="of the text encoder alone, first; default 8000, or 0 if it learns on"
    )
    parser.add_argument("--learning_rate", type=float, default=7e-4, help="of the U-Net")
    parser.add_argument("--text_encoder_learning_rate", type=float, default=3e-4, help="beside the U-Net")
    parser.add_argument("--lr_warmup_steps", type=int, default=100)
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--resume", action="store_true", help="continue from the state beside --output_dir")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.continue_from is None and (args.vae is None or args.tokenizer is None):
        parser.error("expected --vae and --tokenizer, or --continue_from")
    if args.text_encoder_steps is None:
        args.text_encoder_steps = 0 if args.continue_from else 8000
    main(args)
