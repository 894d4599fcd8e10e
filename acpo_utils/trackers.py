"""Pictures in the trackers that can show them."""

import torch


def log_images(accelerator, name: str, images: torch.Tensor, step: int) -> None:
    """`images` (N, 3, H, W) in [0, 1] on the CPU to TensorBoard and wandb, where they are in use."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_images(name, images.numpy(), step)
        if tracker.name == "wandb":
            tracker.log_images({name: [image.permute(1, 2, 0).numpy() for image in images]}, step=step)
