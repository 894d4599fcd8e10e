"""What only a GPU can tell, by one command without a network: step times and memory of the real scripts at the models' real sizes
beside the goals and the scripts' own estimates, fp16, tf32 and torch.compile, where a step's time goes, and the embedded demo.

    python examples/gpu_check.py --output_dir gpu-check
    python examples/gpu_check.py --size tiny --device cpu --output_dir rehearsal    # the same on a CPU, in tiny: a rehearsal

OUTPUT_DIR/gpu_check.json and gpu_check.md have the tables, written anew after every part. Weights and images are random
(random_pipeline.py), but for the demo's. Each run is the training script itself in a process of its own (measured_run.py). One that
fails says why in its row, and the rest goes on. --seconds is shared out among the parts; what one leaves the next ones have.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import accelerate
import diffusers
import torch
from scipy import stats

from acpo_utils import check_min_version
from acpo_utils.files import aligned_table, atomic_write
from acpo_utils.randomness import SharedGenerator, batch_randn


check_min_version("0.2.0")
Tables = dict[str, list[dict]]  # rows by the title of their table
HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
SEEDS = HERE / "demo" / "acpo_lora_sd_seeds.json"
WARM_UP = 5  # timed steps that do not count
# Stable Diffusion 1.4's steps, batch 4, bf16: by label the script's flags.
LORA = "LoRA, no ACPO, encodes"
SHIPPED = "ACPO, as shipped"
README = "ACPO, --gradient_checkpointing (README)"
FULL_DECODE = "ACPO, caches, shared draw, full decode"
CHEAPEST = "the same, tiny decode"
CACHED = "--cache_latents --center_crop --diffusion_timesteps late"
STEPS = {
    LORA: "--quality_weight 0 --anchor_weight 0",
    SHIPPED: "",
    FULL_DECODE: CACHED,
    CHEAPEST: f"{CACHED} --decode tiny --tiny_vae_name_or_path TINY_VAE",
    README: "--gradient_checkpointing",
}
# Goals, on an H200: (label, what, at most).
TIMES = "of the LoRA run"
PEAK = "peak GB"
MINUTES = "1,000 steps, min"
GOALS = (
    (CHEAPEST, TIMES, 1.15),
    (FULL_DECODE, TIMES, 2.9),
    (README, PEAK, 24.0),
    (README, MINUTES, 4.0),
)
PRECISIONS = {
    "bf16": "--mixed_precision bf16",
    "fp16": "--mixed_precision fp16",
    "bf16, --allow_tf32": "--mixed_precision bf16 --allow_tf32",
    "bf16, --torch_compile": "--mixed_precision bf16 --torch_compile",
}
LARGE = {
    "SDXL": ("sdxl", "train_acpo_lora_sdxl.py"),
    "Stable Diffusion 3.5 medium": ("sd3", "train_acpo_lora_sd3.py"),
}
LARGE_FLAGS = "--cache_latents --center_crop --gradient_checkpointing --mixed_precision bf16 --train_batch_size 1"
NOISE = {  # latents of a step
    "Stable Diffusion 1.4, 512 px, batch 4": (4, 4, 64, 64),
    "SDXL, 1024 px, batch 4": (4, 4, 128, 128),
    "Stable Diffusion 3.5, 1024 px, batch 4": (4, 16, 128, 128),
}
LAUNCHER = "-m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
TINY_DEMO = "--max_train_steps 3 --late_start data --num_eval_prompts 4 --num_inference_steps 3"


class Check:
    """The folder of all files, the runs so far by their command, and until when the present part may take."""

    def __init__(self, args):
        self.args = args
        self.runs = {}
        self.deadline = time.monotonic() + args.seconds
        self.tiny = args.size == "tiny"
        self.num_steps = 5 if self.tiny else 30
        self.profile_steps = 1 if self.tiny else 2
        self.folder = args.output_dir / "work"
        self.folder.mkdir(parents=True, exist_ok=True)

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def launch(self, script: Path, *flags, launcher: bool = False) -> tuple[str | None, float]:
        """The script in a process of its own, ended at the deadline: (why it failed or None, seconds).

        Without `launcher` as `accelerate launch` starts a process on one device, but for the seconds that it takes itself.
        """
        command = [sys.executable]
        if launcher:
            command += LAUNCHER.split()
            if self.args.device == "cpu":
                command.append("--cpu")
        command += [str(script), *map(str, flags)]
        environment = os.environ | {
            "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        if self.args.device == "cpu":
            environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        else:
            environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
        if self.seconds_left() <= 0:
            return "not run: no time was left", 0.0
        start = time.monotonic()
        log = self.folder / "last.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            try:
                process.wait(self.seconds_left())
            except subprocess.TimeoutExpired:
                end_group(process)
                seconds = time.monotonic() - start
                return f"ended after {seconds:.0f} s: no more time", seconds
            except BaseException:
                end_group(process)
                raise
        error = None
        if process.returncode != 0:
            error = why(log.read_text(errors="replace"))
        return error, time.monotonic() - start

    def models(self, family: str) -> Path:
        """The folder of random weights of a family, written at its first use. Raises RuntimeError if that fails."""
        folder = self.folder / family
        if not (folder / "images" / "metadata.jsonl").is_file():
            flags = f"--family {family} --size {self.args.size} --device {self.args.device}".split()
            error, _ = self.launch(HERE / "random_pipeline.py", *flags, f"--output_dir={folder}")
            if error:
                raise RuntimeError(f"no weights of {family}: {error}")
        return folder

    def train(self, family: str, script: str, flags: str, num_steps: int, profiled: bool = False) -> dict:
        """What measured_run.py tells of the script on random weights, or {"error": why}. What has run well runs once."""
        key = (script, flags)
        if key in self.runs:
            return self.runs[key]
        profile_steps = self.profile_steps if profiled else 0
        try:
            models = self.models(family)
        except RuntimeError as error:
            return {"error": str(error)}
        own = [
            f"--pretrained_model_name_or_path={models}/pipeline",
            f"--train_data_dir={models}/images",
            f"--evaluator=ipce:{models}/guide",
            f"--output_dir={self.folder}/out",
            f"--max_train_steps={num_steps + 1 + 3 * profile_steps}",
            "--report_to=none",
        ]
        own += flags.replace("TINY_VAE", f"{models}/tiny_vae").split()
        own += ["--resolution=64"] * self.tiny
        run = self.measured(HERE / script, own, profile_steps)
        if "error" not in run:
            self.runs[key] = run
        return run

    def measured(self, script: Path, flags: list[str], profile_steps: int = 0, launcher: bool = False) -> dict:
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        file = self.folder / "measured.json"
        file.unlink(missing_ok=True)
        error, seconds = self.launch(
            HERE / "measured_run.py",
            f"--measured_file={file}",
            f"--profile_steps={profile_steps}",
            script,
            *flags,
            launcher=launcher,
        )
        if error:
            return {"error": error}
        found = json.loads(file.read_text())
        found["flags"] = " ".join(flags)
        found["process_seconds"] = seconds
        return found


def end_group(process: subprocess.Popen) -> None:
    """The launcher and the script that it has started, which are a session of their own."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def why(output: str) -> str:
    """The last line of a process's output that names an error of its own, not the launcher's."""
    found = "it said nothing"
    named = False
    for line in re.split(r"[\r\n]+", output):
        line = line.strip()
        names = re.match(r"(error: |[\w.]*(Error|Exception)\b)", line) is not None
        if "CalledProcessError" in line or named and not names:
            continue
        found = line or found
        named = names
    return found[:300]


