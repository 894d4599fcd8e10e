"""examples/prepare_visual_genome.py on a small file and image folders of Visual Genome's form."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import prepare_visual_genome as script
import pytest
from PIL import Image

from acpo_utils.data import check_images, load_captioned_images
from tests.launching import EXAMPLES, refused, run_script


SCRIPT = EXAMPLES / "prepare_visual_genome.py"
PHRASES = {
    1: ["the clock is green", "a very  tall\nclock tower in town", "sky"],
    2: ["a dog"],
    713: ["two cups", "a café table", ""],
    2409: ["grass", "green grass in the park", "a bench"],
    5: [],  # no phrase
    99: ["an image that was not downloaded"],
}


@pytest.fixture
def genome(tmp_path):
    entries = []
    for image_id, phrases in PHRASES.items():
        box = {"image_id": image_id, "x": 4, "y": 5, "width": 30, "height": 20}
        regions = [{"region_id": 10 * image_id + i, **box, "phrase": text} for i, text in enumerate(phrases)]
        entries.append({"id" if image_id % 2 else "image_id": image_id, "regions": regions})
    (tmp_path / "region_descriptions.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")
    for folder, images in {"VG_100K": [1, 2, 5], "VG_100K_2": [713, 2409, 77]}.items():
        (tmp_path / folder).mkdir()
        for image_id in images:
            Image.new("RGB", (24, 16), (image_id % 256, 0, 0)).save(tmp_path / folder / f"{image_id}.jpg")
    return tmp_path


@pytest.fixture
def flags(genome, monkeypatch):
    """The command line, in the folder of `genome`."""
    monkeypatch.chdir(genome)

    def build(*more, images=("VG_100K", "VG_100K_2"), json_name="region_descriptions.json", output="out"):
        words = ["--region_descriptions", json_name, "--output_dir", output, "--image_dirs", *images]
        return [*words, *map(str, more)]

    return build


def captions(folder) -> dict[str, str]:
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(os.listdir(folder)) == sorted(["metadata.jsonl", *(row["file_name"] for row in rows)])
    return {row["file_name"]: row["text"] for row in rows}


@pytest.mark.parametrize("link", [None, "hard", "symbolic"])
def test_longest_phrase_of_each_image_and_the_result_loads(genome, flags, link):
    out = run_script(SCRIPT, *flags("--phrase", "longest", *(["--link", link] if link else [])))
    assert "4 images" in out and "1 without a file, 1 without a phrase" in out
    expected = {
        "1.jpg": "a very tall clock tower in town",
        "2.jpg": "a dog",
        "713.jpg": "a café table",
        "2409.jpg": "green grass in the park",
    }
    assert captions(genome / "out") == expected
    source, target = genome / "VG_100K" / "1.jpg", genome / "out" / "1.jpg"
    assert target.is_symlink() == (link == "symbolic")
    assert source.samefile(target) == (link is not None)
    assert target.read_bytes() == source.read_bytes()

    dataset = load_captioned_images(train_data_dir=str(genome / "out"), cache_dir=str(genome / "cache"))
    assert sorted(check_images(dataset, "image")["text"]) == sorted(expected.values())
    rows = datasets.load_dataset("imagefolder", data_dir=str(genome / "out"), cache_dir=str(genome / "cache"))["train"]
    assert {row["text"]: row["image"].size for row in rows} == dict.fromkeys(expected.values(), (24, 16))


def test_sampled_phrases_depend_on_the_seed_and_the_image_alone(genome, flags):
    def sampled(seed, *more):
        output = f"out-{seed}-{len(more)}"
        run_script(SCRIPT, *flags("--seed", seed, *more, output=output))
        return captions(genome / output)

    runs = [sampled(seed) for seed in range(5)]
    for result in runs:
        for name, text in result.items():
            assert text in [" ".join(phrase.split()) for phrase in PHRASES[int(Path(name).stem)] if phrase]
    assert len({result["2409.jpg"] for result in runs}) > 1
    subset = sampled(0, "--max_images", 2)
    assert len(subset) == 2 and subset.items() <= runs[0].items()


def test_errors_are_one_line_and_leave_no_output(genome, flags):
    (genome / "empty").mkdir()
    text = (genome / "region_descriptions.json").read_text()
    (genome / "cut.json").write_text(text[: text.index("two cups")])
    (genome / "object.json").write_text('{"id": 1}')
    (genome / "other.json").write_text('[{"id": 1, "attributes": []}]')
    (genome / "none.json").write_text('[{"id": 99, "regions": [{"phrase": "a"}]}]')
    line = text[: text.index("two cups")].count("\n") + 1
    for options, message in [
        ({"json_name": "nowhere.json"}, "nowhere.json: expected the file"),
        ({"json_name": "cut.json"}, f"cut.json: malformed JSON in image 3, line {line}"),
        ({"json_name": "object.json"}, "object.json: expected a list of images"),
        ({"json_name": "other.json"}, "other.json: image 1: expected"),
        ({"json_name": "none.json"}, "1 have no file"),
        ({"images": ["VG_100K", "VG_100K_3"]}, "expected the folder VG_100K_3"),
        ({"images": ["empty"]}, "expected IMAGE_ID.jpg files in empty"),
        ({"output": "VG_100K"}, "--output_dir VG_100K exists"),
    ]:
        assert message in refused(SCRIPT, *flags(**options)), options
    assert "--max_images: expected at least 1" in refused(SCRIPT, *flags("--max_images", 0))
    assert not (genome / "out").exists() and not (genome / ".out.tmp").exists()


def test_archives_are_named(genome, flags):
    """Both downloads are one, and the folders' names are easily taken for the files'."""
    for name in ("regions.json.zip", "images.zip"):
        (genome / name).write_bytes(b"PK\3\4")
    message = refused(SCRIPT, *flags(json_name="regions.json.zip"))
    assert "regions.json.zip: expected UTF-8 text, found a zip archive: unpack it" in message
    message = refused(SCRIPT, *flags(images=["images.zip"]))
    assert "--image_dirs images.zip: expected a folder, found a file: unpack it" in message


def test_brackets_links_and_capitals(genome, flags):
    (genome / "VG_100K_2" / "713.jpg").rename(genome / "VG_100K_2" / "713.JPG")
    (genome / "VG_100K").rename(genome / "far")
    (genome / "VG [1]").symlink_to(genome / "far", target_is_directory=True)
    out = run_script(SCRIPT, *flags(images=("VG [1]", "VG_100K_2"), output="out [1]"))
    assert captions(genome / "out [1]").keys() == {"1.jpg", "2.jpg", "713.jpg", "2409.jpg"}
    assert "1 without an entry in region_descriptions.json, 0 by --max_images" in out
    rows = load_captioned_images(train_data_dir=str(genome / "out [1]"))
    assert len(check_images(rows, "image")) == 4


def test_the_command(genome, flags):
    """The script in a process of its own."""
    done = subprocess.run([sys.executable, SCRIPT, *flags()], cwd=genome, capture_output=True, text=True)
    assert done.returncode == 0 and "4 images with a caption each" in done.stdout, done.stderr
    assert refused(SCRIPT, *flags()) == "error: --output_dir out exists: remove it or name another."
    with pytest.raises(SystemExit) as stopped:
        script.parse_args(flags("--max_images", 0))
    assert stopped.value.code == 2
