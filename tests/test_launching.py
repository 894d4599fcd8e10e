"""tests/launching.py: a script in this process prints, fails and leaves the process as one in a process of its own does."""

import logging
import os
import signal
import sys

import pytest
import torch

from tests.launching import command_line, fresh_process, launch, refused, run_script


SCRIPT = """
import argparse, logging, os, signal, sys, torch
from accelerate import Accelerator
from accelerate.logging import get_logger

logger = get_logger(__name__, log_level="INFO")

def main(args):
    accelerator = Accelerator()
    torch.set_num_threads(2)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["LEFT_BEHIND"] = "1"
    if args.number < 0:
        raise ValueError(f"--number must be at least 0, got {args.number}")
    print(f"{args.number} on {accelerator.device}")
    print("to stderr", file=sys.stderr)
    logger.info("logged")

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", type=int, required=True)
    try:
        main(parser.parse_args())
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


def state():
    return torch.get_num_threads(), signal.getsignal(signal.SIGTERM), dict(os.environ), list(sys.argv)


def test_command_line():
    assert command_line(a=1, b=["x", "y"], c=True, d=None, e=0) == ["--a", "1", "--b", "x", "y", "--c", "--e", "0"]


def test_a_script_in_this_process(script):
    before, level = state(), logging.getLogger().level
    assert run_script(script, "--number", 3) == "3 on cpu\nto stderr\n[RANK 0] logged\n"
    assert state() == before and logging.getLogger().level == level
    assert refused(script, "--number", -1) == "error: --number must be at least 0, got -1"
    assert refused(script) == "error: the following arguments are required: --number"
    assert state() == before
    with pytest.raises(AssertionError, match="script.py ran to its end"):
        refused(script, "--number", 3)
    with pytest.raises(SystemExit, match="must be at least 0"):
        run_script(script, "--number", -1)


def test_a_fresh_process_is_left_as_it_was_after_an_error_too():
    before = state()
    with pytest.raises(RuntimeError), fresh_process():
        os.environ["LEFT_BEHIND"] = "1"
        torch.set_num_threads(2)
        raise RuntimeError
    assert state() == before


@pytest.mark.slow
def test_a_script_launched(script):
    assert launch(script, "--number", 3, num_processes=2).count("3 on cpu") == 2
    assert "error: --number must be at least 0, got -1" in launch(script, "--number", -1, fails=True)
