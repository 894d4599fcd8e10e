"""Memory and FLOP as estimated, against what the script's own training step takes on the same tiny models."""

import argparse
import copy
import functools
import json
import logging
import weakref
from types import SimpleNamespace

import pytest
import torch
import train_acpo_lora_sd as script
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel

from acpo_utils.evaluators import WeightedEvaluators, load_evaluator
from acpo_utils.families.latents import build_decoder
from acpo_utils.late_step import checkpoint_decoder
from acpo_utils.randomness import step_generator
from acpo_utils.training import memory_estimate as estimate
from acpo_utils.training.step_cost import FORMULAS, ON_CPU, ON_CPU_BACKWARD, Meter, StepCost
from tests.scripts.test_training_step import DEFAULTS
from tests.tiny_models import tiny_scheduler, tiny_taesd, tiny_unet, tiny_vae


FLAGS = DEFAULTS | {
    "train_batch_size": 3,
    "resolution": 32,
    "decode_size": 16,
    "decode_dtype": "fp32",
    "tiny_vae_name_or_path": None,
    "gradient_checkpointing": False,
    "mixed_precision": "no",
    "cache_latents": False,
    "center_crop": False,
    "seed": 0,
    "gradient_accumulation_steps": 1,
    "torch_compile": False,
    "max_train_steps": 10,
    "balance_steps": 100,
}


@pytest.fixture
def world(tiny_pipeline, tiny_guide):
    return build_world(tiny_pipeline, tiny_guide)


@pytest.fixture(scope="module")
def lasting(tiny_pipeline, tiny_guide):
    """A world for tests that leave it as it is, with one `StepCost` for all of them, as advice has one for all flags."""
    world = build_world(tiny_pipeline, tiny_guide)
    world.cost = functools.cache(world.cost)
    flags = world.flags

    def flags_of_this_case(**changes):
        world.models[2] = world.vae  # a case before may have had another decoder
        return flags(**changes)

    world.flags = flags_of_this_case
    return world


def build_world(tiny_pipeline, tiny_guide):
    text_encoder = CLIPTextModel.from_pretrained(tiny_pipeline, subfolder="text_encoder").requires_grad_(False)
    vae, unet = tiny_vae().requires_grad_(False).eval(), tiny_unet().requires_grad_(False)
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    models, guide, scheduler = [unet, vae, vae, text_encoder], load_evaluator(f"ipce:{tiny_guide}"), tiny_scheduler()
    guide_inputs = (torch.rand(2, 3, 32, 32), ["a red wall", "a blue wall"])

    with torch.no_grad():
        guide.score(*guide_inputs)  # as main() checks it first: its prompt embeddings are kept from here on

    def flags(**changes):
        args = argparse.Namespace(**(FLAGS | changes))
        getattr(unet, f"{'enable' if args.gradient_checkpointing else 'disable'}_gradient_checkpointing")()
        checkpoint_decoder(models[2], args.gradient_checkpointing)
        if args.decode_dtype == "bf16":
            models[2] = build_decoder(vae, args)
            checkpoint_decoder(models[2], args.gradient_checkpointing)
        return args

    def step(args):
        rows = args.train_batch_size
        batch = {"pixel_values": torch.zeros(rows, 3, 32, 32), "input_ids": torch.ones(rows, 16, dtype=torch.long)}
        with torch.no_grad():
            embeds = text_encoder(batch.pop("input_ids"), return_dict=False)[0]
        batch |= {"prompt_embeds": embeds, "negative_conditions": {"prompt_embeds": embeds[:1]}}
        batch["prompts"] = ["a red wall"] * rows
        return script.training_step(
            batch, *models, guide, scheduler, step_generator(0), anchor_weight=args.anchor_weight, args=args
        )[0]

    def cost():
        guided = (guide, *guide_inputs)
        return StepCost(script.training_step, models, guided, scheduler, conditions, torch.device("cpu"))

    conditions = {"prompt_embeds": torch.randn(1, 16, 32)}
    scorers = {"guide": [guide], "judges": []}
    return SimpleNamespace(
        models=models,
        guide=guide,
        scheduler=scheduler,
        guide_inputs=guide_inputs,
        scorers=scorers,
        unet=unet,
        vae=vae,
        flags=flags,
        step=step,
        cost=cost,
    )