def median_seconds(run: dict) -> float:
    seconds = run["seconds"]
    warm_up = min(WARM_UP, len(seconds) - 1)
    return statistics.median(seconds[warm_up:])


def memory_columns(run: dict) -> dict:
    """In GB of a thousand million bytes, as cards are sold; the peak is of a GPU alone."""
    columns = {}
    estimate = sum(run["estimated_bytes"].values()) / 1e9
    if run["peak_bytes"] is not None:
        columns[PEAK] = run["peak_bytes"] / 1e9
    if estimate:
        columns["estimate GB"] = estimate
    if len(columns) == 2:
        columns["peak of the estimate"] = columns[PEAK] / estimate
    return columns


def steps_part(check: Check) -> Tables:
    """1. Stable Diffusion 1.4's size, 512 px, batch 4, bf16: time and memory of each kind of step, beside the goals."""
    rows = []
    base = None
    for label, flags in STEPS.items():
        profiled = label == SHIPPED  # and the profile part reads it
        run = check.train("sd", "train_acpo_lora_sd.py", sd_flags(flags), check.num_steps, profiled)
        if "error" in run:
            rows.append({"run": label, "note": run["error"]})
            continue
        seconds = median_seconds(run)
        base = seconds if label == LORA else base
        row = {"run": label, "s": seconds}
        if base:
            row[TIMES] = seconds / base
        row[MINUTES] = 1000 * seconds / 60
        row |= memory_columns(run)
        rows.append(row)
    return {"Steps at SD-1.4's size, 512 px, batch 4, bf16": rows, "Goals": goals(rows)}


