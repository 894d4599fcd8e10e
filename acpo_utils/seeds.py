"""Randomness that is a pure function of where it is drawn, so that a resumed run repeats an uninterrupted one."""

import numpy as np
import torch


def step_generator(seed: int, *position: int) -> torch.Generator:
    """A CPU generator for one place of a run, such as (step, micro-step, rank): the same numbers whatever ran before.

    On the CPU also for GPU runs, as diffusers' `randn_tensor` recommends, so that devices draw the same noise.
    """
    state = np.random.SeedSequence([seed, *position]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


class EpochOrder:
    """Which of `size` rows an endless run visits as its sample n: every epoch a permutation drawn from (seed, epoch)."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self._permutation = (None, None)  # the last epoch used, and its order

    def __call__(self, n: int) -> int:
        epoch, position = divmod(n, self.size)
        if self._permutation[0] != epoch:
            self._permutation = (epoch, np.random.default_rng((self.seed, 0, epoch)).permutation(self.size))
        return int(self._permutation[1][position])
