"""The published prompt sets, on small local files of the same form as the ones that are downloaded."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from acpo_utils.data.prompt_sets import Prompt, read_prompt_set


def texts(prompts):
    return [prompt.text for prompt in prompts]


def write_parquet(path, **columns):
    parquet.write_table(pyarrow.table(columns), path)


def test_drawbench_as_parquet_and_as_csv(tmp_path):
    write_parquet(
        tmp_path / "test.parquet", prompts=["A red car.", "A cat on a dog."], category=["Colors", "Conflicting"]
    )
    (tmp_path / "drawbench.csv").write_text('Prompts,Category\n"A red car, parked.",Colors\n')
    assert read_prompt_set(f"drawbench:{tmp_path / 'test.parquet'}") == [
        Prompt("DrawBench", 0, "A red car."),
        Prompt("DrawBench", 1, "A cat on a dog."),
    ]
    assert texts(read_prompt_set(f"DrawBench:{tmp_path / 'drawbench.csv'}")) == ["A red car, parked."]


def test_parti_prompts(tmp_path):
    rows = [
        "Prompt\tCategory\tChallenge\tNote",
        "bond\tAbstract\tBasic\tBiology",
        "a cat, and a dog\tAnimals\tBasic\t",
    ]
    (tmp_path / "PartiPrompts.tsv").write_text("\n".join(rows) + "\n")
    prompts = read_prompt_set(f"partiprompts:{tmp_path / 'PartiPrompts.tsv'}")
    assert texts(prompts) == ["bond", "a cat, and a dog"] and prompts[0].set == "PartiPrompts"


def test_diffusiondb_leaves_out_repetitions_and_unsafe_prompts(tmp_path):
    prompt = ["a castle", "a castle", "a nude", None, "a ship ", ""]
    write_parquet(
        tmp_path / "metadata.parquet", prompt=prompt, prompt_nsfw=[0.1, 0.1, 0.9, 0.0, 0.2, 0.0], seed=[1] * 6
    )
    prompts = read_prompt_set(f"diffusiondb:{tmp_path / 'metadata.parquet'}")
    assert texts(prompts) == ["a castle", "a ship"]


@pytest.mark.parametrize("key", ["id", "image_id"])
def test_region_phrases_of_visual_genome(tmp_path, key):
    images = [
        {key: 1, "regions": [{"region_id": 5, "phrase": "a gray  desk\n"}, {"region_id": 6, "phrase": "the wall"}]},
        {key: 2, "regions": []},
        {key: 3, "regions": [{"region_id": 7, "phrase": "the wall"}, {"region_id": 8, "phrase": "a window é"}]},
    ]
    (tmp_path / "regions.json").write_text(json.dumps(images, indent=1))
    assert texts(read_prompt_set(f"visual-genome:{tmp_path / 'regions.json'}")) == [
        "a gray desk",
        "the wall",
        "a window é",
    ]


def test_a_choice_is_repeated_by_its_seed_and_keeps_every_prompts_row(tmp_path):
    (tmp_path / "mine.txt").write_text("".join(f"prompt {i}\n" for i in range(50)))
    path = str(tmp_path / "mine.txt")
    everything = read_prompt_set(path)
    assert [(p.set, p.row, p.text) for p in everything] == [("mine", i, f"prompt {i}") for i in range(50)]
    ten = read_prompt_set(path, max_prompts=10, seed=3)
    assert ten == read_prompt_set(path, max_prompts=10, seed=3)
    assert ten != read_prompt_set(path, max_prompts=10, seed=4)
    assert all(p in everything for p in ten) and len(set(ten)) == 10
    assert read_prompt_set(path, max_prompts=20, seed=3)[:10] == ten, "a larger choice begins with the smaller one"
    assert read_prompt_set(path, max_prompts=50) == everything


BAD = {
    "visual genome": ("visual-genome:x.json", '{"a": 1}', "expected a list of images"),
    "torn json": ("visual-genome:x.json", '[{"id": 1, "regions": []}, {"id"', "malformed JSON in image 2"),
    "no regions": ("visual-genome:x.json", '[{"id": 1}]', "image 1: expected"),
    "no phrase": ("visual-genome:x.json", '[{"id": 1, "regions": []}]', "expected at least one prompt"),
    "parti column": ("partiprompts:x.tsv", "Category\tNote\nA\tB\n", "expected text in column `prompt`"),
    "no parquet": ("diffusiondb:x.parquet", "hello", "damaged or no parquet file"),
    "no file": ("drawbench:none.csv", "", "expected the file none.csv"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named_in_one_line(tmp_path, monkeypatch, case):
    spec, content, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    if "none" not in spec:
        (tmp_path / spec.partition(":")[2]).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_prompt_set(spec)
    assert "\n" not in str(error.value)


def test_diffusiondb_without_its_columns(tmp_path):
    write_parquet(tmp_path / "m.parquet", text=["a"])
    with pytest.raises(ValueError, match="expected columns prompt and prompt_nsfw, found text"):
        read_prompt_set(f"diffusiondb:{tmp_path / 'm.parquet'}")


def test_without_network_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match="PartiPrompts.tsv of the data set nateraw/parti-prompts .* partiprompts:PATH"
    ):
        read_prompt_set("partiprompts")
    with pytest.raises(ValueError, match="expected visual-genome:PATH"):
        read_prompt_set("visual-genome")
