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
from pathlib import Path

import accelerate
import diffusers
import torch
from scipy import stats

from acpo_utils import check_min_version
from acpo_utils.files import atomic_write
from acpo_utils.randomness import SharedGenerator, batch_randn


check_min_version("0.2.0")
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
TINY_DEMO = "--max_train_steps 3 --late_start data --num_eval_prompts 4 --num_inference_steps 3"


class Check:
    """The folder of all files, the runs so far by their command, and until when the present part may take."""

    def __init__(self, args):
        self.args, self.runs, self.deadline = args, {}, time.monotonic() + args.seconds
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
            command += ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
            command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
            command += ["--cpu"] * (self.args.device == "cpu")
        paths = filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        if self.args.device == "cpu":
            environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        else:
            environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
        if self.seconds_left() <= 0:
            return "not run: no time was left", 0.0
        start, log = time.monotonic(), self.folder / "last.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [*command, str(script), *map(str, flags)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            try:
                process.wait(self.seconds_left())
            except subprocess.TimeoutExpired:
                end_group(process)
                return f"ended after {time.monotonic() - start:.0f} s: no more time", time.monotonic() - start
            except BaseException:
                end_group(process)
                raise
        failed = process.returncode != 0
        return (why(log.read_text(errors="replace")) if failed else None), time.monotonic() - start

    def models(self, family: str) -> Path:
        """The folder of random weights of a family, written at its first use. Raises RuntimeError if that fails."""
        folder = self.folder / family
        if not (folder / "images" / "metadata.jsonl").is_file():
            error, _ = self.launch(
                HERE / "random_pipeline.py",
                "--family",
                family,
                "--size",
                self.args.size,
                "--device",
                self.args.device,
                "--output_dir",
                folder,
            )
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
        found = {"error": error} if error else json.loads(file.read_text())
        return found | {"flags": " ".join(flags), "process_seconds": seconds}


def end_group(process: subprocess.Popen) -> None:
    """The launcher and the script that it has started, which are a session of their own."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def why(output: str) -> str:
    """The last line of a process's output that names an error of its own, not the launcher's."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", output) if line.strip()]
    named = [line for line in lines if re.match(r"(error: |[\w.]*(Error|Exception)\b)", line)]
    own = [line for line in named if "CalledProcessError" not in line]
    return (own or lines or ["it said nothing"])[-1][:300]


def median_seconds(run: dict) -> float:
    seconds = run["seconds"]
    return statistics.median(seconds[min(WARM_UP, len(seconds) - 1) :])


def memory_columns(run: dict) -> dict:
    estimated = sum(run["estimated_bytes"].values())
    return {
        PEAK: run["peak_bytes"] and run["peak_bytes"] / 1e9,
        "estimate GB": estimated / 1e9 or None,
        "peak of the estimate": run["peak_bytes"] and estimated and run["peak_bytes"] / estimated,
    }


def steps_part(check: Check) -> dict[str, list[dict]]:
    """1. Stable Diffusion 1.4's size, 512 px, batch 4, bf16: time and memory of each kind of step, beside the goals."""
    rows, base = [], None
    for label, flags in STEPS.items():
        profiled = label == SHIPPED  # and the profile part reads it
        run = check.train("sd", "train_acpo_lora_sd.py", sd_flags(flags), check.num_steps, profiled)
        if "error" in run:
            rows.append({"run": label, "note": run["error"]})
            continue
        seconds = median_seconds(run)
        base = seconds if label == LORA else base
        row = {"run": label, "s": seconds}
        row[TIMES] = base and seconds / base
        row[MINUTES] = 1000 * seconds / 60
        rows.append(row | memory_columns(run))
    return {"Steps at SD-1.4's size, 512 px, batch 4, bf16": rows, "Goals": goals(rows)}


def sd_flags(flags: str) -> str:
    return f"--train_batch_size 4 --mixed_precision bf16 {flags}".strip()


def goals(rows: list[dict]) -> list[dict]:
    found = []
    for label, what, most in GOALS:
        value = next((row.get(what) for row in rows if row["run"] == label), None)
        row = {"run": label, "what": what, "at most": most, "measured": value}
        found.append(row | {"met": "not measured" if value is None else "yes" if value <= most else "no"})
    return found


