"""Which decode to take: the comparison of gradients, its cost, and what is chosen."""

import json

import measure_decode as script
import pytest
import torch

from tests.launching import EXAMPLES, command_line, launch, refused, run_script
from tests.tiny_models import tiny_klein_vae, tiny_taesd


SCRIPT = EXAMPLES / "measure_decode.py"


@pytest.fixture
def flags(tiny_pipeline, tiny_guide, captioned_images, tmp_path):
    def build(**changes):
        options = {
            "pretrained_model_name_or_path": tiny_pipeline,
            "evaluator": f"ipce:{tiny_guide}",
            "train_data_dir": captioned_images,
            "resolution": 32,
            "num_images": 3,
            "batch_size": 2,
            "repetitions": 1,
            "device": "cpu",
            "output_file": tmp_path / "decode.json",
        }
        return command_line(**(options | changes))

    return build


def test_every_decode_is_compared_with_the_full_one(flags, tmp_path):
    tiny_taesd().save_pretrained(tmp_path / "taesd")
    # No decode of these random networks is near another: any will do, so that the fastest is taken.
    options = {"tiny_vae_name_or_path": tmp_path / "taesd", "decode_size": [16, 24], "least_cosine": -1}
    printed = run_script(SCRIPT, *flags(**options))
    found = json.loads((tmp_path / "decode.json").read_text())
    rows = {row["decode"]: row for row in found["rows"]}
    full, tiny = rows["full"], rows["tiny"]
    assert full["cosine"] == pytest.approx(1) and full["error"] == 0 and full["TFLOP"] > 0 and full["GiB"] > 0
    assert rows["full in bf16"]["TFLOP"] == full["TFLOP"] and rows["full in bf16"]["GiB"] < 0.7 * full["GiB"]
    assert 0 < rows["full in bf16"]["error"] < 2 and rows["full in bf16"]["cosine"] > 0.9
    in_bf16, by_tiny = (rows[f"straight through, backward {how}"] for how in ("in bf16", "by the tiny VAE"))
    assert in_bf16["error"] == by_tiny["error"] == 0 and in_bf16["cosine"] > 0.99
    assert tiny["error"] > 1 and tiny["cosine"] < 0.9 and by_tiny["cosine"] < 0.9
    assert (
        tiny["TFLOP"] < by_tiny["TFLOP"] < full["TFLOP"] / 2 + tiny["TFLOP"]
    )  # attention's backward is the dearer half
    assert rows["crop, 16 px"]["TFLOP"] < rows["crop, 24 px"]["TFLOP"] < full["TFLOP"]
    assert rows["crop, 24 px"]["error"] > 0 and rows["crop, 24 px"]["cosine"] < 1
    assert 0 < rows[script.ROUNDED]["error"] < 0.5
    assert all(row["cosine_10"] <= row["cosine"] + 1e-6 <= row["cosine_90"] + 2e-6 for row in rows.values())
    fastest = min((row for row in rows.values() if row["flags"]), key=lambda row: row["seconds"])
    assert found["take"] == fastest["flags"]
    assert f"Take {fastest['flags']}:" in printed and "| tiny" in printed and "Rounding the image to 8 bits" in printed


def test_the_comparison_is_of_the_seed_and_not_of_the_batches(flags, tmp_path):
    """Noise and windows are drawn for each batch: one image is a batch of its own."""
    found = []
    for _ in range(2):
        script.main(script.parse_args(flags(num_images=1, decode_size=16)))
        found.append(json.loads((tmp_path / "decode.json").read_text())["rows"])
    first, second = ([(row["cosine"], row["error"]) for row in rows] for rows in found)
    assert first == second
    assert "tiny" not in {row["decode"] for row in found[0]}


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "z_image", "klein"])
def test_every_family(flags, tmp_path, family, request):
    model = request.getfixturevalue(f"tiny_{family}_pipeline")
    args = script.parse_args(flags(pretrained_model_name_or_path=model, num_images=1))
    script.main(args)
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert rows[0]["cosine"] == pytest.approx(1) and args.tmax == (100 if family == "sdxl" else 250)
    assert [row["decode"] for row in rows if row["decode"].startswith("crop")] == ["crop, 24 px", "crop, 16 px"]


