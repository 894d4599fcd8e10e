"""What one step of train_acpo_lora_sd.py or _sdxl.py takes, in memory and FLOP, told without running it.

U-Net, encoder and decoder run once each on fake tensors, which have shape, dtype and device but no data, so that device,
autocast and checkpointing choose the kernels they will choose. The guide, which can be anything, runs for real. Then the
script's own `training_step` runs with stand-ins that take as much: it alone says what is called, and how often.
"""

import copy
import functools
import itertools
import weakref
from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple

import torch
from accelerate.utils import convert_outputs_to_fp32
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from acpo_utils.families.latents import StraightThrough, latents_shape, vae_factor
from acpo_utils.families.quantization import in_full_precision, largest_layer, loaded_quantization
from acpo_utils.late_step import checkpoint_decoder
from acpo_utils.randomness import step_generator
from acpo_utils.sharding import WEIGHT_DTYPES


ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch has no formula for these two
ON_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
FORMULAS = flop_registry | {
    ON_CPU: shape_wrapper(lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)),
    ON_CPU_BACKWARD: shape_wrapper(lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)),
}


class Meter(TorchDispatchMode):
    """Inside, counts FLOP, and the bytes `alive` of those allocated inside (so no weights), with their `peak`."""

    def __init__(self):
        super().__init__()
        self.flop, self.storages, self.alive, self.peak = 0, {}, 0, 0  # storages: bytes by key

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if formula := FORMULAS.get(func.overloadpacket):
            self.flop += formula(*args, **(kwargs or {}), out_val=out)
        new = {key: tensor for key, tensor in _by_storage(out).items() if key not in self.storages}
        given = _by_storage((args, kwargs)) if new else {}
        for key in new.keys() - given.keys():  # a view of a weight has been allocated outside
            storage = new[key].untyped_storage()
            self.storages[key] = storage.nbytes()
            self.alive += storage.nbytes()
            weakref.finalize(storage, self._freed, key)
        self.peak = max(self.peak, self.alive)
        return out

    def _freed(self, key: int) -> None:
        self.alive -= self.storages.pop(key)


def _by_storage(tensors) -> dict[int, torch.Tensor]:
    tensors = (tensor for tensor in tree_leaves(tensors) if isinstance(tensor, torch.Tensor))
    return {tensor.untyped_storage()._cdata: tensor for tensor in tensors}


class Cost(NamedTuple):
    """Of one row of a batch: bytes kept for the backward pass, bytes more at the peak, and FLOP."""

    kept: float
    passing: float
    forward: float
    backward: float


def cost_of(run) -> Cost:
    """Of `run()`, which returns a tensor (rows, ...), and of its backward pass if it has one."""
    with Meter() as meter:
        out = run()
        kept, forward = meter.alive, meter.flop
        if out.requires_grad:
            out.float().sum().backward()
    return Cost(
        kept=kept / len(out),
        passing=(meter.peak - kept) / len(out),
        forward=forward / len(out),
        backward=(meter.flop - forward) / len(out),
    )


class _Ledger:
    """What the stand-ins have taken so far: by part the bytes `held` and the FLOP, and the `peak` of bytes."""

    def __init__(self):
        self.held, self.flop, self.peak = Counter(), Counter(), 0.0

    def spend(self, part: str, shape, cost: Cost, *inputs: torch.Tensor) -> torch.Tensor:
        """An empty fp32 tensor of `shape` (rows, ...), which costs `cost` a row, and its backward pass too."""
        return _Graph.apply(shape, _Node(self, part, Cost(*(shape[0] * number for number in cost))), *inputs)


class _Node:
    """Holds its part's bytes until autograd lets go of it: after the backward pass, or where a graph is dropped."""

    def __init__(self, ledger: _Ledger, part: str, cost: Cost):
        self.ledger, self.part, self.cost = ledger, part, cost
        ledger.held[part] += cost.kept
        self.run(cost.forward)

    def run(self, flop: float) -> None:
        self.ledger.flop[self.part] += flop
        self.ledger.peak = max(self.ledger.peak, self.ledger.held.total() + self.cost.passing)

    def __del__(self):
        self.ledger.held[self.part] -= self.cost.kept


