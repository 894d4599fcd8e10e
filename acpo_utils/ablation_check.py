"""Asks a training script whether it takes some flags, before the first of many runs.

`check_flags` starts this module in a process of its own, so that what the script imports is gone afterwards.
"""

import contextlib
import io
import json
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def check_flags(script: str | Path, flag_lists: Sequence[Sequence[str]]) -> list[dict]:
    """What the script's own `parse_args()` makes of each list of flags: {"error": one line or None, "args": dict}.

    The script is loaded once, and neither its `main` nor anything after `if __name__ == "__main__"` runs.
    Raises ValueError if it cannot be loaded, or has no function `parse_args`.
    """
    command = [sys.executable, "-m", "acpo_utils.ablation_check", str(script)]
    found = subprocess.run(
        command, input=json.dumps([list(flags) for flags in flag_lists]), capture_output=True, text=True
    )
    if found.returncode:
        lines = found.stderr.strip().splitlines() or [f"exit status {found.returncode}"]
        raise ValueError(f"{script} cannot be asked for its flags: {lines[-1]}")
    return json.loads(found.stdout.splitlines()[-1])


def _parse(parse_args, script: str, flags: list[str]) -> dict:
    sys.argv = [script, *flags]
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return {"error": None, "args": vars(parse_args())}
    except (SystemExit, ValueError) as error:
        text = messages.getvalue() or str(error)
        return {"error": " ".join(text.rpartition("error: ")[2].split()), "args": {}}


def _main(script: str) -> None:
    sys.path[0] = str(Path(script).resolve().parent)  # as when the script is started
    flag_lists = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        sys.argv = [script]
        parse_args = runpy.run_path(script, run_name="acpo_ablation_check").get("parse_args")
        if parse_args is None:
            raise SystemExit("expected a training script with a function parse_args, found none")
        answers = [_parse(parse_args, script, flags) for flags in flag_lists]
    print(json.dumps(answers, default=str))


if __name__ == "__main__":
    _main(sys.argv[1])
