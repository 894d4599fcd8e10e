"""Metrics that are not scores of one image: distances between sets of images, and the error of the model's prediction.

Images are files, read batch by batch: (B, 3, H, W) uint8 as the networks of torchmetrics want them.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image

from acpo_utils.data import to_rgb
from acpo_utils.denoising_error import MSE_TIMESTEPS, denoising_errors, fixed_noise


def read_images(files: Sequence[Path], batch_size: int = 32) -> Iterator[torch.Tensor]:
    """The images of `files`, all of one size, as (B, 3, H, W) uint8, in order.

    Raises ValueError naming the first file that cannot be read or has another size than those before it.
    """
    shape = None
    for start in range(0, len(files), batch_size):
        batch = []
        for file in files[start : start + batch_size]:
            try:
                with Image.open(file) as image:
                    batch.append(torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1))
            except (OSError, SyntaxError) as error:
                raise ValueError(f"Image {file} cannot be read: {' '.join(str(error).split())}") from error
            shape = shape or batch[-1].shape
            if batch[-1].shape != shape:
                height, width = shape[1:]
                raise ValueError(f"Image {file}: expected {width} x {height} pixels as in the files before it.")
        yield torch.stack(batch)


@torch.no_grad()
def image_features(network: torch.nn.Module, files: Sequence[Path], device, batch_size: int = 32) -> torch.Tensor:
    """`network` on (B, 3, H, W) uint8 images, (N, D) in fp32 on the CPU."""
    return torch.cat([network(batch.to(device)).float().cpu() for batch in read_images(files, batch_size)])


def inception(feature: str, device) -> torch.nn.Module:
    """Inception v3 as FID's authors used it: `feature` "2048" for FID and KID, "logits_unbiased" for IS.

    torchmetrics has the network, torch-fidelity its weights, which are downloaded when they are first used.

    Raises ImportError, with the pip command, if a package is missing, and ValueError if the weights cannot be had.
    """
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        with _no_pickles():
            return NoTrainInceptionV3("inception-v3-compat", [feature]).to(device)
    except ImportError as error:
        raise ImportError("Inception's weights need two packages: pip install torchmetrics torch-fidelity") from error
    except (OSError, RuntimeError) as error:  # network, a damaged file
        raise ValueError(f"Inception's weights cannot be loaded: {' '.join(str(error).split())}") from error


@contextmanager
def _no_pickles() -> Iterator[None]:
    """torch-fidelity asks torch.load to unpickle whatever was downloaded; of a file of tensors no more is needed."""
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        os.environ.pop(variable) if before is None else os.environ.update({variable: before})


def fid(real: torch.Tensor, generated: torch.Tensor) -> float:
    """Frechet Inception Distance (Heusel et al. 2017) between two sets of features, by torchmetrics. 0 is best.

    Args:
        real: (N, D). generated: (M, D). With fewer images than D the covariances are singular and the value is biased
            upwards: compare only sets of equal size.
    Raises:
        ValueError: for fewer than 2 rows, or features of different width.
        ImportError: if torchmetrics is not installed.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    if real.ndim != 2 or real.shape[1:] != generated.shape[1:] or min(len(real), len(generated)) < 2:
        shapes = f"{tuple(real.shape)} and {tuple(generated.shape)}"
        raise ValueError(f"FID needs two feature matrices of one width with at least 2 images each, found {shapes}")
    network = torch.nn.Identity()
    network.num_features = real.shape[1]
    metric = FrechetInceptionDistance(feature=network).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return metric.compute().item()


def inception_score(logits: torch.Tensor, splits: int = 10, seed: int = 0) -> float:
    """Inception Score (Salimans et al. 2016): the mean over `splits` of exp E KL(p(y|x) || p(y)), by torchmetrics.

    Args:
        logits: (N, classes), N >= `splits`. At least 1, at most the number of classes; higher is better.
    Raises:
        ValueError: for fewer images than splits. ImportError: if torchmetrics is not installed.
    """
    from torchmetrics.image.inception import InceptionScore

    if len(logits) < splits:
        raise ValueError(f"IS needs at least {splits} images, one for each of its splits, found {len(logits)}")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Metric `InceptionScore` will save all")
        warnings.filterwarnings("ignore", message=r"std\(\): degrees of freedom")  # of one split
        torch.manual_seed(seed)  # the splits are drawn from the global generator, which fork_rng puts back
        metric = InceptionScore(feature=torch.nn.Identity(), splits=splits)
        metric.update(logits.double())
        return metric.compute()[0].item()


@torch.no_grad()
def prediction_errors(
    pipeline, files: Sequence[Path], prompts: Sequence[str] | None, seed: int = 0, batch_size: int = 8
) -> torch.Tensor:
    """MSE of the paper's table 1 by `denoising_errors`, batch by batch: two models are asked the same.

    Args:
        pipeline: a Stable Diffusion pipeline, or an unconditional one (`prompts` None, no VAE).
        files: N images of R x R pixels, R the model's own resolution. prompts: N strings.
    Returns:
        (N,) errors, in fp32 on the CPU; lower is better.
    """
    unet, device = pipeline.unet, pipeline.device
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)  # whatever it is sampled with
    errors, rows = [], range(0)
    for images in read_images(files, batch_size):
        rows = range(rows.stop, rows.stop + len(images))
        pixels = (images.to(device).float() / 127.5 - 1).to(unet.dtype)  # (B, 3, R, R) in [-1, 1]
        conditions = ()
        if prompts is not None:
            texts = list(prompts[rows.start : rows.stop])
            conditions = (pipeline.encode_prompt(texts, device, 1, False)[0],)  # (B, tokens, dim)  c
            mean_std = pipeline.vae.encode(pixels.to(pipeline.vae.dtype)).latent_dist
            sampled = mean_std.mean + mean_std.std * fixed_noise(mean_std.mean, seed, rows, MSE_TIMESTEPS)
            pixels = (sampled * pipeline.vae.config.scaling_factor).to(unet.dtype)  # (B, 4, h, w)  x0
        pixels = pixels[:, : unet.config.in_channels]  # of a model of grey images

        def predict(noisy, timesteps, conditions=conditions):
            return unet(noisy, timesteps, *conditions, return_dict=False)[0]

        errors.append(denoising_errors(predict, scheduler, pixels, rows, seed).cpu())
    return torch.cat(errors)
