"""CLIPScore and PickScore as evaluators: published numbers in a report, scores in (0, 1) for a loss."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from acpo_utils.evaluators.open_clip_models import warn_of_truncation
from acpo_utils.evaluators.score_scale import to_unit_interval
from acpo_utils.files import one_line


if TYPE_CHECKING:  # transformers takes seconds
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer


logger = logging.getLogger(__name__)
# Name: (model, its processor, the native scores that become 0 and 1).
CLIP_METRICS = {
    "clipscore": ("openai/clip-vit-base-patch16", "openai/clip-vit-base-patch16", (0.0, 50.0)),
    "pickscore": ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", (10.0, 30.0)),
}
CACHE_LIMIT = 50_000  # prompts; 1,024 floats each would be 200 MB


class CLIPMetric(torch.nn.Module):
    """CLIPScore or PickScore: a frozen transformers CLIP, with a preprocessing that lets the gradient through.

    Native score: `factor * cos(f_I, f_T)`. `score` maps it by `to_unit_interval(native, *score_range)`, so that a
    report, `low + (high - low) * score`, is the native score wherever it lies within 5 to 95 % of the range.

    Args:
        image_processor: its sizes, mean and standard deviation are read; the images never pass through it.
        factor: of the cosine. score_range: the native scores that become 0 and 1.
    Raises:
        ValueError: if the processor does anything but resize the shorter side, crop the centre and normalise.
    """

    mean: torch.Tensor  # buffers
    std: torch.Tensor

    def __init__(
        self,
        model: "CLIPModel",
        tokenizer: "CLIPTokenizer",
        image_processor: "CLIPImageProcessor",
        factor: float,
        score_range: tuple[float, float],
    ):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.factor, self.score_range = factor, score_range
        size, crop = image_processor.size, image_processor.crop_size
        side = model.config.vision_config.image_size
        if not size.get("shortest_edge") or (crop["height"], crop["width"]) != (side, side):
            raise ValueError(
                f"expected a processor that resizes the shortest_edge and then crops to {side} x {side} pixels, found "
                f"size {dict(size)} and crop_size {dict(crop)}"
            )
        self.shorter_side, self.crop_side = size["shortest_edge"], side
        self.register_buffer("mean", torch.tensor(image_processor.image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(image_processor.image_std).view(1, 3, 1, 1), persistent=False)
        self.context_length = min(model.config.text_config.max_position_embeddings, tokenizer.model_max_length)
        self._text_cache: dict[str, torch.Tensor] = {}
        self._warned_of_truncation = False
        self.eval().requires_grad_(False)

    def score(self, images: torch.Tensor, prompts: list[str] | None = None) -> torch.Tensor:
        """Scores (B,) in (0, 1) of `images` (B, 3, H, W) in [0, 1], any H and W, given B `prompts`.

        Raises ValueError if the shapes do not fit or the prompts are missing.
        """
        return to_unit_interval(self.native_score(images, prompts), *self.score_range)

    def native_score(self, images: torch.Tensor, prompts: list[str] | None) -> torch.Tensor:
        """`factor * cos(f_I, f_T)`, (B,) in fp32; the metric's published number."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images: expected floats (B, 3, H, W), found {images.dtype} {tuple(images.shape)}.")
        if isinstance(prompts, str) or prompts is None or len(prompts) != len(images):
            found = repr(prompts) if isinstance(prompts, str) or prompts is None else f"{len(prompts)} of them"
            raise ValueError(f"prompts: expected a list of {len(images)} strings, one for each image, found {found}.")
        pixels = self.preprocess(images).to(self.model.dtype)
        f_image = F.normalize(self.model.get_image_features(pixels).pooler_output.float(), dim=-1)  # (B, D)
        return self.factor * (f_image * self._encode_text(list(prompts))).sum(-1)  # (B,)

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """`images` (B, 3, H, W) in [0, 1] as the CLIP was trained on them, (B, 3, h, h), differentiable.

        As in transformers' CLIPImageProcessor: the shorter side is resized (bicubic, antialiased), the centre cut out.
        What lies outside the central square of an oblong image does not count, and gets no gradient.
        """
        images = images.float()
        height, width = images.shape[-2:]
        if min(height, width) != self.shorter_side:
            size = [int(self.shorter_side * side / min(height, width)) for side in (height, width)]
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
            images = images.clamp(0, 1)  # bicubic overshoots at edges; the 8-bit images of the training did not
            height, width = size
        top, left = (height - self.crop_side) // 2, (width - self.crop_side) // 2
        images = images[..., top : top + self.crop_side, left : left + self.crop_side]
        return (images - self.mean) / self.std

    def _encode_text(self, texts: list[str]) -> torch.Tensor:
        """Unit embeddings (len(texts), D) in fp32, kept by text: the model is frozen."""
        device = self.mean.device
        if len(self._text_cache) > CACHE_LIMIT:
            self._text_cache = {}
        if unknown := [text for text in dict.fromkeys(texts) if text not in self._text_cache]:
            if not self._warned_of_truncation:
                counts = [len(ids) for ids in self.tokenizer(unknown, verbose=False).input_ids]
                self._warned_of_truncation = warn_of_truncation(unknown, counts, self.context_length)
            settings = {"padding": True, "truncation": True, "max_length": self.context_length}
            # Outside inference mode: what is kept may be used in a graph later.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
                for text in unknown:  # alone: a batch rounds by its size, and a resumed run has others new to it
                    tokens = self.tokenizer([text], return_tensors="pt", **settings).to(device)
                    features = self.model.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output[0]
                    self._text_cache[text] = F.normalize(features.float(), dim=-1)
        return torch.stack([self._text_cache[text] for text in texts]).to(device)


