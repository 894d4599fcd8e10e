"""Callables for `--evaluator python:tests.guides:NAME`."""

import torch


calls = 0


def breaks_after_the_contract_check(images, prompts=None):
    """A score that keeps the contract when it is checked (two calls) and is not finite in training."""
    global calls
    calls += 1
    score = images.flatten(1).mean(1).clamp(0.01, 0.99)
    return score if calls <= 2 else score * torch.nan


def brightness(images, prompts=None):
    """Differs from prompt to prompt, as noises do, so that a paired t-test has something to test."""
    return images.flatten(1).mean(1).clamp(0.01, 0.99)


def darkness(images, prompts=None):
    """A judge that falls wherever the guide `brightness` rises."""
    return 1 - brightness(images)
