"""Labelled faces for the two-stream evaluator: what the DDPM makes of a face, and what its label is."""

import re

import pytest


pytest.importorskip("skimage")

import build_face_ratings as script
import torch
from datasets import Dataset
from diffusers import DDIMPipeline
from torchvision.transforms.v2.functional import pil_to_tensor

from acpo_utils.evaluation.diversity import ShiftTolerantLPIPS
from tests.demo.kadid_table import write_kadid_table
from tests.tiny_models import tiny_ddim


class KnowsTheFaces(torch.nn.Module):
    """Predicts the noise that leads back to `faces`, one picture for all, whatever it is given."""

    def __init__(self, faces: torch.Tensor, scheduler):
        super().__init__()
        self.faces, self.alphas_cumprod, self.calls = faces, scheduler.alphas_cumprod, []

    def forward(self, samples, timestep):
        self.calls.append(int(timestep))
        abar = self.alphas_cumprod[timestep]
        noise = (samples - abar.sqrt() * (2 * self.faces - 1)) / (1 - abar).sqrt()
        return type("Output", (), {"sample": noise})


def test_a_face_is_sampled_from_its_timestep_to_the_end(tmp_path):
    pipeline = DDIMPipeline.from_pretrained(tiny_ddim(tmp_path))
    pipeline.scheduler.register_to_config(prediction_type="epsilon")
    face = torch.full((1, 3, 8, 8), 0.25)
    pipeline.unet = KnowsTheFaces(face, pipeline.scheduler)
    redrawn = script.redraw(pipeline, torch.rand(2, 3, 8, 8), [17, 19], torch.Generator().manual_seed(0))
    torch.testing.assert_close(redrawn, face.repeat(2, 1, 1, 1), rtol=0, atol=1e-5)
    assert pipeline.unet.calls == [100, 50, 0, 0]  # of 20 sampling timesteps the last three, then the last one


def test_little_noise_leaves_a_face_and_each_keeps_its_place(tmp_path):
    pipeline = DDIMPipeline.from_pretrained(tiny_ddim(tmp_path))
    side = pipeline.unet.config.sample_size
    faces = torch.rand(5, 3, side, side)
    redrawn = script.redraw(pipeline, faces, [0, 19, 0, 19, 19], torch.Generator().manual_seed(0))
    change = (redrawn - faces).abs().mean((1, 2, 3))
    assert change[[1, 3, 4]].max() < 0.02 < 0.1 < change[[0, 2]].min()


def test_the_script(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "SAMPLING_STEPS", 2)
    write_kadid_table(tmp_path / "packages")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    load = script.load_dataset
    monkeypatch.setattr(script, "load_dataset", lambda *args, **more: load(*args, **more).select(range(24)))
    script.main(script.parse_args(["--output_dir", str(tmp_path / "made"), "--train_images", "20"]))
    far = float(re.search(r"distance between two faces: ([\d.]+)", capsys.readouterr().out).group(1))
    train, test = (Dataset.from_parquet(str(tmp_path / "made" / f"{split}.parquet")) for split in ("train", "test"))
    assert len(train) == 20 and set(train["reference"]) == {None} and len(test) == 12
    assert set(train["kind"]) <= set(script.KINDS) and len(set(train["kind"])) >= 3
    lpips = ShiftTolerantLPIPS("alex")
    best = 25 * 2.825  # the mean of `UNCHANGED` in the table that is written here
    for row in test:
        pictures = [pil_to_tensor(row[name])[None] / 255 for name in ("image", "reference")]
        distance = script.distances(lpips, *pictures).item()
        assert 0 <= row["mos"] <= 100
        if row["kind"] != "distorted":
            assert row["mos"] == pytest.approx(best * max(0, 1 - (distance / far) ** 0.5), abs=0.3)
            assert (distance < 1e-6) == (row["made_by"] == "nothing") == (row["kind"] == "real")
            assert ("from t = " in row["made_by"]) == (row["kind"] in ("redrawn", "mixture"))
            if row["kind"] == "cast":
                assert row["made_by"].startswith("nothing, a cast of ")


def test_no_rows_are_refused(capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--output_dir", "made", "--train_images", "0"])
    assert "--train_images: expected at least 1, found 0" in capsys.readouterr().err