def profile_part(check: Check) -> dict[str, list[dict]]:
    """3. Where the time of a step goes, and what drawing noise on the CPU costs."""
    run = check.train("sd", "train_acpo_lora_sd.py", sd_flags(STEPS[SHIPPED]), check.num_steps, profiled=True)
    return profile_tables(SHIPPED, run) | {"Noise for one step: drawn on the CPU, or on the device": noise_rows(check)}


def profile_tables(label: str, run: dict) -> dict[str, list[dict]]:
    """The parts of a step; where the host waits, and as a bound of what that costs the share of a step without a kernel."""
    if "error" in run:
        return {f"{label}: where the time goes": [{"note": run["error"]}]}
    total = sum(run["parts_ms"].values())
    parts = [{"part": part, "ms": ms, "share": ms / total} for part, ms in run["parts_ms"].items()]
    parts.append({"part": "the whole step", "ms": total, "share": 1.0})
    waits = [{"where": where, "a step": number} for where, number in run["synchronisations"].items()]
    waits += [{"where": f"all, {name}", "a step": number} for name, number in run["api_calls"].items()]
    median = median_seconds(run)
    busy = {
        "step, ms": 1e3 * median,
        "kernels run, ms": run["busy_ms"],
        "idle, share": max(0.0, 1 - run["busy_ms"] / (1e3 * median)),
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

            def on_cpu():
                return batch_randn(shape, generator, device, torch.bfloat16)

            def on_device():
                return torch.randn(shape, device=device, dtype=torch.bfloat16)

            row = {"latents": label, "processes": num_processes}
            row["ms, drawn on the CPU"] = 2 * milliseconds(on_cpu, device)
            row["ms, on the device"] = 2 * milliseconds(on_device, device)
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


def demo_part(check: Check) -> dict[str, list[dict]]:
    """4. The embedded demo: its table beside the CPU's, whose seeds say how far a run may be from another one."""
    flags = ["--tmax=100", "--report_to=none", f"--output_dir={check.folder}/out"]
    flags += TINY_DEMO.split() * check.tiny
    run = check.measured(HERE / "train_acpo_lora_sd.py", flags, launcher=True)  # as README.md starts it
    if "error" in run:
        return {"The embedded demo": [{"note": run["error"]}]}
    metrics = json.loads((check.folder / "out" / "metrics.json").read_text())
    timing = {
        "s, all of it": run["process_seconds"],
        "s a step": median_seconds(run),
        "steps": 1 + len(run["seconds"]),
    }
    return {"The embedded demo beside the CPU's": demo_rows(metrics), "The embedded demo: time": [timing]}


def demo_rows(metrics: dict) -> list[dict]:
    """A row for each number of the CPU's runs; "within": in the 95 % interval of one more run like the seeds' (Student)."""
    reference = json.loads(SEEDS.read_text())
    comparisons, panel = metrics["comparisons"], metrics.get("panel", {})
    found = {("base", name): row["base_mean"] for name, row in comparisons.items()}
    found |= {("difference", name): row["mean_difference"] for name, row in comparisons.items()}
    found |= {("change", name): row["change"] for name, row in panel.items()}
    rows = []
    for kind in ("base", "difference", "change"):
        for name, seeds in reference[kind].items():
            mean, n = statistics.mean(seeds), len(seeds)
            half = stats.t.ppf(0.975, n - 1) * statistics.stdev(seeds) * math.sqrt(1 + 1 / n)
            value = found.get((kind, name))
            row = {"metric": name, "what": kind, "CPU, mean": mean, "±": float(half), "here": value}
            row["within"] = "not measured" if value is None else "yes" if abs(value - mean) <= half else "no"
            rows.append(row)
    return rows


def large_part(check: Check) -> dict[str, list[dict]]:
    """5. The large models at 1024 px, batch 1, bf16: time and memory, and where the time goes."""
    rows, tables = [], {}
    for label, (family, script) in LARGE.items():
        run = check.train(family, script, LARGE_FLAGS, min(check.num_steps, 20), profiled=True)
        shutil.rmtree(check.folder / family, ignore_errors=True)  # gigabytes
        if "error" in run:
            rows.append({"run": label, "note": run["error"]})
            continue
        rows.append({"run": label, "s": median_seconds(run)} | memory_columns(run))
        tables |= profile_tables(label, run)
    return {f"Large models at 1024 px: {LARGE_FLAGS}": rows} | tables


def precision_part(check: Check) -> dict[str, list[dict]]:
    """2. The shipped step in fp16, with tf32, and compiled, beside bf16."""
    rows, base = [], None
    for label, flags in PRECISIONS.items():
        command = f"--train_batch_size 4 {flags}"
        run = check.train("sd", "train_acpo_lora_sd.py", command, check.num_steps)
        if "error" in run:
            rows.append({"run": label, "note": run["error"]})
            continue
        seconds = median_seconds(run)
        base = seconds if label == "bf16" else base
        row = {"run": label, "s": seconds, "of bf16": base and seconds / base, "first step, s": run["seconds"][0]}
        row["losses, all finite"] = "yes" if all(map(math.isfinite, run["losses"])) else "no"
        rows.append(row | loss_scale_columns(run["loss_scales"]))
    return {"fp16, tf32, torch.compile at SD-1.4's size": rows}


def loss_scale_columns(scales: list[float]) -> dict:
    """The loss scale at both ends, and for how many of the last steps it stayed as it is: settled if for ten or more."""
    if not scales:
        return {}
    stayed = next((n for n, scale in enumerate(reversed(scales)) if scale != scales[-1]), len(scales))
    return {
        "loss scale, first": scales[0],
        "loss scale, last": scales[-1],
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
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        name = (re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) or [name])[0]
    found = {"device": name, "driver": "none"}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True) if shutil.which("nvidia-smi") else None
        found = {"device": torch.cuda.get_device_name(), "driver": driver.stdout.split()[0] if driver else "unknown"}
        found["cpu"] = name
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
    if isinstance(value, float):
        return format(value, ".3g")
    return "" if value is None else str(value).replace("|", "\\|")


