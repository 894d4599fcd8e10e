"""What a training step logs: numbers of all processes, and pictures in the trackers that can show them."""

import torch


def mean_terms(accelerator, terms: dict[str, torch.Tensor]) -> dict[str, float]:
    """The mean of each of a step's terms over its elements and the processes, which exchange them all at once.

    `late_timesteps` are left out: they say where the others were taken. To be called by every process.
    """
    names = [name for name in terms if name != "late_timesteps"]
    means = torch.stack([terms[name].detach().float().mean() for name in names])
    return dict(zip(names, accelerator.reduce(means, "mean").tolist()))


def log_images(accelerator, name: str, images: torch.Tensor, step: int) -> None:
    """`images` (N, 3, H, W) in [0, 1] on the CPU to TensorBoard and wandb, where they are in use."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_images(name, images.numpy(), step)
        if tracker.name == "wandb":
            tracker.log_images({name: [image.permute(1, 2, 0).numpy() for image in images]}, step=step)