def bytes_kept(step, models) -> int:
    """Of the storages, each once, that autograd still keeps when `step` has returned its loss; no weights."""
    weights = {t.untyped_storage()._cdata for model in models for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights | kept.keys():
            kept[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, kept.pop, storage._cdata)
        return tensor.detach()  # an op's own output would hold its graph in a circle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step()
        assert loss.requires_grad  # and is alive, its graph with it
        return sum(kept.values())


CASES = [
    {},
    {"train_batch_size": 1},
    {"gradient_checkpointing": True},
    {"diffusion_timesteps": "late"},
    {"decode": "crop"},
    {"decode_batch_size": 1},
    {"decode_dtype": "bf16"},
    {"decode": "straight_through", "decode_dtype": "bf16"},
    {"quality_weight": 0.0},
    {"quality_weight": 0.0, "anchor_weight": 0.0},
    {"diffusion_weight": 0.0, "anchor_weight": 0.0},
    {"late_steps": 3, "late_backprop_steps": 2},
    {"late_steps": 3, "late_backprop_steps": 1, "anchor_weight": 0.0},
    {"late_start": "rollout", "num_inference_steps": 20},
    {"guide_perturbation": 2.0},
    {"guide_perturbation": 2.0, "guide_clean_weight": 0.0},
    {"scored_guidance": True, "late_steps": 2},
]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_bytes_kept_for_the_backward_pass(lasting, changes):
    args = lasting.flags(**changes)
    parts = estimate.memory_parts(lasting.cost(), lasting.scorers, args)
    estimated = sum(size for part, size in parts.items() if part.startswith("kept"))
    assert estimated == pytest.approx(
        bytes_kept(lambda: lasting.step(args), [*lasting.models, lasting.guide]), rel=0.03
    )
    assert ("kept: U-Net, L_diff" in parts) == (args.diffusion_weight > 0 and args.diffusion_timesteps == "full")
    assert ("kept: decode" in parts) == ("kept: guide" in parts) == (args.quality_weight > 0)


def test_half_precision_as_accelerate_prepares_it(world):
    """accelerate's autocast is bound to the real U-Net: the estimate runs its own."""
    args = world.flags(mixed_precision="bf16", quality_weight=0.0)
    unet = world.unet.to(torch.bfloat16)
    cast_training_params(unet, dtype=torch.float32)
    world.models[3].to(torch.bfloat16)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    try:
        world.models[0] = Accelerator(mixed_precision="bf16", cpu=True).prepare(unet)
    finally:
        AcceleratorState._reset_state()
    forward = world.models[0].forward
    parts = estimate.memory_parts(world.cost(), world.scorers, args)
    estimated = sum(size for part, size in parts.items() if part.startswith("kept"))
    assert estimated == pytest.approx(bytes_kept(lambda: world.step(args), world.models), rel=0.03)
    assert parts["weights: U-Net"] == sum(p.nbytes for p in unet.parameters() if not p.requires_grad)
    assert world.models[0].forward == forward


@pytest.mark.parametrize(
    "changes", [{}, {"gradient_checkpointing": True}, {"decode": "tiny"}, {"decode_batch_size": 1}], ids=str
)
def test_the_peak_is_that_of_the_allocator(world, changes, tmp_path):
    if "decode" in changes:
        world.models[2] = tiny_taesd().requires_grad_(False)
    args = world.flags(**changes)
    parts = estimate.memory_parts(world.cost(), world.scorers, args)
    estimated = sum(size for part, size in parts.items() if part.startswith(("kept", "passing")))
    with Meter() as meter:
        world.step(args).backward()
    assert estimated == pytest.approx(meter.peak, rel=0.03)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        world.step(args).backward()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    events = sorted((e for e in events if e["name"] == "[memory]"), key=lambda event: event["ts"])
    taken = torch.tensor([event["args"]["Bytes"] for event in events], dtype=torch.float64).cumsum(0)
    assert estimated == pytest.approx(taken.max().item(), rel=0.12)  # the convolutions' scratch is the difference


def test_weights_and_optimizer_to_the_byte(world):
    args = world.flags()
    trained = [p for p in world.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    world.step(args).backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    gradients = [p.grad for p in trained]
    judge = torch.nn.Linear(5, 7)
    guide = WeightedEvaluators({"a": world.guide, "b": SimpleNamespace(function=judge)}, [0.5, 0.5])
    parts = estimate.memory_parts(world.cost(), {"guide": [guide], "judges": [judge, None]}, args)
    assert parts["LoRA, its gradient, AdamW"] == sum(t.nbytes for t in [*trained, *gradients, *moments])
    assert parts["weights: U-Net"] == sum(p.nbytes for p in world.unet.parameters() if not p.requires_grad)
    assert parts["weights: VAE"] == sum(p.nbytes for p in world.vae.parameters())
    assert parts["weights: text encoder"] == sum(p.nbytes for p in world.models[3].parameters())
    buffers_and_weights = sum(t.nbytes for t in [*world.guide.parameters(), *world.guide.buffers()])
    assert parts["weights: guide"] == buffers_and_weights + 4 * 42 and parts["weights: judges"] == 4 * 42


@pytest.mark.parametrize("changes", [{}, {"late_start": "rollout", "num_inference_steps": 20}], ids=str)
def test_flop_of_a_step(lasting, changes):
    args = lasting.flags(**changes)
    cost = lasting.cost()
    own = {packet: FORMULAS[packet].__wrapped__ for packet in (ON_CPU, ON_CPU_BACKWARD)}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        lasting.step(args).backward()
    text = counter.get_flop_counts()["CLIPTextModel"]  # left out of the estimate
    _, flop = cost(args)
    # Of the base's pass the LoRA's products are counted too.
    assert sum(flop.values()) == pytest.approx(counter.get_total_flops() - sum(text.values()), rel=0.02)


def test_advice_saves_and_fits(lasting):
    args = lasting.flags()
    cost = lasting.cost()
    now = sum(estimate.memory_parts(cost, lasting.scorers, args).values())
    lines = estimate.advice(cost, lasting.scorers, 0.6 * now, args).splitlines()
    alone = [(float(line.split()[0].replace(",", "")) * 2**20, line) for line in lines[1:-2]]
    sizes = [size for size, _ in alone]
    assert sizes == sorted(sizes) and max(sizes) < now
    for flag in ("gradient_checkpointing", "mixed_precision bf16", "train_batch_size 1", "diffusion_timesteps late"):
        assert any(f"--{flag}" in line for line in lines[1:-2]), flag
    assert any("--decode crop" in line for _, line in alone)
    assert not any("--decode tiny" in line for _, line in alone), "TAESD is larger than the tests' VAE"
    assert lines[-2] == "Together these fit:" and float(lines[-1].split()[0]) * 2**20 <= 0.6 * now
    assert "--decode" not in lines[-1] and "late" not in lines[-1], "what leaves the objective as it is comes first"
    assert "would still not fit" in estimate.advice(cost, lasting.scorers, 1000, args)


def test_a_suggestion_costs_what_it_says(lasting, world):
    """With one cache for all flags, as `advice` has it, the numbers are those of a fresh estimate."""
    for changes in ({}, {"gradient_checkpointing": True}, {"decode": "crop"}, {"mixed_precision": "bf16"}):
        costs = (lasting.cost(), world.cost())
        parts = [estimate.memory_parts(cost, world.scorers, world.flags(**changes)) for cost in costs]
        assert parts[0] == parts[1]


def test_what_is_in_force_is_not_suggested(world):
    args = world.flags(gradient_checkpointing=True, mixed_precision="fp16", cache_latents=True, train_batch_size=1)
    args.decode, args.late_start, args.decode_batch_size, args.decode_dtype = "tiny", "rollout", 1, "bf16"
    assert list(estimate.flag_changes(args, world.vae)) == []
    args = world.flags(train_batch_size=6, gradient_accumulation_steps=2)
    assert {"train_batch_size": 3, "gradient_accumulation_steps": 4} in list(estimate.flag_changes(args, world.vae))


def log(world, caplog, **changes):
    caplog.clear()
    accelerator = SimpleNamespace(is_main_process=True, device=torch.device("cpu"), mixed_precision="no")
    with caplog.at_level(logging.INFO, logger="acpo_utils.training.memory_estimate"):
        args = world.flags(**changes)
        estimate.log_estimate(
            accelerator,
            script.training_step,
            world.models,
            world.guide,
            {},
            world.scheduler,
            world.guide_inputs,
            {"prompt_embeds": torch.zeros(1, 16, 32)},
            args,
        )
    return [(record.levelname, record.message) for record in caplog.records]


def test_what_is_logged_and_what_is_left_alone(world, caplog, monkeypatch):
    args = world.flags()
    world.step(args)
    models = copy.deepcopy([model.state_dict() for model in world.models])
    modules = [[(module.training, vars(module).keys()) for module in model.modules()] for model in world.models]
    state, prompts = torch.get_rng_state(), dict(world.guide._text_cache)
    ((level, table),) = log(world, caplog)
    assert level == "INFO" and "kept: decode" in table and "available" in table
    assert torch.equal(torch.get_rng_state(), state)
    for model, before, flags in zip(world.models, models, modules):
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert [(module.training, vars(module).keys()) for module in model.modules()] == flags
        assert all(parameter.grad is None for parameter in model.parameters())
    cached = world.guide._text_cache
    assert all(type(embeds) is torch.Tensor for embeds in cached.values()) and prompts.keys() <= cached.keys()
    assert type(world.scheduler.alphas_cumprod) is torch.Tensor
    loss = world.step(args)
    assert torch.equal(loss, world.step(args)) and type(loss) is torch.Tensor

    monkeypatch.setattr(estimate, "available_memory", lambda device, memory: 5e6)
    levels = [level for level, _ in log(world, caplog)]
    assert levels == ["INFO", "WARNING"]


def test_what_measuring_the_balance_takes_beside_checkpointing_is_said(world, caplog):
    """Its backward passes keep the graph, and with it all that a checkpoint has computed again."""
    plain, checkpointed = (
        sum(estimate.memory_parts(world.cost(), world.scorers, world.flags(gradient_checkpointing=on)).values())
        for on in (False, True)
    )
    _, (level, more) = log(world, caplog, gradient_checkpointing=True)
    assert level == "INFO" and plain > checkpointed
    assert f"up to {(plain - checkpointed) / 2**20:,.1f} MiB more at each of --balance_steps" in more
    assert len(log(world, caplog, gradient_checkpointing=True, balance_steps=0)) == 1


def test_a_failure_is_said_and_ends_nothing(world, caplog, monkeypatch):
    def score(images, prompts):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(world.guide, "score", score)
    assert log(world, caplog) == [("WARNING", "No estimate of memory: RuntimeError: out of luck")]
