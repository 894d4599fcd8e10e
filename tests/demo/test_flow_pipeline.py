"""The embedded flow-matching model: what its card says of its parts, and how its script puts them together."""

import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from diffusers.utils import logging

from acpo_utils.data import tokenize
from acpo_utils.families.loading import DTYPE
from tests.launching import EXAMPLES


DEMO = EXAMPLES / "demo"


@pytest.fixture(scope="module")
def flow():
    without_t5 = {"text_encoder_3": None, "tokenizer_3": None}
    return StableDiffusion3Pipeline.from_pretrained(DEMO / "pipeline-flow", **without_t5, **{DTYPE: torch.float32})


@pytest.fixture(scope="module")
def teacher():
    return StableDiffusionPipeline.from_pretrained(DEMO / "pipeline", **{DTYPE: torch.float32})


def test_it_is_small_and_in_half_precision():
    files = [path for path in (DEMO / "pipeline-flow").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 30e6


def test_zeros_in_the_place_of_t5_are_ignored(flow):
    """The card says that with 256 of them it draws as well as with one."""
    logging.set_verbosity_error()
    torch.manual_seed(0)
    velocities = {}
    latents = torch.randn(2, 4, 16, 16)
    for zeros in (1, 256):
        embeds, _, pooled, _ = flow.encode_prompt(
            ["a fox, noto style, on a mint background", "a bee on a white background"],
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=zeros,
        )
        with torch.no_grad():
            velocities[zeros] = flow.transformer(
                latents,
                timestep=torch.tensor([1000.0, 700.0]),
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
            ).sample
    assert (velocities[1] - velocities[256]).square().mean() < 0.02 * velocities[1].square().mean()


def test_the_text_is_read_as_the_teacher_reads_it(flow, teacher):
    """The teacher's layers are frozen: what the transformer is told are its states before the last normalisation."""
    input_ids = tokenize(teacher.tokenizer, ["a fox, noto style, on a mint background"])
    with torch.no_grad():
        states = flow.text_encoder(input_ids, output_hidden_states=True).hidden_states
        expected = teacher.text_encoder(input_ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[-2], expected[-1], atol=1e-5, rtol=1e-5)


def test_a_new_text_encoder_begins_as_its_teacher(teacher, monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.syspath_prepend(str(DEMO))
    spec = importlib.util.spec_from_file_location("train_flow_pipeline", DEMO / "train_flow_pipeline.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    first = script.first_text_encoder(teacher.text_encoder)
    encoders = torch.nn.ModuleList([first, script.second_text_encoder(first.config)])
    input_ids = tokenize(teacher.tokenizer, ["a bee", "a fox on a mint background"])
    conditions = script.encode_captions(encoders, input_ids, num_zeros=3)
    states = teacher.text_encoder(input_ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(conditions["prompt_embeds"][:, :-3, :256], states)
    assert conditions["prompt_embeds"].shape == (2, 27, 320) and not conditions["prompt_embeds"][:, -3:].any()
    assert conditions["pooled_prompt_embeds"].shape == (2, 192)

    # Only what comes behind the teacher learns.
    learning = script.trained_parameters(encoders)
    trained = {id(p) for module in learning for p in module.parameters()}
    assert trained == {id(p) for p in encoders.parameters() if p.requires_grad}
    assert not any(p.requires_grad for p in first.text_model.encoder.layers[:-1].parameters())

    # At sigma = 1 the exact velocity is the noise without the image: no loss; nothing else has none.
    latents = torch.randn(2, 4, 16, 16)
    exact = lambda z, timestep, **_: ((z - latents) / (timestep / 1000).view(-1, 1, 1, 1),)  # noqa: E731
    loss = script.training_step(latents, conditions, exact, torch.Generator().manual_seed(0))
    assert loss < 1e-6 < F.mse_loss(latents, torch.zeros_like(latents))
    for name in ("train_pipeline", "captions"):
        sys.modules.pop(name, None)
