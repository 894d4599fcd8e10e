"""What the VAE's encoder and the text encoder say of a data set, computed once and kept on disk in safetensors."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from acpo_utils.data.captioned import token_ids
from acpo_utils.data.pictures import fit_and_locate, read_image, scaled_size
from acpo_utils.files import atomic_write
from acpo_utils.randomness import EpochOrder


ROWS_PER_FILE = 256


class CachedLatents(torch.utils.data.Dataset):
    """`CaptionedImages` of the same arguments, but with what the encoders made of each item: the same rows in the same
    order, the same flips and captions. Crops are central: a random one would be another image every time.

    Items are {"latent_moments": (2C, h, w), mean and log variance of the VAE's posterior, "prompt": str}, what
    `encode_prompts` says of the caption, such as "prompt_embeds" (tokens, dim), both in `dtype`, and what `describe_crop`
    says, as it is. `build` has to be called before the first one is read.

    Args:
        dataset, tokenizer, resolution, num_samples, seed, random_flip, image_column, caption_column, describe_crop: as
            there. folder: where the files are, or will be. dtype: of what is kept.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        tokenizer,
        resolution: int,
        folder: str | Path,
        num_samples: int,
        seed: int = 0,
        random_flip: bool = False,
        image_column: str = "image",
        caption_column: str = "text",
        dtype: torch.dtype = torch.float32,
        describe_crop: Callable[..., dict[str, torch.Tensor]] | None = None,
    ):
        self.dataset, self.tokenizer, self.folder = dataset, tokenizer, Path(folder)
        self.resolution, self.num_samples, self.seed, self.dtype = resolution, num_samples, seed, dtype
        self.random_flip, self.image_column, self.caption_column = random_flip, image_column, caption_column
        self._texts = dataset.select_columns(caption_column)  # without the images' bytes
        self._row = EpochOrder(len(dataset), seed)
        self._open_files = {}
        self.describe_crop = describe_crop

    def build(self, vae, text_encoder, accelerator, encode_prompts: Callable[..., dict[str, torch.Tensor]]) -> None:
        """Computes what is not there yet, each process its share of the files, and then waits for the others.

        Args:
            encode_prompts: (what `token_ids` gives, text_encoder) -> {name: (B, ...)}, a family's own.

        Raises ValueError if the folder holds a cache of other models, data or settings.
        """
        key = self._key(vae, text_encoder)
        description = self.folder / "cache.json"
        if description.is_file():
            found = json.loads(description.read_text())
            different = [name for name in key if found.get(name) != key[name]]
            if different:
                reasons = "; ".join(f"{name} {found.get(name)} there, now {key[name]}" for name in different)
                raise ValueError(
                    f"{self.folder} holds latents of another run ({reasons}): remove it or choose another."
                )
        elif accelerator.is_main_process:
            with atomic_write(description) as temporary:
                temporary.write_text(json.dumps(key, indent=2))
        accelerator.wait_for_everyone()
        files = range(-(-len(self.dataset) // ROWS_PER_FILE))[accelerator.process_index :: accelerator.num_processes]
        missing = [number for number in files if not _is_readable(self._file(number))]
        for number in tqdm(missing, desc="Caching latents", disable=not accelerator.is_local_main_process):
            rows = range(number * ROWS_PER_FILE, min((number + 1) * ROWS_PER_FILE, len(self.dataset)))
            tensors = {}
            for row in rows:
                tensors |= self._encode(row, vae, text_encoder, encode_prompts)
            with atomic_write(self._file(number)) as temporary:
                save_file(tensors, temporary)
        accelerator.wait_for_everyone()

    @torch.no_grad()
    def _encode(self, row: int, vae, text_encoder, encode_prompts) -> dict[str, torch.Tensor]:
        cells = self.dataset[row]
        image = read_image(cells[self.image_column])
        pixel_values, (top, left) = fit_and_locate(image, self.resolution, True, False, None)  # (3, R, R)
        flips = [pixel_values, pixel_values.flip(-1)] if self.random_flip else [pixel_values]
        # Image by image: what is kept does not depend on how many processes computed it.
        moments = [vae.encode(flip[None].to(vae.device)).latent_dist.parameters[0] for flip in flips]
        captions = cells[self.caption_column]
        captions = [captions] if isinstance(captions, str) else captions
        ids = [token_ids(self.tokenizer, [caption]) for caption in captions]  # caption by caption, for the same reason
        conditions = [encode_prompts({name: i.to(vae.device) for name, i in one.items()}, text_encoder) for one in ids]
        kept = {"moments": torch.stack(moments).to("cpu", self.dtype)}  # (1 or 2, 2C, h, w)
        for name, value in conditions[0].items():  # (captions, ...), such as prompt_embeds (captions, tokens, dim)
            if isinstance(value, list):  # each caption's of its own length: kept by themselves
                for number, condition in enumerate(conditions):
                    kept[f"caption {number} {name}"] = condition[name][0].to("cpu", self.dtype)
            else:
                kept[name] = torch.cat([condition[name] for condition in conditions]).to("cpu", self.dtype)
        if self.describe_crop is not None:
            flipped_left = scaled_size(image.size, self.resolution)[0] - self.resolution - left
            crops = [(top, left), (top, flipped_left)][: len(flips)]
            size, target = (image.height, image.width), (self.resolution, self.resolution)
            described = [self.describe_crop(size, crop, target) for crop in crops]
            for name in described[0]:  # (1 or 2, ...)
                kept[f"crop {name}"] = torch.stack([each[name] for each in described])
        return {f"{name} {row}": tensor.contiguous() for name, tensor in kept.items()}

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, n: int) -> dict:
        if not 0 <= n < self.num_samples:
            raise IndexError(f"item {n} of {self.num_samples}")
        row, rng = self._row(n), np.random.default_rng((self.seed, 1, n))
        number = row // ROWS_PER_FILE
        if number not in self._open_files:  # not before: a worker of the data loader opens its own
            file = safe_open(self._file(number), framework="pt")
            self._open_files[number] = file, sorted({key.rpartition(" ")[0] for key in file.keys()})
        file, names = self._open_files[number]
        flip = int(self.random_flip and rng.random() < 0.5)
        captions = self._texts[row][self.caption_column]
        several = not isinstance(captions, str)
        chosen = int(rng.integers(len(captions))) if several else 0
        item = {"prompt": captions[chosen] if several else captions}
        for name in names:
            if name.startswith("caption "):
                _, caption, condition = name.split()
                if int(caption) == chosen:  # others a row may not have
                    item[condition] = file.get_tensor(f"{name} {row}")
                continue
            kept = file.get_slice(f"{name} {row}")
            if name == "moments":
                item["latent_moments"] = kept[flip]
            elif name.startswith("crop "):
                item[name.removeprefix("crop ")] = kept[flip]
            else:
                item[name] = kept[chosen]
        return item

    def _file(self, number: int) -> Path:
        return self.folder / f"latents-{number:05d}.safetensors"

    def _key(self, vae, text_encoder) -> dict:
        key = {
            "vae": _digest(vae),
            "text encoder": _digest(text_encoder),
            "data": self.dataset._fingerprint,
            "resolution": self.resolution,
            "flips": self.random_flip,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        if isinstance(self.tokenizer, list):  # one of them may be told how long captions are: --max_sequence_length
            key["tokens"] = [tokenizer.model_max_length for tokenizer in self.tokenizer]
        return key


def _is_readable(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return True
    except (OSError, SafetensorError):  # not there, or damaged: it is computed
        return False


def _digest(model: torch.nn.Module) -> str:
    """Of the weights themselves: a folder of the same name may have been trained again."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
