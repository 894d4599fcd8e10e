"""Randomness that is a pure function of where it is drawn: a resumed run repeats an uninterrupted one, and N processes do
together what one does with N times their batch."""

from collections.abc import Iterator

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor


def step_generator(seed: int, *position: int) -> torch.Generator:
    """A CPU generator for one place of a run, such as (step, micro-step): the same numbers whatever ran before.

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


class SharedGenerator(torch.Generator):
    """A CPU generator that every process seeds alike, and that knows which of them it is in.

    `batch_randn` and `batch_randint` draw the whole batch's numbers with it and keep the process's own rows, so that a
    sample has the same noise however many processes there are. What is not drawn row by row is the same in all of them.
    """

    rank, num_processes = 0, 1


def shared_generator(seed: int, step: int, micro_step: int, accelerator) -> SharedGenerator:
    """The generator of one batch of a run, the same numbers whatever ran before (`step_generator`)."""
    generator = SharedGenerator()
    generator.set_state(step_generator(seed, step, micro_step, 0).get_state())
    generator.rank, generator.num_processes = accelerator.process_index, accelerator.num_processes
    return generator


def batch_randn(shape: tuple[int, ...], generator: torch.Generator | None, device, dtype) -> torch.Tensor:
    """`shape` (B, ...) normal numbers: this process's rows of those of the whole batch."""
    rows, num_processes = own_rows(shape[0], generator)
    drawn_on = generator.device if generator is not None else torch.device(device)
    return move_drawn(randn_tensor((shape[0] * num_processes, *shape[1:]), generator, drawn_on, dtype)[rows], device)


def batch_randint(high: int, batch_size: int, generator: torch.Generator | None, device) -> torch.Tensor:
    """(B,) integers, uniform in 0 <= n < high: this process's rows of those of the whole batch."""
    rows, num_processes = own_rows(batch_size, generator)
    drawn_on = generator.device if generator is not None else device
    drawn = torch.randint(high, (batch_size * num_processes,), generator=generator, device=drawn_on)
    return move_drawn(drawn[rows], device)


def batch_rand(batch_size: int, generator: torch.Generator | None, device) -> torch.Tensor:
    """(B,) numbers in fp32, uniform in 0 <= u < 1: this process's rows of those of the whole batch."""
    rows, num_processes = own_rows(batch_size, generator)
    drawn_on = generator.device if generator is not None else device
    return move_drawn(torch.rand(batch_size * num_processes, generator=generator, device=drawn_on)[rows], device)


def move_drawn(drawn: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`drawn` on `device`. An ordinary copy to a GPU would hold the host until the GPU has done all that it was given."""
    if drawn.device.type == "cpu" and torch.device(device).type == "cuda":
        return drawn.pin_memory().to(device, non_blocking=True)
    return drawn.to(device)


def own_rows(batch_size: int, generator: torch.Generator | None) -> tuple[slice, int]:
    """Which rows of the whole batch are this process's, `batch_size` of them, and the number of processes."""
    rank, num_processes = getattr(generator, "rank", 0), getattr(generator, "num_processes", 1)
    return slice(rank * batch_size, (rank + 1) * batch_size), num_processes


def process_batches(first_step: int, last_step: int, batch_size: int, accelerator) -> Iterator[range]:
    """The samples of this process's batches, in order, from step `first_step` to before `last_step`."""
    batches_per_step = accelerator.gradient_accumulation_steps * accelerator.num_processes
    first = first_step * batches_per_step + accelerator.process_index
    for number in range(first, last_step * batches_per_step, accelerator.num_processes):
        yield range(batch_size * number, batch_size * (number + 1))
