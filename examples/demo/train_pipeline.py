"""Train the demo's text-to-image pipeline from scratch on the demo's train split, given its VAE (train_vae.py).

    accelerate launch examples/demo/train_pipeline.py --vae vae-demo --output_dir examples/demo/pipeline

Text encoder and U-Net learn together on latents that are encoded once. Three choices make a few thousand steps enough:
velocity prediction on a schedule that ends in pure noise (Salimans and Ho 2022; Lin et al. 2024), since the loss on noise
hardly weighs the noisiest steps, where the text decides most; and the text enters not by cross-attention alone, but
pooled also into the time embedding, which scales and shifts every block (`addition_embed_type="text"`).

What is saved is the exponential moving average, as a StableDiffusionPipeline folder in fp16, with a sheet of samples
beside it.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode


DATA = Path(__file__).parent / "data"
SHEET_PROMPTS = 40


def train_tokenizer(captions: list[str], max_length: int) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with merges learned from the captions alone."""
    characters = list(bytes_to_unicode().values())
    tokens = characters + [c + "</w>" for c in characters] + ["<|startoftext|>", "<|endoftext|>"]
    base = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=max_length)
    return base.train_new_from_iterator(captions, vocab_size=2000)


@torch.no_grad()
def encode_dataset(vae: AutoencoderKL, images: list) -> torch.Tensor:
    """(N, 4, 16, 16) scaled latents: the posterior's means, computed once."""
    latents = []
    for i in tqdm(range(0, len(images), 64), desc="encoding", mininterval=10):
        pixel_values = torch.stack([pil_to_tensor(image) for image in images[i : i + 64]]).float().div(127.5).sub(1)
        pixel_values = pixel_values.to(memory_format=torch.channels_last)
        latents.append(vae.encode(pixel_values).latent_dist.mode() * vae.config.scaling_factor)
    return torch.cat(latents)


def training_step(latents, input_ids, unet, text_encoder, noise_scheduler) -> torch.Tensor:
    noise = torch.randn_like(latents)
    timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, latents.shape[:1])
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
    prompt_embeds = text_encoder(input_ids, return_dict=False)[0]
    model_pred = unet(noisy_latents, timesteps, prompt_embeds, return_dict=False)[0]
    return F.mse_loss(model_pred.float(), noise_scheduler.get_velocity(latents, noise, timesteps))


def save_pipeline(models: dict, ema: dict[str, EMAModel], prompts: list[str], output_dir: Path, seed: int) -> None:
    """The EMA weights as a fp16 pipeline folder, and a sheet of samples for held-out prompts."""
    for name, average in ema.items():
        average.store(models[name].parameters())
        average.copy_to(models[name].parameters())
    pipeline = StableDiffusionPipeline(
        **models, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    training_scheduler = pipeline.scheduler
    pipeline.scheduler = DDIMScheduler.from_config(training_scheduler.config)
    generator = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    images = pipeline(prompts, num_inference_steps=20, guidance_scale=4.0, generator=generator).images
    to_pil_image(make_grid([pil_to_tensor(image) for image in images], nrow=10, padding=0)).save(f"{output_dir}.png")
    pipeline.scheduler = training_scheduler
    fp16 = {name: type(models[name]).from_config(models[name].config) for name in ("unet", "vae")}
    fp16["text_encoder"] = CLIPTextModel(models["text_encoder"].config)
    for name, copy in fp16.items():
        copy.load_state_dict(models[name].state_dict())
        copy.half()
    temporary = output_dir.with_name(output_dir.name + ".tmp")
    StableDiffusionPipeline(
        **(models | fp16), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    ).save_pretrained(temporary)
    if output_dir.exists():
        os.replace(output_dir, old := output_dir.with_name(output_dir.name + ".old"))
        os.replace(temporary, output_dir)
        for file in sorted(old.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        old.rmdir()
    else:
        os.replace(temporary, output_dir)
    for name, average in ema.items():
        average.restore(models[name].parameters())


def main(args: argparse.Namespace) -> None:
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed)
    files = {split: str(DATA / f"{split}.parquet") for split in ("train", "new_combinations")}
    dataset = load_dataset("parquet", data_files=files)
    captions = dataset["train"]["text"][:]
    vae = AutoencoderKL.from_pretrained(args.vae).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    latents = encode_dataset(vae, dataset["train"]["image"][:])
    tokenizer = train_tokenizer(captions, max_length=24)
    tokenized = tokenizer(captions + [""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    input_ids, empty_ids = tokenized[:-1], tokenized[-1]

    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=3,
            num_attention_heads=6,
            max_position_embeddings=24,
            projection_dim=192,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        cross_attention_dim=192,
        attention_head_dim=6,
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=6,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    ).to(memory_format=torch.channels_last)
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
    print(
        f"U-Net {unet.num_parameters() / 1e6:.1f} M, text encoder {text_encoder.num_parameters() / 1e6:.1f} M parameters"
    )

    trained = list(unet.parameters()) + list(text_encoder.parameters())
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.01)
    lr_scheduler = get_scheduler(
        "cosine", optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    models = {"unet": unet, "text_encoder": text_encoder}
    ema = {
        name: EMAModel(model.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=3 / 4)
        for name, model in models.items()
    }
    unet, text_encoder, optimizer, lr_scheduler = accelerator.prepare(unet, text_encoder, optimizer, lr_scheduler)
    accelerator.register_for_checkpointing(*ema.values())
    state_dir, first_step = Path(f"{args.output_dir}-state"), 0
    if args.resume:
        accelerator.load_state(state_dir)
        first_step = int((state_dir / "step.txt").read_text())

    pipeline_parts = models | {"vae": vae, "tokenizer": tokenizer, "scheduler": noise_scheduler}
    sheet_prompts = dataset["new_combinations"]["text"][:SHEET_PROMPTS]
    progress = tqdm(
        range(first_step, args.max_train_steps), initial=first_step, total=args.max_train_steps, mininterval=30
    )
    average_loss = None
    for step in progress:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        chosen = torch.randint(len(latents), (args.train_batch_size,), generator=generator)
        # Classifier-free guidance needs an unconditional model: a tenth of the captions are emptied.
        dropped = torch.rand(args.train_batch_size, generator=generator) < 0.1
        ids = torch.where(dropped[:, None], empty_ids, input_ids[chosen])
        with accelerator.autocast():
            loss = training_step(latents[chosen], ids, unet, text_encoder, noise_scheduler)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        for name, average in ema.items():
            average.step(models[name].parameters())
        average_loss = loss.item() if average_loss is None else 0.98 * average_loss + 0.02 * loss.item()
        progress.set_postfix(loss=f"{average_loss:.4f}", refresh=False)
        if (step + 1) % args.checkpointing_steps == 0 or step + 1 == args.max_train_steps:
            accelerator.save_state(state_dir)
            (state_dir / "step.txt").write_text(str(step + 1))
            save_pipeline(pipeline_parts, ema, sheet_prompts, args.output_dir, args.seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("pipeline-demo"))
    parser.add_argument("--max_train_steps", type=int, default=3200)
    parser.add_argument("--train_batch_size", type=int, default=48)
    parser.add_argument("--learning_rate", type=float, default=6e-4)
    parser.add_argument("--lr_warmup_steps", type=int, default=100)
    parser.add_argument("--ema_decay", type=float, default=0.998)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="bf16")
    parser.add_argument("--checkpointing_steps", type=int, default=250)
    parser.add_argument("--resume", action="store_true", help="continue from the state beside --output_dir")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
