import json

import pytest

from acpo_utils.evaluation.metrics import check_metric, is_guide, metric_labels, read_guides


def test_names_are_checked(tmp_path):
    (tmp_path / "iqa").mkdir()
    folder = tmp_path / "iqa"
    for spec in (
        "fid",
        "is",
        "kid",
        "kid:vgg",
        "swd",
        "st-lpips:alex",
        "ssim",
        "panel",
        "mse",
        "lpips-diversity",
        "hyperiqa",
        "maniqa",
        "clipscore",
        "pickscore",
    ):
        check_metric(spec)
    for spec in (f"ipce:{folder}", f"two-stream:{folder}", f"judge:{folder}", f"clipscore:{folder}", str(folder)):
        check_metric(spec)
    for spec in ("ipce:someone/on-the-hub", "pyiqa:musiq", "python:my.module:score"):
        check_metric(spec)
    for spec in (
        "fid:x",
        "kid:x",
        "st-lpips",
        "swd-64",
        "clipscores",
        "judge:nowhere",
        "ipce:nowhere",
        "ipce:",
        "pyiqa:",
        "",
        "clipscore:nowhere",
    ):
        with pytest.raises(ValueError, match=f"--metrics {spec}"):
            check_metric(spec)


def test_labels_are_short_and_different():
    specs = [
        "ipce:a/guide",
        "ipce:b/guide",
        "clipscore",
        "judge:x/judge",
        "kid:lite2",
        "pyiqa:musiq",
        "python:my.module:redness",
        "c/iqa/",
        "lpips-diversity",
    ]
    assert list(metric_labels(specs).values()) == [
        "ipce-guide",
        "ipce-guide-2",
        "clipscore",
        "judge",
        "kid:lite2",
        "musiq",
        "redness",
        "iqa",
        "diversity (shift-tolerant LPIPS)",
    ]


def test_guides_are_read_from_the_settings_or_from_the_model_card(tmp_path):
    from acpo_utils.training.hub import save_model_card

    assert read_guides(tmp_path) == []
    settings = {"evaluator": "ipce:iqa/ipce, pickscore", "quality_weight": 0.1}
    save_model_card(tmp_path, base_model="a/b", model_description="", tags=[], settings=settings)
    assert read_guides(tmp_path) == ["ipce:iqa/ipce", "pickscore"]
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    assert read_guides(tmp_path / "pytorch_lora_weights.safetensors") == ["ipce:iqa/ipce", "pickscore"]
    assert read_guides(tmp_path / "someone-on-the-hub") == []
    settings["quality_weight"] = 0.0
    save_model_card(tmp_path, base_model="a/b", model_description="", tags=[], settings=settings)
    assert read_guides(tmp_path) == [], "without quality loss nothing guided"
    (tmp_path / "args.json").write_text(json.dumps({"evaluator": ["two-stream:x"], "quality_weight": 1}))
    assert read_guides(tmp_path) == ["two-stream:x"]
    (tmp_path / "args.json").write_text(json.dumps({"evaluator": None, "quality_weight": 0}))
    assert read_guides(tmp_path) == []
    (tmp_path / "args.json").write_text("{torn")
    assert read_guides(tmp_path) == []


def test_a_guide_is_known_by_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("guide", "other"):
        (tmp_path / name).mkdir()
    absolute = f"ipce:{tmp_path / 'guide'}"
    assert is_guide("ipce:guide", [absolute]) and is_guide("guide/", [absolute]) and is_guide(absolute, ["guide"])
    assert not is_guide("ipce:other", [absolute]) and not is_guide("two-stream:guide", [absolute])
    assert is_guide("hyperiqa", ["x", "pyiqa:hyperiqa"]) and is_guide("pyiqa:maniqa", ["maniqa"])
    assert is_guide("clipscore", ["clipscore:local/copy"]) and not is_guide("pickscore", ["clipscore"])
    assert not is_guide("fid", [absolute]) and not is_guide("fid", []) and not is_guide("musiq", ["pyiqa:hyperiqa"])
    # Trained on another machine: by kind and last name.
    assert is_guide("ipce:guide", ["ipce:/home/someone/guide"]) and not is_guide("ipce:guide", ["ipce:/home/other"])
