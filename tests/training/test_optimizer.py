"""The optimizer by its flags: AdamW and its schedule, or one line where bitsandbytes is asked for and missing."""

import sys
from types import SimpleNamespace

import pytest
import torch

from acpo_utils.training.optimizer import build_optimizer


ARGS = {
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_weight_decay": 0.1,
    "adam_epsilon": 1e-7,
    "lr_scheduler": "linear",
    "lr_warmup_steps": 2,
}


def build(**changes):
    parameters = [torch.nn.Parameter(torch.ones(2))]
    args = SimpleNamespace(**ARGS | {"use_8bit_adam": False} | changes)
    accelerator = SimpleNamespace(num_processes=2)
    return build_optimizer(parameters, accelerator, args, learning_rate=0.5, num_training_steps=10)


def test_the_flags_are_the_optimizers_and_the_schedule_counts_processes():
    optimizer, lr_scheduler = build()
    group = optimizer.param_groups[0]
    assert type(optimizer) is torch.optim.AdamW
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.8, 0.95), 0.1, 1e-7)
    rates = []
    for _ in range(20):
        rates.append(lr_scheduler.get_last_lr()[0])
        optimizer.step()
        lr_scheduler.step()
    assert rates[:5] == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.5]) and rates[12] == pytest.approx(0.25)
    assert lr_scheduler.get_last_lr()[0] == 0.0


def test_8_bit_adam_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="--use_8bit_adam needs bitsandbytes: pip install bitsandbytes"):
        build(use_8bit_adam=True)
