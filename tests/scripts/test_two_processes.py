"""Two processes of the real script: checkpoints with both random states, exact resume, a third process is refused."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import EXAMPLES, launch


SCRIPT = EXAMPLES / "train_acpo_lora_sd.py"


@pytest.mark.slow
def test_a_resumed_run_of_two_processes_is_the_uninterrupted_one(sd_flags, tmp_path):
    options = {"max_train_steps": 2, "checkpointing_steps": 1, "train_batch_size": 1, "learning_rate": 1e-3}
    options |= {"balance_steps": 1}
    resumed_flags = sd_flags("resumed", resume_from_checkpoint="latest", **options)
    assert "shares of the gradient: " in launch(SCRIPT, *sd_flags("whole", **options), num_processes=2)
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
    assert (tmp_path / "whole" / "checkpoint-1" / "random_states_1.pkl").is_file()
    launch(SCRIPT, *resumed_flags, num_processes=2)
    whole, resumed = (load_file(tmp_path / n / "pytorch_lora_weights.safetensors") for n in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(weight.abs().sum() > 0 for name, weight in whole.items() if "lora_B" in name)
    out = launch(SCRIPT, *resumed_flags, num_processes=3, fails=True)
    assert "is of 2 process(es), this run has 3" in out
