"""A run of one of the training scripts beside this file, measured from outside: the seconds and the memory of its steps, beside
what the script itself estimated, and with --profile_steps where the time of a step goes.

    accelerate launch examples/measured_run.py --measured_file run.json examples/train_acpo_lora_sd.py ...

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
from accelerate.utils import parse_flag_from_env
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
    torch.Tensor.item: "item",
    torch.Tensor.tolist: "tolist",
    torch.Tensor.cpu: "cpu",
    torch.Tensor.numpy: "numpy",
    torch.Tensor.__float__: "float",
    torch.Tensor.__int__: "int",
    torch.Tensor.__bool__: "bool",
    torch.Tensor.__index__: "index",
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
        self.device = device
        self.running = False
        self.label = OTHER
        self.marks = []

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
        """`out`, or the first of several, so that its backward pass is a part."""
        if isinstance(out, tuple):
            first, *others = out
            return (self.backward_of(label, first), *others)
        if not (self.running and isinstance(out, torch.Tensor) and out.requires_grad):
            return out
        begin = partial(self.mark, f"{label}, backward")
        return _Mark.apply(out, begin)

    def milliseconds(self, num_steps: int) -> dict[str, float]:
        """{label: of one step}, largest first."""
        total = Counter()
        for this, following in zip(self.marks, self.marks[1:]):
            label, start = this
            _, end = following
            if self.device.type == "cuda":
                total[label] += start.elapsed_time(end)
            else:
                total[label] += 1e3 * (end - start)
        return per_step(total, num_steps)


def per_step(total: Counter, num_steps: int) -> dict[str, float]:
    return {label: amount / num_steps for label, amount in total.most_common()}


class Synchronisations(TorchFunctionMode):
    """Counts, by the line of ours that asks for it, where the host waits for the GPU: reads of a tensor, copies that block.

    Without a GPU it counts every read, also of tensors that a GPU run has on the host.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.places = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in READS:
            if args[0].device.type == self.device.type:
                self.places[f"{place()} {READS[func]}"] += 1
        elif func in MOVES and not kwargs.get("non_blocking"):
            source = args[0]
            if func is torch.Tensor.copy_:
                source = args[1]
            if source.device.type != out.device.type:
                self.places[f"{place()} {MOVES[func]}"] += 1
        return out


def place() -> str:
    """file:function of the innermost frame of this repository."""
    own = Path(__file__).resolve()
    frames = traceback.extract_stack(limit=60)
    for frame in reversed(frames):
        file = Path(frame.filename)
        if file == own:
            continue
        if file.is_relative_to(REPOSITORY):
            name = file.relative_to(REPOSITORY)
            return f"{name}:{frame.name}"
    return "elsewhere"


class Recorder:
    """What is known of the run so far, and what is to be done at the beginning of its next step."""

    def __init__(self, num_steps: int, profile_steps: int):
        self.num_steps = num_steps
        self.profile_steps = profile_steps
        self.last_timed = num_steps - 1 - 3 * profile_steps
        self.on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
        self.device = torch.device("cuda" if self.on_gpu else "cpu")
        self.stopwatch = Stopwatch(self.device)
        self.synchronisations = Synchronisations(self.device)
        activities = [ProfilerActivity.CPU]
        if self.on_gpu:
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(activities=activities)
        self.phases = [self._stopwatch_runs(), self.synchronisations, self.profiler]
        self.phase = ExitStack()
        self.estimating = False
        self.estimate = {}
        self.starts = []
        self.logs = []
        self.loss_scales = []
        self.peak = None
        self.reserved = None

    def begin_step(self) -> None:
        step = len(self.starts)
        beyond = step - self.last_timed
        next_phase = self.profile_steps and beyond >= 0 and beyond % self.profile_steps == 0
        if next_phase:
            self.phase.close()
        if self.on_gpu:
            torch.cuda.synchronize()
        self.starts.append(time.perf_counter())
        if self.on_gpu and step == 0:
            torch.cuda.reset_peak_memory_stats()
        elif self.on_gpu and beyond <= 0:
            self.peak = torch.cuda.max_memory_allocated()
            self.reserved = torch.cuda.max_memory_reserved()
        if next_phase and self.phases:
            self.phase.enter_context(self.phases.pop(0))
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
        timed = self.starts[: self.last_timed + 1]
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
            found["synchronisations"] = per_step(self.synchronisations.places, self.profile_steps)
            found |= profiled(self.profiler, self.profile_steps, self.on_gpu)
        return found


def profiled(profiler, num_steps: int, on_gpu: bool) -> dict:
    """Of one step: the operations that take longest, how long kernels ran, how often the host called what may wait."""
    kernels = Counter()
    calls = Counter()
    for event in profiler.key_averages():
        if event.is_user_annotation:
            continue
        calls[event.key] += event.count
        on_host = event.device_type == torch.autograd.DeviceType.CPU
        if on_gpu and not on_host:
            kernels[event.key] += event.self_device_time_total
        elif not on_gpu:
            kernels[event.key] += event.self_cpu_time_total
    operations = []
    for name, microseconds in kernels.most_common(15):
        row = {
            "operation": name[:90],
            "calls": calls[name] / num_steps,
            "ms": microseconds / 1e3 / num_steps,
        }
        operations.append(row)
    return {
        "operations": operations,
        "busy_ms": kernels.total() / 1e3 / num_steps,
        "api_calls": {name: calls[name] / num_steps for name in API_CALLS if calls[name]},
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

    (name,) = (name for name in FAMILIES if hasattr(script, name))
    family = getattr(script, name)

    def predict(*args, _original=family.predict, **kwargs):
        """The student's pass, unless it is without gradient: inside of base_prediction, or in a rollout."""
        label = "U-Net, student"
        if not torch.is_grad_enabled():
            label = "U-Net, rollout"
        if watch.label == "U-Net, base":
            label = watch.label
        run = watch.wrapped(label, _original)
        return run(*args, **kwargs)

    return [
        (script, "training_step", training_step),
        (script, "log_estimate", log_estimate),
        (memory_estimate, "memory_table", memory_table),
        (script, "build_dataloader", build_dataloader),
        (RunState, "clip_grad_norm", clip_grad_norm),
        (script, "mean_terms", mean_terms),
        (family, "predict", predict),
        *plain_parts(script, family, watch),
    ]


def plain_parts(script, family, watch: Stopwatch):
    """The functions that are each a part as they are."""
    parts = (
        ("captions", family, "encode_prompts"),
        ("encode", script, "encode_images"),
        ("U-Net, base", script, "base_prediction"),
        ("decode", late_step, "decode_latents"),
        ("guide", script, "guide_score"),
        ("noise, drawn on the CPU", randomness, "randn_tensor"),
    )
    for label, target, name in parts:
        original = getattr(target, name)
        yield target, name, watch.wrapped(label, original)


def measure(script, script_args, profile_steps: int) -> dict:
    """Runs the script's `main` to its end and returns what was seen on the way."""
    recorder = Recorder(script_args.max_train_steps, profile_steps)
    with ExitStack() as stack:
        for target, name, wrapper in wrappers(script, recorder):
            stack.enter_context(patch.object(target, name, wrapper))
        stack.enter_context(recorder.phase)
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
