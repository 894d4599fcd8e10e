"""Train the demo's AutoencoderKL from scratch on the demo's train split (64 px -> 16 x 16 x 4 latents).

    python examples/demo/train_vae.py --output_dir vae-demo

Loss: L1 + L1 of image gradients (sharp outlines) + a small KL term, as a plain stand-in for LPIPS and a GAN. Two things
make the latents easy to predict from a caption:

- the decoder sees them with noise of a fixed share of their size, so that a generator's small errors stay small in the
  image;
- they are affine in the background: a drawing on a colour between two others has the latents between those of the two
  (`affine_loss`). Without it, half of what a text encoder got wrong of new combinations was that the same drawing has
  other latents on grey, navy or teal than on the colours it was seen on.
"""

import argparse
import math
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import load_dataset
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from diffusers.optimization import get_scheduler
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import save_image
from tqdm.auto import tqdm


DATA = Path(__file__).parent / "data"


def image_gradients(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return images.diff(dim=-1), images.diff(dim=-2)


def new_vae() -> AutoencoderKL:
    """Untrained, but with signals of one size from end to end: 3 dB ahead of the default initialisation at step 120.

    By default every convolution shrinks what it is given to 0.58 and adds a bias that stays, so that behind ten of
    them little is left of the image. Here the blocks start as identities, and latents start nearly free of noise.
    """
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
        mid_block_add_attention=False,
    )
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            torch.nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            torch.nn.init.zeros_(module.conv2.weight)
    log_variance = slice(vae.config.latent_channels, None)
    torch.nn.init.zeros_(vae.quant_conv.weight.data[log_variance])
    torch.nn.init.constant_(vae.quant_conv.bias.data[log_variance], -6.0)
    return vae


def reconstruction_loss(reconstruction: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    loss = F.l1_loss(reconstruction, pixel_values)
    for predicted, target in zip(image_gradients(reconstruction), image_gradients(pixel_values)):
        loss = loss + F.l1_loss(predicted, target)
    return loss


def affine_loss(between: torch.Tensor, ends: tuple[torch.Tensor, torch.Tensor], share: torch.Tensor) -> torch.Tensor:
    """Squared distance of latents (B, 4, h, w) from those between two others, as a share of the variance of all."""
    return F.mse_loss(between, torch.lerp(*ends, share)) / between.var()


def training_step(
    vae: AutoencoderKL, images: torch.Tensor, others: torch.Tensor, share: torch.Tensor, args: argparse.Namespace
) -> torch.Tensor:
    """images and others (B, 3, 64, 64): the same drawings on two backgrounds; share (B, 1, 1, 1): how far between."""
    pixel_values = torch.lerp(images, others, share)  # the drawing on the colour between
    posterior = vae.encode(torch.cat([pixel_values, images, others])).latent_dist
    between, *ends = posterior.mean.chunk(3)  # (B, 4, 16, 16)
    latents = posterior.sample()[: len(images)]
    noisy_latents = latents + args.latent_noise * between.std() * torch.randn_like(latents)
    loss = reconstruction_loss(vae.decode(noisy_latents).sample, pixel_values)
    loss = loss + args.affine_weight * affine_loss(between, ends, share)
    return loss + args.kl_weight * posterior.kl().mean() / between[0].numel()


def pairs_of_backgrounds(drawings: list[list[int]], batch_size: int, generator: torch.Generator) -> torch.Tensor:
    """(2, B) rows of the data: of each of B random drawings, two on random backgrounds."""
    chosen = torch.randint(len(drawings), (batch_size,), generator=generator).tolist()
    pairs = [
        [drawings[i][k % len(drawings[i])] for k in torch.randint(2**31, (2,), generator=generator)] for i in chosen
    ]
    return torch.tensor(pairs).T


def to_float(images: torch.Tensor) -> torch.Tensor:
    return images.float().div(127.5).sub(1).to(memory_format=torch.channels_last)


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    dataset = load_dataset(
        "parquet", data_files={split: str(DATA / f"{split}.parquet") for split in ("train", "new_combinations")}
    )
    images = {
        split: torch.stack([pil_to_tensor(image) for image in dataset[split]["image"]]) for split in dataset
    }  # (N, 3, 64, 64) uint8
    rows_of = defaultdict(list)
    for row, drawing in enumerate(zip(dataset["train"]["content"], dataset["train"]["style"])):
        rows_of[drawing].append(row)
    drawings = list(rows_of.values())
    vae = AutoencoderKL.from_pretrained(args.continue_from) if args.continue_from else new_vae()
    vae = vae.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, weight_decay=1e-4)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=50, num_training_steps=args.max_train_steps)
    generator = torch.Generator().manual_seed(args.seed)
    progress = tqdm(range(args.max_train_steps), mininterval=30)
    start = time.time()
    for step in progress:
        pair = pairs_of_backgrounds(drawings, args.train_batch_size, generator)
        # A third of the images are the data's own, the others on colours between two of its backgrounds.
        share = (torch.rand(args.train_batch_size, 1, 1, 1, generator=generator) * 1.5 - 0.5).clamp(min=0)
        loss = training_step(vae, *(to_float(images["train"][rows]) for rows in pair), share, args)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % args.checkpointing_steps == 0 or step + 1 == args.max_train_steps:
            vae.eval()
            with torch.no_grad():
                held_out = to_float(images["new_combinations"][:256])
                mean = vae.encode(held_out).latent_dist.mean
                reconstruction = vae.decode(mean).sample.clamp(-1, 1)
                psnr = 10 * math.log10(4 / F.mse_loss(reconstruction, held_out).item())
            vae.register_to_config(scaling_factor=1 / mean.std().item())
            vae.save_pretrained(args.output_dir)
            save_image(
                torch.cat([held_out[:16], reconstruction[:16]]).add(1).div(2),
                args.output_dir / "reconstructions.png",
                nrow=16,
            )
            print(
                f"step {step + 1}: {time.time() - start:.0f} s, held-out PSNR {psnr:.2f} dB, latent std {mean.std():.3f}"
            )
            vae.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("vae-demo"))
    parser.add_argument("--max_train_steps", type=int, default=4000)
    parser.add_argument("--train_batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--kl_weight", type=float, default=1e-6)
    parser.add_argument(
        "--latent_noise", type=float, default=0.17, help="standard deviation, as a share of the latents' own"
    )
    parser.add_argument("--affine_weight", type=float, default=2.0)
    parser.add_argument("--continue_from", type=Path, help="a VAE's folder that learns on")
    parser.add_argument("--checkpointing_steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
