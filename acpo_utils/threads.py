"""How many processor threads a run takes."""

import os

import torch


def use_all_cpus() -> None:
    """Lets torch use every core that this process may use: `accelerate launch` gives a single process one thread."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux; elsewhere a process may use all of them
    torch.set_num_threads(len(affinity(0)) if affinity else os.cpu_count())
