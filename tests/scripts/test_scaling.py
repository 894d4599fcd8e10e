"""Two processes (gloo, on the CPU) against one that does the same work: what docs/scaling.md says is equal, and is not.

The scripts run as they are; what each training step was given and returned, and what was logged, is written down beside
them. Two processes are started by `accelerate launch` and the configurations of examples/accelerate_configs: cpu_2.yaml, and
those of DeepSpeed and FSDP2, for which accelerate is made to take the two processes for two GPUs.
"""

import functools
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Dataset, Features, Image, Value
from safetensors.torch import load_file

from acpo_utils.checkpoints import find_checkpoint
from acpo_utils.evaluators import TwoStreamIQA
from tests import REPOSITORY
from tests.launching import EXAMPLES, command_line, free_port, fresh_process
from tests.scripts.test_train_iqa_ipce import rated_rows, write_rows
from tests.scripts.test_train_iqa_twostream import rated_rows as rated_photographs
from tests.test_sharding import OLD
from tests.tiny_images import pictures
from tests.tiny_models import UNET2D_CONFIG, build_clip_folder, tiny_ddpm


CONFIGS = EXAMPLES / "accelerate_configs"
STEPS = 4

# Of each training: its script, and the file of what it has trained.
KINDS = {
    "sd": ("train_acpo_lora_sd.py", "pytorch_lora_weights.safetensors"),
    "sd3": ("train_acpo_lora_sd3.py", "pytorch_lora_weights.safetensors"),
    "ddpm": ("train_acpo_ddpm.py", "lora/adapter_model.safetensors"),
    "ddpm from scratch": ("train_acpo_ddpm.py", "unet/diffusion_pytorch_model.safetensors"),
    "ipce": ("train_iqa_ipce.py", "checkpoint-4/model.safetensors"),
    "two-stream": ("train_iqa_twostream.py", "checkpoint-4/model.safetensors"),
}


@pytest.mark.parametrize(
    "name, kind, processes, precision",
    [
        ("gpu_1_bf16", "NO", 1, "bf16"),
        ("gpu_8_bf16", "MULTI_GPU", 8, "bf16"),
        ("gpu_8_deepspeed_zero2", "DEEPSPEED", 8, "bf16"),
        ("gpu_8_fsdp2", "FSDP", 8, "bf16"),
        ("cpu_2", "MULTI_GPU", 2, "no"),
    ],
)
def test_accelerate_reads_the_configurations(name, kind, processes, precision):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type.value == kind
    assert (config.num_processes, config.num_machines, config.mixed_precision) == (processes, 1, precision)
    assert name in (REPOSITORY / "docs" / "scaling.md").read_text()
    assert len(list(CONFIGS.glob("*.yaml"))) == 5


def run_and_record(script, folder, words):
    """Runs `script`'s main. folder/RANK.json: samples (hashes) and loss of each training step, and what was logged."""
    import hashlib
    import importlib.util
    import json
    from pathlib import Path
    from unittest.mock import patch

    from acpo_utils.training import run as runs

    spec = importlib.util.spec_from_file_location(Path(script).stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    record = {"samples": [], "loss": [], "logs": []}
    training_step = module.training_step

    def recorded_step(*arguments, **more):
        batch = next(value for value in arguments if isinstance(value, dict))
        if any(type(value).__name__ == "FakeTensor" for value in batch.values()):
            return training_step(*arguments, **more)  # the estimate's
        images = next(batch[name] for name in ("pixel_values", "whole", "images") if name in batch)
        record["samples"].append([hashlib.md5(image.cpu().numpy().tobytes()).hexdigest()[:8] for image in images])
        result = training_step(*arguments, **more)
        record["loss"].append((result[0] if isinstance(result, tuple) else result).item())
        return result

    class RecordedAccelerator(runs.Accelerator):
        def log(self, values, step, **kwargs):
            record["logs"].append(values | {"step": step})
            record["rank"] = self.process_index
            super().log(values, step=step, **kwargs)

    module.training_step = recorded_step
    with patch.object(runs, "Accelerator", RecordedAccelerator):
        module.main(module.parse_args(words))
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, f"{record['rank']}.json").write_text(json.dumps(record))


