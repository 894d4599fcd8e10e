"""Asks accelerate and a training script whether they take some flags, before the first of many runs.

`check_flags` starts this module in a process of its own, so that what the script imports is gone afterwards.
"""

import contextlib
import io
import json
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def check_flags(
    script: str | Path, accelerate_flags: Sequence[str], flag_lists: Sequence[Sequence[str]]
) -> list[dict]:
    """What the script's own `parse_args()` makes of each list of flags: {"error": one line or None, "args": dict}.

    The script is loaded once; neither its `main` nor anything after `if __name__ == "__main__"` runs.
    Raises ValueError, in one line, if `accelerate launch` does not take its flags, if the script cannot be loaded, or
    if it has no function `parse_args`.
    """
    question = json.dumps([list(accelerate_flags), [list(flags) for flags in flag_lists]])
    command = [sys.executable, "-m", "acpo_utils.ablations.check", str(script)]
    found = subprocess.run(command, input=question, capture_output=True, text=True)
    if found.returncode:
        lines = found.stderr.strip().splitlines() or [f"exit status {found.returncode}"]
        raise ValueError(f"{script} cannot be asked for its flags: {lines[-1]}")
    launcher, *answers = json.loads(found.stdout.splitlines()[-1])
    if launcher["error"]:
        raise ValueError(f"accelerate launch does not take {' '.join(accelerate_flags)}: {launcher['error']}")
    return answers


def _ask(parse: Callable) -> dict:
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return {"error": None, "args": vars(parse())}
    except (SystemExit, ValueError) as error:
        text = messages.getvalue() or str(error)
        return {"error": " ".join(text.rpartition("error: ")[2].split()), "args": {}}


def _main(script: str) -> None:
    from accelerate.commands.launch import launch_command_parser

    sys.path[0] = str(Path(script).resolve().parent)  # as when the script is started
    accelerate_flags, flag_lists = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        answers = [_ask(lambda: launch_command_parser().parse_args([*accelerate_flags, script]))]
        sys.argv = [script]
        parse_args = runpy.run_path(script, run_name="acpo_ablation_check").get("parse_args")
        if parse_args is None:
            raise SystemExit("expected a training script with a function parse_args, found none")
        for flags in flag_lists:
            sys.argv = [script, *flags]
            answers.append(_ask(parse_args))
    print(json.dumps(answers, default=str))


if __name__ == "__main__":
    _main(sys.argv[1])
