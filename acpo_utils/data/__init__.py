"""Images, captions and prompts: everything is checked before training, and item n depends on (seed, n) alone."""

from acpo_utils.data.captioned import (
    CaptionedImages,
    collate,
    load_captioned_images,
    to_device,
    token_ids,
    tokenize,
)
from acpo_utils.data.latent_cache import CachedLatents
from acpo_utils.data.pictures import check_images, fit_image, read_image, to_rgb
from acpo_utils.data.prompts import Prompts, read_prompts
from acpo_utils.data.unconditional import (
    UnconditionalImages,
    hold_out,
    load_unconditional_images,
    load_validation_images,
    to_tensor,
)


__all__ = [
    "CachedLatents",
    "CaptionedImages",
    "Prompts",
    "UnconditionalImages",
    "check_images",
    "collate",
    "fit_image",
    "hold_out",
    "load_captioned_images",
    "load_unconditional_images",
    "load_validation_images",
    "read_image",
    "read_prompts",
    "to_device",
    "to_rgb",
    "to_tensor",
    "token_ids",
    "tokenize",
]