def sd_flags(flags: str) -> str:
    return f"--train_batch_size 4 --mixed_precision bf16 {flags}".strip()


def goals(rows: list[dict]) -> list[dict]:
    by_label = {row["run"]: row for row in rows}
    found = []
    for label, what, most in GOALS:
        value = by_label[label].get(what)
        row = {
            "run": label,
            "what": what,
            "at most": most,
            "measured": value,
            "met": verdict(value, -math.inf, most),
        }
        found.append(row)
    return found


def verdict(value: float | None, low: float, high: float) -> str:
    if value is None:
        return "not measured"
    return "yes" if low <= value <= high else "no"


def profile_part(check: Check) -> Tables:
    """3. Where the time of a step goes, and what drawing noise on the CPU costs."""
    flags = sd_flags(STEPS[SHIPPED])
    run = check.train("sd", "train_acpo_lora_sd.py", flags, check.num_steps, profiled=True)
    tables = profile_tables(SHIPPED, run)
    tables["Noise for one step: drawn on the CPU, or on the device"] = noise_rows(check)
    return tables


def profile_tables(label: str, run: dict) -> Tables:
    """The parts of a step; where the host waits, and as a bound of what that costs the share of a step without a kernel."""
    if "error" in run:
        return {f"{label}: where the time goes": [{"note": run["error"]}]}
    total = sum(run["parts_ms"].values())
    parts = []
    for part, ms in [*run["parts_ms"].items(), ("the whole step", total)]:
        parts.append({"part": part, "ms": ms, "share": ms / total})
    waits = []
    for where, number in (run["synchronisations"] | run["api_calls"]).items():
        waits.append({"where": where, "a step": number})
    step = 1e3 * median_seconds(run)
    busy = {
        "step, ms": step,
        "kernels run, ms": run["busy_ms"],
        "idle, share": max(0.0, 1 - run["busy_ms"] / step),
    }
    return {
        f"{label}: where the time goes": parts,
        f"{label}: how long the device had nothing to do": [busy],
        f"{label}: where the host waits for the device (without a GPU: all reads of a tensor)": waits,
        f"{label}: operations": run["operations"],
    }


def noise_rows(check: Check) -> list[dict]:
    """Two draws a step, of the latents' noise and of the posterior's; with several processes each draws all their rows."""
    device = check.args.device
    rows = []
    for label, shape in NOISE.items():
        for num_processes in (1, 8):
            generator = SharedGenerator()
            generator.manual_seed(0)
            generator.num_processes = num_processes
            on_cpu = partial(batch_randn, shape, generator, device, torch.bfloat16)
            on_device = partial(torch.randn, shape, device=device, dtype=torch.bfloat16)
            row = {
                "latents": label,
                "processes": num_processes,
                "ms, drawn on the CPU": 2 * milliseconds(on_cpu, device),
                "ms, on the device": 2 * milliseconds(on_device, device),
            }
            rows.append(row)
    return rows