class _Graph(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shape, node, *inputs):
        ctx.node, ctx.inputs = node, [(tensor.shape, tensor.dtype) for tensor in inputs]
        return inputs[0].new_empty(shape, dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        ctx.node.run(ctx.node.cost.backward)
        del ctx.node
        return None, None, *(grad.new_empty(shape, dtype=dtype) for shape, dtype in ctx.inputs)


class StepCost:
    """What one micro-step of `training_step` takes, with the flags of `args`, or with others.

    Args:
        models: (unet with its LoRA, vae, decoder, text_encoder), before `accelerator.prepare`; they stay as they are.
        guide: (evaluator, images (B, 3, H, W) in [0, 1] of the training's size, B prompts); None without L_quality.
        conditions: what the U-Net is told of one caption, {name: (1, ...)}, as the batch has it where it is cached.
        device: the training's torch.device. quantization: of a `unet` that was not loaded so, BitsAndBytesConfig's keywords.
    """

    def __init__(self, training_step, models, guide, noise_scheduler, conditions: dict, device, quantization=None):
        self.quantization = quantization or loaded_quantization(models[0])
        models = (in_full_precision(models[0]), *models[1:])
        self.training_step, self.models, self.guide, self.device = training_step, models, guide, device
        self.conditions = conditions
        self.scheduler, self.fake_mode = noise_scheduler, FakeTensorMode(allow_non_fake_inputs=True)
        self.copies, self.costs = {}, {}

    def __call__(self, args: SimpleNamespace) -> tuple[dict[str, float], dict[str, float]]:
        """{part: bytes}, whose sum is needed at a time, and {part: FLOP}."""
        half, ledger, passes = WEIGHT_DTYPES.get(args.mixed_precision), _Ledger(), itertools.count(1)
        unet, vae = self._fake(self.models[0], half or torch.float32), self._fake(self.models[1])
        decoder = self.models[2]
        if args.decode == "tiny" and not is_tiny(decoder):
            decoder = tiny_decoder(self.models[1])  # a suggestion
        straight = isinstance(decoder, StraightThrough)  # whose two decoders have their dtypes
        decoder = self._fake(decoder, None if straight else WEIGHT_DTYPES.get(args.decode_dtype))
        if half:
            unet.forward = convert_outputs_to_fp32(torch.autocast(self.device.type, half)(unet.forward))
        getattr(unet, f"{'enable' if args.gradient_checkpointing else 'disable'}_gradient_checkpointing")()
        checkpoint_decoder(decoder, args.gradient_checkpointing)

        def cost(run, *key) -> Cost:
            if key not in self.costs:
                with torch.enable_grad():
                    self.costs[key] = cost_of(run)
            return self.costs[key]

        def predict_one_by_one(latents, *others, **named):
            def as_batch(given):
                return (torch.stack(unet(list(given.unbind()), *others, **named)[0]),)

            return (list(predict(torch.stack(latents), model=as_batch)[0].unbind()),)

        def predict(latents, *others, model=unet, **named):
            if isinstance(latents, list):  # as Z-Image's transformer takes them
                return predict_one_by_one(latents, *others, **named)
            given = latents.detach().requires_grad_(latents.requires_grad)
            run = lambda: model(given, *others, **named)[0]  # noqa: E731
            flags = (args.mixed_precision, args.gradient_checkpointing)
            each = cost(run, "unet", latents.shape[1:], latents.requires_grad, *flags)
            each = each._replace(passing=each.passing + dequantized / len(latents))
            if torch.is_grad_enabled():
                return (ledger.spend(f"U-Net {next(passes)}", latents.shape, each, latents, trained),)
            each = each._replace(kept=0, passing=0)  # before there is any graph
            return (ledger.spend("U-Net without gradient", latents.shape, each, latents),)

        def encode(pixel_values):
            each = cost(lambda: vae.encode(pixel_values).latent_dist.parameters, "encode", pixel_values.shape[1:])
            moments = ledger.spend("encode", moments_shape, each._replace(kept=0), pixel_values)
            return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(moments))

        def decode(latents, return_dict=False):
            given = latents.detach().requires_grad_()
            run = lambda: decoder.decode(given, return_dict=False)[0]  # noqa: E731
            flags = (args.decode, args.decode_dtype, args.gradient_checkpointing)
            each = cost(run, "decode", latents.shape[1:], *flags)
            height, width = (vae_factor(vae) * extent for extent in latents.shape[-2:])
            if args.decode_batch_size:  # the image is kept; each chunk's graph is made, and gone, in the backward pass
                image = 3 * height * width * torch.float32.itemsize
                later = {"passing": each.passing + each.kept - image, "backward": each.backward + each.forward}
                each = each._replace(kept=image, **later)
            return (ledger.spend("decode", (len(latents), 3, height, width), each, latents),)

        def score(images, prompts):
            evaluator, real_images, real_prompts = self.guide
            height, width = images.shape[-2:]
            given = lambda: real_images[..., :height, :width].detach().clone().requires_grad_()  # noqa: E731
            each = cost(lambda: evaluator.score(given(), real_prompts), "guide", height, width)
            return ledger.spend("guide", (len(images),), each, images)

        dequantized = largest_layer(self.models[0], self.quantization) * (half or torch.float32).itemsize
        shape = latents_shape(vae, args.train_batch_size, args.resolution)
        side = args.resolution // vae_factor(vae)
        moments_shape = (shape[0], 2 * vae.config.latent_channels, side, side)
        rows = {name: (shape[0], *value.shape[1:]) for name, value in self.conditions.items()}
        with self.fake_mode, self.device:
            trained = torch.ones((), requires_grad=True)
            conditions = {name: torch.zeros(row, dtype=half) for name, row in rows.items()}
            batch = {"prompts": [""] * shape[0], "negative_conditions": {n: c[:1] for n, c in conditions.items()}}
            batch |= conditions
            if args.cache_latents:
                batch["latent_moments"] = torch.zeros(moments_shape, dtype=half)
            elif not args.train_prompts:
                batch["pixel_values"] = torch.zeros(shape[0], 3, args.resolution, args.resolution)
        statistics = {"bn": vae.bn} if hasattr(vae, "bn") else {}  # of FLUX.2's latents
        stand_in = torch.nn.Module()
        stand_in.forward, stand_in.config = predict, self.models[0].config
        loss, _ = self.training_step(
            batch,
            stand_in,
            SimpleNamespace(config=vae.config, encode=encode, **statistics),
            SimpleNamespace(config=decoder.config, dtype=decoder.dtype, decode=decode, **statistics),
            None,  # the text encoder: the batch has what it says
            SimpleNamespace(score=score),
            self.scheduler,
            step_generator(args.seed),
            args.anchor_weight,
            args,
        )
        kept = dict(ledger.held)
        loss.backward()
        return kept | {"passing": ledger.peak - sum(kept.values())}, dict(ledger.flop)

    def _fake(self, model: torch.nn.Module, frozen_dtype: torch.dtype | None = None) -> torch.nn.Module:
        """A copy of `model` on fake tensors on the device; those that are not trained in `frozen_dtype`, if given."""
        if (model, frozen_dtype) in self.copies:
            return self.copies[model, frozen_dtype]
        memo = {}
        for tensor in [*model.parameters(), *model.buffers()]:
            frozen = frozen_dtype and tensor.is_floating_point() and not tensor.requires_grad
            like = {"dtype": frozen_dtype if frozen else tensor.dtype, "device": self.device}
            with self.fake_mode:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), **like)
                if isinstance(tensor, torch.nn.Parameter):
                    fake = torch.nn.Parameter(fake, tensor.requires_grad)
                if tensor.requires_grad:
                    fake.grad = torch.empty_like(fake)  # there from the first step on
            memo[id(tensor)] = fake
        self.copies[model, frozen_dtype] = copy.deepcopy(model, memo)
        return self.copies[model, frozen_dtype]


