"""TwoStreamIQA: image quality without prompts, from an image and its gradient map (the paper's eq. 4)."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from acpo_utils.files import load_strictly


PATCH_SIZE = 32  # pixels, as published; the least that an image may measure


def gradient_map(images: torch.Tensor) -> torch.Tensor:
    """Sobel magnitude (B, C, H, W) of every channel of `images` (B, C, H, W); a step of height 1 has magnitude 1.

    Its derivative is finite everywhere: the bare root's is infinite where an image is flat, and one flat patch would
    turn all that a guide trains into nan. Written as differences, not as a convolution, so that autocast leaves its
    precision alone: what it measures is small beside the values that it subtracts.
    """
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")  # (B, C, H + 2, W + 2); no edge at the image's border
    above, middle, below = padded[..., :-2, :], padded[..., 1:-1, :], padded[..., 2:, :]
    smooth_rows, step_rows = (above + 2 * middle + below) / 4, below - above  # (B, C, H, W + 2)
    gx = smooth_rows[..., 2:] - smooth_rows[..., :-2]
    gy = (step_rows[..., :-2] + 2 * step_rows[..., 1:-1] + step_rows[..., 2:]) / 4
    floor = 1e-3  # a quarter of one grey level
    return (gx**2 + gy**2 + floor**2).sqrt() - floor


class Encoder(torch.nn.Sequential):
    """Convolutions from an image (B, 3, H, W) to a description of each of its patches (B, C, H / 16, W / 16).

    Published: patches of 32 px cut from the image, each by itself. Here they stand 16 px apart and overlap, since the
    convolutions run over the whole image (each output sees 89 px): cheaper, and without seams in the gradient that a
    guide hands to the generator.
    """

    def __init__(self, widths: tuple[int, ...]):
        def convolution(inputs: int, outputs: int, kernel_size: int, stride: int) -> list[torch.nn.Module]:
            conv = torch.nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, bias=False)
            # Normalised over the data set, not over the image: contrast and strength of noise have to get through.
            return [conv, torch.nn.BatchNorm2d(outputs), torch.nn.ReLU()]

        layers = convolution(3, widths[0], 5, 2)
        for inputs, outputs in zip(widths, widths[1:]):
            layers += convolution(inputs, outputs, 3, 2) + convolution(outputs, outputs, 3, 1)
        super().__init__(*layers)


class TwoStreamIQA(ModelMixin, ConfigMixin):
    """Quality of an image in (0, 1), after the two-stream network of Yan, Gong and Zhang (2019); needs no prompt.

    One encoder reads the image, another its gradient map. Each describes the image by the mean and the standard
    deviation of what it found in the patches, and a small network fuses both descriptions into the score. Published is
    the mean of the patches' scores; but a mean hardly moves when a defect is small, however glaring.

    Args:
        widths: channels of the encoders, from half of the image's resolution down to a sixteenth.
        fusion_width: hidden units of the fusion network.
        score_range: what 0 and 1 mean in a report.
    """

    @register_to_config
    def __init__(
        self,
        widths: tuple[int, int, int, int] = (24, 48, 96, 192),
        fusion_width: int = 256,
        score_range: tuple[float, float] = (0.0, 100.0),
    ):
        super().__init__()
        if len(widths) != 4:
            raise ValueError(f"widths: expected four numbers of channels, found {tuple(widths)}.")
        self.image_encoder = Encoder(tuple(widths))
        self.gradient_encoder = Encoder(tuple(widths))
        self.fusion = torch.nn.Sequential(
            torch.nn.Linear(4 * widths[-1], fusion_width), torch.nn.ReLU(), torch.nn.Linear(fusion_width, 1)
        )

    @property
    def score_range(self) -> tuple[float, float]:
        low, high = self.config.score_range
        return low, high

    def score(self, images: torch.Tensor, prompts: list[str] | None = None) -> torch.Tensor:
        """Scores (B,) in (0, 1) of `images` (B, 3, H, W) in [0, 1], H and W from 32 px; `prompts` are ignored.

        Raises ValueError if the shape does not fit.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images: expected floats (B, 3, H, W), found {images.dtype} {tuple(images.shape)}.")
        if min(images.shape[-2:]) < PATCH_SIZE:
            found = " x ".join(map(str, images.shape[-2:]))
            raise ValueError(f"images: expected at least {PATCH_SIZE} x {PATCH_SIZE} pixels, found {found}.")
        return self(images.float())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores (B,) of `images` (B, 3, H, W) in [0, 1]."""
        return torch.sigmoid(self.fusion(self.describe(images)).squeeze(1).to(images.dtype))  # eq. 4, (B,)

    def describe(self, images: torch.Tensor) -> torch.Tensor:
        """What F of eq. 4 is given, [E_img(x); E_grad(grad x)], (B, 4 C): C the encoders' last width."""
        e_image = self._pool(self.image_encoder(images - 0.5), images.dtype)  # (B, 2 C)
        e_gradient = self._pool(self.gradient_encoder(gradient_map(images)), images.dtype)  # (B, 2 C)
        return torch.cat([e_image, e_gradient], dim=1)

    @staticmethod
    def _pool(patches: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Mean and standard deviation over the patches, (B, C, h, w) -> (B, 2 C), in full precision."""
        patches = patches.flatten(2).to(dtype)  # (B, C, h w)
        # 1e-4 keeps the root's derivative finite where all patches are alike.
        deviation = (patches.var(dim=2, unbiased=False) + 1e-4).sqrt()
        return torch.cat([patches.mean(dim=2), deviation], dim=1)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "TwoStreamIQA":
        """Loads a saved TwoStreamIQA to fp32, in eval mode. Raises ValueError if a tensor is missing or too many."""
        path = str(pretrained_model_name_or_path)
        model = load_strictly(super().from_pretrained, path, **kwargs)
        return model