def load_clip_metric(name: str, path: str | None = None, device: str | torch.device | None = None) -> CLIPMetric:
    """The metric `name`, "clipscore" or "pickscore", frozen, in fp32, on `device`.

    - `clipscore`: 100 * cos(f_I, f_T) of OpenAI's ViT-B/16 without a prefix to the prompt, as the documentation of
      diffusers and torchmetrics compute it (Hessel et al. 2021 multiply by 2.5, for ViT-B/32 and "A photo depicts").
      Published as max(100 cos, 0), 0 to 100; images of their own prompts lie between about 20 and 40, so 0 and 50
      become 0 and 1.
    - `pickscore`: exp(logit_scale) * cos(f_I, f_T) of the ViT-H/14 fine-tuned on Pick-a-Pic (Kirstain et al. 2023);
      exp(logit_scale) is about 100. Means of diffusion models lie between 18 and 23, so 10 and 30 become 0 and 1.

    `path` is a local folder with model and processor, as `save_pretrained` of CLIPModel and CLIPProcessor write them
    (processor_config.json, or the older preprocessor_config.json); without it both come from the hub. Weights in safetensors only, and no code of a repository.

    Raises ValueError, in one line, if they cannot be loaded or a weight is missing.
    """
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    model_source, processor_source, score_range = CLIP_METRICS[name]
    if path is not None:
        if not Path(path).is_dir():
            raise ValueError(f'Evaluator "{name}:{path}": expected a folder with a CLIP, found no such folder.')
        model_source = processor_source = path
    try:
        # from_pretrained would fill what is missing with random numbers and only say so in the log
        model, info = CLIPModel.from_pretrained(
            model_source, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        for kind in ("missing_keys", "mismatched_keys"):
            if keys := sorted(map(str, info[kind])):
                raise ValueError(f"{len(keys)} {kind.replace('_', ' ')} in its weights, e.g. {', '.join(keys[:3])}")
        tokenizer = CLIPTokenizer.from_pretrained(processor_source)
        image_processor = CLIPImageProcessor.from_pretrained(processor_source)
        factor = model.logit_scale.exp().item() if name == "pickscore" else 100.0
        return CLIPMetric(model, tokenizer, image_processor, factor, score_range).to(device)
    except Exception as error:  # of many kinds: network, file system, safetensors, shapes, tokenizer
        reason = one_line(error)
        if path is not None:
            raise ValueError(f'Evaluator "{name}:{path}": cannot load a CLIP from that folder: {reason}') from error
        raise ValueError(
            f'Evaluator "{name}": cannot load {model_source} with the processor of {processor_source}: {reason} '
            f"Where there is no network, save both to one folder and name it: {name}:PATH."
        ) from error
