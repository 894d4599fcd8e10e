"""The models of the tests: real classes at a tiny size, with random weights that a seed fixes."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderTiny,
    DDIMPipeline,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from open_clip.model import CLIP
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from acpo_utils.evaluators import IPCE


# --- Stable Diffusion


def tiny_unet(seed: int = 0, **overrides) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    config = {
        "sample_size": 16,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DConditionModel(**(config | overrides))


def tiny_vae(seed: int = 1) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=32,
    )


def tiny_taesd(seed: int = 6, **overrides) -> AutoencoderTiny:
    """An AutoencoderTiny of `tiny_vae`'s latents: twice as many pixels as latents along a side."""
    torch.manual_seed(seed)
    config = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return AutoencoderTiny(**(config | {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)} | overrides))


def tiny_scheduler(**overrides) -> DDPMScheduler:
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDPMScheduler(**(config | {"clip_sample": False, "steps_offset": 1} | overrides))


def tiny_tokenizer() -> CLIPTokenizer:
    """Every byte is a token: 16 of them at most."""
    characters = list(bytes_to_unicode().values())
    tokens = characters + [c + "</w>" for c in characters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16)


def tiny_text_encoder(seed: int = 2) -> CLIPTextModel:
    """Of `tiny_tokenizer`'s tokens."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=37,
            num_attention_heads=4,
            num_hidden_layers=2,
            max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=32,
        )
    )


def save_tiny_pipeline(folder: Path) -> str:
    """A Stable Diffusion folder."""
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(),
        unet=tiny_unet(),
        scheduler=tiny_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return str(folder)


# --- Stable Diffusion XL


def tiny_sdxl_unet(seed: int = 0, **overrides) -> UNet2DConditionModel:
    """Told of `tiny_sdxl`'s two text encoders, 32 and 24 wide, the second's pooled output of 20 and six time_ids."""
    config = {
        "cross_attention_dim": 56,
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 20 + 6 * 8,
    }
    return tiny_unet(seed, **(config | overrides))


def tiny_sdxl(**overrides) -> StableDiffusionXLPipeline:
    """Its second tokenizer pads with another token than the first, its scheduler says nothing of clip_sample."""
    tokenizers = [tiny_tokenizer(), tiny_tokenizer()]
    tokenizers[1].pad_token = "!"
    torch.manual_seed(7)
    config = {
        "vocab_size": len(tokenizers[0]),
        "intermediate_size": 37,
        "num_hidden_layers": 3,
        "max_position_embeddings": 16,
        "bos_token_id": tokenizers[0].bos_token_id,
        "eos_token_id": tokenizers[0].eos_token_id,
        "projection_dim": 20,
    }
    text_encoder = CLIPTextModel(CLIPTextConfig(**config, hidden_size=32, num_attention_heads=4))
    text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**config, hidden_size=24, num_attention_heads=3))
    for model in (text_encoder, text_encoder_2):
        for _, parameter in sorted(model.named_parameters()):
            torch.nn.init.normal_(parameter, std=0.2)  # so that captions differ, and the same for every transformers
    vae = tiny_vae()
    vae.register_to_config(scaling_factor=0.13025, force_upcast=True)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    parts = {
        "vae": vae,
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
        "tokenizer": tokenizers[0],
        "tokenizer_2": tokenizers[1],
        "unet": tiny_sdxl_unet(),
        "scheduler": scheduler,
        "add_watermarker": False,
    }
    return StableDiffusionXLPipeline(**(parts | overrides))


def save_tiny_sdxl(folder: Path, **overrides) -> str:
    """A Stable Diffusion XL folder."""
    tiny_sdxl(**overrides).save_pretrained(folder)
    return str(folder)


# --- Flow matching: Stable Diffusion 3, FLUX.1 and FLUX.2-klein


def tiny_flow_vae(scaling_factor: float, shift_factor: float) -> AutoencoderKL:
    """16 channels of latents, twice as many pixels along a side, as the VAEs of these families without quant_conv."""
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=16,
        sample_size=32,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def tiny_clip_pair() -> dict:
    """Two CLIPs with pooled outputs, 32 and 24 wide, and their tokenizers, which pad with different tokens."""
    tokenizers = [tiny_tokenizer(), tiny_tokenizer()]
    tokenizers[1].pad_token = "!"
    config = {
        "vocab_size": len(tokenizers[0]),
        "intermediate_size": 37,
        "num_hidden_layers": 3,
        "max_position_embeddings": 16,
        "bos_token_id": tokenizers[0].bos_token_id,
        "eos_token_id": tokenizers[0].eos_token_id,
        "projection_dim": 20,
    }
    first = CLIPTextModelWithProjection(CLIPTextConfig(**config, hidden_size=32, num_attention_heads=4))
    second = CLIPTextModelWithProjection(CLIPTextConfig(**config, hidden_size=24, num_attention_heads=3))
    return {
        "tokenizer": tokenizers[0],
        "tokenizer_2": tokenizers[1],
        "text_encoder": seeded(first),
        "text_encoder_2": seeded(second),
    }


def tiny_t5_tokenizer() -> T5TokenizerFast:
    """Every printable character of ASCII is a token."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return T5TokenizerFast(vocab=special + [(chr(code), -3.0) for code in range(33, 127)], extra_ids=0)


