"""The runs of an ablation: one folder each, skipped when it is finished, continued when it was cut, told apart for good.

A folder holds what the training script writes, `run.log` (all its output) and `run.json`: the flags it was started
with, whether it has finished, and why it failed.
"""

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from acpo_utils.ablations.grid import read_flags
from acpo_utils.ablations.table import read_metrics
from acpo_utils.files import atomic_write


class Run(NamedTuple):
    """One training: `flags` are all of the script's but --output_dir, which is `folder`, and --resume_from_checkpoint."""

    row: str
    seed: int
    folder: Path
    script: str
    accelerate_flags: tuple[str, ...]
    flags: tuple[str, ...]


def manifest(run: Run) -> dict:
    """What makes a run the same run. Neither its folder nor the script's: both may be moved."""
    return {
        "script": Path(run.script).name,
        "accelerate_flags": list(run.accelerate_flags),
        "flags": list(run.flags),
    }


def command(run: Run) -> list[str]:
    """`accelerate launch ...`; a folder with a checkpoint is continued from its latest."""
    resume = any(path.name.partition("-")[2].isdecimal() for path in run.folder.glob("checkpoint-*"))
    options = ["--output_dir", str(run.folder), *(["--resume_from_checkpoint", "latest"] if resume else [])]
    return ["accelerate", "launch", *run.accelerate_flags, run.script, *run.flags, *options]


def run_status(run: Run) -> str:
    """ "finished", "failed", "unfinished" (cut, or running now) or "new".

    Raises ValueError if the folder holds something else: the run of other flags, or files of unknown origin.
    """
    return _status(run)[0]


def failure(run: Run) -> str | None:
    """Why the run failed, in one line, or None."""
    return _status(run)[1].get("error")


def _status(run: Run) -> tuple[str, dict]:
    file = run.folder / "run.json"
    if not file.is_file():
        names = [path.name for path in run.folder.glob("*") if not path.name.startswith(".")]  # a file being written
        if others := sorted(set(names) - {"run.log"}):
            raise ValueError(
                f"{run.folder} holds {others[0]} and no run.json: it is no run of an ablation. Choose another --output_dir."
            )
        return "new", {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        saved = {name: record[name] for name in manifest(run)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}): remove the folder {run.folder} to run it again") from error
    if saved != manifest(run):
        raise ValueError(
            f"{run.folder} holds a run of another command ({_difference(saved, manifest(run))}): choose another "
            "--output_dir, or remove that folder to run it again"
        )
    if record.get("finished") and (run.folder / "metrics.json").is_file():
        return "finished", record
    return ("failed" if record.get("error") else "unfinished"), record


def _difference(saved: dict, wanted: dict) -> str:
    """Where two manifests differ: "there tmax 100, now tmax 300"."""
    sides = []
    for record in (saved, wanted):
        own = {"script": record["script"], "accelerate": " ".join(record["accelerate_flags"]) or "none"}
        sides.append(own | read_flags(record["flags"]))
    names = [name for name in sides[0] | sides[1] if sides[0].get(name) != sides[1].get(name)]
    if not names:
        return "the same flags in another order"
    texts = [", ".join(f"{name} {side.get(name, 'not given')}" for name in names) for side in sides]
    return f"there {texts[0]}, now {texts[1]}"


def execute(run: Run) -> str:
    """Starts the run, or continues it, and waits. Returns "finished", "failed" or "running elsewhere".

    The log's file lock is held by this process and by the training: of two ablations in one folder each run is done by
    one, and a training that outlives a killed ablation is not started a second time. Any exception, Ctrl-C among them,
    ends the training with all its processes first.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / "run.log", "a+", encoding="utf-8", errors="replace") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "running elsewhere"
        if run_status(run) == "finished":  # by another process, since it was planned here
            return "finished"
        start, words = time.monotonic(), command(run)
        _write_record(run, finished=False)
        (run.folder / "metrics.json").unlink(missing_ok=True)
        log.seek(0, os.SEEK_END)
        offset = log.tell()
        log.write(f"$ {shlex.join(words)}\n")
        log.flush()
        code = _launch(words, log)
        log.seek(offset)
        error = _metrics_error(run) if code == 0 else failure_reason(log.read(), code)
        _write_record(run, finished=error is None, seconds=round(time.monotonic() - start, 1), error=error)
    return "failed" if error else "finished"


def _metrics_error(run: Run) -> str | None:
    try:
        read_metrics(run.folder / "metrics.json")
    except OSError:
        return "it ended well and left no metrics.json"
    except ValueError as error:
        return str(error)


def _write_record(run: Run, finished: bool, seconds: float | None = None, error: str | None = None) -> None:
    record = {"finished": finished}
    if seconds is not None:
        record["seconds"] = seconds
    if error is not None:
        record["error"] = error
    with atomic_write(run.folder / "run.json") as temporary:
        temporary.write_text(json.dumps(manifest(run) | record, indent=2) + "\n", encoding="utf-8")


def _launch(words: list[str], log) -> int:
    """Exit status of the command, its output in `log`; in a process group of its own, so that all of it can be ended."""
    words = [sys.executable, "-m", "accelerate.commands.launch", *words[2:]]  # of this environment, whatever the PATH
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait()
    finally:
        if process.returncode is None:
            _signal(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                pass
            _signal(process.pid, signal.SIGKILL)  # what did not listen; checkpoints are written whole or not at all
            process.wait()


def _signal(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        pass


ERROR_LINE = re.compile(r"^(\[rank\d+\]:\s*)?([\w.\-]+: )?(error: |[\w.]*(Error|Exception|Interrupt)(:|$))")
LAUNCHERS = ("CalledProcessError", "ChildFailedError")  # what accelerate says after the script has said why


def failure_reason(output: str, code: int) -> str:
    """The last line of `output` that reads like an error, else the exit status `code` (negative: a signal)."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", output)]
    errors = [line for line in lines if ERROR_LINE.match(line)]
    if errors := [line for line in errors if not any(name in line for name in LAUNCHERS)]:
        return errors[-1].removeprefix("error: ")
    if died := re.findall(r"died with <Signals\.(\w+)", output):
        return f"ended by {died[-1]}" + (" (out of memory?)" if died[-1] == "SIGKILL" else "")
    return f"ended by signal {-code}" if code < 0 else f"exit status {code}"
