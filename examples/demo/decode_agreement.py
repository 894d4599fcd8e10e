"""How well the guide's gradient through a cheap decode agrees with that through the VAE: cosines on the embedded pipeline.

    python examples/demo/decode_agreement.py --tiny_vae examples/demo/tiny-vae  # or without it

Held-out drawings are noised to t < 100, the base U-Net estimates z_0_hat (eq. 5), and the guide scores its decode. The
gradient of the score with respect to z_0_hat is what trains a LoRA; its direction is compared with the full decode's, image
by image: all of it for a decode in bf16 and for a tiny decoder, inside the window for a crop, where the outside gets
nothing. docs/performance.md.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import load_dataset
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm.auto import tqdm

from acpo_utils.evaluators import load_evaluator
from acpo_utils.families.latents import decoder_in, encode_images
from acpo_utils.late_step import crop_latents, decode_latents, predict_original_sample, sample_late_timesteps
from acpo_utils.randomness import step_generator


DEMO = Path(__file__).parent


def gradient(score, z0: torch.Tensor) -> torch.Tensor:
    z0 = z0.detach().requires_grad_(True)
    return torch.autograd.grad(score(z0).sum(), z0)[0]


def cosine(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(first.flatten(1), second.flatten(1))


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO / "pipeline", safety_checker=None)
    guide = load_evaluator(f"ipce:{DEMO / 'guide'}")
    for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        model.requires_grad_(False).float()
    others = {"in bf16": decoder_in(torch.bfloat16, pipeline.vae)}
    if args.tiny_vae:
        others["tiny"] = AutoencoderTiny.from_pretrained(args.tiny_vae).requires_grad_(False).float()
    dataset = load_dataset("parquet", data_files=str(DEMO / "data" / "new_combinations.parquet"), split="train")
    rows = dataset.shuffle(seed=args.seed).select(range(args.num_images))
    cosines: dict[str, list[torch.Tensor]] = {}
    for start in tqdm(range(0, args.num_images, args.batch_size), desc="gradients"):
        batch = rows[start : start + args.batch_size]
        pixel_values = torch.stack([pil_to_tensor(image.convert("RGB")) for image in batch["image"]]) / 127.5 - 1
        generator, prompts = step_generator(args.seed, start), batch["text"]
        latents = encode_images({"pixel_values": pixel_values}, pipeline.vae, generator)  # (B, 4, h, w)
        timesteps = sample_late_timesteps(len(latents), args.tmax, generator)
        noisy_latents = pipeline.scheduler.add_noise(
            latents, torch.randn(latents.shape, generator=generator), timesteps
        )
        with torch.no_grad():
            embeds = pipeline.encode_prompt(prompts, "cpu", 1, False)[0]
            model_pred = pipeline.unet(noisy_latents, timesteps, embeds, return_dict=False)[0]
        z0 = predict_original_sample(pipeline.scheduler, model_pred, timesteps, noisy_latents)
        full = gradient(lambda z: guide.score(decode_latents(pipeline.vae, z), prompts), z0)
        for name, decoder in others.items():
            found = gradient(lambda z: guide.score(decode_latents(decoder, z), prompts), z0)  # noqa: B023
            cosines.setdefault(name, []).append(cosine(full, found))
        for share in (0.75, 0.5):
            side = int(latents.shape[-1] * share)
            window = lambda z: crop_latents(z, side, step_generator(args.seed, start))  # noqa: B023, E731
            score = lambda z: guide.score(decode_latents(pipeline.vae, window(z)), prompts)  # noqa: B023, E731
            by_crop = gradient(score, z0)
            cosines.setdefault(f"crop, {share:g} of the side", []).append(cosine(window(full), window(by_crop)))
    print("| decode | cosine with the full decode's gradient, mean | 10 % to 90 % of the images |\n|---|---|---|")
    for name, values in cosines.items():
        values = torch.cat(values)
        low, high = values.quantile(torch.tensor([0.1, 0.9])).tolist()
        print(f"| {name} | {values.mean():.4f} | {low:.4f} to {high:.4f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny_vae", help="what train_tiny_vae.py wrote; without it there is no row of it")
    parser.add_argument("--num_images", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--tmax", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
