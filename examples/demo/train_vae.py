"""Train the demo's AutoencoderKL from scratch on the demo's train split (64 px -> 16 x 16 x 4 latents).

    python examples/demo/train_vae.py --output_dir vae-demo

Loss: L1 + L1 of image gradients (sharp outlines) + a small KL term, as a plain stand-in for LPIPS and a GAN.
"""

import argparse
import math
import time
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


def training_step(vae: AutoencoderKL, pixel_values: torch.Tensor, kl_weight: float) -> torch.Tensor:
    posterior = vae.encode(pixel_values).latent_dist  # (B, 4, 16, 16)
    loss = reconstruction_loss(vae.decode(posterior.sample()).sample, pixel_values)  # (B, 3, 64, 64)
    return loss + kl_weight * posterior.kl().mean() / posterior.mean[0].numel()


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
    vae = new_vae().train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, weight_decay=1e-4)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=50, num_training_steps=args.max_train_steps)
    generator = torch.Generator().manual_seed(args.seed)
    progress = tqdm(range(args.max_train_steps), mininterval=30)
    start = time.time()
    for step in progress:
        chosen = torch.randint(len(images["train"]), (args.train_batch_size,), generator=generator)
        pixel_values = to_float(images["train"][chosen])
        loss = training_step(vae, pixel_values, args.kl_weight)
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
    parser.add_argument("--checkpointing_steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