def markdown(report: dict) -> str:
    lines = ["# GPU check", "", f"`{report['command']}`", ""]
    lines += [", ".join(f"{name} {value}" for name, value in report["hardware"].items()), ""]
    if report["size"] == "tiny":
        lines += ["**A rehearsal at tiny sizes: none of these numbers means anything.**", ""]
    for part, found in report["parts"].items():
        lines += [f"## {part} ({found['seconds']:.0f} s)", ""]
        for title, rows in found["tables"].items():
            names = list(dict.fromkeys(name for row in rows for name in row))
            lines += [f"### {title}", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
            lines += [f"| {' | '.join(text(row.get(name)) for name in names)} |" for row in rows]
            lines.append("")
    return "\n".join(lines)


def save(report: dict, folder: Path) -> None:
    for name, content in (("gpu_check.json", json.dumps(report, indent=2)), ("gpu_check.md", markdown(report))):
        with atomic_write(folder / name) as temporary:
            temporary.write_text(content)


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
    flags = ["--parts", *args.parts, "--seconds", f"{args.seconds:g}", "--size", args.size, "--device", args.device]
    report = {
        "command": " ".join(["python examples/gpu_check.py", *flags]),
        "hardware": hardware(args.device),
        "size": args.size,
        "parts": {},
    }
    end = check.deadline
    parts = {name: PARTS[name] for name in PARTS if name in args.parts}
    while parts:
        start, shares = time.monotonic(), sum(share for _, share in parts.values())
        name = next(iter(parts))
        measure, share = parts.pop(name)
        check.deadline = start + max(0.0, end - start) * share / shares
        try:
            tables = measure(check)
        except Exception as error:  # what is measured already is kept, and the rest may run
            tables = {"failed": [{"note": f"{type(error).__name__}: {error}"}]}
        report["parts"][name] = {"seconds": time.monotonic() - start, "tables": tables}
        report["runs"] = [{"script": script} | run for (script, _), run in check.runs.items()]
        save(report, args.output_dir)
    shutil.rmtree(check.folder, ignore_errors=True)
    print(f"{markdown(report)}\n{args.output_dir / 'gpu_check.md'}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
