"""A run of one of the training scripts beside this file, measured from outside: the seconds and the memory of its steps, beside
what the script itself estimated, and with --profile_steps where the time of a step goes.

    accelerate launch examples/measured_run.py --measured_file run.json examples/train_acpo_lora_sd.py \
        --max_train_steps 31 --report_to none

What follows the script's name are its own flags. Nothing in the script is changed: its functions are wrapped here. A step is
timed from its `training_step` to the next one's, so with its data, optimizer and log. The last step is not timed. With
--profile_steps N the last 3 N steps before it are for the parts, the synchronisations and torch's profiler, one after the other.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import importlib.util
import json
import sys
import time
import traceback
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from acpo_utils import check_min_version, late_step, randomness
from acpo_utils.files import atomic_write
from acpo_utils.training import memory_estimate
from acpo_utils.training.run_state import RunState


check_min_version("0.2.0")
REPOSITORY = Path(__file__).resolve().parents[1]
FAMILIES = ("stable_diffusion", "sdxl", "sd3", "flux", "z_image")
OTHER = "the rest of training_step"
# To Python, and so to the host: the GPU has then done all that it was given.
READS = {
    getattr(torch.Tensor, name): name.strip("_")
    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__")
}
MOVES = {
    torch.Tensor.to: "to",
    torch.Tensor.cuda: "cuda",
    torch.Tensor.copy_: "copy_",
}
API_CALLS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpyAsync",
    "cudaLaunchKernel",
)


class _Mark(torch.autograd.Function):
    """The tensor itself; its backward pass, which begins that of what made the tensor, calls `begin`."""

    @staticmethod
    def forward(ctx, tensor, begin):
        ctx.begin = begin
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        ctx.begin()
        return grad, None


class Stopwatch:
    """Whose turn it is, and since when: on a GPU by its own clock, as it comes to the place in its stream.

    record_function of torch's profiler would name the forward passes alone: autograd runs the backward ones elsewhere.
    """

    def __init__(self, device: torch.device):
        self.device, self.running, self.label, self.marks = device, False, OTHER, []

    def mark(self, label: str) -> None:
        """From now on it is the turn of `label`."""
        self.label = label
        if not self.running:
            return
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((label, now))

    @contextmanager
    def part(self, label: str):
        outer = self.label
        self.mark(label)
        try:
            yield
        finally:
            self.mark(outer)

    def wrapped(self, label: str, function):
        """`function` as the part `label`; where it returns a tensor with a graph, its backward pass is one too."""

        def run(*args, **kwargs):
            with self.part(label):
                out = function(*args, **kwargs)
            return self.backward_of(label, out)

        return run

    def backward_of(self, label: str, out):
        if isinstance(out, tuple):
            return (self.backward_of(label, out[0]), *out[1:])
        if self.running and isinstance(out, torch.Tensor) and out.requires_grad:
            return _Mark.apply(out, partial(self.mark, f"{label}, backward"))
        return out

    def milliseconds(self, num_steps: int) -> dict[str, float]:
        """{label: of one step}, largest first."""
        total = Counter()
        for (label, start), (_, end) in zip(self.marks, self.marks[1:]):
            total[label] += start.elapsed_time(end) if self.device.type == "cuda" else 1e3 * (end - start)
        return {label: amount / num_steps for label, amount in total.most_common()}


class Synchronisations(TorchFunctionMode):
    """Counts, by the line of ours that asks for it, where the host waits for the GPU: reads of a tensor, copies that block.

    Without a GPU it counts every read, also of tensors that a GPU run has on the host.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.places = device, Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in READS and args[0].device.type == self.device.type:
            self.places[f"{place()} {READS[func]}"] += 1
        elif func in MOVES and not (kwargs or {}).get("non_blocking"):
            source = args[1] if func is torch.Tensor.copy_ else args[0]
            if source.device.type != out.device.type:
                self.places[f"{place()} {MOVES[func]}"] += 1
        return out