def as_gpus():
    """accelerate shards on what it takes for GPUs alone."""
    import torch
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def read_records(folder, number):
    assert len(list(folder.glob("*.json"))) == number
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(number)]


def two_processes(kind, options, folder, config="cpu_2", precision="no", more=()):
    """The records of both. `folder` is the run's --output_dir."""
    recorder = Path(f"{folder}-recorder.py")
    code = [inspect.getsource(function) for function in (as_gpus, run_and_record)]
    calls = ["as_gpus()"] * (config != "cpu_2") + ["run_and_record(*sys.argv[1:3], sys.argv[3:])\n"]
    recorder.write_text("\n\n".join(["import sys", *code, *calls]))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{config}.yaml"]
    command += ["--num_processes", "2", "--mixed_precision", precision, "--main_process_port", free_port(), *more]
    command += [recorder, EXAMPLES / KINDS[kind][0], f"{folder}-record"]
    run = subprocess.run(
        [*map(str, command), *command_line(**options | {"output_dir": folder})],
        capture_output=True,
        text=True,
        env=os.environ | {"ACCELERATE_USE_CPU": str(config == "cpu_2"), "DS_ACCELERATOR": "cpu"},
        timeout=1800,
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    assert ("Memory, estimated for" in run.stderr) == kind.startswith("sd")
    return read_records(Path(f"{folder}-record"), 2)


def one_process(kind, options, folder):
    with fresh_process():
        run_and_record(EXAMPLES / KINDS[kind][0], f"{folder}-record", command_line(**options | {"output_dir": folder}))
    return read_records(Path(f"{folder}-record"), 1)[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_pipeline, tiny_sd3_pipeline, tiny_guide, captioned_images):
    """The options of each kind, for a training of four steps."""
    folder = tmp_path_factory.mktemp("scaling")
    common = {"train_batch_size": 2, "learning_rate": 1e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 1}
    common |= {"checkpointing_steps": 2, "report_to": "none"}
    sd = {"pretrained_model_name_or_path": tiny_pipeline, "evaluator": f"ipce:{tiny_guide}", "resolution": 32}
    sd |= {"train_data_dir": captioned_images, "random_flip": True, "gradient_checkpointing": True}
    sd |= {"lora_target_modules": "to_k,to_q,to_v,to_out.0,conv1,conv_out"}  # FSDP2 puts the last into no block
    sd3 = sd | {"pretrained_model_name_or_path": tiny_sd3_pipeline, "max_sequence_length": 24}
    sd3 |= {"lora_target_modules": "attn.to_q,attn.to_v,attn.add_k_proj,proj_out"}  # so is this one's last

    torch.manual_seed(4)
    TwoStreamIQA(widths=(4, 4, 8, 8), fusion_width=8).save_pretrained(folder / "guide")
    both = {"train_data_dir": pictures(folder / "images", 12), "num_validation_images": 4, "num_eval_images": 0}
    both |= {"sampler": "ddim", "ddpm_num_inference_steps": 4}
    ddpm = {"pretrained_model_name_or_path": tiny_ddpm(folder / "ddpm"), "evaluator": f"two-stream:{folder / 'guide'}"}
    ddpm |= {"last_steps": 2, "late_start": "rollout", "late_steps": 2}
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"} | UNET2D_CONFIG))
    scratch = {"model_config_name_or_path": folder / "config.json", "resolution": 32, "use_ema": True, "num_epochs": 2}

    features = Features({"image": Image(), "mos": Value("float64"), "part": Value("string")})
    (folder / "photographs").mkdir()
    for seed, (split, number) in enumerate({"train": 10, "validation": 5, "test": 8}.items()):
        write_rows(folder / "ratings" / f"{split}.parquet", rated_rows(number, seed))
        rows = Dataset.from_list(rated_photographs(number, seed), features=features)
        rows.to_parquet(folder / "photographs" / f"{split}.parquet")
    rated = {"validation_steps": 2, "max_train_steps": STEPS}
    ipce = {"clip_model": build_clip_folder(folder / "clip"), "train_data_dir": folder / "ratings"}
    # The bias of an attention's keys has no gradient but rounding, which Adam's own epsilon would let through.
    ipce |= {"random_flip": True, "gradient_accumulation_steps": 2, "adam_epsilon": 1e-4, "eval_batch_size": 3}
    two_stream = {
        "train_data_dir": folder / "photographs",
        "widths": [4, 6, 8, 8],
        "fusion_width": 8,
        "resolution": 32,
    }
    return {
        "sd": common | sd | {"max_train_steps": STEPS},
        "sd3": common | sd3 | {"max_train_steps": STEPS},
        "ddpm": common | both | ddpm | {"max_train_steps": STEPS},
        "ddpm from scratch": common | both | scratch,
        "ipce": common | rated | ipce,
        "two-stream": common | rated | two_stream,
    }


@pytest.fixture(scope="module")
def launched(world, tmp_path_factory):
    """kind -> the records of two processes, and their --output_dir; each kind is launched once."""
    folder = tmp_path_factory.mktemp("two")
    return functools.cache(lambda kind: (two_processes(kind, world[kind], folder / kind), folder / kind))


def of_each_step(values):
    """The micro-steps' `values` in four parts, one for each optimizer step."""
    length, rest = divmod(len(values), STEPS)
    assert length and rest == 0
    return [values[i * length : (i + 1) * length] for i in range(STEPS)]


def samples_of_each_step(*records):
    parts = zip(*(of_each_step(record["samples"]) for record in records))
    return [Counter(name for batches in part for batch in batches for name in batch) for part in parts]


def curve(*records):
    """Of each step the mean loss over processes and micro-steps."""
    return [sum(map(sum, parts)) / sum(map(len, parts)) for parts in zip(*(of_each_step(r["loss"]) for r in records))]


def logged(record, name):
    return [log[name] for log in record["logs"] if name in log]


def check_same_work(two, one):
    """The number of steps, the samples of each, the schedule: all that no generator has a part in."""
    assert all(logged(record, "step")[-1] == len(logged(record, "lr")) == STEPS for record in (*two, one))
    assert len(two[0]["loss"]) == len(two[1]["loss"])
    samples = samples_of_each_step(*two)
    assert samples == samples_of_each_step(one) and len({*map(str, samples)}) == STEPS
    assert logged(two[0], "lr") == logged(two[1], "lr") == pytest.approx(logged(one, "lr"), rel=1e-12)
    assert len({*logged(one, "lr")}) == STEPS
    assert logged(two[0], "grad_norm") == pytest.approx(logged(two[1], "grad_norm"), rel=1e-6)  # of the mean gradient


def difference(*files):
    """The largest, over all tensors but batch normalisation's running statistics."""
    first, second = map(load_file, files)
    assert first.keys() == second.keys()
    trained = [name for name in first if "running_" not in name and "num_batches" not in name]
    return max((first[name].float() - second[name].float()).abs().max().item() for name in trained)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd", "sd3", "ddpm", "ddpm from scratch"])
def test_generators(world, launched, tmp_path, kind):
    two, folder = launched(kind)
    twice = one_process(kind, world[kind] | {"train_batch_size": 4}, tmp_path / "twice")
    check_same_work(two, twice)
    checkpoints = [{path.name for path in run.glob("checkpoint-*")} for run in (folder, tmp_path / "twice")]
    assert checkpoints[0] == checkpoints[1] == {"checkpoint-2", "checkpoint-4"}
    # Each loss, the averaged gradient, what was trained: but for the rounding of another batch size.
    assert curve(*two) == pytest.approx(curve(twice), rel=1e-4)
    assert logged(two[0], "grad_norm") == pytest.approx(logged(twice, "grad_norm"), rel=1e-3)
    assert difference(folder / KINDS[kind][1], tmp_path / "twice" / KINDS[kind][1]) < 1e-5
    assert logged(two[0], "loss") == pytest.approx(curve(*two), rel=1e-5)


@pytest.mark.slow
def test_the_ipce_training_is_one_with_twice_the_batch(world, launched, tmp_path):
    two, folder = launched("ipce")
    twice = one_process("ipce", world["ipce"] | {"train_batch_size": 4}, tmp_path / "twice")
    check_same_work(two, twice)
    assert curve(*two) == pytest.approx(curve(twice), rel=1e-4)
    assert logged(two[0], "grad_norm") == pytest.approx(logged(twice, "grad_norm"), rel=1e-3)
    assert difference(folder / KINDS["ipce"][1], tmp_path / "twice" / KINDS["ipce"][1]) < 1e-5
    first, second = (json.loads((run / "metrics.json").read_text()) for run in (folder, tmp_path / "twice"))
    assert first["best_step"] == second["best_step"] and first["test"]["count"] == second["test"]["count"] == 16
    assert first["test"]["rmse"] == pytest.approx(second["test"]["rmse"], abs=1e-4)
    # What is logged is the mean over the processes of the last micro-step.
    last = [sum(losses) / 2 for losses in zip(*(record["loss"][1::2] for record in two))]
    assert logged(two[0], "loss") == pytest.approx(last, rel=1e-5)


@pytest.mark.slow
def test_the_two_stream_training_is_one_that_accumulates(world, launched, tmp_path):
    """Batch normalisation takes in one process's batch at a time: so it does where one process accumulates two."""
    two, folder = launched("two-stream")
    same = one_process("two-stream", world["two-stream"] | {"gradient_accumulation_steps": 2}, tmp_path / "same")
    check_same_work(two, same)
    assert curve(*two) == pytest.approx(curve(same), rel=1e-4)
    files = [run / KINDS["two-stream"][1] for run in (folder, tmp_path / "same")]
    assert difference(*files) < 1e-5
    # The running statistics, by which the evaluator scores later, are the first process's: of half of the images.
    means = [torch.cat([tensor for name, tensor in load_file(f).items() if "running_mean" in name]) for f in files]
    assert not torch.allclose(*means, rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ipce", "two-stream"])
def test_adversarial_training_is_one_with_twice_the_batch(world, tmp_path, kind):
    """No statistics of a batch, so that it holds for the two-stream evaluator too; what an attack is, each process finds."""
    options = world[kind] | {"adversarial_epsilon": 2, "gradient_norm_weight": 1e-3}
    if kind == "two-stream":
        torch.manual_seed(5)
        TwoStreamIQA(widths=(4, 6, 8, 8), fusion_width=8).save_pretrained(tmp_path / "start")
        options["init_evaluator"] = tmp_path / "start"
    two = two_processes(kind, options, tmp_path / "two")
    twice = one_process(kind, options | {"train_batch_size": 4}, tmp_path / "twice")
    assert curve(*two) == pytest.approx(curve(twice), rel=1e-4)
    assert logged(two[0], "gradient_norm") == pytest.approx(logged(two[1], "gradient_norm"), rel=1e-6)
    assert len(logged(twice, "gradient_norm")) == STEPS
    assert logged(two[0], "grad_norm") == pytest.approx(logged(twice, "grad_norm"), rel=1e-3)
    assert difference(tmp_path / "two" / KINDS[kind][1], tmp_path / "twice" / KINDS[kind][1]) < 1e-5


@pytest.mark.slow
def test_one_process_does_not_go_on_from_two(world, launched, tmp_path):
    _, folder = launched("ddpm")
    shutil.copytree(folder / "checkpoint-2", tmp_path / "fewer" / "checkpoint-2")
    with pytest.raises(ValueError, match="is of 2 process.*this run has 1"):
        one_process("ddpm", world["ddpm"] | {"resume_from_checkpoint": "latest"}, tmp_path / "fewer")


def check_sharded(config, kind, world, launched, folder, more=()):
    """By `config` as by DDP; a run that was stopped after two steps goes on to the same end."""
    (plain, plain_folder), how = launched(kind), {"config": config, "more": more}
    sharded = two_processes(kind, world[kind], folder / "all", **how)
    assert curve(*sharded) == pytest.approx(curve(*plain), rel=1e-4)
    assert logged(sharded[0], "grad_norm") == pytest.approx(logged(plain[0], "grad_norm"), rel=1e-3)
    assert logged(sharded[0], "lr") == logged(plain[0], "lr")
    assert difference(folder / "all" / KINDS[kind][1], plain_folder / KINDS[kind][1]) < 1e-5
    shutil.copytree(folder / "all" / "checkpoint-2", folder / "rest" / "checkpoint-2")
    rest = two_processes(kind, world[kind] | {"resume_from_checkpoint": "latest"}, folder / "rest", **how)
    assert logged(rest[0], "loss") == logged(sharded[0], "loss")[2:]
    assert difference(folder / "all" / KINDS[kind][1], folder / "rest" / KINDS[kind][1]) == 0
    with pytest.raises(ValueError, match="is of a run by (DEEPSPEED|FSDP), this one is by DDP"):
        find_checkpoint(folder / "all", "latest")


@pytest.mark.slow
@pytest.mark.parametrize("kind, stage", [("sd", 2), ("sd3", 2), ("ddpm", 1), ("ddpm from scratch", 2)])
def test_deepspeed(world, launched, tmp_path, kind, stage):
    pytest.importorskip("deepspeed")
    check_sharded("gpu_8_deepspeed_zero2", kind, world, launched, tmp_path, ["--zero_stage", stage])


@pytest.mark.slow
@pytest.mark.skipif(OLD, reason="FSDP2 needs accelerate 1.15")
@pytest.mark.parametrize("kind, layers", [("sd", None), ("sd3", "JointTransformerBlock")])
def test_fsdp2(world, launched, tmp_path, kind, layers):
    """The layers to wrap are in the configuration a U-Net's, and a transformer's given beside it, as docs/scaling.md says."""
    more = ["--fsdp_transformer_layer_cls_to_wrap", layers] if layers else []
    check_sharded("gpu_8_fsdp2", kind, world, launched, tmp_path, more)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["gpu_8_deepspeed_zero2", "gpu_8_fsdp2"])
def test_sharded_in_bf16_with_all_that_one_process_does_alone(world, tmp_path, config):
    if "deepspeed" in config:
        pytest.importorskip("deepspeed")
    elif OLD:
        pytest.skip("FSDP2 needs accelerate 1.15")
    (tmp_path / "prompts.txt").write_text("a red wall\na blue wall\na green wall\n")
    alone = {"eval_prompts": tmp_path / "prompts.txt", "num_inference_steps": 3, "validation_prompt": "a wall"}
    alone |= {"validation_steps": 2, "balance_steps": 1, "on_hacking": "keep_best", "gradient_accumulation_steps": 2}
    alone |= {"judge": world["sd"]["evaluator"]}
    options = world["sd"] | alone
    sharded = two_processes("sd", options, tmp_path / "sharded", config, precision="bf16")
    plain = two_processes("sd", options, tmp_path / "plain", precision="bf16")
    assert curve(*sharded) == pytest.approx(curve(*plain), rel=2e-3)
    assert logged(sharded[0], "grad_norm") == pytest.approx(logged(plain[0], "grad_norm"), rel=0.05)
    assert "balance/" in str(plain[0]["logs"]) and "balance/" not in str(sharded[0]["logs"])
    names = {f"{name}-{n}.png" for name in ("step", "base-beside-step") for n in (2, 4)}
    for run in ("sharded", "plain"):
        assert {path.name for path in (tmp_path / run / "validation").iterdir()} == names
        assert (tmp_path / run / "best" / "pytorch_lora_weights.safetensors").is_file()
        assert "guide" in json.loads((tmp_path / run / "metrics.json").read_text())["comparisons"]
    shutil.copytree(tmp_path / "sharded" / "checkpoint-2", tmp_path / "rest" / "checkpoint-2")
    resumed = {"resume_from_checkpoint": "latest"}
    two_processes("sd", options | resumed, tmp_path / "rest", config, precision="bf16")
    assert difference(*(tmp_path / run / KINDS["sd"][1] for run in ("sharded", "rest"))) == 0
    with pytest.raises(AssertionError, match="is of a run with --lora_alpha 4 .now 16."):
        two_processes("sd", options | resumed | {"lora_alpha": 16}, tmp_path / "rest", config, precision="bf16")


@pytest.mark.slow
def test_an_evaluator_is_not_sharded(world, tmp_path):
    with pytest.raises(AssertionError, match="distributed_type FSDP: expected one of NO, MULTI_GPU"):
        two_processes("ipce", world["ipce"], tmp_path / "ipce", "gpu_8_fsdp2")
