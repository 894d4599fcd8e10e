"""Train the demo's flow-matching pipeline, a small Stable Diffusion 3, on the demo's train split.

    accelerate launch examples/demo/train_flow_pipeline.py --output_dir pipeline-flow --mixed_precision bf16

The VAE and the text encoder are those of the demo's Stable Diffusion (`--teacher`), and stay as they are: that encoder
has learned which drawing a caption means, and its last tokens hold the drawing's latents, as a linear map reads them
(train_pipeline.py). Stable Diffusion 3 reads the last but one layer of its encoders, so a fifth layer is put behind the
four: it and a second, small encoder learn what the whole caption says, for the pooled embedding. There is no T5. The pipeline
then puts `max_sequence_length` zeros behind the caption's tokens, 256 of them unless told otherwise; the transformer sees
1 in most steps and 256 in a few, and learns to ignore them.

Velocities of a rectified flow (Liu et al. 2023; Esser et al. 2024), half of the noise levels from the upper quarter, where
the text decides. Muon for what it is for, as in train_pipeline.py. What is saved is the exponential moving average, as a
StableDiffusion3Pipeline folder in fp16, with a sheet of samples beside it.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from captions import ATTRIBUTES
from datasets import load_dataset
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from timm.optim import Muon
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid
from tqdm.auto import tqdm
from train_pipeline import (
    DATA,
    MUON,
    SHEET_PROMPTS,
    draw_captions,
    encode_images,
    parameter_groups,
    save_in_half,
    tokenize_captions,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from acpo_utils import flow_matching
from acpo_utils.data import tokenize
from acpo_utils.families import sd3
from acpo_utils.families.loading import DTYPE
from acpo_utils.training.ema import ema_weights


DEMO = Path(__file__).parent
ZEROS, MANY_ZEROS, MANY_ZEROS_SHARE = 1, 256, 0.05


def training_step(latents, conditions, transformer, generator) -> torch.Tensor:
    noise = torch.randn(latents.shape, generator=generator).to(latents)  # (B, 4, 16, 16)
    sigmas = 1 - torch.rand(latents.shape[:1], generator=generator) ** 2  # (B,) in (0, 1], the density rises towards 1
    noisy_latents = flow_matching.add_noise(latents, noise, sigmas)
    model_pred = sd3.predict(transformer, noisy_latents, sigmas.to(latents), conditions)
    return flow_matching.flow_loss(model_pred, latents, noise, sigmas)


def new_transformer(joint_attention_dim: int, pooled_projection_dim: int) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=6,
        caption_projection_dim=192,
        joint_attention_dim=joint_attention_dim,
        pooled_projection_dim=pooled_projection_dim,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def first_text_encoder(teacher: torch.nn.Module) -> CLIPTextModelWithProjection:
    """The teacher's layers, and one more behind them, which begins as no change at all and serves the pooled embedding."""
    config = CLIPTextConfig(**teacher.config.to_dict() | {"num_hidden_layers": teacher.config.num_hidden_layers + 1})
    text_encoder = CLIPTextModelWithProjection(config)
    text_model = text_encoder.text_model
    text_model.load_state_dict(getattr(teacher, "text_model", teacher).state_dict(), strict=False)
    last = text_model.encoder.layers[-1]
    for layer in (last.self_attn.out_proj, last.mlp.fc2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return text_encoder


def second_text_encoder(first: CLIPTextConfig) -> CLIPTextModelWithProjection:
    narrow = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 64,
    }
    return CLIPTextModelWithProjection(CLIPTextConfig(**first.to_dict() | narrow))


def trained_parameters(text_encoders: torch.nn.ModuleList) -> list[torch.nn.Module]:
    """The modules that learn: behind the teacher's layers, and all of the second encoder. The others are frozen."""
    first = text_encoders[0]
    text_encoders.requires_grad_(False)
    modules = [first.text_model.encoder.layers[-1], first.text_model.final_layer_norm, first.text_projection]
    modules.append(text_encoders[1])
    for module in modules:
        module.requires_grad_(True)
    return modules


def encode_captions(text_encoders, input_ids: torch.Tensor, num_zeros: int) -> dict[str, torch.Tensor]:
    """As `sd3.encode_prompts`, with gradient: (B, tokens + num_zeros, 320) and the pooled embeddings (B, 192)."""
    first, second = (text_encoder(input_ids, output_hidden_states=True) for text_encoder in text_encoders)
    clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return {
        "prompt_embeds": F.pad(clip, (0, 0, 0, num_zeros)),
        "pooled_prompt_embeds": torch.cat([first.text_embeds, second.text_embeds], dim=-1),
    }


def save_pipeline(models: dict, prompts: list[str], output_dir: Path, seed: int) -> None:
    """The models in an fp16 pipeline folder, and a sheet of samples for held-out prompts."""
    build_pipeline = partial(StableDiffusion3Pipeline, text_encoder_3=None, tokenizer_3=None)
    pipeline = build_pipeline(**models)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompts,
        num_inference_steps=20,
        guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
        max_sequence_length=ZEROS,
    ).images
    to_pil_image(make_grid([pil_to_tensor(image) for image in images], nrow=10, padding=0)).save(f"{output_dir}.png")
    save_in_half(build_pipeline, models, output_dir)


