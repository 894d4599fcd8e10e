"""Scripts of examples/ as a user runs them, in this process or by `accelerate launch`.

In this process is the rule: a new interpreter imports torch and diffusers again, for ten times what a tiny training takes.
`launch` is for what a process of its own shows: that the command starts, several processes, signals, an exit code.
To replace something in a script, import it (`import train_acpo_lora_sd as script`), and within `fresh_process()` call
`script.main(script.parse_args(flags))`.
"""

import contextlib
import io
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState

from tests import REPOSITORY


EXAMPLES = REPOSITORY / "examples"
# What accelerate's launcher tells a process on a machine without GPUs.
ON_CPU = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}


def command_line(**options) -> list[str]:
    """{"rank": 4, "judge": ["a", "b"], "random_flip": True} -> --rank 4 --judge a b --random_flip. None: left out."""
    words = []
    for name, value in options.items():
        if value is None:
            continue
        words.append(f"--{name}")
        if value is not True:
            words += map(str, value if isinstance(value, (list, tuple)) else [value])
    return words


@contextlib.contextmanager
def fresh_process():
    """What a script finds in a process of its own: accelerate on the CPU, not used yet. Then all is as it was before."""
    threads, sigterm = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with patch.dict(os.environ, ON_CPU), patch.object(sys, "argv", list(sys.argv)):
            yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_num_threads(threads)
        signal.signal(signal.SIGTERM, sigterm)


def run_script(script: Path, *flags) -> str:
    """The script's own `__main__` block, in this process. Returns what it printed and logged, from INFO on."""
    output = io.StringIO()
    log = logging.StreamHandler(output)
    root = logging.getLogger()
    level = root.level
    root.addHandler(log)
    root.setLevel(logging.INFO)
    try:
        with fresh_process(), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            sys.argv = [str(script), *map(str, flags)]
            runpy.run_path(str(script), run_name="__main__")
    except BaseException:
        print(output.getvalue())  # pytest shows it beneath the traceback
        raise
    finally:
        root.removeHandler(log)
        root.setLevel(level)
    return output.getvalue()


def refused(script: Path, *flags) -> str:
    """Runs the script, which is expected to stop by an error of one line. Returns that line, from "error: " on."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            run_script(script, *flags)
    except SystemExit as stop:
        assert stop.code, "it stopped without an error"
        if isinstance(stop.code, str):
            line = stop.code.strip()
        else:  # argparse's, below the usage
            line = "error: " + output.getvalue().strip().splitlines()[-1].partition("error: ")[2]
    else:
        raise AssertionError(f"{Path(script).name} ran to its end, expected an error")
    assert line.startswith("error: ") and "\n" not in line, f"expected an error of one line, found {line!r}"
    return line


def free_port() -> int:
    """A port for processes to meet at: a fixed one may be in use by a test beside this one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_command(script: Path, *flags, num_processes: int = 1) -> tuple[list[str], dict[str, str]]:
    """`accelerate launch` on so many CPU processes, and its environment."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    # With --cpu the launcher starts one process whatever --num_processes says; with --multi_gpu it starts them all.
    processes = ["--multi_gpu", "--main_process_port", str(free_port())] if num_processes > 1 else ["--cpu"]
    command += ["--dynamo_backend", "no", *processes, "--num_processes", str(num_processes), str(script)]
    # The repository's folder: evaluators of the form python:tests.guides:NAME are imported there.
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return command + list(map(str, flags)), os.environ | ON_CPU | {"PYTHONPATH": path}


def launch(script: Path, *flags, num_processes: int = 1, cwd: Path | None = None, fails: bool = False) -> str:
    """Runs the script by `accelerate launch`, to its end or, if it `fails`, to an exit code other than 0; its output."""
    command, environment = launch_command(script, *flags, num_processes=num_processes)
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=600)
    output = run.stdout + run.stderr
    assert (run.returncode != 0) == fails, output[-4000:]
    return output