def milliseconds(function, device: str, repetitions: int = 10) -> float:
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def demo_part(check: Check) -> Tables:
    """4. The embedded demo: its table beside the CPU's, whose seeds say how far a run may be from another one."""
    flags = ["--tmax=100", "--report_to=none", f"--output_dir={check.folder}/out"]
    if check.tiny:
        flags += TINY_DEMO.split()
    run = check.measured(HERE / "train_acpo_lora_sd.py", flags, launcher=True)  # as README.md starts it
    if "error" in run:
        return {"The embedded demo": [{"note": run["error"]}]}
    file = check.folder / "out" / "metrics.json"
    metrics = json.loads(file.read_text())
    timing = {
        "s, all of it": run["process_seconds"],
        "s a step": median_seconds(run),
        "steps": 1 + len(run["seconds"]),
    }
    return {
        "The embedded demo beside the CPU's": demo_rows(metrics),
        "The embedded demo: time": [timing],
    }


def demo_rows(metrics: dict) -> list[dict]:
    """A row for each number of the CPU's runs; "within": in the 95 % interval of one more run like the seeds' (Student)."""
    reference = json.loads(SEEDS.read_text())
    found = {}
    for name, row in metrics["comparisons"].items():
        found["base", name] = row["base_mean"]
        found["difference", name] = row["mean_difference"]
    for name, row in metrics.get("panel", {}).items():
        found["change", name] = row["change"]
    rows = []
    for kind in ("base", "difference", "change"):
        for name, seeds in reference[kind].items():
            n = len(seeds)
            mean = statistics.mean(seeds)
            quantile = float(stats.t.ppf(0.975, n - 1))
            half = quantile * statistics.stdev(seeds) * math.sqrt(1 + 1 / n)
            value = found.get((kind, name))
            row = {
                "metric": name,
                "what": kind,
                "CPU, mean": mean,
                "±": half,
                "here": value,
                "within": verdict(value, mean - half, mean + half),
            }
            rows.append(row)
    return rows


def large_part(check: Check) -> Tables:
    """5. The large models at 1024 px, batch 1, bf16: time and memory, and where the time goes."""
    rows = []
    tables = {}
    num_steps = min(check.num_steps, 20)
    for label, (family, script) in LARGE.items():
        run = check.train(family, script, LARGE_FLAGS, num_steps, profiled=True)
        shutil.rmtree(check.folder / family, ignore_errors=True)  # gigabytes
        if "error" in run:
            rows.append({"run": label, "note": run["error"]})
            continue
        row = {"run": label, "s": median_seconds(run)}
        row |= memory_columns(run)
        rows.append(row)
        tables |= profile_tables(label, run)
    return {f"Large models at 1024 px: {LARGE_FLAGS}": rows} | tables


def precision_part(check: Check) -> Tables:
    """2. The shipped step in fp16, with tf32, and compiled, beside bf16."""
    rows = []
    base = None
    for label, flags in PRECISIONS.items():
        command = f"--train_batch_size 4 {flags}"
        run = check.train("sd", "train_acpo_lora_sd.py", command, check.num_steps)
        if "error" in run:
            rows.append({"run": label, "note": run["error"]})
            continue
        seconds = median_seconds(run)
        base = seconds if label == "bf16" else base
        finite = all(math.isfinite(loss) for loss in run["losses"])
        row = {"run": label, "s": seconds}
        if base:
            row["of bf16"] = seconds / base
        row["first step, s"] = run["seconds"][0]
        row["losses, all finite"] = "yes" if finite else "no"
        row |= loss_scale_columns(run["loss_scales"])
        rows.append(row)
    return {"fp16, tf32, torch.compile at SD-1.4's size": rows}


