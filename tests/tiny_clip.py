"""A real open_clip model of a few thousand parameters, as a local folder, with a Hugging Face or the bundled tokenizer."""

import json
from pathlib import Path

import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


CAPTIONS = ["a fox, noto style, on a mint background", "two apples on a white background", "an owl, blob style"]


def build_tokenizer(folder: Path) -> int:
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


VISION = {"image_size": 16, "patch_size": 4, "width": 32, "layers": 3, "head_width": 16}


def build_clip_folder(folder: Path, seed: int = 0, bundled_tokenizer: bool = False, vision: dict = VISION) -> Path:
    """An open_clip "local-dir" folder; 16 px images in patches of 4, three vision layers, 48 tokens of context."""
    folder.mkdir(parents=True, exist_ok=True)
    text = {"context_length": 48, "width": 16, "heads": 2, "layers": 1, "vocab_size": 49408}
    if not bundled_tokenizer:
        text |= {"vocab_size": build_tokenizer(folder), "hf_tokenizer_name": "local", "tokenizer_kwargs": {}}
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
