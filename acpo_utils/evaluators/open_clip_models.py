"""open_clip models for evaluators: built from a configuration alone, or loaded with weights and tokenizer."""

import copy
import inspect
import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from acpo_utils.files import one_line


if TYPE_CHECKING:  # open_clip takes seconds
    from open_clip.model import CLIP, CustomTextCLIP
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    OpenCLIP: TypeAlias = CLIP | CustomTextCLIP
    Tokenizer: TypeAlias = HFTokenizer | SimpleTokenizer


def build_clip(clip_config: dict) -> "OpenCLIP":
    """The open_clip network that `clip_config` describes, with random weights; nothing is downloaded."""
    from open_clip.model import CLIP, CustomTextCLIP

    config = copy.deepcopy(dict(clip_config))
    if "multimodal_cfg" in config:
        raise ValueError("IPCE needs an image-text model (CLIP, SigLIP, ...), found a CoCa configuration.")
    if config["vision_cfg"].get("timm_model_name"):
        config["vision_cfg"]["timm_model_pretrained"] = False
    if config["text_cfg"].get("hf_model_name"):
        config["text_cfg"]["hf_model_pretrained"] = False
    custom_text = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    return (CustomTextCLIP if custom_text else CLIP)(**config)


def build_tokenizer(clip_config: dict, source: str | Path | None, **kwargs: Any) -> "Tokenizer":
    """open_clip's own tokenizer (bundled), or the Hugging Face tokenizer in `source` if the configuration names one."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    text_config = clip_config["text_cfg"]
    # Never the repository's own code, even if the configuration, which may come from a hub, asks for it.
    kwargs = kwargs | (text_config.get("tokenizer_kwargs") or {}) | {"trust_remote_code": False}
    context_length = text_config.get("context_length", 77)
    if not text_config.get("hf_tokenizer_name"):
        del kwargs["trust_remote_code"]
        return SimpleTokenizer(context_length=context_length, **kwargs)
    mode = text_config.get("tokenizer_mode")
    return HFTokenizer(str(source), context_length=context_length, tokenizer_mode=mode, **kwargs)


def token_counts(tokenizer: "Tokenizer", texts: list[str]) -> list[int]:
    """How many tokens each text has before truncation, those that mark its start and end included.

    `tokenizer` is one of `build_tokenizer`'s. Counted, not read off the truncated tokens: a tokenizer that pads with
    its end token, as CLIP's does, ends a short text and a cut one alike.
    """
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is None:  # open_clip's SimpleTokenizer: a start and an end
        return [len(tokenizer.encode(text)) + 2 for text in texts]
    texts = [tokenizer.clean_fn(text) for text in texts]
    if tokenizer.tokenizer_mode == "clips":  # start, end and a class token, which open_clip sets itself
        return [len(ids) + 3 for ids in inner(texts, add_special_tokens=False, verbose=False).input_ids]
    return [len(ids) for ids in inner(texts, verbose=False).input_ids]


def warn_of_truncation(texts: list[str], counts: list[int], context_length: int) -> bool:
    """Warns of the first text with more tokens than `context_length`; returns whether there was one."""
    for text, count in zip(texts, counts):
        if count > context_length:
            warnings.warn(
                f"Texts longer than {context_length} tokens are truncated; first, of {count}: {text[:80]!r}...",
                stacklevel=3,
            )
            return True
    return False


def resolve_layers(visual: torch.nn.Module, layers: list[int] | None) -> list[int]:
    """Ascending, non-negative numbers of a transformer's blocks or a convolutional trunk's stages; by default four,
    evenly spaced, ending with the last. Raises ValueError for a number that the image tower does not have, and for a
    tower without such layers."""
    transformer, trunk = getattr(visual, "transformer", None), getattr(visual, "trunk", None)
    blocks = getattr(transformer, "resblocks", None)
    if trunk is not None and hasattr(trunk, "forward_intermediates"):
        blocks = trunk.feature_info  # of timm, one for each
    if blocks is None:
        raise ValueError(
            "head 'alignment_structure' needs the outputs of layers inside the image tower (eq. 2), as vision "
            "transformers and timm's convolutional networks give them, "
            f"found {type(visual if trunk is None else trunk).__name__}. Use head 'prompt_levels' or another CLIP."
        )
    depth = len(blocks)
    if layers is None:
        return sorted({round(depth * quarter / 4) - 1 for quarter in (1, 2, 3, 4)} - {-1})
    if not layers or not all(-depth <= layer < depth for layer in layers):
        raise ValueError(f"structure_layers: expected numbers from {-depth} to {depth - 1}, found {list(layers)}.")
    return sorted({layer % depth for layer in layers})


def gives_tokens(trunk: Any) -> bool:
    """Whether an image network of timm gives patch and prefix tokens of its layers, or else maps (B, C, h, w)."""
    return "return_prefix_tokens" in inspect.signature(trunk.forward_intermediates).parameters


def load_open_clip(clip_model: str, clip_pretrained: str | None = None) -> tuple["OpenCLIP", dict, "Tokenizer", dict]:
    """The model, its configuration (for `build_clip`), its tokenizer and its preprocessing (`mean`, `std`, ...).

    `clip_model` is an open_clip model name with `clip_pretrained` a tag (downloaded) or a local weights file, or a
    local folder ("local-dir:PATH" or just PATH) or "hf-hub:REPO", which bring their own weights. Raises ValueError if
    the model or its weights cannot be found.
    """
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    if os.path.isdir(clip_model):
        clip_model = f"local-dir:{clip_model}"
    brings_weights = clip_model.startswith(("local-dir:", "hf-hub:"))
    if not brings_weights and clip_model not in open_clip.list_models():
        raise ValueError(f"CLIP {clip_model!r}: expected an open_clip model name or a local folder, found neither.")
    if not brings_weights and not clip_pretrained:
        tags = open_clip.list_pretrained_tags_by_model(clip_model)
        raise ValueError(f"CLIP {clip_model!r} needs weights: a local file or one of {tags}, found none.")
    try:
        clip_config = open_clip.get_model_config(clip_model)
        tag = None if brings_weights else get_pretrained_cfg(clip_model, clip_pretrained)
        if tag and tag.get("quick_gelu"):  # OpenAI's weights: open_clip only warns if the activation differs
            clip_config["quick_gelu"] = True
        clip = open_clip.create_model(
            clip_model,
            None if brings_weights else clip_pretrained,
            force_quick_gelu=bool(clip_config.get("quick_gelu")),
            require_pretrained=True,
        )
        if brings_weights:
            source = clip_model.removeprefix("local-dir:").removeprefix("hf-hub:")
        else:
            source = clip_config["text_cfg"].get("hf_tokenizer_name")
        tokenizer = build_tokenizer(clip_config, source)
    except (RuntimeError, OSError, TypeError, ValueError) as error:
        reason = one_line(error)
        raise ValueError(f"Cannot load CLIP {clip_model!r} with weights {clip_pretrained!r}: {reason}") from error
    return clip, json.loads(json.dumps(clip_config)), tokenizer, open_clip.get_model_preprocess_cfg(clip)
