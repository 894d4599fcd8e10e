"""A training that is killed, at any moment and as often as one likes, ends as the one that was left alone."""

import os
import random
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import EXAMPLES, launch_command, run_script


SCRIPT = EXAMPLES / "train_acpo_lora_sd.py"
OPTIONS = {"max_train_steps": 40, "checkpointing_steps": 1, "checkpoints_total_limit": 2, "lr_scheduler": "cosine"}
KILLS = 30


def start(flags):
    command, environment = launch_command(SCRIPT, *flags)
    # A session of its own: the launcher and the training die together, as when a machine goes down.
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def resume(folder):
    return {"resume_from_checkpoint": "latest"} if any(folder.glob("checkpoint-*[0-9]")) else {}


def assert_equal_loras(tmp_path, *names):
    whole, other = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in names)
    assert whole.keys() == other.keys() and all(torch.equal(whole[name], other[name]) for name in whole)


def test_sigterm_saves_a_checkpoint_and_the_run_goes_on_from_it(sd_flags, tmp_path):
    options = OPTIONS | {"max_train_steps": 12, "checkpointing_steps": 1000}
    run_script(SCRIPT, *sd_flags("whole", **options))
    process = start(sd_flags("stopped", **options))
    log = tmp_path / "log"
    with open(log, "w") as file:
        for line in process.stdout:  # the first step is done once its loss stands in the progress bar
            file.write(line)
            if "grad_norm=" in line:
                break
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=120)
    (checkpoint,) = (tmp_path / "stopped").glob("checkpoint-*")
    assert 1 <= int(checkpoint.name.removeprefix("checkpoint-")) < 12
    assert not (tmp_path / "stopped" / "pytorch_lora_weights.safetensors").exists()
    run_script(SCRIPT, *sd_flags("stopped", **options, resume_from_checkpoint="latest"))
    assert_equal_loras(tmp_path, "whole", "stopped")


@pytest.mark.slow
def test_thirty_kills_at_random_moments_change_nothing(sd_flags, tmp_path):
    run_script(SCRIPT, *sd_flags("whole", **OPTIONS))
    rng, deaths, runs = random.Random(0), 0, 0
    while deaths < KILLS:
        folder = tmp_path / f"killed-{runs}"
        process = start(sd_flags(folder.name, **OPTIONS, **resume(folder)))
        # Start-up takes longest by far; four in five kills shall meet the training, its checkpoints or the final save.
        delay = rng.uniform(0, 10)
        if rng.random() < 0.8:
            before = set(folder.glob("checkpoint-*"))
            while process.poll() is None and set(folder.glob("checkpoint-*")) <= before:
                time.sleep(0.005)
            delay = rng.uniform(0, 0.5)
        try:
            output, _ = process.communicate(timeout=delay)
            assert process.returncode == 0, output[-4000:]  # it came to its end before the kill
            assert_equal_loras(tmp_path, "whole", folder.name)
            runs += 1
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            deaths += 1
    run_script(SCRIPT, *sd_flags(folder.name, **OPTIONS, **resume(folder)))
    assert_equal_loras(tmp_path, "whole", folder.name)