def test_the_small_decoder_of_flux2_and_a_model_in_bf16(flags, tmp_path, tiny_klein_pipeline):
    pytest.importorskip("diffusers", minversion="0.38")  # which knows a narrower decoder
    tiny_klein_vae(seed=5, decoder_block_out_channels=(8, 8)).save_pretrained(tmp_path / "small")
    options = {"pretrained_model_name_or_path": tiny_klein_pipeline, "num_images": 1, "mixed_precision": "bf16"}
    args = script.parse_args(flags(tiny_vae_name_or_path=tmp_path / "small", **options))
    pipeline = script.load_pipeline(args)
    assert (pipeline.transformer.dtype, pipeline.vae.dtype) == (torch.bfloat16, torch.float32)
    exact = tiny_klein_vae().state_dict()
    assert all(torch.equal(weight, exact[name]) for name, weight in pipeline.vae.state_dict().items()), "never rounded"
    script.main(args)
    rows = {row["decode"]: row for row in json.loads((tmp_path / "decode.json").read_text())["rows"]}
    by_small = rows["straight through, backward by the tiny VAE"]
    assert by_small["error"] == 0 and rows["tiny"]["error"] > 1 and rows["tiny"]["TFLOP"] < rows["full"]["TFLOP"]


def test_cosine_and_error_of_a_window_are_of_what_is_in_it():
    images = torch.zeros(1, 3, 8, 8)
    gradient = torch.zeros(1, 4, 4, 4)
    gradient[..., 1, 2], gradient[..., 0, 0] = 1.0, 5.0  # inside the window, and outside
    decode = script.Decode(run=None, window=(1, 1, 2))
    other = torch.zeros_like(gradient)
    other[..., 1, 2], other[..., 2, 1] = 3.0, 4.0
    found = (torch.full((1, 3, 4, 4), 2 / 255), other)
    (cosine,), (error,) = script.compare(decode, (images, gradient), found, factor=2)
    assert cosine == pytest.approx(3 / 5) and error == pytest.approx(2)
    (cosine,), _ = script.compare(script.Decode(run=None), (images, gradient), (images, other), factor=2)
    assert cosine == pytest.approx(3 / (26**0.5 * 5))


def test_the_window_alone_has_a_gradient_and_rounding_lets_it_through():
    latents = torch.rand(1, 4, 6, 6, requires_grad=True)
    script.cut(latents, (1, 2, 3)).sum().backward()
    assert latents.grad[..., 1:4, 2:5].eq(1).all() and latents.grad.sum() == 4 * 9
    images = torch.rand(1, 3, 4, 4, requires_grad=True)
    rounded = script.rounded(images)
    torch.testing.assert_close(255 * rounded, (255 * images).round())
    assert torch.autograd.grad(rounded.sum(), images)[0].eq(1).all()


def test_the_fastest_that_points_well_enough_is_taken():
    rows = [
        {"decode": "a", "flags": "full", "cosine": 1.0, "seconds": 2.0, "GiB": 4.0},
        {"decode": "b", "flags": "bf16", "cosine": 0.92, "seconds": 1.0, "GiB": 2.0},
        {"decode": "c", "flags": "straight", "cosine": 0.98, "seconds": 3.0, "GiB": 2.0},
        {"decode": "d", "flags": "tiny", "cosine": 0.4, "seconds": 0.1, "GiB": 0.1},
        {"decode": script.ROUNDED, "flags": None, "cosine": 0.99, "seconds": 0.5, "GiB": 4.0},
    ]
    assert script.choose(rows, 0.9)["flags"] == "bf16"
    assert script.choose(rows, 0.95)["flags"] == "full"
    assert script.choose(rows, 0.3)["flags"] == "tiny"
    assert script.choose(rows, 0.9, by="GiB")["flags"] == "straight", "of equal ones the better"
    rounded, taken, small = script.advice(rows, 0.9).splitlines()
    assert "a cosine of 0.99" in rounded and taken.startswith("Take bf16:") and "straight: 0.50" in small
    assert len(script.advice(rows, 0.3).splitlines()) == 2, "the fastest is the smallest"
    rows[0]["cosine"] = 0.9999999
    assert script.choose(rows, 1.0)["flags"] == "full", "whatever is asked"


BAD_INPUT = {
    "no guide": ({"evaluator": None}, "give an --evaluator"),
    "no model": ({"pretrained_model_name_or_path": "no/such/model"}, "expected a pipeline (hub id or folder with"),
    "no data": ({"train_data_dir": None}, "Expected one of --dataset_name and --train_data_dir"),
    "window": ({"decode_size": 15}, "--decode_size must be a multiple of 2"),
    "number": ({"num_images": 0}, "--num_images: expected at least 1, found 0"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line(flags, case):
    changes, expected = BAD_INPUT[case]
    assert expected in refused(SCRIPT, *flags(**changes))


def test_another_kind_of_pipeline_is_refused(flags, tmp_path):
    from tests.tiny_models import tiny_ddpm

    assert "it is a DDPMPipeline, whose images are not decoded" in refused(
        SCRIPT, *flags(pretrained_model_name_or_path=tiny_ddpm(tmp_path / "ddpm"))
    )


def test_launched_it_names_the_flags(flags):
    assert "Take --de" in launch(SCRIPT, *flags(num_images=1))