def is_tiny(decoder: torch.nn.Module) -> bool:
    """Whether it was loaded for --decode tiny: an AutoencoderTiny, or FLUX.2's small decoder."""
    return isinstance(decoder, AutoencoderTiny) or bool(decoder.config.get("decoder_block_out_channels"))


def tiny_decoder(vae: torch.nn.Module) -> torch.nn.Module:
    """What --decode tiny would load beside `vae`, of its size, on the meta device."""
    if not hasattr(vae, "bn"):
        return taesd(len(vae.config.block_out_channels), vae.config.latent_channels)
    return small_decoder(vae)


@functools.cache
def small_decoder(vae: torch.nn.Module) -> torch.nn.Module:
    """Of FLUX.2-small-decoder's widths, which are three quarters of the VAE's."""
    widths = tuple(3 * width // 4 for width in vae.config.block_out_channels)
    with torch.device("meta"):
        decoder = type(vae).from_config(vae.config, decoder_block_out_channels=widths)
    decoder.encoder = decoder.quant_conv = None
    return decoder.requires_grad_(False)


@functools.cache
def taesd(levels: int, latent_channels: int) -> AutoencoderTiny:
    """Of TAESD's size, on the meta device, for a VAE of so many levels."""
    widths = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (64,) * levels)
    blocks = {"num_encoder_blocks": (1,) + (3,) * (levels - 1), "num_decoder_blocks": (3,) * (levels - 1) + (1,)}
    with torch.device("meta"):
        return AutoencoderTiny(latent_channels=latent_channels, **widths, **blocks).requires_grad_(False)