def tiny_t5(width: int) -> T5EncoderModel:
    return seeded(T5EncoderModel(T5Config(vocab_size=128, d_model=width, d_ff=37, d_kv=8, num_layers=2, num_heads=4)))


def seeded(text_encoder: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that captions differ, and the same for every version of transformers."""
    torch.manual_seed(8)  # after its own initialisation, which draws other numbers in other versions
    parameters = sorted(text_encoder.named_parameters(), key=lambda item: (tuple(item[1].shape), item[0]))
    for _, parameter in parameters:  # T5's embeddings, which are tied, have another name in other versions
        torch.nn.init.normal_(parameter, std=0.2)
    return text_encoder


def tiny_sd3_transformer(seed: int = 0, **overrides) -> SD3Transformer2DModel:
    """Told of `tiny_sd3`'s text encoders: CLIPs 32 and 24 wide, pooled 20 each, and a T5 64 wide."""
    torch.manual_seed(seed)
    config = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_projection_dim": 32,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 40,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    return SD3Transformer2DModel(**(config | overrides))


def tiny_sd3(**overrides) -> StableDiffusion3Pipeline:
    """Its second tokenizer pads with another token than the first. `text_encoder_3=None, tokenizer_3=None`: without T5."""
    parts = tiny_clip_pair() | {
        "vae": tiny_flow_vae(scaling_factor=1.5305, shift_factor=0.0609),
        "text_encoder_3": tiny_t5(64),
        "tokenizer_3": tiny_t5_tokenizer(),
        "transformer": tiny_sd3_transformer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    return StableDiffusion3Pipeline(**(parts | overrides))


def save_tiny_sd3(folder: Path, **overrides) -> str:
    """A Stable Diffusion 3 folder."""
    tiny_sd3(**overrides).save_pretrained(folder)
    return str(folder)


def tiny_flux_transformer(seed: int = 0, **overrides) -> FluxTransformer2DModel:
    """Told of `tiny_flux`'s text encoders, a CLIP 32 wide and a T5 48 wide, and of the guidance scale."""
    torch.manual_seed(seed)
    config = {
        "in_channels": 64,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "pooled_projection_dim": 32,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    }
    return FluxTransformer2DModel(**(config | overrides))


def tiny_flux(**overrides) -> FluxPipeline:
    """As FLUX.1-dev: a shift that depends on the size."""
    parts = {
        "vae": tiny_flow_vae(scaling_factor=0.3611, shift_factor=0.1159),
        "text_encoder": seeded(tiny_text_encoder()),
        "text_encoder_2": tiny_t5(48),
        "tokenizer": tiny_tokenizer(),
        "tokenizer_2": tiny_t5_tokenizer(),
        "transformer": tiny_flux_transformer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }
    return FluxPipeline(**(parts | overrides))


def save_tiny_flux(folder: Path, **overrides) -> str:
    """A FLUX.1 folder."""
    tiny_flux(**overrides).save_pretrained(folder)
    return str(folder)


def tiny_chat_tokenizer() -> Qwen2Tokenizer:
    """Every byte is a token. Its template depends on whether the assistant is to think, as Qwen3's does."""
    tokenizer = Qwen2Tokenizer(
        vocab={character: i for i, character in enumerate(bytes_to_unicode().values())},
        merges=[],
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>a\n{% endif %}{% if not enable_thinking %}no{% endif %}"
    )
    return tokenizer


def tiny_klein_vae(seed: int = 1, **overrides) -> AutoencoderKLFlux2:
    """8 channels of latents, twice as many pixels along a side, normalised as a trained one's are: not by 0 and 1."""
    torch.manual_seed(seed)
    config = {
        "block_out_channels": (16, 16),
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": 8,
        "sample_size": 32,
    }
    vae = AutoencoderKLFlux2(**(config | overrides))
    vae.bn.running_mean.uniform_(-0.5, 0.5)
    vae.bn.running_var.uniform_(0.2, 3.0)
    return vae


def tiny_klein_transformer(seed: int = 0, **overrides) -> Flux2Transformer2DModel:
    """Told of three layers of `tiny_klein`'s text encoder, which is 16 wide."""
    torch.manual_seed(seed)
    config = {
        "in_channels": 32,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": False,
    }
    return Flux2Transformer2DModel(**(config | overrides))


def tiny_klein(**overrides):
    """A Flux2KleinPipeline, of diffusers 0.37 or newer; `is_distilled=True`: as the models of four steps."""
    from diffusers import Flux2KleinPipeline

    tokenizer = tiny_chat_tokenizer()
    text_config = Qwen3Config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=len(tokenizer),
        max_position_embeddings=640,
        tie_word_embeddings=True,
    )
    parts = {
        "vae": tiny_klein_vae(),
        "text_encoder": seeded(Qwen3ForCausalLM(text_config)),
        "tokenizer": tokenizer,
        "transformer": tiny_klein_transformer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }
    return Flux2KleinPipeline(**(parts | overrides))


def save_tiny_klein(folder: Path, **overrides) -> str:
    """A FLUX.2-klein folder."""
    tiny_klein(**overrides).save_pretrained(folder)
    return str(folder)


# --- Unconditional models


UNET2D_CONFIG = {
    "sample_size": 32,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def tiny_unet2d(seed: int = 0, **overrides) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(**(UNET2D_CONFIG | overrides)).eval()


def tiny_ddpm(folder: Path, pipeline_class: type = DDPMPipeline, **scheduler_overrides) -> str:
    """A DDPMPipeline's folder, or a DDIMPipeline's."""
    pipeline = pipeline_class(unet=tiny_unet2d(), scheduler=DDPMScheduler(**scheduler_overrides))
    pipeline.save_pretrained(folder)
    return str(folder)


def tiny_ddim(folder: Path) -> str:
    return tiny_ddpm(folder, DDIMPipeline)


# --- Z-Image


def tiny_z_image_transformer(seed: int = 0, **overrides) -> ZImageTransformer2DModel:
    """Told of `tiny_z_image`'s text encoder, 16 wide."""
    torch.manual_seed(seed)
    config = {
        "in_channels": 16,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [8, 4, 4],
        "axes_lens": [256, 32, 32],
    }
    transformer = ZImageTransformer2DModel(**(config | overrides))
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    return transformer


def tiny_z_image(**overrides) -> ZImagePipeline:
    """As Z-Image, not its Turbo: a shift of 6."""
    tokenizer = tiny_chat_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
    )
    parts = {
        "vae": tiny_flow_vae(scaling_factor=0.3611, shift_factor=0.1159),
        "text_encoder": seeded(Qwen3Model(config)),
        "tokenizer": tokenizer,
        "transformer": tiny_z_image_transformer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=6.0),
    }
    return ZImagePipeline(**(parts | overrides))


