"""The model card and what of a training folder goes to the hub."""

import os
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects

from acpo_utils.lora import LORA_NAME
from acpo_utils.training.hub import IGNORE_PATTERNS, push_to_hub, save_model_card


CARD = {"base_model": "CompVis/stable-diffusion-v1-4", "model_description": "A LoRA.", "tags": ["lora", "acpo"]}


def test_card_holds_description_results_settings_and_usage(tmp_path):
    (tmp_path / LORA_NAME).touch()
    path = save_model_card(
        tmp_path,
        **CARD,
        license="apache-2.0",
        dataset="owner/captions",
        image_files=["comparison.png"],
        metrics="| guide | base |\n|---|---|\n| IPCE | 0.5 |",
        settings={"tmax": 100, "validation_prompt": "a | b"},
    )
    assert [file.name for file in tmp_path.iterdir() if file.name != LORA_NAME] == ["README.md"]
    card = ModelCard.load(path)
    assert card.data.base_model == CARD["base_model"] and card.data.datasets == ["owner/captions"]
    assert card.data.license == "apache-2.0" and set(CARD["tags"]) <= set(card.data.tags)
    for text in ("A LoRA.", "![comparison](comparison.png)", "| IPCE | 0.5 |", "| `tmax` | 100 |", "a \\| b"):
        assert text in card.text
    assert "load_lora_weights" in card.text and "TODO" not in card.text


def test_local_paths_stay_out_of_the_metadata_that_the_hub_checks(tmp_path):
    local = {"base_model": str(tmp_path / "pipeline"), "dataset": str(tmp_path)}
    card = ModelCard.load(save_model_card(tmp_path, **CARD | local, settings={}))
    assert card.data.base_model is None and card.data.datasets is None
    assert local["base_model"] in card.text and local["dataset"] in card.text
    assert "load_lora_weights" not in card.text  # no LoRA in this folder


def test_a_second_run_replaces_the_card(tmp_path):
    save_model_card(tmp_path, **CARD, settings={"seed": 1})
    card = save_model_card(tmp_path, **CARD, settings={"seed": 2}).read_text()
    assert "| `seed` | 2 |" in card and "| `seed` | 1 |" not in card


def test_checkpoints_and_temporary_files_are_not_uploaded():
    kept = [LORA_NAME, "README.md", "comparison.png", "metrics.json", "logs/run/events.out.tfevents.1"]
    kept += ["stage-1/metrics.json", "stage-1/scatter.png"]
    left = ["checkpoint-4/optimizer.bin", "checkpoint-6.tmp/model.safetensors", ".metrics.1.tmp.json"]
    left += ["best/model.safetensors", "stage-1/model.safetensors"]  # the same weights once more
    assert list(filter_repo_objects(kept + left, ignore_patterns=IGNORE_PATTERNS)) == kept


@pytest.mark.skipif(os.environ.get("HF_HUB_OFFLINE") != "1", reason="would reach for the hub")
def test_failed_upload_is_one_line_and_keeps_the_files(tmp_path):
    save_model_card(tmp_path, **CARD, settings={})
    with pytest.raises(ValueError, match="was not uploaded") as error:
        push_to_hub(tmp_path, "owner/name", token="hf_x", commit_message="End of training")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert Path(tmp_path, "README.md").is_file()