def place() -> str:
    """file:function of the innermost frame of this repository."""
    for frame in reversed(traceback.extract_stack(limit=60)):
        file = Path(frame.filename)
        if file.is_relative_to(REPOSITORY) and file != Path(__file__).resolve():
            return f"{file.relative_to(REPOSITORY)}:{frame.name}"
    return "elsewhere"


class Recorder:
    """What is known of the run so far, and what is to be done at the beginning of its next step."""

    def __init__(self, num_steps: int, profile_steps: int):
        self.num_steps, self.profile_steps = num_steps, profile_steps
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.stopwatch = Stopwatch(self.device)
        self.synchronisations = Synchronisations(self.device)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        self.profiler = profile(activities=activities)
        self.estimating = False
        self.starts, self.logs, self.loss_scales, self.estimate = [], [], [], {}
        self.peak = self.reserved = None
        self.phases = ExitStack()

    def begin_step(self) -> None:
        step, first = len(self.starts), self.num_steps - 1 - 3 * self.profile_steps
        if self.profile_steps and (step - first) % self.profile_steps == 0:
            self.phases.close()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.starts.append(time.perf_counter())
        if self.device.type == "cuda" and step == 0:
            torch.cuda.reset_peak_memory_stats()
        elif self.device.type == "cuda" and step <= first:
            self.peak, self.reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        phases = [self._stopwatch_runs, self.synchronisations, self.profiler]
        if self.profile_steps and step >= first and (step - first) % self.profile_steps == 0:
            number = (step - first) // self.profile_steps
            if number < len(phases):
                phase = phases[number]
                self.phases.enter_context(phase() if number == 0 else phase)
        self.stopwatch.mark(OTHER)

    @contextmanager
    def _stopwatch_runs(self):
        self.stopwatch.running = True
        try:
            yield
        finally:
            self.stopwatch.mark("")
            self.stopwatch.running = False

    def results(self) -> dict:
        timed = self.starts[: self.num_steps - 3 * self.profile_steps]
        found = {
            "seconds": [end - start for start, end in zip(timed, timed[1:])],
            "peak_bytes": self.peak,
            "reserved_bytes": self.reserved,
            "estimated_bytes": self.estimate,
            "losses": [logs["loss"] for logs in self.logs],
            "loss_scales": self.loss_scales,
        }
        if self.profile_steps:
            found["parts_ms"] = self.stopwatch.milliseconds(self.profile_steps)
            places = self.synchronisations.places.most_common()
            found["synchronisations"] = {where: number / self.profile_steps for where, number in places}
            found |= profiled(self.profiler, self.profile_steps, self.device)
            found["profiled_seconds"] = self.starts[-1] - self.starts[-1 - self.profile_steps]
        return found


def profiled(profiler, num_steps: int, device: torch.device) -> dict:
    """Of one step: the operations that take longest, how long kernels ran, how often the host called what may wait."""
    events = [event for event in profiler.key_averages() if not event.is_user_annotation]
    on_gpu = device.type == "cuda"

    def milliseconds(event) -> float:
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        return spent / 1e3 / num_steps

    kernels = [event for event in events if (event.device_type != torch.autograd.DeviceType.CPU) == on_gpu]
    longest = sorted(kernels, key=milliseconds, reverse=True)[:15]
    return {
        "operations": [
            {
                "operation": event.key[:90],
                "calls": event.count / num_steps,
                "ms": milliseconds(event),
            }
            for event in longest
        ],
        "busy_ms": sum(map(milliseconds, kernels)),
        "api_calls": {event.key: event.count / num_steps for event in events if event.key in API_CALLS},
    }