def main(args: argparse.Namespace) -> None:
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed)
    files = {split: str(DATA / f"{split}.parquet") for split in ("train", "new_combinations")}
    dataset = load_dataset("parquet", data_files=files)
    teacher = StableDiffusionPipeline.from_pretrained(args.teacher, **{DTYPE: torch.float32})
    vae, tokenizer = teacher.vae, teacher.tokenizer
    vae.register_to_config(shift_factor=0.0)  # which Stable Diffusion 3 adds after the decode's division
    if args.continue_from:
        before = StableDiffusion3Pipeline.from_pretrained(args.continue_from, **{DTYPE: torch.float32})
        text_encoders = torch.nn.ModuleList([before.text_encoder, before.text_encoder_2])
        transformer = before.transformer
    else:
        first = first_text_encoder(teacher.text_encoder)
        text_encoders = torch.nn.ModuleList([first, second_text_encoder(first.config)])
        widths = [text_encoder.config for text_encoder in text_encoders]
        transformer = new_transformer(
            joint_attention_dim=sum(config.hidden_size for config in widths),
            pooled_projection_dim=sum(config.projection_dim for config in widths),
        )
    learning = trained_parameters(text_encoders)
    vae.eval().requires_grad_(False).to(accelerator.device)
    text_encoders.train().to(accelerator.device)
    transformer.train()
    latents = encode_images(vae, dataset["train"]["image"][:])
    rows = dataset["train"].select_columns(list(ATTRIBUTES)).to_list()
    input_ids = tokenize_captions(tokenizer, rows).to(accelerator.device)
    unconditional = tokenize(tokenizer, [""]).to(accelerator.device)

    parameters = [*transformer.parameters()] + [p for module in learning for p in module.parameters()]
    groups = parameter_groups(transformer, learning_rate=args.learning_rate)
    groups += parameter_groups(*learning, learning_rate=args.text_encoder_learning_rate)
    optimizer = Muon(groups, **MUON)
    lr_scheduler = get_scheduler(
        "cosine", optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    average = EMAModel(parameters, decay=args.ema_decay, use_ema_warmup=True, power=3 / 4)
    models = {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": text_encoders[0],
        "text_encoder_2": text_encoders[1],
        "tokenizer": tokenizer,
        "tokenizer_2": CLIPTokenizer.from_pretrained(Path(args.teacher, "tokenizer")),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }
    transformer, optimizer, lr_scheduler = accelerator.prepare(transformer, optimizer, lr_scheduler)
    average.to(accelerator.device)
    # Not prepared, so that autocast leaves them alone: they cost next to nothing.
    accelerator.register_for_checkpointing(average, text_encoders)
    state_dir, first_step = Path(f"{args.output_dir}-state"), 0
    if args.resume:
        accelerator.load_state(state_dir)
        first_step = json.loads((state_dir / "step.json").read_text())

    sheet_prompts = dataset["new_combinations"]["text"][:SHEET_PROMPTS]
    progress = tqdm(
        range(first_step, args.max_train_steps), initial=first_step, total=args.max_train_steps, mininterval=30
    )
    losses: list[float] = []
    # The backward of the fused attention takes a quarter of a step in bf16 on a CPU.
    slow_backward = accelerator.device.type == "cpu" and args.mixed_precision == "bf16"
    backends = [SDPBackend.MATH] if slow_backward else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    for step in progress:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        chosen = torch.randint(len(latents), (args.train_batch_size,), generator=generator)
        # Classifier-free guidance needs an unconditional model: a tenth of the captions are emptied.
        dropped = torch.rand(args.train_batch_size, generator=generator) < 0.1
        captions = draw_captions(input_ids, chosen, generator)
        captions = torch.where(dropped[:, None].to(captions.device), unconditional, captions)
        many = torch.rand(1, generator=generator).item() < MANY_ZEROS_SHARE
        conditions = encode_captions(text_encoders, captions, MANY_ZEROS if many else ZEROS)
        with accelerator.autocast(), sdpa_kernel(backends):
            loss = training_step(latents[chosen], conditions, transformer, generator)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        average.step(parameters)
        losses.append(loss.item())
        progress.set_postfix(loss=f"{sum(losses[-100:]) / len(losses[-100:]):.4f}", refresh=False)
        if (step + 1) % args.checkpointing_steps == 0 or step + 1 == args.max_train_steps:
            accelerator.save_state(state_dir)
            (state_dir / "step.json").write_text(json.dumps(step + 1))
            with ema_weights(average, parameters):
                save_pipeline(models, sheet_prompts, args.output_dir, args.seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--teacher",
        type=Path,
        default=DEMO / "pipeline",
        help="a StableDiffusionPipeline folder written by train_pipeline.py",
    )
    parser.add_argument("--continue_from", type=Path, help="a folder written by this script that learns on")
    parser.add_argument("--output_dir", type=Path, default=Path("pipeline-flow"))
    parser.add_argument("--max_train_steps", type=int, default=8000)
    parser.add_argument("--train_batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of the transformer")
    parser.add_argument("--text_encoder_learning_rate", type=float, default=3e-4, help="of the pooled embedding")
    parser.add_argument("--lr_warmup_steps", type=int, default=100)
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--resume", action="store_true", help="continue from the state beside --output_dir")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
