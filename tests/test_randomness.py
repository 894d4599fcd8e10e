"""What N processes draw and take is, put together, what one does with N times their batch."""

from argparse import Namespace

import pytest
import torch

from acpo_utils.randomness import batch_randint, batch_randn, process_batches, shared_generator, step_generator


def process(rank, num_processes, accumulation=1):
    return Namespace(process_index=rank, num_processes=num_processes, gradient_accumulation_steps=accumulation)


def draw(batch_size, rank, num_processes):
    generator = shared_generator(3, 7, 0, process(rank, num_processes))
    noise = batch_randn((batch_size, 2, 5), generator, "cpu", torch.float32)
    timesteps = batch_randint(100, batch_size, generator, "cpu")
    window = torch.randint(1000, (), generator=generator).item()
    return noise, timesteps, window, batch_randn((batch_size, 3), generator, "cpu", torch.float32)


@pytest.mark.parametrize("num_processes", [2, 3])
def test_rows_put_together_are_those_of_one_process(num_processes):
    noise, timesteps, window, last = draw(4 * num_processes, 0, 1)
    shares = [draw(4, rank, num_processes) for rank in range(num_processes)]
    assert torch.equal(torch.cat([share[0] for share in shares]), noise)
    assert torch.equal(torch.cat([share[1] for share in shares]), timesteps)
    assert {share[2] for share in shares} == {window}, "what is not drawn row by row is the same in all"
    assert torch.equal(torch.cat([share[3] for share in shares]), last)
    assert len(set(noise[:, 0, 0].tolist())) == 4 * num_processes and timesteps.max() < 100


def test_one_process_draws_what_its_generator_does():
    generator = shared_generator(3, 7, 1, process(0, 1))
    plain = step_generator(3, 7, 1, 0)
    assert torch.equal(batch_randn((4, 2), generator, "cpu", torch.float32), torch.randn(4, 2, generator=plain))
    assert torch.equal(batch_randint(9, 4, generator, "cpu"), torch.randint(9, (4,), generator=plain))
    assert batch_randn((4, 2), None, "cpu", torch.float64).dtype == torch.float64 and batch_randint(
        2, 3, None, "cpu"
    ).shape == (3,)


@pytest.mark.gpu
def test_a_gpu_gets_the_numbers_of_the_cpu():
    for draw_on in (
        lambda device: batch_randn((4, 2, 5), shared_generator(3, 7, 0, process(1, 2)), device, torch.bfloat16),
        lambda device: batch_randint(100, 4, shared_generator(3, 7, 0, process(1, 2)), device),
    ):
        assert torch.equal(draw_on("cuda").cpu(), draw_on("cpu"))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_samples_put_together_are_those_of_one_process(accumulation):
    shares = [list(process_batches(2, 5, 4, process(rank, 2, accumulation))) for rank in range(2)]
    one = list(process_batches(2, 5, 8, process(0, 1, accumulation)))
    assert [[*first, *second] for first, second in zip(*shares)] == [list(batch) for batch in one]
    assert len(one) == 3 * accumulation and one[0][0] == 2 * 8 * accumulation