def loss_scale_columns(scales: list[float]) -> dict:
    """The loss scale at both ends, and for how many of the last steps it stayed as it is: settled if for ten or more."""
    if not scales:
        return {}
    last = scales[-1]
    stayed = 0
    for scale in reversed(scales):
        if scale != last:
            break
        stayed += 1
    return {
        "loss scale, first": scales[0],
        "loss scale, last": last,
        "unchanged for": stayed,
        "settled": "yes" if stayed >= 10 else "no",
    }


# In this order; the numbers are the shares of the time.
PARTS = {
    "steps": (steps_part, 180),
    "profile": (profile_part, 20),
    "demo": (demo_part, 70),
    "large": (large_part, 120),
    "precision": (precision_part, 90),  # compiling comes last
}


def hardware(device: str) -> dict[str, str]:
    found = {"cpu": platform.processor() or platform.machine()}
    info = Path("/proc/cpuinfo")
    if info.is_file() and (names := re.findall(r"model name\s*: (.*)", info.read_text())):
        found["cpu"] = names[0]
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            answer = subprocess.run(query, capture_output=True, text=True)
            found["driver"] = answer.stdout.partition("\n")[0]
    return found | {
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "diffusers": diffusers.__version__,
        "accelerate": accelerate.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def text(value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return format(value, ".3g")
    return str(value)


def table(rows: list[dict]) -> str:
    """Markdown; a row need not have every column."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names]
    for row in rows:
        cells.append([text(row.get(name)) for name in names])
    return aligned_table(cells, text_columns=len(names))


def markdown(report: dict) -> str:
    lines = ["# GPU check", "", f"`{report['command']}`", ""]
    hardware = (f"{name} {value}" for name, value in report["hardware"].items())
    lines += [", ".join(hardware), ""]
    if report["size"] == "tiny":
        lines += ["**A rehearsal at tiny sizes: none of these numbers means anything.**", ""]
    for part, found in report["parts"].items():
        lines += [f"## {part} ({found['seconds']:.0f} s)", ""]
        for title, rows in found["tables"].items():
            lines += [f"### {title}", ""]
            lines += [table(rows), ""]
    return "\n".join(lines)


def save(report: dict, folder: Path) -> None:
    with atomic_write(folder / "gpu_check.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2))
    with atomic_write(folder / "gpu_check.md") as temporary:
        temporary.write_text(markdown(report))


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    add("--seconds", type=float, default=480, help="for all of it; what is running then is ended")
    add("--size", choices=["real", "tiny"], default="real", help="tiny: to see whether all of it runs")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--output_dir", type=Path, default=Path("gpu-check"))
    args = parser.parse_args(input_args)
    if not 0 < args.seconds < math.inf:
        parser.error(f"--seconds: expected a number above 0, found {args.seconds}")
    args.output_dir = args.output_dir.resolve()
    return args


def main(args):
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("expected a CUDA device, found none: --size tiny --device cpu rehearses without one")
    check = Check(args)
    flags = f"--parts {' '.join(args.parts)} --seconds {args.seconds:g} --size {args.size} --device {args.device}"
    report = {
        "command": f"python examples/gpu_check.py {flags}",
        "hardware": hardware(args.device),
        "size": args.size,
        "parts": {},
        "runs": {},
    }
    end = check.deadline
    parts = [name for name in PARTS if name in args.parts]
    while parts:
        shares = sum(PARTS[name][1] for name in parts)
        name = parts.pop(0)
        measure, share = PARTS[name]
        start = time.monotonic()
        check.deadline = start + (end - start) * share / shares
        try:
            tables = measure(check)
        except Exception as error:  # what is measured already is kept, and the rest may run
            tables = {"failed": [{"note": f"{type(error).__name__}: {error}"}]}
        report["parts"][name] = {
            "seconds": time.monotonic() - start,
            "tables": tables,
        }
        report["runs"] = list(check.runs.values())
        save(report, args.output_dir)
    shutil.rmtree(check.folder, ignore_errors=True)
    print(f"{markdown(report)}\n{args.output_dir / 'gpu_check.md'}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends what is running, too
    try:
        main(parse_args())
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
