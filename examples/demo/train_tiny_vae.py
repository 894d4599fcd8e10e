"""A tiny decoder for the demo's VAE, for `--decode tiny`: an AutoencoderTiny that learns to draw what the VAE draws.

    python examples/demo/train_tiny_vae.py --output_dir examples/demo/tiny-vae

As TAESD is made (Bohan, Tiny AutoEncoder for Stable Diffusion, 2023): a decoder of a few thin convolutions distilled from
the VAE's. It sees the VAE's latents of the demo's drawings, with noise on them as a generator leaves some, and is to give
the VAE's own decode (L1, and L1 of the differences between neighbouring pixels). The encoder stays untrained: nothing here
asks for it.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import load_dataset
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.optimization import get_scheduler
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm.auto import tqdm

from acpo_utils.late_step import decode_latents


DATA = Path(__file__).parent / "data"
PIPELINE = Path(__file__).parent / "pipeline"
LATENT_NOISE = 0.17  # of the latents' size, as in train_vae.py


def training_step(tiny: AutoencoderTiny, vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """`latents` (B, C, h, w) as the U-Net sees them."""
    noisy = latents + LATENT_NOISE * latents.std() * torch.randn_like(latents)
    with torch.no_grad():
        target = decode_latents(vae, noisy)  # (B, 3, H, W) in [0, 1]
    images = tiny.decode(noisy, return_dict=False)[0] / 2 + 0.5  # not clamped: what lies outside has to come back
    loss = F.l1_loss(images, target)
    for dim in (2, 3):  # outlines
        loss = loss + F.l1_loss(images.diff(dim=dim), target.diff(dim=dim))
    return loss


@torch.no_grad()
def encode(vae: AutoencoderKL, split: str, limit: int | None = None) -> torch.Tensor:
    dataset = load_dataset("parquet", data_files=str(DATA / f"{split}.parquet"), split="train")
    dataset = dataset.select(range(min(limit or len(dataset), len(dataset))))
    images = torch.stack([pil_to_tensor(image.convert("RGB")) for image in dataset["image"]])  # (N, 3, H, W) uint8
    parts = tqdm(images.split(64), desc=f"encoding {split}")
    return torch.cat([vae.encode(part / 127.5 - 1).latent_dist.mode() for part in parts]) * vae.config.scaling_factor


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.pipeline, subfolder="vae").requires_grad_(False)
    blocks = len(vae.config.block_out_channels)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8,) * blocks,
        decoder_block_out_channels=(args.width,) * blocks,
        num_encoder_blocks=(1,) * blocks,
        num_decoder_blocks=(2,) * (blocks - 1) + (1,),
        latent_channels=vae.config.latent_channels,
    )
    latents, held_out = encode(vae, "train"), encode(vae, "new_combinations", 256)
    optimizer = torch.optim.AdamW(tiny.decoder.parameters(), lr=args.learning_rate, weight_decay=0.0)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=50, num_training_steps=args.max_train_steps)
    progress = tqdm(range(args.max_train_steps), mininterval=10)
    for _ in progress:
        loss = training_step(tiny, vae, latents[torch.randint(len(latents), (args.train_batch_size,))])
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    tiny.save_pretrained(args.output_dir)
    with torch.no_grad():
        error = (decode_latents(tiny, held_out) - decode_latents(vae, held_out)).square().mean()
    print(f"{args.output_dir}: PSNR to the VAE's decode of held-out drawings {-10 * error.log10():.2f} dB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--pipeline", default=str(PIPELINE))
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--max_train_steps", type=int, default=2000)
    parser.add_argument("--train_batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
