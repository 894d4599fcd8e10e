"""IPCE: an open_clip model as an image-text quality evaluator (the paper's eqs. 1-3, or the published five prompts)."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from acpo_utils.evaluators.open_clip_models import (
    build_clip,
    build_tokenizer,
    gives_tokens,
    load_open_clip,
    resolve_layers,
    token_counts,
    warn_of_truncation,
)
from acpo_utils.files import load_strictly


HEADS = ("alignment_structure", "prompt_levels")
LEVEL_PROMPTS = tuple(
    f"a photo that {level} matches '{{}}'" for level in ("badly", "poorly", "fairly", "well", "perfectly")
)
CACHE_LIMIT = 50_000  # prompts; 512 floats each would be 100 MB
LONGEST_STRIP = 16  # long side by short side; 8000 x 4 pixels, enlarged whole for the crops, take gigabytes


class IPCE(ModelMixin, ConfigMixin):
    """Quality of an image given its prompt, in (0, 1), differentiable in the image.

    Two heads, chosen by the configuration:

    - `alignment_structure`: eqs. 1-3 of ACPO, on the image resized to the CLIP's input size;
    - `prompt_levels`: the published IPCE (Peng et al., NTIRE 2024): softmax over five prompts of graded wording,
      for `num_crops` local crops and for the whole image; score = (expected level - 1) / 4.

    Build one with [`from_open_clip`] or [`from_pretrained`]. A saved folder holds config.json, safetensors and the
    tokenizer (unless it is open_clip's bundled one): it loads without network.

    Args:
        clip_config: open_clip model configuration (`embed_dim`, `vision_cfg`, `text_cfg`, ...).
        head: `alignment_structure` or `prompt_levels`.
        structure_layers: vision layers of eq. 2 (stages, of a tower that gives maps), counted from 0, negative from the end;
            None: four, evenly spaced.
        num_crops: evenly spaced local crops of `prompt_levels`; published: 15 (8 random ones in training).
        crop_resolution: images with a shorter side below this are enlarged before cropping; published: 512 for a CLIP
            of 224 px, and None scales that to other input sizes.
        crop_stride: of the grid from which crops are taken, 1.5 times as wide where a side is at least twice
            `crop_resolution`; published: 32 (48) for a CLIP of 224 px, None as above.
        image_mean, image_std, interpolation: preprocessing of the CLIP.
        score_range: what 0 and 1 mean in a report.
    """

    @register_to_config
    def __init__(
        self,
        clip_config: dict,
        head: str = "alignment_structure",
        structure_layers: list[int] | None = None,
        num_crops: int = 15,
        crop_resolution: int | None = None,
        crop_stride: int | None = None,
        image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073),
        image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711),
        interpolation: str = "bicubic",
        score_range: tuple[float, float] = (0.0, 5.0),
    ):
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head: expected one of {HEADS}, found {head!r}.")
        self.clip = build_clip(clip_config)
        self.clip.logit_scale.requires_grad_(False)  # stays at its pretrained value, as published
        if self.clip.logit_bias is not None:
            self.clip.logit_bias.requires_grad_(False)
        size = self.clip.visual.image_size
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)
        self.tokenizer = None
        if not clip_config["text_cfg"].get("hf_tokenizer_name"):
            self.tokenizer = build_tokenizer(clip_config, None)
        self.register_buffer("pixel_mean", torch.tensor(image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(image_std).view(1, 3, 1, 1), persistent=False)
        self._text_cache: dict[str, torch.Tensor] = {}
        self._text_cache_state: tuple[torch.device, list[torch.dtype], list[int]] | None = None
        self._warned_of_truncation = False

        crop_resolution = crop_resolution or round(max(self.image_size) * 512 / 224)
        if crop_resolution < max(self.image_size):
            raise ValueError(f"crop_resolution: expected at least {max(self.image_size)}, found {crop_resolution}.")
        crop_stride = crop_stride or max(1, round(max(self.image_size) * 32 / 224))
        self.register_to_config(crop_resolution=crop_resolution, crop_stride=crop_stride)
        if head == "alignment_structure":
            layers = resolve_layers(self.clip.visual, structure_layers)
            trunk = getattr(self.clip.visual, "trunk", None)  # of timm, where a first token may also be a register
            self.has_class_token = trunk is None or getattr(trunk, "cls_token", None) is not None
            self.gives_maps = trunk is not None and not gives_tokens(trunk)
            self.register_to_config(structure_layers=layers)
            self.layer_logits = torch.nn.Parameter(torch.zeros(len(layers)))  # w_l = softmax(layer_logits)
            self.a = torch.nn.Parameter(torch.tensor(10.0))
            self.b = torch.nn.Parameter(torch.tensor(10.0))
            self.bias = torch.nn.Parameter(torch.tensor(0.0))

    @property
    def score_range(self) -> tuple[float, float]:
        low, high = self.config.score_range
        return low, high

    def score(self, images: torch.Tensor, prompts: list[str] | None = None) -> torch.Tensor:
        """Scores (B,) in (0, 1) of `images` (B, 3, H, W) in [0, 1] given B `prompts`; any H and W.

        Raises ValueError if the shapes do not fit or the prompts are missing.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images: expected floats (B, 3, H, W), found {images.dtype} {tuple(images.shape)}.")
        return self(*self.views(images.float()), prompts)

    def views(
        self, images: torch.Tensor, num_crops: int | None = None, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the CLIP looks at: the whole image (B, 3, h, w) and local crops (B, N, 3, h, w), both in [0, 1].

        N is 0 for head `alignment_structure`. Crops are evenly spaced, or, given a `generator`, at random positions
        (the same ones for every image of the batch); of a strip, in its middle, 16 times as long as wide.
        """
        height, width = self.image_size
        whole = self._resize(images, self.image_size)
        num_crops = self.config.num_crops if num_crops is None else num_crops
        if self.config.head == "alignment_structure" or num_crops == 0:
            return whole, whole.new_zeros(len(images), 0, 3, height, width)
        longest = LONGEST_STRIP * min(images.shape[-2:])
        for axis in (-2, -1):
            side = min(images.shape[axis], longest)
            images = images.narrow(axis, (images.shape[axis] - side) // 2, side)
        enlargement = max(1.0, self.config.crop_resolution / min(images.shape[-2:]))
        images = self._resize(images, tuple(round(side * enlargement) for side in images.shape[-2:]))
        stride = self.config.crop_stride
        if max(images.shape[-2:]) >= 2 * self.config.crop_resolution:
            stride = stride * 3 // 2
        tops = range(0, images.shape[-2] - height + 1, stride)
        lefts = range(0, images.shape[-1] - width + 1, stride)
        corners = [(top, left) for top in tops for left in lefts]
        if generator is None:
            chosen = [i * len(corners) // num_crops for i in range(num_crops)]
        else:
            chosen = torch.randint(len(corners), (num_crops,), generator=generator).tolist()
        crops = [images[..., top : top + height, left : left + width] for top, left in (corners[i] for i in chosen)]
        return whole, torch.stack(crops, dim=1)

    def forward(self, whole: torch.Tensor, crops: torch.Tensor, prompts: list[str] | None) -> torch.Tensor:
        """Scores (B,) of the [`views`] of B images. Raises ValueError unless there is one prompt for each image."""
        if isinstance(prompts, str) or prompts is None or len(prompts) != len(whole):
            found = repr(prompts) if isinstance(prompts, str) or prompts is None else f"{len(prompts)} of them"
            raise ValueError(f"prompts: expected a list of {len(whole)} strings, one for each image, found {found}.")
        if self.config.head == "prompt_levels":
            return self._prompt_levels(whole, crops, list(prompts))
        s_align, s_struct = self.similarities(whole, list(prompts))
        return torch.sigmoid(self.a * s_align + self.b * s_struct + self.bias)  # eq. 3, (B,)

    def similarities(self, whole: torch.Tensor, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """`s_align` (B,) of eq. 1 and `s_struct` (B,) of eq. 2, both in [-1, 1]; head `alignment_structure` only."""
        output = self._image_features(whole)
        f_image = F.normalize(output["image_features"].float(), dim=-1)  # (B, D)
        f_text = self._encode_text(prompts)  # (B, D)
        s_align = (f_image * f_text).sum(-1)  # eq. 1, (B,)

        agreement = []
        for layer, patches in enumerate(output["image_intermediates"]):
            if self.gives_maps:
                if len(patches) == 1 and patches.requires_grad:
                    # Through the transposition the gradient of a single image gets strides that batch normalisation
                    # misreads on the CPU (torch 2.14): the gradient of the score would be another one, silently.
                    patches.register_hook(torch.Tensor.contiguous)
                patches = patches.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, P, C)
            if self.has_class_token:
                token = output["image_intermediates_prefix"][layer][:, :1]  # (B, 1, C)
            else:  # SigLIP and convolutional towers have none: the mean token stands for the whole image there
                token = patches.mean(1, keepdim=True)
            agreement.append(F.cosine_similarity(patches.float(), token.float(), dim=-1).mean(1))  # (B,)
        weights = self.layer_logits.softmax(0)  # w_l, summing to 1
        s_struct = (weights * torch.stack(agreement, dim=-1)).sum(-1)  # eq. 2, (B,)
        return s_align, s_struct

    def _image_features(self, whole: torch.Tensor) -> dict:
        """open_clip's `image_features` (B, D) and, of the structure layers, `image_intermediates`."""
        tokens = {} if self.gives_maps else {"output_fmt": "NLC", "output_extra_tokens": True}
        layers = list(self.config.structure_layers)
        return self.clip.visual.forward_intermediates(self._normalise(whole), indices=layers, **tokens)

    def _prompt_levels(self, whole: torch.Tensor, crops: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Published IPCE: E = sum(i p_i), i = 1..5; 0-5 score (E - 1) / 4 * 5, here without the factor 5."""
        batch_size, num_crops = crops.shape[:2]
        texts = [template.format(prompt) for prompt in prompts for template in LEVEL_PROMPTS]
        f_text = self._encode_text(texts).view(batch_size, 1, len(LEVEL_PROMPTS), -1)  # (B, 1, 5, D)
        images = torch.cat([crops, whole.unsqueeze(1)], dim=1).flatten(0, 1)  # (B * (N + 1), 3, h, w)
        f_image = F.normalize(self.clip.encode_image(self._normalise(images)).float(), dim=-1)
        f_image = f_image.view(batch_size, num_crops + 1, 1, -1)  # (B, N + 1, 1, D)
        logits = self.clip.logit_scale.float().exp() * (f_image * f_text).sum(-1)  # (B, N + 1, 5)
        distribution = logits[:, -1].softmax(-1)
        if num_crops:
            distribution = (logits[:, :-1].mean(1).softmax(-1) + distribution) / 2  # (B, 5)
        levels = torch.arange(1, len(LEVEL_PROMPTS) + 1, device=distribution.device)
        return ((distribution * levels).sum(-1) - 1) / 4

    def _resize(self, images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        if tuple(images.shape[-2:]) == tuple(size):
            return images
        return F.interpolate(images, size, mode=self.config.interpolation, antialias=True, align_corners=False)

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        return ((images - self.pixel_mean) / self.pixel_std).to(self.clip.logit_scale.dtype)

    def _text_parameters(self) -> list[torch.nn.Parameter]:
        return [p for name, p in self.clip.named_parameters() if not name.startswith(("visual.", "logit_"))]

    def _encode_text(self, texts: list[str]) -> torch.Tensor:
        """Unit embeddings (len(texts), D) in fp32; kept by text unless the text tower is being trained."""
        device = self.clip.logit_scale.device
        parameters = self._text_parameters()
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
            return F.normalize(self.clip.encode_text(self._tokenize(texts).to(device)).float(), dim=-1)
        # In-place changes (optimizer steps, load_state_dict) count a tensor's version up; moves change its device.
        state = (device, [parameter.dtype for parameter in parameters], [p._version for p in parameters])
        if state != self._text_cache_state or len(self._text_cache) > CACHE_LIMIT:
            self._text_cache, self._text_cache_state = {}, state
        if unknown := [text for text in dict.fromkeys(texts) if text not in self._text_cache]:
            # Outside inference mode: what is kept may be used in a graph later.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
                for text in unknown:  # alone: a batch rounds by its size, and a resumed run has others new to it
                    features = self.clip.encode_text(self._tokenize([text]).to(device))[0]
                    self._text_cache[text] = F.normalize(features.float(), dim=-1)
        return torch.stack([self._text_cache[text] for text in texts])

    def _tokenize(self, texts: list[str]) -> torch.Tensor:
        """Token ids (len(texts), context length); the first text that is too long is reported, once."""
        if self.tokenizer is None:
            raise ValueError("IPCE has no tokenizer: build it with from_pretrained or from_open_clip.")
        if not self._warned_of_truncation:
            counts = token_counts(self.tokenizer, texts)
            self._warned_of_truncation = warn_of_truncation(texts, counts, self.tokenizer.context_length)
        return self.tokenizer(texts)

    @classmethod
    def from_open_clip(
        cls, clip_model: str, clip_pretrained: str | None = None, head: str = "alignment_structure", **config: Any
    ) -> "IPCE":
        """IPCE around a pretrained open_clip model, with an untrained head.

        `clip_model` is an open_clip model name with `clip_pretrained` a tag (downloaded) or a local weights file, or
        a local folder ("local-dir:PATH" or just PATH) or "hf-hub:REPO", which bring their own weights. `config`:
        further arguments of the constructor. Raises ValueError if the model or its weights cannot be found.
        """
        clip, clip_config, tokenizer, preprocess = load_open_clip(clip_model, clip_pretrained)
        config = {
            "image_mean": list(preprocess["mean"]),
            "image_std": list(preprocess["std"]),
            "interpolation": preprocess["interpolation"] if preprocess["interpolation"] == "bilinear" else "bicubic",
        } | config
        model = cls(clip_config, head=head, **config)
        model.clip.load_state_dict(clip.state_dict())
        model.tokenizer = tokenizer
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "IPCE":
        """Loads a saved IPCE to fp32, in eval mode. Raises ValueError if a tensor is missing or does not belong."""
        path = str(pretrained_model_name_or_path)
        model = load_strictly(super().from_pretrained, path, **kwargs)
        if model.tokenizer is None:
            clip_config = model.config.clip_config
            if os.path.isdir(path):
                folder = Path(path, "tokenizer")
                if not folder.is_dir():
                    raise ValueError(f"Expected the evaluator's tokenizer in {folder}, found no such folder.")
                model.tokenizer = build_tokenizer(clip_config, folder)
            else:
                model.tokenizer = build_tokenizer(clip_config, path, subfolder="tokenizer")
        return model

    def save_pretrained(self, save_directory: str | Path, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        """Writes config.json, safetensors (the CLIP in `dtype`, e.g. torch.float16, if given) and the tokenizer."""
        model = self
        if dtype is not None:
            model = copy.deepcopy(self)
            model.clip.to(dtype)
        super(IPCE, model).save_pretrained(save_directory, **kwargs)
        if (
            self.tokenizer is not None
            and hasattr(self.tokenizer, "save_pretrained")
            and kwargs.get("is_main_process", True)
        ):
            self.tokenizer.save_pretrained(str(Path(save_directory, "tokenizer")))
