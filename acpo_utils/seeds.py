"""Randomness that is a pure function of where it is drawn, so that a resumed run repeats an uninterrupted one."""

import numpy as np
import torch


def step_generator(seed: int, *position: int) -> torch.Generator:
    """A CPU generator for one place of a run, such as (step, micro-step, rank): the same numbers whatever ran before.

    On the CPU also for GPU runs, as diffusers' `randn_tensor` recommends, so that devices draw the same noise.
    """
    state = np.random.SeedSequence([seed, *position]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
