import json

import numpy as np
import pytest
import torch
from PIL import Image

from acpo_utils.evaluation.manifest import ImageManifest, model_fingerprint


MADE_FROM = {"model": "abc", "prompt": "a fox é", "seed": [0, 1], "resolution": None}


def picture(value=0.5):
    return torch.full((3, 4, 5), value)


def test_what_is_finished_and_what_is_made_again(tmp_path):
    manifest = ImageManifest(tmp_path)
    assert not manifest.is_finished("a.png", MADE_FROM)
    manifest.save("a.png", picture(), MADE_FROM)
    again = ImageManifest(tmp_path)
    assert again.is_finished("a.png", MADE_FROM | {"seed": (0, 1)})  # as JSON has it
    for change in ({"model": "abd"}, {"prompt": "a fox"}, {"seed": [0, 2]}, {"resolution": 64}, {"new": 1}):
        assert not again.is_finished("a.png", MADE_FROM | change)
    assert not again.is_finished("b.png", MADE_FROM)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:-3])
    assert not again.is_finished("a.png", MADE_FROM)
    (tmp_path / "a.png").write_bytes(whole)
    assert again.is_finished("a.png", MADE_FROM)
    (tmp_path / "a.png").unlink()
    assert not again.is_finished("a.png", MADE_FROM)


def test_pixels_are_rounded_and_grey_is_rgb(tmp_path):
    image = torch.tensor([[[0.0, 0.5, 1.0, 1.2, 100 / 255]]])  # (1, 1, 5)
    ImageManifest(tmp_path).save("grey.png", image, MADE_FROM)
    with Image.open(tmp_path / "grey.png") as saved:
        assert saved.mode == "RGB"
        assert np.asarray(saved)[0].tolist() == [[v] * 3 for v in (0, 128, 255, 255, 100)]


def test_several_processes_and_a_run_that_was_killed_while_writing(tmp_path):
    first, second = ImageManifest(tmp_path, 0), ImageManifest(tmp_path, 1)
    first.save("a.png", picture(0.1), MADE_FROM)
    second.save("b.png", picture(0.2), MADE_FROM)
    with open(tmp_path / "manifest-1.jsonl", "a") as file:
        file.write('{"file": "c.png", "sha2')
    resumed = ImageManifest(tmp_path, 1)
    assert resumed.is_finished("a.png", MADE_FROM) and resumed.is_finished("b.png", MADE_FROM)
    assert not resumed.is_finished("c.png", MADE_FROM)
    resumed.save("c.png", picture(0.3), MADE_FROM)
    assert ImageManifest(tmp_path).is_finished("c.png", MADE_FROM)

    ImageManifest(tmp_path).merge({"a.png": MADE_FROM, "c.png": MADE_FROM})
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["manifest.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == ["a.png", "b.png", "c.png"]
    assert all(ImageManifest(tmp_path).is_finished(name, MADE_FROM) for name in ("a.png", "b.png", "c.png"))


def test_an_image_made_again_replaces_its_line(tmp_path):
    manifest = ImageManifest(tmp_path)
    manifest.save("a.png", picture(0.1), MADE_FROM)
    other = MADE_FROM | {"seed": [5, 1]}
    manifest.save("a.png", picture(0.9), other)
    assert manifest.is_finished("a.png", other) and not manifest.is_finished("a.png", MADE_FROM)
    manifest.merge({"a.png": other})
    assert len((tmp_path / "manifest.jsonl").read_text().splitlines()) == 1
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="a.png is not what was written there"):
        manifest.merge({"a.png": other})


def test_fingerprint_sees_values_names_types_and_nothing_else():
    def layer(seed=0, **kwargs):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to(**kwargs)

    same = model_fingerprint(layer())
    assert len(same) == 16 and model_fingerprint(layer().eval().requires_grad_(False)) == same
    assert model_fingerprint(layer(1)) != same
    assert model_fingerprint(layer(dtype=torch.bfloat16)) != same
    assert model_fingerprint(layer(), layer()) != same
    changed = layer()
    changed[0].bias.data[1] += 1e-6
    assert model_fingerprint(changed) != same
    renamed = torch.nn.ModuleDict({"0": layer()[0], "one": layer()[1]})
    assert model_fingerprint(renamed) != same
