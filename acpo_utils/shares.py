"""Which part of a step a process takes: N processes do in one micro-step what one process does in N of its own."""

from collections.abc import Iterator


def share(micro_step: int, accelerator) -> int:
    """Which of the step's batches this process takes in `micro_step`: the same ones however they are split up."""
    return micro_step * accelerator.num_processes + accelerator.process_index


def own_batches(first_step: int, last_step: int, batch_size: int, accelerator) -> Iterator[range]:
    """The samples of this process's batches, in order, from step `first_step` to before `last_step`."""
    shares_per_step = accelerator.gradient_accumulation_steps * accelerator.num_processes
    first = first_step * shares_per_step + accelerator.process_index
    for number in range(first, last_step * shares_per_step, accelerator.num_processes):
        yield range(batch_size * number, batch_size * (number + 1))
