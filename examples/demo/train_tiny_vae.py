"""A tiny decoder for the demo's VAE, for `--decode tiny`: an AutoencoderTiny that learns to draw what the VAE draws.

    python examples/demo/train_tiny_vae.py --output_dir examples/demo/tiny-vae
    python examples/demo/train_tiny_vae.py --output_dir examples/demo/tiny-vae --guide ipce:examples/demo/guide

As TAESD is made (Bohan, Tiny AutoEncoder for Stable Diffusion, 2023): a decoder of a few thin convolutions distilled from
the VAE's. It sees the VAE's latents of the demo's drawings, with noise on them as a generator leaves some, and is to give
the VAE's own decode (L1, and L1 of the differences between neighbouring pixels). The encoder stays untrained: nothing here
asks for it.

With a guide it learns what the guide's gradient becomes on its way back, too, for `--decode straight_through`: of the gradient g
of the score at the VAE's own decode, J_tiny^T g is to be J^T g (Sobolev training, Czarnecki et al. 2017).
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

from acpo_utils.evaluators import load_evaluator
from acpo_utils.late_step import decode_latents


DATA = Path(__file__).parent / "data"
PIPELINE = Path(__file__).parent / "pipeline"
LATENT_NOISE = 0.17  # of the latents' size, as in train_vae.py


def training_step(tiny: AutoencoderTiny, vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """`latents` (B, C, h, w) as the U-Net sees them."""
    noisy = with_noise(latents)
    with torch.no_grad():
        target = decode_latents(vae, noisy)  # (B, 3, H, W) in [0, 1]
    return image_loss(unclamped(tiny, noisy), target)


def with_noise(latents: torch.Tensor) -> torch.Tensor:
    return latents + LATENT_NOISE * latents.std() * torch.randn_like(latents)


def unclamped(tiny: AutoencoderTiny, latents: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W), in [0, 1] but for what lies outside, which has to come back."""
    return tiny.decode(latents, return_dict=False)[0] / 2 + 0.5


def image_loss(images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    loss = F.l1_loss(images, target)
    for dim in (2, 3):  # outlines
        loss = loss + F.l1_loss(images.diff(dim=dim), target.diff(dim=dim))
    return loss


def gradient_step(tiny: AutoencoderTiny, latents, images, image_gradients, latent_gradients, weight: float):
    """`training_step` and `weight` times |J_tiny^T g - J^T g|^2, of what `guide_gradients` found."""
    latents = latents.requires_grad_(True)
    drawn = unclamped(tiny, latents)
    (found,) = torch.autograd.grad(drawn, latents, image_gradients, create_graph=True)
    return image_loss(drawn, images) + weight * (found - latent_gradients).square().flatten(1).sum(1).mean()


def guide_gradients(vae: AutoencoderKL, guide, latents: torch.Tensor, prompts: list[str]):
    """Of noised latents z (N, C, h, w): z, D(z) (N, 3, H, W), g = dQ/dD(z) of D(z) before it is clamped, and J^T g (N, C, h, w).

    g and J^T g are divided by the length of J^T g: its direction is all that counts.
    """
    parts = []
    for start in tqdm(range(0, len(latents), 50), desc="the guide's gradients"):
        noisy = with_noise(latents[start : start + 50]).requires_grad_(True)
        raw = vae.decode(noisy / vae.config.scaling_factor, return_dict=False)[0] / 2 + 0.5
        images = raw.clamp(0, 1)
        scores = guide.score(images, prompts[start : start + 50])
        image_gradients, latent_gradients = torch.autograd.grad(scores.sum(), [raw, noisy])
        length = latent_gradients.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        parts.append((noisy.detach(), images.detach(), image_gradients / length, latent_gradients / length))
    return [torch.cat(part) for part in zip(*parts)]


def read(split: str, limit: int | None = None):
    dataset = load_dataset("parquet", data_files=str(DATA / f"{split}.parquet"), split="train")
    return dataset.select(range(min(limit or len(dataset), len(dataset))))


@torch.no_grad()
def encode(vae: AutoencoderKL, split: str, limit: int | None = None) -> torch.Tensor:
    dataset = read(split, limit)
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
        num_decoder_blocks=args.num_blocks or (2,) * (blocks - 1) + (1,),
        latent_channels=vae.config.latent_channels,
    )
    held_out = encode(vae, "new_combinations", 256)
    if args.guide:
        guide = load_evaluator(args.guide)
        latents = encode(vae, "train", args.num_gradients)
        gradients = guide_gradients(vae, guide, latents, read("train", len(latents))["text"])
        held_out_gradients = guide_gradients(vae, guide, held_out, read("new_combinations", 256)["text"])
    else:
        latents = encode(vae, "train")
    optimizer = torch.optim.AdamW(tiny.decoder.parameters(), lr=args.learning_rate, weight_decay=0.0)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=50, num_training_steps=args.max_train_steps)
    progress = tqdm(range(args.max_train_steps), mininterval=10)
    for _ in progress:
        rows = torch.randint(len(latents), (args.train_batch_size,))
        if args.guide:
            loss = gradient_step(tiny, *(part[rows] for part in gradients), args.gradient_weight)
        else:
            loss = training_step(tiny, vae, latents[rows])
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    tiny.save_pretrained(args.output_dir)
    with torch.no_grad():
        error = (decode_latents(tiny, held_out) - decode_latents(vae, held_out)).square().mean()
    print(f"{args.output_dir}: PSNR to the VAE's decode of held-out drawings {-10 * error.log10():.2f} dB")
    if args.guide:
        held_out, _, image_gradients, latent_gradients = held_out_gradients
        held_out.requires_grad_(True)
        (found,) = torch.autograd.grad(unclamped(tiny, held_out), held_out, image_gradients)
        cosine = F.cosine_similarity(found.flatten(1), latent_gradients.flatten(1)).mean()
        print(f"cosine of J_tiny^T g with J^T g, held-out drawings, the guide's g at the VAE's decode: {cosine:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--pipeline", default=str(PIPELINE))
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--num_blocks", type=int, nargs="+", help="at each resolution, lowest first; default: 2 2 1")
    parser.add_argument("--guide", help="an evaluator, such as ipce:examples/demo/guide: learn its gradient, too")
    parser.add_argument("--gradient_weight", type=float, default=1.0)
    parser.add_argument("--num_gradients", type=int, default=4000, help="drawings of which the gradient is taken")
    parser.add_argument("--max_train_steps", type=int, default=2000)
    parser.add_argument("--train_batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