def save_tiny_z_image(folder: Path, **overrides) -> str:
    """A Z-Image folder."""
    tiny_z_image(**overrides).save_pretrained(folder)
    return str(folder)


# --- CLIP and the guide


CAPTIONS = ["a fox, noto style, on a mint background", "two apples on a white background", "an owl, blob style"]
CLIP_VISION = {"image_size": 16, "patch_size": 4, "width": 32, "layers": 3, "head_width": 16}


def build_clip_tokenizer(folder: Path) -> int:
    """Byte-level BPE in `folder`, the end token last; returns the vocabulary size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.add_special_tokens(["<start>", "<end>"])
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<start>", "<end>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ids)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", eos_token="<end>"
    )
    fast.save_pretrained(folder)
    return len(fast)


def build_clip_folder(
    folder: Path, seed: int = 0, bundled_tokenizer: bool = False, vision: dict = CLIP_VISION
) -> Path:
    """An open_clip "local-dir" folder; 16 px images in patches of 4, three vision layers, 48 tokens of context.

    With a Hugging Face tokenizer of its own, or the one that open_clip bundles.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = {"context_length": 48, "width": 16, "heads": 2, "layers": 1, "vocab_size": 49408}
    if not bundled_tokenizer:
        text |= {"vocab_size": build_clip_tokenizer(folder), "hf_tokenizer_name": "local", "tokenizer_kwargs": {}}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(seed)
    model = CLIP(**config)
    preprocess = {
        "size": 2 * [vision["image_size"]],
        "mean": [0.4, 0.5, 0.6],
        "std": [0.3, 0.25, 0.2],
        "interpolation": "bicubic",
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return folder


def save_tiny_guide(folder: Path, seed: int = 3) -> str:
    """An IPCE folder around an open_clip model, with the tokenizer that open_clip bundles."""
    torch.manual_seed(seed)
    guide = IPCE(
        {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
            "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        }
    )
    guide.save_pretrained(folder)
    return str(folder)