def load_script(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def wrappers(script, recorder: Recorder):
    """(object, name of its function, what takes the function's place) for all that is looked at."""
    watch = recorder.stopwatch

    def training_step(*args, _original=script.training_step, **kwargs):
        if not recorder.estimating:
            recorder.begin_step()
        return _original(*args, **kwargs)

    def log_estimate(*args, _original=script.log_estimate, **kwargs):
        recorder.estimating = True
        _original(*args, **kwargs)
        recorder.estimating = False

    def memory_table(memory, *args, _original=memory_estimate.memory_table):
        recorder.estimate = recorder.estimate or dict(memory)
        return _original(memory, *args)

    def build_dataloader(*args, _original=script.build_dataloader):
        for batch in _original(*args):
            yield batch
            watch.mark("data")  # the script asks for the next one

    def clip_grad_norm(run, *args, _original=RunState.clip_grad_norm):
        watch.mark("clipping, optimizer")
        if run.accelerator.scaler is not None:
            recorder.loss_scales.append(run.accelerator.scaler.get_scale())
        return _original(run, *args)

    def mean_terms(*args, _original=script.mean_terms):
        watch.mark("log")
        recorder.logs.append(_original(*args))
        return recorder.logs[-1]

    family = next(getattr(script, name) for name in FAMILIES if hasattr(script, name))

    def predict(*args, _original=family.predict, **kwargs):
        """The student's pass, unless it is without gradient: inside of base_prediction, or in a rollout."""
        if torch.is_grad_enabled():
            return watch.wrapped("U-Net, student", _original)(*args, **kwargs)
        base = watch.label == "U-Net, base"
        return watch.wrapped(watch.label if base else "U-Net, rollout", _original)(*args, **kwargs)

    return [
        (script, "training_step", training_step),
        (script, "log_estimate", log_estimate),
        (memory_estimate, "memory_table", memory_table),
        (script, "build_dataloader", build_dataloader),
        (RunState, "clip_grad_norm", clip_grad_norm),
        (script, "mean_terms", mean_terms),
        (family, "predict", predict),
        (family, "encode_prompts", watch.wrapped("captions", family.encode_prompts)),
        (script, "encode_images", watch.wrapped("encode", script.encode_images)),
        (script, "base_prediction", watch.wrapped("U-Net, base", script.base_prediction)),
        (late_step, "decode_latents", watch.wrapped("decode", late_step.decode_latents)),
        (script, "guide_score", watch.wrapped("guide", script.guide_score)),
        (randomness, "randn_tensor", watch.wrapped("noise, drawn on the CPU", randomness.randn_tensor)),
    ]


def measure(script, script_args, profile_steps: int) -> dict:
    """Runs the script's `main` to its end and returns what was seen on the way."""
    recorder = Recorder(script_args.max_train_steps, profile_steps)
    with ExitStack() as stack:
        for target, name, wrapper in wrappers(script, recorder):
            stack.enter_context(patch.object(target, name, wrapper))
        stack.enter_context(recorder.phases)
        script.main(script_args)
    return recorder.results()


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--measured_file", type=Path, required=True, help="the numbers as json")
    add("--profile_steps", type=int, default=0, help="so many steps for each of the three looks inside; 0: none")
    add("script", type=Path)
    add("flags", nargs=argparse.REMAINDER, help="the script's own")
    args = parser.parse_args(input_args)
    if not args.script.is_file():
        parser.error(f"expected a training script, found no file {args.script}")
    return args


def main(args):
    sys.argv = [str(args.script), *args.flags]
    script = load_script(args.script)
    script_args = script.parse_args(args.flags)
    least = 3 + 3 * args.profile_steps
    if script_args.max_train_steps < least or script_args.gradient_accumulation_steps != 1:
        raise ValueError(
            f"expected --max_train_steps of at least {least} with --profile_steps {args.profile_steps}, and no accumulation, "
            f"found {script_args.max_train_steps} and {script_args.gradient_accumulation_steps}"
        )
    measured = measure(script, script_args, args.profile_steps)
    with atomic_write(args.measured_file) as temporary:
        temporary.write_text(json.dumps(measured, indent=2))


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, ImportError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
