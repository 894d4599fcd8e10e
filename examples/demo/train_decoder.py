"""Train the decoder of a pipeline's VAE on what the U-Net says of an image, not on what the encoder says of it.

    python examples/demo/train_decoder.py --pipeline pipeline-demo --output_dir pipeline-demo-sharp

In a pipeline the decoder never sees an encoder's latents, but a U-Net's estimates of them, and these are blurred and
noisy. Here it learns to draw the image from both: latents anywhere between the encoder's and the U-Net's one-step
estimate, made from the caption at a random timestep of the cleaner part of the schedule. Encoder and latents stay what
they are, so the U-Net stays valid.
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm.auto import tqdm
from train_pipeline import DATA, encode_images
from train_vae import reconstruction_loss, to_float

from acpo_utils.data import tokenize
from acpo_utils.families.loading import DTYPE
from acpo_utils.late_step import predict_original_sample


@torch.no_grad()
def unet_estimate(pipeline, noise_scheduler, latents, input_ids, tmax, generator) -> torch.Tensor:
    """(B, 4, h, w) scaled latents -> the U-Net's one-step estimate of them, from a random t < tmax."""
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(tmax, (len(latents),), generator=generator)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    prompt_embeds = pipeline.text_encoder(input_ids, return_dict=False)[0]
    model_pred = pipeline.unet(noisy_latents, timesteps, prompt_embeds, return_dict=False)[0]
    return predict_original_sample(noise_scheduler, model_pred, timesteps, noisy_latents)


def main(args: argparse.Namespace) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(args.pipeline, **{DTYPE: torch.float32})
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    pipeline.unet.to(memory_format=torch.channels_last)
    vae, scale = pipeline.vae.to(memory_format=torch.channels_last), pipeline.vae.config.scaling_factor
    dataset = load_dataset("parquet", data_files=str(DATA / "train.parquet"), split="train")
    images = torch.stack([pil_to_tensor(image) for image in dataset["image"]])  # (N, 3, 64, 64) uint8
    input_ids = tokenize(pipeline.tokenizer, dataset["text"][:])
    latents = encode_images(vae, dataset["image"][:])

    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=1e-4)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=50, num_training_steps=args.max_train_steps)
    generator = torch.Generator().manual_seed(args.seed)
    losses: list[float] = []
    progress = tqdm(range(args.max_train_steps), mininterval=30)
    for _ in progress:
        chosen = torch.randint(len(images), (args.train_batch_size,), generator=generator)
        own = latents[chosen]
        estimate = unet_estimate(pipeline, noise_scheduler, own, input_ids[chosen], args.tmax, generator)
        share = torch.rand(len(own), 1, 1, 1, generator=generator)
        reconstruction = vae.decode(torch.lerp(own, estimate, share) / scale).sample
        loss = reconstruction_loss(reconstruction, to_float(images[chosen]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{sum(losses[-100:]) / len(losses[-100:]):.4f}", refresh=False)
    pipeline.to(dtype=torch.float16).save_pretrained(args.output_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=Path("pipeline-demo"), help="as train_pipeline.py writes it")
    parser.add_argument("--output_dir", type=Path, default=Path("pipeline-demo-sharp"))
    parser.add_argument("--tmax", type=int, default=600)
    parser.add_argument("--max_train_steps", type=int, default=1200)
    parser.add_argument("--train_batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
